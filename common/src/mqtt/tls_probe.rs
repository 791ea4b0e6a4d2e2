//! Probes whether a server that closes a plain connection without an answer uses TLS: sends one `ClientHello` and checks
//! the first byte of the answer. No data of this program are sent.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::tls::provider;

/// How long the server may take.
const TLS_ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// The first bytes of records with which a TLS server answers: a handshake, or an alert.
const RECORDS: [u8; 2] = [22, 21];

/// Whether the server answers a TLS hello in time.
pub(super) async fn speaks_tls(host: &str, port: u16) -> bool {
    let answer = timeout(TLS_ANSWER_TIMEOUT, answer(host, port)).await;
    matches!(answer, Ok(Ok(first)) if RECORDS.contains(&first))
}

async fn answer(host: &str, port: u16) -> io::Result<u8> {
    let hello = hello(host)?;
    let mut stream = TcpStream::connect((host, port)).await?;
    stream.write_all(&hello).await?;
    stream.read_u8().await
}

fn hello(host: &str) -> io::Result<Vec<u8>> {
    let config = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let config = config.map_err(io::Error::other)?.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let mut hello = Vec::new();
    connection.write_tls(&mut hello)?;
    Ok(hello)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    use super::*;

    /// A server that answers a `ClientHello` like this, and closes the connection.
    async fn found(answer: &'static [u8]) -> bool {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 4096];
            let length = stream.read(&mut hello).unwrap();
            assert!(length > 100 && hello[0] == 22, "{length}");
            stream.write_all(answer).unwrap();
        });
        let found = speaks_tls("127.0.0.1", port).await;
        server.join().unwrap();
        found
    }

    #[tokio::test]
    async fn a_server_that_answers_by_a_record_of_tls_speaks_it() {
        assert!(found(&[22, 3, 3, 0, 1, 2]).await && found(&[21, 3, 3, 0, 2, 2, 40]).await);
        assert!(!found(&[]).await && !found(&[0x20, 2, 0, 1]).await);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        assert!(!speaks_tls("127.0.0.1", free).await);
    }
}
