//! The login of callers: one user with one password, by HTTP Basic (RFC 7617).

use std::path::Path;
use std::sync::Arc;

use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use anyhow::anyhow;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use wgkex_common::config;

/// The digest of the one pair of user and password.
#[derive(Debug, Clone)]
pub struct LoginDigest(Arc<[u8; 32]>);

impl LoginDigest {
    /// The login with the user of the config, and the password in the file.
    pub fn read(config: &config::RegistrySettings) -> anyhow::Result<Self> {
        Ok(Self::of(&format!("{}:{}", config.user, password(config)?)))
    }

    /// The login with a user and a password, with a colon between.
    pub(super) fn of(credentials: &str) -> Self {
        Self(Arc::new(Sha256::digest(credentials).into()))
    }

    /// Whether a request has the user and the password. It takes the same time whichever part is wrong.
    pub fn admits(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (scheme, encoded) = value.trim().split_once(' ').unwrap_or_default();
        let credentials = STANDARD.decode(encoded.trim()).unwrap_or_default();
        let is_right: bool = Sha256::digest(credentials).ct_eq(&*self.0).into();
        is_right && scheme.eq_ignore_ascii_case("basic")
    }
}

/// The password of the one user.
pub fn password(config: &config::RegistrySettings) -> anyhow::Result<String> {
    password_of("registry.password_file", &config.password_file)
}

/// The password in the file that a key of the config names.
pub(super) fn password_of(key: &str, file: &Path) -> anyhow::Result<String> {
    config::password_in(file).map_err(|problem| anyhow!("{key}: {}: {problem}", file.display()))
}
