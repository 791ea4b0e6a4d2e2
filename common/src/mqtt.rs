//! The MQTT session under both programs: one task that connects, subscribes, publishes and passes on what is received,
//! and does so again after every loss.
//!
//! Tasks: each connection of a program has one [`Session`]; publishers reach it by its [`MqttHandle`]. What it receives it
//! passes to a function of the program (`bus` of the broker and of the worker), which must not block.
//!
//! Previous stop of a message that goes out: the `bus` room, which makes it of [`crate::wire`]; next stop: the MQTT server.
//!
//! rumqttc forgets what was not acknowledged when the server has lost the session, and deadlocks when its own client is
//! awaited where it is polled. So the session keeps what it publishes in an [`outbox`] until the server has acknowledged
//! it, and never awaits anything but `poll` and its commands. [`subscriptions`] knows which filters are granted, [`echo`]
//! whether they still work, [`reconnect`] when to connect again, [`pair`] what to do where a server allows one connection. [`trial`]
//! is a single connection, by which a command sees what the server allows.

mod cause;
mod echo;
mod options;
mod outbox;
mod pair;
pub mod presence;
mod reconnect;
mod session;
mod subscriptions;
mod tls_probe;
pub mod trial;

use rumqttc::valid_topic;
use tokio::sync::{mpsc, oneshot, watch};

use self::cause::dotted;
use self::outbox::PendingPublish;
use self::subscriptions::Filter;
use crate::Topic;

pub use self::cause::Fault;
pub use self::session::{Session, open, open_pair};
pub use crate::tls::TlsError;
pub use rumqttc::{Publish, QoS};

/// Publishes under way at once; what rumqttc and rumqttd allow too.
const INFLIGHT: u16 = 100;
/// The longest topic there can be (MQTT 3.1.1 section 1.5.3).
const TOPIC_MAX: usize = 65_535;

/// A message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    topic: Topic,
    payload: Vec<u8>,
    qos: QoS,
    retain: bool,
}

impl Message {
    /// Retained, at least once: a state.
    pub fn retained(topic: Topic, payload: impl Into<Vec<u8>>) -> Self {
        Self { topic, payload: payload.into(), qos: QoS::AtLeastOnce, retain: true }
    }

    /// Retained, at most once: a figure that is soon published again.
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

    /// Whether rumqttc can write it, which reports an invalid topic in no other way.
    fn is_sendable(&self) -> bool {
        let topic = self.topic.to_string();
        valid_topic(&topic) && !topic.is_empty() && topic.len() <= TOPIC_MAX
    }
}

/// A connection of a program: its client id, its will, its filters.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// Its client id; a second connection with the same id ends the first.
    pub id: String,
    /// What the server publishes when it is gone.
    pub will: Option<Message>,
    /// Filters of at most once: states, of which only the newest matters and all retained ones must come
    /// (a server's queue for acknowledged messages is bounded, and it drops silently).
    pub qos0_filters: Vec<String>,
    /// Filters of at least once.
    pub qos1_filters: Vec<String>,
    /// Filters of at most once that the program can do without, where an access list does not allow them.
    pub optional: Vec<String>,
    /// Where it publishes to itself, to notice that a server has forgotten its subscriptions.
    pub echo: Option<Topic>,
    /// It is the second connection of a program: only the first one logs its troubles, which are the same.
    pub is_secondary: bool,
}

impl SessionConfig {
    /// The second connection of a program, by which it publishes. What it publishes is acknowledged there: where a
    /// server leaves Nagle's algorithm on, as most do, an acknowledgement would hold up for 40 ms what is to be received
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

/// What the session passes on.
#[derive(Debug)]
pub enum Event {
    /// Connected, and every filter is subscribed.
    Up,
    /// A message on one of the filters.
    Message(Publish),
    /// The connection is lost, or an attempt to connect failed.
    Down,
}

/// Whether the session is connected.
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
    queue: mpsc::Sender<PendingPublish>,
    state: watch::Receiver<ConnectionState>,
    name_suspect: watch::Receiver<bool>,
}

impl MqttHandle {
    /// Publishes and returns when the server has acknowledged, however often the connection is lost meanwhile.
    /// Dropping the future takes the message back if it is not under way yet.
    pub async fn publish(&self, message: Message) -> Result<(), PublishError> {
        if !message.is_sendable() {
            return Err(PublishError::Unsendable);
        }
        let (done, acknowledged) = oneshot::channel();
        self.queue.send(PendingPublish::new(message, Some(done))).await.map_err(|_| PublishError::SessionEnded)?;
        acknowledged.await.unwrap_or(Err(PublishError::SessionEnded))
    }

    /// Publishes without waiting, for what is worthless after the connection is lost. False if there was no place, or no
    /// server can take it.
    #[must_use]
    pub fn try_publish(&self, message: Message) -> bool {
        message.is_sendable() && self.queue.try_send(PendingPublish::new(message, None)).is_ok()
    }

    /// Whether the bus can be used now, and a way to wait for that to change.
    #[must_use]
    pub fn connection_state(&self) -> watch::Receiver<ConnectionState> {
        self.state.clone()
    }

    /// Whether another program may use the client id of this session: the server ends its connections again and again.
    #[must_use]
    pub fn name_suspect(&self) -> watch::Receiver<bool> {
        self.name_suspect.clone()
    }
}
