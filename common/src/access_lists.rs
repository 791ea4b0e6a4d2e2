//! Which keys are admitted: keys can be denied, allowed or trusted. The entries are read from files of this machine
//! (`files.rs`, `parse.rs`), and from records of admin calls, which all brokers and workers share (`records.rs`,
//! `anti_entropy.rs`) and write to disk (`records_file.rs`); `policy.rs` makes the decision for a key.
//!
//! Tasks: one, [`service`], owns all of that; it reads files and writes records on threads that may wait for the disk.
//! Other tasks have its handle, and the [`Admission`] that it computes from the entries.
//!
//! Previous stops of an entry: a file, the broker's `http` (admin calls), or the `bus` room, which receives the records of others.
//! Next stops: the broker's `exchange` before it publishes a key, the worker's `reconciler` before it installs one.

mod anti_entropy;
pub mod files;
pub mod metrics;
pub mod parse;
mod policy;
pub mod records;
pub mod records_file;
pub mod service;

use serde::{Deserialize, Serialize};

pub use self::policy::{Admission, AllowList, Verdict};
use crate::PublicKey;

/// The list that a key is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum List {
    /// It is denied, whatever other lists it is on.
    Deny,
    /// It is admitted, where only listed keys are.
    Allow,
    /// Its peer is never swept.
    Trusted,
}

impl List {
    /// Every list.
    pub const ALL: [Self; 3] = [Self::Deny, Self::Allow, Self::Trusted];

    /// Its name, on the wire and in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Allow => "allow",
            Self::Trusted => "trusted",
        }
    }
}

/// A key on a list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// Which list.
    pub list: List,
    /// Which key.
    pub key: PublicKey,
    /// The only domain in which it is allowed; none for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// The operator's name for the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The reason for the entry; never sent to the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it expires, in seconds of Unix time; none for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

impl Entry {
    /// `key` on `list`, without any details.
    #[must_use]
    pub fn new(list: List, key: PublicKey) -> Self {
        Self { list, key, domain: None, name: None, reason: None, until: None }
    }

    /// Whether it is in effect at `now`, in seconds of Unix time.
    #[must_use]
    pub fn counts(&self, now: u64) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}
