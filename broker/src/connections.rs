//! The connections that are open, so that their number, their time and their memory are bounded: actix-web bounds the
//! time of a connection's first head only. What decides is [`Table`], which knows neither sockets nor a clock.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Shutdown, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use actix_tls::accept::rustls_0_23::TlsStream;
use actix_web::rt::net::TcpStream;
use ipnet::IpNet;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{self, Backlog, listen, shutdown};
use tracing::warn;

use crate::client::{Client, is_in};
use crate::lock;
use crate::metrics::Metrics;

/// Open connections at most: what 3,300 routers need twice over, and an idle one takes about 12 KiB.
const MOST: usize = 8_192;
/// Of them, those of one client: more than routers behind one address have at the same time.
const MOST_OF_CLIENT: usize = 1_024;
/// How long a connection may be open between two requests.
pub const IDLE: Duration = Duration::from_secs(75);
/// The same when half of all are open.
const IDLE_CROWDED: Duration = Duration::from_secs(5);
/// Connections of a server that have come and are not in the table yet, TLS handshakes among them.
const ARRIVING: usize = 1_024;
/// Files that the rest of the program has open.
const FILES: usize = 256;
/// Connections that the kernel keeps until they are accepted; a fleet comes at once.
const WAITING: i32 = 4_096;
/// The value of a clock that says: a request is under way.
const BUSY: u64 = u64::MAX;

/// Why a connection is closed before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Its client has too many.
    Client,
    /// There are too many in all.
    Full,
    /// No request came on it for too long.
    Idle,
}

impl Closed {
    /// Every reason, by the word that metrics have for it.
    pub const REASONS: [&str; 3] = ["client", "full", "idle"];

    fn reason(self) -> &'static str {
        Self::REASONS[match self {
            Self::Client => 0,
            Self::Full => 1,
            Self::Idle => 2,
        }]
    }
}

/// Which connections there are; `S` is what closes one when it is dropped or used.
struct Table<S> {
    most: usize,
    last: u64,
    open: BTreeMap<u64, Open<S>>,
    clients: HashMap<Client, usize>,
}

struct Open<S> {
    /// None for a proxy's, which brings many clients.
    client: Option<Client>,
    socket: S,
    /// Milliseconds on the table's clock since when no request is under way, or [`BUSY`].
    idle: Arc<AtomicU64>,
}

/// A place in the table, and the connections that have to go for it.
struct Admitted<S> {
    id: u64,
    idle: Arc<AtomicU64>,
    gone: Vec<S>,
}

impl<S> Table<S> {
    fn new(most: usize) -> Self {
        Self { most, last: 0, open: BTreeMap::new(), clients: HashMap::new() }
    }

    /// Takes in a connection at `now`. In a full table the longest idle ones go: a sixteenth at once, so that a flood
    /// does not cost a search each.
    fn admit(&mut self, client: Option<Client>, socket: S, now: u64) -> Result<Admitted<S>, (Closed, S)> {
        let has_many = |client| self.clients.get(&client).is_some_and(|open| *open >= MOST_OF_CLIENT);
        if client.is_some_and(|client| !client.is_this_machine() && has_many(client)) {
            return Err((Closed::Client, socket));
        }
        let gone = if self.open.len() < self.most { Vec::new() } else { self.make_room() };
        if self.open.len() >= self.most {
            return Err((Closed::Full, socket));
        }
        self.last += 1;
        let (id, idle) = (self.last, Arc::new(AtomicU64::new(now)));
        self.open.insert(id, Open { client, socket, idle: idle.clone() });
        if let Some(client) = client {
            *self.clients.entry(client).or_default() += 1;
        }
        Ok(Admitted { id, idle, gone })
    }

    fn make_room(&mut self) -> Vec<S> {
        let since = |(id, open): (&u64, &Open<S>)| (open.idle.load(Ordering::Relaxed), *id);
        let mut idle: Vec<_> = self.open.iter().map(since).filter(|(since, _)| *since != BUSY).collect();
        idle.sort_unstable();
        let room = (self.most / 16).max(1);
        idle.into_iter().take(room).filter_map(|(_, id)| self.remove(id)).collect()
    }

    fn remove(&mut self, id: u64) -> Option<S> {
        let Open { client, socket, .. } = self.open.remove(&id)?;
        if let Some(client) = client
            && let Some(open) = self.clients.get_mut(&client)
        {
            *open -= 1;
            if *open == 0 {
                self.clients.remove(&client);
            }
        }
        Some(socket)
    }

    /// Takes out those on which no request came for too long.
    fn expire(&mut self, now: u64) -> Vec<S> {
        let is_crowded = self.open.len() * 2 > self.most;
        let over = |open: &Open<S>| {
            let since = open.idle.load(Ordering::Relaxed);
            // A proxy would send the next request on a connection that it believes to be there.
            let limit = if is_crowded && open.client.is_some() { IDLE_CROWDED } else { IDLE };
            since != BUSY && Duration::from_millis(now.saturating_sub(since)) >= limit
        };
        let over: Vec<_> = self.open.iter().filter(|(_, open)| over(open)).map(|(id, _)| *id).collect();
        over.into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

/// All open connections. Clones share them.
#[derive(Clone)]
pub struct Connections {
    table: Arc<Mutex<Table<Socket>>>,
    capacity: Capacity,
    began: Instant,
    trusted: Arc<[IpNet]>,
    metrics: Metrics,
}

/// How many connections there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Open ones.
    pub open: usize,
    /// Those of a server that are not in the table yet.
    pub arriving: usize,
}

/// A connection's socket once more, to end it from elsewhere.
struct Socket(std::net::TcpStream);

/// What is known of a connection for as long as it is open.
pub struct Connection {
    connections: Connections,
    /// None if it is not in the table, and about to end.
    place: Option<(u64, Arc<AtomicU64>)>,
}

/// A request that is under way; it no longer is when this is dropped.
pub struct Busy {
    began: Instant,
    idle: Option<Arc<AtomicU64>>,
}

impl Connections {
    /// None is open yet. As many files may be open from now on as the system lets this program have.
    #[must_use]
    pub fn new(trusted: &[IpNet], metrics: Metrics) -> Self {
        let capacity = capacity(open_files());
        let table = Arc::new(Mutex::new(Table::new(capacity.open)));
        Self { table, capacity, began: Instant::now(), trusted: trusted.into(), metrics }
    }

    /// How many there are.
    #[must_use]
    pub fn open(&self) -> usize {
        lock(&self.table).open.len()
    }

    /// How many there is room for.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The networks of the trusted proxies.
    #[must_use]
    pub fn trusted(&self) -> &[IpNet] {
        &self.trusted
    }

    /// A connection has come, or its TLS handshake is over.
    #[must_use]
    pub fn opened(&self, stream: &dyn Any) -> Connection {
        let tls = || stream.downcast_ref::<TlsStream<TcpStream>>().map(|stream| stream.get_ref().0);
        let Some(stream) = stream.downcast_ref::<TcpStream>().or_else(tls) else {
            return Connection { connections: self.clone(), place: None };
        };
        let peer = stream.peer_addr().map(|address| address.ip());
        let socket = stream.as_fd().try_clone_to_owned().map(|socket| Socket(socket.into()));
        let place = match (peer, socket) {
            (Ok(peer), Ok(socket)) => self.admit(peer, socket),
            (Err(_), _) | (_, Err(_)) => {
                // It is over already, or there is no file left for it.
                let _ = shutdown(stream.as_raw_fd(), socket::Shutdown::Both);
                None
            }
        };
        Connection { connections: self.clone(), place }
    }

    fn admit(&self, peer: IpAddr, socket: Socket) -> Option<(u64, Arc<AtomicU64>)> {
        let client = (!is_in(&self.trusted, peer)).then(|| peer.into());
        let admitted = lock(&self.table).admit(client, socket, self.now());
        match admitted {
            Ok(Admitted { id, idle, gone }) => {
                self.end(gone, Closed::Full);
                Some((id, idle))
            }
            Err((closed, socket)) => {
                self.end([socket], closed);
                None
            }
        }
    }

    /// Ends the connections on which nothing happens.
    pub fn tidy(&self) {
        let idle = lock(&self.table).expire(self.now());
        self.end(idle, Closed::Idle);
    }

    fn end(&self, sockets: impl IntoIterator<Item = Socket>, closed: Closed) {
        for Socket(stream) in sockets {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
            self.metrics.connections_closed.with_label_values(&[closed.reason()]).inc();
        }
    }

    fn now(&self) -> u64 {
        since(self.began)
    }
}

impl Connection {
    /// A request is under way.
    #[must_use]
    pub fn busy(&self) -> Busy {
        let idle = self.place.as_ref().map(|(_, idle)| idle.clone());
        if let Some(idle) = &idle {
            idle.store(BUSY, Ordering::Relaxed);
        }
        Busy { began: self.connections.began, idle }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(idle) = &self.idle {
            idle.store(since(self.began), Ordering::Relaxed);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some((id, _)) = self.place {
            lock(&self.connections.table).remove(id);
        }
    }
}

/// The listener, with a queue that is as long as a fleet needs.
pub fn lengthen_queue(listener: TcpListener) -> std::io::Result<TcpListener> {
    listen(&listener, Backlog::new(WAITING)?)?;
    Ok(listener)
}

/// Raises the number of files that may be open to what the system allows, and says how many that are.
fn open_files() -> usize {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    let files = raised.or_else(|error| {
        warn!(%error, "the limit of open files cannot be raised");
        getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _)| soft)
    });
    usize::try_from(files.unwrap_or_default()).unwrap_or(usize::MAX)
}

/// How many connections fit: each has two files, and a quarter of them may come by HTTPS beside that; and both
/// servers have some that arrive.
fn capacity(files: usize) -> Capacity {
    let arriving = (files / 8).clamp(16, ARRIVING);
    Capacity { open: (files.saturating_sub(FILES + 2 * arriving) / 9 * 4).clamp(64, MOST), arriving }
}

fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(BUSY - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u8) -> Client {
        IpAddr::from([192, 0, 2, n]).into()
    }

    fn admit(
        table: &mut Table<u64>,
        client: impl Into<Option<Client>>,
        socket: u64,
        now: u64,
    ) -> Option<Admitted<u64>> {
        table.admit(client.into(), socket, now).ok()
    }

    #[test]
    fn a_client_has_only_so_many_and_a_proxy_as_many_as_there_are() {
        let mut table = Table::new(10_000);
        let open = u64::try_from(MOST_OF_CLIENT).unwrap();
        let first = admit(&mut table, client(1), 0, 0).unwrap().id;
        assert!((1..open).all(|socket| admit(&mut table, client(1), socket, 0).is_some()));
        let refused = table.admit(Some(client(1)), 7, 0).err();
        assert_eq!(refused, Some((Closed::Client, 7)));
        assert!(admit(&mut table, client(2), 8, 0).is_some());
        assert!((0..=open).all(|socket| admit(&mut table, None, socket, 0).is_some()));
        assert_eq!(table.remove(first), Some(0));
        assert_eq!(table.remove(first), None);
        assert!(admit(&mut table, client(1), 9, 0).is_some());
    }

    #[test]
    fn in_a_full_table_the_longest_idle_go_and_busy_ones_stay() {
        let mut table = Table::new(32);
        for n in 0..32 {
            let admitted = admit(&mut table, client(u8::try_from(n).unwrap()), n, 100 + n).unwrap();
            if n < 4 {
                admitted.idle.store(BUSY, Ordering::Relaxed);
            }
            if n == 5 {
                admitted.idle.store(900, Ordering::Relaxed);
            }
        }
        assert_eq!(admit(&mut table, client(99), 99, 1000).unwrap().gone, [4, 6]);
        assert_eq!(table.open.len(), 31);
        assert_eq!(table.clients.len(), 31);
        for open in table.open.values() {
            open.idle.store(BUSY, Ordering::Relaxed);
        }
        assert!(admit(&mut table, client(100), 100, 1000).is_some());
        table.open.values().for_each(|open| open.idle.store(BUSY, Ordering::Relaxed));
        assert_eq!(table.admit(Some(client(101)), 101, 1000).err(), Some((Closed::Full, 101)));
    }

    #[test]
    fn who_does_nothing_goes_and_sooner_when_half_are_open() {
        let idle = u64::try_from(IDLE.as_millis()).unwrap();
        let crowded = u64::try_from(IDLE_CROWDED.as_millis()).unwrap();
        let mut table = Table::new(4);
        let busy = admit(&mut table, client(0), 0, 0).unwrap();
        busy.idle.store(BUSY, Ordering::Relaxed);
        admit(&mut table, client(1), 1, 0).unwrap();
        assert_eq!(table.expire(idle - 1), [0; 0]);
        assert_eq!(table.expire(idle), [1]);
        admit(&mut table, client(2), 2, idle).unwrap();
        admit(&mut table, client(3), 3, idle + 1).unwrap();
        assert_eq!(table.expire(idle + crowded - 1), [0; 0]);
        assert_eq!(table.expire(idle + crowded), [2]);
        assert_eq!(table.expire(idle + crowded + 1), [0; 0], "half of all is not more than half");
        admit(&mut table, None, 4, idle).unwrap();
        assert_eq!(table.expire(idle + crowded + 1), [3]);
        assert_eq!(table.expire(2 * idle - 1), [0; 0], "a proxy keeps its connections");
        assert_eq!(table.expire(2 * idle), [4]);
    }

    #[test]
    fn a_fleet_that_comes_at_once_finds_a_place_to_wait() {
        let listener = lengthen_queue(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let (server, patience) = (listener.local_addr().unwrap(), Duration::from_secs(5));
        let waiting: Vec<_> = (0..400).map(|_| std::net::TcpStream::connect_timeout(&server, patience)).collect();
        assert!(waiting.iter().all(Result::is_ok), "nobody accepts yet");
    }

    #[test]
    fn the_files_there_are_bound_the_connections() {
        let open = [0, 1_024, 4_096, 20_000, 1_048_576].map(|files| capacity(files).open);
        assert_eq!(open, [64, 224, 1_248, 7_864, 8_192]);
    }
}
