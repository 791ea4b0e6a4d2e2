//! The shared handle to the keys in flight, and the requests that wait for their keys.
//!
//! [`service`](super::service) begins and awaits requests, the [`publisher`](super::publisher) takes queued keys, and
//! [`crate::bus`] passes on outcomes.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::debug;
use wgkex_common::access_lists::Admission;
use wgkex_common::wire::message::Applied;
use wgkex_common::{Domain, KeyId, WorkerName};

use super::in_flight::{Confirmations, InFlight, Ticket};

/// The keys in flight. Clones share them.
#[derive(Debug, Clone)]
pub struct InFlightHandle {
    table: Arc<Mutex<InFlight>>,
    /// Notified when a key is queued.
    pub(super) queued: Arc<Notify>,
    /// Notified when unacknowledged publications may have to be given up.
    pub(super) review: Arc<Notify>,
}

/// A request that waits for its key. Dropped, it ends.
#[derive(Debug)]
pub struct PendingRequest {
    in_flight: InFlightHandle,
    key: KeyId,
    ticket: Ticket,
}

impl InFlightHandle {
    /// No key of these domains is in flight.
    #[must_use]
    pub fn new(domains: BTreeSet<Domain>, admission: Arc<Admission>) -> Self {
        let table = Arc::new(Mutex::new(InFlight::new(domains, admission)));
        Self { table, queued: Arc::default(), review: Arc::default() }
    }

    /// The table, locked: for one query only.
    pub fn lock(&self) -> MutexGuard<'_, InFlight> {
        self.table.lock()
    }

    /// Begins a request for `key`. None if too many keys are queued.
    #[must_use]
    pub fn request(&self, key: &KeyId, is_established: bool) -> Option<PendingRequest> {
        let ticket = self.lock().request(key, is_established, Instant::now().into_std())?;
        if !ticket.is_joined {
            self.queued.notify_one();
        }
        Some(PendingRequest { in_flight: self.clone(), key: key.clone(), ticket })
    }

    /// Queues `key` for publication, without waiting; best effort.
    pub fn publish(&self, key: &KeyId, is_established: bool) {
        if self.lock().publish(key, is_established, Instant::now().into_std()).is_some() {
            self.queued.notify_one();
        }
    }

    /// Records the outcomes of a batch of keys at `worker`.
    pub fn confirmed(&self, worker: &WorkerName, Applied { domain, installed, failed }: Applied) {
        for (key, reason) in &failed {
            debug!(worker = worker.as_str(), domain, ?key, %reason, "gateway did not take a key");
        }
        let installed = installed.into_iter().map(|key| (key, Ok(())));
        let rejected = failed.into_iter().map(|(key, reason)| (key, Err(reason)));
        self.lock().confirmed(worker, &domain, installed.chain(rejected));
    }

    /// Applies another access admission: also to unacknowledged publications.
    pub fn apply(&self, admission: Arc<Admission>) {
        self.lock().apply(admission, Instant::now().into_std());
        self.review.notify_waiters();
    }

    /// Drops entries whose time is over, also unacknowledged publications.
    pub fn expire(&self) {
        self.lock().expire(Instant::now().into_std());
        self.review.notify_waiters();
    }
}

impl PendingRequest {
    /// Whether its key was queued by an earlier request.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.ticket.is_joined
    }

    /// Whether the MQTT server has acknowledged the key by `until`.
    pub async fn is_published(&self, until: Instant) -> bool {
        let check = |table: &InFlight| table.is_published(&self.key, self.ticket.publication);
        self.wait(until, check).await.unwrap_or(false)
    }

    /// Whether its key is acknowledged or given up.
    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        self.in_flight.lock().is_published(&self.key, self.ticket.publication).is_some()
    }

    /// The first result of `check` on the confirmations of the key, by `until`.
    pub async fn find<T>(&self, until: Instant, mut check: impl FnMut(&Confirmations) -> Option<T>) -> Option<T> {
        loop {
            let changed = self.ticket.changed.notified();
            // The check locks the gateways, so the table is not locked meanwhile.
            let confirmations = self.confirmations();
            if let Some(found) = check(&confirmations) {
                return Some(found);
            }
            timeout_at(until, changed).await.ok()?;
        }
    }

    /// The outcomes of the key at each gateway since the request began.
    #[must_use]
    pub fn confirmations(&self) -> Confirmations {
        self.in_flight.lock().confirmations(&self.key, self.ticket.begun)
    }

    /// Its time is over: outcomes from now on are kept for the router's next request.
    pub fn timed_out(self, is_established: bool) {
        self.in_flight.lock().timed_out(&self.key, is_established, Instant::now().into_std());
    }

    async fn wait<T>(&self, until: Instant, check: impl Fn(&InFlight) -> Option<T>) -> Option<T> {
        loop {
            let changed = self.ticket.changed.notified();
            if let Some(found) = check(&self.in_flight.lock()) {
                return Some(found);
            }
            timeout_at(until, changed).await.ok()?;
        }
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        self.in_flight.lock().end(&self.key, self.ticket.begun);
    }
}
