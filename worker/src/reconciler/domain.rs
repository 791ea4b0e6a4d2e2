//! The state of one domain: what is known of its interface, and what is to be done there next. Pure: what happened comes
//! in with the time, what is to be applied and counted goes out; no kernel, no log, no metrics.
//!
//! Previous stop of a key: [`super::driver`], which carries out what this decides; next stop: [`crate::peers`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgkex_common::access_lists::Admission;
use wgkex_common::storage::key_store::KeyRecord;
use wgkex_common::wire::message::Age;
use wgkex_common::{Domain, PublicKey, RejectReason, Reserved};
use wgkex_kernel::{Change, Device, Interface, KernelError};

use super::reports::Report;
use super::schedule::Schedule;
use crate::peers::{Admitted, Clocks, Counts, KnownPeers, Policy};
use crate::plan::{self, Step};
use crate::profiles::{DesiredPeer, Ownership, Profile};

/// Steps of the backlog, or of a sweep, at once: new keys wait no longer than for these.
const SLICE: usize = 512;

/// Evictions at once. Linux waits for every CPU once for each peer that it removes.
const EVICTIONS_AT_ONCE: usize = 64;

/// For how long what a read showed counts against peers: one may shake hands meanwhile.
const READ_VALID: Duration = Duration::from_secs(1);

/// What became of keys in the kernel.
pub(super) type KeyOutcomes = Vec<(PublicKey, Result<(), KernelError>)>;

/// Peers that make room for others, as far as they are still there.
#[derive(Default)]
struct Evictions {
    steps: VecDeque<Step>,
    /// How many are gone already.
    removed: usize,
    /// When the tables have to be read again before more may go.
    until: Option<Instant>,
}

pub(super) struct DomainReconciler {
    name: Domain,
    interface: Interface,
    peers: KnownPeers,
    schedule: Schedule,
    /// The interface's own key, or why there are no tables to apply anything to.
    interface_key: Result<Option<PublicKey>, RejectReason>,
    /// What the last read showed to be missing, as far as it is not done.
    backlog: VecDeque<Step>,
    evictions: Evictions,
    admission: Arc<Admission>,
    /// Reads fail for another reason than a missing interface, and that is known.
    unreadable: bool,
}

/// What keys that arrived lead to.
#[derive(Default)]
pub(super) struct Arrivals {
    /// Keys that are not to be set.
    pub rejected: Vec<(PublicKey, RejectReason)>,
    /// Keys for which there are no tables.
    pub unavailable: Report,
    /// Peers that are set again. They never wait for new ones.
    pub known: Vec<Step>,
    /// Peers that are set now.
    pub new: Vec<Step>,
    /// What is done after those.
    pub rest: Rest,
}

/// Keys that arrived and are not applied at once.
#[derive(Default)]
pub(super) struct Rest {
    /// They have a place.
    later: Vec<Step>,
    /// They have none.
    deferred: Vec<PublicKey>,
}

/// What became of keys, to be counted.
#[derive(Default)]
pub(super) struct Recorded {
    /// Keys that are newly in the kernel.
    pub installed: u64,
    /// Keys that came again.
    pub refreshed: u64,
    /// Keys of which something lost was restored.
    pub restored: u64,
    /// Why others failed.
    pub failed: Vec<RejectReason>,
    /// Pending keys that were too many.
    pub dropped: usize,
}

/// What denied keys lead to.
#[derive(Default)]
pub(super) struct Denials {
    /// Keys whose peers stay, since others altered them.
    pub altered: Report,
    pub steps: Vec<Step>,
}

/// Peers that are stale.
pub(super) struct Sweep {
    pub steps: Vec<Step>,
    /// There are more than one sweep takes.
    more: bool,
}

/// What a failure of the kernel means.
pub(super) enum Failure {
    /// The interface is not there or not usable.
    Lost(KernelError),
    /// Other changes failed: so many, the first of this key.
    Changes(PublicKey, KernelError, usize),
}

impl DomainReconciler {
    pub(super) fn new(name: Domain, profile: Arc<dyn Profile>, policy: Policy, now: Instant) -> Self {
        Self {
            interface: profile.interface(&name),
            name,
            peers: KnownPeers::new(profile, policy),
            schedule: Schedule::new(&policy, now),
            interface_key: Err(RejectReason::Interface),
            backlog: VecDeque::new(),
            evictions: Evictions::default(),
            admission: Arc::default(),
            unreadable: false,
        }
    }

    pub(super) fn name(&self) -> &Domain {
        &self.name
    }

    pub(super) fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Remembers, before the first read, a key that was in the kernel when the last worker ended.
    pub(super) fn remember(&mut self, key: PublicKey, record: KeyRecord) {
        self.peers.remember(key, record);
    }

    /// The keys to be written down, and what of each, or all of them.
    pub(super) fn take_changed(&mut self, all: bool) -> Vec<(PublicKey, Option<KeyRecord>)> {
        if all {
            self.peers.change_all();
        }
        self.peers.take_changed()
    }

    /// Takes over which keys are admitted; those that no longer are go at the next read.
    pub(super) fn apply_policy(&mut self, admission: Arc<Admission>) {
        self.backlog.retain(|step| !admission.must_remove(self.name.name(), &step.key()));
        self.peers.apply_policy(admission.clone());
        self.admission = admission;
    }

    /// Forgets pending keys that are not admitted; true if peers of such keys are in the kernel.
    pub(super) fn has_denied(&mut self) -> bool {
        let (admission, name) = (&self.admission, self.name.name());
        !admission.removes_none() && !self.peers.remove_denied(|key| admission.must_remove(name, key)).is_empty()
    }

    /// Those of `keys` that have a peer here or are pending.
    pub(super) fn known_of(&self, keys: &BTreeSet<PublicKey>) -> Vec<PublicKey> {
        keys.iter().filter(|key| self.peers.contains(key)).copied().collect()
    }

    /// What was reported of handshakes may not have arrived.
    pub(super) fn report_all(&mut self) {
        self.peers.report_all();
    }

    /// The keys whose handshakes are to be reported.
    pub(super) fn unreported(&mut self, now: Instant) -> Vec<PublicKey> {
        self.peers.unreported(now)
    }

    pub(super) fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() || !self.evictions.steps.is_empty()
    }

    /// When the tables are to be read.
    pub(super) fn read_at(&self) -> Instant {
        self.schedule.read_at()
    }

    /// The tables are read as soon as that may be.
    pub(super) fn expedite(&mut self, now: Instant) {
        self.schedule.expedite(now);
    }

    /// A read took so long, well or not.
    pub(super) fn on_read_ended(&mut self, now: Instant, took: Duration) {
        self.schedule.read(now, took);
    }

    /// Keys are live that this gateway may lack: those that it does are pending from now on. Returns how many.
    pub(super) fn on_live(&mut self, keys: BTreeMap<PublicKey, Age>, reserved: &Reserved, now: Instant) -> usize {
        let own = self.interface_key.clone().ok().flatten();
        let (admission, name) = (&self.admission, self.name.name());
        let keys = keys.into_iter().filter(|(key, _)| !admission.denies(name, key));
        let missing = self.peers.learn(keys, own, reserved, now);
        if self.interface_key.is_ok() {
            self.make_room(missing.number - missing.next.len(), now);
            let profile = self.peers.profile();
            self.backlog.extend(missing.next.iter().filter_map(|key| profile.desired(key)).map(Step::install));
        }
        missing.number
    }

    /// Keys arrived, in this order.
    pub(super) fn on_keys(&mut self, keys: Vec<PublicKey>, reserved: &Reserved, now: Instant) -> Arrivals {
        let (admission, name) = (&self.admission, self.name.name());
        let (denied, keys): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| admission.denies(name, key));
        let denied = plan::dedup_keep_last(denied).into_iter().map(|key| (key, RejectReason::Denied));
        let mut arrivals = Arrivals { rejected: denied.collect(), ..Arrivals::default() };
        let own = match self.interface_key.clone() {
            Ok(own) => own,
            Err(reason) => {
                let unavailable = plan::dedup_keep_last(keys).into_iter().map(|key| (key, Err(reason.clone())));
                return Arrivals { unavailable: unavailable.collect(), ..arrivals };
            }
        };
        let Admitted { known, mut new, deferred, refused } = self.peers.admit(keys, own, reserved, now);
        arrivals.rejected.extend(refused);
        let steps = |peers: Vec<DesiredPeer>| peers.into_iter().map(Step::install).collect();
        let later = steps(new.split_off(SLICE.min(new.len())));
        Arrivals { known: steps(known), new: steps(new), rest: Rest { later, deferred }, ..arrivals }
    }

    /// What was to be done about what these steps set is done by them.
    pub(super) fn supersede(&mut self, steps: &[Step]) {
        if self.has_backlog() {
            let superseded: BTreeSet<_> = steps.iter().flat_map(|step| step.peer.destinations()).collect();
            let stays = |step: &Step| !step.peer.destinations().any(|network| superseded.contains(&network));
            self.backlog.retain(stays);
            self.evictions.steps.retain(stays);
        }
    }

    /// Keys that arrived were applied, or could not be.
    pub(super) fn on_installed(&mut self, report: &Report, now: Instant) -> Recorded {
        let mut recorded = Recorded::default();
        for (key, outcome) in report {
            self.record(&mut recorded, *key, outcome, now);
        }
        recorded
    }

    fn record(&mut self, recorded: &mut Recorded, key: PublicKey, outcome: &Result<(), RejectReason>, now: Instant) {
        match outcome {
            Ok(()) if self.peers.mark_installed(key, now) => recorded.installed += 1,
            Ok(()) => recorded.refreshed += 1,
            Err(reason) => {
                recorded.failed.push(reason.clone());
                recorded.dropped += self.peers.mark_pending(key, now);
            }
        }
    }

    /// Has the rest of the keys that arrived pending; returns how many pending keys were too many.
    pub(super) fn on_rest(&mut self, Rest { later, deferred }: Rest, now: Instant) -> usize {
        self.make_room(deferred.len(), now);
        let keys = later.iter().map(Step::key).chain(deferred);
        let dropped = keys.map(|key| self.peers.mark_pending(key, now)).sum();
        for step in &later {
            self.peers.reserve(&step.key());
        }
        self.supersede(&later);
        self.backlog.extend(later);
        dropped
    }

    /// The next read finds places for keys that have none, and removes what is in the way of others.
    fn make_room(&mut self, without: usize, now: Instant) {
        if without > 0 || self.peers.has_evictions() {
            self.schedule.expedite(now);
        }
    }

    /// A part of the backlog.
    pub(super) fn take_backlog(&mut self) -> Vec<Step> {
        self.backlog.drain(..SLICE.min(self.backlog.len())).collect()
    }

    /// A part of the backlog was applied; returns also what is to be published of it.
    pub(super) fn on_backlog(&mut self, outcomes: &KeyOutcomes, now: Instant) -> (Recorded, Report) {
        let (mut recorded, mut report) = (Recorded::default(), Report::new());
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) if self.peers.has_vanished(key) => {
                    self.peers.put_back(*key, now);
                    recorded.restored += 1;
                }
                Ok(()) if self.peers.is_pending(key) => {
                    if self.peers.is_announced(key) {
                        report.push((*key, Ok(())));
                    }
                    self.record(&mut recorded, *key, &Ok(()), now);
                }
                Ok(()) => recorded.restored += 1,
                Err(KernelError::Interface { .. }) => {}
                Err(KernelError::Interrupted { .. } | KernelError::Refused { .. }) => self.peers.refused(key),
            }
        }
        (recorded, report)
    }

    /// What evictions made room for is in the backlog from now on, if there are none left.
    pub(super) fn use_room(&mut self, reserved: &Reserved, now: Instant) {
        if let (Ok(own), true) = (self.interface_key.clone(), self.evictions.steps.is_empty()) {
            self.backlog.extend(self.peers.give_places(own, reserved));
            self.make_more_room(now);
        }
    }

    /// The next read makes more room, if what left was not enough.
    fn make_more_room(&mut self, now: Instant) {
        if self.evictions.steps.is_empty() && self.evictions.removed > 0 && self.peers.lacks_room() {
            self.schedule.expedite(now);
        }
    }

    /// The tables were read; returns how many peers vanished, and whether it is the first read that did not fail.
    pub(super) fn on_read(&mut self, device: &Device, reserved: &Reserved, now: Clocks) -> (usize, bool) {
        self.interface_key = Ok(device.public_key);
        (self.peers.observe(device, reserved, now), std::mem::take(&mut self.unreadable))
    }

    /// Removes the peers of keys that are not admitted, and what else there is of those just `denied`. What others made
    /// or altered stays.
    pub(super) fn plan_denials(&mut self, device: &Device, denied: &BTreeSet<PublicKey>, now: Instant) -> Denials {
        let (admission, name) = (&self.admission, self.name.name());
        if admission.removes_none() {
            return Denials::default();
        }
        let peers = self.peers.remove_denied(|key| admission.must_remove(name, key));
        let altered = peers.iter().filter(|(_, is_ours)| !**is_ours);
        let altered = altered.map(|(key, _)| (*key, Err(RejectReason::Altered))).collect();
        let mut ours: BTreeSet<_> = peers.iter().filter(|(_, is_ours)| **is_ours).map(|(key, _)| *key).collect();
        if let Some(first) = ours.iter().filter(|key| !denied.contains(key)).nth(SLICE).copied() {
            ours.retain(|key| *key < first || denied.contains(key));
            self.schedule.expedite(now);
        }
        Denials { altered, steps: plan::remove_denied(self.peers.profile(), device, &ours, denied) }
    }

    /// Peers of keys that are not admitted were removed, or could not be; returns how many were.
    pub(super) fn on_denials(&mut self, outcomes: &KeyOutcomes) -> usize {
        let removed = outcomes.iter().filter(|(_, outcome)| outcome.is_ok());
        removed.map(|(key, _)| self.peers.removed(key)).count()
    }

    /// Removes stale peers, if it is time; only ever right after a read: nothing is decided against a peer by what was so
    /// before.
    pub(super) fn plan_sweep(&mut self, device: &Device, now: Instant) -> Option<Sweep> {
        self.schedule.is_sweep_due(now).then(|| {
            let mut stale = self.peers.stale(now);
            let more = stale.iter().nth(SLICE).copied().map(|first| stale.split_off(&first)).is_some();
            Sweep { steps: plan::remove(self.peers.profile(), device, &stale), more }
        })
    }

    /// Stale peers were removed, or could not be; returns how many were.
    pub(super) fn on_swept(&mut self, sweep: &Sweep, outcomes: &KeyOutcomes, now: Instant) -> usize {
        let removed = self.on_removed(outcomes);
        self.peers.forget_stale(now);
        self.schedule.swept(now, sweep.more && removed == sweep.steps.len());
        removed
    }

    /// Peers were removed, or could not be removed whole; returns how many were.
    fn on_removed(&mut self, outcomes: &KeyOutcomes) -> usize {
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) => self.peers.removed(key),
                Err(_) => self.peers.disown(key),
            }
        }
        outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count()
    }

    /// Peers that are in the way of others are to go, a few at a time. Only ever right after a read.
    pub(super) fn plan_evictions(&mut self, device: &Device, now: Instant) {
        let steps = plan::remove(self.peers.profile(), device, &self.peers.eviction_candidates()).into();
        self.evictions = Evictions { steps, removed: 0, until: Some(now + READ_VALID) };
    }

    /// Some of the evictions; none if the last read is too old for them.
    pub(super) fn take_evictions(&mut self, now: Instant) -> Vec<Step> {
        let Evictions { steps, until, .. } = &mut self.evictions;
        if until.is_none_or(|until| until <= now) {
            steps.clear();
        }
        let mut some: Vec<_> = steps.drain(..EVICTIONS_AT_ONCE.min(steps.len())).collect();
        some.retain(|step| self.peers.is_eviction_candidate(&step.key()));
        some
    }

    /// Peers were evicted, or could not be. Returns how many were, and at the end of all how many that is.
    pub(super) fn on_evicted(&mut self, outcomes: &KeyOutcomes) -> (usize, Option<usize>) {
        let removed = self.on_removed(outcomes);
        self.evictions.removed += removed;
        let is_end = self.evictions.steps.is_empty() && self.evictions.removed > 0;
        (removed, is_end.then_some(self.evictions.removed))
    }

    pub(super) fn has_evictions(&self) -> bool {
        !self.evictions.steps.is_empty()
    }

    /// Makes silent peers forget where their routers were, a few at a time.
    pub(super) fn plan_renewals(&self, device: &Device, now: Instant) -> Vec<Step> {
        let idle = self.peers.idle(EVICTIONS_AT_ONCE, now);
        let desired = idle.iter().filter_map(|key| self.peers.profile().desired(key));
        // One whose address somebody gave to another would take it back.
        let is_whole = |peer: &DesiredPeer| {
            device.peers.get(&peer.key()).is_some_and(|actual| peer.ownership(actual) == Ownership::Ours)
        };
        desired.filter(is_whole).map(Step::renew).collect()
    }

    /// Peers were renewed, or could not be; returns how many were, and how many pending keys were too many.
    pub(super) fn on_renewed(&mut self, outcomes: &KeyOutcomes, now: Instant) -> (usize, usize) {
        let (mut renewed, mut dropped) = (0, 0);
        for (key, outcome) in outcomes {
            if outcome.is_ok() {
                self.peers.mark_renewed(key);
                renewed += 1;
            } else {
                // It may be gone, and not be back.
                dropped += self.peers.mark_pending(*key, now);
            }
        }
        if renewed == EVICTIONS_AT_ONCE {
            self.schedule.expedite(now);
        }
        (renewed, dropped)
    }

    /// Whether there are tables to apply anything to.
    pub(super) fn has_tables(&self) -> bool {
        self.interface_key.is_ok()
    }

    /// Removes routes and flood entries that have no peer.
    pub(super) fn plan_orphans(&mut self, device: &Device, now: Instant) -> Vec<Change> {
        let mut orphaned = self.peers.orphaned(device, now);
        if orphaned.len() > SLICE {
            orphaned.truncate(SLICE);
            self.schedule.expedite(now);
        }
        orphaned
    }

    /// What the read showed to be missing is the backlog; returns how many peers are in which state.
    pub(super) fn plan_backlog(&mut self, device: &Device, reserved: &Reserved, now: Instant) -> Counts {
        self.backlog = self.peers.pending_steps(device, reserved).into();
        self.make_more_room(now);
        if self.backlog.is_empty() {
            self.schedule.recovered();
        }
        self.schedule.on_success();
        self.peers.counts(now)
    }

    /// The tables could not be read; returns whether that is news.
    pub(super) fn on_read_failure(&mut self, error: &KernelError, now: Instant) -> bool {
        if let KernelError::Interface { .. } = error {
            self.mark_down(error);
            return false;
        }
        if self.interface_key.is_err() {
            self.interface_key = Err(error.reason());
        }
        self.schedule.on_failure(now);
        !std::mem::replace(&mut self.unreadable, true)
    }

    /// Changes were applied; returns what failed, if anything did.
    pub(super) fn on_applied(&mut self, outcomes: &KeyOutcomes, now: Instant) -> Option<Failure> {
        let errors = || outcomes.iter().filter_map(|(key, outcome)| Some((key, outcome.as_ref().err()?)));
        let (key, first) = errors().next()?;
        self.schedule.on_failure(now);
        if let Some((_, error)) = errors().find(|(_, error)| matches!(error, KernelError::Interface { .. })) {
            self.mark_down(error);
            return Some(Failure::Lost(error.clone()));
        }
        Some(Failure::Changes(*key, first.clone(), errors().count()))
    }

    fn mark_down(&mut self, error: &KernelError) {
        self.interface_key = Err(error.reason());
        self.peers.lost();
        self.backlog.clear();
        self.evictions = Evictions::default();
    }
}

/// What is published of keys that the kernel was asked for.
pub(super) fn to_report(outcomes: KeyOutcomes) -> Report {
    outcomes.into_iter().map(|(key, outcome)| (key, outcome.map_err(|error| error.reason()))).collect()
}
