//! How many wrong passwords a client of the registry may send. No IO; the clock is a parameter.
//!
//! If right passwords were accepted at any rate, a limit of the wrong ones would slow down no attacker, who would see the
//! right one by its answer. So beyond the limit passwords are not compared, except those from addresses with a right
//! password before: others behind the same address as an attacker, as behind NAT, must not be locked out by it.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock, Reference as _};
use parking_lot::Mutex;
use wgkex_common::config::Quota;

use crate::client_ip::Client;
use crate::token_buckets::{ClientBuckets, SingleBucket};

/// Wrong passwords of a client: ten at once, then one in 5 s.
const WRONG: Quota = Quota { burst: NonZeroU32::MIN.saturating_add(9), per_second: 0.2 };
/// The lines in the log about refused clients: one a minute.
const LINES: Quota = Quota { burst: NonZeroU32::MIN, per_second: 1.0 / 60.0 };
/// How long a client is known after a right password: longer than a day, for clients that call once a day.
const KNOWN_FOR: Duration = Duration::from_secs(2 * 24 * 3_600);
/// The most clients that are known: those whose right passwords are the newest.
const KNOWN_MAX: usize = 4_096;

/// The wrong passwords of clients, and the clients that sent a right one.
pub struct LoginLimit<C: Clock = MonotonicClock> {
    clock: C,
    wrong: ClientBuckets<C>,
    /// When each client sent the right password last.
    known: Mutex<BTreeMap<Client, C::Instant>>,
    /// The wrong credentials that each client sent last.
    last_wrong: Mutex<BTreeMap<Client, Digest>>,
    lines: SingleBucket<C>,
    unlogged: AtomicU64,
}

/// The digest of a user and a password.
pub type Digest = [u8; 32];

/// Why a login is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginRefusal {
    /// User and password are missing or wrong.
    Wrong,
    /// The client sent too many wrong ones. The next one is compared after these seconds, at least 1.
    TooManyWrong(u32),
}

impl<C: Clock + Clone> LoginLimit<C> {
    /// No password was sent yet.
    pub fn new(clock: C) -> Self {
        let (wrong, lines) = (ClientBuckets::new(WRONG, &clock), SingleBucket::new(LINES, &clock));
        Self { clock, wrong, known: Mutex::default(), last_wrong: Mutex::default(), lines, unlogged: AtomicU64::new(0) }
    }

    /// Admits `client` if its credentials, of which this is the digest, are right. Beyond the limit that is not checked,
    /// unless the client is known. Wrong ones that a client repeats count once: an agent that still has the password of
    /// yesterday locks out no other one behind its address. Clients that a trusted proxy does not name have no limit, as
    /// each could lock out all.
    pub fn check(
        &self,
        client: Client,
        credentials: &Digest,
        is_right: impl FnOnce() -> bool,
    ) -> Result<(), LoginRefusal> {
        let is_limited = client != Client::Unnamed;
        if is_limited && !self.is_known(client) {
            self.wrong.peek(client).map_err(LoginRefusal::TooManyWrong)?;
        }
        if is_right() {
            if is_limited {
                self.remember(client);
            }
            return Ok(());
        }
        if is_limited && !self.is_repeated(client, credentials) {
            self.wrong.take(client).map_err(LoginRefusal::TooManyWrong)?;
        }
        Err(LoginRefusal::Wrong)
    }

    /// A client was refused for too many wrong passwords. If that is to be logged, how many were since the last line.
    pub fn line(&self) -> Option<u64> {
        self.unlogged.fetch_add(1, Ordering::Relaxed);
        self.lines.take().is_ok().then(|| self.unlogged.swap(0, Ordering::Relaxed))
    }

    /// Forgets clients that were long silent.
    pub fn forget_old(&self) {
        self.wrong.evict_idle();
        let now = self.clock.now();
        self.known.lock().retain(|_, last| is_recent::<C>(*last, now));
        let mut last_wrong = self.last_wrong.lock();
        if last_wrong.len() >= KNOWN_MAX {
            last_wrong.clear();
        }
    }

    /// Whether the last wrong credentials of `client` were the same. Without room for another client they are not.
    fn is_repeated(&self, client: Client, credentials: &Digest) -> bool {
        let mut last_wrong = self.last_wrong.lock();
        if last_wrong.len() >= KNOWN_MAX && !last_wrong.contains_key(&client) {
            return false;
        }
        last_wrong.insert(client, *credentials).is_some_and(|last| last == *credentials)
    }

    fn is_known(&self, client: Client) -> bool {
        self.known.lock().get(&client).is_some_and(|last| is_recent::<C>(*last, self.clock.now()))
    }

    fn remember(&self, client: Client) {
        let mut known = self.known.lock();
        if known.len() >= KNOWN_MAX && !known.contains_key(&client) {
            let oldest = known.iter().min_by_key(|(_, last)| **last).map(|(client, _)| *client);
            oldest.and_then(|oldest| known.remove(&oldest));
        }
        known.insert(client, self.clock.now());
    }
}

fn is_recent<C: Clock>(last: C::Instant, now: C::Instant) -> bool {
    Duration::from(now.duration_since(last)) < KNOWN_FOR
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use governor::clock::FakeRelativeClock;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limit() -> (LoginLimit<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (LoginLimit::new(clock.clone()), clock)
    }

    fn client(n: u32) -> Client {
        IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + n)).into()
    }

    /// A digest that no other call returns.
    fn unused() -> Digest {
        static USED: AtomicU64 = AtomicU64::new(0);
        let mut digest = [7; 32];
        digest[..8].copy_from_slice(&USED.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        digest
    }

    /// How many of a hundred wrong passwords are compared.
    fn compared(limit: &LoginLimit<FakeRelativeClock>, client: Client) -> usize {
        let mut compared = 0;
        for _ in 0..100 {
            let result = limit.check(client, &unused(), || {
                compared += 1;
                false
            });
            assert!(result.is_err());
        }
        compared
    }

    #[test]
    fn wrong_passwords_are_compared_up_to_the_limit_and_those_of_others_are_not_counted() {
        let (limit, clock) = limit();
        let ipv6 = |n: u128| IpAddr::from(Ipv6Addr::from_bits((0x2001_0db8 << 96) | n)).into();
        for (after, client, expected) in [
            (0, client(1), 10),
            (0, client(1), 0),
            (0, client(2), 10),
            (4, client(1), 0),
            (1, client(1), 1),
            (25, client(1), 5),
            (10_000, client(1), 10),
            (0, ipv6(1), 10),
            // Another address of the same /56.
            (0, ipv6(2), 0),
            (0, Client::Unnamed, 100),
            // The operator of this machine.
            (0, IpAddr::from(Ipv4Addr::LOCALHOST).into(), 100),
        ] {
            clock.advance(SECOND * after);
            assert_eq!(compared(&limit, client), expected, "after {after} s");
        }
    }

    #[test]
    fn the_right_password_is_answered_beyond_the_limit_where_it_was_right_before() {
        let (limit, clock) = limit();
        let right = |n| limit.check(client(n), &[0; 32], || true);
        for (n, is_known) in [(1, true), (2, false)] {
            if is_known {
                assert_eq!(right(n), Ok(()));
            }
            compared(&limit, client(n));
            assert_eq!(limit.check(client(n), &[1; 32], || false), Err(LoginRefusal::TooManyWrong(5)), "a wrong one");
            assert_eq!(right(n), if is_known { Ok(()) } else { Err(LoginRefusal::TooManyWrong(5)) }, "{n}");
            clock.advance(SECOND * 2);
            assert_eq!(limit.check(client(n), &[2; 32], || false), Err(LoginRefusal::TooManyWrong(3)), "a wrong one");
            clock.advance(SECOND * 3);
            assert_eq!(right(n), Ok(()), "a newcomer's turn comes, too");
        }
        clock.advance(KNOWN_FOR);
        compared(&limit, client(1));
        assert_eq!(right(1), Err(LoginRefusal::TooManyWrong(5)), "it is forgotten");
    }

    #[test]
    fn however_many_clients_there_are_the_room_is_bounded() {
        let (limit, clock) = limit();
        let known_max = u32::try_from(KNOWN_MAX).unwrap();
        for n in 0..=known_max {
            clock.advance(SECOND);
            assert_eq!(limit.check(client(n), &[0; 32], || true), Ok(()));
        }
        assert_eq!(limit.known.lock().len(), KNOWN_MAX);
        assert!(!limit.is_known(client(0)) && limit.is_known(client(1)), "the oldest is forgotten");
        let refused =
            (0..70_000).filter(|n| limit.check(client(100_000 + n), &[1; 32], || false) != Err(LoginRefusal::Wrong));
        assert!(refused.count() > 4_000, "those without a bucket share one");
        assert!(limit.wrong.len() < 66_000);
        assert_eq!(limit.check(client(1), &[0; 32], || true), Ok(()), "a known client is not concerned");
        clock.advance(KNOWN_FOR);
        limit.forget_old();
        assert_eq!((limit.known.lock().len(), limit.wrong.len()), (0, 0));
    }

    #[test]
    fn an_agent_with_the_password_of_yesterday_locks_out_no_other_one_behind_its_address() {
        let (limit, _) = limit();
        for _ in 0..1_000 {
            assert_eq!(limit.check(client(1), &[1; 32], || false), Err(LoginRefusal::Wrong));
        }
        assert_eq!(limit.check(client(1), &[0; 32], || true), Ok(()));
    }

    #[test]
    fn a_line_a_minute_has_the_number_of_refusals() {
        let (limit, clock) = limit();
        assert_eq!([(); 4].map(|()| limit.line()), [Some(1), None, None, None]);
        clock.advance(SECOND * 59);
        assert_eq!(limit.line(), None);
        clock.advance(SECOND);
        assert_eq!([(); 2].map(|()| limit.line()), [Some(5), None]);
    }
}
