//! Arriving keys: which are admitted, which claim a network, which are pending, which are installed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use wgkex_common::address::claim::{Claim, ClaimState};
use wgkex_common::wire::message::Age;
use wgkex_common::{PublicKey, RejectReason, Reserved};

use super::compact_instant::CompactInstant;
use super::pending::PendingKey;
use super::table::PeerEntry;
use super::{KnownPeers, PeerCapacity};
use crate::plan::Step;
use crate::profiles::DesiredPeer;

/// Live keys that a gateway lacks.
#[derive(Debug, PartialEq, Eq)]
pub struct Missing {
    /// Their number.
    pub number: usize,
    /// Those that can be set before the next read, the oldest first.
    pub next: Vec<PublicKey>,
}

/// The decisions about keys that arrived.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Admitted {
    /// They have peers, and are to be set again.
    pub known: Vec<DesiredPeer>,
    /// They are to be set, in this order.
    pub new: Vec<DesiredPeer>,
    /// There is no room for them before the next read.
    pub deferred: Vec<PublicKey>,
    /// They are not to be set, for this reason: no step is made for them.
    pub refused: Vec<(PublicKey, RejectReason)>,
}

/// Every key once, in the order of their last arrivals.
#[must_use]
pub fn dedup_keep_last(keys: impl IntoIterator<Item = PublicKey>) -> Vec<PublicKey> {
    let mut keys: Vec<_> = keys.into_iter().collect();
    let mut seen = BTreeSet::new();
    keys.reverse();
    keys.retain(|key| seen.insert(*key));
    keys.reverse();
    keys
}

impl KnownPeers {
    /// Decides about `keys`, which arrived in this order for the interface whose own key is `own`.
    ///
    /// Keys with a peer are always set again. Others have room up to [`Policy::unestablished`] and [`Policy::peers`];
    /// beyond that they are pending until the next read, which makes room among peers that never had a handshake.
    ///
    /// [`Policy::unestablished`]: super::Policy::unestablished
    /// [`Policy::peers`]: super::Policy::peers
    pub fn admit(
        &mut self,
        keys: impl IntoIterator<Item = PublicKey>,
        own: Option<PublicKey>,
        reserved: &Reserved,
        now: Instant,
    ) -> Admitted {
        let mut room = self.capacity();
        let mut admitted = Admitted::default();
        let mut deferred = Vec::new();
        for key in dedup_keep_last(keys) {
            let peer = match self.admissible(&key, own, reserved, self.is_admitted_and_established(&key)) {
                Ok(peer) => peer,
                Err(reason) => {
                    admitted.refused.push((key, reason));
                    continue;
                }
            };
            if !self.claim(&peer, now) {
                admitted.refused.push((key, RejectReason::AddressTaken));
            } else if self.table.contains(&key) {
                admitted.known.push(peer);
            } else if self.pending.has_slot(&key) || room.take(self.counts_as_established(&key)) {
                admitted.new.push(peer);
            } else if self.table.unestablished() == 0 {
                self.owners.release(&key, peer.networks());
                admitted.refused.push((key, RejectReason::Full));
            } else {
                deferred.push(peer);
            }
        }
        for list in [&mut admitted.known, &mut admitted.new, &mut deferred] {
            self.refuse_dispossessed(list, &mut admitted.refused);
        }
        admitted.deferred = deferred.iter().map(DesiredPeer::key).collect();
        admitted
    }

    /// Moves peers that do not have their networks any more from `peers` to `refused`: of two keys of one batch with the
    /// same address the first may have been admitted before the second took its address.
    fn refuse_dispossessed(&self, peers: &mut Vec<DesiredPeer>, refused: &mut Vec<(PublicKey, RejectReason)>) {
        peers.retain(|peer| {
            let stays = self.owners.owns(&peer.key(), peer.networks());
            if !stays {
                refused.push((peer.key(), RejectReason::AddressTaken));
            }
            stays
        });
    }

    /// The desired peer of `key`, or the reason why it is rejected; the owners of its networks, other than foreign
    /// peers, are not checked.
    fn admissible(
        &self,
        key: &PublicKey,
        own: Option<PublicKey>,
        reserved: &Reserved,
        is_admitted_and_established: bool,
    ) -> Result<DesiredPeer, RejectReason> {
        if Some(*key) == own {
            return Err(RejectReason::OwnKey);
        }
        if (reserved.is_reserved(key) && !is_admitted_and_established) || reserved.lists(key) {
            return Err(RejectReason::Reserved);
        }
        let peer = self.profile.desired(key).ok_or(RejectReason::Denied)?;
        if self.owners.is_taken_by_foreign(key, peer.networks()) { Err(RejectReason::AddressTaken) } else { Ok(peer) }
    }

    /// Assigns its networks to `peer`, unless another key has the better claim to one; false in that case.
    pub(super) fn claim(&mut self, peer: &DesiredPeer, now: Instant) -> bool {
        let key = peer.key();
        let rivals = self.owners.rivals(key, peer.networks());
        if !rivals.is_empty() {
            let claim = self.claim_of(key, now);
            if rivals.iter().any(|rival| !claim.precedes(&self.claim_of(*rival, now))) {
                self.lose_address(key);
                return false;
            }
            for rival in rivals {
                self.lose_address(rival);
            }
        }
        self.owners.assign(key, peer.networks());
        true
    }

    /// `key` has lost a network to another key, and with it all of its networks.
    fn lose_address(&mut self, key: PublicKey) {
        if self.pending.contains(&key) {
            self.forget_pending(&key);
        }
        if let Some(peer) = self.profile.desired(&key) {
            self.owners.release(&key, peer.networks());
        }
        if self.table.has_ours(&key) {
            self.owners.evict(key);
        }
    }

    fn claim_of(&self, key: PublicKey, now: Instant) -> Claim {
        let (peer, pending) = (self.table.known(&key), self.pending.get(&key));
        let first = peer.map(|entry| entry.first).into_iter().chain(pending.map(|pending| pending.first)).min();
        let first = first.unwrap_or(now.into());
        let younger_than = |limit| move |since: CompactInstant| since.age(now) < limit;
        let here = peer.and_then(|entry| entry.handshake).map(|handshake| handshake.quiet_since);
        let handshake_elsewhere =
            peer.and_then(|entry| entry.handshake_elsewhere).or_else(|| pending?.handshake_elsewhere);
        let state = if self.admission.trusts(&key)
            || here.is_some_and(younger_than(self.policy.stale))
            || handshake_elsewhere.is_some_and(younger_than(self.policy.established_elsewhere()))
        {
            ClaimState::Established
        } else if younger_than(self.policy.grace)(first) {
            ClaimState::New
        } else {
            ClaimState::Expired
        };
        Claim { key, state, first: first.into() }
    }

    /// Reserves slots for pending keys without a peer, in order of arrival, as far as there is room, and returns the
    /// steps that install them. Keys that may not be set are no longer pending.
    pub fn give_slots(&mut self, own: Option<PublicKey>, reserved: &Reserved) -> Vec<Step> {
        let mut room = self.capacity();
        let mut steps = Vec::new();
        for key in self.pending.oldest_first() {
            match self.admissible(&key, own, reserved, self.is_admitted_and_established(&key)) {
                Err(_) => self.forget_pending(&key),
                Ok(peer) if self.lacks_slot(&key) && room.take(self.counts_as_established(&key)) => {
                    self.pending.take_slot(&key);
                    steps.push(Step::install(peer));
                }
                Ok(_) => {}
            }
        }
        steps
    }

    pub(super) fn capacity(&self) -> PeerCapacity {
        PeerCapacity::of(&self.policy, &self.table, &self.pending)
    }

    /// Reserves a slot for the peer of `key`, which is pending, until the next read.
    pub fn take_slot(&mut self, key: &PublicKey) {
        if !self.table.contains(key) {
            self.pending.take_slot(key);
        }
    }

    /// Takes in live `keys`: those that have no peer here, are not pending, may be set, and would not be stale at once
    /// become pending; those for which there is room are returned, the oldest first.
    pub fn learn(
        &mut self,
        keys: impl IntoIterator<Item = (PublicKey, Age)>,
        own: Option<PublicKey>,
        reserved: &Reserved,
        now: Instant,
    ) -> Missing {
        let mut lacking = Vec::new();
        for (key, age) in keys {
            lacking.extend(self.learn_one(key, age, own, reserved, now).map(|arrived| (arrived, key)));
        }
        lacking.retain(|(_, key)| self.claim_by_state(*key, now));
        lacking.retain(|(_, key)| self.pending.contains(key));
        lacking.sort_unstable();
        let mut room = self.capacity();
        let (next, others): (Vec<_>, Vec<_>) =
            lacking.into_iter().partition(|(_, key)| room.take(self.counts_as_established(key)));
        for (_, key) in &next {
            self.take_slot(key);
        }
        let number = next.len() + self.wait_for_room(others);
        if self.pending.len() > self.policy.pending {
            self.drop_oldest();
        }
        Missing { number, next: next.into_iter().map(|(_, key)| key).collect() }
    }

    /// Takes in a live key; if it is lacking here, it becomes pending, and the time of its arrival is returned.
    fn learn_one(
        &mut self,
        key: PublicKey,
        Age { age_secs, has_handshake }: Age,
        own: Option<PublicKey>,
        reserved: &Reserved,
        now: Instant,
    ) -> Option<Instant> {
        let age = Duration::from_secs(age_secs);
        // Handshakes are reported at intervals; a key without one has only its grace.
        let lives = if has_handshake { self.policy.established_elsewhere() } else { self.policy.grace };
        if age >= lives {
            return None;
        }
        let arrived = now.checked_sub(age).unwrap_or(now);
        let pending = PendingKey {
            admitted_since_start: has_handshake,
            ..PendingKey::from_elsewhere(arrived.into(), has_handshake)
        };
        if self.note_handshake_elsewhere(&key, pending.handshake_elsewhere) {
            return None;
        }
        self.admissible(&key, own, reserved, has_handshake).ok()?;
        self.pending.insert(key, pending);
        self.changed.insert(key);
        Some(arrived)
    }

    /// Makes those of `keys`, given with their arrival times, pending for which the next read may evict a peer, and
    /// returns how many: established and trusted keys always, others only if newer than the peer that they evict.
    /// Otherwise the keys of a flood would evict each other for ever.
    fn wait_for_room(&mut self, keys: Vec<(Instant, PublicKey)>) -> usize {
        if keys.is_empty() {
            return 0;
        }
        let may_always = |key: &PublicKey| self.counts_as_established(key) || self.admission.trusts(key);
        let (always, mut others): (Vec<_>, Vec<_>) = keys.into_iter().partition(|(_, key)| may_always(key));
        others.reverse();
        let mut oldest: Vec<_> = self.evictable().map(|(arrived, _)| Instant::from(arrived)).collect();
        oldest.sort_unstable();
        let pairs = others.iter().zip(oldest.into_iter().skip(always.len()));
        // Ages are in whole seconds.
        let newer = pairs.take_while(|((arrived, _), oldest)| *arrived > *oldest + Duration::from_secs(1)).count();
        for (_, key) in &others[newer..] {
            self.forget_pending(key);
        }
        always.len() + newer
    }

    /// Assigns its networks to the pending `key`, unless another key has as good a claim; then it is no longer pending.
    /// Claim ages learnt from a broker are not comparable, so only a strictly better state wins.
    fn claim_by_state(&mut self, key: PublicKey, now: Instant) -> bool {
        let Some(peer) = self.profile.desired(&key) else { return false };
        let state = |key| self.claim_of(key, now).state;
        let precedes = |rival: &PublicKey| state(key) > state(*rival);
        if !self.owners.rivals(key, peer.networks()).iter().all(precedes) {
            self.forget_pending(&key);
            return false;
        }
        self.claim(&peer, now)
    }

    /// Notes the time of a key's handshake at another gateway, as reported by a broker; false if the key is not known.
    fn note_handshake_elsewhere(&mut self, key: &PublicKey, shaken: Option<CompactInstant>) -> bool {
        let note = |entry: &mut PeerEntry| {
            entry.handshake_elsewhere = entry.handshake_elsewhere.max(shaken);
            entry.admitted_since_start |= shaken.is_some();
        };
        self.table.update(key, note) || self.pending.note_handshake_elsewhere(key, shaken)
    }

    /// Whether a broker sent the key since the start, and it had a handshake: then another gateway cannot reserve it by
    /// publishing it.
    pub(super) fn is_admitted_and_established(&self, key: &PublicKey) -> bool {
        let is_pending = |key| {
            self.pending
                .get(key)
                .is_some_and(|pending| pending.admitted_since_start && pending.handshake_elsewhere.is_some())
        };
        self.table.known(key).is_some_and(PeerEntry::is_admitted_and_established) || is_pending(key)
    }

    /// Whether the pending `key` has neither a peer nor a slot for one.
    pub(super) fn lacks_slot(&self, key: &PublicKey) -> bool {
        !self.pending.has_slot(key) && !self.table.contains(key)
    }

    /// Whether the pending `key` counts as established, and so takes no slot of the unestablished ones.
    pub(super) fn counts_as_established(&self, key: &PublicKey) -> bool {
        self.pending.get(key).is_some_and(|pending| pending.handshake_elsewhere.is_some())
            || self.table.vanished(key).is_some_and(|entry| !entry.is_unestablished())
    }

    /// An arrived `key` is completely in the kernel; its grace begins at `now`. Returns whether it is new there.
    pub fn mark_installed(&mut self, key: PublicKey, now: Instant) -> bool {
        let is_new = self.insert_or_restore(key, now);
        self.table.update(&key, |entry| entry.arrived = now.into());
        is_new
    }

    /// The vanished peer of `key` is completely in the kernel again.
    pub fn restore(&mut self, key: PublicKey, now: Instant) {
        self.insert_or_restore(key, now);
    }

    fn insert_or_restore(&mut self, key: PublicKey, now: Instant) -> bool {
        let pending = self.pending.remove(&key);
        self.changed.insert(key);
        let new = || {
            let new = PeerEntry::new(now, true);
            let sweep = self.profile.desired(&key).map_or(new.sweep, |peer| peer.sweep);
            PeerEntry { first: pending.map_or(new.first, |pending| pending.first), sweep, ..new }
        };
        let known = self.table.insert_or_restore(key, new, now);
        self.table.update(&key, |entry| {
            entry.handshake_elsewhere =
                entry.handshake_elsewhere.max(pending.and_then(|pending| pending.handshake_elsewhere));
            entry.admitted_since_start |= pending.is_none_or(|pending| pending.admitted_since_start);
        });
        pending.is_some() || !known
    }

    /// An arrived `key` is not completely in the kernel: it is pending. Returns how many of the oldest pending keys
    /// were dropped for it.
    pub fn mark_pending(&mut self, key: PublicKey, now: Instant) -> usize {
        self.pending.announce(key, now.into());
        self.changed.insert(key);
        if self.pending.len() <= self.policy.pending { 0 } else { self.drop_oldest() }
    }

    /// Drops the oldest pending keys, a sixteenth at once, so that a flood does not cost a search per key. Those that
    /// had a handshake are dropped last.
    fn drop_oldest(&mut self) -> usize {
        let surplus = self.pending.len() - self.policy.pending + self.policy.pending / 16;
        let mut oldest = self.pending.oldest_first();
        oldest.sort_by_key(|key| self.counts_as_established(key));
        oldest.iter().take(surplus).for_each(|key| self.forget_pending(key));
        surplus.min(oldest.len())
    }

    /// The kernel refused `key` once more; after too many refusals it is no longer pending.
    pub fn refused(&mut self, key: &PublicKey) {
        if self.pending.count_refusal(key) {
            self.forget_pending(key);
        }
    }
}
