//! The owner of a topic, and the direction of its messages: the access rules of the MQTT server follow from these.

use super::Topic;
use crate::wire::name::{BrokerName, Participant, WorkerName};

/// The owner of a topic, by the name in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner<'a> {
    /// A worker.
    Worker(&'a WorkerName),
    /// A broker.
    Broker(&'a BrokerName),
    /// A domain, which belongs to no single program.
    Domain(&'a str),
    /// It contains no name.
    Nobody,
}

/// Which programs publish on a topic, and which subscribe to it. Brokers may subscribe to every topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The owner publishes, all programs subscribe; retained.
    StateForAll,
    /// The owner publishes, brokers subscribe, and so does the owner to check the retained message; retained.
    StateForBrokers,
    /// The owner publishes, brokers subscribe.
    ToBrokers,
    /// Brokers publish, the owner subscribes.
    FromBrokers,
    /// All programs publish, the owner subscribes.
    FromAll,
    /// The owner publishes and subscribes.
    Echo,
    /// Brokers publish, all programs subscribe.
    Broadcast,
}

impl Topic {
    /// Its owner.
    #[must_use]
    pub fn owner(&self) -> Owner<'_> {
        match self {
            Self::ConnectedPeers { worker, .. }
            | Self::WorkerStatus { worker }
            | Self::WorkerData { worker, .. }
            | Self::WorkerHello { worker }
            | Self::Applied { worker }
            | Self::Handshakes { worker }
            | Self::Revoked { worker }
            | Self::WorkerRequests { worker }
            | Self::WorkerChunks { worker }
            | Self::WorkerServers { worker }
            | Self::LeaseRequests { worker }
            | Self::WorkerLeases { worker }
            | Self::WorkerEcho { worker } => Owner::Worker(worker),
            Self::BrokerStatus { broker }
            | Self::BrokerHello { broker }
            | Self::BrokerRequests { broker }
            | Self::BrokerChunks { broker }
            | Self::BrokerTenants { broker }
            | Self::BrokerEcho { broker } => Owner::Broker(broker),
            Self::Key { domain } => Owner::Domain(domain),
            Self::Revocations => Owner::Nobody,
        }
    }

    /// The direction of its messages.
    #[must_use]
    pub fn direction(&self) -> Direction {
        match self {
            Self::WorkerStatus { .. }
            | Self::WorkerData { .. }
            | Self::BrokerStatus { .. }
            | Self::BrokerHello { .. } => Direction::StateForAll,
            Self::ConnectedPeers { .. } | Self::WorkerHello { .. } | Self::WorkerServers { .. } => {
                Direction::StateForBrokers
            }
            Self::Applied { .. }
            | Self::Handshakes { .. }
            | Self::Revoked { .. }
            | Self::WorkerRequests { .. }
            | Self::LeaseRequests { .. } => Direction::ToBrokers,
            Self::WorkerChunks { .. }
            | Self::WorkerLeases { .. }
            | Self::BrokerChunks { .. }
            | Self::BrokerTenants { .. } => Direction::FromBrokers,
            Self::BrokerRequests { .. } => Direction::FromAll,
            Self::WorkerEcho { .. } | Self::BrokerEcho { .. } => Direction::Echo,
            Self::Key { .. } | Self::Revocations => Direction::Broadcast,
        }
    }

    /// The domain in it, if there is one.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        if let Self::Key { domain } | Self::ConnectedPeers { domain, .. } | Self::WorkerData { domain, .. } = self {
            Some(domain)
        } else {
            None
        }
    }

    /// Whether messages are retained on it.
    #[must_use]
    pub fn is_retained(&self) -> bool {
        matches!(self.direction(), Direction::StateForAll | Direction::StateForBrokers)
    }

    /// The broker or worker whose retained state is on it; none if it has no state.
    #[must_use]
    pub fn state_of(&self) -> Option<Participant> {
        if !self.is_retained() {
            return None;
        }
        match self.owner() {
            Owner::Worker(worker) => Some(Participant::Worker(worker.clone())),
            Owner::Broker(broker) => Some(Participant::Broker(broker.clone())),
            Owner::Domain(_) | Owner::Nobody => None,
        }
    }
}

impl Participant {
    /// The topic for its requests to `broker`, on which no other program can send them in its name: only a worker
    /// itself may publish on its requests, and only brokers on the chunks of brokers.
    #[must_use]
    pub fn requests(&self, broker: &BrokerName) -> Topic {
        match self {
            Self::Worker(worker) => Topic::WorkerRequests { worker: worker.clone() },
            Self::Broker(_) => Topic::BrokerChunks { broker: broker.clone() },
        }
    }

    /// The topic on which it receives the answers to its requests.
    #[must_use]
    pub fn chunks(&self) -> Topic {
        match self {
            Self::Worker(worker) => Topic::WorkerChunks { worker: worker.clone() },
            Self::Broker(broker) => Topic::BrokerChunks { broker: broker.clone() },
        }
    }
}
