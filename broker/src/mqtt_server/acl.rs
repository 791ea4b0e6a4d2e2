//! Which user may publish and subscribe to which topics: one set of rules, derived from each topic's owner and direction,
//! for the embedded MQTT server and for the access lists of others ([`crate::cli::mqtt_acl`]).

use wgkex_common::config::Role;
use wgkex_common::wire::name::NameError;
use wgkex_common::wire::topic::{Direction, Owner};
use wgkex_common::{BrokerName, Topic, WorkerName};

use crate::mqtt_server::filter::{covers, matches};

/// An operation of a client on a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TopicOperation {
    /// To publish on it.
    Publish,
    /// To subscribe to it.
    Subscribe,
}

impl TopicOperation {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Publish, Self::Subscribe];

    /// Its name in MQTT.
    pub fn word(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
        }
    }
}

/// Stands for the user's name in [`PARKER`].
const USER_PLACEHOLDER: &str = "%u";

/// The rights of each role on Parker's topics (contract section 5).
const PARKER: [(Role, TopicOperation, &str); 9] = [
    (Role::Worker, TopicOperation::Publish, "parker/wireguard-metrics/%u/connected_peers"),
    (Role::Worker, TopicOperation::Publish, "parker/wireguard-worker/%u/status"),
    (Role::Worker, TopicOperation::Publish, "parker/wireguard-worker/%u/data"),
    (Role::Worker, TopicOperation::Subscribe, "parker/wireguard/+"),
    (Role::Worker, TopicOperation::Subscribe, "parker/wireguard-worker/+/data"),
    (Role::Worker, TopicOperation::Subscribe, "parker/wireguard-broker/+/status"),
    (Role::Broker, TopicOperation::Publish, "parker/wireguard/+"),
    (Role::Broker, TopicOperation::Publish, "parker/wireguard-broker/+/status"),
    (Role::Broker, TopicOperation::Subscribe, "parker/#"),
];

/// The rights of one user to publish and to subscribe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TopicAccess {
    publish: Vec<String>,
    subscribe: Vec<String>,
}

impl TopicAccess {
    /// The rights of every client where there are no users: all topics but those that begin with `$`.
    pub fn everything() -> Self {
        Self { publish: vec!["#".into()], subscribe: vec!["#".into()] }
    }

    /// The rights of the user `name`.
    pub fn of(role: Role, name: &str) -> Self {
        Self {
            publish: filters(role, TopicOperation::Publish, name),
            subscribe: filters(role, TopicOperation::Subscribe, name),
        }
    }

    /// Whether a message on `topic` may be published.
    pub fn can_publish(&self, topic: &str) -> bool {
        self.publish.iter().any(|filter| matches(filter, topic))
    }

    /// Whether `filter` may be subscribed to: only if every topic that it matches may be.
    pub fn can_subscribe(&self, filter: &str) -> bool {
        self.subscribe.iter().any(|allowed| covers(allowed, filter))
    }
}

/// The filters of the topics with which the user `name` may do this, in the order in which lists have them.
pub(crate) fn filters(role: Role, operation: TopicOperation, name: &str) -> Vec<String> {
    let parker = PARKER
        .iter()
        .filter(|row| (row.0, row.1) == (role, operation))
        .map(|row| row.2.replace(USER_PLACEHOLDER, name));
    match (role, operation) {
        (Role::Worker, _) => match (name.parse(), operation) {
            (Ok(worker), TopicOperation::Publish) => worker_publishes(&worker).into_iter().chain(parker).collect(),
            (Ok(worker), TopicOperation::Subscribe) => parker.chain(worker_subscribes(&worker)).collect(),
            // The config has no such user.
            (Err(NameError), _) => Vec::new(),
        },
        (Role::Broker, TopicOperation::Publish) => broker_publishes().into_iter().chain(parker).collect(),
        (Role::Broker, TopicOperation::Subscribe) => {
            parker.chain(Topic::ROOTS.map(|root| format!("{root}/#"))).collect()
        }
    }
}

/// The topics that the worker owns, those in `wgkex/` all below its name, and those of its requests to brokers. No
/// keys.
fn worker_publishes(worker: &WorkerName) -> Vec<String> {
    let contract = topics(worker, |topic| matches!(topic.owner(), Owner::Worker(_)) && !topic.is_ours());
    let requests = topics(&WorkerName::any(), |topic| topic.direction() == Direction::FromAll);
    [contract, vec![Topic::all_of_worker(worker)], requests].concat()
}

/// The topics that everybody may subscribe to, and those that only this worker may.
fn worker_subscribes(worker: &WorkerName) -> Vec<String> {
    let any = WorkerName::any();
    let is_for_all = |topic: &Topic| matches!(topic.direction(), Direction::StateForAll | Direction::Broadcast);
    let named = topics(&any, |topic| is_for_all(topic) && topic.owner() != Owner::Nobody);
    let reaches_owner = [Direction::StateForBrokers, Direction::FromBrokers, Direction::Echo];
    let own =
        topics(worker, |topic| matches!(topic.owner(), Owner::Worker(_)) && reaches_owner.contains(&topic.direction()));
    let shared = topics(&any, |topic| is_for_all(topic) && topic.owner() == Owner::Nobody);
    [named, own, shared].concat()
}

/// The topics that any broker owns, those of messages from brokers to workers, and those that no program owns.
fn broker_publishes() -> Vec<String> {
    let any = WorkerName::any();
    let brokers = topics(&any, |topic| matches!(topic.owner(), Owner::Broker(_) | Owner::Domain(_)));
    let workers =
        topics(&any, |topic| matches!(topic.owner(), Owner::Worker(_)) && topic.direction() == Direction::FromBrokers);
    let shared = topics(&any, |topic| topic.owner() == Owner::Nobody);
    [brokers, workers, shared].concat()
}

/// The filters of the kinds of topics for which `is_so` is true, in the order of [`Topic::each`]; of workers' those of
/// `worker`.
fn topics(worker: &WorkerName, is_so: impl Fn(&Topic) -> bool) -> Vec<String> {
    Topic::each("+", worker, &BrokerName::any()).iter().filter(|topic| is_so(topic)).map(Topic::filter).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn worker() -> TopicAccess {
        TopicAccess::of(Role::Worker, "gw1")
    }

    fn broker() -> TopicAccess {
        TopicAccess::of(Role::Broker, "wgkex")
    }

    /// Every topic there is, of the worker `worker` and the broker b1; whether the worker gw1 and a broker may publish on it,
    /// and whether they may subscribe to it.
    fn table(worker: &str) -> [(Topic, [bool; 4]); 21] {
        let (own, name) = (worker == "gw1", || worker.parse().unwrap());
        let (domain, broker) = (|| "ffx_a".to_owned(), || "b1".parse().unwrap());
        [
            (Topic::Key { domain: domain() }, [false, true, true, true]),
            (Topic::ConnectedPeers { domain: domain(), worker: name() }, [own, false, own, true]),
            (Topic::WorkerStatus { worker: name() }, [own, false, true, true]),
            (Topic::WorkerData { worker: name(), domain: domain() }, [own, false, true, true]),
            (Topic::BrokerStatus { broker: broker() }, [false, true, true, true]),
            (Topic::WorkerHello { worker: name() }, [own, false, own, true]),
            (Topic::WorkerEcho { worker: name() }, [own, false, own, true]),
            (Topic::BrokerEcho { broker: broker() }, [false, true, false, true]),
            (Topic::Applied { worker: name() }, [own, false, false, true]),
            (Topic::Handshakes { worker: name() }, [own, false, false, true]),
            (Topic::WorkerRequests { worker: name() }, [own, false, false, true]),
            (Topic::WorkerChunks { worker: name() }, [own, true, own, true]),
            (Topic::BrokerHello { broker: broker() }, [false, true, true, true]),
            (Topic::BrokerRequests { broker: broker() }, [true, true, false, true]),
            (Topic::BrokerChunks { broker: broker() }, [false, true, false, true]),
            (Topic::Revoked { worker: name() }, [own, false, false, true]),
            (Topic::WorkerServers { worker: name() }, [own, false, own, true]),
            (Topic::LeaseRequests { worker: name() }, [own, false, false, true]),
            (Topic::WorkerLeases { worker: name() }, [own, true, own, true]),
            (Topic::BrokerTenants { broker: broker() }, [false, true, false, true]),
            (Topic::Revocations, [false, true, true, true]),
        ]
    }

    #[test]
    fn the_table_has_each_topic() {
        let table: BTreeSet<_> = table("gw1").into_iter().map(|(topic, _)| topic).collect();
        let each = Topic::each("ffx_a", &"gw1".parse().unwrap(), &"b1".parse().unwrap());
        assert_eq!(table, BTreeSet::from(each));
    }

    #[test]
    fn each_publishes_its_own_topics_and_a_worker_no_keys_and_none_of_another() {
        for name in ["gw1", "gw2", "gw1x"] {
            for (topic, expected) in table(name) {
                let topic = topic.to_string();
                let found = [
                    worker().can_publish(&topic),
                    broker().can_publish(&topic),
                    worker().can_subscribe(&topic),
                    broker().can_subscribe(&topic),
                ];
                assert_eq!(found, expected, "{topic}");
            }
        }
    }

    #[test]
    fn the_programs_filters_may_be_subscribed_to_and_wider_ones_not() {
        let pages = Topic::WorkerChunks { worker: "gw1".parse().unwrap() }.to_string();
        for filter in [Topic::keys("ffx_a"), Topic::broker_hellos(), pages, "wireguard-worker/+/+/data".into()] {
            assert!(worker().can_subscribe(&filter), "{filter}");
        }
        for filter in ["#", "wireguard/#", "wgkex/#", "wgkex/worker/+/pages", "wireguard-metrics/+/+/connected_peers"] {
            assert!(!worker().can_subscribe(filter), "{filter}");
        }
        let states = Topic::states();
        let own = [Topic::applied(), Topic::handshakes(), Topic::broker_hellos(), Topic::keys("ffx_a")];
        for filter in states.iter().chain(&own) {
            assert!(broker().can_subscribe(filter), "{filter}");
        }
        assert!(!broker().can_subscribe("#") && !broker().can_subscribe("$SYS/#"));
    }

    #[test]
    fn no_user_publishes_on_topics_of_the_server() {
        for access in [worker(), broker(), TopicAccess::everything()] {
            assert!(!access.can_publish("$SYS/broker/version") && !access.can_subscribe("$SYS/#"));
        }
    }
}
