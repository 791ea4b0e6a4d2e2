//! The live keys: those that gateways get back when they lack them. A key becomes one when a router sends it here or to
//! another broker; what a worker alone speaks of is [`claimed`](crate::fleet::claimed). No IO, no clock.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgkex_common::access_lists::Admission;
use wgkex_common::address::claim::{self, Claim, ClaimState};
use wgkex_common::config::{self, Cleanup};
use wgkex_common::storage::key_store::{KeyRecord, Keys, WriteBuffer};
use wgkex_common::sync::CHUNK;
use wgkex_common::wire::message::{Age, SnapshotChunk, SyncRequest};
use wgkex_common::{BrokerName, Domain, PublicKey, WorkerName};

use crate::fleet::claimed::Claimed;

/// What is said twice in this time, by a router and on the bus, is said once.
const AT_ONCE: Duration = Duration::from_secs(3);
/// Ages that another broker tells are whole seconds, and pages are long on their way. If less than this were news, two
/// brokers would tell each other the same for ever.
const TOLD: Duration = Duration::from_secs(60);
/// Which part of all keys may be those that lost their address while they were silent.
const ABSENT: usize = 16;

/// Every key that is alive, and when it was heard of.
#[derive(Debug)]
pub struct LiveKeys {
    own_name: BrokerName,
    max: usize,
    ttl: Duration,
    /// How long a key has for its first handshake, and how long it is proven by one that was heard of.
    grace: Duration,
    proven: Duration,
    domains: BTreeMap<Domain, Served>,
    claimed: Claimed,
    journal: WriteBuffer,
    admission: Arc<Admission>,
}

/// The live keys of a domain. No two have the same address.
#[derive(Debug, Default)]
struct Served {
    keys: BTreeMap<PublicKey, Live>,
    owners: BTreeMap<Ipv6Addr, PublicKey>,
    /// How many of them are proven.
    proven: usize,
    /// Keys that shook hands, and lost their address while they were silent: it is theirs again when they come back.
    absent: BTreeMap<PublicKey, Live>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Live {
    kept: KeyRecord,
    /// When this run of the program first heard of it.
    first: Instant,
    /// When it last shook hands, as far as a gateway or a broker said so.
    shaken: Option<Instant>,
    /// When it last came back after that was too long ago to be proven by.
    returned: Option<Instant>,
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
    /// Those that are not live, and shook hands by the word of some worker.
    pub claimed: usize,
}

impl LiveKeys {
    /// The keys of `domains` that are known. Changes go into the journal.
    #[must_use]
    pub fn new(
        own_name: BrokerName,
        (config::LiveKeys { max, ttl }, Cleanup { stale, grace, .. }): (config::LiveKeys, Cleanup),
        domains: impl IntoIterator<Item = Domain>,
        (journal, known): (WriteBuffer, Keys),
        now: Instant,
    ) -> Self {
        let proven = stale + claim::handshake_report_interval(ttl, stale);
        let domains = domains.into_iter().map(|domain| (domain, Served::default())).collect();
        let (claimed, admission) = (Claimed::new(max), Arc::default());
        let mut live = Self { own_name, max, ttl, grace, proven, domains, claimed, journal, admission };
        for ((domain, key), kept) in known {
            // Who asked the last run of this program may have missed what that heard of last.
            let shaken = kept.proven.then_some(kept.last);
            if !live.insert(&domain, key, Live { kept, first: kept.last, shaken, returned: None, heard: now }, now) {
                live.journal.remove(&domain, key);
            }
        }
        live.make_room();
        live
    }

    /// Whether the address of `key` is another's, so that a router may not have it now.
    #[must_use]
    pub fn is_taken(&self, domain: &str, key: PublicKey, now: Instant) -> bool {
        let Some(served) = self.domains.get(domain) else { return false };
        let owner = served.owners.get(&key.link_local()).filter(|owner| **owner != key);
        let live = owner.and_then(|owner| Some((owner, served.keys.get(owner)?)));
        let comes_back = served.absent.get(&key).is_some_and(|live| self.is_remembered(live, now));
        let wanted = if comes_back { ClaimState::Returned } else { ClaimState::New };
        let standing = live.map_or(ClaimState::Expired, |(owner, live)| self.standing(owner, live, now));
        standing >= wanted
    }

    fn standing(&self, key: &PublicKey, live: &Live, now: Instant) -> ClaimState {
        let within = |since: Instant, limit: Duration| now.saturating_duration_since(since) < limit;
        if self.admission.trusts(key) || live.shaken.is_some_and(|shaken| within(shaken, self.proven)) {
            ClaimState::Established
        } else if live.kept.proven {
            let has_grace = live.returned.is_some_and(|returned| within(returned, self.grace));
            if has_grace && self.is_remembered(live, now) { ClaimState::Returned } else { ClaimState::Expired }
        } else if within(live.first, self.grace) {
            ClaimState::New
        } else {
            ClaimState::Expired
        }
    }

    /// Whether it shook hands so lately that coming back is worth something: asking alone does not keep an address.
    fn is_remembered(&self, live: &Live, now: Instant) -> bool {
        live.shaken.is_some_and(|shaken| now.saturating_duration_since(shaken) < self.ttl.max(self.proven))
    }

    /// Remembers the key, unless another has the better claim to its address: then that one alone is live. Says whether
    /// it is remembered.
    fn insert(&mut self, domain: &Domain, key: PublicKey, live: Live, now: Instant) -> bool {
        let claim =
            |key: PublicKey, live: &Live| Claim { key, state: self.standing(&key, live, now), first: live.first };
        let Some(served) = self.domains.get(domain) else { return false };
        let address = key.link_local();
        let owner = served.owners.get(&address).copied().filter(|owner| *owner != key);
        let rival = owner.and_then(|owner| Some((owner, served.keys.get(&owner)?)));
        if rival.is_some_and(|(owner, other)| !claim(key, &live).precedes(&claim(owner, other))) {
            return false;
        }
        let Some(served) = self.domains.get_mut(domain) else { return false };
        if let Some(owner) = owner {
            let silent = served.remove(&owner).filter(|live| live.kept.proven);
            if let Some(silent) = silent.filter(|_| served.absent.len() < self.max / ABSENT) {
                served.absent.insert(owner, silent);
            }
            self.journal.remove(domain, owner);
        }
        served.absent.remove(&key);
        served.put(address, key, live);
        true
    }

    /// Whether the key ever shook hands; none if it is not known in this domain.
    #[must_use]
    pub fn is_proven(&self, domain: &Domain, key: &PublicKey) -> Option<bool> {
        Some(self.domains.get(domain)?.known(key)?.kept.proven)
    }

    /// Whether the key is one of a router that shook hands, in whatever domain.
    #[must_use]
    pub fn is_routers(&self, key: &PublicKey) -> bool {
        self.domains.values().any(|served| served.known(key).is_some_and(|live| live.kept.proven))
    }

    /// Takes over who may come from now on, and forgets the keys that have to go.
    pub fn obey(&mut self, admission: Arc<Admission>) {
        self.admission = admission;
        if self.admission.removes_none() {
            return;
        }
        let (admission, journal) = (&self.admission, &self.journal);
        for (domain, served) in &mut self.domains {
            served.retain(|key, _| {
                let stays = !admission.must_remove(domain.name(), key);
                if !stays {
                    journal.remove(domain, *key);
                }
                stays
            });
            served.absent.retain(|key, _| !admission.must_remove(domain.name(), key));
        }
    }

    /// A key came, by a router or on the bus.
    pub fn admit(&mut self, domain: &str, key: PublicKey, now: Instant) {
        self.merge(domain, key, KeyRecord { last: now, proven: false }, AT_ONCE, now);
    }

    /// `worker` sees handshakes of the key. Of one that no router sent that is only kept, for when one does.
    pub fn prove(&mut self, worker: &WorkerName, domain: &str, key: PublicKey, now: Instant) {
        match self.domains.get_key_value(domain) {
            Some((_, served)) if served.keys.contains_key(&key) => {
                self.merge(domain, key, KeyRecord { last: now, proven: true }, AT_ONCE, now);
            }
            Some((domain, _)) => self.claimed.note(worker, domain, key, now),
            None => {}
        }
    }

    /// Another broker knows these keys.
    pub fn learn(&mut self, page: &SnapshotChunk, now: Instant) {
        for (key, Age { age_secs: age, has_handshake: proven }) in &page.keys {
            let age = Duration::from_secs(*age);
            if age < self.ttl {
                let kept = KeyRecord { last: now.checked_sub(age).unwrap_or(now), proven: *proven };
                self.merge(&page.domain, *key, kept, TOLD, now);
            }
        }
    }

    /// Unites what was known of the key with `news`. It counts as heard of only if they differ by more than `same`.
    fn merge(&mut self, domain: &str, key: PublicKey, news: KeyRecord, same: Duration, now: Instant) {
        let Some((domain, served)) = self.domains.get_key_value(domain) else { return };
        if self.admission.denies(domain.name(), &key) {
            return;
        }
        let (domain, is_new) = (domain.clone(), !served.keys.contains_key(&key));
        let before = served.known(&key).copied();
        let mut live = united(before.as_ref(), news, now);
        if let Some(before) = &before {
            if !news.proven && before.kept.proven && self.standing(&key, before, now) == ClaimState::Expired {
                live.returned = Some(now);
            }
            let is_close = |now: Instant, before: Instant| now.saturating_duration_since(before) <= same;
            let shakes_as_before =
                live.shaken.is_none_or(|now| before.shaken.is_some_and(|before| is_close(now, before)));
            let is_same = live.kept.proven == before.kept.proven
                && is_close(live.kept.last, before.kept.last)
                && shakes_as_before;
            if is_same && !is_new {
                return;
            }
        }
        if !self.insert(&domain, key, live, now) {
            return;
        }
        self.journal.put(&domain, key, live.kept);
        if is_new {
            if let Some(at) = self.claimed.take(&domain, &key) {
                self.merge(domain.name(), key, KeyRecord { last: at, proven: true }, AT_ONCE, now);
            }
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
        let mut ranks: Vec<_> = self.domains.values().flat_map(|served| served.keys.values()).map(rank).collect();
        let (_, &mut last, _) = ranks.select_nth_unstable(surplus.min(total) - 1);
        for (domain, served) in &mut self.domains {
            served.retain(|key, live| {
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
        let anew = self.journal.needs_full_write();
        let ttl = self.ttl;
        let over = |live: &Live| now.saturating_duration_since(live.kept.last) >= ttl;
        let mut expired = 0;
        for (domain, served) in &mut self.domains {
            served.retain(|key, live| {
                let is_over = over(live);
                if is_over {
                    self.journal.remove(domain, *key);
                    expired += 1;
                } else if anew {
                    self.journal.put(domain, *key, live.kept);
                }
                !is_over
            });
            served.absent.retain(|_, live| !over(live));
        }
        self.claimed.expire(now, self.proven);
        expired
    }

    /// The answer to `question`. Of a domain that is not served here no key is known.
    #[must_use]
    pub fn answer(&self, question: &SyncRequest, now: Instant) -> SnapshotChunk {
        use std::ops::Bound::{Excluded, Unbounded};
        let keys = self.domains.get(question.domain.as_str()).map(|served| &served.keys);
        let start = question.after.map_or(Unbounded, Excluded);
        let age = |since: Instant| now.saturating_duration_since(since);
        let asked = |live: &Live| {
            age(live.kept.last) < self.ttl
                && question.younger_than.is_none_or(|younger| age(live.heard).as_secs() < younger)
        };
        let keys = keys.into_iter().flat_map(|keys| keys.range((start, Unbounded)));
        let mut wanted = keys.filter(|(_, live)| asked(live));
        let page = wanted.by_ref().take(CHUNK).map(|(key, live)| {
            (*key, Age { age_secs: age(live.kept.last).as_secs(), has_handshake: live.kept.proven })
        });
        let keys = page.collect();
        let (broker, domain, after) = (self.own_name.clone(), question.domain.clone(), question.after);
        SnapshotChunk { broker, domain, after, keys, more: wanted.next().is_some() }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.domains.values().map(|served| served.keys.len()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.domains.values().all(|served| served.keys.is_empty())
    }

    /// How many there are in each domain.
    pub fn counts(&self) -> impl Iterator<Item = (&Domain, Counts)> {
        self.domains.iter().map(|(domain, served)| {
            let (proven, claimed) = (served.proven, self.claimed.len(domain));
            (domain, Counts { proven, unproven: served.keys.len() - proven, claimed })
        })
    }
}

impl Served {
    /// `address` is that of the key.
    fn put(&mut self, address: Ipv6Addr, key: PublicKey, live: Live) {
        self.owners.insert(address, key);
        let before = self.keys.insert(key, live);
        self.proven += usize::from(live.kept.proven);
        self.proven -= usize::from(before.is_some_and(|before| before.kept.proven));
    }

    fn remove(&mut self, key: &PublicKey) -> Option<Live> {
        let live = self.keys.remove(key)?;
        self.owners.remove(&key.link_local());
        self.proven -= usize::from(live.kept.proven);
        Some(live)
    }

    /// What is known of the key, live or not.
    fn known(&self, key: &PublicKey) -> Option<&Live> {
        self.keys.get(key).or_else(|| self.absent.get(key))
    }

    /// Keeps the keys that `stays` is true for.
    fn retain(&mut self, mut stays: impl FnMut(&PublicKey, &Live) -> bool) {
        let Self { keys, owners, proven, absent: _ } = self;
        keys.retain(|key, live| {
            let stays = stays(key, live);
            if !stays {
                owners.remove(&key.link_local());
                *proven -= usize::from(live.kept.proven);
            }
            stays
        });
    }
}

/// What is known of a key with `news` of it.
fn united(before: Option<&Live>, news: KeyRecord, now: Instant) -> Live {
    let shaken = news.proven.then_some(news.last);
    let Some(before) = before else {
        return Live { kept: news, first: news.last, shaken, returned: None, heard: now };
    };
    let kept = KeyRecord { last: before.kept.last.max(news.last), proven: before.kept.proven || news.proven };
    let (first, shaken) = (before.first.min(news.last), shaken.max(before.shaken));
    Live { kept, first, shaken, returned: before.returned, heard: now }
}

#[cfg(test)]
mod tests;
