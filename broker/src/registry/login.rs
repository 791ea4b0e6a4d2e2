//! The login of callers: one user with one password, by HTTP Basic (RFC 7617).

use std::path::Path;

use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use anyhow::anyhow;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use governor::clock::MonotonicClock;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tracing::warn;
use wgkex_common::config;

use crate::client_ip::Client;
use crate::registry::login_limit::{LoginLimit, LoginRefusal};

/// The one pair of user and password, and the limit of wrong ones.
pub struct Login {
    digest: [u8; 32],
    limit: LoginLimit,
}

impl Login {
    /// The login with the user of the config, and the password in the file.
    pub fn read(config: &config::RegistrySettings) -> anyhow::Result<Self> {
        let digest = Sha256::digest(format!("{}:{}", config.user, password(config)?)).into();
        Ok(Self { digest, limit: LoginLimit::new(MonotonicClock) })
    }

    /// Whether a request of `client` has the user and the password. It takes the same time whichever part is wrong. A
    /// request without any does not count as a wrong one.
    pub fn check(&self, headers: &HeaderMap, client: impl FnOnce() -> Client) -> Result<(), LoginRefusal> {
        let credentials = credentials(headers).ok_or(LoginRefusal::Wrong)?;
        let digest = Sha256::digest(credentials).into();
        let result = self.limit.check(client(), &digest, || digest.ct_eq(&self.digest).into());
        if let Err(LoginRefusal::TooManyWrong(_)) = result
            && let Some(refused) = self.limit.line()
        {
            warn!(refused, "the registry refuses clients that have sent too many wrong passwords");
        }
        result
    }

    /// Forgets clients that were long silent.
    pub fn forget_old(&self) {
        self.limit.forget_old();
    }
}

/// User and password, with a colon between.
fn credentials(headers: &HeaderMap) -> Option<Vec<u8>> {
    let (scheme, encoded) = headers.get(AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let credentials = STANDARD.decode(encoded.trim()).ok()?;
    scheme.eq_ignore_ascii_case("basic").then_some(credentials)
}

/// The password of the one user.
pub fn password(config: &config::RegistrySettings) -> anyhow::Result<String> {
    password_of("registry.password_file", &config.password_file)
}

/// The password in the file that a key of the config names.
pub(super) fn password_of(key: &str, file: &Path) -> anyhow::Result<String> {
    config::password_in(file).map_err(|problem| anyhow!("{key}: {}: {problem}", file.display()))
}
