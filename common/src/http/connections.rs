//! The open connections, whose number, time and memory are bounded. [`ConnectionTable`] decides which are closed; it
//! has neither sockets nor a clock. [`ConnectionActivity`] is the state that an entry of the table, the stream and the
//! request of a connection share.

mod activity;
mod capacity;
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

use self::activity::since;
pub(super) use self::activity::{ActiveRequest, ConnectionActivity};
pub use self::capacity::Capacity;
use self::table::{AdmittedConnection, ConnectionTable};

/// How long a connection may be open between two requests.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// Why a connection is closed by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Its client has too many connections.
    Client,
    /// There are too many connections.
    Full,
    /// The client did not send a whole request for too long.
    Idle,
    /// All connections hold too much memory, and this one's client has not read, or not ended a head, for the longest
    /// time.
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
    /// A client, by the address under which its connections are counted and limited.
    Client(IpAddr),
    /// This machine.
    Local,
    /// A proxy, which has connections for many clients, and would send the next request on a connection that it
    /// believes to be open.
    Proxy,
}

/// All open connections of a listener, or of several. Clones share them.
#[derive(Clone)]
pub struct Connections(Arc<ConnectionsState>);

struct ConnectionsState {
    table: Mutex<ConnectionTable<ConnectionSocket>>,
    capacity: Capacity,
    /// The memory held by all, including those that are about to end.
    buffered: AtomicUsize,
    began: Instant,
    peer_kind: Box<dyn Fn(IpAddr) -> PeerKind + Send + Sync>,
    closed: Box<dyn Fn(Closed) + Send + Sync>,
}

/// A duplicate of a connection's socket, to close it from elsewhere.
struct ConnectionSocket(std::net::TcpStream);

/// An upgraded connection, as its session sees it. Dropping it means that the session has sent everything: the
/// connection ends when the client closes its side, or a few seconds later.
pub struct UpgradedConnection {
    connections: Connections,
    activity: Arc<ConnectionActivity>,
    id: u64,
}

/// A connection's entry in the table, for as long as it is open.
pub(super) struct ConnectionGuard {
    connections: Connections,
    activity: Arc<ConnectionActivity>,
    /// None if it has no entry in the table, and is about to end.
    id: Option<u64>,
}

impl Connections {
    /// An empty table. `peer_kind` classifies each address; `closed` is called with the reason when a connection is
    /// closed.
    #[must_use]
    pub fn new(
        capacity: Capacity,
        peer_kind: impl Fn(IpAddr) -> PeerKind + Send + Sync + 'static,
        closed: impl Fn(Closed) + Send + Sync + 'static,
    ) -> Self {
        let (table, buffered) = (Mutex::new(ConnectionTable::new(capacity)), AtomicUsize::new(0));
        let (peer_kind, closed) = (Box::new(peer_kind), Box::new(closed));
        Self(Arc::new(ConnectionsState { table, capacity, buffered, began: Instant::now(), peer_kind, closed }))
    }

    /// The connections of a listener for a few clients: they need no [`Self::tidy`], since each new one evicts others.
    #[must_use]
    pub fn for_few_clients() -> Self {
        Self::new(Capacity::FEW, peer_kind, |_| {})
    }

    /// How many are open and not upgraded.
    #[must_use]
    pub fn open(&self) -> usize {
        self.table().len()
    }

    /// How many are upgraded.
    #[must_use]
    pub fn upgraded(&self) -> usize {
        self.table().upgraded()
    }

    /// Marks the connection of a request as upgraded to a WebSocket; none if there are too many. It may be evicted for
    /// others until it is settled.
    #[must_use]
    pub fn upgrade(&self, request: &HttpRequest) -> Option<UpgradedConnection> {
        let activity = request.conn_data::<Arc<ConnectionActivity>>()?.clone();
        let id = activity.id()?;
        let evicted = self.table().upgrade(id)?;
        self.evict(evicted, Closed::Full);
        Some(UpgradedConnection { connections: self.clone(), activity, id })
    }

    /// The limits of the table.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        self.0.capacity
    }

    /// Closes idle connections.
    pub fn close_idle(&self) {
        let idle = self.table().expire(since(self.0.began));
        self.evict(idle, Closed::Idle);
    }

    /// Registers a connection after it was accepted, or after its TLS handshake.
    pub(super) fn opened(&self, stream: &TcpStream) -> ConnectionGuard {
        let activity = ConnectionActivity::new(self.0.began);
        let address = stream.peer_addr().map(|address| address.ip());
        let socket = stream.as_fd().try_clone_to_owned().map(|socket| ConnectionSocket(socket.into()));
        let id = match (address, socket) {
            (Ok(address), Ok(socket)) => self.admit((self.0.peer_kind)(address), socket, activity.clone()),
            (Err(_), _) | (_, Err(_)) => {
                // It has ended already, or there is no free file descriptor.
                let _ = shutdown(stream.as_raw_fd(), socket::Shutdown::Both);
                None
            }
        };
        ConnectionGuard { connections: self.clone(), activity, id }
    }

    fn admit(&self, peer: PeerKind, socket: ConnectionSocket, activity: Arc<ConnectionActivity>) -> Option<u64> {
        let admitted = self.table().admit(peer, socket, activity);
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

    /// Resets connections, and drops the unsent data in the kernel.
    fn evict(&self, sockets: impl IntoIterator<Item = ConnectionSocket>, closed: Closed) {
        for socket in sockets {
            socket.reset();
            (self.0.closed)(closed);
        }
    }

    fn close(&self, socket: &ConnectionSocket, closed: Closed) {
        // It may have ended already.
        let _ = socket.0.shutdown(Shutdown::Both);
        (self.0.closed)(closed);
    }

    /// The lock needs no poison: a panic ends the process.
    fn table(&self) -> MutexGuard<'_, ConnectionTable<ConnectionSocket>> {
        self.0.table.lock()
    }
}

impl UpgradedConnection {
    /// The session is accepted: the connection is no longer evicted for others.
    pub fn pin(&self) {
        self.activity.pin();
    }

    /// Returns when the client has begun a message that is larger than [`super::MESSAGE_MAX`]. Nothing is received from
    /// it any more.
    pub async fn too_large(&self) {
        poll_fn(|cx| self.activity.poll_too_large(cx)).await;
    }

    /// Bytes sent since the upgrade: passed to the kernel, or to TLS.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.activity.sent()
    }

    /// Returns when so many bytes were sent.
    pub async fn has_sent(&self, bytes: u64) {
        poll_fn(|cx| self.activity.poll_sent(bytes, cx)).await;
    }

    /// Closes it at once and drops the unsent data.
    pub fn abort(&self) {
        if let Some(socket) = self.connections.table().remove(self.id) {
            socket.reset();
        }
    }
}

impl Drop for UpgradedConnection {
    fn drop(&mut self) {
        self.activity.end();
    }
}

impl ConnectionSocket {
    /// Closes it, and drops the unsent data in the kernel.
    fn reset(&self) {
        // It may have ended already.
        let _ = setsockopt(&self.0, Linger, &linger { l_onoff: 1, l_linger: 0 });
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl ConnectionGuard {
    pub(super) fn activity(&self) -> &Arc<ConnectionActivity> {
        &self.activity
    }

    /// Updates the memory that the connection holds.
    pub(super) fn set_buffered(&self, bytes: usize) {
        let before = self.activity.set_buffered(bytes);
        let all = &self.connections.0.buffered;
        if bytes < before {
            all.fetch_sub(before - bytes, Ordering::Relaxed);
        } else if bytes > before
            && all.fetch_add(bytes - before, Ordering::Relaxed) + bytes - before > self.connections.0.capacity.buffered
        {
            let evicted = self.connections.table().free_memory();
            self.connections.evict(evicted, Closed::Unread);
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.set_buffered(0);
        if let Some(id) = self.id {
            self.connections.table().remove(id);
        }
    }
}

#[cfg(test)]
impl Connections {
    /// The guard of a connection without an entry in the table.
    pub(super) fn guard(&self) -> ConnectionGuard {
        ConnectionGuard { connections: self.clone(), activity: ConnectionActivity::new(self.0.began), id: None }
    }
}

/// The kind of peer at an address that is not a proxy's.
#[must_use]
pub fn peer_kind(address: IpAddr) -> PeerKind {
    let address = address.to_canonical();
    if address.is_loopback() { PeerKind::Local } else { PeerKind::Client(address) }
}
