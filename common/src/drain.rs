//! Drains: a gateway that drains gets no new routers, and keeps those that it has.
//!
//! A worker keeps its own drain in a file that `wgkex-worker drain` writes, and publishes it in its
//! [`Hello`](crate::wire::message::Hello); a broker keeps those that its operator asked for. No clock: `now` is passed in.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::access_lists::parse;
use crate::storage::{StorageError, json_file};

/// The version of the worker's file.
const LAYOUT: u32 = 1;

/// That a gateway gets no new routers. Times are seconds of Unix time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Since when.
    pub since: u64,
    /// When it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// Why; shown to operators only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a mistake in a command or a call is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidDrain(String);

impl Drain {
    /// One that begins `now`, with a reason of one short line, for a duration such as `30m` or `12h`.
    pub fn begin(reason: Option<&str>, lasts: Option<&str>, now: u64) -> Result<Self, InvalidDrain> {
        let reason = reason.map(|reason| parse::text("reason", reason)).transpose().map_err(InvalidDrain)?;
        let seconds = |text| {
            parse::duration(text).ok_or_else(|| {
                InvalidDrain("for: is not a duration, one as 30m, 12h or 7d of at most ten years is allowed".into())
            })
        };
        let until = lasts.map(seconds).transpose()?.map(|lasts| now.saturating_add(lasts));
        Ok(Self { since: now, until, reason })
    }

    /// Whether it has ended by itself.
    #[must_use]
    pub fn is_over(&self, now: u64) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// As `since 2026-11-30T06:00:00Z, until 2026-11-30T08:00:00Z: kernel update`. The reason may be a stranger's text.
impl fmt::Display for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "since {}", parse::utc(self.since))?;
        if let Some(until) = self.until {
            write!(f, ", until {}", parse::utc(until))?;
        }
        match &self.reason {
            Some(reason) => write!(f, ": {}", reason.replace(char::is_control, "?")),
            None => Ok(()),
        }
    }
}

/// The content of the worker's file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    #[serde(default)]
    drain: Option<Drain>,
}

/// The worker's file in `state_dir`.
#[must_use]
pub fn worker_file(state_dir: &Path) -> PathBuf {
    state_dir.join("worker.drain.json")
}

/// The drain in the worker's file; none if there is no file, or one without a drain.
pub fn read(file: &Path) -> Result<Option<Drain>, StorageError> {
    Ok(json_file::read::<Kept>(file, LAYOUT)?.unwrap_or_default().drain)
}

/// Writes the worker's file, and returns when it is on the disk.
pub fn save(file: &Path, drain: Option<Drain>) -> Result<(), StorageError> {
    json_file::save(file, LAYOUT, Kept { drain })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_is_read_from_words_and_ends_by_itself() {
        let drain = Drain::begin(Some("kernel"), Some("2m"), 1_000).unwrap();
        assert_eq!(drain, Drain { since: 1_000, until: Some(1_120), reason: Some("kernel".into()) });
        assert_eq!([1_000, 1_119, 1_120, u64::MAX].map(|now| drain.is_over(now)), [false, false, true, true]);
        assert!(!Drain::begin(None, None, 0).unwrap().is_over(u64::MAX), "for good");
        for (reason, lasts) in [(Some("a\nb"), None), (Some(&*"x".repeat(201)), None), (None, Some("soon"))] {
            let error = Drain::begin(reason, lasts, 0).unwrap_err().to_string();
            assert!(error.starts_with(if reason.is_some() { "reason: " } else { "for: " }), "{error}");
        }
        let drain = Drain { reason: Some("a\u{1b}[2J".into()), ..drain };
        assert_eq!(drain.to_string(), "since 1970-01-01T00:16:40Z, until 1970-01-01T00:18:40Z: a?[2J");
    }

    #[test]
    fn the_workers_file_keeps_it_with_a_version() {
        let dir = tempfile::tempdir().unwrap();
        let file = worker_file(dir.path());
        assert_eq!(read(&file).unwrap(), None);
        let drain = Drain { since: 7, until: None, reason: None };
        save(&file, Some(drain.clone())).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), r#"{"layout":1,"drain":{"since":7}}"#);
        assert_eq!(read(&file).unwrap(), Some(drain));
        save(&file, None).unwrap();
        assert_eq!(read(&file).unwrap(), None);
        for text in ["{", r#"{"layout":2}"#, r#"{"layout":1,"drain":{"since":"x"}}"#] {
            std::fs::write(&file, text).unwrap();
            assert!(read(&file).is_err() && file.exists(), "{text}");
        }
    }
}
