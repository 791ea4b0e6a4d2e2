//! How many peers a drain may remove at a time. Pure: `now` is passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use wgkex_common::wire::drain::Percent;

const MINUTE: Duration = Duration::from_secs(60);

/// At most some percent of a number of peers in any minute. If that is less than one peer, one peer in a
/// correspondingly longer period.
#[derive(Debug, Default)]
pub struct Portions {
    percent: Percent,
    /// The number of peers when the first portion was due.
    peers: usize,
    /// The removals of the last period.
    removals: VecDeque<PastRemoval>,
}

#[derive(Debug, Clone, Copy)]
struct PastRemoval {
    at: Instant,
    peers: usize,
}

impl Portions {
    /// Sets the size of portions to this percentage of so many peers. Earlier removals still count.
    pub fn restart(&mut self, percent: Percent, peers: usize) {
        (self.percent, self.peers) = (percent, peers);
    }

    /// Assumes that an earlier run of the program used up the portion just before `now`.
    pub fn assume_removed(&mut self, now: Instant) {
        self.on_removed(usize::MAX, now);
    }

    /// Counts removed peers.
    pub fn on_removed(&mut self, peers: usize, now: Instant) {
        self.forget_old(now);
        if peers > 0 {
            self.removals.push_back(PastRemoval { at: now, peers });
        }
    }

    /// How many peers may be removed now.
    pub fn allowed(&mut self, now: Instant) -> usize {
        self.forget_old(now);
        let removed = self.removals.iter().map(|removal| removal.peers).fold(0, usize::saturating_add);
        self.most().saturating_sub(removed)
    }

    /// When further peers may be removed: now, or later.
    pub fn due(&mut self, now: Instant) -> Instant {
        let oldest = if self.allowed(now) > 0 { None } else { self.removals.front() };
        oldest.map_or(now, |removal| removal.at + self.period())
    }

    /// A hundred times the number of peers of a minute's portion.
    fn hundredths(&self) -> usize {
        self.peers.max(1).saturating_mul(usize::from(u8::from(self.percent)))
    }

    fn most(&self) -> usize {
        (self.hundredths() / 100).max(1)
    }

    /// The period in which that many peers may be removed.
    fn period(&self) -> Duration {
        let hundredths = u32::try_from(self.hundredths()).unwrap_or(u32::MAX);
        MINUTE.max(100 * MINUTE / hundredths)
    }

    fn forget_old(&mut self, now: Instant) {
        let period = self.period();
        self.removals.retain(|removal| now.saturating_duration_since(removal.at) < period);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn portions(percent: u8, peers: usize) -> Portions {
        let mut portions = Portions::default();
        portions.restart(percent.try_into().unwrap(), peers);
        portions
    }

    #[test]
    fn a_portion_is_a_part_of_the_peers_that_there_were_and_at_least_one() {
        for (percent, peers, most, seconds) in [
            (10, 20_000, 2_000, 60),
            (1, 100, 1, 60),
            (100, 7, 7, 60),
            (10, 19, 1, 60),
            (10, 5, 1, 120),
            (1, 1, 1, 6_000),
            (50, 0, 1, 120),
        ] {
            let (mut portions, begun) = (portions(percent, peers), Instant::now());
            assert_eq!((portions.allowed(begun), portions.due(begun)), (most, begun), "{percent} % of {peers}");
            portions.on_removed(most, begun);
            let at = |milliseconds| begun + Duration::from_millis(milliseconds);
            assert_eq!(portions.due(begun), at(1_000 * seconds));
            assert_eq!(portions.allowed(at(1_000 * seconds - 1)), 0);
            assert_eq!(portions.allowed(at(1_000 * seconds)), most);
        }
    }

    #[test]
    fn a_part_of_a_portion_leaves_the_rest_of_it() {
        let (mut portions, begun) = (portions(10, 100), Instant::now());
        portions.on_removed(4, begun);
        portions.on_removed(5, begun + MINUTE / 2);
        assert_eq!(portions.allowed(begun + MINUTE / 2), 1);
        assert_eq!(portions.allowed(begun + MINUTE), 5);
    }

    #[test]
    fn after_a_restart_nothing_goes_for_a_minute_whatever_the_operator_changes() {
        let (mut portions, begun) = (Portions::default(), Instant::now());
        portions.assume_removed(begun);
        for percent in [1, 100] {
            portions.restart(percent.try_into().unwrap(), 200);
            assert_eq!(portions.allowed(begun + MINUTE / 2), 0, "{percent}");
        }
        assert_eq!(portions.allowed(begun + MINUTE), 200);
    }

    #[derive(Debug, Clone, Copy)]
    enum Act {
        Pass(u64),
        Remove(usize),
        /// The program is restarted, and finds the remaining peers.
        Restart,
        /// The operator sets another deadline, which is over at once.
        Again(u8),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (1..90_000_u64).prop_map(Act::Pass),
            4 => (0..500_usize).prop_map(Act::Remove),
            1 => Just(Act::Restart),
            1 => (1..=100_u8).prop_map(Act::Again),
        ]
    }

    proptest! {
        #[test]
        fn never_more_than_the_percentage_goes_in_any_minute_not_across_restarts_either(
            peers in 0..2_000_usize, percent in 1..=100_u8, acts in prop::collection::vec(act(), 0..200),
        ) {
            let (mut left, mut highest, mut now) = (peers, percent, Instant::now());
            let mut portions = portions(percent, peers);
            let mut removals: Vec<(Instant, usize)> = Vec::new();
            for act in acts {
                match act {
                    Act::Pass(milliseconds) => now += Duration::from_millis(milliseconds),
                    Act::Remove(number) => {
                        let number = number.min(portions.allowed(now)).min(left);
                        portions.on_removed(number, now);
                        left -= number;
                        removals.push((now, number));
                    }
                    Act::Restart => {
                        let percent = portions.percent;
                        portions = Portions::default();
                        portions.assume_removed(now);
                        portions.restart(percent, left);
                    }
                    Act::Again(percent) => {
                        highest = highest.max(percent);
                        portions.restart(percent.try_into().unwrap(), left);
                    }
                }
                let minute = removals.iter().filter(|(at, _)| now - *at < MINUTE);
                let minute: usize = minute.map(|(_, number)| number).sum();
                prop_assert!(minute <= (peers * usize::from(highest) / 100).max(1), "{minute} of {peers}");
            }
        }

        #[test]
        fn all_are_gone_in_the_time_that_the_percentage_takes(peers in 1..500_usize, percent in 1..=100_u8) {
            let (mut portions, begun, mut left) = (portions(percent, peers), Instant::now(), peers);
            let mut now = begun;
            while left > 0 {
                let number = portions.allowed(now).min(left);
                portions.on_removed(number, now);
                left -= number;
                now = portions.due(now);
            }
            // A portion is rounded down to whole peers, at worst to little more than a half of it.
            prop_assert!(now - begun <= 2 * MINUTE * 100 / u32::from(percent) + MINUTE);
        }
    }
}
