//! What the worker hears and says on the bus (contract section 4): keys in, to `install`; from there states,
//! peer counts and what became of keys, out.

use std::collections::BTreeSet;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::debug;
use wgkex_common::access_lists::service::{self, ListEvent};
use wgkex_common::mqtt::presence::{Announcement, Presence, PresenceEvent, Reporter};
use wgkex_common::mqtt::{ConnectionState, Event, Message, MqttHandle, Publish, SessionConfig};
use wgkex_common::sync::{SyncEvent, SyncSender};
use wgkex_common::wire::message::{Applied, Handshakes, Hello, Revoked, WorkerData};
use wgkex_common::{Config, Domain, PublicKey, Reserved, Topic};

use crate::metrics::Metrics;
use crate::reconciler::{DomainState, Handle, Said, State};

/// Who this worker is to the MQTT server, and which keys it wants to hear.
pub fn client(config: &Config) -> SessionConfig {
    SessionConfig {
        id: config.name.clone(),
        will: Some(Message::retained(Topic::WorkerStatus { worker: config.name.clone() }, "0")),
        qos0_filters: vec![Topic::worker_data()],
        qos1_filters: config.domains.iter().map(|domain| Topic::keys(domain.name())).collect(),
        optional: vec![
            Topic::worker_statuses(),
            Topic::broker_statuses(),
            Topic::ConnectedPeers { domain: "+".into(), worker: config.name.clone() }.to_string(),
            Topic::WorkerHello { worker: config.name.clone() }.to_string(),
        ],
        echo: Some(Topic::WorkerEcho { worker: config.name.clone() }),
        is_secondary: false,
    }
}

/// The connection by which this worker says what became of keys, and asks for those it may lack.
pub fn second(config: &Config) -> SessionConfig {
    SessionConfig {
        qos0_filters: vec![Topic::broker_hellos()],
        qos1_filters: vec![
            Topic::WorkerChunks { worker: config.name.clone() }.to_string(),
            Topic::Revocations.to_string(),
        ],
        echo: Some(Topic::WorkerEcho { worker: config.name.clone() }),
        ..SessionConfig::secondary(format!("{}-applied", config.name))
    }
}

/// Hands keys that come to the installer, what gateways say of themselves to `reserved`, and who is there to the
/// announcer, by `reporter`; everything else is counted and left. On each connection keys wait for what brokers say
/// of `lists`.
pub fn hand_on(
    domains: BTreeSet<Domain>,
    handle: Handle,
    reserved: watch::Sender<Reserved>,
    lists: service::Handle,
    reporter: Reporter,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => {
            lists.close_gate();
            metrics.mqtt_connected.set(1);
        }
        Event::Down => metrics.mqtt_connected.set(0),
        Event::Message(publish) => {
            let topic = Topic::parse(&publish.topic);
            let is_state = topic.as_ref().is_some_and(|topic| reporter.report(topic, &publish));
            let outcome = match topic {
                Some(Topic::WorkerData { worker, domain }) => reserve(&reserved, &worker, &domain, &publish.payload),
                Some(Topic::WorkerStatus { .. } | Topic::BrokerStatus { .. }) => Ok(()),
                _ if is_state => Ok(()),
                topic => key(&domains, topic, &publish).map(|(domain, key)| handle.offer(domain, key)),
            };
            if let Err(reason) = outcome {
                ignore(&metrics, &publish, reason);
            }
        }
    }
}

fn reserve(reserved: &watch::Sender<Reserved>, worker: &str, domain: &str, payload: &[u8]) -> Result<(), &'static str> {
    let data = WorkerData::parse(payload).map_err(|_| "payload")?;
    reserved.send_modify(|reserved| reserved.update(worker, domain, data.as_ref()));
    Ok(())
}

/// Lets `ears` hear what brokers say of themselves, and the live keys that they send; and `lists` the former, and the
/// records that they share.
pub fn hand_on_pages(handle: Handle, ears: SyncSender, lists: service::Handle, metrics: Metrics) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => {
            handle.reconnected();
            lists.on_event(ListEvent::Up);
        }
        Event::Down => lists.on_event(ListEvent::Down),
        // What finds no place is asked for again.
        Event::Message(publish) => {
            if let Err(reason) = hear(&ears, &lists, &publish) {
                ignore(&metrics, &publish, reason);
            }
        }
    }
}

fn ignore(metrics: &Metrics, publish: &Publish, reason: &'static str) {
    debug!(reason, topic = publish.topic, "message ignored");
    metrics.messages_ignored.with_label_values(&[reason]).inc();
}

/// The key that a message brings, or in one word why it brings none.
fn key(
    domains: &BTreeSet<Domain>,
    topic: Option<Topic>,
    publish: &Publish,
) -> Result<(Domain, PublicKey), &'static str> {
    let Some(Topic::Key { domain }) = topic else { return Err("topic") };
    let domain = domains.get(domain.as_str()).ok_or("domain")?;
    let text = std::str::from_utf8(&publish.payload).map_err(|_| "payload")?;
    Ok((domain.clone(), text.parse().map_err(|_| "payload")?))
}

/// Hears what a broker says, or tells in one word why it says nothing.
fn hear(ears: &SyncSender, lists: &service::Handle, publish: &Publish) -> Result<(), &'static str> {
    let topic = Topic::parse(&publish.topic).ok_or("topic")?;
    if topic == Topic::Revocations {
        lists.on_event(ListEvent::Records(serde_json::from_slice(&publish.payload).map_err(|_| "payload")?));
        return Ok(());
    }
    let heard = SyncEvent::read(topic, &publish.payload)?;
    if let SyncEvent::Broker(name, hello) = &heard {
        lists.on_event(ListEvent::Broker(name.clone(), hello.clone()));
    }
    let _ = ears.try_send(heard);
    Ok(())
}

/// Says on the bus what the installer says of the kernel.
pub struct Announcer {
    worker: String,
    external_name: String,
    domains: BTreeSet<Domain>,
    bus: MqttHandle,
    confirmations: MqttHandle,
    link: watch::Receiver<ConnectionState>,
    state: watch::Receiver<State>,
    installer: Said,
    heard: mpsc::Receiver<PresenceEvent>,
    presence: Presence,
    said: State,
    metrics: Metrics,
}

/// What gives an announcer something to say.
enum Cause {
    /// The bus came or went.
    Link,
    /// A domain is not as it was said.
    State,
    /// A batch of keys is done.
    Applied(Applied),
    /// Keys shake hands.
    Seen(Handshakes),
    /// Denied keys are taken out.
    Revoked(Revoked),
    /// A message of the bus is about who is there.
    Heard(PresenceEvent),
    /// It is time to say everything again.
    Due,
    /// The installer has ended.
    End,
}

impl Announcer {
    /// An announcer of this worker on `bus`, and of what became of keys on `confirmations`, with nothing said yet.
    pub fn new(
        config: &Config,
        (bus, confirmations): (MqttHandle, MqttHandle),
        state: watch::Receiver<State>,
        installer: Said,
        heard: mpsc::Receiver<PresenceEvent>,
        metrics: Metrics,
    ) -> Self {
        let (worker, external_name) = (config.name.clone(), config.external_name.clone());
        let (domains, link) = (config.domains.clone(), bus.connection_state());
        let (said, presence) = (State::new(), Presence::default());
        Self {
            worker,
            external_name,
            domains,
            bus,
            confirmations,
            link,
            state,
            installer,
            heard,
            presence,
            said,
            metrics,
        }
    }

    /// Announces until the installer ends.
    pub async fn run(&mut self) {
        loop {
            match self.next().await {
                Cause::Link if self.is_up() => {
                    self.presence.connected(Instant::now());
                    self.greet();
                }
                Cause::Link => self.presence.disconnected(),
                Cause::State => self.say_changes(),
                Cause::Applied(applied) => self.say_applied(&applied),
                Cause::Seen(seen) => self.say_seen(&seen),
                Cause::Revoked(revoked) => self.say_revoked(&revoked),
                Cause::Heard(heard) => self.hear(heard, Instant::now()),
                Cause::Due => self.say_again(Instant::now()),
                Cause::End => return,
            }
        }
    }

    async fn next(&mut self) -> Cause {
        let due = self.presence.due();
        tokio::select! {
            biased;
            changed = self.link.changed() => if changed.is_ok() { Cause::Link } else { Cause::End },
            applied = self.installer.applied.recv() => applied.map_or(Cause::End, Cause::Applied),
            seen = self.installer.seen.recv() => seen.map_or(Cause::End, Cause::Seen),
            revoked = self.installer.revoked.recv() => revoked.map_or(Cause::End, Cause::Revoked),
            changed = self.state.changed() => if changed.is_ok() { Cause::State } else { Cause::End },
            heard = self.heard.recv() => heard.map_or(Cause::End, Cause::Heard),
            () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => Cause::Due,
        }
    }

    fn is_up(&mut self) -> bool {
        *self.link.borrow_and_update() == ConnectionState::Up
    }

    /// On every connection: first what this worker is and has, then that it is online, so that whoever hears the
    /// last knows the rest. A broker that subscribes in between hears the status alone, and takes the worker for an
    /// original: for that one the hello comes again.
    fn greet(&mut self) {
        self.say_hello(Announcement::Retained);
        self.said.clear();
        self.say_changes();
        self.say(Message::retained(self.status(), "1"));
        self.say_hello(Announcement::Retained);
    }

    /// The same for those who may have been told otherwise, or not have been given it.
    fn say_again(&mut self, now: Instant) {
        let Some(announcement) = self.presence.next(now) else { return };
        if *self.link.borrow() != ConnectionState::Up {
            return;
        }
        self.say_hello(announcement);
        for (domain, state) in &self.said {
            if let Some(data) = self.data(state) {
                self.say_data(domain, &data, announcement);
            }
            self.say(announcement.of(self.count(domain, state)));
        }
        self.say(announcement.of(Message::retained(self.status(), "1")));
        self.say_hello(announcement);
    }

    fn hear(&mut self, heard: PresenceEvent, now: Instant) {
        match heard {
            PresenceEvent::Status { party, online, retained } => {
                self.presence.status(party, online, retained, now, fastrand::f64());
            }
            PresenceEvent::Own(topic, payload) => {
                if self.expected(&topic).is_some_and(|expected| expected != payload) {
                    self.presence.contradicted(now);
                }
            }
        }
    }

    /// What stands on a topic of this worker's state, if it has published anything there on this connection.
    fn expected(&self, topic: &Topic) -> Option<Vec<u8>> {
        let said = |domain: &str| self.said.iter().find(|(said, _)| said.name() == domain).map(|(_, state)| state);
        if let Topic::WorkerHello { .. } = topic {
            serde_json::to_vec(&self.hello()).ok()
        } else if let Topic::WorkerData { domain, .. } = topic {
            serde_json::to_vec(&self.data(said(domain)?)?).ok()
        } else if let Topic::ConnectedPeers { domain, .. } = topic {
            Some(connected(said(domain)?).to_string().into_bytes())
        } else {
            Some(b"1".to_vec())
        }
    }

    fn hello(&self) -> Hello {
        Hello::worker(self.domains.iter().map(ToString::to_string).collect())
    }

    fn say_hello(&self, announcement: Announcement) {
        self.say_json(Topic::WorkerHello { worker: self.worker.clone() }, &self.hello(), announcement);
    }

    fn say_data(&self, domain: &Domain, data: &WorkerData, announcement: Announcement) {
        let topic = Topic::WorkerData { worker: self.worker.clone(), domain: domain.name().into() };
        self.say_json(topic, data, announcement);
    }

    /// Says the domains that are not as they were said. Without a bus nothing is said, and all is said again later.
    fn say_changes(&mut self) {
        let now = self.state.borrow_and_update().clone();
        if *self.link.borrow() != ConnectionState::Up {
            return;
        }
        let before = std::mem::replace(&mut self.said, now.clone());
        for (domain, state) in &now {
            let before = before.get(domain);
            if let Some(data) = self.data(state)
                && before.and_then(|before| self.data(before)).as_ref() != Some(&data)
            {
                self.say_data(domain, &data, Announcement::Retained);
            }
            if before.map(connected) != Some(connected(state)) {
                self.say(self.count(domain, state));
            }
        }
    }

    fn data(&self, state: &DomainState) -> Option<WorkerData> {
        match state {
            DomainState::Up { port, public_key, link_address, connected: _ } => Some(WorkerData {
                external_address: self.external_name.clone(),
                port: *port,
                public_key: *public_key,
                link_address: link_address.to_string(),
            }),
            DomainState::Down { .. } => None,
        }
    }

    fn say_applied(&self, applied: &Applied) {
        let topic = Topic::Applied { worker: self.worker.clone() };
        let payload = serde_json::to_vec(applied).unwrap_or_default();
        let up = *self.confirmations.connection_state().borrow() == ConnectionState::Up;
        if !up || !self.confirmations.try_publish(Message::transient(topic, payload)) {
            self.metrics.confirmations_dropped.inc();
        }
    }

    /// What is not heard is said again when the bus is back.
    fn say_seen(&self, seen: &Handshakes) {
        let topic = Topic::Handshakes { worker: self.worker.clone() };
        let _ = self.confirmations.try_publish(Message::transient(topic, serde_json::to_vec(seen).unwrap_or_default()));
    }

    /// Who made the record asks nobody else when he does not hear it.
    fn say_revoked(&self, revoked: &Revoked) {
        let topic = Topic::Revoked { worker: self.worker.clone() };
        if !self.confirmations.try_publish(Message::transient(topic, serde_json::to_vec(revoked).unwrap_or_default())) {
            self.metrics.confirmations_dropped.inc();
        }
    }

    fn count(&self, domain: &Domain, state: &DomainState) -> Message {
        Message::retained_qos0(self.peers(domain), connected(state).to_string())
    }

    /// Says that no domain is served here, then that the worker is gone, and waits until the server has heard it.
    pub async fn farewell(&self) {
        if *self.link.borrow() != ConnectionState::Up {
            return;
        }
        let offline = self.domains.iter().map(|domain| Message::retained(self.peers(domain), "-1"));
        let gone = Message::retained(self.status(), "0");
        let hello = Message::retained(Topic::WorkerHello { worker: self.worker.clone() }, "");
        for message in offline {
            self.say(message);
        }
        self.say(hello);
        // An error means that the session has ended, and then its last will says it.
        let _ = self.bus.publish(gone).await;
    }

    fn say_json<T: serde::Serialize>(&self, topic: Topic, payload: &T, announcement: Announcement) {
        match serde_json::to_vec(payload) {
            Ok(payload) => self.say(announcement.of(Message::retained(topic, payload))),
            Err(_) => self.metrics.mqtt_publish_failures.inc(),
        }
    }

    fn say(&self, message: Message) {
        if !self.bus.try_publish(message) {
            self.metrics.mqtt_publish_failures.inc();
        }
    }

    fn peers(&self, domain: &Domain) -> Topic {
        Topic::ConnectedPeers { domain: domain.name().into(), worker: self.worker.clone() }
    }

    fn status(&self) -> Topic {
        Topic::WorkerStatus { worker: self.worker.clone() }
    }
}

/// The payload of a domain's peer count (contract section 4).
fn connected(state: &DomainState) -> i64 {
    match state {
        DomainState::Up { connected, .. } => i64::try_from(*connected).unwrap_or(i64::MAX),
        DomainState::Down { .. } => -1,
    }
}

/// Hears a message of anybody's making as both connections do, for whoever makes them up: it must come to an end.
#[cfg(any(test, fuzzing))]
pub fn hear_anything(topic: &str, payload: &[u8]) {
    let publish = Publish::new(topic, wgkex_common::mqtt::QoS::AtMostOnce, payload);
    let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
    let Ok(config) = Config::parse("", yaml, "w") else { return };
    let opened = service::ListService::open(&config, wgkex_common::wire::message::Participant::Worker("w".into()));
    let Ok((_keeper, lists)) = opened else { return };
    let (ears, _heard) = wgkex_common::sync::channel();
    let reserved = watch::Sender::new(Reserved::default());
    if let Some(Topic::WorkerData { worker, domain }) = Topic::parse(topic) {
        let _ = reserve(&reserved, &worker, &domain, payload);
    }
    let _ = (key(&config.domains, Topic::parse(topic), &publish), hear(&ears, &lists, &publish));
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use wgkex_common::mqtt::QoS;

    use super::*;

    proptest! {
        #[test]
        fn whatever_is_said_on_whatever_topic_ends_nobody(
            topic in prop_oneof![
                Just("wireguard/ff_a/all".to_owned()),
                Just("wireguard-worker/w/ff_a/data".to_owned()),
                Just("wgkex/worker/w/pages".to_owned()),
                Just("wgkex/broker/b/hello".to_owned()),
                Just("wgkex/revocations".to_owned()),
                "[a-z+#/\\u{0}\\u{fc}]{0,30}",
            ],
            payload in prop_oneof![vec(any::<u8>(), 0..100), "[\\[{\"a-z:0-9,}\\]]{0,60}".prop_map(String::into_bytes)],
        ) {
            hear_anything(&topic, &payload);
        }
    }

    #[test]
    fn only_a_key_on_a_topic_of_a_served_domain_is_taken() {
        let domains: BTreeSet<_> = [Domain::new("ff_a", &["ff_".into()]).unwrap()].into();
        let text = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";
        let heard = |topic: &str, payload: &[u8]| {
            let publish = Publish::new(topic, QoS::AtMostOnce, payload);
            key(&domains, Topic::parse(topic), &publish).map(|(domain, key)| (domain, key.to_string()))
        };
        for topic in ["wireguard/ff_a/all", "wireguard/ff_a/gw04", "wireguard/ff_a/x"] {
            let domain = domains.first().unwrap().clone();
            assert_eq!(heard(topic, text.as_bytes()), Ok((domain, text.to_owned())));
        }
        assert_eq!(heard("wireguard/ff_b/all", text.as_bytes()), Err("domain"));
        assert_eq!(heard("wireguard-worker/a/status", b"1"), Err("topic"));
        for payload in [b"".as_slice(), b"x", b"\xff\xfe", &text.as_bytes()[1..], format!("{text}\n").as_bytes()] {
            assert_eq!(heard("wireguard/ff_a/all", payload), Err("payload"));
        }
    }
}
