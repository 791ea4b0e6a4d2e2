//! The live keys: those that brokers remember, so that a gateway that lacks some can request them. A key becomes one when a
//! router sends it here or to another broker; handshakes of other keys are kept in [`unrequested`](super::unrequested). No
//! IO, no clock.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use wgkex_common::access_lists::Admission;
use wgkex_common::address::claim::{self, Claim, ClaimState};
use wgkex_common::config::{self, Cleanup};
use wgkex_common::storage::key_store::{KeyRecord, Keys, WriteBuffer};
use wgkex_common::sync::CHUNK_KEYS_MAX;
use wgkex_common::wire::message::{Age, SnapshotChunk, SyncRequest};
use wgkex_common::{BrokerName, Config, Domain, KeyId, PublicKey, WorkerName};

use crate::fleet::key_locations::{GatewayIndex, KeyLocations, NamedLocations};
use crate::fleet::unrequested::{HandshakeReport, UnrequestedKeys};

/// A router's request that arrives a second time within this, by HTTP and by MQTT, counts once.
const SAME_REQUEST: Duration = Duration::from_secs(3);
/// Smaller differences of age are ignored in another broker's snapshot: ages are whole seconds and chunks take their time, so
/// that two brokers would send each other the same keys for ever.
const AGE_TOLERANCE: Duration = Duration::from_secs(60);
/// The fraction of all keys that may be established ones without their address.
const DISPLACED_FRACTION: usize = 16;

/// Every live key, with its times.
#[derive(Debug)]
pub struct LiveKeys {
    own_name: BrokerName,
    max: usize,
    ttl: Duration,
    /// How long a new key keeps its address without a handshake.
    grace: Duration,
    /// How long after its last known handshake a key counts as established.
    handshake_lifetime: Duration,
    domains: BTreeMap<Domain, DomainKeys>,
    unrequested: UnrequestedKeys,
    numbers: GatewayIndex,
    write_buffer: WriteBuffer,
    admission: Arc<Admission>,
}

/// The live keys of a domain. No two have the same address.
#[derive(Debug, Default)]
struct DomainKeys {
    keys: BTreeMap<PublicKey, LiveKey>,
    owners: BTreeMap<Ipv6Addr, PublicKey>,
    /// How many of them are established.
    established: usize,
    /// Established keys that lost their address while they had no handshakes: they get it back when they return.
    displaced: BTreeMap<PublicKey, LiveKey>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LiveKey {
    record: KeyRecord,
    /// When this run of the program first received it.
    first: Instant,
    /// Its last handshake, as far as a gateway or a broker reported one.
    last_handshake: Option<Instant>,
    /// When a router last sent it again after it had expired.
    returned: Option<Instant>,
    /// When this broker last changed it: a sync client may lack it from then on.
    updated_at: Instant,
    /// The gateways that have it.
    locations: KeyLocations,
}

/// The known state of a key in a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyTrace {
    /// The domain.
    pub domain: Domain,
    /// Its state here.
    pub state: KeyState,
    /// How long ago this run of the program first received it.
    pub first: Option<Duration>,
    /// How long ago a router last sent it, or it last had a handshake.
    pub last: Duration,
    /// How long ago its last handshake was, as far as it is known.
    pub last_handshake: Option<Duration>,
    /// Its gateways.
    pub locations: NamedLocations,
}

/// The state of a key in a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// Live, and has had a handshake.
    Established,
    /// Live, and has had none.
    Unestablished,
    /// It has had handshakes, and another key has its address now.
    Displaced,
    /// No router sent it; a worker reports handshakes.
    Claimed,
}

/// How many keys of a domain there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LiveKeyCounts {
    /// Live keys that have had a handshake at some gateway.
    pub established: usize,
    /// The other live keys.
    pub unestablished: usize,
    /// Keys that no router has sent, and of which some worker reports handshakes.
    pub unrequested: usize,
}

impl LiveKeys {
    /// The keys of the config's domains that the last run of this program `remembered`. Changes go into `write_buffer`.
    #[must_use]
    pub fn new(config: &Config, remembered: Keys, write_buffer: WriteBuffer, now: Instant) -> Self {
        let (config::LiveKeyLimits { max, ttl }, Cleanup { stale, grace, .. }) = (config.live_keys, config.cleanup);
        let domains = config.domains.iter().map(|domain| (domain.clone(), DomainKeys::default())).collect();
        let mut live = Self {
            own_name: (&config.name).into(),
            max,
            ttl,
            grace,
            handshake_lifetime: stale + claim::handshake_report_interval(ttl, stale),
            domains,
            unrequested: UnrequestedKeys::new(max),
            numbers: GatewayIndex::new(now),
            write_buffer,
            admission: Arc::default(),
        };
        for (KeyId { domain, key }, record) in remembered {
            // A sync client may lack the keys that the last run received at its end: all keys count as updated now.
            let (last_handshake, locations) = (record.established.then_some(record.last), KeyLocations::default());
            let key_of_last_run =
                LiveKey { record, first: record.last, last_handshake, returned: None, updated_at: now, locations };
            if !live.insert(&domain, key, key_of_last_run, now) {
                live.write_buffer.remove(&domain, key);
            }
        }
        live.evict();
        live
    }

    /// Whether another key has the address of `key`, so that no router may have `key` now.
    #[must_use]
    pub fn is_taken(&self, domain: &str, key: PublicKey, now: Instant) -> bool {
        let Some(known) = self.domains.get(domain) else { return false };
        let owner = known.owners.get(&key.link_local()).filter(|owner| **owner != key);
        let owner = owner.and_then(|owner| Some((owner, known.keys.get(owner)?)));
        let returns = known.displaced.get(&key).is_some_and(|live| self.is_remembered(live, now));
        let wanted = if returns { ClaimState::Returned } else { ClaimState::New };
        owner.map_or(ClaimState::Expired, |(owner, live)| self.claim_state(owner, live, now)) >= wanted
    }

    fn claim_state(&self, key: &PublicKey, live: &LiveKey, now: Instant) -> ClaimState {
        let within = |since: Instant, limit: Duration| now.saturating_duration_since(since) < limit;
        if self.admission.trusts(key) || live.last_handshake.is_some_and(|last| within(last, self.handshake_lifetime)) {
            ClaimState::Established
        } else if live.record.established {
            let has_grace = live.returned.is_some_and(|returned| within(returned, self.grace));
            if has_grace && self.is_remembered(live, now) { ClaimState::Returned } else { ClaimState::Expired }
        } else if within(live.first, self.grace) {
            ClaimState::New
        } else {
            ClaimState::Expired
        }
    }

    /// Whether its last handshake is recent enough for a claim when it returns: requests alone keep no address.
    fn is_remembered(&self, live: &LiveKey, now: Instant) -> bool {
        let limit = self.ttl.max(self.handshake_lifetime);
        live.last_handshake.is_some_and(|last| now.saturating_duration_since(last) < limit)
    }

    /// Makes the key live, unless another key has the better claim to its address. Returns whether it is live.
    fn insert(&mut self, domain: &Domain, key: PublicKey, live: LiveKey, now: Instant) -> bool {
        let claim =
            |key: PublicKey, live: &LiveKey| Claim { key, state: self.claim_state(&key, live, now), first: live.first };
        let Some(known) = self.domains.get(domain) else { return false };
        let address = key.link_local();
        let owner = known.owners.get(&address).copied().filter(|owner| *owner != key);
        let rival = owner.and_then(|owner| Some((owner, known.keys.get(&owner)?)));
        if rival.is_some_and(|(owner, other)| !claim(key, &live).precedes(&claim(owner, other))) {
            return false;
        }
        let Some(known) = self.domains.get_mut(domain) else { return false };
        if let Some(owner) = owner {
            let displaced = known.remove(&owner).filter(|live| live.record.established);
            if let Some(displaced) = displaced.filter(|_| known.displaced.len() < self.max / DISPLACED_FRACTION) {
                known.displaced.insert(owner, displaced);
            }
            self.write_buffer.remove(domain, owner);
        }
        known.displaced.remove(&key);
        known.insert(address, key, live);
        true
    }

    /// Whether the key has ever had a handshake; none if it is not known in this domain.
    #[must_use]
    pub fn is_established(&self, domain: &Domain, key: &PublicKey) -> Option<bool> {
        Some(self.domains.get(domain)?.get(key)?.record.established)
    }

    /// Whether the key is a router's that has had a handshake, in any domain.
    #[must_use]
    pub fn is_routers(&self, key: &PublicKey) -> bool {
        self.domains.values().any(|known| known.get(key).is_some_and(|live| live.record.established))
    }

    /// Whether the key has had a handshake as a router's, in any domain: it is live, or it is known only from reports.
    #[must_use]
    pub fn has_handshake(&self, key: &PublicKey) -> bool {
        self.is_routers(key) || self.unrequested.contains(key)
    }

    /// Applies other access lists: forgets the keys that they remove.
    pub fn apply(&mut self, admission: Arc<Admission>) {
        self.admission = admission;
        if self.admission.removes_none() {
            return;
        }
        let (admission, write_buffer) = (&self.admission, &self.write_buffer);
        for (domain, known) in &mut self.domains {
            known.retain(|key, _| {
                let stays = !admission.must_remove(domain.name(), key);
                if !stays {
                    write_buffer.remove(domain, *key);
                }
                stays
            });
            known.displaced.retain(|key, _| !admission.must_remove(domain.name(), key));
        }
    }

    /// A router requested the key, here or at another broker.
    pub fn on_request(&mut self, domain: &str, key: PublicKey, now: Instant) {
        self.merge(domain, key, KeyRecord { last: now, established: false }, SAME_REQUEST, now);
    }

    /// `worker` reports handshakes of the key. If no router has sent the key, the report is only kept for a later
    /// request.
    pub fn on_handshake(&mut self, worker: &WorkerName, domain: &str, key: PublicKey, now: Instant) {
        match self.domains.get_key_value(domain) {
            Some((_, known)) if known.keys.contains_key(&key) => {
                self.merge(domain, key, KeyRecord { last: now, established: true }, SAME_REQUEST, now);
                self.update_locations(domain, &key, |numbers, locations| numbers.on_handshake(locations, worker));
            }
            Some((domain, _)) => self.unrequested.on_handshake(worker, domain, key, now),
            None => {}
        }
    }

    /// `worker` has published the outcome of a key.
    pub fn on_outcome(&mut self, worker: &WorkerName, domain: &str, key: &PublicKey, is_installed: bool, now: Instant) {
        self.update_locations(domain, key, |numbers, locations| numbers.confirm(locations, worker, is_installed, now));
    }

    fn update_locations(
        &mut self,
        domain: &str,
        key: &PublicKey,
        change: impl FnOnce(&mut GatewayIndex, &mut KeyLocations),
    ) {
        let live = self.domains.get_mut(domain).and_then(|known| known.keys.get_mut(key));
        if let Some(live) = live {
            change(&mut self.numbers, &mut live.locations);
        }
    }

    /// The gateway that last reported handshakes of a key.
    #[must_use]
    pub fn last_with_handshakes(&self, id: &KeyId) -> Option<&WorkerName> {
        self.numbers.last_with_handshakes(self.locations(id)?)
    }

    /// The gateway where the router of a key is connected, by its reports and by this broker's own answers.
    #[must_use]
    pub fn current_gateway(&self, id: &KeyId, now: Instant) -> Option<&WorkerName> {
        self.numbers.current_gateway(self.locations(id)?, now)
    }

    /// This broker answered a request of the key's router with `worker`.
    pub fn on_given(&mut self, id: &KeyId, worker: &WorkerName, now: Instant) {
        self.update_locations(id.domain.name(), &id.key, |numbers, locations| {
            numbers.on_answer(locations, worker, now);
        });
    }

    fn locations(&self, id: &KeyId) -> Option<&KeyLocations> {
        Some(&self.domains.get(&id.domain)?.keys.get(&id.key)?.locations)
    }

    /// The state of a key, in each domain where it is known.
    #[must_use]
    pub fn trace(&self, key: &PublicKey, now: Instant) -> Vec<KeyTrace> {
        let age = |since: Instant| now.saturating_duration_since(since);
        let live = |domain: &Domain, live: &LiveKey, state| KeyTrace {
            domain: domain.clone(),
            state,
            first: Some(age(live.first)),
            last: age(live.record.last),
            last_handshake: live.last_handshake.map(age),
            locations: self.numbers.named(&live.locations, now),
        };
        let claimed = |domain: &Domain| {
            let HandshakeReport { worker, at } = self.unrequested.report(domain, key)?;
            let locations = NamedLocations { handshakes: Some(worker.clone()), ..NamedLocations::default() };
            let (state, age) = (KeyState::Claimed, age(*at));
            Some(KeyTrace {
                domain: domain.clone(),
                state,
                first: None,
                last: age,
                last_handshake: Some(age),
                locations,
            })
        };
        let trace = |(domain, known): (&Domain, &DomainKeys)| match (known.keys.get(key), known.displaced.get(key)) {
            (Some(found), _) if found.record.established => Some(live(domain, found, KeyState::Established)),
            (Some(found), _) => Some(live(domain, found, KeyState::Unestablished)),
            (None, Some(found)) => Some(live(domain, found, KeyState::Displaced)),
            (None, None) => claimed(domain),
        };
        self.domains.iter().filter_map(trace).collect()
    }

    /// Merges the live keys of another broker.
    pub fn on_chunk(&mut self, chunk: &SnapshotChunk, now: Instant) {
        for (key, Age { age_secs, has_handshake: established }) in &chunk.keys {
            let age = Duration::from_secs(*age_secs);
            if age < self.ttl {
                let record = KeyRecord { last: now.checked_sub(age).unwrap_or(now), established: *established };
                self.merge(&chunk.domain, *key, record, AGE_TOLERANCE, now);
            }
        }
    }

    /// Merges the known state of the key with `news`. It counts as updated only if they differ by more than `same`.
    fn merge(&mut self, domain: &str, key: PublicKey, news: KeyRecord, same: Duration, now: Instant) {
        let Some((domain, known)) = self.domains.get_key_value(domain) else { return };
        if self.admission.denies(domain.name(), &key) {
            return;
        }
        let (domain, is_new) = (domain.clone(), !known.keys.contains_key(&key));
        let before = known.get(&key).copied();
        let mut live = merged(before.as_ref(), news, now);
        if let Some(before) = &before {
            if !news.established
                && before.record.established
                && self.claim_state(&key, before, now) == ClaimState::Expired
            {
                live.returned = Some(now);
            }
            if !is_new && live.is_close(before, same) {
                return;
            }
        }
        if !self.insert(&domain, key, live, now) {
            return;
        }
        self.write_buffer.put(&domain, key, live.record);
        if is_new {
            if let Some(HandshakeReport { worker, at }) = self.unrequested.take(&domain, &key) {
                self.merge(domain.name(), key, KeyRecord { last: at, established: true }, SAME_REQUEST, now);
                self.update_locations(domain.name(), &key, |numbers, locations| {
                    numbers.on_handshake(locations, &worker);
                });
            }
            self.evict();
        }
    }

    /// If there are more than `max`, drops the oldest unestablished keys, or the oldest of all if there are no others: a
    /// sixteenth at once, so that a flood does not cost a search per key.
    fn evict(&mut self) {
        let total = self.len();
        if total <= self.max {
            return;
        }
        let mut surplus = total - self.max + self.max / 16;
        let rank = |live: &LiveKey| (live.record.established, live.record.last);
        let mut ranks: Vec<_> = self.domains.values().flat_map(|known| known.keys.values()).map(rank).collect();
        let (_, &mut last, _) = ranks.select_nth_unstable(surplus.min(total) - 1);
        for (domain, known) in &mut self.domains {
            known.retain(|key, live| {
                let stays = surplus == 0 || rank(live) > last;
                if !stays {
                    surplus -= 1;
                    self.write_buffer.remove(domain, *key);
                }
                stays
            });
        }
    }

    /// Forgets the keys whose time is over, and returns how many. If the write buffer needs all keys, it gets the others.
    pub fn expire(&mut self, now: Instant) -> usize {
        let needs_all = self.write_buffer.needs_full_write();
        let ttl = self.ttl;
        let is_over = |live: &LiveKey| now.saturating_duration_since(live.record.last) >= ttl;
        let mut expired = 0;
        for (domain, known) in &mut self.domains {
            known.retain(|key, live| {
                if is_over(live) {
                    self.write_buffer.remove(domain, *key);
                    expired += 1;
                    return false;
                }
                if needs_all {
                    self.write_buffer.put(domain, *key, live.record);
                }
                true
            });
            known.displaced.retain(|_, live| !is_over(live));
        }
        self.unrequested.expire(now, self.handshake_lifetime);
        expired
    }

    /// The chunk that answers `request`; without keys for a domain that is not served here.
    #[must_use]
    pub fn chunk(&self, request: &SyncRequest, now: Instant) -> SnapshotChunk {
        use std::ops::Bound::{Excluded, Unbounded};
        let keys = self.domains.get(request.domain.as_str()).map(|known| &known.keys);
        let start = request.after.map_or(Unbounded, Excluded);
        let age = |since: Instant| now.saturating_duration_since(since);
        let is_wanted = |live: &LiveKey| {
            age(live.record.last) < self.ttl
                && request.younger_than.is_none_or(|younger| age(live.updated_at).as_secs() < younger)
        };
        let keys = keys.into_iter().flat_map(|keys| keys.range((start, Unbounded)));
        let mut wanted = keys.filter(|(_, live)| is_wanted(live));
        let keys = wanted.by_ref().take(CHUNK_KEYS_MAX).map(|(key, live)| {
            (*key, Age { age_secs: age(live.record.last).as_secs(), has_handshake: live.record.established })
        });
        let keys = keys.collect();
        let (broker, domain, after) = (self.own_name.clone(), request.domain.clone(), request.after);
        SnapshotChunk { broker, domain, after, keys, more: wanted.next().is_some() }
    }

    /// How many live keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.domains.values().map(|known| known.keys.len()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.domains.values().all(|known| known.keys.is_empty())
    }

    /// How many keys there are in each domain.
    pub fn counts(&self) -> impl Iterator<Item = (&Domain, LiveKeyCounts)> {
        self.domains.iter().map(|(domain, known)| {
            let (established, unrequested) = (known.established, self.unrequested.len(domain));
            (domain, LiveKeyCounts { established, unestablished: known.keys.len() - established, unrequested })
        })
    }
}

impl DomainKeys {
    /// `address` is that of the key.
    fn insert(&mut self, address: Ipv6Addr, key: PublicKey, live: LiveKey) {
        self.owners.insert(address, key);
        let before = self.keys.insert(key, live);
        self.established += usize::from(live.record.established);
        self.established -= usize::from(before.is_some_and(|before| before.record.established));
    }

    fn remove(&mut self, key: &PublicKey) -> Option<LiveKey> {
        let live = self.keys.remove(key)?;
        self.owners.remove(&key.link_local());
        self.established -= usize::from(live.record.established);
        Some(live)
    }

    /// The key, live or displaced.
    fn get(&self, key: &PublicKey) -> Option<&LiveKey> {
        self.keys.get(key).or_else(|| self.displaced.get(key))
    }

    /// Keeps the live keys that `stays` is true for.
    fn retain(&mut self, mut stays: impl FnMut(&PublicKey, &LiveKey) -> bool) {
        let Self { keys, owners, established, displaced: _ } = self;
        keys.retain(|key, live| {
            let stays = stays(key, live);
            if !stays {
                owners.remove(&key.link_local());
                *established -= usize::from(live.record.established);
            }
            stays
        });
    }
}

impl LiveKey {
    /// Whether it differs from what it was `before` by no more than `same`.
    fn is_close(&self, before: &Self, same: Duration) -> bool {
        let is_close = |now: Instant, before: Instant| now.saturating_duration_since(before) <= same;
        let has_same_handshake =
            self.last_handshake.is_none_or(|now| before.last_handshake.is_some_and(|before| is_close(now, before)));
        self.record.established == before.record.established
            && is_close(self.record.last, before.record.last)
            && has_same_handshake
    }
}

/// The state of a key, merged with `news` of it.
fn merged(before: Option<&LiveKey>, news: KeyRecord, now: Instant) -> LiveKey {
    let last_handshake = news.established.then_some(news.last);
    let Some(before) = before else {
        let locations = KeyLocations::default();
        return LiveKey { record: news, first: news.last, last_handshake, returned: None, updated_at: now, locations };
    };
    LiveKey {
        record: KeyRecord {
            last: before.record.last.max(news.last),
            established: before.record.established || news.established,
        },
        first: before.first.min(news.last),
        last_handshake: last_handshake.max(before.last_handshake),
        returned: before.returned,
        updated_at: now,
        locations: before.locations,
    }
}

#[cfg(test)]
mod tests;
