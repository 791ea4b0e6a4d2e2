//! State that survives a restart, as files in `state_dir`.
//!
//! [`key_store`] stores the live keys of a program; the retained messages of the embedded MQTT server have their table
//! in the broker. Both are databases: [`schema`] migrates them to the current version, [`sqlite`] opens them,
//! [`write_behind`] has one task for each that writes changes of the memory. The records of the access lists are a
//! [`json_file`], which their service writes at once, because an admin call waits for it. [`writes`] serialises the
//! writes to files that several tasks write.
//!
//! Tasks: one for each database, owned by the program's list of services. Previous stop of a key: the broker's `fleet`,
//! the worker's `reconciler`; both load the stored keys at the start.
//!
//! For all files: one of an older version is migrated, one of a newer version prevents the start, before another is
//! migrated ([`versions`]), and stays as it is, a corrupt one is renamed ([`state_file`]), and a failed write is
//! repeated, which is logged once. A database of another running process prevents the start, too ([`process_lock`]).

pub mod json_file;
pub mod key_store;
pub mod process_lock;
pub mod schema;
pub mod sqlite;
pub mod state_file;
pub mod versions;
pub mod write_behind;
pub mod writes;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;
use tracing::{info, warn};

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// It is not a file of its format, or not a complete one.
    #[error("{0}")]
    Corrupt(String),
    /// Its version is unknown to this program, such as a later one. It stays as it is.
    #[error("{0}")]
    UnknownVersion(String),
    /// The disk is full, the directory cannot be written, another process reads the file.
    #[error("{0}")]
    Unavailable(String),
    /// Another process uses it.
    #[error("{0}")]
    InUse(String),
}

impl StorageError {
    /// A value has an unexpected type.
    #[must_use]
    pub fn corrupt_value(error: &rusqlite::Error) -> Self {
        Self::Corrupt(error.to_string())
    }

    /// `file` has the version `found`; the versions up to `known` are supported.
    pub(crate) fn unknown_version(file: &Path, found: impl fmt::Display, is_newer: bool, known: i64) -> Self {
        let (file, what) = (file.display(), if is_newer { "newer than" } else { "not one of" });
        Self::UnknownVersion(format!(
            "{file} has a layout of number {found}, {what} those up to {known} that this version knows: start the version \
             that made it, or move it away; it is left as it is"
        ))
    }
}

impl From<rusqlite::Error> for StorageError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown) => {
                Self::Corrupt(error.to_string())
            }
            Some(ErrorCode::DatabaseBusy) => Self::Unavailable("another process has it".into()),
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

impl From<io::Error> for StorageError {
    fn from(error: io::Error) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// The content of a file, as named in the log.
#[derive(Debug, Clone, Copy)]
pub struct Noun {
    /// A noun, as `state`.
    pub name: &'static str,
    /// Its pronoun, as `it`.
    pub pronoun: &'static str,
}

/// Whether a file can be written. Each change of that is logged once.
#[derive(Debug)]
pub struct Health {
    file: PathBuf,
    noun: Noun,
    is_failing: bool,
}

impl Health {
    /// Nothing has failed yet.
    #[must_use]
    pub fn new(file: PathBuf, noun: Noun) -> Self {
        Self { file, noun, is_failing: false }
    }

    /// The file could not be read, which is logged already.
    #[must_use]
    pub fn unread(file: PathBuf, noun: Noun) -> Self {
        Self { is_failing: true, ..Self::new(file, noun) }
    }

    /// Whether the last attempt failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.is_failing
    }

    /// The file cannot be written, or not be read before that.
    pub fn failed(&mut self, error: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.is_failing, true) {
            let (file, Noun { name, pronoun }) = (self.file.display(), self.noun);
            warn!(%file, failure = %error, "{name} cannot be kept, a restart would lose {pronoun}");
        }
    }

    /// The file was written.
    pub fn succeeded(&mut self) {
        if std::mem::take(&mut self.is_failing) {
            let (file, verb) = (self.file.display(), if self.noun.pronoun == "it" { "is" } else { "are" });
            info!(%file, "{} {verb} kept again", self.noun.name);
        }
    }
}
