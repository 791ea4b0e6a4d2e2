//! The config, checked once at the start. `yaml.rs` (or `variables.rs`) parses the text into a tree, `keys.rs`
//! normalizes that to the shape of the keys in `raw.rs`, which makes the [`Config`] that both programs use;
//! `diagnostics.rs` collects the problems.
//!
//! Each section is one file, with its keys as they may be written in the file (`Raw...`), their checked values, and the
//! defaults; types of values that several sections use are in `value.rs`. A new key is added to its section, and to
//! wgkex.yaml.example.
//!
//! No task; `main` of each program owns the config. Previous stop: the file, or the variables of a container; next stop: `run` of
//! the program, which gives each room its section.

mod certificate;
mod diagnostics;
mod domains;
mod files;
mod http;
mod hub;
mod interfaces;
mod keys;
mod limits;
mod lists;
mod logging;
mod mqtt;
mod mqtt_listen;
mod original;
mod peers;
mod problem;
mod raw;
mod rebalance;
mod registry;
mod reload;
mod servers;
mod setup;
mod tenants;
#[cfg(test)]
mod tests;
mod value;
mod variables;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, io};

use ipnet::IpNet;
use nix::unistd::gethostname;
use serde_json::Value;
pub use tracing::Level;

use self::diagnostics::{Diagnostics, Problems};
pub use self::domains::GatewayShare;
pub use self::files::{CONFIG_FILE, FileToRead, NeededBy, PASSWORD_FILE, UnreadableFile};
pub use self::http::{Https, Listen};
pub use self::hub::HubSettings;
pub use self::limits::{Limits, Quota};
pub use self::lists::{Allow, KeyLists};
pub use self::logging::LogFormat;
pub use self::mqtt::{Credentials, Mqtt, MqttAddress, Tls, password_in};
pub use self::mqtt_listen::{MqttListen, MqttUser, Role};
pub use self::peers::{Cleanup, Confirm, LiveKeyLimits, PeerLimits};
pub use self::problem::ConfigProblem;
use self::problem::{CONFIG_ABSENT, UNREAD};
use self::raw::Raw;
pub use self::rebalance::Rebalance;
pub use self::registry::{RegistrySettings, Storage};
pub use self::reload::ConfigSource;
pub use self::servers::ServerSettings;
pub use self::setup::Setup;
pub use self::tenants::TenantSettings;
pub use self::value::Secret;
pub(crate) use self::yaml::Tree;
use crate::{Domain, HostName, PublicKey, WorkerName};

/// The default file of the original's config.
const ORIGINAL_CONFIG_FILE: &str = "/etc/wgkex.yaml";
/// The name that units use for the credential with the password of the MQTT server.
const PASSWORD_CREDENTIAL: &str = "mqtt-password";
/// The file from which units load it.
const PASSWORD_SOURCE: &str = "/etc/credstore/wgkex.mqtt-password";

/// All settings, validated: they need no further check.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The domains served here: those of `domains` that begin with one of `domain_prefixes`.
    pub domains: BTreeSet<Domain>,
    /// The host name; the name of this worker or broker on the bus.
    pub name: HostName,
    /// The address that routers get (`externalName`, else the host name).
    pub external_name: String,
    /// The gateways that the operator gave a place in the balance, by host name.
    pub workers: BTreeMap<WorkerName, GatewayShare>,
    /// When silent peers are removed.
    pub cleanup: Cleanup,
    /// The MQTT session.
    pub mqtt: Mqtt,
    /// The MQTT server inside the broker, if no other is named.
    pub mqtt_listen: Option<MqttListen>,
    /// Where the broker serves routers.
    pub broker_listen: Listen,
    /// Where the broker serves routers by HTTPS, in addition; none if it does not.
    pub https: Option<Https>,
    /// Where the worker serves its metrics.
    pub worker_listen: Listen,
    /// The user as whom the worker serves, if it is started as root; none for root itself.
    pub worker_user: Option<String>,
    /// How long a router's answer may wait for a gateway.
    pub confirm: Confirm,
    /// The directory of the state that both programs keep over a restart.
    pub state_dir: PathBuf,
    /// How many keys the brokers remember for gateways, and how long.
    pub live_keys: LiveKeyLimits,
    /// How many peers a gateway's interface may have.
    pub peers: PeerLimits,
    /// After how long a silent peer's endpoint is forgotten; none never.
    pub forget_idle_after: Option<Duration>,
    /// Keys that no router may have: `protected_keys` and `key_whitelist`.
    pub protected_keys: BTreeSet<PublicKey>,
    /// The networks of proxies whose headers are trusted for the client's address.
    pub trusted_proxies: Vec<IpNet>,
    /// The rate limits of unknown keys.
    pub limits: Limits,
    /// The access lists.
    pub key_lists: KeyLists,
    /// How fast the share of a returned gateway grows.
    pub rebalance: Rebalance,
    /// Where the broker takes admin calls.
    pub admin_listen: Listen,
    /// The SHA-256 of the token that admin calls need, 64 hexadecimal digits in lower case; without it there are none.
    pub admin_token_hash: Option<Secret>,
    /// Where the tables are that several brokers may share.
    pub storage: Storage,
    /// The registry of servers and clients; none if it is not enabled.
    pub registry: Option<RegistrySettings>,
    /// The servers of the registry that this gateway is, by name.
    pub servers: BTreeMap<String, ServerSettings>,
    /// The hub of tenants that this gateway is, if it is one.
    pub hub: Option<HubSettings>,
    /// The settings of tenants, if the broker serves any.
    pub tenants: Option<TenantSettings>,
    /// The interfaces that `wgkex-worker setup` makes for each of `domains`.
    pub setup: BTreeMap<Domain, Setup>,
    /// Whether the file has a section `setup`.
    pub is_setup_named: bool,
    /// The least important events that are logged.
    pub log_level: Level,
    /// The form of the log's lines.
    pub log_format: LogFormat,
    /// The source of the config and the values of all its keys, to compare them after a reload.
    pub source: ConfigSource,
    /// The warnings: the caller logs them once logging is set up.
    pub warnings: Vec<ConfigProblem>,
}

/// Why there is no valid [`Config`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError {
    /// The errors, at least one.
    pub mistakes: Vec<ConfigProblem>,
    /// The warnings beside them.
    pub warnings: Vec<ConfigProblem>,
}

/// Facts of the machine on which the config is read.
#[derive(Clone, Copy)]
struct HostDefaults<'a> {
    host_name: &'a str,
    /// The file in which the service manager provides the password of the MQTT server, if it does.
    credential: Option<&'a str>,
}

impl ConfigError {
    fn one(problem: String) -> Self {
        Self { mistakes: vec![ConfigProblem::other(problem)], warnings: Vec::new() }
    }

    fn of_file(file: &str, problem: String) -> Self {
        let mistake = ConfigProblem { file: Some(file.to_owned()), ..ConfigProblem::other(problem) };
        Self { mistakes: vec![mistake], warnings: Vec::new() }
    }
}

/// Parses `text`, YAML or JSON of up to `max` bytes with any value at its top; the error is one line that shows nothing
/// of it.
pub(crate) fn tree(text: &str, max: usize) -> Result<Tree, String> {
    yaml::any(text, max)
}

impl Config {
    /// Reads `file`, else the file named by `WGKEX_CONFIG_FILE`, else `/etc/wgkex.yaml`; if that does not exist, and
    /// the caller names none, the variables of the container.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        let variables: BTreeMap<String, String> = env::vars_os().filter_map(text).collect();
        let host_name = gethostname().map_err(|error| ConfigError::one(format!("the host name: {error}")))?;
        let host_name = host_name.to_string_lossy();
        let credential = password_credential(&variables);
        let machine = HostDefaults { host_name: &host_name, credential: credential.as_deref() };
        if let Some(file) = file {
            let name = file.to_string_lossy();
            let yaml =
                fs::read_to_string(file).map_err(|error| ConfigError::of_file(&name, format!("{UNREAD}: {error}")))?;
            let config = Self::of_file(&name, &yaml, machine)?;
            return Ok(Self { source: config.source.in_file(file), ..config });
        }
        let file = variables::value(&variables, "WGKEX_CONFIG_FILE").unwrap_or(ORIGINAL_CONFIG_FILE);
        Self::choose(file, fs::read_to_string(file), &variables, machine)
    }

    /// The config in `yaml`; `source_name` names it in errors, `host_name` is this machine's.
    pub fn parse(source_name: &str, yaml: &str, host_name: &str) -> Result<Self, ConfigError> {
        Self::of_file(source_name, yaml, HostDefaults { host_name, credential: None })
    }

    fn of_file(source: &str, yaml: &str, machine: HostDefaults<'_>) -> Result<Self, ConfigError> {
        let mut diagnostics = Diagnostics::of_file(source, yaml, keys::names());
        let tree = yaml::parse(yaml, &mut diagnostics);
        Self::from_tree(tree, machine, diagnostics)
    }

    /// The config in a container's variables (contract section 7); other variables are ignored.
    pub fn from_variables(variables: &BTreeMap<String, String>, host_name: &str) -> Result<Self, ConfigError> {
        Self::of_variables(variables, HostDefaults { host_name, credential: None })
    }

    fn of_variables(variables: &BTreeMap<String, String>, machine: HostDefaults<'_>) -> Result<Self, ConfigError> {
        let mut diagnostics = Diagnostics::of_variables(&variables::ALIASES, keys::names());
        for (name, meant) in variables::misspelt(variables) {
            let note = format!("is not a known variable and is ignored, did you mean {meant}?");
            diagnostics.warn(&diagnostics::Path::of(name), &note);
        }
        Self::from_tree(Some(variables::tree(variables)), machine, diagnostics)
    }

    /// If there is a file, the variables are ignored; they are used if there is none.
    fn choose(
        file: &str,
        content: io::Result<String>,
        variables: &BTreeMap<String, String>,
        machine: HostDefaults<'_>,
    ) -> Result<Self, ConfigError> {
        let set = |name: &str| variables::value(variables, name).is_some();
        match content {
            Ok(yaml) => {
                let mut config = Self::of_file(file, &yaml, machine)?;
                let ignored: Vec<&str> =
                    variables::ALIASES.map(|(name, _)| name).into_iter().filter(|name| set(name)).collect();
                if !ignored.is_empty() {
                    let names = ignored.join(", ");
                    let problem = format!("counts alone, these variables are ignored: {names}");
                    config
                        .warnings
                        .push(ConfigProblem { file: Some(file.to_owned()), ..ConfigProblem::other(problem) });
                }
                Ok(config)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && set("WGKEX_DOMAINS") => {
                Self::of_variables(variables, machine)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ConfigError::of_file(
                file,
                format!(
                    "{CONFIG_ABSENT} (wgkex.yaml.example shows how), name another file in WGKEX_CONFIG_FILE, or set \
                     WGKEX_DOMAINS and WGKEX_DOMAIN_PREFIXES instead of a file"
                ),
            )),
            Err(error) => Err(ConfigError::of_file(file, format!("{UNREAD}: {error}"))),
        }
    }

    fn from_tree(
        tree: Option<Value>,
        machine: HostDefaults<'_>,
        mut diagnostics: Diagnostics,
    ) -> Result<Self, ConfigError> {
        let config = tree.and_then(|mut tree| {
            diagnostics.keep_secret(&tree);
            keys::normalize(&mut tree, &mut diagnostics);
            let source = ConfigSource::of(tree.clone(), diagnostics.places(&files::KEYS));
            let mut raw = Raw::read(&mut tree, &mut diagnostics)?;
            raw.mqtt.offer_password_file(machine.credential);
            Some(Self { source, ..raw.check(machine.host_name, &mut diagnostics) })
        });
        let Problems { errors, warnings } = diagnostics.into_problems();
        match config {
            Some(config) if errors.is_empty() => Ok(Self { warnings, ..config }),
            _ => Err(ConfigError { mistakes: errors, warnings }),
        }
    }
}

/// The password of the MQTT server that the service manager loaded for this program (`LoadCredential=` in its unit). A
/// command that root runs in a shell, such as `doctor`, reads the file from which the service manager loads it.
fn password_credential(variables: &BTreeMap<String, String>) -> Option<String> {
    match variables::value(variables, "CREDENTIALS_DIRECTORY") {
        Some(directory) => {
            let file = format!("{directory}/{PASSWORD_CREDENTIAL}");
            Path::new(&file).exists().then_some(file)
        }
        None => fs::File::open(PASSWORD_SOURCE).is_ok().then(|| PASSWORD_SOURCE.to_owned()),
    }
}
