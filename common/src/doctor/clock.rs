//! Whether the clock is right: the expiry of list entries and certificates depends on it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Finding, Level, Program};
use crate::peer_clock::Difference;

/// The difference in seconds above which there is a warning.
const CLOCK_ODD_MIN: Duration = Duration::from_secs(5);
/// The difference in seconds above which the expiry of list entries and certificates is wrong.
const CLOCK_WRONG_MIN: Duration = Duration::from_secs(3600);

const SUBJECT: &str = "clock";
const SYNCHRONISE: &str = "synchronise it: `timedatectl set-ntp true`, or chrony";

/// The clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClockFacts {
    /// The brokers whose clock differs, as the running worker measured it by their hellos, by name.
    pub brokers: BTreeMap<String, Difference>,
    /// The difference from the clock of the named HTTP server; or why that is not known.
    pub server: Option<Result<Duration, String>>,
    /// Whether it is synchronised, as reported by the system; none without a report.
    pub is_synchronised: Option<bool>,
}

/// Whether the clock is synchronised, as reported by the system.
#[must_use]
pub fn is_synchronised() -> Option<bool> {
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return Some(true);
    }
    let mut command = Command::new("timedatectl");
    command.args(["show", "--property=NTPSynchronized", "--value"]).stdin(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    match output.stdout.trim_ascii() {
        b"yes" => Some(true),
        b"no" => Some(false),
        _ => None,
    }
}

/// The report, as text.
#[must_use]
pub fn clock(program: Program, facts: &ClockFacts) -> Finding {
    if let Some((broker, difference)) = facts.brokers.iter().max_by_key(|(_, difference)| difference.seconds()) {
        let level = if difference.seconds() >= CLOCK_WRONG_MIN.as_secs() { Level::Fail } else { Level::Warn };
        let found = format!("that of broker {broker} is {difference} this machine's: one of the two is wrong");
        return Finding { level, ..Finding::warn(SUBJECT, found, format!("on both machines: {SYNCHRONISE}")) };
    }
    let away = |off: &Duration| format!("it is {} s away from that of the HTTP server", off.as_secs());
    match (&facts.server, facts.is_synchronised) {
        (Some(Ok(off)), _) if *off >= CLOCK_WRONG_MIN => Finding::fail(SUBJECT, away(off), SYNCHRONISE),
        (Some(Ok(off)), _) if *off > CLOCK_ODD_MIN => Finding::warn(SUBJECT, away(off), SYNCHRONISE),
        (Some(Err(error)), _) => Finding::warn(
            SUBJECT,
            format!("it cannot be compared: {error}"),
            "name another --broker-url, such as http://HOST:5000",
        ),
        (_, Some(false)) => Finding::warn(SUBJECT, "it is not synchronised", SYNCHRONISE),
        (Some(Ok(_)), _) => Finding::ok(SUBJECT, "it is that of the HTTP server"),
        (None, Some(true)) => Finding::ok(SUBJECT, "it is synchronised"),
        (None, None) => {
            let compare = match program {
                Program::Worker => "compare it with that of the broker: --broker-url http://HOST:5000",
                Program::Broker => "compare it with another one, as `chronyc tracking` does",
            };
            Finding::warn(SUBJECT, "the system does not report whether it is synchronised", compare)
        }
    }
}
