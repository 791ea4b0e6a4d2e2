//! Where both programs serve HTTP: `broker_listen`, `worker_listen`, `admin_listen`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::certificate::pair;
use super::diagnostics::{Diagnostics, Path};
use super::value::{File, Host, Port, port};

/// Where a server of ours addresses. `Display` gives `host:port`, with brackets around an IPv6 address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.parse::<Ipv6Addr>().is_ok() { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl Listen {
    /// An address.
    pub(super) fn of(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }

    /// Whether both cannot be used at once.
    fn collides(&self, other: &Self) -> bool {
        let everywhere = |listen: &Self| listen.host.parse().is_ok_and(|address: IpAddr| address.is_unspecified());
        self.port == other.port && (self.host == other.host || everywhere(self) || everywhere(other))
    }

    /// Host and port by which a program on this machine reaches it: if it addresses on all addresses, the loopback
    /// address of IPv4, which also works where `::` is configured and the machine has no IPv6.
    #[must_use]
    pub fn reachable(&self) -> String {
        let is_everywhere = self.host.parse().is_ok_and(|address: IpAddr| address.is_unspecified());
        let host = if is_everywhere { Ipv4Addr::LOCALHOST.to_string() } else { self.host.clone() };
        Self { host, port: self.port }.to_string()
    }
}

/// A server for HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Https {
    /// Where it addresses.
    pub listen: Listen,
    /// Its certificate, and intermediate ones, as PEM.
    pub cert_file: PathBuf,
    /// The private key of the certificate, as PEM.
    pub key_file: PathBuf,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawListen {
    pub host: Option<Host>,
    pub port: Option<Port>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawBrokerListen {
    pub host: Option<Host>,
    pub port: Option<Port>,
    pub tls: RawListenTls,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawListenTls {
    pub port: Option<Port>,
    pub cert_file: Option<File>,
    pub key_file: Option<File>,
}

/// No two servers may have the same address and port. The port of HTTPS is compared with that of HTTP where it is read.
pub(super) fn check_addresses_differ<const N: usize>(
    addresses: [(&str, Option<&Listen>); N],
    diagnostics: &mut Diagnostics,
) {
    let addresses: Vec<_> = addresses.into_iter().filter_map(|(key, listen)| Some((key, listen?))).collect();
    for (at, (key, listen)) in addresses.iter().enumerate() {
        let collision = addresses[..at].iter().find(|(other, known)| listen.collides(known) && !key.starts_with(other));
        if let Some((other, _)) = collision {
            let complaint = format!("must be another address or port than that of {other}");
            diagnostics.invalid(&Path::of(key), &Value::from(listen.to_string()), &complaint);
        }
    }
}

impl RawBrokerListen {
    /// Where routers are served, and where by HTTPS.
    pub fn check(self, diagnostics: &mut Diagnostics) -> (Listen, Option<Https>) {
        let Self { host, port, tls } = self;
        let listen = RawListen { host, port }.check(5000);
        let https = tls.check(&listen, diagnostics);
        (listen, https)
    }
}

impl RawListen {
    pub fn check(self, default_port: u16) -> Listen {
        let host = self.host.map_or_else(|| Ipv4Addr::LOCALHOST.to_string(), |host| host.0);
        Listen { host, port: port(self.port.as_ref(), default_port) }
    }
}

impl RawListenTls {
    pub fn check(self, http: &Listen, diagnostics: &mut Diagnostics) -> Option<Https> {
        const TLS: &str = "broker_listen.tls";
        let port = port(self.port.as_ref(), 5443);
        let Some((cert_file, key_file)) = pair(TLS, self.cert_file, self.key_file, diagnostics) else {
            if port != 5443 {
                diagnostics.warn(&Path::of(TLS).then("port"), "is not used, as broker_listen.tls.cert_file is not set");
            }
            return None;
        };
        if port == http.port {
            diagnostics.invalid(
                &Path::of(TLS).then("port"),
                &Value::from(port),
                "must be another port than that of broker_listen",
            );
        }
        Some(Https { listen: Listen { host: http.host.clone(), port }, cert_file, key_file })
    }
}
