//! Objects with one log line each: limited per minute and in all, as strangers may cause them. No IO, no clock.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::runtime::line_budget::LineBudget;

/// The most objects that are remembered; others are not logged.
const THINGS_MAX: usize = 1024;

/// The objects that were logged.
#[derive(Debug)]
pub struct LoggedOnce<T> {
    logged: BTreeSet<T>,
    budget: LineBudget,
}

impl<T: Ord> LoggedOnce<T> {
    /// Nothing yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { logged: BTreeSet::new(), budget: LineBudget::new(now) }
    }

    /// Whether to log a line about `thing`, which then counts as logged.
    pub fn is_due(&mut self, thing: T, now: Instant) -> bool {
        self.budget.renew(now);
        if self.logged.len() >= THINGS_MAX || self.budget.is_spent() || !self.logged.insert(thing) {
            return false;
        }
        self.budget.spend();
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_thing_is_logged_once_and_there_are_few() {
        let now = Instant::now();
        let mut logged = LoggedOnce::new(now);
        assert!(logged.is_due((0, 0), now));
        let later = now + Duration::from_secs(100);
        assert!(!logged.is_due((0, 0), later));
        let lines = |logged: &mut LoggedOnce<(u64, u64)>, at: Instant| {
            let seconds = (at - now).as_secs();
            (0..100).filter(|n| logged.is_due((seconds, *n), at)).count()
        };
        assert_eq!(lines(&mut logged, later), 10);
        let minutes = (1..500).map(|minute| later + Duration::from_secs(60) * minute);
        let all: usize = minutes.map(|at| lines(&mut logged, at)).sum();
        assert!(all <= THINGS_MAX && logged.logged.len() == THINGS_MAX, "{all}");
    }
}
