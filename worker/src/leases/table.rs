//! The leases of one server: a copy of the broker's, updated by changes and by chunks. Pure.

use std::collections::BTreeMap;

use wgkex_common::PublicKey;
use wgkex_common::wire::lease::{LeaseChange, LeaseChunk, LeaseContent, LeaseVersion, LeasedAddresses};

/// Changes that are kept until the missing ones before them are received.
const EARLY_MAX: usize = 64;
/// Leases of a server at most: more than an interface can have.
const LEASES_MAX: usize = 1_000_000;

/// The leases of one server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeaseTable {
    version: Option<LeaseVersion>,
    leases: BTreeMap<PublicKey, LeasedAddresses>,
    /// Received chunks of another version, as long as chunks are missing.
    partial: Option<Partial>,
    /// Changes received before an earlier one, by the revision that they change.
    early: BTreeMap<i64, (LeaseVersion, LeaseChange)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Partial {
    version: LeaseVersion,
    chunks: u32,
    leases: BTreeMap<PublicKey, LeasedAddresses>,
}

/// The result of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseProgress {
    /// The leases have changed and are complete.
    Changed,
    /// The leases are unchanged and complete.
    Current,
    /// A chunk was received, and another follows.
    Partial,
    /// A change or chunk is missing: all leases have to be requested.
    Incomplete,
}

impl LeaseTable {
    /// The table as it was stored.
    pub fn restored(version: Option<LeaseVersion>, leases: BTreeMap<PublicKey, LeasedAddresses>) -> Self {
        Self { version, leases, ..Self::default() }
    }

    /// Which version it has.
    pub fn version(&self) -> Option<LeaseVersion> {
        self.version
    }

    /// The leases.
    pub fn leases(&self) -> &BTreeMap<PublicKey, LeasedAddresses> {
        &self.leases
    }

    /// Applies a message that leads to `version`.
    pub fn apply(&mut self, version: LeaseVersion, content: LeaseContent) -> LeaseProgress {
        match content {
            LeaseContent::Current if self.version == Some(version) => LeaseProgress::Current,
            LeaseContent::Current => LeaseProgress::Incomplete,
            LeaseContent::Deleted => self.on_deleted(version),
            LeaseContent::Change(change) => self.on_change(version, change),
            LeaseContent::Chunk(chunk) => self.on_chunk(version, chunk),
        }
    }

    fn on_deleted(&mut self, version: LeaseVersion) -> LeaseProgress {
        if self.version.is_some_and(|known| known.id != version.id) {
            return LeaseProgress::Current;
        }
        *self = Self::default();
        LeaseProgress::Changed
    }

    fn on_change(&mut self, version: LeaseVersion, change: LeaseChange) -> LeaseProgress {
        match self.version {
            Some(known) if known == version || version.is_before(&known) => LeaseProgress::Current,
            Some(known) if known.id == version.id && change.after == known.revision => {
                self.change(version, change);
                self.take_early();
                LeaseProgress::Changed
            }
            Some(_) | None => {
                if self.early.len() < EARLY_MAX {
                    self.early.insert(change.after, (version, change));
                }
                LeaseProgress::Incomplete
            }
        }
    }

    fn on_chunk(&mut self, version: LeaseVersion, chunk: LeaseChunk) -> LeaseProgress {
        if self.version.is_some_and(|known| known == version || version.is_before(&known)) {
            self.partial = None;
            return if chunk.is_last { LeaseProgress::Current } else { LeaseProgress::Partial };
        }
        let mut partial = match self.partial.take() {
            _ if chunk.number == 0 => Partial { version, chunks: 0, leases: BTreeMap::new() },
            Some(partial) if (partial.version, partial.chunks) == (version, chunk.number) => partial,
            Some(_) | None => return LeaseProgress::Incomplete,
        };
        partial.leases.extend(chunk.leases);
        partial.chunks += 1;
        if partial.leases.len() > LEASES_MAX {
            return LeaseProgress::Incomplete;
        }
        if !chunk.is_last {
            self.partial = Some(partial);
            return LeaseProgress::Partial;
        }
        (self.version, self.leases) = (Some(version), partial.leases);
        self.take_early();
        LeaseProgress::Changed
    }

    fn change(&mut self, version: LeaseVersion, change: LeaseChange) {
        for key in change.removed {
            self.leases.remove(&key);
        }
        if self.leases.len() + change.added.len() <= LEASES_MAX {
            self.leases.extend(change.added);
        }
        self.version = Some(version);
    }

    /// Applies the early changes that are next now, and drops those that are outdated.
    fn take_early(&mut self) {
        while let Some(known) = self.version {
            self.early.retain(|_, (version, _)| known.is_before(version));
            let Some((next, change)) = self.early.remove(&known.revision) else { return };
            self.change(next, change);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::testing::key;

    fn version(revision: i64) -> LeaseVersion {
        LeaseVersion { id: 7, revision }
    }

    fn lease(n: u32) -> (PublicKey, LeasedAddresses) {
        (key(n), IpAddr::from(Ipv4Addr::from(n)).into())
    }

    fn added(after: i64, n: u32) -> LeaseContent {
        LeaseContent::Change(LeaseChange { after, added: [lease(n)].into(), ..LeaseChange::default() })
    }

    fn removed(after: i64, n: u32) -> LeaseContent {
        LeaseContent::Change(LeaseChange { after, removed: [key(n)].into(), ..LeaseChange::default() })
    }

    fn chunk(number: u32, is_last: bool, leases: &[u32]) -> LeaseContent {
        LeaseContent::Chunk(LeaseChunk { number, is_last, leases: leases.iter().map(|n| lease(*n)).collect() })
    }

    fn numbers(table: &LeaseTable) -> Vec<u32> {
        (0..100).filter(|n| table.leases().contains_key(&key(*n))).collect()
    }

    #[test]
    fn changes_follow_one_another_and_a_gap_is_noticed() {
        let mut table = LeaseTable::default();
        for (revision, content, progress, leases) in [
            (35, added(20, 9), LeaseProgress::Incomplete, vec![]),
            (20, chunk(0, false, &[1]), LeaseProgress::Partial, vec![]),
            (20, chunk(1, true, &[2]), LeaseProgress::Changed, vec![1, 2, 9]),
            (35, added(20, 9), LeaseProgress::Current, vec![1, 2, 9]),
            (41, removed(35, 1), LeaseProgress::Changed, vec![2, 9]),
            (60, added(50, 6), LeaseProgress::Incomplete, vec![2, 9]),
            (41, LeaseContent::Current, LeaseProgress::Current, vec![2, 9]),
            (60, LeaseContent::Current, LeaseProgress::Incomplete, vec![2, 9]),
            (35, chunk(0, true, &[1]), LeaseProgress::Current, vec![2, 9]),
            (50, removed(41, 9), LeaseProgress::Changed, vec![2, 6]),
            (80, chunk(1, true, &[1]), LeaseProgress::Incomplete, vec![2, 6]),
            (81, added(20, 7), LeaseProgress::Incomplete, vec![2, 6]),
            (82, chunk(0, true, &[1]), LeaseProgress::Changed, vec![1]),
        ] {
            assert_eq!(table.apply(version(revision), content.clone()), progress, "{revision} {content:?}");
            assert_eq!(numbers(&table), leases, "{revision} {content:?}");
        }
    }

    #[test]
    fn another_server_of_the_name_replaces_the_first_one() {
        let mut table = LeaseTable::restored(Some(version(5)), [lease(1)].into());
        let other = LeaseVersion { id: 8, revision: 0 };
        assert_eq!(table.apply(other, LeaseContent::Deleted), LeaseProgress::Current, "none of this one");
        assert_eq!(table.apply(LeaseVersion { revision: 1, ..other }, added(0, 2)), LeaseProgress::Incomplete);
        assert_eq!(table.apply(other, chunk(0, true, &[])), LeaseProgress::Changed);
        assert_eq!(numbers(&table), [2]);
        assert_eq!(table.apply(LeaseVersion { revision: 2, ..other }, LeaseContent::Deleted), LeaseProgress::Changed);
        assert_eq!((numbers(&table), table.version()), (vec![], None));
    }

    /// What happened to a broker's message in transit.
    #[derive(Debug, Clone, Copy)]
    enum Way {
        Arrives,
        Lost,
        Twice,
        Swapped,
    }

    proptest! {
        /// Whatever is lost, duplicated or reordered: a worker that has no request pending has the same leases as the
        /// broker.
        #[test]
        fn a_worker_that_is_not_behind_has_the_brokers_leases(
            steps in prop::collection::vec(
                (0_u32..12, prop::sample::select(vec![Way::Arrives, Way::Lost, Way::Twice, Way::Swapped])),
                0..60,
            ),
        ) {
            let (mut table, mut broker) = (LeaseTable::default(), LeaseTable::default());
            broker.apply(version(0), chunk(0, true, &[]));
            table.apply(version(0), chunk(0, true, &[]));
            let (mut held, mut revision) = (None, 0);
            for (n, way) in steps {
                revision += 1;
                let change = if broker.leases().contains_key(&key(n)) { removed } else { added };
                let content = change(revision - 1, n);
                broker.apply(version(revision), content.clone());
                let mut sent = match way {
                    Way::Arrives => vec![(revision, content)],
                    Way::Lost => vec![],
                    Way::Twice => vec![(revision, content.clone()), (revision, content)],
                    Way::Swapped => {
                        held = Some((revision, content));
                        continue;
                    }
                };
                sent.extend(held.take());
                let mut last = None;
                for (revision, content) in sent {
                    last = Some(table.apply(version(revision), content));
                }
                if last == Some(LeaseProgress::Incomplete) {
                    let all: Vec<u32> = numbers(&broker);
                    let progress = table.apply(version(revision), chunk(0, true, &all));
                    prop_assert!(progress != LeaseProgress::Incomplete);
                }
                if table.version() == broker.version() {
                    prop_assert_eq!(table.leases(), broker.leases());
                }
            }
            let all: Vec<u32> = numbers(&broker);
            table.apply(version(revision), chunk(0, true, &all));
            prop_assert_eq!(table.leases(), broker.leases());
        }
    }
}
