//! The connections that are open, so that their number, their time and their memory are bounded. What decides is
//! [`ConnectionTable`], which knows neither sockets nor a clock; [`Flow`] is what an entry there, the stream and the request of a
//! connection share.

mod capacity;
mod flow;
mod table;

use std::future::poll_fn;
use std::net::{IpAddr, Shutdown};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use actix_web::HttpRequest;
use nix::libc::linger;
use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{self, setsockopt, shutdown};
use parking_lot::{Mutex, MutexGuard};
use tokio::net::TcpStream;

pub use self::capacity::Capacity;
use self::flow::since;
pub(super) use self::flow::{ActiveRequest, Flow};
use self::table::{AdmittedConnection, ConnectionTable};

/// How long a connection may be open between two requests.
pub const IDLE: Duration = Duration::from_secs(75);

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

    /// Its label in metrics.
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

/// All open connections of a listener, or of several. Clones share them.
#[derive(Clone)]
pub struct Connections(Arc<ConnectionsState>);

struct ConnectionsState {
    table: Mutex<ConnectionTable<Socket>>,
    capacity: Capacity,
    /// What all hold, those included that are about to end.
    held: AtomicUsize,
    began: Instant,
    peer_kind: Box<dyn Fn(IpAddr) -> PeerKind + Send + Sync>,
    closed: Box<dyn Fn(Closed) + Send + Sync>,
}

/// A connection's socket once more, to end it from elsewhere.
struct Socket(std::net::TcpStream);

/// A connection that is no longer HTTP's, as who has it now sees it. When this is dropped, all is said on it: it ends when its
/// client has said the same, or a few seconds later.
pub struct UpgradedConnection {
    connections: Connections,
    flow: Arc<Flow>,
    id: u64,
}

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
        let (table, held) = (Mutex::new(ConnectionTable::new(capacity)), AtomicUsize::new(0));
        let (peer_kind, closed) = (Box::new(peer_kind), Box::new(closed));
        Self(Arc::new(ConnectionsState { table, capacity, held, began: Instant::now(), peer_kind, closed }))
    }

    /// Those of a listener for a few clients: they need not be tidied, since each makes room for others.
    #[must_use]
    pub fn few() -> Self {
        Self::new(Capacity::FEW, peer_kind, |_| {})
    }

    /// How many there are.
    #[must_use]
    pub fn open(&self) -> usize {
        self.table().len()
    }

    /// How many others are upgraded.
    #[must_use]
    pub fn upgraded(&self) -> usize {
        self.table().upgraded()
    }

    /// The connection of a request is to be a WebSocket from its answer on; none if there are too many. It is kept until
    /// others need its place, unless it is settled.
    #[must_use]
    pub fn upgrade(&self, request: &HttpRequest) -> Option<UpgradedConnection> {
        let flow = request.conn_data::<Arc<Flow>>()?.clone();
        let id = flow.id()?;
        let evicted = self.table().upgrade(id)?;
        self.evict(evicted, Closed::Full);
        Some(UpgradedConnection { connections: self.clone(), flow, id })
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
            Ok(AdmittedConnection { id, evicted }) => {
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
        for socket in sockets {
            socket.reset();
            (self.0.closed)(closed);
        }
    }

    fn close(&self, socket: &Socket, closed: Closed) {
        // It may have ended by itself.
        let _ = socket.0.shutdown(Shutdown::Both);
        (self.0.closed)(closed);
    }

    /// Nothing that panics holds the lock, and panics end the process.
    fn table(&self) -> MutexGuard<'_, ConnectionTable<Socket>> {
        self.0.table.lock()
    }
}

impl UpgradedConnection {
    /// It stays, whoever needs a place.
    pub fn settle(&self) {
        self.flow.settle();
    }

    /// Returns when the client has begun a message that is larger than [`super::MESSAGE_MAX`]. Nothing that it sends arrives
    /// from then on.
    pub async fn too_large(&self) {
        poll_fn(|cx| self.flow.poll_too_large(cx)).await;
    }

    /// How many bytes were sent since the upgrade: handed to the kernel, or to TLS.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.flow.sent()
    }

    /// Returns when so many were.
    pub async fn has_sent(&self, bytes: u64) {
        poll_fn(|cx| self.flow.poll_sent(bytes, cx)).await;
    }

    /// Ends it at once, without what the client has not received.
    pub fn abort(&self) {
        if let Some(socket) = self.connections.table().remove(self.id) {
            socket.reset();
        }
    }
}

impl Drop for UpgradedConnection {
    fn drop(&mut self) {
        self.flow.end();
    }
}

impl Socket {
    /// Closes it, and drops what the kernel has for its client.
    fn reset(&self) {
        // It may have ended by itself.
        let _ = setsockopt(&self.0, Linger, &linger { l_onoff: 1, l_linger: 0 });
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl ConnectionGuard {
    pub(super) fn flow(&self) -> &Arc<Flow> {
        &self.flow
    }

    /// The connection holds so many bytes from now on.
    pub(super) fn hold(&self, bytes: usize) {
        let before = self.flow.hold(bytes);
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
