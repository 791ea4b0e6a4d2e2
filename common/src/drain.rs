//! The origin of a [`Drain`]: a draining gateway gets no new routers, and keeps those that it has; past a deadline its
//! worker removes their peers, a portion each minute.
//!
//! A worker keeps its own drain in a file that `wgkex-worker drain` writes, and publishes it in its
//! [`Hello`](crate::wire::message::Hello); a broker keeps those that its operator requested, which have no deadline. No
//! clock, no task: `now` is passed in.
//!
//! Previous stops: the command `drain` of the worker, and the admin call of the broker. Next stops: the worker's `drain`, which
//! reads the file, and the broker's `fleet`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::storage::versions::StateFile;
use crate::storage::{StorageError, json_file};
use crate::time_text;
use crate::wire::drain::{Deadline, Drain, InvalidPercent, Percent};

/// The version of the worker's file.
const LAYOUT: u32 = 1;
/// The worker's file in `state_dir`.
pub const WORKER_FILE: StateFile = StateFile::json("worker.drain.json", LAYOUT);

/// The parameters of a command or a call. Durations are such as `30m` or `12h`.
#[derive(Debug, Clone, Copy, Default)]
pub struct DrainRequest<'a> {
    /// The reason, in one short line.
    pub reason: Option<&'a str>,
    /// The duration; none for no end.
    pub lasts: Option<&'a str>,
    /// The time until peers are removed; none for never.
    pub deadline: Option<&'a str>,
    /// The most peers to remove in a minute, in percent.
    pub percent: Option<u8>,
}

/// The error message for a mistake in a command or a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidDrain(String);

impl From<InvalidPercent> for InvalidDrain {
    fn from(error: InvalidPercent) -> Self {
        Self(error.to_string())
    }
}

impl Drain {
    /// A drain that begins `now`. The error names the field and the requirement.
    pub fn begin(request: DrainRequest<'_>, now: u64) -> Result<Self, InvalidDrain> {
        let DrainRequest { reason, lasts, deadline, percent } = request;
        let reason = reason.map(|reason| time_text::text("reason", reason)).transpose().map_err(InvalidDrain)?;
        let until = lasts.map(|text| after("for", text, now)).transpose()?;
        let percent = percent.map(Percent::try_from).transpose()?;
        let deadline = match deadline {
            None if percent.is_some() => {
                return Err(InvalidDrain(
                    "percent: has no effect without a deadline, which is to be given, too".into(),
                ));
            }
            None => None,
            Some(text) => {
                let at = after("deadline", text, now)?;
                Some(Deadline { at, percent: percent.unwrap_or_default(), is_over: false })
            }
        };
        if deadline.is_some_and(|deadline| until.is_some_and(|until| until <= deadline.at)) {
            return Err(InvalidDrain("deadline: the drain ends before it (for), a shorter duration is allowed".into()));
        }
        Ok(Self { since: now, until, reason, deadline })
    }
}

/// The time so long after `now`.
fn after(field: &str, duration: &str, now: u64) -> Result<u64, InvalidDrain> {
    let seconds = time_text::duration(duration).ok_or_else(|| {
        InvalidDrain(format!("{field}: is not a duration, one as 30m, 12h or 7d of at most ten years is allowed"))
    })?;
    Ok(now.saturating_add(seconds))
}

/// The content of the worker's file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct StoredDrain {
    #[serde(default)]
    drain: Option<Drain>,
}

/// The worker's file in `state_dir`.
#[must_use]
pub fn worker_file(state_dir: &Path) -> PathBuf {
    WORKER_FILE.path(state_dir)
}

/// The drain in the worker's file; none if there is no file, or one without a drain.
pub fn read(file: &Path) -> Result<Option<Drain>, StorageError> {
    Ok(json_file::read::<StoredDrain>(file, LAYOUT)?.unwrap_or_default().drain)
}

/// Writes the worker's file, and returns when it is on the disk.
pub fn save(file: &Path, drain: Option<Drain>) -> Result<(), StorageError> {
    json_file::save(file, LAYOUT, StoredDrain { drain })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_is_read_from_words_and_ends_by_itself() {
        let request = DrainRequest { reason: Some("kernel"), lasts: Some("2m"), ..DrainRequest::default() };
        let drain = Drain::begin(request, 1_000).unwrap();
        let expected = Drain { since: 1_000, until: Some(1_120), reason: Some("kernel".into()), deadline: None };
        assert_eq!(drain, expected);
        assert_eq!([1_000, 1_119, 1_120, u64::MAX].map(|now| drain.is_over(now)), [false, false, true, true]);
        assert!(!Drain::begin(DrainRequest::default(), 0).unwrap().is_over(u64::MAX), "for good");
        let drain = Drain { reason: Some("a\u{1b}[2J".into()), ..drain };
        assert_eq!(drain.to_string(), "since 1970-01-01T00:16:40Z, until 1970-01-01T00:18:40Z: a?[2J");
    }

    #[test]
    fn a_deadline_is_over_by_the_clock_that_is_asked() {
        let request = DrainRequest { lasts: Some("2h"), deadline: Some("1m"), ..DrainRequest::default() };
        let drain = Drain::begin(request, 0).unwrap();
        assert_eq!(drain.passed_deadline(), None);
        assert_eq!(
            drain.to_string(),
            "since 1970-01-01T00:00:00Z, until 1970-01-01T02:00:00Z, peers are removed from 1970-01-01T00:01:00Z on, \
             10 % a minute"
        );
        assert_eq!(drain.clone().at(59).passed_deadline(), None);
        let over = drain.clone().at(60);
        assert_eq!(
            over.passed_deadline(),
            Some(Deadline { at: 60, percent: Percent::try_from(10).unwrap(), is_over: true })
        );
        assert!(over.to_string().ends_with(", peers are being removed since 1970-01-01T00:01:00Z, 10 % a minute"));
        assert_eq!(over.at(59), drain, "a clock that is set back");
    }

    #[test]
    fn each_mistake_names_its_field() {
        let none = DrainRequest::default();
        let long = "x".repeat(201);
        for (request, field) in [
            (DrainRequest { reason: Some("a\nb"), ..none }, "reason: "),
            (DrainRequest { reason: Some(&long), ..none }, "reason: "),
            (DrainRequest { lasts: Some("soon"), ..none }, "for: "),
            (DrainRequest { deadline: Some("soon"), ..none }, "deadline: "),
            (DrainRequest { deadline: Some("1h"), lasts: Some("60m"), ..none }, "deadline: "),
            (DrainRequest { percent: Some(5), ..none }, "percent: "),
            (DrainRequest { deadline: Some("1h"), percent: Some(0), ..none }, "percent: "),
            (DrainRequest { deadline: Some("1h"), percent: Some(101), ..none }, "percent: "),
        ] {
            let error = Drain::begin(request, 0).unwrap_err().to_string();
            assert!(error.starts_with(field) && error.contains("allowed") | error.contains("given"), "{error}");
        }
    }

    #[test]
    fn the_workers_file_keeps_it_with_a_version() {
        let dir = tempfile::tempdir().unwrap();
        let file = worker_file(dir.path());
        assert_eq!(read(&file).unwrap(), None);
        let drain = Drain { since: 7, until: None, reason: None, deadline: None };
        save(&file, Some(drain.clone())).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), r#"{"layout":1,"drain":{"since":7}}"#);
        assert_eq!(read(&file).unwrap(), Some(drain.clone()));
        let deadline = Some(Deadline { at: 9, percent: Percent::try_from(25).unwrap(), is_over: false });
        save(&file, Some(Drain { deadline, ..drain })).unwrap();
        let text = r#"{"layout":1,"drain":{"since":7,"deadline":{"at":9,"percent":25}}}"#;
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        assert_eq!(read(&file).unwrap().unwrap().deadline, deadline);
        save(&file, None).unwrap();
        assert_eq!(read(&file).unwrap(), None);
        for text in [
            "{",
            r#"{"layout":2}"#,
            r#"{"layout":1,"drain":{"since":"x"}}"#,
            r#"{"layout":1,"drain":{"since":7,"deadline":{"at":9,"percent":0}}}"#,
        ] {
            std::fs::write(&file, text).unwrap();
            assert!(read(&file).is_err() && file.exists(), "{text}");
        }
    }
}
