//! Keys that no router has requested, as far as this broker knows, and of which workers report handshakes: the broker
//! missed the request, has forgotten it, or the worker's report is false. They are kept apart: no snapshot has them,
//! they pass no limit, and displace no other key. When a router requests such a key, it is established at once. No IO,
//! no clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use wgkex_common::{Domain, PublicKey, WorkerName};

/// The fraction of all reports that one worker may fill.
const PER_WORKER_FRACTION: usize = 8;

/// The reports by domain and key, the last one of each key.
#[derive(Debug, Default)]
pub struct UnrequestedKeys {
    max: usize,
    domains: BTreeMap<Domain, BTreeMap<PublicKey, HandshakeReport>>,
    /// How many there are of each worker.
    by_worker: BTreeMap<WorkerName, usize>,
}

/// The last report of a handshake.
#[derive(Debug, Clone)]
pub struct HandshakeReport {
    /// The worker that reported it.
    pub worker: WorkerName,
    /// When.
    pub at: Instant,
}

impl UnrequestedKeys {
    /// None yet, and never more than `max`.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { max, ..Self::default() }
    }

    /// `worker` reports a handshake of `key`. It is left out if there is no room.
    pub fn on_handshake(&mut self, worker: &WorkerName, domain: &Domain, key: PublicKey, now: Instant) {
        let (worker, reports) =
            self.by_worker.get_key_value(worker).map_or((worker.clone(), 0), |(name, n)| (name.clone(), *n));
        let keys = self.domains.entry(domain.clone()).or_default();
        let before = keys.get_mut(&key);
        if before.as_ref().is_some_and(|before| before.worker == worker)
            || reports >= (self.max / PER_WORKER_FRACTION).max(1)
        {
            // The report stays with its worker, renewed.
            if let Some(before) = before {
                before.at = now;
            }
            return;
        }
        let all: usize = self.by_worker.values().sum();
        if before.is_none() && all >= self.max {
            return;
        }
        let before = keys.insert(key, HandshakeReport { worker: worker.clone(), at: now });
        self.release(before);
        *self.by_worker.entry(worker).or_default() += 1;
    }

    /// Takes the last reported handshake of `key`, which is live from now on.
    pub fn take(&mut self, domain: &Domain, key: &PublicKey) -> Option<HandshakeReport> {
        let report = self.domains.get_mut(domain)?.remove(key)?;
        self.release(Some(report.clone()));
        Some(report)
    }

    /// The last reported handshake of `key`.
    #[must_use]
    pub fn report(&self, domain: &Domain, key: &PublicKey) -> Option<&HandshakeReport> {
        self.domains.get(domain)?.get(key)
    }

    /// Whether handshakes of `key` are reported, in any domain.
    #[must_use]
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.domains.values().any(|keys| keys.contains_key(key))
    }

    /// Drops reports older than `limit`.
    pub fn expire(&mut self, now: Instant, limit: Duration) {
        let mut over = Vec::new();
        for keys in self.domains.values_mut() {
            keys.retain(|_, report| {
                let stays = now.saturating_duration_since(report.at) < limit;
                if !stays {
                    over.push(report.clone());
                }
                stays
            });
        }
        for report in over {
            self.release(Some(report));
        }
    }

    /// How many keys of `domain` there are.
    #[must_use]
    pub fn len(&self, domain: &Domain) -> usize {
        self.domains.get(domain).map_or(0, BTreeMap::len)
    }

    fn release(&mut self, report: Option<HandshakeReport>) {
        if let Some(HandshakeReport { worker, .. }) = report
            && let Some(reports) = self.by_worker.get_mut(&worker)
        {
            *reports -= 1;
            if *reports == 0 {
                self.by_worker.remove(&worker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::key;

    const LIMIT: Duration = Duration::from_secs(10);

    fn worker(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn domain(name: &str) -> Domain {
        Domain::new(name, &["ff_".into()]).unwrap()
    }

    #[test]
    fn one_worker_fills_its_share_and_another_has_its_own() {
        let (mut unrequested, now, domain) = (UnrequestedKeys::new(80), Instant::now(), domain("ff_a"));
        for n in 0..1_000 {
            unrequested.on_handshake(&worker("thief"), &domain, key(n), now);
        }
        assert_eq!(unrequested.len(&domain), 10);
        unrequested.on_handshake(&worker("gw"), &domain, key(5_000), now);
        unrequested.on_handshake(&worker("gw"), &domain, key(1), now + LIMIT);
        assert_eq!(
            (unrequested.by_worker["thief"], unrequested.by_worker["gw"]),
            (9, 2),
            "what both say is the last one's"
        );
        unrequested.on_handshake(&worker("thief"), &domain, key(5_000), now);
        unrequested.on_handshake(&worker("thief"), &domain, key(1), now + 2 * LIMIT);
        assert_eq!(unrequested.take(&domain, &key(1)).unwrap().at, now + 2 * LIMIT);
        assert!(unrequested.take(&domain, &key(1)).is_none());
        for n in 0..1_000 {
            unrequested.on_handshake(&worker(&n.to_string()), &domain, key(10_000 + n), now);
        }
        assert_eq!(unrequested.len(&domain), 80);
    }

    proptest! {
        #[test]
        fn the_counters_equal_a_recount(
            words in prop::collection::vec((0..5_u32, any::<bool>(), 0..30_u32, 0..4_u64, any::<bool>()), 0..200),
        ) {
            let (mut unrequested, mut now) = (UnrequestedKeys::new(32), Instant::now());
            for (name, is_first, n, seconds, takes) in words {
                now += Duration::from_secs(seconds);
                let domain = domain(if is_first { "ff_a" } else { "ff_b" });
                if takes {
                    let _ = unrequested.take(&domain, &key(n));
                } else {
                    unrequested.on_handshake(&worker(&name.to_string()), &domain, key(n), now);
                }
                unrequested.expire(now, LIMIT);
                let mut by_worker = BTreeMap::<WorkerName, usize>::new();
                for report in unrequested.domains.values().flat_map(BTreeMap::values) {
                    prop_assert!(now - report.at < LIMIT);
                    *by_worker.entry(report.worker.clone()).or_default() += 1;
                }
                prop_assert!(by_worker.values().all(|reports| *reports <= 32 / PER_WORKER_FRACTION));
                prop_assert_eq!(&unrequested.by_worker, &by_worker);
            }
        }
    }
}
