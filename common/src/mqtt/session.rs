//! One connection of a program: its task, which waits for rumqttc's next event and passes messages to it. The events
//! are handled in [`events`].

mod events;
mod join;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::pin::{Pin, pin};

use rumqttc::{AsyncClient, ConnectionError, EventLoop, Outgoing, QoS};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use super::cause::Attempt;
use super::echo::SessionEcho;
use super::options;
use super::outbox::{Outbox, PendingPublish};
use super::pair::{JoinChannel, JoinedSession, SessionPair};
use super::reconnect::Reconnect;
use super::subscriptions::Subscriptions;
use super::tls_probe;
use super::{ConnectionState, Event, INFLIGHT, Message, MqttHandle, PublishError, SessionConfig, TlsError};
use crate::Topic;
use crate::config::Mqtt;
use crate::runtime::heartbeat::Heartbeat;

/// Messages that may wait for the session; a publisher waits for a place, and its own deadline bounds that.
const QUEUED_MESSAGES_MAX: usize = 1024;

/// The task behind a [`MqttHandle`].
pub struct MqttSession {
    client: AsyncClient,
    eventloop: EventLoop,
    queue: mpsc::Receiver<PendingPublish>,
    outbox: Outbox,
    state: watch::Sender<ConnectionState>,
    name_suspect: watch::Sender<bool>,
    subscriptions: Subscriptions,
    /// The topic on which it publishes to itself, as a topic and as text.
    echo_topic: Option<(Topic, String)>,
    echo: SessionEcho,
    is_connected: bool,
    /// The reasons without a connection that were logged since the last one.
    logged_reasons: BTreeSet<String>,
    id: String,
    attempt: Attempt,
    is_secondary: bool,
    server: String,
    reconnect: Reconnect,
    /// A name with a dot in its topics.
    dotted: Option<String>,
    heartbeat: Heartbeat,
    /// The state shared with the program's other session.
    pair: Option<SessionPair>,
    /// The other session, if that publishes and subscribes through this one.
    joined_session: Option<JoinedSession>,
}

/// The two sessions of a program, `second` made by [`SessionConfig::secondary`]. Where the server lets a program have one connection
/// only, the second goes through the first.
pub fn open_pair(
    config: &Mqtt,
    first: SessionConfig,
    second: SessionConfig,
) -> Result<[(MqttHandle, MqttSession); 2], TlsError> {
    let (mut first, mut second) = (open(config, first)?, open(config, second)?);
    let [of_first, of_second] = SessionPair::new(first.0.queue.clone());
    (first.1.pair, second.1.pair) = (Some(of_first), Some(of_second));
    Ok([first, second])
}

/// A session with the configured server, not yet connected: [`MqttSession::run`] does that.
pub fn open(config: &Mqtt, client: SessionConfig) -> Result<(MqttHandle, MqttSession), TlsError> {
    let (options, network, server) = options::options(config, &client)?;
    let (rumqtt, mut eventloop) = AsyncClient::new(options, usize::from(INFLIGHT) + 16);
    eventloop.set_network_options(network);
    let (sender, queue) = mpsc::channel(QUEUED_MESSAGES_MAX);
    let (state, watched) = watch::channel(ConnectionState::Down(format!("not connected to {server} yet")));
    let (name_suspect, suspected) = watch::channel(false);
    let session = MqttSession {
        client: rumqtt,
        eventloop,
        queue,
        outbox: Outbox::default(),
        state,
        name_suspect,
        subscriptions: Subscriptions::new(client.filters()),
        dotted: client.dotted(),
        echo_topic: client.echo.map(|topic| (topic.clone(), topic.to_string())),
        echo: SessionEcho::default(),
        is_connected: false,
        logged_reasons: BTreeSet::new(),
        attempt: Attempt::new(config, &client.id),
        id: client.id,
        is_secondary: client.is_secondary,
        server,
        reconnect: Reconnect::default(),
        heartbeat: Heartbeat::default(),
        pair: None,
        joined_session: None,
    };
    Ok((MqttHandle { queue: sender, state: watched, name_suspect: suspected }, session))
}

impl MqttSession {
    /// Runs until `stop` returns, then disconnects, so that the server does not publish the will; a publisher that
    /// needs an acknowledgement has to await it before that. `on_event` is called in this task: it must not block.
    pub async fn run(mut self, mut on_event: impl FnMut(Event), stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let heartbeat = self.heartbeat();
        while let Some(event) = heartbeat.wait_for(self.next(stop.as_mut())).await {
            match event {
                Ok(event) => self.handle(event, &mut on_event),
                Err(error) => {
                    tokio::select! {
                        () = heartbeat.wait_for(self.look_for_tls(&error)) => {}
                        () = &mut stop => return,
                    }
                    self.on_disconnect(&error, &mut on_event);
                    if self.pair.as_ref().is_some_and(SessionPair::has_to_join) {
                        return self.join(&mut on_event, stop).await;
                    }
                    tokio::select! {
                        () = heartbeat.wait_for(sleep(self.reconnect.pause())) => {}
                        () = &mut stop => return,
                    }
                }
            }
        }
        self.disconnect().await;
    }

    /// The heartbeat of its task.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    /// Probes once whether a server that closes the connection without an answer uses TLS.
    async fn look_for_tls(&mut self, error: &ConnectionError) {
        if let Some((host, port)) = self.attempt.may_need_tls(error, self.is_connected) {
            self.attempt.server_speaks_tls(tls_probe::speaks_tls(&host, port).await);
        }
    }

    /// The next event of rumqttc, or none when it is time to stop. Meanwhile publish requests are accepted; a running
    /// poll is never cancelled while the connection is up.
    async fn next(
        &mut self,
        mut stop: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Result<rumqttc::Event, ConnectionError>> {
        let mut poll = pin!(self.eventloop.poll());
        let up = *self.state.borrow() == ConnectionState::Up;
        loop {
            let now = Instant::now();
            if self.is_connected {
                self.reconnect.on_still_up(now);
                set(&self.name_suspect, self.reconnect.is_name_suspect());
            }
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
            if let Some(echo) =
                room.then(|| due_echo(&mut self.echo, self.echo_topic.as_ref(), &self.id, now)).flatten()
            {
                self.outbox.enqueue(PendingPublish::new(echo, None), &self.client);
                continue;
            }
            let room = room && !self.echo.must_wait(now);
            let is_silenced = self.echo.is_forbidden(now);
            if let Some(publish) = room.then(|| self.outbox.next()).flatten() {
                enqueue(publish, is_silenced, &mut self.outbox, &self.client);
                continue;
            }
            let due = self.subscriptions.due().into_iter().chain(self.echo.next(now)).chain(self.outbox.due());
            let due = due.chain(self.reconnect.rival_excluded_at()).min();
            tokio::select! {
                event = &mut poll => return Some(event),
                Some(publish) = self.queue.recv(), if room => {
                    enqueue(publish, is_silenced, &mut self.outbox, &self.client);
                }
                Some(joined_session) = joined(&mut self.pair), if self.joined_session.is_none() => {
                    // The next connection is used by both sessions.
                    let filters = self.subscriptions.filters().chain(&joined_session.filters).cloned();
                    self.subscriptions = Subscriptions::new(filters);
                    if joined_session.is_name_suspect {
                        self.reconnect.suspect_name();
                        set(&self.name_suspect, true);
                    }
                    self.joined_session = Some(joined_session);
                    return Some(Err(ConnectionError::NetworkTimeout));
                }
                () = &mut stop => return None,
                () = sleep_until(due.unwrap_or(now)), if self.is_connected && due.is_some() => {}
            }
        }
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

/// Sets the watched value, with a notification only if it changed.
pub(super) fn set(watched: &watch::Sender<bool>, value: bool) {
    watched.send_if_modified(|before| std::mem::replace(before, value) != value);
}

/// The other session of a program, when it joins the first one's connection.
async fn joined(pair: &mut Option<SessionPair>) -> Option<JoinedSession> {
    match pair {
        Some(SessionPair { joining: JoinChannel::First(joining), .. }) => joining.recv().await,
        _ => None,
    }
}

/// The message by which the session checks that the server delivers, if it is due.
fn due_echo(echo: &mut SessionEcho, topic: Option<&(Topic, String)>, id: &str, now: Instant) -> Option<Message> {
    let (topic, _) = topic.filter(|_| echo.is_due(now))?;
    Some(Message { qos: QoS::AtMostOnce, ..Message::transient(topic.clone(), id.to_owned()) })
}

/// Passes a message to rumqttc, unless the server would close the connection because of it.
fn enqueue(publish: PendingPublish, is_silenced: bool, outbox: &mut Outbox, client: &AsyncClient) {
    if is_silenced && publish.is_ours() {
        publish.end(Err(PublishError::NotAllowed));
    } else {
        outbox.enqueue(publish, client);
    }
}
