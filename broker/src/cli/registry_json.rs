//! The JSON answers of a registry, this broker's or a `wireguard_api` broker's.

use std::collections::BTreeMap;

use serde_json::Value;

/// The addresses in an answer of `server/config`, by key.
pub fn addresses_by_key(config: &Value) -> BTreeMap<String, String> {
    let peers = config["peers"].as_array().into_iter().flatten();
    peers.map(|peer| (text_of(&peer["public_key"]).to_owned(), text_of(&peer["ip_address"]).to_owned())).collect()
}

/// The clients with each of their peerings.
pub fn peerings(clients: &Value) -> impl Iterator<Item = (&str, &Value)> {
    clients.as_object().into_iter().flatten().flat_map(|(name, peerings)| {
        peerings.as_object().into_iter().flatten().map(move |(_, peering)| (name.as_str(), peering))
    })
}

/// The text of a field; empty where there is none.
pub fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
