//! The changes of a config since it was read.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::diagnostics::Places;
use super::{Config, ConfigError, ConfigProblem};

/// The source of a config, and the values of all its keys. It is not part of the settings, so all sources compare as
/// equal.
#[derive(Clone, Default)]
pub struct ConfigSource {
    /// The file, if the caller named one.
    file: Option<PathBuf>,
    /// The locations of keys that may get a problem only later.
    places: Places,
    values: Value,
}

impl ConfigSource {
    pub(super) fn of(values: Value, places: Places) -> Self {
        Self { file: None, places, values }
    }

    /// A problem of this key.
    pub(super) fn problem(&self, key: &str, problem: String) -> ConfigProblem {
        let Places { file, lines } = &self.places;
        ConfigProblem { file: file.clone(), line: lines.get(key).copied(), key: Some(key.to_owned()), problem }
    }

    /// The file of the config; none if the command line named it, or the config is from variables.
    pub(super) fn chosen_file(&self) -> Option<&Path> {
        self.places.file.as_deref().filter(|_| self.file.is_none()).map(Path::new)
    }

    /// The text at this JSON pointer (RFC 6901), if there is one.
    pub(super) fn text(&self, pointer: &str) -> Option<&str> {
        self.values.pointer(pointer)?.as_str()
    }

    pub(super) fn in_file(self, file: &Path) -> Self {
        Self { file: Some(file.to_owned()), ..self }
    }

    /// The keys, each with those above it as in `mqtt.tls`, whose values differ, in their order. Lists count as one value.
    #[must_use]
    pub fn changes(&self, newer: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        compare("", &self.values, &newer.values, &mut changes);
        changes
    }
}

impl Config {
    /// Reads the config again from its source.
    pub fn reload(&self) -> Result<Self, ConfigError> {
        Self::load(self.source.file.as_deref())
    }
}

/// The values are not shown: some are passwords.
impl fmt::Debug for ConfigSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSource").field("file", &self.file).finish_non_exhaustive()
    }
}

impl PartialEq for ConfigSource {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A key that is missing is the same as one that is null, an empty list, or a mapping without values.
fn compare(path: &str, older: &Value, newer: &Value, changes: &mut Vec<String>) {
    let (Some(older_keys), Some(newer_keys)) = (mapping(older), mapping(newer)) else {
        if older != newer {
            changes.push(path.to_owned());
        }
        return;
    };
    let keys: BTreeSet<&String> = older_keys.keys().chain(newer_keys.keys()).collect();
    for key in keys {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        compare(&path, older.get(key).unwrap_or(&Value::Null), newer.get(key).unwrap_or(&Value::Null), changes);
    }
}

fn mapping(value: &Value) -> Option<Cow<'_, Map<String, Value>>> {
    match value {
        Value::Object(keys) => Some(Cow::Borrowed(keys)),
        Value::Null => Some(Cow::Owned(Map::new())),
        Value::Array(items) if items.is_empty() => Some(Cow::Owned(Map::new())),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(older: &str, newer: &str) -> Vec<String> {
        let least = "domains: [d_a]\ndomain_prefixes: [d_]\n";
        let config = |yaml: &str| Config::parse("f", &format!("{least}{yaml}"), "gw").unwrap();
        config(older).source.changes(&config(newer).source)
    }

    #[test]
    fn each_changed_key_is_named_once() {
        let none: Vec<String> = Vec::new();
        assert_eq!(changes("", ""), none);
        assert_eq!(changes("mqtt: ~", "mqtt: {tls: ~}"), none);
        assert_eq!(changes("workers: {a: {weight: 1}}", "workers: {a: {weight: 1}}"), none);
        assert_eq!(
            changes("workers: {a: {weight: 1}}", "workers: {a: {weight: 2}, b: {weight: 3}}"),
            ["workers.a.weight", "workers.b.weight"]
        );
        assert_eq!(changes("log_level: INFO\npeers: {max: 9}", "protected_keys: []"), ["log_level", "peers.max"]);
        assert_eq!(changes("worker_listen: '[::1]:1'", "worker_listen: '[::1]:2'"), ["worker_listen.port"]);
    }

    #[test]
    fn no_value_is_shown() {
        let config = Config::parse("f", "domains: [d_a]\ndomain_prefixes: [d_]\nexternalName: hidden", "gw").unwrap();
        assert!(!format!("{:?}", config.source).contains("hidden"));
    }
}
