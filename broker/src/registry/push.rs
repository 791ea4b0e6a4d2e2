//! Leases reach the gateways that are servers: each change at once, and all of them when a worker requests them.
//! Workers add their servers to the registry themselves.
//!
//! Two tasks, which `run` of the broker owns: [`publish_changes`] and [`LeasePublisher::run`]. Previous stop of a
//! change: [`super::pending`]; of a request: [`crate::bus`]. Next stop: the worker, by MQTT. A request that finds the
//! queue full is dropped: the worker repeats it.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};
use wgkex_common::mqtt::{Message, MqttHandle};
use wgkex_common::wire::lease::{
    AnnouncedServer, AnnouncedServers, LeaseContent, LeaseMessage, LeaseRequest, LeaseVersion,
};
use wgkex_common::{BrokerName, Topic, WorkerName};

use crate::database::Transaction;
use crate::registry::Registry;
use crate::registry::call_error::CallError;
use crate::registry::lease_events::{RegistryEvent, RegistryEventReceiver};
use crate::registry::model::{CallFields, InvalidField, NewServer};
use crate::registry::pending::PendingLeases;
use crate::registry::store::{self, LeaseSnapshot, RequestedLeases};

/// Refusals that are remembered at most, so that each is logged once.
const REFUSALS_MAX: usize = 1024;
/// Workers at most whose servers are remembered until the database takes them.
const WAITING_WORKERS_MAX: usize = 1024;
/// How long after the database did not take a worker's servers they are registered again.
const REGISTER_RETRY_PAUSE: Duration = Duration::from_secs(5);
/// How long other events may wait for the database then.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(1);

/// Publishes changes, for ever. The next messages are published when the server has those before.
pub async fn publish_changes(pending: PendingLeases, bus: MqttHandle) {
    loop {
        let messages = pending.next().await;
        // These are so few that each is queued before the next one.
        let published = join_all(messages.iter().map(|(worker, message)| bus.publish(to_worker(worker, message))));
        // Workers request messages that are lost with the session on the next one.
        drop(published.await);
    }
}

/// Answers workers, and registers their servers.
pub struct LeasePublisher {
    registry: Registry,
    bus: MqttHandle,
    broker: BrokerName,
    events: RegistryEventReceiver,
    waiting: UnregisteredServers,
}

/// The servers of workers that the database did not take, because it was away.
#[derive(Debug, Default)]
struct UnregisteredServers {
    announced: VecDeque<(WorkerName, AnnouncedServers)>,
    /// When they are registered again.
    due: Option<Instant>,
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
    pub fn new(registry: Registry, bus: MqttHandle, broker: BrokerName, events: RegistryEventReceiver) -> Self {
        Self { registry, bus, broker, events, waiting: UnregisteredServers::default() }
    }

    /// Publishes until all senders of events are dropped.
    pub async fn run(mut self) {
        loop {
            let due = self.waiting.due;
            tokio::select! {
                biased;
                event = self.events.recv() => match event {
                    Some(event) => self.on_event(event).await,
                    None => return,
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.retry().await,
            }
        }
    }

    async fn on_event(&mut self, event: RegistryEvent) {
        match event {
            RegistryEvent::Announced(worker, announced) => {
                let is_taken = self.register(&worker, &announced).await;
                self.waiting.note(worker, announced, is_taken, Instant::now());
            }
            RegistryEvent::Requested(worker, request) => self.answer(&worker, request).await,
        }
    }

    /// Registers the servers of one worker that waits. The next one's turn is at once, if the database takes these.
    async fn retry(&mut self) {
        let Some((worker, announced)) = self.waiting.announced.pop_front() else { return };
        let is_taken = timeout(REGISTER_TIMEOUT, self.register(&worker, &announced)).await == Ok(true);
        self.waiting.note(worker, announced, is_taken, Instant::now());
    }

    /// Registers a worker's servers. True if the database took each or refused it by its content; false if it cannot be
    /// used.
    async fn register(&self, worker: &WorkerName, announced: &AnnouncedServers) -> bool {
        let is_there = |of: &WorkerName, name: &String| of != worker || announced.servers.contains_key(name);
        self.registry.refused.lock().retain(|(of, name), _| is_there(of, name));
        for (name, announced) in &announced.servers {
            let registered = self.register_one(worker, name, announced).await;
            let key = (worker.clone(), name.clone());
            match registered {
                Ok(()) => {
                    if self.registry.refused.lock().remove(&key).is_some() {
                        info!(%worker, server = key.1, "the worker's server is in the registry now");
                    }
                }
                Err(Unregistered::Call(CallError::Database(_) | CallError::Elsewhere(_))) => return false,
                Err(error) => self.log_refusal(key, &error.to_string()),
            }
        }
        true
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

    /// Sends the leases that a worker lacks. Without an answer the worker repeats its request.
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

    /// The leases in the registry for a worker that knows this version. If that is a later one, from before a copy of
    /// the database was restored, the server gets an even later one first.
    async fn find(
        &self,
        worker: &WorkerName,
        server: &str,
        known: Option<LeaseVersion>,
    ) -> Result<RequestedLeases, CallError> {
        let read = || {
            let (worker, server) = (worker.clone(), server.to_owned());
            self.registry.read(move |tables| store::snapshot(tables, &worker, &server, known))
        };
        let found = read().await?;
        let RequestedLeases::Server(LeaseSnapshot { version, .. }) = &found else { return Ok(found) };
        let Some(known) = known.filter(|known| version.is_before(known)) else { return Ok(found) };
        let asked = worker.clone();
        self.registry
            .change(move |tables, now| store::raise_revision(tables, &asked, known, now).map(|()| Vec::new()))
            .await?;
        read().await
    }
}

impl UnregisteredServers {
    /// Records whether a worker's servers were taken.
    fn note(&mut self, worker: WorkerName, announced: AnnouncedServers, is_taken: bool, now: Instant) {
        self.announced.retain(|(waiting, _)| *waiting != worker);
        if !is_taken && self.announced.len() < WAITING_WORKERS_MAX {
            self.announced.push_back((worker, announced));
        }
        let due = if is_taken { now } else { self.due.filter(|due| *due > now).unwrap_or(now + REGISTER_RETRY_PAUSE) };
        self.due = (!self.announced.is_empty()).then_some(due);
    }
}

/// The messages with the found leases.
fn messages(server: &str, found: RequestedLeases) -> Vec<LeaseMessage> {
    let message = |version, content| vec![LeaseMessage { server: server.to_owned(), version, content }];
    match found {
        RequestedLeases::Nothing => Vec::new(),
        RequestedLeases::Deleted(version) => message(version, LeaseContent::Deleted),
        RequestedLeases::Server(LeaseSnapshot { version, leases: None }) => message(version, LeaseContent::Current),
        RequestedLeases::Server(LeaseSnapshot { version, leases: Some(leases) }) => {
            let leases = leases.into_iter().map(|(key, address)| (key, address.into()));
            LeaseMessage::snapshot(server, version, leases)
        }
    }
}

fn to_worker(worker: &WorkerName, message: &LeaseMessage) -> Message {
    let payload = serde_json::to_vec(message).unwrap_or_default();
    Message::transient(Topic::WorkerLeases { worker: worker.clone() }, payload)
}

/// The server as in a call, with the checks of calls.
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
    CallFields(fields).new_server()
}

#[cfg(test)]
mod tests {
    use wgkex_common::PublicKey;

    use super::*;

    #[test]
    fn servers_wait_until_the_database_takes_those_of_a_worker_and_then_have_their_turn() {
        let now = Instant::now();
        let (mut waiting, none) = (UnregisteredServers::default(), AnnouncedServers::default);
        let at = |seconds| now + Duration::from_secs(seconds);
        let name = |name: &str| name.parse::<WorkerName>().unwrap();
        for (worker, seconds, is_taken, names, due) in [
            ("a", 0, true, vec![], None),
            ("a", 0, false, vec!["a"], Some(5)),
            ("b", 1, false, vec!["a", "b"], Some(5)),
            ("a", 5, false, vec!["b", "a"], Some(10)),
            ("c", 7, true, vec!["b", "a"], Some(7)),
            ("b", 7, true, vec!["a"], Some(7)),
            ("a", 8, true, vec![], None),
        ] {
            waiting.note(name(worker), none(), is_taken, at(seconds));
            let found: Vec<_> = waiting.announced.iter().map(|(worker, _)| worker.as_str()).collect();
            assert_eq!((found, waiting.due), (names, due.map(at)), "{worker} {seconds}");
        }
    }

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
            let messages = messages("s1", RequestedLeases::Server(LeaseSnapshot { version, leases: Some(leases) }));
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
        let current = messages("s1", RequestedLeases::Server(LeaseSnapshot { version, leases: None }));
        assert_eq!(current, [LeaseMessage { server: "s1".into(), version, content: LeaseContent::Current }]);
    }
}
