//! Every MQTT topic, built and parsed in this one file; no other has a slash in a string.

use std::fmt;

use crate::wire::message::Participant;

/// No name of a program or a domain is longer, and whoever keeps one keeps no more.
const LEVEL_MAX: usize = 255;

/// A topic of the contract's section 4, or one of our own below `wgkex/`.
///
/// Names are those of the wire, unchecked against the config: what came over MQTT may be anybody's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// A key for every gateway of a domain. Parsed whatever the last level says, built with `all`.
    Key {
        /// The domain's name.
        domain: String,
    },
    /// How many peers a worker has connected in a domain.
    ConnectedPeers {
        /// The domain's name.
        domain: String,
        /// The worker's name.
        worker: String,
    },
    /// Whether a worker is online; its last will stands here.
    WorkerStatus {
        /// The worker's name.
        worker: String,
    },
    /// What a router must know to reach a worker in a domain.
    WorkerData {
        /// The worker's name.
        worker: String,
        /// The domain's name.
        domain: String,
    },
    /// Whether a broker is online; its last will stands here.
    BrokerStatus {
        /// The broker's name.
        broker: String,
    },
    /// What a worker can do beyond the contract. Ours, retained.
    Hello {
        /// The worker's name.
        worker: String,
    },
    /// What became of a batch of keys at a worker. Ours.
    Applied {
        /// The worker's name.
        worker: String,
    },
    /// Keys that a worker sees handshakes of. Ours.
    Seen {
        /// The worker's name.
        worker: String,
    },
    /// A worker's questions for live keys, to a broker that they name. Ours.
    WorkerQuestions {
        /// The worker's name.
        worker: String,
    },
    /// Live keys for a worker that asked. Ours.
    WorkerPages {
        /// The worker's name.
        worker: String,
    },
    /// What became of denied keys at a worker. Ours.
    Revoked {
        /// The worker's name.
        worker: String,
    },
    /// What a worker publishes to itself. Ours.
    WorkerEcho {
        /// The worker's name.
        worker: String,
    },
    /// Entries of the lists that brokers share, for everybody. Ours.
    Revocations,
    /// What a broker can do beyond the contract. Ours, retained.
    BrokerHello {
        /// The broker's name.
        broker: String,
    },
    /// Questions to a broker for live keys, of those that ask there, and for entries of the lists. Ours.
    Questions {
        /// The broker's name.
        broker: String,
    },
    /// Live keys for a broker that asked; or another broker's question, as only brokers publish there. Ours.
    BrokerPages {
        /// The broker's name.
        broker: String,
    },
    /// What a broker publishes to itself. Ours.
    BrokerEcho {
        /// The broker's name.
        broker: String,
    },
}

impl Topic {
    /// The topic that `text` names, if it is one of ours.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let levels: Vec<&str> = text.split('/').collect();
        if levels.iter().any(|level| level.is_empty() || level.len() > LEVEL_MAX) {
            return None;
        }
        let name = str::to_owned;
        match levels[..] {
            ["wireguard", domain, _] => Some(Self::Key { domain: name(domain) }),
            ["wireguard-metrics", domain, worker, "connected_peers"] => {
                Some(Self::ConnectedPeers { domain: name(domain), worker: name(worker) })
            }
            ["wireguard-worker", worker, "status"] => Some(Self::WorkerStatus { worker: name(worker) }),
            ["wireguard-worker", worker, domain, "data"] => {
                Some(Self::WorkerData { worker: name(worker), domain: name(domain) })
            }
            ["wireguard-broker", broker, "status"] => Some(Self::BrokerStatus { broker: name(broker) }),
            ["wgkex", "worker", worker, "hello"] => Some(Self::Hello { worker: name(worker) }),
            ["wgkex", "worker", worker, "applied"] => Some(Self::Applied { worker: name(worker) }),
            ["wgkex", "worker", worker, "seen"] => Some(Self::Seen { worker: name(worker) }),
            ["wgkex", "worker", worker, "questions"] => Some(Self::WorkerQuestions { worker: name(worker) }),
            ["wgkex", "worker", worker, "pages"] => Some(Self::WorkerPages { worker: name(worker) }),
            ["wgkex", "worker", worker, "echo"] => Some(Self::WorkerEcho { worker: name(worker) }),
            ["wgkex", "broker", broker, "echo"] => Some(Self::BrokerEcho { broker: name(broker) }),
            ["wgkex", "worker", worker, "revoked"] => Some(Self::Revoked { worker: name(worker) }),
            ["wgkex", "revocations"] => Some(Self::Revocations),
            ["wgkex", "broker", broker, "hello"] => Some(Self::BrokerHello { broker: name(broker) }),
            ["wgkex", "broker", broker, "questions"] => Some(Self::Questions { broker: name(broker) }),
            ["wgkex", "broker", broker, "pages"] => Some(Self::BrokerPages { broker: name(broker) }),
            _ => None,
        }
    }

    /// The broker or worker whose state stands on it; none if it is no topic of states.
    #[must_use]
    pub fn state_of(&self) -> Option<Participant> {
        match self {
            Self::ConnectedPeers { worker, .. }
            | Self::WorkerStatus { worker }
            | Self::WorkerData { worker, .. }
            | Self::Hello { worker } => Some(Participant::Worker(worker.clone())),
            Self::BrokerStatus { broker } | Self::BrokerHello { broker } => Some(Participant::Broker(broker.clone())),
            Self::Key { .. }
            | Self::Applied { .. }
            | Self::Seen { .. }
            | Self::Revoked { .. }
            | Self::WorkerQuestions { .. }
            | Self::WorkerPages { .. }
            | Self::WorkerEcho { .. }
            | Self::Revocations
            | Self::Questions { .. }
            | Self::BrokerPages { .. }
            | Self::BrokerEcho { .. } => None,
        }
    }

    /// The filter for every key of a domain, whatever its last level.
    #[must_use]
    pub fn keys(domain: &str) -> String {
        format!("wireguard/{domain}/+")
    }

    /// The filters for what workers and brokers say of themselves, all of it retained.
    #[must_use]
    pub fn states() -> [String; 5] {
        let any = || "+".to_owned();
        [
            Self::WorkerStatus { worker: any() },
            Self::WorkerData { worker: any(), domain: any() },
            Self::ConnectedPeers { domain: any(), worker: any() },
            Self::Hello { worker: any() },
            Self::BrokerStatus { broker: any() },
        ]
        .map(|topic| topic.to_string())
    }

    /// The filter for whether each worker is online.
    #[must_use]
    pub fn worker_statuses() -> String {
        Self::WorkerStatus { worker: "+".into() }.to_string()
    }

    /// The filter for whether each broker is online.
    #[must_use]
    pub fn broker_statuses() -> String {
        Self::BrokerStatus { broker: "+".into() }.to_string()
    }

    /// The filter for what every worker says of itself in every domain.
    #[must_use]
    pub fn worker_data() -> String {
        Self::WorkerData { worker: "+".into(), domain: "+".into() }.to_string()
    }

    /// The filter for what became of keys, at every worker.
    #[must_use]
    pub fn applied() -> String {
        Self::Applied { worker: "+".into() }.to_string()
    }

    /// The filter for the keys that workers see handshakes of.
    #[must_use]
    pub fn seen() -> String {
        Self::Seen { worker: "+".into() }.to_string()
    }

    /// The filter for what became of denied keys, at every worker.
    #[must_use]
    pub fn revoked() -> String {
        Self::Revoked { worker: "+".into() }.to_string()
    }

    /// Whether it is one of our own, which the contract does not have.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.to_string().starts_with("wgkex/")
    }

    /// The filter for the questions of all workers.
    #[must_use]
    pub fn worker_questions() -> String {
        Self::WorkerQuestions { worker: "+".into() }.to_string()
    }

    /// The filter for what brokers can do.
    #[must_use]
    pub fn broker_hellos() -> String {
        Self::BrokerHello { broker: "+".into() }.to_string()
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key { domain } => write!(f, "wireguard/{domain}/all"),
            Self::ConnectedPeers { domain, worker } => {
                write!(f, "wireguard-metrics/{domain}/{worker}/connected_peers")
            }
            Self::WorkerStatus { worker } => write!(f, "wireguard-worker/{worker}/status"),
            Self::WorkerData { worker, domain } => write!(f, "wireguard-worker/{worker}/{domain}/data"),
            Self::BrokerStatus { broker } => write!(f, "wireguard-broker/{broker}/status"),
            Self::Hello { worker } => write!(f, "wgkex/worker/{worker}/hello"),
            Self::Applied { worker } => write!(f, "wgkex/worker/{worker}/applied"),
            Self::Seen { worker } => write!(f, "wgkex/worker/{worker}/seen"),
            Self::WorkerQuestions { worker } => write!(f, "wgkex/worker/{worker}/questions"),
            Self::WorkerPages { worker } => write!(f, "wgkex/worker/{worker}/pages"),
            Self::Revoked { worker } => write!(f, "wgkex/worker/{worker}/revoked"),
            Self::WorkerEcho { worker } => write!(f, "wgkex/worker/{worker}/echo"),
            Self::BrokerEcho { broker } => write!(f, "wgkex/broker/{broker}/echo"),
            Self::Revocations => f.write_str("wgkex/revocations"),
            Self::BrokerHello { broker } => write!(f, "wgkex/broker/{broker}/hello"),
            Self::Questions { broker } => write!(f, "wgkex/broker/{broker}/questions"),
            Self::BrokerPages { broker } => write!(f, "wgkex/broker/{broker}/pages"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table() -> Vec<(Topic, &'static str)> {
        let (domain, worker) = ("ffmuc_welt".to_owned(), "gw04.in.ffmuc.net".to_owned());
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
            (Topic::BrokerStatus { broker: "broker1".into() }, "wireguard-broker/broker1/status"),
            (Topic::Hello { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/hello"),
            (Topic::Applied { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/applied"),
            (Topic::Seen { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/seen"),
            (Topic::WorkerQuestions { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/questions"),
            (Topic::WorkerPages { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/pages"),
            (Topic::WorkerEcho { worker: worker.clone() }, "wgkex/worker/gw04.in.ffmuc.net/echo"),
            (Topic::BrokerEcho { broker: "broker1".into() }, "wgkex/broker/broker1/echo"),
            (Topic::Revoked { worker }, "wgkex/worker/gw04.in.ffmuc.net/revoked"),
            (Topic::Revocations, "wgkex/revocations"),
            (Topic::BrokerHello { broker: "broker1".into() }, "wgkex/broker/broker1/hello"),
            (Topic::Questions { broker: "broker1".into() }, "wgkex/broker/broker1/questions"),
            (Topic::BrokerPages { broker: "broker1".into() }, "wgkex/broker/broker1/pages"),
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
    fn a_key_is_taken_whatever_the_last_level_says() {
        let key = Topic::Key { domain: "ffmuc_welt".into() };
        for text in ["wireguard/ffmuc_welt/all", "wireguard/ffmuc_welt/gw04"] {
            assert_eq!(Topic::parse(text), Some(key.clone()));
        }
        assert_eq!(Topic::keys("ffmuc_welt"), "wireguard/ffmuc_welt/+");
    }

    #[test]
    fn other_topics_are_nobodys() {
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
        ] {
            assert_eq!(Topic::parse(text), None, "{text:?}");
        }
        let hello = |length| Topic::parse(&format!("wgkex/worker/{}/hello", "x".repeat(length)));
        assert!(hello(255).is_some() && hello(256).is_none());
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not_and_what_is_built_parses(
            text in "(wireguard|wgkex|wireguard-worker|x)(/[a-z+#]{0,6}){0,5}",
            domain in "[a-z_]{1,12}",
            worker in "[a-z0-9.-]{1,20}",
        ) {
            let _ = Topic::parse(&text);
            let topic = Topic::WorkerData { worker, domain };
            prop_assert_eq!(Topic::parse(&topic.to_string()), Some(topic));
        }
    }
}
