//! The common parts of the commands `doctor` of both programs: a [`Finding`] for each check, and the output.
//!
//! Each program gathers facts, in its room `cli`, and evaluates them without IO, in its room `doctor`. The checks that
//! both make are here: [`files`], [`bus`], [`clock`], [`config`]; and the code that gathers facts for them: [`access`],
//! [`identity`], [`sockets`].
//!
//! No task. Previous stop: the command `doctor` in the program's `cli` room; next stop: the terminal.

pub mod access;
mod acl;
pub mod bus;
pub mod clock;
pub mod config_files;
pub mod files;
pub mod identity;
pub mod sockets;

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use crate::Config;
use crate::config::{ConfigError, ConfigProblem, NeededBy};
use crate::style::{Colour, Style};

/// The exit code where there are warnings only.
const WARNINGS: u8 = 1;
/// The exit code where something fails.
const FAILURES: u8 = 3;

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// No problem.
    Ok,
    /// The operator should check it.
    Warn,
    /// Routers are not served, or will not be.
    Fail,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its severity.
    pub level: Level,
    /// The subject of the check, such as `wg-welt` or `clock`.
    pub subject: String,
    /// The observation.
    pub found: String,
    /// The remedy; none without a problem.
    pub advice: Option<String>,
}

/// A problem and its remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckProblem {
    /// The problem.
    pub found: String,
    /// The remedy.
    pub advice: String,
}

/// The program that is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The broker.
    Broker,
    /// The worker.
    Worker,
}

impl Program {
    /// Whether it does not start without a file that these programs need.
    #[must_use]
    pub fn needs(self, needed_by: NeededBy) -> bool {
        match needed_by {
            NeededBy::Broker => self == Self::Broker,
            NeededBy::Both => true,
            NeededBy::None => false,
        }
    }

    /// The program's name in a sentence.
    fn word(self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::Worker => "worker",
        }
    }

    /// The key of the config with the address on which it answers.
    fn listen(self) -> &'static str {
        match self {
            Self::Broker => "broker_listen",
            Self::Worker => "worker_listen",
        }
    }

    /// The settings that name its user, as shown in advice.
    fn user(self) -> &'static str {
        match self {
            Self::Broker => "User= of its unit; --user NAME checks for another one",
            Self::Worker => "User= of its unit, or worker_user; --user NAME checks for another one",
        }
    }
}

impl CheckProblem {
    /// A problem and its remedy.
    #[must_use]
    pub fn new(found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { found: found.into(), advice: advice.into() }
    }
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }

    fn colour(self) -> Colour {
        match self {
            Self::Ok => Colour::Good,
            Self::Warn => Colour::Odd,
            Self::Fail => Colour::Bad,
        }
    }
}

impl Finding {
    /// A finding without a problem.
    #[must_use]
    pub fn ok(subject: &str, found: impl Into<String>) -> Self {
        Self { level: Level::Ok, subject: subject.into(), found: found.into(), advice: None }
    }

    /// A warning.
    #[must_use]
    pub fn warn(subject: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warn, subject: subject.into(), found: found.into(), advice: Some(advice.into()) }
    }

    /// A failure.
    #[must_use]
    pub fn fail(subject: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Fail, ..Self::warn(subject, found, advice) }
    }

    /// A finding without a problem if `problem` is none, else that.
    #[must_use]
    pub fn judge(subject: &str, level: Level, ok: impl Into<String>, problem: Option<CheckProblem>) -> Self {
        match problem {
            None => Self::ok(subject, ok),
            Some(CheckProblem { found, advice }) => Self { level, ..Self::warn(subject, found, advice) },
        }
    }
}

/// The finding for a valid config, with its warnings.
#[must_use]
pub fn config(odd: &[ConfigProblem]) -> Vec<Finding> {
    let mut findings = vec![Finding::ok("config", "it is valid")];
    findings.extend(warnings(odd));
    findings
}

/// The command `doctor`: prints the findings of `check` for the config in `file`, and returns the exit code: 0 if there
/// is no problem, 1 if there are warnings, 3 if something fails, or if the checks cannot be made.
#[must_use]
pub fn run(
    file: Option<&Path>,
    is_json: bool,
    check: impl FnOnce(&Config) -> anyhow::Result<Vec<Finding>>,
) -> ExitCode {
    let checked = match Config::load(file) {
        Err(error) => Ok(invalid_config(&error)),
        Ok(config) => check(&config),
    };
    let findings = checked.unwrap_or_else(|error| {
        let advice = "run the doctor as root, and look at the system's log";
        vec![Finding::fail("doctor", format!("the checks cannot be made: {error:#}"), advice)]
    });
    conclude(&findings, is_json)
}

/// The finding for an invalid config, without which nothing else can be checked.
fn invalid_config(error: &ConfigError) -> Vec<Finding> {
    let finding = |mistake: &ConfigProblem| {
        let advice = if mistake.is_denied() {
            "run the doctor as root, or as the user of the program; if it is that user, let it read the file (chown, chmod)"
        } else {
            "correct it: wgkex.yaml.example describes every key"
        };
        Finding::fail("config", mistake.to_string(), advice)
    };
    let mut findings: Vec<_> = error.mistakes.iter().map(finding).collect();
    findings.extend(warnings(&error.warnings));
    findings
}

fn warnings(warnings: &[ConfigProblem]) -> impl Iterator<Item = Finding> {
    let advice = "correct it, or take it out";
    warnings.iter().map(move |warning| Finding::warn("config", warning.to_string(), advice))
}

/// The highest severity.
#[must_use]
pub fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

/// One line for each finding, and a summary.
#[must_use]
pub fn report(findings: &[Finding], style: Style) -> String {
    let mut report = String::new();
    for Finding { level, subject, found, advice } in findings {
        let word = style.paint(level.colour(), &format!("{:<4}", level.word()));
        let advice = advice.as_ref().map_or_else(String::new, |advice| format!("; {advice}"));
        let _ = writeln!(report, "{word} {subject}: {found}{advice}");
    }
    let number = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (checks, warnings, failures) = (findings.len(), number(Level::Warn), number(Level::Fail));
    let _ = writeln!(report, "checks: {checks}, warnings: {warnings}, failures: {failures}");
    report
}

fn conclude(findings: &[Finding], is_json: bool) -> ExitCode {
    let text = if is_json {
        format!("{:#}\n", json!({ "worst": worst(findings), "findings": findings }))
    } else {
        report(findings, Style::of_stdout())
    };
    let mut out = io::stdout().lock();
    match (out.write_all(text.as_bytes()).and_then(|()| out.flush()), worst(findings)) {
        (Err(_), _) | (Ok(()), Level::Fail) => FAILURES.into(),
        (Ok(()), Level::Warn) => WARNINGS.into(),
        (Ok(()), Level::Ok) => ExitCode::SUCCESS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_that_may_not_be_read_is_no_mistake_in_it() {
        let problem = |problem: &str| {
            let mistakes = vec![ConfigProblem { file: None, line: None, key: None, problem: problem.into() }];
            invalid_config(&ConfigError { mistakes, warnings: Vec::new() }).remove(0).advice.unwrap()
        };
        assert!(problem("cannot be read: Permission denied (os error 13)").contains("as root"));
        assert!(problem("/f: cannot be read: Permission denied (os error 13)").contains("as root"));
        assert!(problem("must be a mapping").contains("correct it"));
    }

    #[test]
    fn checks_that_cannot_be_made_end_like_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("wgkex.yaml");
        std::fs::write(&file, "domains: [ff_a]\ndomain_prefixes: [ff_]\n").unwrap();
        assert_eq!(run(Some(&file), false, |_| Ok(vec![Finding::ok("x", "it is well")])), ExitCode::SUCCESS);
        assert_eq!(run(Some(&file), false, |_| anyhow::bail!("netlink")), FAILURES.into());
    }
}
