//! The second session of a program if the server allows one connection only.

use std::pin::Pin;

use tokio::time::sleep;
use tracing::warn;

use super::{MqttSession, set};
use crate::mqtt::outbox::PendingPublish;
use crate::mqtt::pair::{JoinChannel, JoinedSession, SessionPair};
use crate::mqtt::{ConnectionState, Event};
use crate::runtime::heartbeat;

impl MqttSession {
    /// Works through the program's first session, until `stop` returns.
    pub(super) async fn join(self, on_event: &mut impl FnMut(Event), mut stop: Pin<&mut impl Future<Output = ()>>) {
        let Self { client, eventloop, mut queue, mut outbox, state, name_suspect, .. } = self;
        let Self { subscriptions, server, heartbeat, pair, .. } = self;
        drop((client, eventloop));
        let Some(SessionPair { joining: JoinChannel::Second { joined_sessions, queue: first }, .. }) = pair else {
            return;
        };
        warn!(server, "the MQTT server lets this program have one connection only: it uses one for both purposes");
        let (joined_session, mut events) =
            JoinedSession::new(subscriptions.filters().cloned().collect(), *name_suspect.borrow());
        if joined_sessions.send(joined_session).await.is_err() {
            return;
        }
        let mut next: Option<PendingPublish> = None;
        loop {
            heartbeat.beat();
            let up = *state.borrow() == ConnectionState::Up;
            if up && next.is_none() {
                next = outbox.next();
            }
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return };
                    // From now on the first session reports a suspect name; the guest passed that on.
                    set(&name_suspect, false);
                    match &event {
                        Event::Up => drop(state.send_replace(ConnectionState::Up)),
                        Event::Down => drop(state.send_replace(ConnectionState::Down(format!("{server}: connection lost")))),
                        Event::Message(_) => {}
                    }
                    on_event(event);
                }
                publish = queue.recv(), if up && next.is_none() => next = publish,
                permit = first.reserve(), if next.is_some() => {
                    let (Ok(permit), Some(publish)) = (permit, next.take()) else { return };
                    permit.send(publish);
                }
                () = sleep(heartbeat::HEARTBEAT_INTERVAL) => {}
                () = &mut stop => return,
            }
        }
    }
}
