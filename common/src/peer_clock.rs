//! The difference from another program's clock, by the times in its hellos. No IO, no clock.
//!
//! A retained hello is old, so only hellos count that are received when they are published. A delayed one makes a clock
//! seem to be behind: two must show the same difference.
//!
//! No task. Previous stop: the `bus` room, which receives hellos; next stop: the status of the program.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Differences above this, in seconds, are reported.
const DIFFERENCE_SHOWN_MIN: u128 = 60;
/// Hellos sent within this time count as one, such as those that a session sends again after it reconnects.
const SPACING: u64 = 10;

/// The difference of another clock from this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// It is ahead by so many seconds.
    Ahead(u64),
    /// It is behind by so many seconds.
    Behind(u64),
}

/// The clock of another program.
#[derive(Debug, Clone, Default)]
pub struct PeerClock {
    last: Option<ClockSample>,
    before: Option<ClockSample>,
}

#[derive(Debug, Clone, Copy)]
struct ClockSample {
    sent: u64,
    ahead: i128,
}

impl Difference {
    /// The absolute difference in seconds.
    #[must_use]
    pub fn seconds(self) -> u64 {
        match self {
            Self::Ahead(seconds) | Self::Behind(seconds) => seconds,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ahead(seconds) => write!(f, "{seconds} s ahead of"),
            Self::Behind(seconds) => write!(f, "{seconds} s behind"),
        }
    }
}

impl PeerClock {
    /// A hello that was sent at `sent`, by the other clock, was received at `now`, by this one; in seconds of Unix
    /// time.
    pub fn on_hello(&mut self, sent: u64, now: u64) {
        if self.last.is_some_and(|last| sent.abs_diff(last.sent) >= SPACING) {
            self.before = self.last;
        }
        self.last = Some(ClockSample { sent, ahead: i128::from(sent) - i128::from(now) });
    }

    /// The difference, if it is more than a minute by both of the last two hellos.
    #[must_use]
    pub fn difference(&self) -> Option<Difference> {
        let (last, before) = (self.last?.ahead, self.before?.ahead);
        let nearer = last.unsigned_abs().min(before.unsigned_abs());
        if nearer <= DIFFERENCE_SHOWN_MIN || last.signum() != before.signum() {
            return None;
        }
        let seconds = u64::try_from(nearer).unwrap_or(u64::MAX);
        Some(if last > 0 { Difference::Ahead(seconds) } else { Difference::Behind(seconds) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The clock after hellos that were sent at the first times and received at the second ones.
    fn after(hellos: &[[u64; 2]]) -> Option<Difference> {
        let mut clock = PeerClock::default();
        for [sent, now] in hellos {
            clock.on_hello(*sent, *now);
        }
        clock.difference()
    }

    #[test]
    fn two_hellos_that_agree_name_a_difference_of_more_than_a_minute() {
        for (hellos, expected) in [
            (&[[4_600, 1_000], [4_660, 1_062]][..], Some(Difference::Ahead(3_598))),
            (&[[1_000, 4_600], [1_060, 4_662]], Some(Difference::Behind(3_600))),
            (&[[1_060, 1_000], [1_121, 1_060]], None),
            (&[[1_061, 1_000], [1_121, 1_060]], Some(Difference::Ahead(61))),
            (&[[4_600, 1_000]], None),
            (&[[0, 0], [u64::MAX, 0], [u64::MAX - 60, 0]], Some(Difference::Ahead(u64::MAX - 60))),
        ] {
            assert_eq!(after(hellos), expected, "{hellos:?}");
        }
    }

    #[test]
    fn one_that_came_late_or_twice_and_a_clock_that_is_set_right_name_none() {
        assert_eq!(after(&[[1_000, 1_000], [1_060, 5_000]]), None, "it waited for a connection");
        assert_eq!(after(&[[1_000, 5_000], [1_001, 5_000], [1_009, 5_000]]), None, "so did all of these");
        assert_eq!(after(&[[4_600, 1_000], [4_660, 1_060], [1_120, 1_120]]), None);
        assert_eq!(after(&[[4_600, 1_000], [1_000, 4_600]]), None, "they contradict each other");
    }
}
