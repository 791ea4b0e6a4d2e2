//! The keys of the file as they may stand there: each optional, each with its type. `check.rs` gives them meaning;
//! `keys.rs` knows from here which keys there are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::value::{
    Burst, Connections, Count, Directory, File, Flag, Hash, Host, Id, Ipam, Keepalive, Key, Label, LogLevel, Net,
    PasswordHash, Port, PrefixLength, Rate, Seconds, Share, Text, UserRole, Vni,
};

/// Stands for any name in [`Raw::every_key`].
pub(super) const ANY: &str = "*";

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Raw {
    pub domains: Vec<Option<Text>>,
    pub domain_prefixes: Vec<Option<Text>>,
    pub workers: BTreeMap<String, Worker>,
    pub sticky_worker_tolerance: Option<Share>,
    #[serde(rename = "externalName")]
    pub external_name: Option<Text>,
    pub cleanup: Cleanup,
    pub parker: Parker,
    pub broker_signing_key: Option<Text>,
    pub netbox: Netbox,
    pub mqtt: Mqtt,
    pub broker_listen: BrokerListen,
    pub logging_config: Option<Value>,
    pub log_level: Option<LogLevel>,
    pub allowlist: Allowlist,
    pub blacklist_file: Option<Text>,
    pub key_whitelist: Vec<Option<Key>>,
    pub protected_keys: Vec<Option<Key>>,
    pub mqtt_listen: MqttListen,
    pub worker_listen: Listen,
    pub worker_user: Option<Text>,
    pub confirm_timeout: Option<Seconds>,
    pub confirm_budget: Option<Seconds>,
    pub state_dir: Option<Directory>,
    pub live_keys: LiveKeys,
    pub peers: Peers,
    pub forget_idle_after: Option<Seconds>,
    pub trusted_proxies: Vec<Option<Net>>,
    pub limits: Limits,
    pub setup: Setup,
    pub key_lists: KeyLists,
    pub admin_listen: Listen,
    pub admin_token_hash: Option<Hash>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Worker {
    pub weight: Option<Share>,
    pub id: Option<Id>,
    pub pop: Option<Label>,
    pub location: Option<Label>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Cleanup {
    pub interval: Option<Seconds>,
    pub parker_stale_timeout: Option<Seconds>,
    pub legacy_stale_timeout: Option<Seconds>,
    pub initial_handshake_grace: Option<Seconds>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Parker {
    pub enabled: Option<Flag>,
    #[serde(rename = "464xlat")]
    pub xlat464: Option<Flag>,
    pub retry_interval: Option<Seconds>,
    pub wg_keepalive: Option<Seconds>,
    pub ipam: Option<Ipam>,
    pub prefixes: Prefixes,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Prefixes {
    pub ipv4: PrefixIpv4,
    pub ipv6: PrefixIpv6,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct PrefixIpv4 {
    pub length: Option<PrefixLength>,
    pub clat_subnet: Option<Text>,
    pub netbox_filter: Option<Value>,
    pub netbox_additional_data: Option<Value>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct PrefixIpv6 {
    pub length: Option<PrefixLength>,
    pub netbox_filter: Option<Value>,
    pub netbox_additional_data: Option<Value>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Netbox {
    pub url: Option<Text>,
    pub api_key: Option<Text>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Mqtt {
    pub broker_url: Option<Host>,
    pub broker_port: Option<Port>,
    pub username: Option<Text>,
    pub password: Option<Text>,
    pub keepalive: Option<Keepalive>,
    pub tls: Option<Flag>,
    pub ca_file: Option<File>,
    pub cert_file: Option<File>,
    pub key_file: Option<File>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Listen {
    pub host: Option<Host>,
    pub port: Option<Port>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct BrokerListen {
    pub host: Option<Host>,
    pub port: Option<Port>,
    pub tls: ListenTls,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct MqttListen {
    pub host: Option<Host>,
    pub port: Option<Port>,
    pub tls: MqttListenTls,
    pub users: BTreeMap<String, MqttUser>,
    pub max_connections: Option<Connections>,
}

impl MqttListen {
    /// Whether any of it stands in the file.
    pub fn is_set(&self) -> bool {
        let tls = self.tls.cert_file.is_some() || self.tls.key_file.is_some();
        self.host.is_some() || self.port.is_some() || self.max_connections.is_some() || tls || !self.users.is_empty()
    }
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct ListenTls {
    pub port: Option<Port>,
    pub cert_file: Option<File>,
    pub key_file: Option<File>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct MqttListenTls {
    pub cert_file: Option<File>,
    pub key_file: Option<File>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Limits {
    pub per_key: Limit,
    pub per_client: Limit,
    pub per_domain: Limit,
    pub global: Limit,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Limit {
    pub burst: Option<Burst>,
    pub per_second: Option<Rate>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct MqttUser {
    pub password_hash: Option<PasswordHash>,
    pub role: Option<UserRole>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Allowlist {
    pub enabled: Option<Flag>,
    pub file: Option<Text>,
    pub refresh_interval: Option<Seconds>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct KeyLists {
    #[serde(rename = "deny_dir")]
    pub deny: Option<Directory>,
    #[serde(rename = "allow_dir")]
    pub allow: Option<Directory>,
    #[serde(rename = "trusted_dir")]
    pub trusted: Option<Directory>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct LiveKeys {
    pub max: Option<Count>,
    pub ttl: Option<Seconds>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Peers {
    pub max: Option<Count>,
    pub unproven: Option<Count>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Setup {
    pub key_dir: Option<Directory>,
    pub listen_port: Option<Port>,
    pub vxlan_id: Option<Vni>,
    pub vxlan_port: Option<Port>,
    pub domains: BTreeMap<String, SetupDomain>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct SetupDomain {
    pub listen_port: Option<Port>,
    pub vxlan_id: Option<Vni>,
    pub vxlan_port: Option<Port>,
}

impl Raw {
    /// Every key there is, as a tree: a mapping where keys stand below, a list where a list stands, null at a value;
    /// [`ANY`] where the operator chooses the names.
    pub fn every_key() -> Value {
        let raw = Self {
            domains: vec![None],
            domain_prefixes: vec![None],
            key_whitelist: vec![None],
            protected_keys: vec![None],
            trusted_proxies: vec![None],
            workers: BTreeMap::from([(ANY.to_owned(), Worker::default())]),
            mqtt_listen: MqttListen {
                users: BTreeMap::from([(ANY.to_owned(), MqttUser::default())]),
                ..MqttListen::default()
            },
            setup: Setup { domains: BTreeMap::from([(ANY.to_owned(), SetupDomain::default())]), ..Setup::default() },
            ..Self::default()
        };
        serde_json::to_value(raw).unwrap_or_default()
    }
}
