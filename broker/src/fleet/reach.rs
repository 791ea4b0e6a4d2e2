//! Whether routers reach the gateways that they were given: a blocked UDP port or a wrong external name shows nowhere
//! else. No IO, no clock.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use wgkex_common::{Domain, PublicKey, WorkerName};

/// A router that still requests a gateway so long after it was first given one, without a handshake there, does not reach it.
const UNREACHED_AFTER: Duration = Duration::from_secs(300);
/// An answer is forgotten after this long.
const ANSWER_LIFETIME: Duration = Duration::from_secs(1_200);
/// The most answers that are remembered; others are not watched.
const WATCHED_ANSWERS_MAX: usize = 20_000;
/// A gateway with fewer unreached routers is not reported: a single router may have a local problem.
const MIN_UNREACHED: u64 = 3;

/// The answers that named a gateway, in the last 20 minutes.
#[derive(Debug, Default)]
pub struct ReachTracker {
    answers: HashMap<AnsweredRouter, AnswerTimes>,
    /// How many of them each gateway has in each state; none without any.
    counts: BTreeMap<WorkerName, ReachCounts>,
}

/// A router that was given a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct AnsweredRouter {
    key: PublicKey,
    domain: Domain,
    gateway: WorkerName,
}

#[derive(Debug)]
struct AnswerTimes {
    first: Instant,
    last: Instant,
    /// The gateway reported a handshake of the router.
    is_reached: bool,
}

/// The routers that were given a gateway in the last 20 minutes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReachCounts {
    /// The routers with a handshake there.
    pub reached: u64,
    /// The routers without one so far.
    pub waiting: u64,
    /// The routers that still request it 5 minutes after they were first given it, and have had no handshake there.
    pub unreached: u64,
}

impl AnswerTimes {
    /// The counter of the gateway that includes this answer.
    fn place<'a>(&self, ReachCounts { reached, waiting, unreached }: &'a mut ReachCounts) -> &'a mut u64 {
        if self.is_reached {
            reached
        } else if self.last.saturating_duration_since(self.first) >= UNREACHED_AFTER {
            unreached
        } else {
            waiting
        }
    }
}

impl ReachCounts {
    /// Whether so many routers do not reach the gateway that it is the cause: at a gateway without any `connected`
    /// router, one is enough.
    #[must_use]
    pub fn is_suspicious(&self, connected: u64) -> bool {
        let least = if connected == 0 && self.reached == 0 { 1 } else { MIN_UNREACHED };
        self.unreached >= least && self.unreached >= self.reached
    }
}

impl ReachTracker {
    /// A router was given a gateway; `is_reached` if that is the one that last reported handshakes of it.
    pub fn on_given(&mut self, gateway: &WorkerName, domain: &Domain, key: PublicKey, is_reached: bool, now: Instant) {
        let given = AnsweredRouter { key, domain: domain.clone(), gateway: gateway.clone() };
        if self.answers.len() >= WATCHED_ANSWERS_MAX && !self.answers.contains_key(&given) {
            return;
        }
        let counts = self.counts.entry(gateway.clone()).or_default();
        let answer = match self.answers.entry(given) {
            Entry::Occupied(known) => {
                let answer = known.into_mut();
                *answer.place(counts) -= 1;
                answer
            }
            Entry::Vacant(unknown) => unknown.insert(AnswerTimes { first: now, last: now, is_reached }),
        };
        answer.last = now;
        answer.is_reached |= is_reached;
        *answer.place(counts) += 1;
    }

    /// A gateway reports a handshake of a router.
    pub fn on_handshake(&mut self, gateway: &WorkerName, domain: &Domain, key: PublicKey) {
        let given = AnsweredRouter { key, domain: domain.clone(), gateway: gateway.clone() };
        if let (Some(answer), Some(counts)) = (self.answers.get_mut(&given), self.counts.get_mut(gateway)) {
            *answer.place(counts) -= 1;
            answer.is_reached = true;
            *answer.place(counts) += 1;
        }
    }

    /// Forgets old answers.
    pub fn expire(&mut self, now: Instant) {
        let counts = &mut self.counts;
        self.answers.retain(|given, answer| {
            let is_kept = now.saturating_duration_since(answer.last) < ANSWER_LIFETIME;
            if let (false, Some(counts)) = (is_kept, counts.get_mut(&given.gateway)) {
                *answer.place(counts) -= 1;
            }
            is_kept
        });
        counts.retain(|_, counts| *counts != ReachCounts::default());
    }

    /// The routers of each gateway.
    #[must_use]
    pub fn by_gateway(&self) -> &BTreeMap<WorkerName, ReachCounts> {
        &self.counts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::key;

    fn at(begun: Instant, minutes: u64) -> Instant {
        begun + Duration::from_secs(minutes * 60)
    }

    fn scene() -> (ReachTracker, WorkerName, Domain, Instant) {
        let domain = Domain::new("ff_a", &["ff_".into()]).unwrap();
        (ReachTracker::default(), "gw1".parse().unwrap(), domain, Instant::now())
    }

    #[test]
    fn routers_that_go_on_requesting_a_gateway_without_a_handshake_do_not_reach_it() {
        let (mut reach, gateway, domain, begun) = scene();
        // The first has a handshake in time, the second late, the third never, the fourth sends no further request.
        for minute in 0..=6 {
            for n in 1..=3 {
                reach.on_given(&gateway, &domain, key(n), false, at(begun, minute));
            }
            if minute == 0 {
                reach.on_given(&gateway, &domain, key(4), false, at(begun, 0));
            }
            if minute == 1 {
                reach.on_handshake(&gateway, &domain, key(1));
            }
            reach.expire(at(begun, minute));
            let unreached = if minute < 5 { 0 } else { 2 };
            let reached = u64::from(minute >= 1);
            let expected = ReachCounts { reached, waiting: 4 - unreached - reached, unreached };
            assert_eq!(reach.by_gateway()[&gateway], expected, "{minute} min");
        }
        reach.on_handshake(&gateway, &domain, key(2));
        assert_eq!(reach.by_gateway()[&gateway], ReachCounts { reached: 2, waiting: 1, unreached: 1 });
        reach.expire(at(begun, 20));
        assert_eq!(reach.by_gateway()[&gateway], ReachCounts { reached: 2, waiting: 0, unreached: 1 });
        reach.expire(at(begun, 26));
        assert!(reach.by_gateway().is_empty());
    }

    #[test]
    fn a_router_that_is_connected_there_is_reached_and_another_gateways_word_does_not_count() {
        let (mut reach, gateway, domain, begun) = scene();
        let other: WorkerName = "gw2".parse().unwrap();
        reach.on_given(&gateway, &domain, key(1), true, begun);
        reach.on_given(&gateway, &domain, key(2), false, begun);
        reach.on_handshake(&other, &domain, key(2));
        reach.on_given(&gateway, &domain, key(1), false, at(begun, 9));
        reach.on_given(&gateway, &domain, key(2), false, at(begun, 9));
        assert_eq!(reach.by_gateway()[&gateway], ReachCounts { reached: 1, waiting: 0, unreached: 1 });
        assert!(!reach.by_gateway().contains_key(&other));
    }

    #[test]
    fn one_router_alone_and_a_minority_make_no_gateway_suspicious() {
        for (connected, reached, unreached, suspicious) in [
            (1, 0, 2, false),
            (0, 1, 2, false),
            (0, 0, 1, true),
            (0, 0, 0, false),
            (1, 0, 3, true),
            (1, 3, 3, true),
            (1, 4, 3, false),
        ] {
            let found = ReachCounts { reached, waiting: 50, unreached };
            assert_eq!(found.is_suspicious(connected), suspicious, "{found:?}");
        }
    }

    #[test]
    fn a_flood_of_keys_takes_bounded_room_and_is_not_unreached() {
        let (mut reach, gateway, domain, begun) = scene();
        for n in 0..30_000 {
            reach.on_given(&gateway, &domain, key(n), false, begun);
        }
        reach.expire(at(begun, 19));
        assert_eq!(
            reach.by_gateway()[&gateway],
            ReachCounts { waiting: WATCHED_ANSWERS_MAX as u64, ..ReachCounts::default() }
        );
    }

    proptest! {
        #[test]
        fn the_counts_are_those_of_a_recount(
            events in prop::collection::vec((0..4_u8, 0..3_u32, 0..2_u8, any::<bool>(), 0..600_u64), 0..80)
        ) {
            let (mut reach, _, domain, begun) = scene();
            let mut now = begun;
            for (kind, n, gateway, is_reached, seconds) in events {
                let gateway: WorkerName = format!("gw{gateway}").parse().unwrap();
                now += Duration::from_secs(seconds);
                match kind {
                    0 | 1 => reach.on_given(&gateway, &domain, key(n), is_reached, now),
                    2 => reach.on_handshake(&gateway, &domain, key(n)),
                    _ => reach.expire(now),
                }
                let mut recount: BTreeMap<WorkerName, ReachCounts> = BTreeMap::new();
                for (given, answer) in &reach.answers {
                    *answer.place(recount.entry(given.gateway.clone()).or_default()) += 1;
                }
                prop_assert_eq!(reach.by_gateway(), &recount);
            }
        }
    }
}
