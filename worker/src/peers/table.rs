//! The peers of an interface, as last read and updated by changes since.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use wgkex_common::PublicKey;
use wgkex_common::storage::key_store::Clocks;
use wgkex_kernel::{Device, Peer};

use super::compact_instant::CompactInstant;
use super::pending::{Pending, PendingKey};
use super::policy::{PeerCounts, PeerState, Policy};
use crate::plan::SortedCursor;
use crate::profiles::{DesiredPeer, Ownership, Sweep};

/// Observed peers, and those of ours that vanished. The number of unestablished ones is counted.
#[derive(Debug, Default)]
pub(super) struct PeerTable {
    peers: BTreeMap<PublicKey, PeerEntry>,
    /// The entries of peers of ours that vanished. Their keys are pending.
    vanished: BTreeMap<PublicKey, PeerEntry>,
    /// Peers that by the last read lack an allowed-ip, their keepalive or their preshared key.
    incomplete: Vec<PublicKey>,
    /// How many of `peers` are unestablished.
    unestablished: usize,
}

/// The remembered state of a peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerEntry {
    /// When the key arrived.
    pub arrived: CompactInstant,
    /// When it first arrived.
    pub first: CompactInstant,
    pub handshake: Option<Handshake>,
    /// When it had a handshake at another gateway, as reported by a broker.
    pub handshake_elsewhere: Option<CompactInstant>,
    /// When its handshakes were last reported.
    pub reported: Option<CompactInstant>,
    /// The peer was created again since its last handshake, which the kernel therefore does not show.
    pub handshake_lost_in_kernel: bool,
    pub ours: bool,
    /// A broker admitted it since this program started.
    pub admitted_since_start: bool,
    /// Whether the sweep removes it; a peer that is never swept is not evicted either.
    pub sweep: Sweep,
}

/// The last handshake that the kernel showed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handshake {
    /// The kernel's timestamp in nanoseconds; only compared for equality with later ones.
    at: u64,
    /// The time of the handshake by the monotonic clock.
    pub quiet_since: CompactInstant,
}

impl PeerTable {
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// How many peers of ours never had a handshake.
    pub(super) fn unestablished(&self) -> usize {
        self.unestablished
    }

    pub(super) fn contains(&self, key: &PublicKey) -> bool {
        self.peers.contains_key(key)
    }

    /// Whether `key` has a peer of ours.
    pub(super) fn has_ours(&self, key: &PublicKey) -> bool {
        self.peers.get(key).is_some_and(|entry| entry.ours)
    }

    pub(super) fn get(&self, key: &PublicKey) -> Option<&PeerEntry> {
        self.peers.get(key)
    }

    pub(super) fn vanished(&self, key: &PublicKey) -> Option<&PeerEntry> {
        self.vanished.get(key)
    }

    /// The entry of the peer of `key`, also if it vanished.
    pub(super) fn known(&self, key: &PublicKey) -> Option<&PeerEntry> {
        self.peers.get(key).or_else(|| self.vanished.get(key))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&PublicKey, &PeerEntry)> {
        self.peers.iter()
    }

    /// Peers that by the last read lack something.
    pub(super) fn incomplete(&self) -> &[PublicKey] {
        &self.incomplete
    }

    pub(super) fn iter_vanished(&self) -> impl Iterator<Item = (&PublicKey, &PeerEntry)> {
        self.vanished.iter()
    }

    /// Makes the entries those of the peers of `device`; returns how many of ours vanished. Their keys become pending,
    /// and are added to `changed`.
    pub(super) fn take_over(
        &mut self,
        device: &Device,
        pending: &mut Pending,
        changed: &mut BTreeSet<PublicKey>,
        now: Instant,
    ) -> usize {
        let Self { peers, vanished, .. } = self;
        let mut there = SortedCursor::new(device.peers.keys());
        let before = vanished.len();
        peers.retain(|key, entry| {
            let stays = there.has(key);
            if !stays {
                changed.insert(*key);
            }
            if !stays && entry.ours {
                pending.insert_if_absent(*key, PendingKey::from(&*entry));
                vanished.insert(*key, *entry);
            }
            stays
        });
        let gone = vanished.len() - before;
        let mut found = |key: &PublicKey| match (vanished.remove(key), pending.get(key)) {
            (Some(entry), _) => entry.recreated(now),
            (None, Some(PendingKey { first, handshake_elsewhere, .. })) => {
                PeerEntry { first: *first, handshake_elsewhere: *handshake_elsewhere, ..PeerEntry::new(now, false) }
            }
            (None, None) => PeerEntry::new(now, false),
        };
        if peers.is_empty() {
            // A map that is collected at once has full nodes; filled one by one in order, it takes twice the memory.
            *peers = device.peers.keys().map(|key| (*key, found(key))).collect();
        } else if peers.len() < device.peers.len() {
            for key in device.peers.keys() {
                peers.entry(*key).or_insert_with(|| found(key));
            }
        }
        gone
    }

    /// Calls `observe` for each peer of `device` and its entry; it returns whether the peer lacks something. Keys whose
    /// record changes are added to `changed`.
    pub(super) fn observe(
        &mut self,
        device: &Device,
        changed: &mut BTreeSet<PublicKey>,
        mut observe: impl FnMut(&PublicKey, &Peer, &mut PeerEntry) -> bool,
    ) {
        self.incomplete.clear();
        for ((key, peer), entry) in device.peers.iter().zip(self.peers.values_mut()) {
            let before = (entry.ours, entry.handshake.is_some());
            if observe(key, peer, entry) {
                self.incomplete.push(*key);
            }
            if before != (entry.ours, entry.handshake.is_some()) {
                changed.insert(*key);
            }
        }
        self.unestablished = self.peers.values().filter(|entry| entry.is_unestablished()).count();
    }

    /// Changes the entry of a peer; false if there is none.
    pub(super) fn update(&mut self, key: &PublicKey, change: impl FnOnce(&mut PeerEntry)) -> bool {
        let Some(entry) = self.peers.get_mut(key) else { return false };
        self.unestablished -= usize::from(entry.is_unestablished());
        change(entry);
        self.unestablished += usize::from(entry.is_unestablished());
        true
    }

    /// Adds the peer of `key`, with its entry from before it vanished, or else `new`. Returns whether there was one
    /// before.
    pub(super) fn insert_or_restore(&mut self, key: PublicKey, new: impl FnOnce() -> PeerEntry, now: Instant) -> bool {
        let vanished = self.vanished.remove(&key).map(|entry| entry.recreated(now));
        let before = self.peers.len();
        let entry = self.peers.entry(key).or_insert_with(|| vanished.unwrap_or_else(new));
        let is_new = entry.is_unestablished();
        let known = self.peers.len() == before;
        self.unestablished += usize::from(!known && is_new);
        known
    }

    /// Removes the peer of `key`.
    pub(super) fn remove(&mut self, key: &PublicKey) {
        let unestablished = self.peers.remove(key).is_some_and(|entry| entry.is_unestablished());
        self.unestablished -= usize::from(unestablished);
    }

    pub(super) fn forget_vanished(&mut self, key: &PublicKey) {
        self.vanished.remove(key);
    }

    /// The peers that are due to be reported; they count as reported from now on.
    pub(super) fn take_unreported(&mut self, policy: &Policy, now: Instant) -> Vec<PublicKey> {
        let due = |entry: &PeerEntry| {
            let long_ago = |at: CompactInstant| at.age(now) >= policy.report;
            entry.ours && entry.reported.is_none_or(long_ago) && entry.state(policy, now) == PeerState::Connected
        };
        let due = self.peers.iter_mut().filter(|(_, entry)| due(entry));
        due.map(|(key, entry)| {
            entry.reported = Some(now.into());
            *key
        })
        .collect()
    }

    /// Marks all peers as not reported.
    pub(super) fn report_all(&mut self) {
        self.peers.values_mut().chain(self.vanished.values_mut()).for_each(|entry| entry.reported = None);
    }

    /// How many peers are in which state.
    pub(super) fn counts(&self, policy: &Policy, now: Instant) -> PeerCounts {
        let mut counts = PeerCounts::default();
        for entry in self.peers.values() {
            *match entry.state(policy, now) {
                PeerState::Connected => &mut counts.connected,
                PeerState::Idle => &mut counts.idle,
                PeerState::New => &mut counts.new,
                PeerState::Stale => &mut counts.stale,
            } += 1;
        }
        counts
    }

    /// The counter, computed again.
    #[cfg(test)]
    pub(super) fn recount(&self) -> usize {
        self.peers.values().filter(|entry| entry.is_unestablished()).count()
    }
}

impl PeerEntry {
    pub(super) fn new(arrived: Instant, ours: bool) -> Self {
        let arrived = arrived.into();
        Self {
            arrived,
            first: arrived,
            handshake: None,
            handshake_elsewhere: None,
            reported: None,
            handshake_lost_in_kernel: false,
            ours,
            admitted_since_start: false,
            sweep: Sweep::WhenStale,
        }
    }

    /// The entry of a peer that was created again. It gets a new grace once per handshake, so that a peer that is
    /// removed repeatedly still expires.
    fn recreated(mut self, now: Instant) -> Self {
        if !std::mem::replace(&mut self.handshake_lost_in_kernel, true) {
            self.arrived = now.into();
        }
        self
    }

    /// Whether it had a handshake, here or elsewhere, and its key came from a broker.
    pub(super) fn is_admitted_and_established(&self) -> bool {
        self.admitted_since_start && self.is_established()
    }

    /// Whether it had a handshake, here or elsewhere.
    pub(super) fn is_established(&self) -> bool {
        self.handshake.is_some() || self.handshake_elsewhere.is_some()
    }

    /// Whether it is ours, and had a handshake neither here nor elsewhere.
    pub(super) fn is_unestablished(&self) -> bool {
        self.ours && !self.is_established()
    }

    /// Updates the handshake from the kernel's peer.
    pub(super) fn observe(&mut self, peer: &Peer, now: Clocks, since_last_read: Option<Duration>) {
        match (peer.last_handshake, self.handshake) {
            (Some(at), Some(known)) if nanoseconds(at) == known.at => {}
            (Some(at), _) => {
                self.handshake = Some(Handshake::first_seen(at, now, since_last_read));
                self.handshake_lost_in_kernel = false;
            }
            (None, Some(_)) => *self = self.recreated(now.monotonic),
            (None, None) => {}
        }
    }

    /// Compares the peer with its desired state, and returns whose it is; `may_be_ours` is false if a gateway reserves
    /// its key or address.
    pub(super) fn set_ownership(&mut self, desired: Option<&DesiredPeer>, peer: &Peer, may_be_ours: bool) -> Ownership {
        let ownership = desired.map_or(Ownership::Foreign, |desired| desired.ownership(peer));
        self.sweep = desired.map_or(self.sweep, |desired| desired.sweep);
        self.ours = match ownership {
            Ownership::Ours => may_be_ours,
            Ownership::Partial => self.ours,
            Ownership::Foreign => false,
        };
        ownership
    }

    pub(super) fn state(&self, policy: &Policy, now: Instant) -> PeerState {
        let idle = self.handshake.map(|handshake| handshake.quiet_since.age(now));
        match idle {
            Some(idle) if idle < policy.stale.min(policy.connected) => PeerState::Connected,
            Some(idle) if idle < policy.stale => PeerState::Idle,
            _ if self.arrived.age(now) < policy.grace => PeerState::New,
            _ => PeerState::Stale,
        }
    }
}

/// A peer that vanished: its key is pending.
impl From<&PeerEntry> for PendingKey {
    fn from(PeerEntry { arrived, first, handshake_elsewhere, admitted_since_start, .. }: &PeerEntry) -> Self {
        let (arrived, first, handshake_elsewhere, admitted_since_start) =
            (*arrived, *first, *handshake_elsewhere, *admitted_since_start);
        Self { arrived, first, handshake_elsewhere, admitted_since_start, ..Self::from_elsewhere(arrived, false) }
    }
}

impl Handshake {
    /// A handshake that is first shown by this read happened after the last read, however the wall clock was stepped.
    fn first_seen(at: SystemTime, now: Clocks, since_last_read: Option<Duration>) -> Self {
        let by_wall = now.wall.duration_since(at).unwrap_or_default();
        let ago = since_last_read.map_or(by_wall, |longest| by_wall.min(longest));
        let quiet_since = now.monotonic.checked_sub(ago).unwrap_or(now.monotonic).into();
        Self { at: nanoseconds(at), quiet_since }
    }
}

/// A kernel's timestamp in nanoseconds; wraps around, and times before 1970 are 0.
fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().wrapping_mul(1_000_000_000).wrapping_add(since.subsec_nanos().into())
}
