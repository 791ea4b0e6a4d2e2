//! Published and unacknowledged messages, so that a lost connection loses no message whose publisher waits.

use std::collections::VecDeque;
use std::time::Duration;

use rumqttc::{AsyncClient, QoS};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::error;

use super::{Message, PublishError};

/// Lost connections after which an unacknowledged message is given up: the message may be the cause, for example if it
/// is larger than the server allows.
const LOSSES_MAX: u32 = 8;

/// The timeout of an acknowledgement. Without it the session would wait for a message that the server lost as long as
/// the connection stays up.
const PUBACK_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends the result of a message to its publisher.
pub(super) type Ack = oneshot::Sender<Result<(), PublishError>>;

/// A message to be sent, and the publisher that waits for its acknowledgement.
#[derive(Debug)]
pub(super) struct PendingPublish {
    message: Message,
    ack: Option<Ack>,
    /// Connections that were lost after it was sent.
    losses: u32,
    /// When it was sent last.
    sent: Option<Instant>,
}

impl PendingPublish {
    pub(super) fn new(message: Message, ack: Option<Ack>) -> Self {
        Self { message, ack, losses: 0, sent: None }
    }

    /// The publisher no longer waits for it, so it need not be sent.
    fn is_cancelled(&self) -> bool {
        self.ack.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    fn complete(self) {
        self.end(Ok(()));
    }

    /// Whether its topic is one of our own, which the contract does not have.
    pub(super) fn is_ours(&self) -> bool {
        self.message.topic.is_ours()
    }

    pub(super) fn end(self, result: Result<(), PublishError>) {
        if let Some(ack) = self.ack {
            // The publisher may have stopped waiting; the message was sent all the same.
            let _ = ack.send(result);
        }
    }
}

/// Messages by their progress, each list in order.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// To be sent again after a lost connection.
    resend: VecDeque<PendingPublish>,
    /// In rumqttc's queue; it takes them in this order and reports the packet id of each.
    handed_off: VecDeque<PendingPublish>,
    /// Sent under a packet id and not acknowledged.
    unacked: VecDeque<(u16, PendingPublish)>,
}

impl Outbox {
    /// How many were passed to rumqttc and are not acknowledged.
    pub(super) fn in_flight(&self) -> usize {
        self.handed_off.len() + self.unacked.len()
    }

    /// The next message to send again.
    pub(super) fn next(&mut self) -> Option<PendingPublish> {
        self.resend.pop_front()
    }

    /// Passes the message to rumqttc, whose queue has a place for every message in flight.
    pub(super) fn enqueue(&mut self, publish: PendingPublish, client: &AsyncClient) {
        if publish.is_cancelled() {
            return;
        }
        let Message { topic, payload, qos, retain } = publish.message.clone();
        match client.try_publish(topic.to_string(), qos, retain, payload) {
            Ok(()) => self.handed_off.push_back(publish),
            Err(_) => self.resend.push_front(publish),
        }
    }

    /// rumqttc has sent the oldest message of its queue. With `QoS` 0 it is complete.
    pub(super) fn sent(&mut self, pkid: u16, now: Instant) {
        match self.handed_off.pop_front() {
            Some(publish) if publish.message.qos == QoS::AtMostOnce => publish.complete(),
            Some(publish) => self.unacked.push_back((pkid, PendingPublish { sent: Some(now), ..publish })),
            None => {}
        }
    }

    /// The server has acknowledged the message with this packet id.
    pub(super) fn acknowledged(&mut self, pkid: u16) {
        let place = self.unacked.iter().position(|(sent, _)| *sent == pkid);
        if let Some((_, publish)) = place.and_then(|place| self.unacked.remove(place)) {
            publish.complete();
        }
    }

    /// The deadline for the acknowledgement of the oldest sent message.
    pub(super) fn due(&self) -> Option<Instant> {
        self.unacked.front().and_then(|(_, publish)| publish.sent).map(|sent| sent + PUBACK_TIMEOUT)
    }

    /// Whether that deadline is over.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.due().is_some_and(|due| due <= now)
    }

    /// The connection is lost: messages whose publishers wait are sent again, in the old order; the others are dropped.
    pub(super) fn on_disconnect(&mut self) {
        let mut kept = Vec::with_capacity(self.unacked.len());
        for (_, mut publish) in self.unacked.drain(..) {
            publish.losses += 1;
            if publish.losses < LOSSES_MAX {
                kept.push(publish);
            } else {
                error!(topic = %publish.message.topic, bytes = publish.message.payload.len(), "message given up: the MQTT \
                    server does not acknowledge it, and the connection is lost each time");
                publish.end(Err(PublishError::Unsendable));
            }
        }
        let sent = kept.into_iter();
        let mut again: VecDeque<PendingPublish> = sent.chain(self.handed_off.drain(..)).collect();
        again.append(&mut self.resend);
        again.retain(|publish| publish.ack.is_some() && !publish.is_cancelled());
        self.resend = again;
    }
}

#[cfg(test)]
mod tests {
    use rumqttc::{EventLoop, MqttOptions};

    use super::*;
    use crate::Topic;

    /// A message identified by its payload.
    fn publish(text: &str, waited_for: bool) -> (PendingPublish, oneshot::Receiver<Result<(), PublishError>>) {
        let (done, acknowledged) = oneshot::channel();
        let message = Message::transient(Topic::Key { domain: "d".into() }, text);
        (PendingPublish::new(message, waited_for.then_some(done)), acknowledged)
    }

    fn client() -> (AsyncClient, EventLoop) {
        AsyncClient::new(MqttOptions::new("test", "localhost", 1), 10)
    }

    fn texts(publishes: &VecDeque<PendingPublish>) -> Vec<&str> {
        publishes.iter().map(|publish| std::str::from_utf8(&publish.message.payload).unwrap()).collect()
    }

    #[test]
    fn an_acknowledgement_reaches_the_publisher_it_belongs_to() {
        let (client, _eventloop) = client();
        let mut outbox = Outbox::default();
        let (first, mut first_done) = publish("1", true);
        let (second, mut second_done) = publish("2", true);
        outbox.enqueue(first, &client);
        outbox.enqueue(second, &client);
        outbox.sent(7, Instant::now());
        outbox.sent(8, Instant::now());
        outbox.acknowledged(8);
        assert!(second_done.try_recv().is_ok());
        assert!(first_done.try_recv().is_err());
        outbox.acknowledged(9);
        outbox.acknowledged(7);
        assert!(first_done.try_recv().is_ok());
        assert_eq!(outbox.in_flight(), 0);
    }

    #[test]
    fn an_acknowledgement_is_overdue_by_the_message_that_waits_the_longest() {
        let ((client, _eventloop), now) = (client(), Instant::now());
        let mut outbox = Outbox::default();
        let _done = ["1", "2"].map(|text| {
            let (publish, done) = publish(text, true);
            outbox.enqueue(publish, &client);
            done
        });
        assert_eq!(outbox.due(), None);
        outbox.sent(1, now);
        outbox.sent(2, now + PUBACK_TIMEOUT / 2);
        assert!(!outbox.is_overdue(now + PUBACK_TIMEOUT / 2) && outbox.is_overdue(now + PUBACK_TIMEOUT));
        outbox.acknowledged(1);
        assert_eq!(outbox.due(), Some(now + PUBACK_TIMEOUT / 2 + PUBACK_TIMEOUT));
        outbox.on_disconnect();
        assert_eq!(outbox.due(), None, "it is sent again");
    }

    #[test]
    fn a_figure_is_done_when_it_is_written() {
        let (client, _eventloop) = client();
        let mut outbox = Outbox::default();
        let (mut figure, mut done) = publish("1", true);
        figure.message.qos = QoS::AtMostOnce;
        outbox.enqueue(figure, &client);
        outbox.sent(0, Instant::now());
        assert!(done.try_recv().is_ok());
        assert_eq!(outbox.in_flight(), 0);
    }

    #[test]
    fn a_lost_connection_keeps_the_order_and_drops_cancelled_messages() {
        let (client, _eventloop) = client();
        let mut outbox = Outbox::default();
        let mut waiting = Vec::new();
        for (text, waited_for) in [("1", true), ("2", false), ("3", true), ("4", true), ("5", true)] {
            let (publish, done) = publish(text, waited_for);
            outbox.enqueue(publish, &client);
            if text != "4" {
                waiting.push(done); // the publisher of 4 has given up
            }
        }
        outbox.sent(1, Instant::now());
        outbox.sent(2, Instant::now());
        outbox.acknowledged(2);
        outbox.sent(3, Instant::now());
        outbox.on_disconnect();
        assert_eq!(texts(&outbox.resend), ["1", "3", "5"]);
        let first = outbox.next().unwrap();
        outbox.enqueue(first, &client);
        outbox.on_disconnect();
        assert_eq!(texts(&outbox.resend), ["1", "3", "5"]);
        assert_eq!(outbox.in_flight(), 0);
    }

    #[test]
    fn a_message_over_which_connections_are_lost_again_and_again_is_given_up() {
        let (client, _eventloop) = client();
        let mut outbox = Outbox::default();
        let (publish, mut done) = publish("1", true);
        outbox.enqueue(publish, &client);
        for loss in 1..=LOSSES_MAX {
            outbox.sent(1, Instant::now());
            outbox.on_disconnect();
            let given_up = done.try_recv().is_ok_and(|result| result == Err(PublishError::Unsendable));
            assert_eq!(given_up, loss == LOSSES_MAX);
            if let Some(publish) = outbox.next() {
                outbox.handed_off.push_back(publish);
            }
        }
    }

    #[test]
    fn a_full_queue_of_the_client_loses_nothing() {
        let (client, _eventloop) = client();
        let mut outbox = Outbox::default();
        let waiting: Vec<_> = (0..12)
            .map(|number| {
                let (publish, done) = publish(&number.to_string(), true);
                outbox.enqueue(publish, &client);
                done
            })
            .collect();
        assert_eq!(outbox.in_flight(), 10);
        outbox.on_disconnect();
        assert_eq!(outbox.resend.len(), waiting.len());
    }
}
