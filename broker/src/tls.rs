//! The certificate of a TLS listener, for HTTPS and for MQTT.
//!
//! Tasks: one for each, [`Certificate::watch`], reads it again when its files change; new connections get the new one.
//! Owner: `run` of the broker. Previous stop of a certificate: [`crate::file_watcher`]; next stop: the listeners of
//! [`crate::http`] and [`crate::mqtt_server`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tracing::{info, warn};
use wgkex_common::tls::rustls::client::verify_server_cert_signed_by_trust_anchor;
use wgkex_common::tls::rustls::pki_types::{CertificateDer, UnixTime};
use wgkex_common::tls::rustls::server::ParsedCertificate;
use wgkex_common::tls::rustls::server::{ClientHello, ResolvesServerCert};
use wgkex_common::tls::rustls::sign::CertifiedKey;
use wgkex_common::tls::rustls::{self, CertificateError, RootCertStore, ServerConfig};
use wgkex_common::tls::{TlsError, certificates, private_key, provider};

use crate::file_watcher::{self, FileVersion, file_version};

/// After the last end that a certificate can have, that of the year 9999.
const AFTER_ALL: Duration = Duration::from_secs(253_402_300_800);

/// The certificate that is in use.
pub struct Certificate {
    /// The part of the config that names the files.
    section: &'static str,
    cert_file: PathBuf,
    key_file: PathBuf,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Reads the files of the certificate and of its key, which `section` of the config names.
    pub fn open(section: &'static str, cert_file: PathBuf, key_file: PathBuf) -> Result<Arc<Self>, TlsError> {
        let current = RwLock::new(Arc::new(read(section, &cert_file, &key_file)?));
        Ok(Arc::new(Self { section, cert_file, key_file, current }))
    }

    /// TLS 1.2 and 1.3, with the current certificate.
    pub fn server(self: &Arc<Self>) -> Result<ServerConfig, TlsError> {
        let config = ServerConfig::builder_with_provider(provider());
        let config =
            config.with_safe_default_protocol_versions().map_err(|error| TlsError::of(self.section, &error))?;
        Ok(config.with_no_client_auth().with_cert_resolver(self.clone()))
    }

    /// Checks for new files, for ever.
    pub async fn watch(self: Arc<Self>) {
        file_watcher::watch(self, Self::version, Self::renew).await;
    }

    fn renew(&self) {
        match read(self.section, &self.cert_file, &self.key_file) {
            Ok(new) => {
                *self.current.write() = Arc::new(new);
                info!(of = self.section, "certificate is renewed");
            }
            Err(error) => warn!(%error, "the old certificate stays in use"),
        }
    }

    fn version(&self) -> [FileVersion; 2] {
        [&self.cert_file, &self.key_file].map(|file| file_version(file))
    }
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Certificate")
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().clone())
    }
}

/// For how long a certificate counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// It does not count yet.
    NotYet,
    /// It counts for so long.
    Left(Duration),
    /// It has not counted for so long.
    Expired(Duration),
}

/// For how long the certificates that `section` of the config names count, all of the chain; an error if they cannot be
/// read, or the key is not theirs.
pub fn validity(section: &str, cert_file: &Path, key_file: &Path) -> Result<Validity, TlsError> {
    let key = read(section, cert_file, key_file)?;
    let now = UnixTime::now();
    let validities: Result<Vec<_>, _> = key.cert.iter().map(|certificate| validity_of(certificate, now)).collect();
    let validities =
        validities.map_err(|error| TlsError::in_file(&format!("{section}.cert_file"), cert_file, &error))?;
    Ok(validities.into_iter().min_by_key(Validity::order).unwrap_or(Validity::NotYet))
}

impl Validity {
    /// Orders validities, the worst one first.
    fn order(&self) -> (u8, Duration) {
        match self {
            Self::Expired(_) => (0, Duration::ZERO),
            Self::NotYet => (1, Duration::ZERO),
            Self::Left(left) => (2, *left),
        }
    }
}

/// Rustls checks the end of a certificate before its signer, and names the end in its error.
fn validity_of(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<Validity, rustls::Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    let algorithms = provider().signature_verification_algorithms.all;
    let verified =
        |at| verify_server_cert_signed_by_trust_anchor(&parsed, &RootCertStore::empty(), &[], at, algorithms);
    let end = match verified(UnixTime::since_unix_epoch(AFTER_ALL)) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => not_after,
        Err(error) => return Err(error),
        Ok(()) => return Err(CertificateError::BadEncoding.into()),
    };
    let is_early = matches!(
        verified(now),
        Err(rustls::Error::InvalidCertificate(
            CertificateError::NotValidYetContext { .. } | CertificateError::NotValidYet
        ))
    );
    let (end, now) = (Duration::from_secs(end.as_secs()), Duration::from_secs(now.as_secs()));
    Ok(match end.checked_sub(now) {
        _ if is_early => Validity::NotYet,
        Some(left) => Validity::Left(left),
        None => Validity::Expired(now.saturating_sub(end)),
    })
}

fn read(section: &str, cert_file: &Path, key_file: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(&format!("{section}.cert_file"), cert_file)?;
    let key_name = format!("{section}.key_file");
    let key = private_key(&key_name, key_file)?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(|error| TlsError::in_file(&key_name, key_file, &error))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn the_validity_of_a_certificate_is_read_from_it() {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2020, 1, 11));
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let day = |day: u64| UnixTime::since_unix_epoch(Duration::from_secs(86_400 * day));
        let first = 18_262;
        for (at, validity) in [
            (day(first - 1), Validity::NotYet),
            (day(first), Validity::Left(Duration::from_hours(240))),
            (day(first + 10), Validity::Left(Duration::ZERO)),
            (day(first + 13), Validity::Expired(Duration::from_hours(72))),
        ] {
            assert_eq!(validity_of(certificate.der(), at).unwrap(), validity);
        }
    }
}
