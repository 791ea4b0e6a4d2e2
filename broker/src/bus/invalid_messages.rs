//! Invalid messages of gateways: each new error is a line in the log, as such a gateway may get no routers.

use std::collections::BTreeMap;
use std::time::Instant;

use tracing::warn;
use wgkex_common::runtime::line_budget::LineBudget;
use wgkex_common::wire::message::{Hello, WorkerData};
use wgkex_common::wire::topic::{Direction, Owner};
use wgkex_common::{Topic, WorkerName};

use crate::bus::LOGGED_GATEWAYS_MAX;

/// The most topics of a gateway that are remembered.
const TOPICS_MAX: usize = 64;

/// The topics whose last message was invalid.
#[derive(Debug, Default)]
pub struct InvalidMessages {
    gateways: BTreeMap<WorkerName, GatewayErrors>,
}

#[derive(Debug)]
struct GatewayErrors {
    by_topic: BTreeMap<Topic, String>,
    budget: LineBudget,
}

/// The subject of a gateway's message.
struct Subject<'a> {
    gateway: &'a WorkerName,
    what: &'static str,
    domain: Option<&'a str>,
}

impl InvalidMessages {
    /// A message arrived on `topic`, and was valid or not.
    pub fn on_message(&mut self, topic: &Topic, payload: &[u8], is_valid: bool, now: Instant) {
        let Some(Subject { gateway, what, domain }) = subject(topic) else { return };
        if is_valid {
            self.forget(gateway, topic);
        } else if let Some(cause) = cause(topic, payload)
            && self.is_news(gateway, topic, &cause, now)
        {
            warn!(
                gateway = gateway.as_str(),
                what, domain, cause, "gateway published an invalid value, and may get no routers"
            );
        }
    }

    fn forget(&mut self, gateway: &WorkerName, topic: &Topic) {
        if let Some(known) = self.gateways.get_mut(gateway) {
            known.by_topic.remove(topic);
        }
    }

    /// Remembers the error; true if it is to be logged.
    fn is_news(&mut self, gateway: &WorkerName, topic: &Topic, cause: &str, now: Instant) -> bool {
        if self.gateways.len() >= LOGGED_GATEWAYS_MAX && !self.gateways.contains_key(gateway) {
            self.gateways.retain(|_, known| !known.budget.is_over(now));
            if self.gateways.len() >= LOGGED_GATEWAYS_MAX {
                return false;
            }
        }
        let new = || GatewayErrors { by_topic: BTreeMap::new(), budget: LineBudget::new(now) };
        let known = self.gateways.entry(gateway.clone()).or_insert_with(new);
        known.budget.renew(now);
        let is_known = known.by_topic.get(topic).is_some_and(|known| known == cause);
        if is_known
            || known.budget.is_spent()
            || (known.by_topic.len() >= TOPICS_MAX && !known.by_topic.contains_key(topic))
        {
            return false;
        }
        known.by_topic.insert(topic.clone(), cause.to_owned());
        known.budget.spend();
        true
    }
}

/// The subject of a message on `topic`; none if gateways do not publish there.
fn subject(topic: &Topic) -> Option<Subject<'_>> {
    let Owner::Worker(gateway) = topic.owner() else { return None };
    let is_published_by_owner = match topic.direction() {
        Direction::StateForAll | Direction::StateForBrokers | Direction::ToBrokers => true,
        Direction::FromBrokers | Direction::FromAll | Direction::Echo | Direction::Broadcast => false,
    };
    is_published_by_owner.then(|| Subject { gateway, what: topic.last_level(), domain: topic.domain() })
}

/// Why a payload is invalid on its topic. It is not shown, as it may be a key.
fn cause(topic: &Topic, payload: &[u8]) -> Option<String> {
    if let Topic::WorkerData { .. } = topic {
        WorkerData::parse(payload).err().map(|error| error.to_string())
    } else if let Topic::WorkerHello { .. } = topic {
        Hello::parse(payload).err().map(|error| error.to_string())
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
    use std::time::Duration;

    use super::*;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    #[test]
    fn each_new_error_is_logged_once_and_no_more_than_a_bound_in_a_minute() {
        let (mut invalid, now) = (InvalidMessages::default(), Instant::now());
        let topic = |domain: &str| Topic::WorkerData { worker: name("gw"), domain: domain.into() };
        let mut news = |domain: &str, cause: &str, seconds| {
            invalid.is_news(&name("gw"), &topic(domain), cause, now + Duration::from_secs(seconds))
        };
        assert!(news("a", "x", 0) && !news("a", "x", 100) && news("a", "y", 100) && news("b", "x", 100));
        let said = (0..1_000).filter(|n| news("c", &n.to_string(), 101)).count();
        assert_eq!(said, 8);
        assert!(!news("d", "x", 102) && news("d", "x", 160), "it is said later");
        invalid.forget(&name("gw"), &topic("d"));
        assert!(
            invalid.is_news(&name("gw"), &topic("d"), "x", now + Duration::from_secs(161)),
            "it was right meanwhile"
        );
        for n in 0..2 * LOGGED_GATEWAYS_MAX {
            let _ = invalid.is_news(&name(&n.to_string()), &topic("a"), "x", now + Duration::from_secs(161));
        }
        for n in 0..2 * TOPICS_MAX {
            let _ =
                invalid.is_news(&name("gw"), &topic(&n.to_string()), "x", now + Duration::from_secs(1_000 * n as u64));
        }
        assert!(invalid.gateways.len() <= LOGGED_GATEWAYS_MAX && invalid.gateways["gw"].by_topic.len() <= TOPICS_MAX);
    }

    #[test]
    fn only_an_invalid_message_of_a_gateway_has_a_cause() {
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
