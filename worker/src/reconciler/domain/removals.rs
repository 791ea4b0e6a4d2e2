//! Removals of peers and orphans from a domain: of denied keys, stale, evicted, idle. All are planned right after a
//! read of the tables: no peer is removed because of an outdated state.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use wgkex_common::{PublicKey, RejectReason, Reserved};
use wgkex_kernel::{Change, Device};

use super::{BACKLOG_SLICE, DomainReconciler, KeyOutcomes};
use crate::plan::{self, Step};
use crate::profiles::{DesiredPeer, Ownership};
use crate::reconciler::reports::Report;

/// Evictions at once. Linux waits for every CPU once for each peer that it removes.
const EVICTIONS_AT_ONCE: usize = 64;

/// How long the result of a read may be used to remove peers: they may have handshakes meanwhile.
const READ_VALID: Duration = Duration::from_secs(1);

/// Planned evictions that are not applied yet.
#[derive(Default)]
pub(super) struct Evictions {
    pub(super) steps: VecDeque<Step>,
    /// How many are applied.
    removed: usize,
    /// When the tables have to be read again before more evictions.
    until: Option<Instant>,
}

/// The steps and outcomes for denied keys.
#[derive(Default)]
pub struct Denials {
    /// Keys whose peers stay, since other programs altered them.
    pub altered: Report,
    pub steps: Vec<Step>,
}

/// The result of an eviction.
pub struct Evicted {
    /// How many.
    pub removed: usize,
    /// How many since the last read, if these were the last ones.
    pub removed_in_all: Option<usize>,
}

/// The result of a renewal.
pub struct Renewed {
    /// How many.
    pub renewed: usize,
    /// Pending keys that were dropped because there were too many.
    pub dropped: usize,
}

/// Stale peers to be removed.
pub struct StaleRemoval {
    pub steps: Vec<Step>,
    /// There are more stale peers than one sweep removes.
    more: bool,
}

impl DomainReconciler {
    /// Forgets pending keys that are not admitted; true if peers of such keys are in the kernel.
    pub fn has_denied(&mut self) -> bool {
        let (admission, name) = (&self.admission, self.name.name());
        !admission.removes_none() && !self.peers.remove_denied(|key| admission.must_remove(name, key)).is_empty()
    }

    /// Removes the peers of keys that are not admitted, and other objects of those just `denied`. Peers that other
    /// programs made or altered stay.
    pub fn plan_denials(&mut self, device: &Device, denied: &BTreeSet<PublicKey>, now: Instant) -> Denials {
        let (admission, name) = (&self.admission, self.name.name());
        if admission.removes_none() {
            return Denials::default();
        }
        let peers = self.peers.remove_denied(|key| admission.must_remove(name, key));
        let altered = peers.iter().filter(|(_, is_ours)| !**is_ours);
        let altered = altered.map(|(key, _)| (*key, Err(RejectReason::Altered))).collect();
        let mut ours: BTreeSet<_> = peers.iter().filter(|(_, is_ours)| **is_ours).map(|(key, _)| *key).collect();
        if let Some(first) = ours.iter().filter(|key| !denied.contains(key)).nth(BACKLOG_SLICE).copied() {
            ours.retain(|key| *key < first || denied.contains(key));
            self.schedule.expedite(now);
        }
        Denials { altered, steps: plan::remove_denied(self.peers.profile(), device, &ours, denied) }
    }

    /// Peers of keys that are not admitted were removed, or could not be; returns how many were.
    pub fn on_denials(&mut self, outcomes: &KeyOutcomes) -> usize {
        let removed = outcomes.iter().filter(|(_, outcome)| outcome.is_ok());
        removed.map(|(key, _)| self.peers.removed(key)).count()
    }

    /// Removes stale peers, if it is time.
    pub fn plan_sweep(&mut self, device: &Device, now: Instant) -> Option<StaleRemoval> {
        self.schedule.is_sweep_due(now).then(|| {
            let mut stale = self.peers.stale(now);
            let more = stale.iter().nth(BACKLOG_SLICE).copied().map(|first| stale.split_off(&first)).is_some();
            StaleRemoval { steps: plan::remove(self.peers.profile(), device, &stale), more }
        })
    }

    /// Stale peers were removed, or could not be; returns how many were.
    pub fn on_swept(&mut self, sweep: &StaleRemoval, outcomes: &KeyOutcomes, now: Instant) -> usize {
        let removed = self.on_removed(outcomes);
        self.peers.forget_stale(now);
        self.schedule.swept(now, sweep.more && removed == sweep.steps.len());
        removed
    }

    /// Peers were removed, or could not be removed whole; returns how many were.
    pub(super) fn on_removed(&mut self, outcomes: &KeyOutcomes) -> usize {
        for (key, outcome) in outcomes {
            match outcome {
                Ok(()) => self.peers.removed(key),
                Err(_) => self.peers.mark_foreign(key),
            }
        }
        outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count()
    }

    /// Plans the evictions of peers, to be applied a few at a time.
    pub fn plan_evictions(&mut self, device: &Device, now: Instant) {
        let steps = plan::remove(self.peers.profile(), device, &self.peers.eviction_candidates()).into();
        self.evictions = Evictions { steps, removed: 0, until: Some(now + READ_VALID) };
    }

    /// The next evictions; none if the last read is too old.
    pub fn take_evictions(&mut self, now: Instant) -> Vec<Step> {
        let Evictions { steps, until, .. } = &mut self.evictions;
        if until.is_none_or(|until| until <= now) {
            steps.clear();
        }
        let mut some: Vec<_> = steps.drain(..EVICTIONS_AT_ONCE.min(steps.len())).collect();
        some.retain(|step| self.peers.is_eviction_candidate(&step.key()));
        some
    }

    /// Peers were evicted, or could not be.
    pub fn on_evicted(&mut self, outcomes: &KeyOutcomes) -> Evicted {
        let removed = self.on_removed(outcomes);
        self.evictions.removed += removed;
        let is_end = self.evictions.steps.is_empty() && self.evictions.removed > 0;
        Evicted { removed, removed_in_all: is_end.then_some(self.evictions.removed) }
    }

    pub fn has_evictions(&self) -> bool {
        !self.evictions.steps.is_empty()
    }

    /// Creates silent peers again, a few at a time, so that their endpoints are forgotten.
    pub fn plan_renewals(&self, device: &Device, now: Instant) -> Vec<Step> {
        let idle = self.peers.idle(EVICTIONS_AT_ONCE, now);
        let desired = idle.iter().filter_map(|key| self.peers.profile().desired(key));
        // A peer whose address was given to another peer would take it back.
        let is_whole = |peer: &DesiredPeer| {
            device.peers.get(&peer.key()).is_some_and(|actual| peer.ownership(actual) == Ownership::Ours)
        };
        desired.filter(is_whole).map(Step::renew).collect()
    }

    /// Peers were renewed, or could not be.
    pub fn on_renewed(&mut self, outcomes: &KeyOutcomes, now: Instant) -> Renewed {
        let (mut renewed, mut dropped) = (0, 0);
        for (key, outcome) in outcomes {
            if outcome.is_ok() {
                self.peers.mark_renewed(key);
                renewed += 1;
            } else {
                // The peer may have been removed without being set again.
                dropped += self.peers.mark_pending(*key, now);
            }
        }
        if renewed == EVICTIONS_AT_ONCE {
            self.schedule.expedite(now);
        }
        Renewed { renewed, dropped }
    }

    /// Removes routes and flood entries that have no peer.
    pub fn plan_orphans(&mut self, device: &Device, now: Instant) -> Vec<Change> {
        let mut orphaned = self.peers.orphaned(device, now);
        if orphaned.len() > BACKLOG_SLICE {
            orphaned.truncate(BACKLOG_SLICE);
            self.schedule.expedite(now);
        }
        orphaned
    }

    /// Adds the keys that now have room to the backlog, if no evictions are left.
    pub fn assign_slots(&mut self, reserved: &Reserved, now: Instant) {
        if let (Ok(own), true) = (self.interface_key.clone(), self.evictions.steps.is_empty()) {
            self.backlog.extend(self.peers.give_slots(own, reserved));
            self.make_more_room(now);
        }
    }

    /// Schedules an early read for further evictions if keys still lack a slot.
    pub(super) fn make_more_room(&mut self, now: Instant) {
        if self.evictions.steps.is_empty() && self.evictions.removed > 0 && self.peers.lacks_room() {
            self.schedule.expedite(now);
        }
    }
}
