//! All keys of the file, each optional and with its type, section by section; and the [`Config`] that they make
//! together. `keys.rs` derives the known keys from these types.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::diagnostics::{Diagnostics, Path};
use super::domains::{self, RawWorker};
use super::http::{Listen, RawBrokerListen, RawListen, check_addresses_differ};
use super::hub::RawHub;
use super::interfaces::InterfaceOwners;
use super::limits::RawLimits;
use super::lists::{RawAllowlist, RawKeyLists};
use super::logging::{Format, LogFormat, log_level};
use super::mqtt::RawMqtt;
use super::mqtt_listen::{RawMqttListen, RawMqttUser};
use super::original::{Netbox, Parker};
use super::peers::{RawCleanup, RawLiveKeys, RawPeers, confirm, forget_idle_after};
use super::rebalance::RawRebalance;
use super::registry::{self, RawRegistry};
use super::servers::{self, RawServer};
use super::setup::{RawSetup, RawSetupDomain};
use super::tenants::RawTenants;
use super::value::{DatabaseUrl, Directory, File, Hash, Key, LogLevel, Net, PublicHost, Seconds, Secret, Share, Text};
use super::{Config, ConfigSource};
use crate::{HostName, PublicKey};

/// Stands for any name in [`Raw::every_key`].
pub(super) const ANY: &str = "*";

/// The most errors of types before the check stops.
const ERRORS_MAX: usize = 50;

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Raw {
    pub domains: Vec<Option<Text>>,
    pub domain_prefixes: Vec<Option<Text>>,
    pub workers: BTreeMap<String, RawWorker>,
    pub sticky_worker_tolerance: Option<Share>,
    #[serde(rename = "externalName")]
    pub external_name: Option<PublicHost>,
    pub cleanup: RawCleanup,
    pub parker: Parker,
    pub broker_signing_key: Option<Text>,
    pub netbox: Netbox,
    pub mqtt: RawMqtt,
    pub broker_listen: RawBrokerListen,
    pub logging_config: Option<Value>,
    pub log_level: Option<LogLevel>,
    pub log_format: Option<Format>,
    pub allowlist: RawAllowlist,
    pub blacklist_file: Option<Text>,
    pub key_whitelist: Vec<Option<Key>>,
    pub protected_keys: Vec<Option<Key>>,
    pub mqtt_listen: RawMqttListen,
    pub worker_listen: RawListen,
    pub worker_user: Option<Text>,
    pub confirm_timeout: Option<Seconds>,
    pub confirm_budget: Option<Seconds>,
    pub state_dir: Option<Directory>,
    pub live_keys: RawLiveKeys,
    pub peers: RawPeers,
    pub forget_idle_after: Option<Seconds>,
    pub trusted_proxies: Vec<Option<Net>>,
    pub limits: RawLimits,
    pub rebalance: RawRebalance,
    pub setup: RawSetup,
    pub key_lists: RawKeyLists,
    pub admin_listen: RawListen,
    pub admin_token_hash: Option<Hash>,
    pub storage: Option<DatabaseUrl>,
    pub storage_password_file: Option<File>,
    pub registry: RawRegistry,
    pub servers: BTreeMap<String, RawServer>,
    pub hub: RawHub,
    pub tenants: RawTenants,
}

impl Raw {
    /// Deserializes a normalized `tree`. A value of a wrong type is reported and left out, so that all such errors are
    /// found at once; none if there are too many.
    pub fn read(tree: &mut Value, diagnostics: &mut Diagnostics) -> Option<Self> {
        for _ in 0..ERRORS_MAX {
            let error = match serde_path_to_error::deserialize::<_, Self>(&*tree) {
                Ok(raw) => return Some(raw),
                Err(error) => error,
            };
            let path = Path::from(error.path());
            let value = path.find(tree).map(Value::take).unwrap_or_default();
            diagnostics.invalid(&path, &value, &error.inner().to_string());
        }
        None
    }

    /// The config on the machine `host_name`; it is valid only if the diagnostics has no error.
    pub fn check(self, host_name: &str, diagnostics: &mut Diagnostics) -> Config {
        let name = check_name(host_name, diagnostics);
        domains::check_present(&self.domains, &self.domain_prefixes, diagnostics);
        self.parker.check(diagnostics);
        let listed: Vec<Text> = self.domains.into_iter().flatten().collect();
        let domains = domains::check(&listed, self.domain_prefixes, diagnostics);
        let is_listen_set = self.mqtt_listen.is_set();
        let mqtt_listen = self.mqtt.broker_url.is_none().then(|| self.mqtt_listen.check(diagnostics));
        let external_name = self.external_name.map(|name| name.0).filter(|name| !name.is_empty());
        let whitelist: BTreeSet<PublicKey> = self.key_whitelist.into_iter().flatten().map(|key| key.0).collect();
        let protected_keys = self.protected_keys.into_iter().flatten().map(|key| key.0);
        let workers = domains::workers(&self.workers, diagnostics);
        let mqtt = self.mqtt.check(mqtt_listen.as_ref(), is_listen_set, diagnostics);
        let (broker_listen, https) = self.broker_listen.check(diagnostics);
        let (worker_listen, admin_listen) = (self.worker_listen.check(9586), self.admin_listen.check(5001));
        let (key_dir, tenants) = (self.setup.key_dir(), self.tenants.check(diagnostics));
        let servers = servers::check(self.servers, &key_dir, diagnostics);
        let hub = self.hub.check(&tenants.settings.networks, &key_dir, diagnostics);
        let (is_setup_named, setup) = (self.setup.is_named(), self.setup.check(&listed, &domains, diagnostics));
        InterfaceOwners { domains: &setup, servers: &servers, hub: hub.as_ref() }.check(diagnostics);
        let mqtt_address = mqtt_listen.as_ref().map(|listen| Listen::of(listen.address));
        check_addresses_differ(
            [
                ("broker_listen", Some(&broker_listen)),
                ("broker_listen.tls", https.as_ref().map(|https| &https.listen)),
                ("admin_listen", self.admin_token_hash.as_ref().map(|_| &admin_listen)),
                ("mqtt_listen", mqtt_address.as_ref()),
                ("worker_listen", Some(&worker_listen)),
            ],
            diagnostics,
        );
        Config {
            name,
            external_name: external_name.unwrap_or_else(|| host_name.to_owned()),
            workers,
            cleanup: self.cleanup.check(),
            mqtt,
            mqtt_listen,
            https,
            broker_listen,
            worker_listen,
            worker_user: self.worker_user.map(|user| user.0).filter(|user| !user.is_empty()),
            confirm: confirm(self.confirm_timeout.as_ref(), self.confirm_budget.as_ref(), diagnostics),
            state_dir: self.state_dir.map_or_else(|| "/var/lib/wgkex".into(), |dir| dir.0.into()),
            live_keys: self.live_keys.check(),
            peers: self.peers.check(),
            forget_idle_after: forget_idle_after(self.forget_idle_after.as_ref(), diagnostics),
            protected_keys: protected_keys.chain(whitelist.clone()).collect(),
            trusted_proxies: self.trusted_proxies.into_iter().flatten().map(|net| IpNet::trunc(&net.0)).collect(),
            limits: self.limits.check(),
            key_lists: self.key_lists.check(self.blacklist_file, self.allowlist, whitelist, diagnostics),
            rebalance: self.rebalance.check(),
            admin_listen,
            admin_token_hash: self.admin_token_hash.map(|hash| Secret::new(hash.0)),
            storage: registry::storage(self.storage, self.storage_password_file, diagnostics),
            registry: self.registry.check(diagnostics),
            servers,
            hub,
            tenants: tenants.enabled(),
            is_setup_named,
            setup,
            log_level: log_level(self.log_level, self.logging_config.as_ref(), diagnostics),
            log_format: self.log_format.map_or_else(LogFormat::default, |format| format.0),
            source: ConfigSource::default(),
            warnings: Vec::new(),
            domains: domains.into_iter().collect(),
        }
    }

    /// All known keys, as a tree: a mapping where keys stand below, a list where a list stands, null at a value;
    /// [`ANY`] where the operator chooses the names.
    pub fn every_key() -> Value {
        let raw = Self {
            domains: vec![None],
            domain_prefixes: vec![None],
            key_whitelist: vec![None],
            protected_keys: vec![None],
            trusted_proxies: vec![None],
            workers: BTreeMap::from([(ANY.to_owned(), RawWorker::default())]),
            mqtt_listen: RawMqttListen {
                users: BTreeMap::from([(ANY.to_owned(), RawMqttUser::default())]),
                ..RawMqttListen::default()
            },
            servers: BTreeMap::from([(ANY.to_owned(), RawServer::default())]),
            setup: RawSetup {
                domains: BTreeMap::from([(ANY.to_owned(), RawSetupDomain::default())]),
                ..RawSetup::default()
            },
            ..Self::default()
        };
        serde_json::to_value(raw).unwrap_or_default()
    }
}

fn check_name(host_name: &str, diagnostics: &mut Diagnostics) -> HostName {
    host_name.parse().unwrap_or_else(|_| {
        diagnostics.error_of_source(None, &format!(
            "the host name must be one without \"/\", \"+\", \"#\" and control characters, as it is part of MQTT topics, not \
             {host_name:?}"
        ));
        HostName::any()
    })
}
