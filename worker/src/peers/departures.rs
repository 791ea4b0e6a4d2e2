//! Removal of peers: stale ones, those whose slot or address others need, those that are denied.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use wgkex_common::PublicKey;

use super::KnownPeers;
use super::capacity::evictions;
use super::compact_instant::CompactInstant;
use super::policy::{PeerState, Policy};
use super::table::{Handshake, PeerEntry};
use crate::profiles::Sweep;

/// How long a route or flood entry has to be without a peer before it is removed: another program may be about to set
/// the peer.
pub(crate) const ORPHANED: Duration = Duration::from_secs(30);

/// The peers that a drain may remove, the longest silent first: most likely their routers are gone already.
#[derive(Debug, Default)]
pub struct Drainable {
    connected: Vec<(Option<CompactInstant>, PublicKey)>,
    silent: Vec<(Option<CompactInstant>, PublicKey)>,
}

impl Drainable {
    /// The peers whose routers are connected.
    #[must_use]
    pub fn connected(&self) -> impl ExactSizeIterator<Item = PublicKey> {
        self.connected.iter().map(|(_, key)| *key)
    }

    /// The peers whose routers are not connected.
    #[must_use]
    pub fn silent(&self) -> impl ExactSizeIterator<Item = PublicKey> {
        self.silent.iter().map(|(_, key)| *key)
    }
}

impl KnownPeers {
    /// Whether there is a peer whose address another key has.
    #[must_use]
    pub fn has_evictions(&self) -> bool {
        !self.owners.to_evict().is_empty()
    }

    /// Peers of ours to be evicted: those that lost their address, and, where pending keys have no room, the oldest
    /// ones without a handshake, plus some in advance. Judged by the last read.
    #[must_use]
    pub fn eviction_candidates(&self) -> BTreeSet<PublicKey> {
        let mut candidates = self.owners.to_evict().clone();
        let mut room = self.capacity();
        let new = self.pending.keys().filter(|key| self.lacks_slot(key));
        let lacking = new.filter(|key| !room.take(self.counts_as_established(key))).count();
        let number = evictions(&self.policy, self.table.unestablished(), lacking);
        if number > 0 {
            let mut oldest: Vec<_> = self.evictable().collect();
            oldest.sort_unstable();
            candidates.extend(oldest.into_iter().take(number).map(|(_, key)| key));
        }
        candidates
    }

    /// Whether a pending key has neither a peer nor a slot for one.
    #[must_use]
    pub fn lacks_room(&self) -> bool {
        self.pending.keys().any(|key| self.lacks_slot(key))
    }

    /// Whether the peer of `key`, one of the [`eviction_candidates`](Self::eviction_candidates), still has to be
    /// evicted.
    #[must_use]
    pub fn is_eviction_candidate(&self, key: &PublicKey) -> bool {
        self.owners.to_evict().contains(key) || self.table.get(key).is_some_and(|entry| self.is_evictable(key, entry))
    }

    /// Peers that may be evicted for others, with the arrival times of their keys.
    pub(super) fn evictable(&self) -> impl Iterator<Item = (CompactInstant, PublicKey)> {
        let evictable = self.table.iter().filter(|(key, entry)| self.is_evictable(key, entry));
        evictable.map(|(key, entry)| (entry.arrived, *key))
    }

    fn is_evictable(&self, key: &PublicKey, entry: &PeerEntry) -> bool {
        entry.is_unestablished() && entry.sweep == Sweep::WhenStale && !self.admission.trusts(key)
    }

    /// The peers of ours that are stale, judged by the last read.
    #[must_use]
    pub fn stale(&self, now: Instant) -> BTreeSet<PublicKey> {
        self.stale_by(&self.policy, now)
    }

    /// The stale peers without regard to the arrival times of their keys.
    #[must_use]
    pub fn stale_without_grace(&self, now: Instant) -> BTreeSet<PublicKey> {
        self.stale_by(&Policy { grace: Duration::ZERO, ..self.policy }, now)
    }

    fn stale_by(&self, policy: &Policy, now: Instant) -> BTreeSet<PublicKey> {
        let is_stale = |entry: &PeerEntry| {
            entry.ours && entry.sweep == Sweep::WhenStale && entry.state(policy, now) == PeerState::Stale
        };
        let stale = self.table.iter().filter(|(key, entry)| is_stale(entry) && !self.admission.trusts(key));
        stale.map(|(key, _)| *key).collect()
    }

    /// The peers of ours that a drain removes past its deadline, judged by the last read. `requested` has the times at
    /// which routers sent their keys past the deadline: such a peer stays for its grace, and as long as its router is
    /// connected after that time, since the router got no other gateway.
    #[must_use]
    pub fn drainable(&self, requested: &BTreeMap<PublicKey, Instant>, now: Instant) -> Drainable {
        let mut drainable = Drainable::default();
        for (key, entry) in self.table.iter() {
            if !entry.ours || entry.sweep != Sweep::WhenStale || self.admission.trusts(key) {
                continue;
            }
            let is_connected = entry.state(&self.policy, now) == PeerState::Connected;
            let quiet_since = entry.handshake.map(|handshake| handshake.quiet_since);
            if let Some(requested) = requested.get(key) {
                let has_grace = now.saturating_duration_since(*requested) < self.policy.grace;
                let has_returned = is_connected && quiet_since.is_some_and(|since| Instant::from(since) >= *requested);
                if has_grace || has_returned {
                    continue;
                }
            }
            let class = if is_connected { &mut drainable.connected } else { &mut drainable.silent };
            class.push((quiet_since, *key));
        }
        drainable.connected.sort_unstable();
        drainable.silent.sort_unstable();
        drainable
    }

    /// Forgets pending keys that did not arrive over MQTT in this run of the program, apart from those that have peers,
    /// or whose peers vanished.
    pub fn forget_unrequested(&mut self) {
        let is_unrequested = |key: &&PublicKey| !self.is_announced(key) && self.table.known(key).is_none();
        for key in self.pending.keys().filter(is_unrequested).copied().collect::<Vec<_>>() {
            self.forget_pending(&key);
        }
    }

    /// Forgets the keys of peers that vanished repeatedly and are stale: no sweep has found them.
    pub fn forget_stale(&mut self, now: Instant) {
        let is_stale = |entry: &PeerEntry| {
            entry.handshake_lost_in_kernel
                && entry.sweep == Sweep::WhenStale
                && entry.state(&self.policy, now) == PeerState::Stale
        };
        let stale = self
            .table
            .iter_vanished()
            .filter(|(key, entry)| is_stale(entry) && !self.is_announced(key) && !self.admission.trusts(key));
        for key in stale.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.forget_pending(&key);
        }
    }

    /// At most so many of the peers of ours that have been silent for
    /// [`Policy::forget_endpoint_after`](super::Policy::forget_endpoint_after): their endpoints are to be forgotten.
    #[must_use]
    pub fn idle(&self, most: usize, now: Instant) -> Vec<PublicKey> {
        let Some(forget) = self.policy.forget_endpoint_after else { return Vec::new() };
        let is_silent = |handshake: Handshake| handshake.quiet_since.age(now) >= forget;
        let is_idle =
            |entry: &PeerEntry| entry.ours && !entry.handshake_lost_in_kernel && entry.handshake.is_some_and(is_silent);
        self.table.iter().filter(|(_, entry)| is_idle(entry)).map(|(key, _)| *key).take(most).collect()
    }

    /// The peer of `key` was created again without a handshake in the kernel; the handshake remembered here is kept.
    pub fn mark_renewed(&mut self, key: &PublicKey) {
        self.table.update(key, |entry| entry.handshake_lost_in_kernel = true);
    }

    /// Forgets the pending keys that `is_removed` selects; returns the peers that it selects, and whether each is ours.
    pub fn remove_denied(&mut self, is_removed: impl Fn(&PublicKey) -> bool) -> BTreeMap<PublicKey, bool> {
        let pending: Vec<_> = self.pending.keys().filter(|key| is_removed(key)).copied().collect();
        for key in &pending {
            self.forget_pending(key);
        }
        self.table.iter().filter(|(key, _)| is_removed(key)).map(|(key, entry)| (*key, entry.ours)).collect()
    }

    /// The peer of `key` could not be removed completely: it is no longer ours. If the next read does not show it, it
    /// is gone.
    pub fn mark_foreign(&mut self, key: &PublicKey) {
        if self.table.update(key, |entry| entry.ours = false) {
            self.changed.insert(*key);
        }
    }

    /// `key` was removed from the kernel.
    pub fn removed(&mut self, key: &PublicKey) {
        self.table.remove(key);
        self.owners.evicted(key);
        self.release_address(key);
    }

    /// `key` is no longer pending, and the entry of its vanished peer is forgotten.
    pub(super) fn forget_pending(&mut self, key: &PublicKey) {
        self.pending.remove(key);
        self.table.forget_vanished(key);
        self.release_address(key);
    }

    /// The record of `key` has changed, and it has no address any more unless it has a peer.
    fn release_address(&mut self, key: &PublicKey) {
        self.changed.insert(*key);
        if !self.table.contains(key)
            && let Some(peer) = self.profile.desired(key)
        {
            self.owners.release(key, peer.networks());
        }
    }
}
