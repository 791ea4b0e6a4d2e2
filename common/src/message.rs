//! The JSON payloads of MQTT: the contract's worker data, and those of our own topics.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{PublicKey, Topic};

/// What a router must know to reach a gateway in a domain (contract section 4); retained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct WorkerData {
    /// Host name or address of the gateway as routers reach it.
    pub external_address: String,
    /// The UDP port WireGuard listens on.
    pub port: u16,
    /// The public key of the gateway's interface.
    pub public_key: PublicKey,
    /// The first address on the gateway's WireGuard interface.
    pub link_address: String,
}

/// What is retained with this payload; none if it is empty, which takes back what was (MQTT 3.1.1 section 3.3.1.3).
fn retained<T: DeserializeOwned>(payload: &[u8]) -> Result<Option<T>, serde_json::Error> {
    if payload.is_empty() { Ok(None) } else { serde_json::from_slice(payload).map(Some) }
}

impl WorkerData {
    /// What a worker says of itself by this payload; none if it takes that back.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        retained(payload)
    }
}

/// What a worker or a broker is and can do beyond the contract; retained. Unknown fields and abilities are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version of its program.
    pub version: String,
    /// Its abilities, by name.
    pub can: Vec<String>,
    /// The domains that it serves, by name; what is retained of others is left from an earlier config. None if it
    /// does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domains: Option<Vec<String>>,
    /// Which run of the program it is: another number means that it was started anew. None if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
    /// A broker's digest of the records that it shares; who has another one lacks some, or has more. None if it shares
    /// none.
    #[serde(default, rename = "revocations", skip_serializing_if = "Option::is_none")]
    pub records: Option<String>,
}

impl Hello {
    /// The ability to say what became of each key, by [`Applied`].
    pub const CONFIRM: &str = "confirm";

    /// The ability to take keys out of the kernel that are denied, and to say so by [`Revoked`].
    pub const REVOKE: &str = "revoke";

    /// The ability to answer each [`Question`].
    pub const ANSWER: &str = "answer";

    /// What a worker or a broker says of itself by this payload; none if it takes that back.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        retained(payload)
    }

    /// The hello of this worker, for the domains with these names.
    #[must_use]
    pub fn worker(domains: Vec<String>) -> Self {
        Self::new(&[Self::CONFIRM, Self::REVOKE], domains, None)
    }

    /// The hello of this broker, for the domains with these names; `instance` is of this run of it alone.
    #[must_use]
    pub fn broker(domains: Vec<String>, instance: u64) -> Self {
        Self::new(&[Self::ANSWER], domains, Some(instance))
    }

    fn new(abilities: &[&str], domains: Vec<String>, instance: Option<u64>) -> Self {
        let version = env!("CARGO_PKG_VERSION").into();
        let can = abilities.iter().map(|&ability| ability.to_owned()).collect();
        Self { version, can, domains: Some(domains), instance, records: None }
    }

    /// Whether the worker may serve the domain with this name.
    #[must_use]
    pub fn serves(&self, domain: &str) -> bool {
        self.domains.as_ref().is_none_or(|domains| domains.iter().any(|served| served == domain))
    }

    /// Whether the worker says what became of each key.
    #[must_use]
    pub fn confirms(&self) -> bool {
        self.can(Self::CONFIRM)
    }

    /// Whether the worker takes denied keys out of its kernel.
    #[must_use]
    pub fn revokes(&self) -> bool {
        self.can(Self::REVOKE)
    }

    /// Whether the broker answers questions.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.can(Self::ANSWER)
    }

    fn can(&self, wanted: &str) -> bool {
        self.can.iter().any(|ability| ability == wanted)
    }
}

/// What became of a batch of keys in one domain at one worker, said after the kernel acknowledged it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The domain's name.
    pub domain: String,
    /// Keys whose peer, route and FDB entry stand in the kernel.
    #[serde(default)]
    pub installed: Vec<PublicKey>,
    /// Keys that do not stand there, or not with all three objects, or no longer, and why, in one word or a short phrase.
    #[serde(default)]
    pub failed: BTreeMap<PublicKey, String>,
}

impl Applied {
    /// Why a key failed that a gateway has, or whose address a gateway has.
    pub const RESERVED: &str = "reserved";

    /// Why a key failed that a list does not let come.
    pub const DENIED: &str = "denied";

    /// Why a key failed whose address another key has.
    pub const ADDRESS_TAKEN: &str = "address taken";

    /// Why a key failed for which there is no room.
    pub const FULL: &str = "full";

    /// Why a key no longer stands that did: it made room for another, or was swept.
    pub const REMOVED: &str = "removed";
}

/// Keys of a domain whose first handshake a worker saw, or still sees handshakes of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The domain's name.
    pub domain: String,
    /// The keys.
    pub keys: Vec<PublicKey>,
}

/// What became at a worker of keys that a record denied, said after the kernel acknowledged it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// When the record was made, as it says itself.
    pub at: u64,
    /// Each key with [`Revoked::REMOVED`], [`Revoked::ABSENT`], or the reason why it is still there.
    pub keys: BTreeMap<PublicKey, String>,
}

impl Revoked {
    /// Peer, route and FDB entry were there, and are gone.
    pub const REMOVED: &str = "removed";
    /// There was nothing of it.
    pub const ABSENT: &str = "absent";
}

/// One of those that share the keys.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Party {
    /// The worker of this name.
    Worker(String),
    /// The broker of this name.
    Broker(String),
}

impl Party {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Worker(name) | Self::Broker(name) => name,
        }
    }

    /// Where it hears the answers to its questions.
    #[must_use]
    pub fn pages(&self) -> Topic {
        match self {
            Self::Worker(worker) => Topic::WorkerPages { worker: worker.clone() },
            Self::Broker(broker) => Topic::BrokerPages { broker: broker.clone() },
        }
    }
}

/// Asks a broker for live keys of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Who asks.
    pub from: Party,
    /// The domain's name.
    pub domain: String,
    /// Keys beyond this one in the order of their bytes; none for the first page.
    pub after: Option<PublicKey>,
    /// Only keys that the broker heard of in the last so many seconds; none for all.
    pub younger_than: Option<u64>,
}

/// Asks a broker for all its records, which it then says to everybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordsQuestion {
    /// Who asks.
    pub from: Party,
    /// True: it tells this question from a [`Question`].
    pub revocations: bool,
}

/// What a broker is asked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Asked {
    /// For all records.
    Records(RecordsQuestion),
    /// For live keys.
    Keys(Question),
}

/// The answer to a [`Question`]: the first live keys, in the order of their bytes, that it asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// Who answers.
    pub broker: String,
    /// As asked.
    pub domain: String,
    /// As asked.
    pub after: Option<PublicKey>,
    /// Each key with its age.
    pub keys: BTreeMap<PublicKey, Age>,
    /// Whether there are more keys after these.
    pub more: bool,
}

/// How long ago a live key last came or shook hands, in seconds, and whether it ever shook hands. In JSON a list of
/// both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Age(pub u64, pub bool);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_data_is_the_contracts_json() {
        let data = WorkerData {
            external_address: "gw04.ext.ffmuc.net".into(),
            port: 40011,
            public_key: "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=".parse().unwrap(),
            link_address: "fe80::27c:16ff:fec0:6c74".into(),
        };
        let json = r#"{"ExternalAddress":"gw04.ext.ffmuc.net","Port":40011,"PublicKey":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","LinkAddress":"fe80::27c:16ff:fec0:6c74"}"#;
        assert_eq!(serde_json::to_string(&data).unwrap(), json);
        assert_eq!(serde_json::from_str::<WorkerData>(json).unwrap(), data);
    }

    #[test]
    fn a_question_for_records_is_told_from_one_for_keys() {
        let asked = |json: &str| serde_json::from_str::<Asked>(json);
        let records = asked(r#"{"from":{"worker":"gw1"},"revocations":true}"#).unwrap();
        assert_eq!(records, Asked::Records(RecordsQuestion { from: Party::Worker("gw1".into()), revocations: true }));
        let keys = r#"{"from":{"broker":"b1"},"domain":"d","after":null,"younger_than":20}"#;
        assert!(matches!(asked(keys).unwrap(), Asked::Keys(question) if question.domain == "d"));
        assert!(asked(r#"{"from":{"broker":"b1"}}"#).is_err());
    }

    #[test]
    fn applied_names_each_key_once_and_a_later_version_may_say_more() {
        let json = r#"{"domain":"d","installed":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="],"failed":{"o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=":"own key"}}"#;
        let applied: Applied = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&applied).unwrap(), json);
        assert_eq!(serde_json::from_str::<Applied>(r#"{"domain":"d","new":1}"#).unwrap().domain, "d");
        assert!(serde_json::from_str::<Applied>(r#"{"domain":"d","installed":["x"]}"#).is_err());
    }
}
