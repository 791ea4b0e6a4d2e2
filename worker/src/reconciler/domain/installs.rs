//! Keys that arrive at a domain, or are live and missing there: which are set at once, which later, which never.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use wgkex_common::wire::message::Age;
use wgkex_common::{PublicKey, RejectReason, Reserved};

use super::{BACKLOG_SLICE, DomainReconciler, Recorded};
use crate::peers::{Admitted, dedup_keep_last};
use crate::plan::Step;
use crate::profiles::DesiredPeer;
use crate::reconciler::reports::Report;

/// The decisions about keys that arrived.
#[derive(Default)]
pub struct Arrivals {
    /// Keys that are rejected.
    pub rejected: Vec<(PublicKey, RejectReason)>,
    /// Keys that fail because there are no usable tables.
    pub unavailable: Report,
    /// Peers that are set again. They never wait for new ones.
    pub known: Vec<Step>,
    /// Peers that are set now.
    pub new: Vec<Step>,
    /// Keys that wait until those are applied.
    pub delayed: DelayedKeys,
}

/// Keys that arrived and are not applied at once.
#[derive(Default)]
pub struct DelayedKeys {
    /// They have a slot.
    later: Vec<Step>,
    /// They have no slot.
    deferred: Vec<PublicKey>,
}

impl DomainReconciler {
    /// Takes in live keys that this gateway may lack: the missing ones become pending. Returns how many.
    pub fn on_live(&mut self, mut keys: BTreeMap<PublicKey, Age>, reserved: &Reserved, now: Instant) -> usize {
        let own = self.interface_key.clone().ok().flatten();
        let (admission, name) = (&self.admission, self.name.name());
        keys.retain(|key, _| !admission.denies(name, key) && (!self.drain.is_on() || self.peers.contains(key)));
        let missing = self.peers.learn(keys, own, reserved, now);
        if self.interface_key.is_ok() {
            self.make_room(missing.number - missing.next.len(), now);
            let profile = self.peers.profile();
            self.backlog.extend(missing.next.iter().filter_map(|key| profile.desired(key)).map(Step::install));
        }
        missing.number
    }

    /// Decides about keys that arrived, in this order.
    pub fn on_keys(&mut self, keys: Vec<PublicKey>, reserved: &Reserved, now: Instant) -> Arrivals {
        let (admission, name) = (&self.admission, self.name.name());
        let (denied, keys): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| admission.denies(name, key));
        let denied = dedup_keep_last(denied).into_iter().map(|key| (key, RejectReason::Denied));
        let mut arrivals = Arrivals { rejected: denied.collect(), ..Arrivals::default() };
        let own = match self.interface_key.clone() {
            Ok(own) => own,
            Err(reason) => {
                let unavailable = dedup_keep_last(keys).into_iter().map(|key| (key, Err(reason.clone())));
                return Arrivals { unavailable: unavailable.collect(), ..arrivals };
            }
        };
        let Admitted { known, mut new, deferred, refused } = self.peers.admit(keys, own, reserved, now);
        arrivals.rejected.extend(refused);
        let steps = |peers: Vec<DesiredPeer>| peers.into_iter().map(Step::install).collect();
        let later = steps(new.split_off(BACKLOG_SLICE.min(new.len())));
        Arrivals { known: steps(known), new: steps(new), delayed: DelayedKeys { later, deferred }, ..arrivals }
    }

    /// Drops waiting steps for the destinations that these steps set.
    pub fn supersede(&mut self, steps: &[Step]) {
        if self.has_backlog() {
            let superseded: BTreeSet<_> = steps.iter().flat_map(|step| step.peer.destinations()).collect();
            let stays = |step: &Step| !step.peer.destinations().any(|network| superseded.contains(&network));
            self.backlog.retain(stays);
            self.evictions.steps.retain(stays);
        }
    }

    /// Keys that arrived were applied, or could not be.
    pub fn on_installed(&mut self, report: &Report, now: Instant) -> Recorded {
        let mut recorded = Recorded::default();
        for (key, outcome) in report {
            self.record(&mut recorded, *key, outcome, now);
        }
        recorded
    }

    pub(super) fn record(
        &mut self,
        recorded: &mut Recorded,
        key: PublicKey,
        outcome: &Result<(), RejectReason>,
        now: Instant,
    ) {
        if outcome.is_ok() {
            self.drain.on_request(key, now);
        }
        match outcome {
            Ok(()) if self.peers.mark_installed(key, now) => recorded.installed += 1,
            Ok(()) => recorded.refreshed += 1,
            Err(reason) => {
                recorded.failed.push(reason.clone());
                recorded.dropped += self.peers.mark_pending(key, now);
            }
        }
    }

    /// Makes the rest of the keys that arrived pending; returns how many pending keys were dropped.
    pub fn on_delayed(&mut self, DelayedKeys { later, deferred }: DelayedKeys, now: Instant) -> usize {
        self.make_room(deferred.len(), now);
        let keys = later.iter().map(Step::key).chain(deferred);
        let dropped = keys.map(|key| self.peers.mark_pending(key, now)).sum();
        for step in &later {
            self.peers.take_slot(&step.key());
        }
        self.supersede(&later);
        self.backlog.extend(later);
        dropped
    }

    /// Schedules a read early if keys lack a slot or a peer has to be evicted.
    fn make_room(&mut self, without: usize, now: Instant) {
        if without > 0 || self.peers.has_evictions() {
            self.schedule.expedite(now);
        }
    }
}
