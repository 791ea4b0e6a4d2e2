//! How often unknown keys may be requested, so that a flood of them costs next to nothing and keeps no others out. No IO;
//! the clock is a parameter.

use governor::clock::{Clock, MonotonicClock};
use wgkex_common::{PublicKey, config};

use crate::client_ip::Client;
use crate::token_buckets::{ClientBuckets, KeyedBuckets, SingleBucket};

/// A limit that was exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// How often one key may be requested.
    Key,
    /// How many unknown keys a client may send.
    Client,
    /// How many unknown keys a domain may have.
    Domain,
    /// How many unknown keys there may be.
    Global,
}

/// A request that exceeds a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limited {
    /// The limit.
    pub limit: Limit,
    /// When to try again: seconds from now, at least 1.
    pub seconds: u32,
}

/// The limits, each with its buckets.
pub struct RateLimits<C: Clock = MonotonicClock> {
    keys: Option<KeyedBuckets<(String, PublicKey), C>>,
    clients: Option<ClientBuckets<C>>,
    domains: Option<KeyedBuckets<String, C>>,
    global: Option<SingleBucket<C>>,
}

impl<C: Clock + Clone> RateLimits<C> {
    /// The limits with full buckets.
    #[must_use]
    pub fn new(config: config::Limits, clock: &C) -> Self {
        Self {
            keys: config.per_key.map(|quota| KeyedBuckets::new(quota, clock)),
            clients: config.per_client.map(|quota| ClientBuckets::new(quota, clock)),
            domains: config.per_domain.map(|quota| KeyedBuckets::new(quota, clock)),
            global: config.global.map(|quota| SingleBucket::new(quota, clock)),
        }
    }

    /// Whether a request for an unknown key would be within the limits that do not depend on its client. Nothing is counted.
    pub fn peek(&self, key: &PublicKey, domain: &str) -> Result<(), Limited> {
        if let Some(domains) = &self.domains {
            domains.peek_at(&domain.to_owned()).map_err(Limit::Domain.exceeded())?;
        }
        if let Some(global) = &self.global {
            global.peek().map_err(Limit::Global.exceeded())?;
        }
        match &self.keys {
            Some(keys) if !keys.is_crowded() => keys.peek_at(&(domain.to_owned(), *key)).map_err(Limit::Key.exceeded()),
            _ => Ok(()),
        }
    }

    /// Whether an unknown key may be requested. The narrow limits come first, so that a request that exceeds them takes
    /// nothing from others; only the key's own comes last, or a flood of keys would fill all buckets. `client` is called
    /// only if a limit needs it: it parses headers.
    pub fn check(&self, key: &PublicKey, client: impl FnOnce() -> Client, domain: &str) -> Result<(), Limited> {
        if let Some(clients) = &self.clients {
            clients.take(client()).map_err(Limit::Client.exceeded())?;
        }
        if let Some(domains) = &self.domains {
            domains.take_from(&domain.to_owned()).map_err(Limit::Domain.exceeded())?;
        }
        if let Some(global) = &self.global {
            global.take().map_err(Limit::Global.exceeded())?;
        }
        self.check_key(key, domain)
    }

    /// Whether a key is within its own limit, known or not. Each domain has a separate bucket: a router's key is
    /// public, so requests for it in one domain must not use up that of another.
    pub fn check_key(&self, key: &PublicKey, domain: &str) -> Result<(), Limited> {
        match &self.keys {
            Some(keys) if !keys.is_crowded() => {
                keys.take_from(&(domain.to_owned(), *key)).map_err(Limit::Key.exceeded())
            }
            _ => Ok(()),
        }
    }

    /// Drops full buckets: a missing bucket counts as full.
    pub fn evict_idle(&self) {
        if let Some(keys) = &self.keys {
            keys.evict_idle();
        }
        if let Some(clients) = &self.clients {
            clients.evict_idle();
        }
    }
}

impl Limit {
    /// That it is exceeded for some seconds.
    fn exceeded(self) -> impl Fn(u32) -> Limited {
        move |seconds| Limited { limit: self, seconds }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};
    use std::num::NonZeroU32;
    use std::time::Duration;

    use governor::clock::FakeRelativeClock;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::key;
    use crate::token_buckets::BUCKETS_MAX;

    const SECOND: Duration = Duration::from_secs(1);

    fn client(n: u32) -> Client {
        IpAddr::V6(Ipv6Addr::from_bits((0x2001_0db8 << 96) | (u128::from(n) << 72))).into()
    }

    fn quota(burst: u32, per_second: f64) -> Option<config::Quota> {
        Some(config::Quota { burst: NonZeroU32::new(burst)?, per_second })
    }

    const NO_LIMITS: config::Limits =
        config::Limits { per_key: None, per_client: None, per_domain: None, global: None };

    fn limits(config: config::Limits) -> (RateLimits<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (RateLimits::new(config, &clock), clock)
    }

    fn limited(limit: Limit, seconds: u32) -> Result<(), Limited> {
        Err(Limited { limit, seconds })
    }

    #[test]
    fn each_limit_counts_for_itself_and_has_the_time_of_the_next_try() {
        let two = quota(2, 0.4);
        let cases = [
            (config::Limits { per_key: two, ..NO_LIMITS }, Limit::Key, [true, false, false]),
            (config::Limits { per_client: two, ..NO_LIMITS }, Limit::Client, [false, true, false]),
            (config::Limits { per_domain: two, ..NO_LIMITS }, Limit::Domain, [false, false, true]),
        ];
        for (config, limit, [by_key, by_client, by_domain]) in cases {
            let (limits, clock) = limits(config);
            let ask = |k, c, d| limits.check(&key(k), || client(c), d);
            for n in 1..=2 {
                let (k, c, d) = (
                    if by_key { 0 } else { n },
                    if by_client { 0 } else { n },
                    if by_domain || by_key { "a" } else { "b" },
                );
                assert_eq!(ask(k, c, d), Ok(()), "{limit:?}");
            }
            let (k, c, d) = (
                if by_key { 0 } else { 9 },
                if by_client { 0 } else { 9 },
                if by_domain || by_key { "a" } else { "c" },
            );
            assert_eq!(ask(k, c, d), limited(limit, 3));
            clock.advance(SECOND);
            assert_eq!(ask(k, c, d), limited(limit, 2));
            assert_eq!(ask(50, 50, "z"), Ok(()), "another is not concerned");
            clock.advance(SECOND * 2);
            assert_eq!(ask(k, c, d), Ok(()));
        }
        let (limits, _) = limits(config::Limits { global: two, ..NO_LIMITS });
        let results = [1, 2, 3].map(|n| limits.check(&key(n), || client(n), "a"));
        assert_eq!(results, [Ok(()), Ok(()), limited(Limit::Global, 3)]);
    }

    #[test]
    fn a_peek_predicts_the_outcome_and_consumes_nothing() {
        let two = quota(2, 0.5);
        let cases = [
            (config::Limits { per_key: two, ..NO_LIMITS }, Limit::Key),
            (config::Limits { per_domain: two, ..NO_LIMITS }, Limit::Domain),
            (config::Limits { global: two, ..NO_LIMITS }, Limit::Global),
        ];
        for (config, limit) in cases {
            let (limits, clock) = limits(config);
            for _ in 0..2 {
                for _ in 0..10 {
                    assert_eq!(limits.peek(&key(0), "a"), Ok(()));
                }
                assert_eq!(limits.check(&key(0), || client(0), "a"), Ok(()), "looking took something");
            }
            assert_eq!(limits.peek(&key(0), "a"), limited(limit, 2));
            assert_eq!(limits.peek(&key(0), "a"), limits.check(&key(0), || client(0), "a"));
            clock.advance(SECOND * 2);
            assert_eq!(limits.peek(&key(0), "a"), Ok(()));
        }
        let (limits, clock) = limits(config::Limits { per_key: two, ..NO_LIMITS });
        assert_eq!(limits.peek(&key(0), "a"), Ok(()));
        clock.advance(SECOND * 10);
        limits.evict_idle();
        assert!(limits.keys.as_ref().unwrap().len() == 0, "nothing is left of a look");
    }

    #[test]
    fn without_limits_nothing_is_limited_and_no_header_is_parsed() {
        let (limits, _) = limits(NO_LIMITS);
        assert!((0..1000).all(|_| limits.check(&key(0), || unreachable!(), "a").is_ok()));
    }

    #[test]
    fn a_rejected_request_takes_nothing_from_others() {
        let config = config::Limits { per_client: quota(1, 1.0), global: quota(3, 0.001), ..NO_LIMITS };
        let (limits, _) = limits(config);
        for n in 0..100 {
            let _ = limits.check(&key(n), || client(0), "a");
        }
        assert_eq!([1, 2].map(|n| limits.check(&key(n), || client(n), "a")), [Ok(()), Ok(())]);
    }

    #[test]
    fn this_machine_is_no_client_of_its_own() {
        let config = config::Limits { per_client: quota(1, 0.001), ..NO_LIMITS };
        for (address, second) in [("127.0.0.1", true), ("::1", true), ("127.0.0.2", false), ("::ffff:7f00:2", false)] {
            let (limits, _) = limits(config);
            let client = || Client::from(address.parse::<IpAddr>().unwrap());
            let admitted = [1, 2].map(|n| limits.check(&key(n), client, "a").is_ok());
            assert_eq!(admitted, [true, second], "{address}");
        }
    }

    #[test]
    fn the_defaults_let_pass_whole_networks_and_a_power_cut_and_slow_down_a_flood() {
        let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]";
        let config = wgkex_common::Config::parse("f", yaml, "h").unwrap().limits;
        // All routers behind one address, each of which tries twice.
        let (one, _) = limits(config);
        for n in 0..600 {
            assert_eq!(one.check(&key(n % 300), || client(0), "ff_a"), Ok(()));
        }
        // The largest fleet in 10 s, each router twice.
        let (fleet, clock) = limits(config);
        for n in 0..6_600 {
            clock.advance(SECOND * 10 / 6_600);
            assert_eq!(fleet.check(&key(n), || client(n % 3_300), "ff_a"), Ok(()));
        }
        let (one, clock) = limits(config);
        let taken = |limits: &RateLimits<_>, clients: u32| {
            let pass = |n: &u32| {
                clock.advance(SECOND * 60 / 100_000);
                limits.check(&key(*n), || client(n % clients), "ff_a").is_ok()
            };
            (0..100_000).filter(pass).count()
        };
        assert!(taken(&one, 1) <= 1_000 + 20 * 61);
        let many = RateLimits::new(config, &clock);
        assert!(taken(&many, 5_000) <= 25_000 + 250 * 61);
    }

    #[test]
    fn however_many_clients_there_are_the_room_is_bounded() {
        let config = config::Limits { per_key: quota(2, 1.0), per_client: quota(2, 1.0), ..NO_LIMITS };
        let (limits, clock) = limits(config);
        let most = u32::try_from(BUCKETS_MAX).unwrap();
        let passed = (0..most + 1_000).filter(|n| limits.check(&key(*n), || client(*n), "a").is_ok()).count();
        assert_eq!(passed, BUCKETS_MAX + 2, "the rest counts as one");
        assert_eq!(limits.clients.as_ref().unwrap().len(), BUCKETS_MAX + 1);
        assert!(limits.keys.as_ref().unwrap().len() <= BUCKETS_MAX);
        clock.advance(SECOND * 10);
        limits.evict_idle();
        assert!(limits.clients.as_ref().unwrap().len() == 0 && limits.keys.as_ref().unwrap().len() == 0);
        assert_eq!(limits.check(&key(1), || client(1), "a"), Ok(()));
    }

    proptest! {
        #[test]
        fn no_more_pass_than_burst_and_rate_allow(
            burst in 1u32..50,
            per_second in 0.1f64..100.0,
            gaps in prop::collection::vec(0u64..2_000, 1..200),
        ) {
            let (limits, clock) = limits(config::Limits { global: quota(burst, per_second), ..NO_LIMITS });
            let mut passed = 0;
            for (n, gap) in gaps.iter().enumerate() {
                clock.advance(Duration::from_millis(*gap));
                let result = limits.check(&key(u32::try_from(n).unwrap()), || client(0), "a");
                passed += u32::from(result.is_ok());
                prop_assert!(result.is_ok_and(|()| true) || result.is_err_and(|limited| limited.seconds >= 1));
            }
            let time = Duration::from_millis(gaps.iter().sum()).as_secs_f64();
            prop_assert!(f64::from(passed) <= f64::from(burst) + time * per_second + 1.0);
        }
    }
}
