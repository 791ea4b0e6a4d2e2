//! The MQTT session of both programs: one task that connects, subscribes, publishes and passes on received messages,
//! and reconnects after every loss.
//!
//! Tasks: each connection of a program has one [`MqttSession`]; publishers reach it by its [`MqttHandle`]. It passes
//! received messages to a function of the program (`bus` of the broker and of the worker), which must not block.
//!
//! Previous stop of an outgoing message: the `bus` room, which makes it from [`crate::wire`]; next stop: the MQTT
//! server.
//!
//! rumqttc drops unacknowledged messages when the server has lost the session, and deadlocks when its client is awaited
//! in the task that polls it. So the session keeps published messages in an [`outbox`] until the server has
//! acknowledged them, and never awaits anything but `poll` and its commands. [`subscriptions`] has the granted filters,
//! [`echo`] checks that they still work, [`reconnect`] schedules attempts to connect, [`pair`] handles servers that
//! allow one connection only. [`trial`] is a single connection, by which a command checks its rights at the server.

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
pub use self::session::{MqttSession, open, open_pair};
pub use crate::tls::TlsError;
pub use rumqttc::{Publish, QoS};

/// The most unacknowledged publishes; rumqttc and rumqttd have the same limit.
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

    /// Retained, at most once: a value that is published again soon.
    pub fn retained_qos0(topic: Topic, payload: impl Into<Vec<u8>>) -> Self {
        Self { qos: QoS::AtMostOnce, ..Self::retained(topic, payload) }
    }

    /// Not retained, at least once: an event.
    pub fn transient(topic: Topic, payload: impl Into<Vec<u8>>) -> Self {
        Self { retain: false, ..Self::retained(topic, payload) }
    }

    /// The same, not retained.
    #[must_use]
    pub fn not_retained(self) -> Self {
        Self { retain: false, ..self }
    }

    /// Whether rumqttc can send it; it reports an invalid topic in no other way.
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
    /// The last will: published by the server when the connection is lost.
    pub will: Option<Message>,
    /// Filters of `QoS` 0: states, of which only the newest matters and all retained messages must be received (a
    /// server's queue for `QoS` 1 is bounded, and drops silently).
    pub qos0_filters: Vec<String>,
    /// Filters of `QoS` 1.
    pub qos1_filters: Vec<String>,
    /// Filters of `QoS` 0 that the program can do without, if an access list does not allow them.
    pub optional: Vec<String>,
    /// The topic on which it publishes to itself, to detect that a server has lost its subscriptions.
    pub echo: Option<Topic>,
    /// It is the second connection of a program: only the first one logs connection problems, which are the same.
    pub is_secondary: bool,
}

impl SessionConfig {
    /// The second connection of a program, by which it publishes. The acknowledgements of these messages are received
    /// there: on a server with Nagle's algorithm, as most have, they would delay messages on the first connection by 40
    /// ms.
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

    /// A name with a dot in its filters or its will.
    fn dotted(&self) -> Option<String> {
        let will = self.will.as_ref().map(|will| will.topic.to_string());
        let mut topics = will.into_iter().chain(self.filters().map(|filter| filter.text));
        topics.find_map(|topic| dotted(&topic).map(str::to_owned))
    }
}

/// The events that the session passes on.
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
    /// It cannot be sent: its topic has wildcards or is too long, or the connection was lost each time it was sent.
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
    /// Publishes and returns when the server has acknowledged, however often the connection is lost meanwhile. Dropping
    /// the future cancels the message if it is not sent yet.
    pub async fn publish(&self, message: Message) -> Result<(), PublishError> {
        if !message.is_sendable() {
            return Err(PublishError::Unsendable);
        }
        let (done, acknowledged) = oneshot::channel();
        self.queue.send(PendingPublish::new(message, Some(done))).await.map_err(|_| PublishError::SessionEnded)?;
        acknowledged.await.unwrap_or(Err(PublishError::SessionEnded))
    }

    /// Publishes without waiting, for messages that are useless after the connection is lost. False if the queue is
    /// full, or the message cannot be sent.
    #[must_use]
    pub fn try_publish(&self, message: Message) -> bool {
        message.is_sendable() && self.queue.try_send(PendingPublish::new(message, None)).is_ok()
    }

    /// The state of the connection, with notifications of changes.
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
