//! When a domain's tables are read next, and whether that read also sweeps. Pure: `now` is passed in.

use std::time::{Duration, Instant};

use crate::peers::Policy;

/// Link events come in bursts: after a read, they are collected for at least this long.
const READ_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// The first pause after a failure; each further one doubles it.
const RETRY_MIN: Duration = Duration::from_secs(1);

/// When one domain is read, and when its stale peers are swept.
#[derive(Debug)]
pub struct Schedule {
    count: Duration,
    interval: Duration,
    read_at: Instant,
    sweep_at: Instant,
    /// The earliest read after a link event: at most half of the time is spent on reading.
    settled_at: Instant,
    failures: u32,
}

impl Schedule {
    /// The first read is due at once, the first sweep after an interval.
    #[must_use]
    pub fn new(policy: &Policy, now: Instant) -> Self {
        Self {
            count: policy.read_interval,
            interval: policy.sweep_interval,
            read_at: now,
            sweep_at: now + policy.sweep_interval,
            settled_at: now,
            failures: 0,
        }
    }

    /// When the next read is due.
    #[must_use]
    pub fn read_at(&self) -> Instant {
        self.read_at
    }

    /// The links may have changed: reads at once, or at the end of the pause after the last read.
    pub fn expedite(&mut self, now: Instant) {
        self.read_at = self.read_at.min(now.max(self.settled_at));
    }

    /// A read that began at `now` has ended, with or without success, after `took`.
    pub fn read(&mut self, now: Instant, took: Duration) {
        self.read_at = now + took + self.count;
        self.settled_at = now + took + took.max(READ_INTERVAL_MIN);
    }

    /// Whether a sweep of the stale peers is due.
    #[must_use]
    pub fn is_sweep_due(&self, now: Instant) -> bool {
        now >= self.sweep_at
    }

    /// A sweep is done; if it left `more` stale peers, the next one is due at once.
    pub fn swept(&mut self, now: Instant, more: bool) {
        self.sweep_at = if more { now } else { now + self.interval };
    }

    /// A read succeeded: the next one is no later than the next sweep.
    pub fn on_success(&mut self) {
        self.read_at = self.read_at.min(self.sweep_at);
    }

    /// A read or a change failed: the next read follows after a pause that doubles with each failure, at the latest at
    /// its regular time.
    pub fn on_failure(&mut self, now: Instant) {
        let pause = RETRY_MIN * 2_u32.pow(self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        self.read_at = self.read_at.min(now + pause);
    }

    /// The backlog is empty: the next failure starts with the shortest pause.
    pub fn recovered(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_read_is_at_once_and_the_next_after_the_count_interval() {
        let (mut schedule, start) = schedule();
        assert_eq!(schedule.read_at(), start);
        good_read(&mut schedule, start, SECOND);
        assert_eq!(schedule.read_at(), start + SECOND + count());
    }

    #[test]
    fn a_burst_of_link_events_is_one_read_at_once_and_one_when_it_has_settled() {
        let (mut schedule, start) = schedule();
        good_read(&mut schedule, start, Duration::ZERO);
        let event = start + 10 * SECOND;
        schedule.expedite(event);
        assert_eq!(schedule.read_at(), event);
        good_read(&mut schedule, event, Duration::ZERO);
        schedule.expedite(event);
        schedule.expedite(event + READ_INTERVAL_MIN / 2);
        assert_eq!(schedule.read_at(), event + READ_INTERVAL_MIN);
    }

    #[test]
    fn a_slow_kernel_is_read_at_most_half_of_the_time() {
        let (mut schedule, start) = schedule();
        good_read(&mut schedule, start, 10 * SECOND);
        schedule.expedite(start + 10 * SECOND);
        assert_eq!(schedule.read_at(), start + 20 * SECOND);
    }

    #[test]
    fn failures_are_retried_with_growing_pauses_up_to_the_count_interval() {
        let (mut schedule, start) = schedule();
        for pause in [1, 2, 4, 8, 16, 32].map(|seconds| seconds * SECOND).into_iter().chain([count(); 2]) {
            schedule.read(start, Duration::ZERO);
            schedule.on_failure(start);
            assert_eq!(schedule.read_at(), start + pause);
        }
        schedule.recovered();
        schedule.on_failure(start);
        assert_eq!(schedule.read_at(), start + SECOND);
    }

    #[test]
    fn a_sweep_waits_for_a_good_read() {
        let policy = Policy { sweep_interval: 90 * SECOND, ..Policy::default() };
        let start = Instant::now();
        let mut schedule = Schedule::new(&policy, start);
        good_read(&mut schedule, start, Duration::ZERO);
        good_read(&mut schedule, start + 60 * SECOND, Duration::ZERO);
        let due = start + 90 * SECOND;
        assert_eq!(schedule.read_at(), due);
        assert!(schedule.is_sweep_due(due) && !schedule.is_sweep_due(start + 89 * SECOND));

        schedule.read(due, Duration::ZERO);
        schedule.on_failure(due);
        assert_eq!(schedule.read_at(), due + SECOND);
        assert!(schedule.is_sweep_due(due + SECOND));
    }

    #[test]
    fn a_sweep_with_too_many_peers_continues_at_once() {
        let (mut schedule, start) = schedule();
        let due = start + Policy::default().sweep_interval;
        for (more, next) in [(true, due), (false, due + count())] {
            schedule.read(due, Duration::ZERO);
            schedule.swept(due, more);
            schedule.on_success();
            assert_eq!(schedule.read_at(), next);
        }
        assert!(!schedule.is_sweep_due(due));
    }

    fn count() -> Duration {
        Policy::default().read_interval
    }

    fn schedule() -> (Schedule, Instant) {
        let start = Instant::now();
        (Schedule::new(&Policy::default(), start), start)
    }

    fn good_read(schedule: &mut Schedule, now: Instant, took: Duration) {
        schedule.read(now, took);
        schedule.on_success();
    }
}
