//! The events of the task that publishes leases, [`push`](super::push).

use tokio::sync::mpsc;
use wgkex_common::WorkerName;
use wgkex_common::wire::lease::{AnnouncedServers, LeaseRequest};

/// Events that wait at most.
const REGISTRY_EVENTS_MAX: usize = 4096;

/// An event for the task.
#[derive(Debug, Clone)]
pub enum RegistryEvent {
    /// A worker announced its servers.
    Announced(WorkerName, AnnouncedServers),
    /// A worker requests leases.
    Requested(WorkerName, LeaseRequest),
}

/// Sends events to the task. Clones share it.
pub type RegistryEventSender = mpsc::Sender<RegistryEvent>;
/// Receives the events in the task.
pub type RegistryEventReceiver = mpsc::Receiver<RegistryEvent>;

/// The queue of the task.
#[must_use]
pub fn channel() -> (RegistryEventSender, RegistryEventReceiver) {
    mpsc::channel(REGISTRY_EVENTS_MAX)
}
