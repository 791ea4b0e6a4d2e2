//! Messages that a program does not use, and why.

use serde::de::DeserializeOwned;
use strum::AsRefStr;

use crate::PublicKey;

/// Why an MQTT message is ignored: the label `reason` of the metrics that count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, AsRefStr)]
#[strum(serialize_all = "snake_case")]
pub enum Ignored {
    /// Its topic is unknown, or not one of this session.
    Topic,
    /// Its domain is not served.
    Domain,
    /// Its payload is invalid for the topic.
    Payload,
}

/// The JSON value in a payload.
pub fn json<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Ignored> {
    serde_json::from_slice(payload).map_err(|_| Ignored::Payload)
}

/// The key that is the payload of a key topic (contract section 4).
pub fn key(payload: &[u8]) -> Result<PublicKey, Ignored> {
    let text = std::str::from_utf8(payload).map_err(|_| Ignored::Payload)?;
    text.parse().map_err(|_| Ignored::Payload)
}
