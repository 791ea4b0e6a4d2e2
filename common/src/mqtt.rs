//! The MQTT session under both programs: one task that connects, subscribes, publishes and hands on what
//! comes, and does so again after every loss.
//!
//! rumqttc forgets what was not acknowledged when the server has lost the session, and deadlocks when its own
//! client is awaited where it is polled. So the session keeps what it publishes in an [`Outbox`] until the server
//! has acknowledged it, and never awaits anything but `poll` and its orders.

mod echo;
mod options;
mod outbox;
mod pair;
pub mod presence;
mod subscriptions;

use std::mem::take;
use std::pin::{Pin, pin};
use std::time::Duration;

use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, EventLoop, Incoming, MqttState, Outgoing, StateError, SubAck,
    valid_topic,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use self::echo::Echo;
use self::outbox::{Outbox, PendingPublish};
use self::pair::{Guest, Joining, Pair};
use self::subscriptions::{Filter, Subscriptions};
use crate::Topic;
use crate::config::Mqtt;

pub use crate::runtime::tls::TlsError;
pub use rumqttc::{Publish, QoS};

/// Orders that may wait for the session; a publisher waits for a place, and its own deadline bounds that.
const COMMAND_QUEUE: usize = 1024;
/// Publishes under way at once; what rumqttc and rumqttd allow too.
const INFLIGHT: u16 = 100;
/// The pause before the second attempt to connect; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest pause between two attempts to connect.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest topic there can be (MQTT 3.1.1 section 1.5.3).
const TOPIC_MAX: usize = 65_535;
/// The longest pause where the server closes each connection as soon as it stands.
const PAUSE_THROWN_OUT: Duration = Duration::from_secs(30);
/// After so many connections in a row that the server closed before it had granted every subscription, it may not like a name.
const CLOSED_EARLY: u32 = 3;
/// After so many of these the log says what may be the cause.
const THROWN_OUT: u32 = 5;
/// A connection that held this long was a good one: the next attempt after it comes soon.
const STABLE_AFTER: Duration = Duration::from_secs(5);

/// A message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    topic: Topic,
    payload: Vec<u8>,
    qos: QoS,
    retain: bool,
}

impl Message {
    /// Retained, at least once: what is so until it is said otherwise.
    pub fn retained(topic: Topic, payload: impl Into<Vec<u8>>) -> Self {
        Self { topic, payload: payload.into(), qos: QoS::AtLeastOnce, retain: true }
    }

    /// Retained, at most once: a figure that is soon said again.
    pub fn retained_qos0(topic: Topic, payload: impl Into<Vec<u8>>) -> Self {
        Self { qos: QoS::AtMostOnce, ..Self::retained(topic, payload) }
    }

    /// Not retained, at least once: something that happened.
    pub fn transient(topic: Topic, payload: impl Into<Vec<u8>>) -> Self {
        Self { retain: false, ..Self::retained(topic, payload) }
    }

    /// The same, not retained.
    #[must_use]
    pub fn not_retained(self) -> Self {
        Self { retain: false, ..self }
    }

    /// Whether rumqttc can write it. It says no other way that a topic is not one.
    fn is_sendable(&self) -> bool {
        let topic = self.topic.to_string();
        valid_topic(&topic) && !topic.is_empty() && topic.len() <= TOPIC_MAX
    }
}

/// Who this client is, and what it wants to hear.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// Its client id; a second connection with the same id ends the first.
    pub id: String,
    /// What the server says in its name when it is gone.
    pub will: Option<Message>,
    /// Filters heard at most once: states, of which only the newest matters and all retained ones must come
    /// (a server's queue for acknowledged messages is bounded, and it drops silently).
    pub qos0_filters: Vec<String>,
    /// Filters heard at least once.
    pub qos1_filters: Vec<String>,
    /// Filters heard at most once that the program can do without, where an access list does not allow them.
    pub optional: Vec<String>,
    /// Where it publishes to itself, to notice that a server has forgotten its subscriptions.
    pub echo: Option<Topic>,
    /// It is the second connection of a program: the log tells of the troubles of the first, which are the same.
    pub is_secondary: bool,
}

impl SessionConfig {
    /// The second connection of a program, by which it publishes. What it publishes is acknowledged there: where a
    /// server leaves Nagle's algorithm on, as most do, an acknowledgement would hold up for 40 ms what is to be heard
    /// on the first.
    #[must_use]
    pub fn secondary(id: String) -> Self {
        Self {
            id,
            will: None,
            qos0_filters: Vec::new(),
            qos1_filters: Vec::new(),
            optional: Vec::new(),
            echo: None,
            is_secondary: true,
        }
    }

    fn filters(&self) -> impl Iterator<Item = Filter> {
        let required = |text: &String, qos| Filter { text: text.clone(), qos, is_required: true };
        let qos0 = self.qos0_filters.iter().map(move |text| required(text, QoS::AtMostOnce));
        let qos1 = self.qos1_filters.iter().map(move |text| required(text, QoS::AtLeastOnce));
        let optional = self.optional.iter().cloned().chain(self.echo.as_ref().map(Topic::to_string));
        let optional = optional.map(|text| Filter { text, qos: QoS::AtMostOnce, is_required: false });
        qos0.chain(qos1).chain(optional)
    }

    /// A name in its filters or its will that has a dot.
    fn dotted(&self) -> Option<String> {
        let will = self.will.as_ref().map(|will| will.topic.to_string());
        let mut topics = will.into_iter().chain(self.filters().map(|filter| filter.text));
        topics.find_map(|topic| dotted(&topic).map(str::to_owned))
    }
}

/// What the session hands on.
#[derive(Debug)]
pub enum Event {
    /// Connected, and every filter is subscribed.
    Up,
    /// A message on one of the filters.
    Message(Publish),
    /// The connection is lost, or an attempt to connect failed.
    Down,
}

/// Whether the bus can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionState {
    /// Connected and subscribed.
    Up,
    /// Not connected, and why, in one line without secrets.
    Down(String),
}

/// Why a message was not acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The session has ended.
    #[error("the MQTT session has ended")]
    SessionEnded,
    /// No server can take it: its topic has wildcards or is too long, or connections were lost over it again and again.
    #[error("the message cannot be published")]
    Unsendable,
    /// The server ends the connection of a program that publishes below `wgkex/`.
    #[error("the MQTT server does not let this program publish below wgkex/")]
    NotAllowed,
}

/// The publishers' side of a session.
#[derive(Debug, Clone)]
pub struct MqttHandle {
    orders: mpsc::Sender<PendingPublish>,
    state: watch::Receiver<ConnectionState>,
}

impl MqttHandle {
    /// Publishes and returns when the server has acknowledged, however often the connection is lost meanwhile.
    /// Dropping the future takes the message back if it is not under way yet.
    pub async fn publish(&self, message: Message) -> Result<(), PublishError> {
        if !message.is_sendable() {
            return Err(PublishError::Unsendable);
        }
        let (done, acknowledged) = oneshot::channel();
        self.orders.send(PendingPublish::new(message, Some(done))).await.map_err(|_| PublishError::SessionEnded)?;
        acknowledged.await.unwrap_or(Err(PublishError::SessionEnded))
    }

    /// Publishes without waiting, for what is worthless after the connection is lost. False if there was no place, or no
    /// server can take it.
    #[must_use]
    pub fn try_publish(&self, message: Message) -> bool {
        message.is_sendable() && self.orders.try_send(PendingPublish::new(message, None)).is_ok()
    }

    /// Whether the bus can be used now, and a way to wait for that to change.
    #[must_use]
    pub fn connection_state(&self) -> watch::Receiver<ConnectionState> {
        self.state.clone()
    }
}

/// The task behind a [`MqttHandle`].
pub struct Session {
    client: AsyncClient,
    eventloop: EventLoop,
    orders: mpsc::Receiver<PendingPublish>,
    outbox: Outbox,
    state: watch::Sender<ConnectionState>,
    subscriptions: Subscriptions,
    /// Where it publishes to itself, as a topic and as text, and what it knows of that.
    echo_topic: Option<(Topic, String)>,
    echo: Echo,
    is_connected: bool,
    id: String,
    is_secondary: bool,
    server: String,
    pause: Duration,
    since: Option<Instant>,
    /// Connections in a row that the server closed soon after they stood.
    thrown_out: u32,
    /// Connections in a row that the server closed before it had granted every subscription.
    closed_early: u32,
    /// A name in its topics with a dot.
    dotted: Option<String>,
    /// What it has of the program's other session.
    pair: Option<Pair>,
    /// The other session, if that publishes and subscribes through this one.
    guest: Option<Guest>,
}

/// The two sessions of a program, `second` made by [`SessionConfig::secondary`]. Where the server lets a program have one connection
/// only, the second goes through the first.
pub fn open_pair(
    config: &Mqtt,
    first: SessionConfig,
    second: SessionConfig,
) -> Result<[(MqttHandle, Session); 2], TlsError> {
    let (mut first, mut second) = (open(config, first)?, open(config, second)?);
    let [of_first, of_second] = Pair::new(first.0.orders.clone());
    (first.1.pair, second.1.pair) = (Some(of_first), Some(of_second));
    Ok([first, second])
}

/// A session with the configured server, not yet connected: [`Session::run`] does that.
pub fn open(config: &Mqtt, client: SessionConfig) -> Result<(MqttHandle, Session), TlsError> {
    let (options, network, server) = options::options(config, &client)?;
    let (rumqtt, mut eventloop) = AsyncClient::new(options, usize::from(INFLIGHT) + 16);
    eventloop.set_network_options(network);
    let (sender, orders) = mpsc::channel(COMMAND_QUEUE);
    let (state, watched) = watch::channel(ConnectionState::Down(format!("not connected to {server} yet")));
    let session = Session {
        client: rumqtt,
        eventloop,
        orders,
        outbox: Outbox::default(),
        state,
        subscriptions: Subscriptions::new(client.filters()),
        dotted: client.dotted(),
        closed_early: 0,
        echo_topic: client.echo.map(|topic| (topic.clone(), topic.to_string())),
        echo: Echo::default(),
        is_connected: false,
        id: client.id,
        is_secondary: client.is_secondary,
        server,
        pause: PAUSE_MIN,
        since: None,
        thrown_out: 0,
        pair: None,
        guest: None,
    };
    Ok((MqttHandle { orders: sender, state: watched }, session))
}

impl Session {
    /// Runs until `stop` returns, then disconnects, so that the server does not publish the will; what must be
    /// acknowledged before that, its publisher awaits first. `on_event` is called in this task: it must not block.
    pub async fn run(mut self, mut on_event: impl FnMut(Event), stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        while let Some(event) = self.next(stop.as_mut()).await {
            match event {
                Ok(event) => self.handle(event, &mut on_event),
                Err(error) => {
                    self.on_disconnect(&error, &mut on_event);
                    if self.pair.as_ref().is_some_and(Pair::has_to_join) {
                        return self.join(&mut on_event, stop).await;
                    }
                    tokio::select! {
                        () = sleep(self.pause()) => {}
                        () = &mut stop => return,
                    }
                }
            }
        }
        self.disconnect().await;
    }

    /// Goes on through the program's first session, until `stop` returns.
    async fn join(self, on_event: &mut impl FnMut(Event), mut stop: Pin<&mut impl Future<Output = ()>>) {
        let Self { client, eventloop, mut orders, mut outbox, state, subscriptions, server, pair, .. } = self;
        drop((client, eventloop));
        let Some(Pair { joining: Joining::Second { guests, orders: first }, .. }) = pair else { return };
        warn!(server, "the MQTT server lets this program have one connection only: it uses one for both purposes");
        let (guest, mut events) = Guest::new(subscriptions.filters().cloned().collect());
        if guests.send(guest).await.is_err() {
            return;
        }
        let mut next: Option<PendingPublish> = None;
        loop {
            let up = *state.borrow() == ConnectionState::Up;
            if up && next.is_none() {
                next = outbox.next();
            }
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return };
                    match &event {
                        Event::Up => drop(state.send_replace(ConnectionState::Up)),
                        Event::Down => drop(state.send_replace(ConnectionState::Down(format!("{server}: connection lost")))),
                        Event::Message(_) => {}
                    }
                    on_event(event);
                }
                publish = orders.recv(), if up && next.is_none() => next = publish,
                permit = first.reserve(), if next.is_some() => {
                    let (Ok(permit), Some(publish)) = (permit, next.take()) else { return };
                    permit.send(publish);
                }
                () = &mut stop => return,
            }
        }
    }

    /// The next event of rumqttc, or none when it is time to stop. Orders are taken meanwhile, without ever
    /// dropping a poll half done on a connection that goes on.
    async fn next(
        &mut self,
        mut stop: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Result<rumqttc::Event, ConnectionError>> {
        let mut poll = pin!(self.eventloop.poll());
        let up = *self.state.borrow() == ConnectionState::Up;
        loop {
            let now = Instant::now();
            let is_overdue = self.subscriptions.is_overdue(now) || self.outbox.is_overdue(now);
            if self.is_connected && (is_overdue || self.echo.is_lost(now)) {
                return Some(Err(ConnectionError::NetworkTimeout));
            }
            if let Some(filters) = self.is_connected.then(|| self.subscriptions.next(now)).flatten()
                && self.client.try_subscribe_many(filters).is_err()
            {
                warn!(server = self.server, "subscription found no place");
            }
            let room = up && self.outbox.in_flight() < usize::from(INFLIGHT);
            if room
                && let Some((topic, _)) = &self.echo_topic
                && self.echo.is_due(now)
            {
                let echo = Message { qos: QoS::AtMostOnce, ..Message::transient(topic.clone(), self.id.clone()) };
                self.outbox.enqueue(PendingPublish::new(echo, None), &self.client);
                continue;
            }
            let room = room && !self.echo.must_wait(now);
            let is_silenced = self.echo.is_forbidden(now);
            if let Some(publish) = room.then(|| self.outbox.next()).flatten() {
                enqueue(publish, is_silenced, &mut self.outbox, &self.client);
                continue;
            }
            let due = self.subscriptions.due().into_iter().chain(self.echo.next(now)).chain(self.outbox.due()).min();
            tokio::select! {
                event = &mut poll => return Some(event),
                Some(publish) = self.orders.recv(), if room => {
                    enqueue(publish, is_silenced, &mut self.outbox, &self.client);
                }
                Some(guest) = joined(&mut self.pair), if self.guest.is_none() => {
                    // The next connection is one for both.
                    let filters = self.subscriptions.filters().chain(&guest.filters).cloned();
                    self.subscriptions = Subscriptions::new(filters);
                    self.guest = Some(guest);
                    return Some(Err(ConnectionError::NetworkTimeout));
                }
                () = &mut stop => return None,
                () = sleep_until(due.unwrap_or(now)), if self.is_connected && due.is_some() => {}
            }
        }
    }

    fn handle(&mut self, event: rumqttc::Event, on_event: &mut impl FnMut(Event)) {
        if matches!(event, rumqttc::Event::Incoming(_)) {
            // Behind a long queue a pong comes late. rumqttc would take a server for dead that is heard all the time.
            self.eventloop.state.await_pingresp = false;
        }
        match event {
            rumqttc::Event::Incoming(Incoming::ConnAck(_)) => self.connected(on_event),
            rumqttc::Event::Incoming(Incoming::SubAck(ack)) => self.subscribed(&ack, on_event),
            rumqttc::Event::Incoming(Incoming::Publish(publish)) if self.is_echo(&publish) => self.echo_came(&publish),
            rumqttc::Event::Incoming(Incoming::Publish(publish)) => {
                if !publish.retain {
                    self.echo.message(Instant::now());
                }
                match &self.guest {
                    Some(guest) if guest.wants(&publish) => guest.hand_on(Event::Message(publish)),
                    _ => on_event(Event::Message(publish)),
                }
            }
            rumqttc::Event::Incoming(Incoming::PubAck(ack)) => self.outbox.acknowledged(ack.pkid),
            rumqttc::Event::Outgoing(Outgoing::Publish(pkid)) => self.outbox.sent(pkid, Instant::now()),
            rumqttc::Event::Incoming(_) | rumqttc::Event::Outgoing(_) => {}
        }
    }

    fn connected(&mut self, on_event: &mut impl FnMut(Event)) {
        let now = Instant::now();
        (self.is_connected, self.since) = (true, Some(now));
        if let Some(pair) = &self.pair {
            pair.connected(now);
        }
        self.subscriptions.reset();
        if self.subscriptions.is_complete() {
            self.up(on_event);
        }
    }

    fn subscribed(&mut self, ack: &SubAck, on_event: &mut impl FnMut(Event)) {
        for filter in self.subscriptions.answered(&ack.return_codes, Instant::now()) {
            let hint = dot_hint(&filter);
            warn!(server = self.server, client = self.id, filter, "subscription refused by the MQTT server{hint}");
        }
        if *self.state.borrow() == ConnectionState::Up {
            return;
        }
        if self.subscriptions.is_complete() {
            self.up(on_event);
        } else if let Some(filter) = self.subscriptions.refused() {
            let hint = dot_hint(filter);
            let reason = format!("{}: the server refuses the subscription to {filter}{hint}", self.server);
            self.state.send_replace(ConnectionState::Down(reason));
        }
    }

    fn is_echo(&self, publish: &Publish) -> bool {
        self.echo_topic.as_ref().is_some_and(|(_, topic)| *topic == publish.topic)
    }

    /// The other connection of this program has the same topic.
    fn echo_came(&mut self, publish: &Publish) {
        if publish.payload == self.id.as_bytes() {
            self.echo.heard(Instant::now());
        }
    }

    fn up(&mut self, on_event: &mut impl FnMut(Event)) {
        if !self.is_secondary {
            info!(server = self.server, client = self.id, "MQTT connected");
        }
        if self.echo.is_given_up() {
            let server = &self.server;
            warn!(
                server,
                client = self.id,
                "nothing comes back of what this program publishes to itself: may it do that?"
            );
        }
        if self.echo_topic.as_ref().is_some_and(|(_, topic)| self.subscriptions.is_granted(topic)) {
            self.echo.up(Instant::now());
        }
        self.state.send_replace(ConnectionState::Up);
        on_event(Event::Up);
        if let Some(guest) = &self.guest {
            guest.hand_on(Event::Up);
        }
    }

    /// What rumqttc still holds to be sent is in the outbox too, and is published again from there. What it has received is
    /// handed on; it would do so on the next connection, and take the answer to a SUBSCRIBE of this one for that of the next.
    fn on_disconnect(&mut self, error: &ConnectionError, on_event: &mut impl FnMut(Event)) {
        self.eventloop.clean();
        self.eventloop.pending.clear();
        let received = take(&mut self.eventloop.state.events);
        self.eventloop.state = MqttState::new(INFLIGHT, false);
        for event in received {
            if !matches!(event, rumqttc::Event::Incoming(Incoming::ConnAck(_) | Incoming::SubAck(_))) {
                self.handle(event, on_event);
            }
        }
        self.outbox.on_disconnect();
        let now = Instant::now();
        let is_over_echo = self.echo.down(is_closed(error), now);
        if is_over_echo && self.echo.is_forbidden(now) {
            warn!(
                server = self.server,
                client = self.id,
                "the MQTT server ends the connection when this program publishes below wgkex/, as where an access list \
                 does not allow it: nothing is published there for now, so keys are not confirmed"
            );
        }
        if let Some(pair) = &self.pair {
            pair.lost(!is_over_echo, now);
        }
        self.is_connected = false;
        self.subscriptions.reset();
        if !is_over_echo {
            self.count_thrown_out(error);
            self.count_closed_early(error);
        }
        let hint = self.dotted.as_ref().filter(|_| self.closed_early >= CLOSED_EARLY).map(|name| dot_hint(name));
        let down = ConnectionState::Down(format!(
            "{}: {}{}",
            self.server,
            describe(error),
            hint.as_deref().unwrap_or_default()
        ));
        let before = self.state.send_replace(down.clone());
        // The name may be in filters of the second alone.
        let is_new = hint.is_some() && self.closed_early == CLOSED_EARLY;
        if let (ConnectionState::Down(reason), true) = (&down, down != before && (!self.is_secondary || is_new)) {
            warn!(reason, client = self.id, "MQTT not connected");
        }
        on_event(Event::Down);
        if let Some(guest) = &self.guest {
            guest.hand_on(Event::Down);
        }
    }

    /// Nor has it a way to refuse a name.
    fn count_closed_early(&mut self, error: &ConnectionError) {
        let was_up = *self.state.borrow() == ConnectionState::Up;
        self.closed_early = if is_closed(error) && !was_up { self.closed_early.saturating_add(1) } else { 0 };
    }

    /// MQTT 3.1.1 has no way to say that another client of the same id has connected: the server closes the connection.
    fn count_thrown_out(&mut self, error: &ConnectionError) {
        let is_closed = matches!(error, ConnectionError::Io(_) | ConnectionError::MqttState(_));
        match self.since {
            Some(since) if is_closed && since.elapsed() < STABLE_AFTER => self.thrown_out += 1,
            Some(_) => self.thrown_out = 0,
            // Nobody listens there: the server was restarted.
            None if matches!(error, ConnectionError::Io(_)) => self.thrown_out = 0,
            None => {}
        }
        if self.thrown_out == THROWN_OUT {
            warn!(
                server = self.server,
                client = self.id,
                "the MQTT server closes each connection as soon as it stands: another program may use this name as its \
                 client id, or the server refuses something that this program subscribes to or publishes"
            );
        }
    }

    /// How long to wait before the next attempt to connect: short after a connection that held, then longer, and
    /// never in step with the other clients of a server that comes back.
    fn pause(&mut self) -> Duration {
        if self.since.take().is_some_and(|since| since.elapsed() > STABLE_AFTER) {
            self.pause = PAUSE_MIN;
        }
        let pause = self.pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        let longest = if self.thrown_out > THROWN_OUT { PAUSE_THROWN_OUT } else { PAUSE_MAX };
        self.pause = (self.pause * 2).min(longest);
        pause
    }

    async fn disconnect(mut self) {
        if *self.state.borrow() != ConnectionState::Up || self.client.try_disconnect().is_err() {
            return;
        }
        while let Ok(event) = self.eventloop.poll().await {
            if event == rumqttc::Event::Outgoing(Outgoing::Disconnect) {
                return;
            }
        }
    }
}

/// The other session of a program, when it joins the first one's connection.
async fn joined(pair: &mut Option<Pair>) -> Option<Guest> {
    match pair {
        Some(Pair { joining: Joining::First(joining), .. }) => joining.recv().await,
        _ => None,
    }
}

/// Gives a publish to rumqttc, unless the server would end the connection over it.
fn enqueue(publish: PendingPublish, is_silenced: bool, outbox: &mut Outbox, client: &AsyncClient) {
    if is_silenced && publish.is_ours() {
        publish.end(Err(PublishError::NotAllowed));
    } else {
        outbox.enqueue(publish, client);
    }
}

/// Whether the server closed a connection that stood.
fn is_closed(error: &ConnectionError) -> bool {
    matches!(
        error,
        ConnectionError::MqttState(StateError::ConnectionAborted | StateError::Io(_) | StateError::Deserialization(_))
    )
}

/// The first level of a topic or filter that has a dot.
fn dotted(topic: &str) -> Option<&str> {
    topic.split('/').find(|level| level.contains('.'))
}

/// What may be the cause where the server does not take this topic, filter or name; empty if it has no dot.
fn dot_hint(topic: &str) -> String {
    let hint = |name| format!("; it may be one that takes no name with a dot, as NATS before 2.10, and {name} has one");
    dotted(topic).map(hint).unwrap_or_default()
}

/// One line on why there is no connection, in an operator's words.
fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => "the server refuses the user name or password".into(),
        ConnectionError::ConnectionRefused(code) => format!("the server refuses the connection: {code:?}"),
        ConnectionError::NetworkTimeout | ConnectionError::FlushTimeout => "the server does not answer".into(),
        ConnectionError::Io(error) => error.to_string(),
        ConnectionError::Tls(error) => format!("TLS: {error}"),
        ConnectionError::MqttState(error) => error.to_string(),
        ConnectionError::NotConnAck(_) => "the server does not speak MQTT 3.1.1".into(),
        ConnectionError::RequestsDone => "the session has ended".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::Config;

    /// A server that answers no ping, and says something all the time if it is `talkative`, until its client goes.
    fn start_deaf_server(talkative: bool) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut packet = [0; 512];
            let _connect = client.read(&mut packet).unwrap();
            client.write_all(&[0x20, 2, 0, 0]).unwrap();
            let _subscribe = client.read(&mut packet).unwrap();
            client.write_all(&[0x90, 3, packet[2], packet[3], 0]).unwrap();
            let publish = [0x30, 4, 0, 1, b'a', b'x'];
            while client.write_all(if talkative { &publish } else { &[] }).is_ok() {
                thread::sleep(Duration::from_millis(50));
            }
        });
        port
    }

    /// How often the connection to such a server was lost after some keep-alives.
    async fn losses(talkative: bool) -> usize {
        let port = start_deaf_server(talkative);
        let yaml = format!(
            "domains: [ff_a]\ndomain_prefixes: [ff_]\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}, keepalive: 1}}"
        );
        let config = Config::parse("", &yaml, "w").unwrap();
        let client = SessionConfig { qos0_filters: vec!["a".into()], ..SessionConfig::secondary("w".into()) };
        let (_bus, session) = open(&config.mqtt, client).unwrap();
        let (lost, counted) = mpsc::unbounded_channel();
        let on_event = move |event| {
            if matches!(event, Event::Down) {
                lost.send(()).unwrap();
            }
        };
        session.run(on_event, sleep(Duration::from_secs(5))).await;
        counted.len()
    }

    /// A server that delivers a message, grants a subscription and breaks the connection, all at once; then it lets the
    /// client in, and answers no more.
    fn start_leaving_server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let mut packet = [0; 512];
            let (mut client, _) = listener.accept().unwrap();
            let _connect = client.read(&mut packet).unwrap();
            client.write_all(&[0x20, 2, 0, 0]).unwrap();
            let _subscribe = client.read(&mut packet).unwrap();
            let (publish, granted) = ([0x30, 4, 0, 1, b'a', b'x'], [0x90, 3, packet[2], packet[3], 0]);
            // There is no packet of type 0: with it the connection is over for the client.
            client.write_all(&[&publish[..], &granted, &[0, 0]].concat()).unwrap();
            let (mut again, _) = listener.accept().unwrap();
            let _connect = again.read(&mut packet).unwrap();
            again.write_all(&[0x20, 2, 0, 0]).unwrap();
            while again.read(&mut packet).is_ok_and(|length| length > 0) {}
        });
        port
    }

    /// rumqttc keeps what it has read when a connection breaks, and returns it on the next one.
    #[tokio::test]
    async fn what_came_with_a_loss_is_handed_on_and_is_none_of_the_next_connection() {
        let port = start_leaving_server();
        let yaml =
            format!("domains: [ff_a]\ndomain_prefixes: [ff_]\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}}}");
        let config = Config::parse("", &yaml, "w").unwrap();
        let client = SessionConfig { qos0_filters: vec!["a".into()], ..SessionConfig::secondary("w".into()) };
        let (_bus, session) = open(&config.mqtt, client).unwrap();
        let (events, mut handed_on) = mpsc::unbounded_channel();
        let on_event = move |event| {
            let _ = events.send(match event {
                Event::Up => "up",
                Event::Down => "down",
                Event::Message(_) => "message",
            });
        };
        session.run(on_event, sleep(Duration::from_secs(2))).await;
        let mut all = Vec::new();
        while let Ok(event) = handed_on.try_recv() {
            all.push(event);
        }
        assert_eq!(all, ["message", "down"]);
    }

    /// Quick restarts of the server were taken for another program of the same name, and cost up to 30 s each.
    #[tokio::test]
    async fn a_server_where_nobody_listens_between_two_losses_was_restarted() {
        let config = Config::parse("", "domains: [ff_a]\ndomain_prefixes: [ff_]", "w").unwrap();
        let (_bus, mut session) = open(&config.mqtt, SessionConfig::secondary("w".into())).unwrap();
        let closed = ConnectionError::MqttState(StateError::ConnectionAborted);
        let refused = ConnectionError::Io(std::io::ErrorKind::ConnectionRefused.into());
        let mut longest = |is_restarted: bool| {
            let pauses = (0..2 * THROWN_OUT).map(|_| {
                session.since = Some(Instant::now());
                session.count_thrown_out(&closed);
                let pause = session.pause();
                if is_restarted {
                    session.count_thrown_out(&refused);
                }
                pause
            });
            pauses.max().unwrap()
        };
        assert!(longest(true) <= PAUSE_MAX);
        assert!(longest(false) > PAUSE_MAX);
    }

    #[tokio::test]
    async fn a_server_that_is_heard_is_not_dead_although_its_pongs_are_late() {
        let (talkative, silent) = tokio::join!(losses(true), losses(false));
        assert_eq!((talkative, silent > 0), (0, true), "{silent}");
    }
}
