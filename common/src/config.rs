//! The config, checked once at the start: `yaml.rs` makes text a tree, `keys.rs` knows the keys, `value.rs`
//! and `raw.rs` their types, `check.rs` makes the [`Config`] that both binaries run by; `diagnostics.rs` writes the lines
//! about what is wrong.

mod check;
mod diagnostics;
mod keys;
mod raw;
#[cfg(test)]
mod tests;
mod value;
mod variables;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fmt, fs, io};

use ipnet::IpNet;
use nix::unistd::gethostname;
use serde_json::Value;
pub use tracing::Level;

use self::diagnostics::Diagnostics;
pub(crate) use self::yaml::Tree;
use crate::{Domain, HostName, PublicKey, WorkerName};

/// Where the original has its config.
const FILE: &str = "/etc/wgkex.yaml";

/// Everything an operator may decide; it can be relied on without another check.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The domains served here: those of `domains` that begin with one of `domain_prefixes`.
    pub domains: BTreeSet<Domain>,
    /// The host name; what this worker or broker is called on the bus.
    pub name: HostName,
    /// What routers are told to connect to (`externalName`, else the host name).
    pub external_name: String,
    /// The gateways that the operator gave a place in the balance, by host name.
    pub workers: BTreeMap<WorkerName, Worker>,
    /// When peers that stay silent go.
    pub cleanup: Cleanup,
    /// The bus.
    pub mqtt: Mqtt,
    /// The MQTT server inside the broker, if no other is named.
    pub mqtt_listen: Option<MqttListen>,
    /// Where the broker serves routers.
    pub broker_listen: Listen,
    /// Where the broker serves routers by HTTPS, beside that; none if it does not.
    pub https: Option<Https>,
    /// Where the worker serves its metrics.
    pub worker_listen: Listen,
    /// As which user the worker serves, if it is started as root; none for root itself.
    pub worker_user: Option<String>,
    /// How long a router's answer may wait for a gateway.
    pub confirm: Confirm,
    /// Where both programs keep what they must know again after a restart.
    pub state_dir: PathBuf,
    /// Which keys a gateway gets back.
    pub live_keys: LiveKeys,
    /// How many peers a gateway's interface may have.
    pub peers: Peers,
    /// After how long a silent peer's endpoint is forgotten; none never.
    pub forget_idle_after: Option<Duration>,
    /// Keys that no router may have: `protected_keys` and `key_whitelist`.
    pub protected_keys: BTreeSet<PublicKey>,
    /// The networks of proxies whose word counts on where a request comes from.
    pub trusted_proxies: Vec<IpNet>,
    /// How often keys may come that the broker does not know.
    pub limits: Limits,
    /// Which keys may come, and stay.
    pub key_lists: KeyLists,
    /// Where the broker takes admin calls.
    pub admin_listen: Listen,
    /// The SHA-256 of the token that admin calls need, 64 hexadecimal digits in lower case; without it there are none.
    pub admin_token_hash: Option<Secret>,
    /// What `wgkex-worker setup` makes for each of `domains`.
    pub setup: BTreeMap<Domain, Setup>,
    /// The least important events that are logged.
    pub log_level: Level,
    /// What is odd but does no harm, one line each: the caller logs them once logging is up.
    pub warnings: Vec<String>,
}

/// A gateway's place in the balance (contract section 6).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worker {
    /// Its share of the peers relative to the others'; finite, not negative.
    pub weight: f64,
}

/// When peers that stay silent go (contract section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleanup {
    /// How often stale peers are looked for.
    pub interval: Duration,
    /// A peer without a handshake for this long is stale.
    pub stale: Duration,
    /// How long a new key has for its first handshake.
    pub grace: Duration,
}

/// The session with the MQTT server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mqtt {
    /// Which server.
    pub server: Server,
    /// Who we are to it; none for one that asks nobody.
    pub credentials: Option<Credentials>,
    /// How long the line may be silent; whole seconds, 1 to 65535.
    pub keepalive: Duration,
    /// How the connection is encrypted; none if it is not.
    pub tls: Option<Tls>,
}

/// What makes an encrypted connection one that both sides trust.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// The certificates, as PEM, by one of which the server's must be signed; none for the system's.
    pub ca_file: Option<PathBuf>,
    /// The own certificate and its private key, as PEM, for a server that asks for them.
    pub own: Option<(PathBuf, PathBuf)>,
}

/// The MQTT server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// The one inside the broker, which a program on the same machine reaches at this address.
    Embedded(SocketAddr),
    /// Somebody else's.
    External {
        /// Its name or address, without brackets.
        host: String,
        /// Its port.
        port: u16,
    },
}

/// The MQTT server inside the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttListen {
    /// Where it listens; a loopback address if there are no users.
    pub address: SocketAddr,
    /// The certificates and the private key that it shows, as PEM; none if connections are not encrypted.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Who may connect, by name; if there is nobody, everybody may, and do everything.
    pub users: BTreeMap<String, MqttUser>,
    /// So many connections at most.
    pub max_connections: usize,
}

/// Who may connect to the MQTT server inside the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttUser {
    /// The Argon2id hash of the password, as a PHC string.
    pub password_hash: Secret,
    /// What the user may do.
    pub role: Role,
}

/// What a user of the bus is to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The worker of which the user's name is the name.
    Worker,
    /// Any broker.
    Broker,
}

/// A user of the MQTT server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub username: String,
    /// The user's password.
    pub password: Secret,
}

/// A text that neither logs nor errors may show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// A secret that was made here and not read.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the one who must send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where a server of ours listens. `Display` gives `host:port`, with brackets around an IPv6 address.
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

/// A server for HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Https {
    /// Where it listens.
    pub listen: Listen,
    /// Its certificate, and those between it and the root, as PEM.
    pub cert_file: PathBuf,
    /// The private key of the certificate, as PEM.
    pub key_file: PathBuf,
}

/// How often a key may come to be taken in; where none is set, there is no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The same key.
    pub per_key: Option<Quota>,
    /// Unknown keys from one address (IPv4) or network (IPv6, /56).
    pub per_client: Option<Quota>,
    /// Unknown keys of one domain.
    pub per_domain: Option<Quota>,
    /// Unknown keys in all.
    pub global: Option<Quota>,
}

/// So many at once, and so many a second from then on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quota {
    /// What may come at once; at most 1000000.
    pub burst: NonZeroU32,
    /// By how many a second that fills again; 0.001 to 1000000.
    pub per_second: f64,
}

/// How long a router's answer may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirm {
    /// For one gateway to say that it has the key.
    pub timeout: Duration,
    /// For all gateways tried one after the other; at least `timeout`.
    pub budget: Duration,
}

/// The keys that the brokers remember, for gateways that lack them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveKeys {
    /// So many at most; at least 1.
    pub max: usize,
    /// A key is forgotten this long after a router last sent it, or a gateway last reported a handshake.
    pub ttl: Duration,
}

/// How many peers a domain has at a gateway at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peers {
    /// In all, whoever made them; at least 1.
    pub max: usize,
    /// Of those that never shook hands; at least 1.
    pub unproven: usize,
}

/// Files and directories of keys on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyLists {
    /// The file of denied keys.
    pub deny_file: Option<PathBuf>,
    /// The directory of denied keys.
    pub deny_dir: Option<PathBuf>,
    /// Where allowed keys stand; none if every key may come that is not denied.
    pub allow: Option<Allow>,
    /// Keys whose peers are never swept.
    pub trusted: BTreeSet<PublicKey>,
    /// The directory of such keys.
    pub trusted_dir: Option<PathBuf>,
    /// How often to look whether files changed.
    pub refresh: Duration,
}

/// Where allowed keys stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allow {
    /// The file.
    pub file: Option<PathBuf>,
    /// The directory.
    pub dir: Option<PathBuf>,
}

/// The interfaces of a domain, as `wgkex-worker setup` makes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// Where the gateway's private key is kept.
    pub key_file: PathBuf,
    /// The UDP port of `wg-REST`; no two domains have the same.
    pub listen_port: u16,
    /// The network identifier of `vx-REST`, 1 to 16777215.
    pub vxlan_id: u32,
    /// The UDP port of `vx-REST`.
    pub vxlan_port: u16,
}

/// Why there is no [`Config`]: one line per mistake, each naming the file (or variable), the key, what is wrong and
/// what is allowed. No line shows a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .lines.join("\n"))]
pub struct ConfigError {
    lines: Vec<String>,
}

impl ConfigError {
    fn one(line: String) -> Self {
        Self { lines: vec![line] }
    }

    /// The lines, for a log that takes one event each.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

/// What `text` says, YAML or JSON of up to `max` bytes with whatever at its top; else one line that shows nothing of it.
pub(crate) fn tree(text: &str, max: usize) -> Result<Tree, String> {
    yaml::any(text, max)
}

impl Config {
    /// Reads the file named by `WGKEX_CONFIG_FILE`, else `/etc/wgkex.yaml`; where there is none, the variables of
    /// the container.
    pub fn load() -> Result<Self, ConfigError> {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        let variables: BTreeMap<String, String> = env::vars_os().filter_map(text).collect();
        let file = variables::value(&variables, "WGKEX_CONFIG_FILE").unwrap_or(FILE);
        let host_name = gethostname().map_err(|error| ConfigError::one(format!("the host name: {error}")))?;
        Self::choose(file, fs::read_to_string(file), &variables, &host_name.to_string_lossy())
    }

    /// The config that `yaml` says; `source_name` names it in errors, `host_name` is this machine's.
    pub fn parse(source_name: &str, yaml: &str, host_name: &str) -> Result<Self, ConfigError> {
        let mut diagnostics = Diagnostics::of_file(source_name, yaml);
        let tree = yaml::parse(yaml, &mut diagnostics);
        Self::from_tree(tree, host_name, diagnostics)
    }

    /// The config that a container's variables say (contract section 7); other variables do not count.
    pub fn from_variables(variables: &BTreeMap<String, String>, host_name: &str) -> Result<Self, ConfigError> {
        let diagnostics = Diagnostics::of_variables(&variables::ALIASES);
        Self::from_tree(Some(variables::tree(variables)), host_name, diagnostics)
    }

    /// A file counts alone; where there is none, the variables do.
    fn choose(
        file: &str,
        content: io::Result<String>,
        variables: &BTreeMap<String, String>,
        host_name: &str,
    ) -> Result<Self, ConfigError> {
        let set = |name: &str| variables::value(variables, name).is_some();
        match content {
            Ok(yaml) => {
                let mut config = Self::parse(file, &yaml, host_name)?;
                let ignored: Vec<&str> =
                    variables::ALIASES.map(|(name, _)| name).into_iter().filter(|name| set(name)).collect();
                if !ignored.is_empty() {
                    let names = ignored.join(", ");
                    config.warnings.push(format!("{file}: counts alone, these variables are ignored: {names}"));
                }
                Ok(config)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && set("WGKEX_DOMAINS") => {
                Self::from_variables(variables, host_name)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ConfigError::one(format!(
                "{file}: does not exist; write it (wgkex.yaml.example shows how), name another file in \
                 WGKEX_CONFIG_FILE, or set WGKEX_DOMAINS and WGKEX_DOMAIN_PREFIXES instead of a file"
            ))),
            Err(error) => Err(ConfigError::one(format!("{file}: cannot be read: {error}"))),
        }
    }

    fn from_tree(tree: Option<Value>, host_name: &str, mut diagnostics: Diagnostics) -> Result<Self, ConfigError> {
        let config = tree.and_then(|mut tree| {
            diagnostics.keep_secret(&tree);
            keys::normalize(&mut tree, &mut diagnostics);
            let raw = check::types(&mut tree, &mut diagnostics)?;
            Some(check::check(raw, host_name, &mut diagnostics))
        });
        let (lines, warnings) = diagnostics.into_lines();
        match config {
            Some(config) if lines.is_empty() => Ok(Self { warnings, ..config }),
            _ => Err(ConfigError { lines }),
        }
    }
}
