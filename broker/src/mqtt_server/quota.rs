//! The limits of one user: connections, packets and bytes over time, and memory for incomplete packets. All connections of a
//! user share them.
//!
//! A user that exceeds its rate is slowed down: nothing is read from it for a while. Unread data stays in its own
//! buffers, so nothing that was acknowledged is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use strum::{IntoStaticStr, VariantNames};
use tokio::time::Instant;
use wgkex_common::config::Role;

/// The most connections of one user, however many there may be in all. A worker and a broker have two each.
const CLIENTS_MAX: usize = 32;
/// The least of those, however few there may be in all.
const MIN_CLIENTS: usize = 4;
/// The most bytes of incomplete packets of one user; larger packets wait for their turn.
const UNFINISHED_MAX: usize = 4 << 20;
/// The same for all clients together, where there are no users.
const UNFINISHED_OF_ALL_MAX: usize = 64 << 20;
/// The shortest time between two log lines about the same offence of a user.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// The cost of a packet, beside its bytes.
pub const PACKET_COST: u64 = 100;
/// The cost of each topic that a search of the retained messages compares.
pub const COMPARED_TOPIC_COST: u64 = 5;
/// The cost of each retained message that is delivered.
pub const DELIVERY_COST: u64 = 50;
/// The cost of a new connection: tasks, a client slot, and its will.
pub const LOGIN_COST: u64 = 5_000;

/// The cost of an operation for the server.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Its time, in hundredths of that of a small packet.
    pub work: u64,
    /// The bytes that it moves.
    pub bytes: u64,
}

/// A rate, and how much more is allowed at once.
#[derive(Debug, Clone, Copy)]
struct Pace {
    per_second: u64,
    burst: u64,
}

/// The rate of a user.
#[derive(Debug, Clone, Copy)]
struct RateLimit {
    work: Pace,
    bytes: Pace,
    /// How long its clients may keep their readers from reading while others wait, in microseconds.
    wait_max: Pace,
}

/// A worker publishes a batch of 2,000 keys in 100 kB. In the worst case it publishes each key alone: 20,000 keys are
/// half of the number that it may publish at once.
const WORKER_LIMIT: RateLimit = RateLimit {
    work: Pace { per_second: 2_000 * PACKET_COST, burst: 40_000 * PACKET_COST },
    bytes: Pace { per_second: 512 << 10, burst: 16 << 20 },
    wait_max: Pace { per_second: 1_000_000 / 60, burst: 2_000_000 },
};
/// A broker of another machine publishes as many keys as routers request, and sends all live keys to each gateway that
/// requests them. It is trusted with more than this; the limit is for programs that fail.
const BROKER_LIMIT: RateLimit = RateLimit {
    work: Pace { per_second: 50_000 * PACKET_COST, burst: 100_000 * PACKET_COST },
    bytes: Pace { per_second: 64 << 20, burst: 256 << 20 },
    wait_max: Pace { per_second: 5_000_000 / 60, burst: 5_000_000 },
};

/// The rate up to which a user does not count as one that publishes much at once: a batch of keys, and the lasting rate
/// of a worker.
const STEADY: Pace = Pace { per_second: 512 << 10, burst: 256 << 10 };

/// Why nothing is read from a client for a while; the names are the labels of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum ThrottleReason {
    /// Its user exceeds its rate.
    Rate,
    /// Its user has too many bytes of incomplete packets.
    Unfinished,
    /// Other clients have not yet read enough of the published messages.
    Behind,
}

impl ThrottleReason {
    /// The label of metrics and log.
    pub fn reason(self) -> &'static str {
        self.into()
    }
}

/// The account that all connections of a user share, or all connections where there are no users.
#[derive(Debug, Clone)]
pub struct Account {
    /// How many connections there may be at once.
    pub max_clients: usize,
    /// Whether it is this broker's own, which nothing may hold up.
    pub is_own: bool,
    rate: Option<Arc<Rate>>,
    unfinished: Arc<MemoryShare>,
    warned: Arc<[LogThrottle; 2]>,
}

/// An offence of a user that is logged, each kind at most once in a while.
#[derive(Debug, Clone, Copy)]
pub enum Offence {
    /// It publishes on or subscribes to a topic that it may not.
    Forbidden,
    /// It exceeds its rate.
    Excess,
}

impl Account {
    /// The account of a user; the `users` of the config share `max_clients`.
    pub fn of(role: Role, users: usize, max_clients: usize) -> Self {
        let max_clients = (max_clients / users.max(1)).clamp(MIN_CLIENTS, CLIENTS_MAX);
        Self { max_clients, ..Self::with(Some(rate(role)), UNFINISHED_MAX) }
    }

    /// The account of all clients, where there are no users.
    pub fn of_anyone() -> Self {
        Self::with(Some(rate(Role::Broker)), UNFINISHED_OF_ALL_MAX)
    }

    /// The account of this broker itself.
    pub fn own() -> Self {
        Self { is_own: true, ..Self::with(None, usize::MAX) }
    }

    fn with(rate: Option<Rate>, unfinished: usize) -> Self {
        let unfinished = Arc::new(MemoryShare { taken: AtomicUsize::new(0), most: unfinished });
        Self { max_clients: usize::MAX, is_own: false, rate: rate.map(Arc::new), unfinished, warned: Arc::default() }
    }

    /// The same account with a rate of its own, for one of many programs without users.
    pub fn with_new_rate(&self) -> Self {
        Self { rate: Some(Arc::new(rate(Role::Broker))), ..self.clone() }
    }

    /// Charges `cost`; returns how long the user has to wait.
    pub fn charge(&self, cost: Cost, now: Instant) -> Duration {
        self.rate.as_ref().map_or(Duration::ZERO, |rate| rate.charge(cost, now))
    }

    /// Whether the user publishes much at once, within its rate.
    pub fn is_bursting(&self, now: Instant) -> bool {
        self.rate.as_ref().is_some_and(|rate| rate.is_bursting(now))
    }

    /// A client of the user kept its reader from reading for so long while others waited. True if that was too long, also
    /// together with the user's other clients.
    pub fn charge_wait(&self, time: Duration, now: Instant) -> bool {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.rate.as_ref().is_some_and(|rate| rate.charge_wait(micros, now))
    }

    /// Reserves memory for an incomplete packet of so many bytes, until it is dropped; none if there is too little.
    pub fn reserve(&self, bytes: usize) -> Option<ReservedBytes> {
        self.unfinished.take(bytes)
    }

    /// Whether the offence is to be logged, as it was not for a while.
    pub fn may_warn(&self, offence: Offence) -> bool {
        self.warned[offence as usize].is_due(WARNING_INTERVAL)
    }
}

fn rate(role: Role) -> Rate {
    let RateLimit { work, bytes, wait_max } = match role {
        Role::Worker => WORKER_LIMIT,
        Role::Broker => BROKER_LIMIT,
    };
    Rate {
        began: Instant::now(),
        work: Meter::new(work),
        bytes: Meter::new(bytes),
        steady: Meter::new(STEADY),
        wait_max: Meter::new(wait_max),
    }
}

/// The rate of a user, and the charges so far.
#[derive(Debug)]
struct Rate {
    began: Instant,
    work: Meter,
    bytes: Meter,
    /// Of the same bytes.
    steady: Meter,
    /// Of the time for which others waited.
    wait_max: Meter,
}

impl Rate {
    fn charge(&self, cost: Cost, now: Instant) -> Duration {
        let now = self.nanos(now);
        self.steady.charge(cost.bytes, now);
        self.work.charge(cost.work, now).max(self.bytes.charge(cost.bytes, now))
    }

    fn is_bursting(&self, now: Instant) -> bool {
        !self.steady.charge(0, self.nanos(now)).is_zero()
    }

    fn charge_wait(&self, micros: u64, now: Instant) -> bool {
        !self.wait_max.charge(micros, self.nanos(now)).is_zero()
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A meter of one kind of cost, in nanoseconds of its pace. It has no lock, as many connections charge here.
#[derive(Debug)]
struct Meter {
    /// When all that was charged is paid.
    paid: AtomicU64,
    price: u64,
    burst: u64,
}

impl Meter {
    fn new(pace: Pace) -> Self {
        let price = 1_000_000_000 / pace.per_second;
        Self { paid: AtomicU64::new(0), price, burst: price * pace.burst }
    }

    fn charge(&self, amount: u64, now: u64) -> Duration {
        let after = |paid: u64| paid.max(now).saturating_add(amount.saturating_mul(self.price));
        let before = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |paid| Some(after(paid)));
        let paid = after(before.unwrap_or_default());
        Duration::from_nanos(paid.saturating_sub(now).saturating_sub(self.burst))
    }
}

/// An amount of memory.
#[derive(Debug)]
struct MemoryShare {
    taken: AtomicUsize,
    most: usize,
}

/// A part of a [`MemoryShare`], until it is dropped.
#[derive(Debug)]
pub struct ReservedBytes(Arc<MemoryShare>, usize);

impl MemoryShare {
    fn take(self: &Arc<Self>, bytes: usize) -> Option<ReservedBytes> {
        let after = |taken: usize| taken.checked_add(bytes).filter(|taken| *taken <= self.most);
        let is_taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after).is_ok();
        is_taken.then(|| ReservedBytes(self.clone(), bytes))
    }
}

impl Drop for ReservedBytes {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// Limits how often something is logged.
#[derive(Debug, Default)]
pub struct LogThrottle(Mutex<Option<Instant>>);

impl LogThrottle {
    /// Whether it was not due in the last `pause`.
    pub fn is_due(&self, pause: Duration) -> bool {
        let mut last = self.0.lock();
        let is_due = last.is_none_or(|last| last.elapsed() >= pause);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(rate: &Rate, millis: u64) -> Instant {
        rate.began + Duration::from_millis(millis)
    }

    /// How many packets of so many bytes may be sent at once.
    fn burst(rate: &Rate, bytes: u64, now: Instant) -> u32 {
        let mut sent = 0;
        while rate.charge(Cost { work: PACKET_COST, bytes }, now).is_zero() {
            sent += 1;
        }
        sent
    }

    #[test]
    fn a_user_that_exceeds_its_rate_waits_until_all_is_paid() {
        let rate = rate(Role::Worker);
        assert_eq!(burst(&rate, 10, after(&rate, 0)), 40_000);
        let wait = rate.charge(Cost { work: 2_000 * PACKET_COST, bytes: 0 }, after(&rate, 0));
        assert!((1_000..1_002).contains(&wait.as_millis()), "{wait:?}");
        assert_eq!(burst(&rate, 10, after(&rate, 2_001)), 2_001);
        assert_eq!(burst(&rate, 10, after(&rate, 1_000_000)), 40_000, "no more is saved up");
        assert_eq!(burst(&rate, 100_000, after(&rate, 2_000_000)), 167, "16 MiB");
    }

    #[test]
    fn a_worker_publishes_20_000_keys_at_once_each_alone_and_a_broker_more() {
        let (worker, broker) = (rate(Role::Worker), rate(Role::Broker));
        assert!(burst(&worker, 200, after(&worker, 0)) > 2 * 20_000 - 1);
        assert!(burst(&broker, 200, after(&broker, 0)) >= 100_000);
        assert_eq!(Account::own().charge(Cost { work: u64::MAX, bytes: u64::MAX }, Instant::now()), Duration::ZERO);
    }

    #[test]
    fn a_user_holds_others_up_for_two_seconds_and_then_for_one_a_minute() {
        let rate = rate(Role::Worker);
        assert!((0..20).all(|_| !rate.charge_wait(100_000, after(&rate, 0))));
        assert!(rate.charge_wait(100_000, after(&rate, 0)));
        assert!(!rate.charge_wait(890_000, after(&rate, 60_000)) && rate.charge_wait(100_000, after(&rate, 60_000)));
        assert!(!Account::own().charge_wait(Duration::MAX, Instant::now()));
    }

    #[test]
    fn a_user_bursts_that_publishes_more_than_a_batch_at_once() {
        for role in [Role::Worker, Role::Broker] {
            let rate = rate(role);
            assert!(rate.charge(Cost { work: PACKET_COST, bytes: 256 << 10 }, after(&rate, 0)).is_zero());
            assert!(!rate.is_bursting(after(&rate, 0)));
            assert!(rate.charge(Cost { work: PACKET_COST, bytes: 512 << 10 }, after(&rate, 0)).is_zero());
            assert!(rate.is_bursting(after(&rate, 0)) && rate.is_bursting(after(&rate, 990)));
            assert!(!rate.is_bursting(after(&rate, 1_010)));
        }
        assert!(!Account::own().is_bursting(Instant::now()));
    }

    #[test]
    fn connections_of_a_user_share_and_those_of_programs_without_one_do_not() {
        let (user, now) = (Account::of(Role::Worker, 1, 100), Instant::now());
        let much = Cost { work: 80_000 * PACKET_COST, bytes: 0 };
        assert!(!user.clone().charge(much, now).is_zero() && !user.charge(Cost::default(), now).is_zero());
        let anyone = Account::of_anyone();
        let flood = Cost { work: 200_000 * PACKET_COST, bytes: 0 };
        assert!(!anyone.with_new_rate().charge(flood, now).is_zero());
        assert!(anyone.with_new_rate().charge(Cost::default(), now).is_zero());
        let held: Vec<_> = (0..10).map_while(|_| user.clone().reserve(1 << 20)).collect();
        assert_eq!(held.len(), 4);
        drop(held);
        assert!(user.reserve(1 << 20).is_some());
    }

    #[test]
    fn seats_are_for_all_users() {
        let max_clients = |users, all| Account::of(Role::Worker, users, all).max_clients;
        assert_eq!(
            [max_clients(3, 10), max_clients(1, 10), max_clients(10, 100), max_clients(3, 10_000)],
            [4, 10, 10, 32]
        );
        assert_eq!(Account::of_anyone().max_clients, usize::MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn frequent_events_are_logged_rarely() {
        let throttle = LogThrottle::default();
        assert!(throttle.is_due(WARNING_INTERVAL) && !throttle.is_due(WARNING_INTERVAL));
        tokio::time::advance(WARNING_INTERVAL).await;
        assert!(throttle.is_due(WARNING_INTERVAL));
    }
}
