//! An error or warning about a config, with file, line and key.

use std::{fmt, io};

use serde::Serialize;

/// The text of a problem if a file cannot be read; the error follows.
pub(super) const UNREAD: &str = "cannot be read";
/// The same if there is no config.
pub(super) const CONFIG_ABSENT: &str = "does not exist; write it";
/// The same if the file of a password has no password.
pub(super) const NO_PASSWORD: &str = "must have one line, the password";

/// An error or warning about a config. It shows no secret, and its text is one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfigProblem {
    /// The file; none if it is not about one.
    pub file: Option<String>,
    /// The line in it, from 1: of the key, or of the nearest mapping around a key that is missing.
    pub line: Option<usize>,
    /// The key, such as `mqtt.broker_port`, or the variable; none for the source as a whole.
    pub key: Option<String>,
    /// The problem, and the allowed values.
    pub problem: String,
}

impl ConfigProblem {
    /// About no file and no key.
    pub(super) fn other(problem: String) -> Self {
        Self { file: None, line: None, key: None, problem }
    }

    /// Whether the only problem is that the caller may not read the file.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.problem.contains(&format!("{UNREAD}: {}", io::Error::from(nix::errno::Errno::EACCES)))
    }

    /// Whether it may be solved without a change of the config: another program may mount, write or open a file later.
    #[must_use]
    pub fn may_resolve_itself(&self) -> bool {
        [UNREAD, CONFIG_ABSENT, NO_PASSWORD].iter().any(|text| self.problem.contains(text))
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{file}:")?;
            if let Some(line) = self.line {
                write!(f, "{line}:")?;
            }
            f.write_str(" ")?;
        }
        if let Some(key) = &self.key {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.problem)
    }
}
