//! The drain of a gateway, as in its hello and in the files of drains.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::time_text::utc;

/// The default portion of a minute.
const DEFAULT_PERCENT: u8 = 10;

/// A gateway gets no new routers. Times are seconds of Unix time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// When it began.
    pub since: u64,
    /// When it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// The reason; shown to operators only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When the gateway's worker begins to remove its peers, and how fast; none for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Deadline>,
}

/// When the worker of a draining gateway begins to remove its peers, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    /// When, in seconds of Unix time.
    pub at: u64,
    /// The most peers to remove in a minute, in percent of those at the deadline.
    pub percent: Percent,
    /// Whether it is over by the clock of the gateway, which publishes that. Always false in a file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_over: bool,
}

/// A percentage, from 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Percent(u8);

/// A number that is no [`Percent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("percent: is not a portion for each minute, 1 to 100 is allowed")]
pub struct InvalidPercent;

impl TryFrom<u8> for Percent {
    type Error = InvalidPercent;

    fn try_from(percent: u8) -> Result<Self, InvalidPercent> {
        if (1..=100).contains(&percent) { Ok(Self(percent)) } else { Err(InvalidPercent) }
    }
}

impl From<Percent> for u8 {
    fn from(Percent(percent): Percent) -> Self {
        percent
    }
}

impl Default for Percent {
    fn default() -> Self {
        Self(DEFAULT_PERCENT)
    }
}

impl Drain {
    /// Whether it has ended by itself.
    #[must_use]
    pub fn is_over(&self, now: u64) -> bool {
        self.until.is_some_and(|until| until <= now)
    }

    /// This drain at `now` by the clock of its gateway, which decides whether the deadline is over.
    #[must_use]
    pub fn at(self, now: u64) -> Self {
        let deadline = self.deadline.map(|deadline| Deadline { is_over: deadline.at <= now, ..deadline });
        Self { deadline, ..self }
    }

    /// The deadline, if it is over.
    #[must_use]
    pub fn passed_deadline(&self) -> Option<Deadline> {
        self.deadline.filter(|deadline| deadline.is_over)
    }
}

/// Formats it as `since 2026-11-30T06:00:00Z, until 2026-11-30T08:00:00Z, peers are removed from 2026-11-30T07:00:00Z
/// on, 10 % a minute: kernel update`. The reason may be untrusted text.
impl fmt::Display for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "since {}", utc(self.since))?;
        if let Some(until) = self.until {
            write!(f, ", until {}", utc(until))?;
        }
        if let Some(deadline) = self.deadline {
            write!(f, ", {deadline}")?;
        }
        match &self.reason {
            Some(reason) => write!(f, ": {}", reason.replace(char::is_control, "?")),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, Percent(percent)) = (utc(self.at), self.percent);
        if self.is_over {
            write!(f, "peers are being removed since {at}, {percent} % a minute")
        } else {
            write!(f, "peers are removed from {at} on, {percent} % a minute")
        }
    }
}
