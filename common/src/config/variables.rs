//! The variables that containers set instead of a file (contract section 7).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::value::truth;

/// Each variable with the key that it sets.
pub(super) const ALIASES: [(&str, &str); 11] = [
    ("WGKEX_DOMAIN_PREFIXES", "domain_prefixes"),
    ("WGKEX_DOMAINS", "domains"),
    ("WGKEX_DEBUG", "log_level"),
    ("WGKEX_BROKER_LISTEN", "broker_listen"),
    ("MQTT_BROKER_URL", "mqtt.broker_url"),
    ("MQTT_BROKER_PORT", "mqtt.broker_port"),
    ("MQTT_USERNAME", "mqtt.username"),
    // Before the variable whose path is a prefix of this one.
    ("MQTT_PASSWORD_FILE", "mqtt.password_file"),
    ("MQTT_PASSWORD", "mqtt.password"),
    ("MQTT_KEEPALIVE", "mqtt.keepalive"),
    ("MQTT_TLS", "mqtt.tls"),
];

/// The most wrong letters for which a similar variable is suggested.
const TYPO_MAX: usize = 3;

/// All addresses: a server on the loopback address of a container cannot be reached from outside.
const EVERYWHERE: &str = "::";

/// The tree that a file with the same content would give.
pub(super) fn tree(variables: &BTreeMap<String, String>) -> Value {
    let (mut top, mut mqtt) = (Map::new(), Map::new());
    top.insert("broker_listen".into(), EVERYWHERE.into());
    for (name, path) in ALIASES {
        let Some(text) = value(variables, name) else { continue };
        match path.strip_prefix("mqtt.") {
            Some(key) => mqtt.insert(key.into(), text.into()),
            None if path == "log_level" => top.insert(path.into(), level(text).into()),
            None if path == "broker_listen" => top.insert(path.into(), address(text).into()),
            None => top.insert(path.into(), names(&variables[name])),
        };
    }
    top.insert("mqtt".into(), mqtt.into());
    top.into()
}

/// Unknown variables that are similar to known ones, each with that one.
pub(super) fn misspelt(variables: &BTreeMap<String, String>) -> Vec<(&str, &'static str)> {
    let is_known = |name: &str| ALIASES.iter().any(|(known, _)| *known == name);
    let meant = |name: &str| {
        let known = ALIASES.iter().map(|(known, _)| (strsim::damerau_levenshtein(known, name), *known));
        let is_near = |(edit_distance, known): &(usize, &str)| {
            *edit_distance <= TYPO_MAX || known.starts_with(&format!("{name}_"))
        };
        known.filter(is_near).min().map(|(_, known)| known)
    };
    let is_ours = |name: &&String| name.starts_with("WGKEX_") || name.starts_with("MQTT_");
    let unknown = variables.keys().filter(is_ours).filter(|name| !is_known(name));
    unknown.filter_map(|name| Some((name.as_str(), meant(name)?))).collect()
}

/// An address to listen on: a port alone means all addresses.
fn address(text: &str) -> String {
    if text.parse::<u16>().is_ok() { format!("[{EVERYWHERE}]:{text}") } else { text.into() }
}

/// The value of a variable, without the quotes that a file of variables leaves around it. An empty one counts as not
/// set.
pub(super) fn value<'a>(variables: &'a BTreeMap<String, String>, name: &str) -> Option<&'a str> {
    variables.get(name).map(|text| unquoted(text)).filter(|text| !text.is_empty())
}

/// The text without one pair of quotes around it.
fn unquoted(text: &str) -> &str {
    let inside = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
    inside('"').or_else(|| inside('\'')).unwrap_or(text)
}

/// Names in one text; it may have quotes around it, or each of them.
fn names(quoted: &str) -> Value {
    let text = unquoted(quoted);
    let text = if text.contains(['"', '\'']) { quoted } else { text };
    text.split([',', ' ']).map(unquoted).filter(|name| !name.is_empty()).collect()
}

/// `WGKEX_DEBUG` is a level, or a truth value.
fn level(text: &str) -> &str {
    match truth(text) {
        Some(true) => "DEBUG",
        Some(false) => "INFO",
        None => text,
    }
}
