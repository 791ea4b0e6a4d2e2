//! The server's side of TLS. Its files are read again when they change.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use anyhow::{Context as _, ensure};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{info, warn};

use crate::lock;

/// A certificate and its key, as they are now.
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<(Seen, Arc<ServerConfig>)>,
}

/// By which a file is known to be the same.
type Seen = [Option<SystemTime>; 2];

impl Tls {
    /// Reads both files. The error names the key and the file.
    pub fn open((certificate, key): (PathBuf, PathBuf)) -> anyhow::Result<Self> {
        let current = Mutex::new((seen([&certificate, &key]), Arc::new(load(&certificate, &key)?)));
        Ok(Self { certificate, key, current })
    }

    /// What to meet the next client with.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut current = lock(&self.current);
        let now = seen([&self.certificate, &self.key]);
        if now != current.0 {
            current.0 = now;
            match load(&self.certificate, &self.key) {
                Ok(config) => {
                    info!(file = %self.certificate.display(), "new certificate of the MQTT server");
                    current.1 = Arc::new(config);
                }
                Err(error) => warn!("{error:#}: the certificate before is kept"),
            }
        }
        current.1.clone().into()
    }
}

fn seen(files: [&Path; 2]) -> Seen {
    files.map(|file| fs::metadata(file).and_then(|data| data.modified()).ok())
}

fn load(certificate: &Path, key: &Path) -> anyhow::Result<ServerConfig> {
    let name = |key: &str, file: &Path| format!("mqtt_listen.tls.{key} {}", file.display());
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect);
    let chain = chain.with_context(|| name("cert_file", certificate))?;
    ensure!(!chain.is_empty(), "{}: no certificate in it, PEM is expected", name("cert_file", certificate));
    let private = PrivateKeyDer::from_pem_file(key).with_context(|| name("key_file", key))?;
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("mqtt_listen.tls")?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .with_context(|| name("key_file", key))
}
