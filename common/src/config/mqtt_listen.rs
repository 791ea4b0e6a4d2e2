//! The MQTT server inside the broker: `mqtt_listen`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::certificate::pair;
use super::diagnostics::{Diagnostics, Path};
use super::value::{Connections, File, Host, PasswordHash, Port, Secret, port, text, value_type};
use crate::is_topic_level;

/// The default address of the embedded MQTT server.
pub(super) const DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1883);

/// The MQTT server inside the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttListen {
    /// Where it listens; a loopback address if there are no users.
    pub address: SocketAddr,
    /// The certificates and the private key of the server, as PEM; none if connections are not encrypted.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// The users, by name; if there are none, every client may connect, and do everything.
    pub users: BTreeMap<String, MqttUser>,
    /// So many connections at most.
    pub max_connections: usize,
}

/// A user of the MQTT server inside the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttUser {
    /// The Argon2id hash of the password, as a PHC string.
    pub password_hash: Secret,
    /// The user's role.
    pub role: Role,
}

/// The role of a user, which decides its rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The worker with the user's name.
    Worker,
    /// Any broker.
    Broker,
}

value_type!(UserRole(Role), role, "must be worker or broker");

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawMqttListen {
    pub host: Option<Host>,
    pub port: Option<Port>,
    pub tls: RawMqttListenTls,
    pub users: BTreeMap<String, RawMqttUser>,
    pub max_connections: Option<Connections>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawMqttListenTls {
    pub cert_file: Option<File>,
    pub key_file: Option<File>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawMqttUser {
    pub password_hash: Option<PasswordHash>,
    pub role: Option<UserRole>,
}

impl RawMqttListen {
    /// Whether the file has any of its keys.
    pub fn is_set(&self) -> bool {
        let tls = self.tls.cert_file.is_some() || self.tls.key_file.is_some();
        self.host.is_some() || self.port.is_some() || self.max_connections.is_some() || tls || !self.users.is_empty()
    }

    pub fn check(self, diagnostics: &mut Diagnostics) -> MqttListen {
        let has_users = !self.users.is_empty();
        let users = self.users.into_iter().filter_map(|(name, raw)| raw.check(name, diagnostics)).collect();
        let tls = pair("mqtt_listen.tls", self.tls.cert_file, self.tls.key_file, diagnostics);
        let host = self.host.map_or_else(|| DEFAULT.ip().to_string(), |host| host.0);
        let ip = ip(&host, has_users, diagnostics);
        if !ip.is_loopback() && tls.is_none() {
            diagnostics
                .warn(&Path::of("mqtt_listen"), "passwords and keys are not encrypted, as mqtt_listen.tls is not set");
        }
        MqttListen {
            address: SocketAddr::new(ip, port(self.port.as_ref(), DEFAULT.port())),
            tls,
            users,
            max_connections: self.max_connections.map_or(10_000, |max| max.0),
        }
    }
}

/// The address of the embedded server: without users it must be a loopback address, so that only programs on this
/// machine connect.
fn ip(host: &str, has_users: bool, diagnostics: &mut Diagnostics) -> IpAddr {
    let address = if host == "localhost" { "127.0.0.1" } else { host }.parse().ok();
    let complaint = match address {
        Some(ip) if has_users || IpAddr::is_loopback(&ip) => return ip,
        Some(_) => {
            "must be a loopback address such as 127.0.0.1 (another only with mqtt_listen.users, as without them everybody \
             may publish everything)"
        }
        None => "must be an address such as 127.0.0.1 or \"::\"",
    };
    diagnostics.invalid(&Path::of("mqtt_listen.host"), &Value::from(host), complaint);
    DEFAULT.ip()
}

impl RawMqttUser {
    fn check(self, name: String, diagnostics: &mut Diagnostics) -> Option<(String, MqttUser)> {
        let path = Path::of("mqtt_listen.users").then(&name);
        if !is_topic_level(&name) {
            diagnostics.error(&path, "must be a user name without \"/\", \"+\" and \"#\"");
        }
        let Some(hash) = self.password_hash else {
            diagnostics
                .error(&path.then("password_hash"), "must be set, to what \"wgkex-broker hash-password\" prints");
            return None;
        };
        let role = self.role.map_or(Role::Worker, |UserRole(role)| role);
        Some((name, MqttUser { password_hash: Secret::new(hash.0), role }))
    }
}

fn role(value: &Value) -> Option<Role> {
    match text(value)?.as_str() {
        "worker" => Some(Role::Worker),
        "broker" => Some(Role::Broker),
        _ => None,
    }
}
