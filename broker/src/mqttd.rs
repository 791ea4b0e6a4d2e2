//! The MQTT 3.1.1 server inside the broker: our own listener, sessions and retained messages, around rumqttd's router.
//!
//! Follow a client: [`admit`] lets it in, [`connection`] runs its [`session`], which says and hears what it may on the
//! [`bus`]. Behind that, [`router`] carries what is said to all who listen, and [`retained`] keeps what is to be kept,
//! on disk by [`file`].

mod admit;
mod bus;
mod connection;
mod file;
pub mod filter;
mod message;
mod retained;
mod router;
mod session;
mod users;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use bytes::BytesMut;
use rumqttc::{ConnAck, ConnectReturnCode, Packet};
use tokio::net::TcpStream;
use tokio::runtime;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};
use wgkex_common::config::{Credentials, Mqtt, MqttListen, Server};
use wgkex_common::process;
use wgkex_common::tls::TlsError;

use self::admit::{BUSY, Client, Door, FULL, PATIENCE, Stream};
use self::bus::Bus;
use self::connection::{Connection, End};
use self::file::File;
use self::session::Session;
use self::users::Users;
use crate::certificate::Certificate;
use crate::metrics::Metrics;
use crate::{client, lock};

pub use self::admit::Refusal;

/// So many connections may wait at a door to be let in,
const WAITING: usize = 512;
/// and so many of one client that is not this machine: it cannot keep others out.
const WAITING_OF_CLIENT: usize = 64;
/// This broker's own connections, two of which may be about to end.
const OWN: usize = 4;
/// The threads that serve all clients. One may have to wait for the router.
const THREADS: usize = 2;
/// How long to wait when the system has no more descriptors.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the end of the server may take.
const END: Duration = Duration::from_secs(1);

/// The server, on threads of its own.
pub struct Mqttd {
    own: SocketAddr,
    credentials: Credentials,
    over: watch::Sender<bool>,
    ended: oneshot::Receiver<()>,
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
        let door = Door { users: Users::new(&config.users)?, tls, room };
        let own_door = Door { users: own_users, tls: None, room: room + OWN };

        let (file, retained) = File::open(dir)?;
        let (users, has_tls, kept) = (config.users.len(), config.tls.is_some(), retained.len());
        let bus = Arc::new(Bus::open(retained, room + OWN, metrics.clone())?);
        let server = Serving { bus, metrics: metrics.clone() };
        let (over, ended) = server.start([(public, door), (own, own_door)], file)?;
        info!(mqtt_listen = %config.address, users, tls = has_tls, retained = kept, "MQTT server started");
        Ok(Self { own: address, credentials, over, ended })
    }

    /// How this broker itself connects: by a door of its own, which neither TLS nor a crowd stand in the way of.
    pub fn access(&self, mqtt: &Mqtt) -> Mqtt {
        Mqtt { server: Server::Embedded(self.own), credentials: Some(self.credentials.clone()), ..mqtt.clone() }
    }

    /// Ends it: the ports are free, all connections closed, and what is kept is on disk. No last will is said: those who
    /// are there come back to the next server, and for who does not, it is due then.
    pub async fn stop(self) {
        self.over.send_replace(true);
        let _ = timeout(END, self.ended).await;
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
        let listener = TcpListener::bind(address)?;
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
        doors: [(TcpListener, Door); 2],
        file: File,
    ) -> anyhow::Result<(watch::Sender<bool>, oneshot::Receiver<()>)> {
        let ((over, stop), (end, ended)) = (watch::channel(false), oneshot::channel());
        let mut runtime = runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(THREADS).thread_name("mqtt").enable_all().build();
        let runtime = runtime.context("the threads of the MQTT server do not start")?;
        thread::Builder::new().name("mqttd".into()).spawn(move || {
            runtime.block_on(self.run(doors, file, stop));
            runtime.shutdown_background();
            // The one who waits for it may have gone first.
            let _ = end.send(());
        })?;
        Ok((over, ended))
    }

    async fn run(self, doors: [(TcpListener, Door); 2], file: File, stop: watch::Receiver<bool>) {
        for (listener, door) in doors {
            tokio::spawn(self.clone().attend(listener, Arc::new(door), stop.clone()));
        }
        file.run(self.bus, process::over(stop)).await;
    }

    /// Lets clients in at one door until it is over; their connections end with the runtime.
    async fn attend(self, listener: TcpListener, door: Arc<Door>, stop: watch::Receiver<bool>) {
        let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
        let waiting = Waiting::default();
        let accept = async {
            loop {
                match listener.accept().await {
                    Ok((stream, address)) => match waiting.turn(address.ip().into()) {
                        Some(turn) => drop(tokio::spawn(self.clone().serve(stream, door.clone(), turn))),
                        None => self.metrics.mqtt_refused.with_label_values(&["full"]).inc(),
                    },
                    Err(error) => {
                        warn!(%error, "the MQTT server cannot take a connection");
                        sleep(PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = accept => {}
            () = process::over(stop) => {}
        }
    }

    /// One connection, from its first byte to its last.
    async fn serve(self, stream: TcpStream, door: Arc<Door>, turn: Turn) {
        let (stream, input, client) = match door.admit(stream).await {
            Ok(admitted) => admitted,
            Err(refusal) => return self.metrics.mqtt_refused.with_label_values(&[refusal.1]).inc(),
        };
        let Client { name, access, will, silence } = client;
        let seat = match timeout(PATIENCE, self.bus.enter(&name, door.room)).await {
            Ok(Some(seat)) => seat,
            Ok(None) => return self.refuse(FULL, stream).await,
            Err(_) => return self.refuse(BUSY, stream).await,
        };
        drop(turn);
        if let Some(will) = will {
            self.bus.promise(&seat, will);
        }
        let mut output = BytesMut::new();
        let _ = Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false)).write(&mut output, usize::MAX);
        let shared = (self.bus.clone(), self.metrics.clone());
        let connection = Connection::new(stream, (input, output), Session::new(access), silence, shared);
        let (end, ear) = connection.run(&seat).await;
        debug!(client = %seat, ?end, "MQTT client is gone");
        self.bus.leave(seat, end != End::Farewell, ear).await;
    }

    async fn refuse(&self, refusal: Refusal, stream: Box<dyn Stream>) {
        self.metrics.mqtt_refused.with_label_values(&[refusal.1]).inc();
        refusal.tell(stream).await;
    }
}

/// How many connections of each client wait at a door.
#[derive(Clone, Default)]
struct Waiting(Arc<Mutex<BTreeMap<client::Client, usize>>>);

/// A place among those who wait.
struct Turn(Waiting, client::Client);

impl Waiting {
    /// A place for one more connection of `client`, if there is one.
    fn turn(&self, client: client::Client) -> Option<Turn> {
        let mut waiting = lock(&self.0);
        let all: usize = waiting.values().sum();
        let own = waiting.entry(client).or_default();
        let has_place = all < WAITING && (*own < WAITING_OF_CLIENT || client.is_this_machine());
        *own += usize::from(has_place);
        if *own == 0 {
            waiting.remove(&client);
        }
        has_place.then(|| Turn(self.clone(), client))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Self(Waiting(waiting), client) = self;
        let mut waiting = lock(waiting);
        match waiting.get_mut(client) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(waiting.remove(client)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn one_client_that_waits_leaves_places_for_others() {
        let waiting = Waiting::default();
        let client = |n: u8| IpAddr::from([192, 0, 2, n]).into();
        let turns: Vec<_> = (0..1_000).map_while(|_| waiting.turn(client(1))).collect();
        assert_eq!(turns.len(), WAITING_OF_CLIENT);
        let others: Vec<_> = (2..).map_while(|n| waiting.turn(client(n))).take(100).collect();
        assert_eq!(others.len(), 100);
        drop(turns);
        assert!(waiting.turn(client(1)).is_some());
        drop(others);
        assert!(lock(&waiting.0).is_empty());
    }
}
