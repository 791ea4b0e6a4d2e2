//! The task that owns the kernel: keys that arrived are applied as one batch, and while the kernel is busy the next
//! batch is collected. It also reads the tables when that is due, restores lost objects and sweeps stale peers.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use wgkex_common::runtime::heartbeat::Heartbeat;
use wgkex_common::storage::key_store::{Keys, WriteBuffer};
use wgkex_common::wire::drain::{Deadline, Drain};
use wgkex_common::wire::revoke_outcome::RevokeOutcome;
use wgkex_common::{Domain, KeyId, PublicKey, RejectReason, Reserved};
use wgkex_kernel::Kernel;

use super::domain::DomainReconciler;
use super::driver::Driver;
use super::handle::{self, AdmissionUpdate, Inbox, ReconcilerHandle, WaitingKeys};
use super::reports::{ReportSender, Reports, RevokedKey};
use super::{DomainStates, KeySnapshot, Metrics, clock, clocks};
use crate::peers::{Clocks, Policy};
use crate::profiles::Profile;

/// Keys in a batch at most.
const BATCH_KEYS_MAX: usize = 4_096;

/// After a batch that took longer than this, keys are collected for as long as it took: with a slow kernel each key of
/// a burst must cost less than a single one.
const SLOW_BATCH_MIN: Duration = Duration::from_millis(3);

/// The longest time that keys are collected.
const BATCH_WINDOW: Duration = Duration::from_millis(50);

/// If so many keys wait after a batch, the next one is applied without further collecting.
const BATCH_FULL_ENOUGH: usize = 64;

/// With a backlog, waiting keys are counted this often.
const COUNT_WAITING: Duration = Duration::from_millis(500);

/// While the backlog is longer than this, live keys that may be lacking are not taken in: their sender waits.
const BACKLOG_MAX: usize = 2_048;

/// Owns the kernel of a gateway.
pub struct Reconciler<K> {
    kernel: K,
    pub(super) domains: BTreeMap<Domain, DomainReconciler>,
    inbox: Inbox,
    batch: Vec<KeyId>,
    reserved: watch::Receiver<Reserved>,
    /// Since when the gate is closed, so that keys wait; none if it is open.
    gate: watch::Receiver<Option<std::time::Instant>>,
    /// Whether the gateway drains.
    drain: watch::Receiver<Option<Drain>>,
    buffer: WriteBuffer,
    /// The last event was a batch of keys.
    other_work_first: bool,
    /// The next batch is collected until this time.
    collects_until: Option<Instant>,
    /// When the waiting keys were last counted.
    counted_at: Option<std::time::Instant>,
    reports: ReportSender,
    heartbeat: Heartbeat,
    metrics: Metrics,
}

/// The parts from which a reconciler is made.
pub struct ReconcilerParts<K> {
    /// The kernel, which the reconciler owns from now on.
    pub kernel: K,
    /// The domains that it serves.
    pub domains: BTreeSet<Domain>,
    /// The profile of the domains' keys.
    pub profile: Arc<dyn Profile>,
    /// When peers are stale, and how many there may be.
    pub policy: Policy,
    /// The buffer of records that are to be stored.
    pub buffer: WriteBuffer,
    /// The records of the last run of this program: these keys are to be in the kernel.
    pub remembered: Keys,
    /// Reserved keys and addresses.
    pub reserved: watch::Receiver<Reserved>,
    /// Since when the gate is closed, so that arriving and missing keys wait; none if it is open.
    pub gate: watch::Receiver<Option<std::time::Instant>>,
    /// Whether the gateway drains: past the deadline peers are removed.
    pub drain: watch::Receiver<Option<Drain>>,
    /// Its metrics.
    pub metrics: Metrics,
}

/// An event that the reconciler handles.
#[derive(Debug)]
pub(super) enum TaskEvent {
    /// Keys arrived, in this order.
    Keys(Vec<KeyId>),
    /// These keys are live, and this gateway may lack some of them.
    Snapshot(Domain, KeySnapshot),
    /// Earlier reports may be lost.
    Reconnected,
    /// The admission has changed.
    AdmissionChanged,
    /// The gate was closed or opened.
    GateChanged,
    /// The drain has begun, passed its deadline, or ended.
    DrainChanged,
    /// Links or addresses may have changed, or a read was requested.
    LinkChanged,
    /// A read of this domain's tables is due.
    ReadDue(Domain),
    /// This domain has a backlog, and no other event is waiting.
    BacklogReady(Domain),
}

impl<K: Kernel> Reconciler<K> {
    /// A reconciler that reads its domains at once, its handle, and its reports.
    pub fn new(parts: ReconcilerParts<K>) -> (Self, ReconcilerHandle, Reports) {
        let ReconcilerParts { kernel, domains, profile, policy, buffer, remembered, reserved, gate, drain, metrics } =
            parts;
        let (state, state_receiver) = watch::channel(DomainStates::new());
        let (handle, inbox) = handle::channel(state_receiver, metrics.clone());
        let deadline = passed_deadline(drain.borrow().as_ref());
        let domain = |name: Domain| {
            let mut domain = DomainReconciler::new(name.clone(), profile.clone(), policy, clock());
            if let Some(deadline) = deadline {
                domain.resume_removals(deadline, clock());
            }
            (name, domain)
        };
        let mut domains: BTreeMap<_, _> = domains.into_iter().map(domain).collect();
        for (KeyId { domain, key }, record) in remembered {
            if let Some(domain) = domains.get_mut(&domain) {
                domain.remember(key, record);
            }
        }
        let (sender, reports) = ReportSender::new(state, metrics.clone());
        let reconciler = Self {
            kernel,
            domains,
            inbox,
            batch: Vec::new(),
            reserved,
            gate,
            drain,
            buffer,
            other_work_first: false,
            collects_until: None,
            counted_at: None,
            reports: sender,
            heartbeat: Heartbeat::default(),
            metrics,
        };
        (reconciler, handle, reports)
    }

    /// The heartbeat of its task.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    /// Works until `stop`, or until every [`ReconcilerHandle`] is dropped. A running call of the kernel is not waited
    /// for: its changes are idempotent.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut work = pin!(self.work());
        tokio::select! {
            () = &mut stop => {}
            () = &mut work => {}
        }
    }

    async fn work(mut self) {
        self.apply_admission(clocks()).await;
        for domain in self.domains.keys().cloned().collect::<Vec<_>>() {
            self.handle(TaskEvent::ReadDue(domain), clocks()).await;
        }
        let heartbeat = self.heartbeat();
        while let Some(event) = heartbeat.wait_for(self.next()).await {
            self.handle(event, clocks()).await;
        }
    }

    /// Waits for the next event. After each batch of keys other work that is due has its turn, so that neither
    /// starves the other and a key never waits for more than one read or one slice of the backlog.
    async fn next(&mut self) -> Option<TaskEvent> {
        let is_closed = self.gate.borrow_and_update().is_some();
        let ready = self.domains.values().find(|domain| domain.has_backlog() && !is_closed);
        let ready = ready.map(|domain| TaskEvent::BacklogReady(domain.name().clone()));
        let due = self.domains.values().min_by_key(|domain| domain.read_at());
        let due = due.map(|domain| (Instant::from_std(domain.read_at()), TaskEvent::ReadDue(domain.name().clone())));
        let backlog: usize = self.domains.values().map(DomainReconciler::backlog_len).sum();
        let has_room = !is_closed && backlog < BACKLOG_MAX;
        let mut other = pin!(other(due, ready));
        let inbox = &mut self.inbox;
        if std::mem::take(&mut self.other_work_first) {
            if let Some(event) = other.as_mut().now_or_never() {
                return Some(event);
            }
            if has_room && let Ok((domain, keys)) = inbox.live.try_recv() {
                return Some(TaskEvent::Snapshot(domain, keys));
            }
        }
        tokio::select! {
            biased;
            () = inbox.admission_changed.notified() => Some(TaskEvent::AdmissionChanged),
            () = changed(&mut self.gate) => Some(TaskEvent::GateChanged),
            () = changed(&mut self.drain) => Some(TaskEvent::DrainChanged),
            () = self.kernel.changed() => Some(TaskEvent::LinkChanged),
            () = inbox.refresh.notified() => Some(TaskEvent::LinkChanged),
            () = inbox.reconnected.notified() => Some(TaskEvent::Reconnected),
            count = collect_batch(self.collects_until, &mut inbox.keys, &mut self.batch), if !is_closed => {
                self.other_work_first = true;
                (count > 0).then(|| TaskEvent::Keys(std::mem::take(&mut self.batch)))
            }
            Some((domain, keys)) = inbox.live.recv(), if has_room => Some(TaskEvent::Snapshot(domain, keys)),
            event = other => Some(event),
        }
    }

    pub(super) async fn handle(&mut self, event: TaskEvent, now: Clocks) {
        match event {
            TaskEvent::Keys(keys) => self.install(keys, now).await,
            TaskEvent::Snapshot(domain, keys) => self.learn(&domain, keys, now),
            TaskEvent::Reconnected => self.domains.values_mut().for_each(DomainReconciler::report_all),
            TaskEvent::AdmissionChanged => self.apply_admission(now).await,
            TaskEvent::GateChanged => {}
            TaskEvent::DrainChanged => self.apply_drain(now),
            TaskEvent::LinkChanged => self.domains.values_mut().for_each(|domain| domain.expedite(now.monotonic)),
            TaskEvent::ReadDue(domain) => {
                if let Some(mut driver) = self.driver(&domain, now) {
                    // Failed changes are tried again after the next read.
                    let _ = driver.read(&BTreeSet::new()).await;
                }
            }
            TaskEvent::BacklogReady(domain) => {
                if let Some(mut driver) = self.driver(&domain, now) {
                    driver.catch_up().await;
                }
            }
        }
        self.write_changes();
        self.count_waiting(now.monotonic);
    }

    /// Publishes the number of waiting keys; with a backlog not at every event.
    fn count_waiting(&mut self, now: std::time::Instant) {
        let is_recent = self.counted_at.is_some_and(|at| now.saturating_duration_since(at) < COUNT_WAITING);
        if is_recent && self.domains.values().any(DomainReconciler::has_backlog) {
            return;
        }
        self.counted_at = Some(now);
        let counts = self.domains.values().map(DomainReconciler::waiting);
        let waiting = counts.fold(WaitingKeys::default(), |WaitingKeys { keys, since }, (number, oldest)| {
            WaitingKeys { keys: keys + number, since: since.into_iter().chain(oldest).min() }
        });
        self.inbox.waiting.send_replace(waiting);
    }

    fn driver(&mut self, domain: &Domain, now: Clocks) -> Option<Driver<'_, K>> {
        let Self { kernel, domains, reserved, reports, heartbeat, metrics, .. } = self;
        let domain = domains.get_mut(domain)?;
        Some(Driver { kernel, domain, reports, reserved, heartbeat, metrics, now })
    }

    async fn install(&mut self, keys: Vec<KeyId>, now: Clocks) {
        let begun = Instant::now();
        self.reports.set_queue(self.inbox.keys.len());
        let mut by_domain = BTreeMap::<Domain, Vec<PublicKey>>::new();
        for KeyId { domain, key } in keys {
            by_domain.entry(domain).or_default().push(key);
        }
        for (domain, keys) in by_domain {
            if let Some(mut driver) = self.driver(&domain, now) {
                driver.install(keys).await;
            }
        }
        let took = begun.elapsed();
        let collects = took > SLOW_BATCH_MIN && self.inbox.keys.len() < BATCH_FULL_ENOUGH;
        self.collects_until = collects.then(|| Instant::now() + took.min(BATCH_WINDOW));
    }

    fn learn(&mut self, domain: &Domain, keys: KeySnapshot, now: Clocks) {
        let Self { domains, reserved, metrics, .. } = self;
        if let Some(domain) = domains.get_mut(domain) {
            let learnt = domain.on_live(keys, &reserved.borrow(), now.monotonic);
            metrics.keys_learnt.with_label_values(&[domain.name().name()]).inc_by(learnt as u64);
        }
    }

    /// Applies the drain: peers are removed once its deadline is over, until it ends.
    fn apply_drain(&mut self, now: Clocks) {
        let deadline = passed_deadline(self.drain.borrow().as_ref());
        for domain in self.domains.values_mut() {
            domain.set_deadline(deadline, now.monotonic);
        }
    }

    /// Applies the new admission, removes peers that are no longer admitted, and publishes the outcomes of keys that
    /// were denied just now.
    async fn apply_admission(&mut self, now: Clocks) {
        let AdmissionUpdate { admission, denied } = self.inbox.take_admission_update();
        let Some(admission) = admission else { return };
        let keys: BTreeSet<PublicKey> = denied.keys().copied().collect();
        let mut outcomes = BTreeMap::<PublicKey, Result<(), RejectReason>>::new();
        for name in self.domains.keys().cloned().collect::<Vec<_>>() {
            let Some(mut driver) = self.driver(&name, now) else { continue };
            driver.domain.apply_admission(admission.clone());
            if keys.is_empty() && !driver.domain.has_denied() {
                continue;
            }
            for (key, outcome) in driver.remove_denied(&keys).await {
                let worst = outcomes.entry(key).or_insert(Ok(()));
                if worst.is_ok() {
                    *worst = outcome;
                }
            }
        }
        self.reports.revoked(denied.into_iter().map(|(key, at)| {
            let outcome = outcomes.remove(&key).map_or(RevokeOutcome::Absent, RevokeOutcome::from);
            RevokedKey { at, key, outcome }
        }));
    }

    /// Buffers the changed records, or all if a full write is needed.
    fn write_changes(&mut self) {
        let all = self.buffer.needs_full_write();
        for (domain, state) in &mut self.domains {
            for (key, record) in state.take_changed(all) {
                match record {
                    Some(record) => self.buffer.put(domain, key, record),
                    None => self.buffer.remove(domain, key),
                }
            }
        }
    }
}

/// Receives the waiting keys, and those that arrive until then; returns their number, 0 if the queue is closed.
/// Cancel-safe.
async fn collect_batch(until: Option<Instant>, keys: &mut mpsc::Receiver<KeyId>, batch: &mut Vec<KeyId>) -> usize {
    if let Some(until) = until {
        tokio::time::sleep_until(until).await;
    }
    keys.recv_many(batch, BATCH_KEYS_MAX).await
}

/// The deadline of the drain, if it is over.
fn passed_deadline(drain: Option<&Drain>) -> Option<Deadline> {
    drain.and_then(Drain::passed_deadline)
}

/// Returns when the value has changed since it was last read.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// The due event at its time, or else the backlog, at once.
async fn other(due: Option<(Instant, TaskEvent)>, ready: Option<TaskEvent>) -> TaskEvent {
    match (due, ready) {
        (Some((time, event)), _) if time <= Instant::now() => event,
        (_, Some(event)) => event,
        (Some((time, event)), None) => {
            tokio::time::sleep_until(time).await;
            event
        }
        (None, None) => pending().await,
    }
}
