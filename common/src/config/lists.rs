//! Files and directories of keys: `blacklist_file`, `allowlist`, `key_lists`; trusted are those of `key_whitelist`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::diagnostics::{Diagnostics, Path};
use super::value::{Directory, Flag, Seconds, Text, seconds};
use crate::PublicKey;

/// Files and directories of keys on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyLists {
    /// The file of denied keys.
    pub deny_file: Option<PathBuf>,
    /// The directory of denied keys.
    pub deny_dir: Option<PathBuf>,
    /// The sources of allowed keys; none if every key is admitted that is not denied.
    pub allow: Option<Allow>,
    /// Keys whose peers are never swept.
    pub trusted: BTreeSet<PublicKey>,
    /// The directory of such keys.
    pub trusted_dir: Option<PathBuf>,
    /// How often to check whether files changed.
    pub refresh: Duration,
}

/// The sources of allowed keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allow {
    /// The file.
    pub file: Option<PathBuf>,
    /// The directory.
    pub dir: Option<PathBuf>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawAllowlist {
    pub enabled: Option<Flag>,
    pub file: Option<Text>,
    pub refresh_interval: Option<Seconds>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawKeyLists {
    #[serde(rename = "deny_dir")]
    pub deny: Option<Directory>,
    #[serde(rename = "allow_dir")]
    pub allow: Option<Directory>,
    #[serde(rename = "trusted_dir")]
    pub trusted: Option<Directory>,
}

impl RawKeyLists {
    /// Together with `blacklist_file`, `allowlist` and the keys of `key_whitelist`.
    pub fn check(
        self,
        deny: Option<Text>,
        allow: RawAllowlist,
        trusted: BTreeSet<PublicKey>,
        diagnostics: &mut Diagnostics,
    ) -> KeyLists {
        let path = |text: Text| PathBuf::from(text.0);
        let dir = |dir: Directory| PathBuf::from(dir.0);
        let (is_enabled, file, allow_dir) =
            (allow.enabled.is_some_and(|flag| flag.0), allow.file.map(path), self.allow.map(dir));
        for (key, is_set) in [("allowlist.file", file.is_some()), ("key_lists.allow_dir", allow_dir.is_some())] {
            if is_set && !is_enabled {
                diagnostics.warn(&Path::of(key), "is not used, as allowlist.enabled is not true");
            }
        }
        if is_enabled && file.is_none() && allow_dir.is_none() {
            let note = "is true, but neither allowlist.file nor key_lists.allow_dir is set: only keys that are allowed by \
                        an admin call may come";
            diagnostics.warn(&Path::of("allowlist.enabled"), note);
        }
        KeyLists {
            deny_file: deny.map(path),
            deny_dir: self.deny.map(dir),
            allow: is_enabled.then_some(Allow { file, dir: allow_dir }),
            trusted,
            trusted_dir: self.trusted.map(dir),
            refresh: seconds(allow.refresh_interval.as_ref(), 5),
        }
    }
}
