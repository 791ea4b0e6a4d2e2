//! Every MQTT topic of wgkex: its text is defined here, its owner and direction in [`ownership`]. The access rules of
//! the MQTT server are derived from these (they also have rows for Parker, whose topics wgkex does not use yet).

mod ownership;

use std::fmt;

pub use self::ownership::{Direction, Owner};
use crate::wire::name::{BrokerName, WorkerName};

/// The longest name of a program or a domain, in bytes.
const LEVEL_MAX: usize = 255;
/// The prefix of all our own topics.
const OURS: &str = "wgkex";

/// A topic of the contract's section 4, or one of our own below `wgkex/`.
///
/// The domain is as received, unchecked against the config: any client may have published it. So are the names of
/// programs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// A key for every gateway of a domain. Parsed whatever the last level is, built with `all`.
    Key {
        /// The domain's name.
        domain: String,
    },
    /// How many peers a worker has connected in a domain.
    ConnectedPeers {
        /// The domain's name.
        domain: String,
        /// The worker's name.
        worker: WorkerName,
    },
    /// Whether a worker is online; its last will stands here.
    WorkerStatus {
        /// The worker's name.
        worker: WorkerName,
    },
    /// The parameters that a router needs to use a worker in a domain.
    WorkerData {
        /// The worker's name.
        worker: WorkerName,
        /// The domain's name.
        domain: String,
    },
    /// Whether a broker is online; its last will stands here.
    BrokerStatus {
        /// The broker's name.
        broker: BrokerName,
    },
    /// The hello of a worker. Ours.
    WorkerHello {
        /// The worker's name.
        worker: WorkerName,
    },
    /// The outcomes of a batch of keys at a worker. Ours.
    Applied {
        /// The worker's name.
        worker: WorkerName,
    },
    /// Keys that have handshakes at a worker. Ours.
    Handshakes {
        /// The worker's name.
        worker: WorkerName,
    },
    /// The outcomes of denied keys at a worker. Ours.
    Revoked {
        /// The worker's name.
        worker: WorkerName,
    },
    /// A worker's sync requests, to a broker that they name. Ours.
    WorkerRequests {
        /// The worker's name.
        worker: WorkerName,
    },
    /// Snapshot chunks for a worker that requested them. Ours.
    WorkerChunks {
        /// The worker's name.
        worker: WorkerName,
    },
    /// The servers of the registry that a worker is. Ours.
    WorkerServers {
        /// The worker's name.
        worker: WorkerName,
    },
    /// A worker's requests for the leases of its servers, to a broker that they name. Ours.
    LeaseRequests {
        /// The worker's name.
        worker: WorkerName,
    },
    /// Leases of a worker's servers. Ours.
    WorkerLeases {
        /// The worker's name.
        worker: WorkerName,
    },
    /// Messages of a worker to itself. Ours.
    WorkerEcho {
        /// The worker's name.
        worker: WorkerName,
    },
    /// The hello of a broker. Ours.
    BrokerHello {
        /// The broker's name.
        broker: BrokerName,
    },
    /// Requests to a broker: for entries of the lists, and for live keys if it receives them on no other topic. Ours.
    BrokerRequests {
        /// The broker's name.
        broker: BrokerName,
    },
    /// Snapshot chunks for a broker that requested them; or another broker's sync request, as only brokers publish
    /// here. Ours.
    BrokerChunks {
        /// The broker's name.
        broker: BrokerName,
    },
    /// Messages of brokers that serve tenants about their members, to a broker. Ours.
    BrokerTenants {
        /// The broker's name.
        broker: BrokerName,
    },
    /// Messages of a broker to itself. Ours.
    BrokerEcho {
        /// The broker's name.
        broker: BrokerName,
    },
    /// Entries of the lists that brokers share. Ours.
    Revocations,
}

impl Topic {
    /// The first level of every topic, except Parker's.
    pub const ROOTS: [&str; 5] = ["wireguard", "wireguard-metrics", "wireguard-worker", "wireguard-broker", OURS];

    /// One topic of each kind, of this domain, worker and broker; `+` stands for all of them in a filter.
    #[must_use]
    pub fn each(domain: &str, worker: &WorkerName, broker: &BrokerName) -> [Self; 21] {
        let (domain, worker, broker) = (|| domain.to_owned(), || worker.clone(), || broker.clone());
        [
            Self::Key { domain: domain() },
            Self::WorkerChunks { worker: worker() },
            Self::WorkerHello { worker: worker() },
            Self::WorkerEcho { worker: worker() },
            Self::WorkerServers { worker: worker() },
            Self::LeaseRequests { worker: worker() },
            Self::WorkerLeases { worker: worker() },
            Self::Applied { worker: worker() },
            Self::Handshakes { worker: worker() },
            Self::Revoked { worker: worker() },
            Self::WorkerRequests { worker: worker() },
            Self::ConnectedPeers { domain: domain(), worker: worker() },
            Self::WorkerStatus { worker: worker() },
            Self::WorkerData { worker: worker(), domain: domain() },
            Self::BrokerStatus { broker: broker() },
            Self::BrokerHello { broker: broker() },
            Self::BrokerRequests { broker: broker() },
            Self::BrokerChunks { broker: broker() },
            Self::BrokerTenants { broker: broker() },
            Self::BrokerEcho { broker: broker() },
            Self::Revocations,
        ]
    }

    /// Its last level, which names the kind of message.
    #[must_use]
    pub fn last_level(&self) -> &'static str {
        match self {
            Self::Key { .. } => "all",
            Self::ConnectedPeers { .. } => "connected_peers",
            Self::WorkerStatus { .. } | Self::BrokerStatus { .. } => "status",
            Self::WorkerData { .. } => "data",
            Self::WorkerHello { .. } | Self::BrokerHello { .. } => "hello",
            Self::Applied { .. } => "applied",
            Self::Handshakes { .. } => "seen",
            Self::Revoked { .. } => "revoked",
            Self::WorkerRequests { .. } | Self::BrokerRequests { .. } => "questions",
            Self::WorkerChunks { .. } | Self::BrokerChunks { .. } => "pages",
            Self::WorkerServers { .. } => "servers",
            Self::LeaseRequests { .. } => "lease-requests",
            Self::BrokerTenants { .. } => "tenants",
            Self::WorkerLeases { .. } => "leases",
            Self::WorkerEcho { .. } | Self::BrokerEcho { .. } => "echo",
            Self::Revocations => "revocations",
        }
    }

    /// The filter for it; its names may be `+`. The filter for a key has any last level.
    #[must_use]
    pub fn filter(&self) -> String {
        if let Self::Key { domain } = self { Self::keys(domain) } else { self.to_string() }
    }

    /// The filter for all topics of our own that a worker owns.
    #[must_use]
    pub fn all_of_worker(worker: &WorkerName) -> String {
        format!("{OURS}/worker/{worker}/+")
    }

    /// The topic that `text` names, if it is one of ours.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let levels: Vec<&str> = text.split('/').collect();
        if levels.iter().any(|level| level.is_empty() || level.len() > LEVEL_MAX) {
            return None;
        }
        match levels[..] {
            ["wireguard", domain, _] => Some(Self::Key { domain: domain.to_owned() }),
            ["wireguard-metrics", domain, worker, "connected_peers"] => {
                Some(Self::ConnectedPeers { domain: domain.to_owned(), worker: worker.parse().ok()? })
            }
            ["wireguard-worker", worker, "status"] => Some(Self::WorkerStatus { worker: worker.parse().ok()? }),
            ["wireguard-worker", worker, domain, "data"] => {
                Some(Self::WorkerData { worker: worker.parse().ok()?, domain: domain.to_owned() })
            }
            ["wireguard-broker", broker, "status"] => Some(Self::BrokerStatus { broker: broker.parse().ok()? }),
            ["wgkex", "worker", worker, "hello"] => Some(Self::WorkerHello { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "applied"] => Some(Self::Applied { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "seen"] => Some(Self::Handshakes { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "questions"] => Some(Self::WorkerRequests { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "pages"] => Some(Self::WorkerChunks { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "servers"] => Some(Self::WorkerServers { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "lease-requests"] => Some(Self::LeaseRequests { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "leases"] => Some(Self::WorkerLeases { worker: worker.parse().ok()? }),
            ["wgkex", "worker", worker, "echo"] => Some(Self::WorkerEcho { worker: worker.parse().ok()? }),
            ["wgkex", "broker", broker, "echo"] => Some(Self::BrokerEcho { broker: broker.parse().ok()? }),
            ["wgkex", "worker", worker, "revoked"] => Some(Self::Revoked { worker: worker.parse().ok()? }),
            ["wgkex", "revocations"] => Some(Self::Revocations),
            ["wgkex", "broker", broker, "hello"] => Some(Self::BrokerHello { broker: broker.parse().ok()? }),
            ["wgkex", "broker", broker, "questions"] => Some(Self::BrokerRequests { broker: broker.parse().ok()? }),
            ["wgkex", "broker", broker, "tenants"] => Some(Self::BrokerTenants { broker: broker.parse().ok()? }),
            ["wgkex", "broker", broker, "pages"] => Some(Self::BrokerChunks { broker: broker.parse().ok()? }),
            _ => None,
        }
    }

    /// The topic of a received message. None if it was `retained` on a topic on which no program retains messages: it
    /// was published by another client, and may be of any age.
    #[must_use]
    pub fn received(text: &str, retained: bool) -> Option<Self> {
        Self::parse(text).filter(|topic| !retained || topic.is_retained())
    }

    /// The filter for every key of a domain, whatever its last level.
    #[must_use]
    pub fn keys(domain: &str) -> String {
        format!("wireguard/{domain}/+")
    }

    /// The filters for the states of workers and brokers, all of them retained.
    #[must_use]
    pub fn states() -> [String; 5] {
        let (domain, worker) = (|| "+".to_owned(), WorkerName::any);
        [
            Self::WorkerStatus { worker: worker() },
            Self::WorkerData { worker: worker(), domain: domain() },
            Self::ConnectedPeers { domain: domain(), worker: worker() },
            Self::WorkerHello { worker: worker() },
            Self::BrokerStatus { broker: BrokerName::any() },
        ]
        .map(|topic| topic.to_string())
    }

    /// The filter for the status of every worker.
    #[must_use]
    pub fn worker_statuses() -> String {
        Self::WorkerStatus { worker: WorkerName::any() }.to_string()
    }

    /// The filter for the status of every broker.
    #[must_use]
    pub fn broker_statuses() -> String {
        Self::BrokerStatus { broker: BrokerName::any() }.to_string()
    }

    /// The filter for the data of every worker in every domain.
    #[must_use]
    pub fn worker_data() -> String {
        Self::WorkerData { worker: WorkerName::any(), domain: "+".into() }.to_string()
    }

    /// The filter for the outcomes of keys, of every worker.
    #[must_use]
    pub fn applied() -> String {
        Self::Applied { worker: WorkerName::any() }.to_string()
    }

    /// The filter for the keys that have handshakes, of every worker.
    #[must_use]
    pub fn handshakes() -> String {
        Self::Handshakes { worker: WorkerName::any() }.to_string()
    }

    /// The filter for the outcomes of denied keys, of every worker.
    #[must_use]
    pub fn revoked() -> String {
        Self::Revoked { worker: WorkerName::any() }.to_string()
    }

    /// Whether it is one of our own, which the contract does not have.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.to_string().starts_with("wgkex/")
    }

    /// The filter for the sync requests of all workers.
    #[must_use]
    pub fn worker_requests() -> String {
        Self::WorkerRequests { worker: WorkerName::any() }.to_string()
    }

    /// The filter for the servers that workers are.
    #[must_use]
    pub fn worker_servers() -> String {
        Self::WorkerServers { worker: WorkerName::any() }.to_string()
    }

    /// The filter for the requests for leases of all workers.
    #[must_use]
    pub fn lease_requests() -> String {
        Self::LeaseRequests { worker: WorkerName::any() }.to_string()
    }

    /// The filter for the hellos of brokers.
    #[must_use]
    pub fn broker_hellos() -> String {
        Self::BrokerHello { broker: BrokerName::any() }.to_string()
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.last_level();
        match (self, self.owner()) {
            (Self::Key { domain }, _) => write!(f, "wireguard/{domain}/{last}"),
            (Self::ConnectedPeers { domain, worker }, _) => write!(f, "wireguard-metrics/{domain}/{worker}/{last}"),
            (Self::WorkerStatus { worker }, _) => write!(f, "wireguard-worker/{worker}/{last}"),
            (Self::WorkerData { worker, domain }, _) => write!(f, "wireguard-worker/{worker}/{domain}/{last}"),
            (Self::BrokerStatus { broker }, _) => write!(f, "wireguard-broker/{broker}/{last}"),
            (_, Owner::Worker(worker)) => write!(f, "{OURS}/worker/{worker}/{last}"),
            (_, Owner::Broker(broker)) => write!(f, "{OURS}/broker/{broker}/{last}"),
            (_, Owner::Domain(_) | Owner::Nobody) => write!(f, "{OURS}/{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table() -> Vec<(Topic, &'static str)> {
        let (domain, worker) = ("ffmuc_welt".to_owned(), "gw04.in.ffmuc.net".parse::<WorkerName>().unwrap());
        let broker = || "broker1".parse().unwrap();
        vec![
            (Topic::Key { domain: domain.clone() }, "wireguard/ffmuc_welt/all"),
            (
                Topic::ConnectedPeers { domain: domain.clone(), worker: worker.clone() },
                "wireguard-metrics/ffmuc_welt/gw04.in.ffmuc.net/connected_peers",
            ),
            (Topic::WorkerStatus { worker: worker.clone() }, "wireguard-worker/gw04.in.ffmuc.net/status"),
            (
                Topic::WorkerData { worker: worker.clone(), domain },
                "wireguard-worker/gw04.in.ffmuc.net/ffmuc_welt/data",
            ),
            (Topic::BrokerStatus { broker: broker() }, "wireguard-broker/broker1/status"),
            (Topic::WorkerHello { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/hello"),
            (Topic::Applied { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/applied"),
            (Topic::Handshakes { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/seen"),
            (Topic::WorkerRequests { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/questions"),
            (Topic::WorkerChunks { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/pages"),
            (Topic::WorkerEcho { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/echo"),
            (Topic::BrokerEcho { broker: broker() }, "wgkex/broker/broker1/echo"),
            (Topic::Revoked { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/revoked"),
            (Topic::WorkerServers { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/servers"),
            (Topic::LeaseRequests { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/lease-requests"),
            (Topic::WorkerLeases { worker }, "wgkex/worker/gw04.in.ffmuc.net/leases"),
            (Topic::Revocations, "wgkex/revocations"),
            (Topic::BrokerHello { broker: broker() }, "wgkex/broker/broker1/hello"),
            (Topic::BrokerRequests { broker: broker() }, "wgkex/broker/broker1/questions"),
            (Topic::BrokerChunks { broker: broker() }, "wgkex/broker/broker1/pages"),
            (Topic::BrokerTenants { broker: broker() }, "wgkex/broker/broker1/tenants"),
        ]
    }

    #[test]
    fn every_topic_is_the_contracts_in_both_directions() {
        for (topic, text) in table() {
            assert_eq!(topic.to_string(), text);
            assert_eq!(Topic::parse(text), Some(topic));
        }
    }

    #[test]
    fn each_lists_every_kind_of_topic_once() {
        let mut all: Vec<_> =
            Topic::each("ffmuc_welt", &"gw04.in.ffmuc.net".parse().unwrap(), &"broker1".parse().unwrap()).into();
        let mut expected: Vec<_> = table().into_iter().map(|(topic, _)| topic).collect();
        all.sort();
        expected.sort();
        assert_eq!(all, expected);
        for topic in &all {
            let first = topic.to_string().split('/').next().unwrap_or_default().to_owned();
            assert!(Topic::ROOTS.contains(&first.as_str()), "{topic}");
        }
    }

    #[test]
    fn a_retained_message_is_received_only_on_the_topics_of_states() {
        let states = ["connected_peers", "status", "data", "hello", "servers"];
        for (topic, text) in table() {
            let is_state = states.contains(&topic.last_level());
            assert_eq!(Topic::received(text, true), is_state.then(|| topic.clone()), "{text}");
            assert_eq!(Topic::received(text, false), Some(topic));
        }
        assert_eq!(Topic::received("wgkex/x", false), None);
    }

    #[test]
    fn a_key_topic_may_have_any_last_level() {
        let key = Topic::Key { domain: "ffmuc_welt".into() };
        for text in ["wireguard/ffmuc_welt/all", "wireguard/ffmuc_welt/gw04"] {
            assert_eq!(Topic::parse(text), Some(key.clone()));
        }
        assert_eq!(Topic::keys("ffmuc_welt"), "wireguard/ffmuc_welt/+");
    }

    #[test]
    fn unknown_topics_do_not_parse() {
        for text in [
            "",
            "/",
            "wireguard",
            "wireguard/a",
            "wireguard//all",
            "wireguard/a/b/c",
            "wireguard-worker/a/b/c",
            "wireguard-worker//status",
            "parker/wireguard/all",
            "wireguard-metrics/a/b/other",
            "$SYS/broker/uptime",
            "wireguard-worker/a\u{1}/status",
        ] {
            assert_eq!(Topic::parse(text), None, "{text:?}");
        }
        let hello = |length| Topic::parse(&format!("wgkex/worker/{}/hello", "x".repeat(length)));
        assert!(hello(255).is_some() && hello(256).is_none());
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not_and_built_topics_parse(
            text in "(wireguard|wgkex|wireguard-worker|x)(/[a-z+#]{0,6}){0,5}",
            domain in "[a-z_]{1,12}",
            worker in "[a-z0-9.-]{1,20}",
        ) {
            let _ = Topic::parse(&text);
            let topic = Topic::WorkerData { worker: worker.parse().unwrap(), domain };
            prop_assert_eq!(Topic::parse(&topic.to_string()), Some(topic));
        }
    }
}
