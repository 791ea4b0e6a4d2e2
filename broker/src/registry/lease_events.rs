//! The events of the task that publishes leases, [`push`](super::push).

use tokio::sync::mpsc;
use wgkex_common::WorkerName;
use wgkex_common::wire::lease::{AnnouncedServers, LeaseRequest};

/// Events that wait at most.
const QUEUE: usize = 4096;

/// An event for the task.
#[derive(Debug, Clone)]
pub enum LeaseEvent {
    /// A worker announced its servers.
    Announced(WorkerName, AnnouncedServers),
    /// A worker requests leases.
    Requested(WorkerName, LeaseRequest),
}

/// Sends events to the task. Clones share it.
pub type LeaseSender = mpsc::Sender<LeaseEvent>;
/// Receives the events in the task.
pub type LeaseReceiver = mpsc::Receiver<LeaseEvent>;

/// The queue of the task.
#[must_use]
pub fn channel() -> (LeaseSender, LeaseReceiver) {
    mpsc::channel(QUEUE)
}
