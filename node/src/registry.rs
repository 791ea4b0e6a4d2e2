//! The HTTP client of a broker's registry.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use wgkex_common::PublicKey;
use wgkex_common::config::password_in;
use wgkex_common::tls;

use crate::tunnel::ClientConfig;

/// The timeout of a call.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(15);
/// The largest answer in bytes: a config with a list of allowed-ips.
const ANSWER_MAX: u64 = 64 * 1024;

/// The `Authorization` header of each call.
pub struct AuthorizationHeader(String);

/// The registry of a broker.
pub struct RemoteRegistry {
    url: String,
    login: AuthorizationHeader,
    agent: Agent,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum RemoteCallError {
    /// The file with the password cannot be used.
    #[error("{0}: {1}")]
    Password(PathBuf, String),
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// This is no URL of a broker.
    #[error("--registry must begin with https:// or http://")]
    Url,
    /// No complete answer was received.
    #[error("{url}: {error}")]
    Connection {
        /// The URL of the call.
        url: String,
        /// The error of the HTTP client.
        error: ureq::Error,
    },
    /// The broker answered with another status, or with an invalid body.
    #[error("{url}: {status}{message}")]
    Refused {
        /// The URL of the call.
        url: String,
        /// The HTTP status.
        status: u16,
        /// The broker's error message.
        message: String,
    },
}

impl AuthorizationHeader {
    /// Of a user whose password is in a file.
    pub fn read(user: &str, password_file: &Path) -> Result<Self, RemoteCallError> {
        let password =
            password_in(password_file).map_err(|problem| RemoteCallError::Password(password_file.into(), problem))?;
        Ok(Self(format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))))
    }
}

impl RemoteRegistry {
    /// At a broker. Its certificate is signed by one of `ca_file`, or of the system.
    pub fn new(url: &str, login: AuthorizationHeader, ca_file: Option<&Path>) -> Result<Self, RemoteCallError> {
        let url = url.trim_end_matches('/').to_owned();
        let is_https = url.starts_with("https://");
        if !is_https && !url.starts_with("http://") {
            return Err(RemoteCallError::Url);
        }
        let mut config = Agent::config_builder().max_redirects(0).http_status_as_error(false);
        config = config.timeout_global(Some(REGISTRY_TIMEOUT));
        if is_https {
            let certificates = match ca_file {
                Some(file) => tls::certificates("--ca-file", file)?,
                None => rustls_native_certs::load_native_certs().certs,
            };
            let roots = certificates.iter().map(|certificate| Certificate::from_der(certificate).to_owned());
            let tls = TlsConfig::builder().root_certs(RootCerts::Specific(std::sync::Arc::new(roots.collect())));
            config = config.tls_config(tls.unversioned_rustls_crypto_provider(tls::provider()).build());
        }
        Ok(Self { url, login, agent: config.build().into() })
    }

    /// Leases an address of a server for this key, or keeps the lease that the client has; returns the config for the
    /// tunnel to the server.
    pub fn lease(&self, client: &str, server: &str, key: &PublicKey) -> Result<ClientConfig, RemoteCallError> {
        let new = json!({ "client_name": client, "server_name": server, "public_key": key });
        let known = json!({ "client_name": client, "server_name": server, "with_public_key": key });
        match self.config(&known) {
            Ok(config) if config.is_of(key) => return Ok(config),
            // A broker that does not know the field `with_public_key` does not return the client's key.
            Ok(_) | Err(RemoteCallError::Refused { status: 404, .. }) => {}
            Err(error) => return Err(error),
        }
        self.call("client/add", &new, 201)?;
        self.config(&known)
    }

    fn config(&self, known: &Value) -> Result<ClientConfig, RemoteCallError> {
        let (url, answer) = self.call("client/config", known, 200)?;
        let refused =
            |error: serde_json::Error| RemoteCallError::Refused { url, status: 200, message: format!(": {error}") };
        serde_json::from_str(&answer).map_err(refused)
    }

    fn call(&self, route: &str, fields: &Value, expected: u16) -> Result<(String, String), RemoteCallError> {
        let url = format!("{}/api/v1/{route}", self.url);
        let request = self.agent.post(&url).header("Authorization", &self.login.0);
        let request = request.header("Content-Type", "application/json");
        let failed = |error| RemoteCallError::Connection { url: url.clone(), error };
        let mut response = request.send(fields.to_string()).map_err(failed)?;
        let body = response.body_mut().with_config().limit(ANSWER_MAX).read_to_string().map_err(failed)?;
        let status = response.status().as_u16();
        if status != expected {
            let error = serde_json::from_str::<Value>(&body).unwrap_or_default();
            let message = error["error"]["message"].as_str().map_or_else(String::new, |message| {
                // The message is printed on a terminal: control characters are removed.
                format!(": {}", message.chars().filter(|char| !char.is_control()).collect::<String>())
            });
            return Err(RemoteCallError::Refused { url, status, message });
        }
        Ok((url, body))
    }
}
