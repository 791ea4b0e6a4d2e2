//! The JSON payloads of MQTT: the contract's worker data, and those of our own topics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::address::reserved::GatewayPeer;
use crate::wire::drain::Drain;
use crate::wire::name::Participant;
use crate::wire::revoke_outcome::RevokeOutcome;
use crate::{BrokerName, PublicKey, RejectReason};

/// The longest payload of a hello or of worker data.
const STATE_MAX: usize = 64 << 10;
/// The longest name or address.
const NAME_MAX: usize = 255;
/// The longest version, ability or digest.
const WORD_MAX: usize = 64;
/// So many abilities at most, and so many domains.
const ABILITIES_MAX: usize = 64;
const DOMAINS_MAX: usize = 1024;
/// The longest reason of a drain.
const REASON_MAX: usize = 200;

/// The error of a payload, for the log: it shows nothing of the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is longer than any that a program of the fleet sends.
    #[error("has more than {STATE_MAX} bytes")]
    Long,
    /// It is not an object of JSON.
    #[error("is not a JSON object")]
    Json,
    /// A field is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has another type, or an invalid value.
    #[error("{0} is not {1}")]
    Field(&'static str, &'static str),
}

/// The parameters that a router needs to use a gateway in a domain (contract section 4); retained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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

impl WorkerData {
    /// The worker data in this payload; none if it is empty, which clears them. The original's broker passes the fields
    /// on as text, so the port may be a text.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some(fields) = RetainedFields::parse(payload)? else { return Ok(None) };
        Ok(Some(Self {
            external_address: fields.address("ExternalAddress")?,
            port: fields.port("Port")?,
            public_key: fields.key("PublicKey")?,
            link_address: fields.address("LinkAddress")?,
        }))
    }
}

impl From<&WorkerData> for GatewayPeer {
    fn from(data: &WorkerData) -> Self {
        Self { key: data.public_key, address: data.link_address.parse().ok() }
    }
}

/// The fields of a retained payload, by name.
struct RetainedFields(Map<String, Value>);

impl RetainedFields {
    /// None if the payload is empty, which clears the retained message (MQTT 3.1.1 section 3.3.1.3).
    fn parse(payload: &[u8]) -> Result<Option<Self>, Malformed> {
        match payload.len() {
            0 => Ok(None),
            1..=STATE_MAX => {
                serde_json::from_slice(payload).map(|fields| Some(Self(fields))).map_err(|_| Malformed::Json)
            }
            _ => Err(Malformed::Long),
        }
    }

    /// A field that is not null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn needed(&self, name: &'static str) -> Result<&Value, Malformed> {
        self.get(name).ok_or(Malformed::Missing(name))
    }

    fn text(&self, name: &'static str, max: usize) -> Result<String, Malformed> {
        text(self.needed(name)?, max).ok_or(Malformed::Field(name, "a short text"))
    }

    /// An empty text counts as missing: it leads to no gateway.
    fn address(&self, name: &'static str) -> Result<String, Malformed> {
        let address = self.text(name, NAME_MAX)?;
        if address.trim().is_empty() { Err(Malformed::Missing(name)) } else { Ok(address) }
    }

    fn texts(&self, name: &'static str, (number, max): (usize, usize)) -> Result<Vec<String>, Malformed> {
        let items = self.needed(name)?.as_array().filter(|items| items.len() <= number);
        let texts = items.and_then(|items| items.iter().map(|item| text(item, max)).collect());
        texts.ok_or(Malformed::Field(name, "a list of a few short texts"))
    }

    fn port(&self, name: &'static str) -> Result<u16, Malformed> {
        let port = match self.needed(name)? {
            Value::Number(number) => number.as_u64().and_then(|port| port.try_into().ok()),
            Value::String(text) => text.trim().parse().ok(),
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
        };
        port.filter(|port| *port > 0).ok_or(Malformed::Field(name, "a port from 1 to 65535"))
    }

    fn key(&self, name: &'static str) -> Result<PublicKey, Malformed> {
        let key = self.needed(name)?.as_str().and_then(|text| text.parse().ok());
        key.ok_or(Malformed::Field(name, "a WireGuard public key"))
    }
}

fn text(value: &Value, max: usize) -> Option<String> {
    value.as_str().filter(|text| text.len() <= max).map(str::to_owned)
}

/// Unknown fields are ignored.
fn drain(value: &Value) -> Result<Drain, Malformed> {
    let drain = Drain::deserialize(value).ok();
    let is_short = |drain: &Drain| drain.reason.as_ref().is_none_or(|reason| reason.len() <= REASON_MAX);
    drain.filter(is_short).ok_or(Malformed::Field("drain", "a time and a short text"))
}

fn served(field: &'static str, value: &Value) -> Result<ServiceAnnouncement, Malformed> {
    let served = ServiceAnnouncement::deserialize(value).ok().filter(|served| served.rules.len() <= WORD_MAX);
    served.ok_or(Malformed::Field(field, "a time and a short text"))
}

/// The state and the abilities of a worker or a broker beyond the contract; retained. Unknown fields and abilities are
/// ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hello {
    /// The version of its program.
    pub version: String,
    /// Its abilities, by name.
    #[serde(rename = "can")]
    pub capabilities: Vec<String>,
    /// The domains that it serves, by name; retained messages of others are from an earlier config. None if it has no
    /// such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domains: Option<Vec<String>>,
    /// The run of the program: another number means that it was restarted. None if it has no such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
    /// A broker's digest of the records that it shares; a program with another digest has other records. None if it
    /// shares none.
    #[serde(rename = "revocations", skip_serializing_if = "Option::is_none")]
    pub records: Option<String>,
    /// The drain of this worker: it gets no new routers. None if it has no such field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// Whether this worker detects another program with its name.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub name_in_use: bool,
    /// The tenants that this broker serves. None if it serves none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenants: Option<ServiceAnnouncement>,
    /// The registry that only this broker has, as no other broker has access to its database. None if it has none like
    /// that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<ServiceAnnouncement>,
}

/// A hello as it is published.
#[derive(Serialize)]
struct SentHello<'a> {
    #[serde(flatten)]
    hello: &'a Hello,
    /// When it is sent, in seconds of Unix time by the clock of its program.
    time: u64,
}

/// The tenants or the registry of a broker: shared by brokers with the same rules, or exclusive to one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAnnouncement {
    /// When it was started, in milliseconds since 1970 by its own clock: the earliest one takes precedence.
    pub since: u64,
    /// A digest of the settings that have to be equal.
    pub rules: String,
}

impl Hello {
    /// The ability to report the outcome of each key, by [`Applied`].
    pub const CONFIRM: &str = "confirm";

    /// The ability to remove denied keys from the kernel, and to report that by [`Revoked`].
    pub const REVOKE: &str = "revoke";

    /// The ability to answer each [`SyncRequest`].
    pub const ANSWER: &str = "answer";

    /// A broker's ability to receive requests on topics of the requesting program; it sends its own there, too.
    pub const OWN_TOPIC_REQUESTS: &str = "named questions";

    /// A broker's ability to receive requests for records there, too.
    pub const NAMED_RECORDS: &str = "named records";

    /// A broker's ability to answer requests for leases, as it has a registry.
    pub const LEASES: &str = "leases";

    /// The hello in this payload; none if it is empty, which clears it.
    pub fn parse(payload: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some(fields) = RetainedFields::parse(payload)? else { return Ok(None) };
        let number = |value: &Value| value.as_u64().ok_or(Malformed::Field("instance", "a whole number"));
        let said = |name| fields.get(name).is_some();
        Ok(Some(Self {
            version: fields.text("version", WORD_MAX)?,
            capabilities: fields.texts("can", (ABILITIES_MAX, WORD_MAX))?,
            domains: said("domains").then(|| fields.texts("domains", (DOMAINS_MAX, NAME_MAX))).transpose()?,
            instance: fields.get("instance").map(number).transpose()?,
            records: said("revocations").then(|| fields.text("revocations", WORD_MAX)).transpose()?,
            drain: fields.get("drain").map(drain).transpose()?,
            name_in_use: fields.get("name_in_use").is_some_and(|value| *value == Value::Bool(true)),
            tenants: fields.get("tenants").map(|value| served("tenants", value)).transpose()?,
            registry: fields.get("registry").map(|value| served("registry", value)).transpose()?,
        }))
    }

    /// The payload, sent at this time.
    #[must_use]
    pub fn payload(&self, time: u64) -> Vec<u8> {
        serde_json::to_vec(&SentHello { hello: self, time }).unwrap_or_default()
    }

    /// When this payload was sent, in seconds of Unix time by the clock of its program. None if it has no time.
    #[must_use]
    pub fn sent(payload: &[u8]) -> Option<u64> {
        RetainedFields::parse(payload).ok()??.get("time")?.as_u64()
    }

    /// Whether this payload is this hello, with any time.
    #[must_use]
    pub fn is_in(&self, payload: &[u8]) -> bool {
        Self::sent(payload).is_some_and(|time| self.payload(time) == payload)
    }

    /// The hello of this worker, for the domains with these names.
    #[must_use]
    pub fn worker(domains: Vec<String>) -> Self {
        Self::new(&[Self::CONFIRM, Self::REVOKE], domains, None)
    }

    /// The hello of this broker, for the domains with these names; `instance` identifies this run of it.
    #[must_use]
    pub fn broker(domains: Vec<String>, instance: u64) -> Self {
        Self::new(&[Self::ANSWER, Self::OWN_TOPIC_REQUESTS, Self::NAMED_RECORDS], domains, Some(instance))
    }

    fn new(abilities: &[&str], domains: Vec<String>, instance: Option<u64>) -> Self {
        let version = env!("CARGO_PKG_VERSION").into();
        let capabilities = abilities.iter().map(|&ability| ability.to_owned()).collect();
        Self {
            version,
            capabilities,
            domains: Some(domains),
            instance,
            records: None,
            drain: None,
            name_in_use: false,
            tenants: None,
            registry: None,
        }
    }

    /// Whether the worker may serve the domain with this name.
    #[must_use]
    pub fn serves(&self, domain: &str) -> bool {
        self.domains.as_ref().is_none_or(|domains| domains.iter().any(|served| served == domain))
    }

    /// Whether the worker reports the outcome of each key.
    #[must_use]
    pub fn confirms(&self) -> bool {
        self.can(Self::CONFIRM)
    }

    /// Whether the worker removes denied keys from its kernel.
    #[must_use]
    pub fn revokes(&self) -> bool {
        self.can(Self::REVOKE)
    }

    /// Whether the broker answers requests.
    #[must_use]
    pub fn answers(&self) -> bool {
        self.can(Self::ANSWER)
    }

    /// Whether the broker receives requests on topics of the requesting program.
    #[must_use]
    pub fn names_requests(&self) -> bool {
        self.can(Self::OWN_TOPIC_REQUESTS)
    }

    /// Whether the broker receives requests for records on topics of the requesting program.
    #[must_use]
    pub fn names_records(&self) -> bool {
        self.can(Self::NAMED_RECORDS)
    }

    /// Adds the ability of a broker with a registry.
    #[must_use]
    pub fn with_leases(mut self) -> Self {
        self.capabilities.push(Self::LEASES.to_owned());
        self
    }

    /// Whether the broker has a registry.
    #[must_use]
    pub fn has_leases(&self) -> bool {
        self.can(Self::LEASES)
    }

    fn can(&self, wanted: &str) -> bool {
        self.capabilities.iter().any(|ability| ability == wanted)
    }
}

/// The outcomes of a batch of keys in one domain at one worker, published after the kernel acknowledged it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The domain's name.
    pub domain: String,
    /// Keys whose peer, route and FDB entry are in the kernel.
    #[serde(default)]
    pub installed: Vec<PublicKey>,
    /// Keys of which one of these is missing, or that were removed, each with the reason.
    #[serde(default)]
    pub failed: BTreeMap<PublicKey, RejectReason>,
}

/// Keys of a domain that had a first handshake at a worker, or continue to have handshakes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handshakes {
    /// The domain's name.
    pub domain: String,
    /// The keys.
    pub keys: Vec<PublicKey>,
}

/// The outcomes of keys that a record denied at one worker, published after the kernel acknowledged the removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// When the record was made, by its own time.
    pub at: u64,
    /// The outcome of each key.
    pub keys: BTreeMap<PublicKey, RevokeOutcome>,
}

/// The sender of a request to a broker, as far as the topic proves it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Requester {
    /// A program, on a topic on which no other program may publish in its name.
    Named(Participant),
    /// Any program, on the topic on which every program may publish, in any name.
    Shared,
}

/// A request to a broker for live keys of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncRequest {
    /// The program that sends the request.
    pub from: Participant,
    /// The broker, if it is not in the topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<BrokerName>,
    /// The domain's name.
    pub domain: String,
    /// Keys beyond this one in the order of their bytes; none for the first chunk.
    pub after: Option<PublicKey>,
    /// Only keys that the broker updated in the last so many seconds; none for all.
    pub younger_than: Option<u64>,
}

/// A request to a broker for all its records, which it then broadcasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordsRequest {
    /// The program that sends the request.
    pub from: Participant,
    /// The broker, if it is not in the topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<BrokerName>,
    /// True: it distinguishes this request from a [`SyncRequest`].
    pub revocations: bool,
}

/// A request to a broker.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Request {
    /// For all records.
    Records(RecordsRequest),
    /// For live keys.
    Keys(SyncRequest),
}

/// The answer to a [`SyncRequest`]: the first requested live keys, in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotChunk {
    /// The broker that answers.
    pub broker: BrokerName,
    /// The domain's name, from the request.
    pub domain: String,
    /// The key after which it begins, from the request.
    pub after: Option<PublicKey>,
    /// Each key with its age.
    pub keys: BTreeMap<PublicKey, Age>,
    /// Whether there are more keys after these.
    pub more: bool,
}

/// The age of a live key. In JSON a list of both values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, bool)", into = "(u64, bool)")]
pub struct Age {
    /// Seconds since the key was last requested or last had a handshake.
    pub age_secs: u64,
    /// Whether it ever had a handshake.
    pub has_handshake: bool,
}

impl From<(u64, bool)> for Age {
    fn from((age_secs, has_handshake): (u64, bool)) -> Self {
        Self { age_secs, has_handshake }
    }
}

impl From<Age> for (u64, bool) {
    fn from(Age { age_secs, has_handshake }: Age) -> Self {
        (age_secs, has_handshake)
    }
}

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
        assert_eq!(WorkerData::parse(json.as_bytes()), Ok(Some(data.clone())));
        // As another program may write it, and the original's broker accepts it.
        for port in ["\"40011\"", "\" 40011 \"", "40011"] {
            let text = json.replace("40011", port).replace(',', ", \"new\": [1], ");
            assert_eq!(WorkerData::parse(text.as_bytes()), Ok(Some(data.clone())), "{text}");
        }
        assert_eq!(WorkerData::parse(b""), Ok(None));
    }

    #[test]
    fn errors_in_worker_data_are_named_without_the_payload() {
        let json = r#"{"ExternalAddress":"gw","Port":1,"PublicKey":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","LinkAddress":"fe80::1"}"#;
        let with = |from: &str, to: &str| WorkerData::parse(json.replace(from, to).as_bytes()).unwrap_err().to_string();
        for (from, to, said) in [
            (json, "[]", "is not a JSON object"),
            (json, "{", "is not a JSON object"),
            (json, "\u{0}", "is not a JSON object"),
            (json, &" ".repeat(STATE_MAX + 1), "has more than 65536 bytes"),
            ("\"Port\":1,", "", "Port is missing"),
            ("\"Port\":1,", "\"Port\":null,", "Port is missing"),
            ("\"Port\":1,", "\"Port\":0,", "Port is not a port from 1 to 65535"),
            ("\"Port\":1,", "\"Port\":65536,", "Port is not a port from 1 to 65535"),
            ("\"Port\":1,", "\"Port\":1.5,", "Port is not a port from 1 to 65535"),
            ("\"Port\":1,", "\"Port\":\"http\",", "Port is not a port from 1 to 65535"),
            ("TszFS3oF", "secret", "PublicKey is not a WireGuard public key"),
            ("\"gw\"", "7", "ExternalAddress is not a short text"),
            ("fe80::1", &"x".repeat(256), "LinkAddress is not a short text"),
            ("\"gw\"", "\"\"", "ExternalAddress is missing"),
            ("fe80::1", " ", "LinkAddress is missing"),
        ] {
            assert_eq!(with(from, to), said, "{to:.40}");
        }
    }

    #[test]
    fn a_hello_has_its_time_and_is_otherwise_the_same_at_any_time() {
        let hello = Hello::broker(vec!["d".into()], 7);
        let payload = hello.payload(1_796_018_400);
        assert!(payload.ends_with(b",\"time\":1796018400}"), "{payload:?}");
        assert_eq!(Hello::parse(&payload), Ok(Some(hello.clone())));
        assert_eq!(Hello::sent(&payload), Some(1_796_018_400));
        let older = serde_json::to_vec(&hello).unwrap();
        assert_eq!(
            [Hello::sent(&older), Hello::sent(b""), Hello::sent(b"[]"), Hello::sent(br#"{"time":-1}"#)],
            [None; 4]
        );
        assert!(hello.is_in(&payload) && hello.is_in(&hello.payload(1)));
        assert!(!hello.is_in(&older) && !hello.is_in(&Hello::broker(Vec::new(), 7).payload(1)));
    }

    #[test]
    fn a_hello_is_bounded() {
        let hello = |json: &str| Hello::parse(json.as_bytes());
        let least = hello(r#"{"version":"9","can":["confirm"],"new":{}}"#).unwrap().unwrap();
        assert!(least.confirms() && least.domains.is_none() && !least.names_requests());
        let made = Hello { records: Some("0".repeat(32)), ..Hello::broker(vec!["d".into()], u64::MAX) };
        assert_eq!(Hello::parse(&serde_json::to_vec(&made).unwrap()), Ok(Some(made)));
        assert_eq!(Hello::parse(b""), Ok(None));
        let list = |number, length| serde_json::to_string(&vec!["x".repeat(length); number]).unwrap();
        let with = |field: &str, value: &str| {
            let rest = if field == "can" { r#""version":"1""#.to_owned() } else { r#""can":[]"#.to_owned() };
            let rest = if ["can", "version"].contains(&field) { rest } else { format!(r#""version":"1",{rest}"#) };
            hello(&format!("{{{rest},\"{field}\":{value}}}")).map(drop)
        };
        assert_eq!(with("version", &format!("{:?}", "x".repeat(65))), Err(Malformed::Field("version", "a short text")));
        for (field, value) in [
            ("can", list(65, 1)),
            ("can", list(1, 65)),
            ("can", "\"confirm\"".into()),
            ("can", "[1]".into()),
            ("domains", list(1025, 1)),
            ("domains", list(1, 256)),
        ] {
            assert_eq!(
                with(field, &value).unwrap_err().to_string(),
                format!("{field} is not a list of a few short texts")
            );
        }
        assert!(with("domains", &list(1024, 40)).is_ok() && with("instance", "-1").is_err());
        assert_eq!(hello(r#"{"version":"1"}"#), Err(Malformed::Missing("can")));
    }

    #[test]
    fn a_drain_in_a_hello_is_bounded_and_absent_in_those_of_older_programs() {
        let plain = Hello::worker(Vec::new());
        assert!(!serde_json::to_string(&plain).unwrap().contains("drain"));
        let drain = Drain { since: 7, until: Some(9), reason: Some("x".repeat(REASON_MAX)), deadline: None };
        let made = Hello { drain: Some(drain), ..plain };
        assert_eq!(Hello::parse(&serde_json::to_vec(&made).unwrap()), Ok(Some(made)));
        let with = |drain: &str| Hello::parse(format!(r#"{{"version":"1","can":[],"drain":{drain}}}"#).as_bytes());
        assert_eq!(with("null").unwrap().unwrap().drain, None);
        assert_eq!(with(r#"{"since":7,"new":[]}"#).unwrap().unwrap().drain.unwrap().since, 7);
        let long = format!(r#"{{"since":7,"reason":{:?}}}"#, "x".repeat(REASON_MAX + 1));
        let deadline = with(r#"{"since":7,"deadline":{"at":9,"percent":5,"is_over":true}}"#).unwrap().unwrap();
        assert_eq!(deadline.drain.unwrap().passed_deadline().unwrap().at, 9);
        let none = r#"{"since":7,"deadline":{"at":9,"percent":101}}"#;
        for wrong in ["7", "{}", r#"{"since":-1}"#, r#"{"since":7,"reason":7}"#, &long, none] {
            assert_eq!(with(wrong), Err(Malformed::Field("drain", "a time and a short text")), "{wrong}");
        }
    }

    #[test]
    fn a_records_request_is_distinguished_from_a_sync_request() {
        let asked = |json: &str| serde_json::from_str::<Request>(json);
        let records = asked(r#"{"from":{"worker":"gw1"},"revocations":true}"#).unwrap();
        assert_eq!(
            records,
            Request::Records(RecordsRequest {
                from: Participant::Worker("gw1".parse().unwrap()),
                to: None,
                revocations: true
            })
        );
        let keys = r#"{"from":{"broker":"b1"},"domain":"d","after":null,"younger_than":20}"#;
        assert!(matches!(asked(keys).unwrap(), Request::Keys(question) if question.domain == "d"));
        assert!(asked(r#"{"from":{"broker":"b1"}}"#).is_err());
    }

    #[test]
    fn applied_has_each_key_once_and_unknown_fields_are_ignored() {
        let json = r#"{"domain":"d","installed":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="],"failed":{"o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=":"own key"}}"#;
        let applied: Applied = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&applied).unwrap(), json);
        assert_eq!(serde_json::from_str::<Applied>(r#"{"domain":"d","new":1}"#).unwrap().domain, "d");
        assert!(serde_json::from_str::<Applied>(r#"{"domain":"d","installed":["x"]}"#).is_err());
    }
}
