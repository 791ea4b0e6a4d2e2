//! The peers of an interface, as last read and with what was applied since.

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

/// Observed peers, and those of ours that vanished. It counts those that never had a handshake.
#[derive(Debug, Default)]
pub(super) struct PeerTable {
    peers: BTreeMap<PublicKey, PeerEntry>,
    /// What was known of peers of ours that vanished. Their keys are pending.
    vanished: BTreeMap<PublicKey, PeerEntry>,
    /// Those that as last read lacked some of their allowed-ips, their keepalive or their preshared key.
    incomplete: Vec<PublicKey>,
    /// How many of `peers` are unestablished.
    unestablished: usize,
}

/// What is known of a peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerEntry {
    /// When the key arrived.
    pub arrived: CompactInstant,
    /// When it first arrived.
    pub first: CompactInstant,
    pub handshake: Option<Handshake>,
    /// When it had a handshake at another gateway, by a broker's snapshot.
    pub elsewhere: Option<CompactInstant>,
    /// When its handshakes were last reported.
    pub reported: Option<CompactInstant>,
    /// The peer was created again since its last handshake, which the kernel therefore does not know.
    pub renewed: bool,
    pub ours: bool,
    /// A broker admitted it since this program started.
    pub came: bool,
    /// Whether the sweep removes it; what it never removes is not evicted either.
    pub sweep: Sweep,
}

/// The last handshake that the kernel showed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handshake {
    /// As the kernel has it, in nanoseconds of its clock; only ever compared with what it was before.
    at: u64,
    /// When that was by the monotonic clock.
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

    /// What is known of the peer of `key`, also if it vanished.
    pub(super) fn known(&self, key: &PublicKey) -> Option<&PeerEntry> {
        self.peers.get(key).or_else(|| self.vanished.get(key))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&PublicKey, &PeerEntry)> {
        self.peers.iter()
    }

    /// Those that as last read lacked something.
    pub(super) fn incomplete(&self) -> &[PublicKey] {
        &self.incomplete
    }

    pub(super) fn iter_vanished(&self) -> impl Iterator<Item = (&PublicKey, &PeerEntry)> {
        self.vanished.iter()
    }

    /// Has an entry for each peer of `device`, and for no other; returns how many vanished. Their keys are pending, and
    /// they are among the `changed`.
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
            (Some(entry), _) => entry.made_anew(now),
            (None, Some(PendingKey { first, elsewhere, .. })) => {
                PeerEntry { first: *first, elsewhere: *elsewhere, ..PeerEntry::new(now, false) }
            }
            (None, None) => PeerEntry::new(now, false),
        };
        if peers.is_empty() {
            // Made at once a map has full nodes; filled in order, one by one, it takes twice the memory.
            *peers = device.peers.keys().map(|key| (*key, found(key))).collect();
        } else if peers.len() < device.peers.len() {
            for key in device.peers.keys() {
                peers.entry(*key).or_insert_with(|| found(key));
            }
        }
        gone
    }

    /// Has `observe` look at each peer of `device` and its entry, which are those of the same keys; it returns whether the
    /// peer lacks something. Keys of which something else is remembered than before are among the `changed`.
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

    /// There is a peer of `key` from now on, with what was known of it when it vanished, or else `new`. Returns whether
    /// there was one before.
    pub(super) fn seat(&mut self, key: PublicKey, new: impl FnOnce() -> PeerEntry, now: Instant) -> bool {
        let vanished = self.vanished.remove(&key).map(|entry| entry.made_anew(now));
        let before = self.peers.len();
        let entry = self.peers.entry(key).or_insert_with(|| vanished.unwrap_or_else(new));
        let is_new = entry.is_unestablished();
        let known = self.peers.len() == before;
        self.unestablished += usize::from(!known && is_new);
        known
    }

    /// There is no peer of `key` any more.
    pub(super) fn remove(&mut self, key: &PublicKey) {
        let unestablished = self.peers.remove(key).is_some_and(|entry| entry.is_unestablished());
        self.unestablished -= usize::from(unestablished);
    }

    pub(super) fn forget_vanished(&mut self, key: &PublicKey) {
        self.vanished.remove(key);
    }

    /// The peers that are to be reported, which count as reported from now on.
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

    /// No peer counts as reported.
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

    /// What is counted, counted again.
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
            elsewhere: None,
            reported: None,
            renewed: false,
            ours,
            came: false,
            sweep: Sweep::WhenStale,
        }
    }

    /// Its peer was created again. That gives it a new grace once per handshake, so that a peer that is removed repeatedly
    /// still expires.
    fn made_anew(mut self, now: Instant) -> Self {
        if !std::mem::replace(&mut self.renewed, true) {
            self.arrived = now.into();
        }
        self
    }

    /// It had a handshake, here or elsewhere, and is no peer that somebody else made.
    pub(super) fn is_routers(&self) -> bool {
        self.came && self.is_established()
    }

    /// It had a handshake, here or elsewhere.
    pub(super) fn is_established(&self) -> bool {
        self.handshake.is_some() || self.elsewhere.is_some()
    }

    /// It is ours, and had a handshake neither here nor elsewhere.
    pub(super) fn is_unestablished(&self) -> bool {
        self.ours && !self.is_established()
    }

    /// Takes in what the kernel shows of its handshakes.
    pub(super) fn observe(&mut self, peer: &Peer, now: Clocks, since_last_read: Option<Duration>) {
        match (peer.last_handshake, self.handshake) {
            (Some(at), Some(known)) if nanoseconds(at) == known.at => {}
            (Some(at), _) => {
                self.handshake = Some(Handshake::first_seen(at, now, since_last_read));
                self.renewed = false;
            }
            (None, Some(_)) => *self = self.made_anew(now.monotonic),
            (None, None) => {}
        }
    }

    /// Takes in what its profile makes of the peer, and returns whose it is; `may_be_ours` unless somebody reserves it.
    pub(super) fn judge(&mut self, desired: Option<&DesiredPeer>, peer: &Peer, may_be_ours: bool) -> Ownership {
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
    fn from(PeerEntry { arrived, first, elsewhere, came, .. }: &PeerEntry) -> Self {
        let (arrived, first, elsewhere, came) = (*arrived, *first, *elsewhere, *came);
        Self { arrived, first, elsewhere, came, ..Self::from_elsewhere(arrived, false) }
    }
}

impl Handshake {
    /// A handshake that the last read did not show is no older than that read, however the wall clock was stepped.
    fn first_seen(at: SystemTime, now: Clocks, since_last_read: Option<Duration>) -> Self {
        let by_wall = now.wall.duration_since(at).unwrap_or_default();
        let ago = since_last_read.map_or(by_wall, |longest| by_wall.min(longest));
        let quiet_since = now.monotonic.checked_sub(ago).unwrap_or(now.monotonic).into();
        Self { at: nanoseconds(at), quiet_since }
    }
}

/// A time of the kernel's, whose seconds are 64 bits and whose years before 1970 are none.
fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs().wrapping_mul(1_000_000_000).wrapping_add(since.subsec_nanos().into())
}
