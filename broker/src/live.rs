//! The live keys: those that gateways get back when they lack them. No IO, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgkex_common::config;
use wgkex_common::lists::Admission;
use wgkex_common::message::{Age, Page, Question};
use wgkex_common::store::{Journal, Kept, Keys};
use wgkex_common::sync::PAGE;
use wgkex_common::{Domain, PublicKey};

/// What is said twice in this time, by a router and on the bus, is said once.
const AT_ONCE: Duration = Duration::from_secs(3);
/// Ages that another broker tells are whole seconds, and pages are long on their way. If less than this were news, two
/// brokers would tell each other the same for ever.
const TOLD: Duration = Duration::from_secs(60);

/// Every key that is alive, and when it was heard of.
#[derive(Debug)]
pub struct LiveKeys {
    own_name: String,
    max: usize,
    ttl: Duration,
    domains: BTreeMap<Domain, BTreeMap<PublicKey, Live>>,
    journal: Journal,
    admission: Arc<Admission>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Live {
    kept: Kept,
    /// When this broker last heard of it, from whomever: an asker may lack it from then on.
    heard: Instant,
}

/// How many live keys there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that shook hands at some gateway.
    pub proven: usize,
    /// Those that never did.
    pub unproven: usize,
}

impl LiveKeys {
    /// The keys of `domains` that are known. Changes go into the journal.
    #[must_use]
    pub fn new(
        own_name: String,
        config: config::LiveKeys,
        domains: impl IntoIterator<Item = Domain>,
        (journal, known): (Journal, Keys),
        now: Instant,
    ) -> Self {
        let config::LiveKeys { max, ttl } = config;
        let domains = domains.into_iter().map(|domain| (domain, BTreeMap::new())).collect();
        let mut live = Self { own_name, max, ttl, domains, journal, admission: Arc::default() };
        for ((domain, key), kept) in known {
            if let Some(keys) = live.domains.get_mut(&domain) {
                // Who asked the last run of this program may have missed what that heard of last.
                keys.insert(key, Live { kept, heard: now });
            }
        }
        live.make_room();
        live
    }

    /// Takes over who may come from now on, and forgets the keys that have to go.
    pub fn obey(&mut self, admission: Arc<Admission>) {
        self.admission = admission;
        if self.admission.expels_nobody() {
            return;
        }
        let (admission, journal) = (&self.admission, &self.journal);
        for (domain, keys) in &mut self.domains {
            keys.retain(|key, _| {
                let stays = !admission.expels(domain.name(), key);
                if !stays {
                    journal.remove(domain, *key);
                }
                stays
            });
        }
    }

    /// A key came, by a router or on the bus.
    pub fn admit(&mut self, domain: &str, key: PublicKey, now: Instant) {
        self.merge(domain, key, Kept { last: now, proven: false }, AT_ONCE, now);
    }

    /// A gateway sees handshakes of the key.
    pub fn prove(&mut self, domain: &str, key: PublicKey, now: Instant) {
        self.merge(domain, key, Kept { last: now, proven: true }, AT_ONCE, now);
    }

    /// A gateway has the key; who knows it already learns nothing by that.
    pub fn witness(&mut self, domain: &str, key: PublicKey, now: Instant) {
        if self.domains.get(domain).is_some_and(|keys| !keys.contains_key(&key)) {
            self.admit(domain, key, now);
        }
    }

    /// Another broker knows these keys.
    pub fn learn(&mut self, page: &Page, now: Instant) {
        for (key, Age(age, proven)) in &page.keys {
            let age = Duration::from_secs(*age);
            if age < self.ttl {
                let kept = Kept { last: now.checked_sub(age).unwrap_or(now), proven: *proven };
                self.merge(&page.domain, *key, kept, TOLD, now);
            }
        }
    }

    /// Unites what was known of the key with `news`. It counts as heard of only if they differ by more than `same`.
    fn merge(&mut self, domain: &str, key: PublicKey, news: Kept, same: Duration, now: Instant) {
        let Some((domain, _)) = self.domains.get_key_value(domain) else { return };
        if self.admission.refuses(domain.name(), &key) {
            return;
        }
        let domain = domain.clone();
        let keys = self.domains.entry(domain.clone()).or_default();
        let before = keys.get(&key).map(|live| live.kept);
        let kept = before
            .map_or(news, |before| Kept { last: before.last.max(news.last), proven: before.proven || news.proven });
        let is_same =
            |before: Kept| kept.proven == before.proven && kept.last.saturating_duration_since(before.last) <= same;
        if before.is_some_and(is_same) {
            return;
        }
        keys.insert(key, Live { kept, heard: now });
        self.journal.put(&domain, key, kept);
        if before.is_none() {
            self.make_room();
        }
    }

    /// Drops the oldest of those that never shook hands, or of all if there are no others: a sixteenth at once, so
    /// that a flood does not cost a search per key.
    fn make_room(&mut self) {
        let total = self.len();
        if total <= self.max {
            return;
        }
        let mut surplus = total - self.max + self.max / 16;
        let rank = |live: &Live| (live.kept.proven, live.kept.last);
        let mut ranks: Vec<_> = self.domains.values().flat_map(BTreeMap::values).map(rank).collect();
        let (_, &mut last, _) = ranks.select_nth_unstable(surplus.min(total) - 1);
        for (domain, keys) in &mut self.domains {
            keys.retain(|key, live| {
                let stays = surplus == 0 || rank(live) > last;
                if !stays {
                    surplus -= 1;
                    self.journal.remove(domain, *key);
                }
                stays
            });
        }
    }

    /// Forgets the keys whose time is over, and says how many. A journal that begins anew gets the others.
    pub fn expire(&mut self, now: Instant) -> usize {
        let anew = self.journal.begins_anew();
        let ttl = self.ttl;
        let over = |live: &Live| now.saturating_duration_since(live.kept.last) >= ttl;
        let mut expired = 0;
        for (domain, keys) in &mut self.domains {
            keys.retain(|key, live| {
                let is_over = over(live);
                if is_over {
                    self.journal.remove(domain, *key);
                    expired += 1;
                } else if anew {
                    self.journal.put(domain, *key, live.kept);
                }
                !is_over
            });
        }
        expired
    }

    /// The answer to `question`. Of a domain that is not served here no key is known.
    #[must_use]
    pub fn answer(&self, question: &Question, now: Instant) -> Page {
        use std::ops::Bound::{Excluded, Unbounded};
        let keys = self.domains.get(question.domain.as_str());
        let start = question.after.map_or(Unbounded, Excluded);
        let age = |since: Instant| now.saturating_duration_since(since);
        let asked = |live: &Live| {
            age(live.kept.last) < self.ttl
                && question.younger_than.is_none_or(|younger| age(live.heard).as_secs() < younger)
        };
        let keys = keys.into_iter().flat_map(|keys| keys.range((start, Unbounded)));
        let mut wanted = keys.filter(|(_, live)| asked(live));
        let page =
            wanted.by_ref().take(PAGE).map(|(key, live)| (*key, Age(age(live.kept.last).as_secs(), live.kept.proven)));
        let keys = page.collect();
        let (broker, domain, after) = (self.own_name.clone(), question.domain.clone(), question.after);
        Page { broker, domain, after, keys, more: wanted.next().is_some() }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.domains.values().map(BTreeMap::len).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.domains.values().all(BTreeMap::is_empty)
    }

    /// How many there are in each domain.
    pub fn counts(&self) -> impl Iterator<Item = (&Domain, Counts)> {
        self.domains.iter().map(|(domain, keys)| {
            let proven = keys.values().filter(|live| live.kept.proven).count();
            (domain, Counts { proven, unproven: keys.len() - proven })
        })
    }
}

#[cfg(test)]
mod tests;
