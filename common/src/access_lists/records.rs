//! The records that operators make by admin calls and that brokers and workers share. The newest record of each key on
//! a list is in effect, so that programs that merged the same records, in any order, have the same map. No IO, no
//! clock.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::access_lists::{Entry, List};
use crate::time_text::TEXT_MAX;
use crate::{PublicKey, is_topic_level};

/// With so many keys an operator cannot allow or trust another one.
pub const RECORDS_MAX: usize = 10_000;
/// The limit of all records, so that keys can be denied when there are [`RECORDS_MAX`].
const RECORDS_WITH_DENIED_MAX: usize = 2 * RECORDS_MAX;
/// How far ahead, in seconds, the clock of a record's maker may be.
const CLOCK_AHEAD_MAX: u64 = 3_600;
/// Records that are no longer in effect are remembered this long, in seconds, for programs that were away.
const ENDED_RECORD_LIFETIME: u64 = 7 * 86_400;
/// The year 10000, in milliseconds of Unix time: no clock is set to that.
const AT_MAX: u64 = 253_402_300_800_000;
/// The longest name of a domain.
const DOMAIN_MAX: usize = 200;

/// An entry that an operator added to a list or removed from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The entry.
    #[serde(flatten)]
    pub entry: Entry,
    /// When it was made, in milliseconds of Unix time; of two with the same subject the later one is in effect.
    pub at: u64,
    /// Whether it adds the key to the list, or removes it.
    #[serde(rename = "on")]
    pub present: bool,
}

/// The limit of records is reached, and all of them are in effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are {0} entries already, no more are allowed: what is taken off a list makes room")]
pub struct RecordsFull(usize);

/// The result of merging records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Merged {
    /// The records that are in effect instead of older ones.
    pub taken: Vec<Record>,
    /// How many newer records were not accepted.
    pub refused: RefusedRecords,
}

/// How many records were not accepted, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RefusedRecords {
    /// Invalid ones, which no broker makes.
    pub unsound: u64,
    /// Their time is in the future by the clock here.
    pub future: u64,
    /// Those over the limit, or dropped for others.
    pub full: u64,
}

impl RefusedRecords {
    /// How many of each reason, by its label in metrics.
    #[must_use]
    pub fn by_reason(self) -> [(&'static str, u64); 3] {
        [("unsound", self.unsound), ("future", self.future), ("full", self.full)]
    }
}

impl std::ops::AddAssign for RefusedRecords {
    fn add_assign(&mut self, more: Self) {
        self.unsound += more.unsound;
        self.future += more.future;
        self.full += more.full;
    }
}

/// The subject of a record: of two with the same subject one is in effect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct RecordId {
    list: List,
    key: PublicKey,
    domain: Option<String>,
}

impl RecordId {
    fn of(Entry { list, key, domain, .. }: &Entry) -> Self {
        Self { list: *list, key: *key, domain: domain.clone() }
    }
}

/// The newest record of each subject.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    newest: BTreeMap<RecordId, Record>,
}

impl Record {
    /// Whether it is valid: only such records are made by brokers.
    fn is_valid(&self) -> bool {
        let Entry { list, domain, name, reason, .. } = &self.entry;
        let fits = |text: &Option<String>| {
            text.as_ref().is_none_or(|text| text.len() <= TEXT_MAX && !text.chars().any(char::is_control))
        };
        let domain_fits = domain
            .as_ref()
            .is_none_or(|domain| *list == List::Allow && domain.len() <= DOMAIN_MAX && is_topic_level(domain));
        self.at <= AT_MAX && fits(name) && fits(reason) && domain_fits
    }

    /// Whether it puts the key on the list at `now`.
    #[must_use]
    pub fn counts(&self, now: u64) -> bool {
        self.present && self.entry.counts(now)
    }

    /// Whether its time is too far in the future: its maker's clock was wrong, or the one here is.
    fn is_too_far_ahead(&self, now: u64) -> bool {
        self.at / 1000 > now.saturating_add(CLOCK_AHEAD_MAX)
    }

    /// Whether it can be forgotten.
    fn is_past(&self, now: u64) -> bool {
        let end = if self.present { self.entry.until } else { Some(self.at / 1000) };
        end.is_some_and(|end| end.saturating_add(ENDED_RECORD_LIFETIME) <= now)
    }

    fn id(&self) -> RecordId {
        RecordId::of(&self.entry)
    }

    /// Eviction order when the table is full: first records that are not in effect, then those that do not deny, then the
    /// oldest. The same in every program, so that those with too many keep the same ones.
    fn eviction_rank(&self, now: u64) -> (bool, bool, (u64, bool, &Entry)) {
        (self.counts(now), self.entry.list == List::Deny, self.version())
    }

    /// Of two records with the same subject the one with the greater version is in effect, in every program that has
    /// both.
    fn version(&self) -> (u64, bool, &Entry) {
        (self.at, self.present, &self.entry)
    }
}

impl Records {
    /// Merges records of other programs. `now` is in seconds of Unix time.
    pub fn merge(&mut self, records: impl IntoIterator<Item = Record>, now: u64) -> Merged {
        let (mut subjects, mut refused) = (BTreeSet::new(), RefusedRecords::default());
        for record in records {
            if !record.is_valid() {
                refused.unsound += 1;
            } else if record.is_too_far_ahead(now) {
                refused.future += 1;
            } else if self.take(record.clone(), now) {
                subjects.insert(record.id());
            }
        }
        refused.full += self.trim(now);
        let taken = subjects.iter().filter_map(|subject| self.newest.get(subject)).cloned().collect();
        Merged { taken, refused }
    }

    /// The records from the disk. None is rejected by its time: after a start the clock may be wrong.
    #[must_use]
    pub fn restored(records: impl IntoIterator<Item = Record>, now: u64) -> Self {
        let mut restored = Self::default();
        for record in records.into_iter().filter(Record::is_valid) {
            restored.take(record, now);
        }
        restored.trim(now);
        restored
    }

    /// Takes in a record if it is newer than the known one of its subject, or if the known one is of the future: other
    /// programs reject that.
    fn take(&mut self, record: Record, now: u64) -> bool {
        let subject = record.id();
        let is_newer = |known: &Record| known.is_too_far_ahead(now) || known.version() < record.version();
        let takes = !record.is_past(now) && self.newest.get(&subject).is_none_or(is_newer);
        if takes {
            self.newest.insert(subject, record);
        }
        takes
    }

    /// Drops the records over the limit; returns how many of those were in effect.
    fn trim(&mut self, now: u64) -> u64 {
        let surplus = self.newest.len().saturating_sub(RECORDS_WITH_DENIED_MAX);
        if surplus == 0 {
            return 0;
        }
        let mut all: Vec<&Record> = self.newest.values().collect();
        all.sort_unstable_by(|a, b| a.eviction_rank(now).cmp(&b.eviction_rank(now)));
        let gone: Vec<_> = all.into_iter().take(surplus).map(|record| (record.id(), record.counts(now))).collect();
        for (subject, _) in &gone {
            self.newest.remove(subject);
        }
        gone.iter().map(|(_, counted)| u64::from(*counted)).sum()
    }

    /// Makes a record of `entry` that takes effect over every known one, whatever their times. Records that are no
    /// longer in effect are dropped for it.
    pub fn change(&mut self, entry: Entry, present: bool, now_ms: u64) -> Result<Record, RecordsFull> {
        let now = now_ms / 1000;
        let mut record = Record { entry, at: now_ms, present };
        match self.newest.get(&record.id()) {
            Some(known) if !known.is_too_far_ahead(now) => record.at = now_ms.max(known.at + 1).min(AT_MAX),
            Some(_) => {}
            None => self
                .make_room(if record.entry.list == List::Deny { RECORDS_WITH_DENIED_MAX } else { RECORDS_MAX }, now)?,
        }
        self.newest.insert(record.id(), record.clone());
        Ok(record)
    }

    /// Drops the oldest records that are no longer in effect, though other programs may keep them, until one more fits
    /// `limit`.
    fn make_room(&mut self, limit: usize, now: u64) -> Result<(), RecordsFull> {
        let surplus = (self.newest.len() + 1).saturating_sub(limit);
        if surplus == 0 {
            return Ok(());
        }
        let over = self.newest.values().filter(|record| !record.counts(now));
        let mut over: Vec<_> = over.map(|record| (record.at, record.id())).collect();
        if over.len() < surplus {
            return Err(RecordsFull(limit));
        }
        over.sort_unstable();
        for (_, subject) in over.into_iter().take(surplus) {
            self.newest.remove(&subject);
        }
        Ok(())
    }

    /// Whether `entry`'s key is on its list at `now` by a record.
    #[must_use]
    pub fn has(&self, entry: &Entry, now: u64) -> bool {
        self.newest.get(&RecordId::of(entry)).is_some_and(|record| record.counts(now))
    }

    /// Drops expired records; true if there were any.
    pub fn forget(&mut self, now: u64) -> bool {
        let before = self.newest.len();
        self.newest.retain(|_, record| !record.is_past(now));
        self.newest.len() < before
    }

    /// All of them, in the order of their subjects.
    pub fn iter(&self) -> impl Iterator<Item = &Record> {
        self.newest.values()
    }

    /// The records that other programs accept, too.
    pub fn shared(&self, now: u64) -> impl Iterator<Item = &Record> {
        self.newest.values().filter(move |record| !record.is_too_far_ahead(now))
    }

    /// The digest: equal in all programs with the same records in effect at `now`.
    #[must_use]
    pub fn digest(&self, now: u64) -> String {
        let mut hash = Sha256::new();
        for record in self.shared(now).filter(|record| record.counts(now)) {
            let Entry { list, key, domain, .. } = &record.entry;
            hash.update(key.as_bytes());
            hash.update(record.at.to_be_bytes());
            hash.update([*list as u8]);
            hash.update(domain.as_deref().unwrap_or_default());
            hash.update([0]);
        }
        hex::encode(&hash.finalize()[..16])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 2_000_000_000;

    fn key(n: u32) -> PublicKey {
        let mut bytes = [0x42; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        PublicKey::from_bytes(bytes).unwrap()
    }

    fn deny(n: u32) -> Entry {
        Entry::new(List::Deny, key(n))
    }

    fn record(n: u32, at: u64, on: bool) -> Record {
        Record { entry: deny(n), at: NOW * 1000 + at, present: on }
    }

    fn records(all: impl IntoIterator<Item = Record>) -> Records {
        let mut records = Records::default();
        records.merge(all, NOW);
        records
    }

    #[test]
    fn the_newest_record_counts_in_any_order_of_merging() {
        let (put, taken, again) = (record(1, 1, true), record(1, 2, false), record(1, 3, true));
        for order in [[&put, &taken, &again], [&again, &taken, &put], [&taken, &again, &put]] {
            assert!(records(order.into_iter().cloned()).has(&deny(1), NOW));
        }
        assert!(!records([taken.clone(), put.clone()]).has(&deny(1), NOW));
        let tie = Record { at: put.at, ..taken };
        assert!(records([tie.clone(), put.clone()]).has(&deny(1), NOW) && records([put, tie]).has(&deny(1), NOW));
    }

    #[test]
    fn a_change_counts_although_another_clock_is_ahead() {
        let mut ahead = records([record(1, CLOCK_AHEAD_MAX * 1000, true)]);
        let lifted = ahead.change(deny(1), false, NOW * 1000).unwrap();
        assert!(!ahead.has(&deny(1), NOW));
        let mut other = records([record(1, CLOCK_AHEAD_MAX * 1000, true)]);
        assert_eq!(other.merge([lifted.clone()], NOW + 1).taken, [lifted]);
        assert_eq!(other, ahead);
    }

    /// Failed when records from the year 2096 were accepted: they could not be overridden by a program with the right
    /// clock.
    #[test]
    fn records_of_the_future_are_refused_and_replaced() {
        let future = record(1, (CLOCK_AHEAD_MAX + 1) * 1000, true);
        let merged = Records::default().merge([future.clone()], NOW);
        assert_eq!(
            (merged.taken.len(), merged.refused),
            (0, RefusedRecords { future: 1, ..RefusedRecords::default() })
        );
        // The record was made here, while the clock was wrong.
        let of_the_future = || Records::restored([future.clone()], NOW);
        assert!(of_the_future().has(&deny(1), NOW), "it counts here");
        assert_eq!(of_the_future().digest(NOW), Records::default().digest(NOW), "and keeps nobody waiting");
        assert_eq!(of_the_future().shared(NOW).count(), 0);
        let lifted = of_the_future().change(deny(1), false, NOW * 1000).unwrap();
        assert_eq!(lifted.at, NOW * 1000);
        assert_eq!(of_the_future().merge([lifted.clone()], NOW).taken, [lifted]);
    }

    fn many(range: std::ops::Range<u32>, at: u64) -> impl Iterator<Item = Record> {
        range.map(move |n| record(n, at, true))
    }

    /// Failed when with 10,000 entries no further key could be denied.
    #[test]
    fn a_full_list_lets_an_operator_deny() {
        let max = u32::try_from(RECORDS_MAX).unwrap();
        let mut full = records(many(0..max, 0));
        let trust = Entry::new(List::Trusted, key(1));
        assert_eq!(full.change(trust.clone(), true, NOW * 1000), Err(RecordsFull(RECORDS_MAX)));
        assert!(full.change(deny(max), true, NOW * 1000).is_ok());
        assert!(full.change(deny(7), false, NOW * 1000).is_ok());
        full.merge(many(max..2 * max, 0), NOW);
        assert_eq!(full.newest.len(), RECORDS_WITH_DENIED_MAX);
        // Removed entries are dropped first, and only those.
        assert!(full.change(deny(1_000_000), true, NOW * 1000).is_ok());
        assert!(!full.newest.contains_key(&record(7, 0, false).id()) && full.newest.len() == RECORDS_WITH_DENIED_MAX);
        assert_eq!(full.change(deny(1_000_001), true, NOW * 1000), Err(RecordsFull(RECORDS_WITH_DENIED_MAX)));
        for n in 0..max + 10 {
            full.change(deny(n), false, NOW * 1000).unwrap();
        }
        assert!(full.change(trust, true, NOW * 1000).is_ok());
    }

    /// Failed when records after the 20,000th were dropped silently, and programs that received another order never
    /// agreed.
    #[test]
    fn of_too_many_everybody_keeps_the_same() {
        let most = u32::try_from(RECORDS_WITH_DENIED_MAX).unwrap();
        let trusted = Record { entry: Entry::new(List::Trusted, key(1)), ..record(1, 9, true) };
        let all: Vec<_> = many(0..most, 5).chain(many(most..most + 10, 3)).chain([trusted]).collect();
        let merged = Records::default().merge(all.clone(), NOW);
        assert_eq!(
            (merged.taken.len(), merged.refused),
            (RECORDS_WITH_DENIED_MAX, RefusedRecords { full: 11, ..RefusedRecords::default() })
        );
        let mut backwards = Records::default();
        for part in all.chunks(777).rev() {
            backwards.merge(part.iter().cloned(), NOW);
        }
        let all = records(all);
        assert!(backwards == all && all.digest(NOW) == backwards.digest(NOW));
        assert!(all.has(&deny(0), NOW) && !all.has(&deny(most), NOW), "the oldest go");
    }

    #[test]
    fn ended_records_are_forgotten_after_a_week_and_not_merged_again() {
        let ends = Record { entry: Entry { until: Some(NOW + 10), ..deny(1) }, ..record(1, 0, true) };
        let (lifted, stays) = (record(2, 0, false), record(3, 0, true));
        let mut all = records([ends.clone(), lifted.clone(), stays]);
        assert!(all.has(&ends.entry, NOW + 9) && !all.has(&ends.entry, NOW + 10));
        assert!(!all.forget(NOW + ENDED_RECORD_LIFETIME - 1) && all.forget(NOW + ENDED_RECORD_LIFETIME));
        assert_eq!(all.newest.len(), 2);
        assert!(all.forget(NOW + ENDED_RECORD_LIFETIME + 10) && all.newest.len() == 1);
        assert_eq!(all.merge([ends, lifted], NOW + ENDED_RECORD_LIFETIME + 10), Merged::default());
    }

    #[test]
    fn invalid_records_are_not_merged() {
        let good = record(1, 0, true);
        let with = |entry: Entry| Record { entry, ..good.clone() };
        for bad in [
            Record { at: u64::MAX, ..good.clone() },
            with(Entry { name: Some("x".repeat(201)), ..deny(1) }),
            with(Entry { reason: Some("x\ny".into()), ..deny(1) }),
            with(Entry { domain: Some("a".into()), ..deny(1) }),
            with(Entry { domain: Some("a/b".into()), ..Entry::new(List::Allow, key(1)) }),
        ] {
            let refused = RefusedRecords { unsound: 1, ..RefusedRecords::default() };
            assert_eq!(Records::default().merge([bad.clone()], NOW), Merged { taken: vec![], refused }, "{bad:?}");
        }
    }

    #[test]
    fn the_digest_depends_only_on_records_in_effect() {
        let (one, two) = (record(1, 0, true), record(2, 0, true));
        let digest = |all: &[&Record]| records(all.iter().copied().cloned()).digest(NOW);
        assert_eq!(digest(&[&one, &two]), digest(&[&two, &one]));
        assert_eq!(digest(&[&one, &record(2, 1, false)]), digest(&[&one]));
        assert_ne!(digest(&[&one]), digest(&[&two]));
        assert_ne!(digest(&[&one]), digest(&[&record(1, 1, true)]));
        assert_eq!(digest(&[&one]).len(), 32);
        let ends = Record { entry: Entry { until: Some(NOW), ..deny(1) }, ..one };
        assert_eq!(digest(&[&ends]), digest(&[]));
    }

    #[test]
    fn a_record_is_one_flat_object() {
        let entry = Entry { reason: Some("spam".into()), until: Some(5), ..deny(1) };
        let json = serde_json::to_string(&Record { entry, at: 7, present: true }).unwrap();
        let key = key(1);
        assert_eq!(json, format!(r#"{{"list":"deny","key":"{key}","reason":"spam","until":5,"at":7,"on":true}}"#));
        let later = format!(r#"{{"list":"allow","key":"{key}","domain":"d","at":7,"on":false,"new":1}}"#);
        let read: Record = serde_json::from_str(&later).unwrap();
        assert_eq!((read.entry.domain.as_deref(), read.present), (Some("d"), false));
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let entry =
            (0..3_usize, 0..4_u32, prop::option::of("[ab]"), prop::option::of("[xy]"), prop::option::of(0..20_u64));
        (entry, 0..6_u64, any::<bool>()).prop_map(|((list, n, domain, name, until), at, on)| {
            let list = List::ALL[list];
            let domain = domain.filter(|_| list == List::Allow);
            let until = until.map(|until| NOW + until - 10);
            Record {
                entry: Entry { domain, name, until, ..Entry::new(list, key(n)) },
                at: NOW * 1000 + at,
                present: on,
            }
        })
    }

    proptest! {
        #[test]
        fn merging_is_commutative_associative_and_idempotent(
            (ours, theirs) in (prop::collection::vec(any_record(), 0..30), prop::collection::vec(any_record(), 0..30)),
            seed: u64,
        ) {
            let both: Vec<_> = ours.iter().chain(&theirs).cloned().collect();
            let together = records(both.clone());
            let mut shuffled = both.clone();
            fastrand::Rng::with_seed(seed).shuffle(&mut shuffled);
            prop_assert_eq!(&records(shuffled), &together);
            prop_assert_eq!(&records(both.iter().chain(&both).cloned()), &together);

            // Each is merged separately first, and then one into the other.
            let mut one_by_one = records(ours);
            for record in records(theirs).iter() {
                one_by_one.merge([record.clone()], NOW);
            }
            prop_assert_eq!(one_by_one.digest(NOW), together.digest(NOW));
            prop_assert_eq!(one_by_one, together);
        }
    }
}
