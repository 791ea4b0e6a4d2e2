//! The handle by which other tasks reach the reconciler's task, without waiting for the kernel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use wgkex_common::access_lists::Admission;
use wgkex_common::runtime::metrics::set;
use wgkex_common::wire::message::Age;
use wgkex_common::{Domain, KeyId, PublicKey};

use super::{DomainStates, KeySnapshot, Metrics};

/// Keys that wait for a batch at most; all retained keys of a large fleet fit.
const QUEUED_KEYS_MAX: usize = 65_536;

/// A new admission, and the keys that were denied just now, each with the time of its record.
#[derive(Debug, Default)]
pub(super) struct AdmissionUpdate {
    pub admission: Option<Arc<Admission>>,
    pub denied: BTreeMap<PublicKey, u64>,
}

/// Keys that arrived and are not in the kernel, without those in the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WaitingKeys {
    /// Their number.
    pub keys: usize,
    /// The arrival of the oldest.
    pub since: Option<Instant>,
}

/// The task's end of the queues.
pub(super) struct Inbox {
    pub keys: mpsc::Receiver<KeyId>,
    pub live: mpsc::Receiver<(Domain, KeySnapshot)>,
    admission_update: Arc<Mutex<AdmissionUpdate>>,
    pub admission_changed: Arc<Notify>,
    pub reconnected: Arc<Notify>,
    pub refresh: Arc<Notify>,
    pub waiting: watch::Sender<WaitingKeys>,
}

/// The handle of the [`Reconciler`](super::Reconciler), which ends when all handles are dropped.
#[derive(Debug, Clone)]
pub struct ReconcilerHandle {
    keys: mpsc::Sender<KeyId>,
    live: mpsc::Sender<(Domain, KeySnapshot)>,
    admission_update: Arc<Mutex<AdmissionUpdate>>,
    admission_changed: Arc<Notify>,
    reconnected: Arc<Notify>,
    refresh: Arc<Notify>,
    state: watch::Receiver<DomainStates>,
    waiting: watch::Receiver<WaitingKeys>,
    pub(super) metrics: Metrics,
}

/// A handle, which gives access to `state`, and the task's end of its queues.
pub(super) fn channel(state: watch::Receiver<DomainStates>, metrics: Metrics) -> (ReconcilerHandle, Inbox) {
    let (keys, keys_receiver) = mpsc::channel(QUEUED_KEYS_MAX);
    let (live, live_receiver) = mpsc::channel(1);
    let (waiting_sender, waiting) = watch::channel(WaitingKeys::default());
    let handle = ReconcilerHandle {
        keys,
        live,
        admission_update: Arc::default(),
        admission_changed: Arc::default(),
        reconnected: Arc::default(),
        refresh: Arc::default(),
        state,
        waiting,
        metrics,
    };
    let inbox = Inbox {
        keys: keys_receiver,
        live: live_receiver,
        admission_update: handle.admission_update.clone(),
        admission_changed: handle.admission_changed.clone(),
        reconnected: handle.reconnected.clone(),
        refresh: handle.refresh.clone(),
        waiting: waiting_sender,
    };
    (handle, inbox)
}

impl Inbox {
    /// The new admission, and the keys denied since the last call.
    pub(super) fn take_admission_update(&self) -> AdmissionUpdate {
        std::mem::take(&mut *self.admission_update.lock())
    }
}

impl ReconcilerHandle {
    /// Queues a key that arrived, without waiting. A key for a full queue is dropped and counted.
    pub fn enqueue(&self, key: KeyId) {
        self.metrics.keys_received.with_label_values(&[key.domain.name()]).inc();
        if self.keys.try_send(key).is_err() {
            self.metrics.keys_dropped.with_label_values(&["queue"]).inc();
        }
        let length = self.keys.max_capacity() - self.keys.capacity();
        set(&self.metrics.queue_length, length);
    }

    /// Passes live keys that this gateway may lack; waits while the task is busy.
    pub async fn learn(&self, domain: Domain, keys: BTreeMap<PublicKey, Age>) {
        // An error means that the task has ended.
        let _ = self.live.send((domain, keys)).await;
    }

    /// Sets the new admission, and the keys that were denied just now, each with the time of its record: their outcomes
    /// are published. Never waits.
    pub fn set_admission(&self, admission: Arc<Admission>, denied: impl IntoIterator<Item = (PublicKey, u64)>) {
        let mut update = self.admission_update.lock();
        update.admission = Some(admission);
        update.denied.extend(denied);
        drop(update);
        self.admission_changed.notify_one();
    }

    /// MQTT was disconnected, or a broker is new: earlier reports may be lost.
    pub fn reconnected(&self) {
        self.reconnected.notify_one();
    }

    /// Requests an early read of all tables; the result is published in the state.
    pub fn refresh(&self) {
        self.refresh.notify_one();
    }

    /// The state of every domain, now and whenever it changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<DomainStates> {
        self.state.clone()
    }

    /// The number of keys that wait for the kernel.
    #[must_use]
    pub fn waiting(&self) -> watch::Receiver<WaitingKeys> {
        self.waiting.clone()
    }
}
