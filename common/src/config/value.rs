//! The types of values that keys have, each with the sentence that states the requirement. Quoted numbers are accepted
//! as numbers and YAML 1.1's truth values as truth values, as by the original's parser.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use tracing::Level;

use crate::PublicKey;

/// Defines a type that is parsed from one value, or rejects it with a complaint. It is never written: serialized it is
/// null, which `keys.rs` interprets as the place of a value. Without `Debug`, as some of the texts are secrets.
macro_rules! value_type {
    ($(#[$doc:meta])* $name:ident($inner:ty), $read:expr, $complaint:expr) => {
        $(#[$doc])*
        pub(super) struct $name(pub(super) $inner);

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = <serde_json::Value as serde::Deserialize>::deserialize(deserializer)?;
                $read(&value).map(Self).ok_or_else(|| serde::de::Error::custom($complaint))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_unit()
            }
        }
    };
}
pub(super) use value_type;

value_type!(Text(String), text, "must be a text (a number needs quotes around it)");
value_type!(
    /// A text, or a number that serves as a name.
    Label(()),
    |value: &Value| (value.is_string() || value.is_number()).then_some(()),
    "must be a text or a number"
);
value_type!(
    Host(String),
    |value: &Value| text(value).and_then(|text| host(&text)),
    "must be a host name or an address (no scheme, no path; a port has its own key)"
);
value_type!(
    /// A text sent to routers, as written; empty for the host name.
    PublicHost(String),
    |value: &Value| text(value).filter(|text| text.is_empty() || host(text).is_some()),
    "must be a host name or an address (no scheme, no port, no path, no blanks)"
);
value_type!(
    Directory(String),
    |value: &Value| text(value).filter(|text| text.starts_with('/')),
    "must be the absolute path of a directory"
);
value_type!(
    File(String),
    |value: &Value| text(value).filter(|text| text.starts_with('/')),
    "must be the absolute path of a file"
);
value_type!(Flag(bool), flag, "must be true or false");
value_type!(Port(u16), |value: &Value| whole(value, 1..=65535), "must be a number from 1 to 65535");
value_type!(Vni(u32), |value: &Value| whole(value, 1..=0x00ff_ffff), "must be a number from 1 to 16777215");
value_type!(PrefixLength(()), |value: &Value| whole(value, 0..=128u8).map(drop), "must be a number from 0 to 128");
value_type!(Id(()), |value: &Value| whole(value, 0..=u32::MAX).map(drop), "must be a whole number");
value_type!(
    /// Enough for any fleet, and few enough to fit into memory.
    Count(usize),
    |value: &Value| whole::<u32>(value, 1..=100_000_000).and_then(|count| usize::try_from(count).ok()),
    "must be a whole number from 1 to 100000000"
);
value_type!(
    /// 0 means that there is no limit. The highest, at the lowest [`Rate`], still fits into 64 bits of nanoseconds.
    Burst(u32),
    |value: &Value| whole(value, 0..=1_000_000),
    "must be a whole number from 0 (no limit) to 1000000"
);
value_type!(
    Rate(f64),
    |value: &Value| number(value).filter(|rate| (0.001..=1e6).contains(rate)),
    "must be a number from 0.001 to 1000000"
);
value_type!(
    /// The addresses of a network, or a single one. An IPv4 address is one, however it is written.
    Net(IpNet),
    |value: &Value| {
        let text = text(value)?;
        let single = || text.parse::<IpAddr>().map(|address| IpNet::from(address.to_canonical()));
        text.parse().or_else(|_| single()).ok()
    },
    "must be an address, or a network such as 192.0.2.0/24"
);
value_type!(Whole(u64), |value: &Value| whole(value, 0..=u64::MAX), "must be a whole number, 0 or more");
value_type!(
    /// The password has a file of its own.
    DatabaseUrl(String),
    |value: &Value| text(value).filter(|text| is_database_url(text)),
    "must be postgres://USER@HOST:PORT/DATABASE (the password is in storage_password_file), or nothing for SQLite in state_dir"
);
value_type!(
    /// One network or more.
    Pool(Vec<IpNet>),
    |value: &Value| {
        let networks = match value {
            Value::Array(items) => items.iter().map(text).collect::<Option<Vec<_>>>()?,
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_) => vec![text(value)?],
        };
        let networks = networks.iter().map(|network| network.parse::<IpNet>().ok());
        networks.collect::<Option<Vec<_>>>().filter(|networks| !networks.is_empty())
    },
    "must be a network such as 10.64.0.0/10, or a list of them"
);
value_type!(TenantLength(u8), |value: &Value| whole(value, 0..=128), "must be a number from 8 to 28 (IPv6: 124)");
value_type!(
    /// The most files that a process can have open.
    Connections(usize),
    |value: &Value| whole::<u32>(value, 10..=1_000_000).and_then(|count| usize::try_from(count).ok()),
    "must be a whole number from 10 to 1000000"
);
value_type!(
    /// Not truncated; the parameters are checked where passwords are verified.
    PasswordHash(String),
    |value: &Value| text(value).filter(|text| is_whole_hash(text)),
    "must be what \"wgkex-broker hash-password\" prints, all of it"
);
value_type!(
    /// 0 means no keep-alive (MQTT 3.1.1 section 3.1.2.10).
    Keepalive(u16),
    |value: &Value| whole(value, 0..=65535),
    "must be a whole number of seconds from 0 to 65535"
);
value_type!(
    /// The upper bound keeps every sum with a clock's reading far from an overflow.
    Seconds(Duration),
    |value: &Value| {
        number(value).filter(|seconds| (0.001..=1e9).contains(seconds)).map(Duration::from_secs_f64)
    },
    "must be a number of seconds from 0.001 to 1000000000"
);
value_type!(
    /// 0 means at once, or not at all.
    FillTime(Duration),
    |value: &Value| number(value).filter(|seconds| (0.0..=1e6).contains(seconds)).map(Duration::from_secs_f64),
    "must be a number of seconds from 0 (off) to 1000000"
);
value_type!(
    Share(f64),
    |value: &Value| number(value).filter(|share| (0.0..=1e9).contains(share)),
    "must be a number from 0 to 1000000000"
);
value_type!(LogLevel(Level), level, "must be DEBUG, INFO, WARNING, ERROR or CRITICAL");
value_type!(
    Ipam(()),
    |value: &Value| text(value).filter(|name| ["json", "netbox"].contains(&name.as_str())).map(drop),
    "must be json or netbox"
);
value_type!(
    /// In lower case.
    Hash(String),
    |value: &Value| {
        let is_hash = |text: &String| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        text(value).filter(is_hash).map(|text| text.to_ascii_lowercase())
    },
    "must be a SHA-256 hash, 64 hexadecimal digits (\"wgkex-broker admin-token\" makes a token and its hash)"
);
value_type!(
    Key(PublicKey),
    |value: &Value| text(value)?.parse::<PublicKey>().ok(),
    "must be a WireGuard public key, 44 characters of base64"
);

/// A password of our examples, which must be replaced.
pub(super) fn is_placeholder(password: &str) -> bool {
    password.starts_with("PASSWORD OF ") || password.chars().all(|c| c == '.' || c == '…')
}

/// Whether it has all parts of a PHC string of Argon2id, with 32 bytes of hash: no password matches a truncated one.
fn is_whole_hash(text: &str) -> bool {
    let is_base64 =
        |part: &&str, least| part.len() >= least && part.chars().all(|c| c.is_ascii_alphanumeric() || "+/".contains(c));
    let Some(rest) = text.strip_prefix("$argon2id$") else { return false };
    let parts: Vec<&str> = rest.split('$').skip_while(|part| part.starts_with("v=")).collect();
    matches!(&parts[..], [parameters, salt, hash] if parameters.starts_with("m=") && is_base64(salt, 11) && is_base64(hash, 43))
}

/// A text that is shown neither in logs nor in errors.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// A secret that was generated here and not read.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the code that sends it.
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

/// A port, or the default if there is none.
pub(super) fn port(port: Option<&Port>, default: u16) -> u16 {
    port.map_or(default, |port| port.0)
}

/// A duration, or the default in seconds if there is none.
pub(super) fn seconds(seconds: Option<&Seconds>, default: u64) -> Duration {
    seconds.map_or(Duration::from_secs(default), |seconds| seconds.0)
}

/// A text as it is written.
pub(super) fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// The host in `text`, without the brackets around an IPv6 address.
fn host(text: &str) -> Option<String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.split('%').next().unwrap_or_default();
    let name = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || ".-_".contains(c));
    (name || address.parse::<Ipv6Addr>().is_ok()).then(|| bare.to_owned())
}

/// Whether a text names user, host and database, perhaps a port, and nothing else.
fn is_database_url(text: &str) -> bool {
    let rest = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"));
    let parts = rest.and_then(|rest| rest.split_once('@')).and_then(|(user, rest)| Some((user, rest.split_once('/')?)));
    let Some((user, (place, database))) = parts else { return false };
    let (name, port) = match place.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        Some(_) | None => (place, None),
    };
    let is_name = |text: &str| !text.is_empty() && !text.contains([':', '/', '?', '#', '&', ' ']);
    let is_port = port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    is_name(user) && is_name(database) && is_port && host(name).is_some()
}

/// The truth value of a text in YAML 1.1 as Python reads it.
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

/// The text of a number, with or without quotes, without the underscores that YAML 1.1 allows.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.trim().replace('_', "")),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
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
