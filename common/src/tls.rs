//! Certificates and keys from PEM files, for TLS clients and servers. The provider is ring, everywhere.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub use tokio_rustls::rustls;

/// TLS cannot be used as configured; the text names the key and the file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(pub(crate) String);

impl TlsError {
    /// The setting of the config's `key` cannot be used because of `error`.
    pub fn of(key: &str, error: &dyn fmt::Display) -> Self {
        Self(format!("{key}: {error}"))
    }

    /// `file`, which the config's `key` names, cannot be used because of `error`.
    pub fn in_file(key: &str, file: &Path, error: &dyn fmt::Display) -> Self {
        Self(format!("{key} {}: {error}", file.display()))
    }
}

/// The cryptographic provider.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificates in `file`, which the config's `key` names; at least one.
pub fn certificates(key: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
    let certificates = certificates.map_err(|error| TlsError::in_file(key, file, &error))?;
    if certificates.is_empty() {
        return Err(TlsError::in_file(key, file, &"no certificate in it, PEM is expected"));
    }
    Ok(certificates)
}

/// The private key in `file`, which the config's `key` names.
pub fn private_key(key: &str, file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(file).map_err(|error| TlsError::in_file(key, file, &error))
}
