//! The registry of servers and clients: `registry`; and the database of its tables: `storage`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::diagnostics::{Diagnostics, Path};
use super::value::{DatabaseUrl, File, Flag, Text};

/// The registry of servers, clients and leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrySettings {
    /// The one user who may make calls.
    pub user: String,
    /// The file with that user's password.
    pub password_file: PathBuf,
    /// Whether `client/config` needs no login.
    pub open_client_config: bool,
}

/// The database of the tables that several brokers may share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Storage {
    /// The URL of a `PostgreSQL` server, without a password; none for SQLite in `state_dir`.
    pub url: Option<String>,
    /// The file with its password.
    pub password_file: Option<PathBuf>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawRegistry {
    pub enabled: Option<Flag>,
    pub user: Option<Text>,
    pub password_file: Option<File>,
    pub open_client_config: Option<Flag>,
}

impl RawRegistry {
    /// None if it is not enabled.
    pub fn check(self, diagnostics: &mut Diagnostics) -> Option<RegistrySettings> {
        let is_set = |flag: Option<Flag>| flag.is_some_and(|flag| flag.0);
        if !is_set(self.enabled) {
            return None;
        }
        let user = self.user.map_or_else(|| "admin".to_owned(), |user| user.0);
        if user.is_empty() || user.contains(':') {
            diagnostics.error(&Path::of("registry.user"), "must be a name without a colon");
        }
        let Some(password_file) = self.password_file else {
            let complaint = "is missing: it must be the file with the password of registry.user";
            diagnostics.error(&Path::of("registry.password_file"), complaint);
            return None;
        };
        let (password_file, open_client_config) = (password_file.0.into(), is_set(self.open_client_config));
        Some(RegistrySettings { user, password_file, open_client_config })
    }
}

/// `storage` and `storage_password_file`.
pub(super) fn storage(url: Option<DatabaseUrl>, password_file: Option<File>, diagnostics: &mut Diagnostics) -> Storage {
    if url.is_none() && password_file.is_some() {
        diagnostics.warn(&Path::of("storage_password_file"), "is not used, as storage names no server");
    }
    Storage { url: url.map(|url| url.0), password_file: password_file.map(|file| file.0.into()) }
}
