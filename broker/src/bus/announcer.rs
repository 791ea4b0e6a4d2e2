//! What this broker publishes of itself, and when it may serve: the status on one connection, the hello on the other, on
//! every connection and again as [`Presence`] says. One task; [`crate::bus::subscriber`] passes on what is heard of that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{info, warn};
use wgkex_common::access_lists::service::ListSnapshot;
use wgkex_common::mqtt::presence::{Announcement, Presence, PresenceEvent};
use wgkex_common::mqtt::{ConnectionState, MqttHandle};
use wgkex_common::wire::message::Hello;
use wgkex_common::{BrokerName, Config, Domain, Topic};

use crate::bus::subscriber::{hello, status};
use crate::exchange::handle::InFlightHandle;
use crate::fleet::gateways::Gateways;

/// Changes of the lists that come within this time make one hello.
const AT_ONCE: Duration = Duration::from_millis(200);
/// How long the own status may take to come back,
const ECHO: Duration = Duration::from_secs(2);
/// and how long if it came back on an earlier connection: then it is rather the server that hands nothing out, and the
/// session connects anew before that.
const ECHO_AGAIN: Duration = Duration::from_secs(60);
/// How often it is looked whether the retained states are complete, until they are,
const SETTLE: Duration = Duration::from_millis(50);
/// and after that, whether gateways have been silent for too long.
const LIVENESS: Duration = Duration::from_secs(1);

/// The task's state.
pub struct Announcer {
    broker: BrokerName,
    domains: Vec<String>,
    instance: u64,
    bus: MqttHandle,
    keys: MqttHandle,
    links: [watch::Receiver<ConnectionState>; 2],
    heard: mpsc::Receiver<PresenceEvent>,
    lists: watch::Receiver<ListSnapshot>,
    gateways: Arc<Mutex<Gateways>>,
    in_flight: InFlightHandle,
    presence: Presence,
    /// When the status was published on this connection; none without one.
    greeted: Option<Instant>,
    hello_due: Option<Instant>,
    /// The last hello, and when it was published.
    said: Option<(Instant, Vec<u8>)>,
}

enum Cause {
    Bus,
    Keys,
    Lists,
    Heard(PresenceEvent),
    Due,
    End,
}

impl Announcer {
    /// Of this broker: `bus` is the connection on which it hears workers, `keys` the other one.
    pub fn new(
        config: &Config,
        [bus, keys]: [MqttHandle; 2],
        heard: mpsc::Receiver<PresenceEvent>,
        lists: watch::Receiver<ListSnapshot>,
        gateways: Arc<Mutex<Gateways>>,
        in_flight: InFlightHandle,
    ) -> Self {
        Self {
            broker: (&config.name).into(),
            domains: config.domains.iter().map(Domain::to_string).collect(),
            instance: fastrand::u64(..),
            links: [bus.connection_state(), keys.connection_state()],
            bus,
            keys,
            heard,
            lists,
            gateways,
            in_flight,
            presence: Presence::default(),
            greeted: None,
            hello_due: None,
            said: None,
        }
    }

    /// Runs until a session ends.
    pub async fn run(mut self) {
        // A connection may be there already.
        self.bus_changed();
        self.keys_changed();
        loop {
            match self.next().await {
                Cause::Bus => self.bus_changed(),
                Cause::Keys => self.keys_changed(),
                Cause::Lists => self.lists_changed(),
                Cause::Heard(heard) => self.hear(heard, Instant::now()),
                Cause::Due => self.look(Instant::now()),
                Cause::End => return,
            }
        }
    }

    async fn next(&mut self) -> Cause {
        let due = self.due();
        let [bus, keys] = &mut self.links;
        tokio::select! {
            changed = bus.changed() => changed.map_or(Cause::End, |()| Cause::Bus),
            changed = keys.changed() => changed.map_or(Cause::End, |()| Cause::Keys),
            changed = self.lists.changed() => changed.map_or(Cause::End, |()| Cause::Lists),
            heard = self.heard.recv() => heard.map_or(Cause::End, Cause::Heard),
            () = sleep_until(due.into()) => Cause::Due,
        }
    }

    fn due(&self) -> Instant {
        let is_settling = self.greeted.is_some() && !self.gateways.lock().is_synced();
        let look = Instant::now() + if is_settling { SETTLE } else { LIVENESS };
        self.presence.due().into_iter().chain(self.hello_due).fold(look, Instant::min)
    }

    /// The status comes first on a connection: it comes back once this broker hears what is on the bus.
    fn bus_changed(&mut self) {
        let now = Instant::now();
        if *self.links[0].borrow_and_update() == ConnectionState::Up {
            self.greeted = Some(now);
            self.presence.connected(now);
            self.publish_status(Announcement::Retained);
        } else {
            self.greeted = None;
            self.presence.disconnected();
        }
    }

    fn keys_changed(&mut self) {
        let up = *self.links[1].borrow_and_update() == ConnectionState::Up;
        self.hello_due = up.then(Instant::now);
    }

    fn lists_changed(&mut self) {
        let digest = self.lists.borrow_and_update().digest.clone();
        let published = self.said.as_ref().map(|(at, payload)| (*at, *payload == self.hello_payload(digest)));
        if let Some((at, false)) = published
            && *self.links[1].borrow() == ConnectionState::Up
        {
            self.hello_due.get_or_insert(at + AT_ONCE);
        }
    }

    fn hear(&mut self, heard: PresenceEvent, now: Instant) {
        match heard {
            PresenceEvent::Status { party, online, retained } => {
                self.presence.status(party, online, retained, now, fastrand::f64());
            }
            PresenceEvent::Own(topic, payload) => {
                let is_hello = matches!(topic, Topic::BrokerHello { .. });
                let expected = if is_hello { self.said.as_ref().map(|(_, said)| &said[..]) } else { Some(&b"1"[..]) };
                if expected.is_some_and(|expected| expected != payload) {
                    self.presence.contradicted(now);
                }
            }
        }
    }

    fn look(&mut self, now: Instant) {
        if self.hello_due.take_if(|due| *due <= now).is_some() {
            self.publish_hello(Announcement::Retained, now);
        }
        if let Some(announcement) = self.presence.next(now) {
            self.publish_hello(announcement, now);
            self.publish_status(announcement);
        }
        let mut gateways = self.gateways.lock();
        let patience = if gateways.has_ever_echoed() { ECHO_AGAIN } else { ECHO };
        let is_late = self.greeted.is_some_and(|greeted| now.saturating_duration_since(greeted) >= patience);
        if is_late && !gateways.has_echo() {
            warn!(
                "own status was not heard back: the MQTT server may not let this broker read wireguard-broker/+/status"
            );
            gateways.force_echo(now);
        }
        if gateways.check_synced(now) {
            info!("ready: all retained states are heard");
        }
        let expired = gateways.expire(now);
        drop(gateways);
        for worker in expired {
            warn!(
                worker = worker.as_str(),
                online = false,
                "gateway published nothing for too long, it is taken for offline"
            );
            self.in_flight.lock().invalidate(&worker, None);
        }
    }

    fn publish_status(&self, announcement: Announcement) {
        // An error means that the connection is being lost, and on the next one it is published again.
        let _ = self.bus.try_publish(announcement.of(status(&self.broker, "1")));
    }

    fn publish_hello(&mut self, announcement: Announcement, now: Instant) {
        let digest = self.lists.borrow().digest.clone();
        let payload = self.hello_payload(digest);
        let _ = self.keys.try_publish(announcement.of(hello(&self.broker, payload.clone())));
        self.said = Some((now, payload));
    }

    fn hello_payload(&self, digest: String) -> Vec<u8> {
        let hello = Hello { records: Some(digest), ..Hello::broker(self.domains.clone(), self.instance) };
        serde_json::to_vec(&hello).unwrap_or_default()
    }
}
