//! What the worker publishes by MQTT: its states, its peer counts and the outcomes of keys.
//!
//! One task, which `run` of the worker owns, runs [`Publisher::run`]. Previous stop of a key: [`crate::reconciler`],
//! which reports its outcome; next stop: a broker.

use std::collections::BTreeSet;
use std::time::{Instant, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use wgkex_common::mqtt::presence::{Announcement, Presence, PresenceEvent};
use wgkex_common::mqtt::{ConnectionState, Message, MqttHandle};
use wgkex_common::time_text::unix;
use wgkex_common::wire::drain::Drain;
use wgkex_common::wire::message::{Applied, Handshakes, Hello, Revoked, WorkerData};
use wgkex_common::{Config, Domain, Topic, WorkerName};

use crate::bus::Metrics;
use crate::reconciler::{DomainState, DomainStates, Reports};

/// Publishes the states and outcomes that the reconciler reports.
pub struct Publisher {
    worker: WorkerName,
    external_name: String,
    domains: BTreeSet<Domain>,
    bus: MqttHandle,
    confirmations: MqttHandle,
    connection: watch::Receiver<ConnectionState>,
    state: watch::Receiver<DomainStates>,
    drain: watch::Receiver<Option<Drain>>,
    name_suspects: [watch::Receiver<bool>; 2],
    reports: Reports,
    presence_events: mpsc::Receiver<PresenceEvent>,
    presence: Presence,
    published: DomainStates,
    metrics: Metrics,
}

/// The events that make a publisher publish something.
enum Trigger {
    /// The MQTT connection is established or lost.
    Connection,
    /// The state of a domain differs from the published one.
    State,
    /// The hello changes: the gateway begins or ends to drain, or another program begins or ends to use its name.
    Hello,
    /// The outcomes of a batch of keys.
    Applied(Applied),
    /// Keys with a new handshake.
    Handshakes(Handshakes),
    /// The outcomes of denied keys.
    Revoked(Revoked),
    /// A status message of another program, or a message on this worker's own topics.
    Presence(PresenceEvent),
    /// All states are due to be published again.
    Due,
    /// The reconciler has ended.
    End,
}

/// The parts from which a publisher is made.
pub struct PublisherParts {
    /// The session on which the worker publishes its states.
    pub bus: MqttHandle,
    /// The session on which it publishes the outcomes of keys.
    pub confirmations: MqttHandle,
    /// The states to be published.
    pub state: watch::Receiver<DomainStates>,
    /// Whether the gateway drains.
    pub drain: watch::Receiver<Option<Drain>>,
    /// The outcomes of keys.
    pub reports: Reports,
    /// The status messages of other programs, and messages on this worker's own topics.
    pub presence_events: mpsc::Receiver<PresenceEvent>,
    /// Its metrics.
    pub metrics: Metrics,
}

impl Publisher {
    /// The publisher of this worker, with nothing published yet.
    pub fn new(config: &Config, parts: PublisherParts) -> Self {
        let PublisherParts { bus, confirmations, state, drain, reports, presence_events, metrics } = parts;
        Self {
            worker: WorkerName::from(&config.name),
            external_name: config.external_name.clone(),
            domains: config.domains.clone(),
            connection: bus.connection_state(),
            name_suspects: [&bus, &confirmations].map(MqttHandle::name_suspect),
            bus,
            confirmations,
            state,
            drain,
            reports,
            presence_events,
            presence: Presence::default(),
            published: DomainStates::new(),
            metrics,
        }
    }

    /// The connection was established or lost.
    fn on_connection(&mut self) {
        if self.is_up() {
            self.presence.connected(Instant::now());
            self.announce_online();
        } else {
            self.presence.disconnected();
        }
    }

    /// Publishes until the reconciler ends.
    pub async fn run(&mut self) {
        loop {
            match self.next().await {
                Trigger::Connection => self.on_connection(),
                Trigger::State => self.publish_changes(),
                Trigger::Hello => self.hello_changed(),
                Trigger::Applied(applied) => self.publish_applied(&applied),
                Trigger::Handshakes(handshakes) => self.publish_handshakes(&handshakes),
                Trigger::Revoked(revoked) => self.publish_revoked(&revoked),
                Trigger::Presence(event) => self.on_presence(event, Instant::now()),
                Trigger::Due => self.publish_again(Instant::now()),
                Trigger::End => return,
            }
        }
    }

    async fn next(&mut self) -> Trigger {
        let due = self.presence.due();
        let [first, second] = &mut self.name_suspects;
        tokio::select! {
            biased;
            changed = self.connection.changed() => if changed.is_ok() { Trigger::Connection } else { Trigger::End },
            applied = self.reports.applied.recv() => applied.map_or(Trigger::End, Trigger::Applied),
            handshakes = self.reports.handshakes.recv() => handshakes.map_or(Trigger::End, Trigger::Handshakes),
            revoked = self.reports.revoked.recv() => revoked.map_or(Trigger::End, Trigger::Revoked),
            changed = self.state.changed() => if changed.is_ok() { Trigger::State } else { Trigger::End },
            changed = self.drain.changed() => if changed.is_ok() { Trigger::Hello } else { Trigger::End },
            changed = first.changed() => if changed.is_ok() { Trigger::Hello } else { Trigger::End },
            changed = second.changed() => if changed.is_ok() { Trigger::Hello } else { Trigger::End },
            event = self.presence_events.recv() => event.map_or(Trigger::End, Trigger::Presence),
            () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => Trigger::Due,
        }
    }

    fn is_up(&mut self) -> bool {
        *self.connection.borrow_and_update() == ConnectionState::Up
    }

    /// On every connection: first the hello and the data of this worker, then the status online, so that a broker that
    /// receives the status has the rest. A broker that subscribes in between receives the status alone, and takes the
    /// worker for an original: for that one the hello is published again.
    fn announce_online(&mut self) {
        self.publish_hello(Announcement::Retained);
        self.published.clear();
        self.publish_changes();
        self.publish(Message::retained(self.status(), "1"));
        self.publish_hello(Announcement::Retained);
    }

    /// Publishes all states again for brokers that may have received other ones, or none.
    fn publish_again(&mut self, now: Instant) {
        let Some(announcement) = self.presence.next(now) else { return };
        if *self.connection.borrow() != ConnectionState::Up {
            return;
        }
        self.publish_hello(announcement);
        for (domain, state) in &self.published {
            if let Some(data) = self.data(state) {
                self.publish_data(domain, &data, announcement);
            }
            self.publish(announcement.apply_to(self.count(domain, state)));
        }
        self.publish(announcement.apply_to(Message::retained(self.status(), "1")));
        self.publish_hello(announcement);
    }

    fn on_presence(&mut self, event: PresenceEvent, now: Instant) {
        match event {
            PresenceEvent::Status { party, online, retained } => {
                self.presence.status(party, online, retained, now, fastrand::f64());
            }
            PresenceEvent::Own(topic, payload) => {
                if !self.is_own(&topic, &payload) {
                    self.presence.on_wrong_retained(now);
                }
            }
        }
    }

    /// Whether this is the payload that this worker published on the topic; also true if it has published none there on
    /// this connection.
    fn is_own(&self, topic: &Topic, payload: &[u8]) -> bool {
        if let Topic::WorkerHello { .. } = topic {
            self.hello().is_in(payload)
        } else {
            self.expected(topic).is_none_or(|expected| expected == payload)
        }
    }

    fn expected(&self, topic: &Topic) -> Option<Vec<u8>> {
        let published =
            |domain: &str| self.published.iter().find(|(name, _)| name.name() == domain).map(|(_, state)| state);
        if let Topic::WorkerData { domain, .. } = topic {
            serde_json::to_vec(&self.data(published(domain)?)?).ok()
        } else if let Topic::ConnectedPeers { domain, .. } = topic {
            Some(connected(published(domain)?).to_string().into_bytes())
        } else {
            Some(b"1".to_vec())
        }
    }

    fn hello(&self) -> Hello {
        let domains = self.domains.iter().map(ToString::to_string).collect();
        let name_in_use = self.name_suspects.iter().any(|suspect| *suspect.borrow());
        Hello { drain: self.drain.borrow().clone(), name_in_use, ..Hello::worker(domains) }
    }

    /// Without a connection nothing is published: the hello published on the next connection includes the change.
    fn hello_changed(&mut self) {
        if *self.connection.borrow() == ConnectionState::Up {
            self.publish_hello(Announcement::Retained);
        }
    }

    fn publish_hello(&self, announcement: Announcement) {
        let payload = self.hello().payload(unix(SystemTime::now()));
        let topic = Topic::WorkerHello { worker: self.worker.clone() };
        self.publish(announcement.apply_to(Message::retained(topic, payload)));
    }

    fn publish_data(&self, domain: &Domain, data: &WorkerData, announcement: Announcement) {
        let topic = Topic::WorkerData { worker: self.worker.clone(), domain: domain.name().into() };
        match serde_json::to_vec(data) {
            Ok(payload) => self.publish(announcement.apply_to(Message::retained(topic, payload))),
            Err(_) => self.metrics.publish_failures.inc(),
        }
    }

    /// Publishes the states of domains that differ from the published ones. Without a connection nothing is published;
    /// the next connection publishes all of them.
    fn publish_changes(&mut self) {
        let now = self.state.borrow_and_update().clone();
        if *self.connection.borrow() != ConnectionState::Up {
            return;
        }
        let before = std::mem::replace(&mut self.published, now.clone());
        for (domain, state) in &now {
            let before = before.get(domain);
            if let Some(data) = self.data(state)
                && before.and_then(|before| self.data(before)).as_ref() != Some(&data)
            {
                self.publish_data(domain, &data, Announcement::Retained);
            }
            if before.map(connected) != Some(connected(state)) {
                self.publish(self.count(domain, state));
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

    fn publish_applied(&self, applied: &Applied) {
        let up = *self.confirmations.connection_state().borrow() == ConnectionState::Up;
        if !up || !self.try_report(Topic::Applied { worker: self.worker.clone() }, applied) {
            self.reports.dropped.inc();
        }
    }

    /// Lost handshakes are published again on the next connection.
    fn publish_handshakes(&self, handshakes: &Handshakes) {
        let _ = self.try_report(Topic::Handshakes { worker: self.worker.clone() }, handshakes);
    }

    /// Best effort: if the message is lost, the admin call reports "no answer".
    fn publish_revoked(&self, revoked: &Revoked) {
        if !self.try_report(Topic::Revoked { worker: self.worker.clone() }, revoked) {
            self.reports.dropped.inc();
        }
    }

    /// Publishes the outcomes of keys on the second session; false if its queue is full.
    fn try_report<T: serde::Serialize>(&self, topic: Topic, report: &T) -> bool {
        let payload = serde_json::to_vec(report).unwrap_or_default();
        self.confirmations.try_publish(Message::transient(topic, payload))
    }

    fn count(&self, domain: &Domain, state: &DomainState) -> Message {
        Message::retained_qos0(self.peers(domain), connected(state).to_string())
    }

    /// Publishes for each domain that it is not served here, clears the hello, publishes the status offline, and waits
    /// until the server acknowledges that.
    pub async fn announce_offline(&self) {
        if *self.connection.borrow() != ConnectionState::Up {
            return;
        }
        let offline = self.domains.iter().map(|domain| Message::retained(self.peers(domain), "-1"));
        let gone = Message::retained(self.status(), "0");
        let hello = Message::retained(Topic::WorkerHello { worker: self.worker.clone() }, "");
        for message in offline {
            self.publish(message);
        }
        self.publish(hello);
        // On an error the session has ended, and the server publishes the last will.
        let _ = self.bus.publish(gone).await;
    }

    fn publish(&self, message: Message) {
        if !self.bus.try_publish(message) {
            self.metrics.publish_failures.inc();
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
