//! The one task that owns the kernel: what arrived goes in as one batch, and while the kernel is busy the next batch is
//! collected. It also reads the tables when that is due, restores what is lost and sweeps what is stale.

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
use super::handle::{self, AdmissionUpdate, Inbox, ReconcilerHandle, Waiting};
use super::reports::{ReportSender, Reports, RevokedKey};
use super::{DomainStates, Metrics, Snapshot, clock, clocks};
use crate::peers::{Clocks, Policy};
use crate::profiles::Profile;

/// Keys in a batch at most.
const BATCH: usize = 4_096;

/// After a batch that took longer than this, keys are collected for as long as it took: where a batch is slow, each key
/// of a storm must cost less than one alone.
const SLOW: Duration = Duration::from_millis(3);

/// The longest that keys are collected.
const BATCH_WINDOW: Duration = Duration::from_millis(50);

/// Where so many keys wait after a batch, the next one is not collected any longer.
const BATCH_FULL_ENOUGH: usize = 64;

/// Where many keys wait, they are counted this often.
const COUNT_WAITING: Duration = Duration::from_millis(500);

/// While the backlog is longer than this, live keys that may be lacking are not looked at: they wait with their sender.
const MAX_BACKLOG: usize = 2_048;

/// Owns the kernel of a gateway.
pub struct Reconciler<K> {
    kernel: K,
    pub(super) domains: BTreeMap<Domain, DomainReconciler>,
    inbox: Inbox,
    batch: Vec<KeyId>,
    reserved: watch::Receiver<Reserved>,
    /// Since when keys have to wait, if they have to.
    gate: watch::Receiver<Option<std::time::Instant>>,
    /// Whether the gateway drains.
    drain: watch::Receiver<Option<Drain>>,
    buffer: WriteBuffer,
    /// The last event was a batch of keys.
    other_work_first: bool,
    /// The next batch is collected until then.
    collects_until: Option<Instant>,
    /// When it was last counted how many keys wait.
    counted_at: Option<std::time::Instant>,
    reports: ReportSender,
    heartbeat: Heartbeat,
    metrics: Metrics,
}

/// What a reconciler starts with.
pub struct ReconcilerParts<K> {
    /// The kernel, which is its own from now on.
    pub kernel: K,
    /// What it serves.
    pub domains: BTreeSet<Domain>,
    /// What keys of these domains are to be.
    pub profile: Arc<dyn Profile>,
    /// When peers are stale, and how many there may be.
    pub policy: Policy,
    /// Where it writes down which keys are in the kernel.
    pub buffer: WriteBuffer,
    /// The keys that the last run of this program wrote down: the kernel is to have them.
    pub remembered: Keys,
    /// What is left alone.
    pub reserved: watch::Receiver<Reserved>,
    /// Since when keys have to wait, those that arrive and those that are missing, if they have to.
    pub gate: watch::Receiver<Option<std::time::Instant>>,
    /// Whether the gateway drains: past the deadline peers are removed.
    pub drain: watch::Receiver<Option<Drain>>,
    /// What it counts in.
    pub metrics: Metrics,
}

/// What can happen to a reconciler.
#[derive(Debug)]
pub(super) enum TaskEvent {
    /// Keys arrived, in this order.
    Keys(Vec<KeyId>),
    /// These keys are live, and this gateway may lack some of them.
    Snapshot(Domain, Snapshot),
    /// What was published before may not have arrived.
    Reconnected,
    /// Other keys are admitted than before.
    AdmissionChanged,
    /// Keys have to wait from now on, or no longer.
    GateChanged,
    /// The gateway begins to drain, is past the deadline of that, or drains no longer.
    DrainChanged,
    /// Links or addresses may have changed, or somebody wants to know.
    LinkChanged,
    /// It is time to read this domain's tables.
    ReadDue(Domain),
    /// This domain has a backlog, and there is nothing better to do.
    BacklogReady(Domain),
}

impl<K: Kernel> Reconciler<K> {
    /// A reconciler whose domains are read at once, how others reach it, and what it reports.
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

    /// Works until `stop`, or until every [`ReconcilerHandle`] is gone. What the kernel is doing at that moment is not
    /// waited for: it can be repeated without harm.
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
        let has_room = !is_closed && backlog < MAX_BACKLOG;
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
                    // What it could not do is done at the next read.
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

    /// Publishes how many keys wait, not more often than that is worth its time.
    fn count_waiting(&mut self, now: std::time::Instant) {
        let is_recent = self.counted_at.is_some_and(|at| now.saturating_duration_since(at) < COUNT_WAITING);
        if is_recent && self.domains.values().any(DomainReconciler::has_backlog) {
            return;
        }
        self.counted_at = Some(now);
        let counts = self.domains.values().map(DomainReconciler::waiting);
        let waiting = counts.fold(Waiting::default(), |Waiting { keys, since }, (number, oldest)| Waiting {
            keys: keys + number,
            since: since.into_iter().chain(oldest).min(),
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
        let collects = took > SLOW && self.inbox.keys.len() < BATCH_FULL_ENOUGH;
        self.collects_until = collects.then(|| Instant::now() + took.min(BATCH_WINDOW));
    }

    fn learn(&mut self, domain: &Domain, keys: Snapshot, now: Clocks) {
        let Self { domains, reserved, metrics, .. } = self;
        if let Some(domain) = domains.get_mut(domain) {
            let learnt = domain.on_live(keys, &reserved.borrow(), now.monotonic);
            metrics.keys_learnt.with_label_values(&[domain.name().name()]).inc_by(learnt as u64);
        }
    }

    /// Begins to remove peers where a deadline is over, and ends that where the gateway drains no longer.
    fn apply_drain(&mut self, now: Clocks) {
        let deadline = passed_deadline(self.drain.borrow().as_ref());
        for domain in self.domains.values_mut() {
            domain.set_deadline(deadline, now.monotonic);
        }
    }

    /// Takes over which keys are admitted, removes others, and publishes what became of keys that were denied just now.
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

    /// Has what changed written down, or everything where that is needed.
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

/// Takes the keys that wait, and that come until then; how many there are, none if no more will come. Cancel-safe.
async fn collect_batch(until: Option<Instant>, keys: &mut mpsc::Receiver<KeyId>, batch: &mut Vec<KeyId>) -> usize {
    if let Some(until) = until {
        tokio::time::sleep_until(until).await;
    }
    keys.recv_many(batch, BATCH).await
}

/// The deadline of the drain, if it is over.
fn passed_deadline(drain: Option<&Drain>) -> Option<Deadline> {
    drain.and_then(Drain::passed_deadline)
}

/// Returns when the value is another one than last looked at.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// What is due at its time, else the backlog, at once.
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
