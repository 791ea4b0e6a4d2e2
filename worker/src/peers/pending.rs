//! Arrived keys that are not completely in the kernel yet.

use std::collections::BTreeMap;

use wgkex_common::PublicKey;

use super::compact_instant::CompactInstant;

/// How often a key that the kernel refuses is tried: some minutes, with the growing pauses of the schedule.
pub(super) const INSTALL_TRIES_MAX: u8 = 8;

/// Pending keys. One may have a peer, too. The number of reserved slots is counted.
#[derive(Debug, Default)]
pub(super) struct Pending {
    keys: BTreeMap<PublicKey, PendingKey>,
    /// How many of `keys` have a slot.
    slots: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct PendingKey {
    pub arrived: CompactInstant,
    /// When it first arrived.
    pub first: CompactInstant,
    pub tries: u8,
    /// It arrived over MQTT, not from the state file or a snapshot.
    pub announced: bool,
    /// When it had a handshake at another gateway, as reported by a broker.
    pub handshake_elsewhere: Option<CompactInstant>,
    /// A slot is reserved for its peer.
    pub has_slot: bool,
    /// A broker admitted it since this program started.
    pub admitted_since_start: bool,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The number of reserved slots.
    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    pub(super) fn contains(&self, key: &PublicKey) -> bool {
        self.keys.contains_key(key)
    }

    pub(super) fn get(&self, key: &PublicKey) -> Option<&PendingKey> {
        self.keys.get(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &PublicKey> {
        self.keys.keys()
    }

    /// Whether a slot is reserved for `key`.
    pub(super) fn has_slot(&self, key: &PublicKey) -> bool {
        self.keys.get(key).is_some_and(|pending| pending.has_slot)
    }

    /// The number of keys whose outcome a broker may wait for, and the arrival of the oldest.
    pub(super) fn announced(&self) -> (usize, Option<CompactInstant>) {
        let arrivals = self.keys.values().filter(|pending| pending.announced).map(|pending| pending.arrived);
        arrivals.fold((0, None), |(number, oldest), arrived| (number + 1, oldest.into_iter().chain([arrived]).min()))
    }

    pub(super) fn oldest_first(&self) -> Vec<PublicKey> {
        let mut keys: Vec<_> = self.keys.iter().map(|(key, pending)| (pending.arrived, *key)).collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, key)| key).collect()
    }

    /// Inserts a pending key as given, without a slot.
    pub(super) fn insert(&mut self, key: PublicKey, pending: PendingKey) {
        self.remove(&key);
        self.keys.insert(key, pending);
    }

    pub(super) fn insert_if_absent(&mut self, key: PublicKey, pending: PendingKey) {
        self.keys.entry(key).or_insert(pending);
    }

    /// `key` arrived at `now`, perhaps again while it is pending; it keeps its slot.
    pub(super) fn announce(&mut self, key: PublicKey, now: CompactInstant) {
        let new = PendingKey { announced: true, admitted_since_start: true, ..PendingKey::from_elsewhere(now, false) };
        let pending = self.keys.entry(key).or_insert(new);
        *pending = PendingKey {
            first: pending.first,
            handshake_elsewhere: pending.handshake_elsewhere,
            has_slot: pending.has_slot,
            ..new
        };
    }

    /// Notes the time of a pending key's handshake at another gateway; false if it is not pending.
    pub(super) fn note_handshake_elsewhere(&mut self, key: &PublicKey, shaken: Option<CompactInstant>) -> bool {
        let Some(pending) = self.keys.get_mut(key) else { return false };
        pending.handshake_elsewhere = pending.handshake_elsewhere.max(shaken);
        pending.admitted_since_start |= shaken.is_some();
        true
    }

    /// Reserves a slot for `key`, if it is pending.
    pub(super) fn take_slot(&mut self, key: &PublicKey) {
        if let Some(pending) = self.keys.get_mut(key).filter(|pending| !pending.has_slot) {
            pending.has_slot = true;
            self.slots += 1;
        }
    }

    /// Releases all slots.
    pub(super) fn release_slots(&mut self) {
        self.keys.values_mut().for_each(|pending| pending.has_slot = false);
        self.slots = 0;
    }

    /// `key` is no longer pending.
    pub(super) fn remove(&mut self, key: &PublicKey) -> Option<PendingKey> {
        let pending = self.keys.remove(key);
        self.slots -= usize::from(pending.is_some_and(|pending| pending.has_slot));
        pending
    }

    /// Keeps only the keys that `keeps` selects.
    pub(super) fn retain(&mut self, mut keeps: impl FnMut(&PublicKey, &PendingKey) -> bool) {
        let slots = &mut self.slots;
        self.keys.retain(|key, pending| {
            let stays = keeps(key, pending);
            *slots -= usize::from(!stays && pending.has_slot);
            stays
        });
    }

    /// The kernel refused `key` once more; true after too many refusals.
    pub(super) fn count_refusal(&mut self, key: &PublicKey) -> bool {
        let Some(pending) = self.keys.get_mut(key) else { return false };
        pending.tries += 1;
        pending.tries >= INSTALL_TRIES_MAX
    }

    /// The counters, computed again.
    #[cfg(test)]
    pub(super) fn recount(&self) -> usize {
        self.keys.values().filter(|pending| pending.has_slot).count()
    }
}

impl PendingKey {
    /// A key that did not arrive over MQTT in this run of the program.
    pub(super) fn from_elsewhere(arrived: CompactInstant, established: bool) -> Self {
        let handshake_elsewhere = established.then_some(arrived);
        Self {
            arrived,
            first: arrived,
            tries: 0,
            announced: false,
            handshake_elsewhere,
            has_slot: false,
            admitted_since_start: false,
        }
    }
}
