//! Which keys are admitted, by all entries of the lists at one time. No IO, no clock.

use std::collections::{BTreeMap, BTreeSet};

use super::{Entry, List};
use crate::PublicKey;

/// Whether only listed keys are admitted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AllowList {
    /// Every key that is not denied is admitted.
    #[default]
    Off,
    /// Only listed keys are admitted, and a file or directory of them could not be read so far.
    Unread,
    /// Only listed keys are admitted.
    Read,
}

/// The lists' decision about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is admitted.
    Allowed,
    /// It is not admitted, since it is not on an allow list.
    NotAllowlisted,
    /// It is denied.
    Denied,
}

/// Which keys the lists admit, deny and trust, at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admission {
    denied: BTreeSet<PublicKey>,
    trusted: BTreeSet<PublicKey>,
    allow_list: AllowList,
    allowed: BTreeSet<PublicKey>,
    allowed_in: BTreeMap<String, BTreeSet<PublicKey>>,
    ends: Option<u64>,
}

impl Admission {
    /// The admission by those of `entries` that are in effect at `now`, in seconds of Unix time.
    #[must_use]
    pub fn of<'a>(entries: impl IntoIterator<Item = &'a Entry>, allow_list: AllowList, now: u64) -> Self {
        let mut admission = Self { allow_list, ..Self::default() };
        for entry in entries.into_iter().filter(|entry| entry.counts(now)) {
            admission.ends = admission.ends.into_iter().chain(entry.until).min();
            match (entry.list, &entry.domain) {
                (List::Deny, _) => &mut admission.denied,
                (List::Trusted, _) => &mut admission.trusted,
                (List::Allow, None) => &mut admission.allowed,
                (List::Allow, Some(domain)) => admission.allowed_in.entry(domain.clone()).or_default(),
            }
            .insert(entry.key);
        }
        admission
    }

    /// The decision about `key` in the domain with this name. A denied key is not admitted, whatever other lists it is
    /// on.
    #[must_use]
    pub fn verdict(&self, domain: &str, key: &PublicKey) -> Verdict {
        let is_listed =
            || self.allowed.contains(key) || self.allowed_in.get(domain).is_some_and(|keys| keys.contains(key));
        if self.denied.contains(key) {
            Verdict::Denied
        } else if self.allow_list == AllowList::Off || is_listed() {
            Verdict::Allowed
        } else {
            Verdict::NotAllowlisted
        }
    }

    /// Whether `key` is not admitted.
    #[must_use]
    pub fn denies(&self, domain: &str, key: &PublicKey) -> bool {
        self.verdict(domain, key) != Verdict::Allowed
    }

    /// Whether an existing peer of `key` must be removed. While the allow list could not be read, no peer is removed
    /// for missing from it.
    #[must_use]
    pub fn must_remove(&self, domain: &str, key: &PublicKey) -> bool {
        match self.verdict(domain, key) {
            Verdict::Allowed => false,
            Verdict::NotAllowlisted => self.allow_list == AllowList::Read,
            Verdict::Denied => true,
        }
    }

    /// Whether no peer has to be removed.
    #[must_use]
    pub fn removes_none(&self) -> bool {
        self.denied.is_empty() && self.allow_list != AllowList::Read
    }

    /// Whether only keys on an allow list are admitted.
    #[must_use]
    pub fn only_allows(&self) -> bool {
        self.allow_list != AllowList::Off
    }

    /// Whether the peer of `key` is never swept.
    #[must_use]
    pub fn trusts(&self, key: &PublicKey) -> bool {
        self.trusted.contains(key)
    }

    /// How many keys are on a list; one that is allowed in several domains counts in each.
    #[must_use]
    pub fn len(&self, list: List) -> usize {
        match list {
            List::Deny => self.denied.len(),
            List::Allow => self.allowed.len() + self.allowed_in.values().map(BTreeSet::len).sum::<usize>(),
            List::Trusted => self.trusted.len(),
        }
    }

    /// Whether an entry has expired by `now`, so that this is outdated.
    #[must_use]
    pub fn is_over(&self, now: u64) -> bool {
        self.ends.is_some_and(|end| end <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n.max(2); 32]).unwrap()
    }

    fn entry(list: List, n: u8) -> Entry {
        Entry::new(list, key(n))
    }

    fn allowed_in(domain: &str, n: u8) -> Entry {
        Entry { domain: Some(domain.into()), ..entry(List::Allow, n) }
    }

    #[test]
    fn deny_beats_allow_and_trust() {
        let entries = [entry(List::Deny, 3), entry(List::Allow, 3), entry(List::Trusted, 3), entry(List::Allow, 4)];
        for allow_list in [AllowList::Off, AllowList::Unread, AllowList::Read] {
            let admission = Admission::of(&entries, allow_list, 0);
            assert_eq!(admission.verdict("a", &key(3)), Verdict::Denied);
            assert_eq!(admission.verdict("a", &key(4)), Verdict::Allowed);
            assert!(
                admission.must_remove("a", &key(3))
                    && !admission.must_remove("a", &key(4))
                    && !admission.removes_none()
            );
        }
    }

    #[test]
    fn an_allow_list_admits_only_listed_keys_each_in_its_domain() {
        use Verdict::{Allowed, NotAllowlisted};
        let entries = [allowed_in("a", 3), entry(List::Allow, 4)];
        let verdicts = |allow_list| {
            let admission = Admission::of(&entries, allow_list, 0);
            [("a", 3), ("b", 3), ("a", 4), ("b", 4), ("a", 5)].map(|(domain, n)| admission.verdict(domain, &key(n)))
        };
        assert_eq!(verdicts(AllowList::Off), [Allowed; 5]);
        for allow_list in [AllowList::Read, AllowList::Unread] {
            assert_eq!(verdicts(allow_list), [Allowed, NotAllowlisted, Allowed, Allowed, NotAllowlisted]);
        }
    }

    #[test]
    fn an_unread_allow_list_removes_no_peer() {
        let goes = |allow_list| Admission::of(&[entry(List::Allow, 3)], allow_list, 0).must_remove("a", &key(4));
        assert!(goes(AllowList::Read) && !goes(AllowList::Unread) && !goes(AllowList::Off));
        assert!(Admission::of(&[], AllowList::Unread, 0).removes_none());
        assert!(!Admission::of(&[], AllowList::Read, 0).removes_none());
    }

    #[test]
    fn an_entry_counts_until_its_end() {
        let entries = [
            Entry { until: Some(100), ..entry(List::Deny, 3) },
            Entry { until: Some(200), ..entry(List::Trusted, 4) },
            entry(List::Deny, 5),
        ];
        let at = |now| Admission::of(&entries, AllowList::Off, now);
        assert!(at(99).denies("a", &key(3)) && !at(100).denies("a", &key(3)) && at(100).denies("a", &key(5)));
        assert!(at(199).trusts(&key(4)) && !at(200).trusts(&key(4)));
        assert!(!at(0).is_over(99) && at(0).is_over(100));
        assert!(!at(100).is_over(199) && at(100).is_over(200) && !at(200).is_over(u64::MAX));
        assert_eq!(List::ALL.map(|list| at(0).len(list)), [2, 0, 1]);
    }
}
