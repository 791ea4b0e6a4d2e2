//! Leases reach the gateways that are servers: each change at once, and all of them when a worker asks. Workers add their servers
//! to the registry themselves.
//!
//! One task, [`LeasePublisher::run`], which `run` of the broker owns. Previous stop of a change: the thread of the database, in the
//! order of the commits; of a request: [`crate::bus`]. Next stop: the worker, by MQTT. What finds the queue full is dropped: the
//! worker notices the gap and asks.

use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tracing::{info, warn};
use wgkex_common::mqtt::{Message, MqttHandle};
use wgkex_common::wire::lease::{
    AnnouncedServer, AnnouncedServers, LeaseContent, LeaseMessage, LeaseRequest, LeaseVersion,
};
use wgkex_common::{BrokerName, Topic, WorkerName};

use crate::database::Transaction;
use crate::registry::model::{Fields, InvalidField, NewServer};
use crate::registry::store::{self, Found, ServerChange, Snapshot};
use crate::registry::{CallError, Registry};

/// Events that wait at most.
const QUEUE: usize = 4096;
/// Refusals that are remembered at most, so that each is logged once.
const REFUSALS_MAX: usize = 1024;

/// What the task is told.
#[derive(Debug, Clone)]
pub enum LeaseEvent {
    /// Leases of workers' servers changed.
    Changed(Vec<ServerChange>),
    /// The servers that a worker is.
    Announced(WorkerName, AnnouncedServers),
    /// A worker asks for leases.
    Requested(WorkerName, LeaseRequest),
}

/// Tells the task. Clones share it.
pub type LeaseSender = mpsc::Sender<LeaseEvent>;
/// What the task receives.
pub type LeaseReceiver = mpsc::Receiver<LeaseEvent>;

/// The queue of the task.
#[must_use]
pub fn channel() -> (LeaseSender, LeaseReceiver) {
    mpsc::channel(QUEUE)
}

/// Publishes leases.
pub struct LeasePublisher {
    registry: Registry,
    bus: MqttHandle,
    broker: BrokerName,
    events: LeaseReceiver,
}

/// Why a worker's server is not taken.
#[derive(Debug, thiserror::Error)]
enum Unregistered {
    #[error(transparent)]
    Field(#[from] InvalidField),
    #[error(transparent)]
    Call(#[from] CallError),
}

impl LeasePublisher {
    /// With nothing published yet.
    #[must_use]
    pub fn new(registry: Registry, bus: MqttHandle, broker: BrokerName, events: LeaseReceiver) -> Self {
        Self { registry, bus, broker, events }
    }

    /// Publishes until nobody can tell it anything any more.
    pub async fn run(mut self) {
        while let Some(event) = self.events.recv().await {
            match event {
                LeaseEvent::Changed(changes) => self.publish_changes(changes),
                LeaseEvent::Announced(worker, announced) => self.register(&worker, announced).await,
                LeaseEvent::Requested(worker, request) => self.answer(&worker, request).await,
            }
        }
    }

    fn publish_changes(&self, changes: Vec<ServerChange>) {
        for ServerChange { worker, message } in changes {
            let _ = self.bus.try_publish(to_worker(&worker, &message));
        }
    }

    async fn register(&self, worker: &WorkerName, announced: AnnouncedServers) {
        let is_there = |of: &WorkerName, name: &String| of != worker || announced.servers.contains_key(name);
        self.registry.refused.lock().retain(|(of, name), _| is_there(of, name));
        for (name, announced) in announced.servers {
            let registered = self.register_one(worker, &name, &announced).await;
            let key = (worker.clone(), name);
            match registered {
                Ok(()) => {
                    if self.registry.refused.lock().remove(&key).is_some() {
                        info!(%worker, server = key.1, "the worker's server is in the registry now");
                    }
                }
                Err(Unregistered::Call(CallError::Database(_) | CallError::Elsewhere(_))) => {}
                Err(error) => self.log_refusal(key, &error.to_string()),
            }
        }
    }

    async fn register_one(
        &self,
        worker: &WorkerName,
        name: &str,
        announced: &AnnouncedServer,
    ) -> Result<(), Unregistered> {
        let (new, worker) = (new_server(name, announced)?, worker.clone());
        let register = move |tables: &mut Transaction<'_>, _| {
            store::register(tables, &new, store::new_id(), &worker)?;
            Ok(Vec::new())
        };
        Ok(self.registry.change(register).await?)
    }

    fn log_refusal(&self, key: (WorkerName, String), reason: &str) {
        let mut refused = self.registry.refused.lock();
        if refused.get(&key).is_some_and(|known| known == reason) || refused.len() >= REFUSALS_MAX {
            return;
        }
        let (worker, server) = (&key.0, &key.1);
        warn!(%worker, server, reason, "the worker's server is not taken into the registry");
        refused.insert(key, reason.to_owned());
    }

    /// Sends what a worker lacks. Without an answer it asks again.
    async fn answer(&self, worker: &WorkerName, LeaseRequest { to, server, known }: LeaseRequest) {
        if to != self.broker {
            return;
        }
        let Ok(found) = self.find(worker, &server, known).await else { return };
        for message in messages(&server, found) {
            if self.bus.publish(to_worker(worker, &message)).await.is_err() {
                return;
            }
        }
    }

    /// What the registry has for a worker that knows this version. One from before a copy was restored is outrun first.
    async fn find(&self, worker: &WorkerName, server: &str, known: Option<LeaseVersion>) -> Result<Found, CallError> {
        let read = || {
            let (worker, server) = (worker.clone(), server.to_owned());
            self.registry.read(move |tables| store::snapshot(tables, &worker, &server, known))
        };
        let found = read().await?;
        let Found::Server(Snapshot { version, .. }) = &found else { return Ok(found) };
        let Some(known) = known.filter(|known| version.is_before(known)) else { return Ok(found) };
        let asked = worker.clone();
        self.registry.change(move |tables, now| store::outrun(tables, &asked, known, now).map(|()| Vec::new())).await?;
        read().await
    }
}

/// The messages that have what was found.
fn messages(server: &str, found: Found) -> Vec<LeaseMessage> {
    let message = |version, content| vec![LeaseMessage { server: server.to_owned(), version, content }];
    match found {
        Found::Nothing => Vec::new(),
        Found::Deleted(version) => message(version, LeaseContent::Deleted),
        Found::Server(Snapshot { version, leases: None }) => message(version, LeaseContent::Current),
        Found::Server(Snapshot { version, leases: Some(leases) }) => {
            let leases = leases.into_iter().map(|(key, address)| (key, address.into()));
            LeaseMessage::snapshot(server, version, leases)
        }
    }
}

fn to_worker(worker: &WorkerName, message: &LeaseMessage) -> Message {
    let payload = serde_json::to_vec(message).unwrap_or_default();
    Message::transient(Topic::WorkerLeases { worker: worker.clone() }, payload)
}

/// The server as a call would have it, with the checks of calls.
fn new_server(name: &str, announced: &AnnouncedServer) -> Result<NewServer, InvalidField> {
    let fields = json!({
        "server_name": name,
        "public_key": announced.public_key,
        "network_address": announced.network.addr(),
        "network_mask": announced.network.prefix_len(),
        "n_reserved_ips": announced.reserved,
        "endpoint_address": announced.endpoint_address,
        "endpoint_port": announced.endpoint_port,
        "allowed_ips": announced.allowed_ips,
    });
    let fields = if let Value::Object(fields) = fields { fields } else { Map::new() };
    Fields(fields).new_server()
}

#[cfg(test)]
mod tests {
    use wgkex_common::PublicKey;

    use super::*;

    #[test]
    fn a_snapshot_comes_in_chunks_of_which_one_is_the_last() {
        let version = LeaseVersion { id: 7, revision: 3 };
        for (leases, expected) in [(0, vec![0]), (1, vec![1]), (1000, vec![1000]), (2001, vec![1000, 1000, 1])] {
            let key = |n: u32| {
                let mut bytes = [9; 32];
                bytes[..4].copy_from_slice(&n.to_be_bytes());
                PublicKey::from_bytes(bytes).unwrap()
            };
            let leases = (0..leases).map(|n| (key(n), std::net::Ipv4Addr::from(n).into())).collect();
            let messages = messages("s1", Found::Server(Snapshot { version, leases: Some(leases) }));
            let chunks: Vec<_> = messages
                .iter()
                .zip(0..)
                .map(|(message, number)| {
                    let LeaseContent::Chunk(chunk) = &message.content else { panic!("{message:?}") };
                    assert_eq!((message.version, chunk.number), (version, number));
                    assert_eq!(chunk.is_last, number as usize == expected.len() - 1);
                    chunk.leases.len()
                })
                .collect();
            assert_eq!(chunks, expected);
        }
        let current = messages("s1", Found::Server(Snapshot { version, leases: None }));
        assert_eq!(current, [LeaseMessage { server: "s1".into(), version, content: LeaseContent::Current }]);
    }
}
