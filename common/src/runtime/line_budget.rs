//! A limit of the log lines per minute about one object, such as a gateway, that others can cause. No IO, no clock.

use std::time::{Duration, Instant};

/// The most lines about one object in each period.
const LINES_MAX: u32 = 10;
const PERIOD_OF_LINES: Duration = Duration::from_secs(60);

/// The lines about one object in this period.
#[derive(Debug)]
pub struct LineBudget {
    since: Instant,
    lines: u32,
}

impl LineBudget {
    /// No line yet in a period that begins now.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { since: now, lines: 0 }
    }

    /// Whether the period is over.
    #[must_use]
    pub fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= PERIOD_OF_LINES
    }

    /// Begins another period if this one is over.
    pub fn renew(&mut self, now: Instant) {
        if self.is_over(now) {
            *self = Self::new(now);
        }
    }

    /// Whether the limit of this period is reached.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.lines >= LINES_MAX
    }

    /// Counts a line.
    pub fn spend(&mut self) {
        self.lines += 1;
    }
}
