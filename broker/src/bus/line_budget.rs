//! How many log lines there are about one gateway in a minute, and for how many gateways that is remembered. No IO.

use std::time::{Duration, Instant};

/// The most lines about one gateway in each period.
const MAX_LINES: u32 = 10;
const PERIOD_OF_LINES: Duration = Duration::from_secs(60);
/// The most gateways that are remembered: more than any fleet has.
pub const MAX_LOGGED_GATEWAYS: usize = 4096;

/// The lines about one gateway in this period.
#[derive(Debug)]
pub struct LineBudget {
    since: Instant,
    lines: u32,
}

impl LineBudget {
    /// No line yet in a period that begins now.
    pub fn new(now: Instant) -> Self {
        Self { since: now, lines: 0 }
    }

    /// Whether the period is over.
    pub fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= PERIOD_OF_LINES
    }

    /// Begins another period if this one is over.
    pub fn renew(&mut self, now: Instant) {
        if self.is_over(now) {
            *self = Self::new(now);
        }
    }

    /// Whether there may be no further line in this period.
    pub fn is_spent(&self) -> bool {
        self.lines >= MAX_LINES
    }

    /// Counts a line.
    pub fn spend(&mut self) {
        self.lines += 1;
    }
}
