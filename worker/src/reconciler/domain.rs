//! One domain at the kernel: what is known of it, and each thing that is done with it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::yield_now;
use tracing::{debug, info, warn};
use wgkex_common::access_lists::Admission;
use wgkex_common::storage::key_store::{KeyRecord, WriteBuffer};
use wgkex_common::wire::message::Age;
use wgkex_common::{Domain, PublicKey, RejectReason, Reserved};

use crate::metrics::Metrics;
use crate::peers::{Admitted, Clocks, KnownPeers, Policy};
use crate::plan::{self, Step};
use crate::profiles::{DesiredPeer, Ownership, Profile};
use crate::reconciler::reports::{Outbox, Report};
use crate::reconciler::schedule::Schedule;
use wgkex_kernel::{Device, Interface, Kernel, KernelError};

/// Keys that are caught up with, or swept, at once: new keys wait no longer than for these.
const SLICE: usize = 512;

/// Peers that make room for others at once. Linux waits for every CPU once for each peer that it removes.
const ROOM: usize = 64;

/// For how long what a read showed counts against peers: one may shake hands meanwhile.
const FRESH: Duration = Duration::from_secs(1);

/// Peers that make room for others, as far as they are still there.
#[derive(Default)]
struct Leaving {
    steps: VecDeque<Step>,
    /// How many are gone already.
    removed: usize,
    /// When somebody has to look again whether they may go.
    until: Option<tokio::time::Instant>,
}

pub(super) struct Served {
    domain: Domain,
    interface: Interface,
    peers: KnownPeers,
    schedule: Schedule,
    /// The interface's own key, or why there are no tables to apply anything to.
    own: Result<Option<PublicKey>, RejectReason>,
    /// What the last read showed to be owed, as far as it is not done.
    backlog: VecDeque<Step>,
    leaving: Leaving,
    reserved: watch::Receiver<Reserved>,
    admission: Arc<Admission>,
    journal: WriteBuffer,
    /// Reads fail for another reason than a missing interface, and that has been said.
    unreadable: bool,
    metrics: Metrics,
}

impl Served {
    pub fn new(
        domain: Domain,
        profile: Arc<dyn Profile>,
        policy: Policy,
        now: Instant,
        (reserved, journal, metrics): (watch::Receiver<Reserved>, WriteBuffer, Metrics),
    ) -> Self {
        Self {
            interface: profile.interface(&domain),
            domain,
            peers: KnownPeers::new(profile, policy),
            reserved,
            journal,
            schedule: Schedule::new(&policy, now),
            own: Err(RejectReason::Interface),
            backlog: VecDeque::new(),
            leaving: Leaving::default(),
            admission: Arc::default(),
            unreadable: false,
            metrics,
        }
    }

    pub fn domain(&self) -> Domain {
        self.domain.clone()
    }

    /// Remembers, before the first read, a key that stood when the last worker ended.
    pub fn remember(&mut self, key: PublicKey, kept: KeyRecord) {
        self.peers.remember(key, kept);
    }

    /// Has what changed written down, or everything `anew`.
    pub fn note_changes(&mut self, anew: bool) {
        if anew {
            self.peers.change_all();
        }
        for (key, kept) in self.peers.take_changed() {
            match kept {
                Some(kept) => self.journal.put(&self.domain, key, kept),
                None => self.journal.remove(&self.domain, key),
            }
        }
    }

    /// Takes over who may come; those who are here and may not go at the next read.
    pub fn admit(&mut self, admission: Arc<Admission>) {
        self.backlog.retain(|step| !admission.must_remove(self.domain.name(), &step.key()));
        self.peers.apply_policy(admission.clone());
        self.admission = admission;
    }

    /// Forgets keys that wait and may not come; true if some stand in the kernel that may not.
    pub fn has_to_expel(&mut self) -> bool {
        let (admission, domain) = (&self.admission, self.domain.name());
        !admission.removes_none() && !self.peers.remove_denied(|key| admission.must_remove(domain, key)).is_empty()
    }

    /// What was reported of handshakes may not have been heard.
    pub fn report_all(&mut self) {
        self.peers.report_all();
    }

    /// How much is owed.
    pub fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Keys are live that this gateway may lack: those that it does are owed from now on.
    pub fn learn(&mut self, keys: BTreeMap<PublicKey, Age>, now: Instant) {
        let own = self.own.clone().ok().flatten();
        let (admission, domain) = (&self.admission, self.domain.name());
        let keys = keys.into_iter().filter(|(key, _)| !admission.denies(domain, key));
        let learnt = self.peers.learn(keys, own, &self.reserved.borrow(), now);
        self.metrics.keys_learnt.with_label_values(&[self.domain.name()]).inc_by(learnt.number as u64);
        if self.own.is_ok() {
            self.make_room(learnt.number - learnt.next.len(), now);
            let profile = self.peers.profile();
            self.backlog.extend(learnt.next.iter().filter_map(|key| profile.desired(key)).map(Step::install));
        }
    }

    /// The next read finds places for keys that have none, and takes away what is in the way of others.
    fn make_room(&mut self, without: usize, now: Instant) {
        if without > 0 || self.peers.has_evictions() {
            self.schedule.hurry(now);
        }
    }

    /// When it is to be read.
    pub fn due(&self) -> Instant {
        self.schedule.read_at()
    }

    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() || !self.leaving.steps.is_empty()
    }

    pub fn hurry(&mut self, now: Instant) {
        self.schedule.hurry(now);
    }

    /// Puts keys that arrived into the kernel and says what became of each.
    pub async fn install<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, keys: Vec<PublicKey>, now: Clocks) {
        let (admission, domain) = (&self.admission, self.domain.name());
        let (denied, keys): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| admission.denies(domain, key));
        let mut refused: Vec<_> =
            plan::dedup_keep_last(denied).into_iter().map(|key| (key, RejectReason::Denied)).collect();
        let own = match self.own.clone() {
            Ok(own) => own,
            Err(reason) => {
                let report = plan::dedup_keep_last(keys).into_iter().map(|key| (key, Err(reason.clone()))).collect();
                self.settle_all(outbox, self.refuse(refused), report, now.monotonic);
                return;
            }
        };
        let admitted = self.peers.admit(keys, own, &self.reserved.borrow(), now.monotonic);
        let Admitted { known, mut new, deferred, refused: others } = admitted;
        refused.extend(others);
        let mut refused = self.refuse(refused);
        // What is known never waits for what is not.
        let later = new.split_off(SLICE.min(new.len()));
        for peers in [known, new] {
            let steps: Vec<_> = peers.into_iter().map(Step::install).collect();
            self.supersede(&steps);
            let report = told(self.apply(kernel, outbox, &steps, now.monotonic).await);
            if !report.is_empty() {
                self.settle_all(outbox, std::mem::take(&mut refused), report, now.monotonic);
            }
        }
        outbox.confirm(&self.domain, &refused);
        self.make_room(deferred.len(), now.monotonic);
        for key in later.iter().map(DesiredPeer::key).chain(deferred) {
            self.want(key, now.monotonic);
        }
        for peer in &later {
            self.peers.reserve(&peer.key());
        }
        let later: Vec<_> = later.into_iter().map(Step::install).collect();
        self.supersede(&later);
        self.backlog.extend(later);
    }

    /// Counts what is refused. What a broker of ours would not have let pass is told, once for a batch.
    fn refuse(&self, refused: Vec<(PublicKey, RejectReason)>) -> Report {
        for wrong in [RejectReason::Reserved, RejectReason::AddressTaken] {
            let mut keys = refused.iter().filter(|(_, reason)| *reason == wrong).map(|(key, _)| key);
            if let Some(key) = keys.next() {
                warn!(domain = %self.domain, ?key, others = keys.count(), reason = %wrong, "key refused");
            }
        }
        let refusal = |(key, reason): (PublicKey, RejectReason)| {
            debug!(domain = %self.domain, ?key, %reason, "key refused");
            self.count_failed(&reason);
            (key, Err(reason))
        };
        refused.into_iter().map(refusal).collect()
    }

    /// Remembers what became of the keys of `report`, and says it, and what was `refused`, in one message.
    fn settle_all(&mut self, outbox: &Outbox, refused: Report, report: Report, now: Instant) {
        for (key, outcome) in &report {
            self.settle(*key, outcome.clone(), now);
        }
        outbox.confirm(&self.domain, &[report, refused].concat());
    }

    /// What came now says more of its addresses than what was owed before.
    fn supersede(&mut self, steps: &[Step]) {
        if self.has_backlog() {
            let superseded: BTreeSet<_> = steps.iter().flat_map(|step| step.peer.destinations()).collect();
            let stays = |step: &Step| !step.peer.destinations().any(|network| superseded.contains(&network));
            self.backlog.retain(stays);
            self.leaving.steps.retain(stays);
        }
    }

    fn settle(&mut self, key: PublicKey, outcome: Result<(), RejectReason>, now: Instant) {
        let domain = self.domain.name();
        match outcome {
            Ok(()) if self.peers.mark_installed(key, now) => {
                self.metrics.keys_installed.with_label_values(&[domain]).inc();
            }
            Ok(()) => self.metrics.keys_refreshed.with_label_values(&[domain]).inc(),
            Err(reason) => {
                self.count_failed(&reason);
                self.want(key, now);
            }
        }
    }

    fn want(&mut self, key: PublicKey, now: Instant) {
        let dropped = self.peers.mark_pending(key, now) as u64;
        self.metrics.keys_dropped.with_label_values(&["waiting"]).inc_by(dropped);
    }

    fn count_failed(&self, reason: &RejectReason) {
        self.metrics.keys_failed.with_label_values(&[self.domain.name(), reason.as_ref()]).inc();
    }

    /// Does a part of what is owed; if nothing is, of what makes room.
    pub async fn catch_up<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, now: Clocks) {
        if self.backlog.is_empty() {
            self.oust(kernel, outbox, now.monotonic).await;
            if let (Ok(own), true) = (self.own.clone(), self.leaving.steps.is_empty()) {
                self.backlog.extend(self.peers.give_places(own, &self.reserved.borrow()));
                self.make_more_room(now.monotonic);
            }
            return;
        }
        let steps: Vec<_> = self.backlog.drain(..SLICE.min(self.backlog.len())).collect();
        let mut report = Report::new();
        for (key, outcome) in self.apply(kernel, outbox, &steps, now.monotonic).await {
            match outcome {
                Ok(()) if self.peers.has_vanished(&key) => {
                    self.peers.put_back(key, now.monotonic);
                    self.metrics.keys_restored.with_label_values(&[self.domain.name()]).inc();
                }
                Ok(()) if self.peers.is_pending(&key) => {
                    if self.peers.is_announced(&key) {
                        report.push((key, Ok(())));
                    }
                    self.settle(key, Ok(()), now.monotonic);
                }
                Ok(()) => self.metrics.keys_restored.with_label_values(&[self.domain.name()]).inc(),
                Err(KernelError::Interface { .. }) => {}
                Err(KernelError::Interrupted { .. } | KernelError::Refused { .. }) => self.peers.refused(&key),
            }
        }
        outbox.confirm(&self.domain, &report);
    }

    /// Takes the keys `denied` out of the kernel, and says of each what became of it.
    pub async fn revoke<K: Kernel>(
        &mut self,
        kernel: &mut K,
        outbox: &mut Outbox,
        denied: &BTreeSet<PublicKey>,
        now: Clocks,
    ) -> BTreeMap<PublicKey, Result<(), RejectReason>> {
        let known: Vec<_> = denied.iter().filter(|key| self.peers.contains(key)).copied().collect();
        match self.read_and_expel(kernel, outbox, denied, now).await {
            Ok(outcomes) => outcomes.into_iter().collect(),
            // What cannot be read now is looked at when it can.
            Err(reason) => known.into_iter().map(|key| (key, Err(reason.clone()))).collect(),
        }
    }

    /// Reads the tables and draws every conclusion from them.
    pub async fn read<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, now: Clocks) {
        // What it could not do is done at the next read.
        let _ = self.read_and_expel(kernel, outbox, &BTreeSet::new(), now).await;
    }

    async fn read_and_expel<K: Kernel>(
        &mut self,
        kernel: &mut K,
        outbox: &mut Outbox,
        denied: &BTreeSet<PublicKey>,
        now: Clocks,
    ) -> Result<Report, RejectReason> {
        let begun = tokio::time::Instant::now();
        let read = kernel.read(&self.interface).await;
        self.schedule.read(now.monotonic, begun.elapsed());
        match read {
            Ok(device) => Ok(self.observe(kernel, outbox, &device, denied, now).await),
            Err(error) => {
                self.metrics.read_failures.with_label_values(&[self.domain.name()]).inc();
                self.unread(outbox, &error, now.monotonic);
                Err(error.reason())
            }
        }
    }

    /// Returns what became of keys that may not be here. With many peers every part of this takes long; between them
    /// the bus, and who ends the worker, have their turn.
    async fn observe<K: Kernel>(
        &mut self,
        kernel: &mut K,
        outbox: &mut Outbox,
        device: &Device,
        denied: &BTreeSet<PublicKey>,
        now: Clocks,
    ) -> Report {
        if std::mem::take(&mut self.unreadable) {
            info!(domain = %self.domain, "tables can be read again");
        }
        self.own = Ok(device.public_key);
        yield_now().await;
        let vanished = self.peers.observe(device, &self.reserved.borrow(), now);
        if vanished > 0 {
            warn!(domain = %self.domain, peers = vanished, "peers vanished that nobody revoked; they are put back");
        }
        yield_now().await;
        let expelled = self.expel(kernel, outbox, device, denied, now.monotonic).await;
        if self.schedule.is_sweep_due(now.monotonic) {
            self.sweep(kernel, outbox, device, now.monotonic).await;
        }
        self.make_leave(device);
        self.oust(kernel, outbox, now.monotonic).await;
        self.forget(kernel, outbox, device, now.monotonic).await;
        yield_now().await;
        if self.own.is_ok() {
            self.clear(kernel, device, now.monotonic).await;
            if !outbox.report(&self.domain, &self.peers.unreported(now.monotonic)) {
                self.peers.report_all();
            }
            self.backlog = self.peers.pending_steps(device, &self.reserved.borrow()).into();
            self.make_more_room(now.monotonic);
            if self.backlog.is_empty() {
                self.schedule.recovered();
            }
            self.schedule.good();
            outbox.set_tables(&self.domain, device, self.peers.counts(now.monotonic));
        }
        yield_now().await;
        expelled
    }

    /// Removes the peers of keys that may not be here, and what else there is of those just `denied`. What others made
    /// or altered stays.
    async fn expel<K: Kernel>(
        &mut self,
        kernel: &mut K,
        outbox: &mut Outbox,
        device: &Device,
        denied: &BTreeSet<PublicKey>,
        now: Instant,
    ) -> Report {
        let (admission, domain) = (self.admission.clone(), self.domain.clone());
        let is_expelled = |key: &PublicKey| admission.must_remove(domain.name(), key);
        if admission.removes_none() {
            return Report::new();
        }
        let peers = self.peers.remove_denied(is_expelled);
        let altered =
            peers.iter().filter(|(_, is_ours)| !**is_ours).map(|(key, _)| (*key, Err(RejectReason::Altered))).collect();
        let mut ours: BTreeSet<_> = peers.iter().filter(|(_, is_ours)| **is_ours).map(|(key, _)| *key).collect();
        if let Some(first) = ours.iter().filter(|key| !denied.contains(key)).nth(SLICE).copied() {
            ours.retain(|key| *key < first || denied.contains(key));
            self.schedule.hurry(now);
        }
        let outcomes =
            self.apply(kernel, outbox, &plan::remove_denied(self.peers.profile(), device, &ours, denied), now).await;
        let said: Report = outcomes.iter().map(|(key, _)| (*key, Err(RejectReason::Denied))).collect();
        outbox.confirm(&domain, &said);
        let removed = outcomes.iter().filter(|(_, outcome)| outcome.is_ok());
        let removed = removed.map(|(key, _)| self.peers.removed(key)).count();
        if removed > 0 {
            self.metrics.peers_revoked.with_label_values(&[domain.name()]).inc_by(removed as u64);
            info!(%domain, removed, "peers of keys that may not be here are removed");
        }
        [altered, told(outcomes)].concat()
    }

    /// Only ever right after a read: nothing is decided against a peer by what was so before.
    async fn sweep<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, device: &Device, now: Instant) {
        let mut stale = self.peers.stale(now);
        let more = stale.iter().nth(SLICE).copied().map(|first| stale.split_off(&first)).is_some();
        let removed = self.remove(kernel, outbox, &plan::remove(self.peers.profile(), device, &stale), now).await;
        self.peers.forget_stale(now);
        self.schedule.swept(now, more && removed == stale.len());
        self.metrics.sweeps.with_label_values(&[self.domain.name()]).inc();
        self.metrics.peers_removed.with_label_values(&[self.domain.name()]).inc_by(removed as u64);
        if removed > 0 {
            info!(domain = %self.domain, removed, "stale peers are removed");
        }
    }

    /// Peers that are in the way of others are to go. Only ever right after a read.
    fn make_leave(&mut self, device: &Device) {
        let steps = plan::remove(self.peers.profile(), device, &self.peers.eviction_candidates()).into();
        self.leaving = Leaving { steps, removed: 0, until: Some(tokio::time::Instant::now() + FRESH) };
    }

    /// Removes some of the peers that are in the way of others: keys wait meanwhile.
    async fn oust<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, now: Instant) {
        if self.leaving.steps.is_empty() {
            return;
        }
        if self.leaving.until.is_none_or(|until| until <= tokio::time::Instant::now()) {
            self.leaving.steps.clear();
        }
        let some = ROOM.min(self.leaving.steps.len());
        let mut steps: Vec<_> = self.leaving.steps.drain(..some).collect();
        steps.retain(|step| self.peers.is_eviction_candidate(&step.key()));
        let removed = self.remove(kernel, outbox, &steps, now).await;
        self.metrics.peers_ousted.with_label_values(&[self.domain.name()]).inc_by(removed as u64);
        self.leaving.removed += removed;
        if self.leaving.steps.is_empty() && self.leaving.removed > 0 {
            info!(domain = %self.domain, removed = self.leaving.removed, "peers without a handshake make room for others");
        }
    }

    /// The next read makes more room, if what left was not enough.
    fn make_more_room(&mut self, now: Instant) {
        if self.leaving.steps.is_empty() && self.leaving.removed > 0 && self.peers.lacks_room() {
            self.schedule.hurry(now);
        }
    }

    /// Makes silent peers forget where their routers were, a few at a time.
    async fn forget<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, device: &Device, now: Instant) {
        let idle = self.peers.idle(ROOM, now);
        let desired = idle.iter().filter_map(|key| self.peers.profile().desired(key));
        // One whose address somebody gave to another would take it back.
        let is_whole = |peer: &DesiredPeer| {
            device.peers.get(&peer.key()).is_some_and(|actual| peer.ownership(actual) == Ownership::Ours)
        };
        let steps: Vec<_> = desired.filter(is_whole).map(Step::renew).collect();
        let mut renewed = 0;
        for (key, outcome) in self.apply(kernel, outbox, &steps, now).await {
            if outcome.is_ok() {
                self.peers.mark_renewed(&key);
                renewed += 1;
            } else {
                // It may be gone, and not be back.
                self.want(key, now);
            }
        }
        if renewed == ROOM {
            self.schedule.hurry(now);
        }
        self.metrics.peers_forgotten.with_label_values(&[self.domain.name()]).inc_by(renewed as u64);
    }

    /// Removes these peers and returns how many went. Says that they do not stand any more, also of those that could not
    /// be removed whole.
    async fn remove<K: Kernel>(&mut self, kernel: &mut K, outbox: &mut Outbox, steps: &[Step], now: Instant) -> usize {
        let outcomes = self.apply(kernel, outbox, steps, now).await;
        let said: Report = outcomes.iter().map(|(key, _)| (*key, Err(RejectReason::Removed))).collect();
        outbox.confirm(&self.domain, &said);
        for (key, outcome) in &outcomes {
            match outcome {
                Ok(()) => self.peers.removed(key),
                Err(_) => self.peers.disown(key),
            }
        }
        outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count()
    }

    /// Removes routes and flood entries that have no peer.
    async fn clear<K: Kernel>(&mut self, kernel: &mut K, device: &Device, now: Instant) {
        let mut orphaned = self.peers.orphaned(device, now);
        if orphaned.is_empty() {
            return;
        }
        if orphaned.len() > SLICE {
            orphaned.truncate(SLICE);
            self.schedule.hurry(now);
        }
        let applied = kernel.apply(&self.interface, orphaned).await;
        let removed = applied.iter().filter(|(_, result)| result.is_ok()).count() as u64;
        self.metrics.orphans_removed.with_label_values(&[self.domain.name()]).inc_by(removed);
        match applied.into_iter().find_map(|(_, result)| result.err()) {
            None => info!(domain = %self.domain, removed, "routes and flood entries without a peer are removed"),
            Some(error) => warn!(domain = %self.domain, removed, %error, "routes or flood entries without a peer stay"),
        }
    }

    fn unread(&mut self, outbox: &mut Outbox, error: &KernelError, now: Instant) {
        if let KernelError::Interface { .. } = error {
            self.lose(outbox, error);
            return;
        }
        if !std::mem::replace(&mut self.unreadable, true) {
            warn!(domain = %self.domain, %error, "tables cannot be read");
        }
        if self.own.is_err() {
            self.own = Err(error.reason());
        }
        self.schedule.failed(now);
    }

    fn lose(&mut self, outbox: &mut Outbox, error: &KernelError) {
        self.own = Err(error.reason());
        self.peers.lost();
        self.backlog.clear();
        self.leaving = Leaving::default();
        outbox.set_lost(&self.domain, error);
    }

    async fn apply<K: Kernel>(
        &mut self,
        kernel: &mut K,
        outbox: &mut Outbox,
        steps: &[Step],
        now: Instant,
    ) -> Vec<(PublicKey, Result<(), KernelError>)> {
        if steps.is_empty() {
            return Vec::new();
        }
        let begun = tokio::time::Instant::now();
        let applied = kernel.apply(&self.interface, plan::changes(steps)).await;
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        self.metrics.batch_keys.observe(steps.len() as f64);
        self.metrics.batch_duration.observe(begun.elapsed().as_secs_f64());
        let outcomes = plan::outcomes(steps, applied);
        self.judge(outbox, &outcomes, now);
        outcomes
    }

    fn judge(&mut self, outbox: &mut Outbox, outcomes: &[(PublicKey, Result<(), KernelError>)], now: Instant) {
        let errors = || outcomes.iter().filter_map(|(key, outcome)| Some((key, outcome.as_ref().err()?)));
        if errors().next().is_some() {
            self.schedule.failed(now);
        }
        if let Some((_, error)) = errors().find(|(_, error)| matches!(error, KernelError::Interface { .. })) {
            self.lose(outbox, error);
        } else if let Some((key, error)) = errors().next() {
            warn!(domain = %self.domain, ?key, %error, failed = errors().count(), "changes failed");
        }
    }
}

fn told(outcomes: Vec<(PublicKey, Result<(), KernelError>)>) -> Report {
    outcomes.into_iter().map(|(key, outcome)| (key, outcome.map_err(|error| error.reason()))).collect()
}
