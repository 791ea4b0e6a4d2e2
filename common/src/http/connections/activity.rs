//! The activity of a connection: whether its client is waited for, since when, and the memory that it holds.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use futures_util::task::AtomicWaker;

/// The idle time of a connection whose request is being served.
pub const BUSY: u64 = u64::MAX;

/// The state that a connection's entry in the table, its stream and its request share.
pub struct ConnectionActivity {
    began: Instant,
    /// Milliseconds on the table's clock since when its client is waited for, or [`BUSY`].
    idle: AtomicU64,
    /// The memory that it holds, in bytes.
    buffered: AtomicUsize,
    /// The task that waits until the next request may be read.
    next: AtomicWaker,
    /// Its number in the table.
    id: OnceLock<u64>,
    /// The state of its upgrade, as one of the constants below.
    upgrade: AtomicU8,
    /// Bytes that were sent since the upgrade.
    sent: AtomicU64,
    /// The number of bytes that the session waits for.
    awaited: AtomicU64,
    /// The task that waits for a message that is too large, or for so many bytes to be sent.
    session: AtomicWaker,
}

/// The number of awaited bytes if no task waits.
const NOTHING_AWAITED: u64 = u64::MAX;

/// The connection is not upgraded.
const HTTP: u8 = 0;
/// The connection is upgraded.
const UPGRADED: u8 = 1;
/// It is upgraded, and its client has sent a message that is too large.
const TOO_LARGE: u8 = 2;
/// The session has sent everything: the connection ends when its client has closed its side.
const ENDING: u8 = 3;

/// A request that is being served, until this is dropped.
pub struct ActiveRequest {
    activity: Arc<ConnectionActivity>,
    since: u64,
}

impl ConnectionActivity {
    pub fn new(began: Instant) -> Arc<Self> {
        let (idle, buffered) = (AtomicU64::new(since(began)), AtomicUsize::new(0));
        let (id, upgrade) = (OnceLock::new(), AtomicU8::new(HTTP));
        let (sent, awaited) = (AtomicU64::new(0), AtomicU64::new(NOTHING_AWAITED));
        let [next, session] = [AtomicWaker::new(), AtomicWaker::new()];
        Arc::new(Self { began, idle, buffered, next, id, upgrade, sent, awaited, session })
    }

    /// Marks the connection as busy until the result is dropped.
    pub fn begin(self: &Arc<Self>) -> ActiveRequest {
        self.set_busy();
        ActiveRequest { activity: self.clone(), since: since(self.began) }
    }

    /// Marks the connection as busy.
    pub fn set_busy(&self) {
        if !self.is_upgraded() {
            self.idle.store(BUSY, Ordering::Relaxed);
        }
    }

    /// Marks the client as waited for, since then.
    pub fn wait_for_client(&self, since: u64) {
        if !self.is_upgraded() {
            self.idle.store(since, Ordering::Relaxed);
        }
        self.wake();
    }

    /// Its number in the table.
    pub fn id(&self) -> Option<u64> {
        self.id.get().copied()
    }

    pub fn set_id(&self, id: u64) {
        let _ = self.id.set(id);
    }

    /// Marks the connection as upgraded. It is idle until it is settled, and again when it ends.
    pub fn upgrade(&self) {
        self.upgrade.store(UPGRADED, Ordering::Relaxed);
        self.idle.store(since(self.began), Ordering::Relaxed);
    }

    pub fn pin(&self) {
        self.idle.store(BUSY, Ordering::Relaxed);
    }

    /// The session has sent everything.
    pub fn end(&self) {
        if self.upgrade.swap(ENDING, Ordering::Relaxed) != ENDING {
            self.idle.store(since(self.began), Ordering::Relaxed);
        }
        self.wake();
    }

    pub fn is_upgraded(&self) -> bool {
        self.upgrade.load(Ordering::Relaxed) != HTTP
    }

    pub fn is_ending(&self) -> bool {
        self.upgrade.load(Ordering::Relaxed) == ENDING
    }

    /// The client has sent a message that is too large.
    pub fn set_too_large(&self) {
        let _ = self.upgrade.compare_exchange(UPGRADED, TOO_LARGE, Ordering::Relaxed, Ordering::Relaxed);
        self.session.wake();
    }

    /// Ready when the client has sent a message that is too large.
    pub fn poll_too_large(&self, cx: &Context<'_>) -> Poll<()> {
        self.session.register(cx.waker());
        if self.upgrade.load(Ordering::Relaxed) == TOO_LARGE { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Counts bytes sent after an upgrade.
    pub fn add_sent(&self, bytes: usize) {
        let sent = self.sent.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if sent >= self.awaited.load(Ordering::Relaxed) {
            self.session.wake();
        }
    }

    /// Bytes that were sent since the upgrade.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Ready when so many bytes were sent since the upgrade. Only the task of [`Self::poll_too_large`] may wait for it.
    pub fn poll_sent(&self, bytes: u64, cx: &Context<'_>) -> Poll<()> {
        self.session.register(cx.waker());
        let is_sent = self.sent() >= bytes;
        self.awaited.store(if is_sent { NOTHING_AWAITED } else { bytes }, Ordering::Relaxed);
        if is_sent { Poll::Ready(()) } else { Poll::Pending }
    }

    pub fn is_busy(&self) -> bool {
        self.idle() == BUSY
    }

    /// Wakes the task that waits for the next request.
    pub fn wake(&self) {
        self.next.wake();
    }

    /// Milliseconds on the table's clock since when its client is waited for, or [`BUSY`].
    pub fn idle(&self) -> u64 {
        self.idle.load(Ordering::Relaxed)
    }

    /// The memory that it holds, in bytes.
    pub fn buffered(&self) -> usize {
        self.buffered.load(Ordering::Relaxed)
    }

    /// Sets the memory that it holds, in bytes; returns the former value.
    pub fn set_buffered(&self, bytes: usize) -> usize {
        self.buffered.swap(bytes, Ordering::Relaxed)
    }

    pub fn register(&self, next: &Waker) {
        self.next.register(next);
    }
}

impl ActiveRequest {
    /// When it began, on the table's clock.
    pub fn since(&self) -> u64 {
        self.since
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.activity.wait_for_client(since(self.activity.began));
    }
}

/// Milliseconds since then.
pub fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(BUSY - 1)
}
