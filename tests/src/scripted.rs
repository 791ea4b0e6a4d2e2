//! Scripted workers, with exactly the bytes of the contract: the original, which publishes nothing about a key, and one
//! that confirms.

use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::key;
use crate::probe::{Message, Probe, Role, message};
use crate::stack::Stack;

/// The reaction of a scripted worker to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerBehaviour {
    /// An original: installs it and publishes nothing, because it has no such message.
    Original,
    /// Confirms it.
    Confirms,
    /// Rejects it.
    Refuses,
    /// Rejects it for lack of room.
    Full,
    /// Announces that it confirms, and does not confirm.
    Silent,
    /// Confirms it after a delay.
    Slow,
    /// Its interface is missing: it publishes -1 for the domain, and rejects each key for that.
    Down,
    /// Publishes that it is offline, and confirms nevertheless.
    OfflineButConfirms,
    /// Publishes that it is offline, and rejects.
    OfflineButRefuses,
    /// An original whose domain is offline, with older data retained.
    OriginalDown,
}

impl WorkerBehaviour {
    fn is_original(self) -> bool {
        matches!(self, Self::Original | Self::OriginalDown)
    }

    fn is_domain_down(self) -> bool {
        matches!(self, Self::Down | Self::OriginalDown)
    }

    fn is_offline(self) -> bool {
        matches!(self, Self::OfflineButConfirms | Self::OfflineButRefuses)
    }
}

/// How long [`WorkerBehaviour::Slow`] takes.
const SLOW: Duration = Duration::from_millis(200);

/// A worker that is online in all domains of a stack.
pub struct Worker {
    /// Its name.
    pub name: String,
    /// Its MQTT client.
    pub probe: Probe,
}

impl Worker {
    /// Publishes that it is online with `peers` connected peers in each domain; again on every new connection to the
    /// bus.
    #[must_use]
    pub fn start(stack: &Stack, name: &str, behaviour: WorkerBehaviour, peers: u64) -> Self {
        let domains = stack.plan.domains.clone();
        let filters: Vec<_> = domains.iter().map(|domain| format!("wireguard/{domain}/+")).collect();
        let filters: Vec<_> = filters.iter().map(String::as_str).collect();
        let (worker, greeting) = (name.to_owned(), greeting(name, &domains, behaviour, peers));
        let role = Role::new(name, &filters).will(status(name, "0")).greeting(greeting).answer(move |received| {
            let domain = received.topic.split('/').nth(1).unwrap_or_default();
            match behaviour {
                _ if received.payload.len() != 44 => Vec::new(),
                WorkerBehaviour::Slow => {
                    thread::sleep(SLOW);
                    vec![applied(&worker, domain, &received.text())]
                }
                WorkerBehaviour::Confirms | WorkerBehaviour::OfflineButConfirms => {
                    vec![applied(&worker, domain, &received.text())]
                }
                WorkerBehaviour::Down => vec![failed(&worker, domain, &received.text(), "interface")],
                WorkerBehaviour::Refuses | WorkerBehaviour::OfflineButRefuses => {
                    vec![failed(&worker, domain, &received.text(), "refused")]
                }
                WorkerBehaviour::Full => vec![failed(&worker, domain, &received.text(), "full")],
                WorkerBehaviour::Original | WorkerBehaviour::OriginalDown | WorkerBehaviour::Silent => Vec::new(),
            }
        });
        Self { name: name.into(), probe: stack.probe(role) }
    }
}

/// The messages of a worker on every connection. The status is the last, so that a broker that receives it has the
/// rest.
fn greeting(name: &str, domains: &[String], behaviour: WorkerBehaviour, peers: u64) -> Vec<Message> {
    let hello = (!behaviour.is_original()).then(|| hello(name));
    let peers = if behaviour.is_domain_down() { "-1".into() } else { peers.to_string() };
    let online = if behaviour.is_offline() { "0" } else { "1" };
    let data = domains.iter().map(|domain| data(name, domain));
    let counts = domains.iter().map(|domain| peers_of(name, domain, &peers));
    hello.into_iter().chain(data).chain(counts).chain([status(name, online)]).collect()
}

/// The topic of a domain's keys.
#[must_use]
pub fn key_topic(domain: &str) -> String {
    format!("wireguard/{domain}/all")
}

/// A key, as the broker publishes it.
#[must_use]
pub fn key_for(domain: &str, key: &str) -> Message {
    message(key_topic(domain), key, 1, false)
}

/// A worker's status.
#[must_use]
pub fn status(worker: &str, status: &str) -> Message {
    message(format!("wireguard-worker/{worker}/status"), status, 1, true)
}

/// The peer count of a worker.
#[must_use]
pub fn peers_of(worker: &str, domain: &str, peers: &str) -> Message {
    message(format!("wireguard-metrics/{domain}/{worker}/connected_peers"), peers, 0, true)
}

/// A worker's data, as the original writes it: Python puts a space after a comma and a colon.
#[must_use]
pub fn data(worker: &str, domain: &str) -> Message {
    let public_key = gateway_key(worker);
    let data = format!(
        r#"{{"ExternalAddress": "{worker}.example", "Port": 40011, "PublicKey": "{public_key}", "LinkAddress": "fe80::27c:16ff:fec0:6c74"}}"#
    );
    message(format!("wireguard-worker/{worker}/{domain}/data"), data, 1, true)
}

/// A scripted worker's own key.
#[must_use]
pub fn gateway_key(worker: &str) -> String {
    key(u32::MAX - worker.bytes().fold(0, |sum: u32, byte| (sum * 31 + u32::from(byte)) % 1_000_000))
}

/// The answer to a router that gets this worker.
#[must_use]
pub fn endpoint(worker: &str) -> serde_json::Value {
    json!({ "Endpoint": {
        "Address": format!("{worker}.example"),
        "Port": "40011",
        "AllowedIPs": ["fe80::27c:16ff:fec0:6c74"],
        "PublicKey": gateway_key(worker),
    } })
}

/// The hello of a worker that confirms.
#[must_use]
pub fn hello(worker: &str) -> Message {
    message(format!("wgkex/worker/{worker}/hello"), r#"{"version":"0.1.0","can":["confirm"]}"#, 1, true)
}

/// The same, with this time of sending, in seconds of Unix time.
#[must_use]
pub fn hello_sent(worker: &str, time: u64) -> Message {
    let payload = format!(r#"{{"version":"0.1.0","can":["confirm"],"time":{time}}}"#);
    Message { payload: payload.into(), ..hello(worker) }
}

/// A worker's confirmation of a key.
#[must_use]
pub fn applied(worker: &str, domain: &str, key: &str) -> Message {
    let payload = format!(r#"{{"domain":"{domain}","installed":["{key}"],"failed":{{}}}}"#);
    message(format!("wgkex/worker/{worker}/applied"), payload, 1, false)
}

/// A worker's rejection of a key, with the reason.
#[must_use]
pub fn failed(worker: &str, domain: &str, key: &str, reason: &str) -> Message {
    let payload = format!(r#"{{"domain":"{domain}","installed":[],"failed":{{"{key}":"{reason}"}}}}"#);
    message(format!("wgkex/worker/{worker}/applied"), payload, 1, false)
}
