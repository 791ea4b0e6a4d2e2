//! The records that operators make by admin calls and that brokers and workers share. Of each subject the newest one
//! counts, so that whoever has heard the same records, in whatever order, has the same map. No IO, no clock.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::parse::TEXT_MAX;
use super::{Entry, List, hex};
use crate::{PublicKey, is_topic_level};

/// An operator makes so many at most.
pub const MAX: usize = 10_000;
/// Those of brokers that were apart may come to more together.
const MERGED_MAX: usize = 2 * MAX;
/// What counts no longer is remembered this long, in seconds, for those who were away.
const REMEMBERED: u64 = 7 * 86_400;
/// The year 10000, in milliseconds of Unix time: a clock that says so is not one.
const AT_MAX: u64 = 253_402_300_800_000;
/// The longest name of a domain.
const DOMAIN_MAX: usize = 200;

/// That a key is on a list, or not any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it is about.
    #[serde(flatten)]
    pub entry: Entry,
    /// When it was made, in milliseconds of Unix time; of two about the same the later one counts.
    pub at: u64,
    /// Whether it puts the key on the list, or takes it off.
    pub on: bool,
}

/// There are too many records for one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are {MAX} entries already, no more are allowed")]
pub struct Full;

/// What a record is about: of two about the same one counts.
type Subject = (List, PublicKey, Option<String>);

/// The newest record of each subject.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    newest: BTreeMap<Subject, Record>,
}

impl Record {
    /// Whether it is one that a broker makes.
    fn is_sound(&self) -> bool {
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
        self.on && self.entry.counts(now)
    }

    /// Whether it may be forgotten.
    fn is_past(&self, now: u64) -> bool {
        let end = if self.on { self.entry.until } else { Some(self.at / 1000) };
        end.is_some_and(|end| end.saturating_add(REMEMBERED) <= now)
    }

    fn subject(&self) -> Subject {
        (self.entry.list, self.entry.key, self.entry.domain.clone())
    }

    /// What of two about the same decides which one counts: the same for everybody who has both.
    fn rank(&self) -> (u64, bool, &Entry) {
        (self.at, self.on, &self.entry)
    }
}

impl Records {
    /// Takes in a record that somebody made; true if it counts now instead of what did. `now` is in seconds of Unix time.
    pub fn merge(&mut self, record: Record, now: u64) -> bool {
        let subject = record.subject();
        let known = self.newest.get(&subject);
        let is_newer = known.is_none_or(|known| known.rank() < record.rank());
        let has_room = known.is_some() || self.newest.len() < MERGED_MAX;
        let takes = is_newer && has_room && record.is_sound() && !record.is_past(now);
        if takes {
            self.newest.insert(subject, record);
        }
        takes
    }

    /// Makes a record of `entry` that counts instead of every one known, whatever the clocks of their makers said.
    pub fn change(&mut self, entry: Entry, on: bool, now_ms: u64) -> Result<Record, Full> {
        let mut record = Record { entry, at: now_ms, on };
        let known = self.newest.get(&record.subject());
        if known.is_none() && self.newest.len() >= MAX {
            return Err(Full);
        }
        record.at = known.map_or(now_ms, |known| now_ms.max(known.at + 1)).min(AT_MAX);
        self.newest.insert(record.subject(), record.clone());
        Ok(record)
    }

    /// Whether `entry`'s key is on its list at `now` by a record.
    #[must_use]
    pub fn has(&self, entry: &Entry, now: u64) -> bool {
        let subject = (entry.list, entry.key, entry.domain.clone());
        self.newest.get(&subject).is_some_and(|record| record.counts(now))
    }

    /// Forgets what need not be remembered any more; true if there was something.
    pub fn forget(&mut self, now: u64) -> bool {
        let before = self.newest.len();
        self.newest.retain(|_, record| !record.is_past(now));
        self.newest.len() < before
    }

    /// All of them, in the order of their subjects.
    pub fn iter(&self) -> impl Iterator<Item = &Record> {
        self.newest.values()
    }

    /// The same for everybody whose records say the same at `now`.
    #[must_use]
    pub fn digest(&self, now: u64) -> String {
        let mut hash = Sha256::new();
        for record in self.newest.values().filter(|record| record.counts(now)) {
            let Entry { list, key, domain, .. } = &record.entry;
            hash.update(key.as_bytes());
            hash.update(record.at.to_be_bytes());
            hash.update([*list as u8]);
            hash.update(domain.as_deref().unwrap_or_default());
            hash.update([0]);
        }
        hex(&hash.finalize()[..16])
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
        Record { entry: deny(n), at: NOW * 1000 + at, on }
    }

    fn records(all: impl IntoIterator<Item = Record>) -> Records {
        let mut records = Records::default();
        for record in all {
            records.merge(record, NOW);
        }
        records
    }

    #[test]
    fn the_newest_counts_whatever_the_order() {
        let (put, taken, again) = (record(1, 1, true), record(1, 2, false), record(1, 3, true));
        for order in [[&put, &taken, &again], [&again, &taken, &put], [&taken, &again, &put]] {
            assert!(records(order.into_iter().cloned()).has(&deny(1), NOW));
        }
        assert!(!records([taken.clone(), put.clone()]).has(&deny(1), NOW));
        let tie = Record { at: put.at, ..taken };
        assert!(records([tie.clone(), put.clone()]).has(&deny(1), NOW) && records([put, tie]).has(&deny(1), NOW));
    }

    #[test]
    fn a_change_counts_although_somebodys_clock_is_ahead() {
        let mut ahead = records([record(1, 10_000_000, true)]);
        let lifted = ahead.change(deny(1), false, NOW * 1000).unwrap();
        assert!(!ahead.has(&deny(1), NOW));
        let mut other = records([record(1, 10_000_000, true)]);
        assert!(other.merge(lifted, NOW) && other == ahead);
    }

    #[test]
    fn one_too_many_is_refused_and_a_known_one_is_not() {
        let mut full = Records::default();
        for n in 0..u32::try_from(MAX).unwrap() {
            full.change(deny(n), true, NOW * 1000).unwrap();
        }
        assert_eq!(full.change(deny(1_000_000), true, NOW * 1000), Err(Full));
        assert!(full.change(deny(7), false, NOW * 1000).is_ok());
        for n in 0..u32::try_from(2 * MAX).unwrap() {
            full.merge(record(1_000_000 + n, 0, true), NOW);
        }
        assert_eq!(full.newest.len(), MERGED_MAX);
    }

    #[test]
    fn what_counts_no_longer_is_forgotten_after_a_week_and_not_learnt_again() {
        let ends = Record { entry: Entry { until: Some(NOW + 10), ..deny(1) }, ..record(1, 0, true) };
        let (lifted, stays) = (record(2, 0, false), record(3, 0, true));
        let mut all = records([ends.clone(), lifted.clone(), stays]);
        assert!(all.has(&ends.entry, NOW + 9) && !all.has(&ends.entry, NOW + 10));
        assert!(!all.forget(NOW + REMEMBERED - 1) && all.forget(NOW + REMEMBERED));
        assert_eq!(all.newest.len(), 2);
        assert!(all.forget(NOW + REMEMBERED + 10) && all.newest.len() == 1);
        assert!(!all.merge(ends, NOW + REMEMBERED + 10) && !all.merge(lifted, NOW + REMEMBERED + 10));
    }

    #[test]
    fn what_no_broker_makes_is_not_learnt() {
        let good = record(1, 0, true);
        let with = |entry: Entry| Record { entry, ..good.clone() };
        for bad in [
            Record { at: u64::MAX, ..good.clone() },
            with(Entry { name: Some("x".repeat(201)), ..deny(1) }),
            with(Entry { reason: Some("x\ny".into()), ..deny(1) }),
            with(Entry { domain: Some("a".into()), ..deny(1) }),
            with(Entry { domain: Some("a/b".into()), ..Entry::new(List::Allow, key(1)) }),
        ] {
            assert!(!Records::default().merge(bad.clone(), NOW), "{bad:?}");
        }
    }

    #[test]
    fn the_digest_tells_what_counts_and_nothing_else() {
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
        let json = serde_json::to_string(&Record { entry, at: 7, on: true }).unwrap();
        let key = key(1);
        assert_eq!(json, format!(r#"{{"list":"deny","key":"{key}","reason":"spam","until":5,"at":7,"on":true}}"#));
        let later = format!(r#"{{"list":"allow","key":"{key}","domain":"d","at":7,"on":false,"new":1}}"#);
        let read: Record = serde_json::from_str(&later).unwrap();
        assert_eq!((read.entry.domain.as_deref(), read.on), (Some("d"), false));
    }

    fn any_record() -> impl Strategy<Value = Record> {
        let entry =
            (0..3_usize, 0..4_u32, prop::option::of("[ab]"), prop::option::of("[xy]"), prop::option::of(0..20_u64));
        (entry, 0..6_u64, any::<bool>()).prop_map(|((list, n, domain, name, until), at, on)| {
            let list = List::ALL[list];
            let domain = domain.filter(|_| list == List::Allow);
            let until = until.map(|until| NOW + until - 10);
            Record { entry: Entry { domain, name, until, ..Entry::new(list, key(n)) }, at: NOW * 1000 + at, on }
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

            // Each merged by itself first, and then one into the other.
            let mut one_by_one = records(ours);
            for record in records(theirs).iter() {
                one_by_one.merge(record.clone(), NOW);
            }
            prop_assert_eq!(one_by_one.digest(NOW), together.digest(NOW));
            prop_assert_eq!(one_by_one, together);
        }
    }
}
