//! What is wrong or odd with a config, by file, line and key.

use std::{fmt, io};

use serde::Serialize;

/// What the text of a problem has where a file cannot be read; the error follows.
pub(super) const UNREAD: &str = "cannot be read";
/// The same where there is no config.
pub(super) const ABSENT: &str = "does not exist; write it";
/// The same where the file of a password has none.
pub(super) const NO_PASSWORD: &str = "must have one line, the password";

/// One thing that is wrong or odd with a config. It shows no secret, and its text is one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file; none if it is not about one.
    pub file: Option<String>,
    /// The line in it, from 1: of the key, or of the nearest mapping around a key that is missing.
    pub line: Option<usize>,
    /// The key, such as `mqtt.broker_port`, or the variable; none for the source as a whole.
    pub key: Option<String>,
    /// What is wrong, and what is allowed.
    pub problem: String,
}

impl Problem {
    /// About no file and no key.
    pub(super) fn other(problem: String) -> Self {
        Self { file: None, line: None, key: None, problem }
    }

    /// Whether it is only that who reads this may not.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.problem.contains(&format!("{UNREAD}: {}", io::Error::from(nix::errno::Errno::EACCES)))
    }

    /// Whether it may go without a change of the config: a file that another program mounts, writes or opens later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        [UNREAD, ABSENT, NO_PASSWORD].iter().any(|text| self.problem.contains(text))
    }
}

impl fmt::Display for Problem {
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
