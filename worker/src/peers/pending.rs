//! Keys that came and are not whole in the kernel yet.

use std::collections::BTreeMap;

use wgkex_common::PublicKey;

use super::compact_instant::CompactInstant;

/// How often a key that the kernel refuses is tried: with the schedule's growing pauses, for some minutes.
pub(super) const MAX_TRIES: u8 = 8;

/// Keys that are pending. One may have a peer, too. It counts those for which a place is reserved.
#[derive(Debug, Default)]
pub(super) struct Pending {
    keys: BTreeMap<PublicKey, PendingKey>,
    /// How many of `keys` have a place.
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
    /// When it had a handshake at another gateway, by a broker's snapshot.
    pub elsewhere: Option<CompactInstant>,
    /// A place is kept for its peer.
    pub has_slot: bool,
    /// A broker admitted it since this program started.
    pub came: bool,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// For how many keys a place is reserved.
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

    /// Whether a place is reserved for `key`.
    pub(super) fn has_slot(&self, key: &PublicKey) -> bool {
        self.keys.get(key).is_some_and(|pending| pending.has_slot)
    }

    /// How many keys somebody may wait for, and when the oldest of them arrived.
    pub(super) fn announced(&self) -> (usize, Option<CompactInstant>) {
        let arrivals = self.keys.values().filter(|pending| pending.announced).map(|pending| pending.arrived);
        arrivals.fold((0, None), |(number, oldest), arrived| (number + 1, oldest.into_iter().chain([arrived]).min()))
    }

    pub(super) fn oldest_first(&self) -> Vec<PublicKey> {
        let mut keys: Vec<_> = self.keys.iter().map(|(key, pending)| (pending.arrived, *key)).collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, key)| key).collect()
    }

    /// `key` is pending as it is given, without a place.
    pub(super) fn insert(&mut self, key: PublicKey, pending: PendingKey) {
        self.remove(&key);
        self.keys.insert(key, pending);
    }

    pub(super) fn insert_if_absent(&mut self, key: PublicKey, pending: PendingKey) {
        self.keys.entry(key).or_insert(pending);
    }

    /// `key` came at `now`, once more if it is pending already, and keeps its place.
    pub(super) fn announce(&mut self, key: PublicKey, now: CompactInstant) {
        let new = PendingKey { announced: true, came: true, ..PendingKey::from_elsewhere(now, false) };
        let pending = self.keys.entry(key).or_insert(new);
        *pending = PendingKey { first: pending.first, elsewhere: pending.elsewhere, has_slot: pending.has_slot, ..new };
    }

    /// Takes in when a pending key had a handshake elsewhere; false if it is not pending.
    pub(super) fn note_elsewhere(&mut self, key: &PublicKey, shaken: Option<CompactInstant>) -> bool {
        let Some(pending) = self.keys.get_mut(key) else { return false };
        pending.elsewhere = pending.elsewhere.max(shaken);
        pending.came |= shaken.is_some();
        true
    }

    /// Keeps a place for `key`, if it is pending.
    pub(super) fn take_slot(&mut self, key: &PublicKey) {
        if let Some(pending) = self.keys.get_mut(key).filter(|pending| !pending.has_slot) {
            pending.has_slot = true;
            self.slots += 1;
        }
    }

    /// Keeps no place for any key.
    pub(super) fn release_slots(&mut self) {
        self.keys.values_mut().for_each(|pending| pending.has_slot = false);
        self.slots = 0;
    }

    /// `key` is pending no longer.
    pub(super) fn remove(&mut self, key: &PublicKey) -> Option<PendingKey> {
        let pending = self.keys.remove(key);
        self.slots -= usize::from(pending.is_some_and(|pending| pending.has_slot));
        pending
    }

    /// Keeps only the keys that `keeps` names.
    pub(super) fn retain(&mut self, mut keeps: impl FnMut(&PublicKey, &PendingKey) -> bool) {
        let slots = &mut self.slots;
        self.keys.retain(|key, pending| {
            let stays = keeps(key, pending);
            *slots -= usize::from(!stays && pending.has_slot);
            stays
        });
    }

    /// The kernel refused `key` once more; true if that was too often.
    pub(super) fn count_refusal(&mut self, key: &PublicKey) -> bool {
        let Some(pending) = self.keys.get_mut(key) else { return false };
        pending.tries += 1;
        pending.tries >= MAX_TRIES
    }

    /// What is counted, counted again.
    #[cfg(test)]
    pub(super) fn recount(&self) -> usize {
        self.keys.values().filter(|pending| pending.has_slot).count()
    }
}

impl PendingKey {
    /// Of a key that did not come to this program itself.
    pub(super) fn from_elsewhere(arrived: CompactInstant, established: bool) -> Self {
        let elsewhere = established.then_some(arrived);
        Self { arrived, first: arrived, tries: 0, announced: false, elsewhere, has_slot: false, came: false }
    }
}
