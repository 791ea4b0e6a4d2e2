//! What the task that publishes leases, [`push`](super::push), is told.

use tokio::sync::mpsc;
use wgkex_common::WorkerName;
use wgkex_common::wire::lease::{AnnouncedServers, LeaseRequest};

/// Events that wait at most.
const QUEUE: usize = 4096;

/// What the task is told.
#[derive(Debug, Clone)]
pub enum LeaseEvent {
    /// The servers that a worker is.
    Announced(WorkerName, AnnouncedServers),
    /// A worker asks for leases.
    Requested(WorkerName, LeaseRequest),
}

/// Tells the task. Clones share it.
pub type LeaseSender = mpsc::Sender<LeaseEvent>;
/// What the task receives.
pub type LeaseReceiver = mpsc::Receiver<LeaseEvent>;

/// The queue of the task.
#[must_use]
pub fn channel() -> (LeaseSender, LeaseReceiver) {
    mpsc::channel(QUEUE)
}
