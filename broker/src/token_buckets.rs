//! Token buckets, which are governor's: their number is bounded, and they can be looked at without taking a token. No
//! IO; the clock is a parameter.

use std::convert::Infallible;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::keyed::{HashMapStateStore, ShrinkableKeyedStateStore};
use governor::state::{InMemoryState, StateStore};
use governor::{NotUntil, RateLimiter};
use wgkex_common::config;

use crate::client_ip::Client;

/// The most buckets of one limit. A full bucket is dropped.
pub const BUCKETS_MAX: usize = 65_536;

/// One bucket.
pub type SingleBucket<C> = TokenBuckets<InMemoryState, C>;
/// A bucket for each key.
pub type KeyedBuckets<K, C> = TokenBuckets<HashMapStateStore<K>, C>;

type StoreLimiter<S, C> = RateLimiter<<S as StateStore>::Key, SharedStore<S>, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// The buckets of a limit. An empty one is answered with the seconds until it has a token again, at least 1.
pub struct TokenBuckets<S: StateStore, C: Clock> {
    clock: C,
    /// Takes from them.
    consume: StoreLimiter<S, C>,
    /// Checks them, and takes nothing.
    peek: StoreLimiter<S, C>,
}

/// A bucket for each client but this machine's operator, who has no limit.
pub struct ClientBuckets<C: Clock = MonotonicClock>(KeyedBuckets<ClientBucket, C>);

/// The bucket of one client, or the one that all clients without a bucket share.
#[derive(Clone, PartialEq, Eq, Hash)]
enum ClientBucket {
    One(Client),
    Overflow,
}

/// Buckets that two limiters share; `is_taken` is true for the one that takes from them.
struct SharedStore<S> {
    store: Arc<S>,
    is_taken: bool,
}

impl<S> SharedStore<S> {
    /// The buckets in `store`, once to take from and once only to check.
    fn twice(store: S) -> [Self; 2] {
        let store = Arc::new(store);
        [true, false].map(|is_taken| Self { store: Arc::clone(&store), is_taken })
    }
}

impl<S: StateStore> StateStore for SharedStore<S> {
    type Key = S::Key;

    fn measure_and_replace<T, F, E>(&self, key: &S::Key, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        if self.is_taken {
            return self.store.measure_and_replace(key, measure);
        }
        // An error leaves the bucket in the store unchanged.
        let looked: Result<Infallible, _> =
            self.store.measure_and_replace(key, |bucket| Err(measure(bucket).map(|(found, _)| found)));
        match looked {
            Ok(never) => match never {},
            Err(found) => found,
        }
    }
}

impl<K: Hash + Eq + Clone, S: ShrinkableKeyedStateStore<K>> ShrinkableKeyedStateStore<K> for SharedStore<S> {
    fn retain_recent(&self, drop_below: Nanos) {
        self.store.retain_recent(drop_below);
    }

    fn shrink_to_fit(&self) {
        self.store.shrink_to_fit();
    }

    fn len(&self) -> usize {
        self.store.len()
    }

    fn is_empty(&self) -> bool {
        self.store.is_empty()
    }
}

impl<S: StateStore + Default, C: Clock + Clone> TokenBuckets<S, C> {
    /// Full buckets.
    pub fn new(quota: config::Quota, clock: &C) -> Self {
        let [consume, peek] =
            SharedStore::twice(S::default()).map(|buckets| RateLimiter::new(rate(quota), buckets, clock.clone()));
        Self { clock: clock.clone(), consume, peek }
    }

    fn seconds(&self, result: Result<(), NotUntil<C::Instant>>) -> Result<(), u32> {
        result.map_err(|until| {
            let wait = until.wait_time_from(self.clock.now());
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            u32::try_from(seconds.max(1)).unwrap_or(u32::MAX)
        })
    }
}

impl<C: Clock + Clone> SingleBucket<C> {
    /// Takes a token.
    pub fn take(&self) -> Result<(), u32> {
        self.seconds(self.consume.check())
    }

    /// Whether there is a token.
    pub fn peek(&self) -> Result<(), u32> {
        self.seconds(self.peek.check())
    }
}

impl<K: Hash + Eq + Clone, C: Clock + Clone> KeyedBuckets<K, C> {
    /// Takes a token from the bucket of `key`.
    pub fn take_from(&self, key: &K) -> Result<(), u32> {
        self.seconds(self.consume.check_key(key))
    }

    /// Whether there is a token in the bucket of `key`.
    pub fn peek_at(&self, key: &K) -> Result<(), u32> {
        self.seconds(self.peek.check_key(key))
    }

    /// How many buckets there are that are not full.
    pub fn len(&self) -> usize {
        self.consume.len()
    }

    /// Whether there is no room for the bucket of another key.
    pub fn is_crowded(&self) -> bool {
        self.len() >= BUCKETS_MAX
    }

    /// Drops full buckets: a missing bucket counts as full.
    pub fn evict_idle(&self) {
        self.consume.retain_recent();
        self.consume.shrink_to_fit();
    }
}

impl<C: Clock + Clone> ClientBuckets<C> {
    /// Full buckets.
    pub fn new(quota: config::Quota, clock: &C) -> Self {
        Self(KeyedBuckets::new(quota, clock))
    }

    /// Takes a token from the bucket of `client`.
    pub fn take(&self, client: Client) -> Result<(), u32> {
        self.bucket(client).map_or(Ok(()), |bucket| self.0.take_from(&bucket))
    }

    /// Whether there is a token in the bucket of `client`.
    pub fn peek(&self, client: Client) -> Result<(), u32> {
        self.bucket(client).map_or(Ok(()), |bucket| self.0.peek_at(&bucket))
    }

    /// How many buckets there are that are not full.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Drops full buckets.
    pub fn evict_idle(&self) {
        self.0.evict_idle();
    }

    /// The bucket of `client`; none if it has no limit.
    fn bucket(&self, client: Client) -> Option<ClientBucket> {
        let bucket = if self.0.is_crowded() { ClientBucket::Overflow } else { ClientBucket::One(client) };
        (!client.is_this_machine()).then_some(bucket)
    }
}

fn rate(config::Quota { burst, per_second }: config::Quota) -> governor::Quota {
    let interval = Duration::from_secs_f64(per_second.recip()).max(Duration::from_nanos(1));
    // None is for an interval of 0 only.
    governor::Quota::with_period(interval).unwrap_or(governor::Quota::per_second(burst)).allow_burst(burst)
}
