//! The messages between members and broker: JSON objects without a type, distinguished by their keys.

use std::fmt;
use std::iter::{from_fn, once, repeat};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use wgkex_common::{KeyError, PublicKey};

use crate::tenants::table::{Member, MemberInfo};

/// The most bytes of a name.
pub const NAME_MAX: usize = 255;
/// The bytes from which on a part of an answer has no further member.
const PART_BYTES_MIN: usize = 4 << 10;

/// Why a first message is not a join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinMessageError {
    /// It does not have the expected form.
    #[error("not a JSON object with display_name and public_key as texts: {0}")]
    Malformed(String),
    /// The name is too long.
    #[error("display_name has at most {NAME_MAX} bytes")]
    LongName,
    /// The key is none.
    #[error("public_key is {0}")]
    Key(KeyError),
}

/// The members of the object that count. Of several with one name that is the last, as for the original.
#[derive(Default)]
struct JoinMessage {
    display_name: Option<Value>,
    public_key: Option<Value>,
}

impl<'de> Deserialize<'de> for JoinMessage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self::default())
    }
}

impl<'de> Visitor<'de> for JoinMessage {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut members: A) -> Result<Self, A::Error> {
        while let Some(name) = members.next_key::<String>()? {
            match name.as_str() {
                "display_name" => self.display_name = Some(members.next_value()?),
                "public_key" => self.public_key = Some(members.next_value()?),
                _ => drop(members.next_value::<IgnoredAny>()?),
            }
        }
        Ok(self)
    }
}

/// The client in its first message. Further members of the object do not count.
pub fn parse_join(text: &str, endpoint: Option<IpAddr>) -> Result<MemberInfo, JoinMessageError> {
    if !text.trim_start().starts_with('{') {
        return Err(JoinMessageError::Malformed("it is no object".into()));
    }
    let message: serde_json::Result<JoinMessage> = serde_json::from_str(text);
    let JoinMessage { display_name, public_key } =
        message.map_err(|error| JoinMessageError::Malformed(place(&error)))?;
    let display_name = required_text("display_name", display_name)?;
    let public_key = required_text("public_key", public_key)?;
    if display_name.len() > NAME_MAX {
        return Err(JoinMessageError::LongName);
    }
    let public_key = public_key.parse::<PublicKey>().map_err(JoinMessageError::Key)?;
    Ok(MemberInfo { display_name, public_key, endpoint })
}

fn required_text(name: &str, value: Option<Value>) -> Result<String, JoinMessageError> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(JoinMessageError::Malformed(format!("{name} has another type"))),
        None => Err(JoinMessageError::Malformed(format!("{name} is missing"))),
    }
}

/// The place of the error, without the client's text.
fn place(error: &serde_json::Error) -> String {
    format!("no JSON at column {} of line {}", error.column(), error.line())
}

/// The extensions of the original's messages that a client gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Form {
    /// `endpoint` in each member's object: the endpoints of those that show theirs.
    pub endpoints: bool,
    /// `hub` in the answer, and a message when it changes.
    pub hub: bool,
}

#[derive(Serialize)]
struct MemberObject<'a> {
    display_name: &'a str,
    public_key: PublicKey,
    virtual_ip: IpAddr,
    #[serde(flatten)]
    shown: Option<ShownEndpoint>,
}

/// It is null where a member does not show it.
#[derive(Serialize)]
struct ShownEndpoint {
    endpoint: Option<IpAddr>,
}

/// The hub, as a member configures it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HubPeer {
    /// Its key.
    pub public_key: PublicKey,
    /// Its address or name, and its UDP port.
    pub endpoint: String,
    /// The network of the tenant.
    pub allowed_ips: IpNet,
}

/// It is null while there is none.
#[derive(Serialize)]
struct ShownHub<'a> {
    hub: Option<&'a HubPeer>,
}

#[derive(Serialize)]
struct RemovalMessage {
    removed_peer: IpAddr,
}

impl<'a> MemberObject<'a> {
    fn new(member: &'a Member, form: Form) -> Self {
        let MemberInfo { display_name, public_key, endpoint } = &member.client;
        let shown = form.endpoints.then_some(ShownEndpoint { endpoint: *endpoint });
        Self { display_name, public_key: *public_key, virtual_ip: member.virtual_ip, shown }
    }
}

/// The answer to a member that has joined.
#[derive(Debug)]
pub struct Welcome {
    /// Its address.
    pub virtual_ip: IpAddr,
    /// The members before it.
    pub peers: Vec<Arc<Member>>,
    /// The hub, if there is one.
    pub hub: Option<HubPeer>,
}

/// The answer to a member's join, in parts of a few KiB: as a whole that of a large tenant has half a megabyte.
pub fn answer(Welcome { virtual_ip, peers, hub }: &Welcome, form: Form) -> impl Iterator<Item = String> {
    let comma = once("").chain(repeat(","));
    let peers = comma.zip(peers).map(move |(comma, peer)| format!("{comma}{}", announcement(peer, form)));
    let hub = if form.hub { format!(r#","hub":{}"#, json(hub)) } else { String::new() };
    let mut pieces =
        once(format!(r#"{{"virtual_ip":"{virtual_ip}","peers":["#)).chain(peers).chain(once(format!("]{hub}}}")));
    from_fn(move || {
        let mut part = pieces.next()?;
        while part.len() < PART_BYTES_MIN
            && let Some(piece) = pieces.next()
        {
            part += &piece;
        }
        Some(part)
    })
}

/// The message about another hub than before, or about none.
pub fn hub_change(hub: Option<&HubPeer>) -> String {
    json(&ShownHub { hub })
}

/// The message about a new member for the others.
pub fn announcement(member: &Member, form: Form) -> String {
    json(&MemberObject::new(member, form))
}

/// The message about a member that left for the others.
pub fn removal(virtual_ip: IpAddr) -> String {
    json(&RemovalMessage { removed_peer: virtual_ip })
}

/// Texts, keys and addresses are always written.
fn json(message: &impl Serialize) -> String {
    serde_json::to_string(message).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    fn member(name: &str, endpoint: Option<&str>) -> Member {
        let text = serde_json::json!({ "display_name": name, "public_key": KEY }).to_string();
        let client = parse_join(&text, endpoint.map(|address| address.parse().unwrap())).unwrap();
        Member { virtual_ip: "10.64.0.1".parse().unwrap(), client }
    }

    #[test]
    fn messages_are_those_of_the_original_and_endpoints_are_added_on_demand() {
        let (shown, hidden) = (member("A", Some("192.0.2.7")), member("A", None));
        let plain = format!(r#"{{"display_name":"A","public_key":"{KEY}","virtual_ip":"10.64.0.1"}}"#);
        assert_eq!(announcement(&shown, Form::default()), plain);
        let with = |endpoint: &str| plain.replace('}', &format!(r#","endpoint":{endpoint}}}"#));
        assert_eq!(announcement(&shown, Form { endpoints: true, ..Form::default() }), with(r#""192.0.2.7""#));
        assert_eq!(announcement(&hidden, Form { endpoints: true, ..Form::default() }), with("null"));
        let address = "10.64.0.2".parse().unwrap();
        let welcome = |peers: &[&Member], hub| {
            let peers = peers.iter().map(|peer| Arc::new((*peer).clone())).collect();
            Welcome { virtual_ip: address, peers, hub }
        };
        let hub = HubPeer {
            public_key: KEY.parse().unwrap(),
            endpoint: "gw1:51830".into(),
            allowed_ips: "10.64.0.0/20".parse().unwrap(),
        };
        let alone = r#"{"virtual_ip":"10.64.0.2","peers":[]}"#;
        let answer = |welcome: &Welcome, form| answer(welcome, form).collect::<String>();
        for hub in [None, Some(hub.clone())] {
            assert_eq!(answer(&welcome(&[], hub), Form::default()), alone);
        }
        let peers = answer(&welcome(&[&shown], None), Form::default());
        assert_eq!(peers, format!(r#"{{"virtual_ip":"10.64.0.2","peers":[{plain}]}}"#));
        let with_hub = Form { hub: true, ..Form::default() };
        let object = format!(r#""hub":{{"public_key":"{KEY}","endpoint":"gw1:51830","allowed_ips":"10.64.0.0/20"}}"#);
        assert_eq!(answer(&welcome(&[], None), with_hub), alone.replace('}', r#","hub":null}"#));
        assert_eq!(answer(&welcome(&[], Some(hub.clone())), with_hub), alone.replace('}', &format!(",{object}}}")));
        assert_eq!([hub_change(Some(&hub)), hub_change(None)], [format!("{{{object}}}"), r#"{"hub":null}"#.into()]);
        assert_eq!(removal(address), r#"{"removed_peer":"10.64.0.2"}"#);
    }

    #[test]
    fn the_answer_of_a_large_tenant_comes_in_parts_of_bounded_size() {
        let peer = Arc::new(member(&"\u{1}".repeat(NAME_MAX), None));
        let welcome = |peers| {
            let virtual_ip = "10.64.0.1".parse().unwrap();
            Welcome { virtual_ip, peers: vec![peer.clone(); peers], hub: None }
        };
        for peers in [0, 1, 2, 3, 4, 100] {
            let parts: Vec<_> = answer(&welcome(peers), Form::default()).collect();
            let whole: Value = serde_json::from_str(&parts.concat()).unwrap();
            assert_eq!(whole["peers"].as_array().map(Vec::len), Some(peers));
            assert!(parts.iter().all(|part| !part.is_empty() && part.len() < PART_BYTES_MIN + 2048), "{parts:?}");
            let (last, before) = parts.split_last().unwrap();
            assert!(
                before.iter().all(|part| part.len() >= PART_BYTES_MIN) && (peers < 4 || !before.is_empty()),
                "{last}"
            );
        }
    }

    #[test]
    fn of_two_members_of_one_name_the_last_counts() {
        let text = format!(
            r#"{{"display_name":7,"public_key":"{KEY}","display_name":"A","public_key":"x","public_key":"{KEY}"}}"#
        );
        assert_eq!(parse_join(&text, None).unwrap(), member("A", None).client);
    }

    #[test]
    fn white_space_and_further_members_are_accepted_and_names_are_echoed_as_given() {
        let deep = "[".repeat(1000) + &"]".repeat(1000);
        let text = format!(" {{\"x\": {deep}, \"public_key\" :\n\"{KEY}\", \"display_name\": \" \\u00e4\\\"\\n\" }} ");
        assert_eq!(parse_join(&text, None).unwrap().display_name, " \u{e4}\"\n");
        for name in ["", "%_'", &"\u{e4}".repeat(127)] {
            assert_eq!(member(name, None).client.display_name, name);
        }
    }

    #[test]
    fn what_is_wrong_with_a_join_is_named_without_what_was_sent() {
        let parsed = |text: &str| parse_join(text, None).unwrap_err().to_string();
        let named =
            |name: &str, key: &str| parsed(&serde_json::json!({ "display_name": name, "public_key": key }).to_string());
        for text in [
            "x",
            "",
            "secret",
            "[1]",
            "[\"secret\",\"\"]",
            "\"secret\"",
            "7",
            "null",
            "{\"secret\"",
            "{}",
            "{\"public_key\":\"secret\"}",
        ] {
            let error = parsed(text);
            assert!(error.contains("JSON object") && !error.contains("secret"), "{text}: {error}");
            assert!(error.len() <= 123, "a close frame has room for it: {error}");
        }
        assert!(parsed("{}").ends_with("display_name is missing"));
        let null = format!(r#"{{"display_name":null,"public_key":"{KEY}"}}"#);
        let number = format!(r#"{{"display_name":7,"public_key":"{KEY}"}}"#);
        for text in [null, number, r#"{"display_name":"A","public_key":7}"#.into()] {
            assert!(parsed(&text).contains("another type"), "{text}");
        }
        assert!(parsed(&"[".repeat(10_000)).contains("JSON"));
        assert_eq!(named(&"a".repeat(256), KEY), "display_name has at most 255 bytes");
        for key in ["", "PeerA-PublicKey", "AAAA", &KEY[..43], &format!("{KEY} "), &"A".repeat(43)] {
            assert!(named("A", key).starts_with("public_key is not a"), "{key}");
        }
        assert!(named("A", &format!("{}=", "A".repeat(43))).contains("small order"));
    }
}
