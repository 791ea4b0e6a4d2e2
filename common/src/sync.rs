//! Catching up: a program that may lack live keys requests them from a broker, chunk by chunk. Each request has the key
//! after which to continue, so a broker keeps no state of it, and another broker can continue after the first one has
//! failed.
//!
//! Nothing relies on the MQTT server having delivered everything: each client requests every 10 seconds the changes
//! since its last round; the same request is used after a fault.
//!
//! Tasks: one, [`run`], owns the [`SyncClient`] of a program. Previous stop of a live key: the `bus` room, which passes
//! on the messages of brokers; next stop: the broker's `fleet`, or the worker's `reconciler`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, info};

use crate::mqtt::{ConnectionState, Message, MqttHandle};
use crate::wire::ignored::{Ignored, json};
use crate::wire::message::{Hello, SnapshotChunk, SyncRequest};
use crate::wire::name::Participant;
use crate::wire::topic::Direction;
use crate::{BrokerName, Domain, PublicKey, Topic};

/// Keys of a chunk at most: about 70 kB of JSON.
pub const CHUNK_KEYS_MAX: usize = 1000;
/// The interval of requests for changes.
const REQUEST_INTERVAL: Duration = Duration::from_secs(10);
/// The interval of requests for all keys, in case a change was missed.
const FULL_REQUEST_INTERVAL: Duration = Duration::from_secs(3600);
/// How long a chunk may take before its request is sent again; doubled each time, for slow lines.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a request is sent before another broker is tried.
const REQUEST_TRIES_MAX: u32 = 3;
/// How long a broker that did not answer is skipped.
const COOLDOWN: Duration = Duration::from_secs(30);
/// Changes from shortly before the last round are requested again: they may have been in transit.
const OVERLAP: Duration = Duration::from_secs(10);
/// Clients that reconnect at once, after a restart of their MQTT server, spread over this time.
const JITTER: Duration = Duration::from_secs(1);
/// Brokers that are remembered at most.
const SYNC_BROKERS_MAX: usize = 4096;
/// Queued events for the client at most; dropped chunks are requested again.
const SYNC_EVENTS_MAX: usize = 1024;

/// The selection of brokers to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerSelection {
    /// One broker, the same as long as it answers: all have the same keys.
    Sticky,
    /// Each broker in turn: that makes all have the same keys.
    RoundRobin,
}

/// Decides what to request from which broker. No IO, no clock.
#[derive(Debug)]
pub struct SyncClient {
    /// The program that sends the requests and receives the chunks.
    own: Participant,
    selection: PeerSelection,
    domains: Vec<Domain>,
    /// Every broker that answers requests.
    brokers: BTreeMap<BrokerName, KnownBroker>,
    state: SyncState,
}

#[derive(Debug, Default)]
struct KnownBroker {
    /// The run of its program.
    instance: Option<u64>,
    /// How many of the domains it does not serve.
    missing_domains: usize,
    /// It subscribes to topics on which only the requesting program may publish.
    names_requests: bool,
    /// When the last round with it began.
    tried: Option<Instant>,
    /// When the last complete round with it began, and the last such for all keys.
    last_complete_round: Option<Instant>,
    last_round_for_all: Option<Instant>,
    /// When it failed to answer.
    failed_at: Option<Instant>,
}

#[derive(Debug)]
enum SyncState {
    /// MQTT is disconnected: nothing is requested.
    Offline,
    /// The next round begins at this time.
    Idle {
        until: Instant,
    },
    InRound(Round),
}

/// One pass over all chunks of all domains.
#[derive(Debug, Clone)]
struct Round {
    broker: BrokerName,
    begun: Instant,
    /// Only keys that were updated since; none for all.
    since: Option<Instant>,
    /// Index of the current domain.
    domain: usize,
    after: Option<PublicKey>,
    /// When the request was sent, and how often.
    sent_at: Option<Instant>,
    tries: u32,
}

impl SyncClient {
    /// A client for `domains` in the name of `own`.
    #[must_use]
    pub fn new(own: Participant, selection: PeerSelection, domains: impl IntoIterator<Item = Domain>) -> Self {
        let domains = domains.into_iter().collect();
        Self { own, selection, domains, brokers: BTreeMap::new(), state: SyncState::Offline }
    }

    /// Handles the hello of a broker; none if it is cleared. True if the broker is new, or was restarted.
    pub fn broker(&mut self, name: &BrokerName, hello: Option<&Hello>, now: Instant) -> bool {
        let Some(hello) = hello.filter(|hello| hello.answers()) else {
            self.brokers.remove(name);
            return false;
        };
        let is_own = matches!(&self.own, Participant::Broker(own) if own == name);
        if is_own
            || (self.brokers.len() >= SYNC_BROKERS_MAX
                && !self.brokers.contains_key(name)
                && !self.evict_unresponsive())
        {
            return false;
        }
        let missing_domains = self.domains.iter().filter(|domain| !hello.serves(domain.name())).count();
        let known = self.brokers.contains_key(name);
        let broker = self.brokers.entry(name.clone()).or_default();
        let is_new = !known || broker.instance != hello.instance;
        (broker.instance, broker.missing_domains, broker.failed_at) = (hello.instance, missing_domains, None);
        broker.names_requests = hello.names_requests();
        if broker.last_complete_round.is_none()
            && let SyncState::Idle { until } = &mut self.state
        {
            *until = (*until).min(now + JITTER);
        }
        is_new
    }

    /// Forgets a broker that never completed a round, to make room for another one.
    fn evict_unresponsive(&mut self) -> bool {
        let unresponsive =
            self.brokers.iter().find(|(_, broker)| broker.last_complete_round.is_none()).map(|(name, _)| name.clone());
        unresponsive.is_some_and(|name| self.brokers.remove(&name).is_some())
    }

    /// MQTT is connected: missed changes are requested after `pause`.
    pub fn online(&mut self, now: Instant, pause: Duration) {
        self.state = SyncState::Idle { until: now + pause };
    }

    /// MQTT is disconnected; an outstanding request is dropped.
    pub fn offline(&mut self) {
        self.state = SyncState::Offline;
    }

    /// Received keys were removed here: the next round with each broker, at once, is for all keys.
    pub fn keys_removed(&mut self, now: Instant) {
        for broker in self.brokers.values_mut() {
            broker.last_round_for_all = None;
        }
        if !matches!(self.state, SyncState::Offline) {
            self.state = SyncState::Idle { until: now };
        }
    }

    /// When the next action is due, if nothing is received until then.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        match &self.state {
            SyncState::Offline => None,
            SyncState::Idle { until } => Some(*until),
            SyncState::InRound(round) => Some(round.sent_at.map_or(round.begun, |sent_at| sent_at + round.patience())),
        }
    }

    /// The topic for requests of this client to `broker`: the client's own, unless the broker is of a version that does
    /// not subscribe to that.
    fn topic(&self, broker: &BrokerName) -> Topic {
        if self.brokers.get(broker).is_some_and(|broker| broker.names_requests) {
            self.own.requests(broker)
        } else {
            Topic::BrokerRequests { broker: broker.clone() }
        }
    }

    /// The request to send now, and to which broker.
    pub fn ask(&mut self, now: Instant) -> Option<(BrokerName, SyncRequest)> {
        if self.due().is_none_or(|due| due > now) {
            return None;
        }
        self.state = match std::mem::replace(&mut self.state, SyncState::Offline) {
            SyncState::InRound(round) if round.tries < REQUEST_TRIES_MAX => SyncState::InRound(round),
            SyncState::InRound(round) => {
                debug!(broker = round.broker.as_str(), "broker does not answer sync requests");
                if let Some(broker) = self.brokers.get_mut(&round.broker) {
                    broker.failed_at = Some(now);
                }
                self.begin(now, Some(round))
            }
            SyncState::Idle { .. } | SyncState::Offline => self.begin(now, None),
        };
        let SyncState::InRound(round) = &mut self.state else { return None };
        round.sent_at = Some(now);
        round.tries += 1;
        let younger = |since: Instant| (now.saturating_duration_since(since) + OVERLAP).as_secs() + 1;
        let request = SyncRequest {
            from: self.own.clone(),
            to: Some(round.broker.clone()),
            domain: self.domains.get(round.domain)?.name().to_owned(),
            after: round.after,
            younger_than: round.since.map(younger),
        };
        Some((round.broker.clone(), request))
    }

    /// Begins a round with the next broker. For all keys, it continues where the round `left` was interrupted.
    fn begin(&mut self, now: Instant, left: Option<Round>) -> SyncState {
        let Some(name) = self.next_broker(now) else { return SyncState::Idle { until: now + REQUEST_INTERVAL } };
        let broker = self.brokers.entry(name.clone()).or_default();
        broker.tried = Some(now);
        let lately = |at: Instant| now.saturating_duration_since(at) < FULL_REQUEST_INTERVAL;
        let since = broker.last_complete_round.filter(|_| broker.last_round_for_all.is_some_and(lately));
        let fresh = Round { broker: name, begun: now, since, domain: 0, after: None, sent_at: None, tries: 0 };
        SyncState::InRound(match left {
            Some(left) if left.since.is_none() && since.is_none() => {
                Round { broker: fresh.broker, sent_at: None, tries: 0, ..left }
            }
            _ => fresh,
        })
    }

    /// The broker for the next round, without those that recently did not answer.
    fn next_broker(&self, now: Instant) -> Option<BrokerName> {
        let long_ago = |silent: Instant| now.saturating_duration_since(silent) >= COOLDOWN;
        let candidates = self.brokers.iter().filter(|(_, broker)| broker.failed_at.is_none_or(long_ago));
        match self.selection {
            // It stays with the broker that was asked last, which has the fewest changes.
            PeerSelection::Sticky => candidates.min_by_key(|(name, broker)| {
                (
                    broker.missing_domains,
                    Reverse(broker.last_complete_round),
                    rendezvous_hash(name.as_str(), self.own.name()),
                )
            }),
            PeerSelection::RoundRobin => candidates.min_by_key(|(_, broker)| broker.tried),
        }
        .map(|(name, _)| name.clone())
    }

    /// Whether `chunk` answers the outstanding request. If so, the next request is due once its keys are processed.
    pub fn apply(&mut self, chunk: &SnapshotChunk) -> bool {
        let SyncState::InRound(round) = &mut self.state else { return false };
        let is_asked = self.domains.get(round.domain).is_some_and(|domain| domain.name() == chunk.domain);
        let fits = is_asked && round.sent_at.is_some() && chunk.broker == round.broker && chunk.after == round.after;
        if !fits || chunk.keys.len() > CHUNK_KEYS_MAX {
            return false;
        }
        // A chunk that leads back would make the round endless.
        let last = chunk.keys.keys().next_back().copied();
        let after = last.filter(|last| chunk.more && round.after.is_none_or(|after| after < *last));
        (round.after, round.sent_at, round.tries) = (after, None, 0);
        if after.is_none() {
            round.domain += 1;
        }
        if round.domain == self.domains.len() {
            if let Some(broker) = self.brokers.get_mut(&round.broker) {
                broker.last_complete_round = Some(round.begun);
                if round.since.is_none() {
                    broker.last_round_for_all = Some(round.begun);
                }
            }
            self.state = SyncState::Idle { until: round.begun + REQUEST_INTERVAL };
        }
        true
    }

    /// The domain with this name, if it is one of the client's.
    fn domain(&self, name: &str) -> Option<&Domain> {
        self.domains.iter().find(|domain| domain.name() == name)
    }
}

impl Round {
    fn patience(&self) -> Duration {
        CHUNK_TIMEOUT * 2_u32.pow(self.tries.saturating_sub(1).min(REQUEST_TRIES_MAX))
    }
}

/// Distributes many clients over equally suitable brokers (FNV-1a).
fn rendezvous_hash(broker: &str, client: &str) -> u64 {
    let bytes = broker.bytes().chain([0]).chain(client.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// An event for a client.
#[derive(Debug)]
pub enum SyncEvent {
    /// The hello of a broker; none if it is cleared.
    Broker(BrokerName, Option<Hello>),
    /// An answer to a request.
    Chunk(SnapshotChunk),
    /// This program has removed live keys, and needs them again.
    KeysRemoved,
}

impl SyncEvent {
    /// The event of a message; else the label of the reason why it has none: `topic` or `payload`.
    pub fn read(topic: Topic, payload: &[u8]) -> Result<Self, Ignored> {
        if let Topic::BrokerHello { broker } = topic {
            Hello::parse(payload).map(|hello| Self::Broker(broker, hello)).map_err(|_| Ignored::Payload)
        } else if topic.direction() == Direction::FromBrokers {
            json(payload).map(Self::Chunk)
        } else {
            Err(Ignored::Topic)
        }
    }
}

/// Sends events to a client; events for a full queue are dropped.
pub type SyncSender = mpsc::Sender<SyncEvent>;

/// The receiver of the same channel.
pub type SyncReceiver = mpsc::Receiver<SyncEvent>;

/// The queue of events to a client.
#[must_use]
pub fn channel() -> (SyncSender, SyncReceiver) {
    mpsc::channel(SYNC_EVENTS_MAX)
}

/// Sends the requests of `client` on `bus`, and calls `take` for the keys of each chunk before it requests the next
/// one; calls `new` for a new broker, which may have no keys yet. Ends with the bus.
pub async fn run<F: Future<Output = ()>>(
    mut client: SyncClient,
    bus: MqttHandle,
    mut events: SyncReceiver,
    mut take: impl FnMut(Domain, SnapshotChunk) -> F,
    mut new: impl FnMut(),
) {
    let mut link = bus.connection_state();
    loop {
        let now = Instant::now();
        if let Some((broker, request)) = client.ask(now) {
            if request.younger_than.is_none() && request.after.is_none() {
                info!(broker = broker.as_str(), domain = request.domain, "requesting all live keys");
            }
            let payload = serde_json::to_vec(&request).unwrap_or_default();
            // A lost request is sent again.
            let _ = bus.try_publish(Message::transient(client.topic(&broker), payload));
        }
        let due = client.due().unwrap_or_else(|| now + REQUEST_INTERVAL);
        tokio::select! {
            changed = link.changed() => {
                if changed.is_err() {
                    return;
                }
                let up = *link.borrow_and_update() == ConnectionState::Up;
                if up { client.online(Instant::now(), JITTER.mul_f64(fastrand::f64())) } else { client.offline() }
            }
            event = events.recv() => match event {
                Some(SyncEvent::Broker(name, hello)) => {
                    if client.broker(&name, hello.as_ref(), Instant::now()) {
                        new();
                    }
                }
                Some(SyncEvent::Chunk(chunk)) => {
                    if client.apply(&chunk) && let Some(domain) = client.domain(&chunk.domain).cloned() {
                        take(domain, chunk).await;
                    }
                }
                Some(SyncEvent::KeysRemoved) => client.keys_removed(Instant::now()),
                None => return,
            },
            () = sleep_until(due.into()) => {}
        }
    }
}

#[cfg(test)]
mod tests;
