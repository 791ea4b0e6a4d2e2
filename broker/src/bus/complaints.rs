//! What gateways say that nobody can use: each change of it is a line in the log, as such a gateway gets no routers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::warn;
use wgkex_common::wire::message::{Hello, WorkerData};
use wgkex_common::wire::topic::{Direction, Owner};
use wgkex_common::{Topic, WorkerName};

/// Gateways that are remembered at most, and topics of one: more are somebody's nonsense.
const GATEWAYS: usize = 4096;
const TOPICS: usize = 64;
/// So many lines in this time at most about one gateway.
const LINES: u32 = 10;
const TIME: Duration = Duration::from_secs(60);

/// What was wrong with the last message on each topic on which something was.
#[derive(Debug, Default)]
pub struct Complaints {
    gateways: BTreeMap<WorkerName, Gateway>,
}

#[derive(Debug)]
struct Gateway {
    causes: BTreeMap<Topic, String>,
    /// Since when lines are counted, and how many there were.
    since: Instant,
    lines: u32,
}

/// What a message of a gateway is to say, and of which domain.
type Subject<'a> = (&'a WorkerName, &'static str, Option<&'a str>);

impl Complaints {
    /// A message came on `topic`, and was taken in or not.
    pub fn hear(&mut self, topic: &Topic, payload: &[u8], is_taken: bool, now: Instant) {
        let Some((gateway, what, domain)) = subject(topic) else { return };
        if is_taken {
            self.forget(gateway, topic);
        } else if let Some(cause) = cause(topic, payload)
            && self.is_news(gateway, topic, &cause, now)
        {
            warn!(
                gateway = gateway.as_str(),
                what, domain, cause, "gateway says what cannot be used, and may get no routers"
            );
        }
    }

    fn forget(&mut self, gateway: &WorkerName, topic: &Topic) {
        if let Some(known) = self.gateways.get_mut(gateway) {
            known.causes.remove(topic);
        }
    }

    /// Notes a cause; true if there is to be a line about it.
    fn is_news(&mut self, gateway: &WorkerName, topic: &Topic, cause: &str, now: Instant) -> bool {
        if self.gateways.len() >= GATEWAYS && !self.gateways.contains_key(gateway) {
            self.gateways.retain(|_, known| !known.is_over(now));
            if self.gateways.len() >= GATEWAYS {
                return false;
            }
        }
        let new = || Gateway { causes: BTreeMap::new(), since: now, lines: 0 };
        let known = self.gateways.entry(gateway.clone()).or_insert_with(new);
        if known.is_over(now) {
            (known.since, known.lines) = (now, 0);
        }
        let is_known = known.causes.get(topic).is_some_and(|known| known == cause);
        if is_known || known.lines >= LINES || (known.causes.len() >= TOPICS && !known.causes.contains_key(topic)) {
            return false;
        }
        known.causes.insert(topic.clone(), cause.to_owned());
        known.lines += 1;
        true
    }
}

impl Gateway {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= TIME
    }
}

/// Of which gateway a topic is, what is said there, and of which domain; none if it is not a gateway's.
fn subject(topic: &Topic) -> Option<Subject<'_>> {
    let Owner::Worker(gateway) = topic.owner() else { return None };
    let is_its_word = match topic.direction() {
        Direction::StateForAll | Direction::StateForBrokers | Direction::ToBrokers => true,
        Direction::FromBrokers | Direction::FromAll | Direction::Echo | Direction::Broadcast => false,
    };
    is_its_word.then(|| (gateway, topic.last_level(), topic.domain()))
}

/// Why a payload that was not taken in says nothing there. Nothing of it is shown, as it may be a key.
fn cause(topic: &Topic, payload: &[u8]) -> Option<String> {
    if let Topic::WorkerData { .. } = topic {
        WorkerData::parse(payload).err().map(|wrong| wrong.to_string())
    } else if let Topic::WorkerHello { .. } = topic {
        Hello::parse(payload).err().map(|wrong| wrong.to_string())
    } else if let Topic::WorkerStatus { .. } = topic {
        Some("is neither 1 nor 0".into())
    } else if let Topic::ConnectedPeers { .. } = topic {
        Some("is not a number of peers".into())
    } else {
        Some("is not the JSON that this version knows".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    #[test]
    fn each_change_is_said_once_and_no_more_than_a_bound_in_a_minute() {
        let (mut complaints, now) = (Complaints::default(), Instant::now());
        let topic = |domain: &str| Topic::WorkerData { worker: name("gw"), domain: domain.into() };
        let mut news = |domain: &str, cause: &str, seconds| {
            complaints.is_news(&name("gw"), &topic(domain), cause, now + Duration::from_secs(seconds))
        };
        assert!(news("a", "x", 0) && !news("a", "x", 100) && news("a", "y", 100) && news("b", "x", 100));
        let said = (0..1_000).filter(|n| news("c", &n.to_string(), 101)).count();
        assert_eq!(said, 8);
        assert!(!news("d", "x", 102) && news("d", "x", 160), "it is said later");
        complaints.forget(&name("gw"), &topic("d"));
        assert!(
            complaints.is_news(&name("gw"), &topic("d"), "x", now + Duration::from_secs(161)),
            "it was right meanwhile"
        );
        for n in 0..2 * GATEWAYS {
            let _ = complaints.is_news(&name(&n.to_string()), &topic("a"), "x", now + Duration::from_secs(161));
        }
        for n in 0..2 * TOPICS {
            let _ = complaints.is_news(
                &name("gw"),
                &topic(&n.to_string()),
                "x",
                now + Duration::from_secs(1_000 * n as u64),
            );
        }
        assert!(complaints.gateways.len() <= GATEWAYS && complaints.gateways["gw"].causes.len() <= TOPICS);
    }

    #[test]
    fn only_what_a_gateway_says_wrongly_has_a_cause() {
        let of = |topic: &str, payload: &[u8]| {
            let topic = Topic::parse(topic).unwrap();
            subject(&topic)?;
            cause(&topic, payload)
        };
        assert_eq!(of("wireguard-worker/gw/ff_a/data", b"{}").as_deref(), Some("ExternalAddress is missing"));
        assert_eq!(of("wgkex/worker/gw/hello", b"[]").as_deref(), Some("is not a JSON object"));
        assert!(of("wireguard-metrics/ff_a/gw/connected_peers", b"x").is_some());
        assert_eq!(of("wgkex/worker/gw/hello", b""), None, "something else was wrong with it");
        assert_eq!(of("wireguard-broker/b/status", b"x"), None);
    }
}
