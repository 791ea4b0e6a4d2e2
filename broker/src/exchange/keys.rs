//! The shared handle to the keys in flight: requests wait here for what becomes of their keys.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::debug;
use wgkex_common::access_lists::Admission;
use wgkex_common::wire::message::Applied;
use wgkex_common::{Domain, WorkerName};

use super::in_flight::{Confirmations, InFlight, KeyId, Ticket};

/// The keys in flight. Clones share them.
#[derive(Debug, Clone)]
pub struct Keys {
    table: Arc<Mutex<InFlight>>,
    /// Notified when a key is queued.
    pub(super) queued: Arc<Notify>,
    /// Notified when publications under way may have to be given up.
    pub(super) review: Arc<Notify>,
}

/// One request that waits; it no longer does when this is dropped.
#[derive(Debug)]
pub struct Request {
    keys: Keys,
    key: KeyId,
    ticket: Ticket,
}

impl Keys {
    /// No key of these domains is in flight.
    #[must_use]
    pub fn new(domains: BTreeSet<Domain>, policy: Arc<Admission>) -> Self {
        let table = Arc::new(Mutex::new(InFlight::new(domains, policy)));
        Self { table, queued: Arc::default(), review: Arc::default() }
    }

    /// The table, for as short as one question takes.
    pub fn lock(&self) -> MutexGuard<'_, InFlight> {
        self.table.lock()
    }

    /// Begins a request for `key`. None if too many keys are queued.
    #[must_use]
    pub fn request(&self, key: &KeyId, is_proven: bool) -> Option<Request> {
        let ticket = self.lock().request(key, is_proven, Instant::now().into_std())?;
        if !ticket.is_joined {
            self.queued.notify_one();
        }
        Some(Request { keys: self.clone(), key: key.clone(), ticket })
    }

    /// Has `key` published, without waiting, if there is a place.
    pub fn publish(&self, key: &KeyId, is_proven: bool) {
        if self.lock().publish(key, is_proven, Instant::now().into_std()).is_some() {
            self.queued.notify_one();
        }
    }

    /// `worker` said what became of a batch of keys.
    pub fn confirmed(&self, worker: &WorkerName, Applied { domain, installed, failed }: Applied) {
        for (key, reason) in &failed {
            debug!(worker = worker.as_str(), domain, ?key, %reason, "gateway did not take a key");
        }
        let installed = installed.into_iter().map(|key| (key, Ok(())));
        let rejected = failed.into_iter().map(|(key, reason)| (key, Err(reason)));
        self.lock().confirmed(worker, &domain, installed.chain(rejected));
    }

    /// Applies another access policy: also to what is under way.
    pub fn apply(&self, policy: Arc<Admission>) {
        self.lock().apply(policy, Instant::now().into_std());
        self.review.notify_waiters();
    }

    /// Drops what took too long: also of what is under way.
    pub fn expire(&self) {
        self.lock().expire(Instant::now().into_std());
        self.review.notify_waiters();
    }
}

impl Request {
    /// Whether its key was queued by an earlier request.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.ticket.is_joined
    }

    /// Whether the MQTT server has acknowledged its key by `until`.
    pub async fn is_published(&self, until: Instant) -> bool {
        let check = |table: &InFlight| table.is_published(&self.key, self.ticket.publication);
        self.wait(until, check).await.unwrap_or(false)
    }

    /// Whether its key is acknowledged or given up.
    #[cfg(test)]
    pub(super) fn is_over(&self) -> bool {
        self.keys.lock().is_published(&self.key, self.ticket.publication).is_some()
    }

    /// What `check` finds, by `until`, in what gateways say of the key.
    pub async fn find<T>(&self, until: Instant, mut check: impl FnMut(&Confirmations) -> Option<T>) -> Option<T> {
        loop {
            let changed = self.ticket.changed.notified();
            // The check asks the gateways: not with the table locked.
            let confirmations = self.confirmations();
            if let Some(found) = check(&confirmations) {
                return Some(found);
            }
            timeout_at(until, changed).await.ok()?;
        }
    }

    /// What gateways said of the key since the request began.
    #[must_use]
    pub fn confirmations(&self) -> Confirmations {
        self.keys.lock().confirmations(&self.key, self.ticket.begun)
    }

    /// Its time is over: what is said from now on is for the router's next request.
    pub fn timed_out(self, is_proven: bool) {
        self.keys.lock().timed_out(&self.key, is_proven, Instant::now().into_std());
    }

    async fn wait<T>(&self, until: Instant, check: impl Fn(&InFlight) -> Option<T>) -> Option<T> {
        loop {
            let changed = self.ticket.changed.notified();
            if let Some(found) = check(&self.keys.lock()) {
                return Some(found);
            }
            timeout_at(until, changed).await.ok()?;
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.keys.lock().end(&self.key, self.ticket.begun);
    }
}
