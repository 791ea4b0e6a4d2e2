//! `doctor`: what is wrong with a gateway, and what to do about it. No IO: [`crate::cli::doctor`] gathers [`Facts`], and
//! [`findings`] decides about them.
//!
//! Each room of checks is a file: [`interfaces`], [`machine`], [`bus`], [`files`].

mod bus;
pub mod facts;
mod files;
mod interfaces;
mod machine;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use serde::Serialize;
use wgkex_common::config::ConfigError;

use self::facts::Facts;
use crate::status::{Colour, Style};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// It is as it should be.
    Ok,
    /// Somebody should look.
    Warn,
    /// Routers are not served, or will not be.
    Fail,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was looked at, as `wg-welt` or `clock`.
    pub subject: String,
    /// What was found.
    pub found: String,
    /// What to do; none if it is as it should be.
    pub advice: Option<String>,
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
    fn ok(subject: &str, found: impl Into<String>) -> Self {
        Self { level: Level::Ok, subject: subject.into(), found: found.into(), advice: None }
    }

    fn warn(subject: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Warn, subject: subject.into(), found: found.into(), advice: Some(advice.into()) }
    }

    fn fail(subject: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level: Level::Fail, ..Self::warn(subject, found, advice) }
    }

    /// `ok` if `trouble` is none, else that, with what to do.
    fn judge(subject: &str, level: Level, ok: impl Into<String>, trouble: Option<(String, String)>) -> Self {
        match trouble {
            None => Self::ok(subject, ok),
            Some((found, advice)) => Self { level, ..Self::warn(subject, found, advice) },
        }
    }
}

/// What every check finds, in the order in which one would look.
#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = machine::config(&facts.config_warnings);
    findings.push(machine::capability(facts.has_net_admin));
    findings.push(machine::wireguard(facts));
    for domain in &facts.domains {
        findings.extend(interfaces::domain(domain, facts.is_setup_named));
    }
    findings.extend(machine::managers(&facts.managers));
    findings.push(machine::clock(&facts.clock));
    findings.extend(files::state(facts));
    findings.extend(files::lists(facts));
    findings.extend(bus::mqtt(facts));
    findings
}

/// What is wrong with a config by which nothing else can be checked.
#[must_use]
pub fn invalid_config(error: &ConfigError) -> Vec<Finding> {
    let advice = "correct it: wgkex.yaml.example describes every key";
    let mut findings: Vec<_> =
        error.mistakes.iter().map(|mistake| Finding::fail("config", mistake.to_string(), advice)).collect();
    findings.extend(machine::warnings(&error.warnings));
    findings
}

/// The worst of all.
#[must_use]
pub fn worst(findings: &[Finding]) -> Level {
    findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
}

/// One line for each finding, and one for all.
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
