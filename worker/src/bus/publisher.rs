//! What the worker publishes by MQTT: its states, peer counts and what became of keys.
//!
//! Previous stop of a key: [`crate::reconciler`], which reports what became of it; next stop: a broker.

use std::collections::BTreeSet;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use wgkex_common::mqtt::presence::{Announcement, Presence, PresenceEvent};
use wgkex_common::mqtt::{ConnectionState, Message, MqttHandle};
use wgkex_common::wire::message::{Applied, Handshakes, Hello, Revoked, WorkerData};
use wgkex_common::{Config, Domain, Topic, WorkerName};

use crate::bus::Metrics;
use crate::reconciler::{DomainState, Reports, State};

/// Publishes what the reconciler reports of the kernel.
pub struct Publisher {
    worker: WorkerName,
    external_name: String,
    domains: BTreeSet<Domain>,
    bus: MqttHandle,
    confirmations: MqttHandle,
    link: watch::Receiver<ConnectionState>,
    state: watch::Receiver<State>,
    reports: Reports,
    presence_events: mpsc::Receiver<PresenceEvent>,
    presence: Presence,
    published: State,
    metrics: Metrics,
}

/// What gives a publisher something to publish.
enum Event {
    /// MQTT is connected, or no longer.
    Link,
    /// A domain is not as it was published.
    State,
    /// A batch of keys is done.
    Applied(Applied),
    /// Keys shake hands.
    Handshakes(Handshakes),
    /// Denied keys are taken out.
    Revoked(Revoked),
    /// A message is about which programs are there.
    Presence(PresenceEvent),
    /// It is time to publish everything again.
    Due,
    /// The reconciler has ended.
    End,
}

impl Publisher {
    /// A publisher of this worker on `bus`, and of what became of keys on `confirmations`, with nothing published yet.
    pub fn new(
        config: &Config,
        (bus, confirmations): (MqttHandle, MqttHandle),
        state: watch::Receiver<State>,
        reports: Reports,
        presence_events: mpsc::Receiver<PresenceEvent>,
        metrics: Metrics,
    ) -> Self {
        let (worker, external_name) = (WorkerName::from(&config.name), config.external_name.clone());
        let (domains, link) = (config.domains.clone(), bus.connection_state());
        let (published, presence) = (State::new(), Presence::default());
        Self {
            worker,
            external_name,
            domains,
            bus,
            confirmations,
            link,
            state,
            reports,
            presence_events,
            presence,
            published,
            metrics,
        }
    }

    /// Publishes until the reconciler ends.
    pub async fn run(&mut self) {
        loop {
            match self.next().await {
                Event::Link if self.is_up() => {
                    self.presence.connected(Instant::now());
                    self.announce_online();
                }
                Event::Link => self.presence.disconnected(),
                Event::State => self.publish_changes(),
                Event::Applied(applied) => self.publish_applied(&applied),
                Event::Handshakes(seen) => self.publish_handshakes(&seen),
                Event::Revoked(revoked) => self.publish_revoked(&revoked),
                Event::Presence(heard) => self.on_presence(heard, Instant::now()),
                Event::Due => self.publish_again(Instant::now()),
                Event::End => return,
            }
        }
    }

    async fn next(&mut self) -> Event {
        let due = self.presence.due();
        tokio::select! {
            biased;
            changed = self.link.changed() => if changed.is_ok() { Event::Link } else { Event::End },
            applied = self.reports.applied.recv() => applied.map_or(Event::End, Event::Applied),
            seen = self.reports.seen.recv() => seen.map_or(Event::End, Event::Handshakes),
            revoked = self.reports.revoked.recv() => revoked.map_or(Event::End, Event::Revoked),
            changed = self.state.changed() => if changed.is_ok() { Event::State } else { Event::End },
            heard = self.presence_events.recv() => heard.map_or(Event::End, Event::Presence),
            () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => Event::Due,
        }
    }

    fn is_up(&mut self) -> bool {
        *self.link.borrow_and_update() == ConnectionState::Up
    }

    /// On every connection: first what this worker is and has, then that it is online, so that a broker that receives the
    /// last has the rest. A broker that subscribes in between receives the status alone, and takes the worker for an
    /// original: for that one the hello comes again.
    fn announce_online(&mut self) {
        self.publish_hello(Announcement::Retained);
        self.published.clear();
        self.publish_changes();
        self.publish(Message::retained(self.status(), "1"));
        self.publish_hello(Announcement::Retained);
    }

    /// The same for brokers that may have received something else, or nothing.
    fn publish_again(&mut self, now: Instant) {
        let Some(announcement) = self.presence.next(now) else { return };
        if *self.link.borrow() != ConnectionState::Up {
            return;
        }
        self.publish_hello(announcement);
        for (domain, state) in &self.published {
            if let Some(data) = self.data(state) {
                self.publish_data(domain, &data, announcement);
            }
            self.publish(announcement.of(self.count(domain, state)));
        }
        self.publish(announcement.of(Message::retained(self.status(), "1")));
        self.publish_hello(announcement);
    }

    fn on_presence(&mut self, heard: PresenceEvent, now: Instant) {
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

    /// What is retained on a topic of this worker's state, if it has published anything there on this connection.
    fn expected(&self, topic: &Topic) -> Option<Vec<u8>> {
        let published =
            |domain: &str| self.published.iter().find(|(name, _)| name.name() == domain).map(|(_, state)| state);
        if let Topic::WorkerHello { .. } = topic {
            serde_json::to_vec(&self.hello()).ok()
        } else if let Topic::WorkerData { domain, .. } = topic {
            serde_json::to_vec(&self.data(published(domain)?)?).ok()
        } else if let Topic::ConnectedPeers { domain, .. } = topic {
            Some(connected(published(domain)?).to_string().into_bytes())
        } else {
            Some(b"1".to_vec())
        }
    }

    fn hello(&self) -> Hello {
        Hello::worker(self.domains.iter().map(ToString::to_string).collect())
    }

    fn publish_hello(&self, announcement: Announcement) {
        self.publish_json(Topic::WorkerHello { worker: self.worker.clone() }, &self.hello(), announcement);
    }

    fn publish_data(&self, domain: &Domain, data: &WorkerData, announcement: Announcement) {
        let topic = Topic::WorkerData { worker: self.worker.clone(), domain: domain.name().into() };
        self.publish_json(topic, data, announcement);
    }

    /// Publishes the domains that are not as they were published. Without a connection nothing is, and all is later.
    fn publish_changes(&mut self) {
        let now = self.state.borrow_and_update().clone();
        if *self.link.borrow() != ConnectionState::Up {
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

    /// What is lost is published again when MQTT is back.
    fn publish_handshakes(&self, seen: &Handshakes) {
        let _ = self.try_report(Topic::Handshakes { worker: self.worker.clone() }, seen);
    }

    /// Best effort: the caller reports "no answer" if this is lost.
    fn publish_revoked(&self, revoked: &Revoked) {
        if !self.try_report(Topic::Revoked { worker: self.worker.clone() }, revoked) {
            self.reports.dropped.inc();
        }
    }

    /// Publishes what became of keys, by the session for that; false if there is no place.
    fn try_report<T: serde::Serialize>(&self, topic: Topic, report: &T) -> bool {
        let payload = serde_json::to_vec(report).unwrap_or_default();
        self.confirmations.try_publish(Message::transient(topic, payload))
    }

    fn count(&self, domain: &Domain, state: &DomainState) -> Message {
        Message::retained_qos0(self.peers(domain), connected(state).to_string())
    }

    /// Publishes that no domain is served here, then that the worker is gone, and waits until the server acknowledges it.
    pub async fn announce_offline(&self) {
        if *self.link.borrow() != ConnectionState::Up {
            return;
        }
        let offline = self.domains.iter().map(|domain| Message::retained(self.peers(domain), "-1"));
        let gone = Message::retained(self.status(), "0");
        let hello = Message::retained(Topic::WorkerHello { worker: self.worker.clone() }, "");
        for message in offline {
            self.publish(message);
        }
        self.publish(hello);
        // An error means that the session has ended, and then its last will is published.
        let _ = self.bus.publish(gone).await;
    }

    fn publish_json<T: serde::Serialize>(&self, topic: Topic, payload: &T, announcement: Announcement) {
        match serde_json::to_vec(payload) {
            Ok(payload) => self.publish(announcement.of(Message::retained(topic, payload))),
            Err(_) => self.metrics.publish_failures.inc(),
        }
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
