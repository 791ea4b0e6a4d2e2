//! The kinds of values that keys have, each with the sentence that says what is allowed. Quoted numbers are numbers
//! and YAML 1.1's truth values are truth values, because the original's parser has it so.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use tracing::Level;

use super::LogFormat;
use super::mqtt_listen::Role;
use crate::PublicKey;

/// Makes a type that is read from one value, or refuses it with a complaint. It is never written: serialized it is
/// null, which `keys.rs` reads as "a value stands here". Without `Debug`, as some of the texts are secrets.
macro_rules! value_type {
    ($(#[$doc:meta])* $name:ident($inner:ty), $read:expr, $complaint:expr) => {
        $(#[$doc])*
        pub(super) struct $name(pub(super) $inner);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = Value::deserialize(deserializer)?;
                $read(&value).map(Self).ok_or_else(|| D::Error::custom($complaint))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_unit()
            }
        }
    };
}

value_type!(Text(String), text, "is not a text, one is allowed (a number needs quotes around it)");
value_type!(
    /// A text, or a number that serves as a name.
    Label(()),
    |value: &Value| (value.is_string() || value.is_number()).then_some(()),
    "is not a name, a text or a number is allowed"
);
value_type!(
    Host(String),
    |value: &Value| text(value).and_then(|text| host(&text)),
    "is not a host, a name or an address is allowed (no scheme, no path; a port has its own key)"
);
value_type!(
    Directory(String),
    |value: &Value| text(value).filter(|text| text.starts_with('/')),
    "is not a directory, an absolute path is allowed"
);
value_type!(
    File(String),
    |value: &Value| text(value).filter(|text| text.starts_with('/')),
    "is not a file, an absolute path is allowed"
);
value_type!(Flag(bool), flag, "is not a truth value, true or false is allowed");
value_type!(Port(u16), |value: &Value| whole(value, 1..=65535), "is not a port, a number from 1 to 65535 is allowed");
value_type!(
    Vni(u32),
    |value: &Value| whole(value, 1..=0x00ff_ffff),
    "is not a VXLAN id, a number from 1 to 16777215 is allowed"
);
value_type!(
    PrefixLength(()),
    |value: &Value| whole(value, 0..=128u8).map(drop),
    "is not a prefix length, a number from 0 to 128 is allowed"
);
value_type!(Id(()), |value: &Value| whole(value, 0..=u32::MAX).map(drop), "is not an id, a whole number is allowed");
value_type!(
    /// Enough for any fleet, and few enough to fit into memory.
    Count(usize),
    |value: &Value| whole::<u32>(value, 1..=100_000_000).and_then(|count| usize::try_from(count).ok()),
    "is not a number of keys, a whole number from 1 to 100000000 is allowed"
);
value_type!(
    /// 0 means that there is no limit. The highest, at the lowest [`Rate`], still fits into 64 bits of nanoseconds.
    Burst(u32),
    |value: &Value| whole(value, 0..=1_000_000),
    "is not a burst, a whole number from 0 (no limit) to 1000000 is allowed"
);
value_type!(
    Rate(f64),
    |value: &Value| number(value).filter(|rate| (0.001..=1e6).contains(rate)),
    "is not a rate, a number from 0.001 to 1000000 is allowed"
);
value_type!(
    /// The addresses of a network, or a single one. An IPv4 address is one, however it is written.
    Net(IpNet),
    |value: &Value| {
        let text = text(value)?;
        let single = || text.parse::<IpAddr>().map(|address| IpNet::from(address.to_canonical()));
        text.parse().or_else(|_| single()).ok()
    },
    "is not a network, an address or one such as 192.0.2.0/24 is allowed"
);
value_type!(
    /// One network or more.
    Pool(Vec<IpNet>),
    |value: &Value| {
        let networks = match value {
            Value::Array(items) => items.iter().map(text).collect::<Option<Vec<_>>>()?,
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => vec![text(value)?],
        };
        let networks = networks.iter().map(|network| network.parse::<IpNet>().ok().map(|network| network.trunc()));
        networks.collect::<Option<Vec<_>>>().filter(|networks| !networks.is_empty())
    },
    "is not a pool, a network such as 10.64.0.0/10 or a list of them is allowed"
);
value_type!(
    TenantLength(u8),
    |value: &Value| whole(value, 0..=128),
    "is not a prefix length, a number from 8 to 28 (IPv6: 124) is allowed"
);
value_type!(
    /// As many as a process may have files open at the very most.
    Connections(usize),
    |value: &Value| whole::<u32>(value, 10..=1_000_000).and_then(|count| usize::try_from(count).ok()),
    "is not a number of connections, a whole number from 10 to 1000000 is allowed"
);
value_type!(
    /// Whether it is a whole PHC string is checked where passwords are verified.
    PasswordHash(String),
    |value: &Value| text(value).filter(|text| text.starts_with("$argon2id$")),
    "is not a password's hash, what \"wgkex-broker hash-password\" prints is allowed"
);
value_type!(UserRole(Role), role, "is not a role, worker or broker is allowed");
value_type!(
    /// 0 means that the line may be silent for ever (MQTT 3.1.1 section 3.1.2.10).
    Keepalive(u16),
    |value: &Value| whole(value, 0..=65535),
    "is not a keepalive, a whole number of seconds from 0 to 65535 is allowed"
);
value_type!(
    /// The upper bound keeps every sum with a clock's reading far from an overflow.
    Seconds(Duration),
    |value: &Value| {
        number(value).filter(|seconds| (0.001..=1e9).contains(seconds)).map(Duration::from_secs_f64)
    },
    "is not a time, a number of seconds from 0.001 to 1000000000 is allowed"
);
value_type!(
    /// 0 means at once, or not at all.
    FillTime(Duration),
    |value: &Value| number(value).filter(|seconds| (0.0..=1e6).contains(seconds)).map(Duration::from_secs_f64),
    "is not a time, a number of seconds from 0 (off) to 1000000 is allowed"
);
value_type!(
    Share(f64),
    |value: &Value| number(value).filter(|share| (0.0..=1e9).contains(share)),
    "is not a share, a number from 0 to 1000000000 is allowed"
);
value_type!(LogLevel(Level), level, "is not a log level, DEBUG, INFO, WARNING, ERROR or CRITICAL is allowed");
value_type!(
    Format(LogFormat),
    |value: &Value| match text(value)?.as_str() {
        "text" => Some(LogFormat::Text),
        "json" => Some(LogFormat::Json),
        _ => None,
    },
    "is not a log format, text or json is allowed"
);
value_type!(
    Ipam(()),
    |value: &Value| text(value).filter(|name| ["json", "netbox"].contains(&name.as_str())).map(drop),
    "is not an IPAM, json or netbox is allowed"
);
value_type!(
    /// In lower case.
    Hash(String),
    |value: &Value| {
        let is_hash = |text: &String| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        text(value).filter(is_hash).map(|text| text.to_ascii_lowercase())
    },
    "is not a SHA-256 hash, 64 hexadecimal digits are allowed (\"wgkex-broker admin-token\" makes a token and its hash)"
);
value_type!(
    Key(PublicKey),
    |value: &Value| text(value)?.parse::<PublicKey>().ok(),
    "is not a WireGuard public key, 44 characters of base64 are allowed"
);

/// A text that neither logs nor errors may show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// A secret that was made here and not read.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the code that must send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A port, or the one that is meant where none is given.
pub(super) fn port(port: Option<&Port>, default: u16) -> u16 {
    port.map_or(default, |port| port.0)
}

/// A time, or the seconds that are meant where none is given.
pub(super) fn seconds(seconds: Option<&Seconds>, default: u64) -> Duration {
    seconds.map_or(Duration::from_secs(default), |seconds| seconds.0)
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// The host in `text`, without the brackets that an IPv6 address may wear.
fn host(text: &str) -> Option<String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.split('%').next().unwrap_or_default();
    let name = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || ".-_".contains(c));
    (name || address.parse::<Ipv6Addr>().is_ok()).then(|| bare.to_owned())
}

/// The truth value that a text stands for in YAML 1.1 as Python reads it.
pub(super) fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn flag(value: &Value) -> Option<bool> {
    value.as_bool().or_else(|| truth(&scalar(value)?))
}

fn number(value: &Value) -> Option<f64> {
    scalar(value)?.parse().ok()
}

fn whole<T: TryFrom<u64> + PartialOrd>(value: &Value, allowed: std::ops::RangeInclusive<T>) -> Option<T> {
    let number: u64 = scalar(value)?.parse().ok()?;
    T::try_from(number).ok().filter(|number| allowed.contains(number))
}

/// What was written for a number, with or without quotes, without the underscores that YAML 1.1 allows.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.trim().replace('_', "")),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

fn role(value: &Value) -> Option<Role> {
    match text(value)?.as_str() {
        "worker" => Some(Role::Worker),
        "broker" => Some(Role::Broker),
        _ => None,
    }
}

/// A level by one of Python's names, or by the number behind it.
fn level(value: &Value) -> Option<Level> {
    match scalar(value)?.to_ascii_uppercase().as_str() {
        "DEBUG" | "NOTSET" | "10" | "0" => Some(Level::DEBUG),
        "INFO" | "20" => Some(Level::INFO),
        "WARNING" | "WARN" | "30" => Some(Level::WARN),
        "ERROR" | "CRITICAL" | "FATAL" | "40" | "50" => Some(Level::ERROR),
        _ => None,
    }
}
