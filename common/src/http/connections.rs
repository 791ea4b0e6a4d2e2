//! The connections that are open, so that their number, their time and their memory are bounded. What decides is
//! [`Table`], which knows neither sockets nor a clock.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Shutdown, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use nix::libc::linger;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::{Linger, SndBuf};
use nix::sys::socket::{self, Backlog, listen, setsockopt, shutdown};
use parking_lot::{Mutex, MutexGuard};
use tokio::net::TcpStream;
use tracing::warn;

/// The most open connections: twice what 3,300 routers need; an idle one takes about 12 KiB.
const MAX_OPEN: usize = 8_192;
/// The most of one client: more than routers behind one address have at the same time.
const MAX_OF_CLIENT: usize = 1_024;
/// What all of them may hold beyond that, in bytes: answers that are not read, and heads that do not end.
const MAX_HELD: usize = 16 << 20;
/// How long a connection may be open between two requests.
pub const IDLE: Duration = Duration::from_secs(75);
/// The same when half of all are open.
const IDLE_CROWDED: Duration = Duration::from_secs(5);
/// The most connections of a server that are not in the table yet, TLS handshakes among them.
const MAX_PENDING: usize = 1_024;
/// Files that the rest of the program has open.
const FILES: usize = 256;
/// Connections that the kernel keeps until they are accepted; a fleet comes at once.
const BACKLOG: i32 = 4_096;
/// What the kernel keeps of an answer that is not read, in bytes; it counts its own costs in.
const KERNEL: usize = 128 << 10;
/// In place of a time: a request is being served.
const BUSY: u64 = u64::MAX;

/// Why a connection is closed before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Its client has too many.
    Client,
    /// There are too many in all.
    Full,
    /// No whole request came on it for too long.
    Idle,
    /// All of them hold too much, and its client did not read, or did not end a head, for the longest time.
    Unread,
}

impl Closed {
    /// Every reason.
    pub const ALL: [Self; 4] = [Self::Client, Self::Full, Self::Idle, Self::Unread];

    /// The word that metrics have for it.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Full => "full",
            Self::Idle => "idle",
            Self::Unread => "unread",
        }
    }
}

/// The kind of peer that a connection has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerKind {
    /// A client's, by what counts as its address; it has only so many.
    Client(IpAddr),
    /// This machine's.
    Local,
    /// A proxy's, which brings many clients, and would send the next request on a connection that it believes to be
    /// there.
    Proxy,
}

/// How many connections there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Open ones.
    pub open: usize,
    /// Of them, those of one client.
    pub of_client: usize,
    /// Those of a server that are not in the table yet.
    pub pending: usize,
    /// What they may hold, in bytes.
    pub held: usize,
}

impl Capacity {
    /// Of a listener for a few clients.
    pub const FEW: Self = Self { open: 32, of_client: 16, pending: 16, held: 4 << 20 };

    /// Of a listener for a fleet. As many files may be open from now on as the system lets this program have.
    #[must_use]
    pub fn of_fleet() -> Self {
        Self::of_files(open_files())
    }

    /// Each connection has two files, and a quarter of them may come by HTTPS beside that; and both servers have some
    /// that arrive.
    fn of_files(files: usize) -> Self {
        let pending = (files / 8).clamp(16, MAX_PENDING);
        let open = (files.saturating_sub(FILES + 2 * pending) / 9 * 4).clamp(64, MAX_OPEN);
        Self { open, of_client: MAX_OF_CLIENT, pending, held: MAX_HELD }
    }
}

/// The state that a connection's entry in the table, its stream and its request share.
pub(super) struct Flow {
    began: Instant,
    /// Milliseconds on the table's clock since when its client is waited for, or [`BUSY`].
    idle: AtomicU64,
    /// What it holds, in bytes.
    held: AtomicUsize,
    /// The task that waits until the next request may come.
    next: AtomicWaker,
}

/// A request that is being served, until this is dropped.
pub(super) struct ActiveRequest {
    flow: Arc<Flow>,
    since: u64,
}

impl Flow {
    fn new(began: Instant) -> Arc<Self> {
        let (idle, held) = (AtomicU64::new(since(began)), AtomicUsize::new(0));
        Arc::new(Self { began, idle, held, next: AtomicWaker::new() })
    }

    /// A request is being served.
    pub(super) fn begin(self: &Arc<Self>) -> ActiveRequest {
        self.set_busy();
        ActiveRequest { flow: self.clone(), since: since(self.began) }
    }

    /// It is this program's turn.
    pub(super) fn set_busy(&self) {
        self.idle.store(BUSY, Ordering::Relaxed);
    }

    /// It is the client's turn, since then.
    pub(super) fn wait_for_client(&self, since: u64) {
        self.idle.store(since, Ordering::Relaxed);
        self.wake();
    }

    pub(super) fn is_busy(&self) -> bool {
        self.idle.load(Ordering::Relaxed) == BUSY
    }

    /// Wakes the task that waits for the next request.
    pub(super) fn wake(&self) {
        self.next.wake();
    }

    pub(super) fn register(&self, next: &Waker) {
        self.next.register(next);
    }
}

impl ActiveRequest {
    /// When it began, on the table's clock.
    pub(super) fn since(&self) -> u64 {
        self.since
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.flow.wait_for_client(since(self.flow.began));
    }
}

/// The open connections; `S` is the socket by which one is closed.
struct Table<S> {
    capacity: Capacity,
    last: u64,
    open: BTreeMap<u64, Open<S>>,
    clients: HashMap<IpAddr, usize>,
}

struct Open<S> {
    peer: PeerKind,
    socket: S,
    flow: Arc<Flow>,
}

/// An entry in the table, and the connections that are evicted for it.
struct Admitted<S> {
    id: u64,
    evicted: Vec<S>,
}

impl<S> Open<S> {
    fn idle(&self) -> u64 {
        self.flow.idle.load(Ordering::Relaxed)
    }

    fn held(&self) -> usize {
        self.flow.held.load(Ordering::Relaxed)
    }
}

impl<S> Table<S> {
    fn new(capacity: Capacity) -> Self {
        Self { capacity, last: 0, open: BTreeMap::new(), clients: HashMap::new() }
    }

    /// Takes in a connection. In a full table those go whose client is waited for the longest, be it for a request or for
    /// the body of one: a sixteenth at once, so that a flood does not cost a search each.
    fn admit(&mut self, peer: PeerKind, socket: S, flow: Arc<Flow>) -> Result<Admitted<S>, (Closed, S)> {
        if let PeerKind::Client(client) = peer
            && self.clients.get(&client).is_some_and(|open| *open >= self.capacity.of_client)
        {
            return Err((Closed::Client, socket));
        }
        let evicted = if self.open.len() < self.capacity.open { Vec::new() } else { self.make_room() };
        if self.open.len() >= self.capacity.open {
            return Err((Closed::Full, socket));
        }
        self.last += 1;
        self.open.insert(self.last, Open { peer, socket, flow });
        if let PeerKind::Client(client) = peer {
            *self.clients.entry(client).or_default() += 1;
        }
        Ok(Admitted { id: self.last, evicted })
    }

    fn make_room(&mut self) -> Vec<S> {
        let idle = self.longest_idle(|open| open.idle() != BUSY);
        let room = (self.capacity.open / 16).max(1);
        idle.into_iter().take(room).filter_map(|id| self.remove(id)).collect()
    }

    /// Takes out connections until the others hold a quarter less than they may, if they hold more.
    fn free_memory(&mut self) -> Vec<S> {
        let most = self.capacity.held;
        let mut held: usize = self.open.values().map(Open::held).sum();
        if held <= most {
            return Vec::new();
        }
        let mut evicted = Vec::new();
        for id in self.longest_idle(|open| open.held() > 0) {
            if held <= most / 4 * 3 {
                break;
            }
            held = held.saturating_sub(self.open.get(&id).map_or(0, Open::held));
            evicted.extend(self.remove(id));
        }
        evicted
    }

    /// Which ones these are, the longest idle first and those with a request under way last.
    fn longest_idle(&self, is_meant: impl Fn(&Open<S>) -> bool) -> Vec<u64> {
        let meant = self.open.iter().filter(|(_, open)| is_meant(open));
        let mut meant: Vec<_> = meant.map(|(id, open)| (open.idle(), *id)).collect();
        meant.sort_unstable();
        meant.into_iter().map(|(_, id)| id).collect()
    }

    fn remove(&mut self, id: u64) -> Option<S> {
        let Open { peer, socket, .. } = self.open.remove(&id)?;
        if let PeerKind::Client(client) = peer
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
        let is_crowded = self.open.len() * 2 > self.capacity.open;
        let over = |open: &Open<S>| {
            let since = open.idle();
            let limit = if is_crowded && open.peer != PeerKind::Proxy { IDLE_CROWDED } else { IDLE };
            since != BUSY && Duration::from_millis(now.saturating_sub(since)) >= limit
        };
        let over: Vec<_> = self.open.iter().filter(|(_, open)| over(open)).map(|(id, _)| *id).collect();
        over.into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

/// All open connections of a listener, or of several. Clones share them.
#[derive(Clone)]
pub struct Connections(Arc<Shared>);

struct Shared {
    table: Mutex<Table<Socket>>,
    capacity: Capacity,
    /// What all hold, those included that are about to end.
    held: AtomicUsize,
    began: Instant,
    peer_kind: Box<dyn Fn(IpAddr) -> PeerKind + Send + Sync>,
    closed: Box<dyn Fn(Closed) + Send + Sync>,
}

/// A connection's socket once more, to end it from elsewhere.
struct Socket(std::net::TcpStream);

/// A connection's entry in the table, for as long as it is open.
pub(super) struct ConnectionGuard {
    connections: Connections,
    flow: Arc<Flow>,
    /// None if it is not in the table, and about to end.
    id: Option<u64>,
}

impl Connections {
    /// None is open yet. `peer_kind` is asked for each address; `closed` is called with the reason why one is closed.
    #[must_use]
    pub fn new(
        capacity: Capacity,
        peer_kind: impl Fn(IpAddr) -> PeerKind + Send + Sync + 'static,
        closed: impl Fn(Closed) + Send + Sync + 'static,
    ) -> Self {
        let (table, held) = (Mutex::new(Table::new(capacity)), AtomicUsize::new(0));
        let (peer_kind, closed) = (Box::new(peer_kind), Box::new(closed));
        Self(Arc::new(Shared { table, capacity, held, began: Instant::now(), peer_kind, closed }))
    }

    /// Those of a listener for a few clients: they need not be tidied, since each makes room for others.
    #[must_use]
    pub fn few() -> Self {
        Self::new(Capacity::FEW, peer_kind, |_| {})
    }

    /// How many there are.
    #[must_use]
    pub fn open(&self) -> usize {
        self.table().open.len()
    }

    /// How many there is room for.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.0.capacity
    }

    /// Ends the connections on which nothing happens.
    pub fn tidy(&self) {
        let idle = self.table().expire(since(self.0.began));
        self.evict(idle, Closed::Idle);
    }

    /// A connection has come, or its TLS handshake is over.
    pub(super) fn opened(&self, stream: &TcpStream) -> ConnectionGuard {
        let flow = Flow::new(self.0.began);
        let address = stream.peer_addr().map(|address| address.ip());
        let socket = stream.as_fd().try_clone_to_owned().map(|socket| Socket(socket.into()));
        let id = match (address, socket) {
            (Ok(address), Ok(socket)) => self.admit((self.0.peer_kind)(address), socket, flow.clone()),
            (Err(_), _) | (_, Err(_)) => {
                // It is over already, or there is no file left for it.
                let _ = shutdown(stream.as_raw_fd(), socket::Shutdown::Both);
                None
            }
        };
        ConnectionGuard { connections: self.clone(), flow, id }
    }

    fn admit(&self, peer: PeerKind, socket: Socket, flow: Arc<Flow>) -> Option<u64> {
        let admitted = self.table().admit(peer, socket, flow);
        match admitted {
            Ok(Admitted { id, evicted }) => {
                self.evict(evicted, Closed::Full);
                Some(id)
            }
            Err((closed, socket)) => {
                self.close(&socket, closed);
                None
            }
        }
    }

    /// Closes connections, and drops what the kernel has for their clients.
    fn evict(&self, sockets: impl IntoIterator<Item = Socket>, closed: Closed) {
        let at_once = linger { l_onoff: 1, l_linger: 0 };
        for socket in sockets {
            // It may have ended by itself.
            let _ = setsockopt(&socket.0, Linger, &at_once);
            self.close(&socket, closed);
        }
    }

    fn close(&self, socket: &Socket, closed: Closed) {
        // It may have ended by itself.
        let _ = socket.0.shutdown(Shutdown::Both);
        (self.0.closed)(closed);
    }

    /// Nothing that panics holds the lock, and panics end the process.
    fn table(&self) -> MutexGuard<'_, Table<Socket>> {
        self.0.table.lock()
    }
}

impl ConnectionGuard {
    pub(super) fn flow(&self) -> &Arc<Flow> {
        &self.flow
    }

    /// The connection holds so many bytes from now on.
    pub(super) fn hold(&self, bytes: usize) {
        let before = self.flow.held.swap(bytes, Ordering::Relaxed);
        let all = &self.connections.0.held;
        if bytes < before {
            all.fetch_sub(before - bytes, Ordering::Relaxed);
        } else if bytes > before
            && all.fetch_add(bytes - before, Ordering::Relaxed) + bytes - before > self.connections.0.capacity.held
        {
            let evicted = self.connections.table().free_memory();
            self.connections.evict(evicted, Closed::Unread);
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.hold(0);
        if let Some(id) = self.id {
            self.connections.table().remove(id);
        }
    }
}

#[cfg(test)]
impl Flow {
    /// What its connection holds, in bytes.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
impl Connections {
    /// The place of a connection that is not in the table.
    pub(super) fn guard(&self) -> ConnectionGuard {
        ConnectionGuard { connections: self.clone(), flow: Flow::new(self.0.began), id: None }
    }
}

/// The kind of peer at an address that is no proxy's.
#[must_use]
pub fn peer_kind(address: IpAddr) -> PeerKind {
    let address = address.to_canonical();
    if address.is_loopback() { PeerKind::Local } else { PeerKind::Client(address) }
}

/// The listener, with a queue that is as long as a fleet needs, and connections for which the kernel keeps little.
pub fn prepare(listener: TcpListener) -> std::io::Result<TcpListener> {
    setsockopt(&listener, SndBuf, &(KERNEL / 2))?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Raises the number of files that may be open to what the system allows; returns that number.
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

fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(BUSY - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u8) -> PeerKind {
        PeerKind::Client([192, 0, 2, n].into())
    }

    fn table(open: usize, held: usize) -> Table<u64> {
        Table::new(Capacity { open, of_client: MAX_OF_CLIENT, pending: 0, held })
    }

    /// Lets in a connection that is idle since then.
    fn admit(table: &mut Table<u64>, peer: PeerKind, socket: u64, idle: u64) -> Option<(Arc<Flow>, Admitted<u64>)> {
        let flow = Flow::new(Instant::now());
        flow.wait_for_client(idle);
        let admitted = table.admit(peer, socket, flow.clone()).ok()?;
        Some((flow, admitted))
    }

    #[test]
    fn a_client_has_only_so_many_and_a_proxy_and_this_machine_as_many_as_there_are() {
        let mut table = table(10_000, 0);
        let open = u64::try_from(MAX_OF_CLIENT).unwrap();
        let first = admit(&mut table, client(1), 0, 0).unwrap().1.id;
        assert!((1..open).all(|socket| admit(&mut table, client(1), socket, 0).is_some()));
        let refused = table.admit(client(1), 7, Flow::new(Instant::now())).err();
        assert_eq!(refused, Some((Closed::Client, 7)));
        assert!(admit(&mut table, client(2), 8, 0).is_some());
        for peer in [PeerKind::Proxy, PeerKind::Local] {
            assert!((0..=open).all(|socket| admit(&mut table, peer, socket, 0).is_some()));
        }
        assert_eq!(table.remove(first), Some(0));
        assert_eq!(table.remove(first), None);
        assert!(admit(&mut table, client(1), 9, 0).is_some());
    }

    #[test]
    fn in_a_full_table_those_go_whose_client_is_waited_for_the_longest_and_busy_ones_stay() {
        let mut table = table(32, 0);
        let mut busy = Vec::new();
        for n in 0..32 {
            let (flow, _) = admit(&mut table, client(u8::try_from(n).unwrap()), n, 100 + n).unwrap();
            match n {
                0..4 => busy.push(flow.begin()),
                // The head of a request has come, and its body has not.
                4 => flow.wait_for_client(900),
                _ => {}
            }
        }
        assert_eq!(admit(&mut table, client(99), 99, 1000).unwrap().1.evicted, [5, 6]);
        assert_eq!(table.open.len(), 31);
        assert_eq!(table.clients.len(), 31);
        table.open.values().for_each(|open| open.flow.set_busy());
        let (flow, _) = admit(&mut table, client(100), 100, 1000).unwrap();
        let _busy = flow.begin();
        assert_eq!(table.admit(client(101), 101, flow).err(), Some((Closed::Full, 101)));
    }

    #[test]
    fn who_does_nothing_goes_and_sooner_when_half_are_open() {
        let idle = u64::try_from(IDLE.as_millis()).unwrap();
        let crowded = u64::try_from(IDLE_CROWDED.as_millis()).unwrap();
        let mut table = table(4, 0);
        let _busy = admit(&mut table, client(0), 0, 0).unwrap().0.begin();
        admit(&mut table, client(1), 1, 0).unwrap();
        assert_eq!(table.expire(idle - 1), [0; 0]);
        assert_eq!(table.expire(idle), [1]);
        admit(&mut table, client(2), 2, idle).unwrap();
        admit(&mut table, client(3), 3, idle + 1).unwrap();
        assert_eq!(table.expire(idle + crowded - 1), [0; 0]);
        assert_eq!(table.expire(idle + crowded), [2]);
        assert_eq!(table.expire(idle + crowded + 1), [0; 0], "half of all is not more than half");
        admit(&mut table, PeerKind::Proxy, 4, idle).unwrap();
        assert_eq!(table.expire(idle + crowded + 1), [3]);
        assert_eq!(table.expire(2 * idle - 1), [0; 0], "a proxy keeps its connections");
        assert_eq!(table.expire(2 * idle), [4]);
    }

    #[test]
    fn when_all_hold_too_much_those_go_that_do_not_read_for_the_longest() {
        let mut table = table(100, 1000);
        let hold = |flow: &Flow, bytes| flow.held.store(bytes, Ordering::Relaxed);
        let mut flows = Vec::new();
        for n in 0..10 {
            flows.push(admit(&mut table, client(1), n, 100 - n).unwrap().0);
            hold(&flows[flows.len() - 1], 100);
        }
        assert_eq!(table.free_memory(), [0; 0], "that much they may");
        hold(&flows[9], 0);
        let busy = flows[8].begin();
        hold(&flows[8], 201);
        assert_eq!(table.free_memory(), [7, 6, 5], "who has no request under way goes first, who holds nothing stays");
        for flow in &flows {
            hold(flow, 0);
        }
        hold(&flows[8], 1001);
        assert_eq!(table.free_memory(), [8]);
        drop(busy);
    }

    #[test]
    fn a_fleet_that_comes_at_once_finds_a_place_to_wait() {
        let listener = prepare(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let (server, patience) = (listener.local_addr().unwrap(), Duration::from_secs(5));
        let waiting: Vec<_> = (0..400).map(|_| std::net::TcpStream::connect_timeout(&server, patience)).collect();
        assert!(waiting.iter().all(Result::is_ok), "nobody accepts yet");
    }

    #[test]
    fn the_files_there_are_bound_the_connections() {
        let open = [0, 1_024, 4_096, 20_000, 1_048_576].map(|files| Capacity::of_files(files).open);
        assert_eq!(open, [64, 224, 1_248, 7_864, 8_192]);
    }
}
