//! The MQTT 3.1.1 server inside the broker, used unless `mqtt.broker_url` names another one.
//!
//! The way of a client: a [`handshake_limiter`] permit, [`handshake`] (TLS, CONNECT, [`users`] and their [`password`]),
//! a client slot of the [`broker`], and then [`connection`], which moves packets between the socket and its
//! [`session`]. A session publishes and subscribes as [`acl`] allows; [`quota`] limits the resources of one user.
//! Published messages go through the [`log`], the only file that knows rumqttd, and into [`retained`] if they are to be
//! retained. No client publishes more than the others can read, see [`progress`]. [`client_problems`] has the clients
//! that were refused, or that replace each other, for operators.
//!
//! Owners: [`broker::MessageBroker`] has the log, the retained messages, the wills and the client slots, for all
//! connections; each connection owns its session; [`retained_store`] owns the file. Tasks: one accept loop for each of the
//! two endpoints (the configured address, and one for this broker alone), one task for each connection, and the writer of
//! the file. Threads: two for all clients, one for this broker's own connections, which no crowd of clients can hold up,
//! one at each endpoint that verifies passwords, and rumqttd's router.
//!
//! The service manager restarts the broker if the server is stuck: if the broker's own session, which sends echoes
//! through the router, stays without a connection.
//!
//! Previous stop: workers and other brokers, over TCP. Next stop: [`crate::bus`], which connects like any client, to the
//! endpoint of its own ([`MqttServer::access`]).

pub(crate) mod acl;
mod broker;
mod client_problems;
mod connection;
pub(crate) mod filter;
mod handshake;
mod handshake_limiter;
mod log;
mod login_queue;
mod message;
mod metrics;
pub mod password;
mod progress;
mod quota;
mod refusal_log;
mod refused_clients;
mod retained;
pub(crate) mod retained_store;
mod session;
mod subscriptions;
mod takeovers;
mod users;
mod wrong_passwords;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use bytes::BytesMut;
use parking_lot::Mutex;
use rumqttc::{ConnAck, ConnectReturnCode, Packet};
use tokio::net::TcpStream;
use tokio::runtime::{self, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use wgkex_common::config::{Credentials, Mqtt, MqttAddress, MqttListen};
use wgkex_common::http::listener::{is_listening, prepare};
use wgkex_common::runtime::services::Ended;
use wgkex_common::tls::TlsError;

use self::broker::{ClientSlot, MessageBroker};
use self::connection::{ClientConnection, ConnectionEnd};
use self::handshake::{AdmittedClient, ClientStream, ConnectRefusal, LOGIN_TIMEOUT, MqttEndpoint, RefusedConnection};
use self::handshake_limiter::{HandshakeLimiter, HandshakePermit};
use self::message::PublishedMessage;
use self::quota::{Cost, LOGIN_COST, LogThrottle};
use self::refusal_log::RefusalLog;
use self::retained_store::File;
use self::session::ClientSession;
use self::users::Users;
use crate::tls::Certificate;

pub use self::client_problems::ClientProblems;
pub use self::metrics::Metrics;
pub use self::refused_clients::RefusedClient;

/// The most connections of this broker itself: two, and two that are about to end.
const OWN_MAX: usize = 4;
/// The threads that serve all clients but this broker itself. One may have to wait for the router.
const THREADS: usize = 2;
/// The shortest time between two warnings that no connection can be accepted.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);
/// How long to wait before the next `accept` when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the server may take to stop.
const THREAD_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The server, on threads of its own.
pub struct MqttServer {
    own: SocketAddr,
    credentials: Credentials,
    problems: ClientProblems,
    certificate: Option<Arc<Certificate>>,
    stop: CancellationToken,
    /// Sent once.
    ended: Option<oneshot::Receiver<()>>,
}

impl MqttServer {
    /// Starts to serve; the messages that were retained in `dir` are there again. The error names the key that has to be changed.
    pub fn start(config: &MqttListen, dir: &Path, metrics: &Metrics) -> anyhow::Result<Self> {
        let public = bind(config.address)?;
        let own = bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = own.local_addr().context("mqtt_listen")?;
        let (own_users, credentials) = Users::own()?;
        let certificate = config.tls.clone().map(certificate).transpose()?;
        let tls = certificate.as_ref().map(acceptor).transpose()?;
        let room = config.max_connections + 2;
        let endpoint = MqttEndpoint { users: Users::new(config)?, tls, room };
        let own_endpoint = MqttEndpoint { users: own_users, tls: None, room: room + OWN_MAX };

        let (file, retained) = File::open(dir)?;
        let (users, has_tls, kept) = (config.users.len(), config.tls.is_some(), retained.len());
        let broker = Arc::new(MessageBroker::open(retained, room + OWN_MAX, metrics.clone())?);
        let problems = broker.problems.clone();
        let server = Context { broker, refusals: Arc::default(), metrics: metrics.clone() };
        let (stop, ended) = server.start((public, endpoint), (own, own_endpoint), file)?;
        info!(mqtt_listen = %config.address, users, tls = has_tls, retained = kept, "MQTT server started");
        Ok(Self { own: address, credentials, problems, certificate, stop, ended: Some(ended) })
    }

    /// Returns when it ends without having been stopped.
    pub async fn ended(&mut self) -> Ended {
        if let Some(ended) = &mut self.ended {
            let _ = ended.await;
        }
        self.ended = None;
        Ended("the MQTT server")
    }

    /// How this broker itself connects: to a separate endpoint, which has no TLS, and room however many clients connect
    /// to the other one.
    #[must_use]
    pub fn access(&self, mqtt: &Mqtt) -> Mqtt {
        Mqtt { server: MqttAddress::Own(self.own), credentials: Some(self.credentials.clone()), ..mqtt.clone() }
    }

    /// The clients that it had trouble with.
    #[must_use]
    pub fn problems(&self) -> ClientProblems {
        self.problems.clone()
    }

    /// The certificate of its TLS, which is to be watched.
    #[must_use]
    pub fn certificate(&self) -> Option<Arc<Certificate>> {
        self.certificate.clone()
    }

    /// Ends it: the ports are free, all connections closed, and the retained messages are on disk. No will is published:
    /// clients reconnect to the next server, and the wills of those that do not are due then.
    pub async fn stop(self) {
        self.stop.cancel();
        if let Some(ended) = self.ended
            && timeout(THREAD_STOP_TIMEOUT, ended).await.is_err()
        {
            error!("the disk did not take the last retained messages in time");
        }
    }
}

fn certificate((cert_file, key_file): (PathBuf, PathBuf)) -> Result<Arc<Certificate>, TlsError> {
    Certificate::open("mqtt_listen.tls", cert_file, key_file)
}

/// Accepts TLS with this certificate.
fn acceptor(certificate: &Arc<Certificate>) -> Result<TlsAcceptor, TlsError> {
    Ok(Arc::new(certificate.server()?).into())
}

fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let listener = prepare(TcpListener::bind(address)?)?;
        listener.set_nonblocking(true)?;
        io::Result::Ok(listener)
    };
    bind().with_context(|| format!("mqtt_listen {address}"))
}

/// The state that every connection needs.
#[derive(Clone)]
struct Context {
    broker: Arc<MessageBroker>,
    refusals: Arc<Mutex<RefusalLog>>,
    metrics: Metrics,
}

impl Context {
    /// Runs on threads of its own until the token is cancelled; the channel is sent to when it has ended.
    fn start(
        self,
        public: (TcpListener, MqttEndpoint),
        own: (TcpListener, MqttEndpoint),
        file: File,
    ) -> anyhow::Result<(CancellationToken, oneshot::Receiver<()>)> {
        let (stop, (end, ended)) = (CancellationToken::new(), oneshot::channel());
        let stop_signal = stop.clone();
        let (starts, started) = mpsc::channel();
        thread::Builder::new().name("mqttd".into()).spawn(move || {
            match self.open(public, own) {
                Ok((runtime, own_runtime, endpoints)) => {
                    let _ = starts.send(Ok(()));
                    runtime.block_on(self.run(endpoints, file, stop_signal));
                    runtime.shutdown_background();
                    own_runtime.shutdown_background();
                }
                Err(error) => drop(starts.send(Err(error))),
            }
            // The receiver may have been dropped first.
            let _ = end.send(());
        })?;
        started.recv().context("the MQTT server does not start")??;
        Ok((stop, ended))
    }

    /// Accepts clients at both endpoints from now on.
    fn open(
        &self,
        public: (TcpListener, MqttEndpoint),
        own: (TcpListener, MqttEndpoint),
    ) -> anyhow::Result<(Runtime, Runtime, [JoinHandle<()>; 2])> {
        let (runtime, own_runtime) = (threads("mqtt", THREADS)?, threads("mqtt-own", 1)?);
        let open = |runtime: &Runtime, (listener, endpoint)| {
            let _entered = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener).context("mqtt_listen: nothing can be accepted");
            anyhow::Ok(runtime.spawn(self.clone().run_endpoint(listener?, Arc::new(endpoint))))
        };
        let endpoints = [open(&runtime, public)?, open(&own_runtime, own)?];
        Ok((runtime, own_runtime, endpoints))
    }

    /// Works until it is stopped, an endpoint fails, or the log ends.
    async fn run(self, mut endpoints: [JoinHandle<()>; 2], file: File, stop: CancellationToken) {
        let broker = self.broker.clone();
        let close = async {
            let [public, own] = &mut endpoints;
            tokio::select! {
                () = stop.cancelled() => {}
                _ = public => {}
                _ = own => {}
                () = broker.log_ended() => error!("the router of the MQTT server ended"),
            }
            endpoints.iter().for_each(JoinHandle::abort);
        };
        file.run(self.broker, close).await;
    }

    /// Accepts connections until the listener fails, or passwords are verified no longer.
    async fn run_endpoint(self, listener: tokio::net::TcpListener, endpoint: Arc<MqttEndpoint>) {
        tokio::select! {
            () = self.accept_loop(listener, endpoint.clone()) => {}
            () = endpoint.users.thread_ended() => error!("the thread that verifies passwords ended"),
        }
    }

    /// Accepts connections until the listener fails; they end with the runtime.
    async fn accept_loop(self, listener: tokio::net::TcpListener, endpoint: Arc<MqttEndpoint>) {
        let (limiter, warned) = (HandshakeLimiter::default(), LogThrottle::default());
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    let permit = limiter.acquire(address.ip());
                    tokio::spawn(self.clone().serve(stream, endpoint.clone(), permit));
                }
                Err(error) if !is_listening(&listener) => {
                    error!(listener = "mqtt_listen", %error, "listener failed");
                    return;
                }
                Err(error) => {
                    if warned.is_due(WARNING_INTERVAL) {
                        warn!(%error, "the MQTT server cannot take a connection");
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// One connection, from its first byte to its last.
    async fn serve(self, stream: TcpStream, endpoint: Arc<MqttEndpoint>, mut permit: HandshakePermit) {
        let evicted = permit.evicted();
        let entered = tokio::select! {
            entered = self.enter(stream, &endpoint, &mut permit) => entered,
            () = evicted.notified() => return self.refused(&ConnectRefusal::Evicted.into()),
        };
        drop(permit);
        let Some((stream, input, client, slot)) = entered else { return };
        let AdmittedClient { access, account, will, keep_alive, .. } = client;
        if let Some(will) = will {
            self.broker.set_will(&slot, will);
        }
        let mut output = BytesMut::new();
        let _ = Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false)).write(&mut output, usize::MAX);
        let session = ClientSession::new(access, account.is_own);
        let (broker, metrics) = (self.broker.clone(), self.metrics.clone());
        let start =
            connection::ConnectionParts { stream, input, output, session, account, keep_alive, broker, metrics };
        let connection = ClientConnection::new(start);
        let (end, log_reader) = connection.run(&slot).await;
        debug!(client = %slot, ?end, "MQTT client is gone");
        self.broker.unregister(slot, end != ConnectionEnd::Disconnect, log_reader).await;
    }

    /// Admits a client and gives it a slot, or sends it the reason why not.
    async fn enter(
        &self,
        stream: TcpStream,
        endpoint: &MqttEndpoint,
        permit: &mut HandshakePermit,
    ) -> Option<(Box<dyn ClientStream>, BytesMut, AdmittedClient, ClientSlot)> {
        let (stream, input, client) = match endpoint.admit(stream, permit).await {
            Ok(admitted) => admitted,
            Err(refused) => {
                self.refused(&refused);
                return None;
            }
        };
        permit.logged_in(&client.user);
        let bytes = client.will.as_ref().map_or(0, PublishedMessage::size) as u64;
        let wait = client.account.charge(Cost { work: LOGIN_COST, bytes }, Instant::now());
        let slot = timeout(LOGIN_TIMEOUT, async {
            sleep(wait).await;
            self.broker.register(&client.name, &client.account, endpoint.room).await
        });
        let refusal = match slot.await {
            Ok(Some(slot)) => return Some((stream, input, client, slot)),
            Ok(None) => ConnectRefusal::Full,
            Err(_) => ConnectRefusal::Busy,
        };
        self.refused(&RefusedConnection { is_user: true, user: Some(client.user), ..RefusedConnection::from(refusal) });
        refusal.send(stream).await;
        None
    }

    fn refused(&self, refused: &RefusedConnection) {
        self.metrics.refused.with_label_values(&[refused.refusal.reason()]).inc();
        let now = std::time::Instant::now();
        self.broker.problems.on_refused(refused, now);
        let Some(unlogged) = self.refusals.lock().line(refused, now) else { return };
        let RefusedConnection { user, client_id, cause, .. } = refused;
        if refused.is_noise() {
            info!(reason = %cause, unlogged, "MQTT client refused");
        } else {
            warn!(user, client = client_id, reason = %cause, unlogged, "MQTT client refused");
        }
    }
}

fn threads(name: &str, count: usize) -> anyhow::Result<Runtime> {
    let mut runtime = runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(count).thread_name(name).enable_all().build();
    runtime.context("the threads of the MQTT server do not start")
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::metrics::MetricsRegistry;

    /// Starts a server that accepts clients by `public`.
    fn start(
        dir: &Path,
        public: TcpListener,
    ) -> (Arc<MessageBroker>, anyhow::Result<(CancellationToken, oneshot::Receiver<()>)>) {
        let metrics = Metrics::register(&MetricsRegistry::default()).unwrap();
        let broker = Arc::new(MessageBroker::open(retained::RetainedMessages::default(), 10, metrics.clone()).unwrap());
        let endpoint = || MqttEndpoint { users: Users::own().unwrap().0, tls: None, room: 10 };
        public.set_nonblocking(true).unwrap();
        let server = Context { broker: broker.clone(), refusals: Arc::default(), metrics };
        let own = bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        (broker, server.start((public, endpoint()), (own, endpoint()), File::open(dir).unwrap().0))
    }

    /// Such a server would start and admit no client.
    #[test]
    fn a_listener_that_cannot_be_served_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("no socket")).unwrap();
        let (_broker, started) = start(dir.path(), OwnedFd::from(file).into());
        assert!(started.err().is_some_and(|error| error.to_string().contains("mqtt_listen")));
    }

    /// It would accept clients and deliver nothing.
    #[tokio::test]
    async fn the_server_ends_with_its_router() {
        let dir = tempfile::tempdir().unwrap();
        let (broker, started) = start(dir.path(), bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap());
        let (_stop, mut ended) = started.unwrap();
        assert!(timeout(Duration::from_millis(100), &mut ended).await.is_err(), "it serves");
        broker.break_log().await;
        timeout(Duration::from_secs(10), ended).await.expect("it ends").unwrap();
    }
}
