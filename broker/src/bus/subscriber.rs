//! The messages that the broker receives by MQTT, on two sessions: [`Primary`] receives those of workers, for which
//! answers wait; [`Secondary`] receives the keys of other brokers, requests for keys, and the hellos of brokers.
//!
//! The previous stop of an outcome is a worker, the next one [`crate::exchange`]; states go to [`crate::fleet`],
//! requests to [`sync_server`](super::sync_server). This broker's own status and hello go to
//! [`announcer`](super::announcer).

use std::collections::BTreeSet;
use std::time::{Instant, SystemTime};

use tracing::debug;
use wgkex_common::access_lists::service::{self, ListEvent};
use wgkex_common::mqtt::presence::Reporter;
use wgkex_common::mqtt::{Event, Message, Publish, SessionConfig};
use wgkex_common::sync::{SyncEvent, SyncSender};
use wgkex_common::time_text::unix;
use wgkex_common::wire::ignored::{Ignored, json, key};
use wgkex_common::wire::lease::{AnnouncedServers, HUB, LeaseRequest};
use wgkex_common::wire::message::{Applied, Handshakes, Hello, RecordsRequest, Request, Requester, Revoked};
use wgkex_common::wire::name::Participant;
use wgkex_common::{BrokerName, Config, PublicKey, Topic, WorkerName};

use crate::bus::invalid_messages::InvalidMessages;
use crate::bus::metrics::Metrics;
use crate::bus::online_log::{LoggedState, OnlineLog};
use crate::bus::requesters::Requesters;
use crate::exchange::handle::InFlightHandle;
use crate::fleet::Fleet;
use crate::fleet::gateways::Gateways;
use crate::fleet::revocation::PendingRevocations;
use crate::registry::holder::RegistryHolder;
use crate::registry::lease_events::{RegistryEvent, RegistryEventSender};
use crate::tenants::{TenantEvent, TenantEventSender};

/// The most keys in one message of a worker: twice as many as one of ours puts into it.
const KEYS_MAX: usize = 4_096;

/// The session that receives messages of workers. A worker on the same machine has the host name as its client id, so
/// the broker's is another.
pub fn session(config: &Config) -> SessionConfig {
    let own = BrokerName::from(&config.name);
    SessionConfig {
        id: format!("wgkex-broker-{own}"),
        will: Some(status(&own, "0")),
        qos0_filters: Topic::states().into(),
        qos1_filters: vec![Topic::applied(), Topic::handshakes(), Topic::revoked()],
        optional: Vec::new(),
        echo: Some(Topic::BrokerEcho { broker: own }),
        is_secondary: false,
    }
}

/// The session that publishes keys, and receives those of other brokers.
pub fn secondary_session(config: &Config) -> SessionConfig {
    let own = BrokerName::from(&config.name);
    let keys = config.domains.iter().map(|domain| Topic::keys(domain.name()));
    let servers = has_leases(config).then(Topic::worker_servers);
    SessionConfig {
        will: Some(hello(&own, Vec::new())),
        qos0_filters: [Topic::broker_hellos()].into_iter().chain(servers).collect(),
        qos1_filters: keys.chain(request_filters(config, &own)).chain([Topic::Revocations.to_string()]).collect(),
        echo: Some(Topic::BrokerEcho { broker: own }),
        ..SessionConfig::secondary(format!("wgkex-broker-{}-keys", config.name))
    }
}

/// Whether workers request leases from this broker.
fn has_leases(config: &Config) -> bool {
    config.registry.is_some() || config.tenants.as_ref().is_some_and(|tenants| tenants.hub.is_some())
}

/// The filters for requests to this broker, and for the frames of its tenants.
fn request_filters(config: &Config, own: &BrokerName) -> impl Iterator<Item = String> {
    let broker = || own.clone();
    let own_topics = [Topic::BrokerRequests { broker: broker() }, Topic::BrokerChunks { broker: broker() }];
    let of_tenants = config.tenants.as_ref().map(|_| Topic::BrokerTenants { broker: broker() }.to_string());
    let of_leases = has_leases(config).then(Topic::lease_requests);
    let own_topics = own_topics.map(|topic| topic.to_string()).into_iter();
    own_topics.chain([Topic::worker_requests()]).chain(of_leases).chain(of_tenants)
}

/// This broker's capabilities; an empty payload removes them.
pub fn hello(broker: &BrokerName, payload: Vec<u8>) -> Message {
    Message::retained(Topic::BrokerHello { broker: broker.clone() }, payload)
}

/// Whether this broker is online (contract section 4).
pub fn status(broker: &BrokerName, status: &str) -> Message {
    Message::retained(Topic::BrokerStatus { broker: broker.clone() }, status)
}

/// Where the messages of the first session go.
pub struct Primary {
    /// States of workers and brokers, and handshakes of keys.
    pub fleet: Fleet,
    /// Outcomes of keys.
    pub in_flight: InFlightHandle,
    /// Outcomes of denied keys.
    pub revocations: PendingRevocations,
    /// Which programs are on the bus.
    pub reporter: Reporter,
    /// Logs gateways that come online and go offline.
    pub online_log: OnlineLog,
    /// Logs invalid messages.
    pub invalid: InvalidMessages,
    /// Receives which brokers are online; none without tenants.
    pub tenants: Option<TenantEventSender>,
    /// Receives the same for the registry.
    pub registry: RegistryHolder,
    /// The metrics.
    pub metrics: Metrics,
}

impl Primary {
    /// Takes in an event of the session.
    pub fn on_event(&mut self, event: Event) {
        match event {
            Event::Up => self.metrics.connected.set(1),
            Event::Down => {
                self.metrics.connected.set(0);
                self.fleet.gateways().on_disconnect(Instant::now());
                self.in_flight.lock().invalidate_late();
            }
            Event::Message(publish) => {
                let outcome = topic(&publish).and_then(|topic| self.on_message(&topic, &publish));
                self.metrics.count(&publish, outcome);
            }
        }
    }

    fn on_message(&mut self, topic: &Topic, publish: &Publish) -> Result<(), Ignored> {
        self.reporter.report(topic, publish);
        let outcome = self.receive(topic, publish);
        self.invalid.on_message(topic, &publish.payload, outcome.is_ok(), Instant::now());
        outcome
    }

    fn receive(&self, topic: &Topic, publish: &Publish) -> Result<(), Ignored> {
        let now = Instant::now();
        if let Topic::Revoked { worker } = topic {
            let revoked: Revoked = json(&publish.payload)?;
            if self.fleet.gateways().is_online(worker) {
                self.revocations.on_revoked(worker, revoked);
            }
        } else if let Topic::Applied { worker } = topic {
            let applied: Applied = json(&publish.payload)?;
            check_size(applied.installed.len() + applied.failed.len())?;
            let can_confirm = self.fleet.gateways().can_confirm(worker, &applied.domain);
            self.on_confirmation(worker, now);
            if can_confirm {
                self.on_outcomes(worker, applied, now);
            }
        } else if let Topic::Handshakes { worker } = topic {
            let handshakes: Handshakes = json(&publish.payload)?;
            check_size(handshakes.keys.len())?;
            if self.on_confirmation(worker, now) {
                self.on_handshakes(worker, &handshakes);
            }
        } else {
            self.on_state(topic, publish, now)?;
        }
        Ok(())
    }

    /// A report of outcomes or handshakes shows that its worker is alive; true if the worker is one that confirms keys.
    fn on_confirmation(&self, worker: &WorkerName, now: Instant) -> bool {
        let mut gateways = self.fleet.gateways();
        let was_online = gateways.is_online(worker);
        let confirms = gateways.on_confirmation(worker, now);
        if confirms && !was_online {
            self.online_log.on_change(worker, &LoggedState::Online, now);
        }
        confirms
    }

    /// Records the outcomes of keys: where they are, which operators see, and for the requests that wait. The live keys are
    /// locked for both: a key that is not acknowledged yet gets its outcomes from those in flight when it becomes live.
    fn on_outcomes(&self, worker: &WorkerName, applied: Applied, now: Instant) {
        let Applied { domain, installed, failed } = &applied;
        let outcomes = installed.iter().map(|key| (key, true)).chain(failed.keys().map(|key| (key, false)));
        let mut live = self.fleet.live();
        for (key, is_installed) in outcomes {
            live.on_outcome(worker, domain, key, is_installed, now);
        }
        self.in_flight.confirmed(worker, applied);
    }

    /// A reported handshake does not make a key a router's if the reporting gateway claims the key as its own.
    fn on_handshakes(&self, worker: &WorkerName, handshakes: &Handshakes) {
        let gateways = self.fleet.gateways();
        if !gateways.can_report(worker, &handshakes.domain) {
            return;
        }
        let not_routers: BTreeSet<_> = handshakes.keys.iter().filter(|key| !gateways.may_report(worker, key)).collect();
        drop(gateways);
        let (now, mut live) = (Instant::now(), self.fleet.live());
        let is_routers = |key: &&PublicKey| !not_routers.contains(key) || live.is_routers(key);
        let keys: Vec<PublicKey> = handshakes.keys.iter().filter(is_routers).copied().collect();
        for key in &keys {
            live.on_handshake(worker, &handshakes.domain, *key, now);
        }
        drop(live);
        let mut gateways = self.fleet.gateways();
        for key in keys {
            gateways.on_handshake(worker, &handshakes.domain, key);
        }
    }

    /// Applies a state. When a gateway or one of its domains goes offline, or comes online, its outcomes so far are invalid.
    fn on_state(&self, topic: &Topic, publish: &Publish, now: Instant) -> Result<(), Ignored> {
        if let Topic::BrokerStatus { broker } = topic {
            let is_online = &*publish.payload == b"1";
            self.registry.on_status(broker, is_online);
            if let Some(tenants) = &self.tenants {
                let _ = tenants.try_send(TenantEvent::Status(broker.clone(), is_online));
            }
        }
        let state_of = topic.state_of();
        let worker = if let Some(Participant::Worker(worker)) = &state_of { Some(worker) } else { None };
        let mut gateways = self.fleet.gateways();
        let is_online = |gateways: &Gateways| worker.is_some_and(|worker| gateways.is_online(worker));
        let was_online = is_online(&gateways);
        gateways.apply(topic, &publish.payload, publish.retain, now).map_err(|_| Ignored::Payload)?;
        if let Topic::WorkerHello { worker } = topic
            && !publish.retain
            && let Some(sent) = Hello::sent(&publish.payload)
        {
            gateways.on_time(worker, sent, unix(SystemTime::now()));
        }
        let online = is_online(&gateways);
        let invalidated = if let Topic::ConnectedPeers { domain, worker } = topic {
            let is_down = gateways.is_served(domain) && !gateways.has_online(worker, domain);
            is_down.then_some((worker, Some(domain.as_str())))
        } else {
            worker.filter(|_| online != was_online).map(|worker| (worker, None))
        };
        let changed = worker.filter(|_| online != was_online);
        let changed = changed.map(|worker| (worker, LoggedState::of(gateways.offline(worker, now))));
        drop(gateways);
        if let Some((worker, domain)) = invalidated {
            self.in_flight.lock().invalidate(worker, domain);
        }
        if let Some((worker, state)) = changed {
            self.online_log.on_change(worker, &state, now);
        }
        Ok(())
    }
}

/// Where the messages of the second session go.
pub struct Secondary {
    /// Keys that routers sent to other brokers.
    pub fleet: Fleet,
    /// Hellos and snapshot chunks of other brokers.
    pub sync: SyncSender,
    /// Entries of the access lists, and requests for them.
    pub lists: service::Handle,
    /// Requests for keys.
    pub requesters: Requesters,
    /// Servers of workers, and requests for their leases; none without a registry.
    pub leases: Option<RegistryEventSender>,
    /// Tenants of other brokers; none without tenants here.
    pub tenants: Option<TenantEventSender>,
    /// Registries of other brokers.
    pub registry: RegistryHolder,
    /// Receives messages that are published under this broker's name.
    pub reporter: Reporter,
    /// The metrics.
    pub metrics: Metrics,
}

impl Secondary {
    /// Takes in an event of the session.
    pub fn on_event(&mut self, event: Event) {
        match event {
            Event::Up => self.lists.on_event(ListEvent::Up),
            Event::Down => self.lists.on_event(ListEvent::Down),
            Event::Message(publish) => {
                let outcome = topic(&publish).and_then(|topic| {
                    self.reporter.report(&topic, &publish);
                    self.receive(topic, &publish)
                });
                self.metrics.count(&publish, outcome);
            }
        }
    }

    /// An event or request that finds its queue full is dropped: the other program sends it again.
    fn receive(&mut self, topic: Topic, publish: &Publish) -> Result<(), Ignored> {
        let payload = &publish.payload;
        match topic {
            Topic::Key { domain } => self.fleet.live().on_request(&domain, key(payload)?, Instant::now()),
            Topic::BrokerHello { .. } | Topic::BrokerChunks { .. } => match SyncEvent::read(topic, payload) {
                Ok(event) => self.on_sync(event),
                // Brokers send each other requests on the topic for chunks.
                Err(_) => self.on_request_of_broker(json(payload)?)?,
            },
            Topic::WorkerRequests { worker } => self.on_request_of_worker(&worker, json(payload)?)?,
            Topic::BrokerRequests { .. } => match json(payload)? {
                Request::Records(_) => self.lists.on_event(ListEvent::Asked(Requester::Shared)),
                Request::Keys(request) => self.requesters.on_shared_topic(request)?,
            },
            Topic::WorkerServers { worker } => self.on_servers(worker, payload)?,
            Topic::LeaseRequests { worker } => {
                let request: LeaseRequest = json(payload)?;
                if request.server == HUB {
                    self.on_tenants(TenantEvent::LeaseRequest(worker, request));
                } else {
                    self.on_leases(RegistryEvent::Requested(worker, request));
                }
            }
            Topic::BrokerTenants { .. } => self.on_tenants(TenantEvent::Frame(json(payload)?)),
            Topic::Revocations => self.lists.on_event(ListEvent::Records(json(payload)?)),
            Topic::ConnectedPeers { .. }
            | Topic::WorkerStatus { .. }
            | Topic::WorkerData { .. }
            | Topic::BrokerStatus { .. }
            | Topic::WorkerHello { .. }
            | Topic::Applied { .. }
            | Topic::Handshakes { .. }
            | Topic::Revoked { .. }
            | Topic::WorkerChunks { .. }
            | Topic::WorkerLeases { .. }
            | Topic::WorkerEcho { .. }
            | Topic::BrokerEcho { .. } => return Err(Ignored::Topic),
        }
        Ok(())
    }

    fn on_sync(&mut self, event: SyncEvent) {
        if let SyncEvent::Broker(name, hello) = &event {
            self.lists.on_event(ListEvent::Broker(name.clone(), hello.clone().map(Box::new)));
            self.requesters.on_broker(name, hello.as_ref());
            let (tenants, registry) =
                hello.as_ref().map_or((None, None), |hello| (hello.tenants.clone(), hello.registry.clone()));
            self.on_tenants(TenantEvent::Hello(name.clone(), tenants));
            self.registry.on_hello(name, registry, hello.is_none());
        }
        let _ = self.sync.try_send(event);
    }

    fn on_request_of_broker(&mut self, request: Request) -> Result<(), Ignored> {
        match request {
            Request::Records(RecordsRequest { from: from @ Participant::Broker(_), .. }) => {
                self.lists.on_event(ListEvent::Asked(Requester::Named(from)));
                Ok(())
            }
            Request::Records(_) => Err(Ignored::Payload),
            Request::Keys(request) => self.requesters.on_broker_request(request),
        }
    }

    fn on_request_of_worker(&mut self, worker: &WorkerName, request: Request) -> Result<(), Ignored> {
        match request {
            Request::Records(RecordsRequest { from, to, .. }) => {
                if self.requesters.is_for_this_broker(worker, &from, to.as_ref())? {
                    self.lists.on_event(ListEvent::Asked(Requester::Named(from)));
                }
                Ok(())
            }
            Request::Keys(request) => self.requesters.on_worker_request(worker, request),
        }
    }

    /// The payload is empty if the worker withdrew its servers; those that it announced before stay in the registry.
    fn on_servers(&self, worker: WorkerName, payload: &[u8]) -> Result<(), Ignored> {
        if payload.is_empty() {
            self.on_tenants(TenantEvent::Hub(worker, None));
        } else {
            let servers: AnnouncedServers = json(payload)?;
            let servers = servers.bounded().ok_or(Ignored::Payload)?;
            self.on_tenants(TenantEvent::Hub(worker.clone(), servers.hub.clone()));
            self.on_leases(RegistryEvent::Announced(worker, servers));
        }
        Ok(())
    }

    /// An event for which the queue has no room is dropped: the receiver notices a missing frame, and sessions are
    /// registered again.
    fn on_tenants(&self, event: TenantEvent) {
        if let Some(tenants) = &self.tenants {
            let _ = tenants.try_send(event);
        }
    }

    /// An event for which the queue has no room is dropped: workers announce servers and request leases again.
    fn on_leases(&self, event: RegistryEvent) {
        if let Some(leases) = &self.leases {
            let _ = leases.try_send(event);
        }
    }
}

fn topic(publish: &Publish) -> Result<Topic, Ignored> {
    Topic::received(&publish.topic, publish.retain).ok_or(Ignored::Topic)
}

/// A long message of one worker must not delay those of the others.
fn check_size(keys: usize) -> Result<(), Ignored> {
    if keys <= KEYS_MAX { Ok(()) } else { Err(Ignored::Payload) }
}

impl Metrics {
    fn count(&self, publish: &Publish, outcome: Result<(), Ignored>) {
        if let Err(reason) = outcome {
            let reason = reason.as_ref();
            debug!(reason, topic = publish.topic, "message ignored");
            self.messages_ignored.with_label_values(&[reason]).inc();
        }
    }
}

/// Receives any message as both sessions do, for fuzzing: it must terminate.
#[cfg(any(test, fuzzing))]
pub fn receive_anything(topic: &str, payload: &[u8], retained: bool) {
    use wgkex_common::access_lists::service::ListService;
    use wgkex_common::mqtt::QoS;
    use wgkex_common::storage::key_store::{Keys, WriteBuffer};
    use wgkex_common::sync;

    use crate::bus::sync_queue::SyncQueue;
    use crate::fleet::live_keys::LiveKeys;
    use crate::registry::lease_events;

    let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nlive_keys: {max: 10}\nstate_dir: /nonexistent";
    let (Ok(config), Ok(metrics)) =
        (Config::parse("", yaml, "b"), Metrics::register(&crate::metrics::MetricsRegistry::default()))
    else {
        return;
    };
    let own = BrokerName::from(&config.name);
    let Ok((_service, lists)) = ListService::open(&config, Participant::Broker(own.clone())) else { return };
    let live = LiveKeys::new(&config, Keys::new(), WriteBuffer::default(), Instant::now());
    let fleet = Fleet::new(Gateways::new(&config), live);
    let (reporter, _presence_events) = Reporter::new(Participant::Broker(own.clone()));
    let (sync, _sync_events) = sync::channel();
    let mut publish = Publish::new(topic, QoS::AtMostOnce, payload);
    publish.retain = retained;
    let mut primary = Primary {
        fleet: fleet.clone(),
        in_flight: InFlightHandle::new(config.domains, std::sync::Arc::default()),
        revocations: PendingRevocations::default(),
        reporter: reporter.clone(),
        online_log: OnlineLog::default(),
        invalid: InvalidMessages::default(),
        tenants: None,
        registry: RegistryHolder::default(),
        metrics: metrics.clone(),
    };
    primary.on_event(Event::Message(publish.clone()));
    let requesters = Requesters::new(own, SyncQueue::default());
    let (leases, _lease_events) = lease_events::channel();
    let leases = Some(leases);
    let (tenants, _tenant_events) = tokio::sync::mpsc::channel(1);
    let tenants = Some(tenants);
    let registry = primary.registry.clone();
    let mut secondary =
        Secondary { fleet: fleet.clone(), sync, lists, requesters, leases, tenants, registry, reporter, metrics };
    secondary.on_event(Event::Message(publish));
    assert!(fleet.live().len() <= 10);
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Nearly valid payloads find more errors than random bytes do.
    const PAYLOADS: [&str; 15] = [
        r#"{"from":"b","epoch":1,"number":0,"content":{"requests":["register",{"leave":1}]}}"#,
        r#"{"from":"b","epoch":1,"number":0,"content":{"updates":["snapshot",{"left":["t","10.0.0.1"]}]}}"#,
        r#"{"servers":{"s1":{"public_key":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","network":"10.0.0.0/8","reserved":1,"endpoint_address":"x","endpoint_port":1,"allowed_ips":"x"}}}"#,
        r#"{"to":"b","server":"s1","known":{"id":1,"revision":2}}"#,
        r#"{"ExternalAddress":"x","Port":1,"PublicKey":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","LinkAddress":"x"}"#,
        r#"{"domain":"ff_a","installed":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="],"failed":{}}"#,
        r#"{"domain":"ff_a","keys":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="]}"#,
        r#"{"broker":"b","domain":"ff_a","after":null,"keys":{},"more":true}"#,
        r#"{"from":{"worker":"a/b"},"domain":"ff_a","after":null,"younger_than":18446744073709551615}"#,
        r#"{"from":{"worker":"a"},"to":"b","domain":"ff_a","after":null,"younger_than":0}"#,
        r#"{"version":"1","can":["confirm","answer"],"domains":["ff_a"],"instance":1}"#,
        r#"[{"key":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","list":"deny","at":1,"on":true}]"#,
        r#"{"domain":"ff_a","at":{},"keys":{"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=":"removed"}}"#,
        "18446744073709551615",
        "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=",
    ];

    proptest! {
        #[test]
        fn any_message_on_any_topic_is_survived(
            topic in prop_oneof![
                4 => prop::sample::select(topics()),
                1 => "[a-z+#/\u{0}\u{fc}]{0,30}",
            ],
            payload in prop_oneof![
                prop::sample::select(&PAYLOADS[..]).prop_map(|text| text.as_bytes().to_vec()),
                (prop::sample::select(&PAYLOADS[..]), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(text, at, byte)| {
                    let mut bytes = text.as_bytes().to_vec();
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                    bytes
                }),
                vec(any::<u8>(), 0..100),
            ],
            retained in any::<bool>(),
        ) {
            receive_anything(&topic, &payload, retained);
        }
    }

    fn topics() -> Vec<String> {
        [
            "wireguard/ff_a/all",
            "wireguard-metrics/ff_a/w/connected_peers",
            "wireguard-worker/w/status",
            "wireguard-worker/w/ff_a/data",
            "wireguard-broker/b/status",
            "wgkex/worker/w/hello",
            "wgkex/worker/w/applied",
            "wgkex/worker/w/seen",
            "wgkex/worker/a/questions",
            "wgkex/worker/w/servers",
            "wgkex/worker/w/lease-requests",
            "wgkex/worker/w/pages",
            "wgkex/broker/b/hello",
            "wgkex/broker/b/questions",
            "wgkex/broker/b/pages",
            "wgkex/broker/b/tenants",
            "wgkex/worker/w/revoked",
            "wgkex/revocations",
        ]
        .map(str::to_owned)
        .into()
    }
}
