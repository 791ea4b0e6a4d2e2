//! The MQTT 3.1.1 server inside the broker: our own listener, sessions and retained messages, around rumqttd's router.
//!
//! Follow a client: [`pending`] has a place for it, [`admit`] lets it in, [`connection`] runs its [`session`], which says
//! and hears what it may on the [`bus`]. Behind that, [`router`] carries what is said to all who listen, and [`retained`]
//! keeps what is to be kept, on disk by [`file`]. [`quota`] is what one user may take, [`checks`] whose password is
//! verified next, and [`guesses`] how often one may be wrong.
//!
//! Threads: two for all clients, one for this broker's own connections, which no crowd of clients can hold up, one at
//! each door that verifies passwords, and the router's.

pub(crate) mod acl;
mod broker;
mod checks;
mod connection;
pub(crate) mod filter;
mod guesses;
mod handshake;
mod log;
mod message;
pub mod password;
mod pending;
mod quota;
mod retained;
mod retained_store;
mod session;
mod subscriptions;
mod users;

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use bytes::BytesMut;
use rumqttc::{ConnAck, ConnectReturnCode, Packet};
use tokio::net::TcpStream;
use tokio::runtime::{self, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};
use wgkex_common::config::{Credentials, Mqtt, MqttListen, Server};
use wgkex_common::http::connections::prepare;
use wgkex_common::runtime::process;
use wgkex_common::runtime::tasks::Ended;
use wgkex_common::runtime::tls::TlsError;

use self::broker::{Bus, Seat};
use self::connection::{Connection, End};
use self::handshake::{BUSY, Client, Door, EVICTED, FULL, PATIENCE, Stream};
use self::message::Message;
use self::pending::{Pending, Place};
use self::quota::{Cost, LOGIN, Rarely};
use self::retained_store::File;
use self::session::Session;
use self::users::Users;
use crate::metrics::Metrics;
use crate::tls::Certificate;

pub use self::connection::Slowed;
pub use self::handshake::Refusal;

/// This broker's own connections, two of which may be about to end.
const OWN: usize = 4;
/// The threads that serve all clients but this broker itself. One may have to wait for the router.
const THREADS: usize = 2;
/// How often it is said that no connection can be taken.
const WARN: Duration = Duration::from_secs(60);
/// How long to wait when the system has no more descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the end of the server may take.
const END: Duration = Duration::from_secs(1);

/// The server, on threads of its own.
pub struct Mqttd {
    own: SocketAddr,
    credentials: Credentials,
    over: watch::Sender<bool>,
    /// Says so once.
    ended: Option<oneshot::Receiver<()>>,
}

impl Mqttd {
    /// Starts to serve; what was kept in `dir` is there again. The error names the key that has to be changed.
    pub fn start(config: &MqttListen, dir: &Path, metrics: &Metrics) -> anyhow::Result<Self> {
        let public = bind(config.address)?;
        let own = bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = own.local_addr().context("mqtt_listen")?;
        let (own_users, credentials) = Users::own()?;
        let tls = config.tls.clone().map(acceptor).transpose()?;
        let room = config.max_connections + 2;
        let door = Door { users: Users::new(config)?, tls, room };
        let own_door = Door { users: own_users, tls: None, room: room + OWN };

        let (file, retained) = File::open(dir)?;
        let (users, has_tls, kept) = (config.users.len(), config.tls.is_some(), retained.len());
        let bus = Arc::new(Bus::open(retained, room + OWN, metrics.clone())?);
        let server = Serving { bus, metrics: metrics.clone() };
        let (over, ended) = server.start((public, door), (own, own_door), file)?;
        info!(mqtt_listen = %config.address, users, tls = has_tls, retained = kept, "MQTT server started");
        Ok(Self { own: address, credentials, over, ended: Some(ended) })
    }

    /// Returns when it ends, which it should not do of itself.
    pub async fn ended(&mut self) -> Ended {
        if let Some(ended) = &mut self.ended {
            let _ = ended.await;
        }
        self.ended = None;
        Ended("the MQTT server")
    }

    /// How this broker itself connects: by a door of its own, which neither TLS nor a crowd stand in the way of.
    #[must_use]
    pub fn access(&self, mqtt: &Mqtt) -> Mqtt {
        Mqtt { server: Server::Embedded(self.own), credentials: Some(self.credentials.clone()), ..mqtt.clone() }
    }

    /// Ends it: the ports are free, all connections closed, and what is kept is on disk. No last will is said: those who
    /// are there come back to the next server, and for who does not, it is due then.
    pub async fn stop(self) {
        self.over.send_replace(true);
        if let Some(ended) = self.ended {
            let _ = timeout(END, ended).await;
        }
    }
}

/// What meets clients with the certificate of these files, which is renewed from now on.
fn acceptor(files: (PathBuf, PathBuf)) -> Result<TlsAcceptor, TlsError> {
    let certificate = Certificate::open("mqtt_listen.tls", files)?;
    let acceptor = TlsAcceptor::from(Arc::new(certificate.server()?));
    tokio::spawn(certificate.watch());
    Ok(acceptor)
}

fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let listener = prepare(TcpListener::bind(address)?)?;
        listener.set_nonblocking(true)?;
        io::Result::Ok(listener)
    };
    bind().with_context(|| format!("mqtt_listen {address}"))
}

/// What every connection needs.
#[derive(Clone)]
struct Serving {
    bus: Arc<Bus>,
    metrics: Metrics,
}

impl Serving {
    /// Runs on threads of its own, until it is told that it is over; says when it has ended.
    fn start(
        self,
        public: (TcpListener, Door),
        own: (TcpListener, Door),
        file: File,
    ) -> anyhow::Result<(watch::Sender<bool>, oneshot::Receiver<()>)> {
        let ((over, stop), (end, ended)) = (watch::channel(false), oneshot::channel());
        let (starts, started) = mpsc::channel();
        thread::Builder::new().name("mqttd".into()).spawn(move || {
            match self.open(public, own) {
                Ok((runtime, own_runtime, attending)) => {
                    let _ = starts.send(Ok(()));
                    runtime.block_on(self.run(attending, file, stop));
                    runtime.shutdown_background();
                    own_runtime.shutdown_background();
                }
                Err(error) => drop(starts.send(Err(error))),
            }
            // The one who waits for it may have gone first.
            let _ = end.send(());
        })?;
        started.recv().context("the MQTT server does not start")??;
        Ok((over, ended))
    }

    /// Lets clients in at both doors from now on.
    fn open(
        &self,
        public: (TcpListener, Door),
        own: (TcpListener, Door),
    ) -> anyhow::Result<(Runtime, Runtime, [JoinHandle<Infallible>; 2])> {
        let (runtime, own_runtime) = (threads("mqtt", THREADS)?, threads("mqtt-own", 1)?);
        let open = |runtime: &Runtime, (listener, door)| {
            let _entered = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener).context("mqtt_listen: nothing can be accepted");
            anyhow::Ok(runtime.spawn(self.clone().attend(listener?, Arc::new(door))))
        };
        let attending = [open(&runtime, public)?, open(&own_runtime, own)?];
        Ok((runtime, own_runtime, attending))
    }

    async fn run(self, attending: [JoinHandle<Infallible>; 2], file: File, stop: watch::Receiver<bool>) {
        let close = async {
            process::over(stop).await;
            attending.iter().for_each(JoinHandle::abort);
        };
        file.run(self.bus, close).await;
    }

    /// Lets clients in; their connections end with the runtime.
    async fn attend(self, listener: tokio::net::TcpListener, door: Arc<Door>) -> Infallible {
        let (pending, warned) = (Pending::default(), Rarely::default());
        loop {
            match listener.accept().await {
                Ok((stream, address)) => {
                    let place = pending.enter(address.ip());
                    tokio::spawn(self.clone().serve(stream, door.clone(), place));
                }
                Err(error) => {
                    if warned.is_due(WARN) {
                        warn!(%error, "the MQTT server cannot take a connection");
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// One connection, from its first byte to its last.
    async fn serve(self, stream: TcpStream, door: Arc<Door>, mut place: Place) {
        let evicted = place.evicted();
        let entered = tokio::select! {
            entered = self.enter(stream, &door, &mut place) => entered,
            () = evicted.notified() => return self.count(EVICTED),
        };
        drop(place);
        let Some((stream, input, client, seat)) = entered else { return };
        let Client { access, account, will, silence, .. } = client;
        if let Some(will) = will {
            self.bus.promise(&seat, will);
        }
        let mut output = BytesMut::new();
        let _ = Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false)).write(&mut output, usize::MAX);
        let shared = (self.bus.clone(), self.metrics.clone());
        let session = Session::new(access, account.is_own);
        let connection = Connection::new(stream, (input, output), (session, account), silence, shared);
        let (end, ear) = connection.run(&seat).await;
        debug!(client = %seat, ?end, "MQTT client is gone");
        self.bus.leave(seat, end != End::Farewell, ear).await;
    }

    /// Lets a client in and gives it a seat, or tells it why not.
    async fn enter(
        &self,
        stream: TcpStream,
        door: &Door,
        place: &mut Place,
    ) -> Option<(Box<dyn Stream>, BytesMut, Client, Seat)> {
        let (stream, input, client) = match door.admit(stream, place).await {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.count(refusal);
                return None;
            }
        };
        place.logged_in(&client.user);
        let bytes = client.will.as_ref().map_or(0, Message::size) as u64;
        let wait = client.account.charge(Cost { work: LOGIN, bytes }, Instant::now());
        let seat = timeout(PATIENCE, async {
            sleep(wait).await;
            self.bus.enter(&client.name, &client.account, door.room).await
        });
        let refusal = match seat.await {
            Ok(Some(seat)) => return Some((stream, input, client, seat)),
            Ok(None) => FULL,
            Err(_) => BUSY,
        };
        self.count(refusal);
        refusal.tell(stream).await;
        None
    }

    fn count(&self, refusal: Refusal) {
        self.metrics.mqtt_refused.with_label_values(&[refusal.1]).inc();
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

    /// Such a server would start and let nobody in.
    #[test]
    fn a_listener_that_cannot_be_served_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("no socket")).unwrap();
        let metrics = Metrics::new().unwrap();
        let bus = Arc::new(Bus::open(retained::Retained::default(), 10, metrics.clone()).unwrap());
        let door = || Door { users: Users::own().unwrap().0, tls: None, room: 10 };
        let (public, own) = (TcpListener::from(OwnedFd::from(file)), bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap());
        public.set_nonblocking(true).unwrap();
        let started =
            Serving { bus, metrics }.start((public, door()), (own, door()), File::open(dir.path()).unwrap().0);
        assert!(started.err().is_some_and(|error| error.to_string().contains("mqtt_listen")));
    }
}
