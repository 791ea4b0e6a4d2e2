//! The variables that containers set instead of a file (contract section 7).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::leaf::truth;

/// Each variable with the key that it stands for.
pub(super) const ALIASES: [(&str, &str); 9] = [
    ("WGKEX_DOMAIN_PREFIXES", "domain_prefixes"),
    ("WGKEX_DOMAINS", "domains"),
    ("WGKEX_DEBUG", "log_level"),
    ("MQTT_BROKER_URL", "mqtt.broker_url"),
    ("MQTT_BROKER_PORT", "mqtt.broker_port"),
    ("MQTT_USERNAME", "mqtt.username"),
    ("MQTT_PASSWORD", "mqtt.password"),
    ("MQTT_KEEPALIVE", "mqtt.keepalive"),
    ("MQTT_TLS", "mqtt.tls"),
];

/// The tree that a file with the same content would give. An empty variable is one that is not set.
pub(super) fn tree(variables: &BTreeMap<String, String>) -> Value {
    let (mut top, mut mqtt) = (Map::new(), Map::new());
    let set = ALIASES.iter().filter_map(|(name, path)| Some((*path, variables.get(*name)?)));
    for (path, text) in set.filter(|(_, text)| !text.is_empty()) {
        match path.strip_prefix("mqtt.") {
            Some(key) => mqtt.insert(key.into(), text.as_str().into()),
            None if path == "log_level" => top.insert(path.into(), level(text).into()),
            None => top.insert(path.into(), names(text)),
        };
    }
    top.insert("mqtt".into(), mqtt.into());
    top.into()
}

fn names(text: &str) -> Value {
    text.split([',', ' ']).filter(|name| !name.is_empty()).collect()
}

/// `WGKEX_DEBUG` is a level, or whether there is to be one.
fn level(text: &str) -> &str {
    match truth(text) {
        Some(true) => "DEBUG",
        Some(false) => "INFO",
        None => text,
    }
}
