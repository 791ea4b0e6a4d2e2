//! Whose turn it is on a connection, since when, and what it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Waker;
use std::time::Instant;

use futures_util::task::AtomicWaker;

/// In place of a time: a request is being served.
pub const BUSY: u64 = u64::MAX;

/// The state that a connection's entry in the table, its stream and its request share.
pub struct Flow {
    began: Instant,
    /// Milliseconds on the table's clock since when its client is waited for, or [`BUSY`].
    idle: AtomicU64,
    /// What it holds, in bytes.
    held: AtomicUsize,
    /// The task that waits until the next request may come.
    next: AtomicWaker,
}

/// A request that is being served, until this is dropped.
pub struct ActiveRequest {
    flow: Arc<Flow>,
    since: u64,
}

impl Flow {
    pub fn new(began: Instant) -> Arc<Self> {
        let (idle, held) = (AtomicU64::new(since(began)), AtomicUsize::new(0));
        Arc::new(Self { began, idle, held, next: AtomicWaker::new() })
    }

    /// A request is being served.
    pub fn begin(self: &Arc<Self>) -> ActiveRequest {
        self.set_busy();
        ActiveRequest { flow: self.clone(), since: since(self.began) }
    }

    /// It is this program's turn.
    pub fn set_busy(&self) {
        self.idle.store(BUSY, Ordering::Relaxed);
    }

    /// It is the client's turn, since then.
    pub fn wait_for_client(&self, since: u64) {
        self.idle.store(since, Ordering::Relaxed);
        self.wake();
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

    /// What it holds, in bytes.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// It holds so many bytes from now on; returns how many it held before.
    pub fn hold(&self, bytes: usize) -> usize {
        self.held.swap(bytes, Ordering::Relaxed)
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
        self.flow.wait_for_client(since(self.flow.began));
    }
}

/// Milliseconds since then.
pub fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(BUSY - 1)
}
