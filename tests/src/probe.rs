//! An MQTT client of a test that keeps every message it receives: one that only subscribes, or one in the role of a
//! worker or a broker.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rumqttc::{AsyncClient, EventLoop, Incoming, LastWill, MqttOptions, NetworkOptions, QoS, SubscribeFilter};
use tokio::runtime;
use tokio::sync::oneshot;

use crate::DEADLINE;

/// The largest packet that MQTT allows.
const PROTOCOL_PACKET_MAX: usize = 268_435_455;

/// A message that was received, or is to be published.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Its quality of service, 0 or 1. When received: the lower one of publisher and subscription.
    pub qos: u8,
    /// When received: it was retained. When published: it is to be retained.
    pub retain: bool,
}

/// A message to publish, or to compare with one that was received.
#[must_use]
pub fn message(topic: impl Into<String>, payload: impl Into<Vec<u8>>, qos: u8, retain: bool) -> Message {
    Message { topic: topic.into(), payload: payload.into(), qos, retain }
}

impl Message {
    /// The payload, as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// A hello without its time, which is its last member; any other message unchanged.
    #[must_use]
    pub fn undated(self) -> Self {
        let text = self.text();
        match text.rsplit_once(r#","time":"#) {
            Some((rest, _)) if self.topic.ends_with("/hello") => Self { payload: format!("{rest}}}").into(), ..self },
            _ => self,
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = if self.retain { " retained" } else { "" };
        let start = self.payload.get(..200).unwrap_or(&self.payload);
        write!(f, "{} = {:?} (QoS {}{kept})", self.topic, String::from_utf8_lossy(start), self.qos)
    }
}

/// The messages that a client publishes when it receives one.
pub type Answer = Box<dyn FnMut(&Message) -> Vec<Message> + Send>;

/// How a probe connects and behaves.
pub struct Role {
    id: String,
    filters: Vec<String>,
    qos: u8,
    will: Option<Message>,
    credentials: Option<(String, String)>,
    greeting: Vec<Message>,
    answer: Option<Answer>,
}

impl Role {
    /// A client of this id that subscribes to `filters`.
    #[must_use]
    pub fn new(id: &str, filters: &[&str]) -> Self {
        let filters = filters.iter().map(|&filter| filter.to_owned()).collect();
        Self { id: id.into(), filters, qos: 1, will: None, credentials: None, greeting: Vec::new(), answer: None }
    }

    /// Subscribes with quality of service 0.
    #[must_use]
    pub fn at_most_once(self) -> Self {
        Self { qos: 0, ..self }
    }

    /// With a last will.
    #[must_use]
    pub fn will(self, will: Message) -> Self {
        Self { will: Some(will), ..self }
    }

    /// With user name and password.
    #[must_use]
    pub fn credentials(self, user: &str, password: &str) -> Self {
        Self { credentials: Some((user.into(), password.into())), ..self }
    }

    /// Publishes these messages on every connection, after it has subscribed.
    #[must_use]
    pub fn greeting(self, greeting: Vec<Message>) -> Self {
        Self { greeting, ..self }
    }

    /// Publishes the messages that `answer` returns for each received message.
    #[must_use]
    pub fn answer(self, answer: impl FnMut(&Message) -> Vec<Message> + Send + 'static) -> Self {
        Self { answer: Some(Box::new(answer)), ..self }
    }

    fn options(&self, server: SocketAddr) -> MqttOptions {
        let mut options = MqttOptions::new(&self.id, server.ip().to_string(), server.port());
        options.set_max_packet_size(PROTOCOL_PACKET_MAX, PROTOCOL_PACKET_MAX).set_keep_alive(Duration::from_secs(30));
        if let Some(will) = &self.will {
            options.set_last_will(LastWill::new(&will.topic, will.payload.clone(), qos(will.qos), will.retain));
        }
        if let Some((user, password)) = &self.credentials {
            options.set_credentials(user, password);
        }
        options
    }
}

/// A client on the bus. It reconnects by itself; dropping it disconnects, without a last will.
pub struct Probe {
    id: String,
    client: AsyncClient,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    received: Vec<Message>,
    unread: VecDeque<Message>,
    sessions: usize,
    /// The number of messages passed to rumqttc, and of those it has written.
    handed_over: usize,
    written: usize,
    /// The number of them that the server has to acknowledge, and of those it has acknowledged.
    to_acknowledge: usize,
    acknowledged: usize,
    closed: bool,
}

impl Probe {
    /// A client that receives every message on the bus.
    #[must_use]
    pub fn witness(server: SocketAddr) -> Self {
        Self::connect(server, Role::new("witness", &["#"]))
    }

    /// Connects, and returns when all filters are subscribed and the server has acknowledged the greeting.
    #[must_use]
    pub fn connect(server: SocketAddr, role: Role) -> Self {
        let (client, mut eventloop) = AsyncClient::new(role.options(server), 100_000);
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        eventloop.set_network_options(network);
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = oneshot::channel();
        let id = role.id.clone();
        let actor = Actor { client: client.clone(), role, shared: shared.clone() };
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(actor.run(eventloop, stopped));
        });
        let probe = Self { id, client, shared, stop: Some(stop), thread: Some(thread) };
        probe.wait_for_session(1);
        probe.publish_all([]);
        probe
    }

    /// Publishes a message, and returns when the server has acknowledged it.
    pub fn publish(&self, message: Message) {
        self.publish_all([message]);
    }

    /// Publishes all of these, and returns when the server has acknowledged them.
    pub fn publish_all(&self, all: impl IntoIterator<Item = Message>) {
        let mut state = self.shared.lock();
        for message in all {
            state.hand_over(&self.client, message);
        }
        let (handed_over, to_acknowledge) = (state.handed_over, state.to_acknowledge);
        drop(state);
        self.wait("the server takes what is said", |state| {
            (state.written >= handed_over && state.acknowledged >= to_acknowledge).then_some(())
        });
    }

    /// All messages received so far.
    #[must_use]
    pub fn received(&self) -> Vec<Message> {
        self.shared.lock().received.clone()
    }

    /// The next message that `wanted` accepts; it is returned only once. Earlier messages stay for later calls.
    pub fn next(&self, what: &str, mut wanted: impl FnMut(&Message) -> bool) -> Message {
        self.wait(what, |state| {
            let place = state.unread.iter().position(&mut wanted)?;
            state.unread.remove(place)
        })
    }

    /// The next message on `topic`.
    #[expect(clippy::must_use_candidate, reason = "mostly it is awaited, and not looked at")]
    pub fn next_on(&self, topic: &str) -> Message {
        self.next(&format!("a message on {topic}"), |message| message.topic == topic)
    }

    /// Waits until the probe has connected and subscribed `number` times.
    pub fn wait_for_session(&self, number: usize) {
        self.wait("connected and subscribed", |state| (state.sessions >= number).then_some(()));
    }

    /// The number of its connections with a subscription.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.shared.lock().sessions
    }

    /// Drops the connection without a DISCONNECT, so that the server publishes the will.
    pub fn drop_connection(mut self) {
        self.stop = None;
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // The panic of the thread is already on the output.
            let _ = thread.join();
        }
    }

    fn wait<T>(&self, what: &str, mut found: impl FnMut(&mut State) -> Option<T>) -> T {
        let begun = Instant::now();
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = found(&mut state) {
                return found;
            }
            let left = DEADLINE.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let (id, received) = (&self.id, &state.received);
                let last = &received[received.len().saturating_sub(50)..];
                panic!("{id}: {what}: not within {DEADLINE:?}; heard {} messages, the last: {last:#?}", received.len());
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = self.client.try_disconnect();
            let begun = Instant::now();
            let mut state = self.shared.lock();
            while !state.closed && begun.elapsed() < Duration::from_secs(2) {
                let left = Duration::from_millis(100);
                state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            drop(state);
            drop(stop);
        }
        self.join();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn hand_over(&mut self, client: &AsyncClient, message: Message) {
        let Message { topic, payload, qos: level, retain } = message;
        client.try_publish(topic, qos(level), retain, payload).expect("room for a message");
        self.handed_over += 1;
        self.to_acknowledge += usize::from(level > 0);
    }
}

/// The thread of a probe.
struct Actor {
    client: AsyncClient,
    role: Role,
    shared: Arc<Shared>,
}

impl Actor {
    async fn run(mut self, mut eventloop: EventLoop, mut stopped: oneshot::Receiver<()>) {
        loop {
            let event = tokio::select! {
                event = eventloop.poll() => event,
                _ = &mut stopped => return,
            };
            match event {
                Ok(rumqttc::Event::Incoming(incoming)) => self.incoming(incoming),
                Ok(rumqttc::Event::Outgoing(outgoing)) => self.outgoing(&outgoing),
                Err(_) if self.shared.lock().closed => return,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
            self.shared.changed.notify_all();
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "a client receives only a few of the packets there are")]
    fn incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::ConnAck(_) if self.role.filters.is_empty() => self.greet(),
            Incoming::ConnAck(_) => {
                let filters =
                    self.role.filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), qos(self.role.qos)));
                self.client.try_subscribe_many(filters.collect::<Vec<_>>()).expect("room for a subscription");
            }
            Incoming::SubAck(_) => self.greet(),
            Incoming::PubAck(_) => self.shared.lock().acknowledged += 1,
            Incoming::Publish(publish) => self.receive(&publish),
            _ => {}
        }
    }

    fn greet(&mut self) {
        let mut state = self.shared.lock();
        for message in &self.role.greeting {
            state.hand_over(&self.client, message.clone());
        }
        state.sessions += 1;
    }

    fn outgoing(&mut self, outgoing: &rumqttc::Outgoing) {
        if let rumqttc::Outgoing::Publish(_) = outgoing {
            self.shared.lock().written += 1;
        } else if *outgoing == rumqttc::Outgoing::Disconnect {
            self.shared.lock().closed = true;
        }
    }

    fn receive(&mut self, publish: &rumqttc::Publish) {
        let message = message(&publish.topic, publish.payload.as_ref(), publish.qos as u8, publish.retain);
        let answers = self.role.answer.as_mut().map(|answer| answer(&message)).unwrap_or_default();
        let mut state = self.shared.lock();
        for answer in answers {
            state.hand_over(&self.client, answer);
        }
        state.received.push(message.clone());
        state.unread.push_back(message);
    }
}

fn qos(level: u8) -> QoS {
    if level == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce }
}
