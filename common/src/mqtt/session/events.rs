//! The handling of rumqttc's events: the session is connected, has received a message, or has lost the connection.

use std::io;
use std::mem::take;

use rumqttc::{ConnectionError, Incoming, MqttState, Outgoing, Publish, SubAck};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{MqttSession, set};
use crate::mqtt::cause::dot_hint;
use crate::mqtt::reconnect::is_closed;
use crate::mqtt::{ConnectionState, Event, INFLIGHT};

/// Reasons that are remembered at most, so that each is logged once.
const LOGGED_REASONS_MAX: usize = 16;

impl MqttSession {
    pub(super) fn handle(&mut self, event: rumqttc::Event, on_event: &mut impl FnMut(Event)) {
        if matches!(event, rumqttc::Event::Incoming(_)) {
            // Behind a long queue a pong is late. rumqttc would close the connection to a server that sends all the
            // time.
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
                match &self.joined_session {
                    Some(joined_session) if joined_session.matches(&publish) => {
                        joined_session.on_event(Event::Message(publish));
                    }
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
        self.is_connected = true;
        self.attempt.connected();
        self.reconnect.connected(now);
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

    /// The program's other connection has the same topic; and a retained message there is from neither.
    fn echo_came(&mut self, publish: &Publish) {
        if publish.payload == self.id.as_bytes() && !publish.retain && self.echo.received(Instant::now()) {
            // The server sends the retained messages again.
            self.subscriptions.reset();
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
                "this program does not receive what it publishes to itself: the server may not allow that"
            );
        }
        if self.echo_topic.as_ref().is_some_and(|(_, topic)| self.subscriptions.is_granted(topic)) {
            self.echo.up(Instant::now());
        }
        self.state.send_replace(ConnectionState::Up);
        on_event(Event::Up);
        if let Some(joined_session) = &self.joined_session {
            joined_session.on_event(Event::Up);
        }
    }

    /// Messages queued in rumqttc are in the outbox too, and are sent again from there. Its received events are handled
    /// now; otherwise it would return them on the next connection, and the answer to a SUBSCRIBE of this connection
    /// would be taken for one of the next.
    pub(super) fn on_disconnect(&mut self, error: &ConnectionError, on_event: &mut impl FnMut(Event)) {
        for event in self.take_received() {
            self.handle(event, on_event);
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
        let accepted = std::mem::replace(&mut self.is_connected, false);
        self.subscriptions.reset();
        if !is_over_echo {
            self.count(error);
        }
        self.report_down(error, accepted);
        on_event(Event::Down);
        if let Some(joined_session) = &self.joined_session {
            joined_session.on_event(Event::Down);
        }
    }

    /// The events that rumqttc has not returned, without the answers to a CONNECT or SUBSCRIBE; it forgets the
    /// connection.
    fn take_received(&mut self) -> Vec<rumqttc::Event> {
        self.eventloop.clean();
        self.eventloop.pending.clear();
        let received = take(&mut self.eventloop.state.events);
        self.eventloop.state = MqttState::new(INFLIGHT, false);
        let is_answer = |event: &rumqttc::Event| {
            matches!(event, rumqttc::Event::Incoming(Incoming::ConnAck(_) | Incoming::SubAck(_)))
        };
        received.into_iter().filter(|event| !is_answer(event)).collect()
    }

    /// Sets the state to why the connection is down, and logs each reason once.
    fn report_down(&mut self, error: &ConnectionError, accepted: bool) {
        let is_dot_suspect = self.reconnect.is_closed_early() && !self.attempt.lacks_tls(accepted);
        let hint = self.dotted.as_ref().filter(|_| is_dot_suspect).map(|name| dot_hint(name));
        // If the server does not listen, another program with the same name is not the cause.
        let is_answered =
            !matches!(error, ConnectionError::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused);
        let is_in_use = is_answered && *self.name_suspect.borrow();
        let in_use = if is_in_use { "; another program may use this client id" } else { "" };
        let down = ConnectionState::Down(format!(
            "{}: {}{}{in_use}",
            self.server,
            self.attempt.describe(error, accepted),
            hint.as_deref().unwrap_or_default()
        ));
        let before = self.state.send_replace(down.clone());
        if before == ConnectionState::Up || self.logged_reasons.len() >= LOGGED_REASONS_MAX {
            self.logged_reasons.clear();
        }
        // The name may only be in filters of the second session.
        let is_new = hint.is_some() && self.reconnect.is_closed_early_first();
        if let ConnectionState::Down(reason) = &down
            && (!self.is_secondary || is_new)
            && self.logged_reasons.insert(reason.clone())
        {
            warn!(reason, client = self.id, "MQTT not connected");
        }
    }

    fn count(&mut self, error: &ConnectionError) {
        let was_up = *self.state.borrow() == ConnectionState::Up;
        let is_thrown_out = self.reconnect.lost(error, was_up);
        set(&self.name_suspect, self.reconnect.is_name_suspect());
        if is_thrown_out {
            warn!(
                server = self.server,
                client = self.id,
                "the MQTT server closes each connection as soon as it stands: another program may use this name as its \
                 client id, or the server refuses something that this program subscribes to or publishes"
            );
        }
    }
}
