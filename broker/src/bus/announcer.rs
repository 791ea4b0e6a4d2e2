//! The task that publishes this broker's presence: the status on one session, the hello on the other, on every
//! connection and again when [`Presence`] is due. It also decides when the retained states are complete, so that the
//! broker may serve, and marks gateways that publish nothing as offline.
//!
//! The previous stop of its events is [`subscriber`](super::subscriber), the next one of its messages the MQTT server.

use std::future::pending;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tracing::{info, warn};
use wgkex_common::access_lists::service::ListSnapshot;
use wgkex_common::mqtt::presence::{Announcement, Presence, PresenceEvent};
use wgkex_common::mqtt::{ConnectionState, MqttHandle};
use wgkex_common::time_text::unix;
use wgkex_common::wire::message::{Hello, ServiceAnnouncement};
use wgkex_common::{BrokerName, Config, Domain, Topic};

use crate::bus::online_log::OnlineLog;
use crate::bus::problem_log::ProblemLog;
use crate::bus::subscriber::{hello, status};
use crate::exchange::handle::InFlightHandle;
use crate::fleet::Fleet;
use crate::registry::holder::RegistryHolder;

/// The shortest time between two hellos: changes of the lists within it share one hello.
const HELLO_INTERVAL: Duration = Duration::from_millis(200);
/// How long the MQTT server may take to deliver this broker's own status.
const STATUS_ECHO_TIMEOUT: Duration = Duration::from_secs(2);
/// The same if it was delivered on an earlier connection: then the server may deliver nothing at all, and the session
/// reconnects before that.
const REPEATED_ECHO_TIMEOUT: Duration = Duration::from_secs(60);
/// How often to check whether the retained states are complete, until they are.
const SYNC_CHECK: Duration = Duration::from_millis(50);
/// How often to check after that whether gateways still publish.
const LIVENESS_CHECK: Duration = Duration::from_secs(1);

/// The task's state.
pub struct Announcer {
    broker: BrokerName,
    domains: Vec<String>,
    tenants: Option<watch::Receiver<ServiceAnnouncement>>,
    registry: RegistryHolder,
    instance: u64,
    bus: MqttHandle,
    keys: MqttHandle,
    connections: [watch::Receiver<ConnectionState>; 2],
    presence_events: mpsc::Receiver<PresenceEvent>,
    lists: watch::Receiver<ListSnapshot>,
    fleet: Fleet,
    in_flight: InFlightHandle,
    online_log: OnlineLog,
    problem_log: ProblemLog,
    presence: Presence,
    /// When the status was published on this connection; none without one.
    status_published: Option<Instant>,
    hello_due: Option<Instant>,
    last_hello: Option<PublishedHello>,
}

struct PublishedHello {
    at: Instant,
    hello: Hello,
}

/// The events that the announcer handles.
enum AnnouncerEvent {
    /// The first session is connected, or no longer.
    Bus,
    /// The second one.
    Keys,
    /// The access lists changed.
    Lists,
    /// The announced service of this broker's tenants changed.
    Tenants,
    /// A message concerns the presence of programs on the bus.
    Presence(PresenceEvent),
    /// A message or a check is due.
    Due,
    /// A session has ended.
    End,
}

impl Announcer {
    /// The announcer of this broker: `bus` is the session that receives messages of workers, `keys` the other one.
    pub fn new(
        config: &Config,
        [bus, keys]: [MqttHandle; 2],
        presence_events: mpsc::Receiver<PresenceEvent>,
        lists: watch::Receiver<ListSnapshot>,
        fleet: Fleet,
        in_flight: InFlightHandle,
        online_log: OnlineLog,
    ) -> Self {
        Self {
            broker: (&config.name).into(),
            domains: config.domains.iter().map(Domain::to_string).collect(),
            tenants: None,
            registry: RegistryHolder::default(),
            instance: fastrand::u64(..),
            connections: [bus.connection_state(), keys.connection_state()],
            bus,
            keys,
            presence_events,
            lists,
            fleet,
            in_flight,
            online_log,
            problem_log: ProblemLog::new(Instant::now()),
            presence: Presence::default(),
            status_published: None,
            hello_due: None,
            last_hello: None,
        }
    }

    /// The hello also announces that this broker serves tenants, and that it has a registry, its own or a shared one.
    pub fn with_services(
        self,
        tenants: Option<watch::Receiver<ServiceAnnouncement>>,
        registry: RegistryHolder,
    ) -> Self {
        Self { tenants, registry, ..self }
    }

    /// Runs until a session ends.
    pub async fn run(mut self) {
        // The sessions may be connected already.
        self.bus_changed();
        self.keys_changed();
        loop {
            match self.next().await {
                AnnouncerEvent::Bus => self.bus_changed(),
                AnnouncerEvent::Keys | AnnouncerEvent::Tenants => self.keys_changed(),
                AnnouncerEvent::Lists => self.lists_changed(),
                AnnouncerEvent::Presence(event) => self.on_presence(event, Instant::now()),
                AnnouncerEvent::Due => self.on_due(Instant::now()),
                AnnouncerEvent::End => return,
            }
        }
    }

    async fn next(&mut self) -> AnnouncerEvent {
        let due = self.due();
        let [bus, keys] = &mut self.connections;
        tokio::select! {
            changed = bus.changed() => changed.map_or(AnnouncerEvent::End, |()| AnnouncerEvent::Bus),
            changed = keys.changed() => changed.map_or(AnnouncerEvent::End, |()| AnnouncerEvent::Keys),
            changed = self.lists.changed() => changed.map_or(AnnouncerEvent::End, |()| AnnouncerEvent::Lists),
            () = changed(self.tenants.as_mut()) => AnnouncerEvent::Tenants,
            event = self.presence_events.recv() => event.map_or(AnnouncerEvent::End, AnnouncerEvent::Presence),
            () = sleep_until(due.into()) => AnnouncerEvent::Due,
        }
    }

    fn due(&self) -> Instant {
        let is_syncing = self.status_published.is_some() && !self.fleet.gateways().is_synced();
        let check = Instant::now() + if is_syncing { SYNC_CHECK } else { LIVENESS_CHECK };
        self.presence.due().into_iter().chain(self.hello_due).fold(check, Instant::min)
    }

    /// Publishes the status as the first message of a connection: its delivery shows that this broker receives the
    /// retained messages.
    fn bus_changed(&mut self) {
        let now = Instant::now();
        if *self.connections[0].borrow_and_update() == ConnectionState::Up {
            self.status_published = Some(now);
            self.presence.connected(now);
            self.publish_status(Announcement::Retained);
        } else {
            self.status_published = None;
            self.presence.disconnected();
        }
    }

    fn keys_changed(&mut self) {
        let up = *self.connections[1].borrow_and_update() == ConnectionState::Up;
        self.hello_due = up.then(Instant::now);
    }

    fn lists_changed(&mut self) {
        let digest = self.lists.borrow_and_update().digest.clone();
        let last = self.last_hello.as_ref().filter(|last| last.hello != self.hello(digest));
        if let Some(PublishedHello { at, .. }) = last
            && *self.connections[1].borrow() == ConnectionState::Up
        {
            self.hello_due.get_or_insert(*at + HELLO_INTERVAL);
        }
    }

    fn on_presence(&mut self, event: PresenceEvent, now: Instant) {
        match event {
            PresenceEvent::Status { party, online, retained } => {
                self.presence.status(party, online, retained, now, fastrand::f64());
            }
            PresenceEvent::Own(topic, payload) => {
                let is_own = if let Topic::BrokerHello { .. } = topic {
                    self.last_hello.as_ref().is_none_or(|last| last.hello.is_in(&payload))
                } else {
                    payload == b"1"
                };
                if !is_own {
                    self.presence.on_wrong_retained(now);
                }
            }
        }
    }

    fn on_due(&mut self, now: Instant) {
        self.lists_changed();
        if self.hello_due.take_if(|due| *due <= now).is_some() {
            self.publish_hello(Announcement::Retained, now);
        }
        if let Some(announcement) = self.presence.next(now) {
            self.publish_hello(announcement, now);
            self.publish_status(announcement);
        }
        let mut gateways = self.fleet.gateways();
        let timeout = if gateways.has_ever_echoed() { REPEATED_ECHO_TIMEOUT } else { STATUS_ECHO_TIMEOUT };
        let is_late =
            self.status_published.is_some_and(|published| now.saturating_duration_since(published) >= timeout);
        if is_late && !gateways.has_echo() {
            warn!(
                "own status was not received: the MQTT server may not let this broker read wireguard-broker/+/status"
            );
            gateways.force_echo(now);
        }
        if gateways.check_synced(now) {
            info!("ready: all retained states are received");
        }
        let expired = gateways.expire(now);
        let (problems, is_synced) = (gateways.problems(now), gateways.is_synced());
        drop(gateways);
        self.problem_log.update(problems.all(), is_synced, now);
        for worker in expired {
            if let Some(offline) = self.fleet.gateways().offline(&worker, now) {
                self.online_log.on_expired(&worker, offline);
            }
            self.in_flight.lock().invalidate(&worker, None);
        }
        self.online_log.on_due(now);
    }

    fn publish_status(&self, announcement: Announcement) {
        // An error means that the connection is being lost; on the next one it is published again.
        let _ = self.bus.try_publish(announcement.apply_to(status(&self.broker, "1")));
    }

    fn publish_hello(&mut self, announcement: Announcement, now: Instant) {
        let digest = self.lists.borrow().digest.clone();
        let hello_message = self.hello(digest);
        let payload = hello_message.payload(unix(SystemTime::now()));
        let _ = self.keys.try_publish(announcement.apply_to(hello(&self.broker, payload)));
        self.last_hello = Some(PublishedHello { at: now, hello: hello_message });
    }

    fn hello(&self, digest: String) -> Hello {
        let tenants = self.tenants.as_ref().map(|tenants| tenants.borrow().clone());
        let registry = self.registry.announced();
        let hello =
            Hello { records: Some(digest), tenants, registry, ..Hello::broker(self.domains.clone(), self.instance) };
        if self.registry.is_serving() { hello.with_leases() } else { hello }
    }
}

/// Returns when there is a new value; never if there is none, or will be none.
async fn changed(value: Option<&mut watch::Receiver<ServiceAnnouncement>>) {
    let is_over = match value {
        Some(value) => value.changed().await.is_err(),
        None => true,
    };
    if is_over {
        pending::<()>().await;
    }
}
