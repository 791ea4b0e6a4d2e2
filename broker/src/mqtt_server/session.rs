//! The MQTT 3.1.1 state of one client from its CONNECT on: packets in, packets and actions out, no IO.
//!
//! Every session is a clean one: a client that reconnects subscribes again.

use std::collections::{BTreeSet, VecDeque};

use bytes::BytesMut;
use rumqttc::{
    Packet, PubAck, PubComp, PubRec, PubRel, Publish, QoS, SubAck, Subscribe, SubscribeReasonCode, UnsubAck,
    Unsubscribe,
};

use crate::mqtt_server::acl::{TopicAccess, TopicOperation};
use crate::mqtt_server::filter::{is_filter, is_topic};
use crate::mqtt_server::log::LogPosition;
use crate::mqtt_server::message::{PublishedMessage, lower_qos};
use crate::mqtt_server::quota::PACKET_COST;
use crate::mqtt_server::subscriptions::{ClientSubscriptions, GrantedSubscription, LEVELS_MAX};

/// The most messages in flight to a client; the next one waits for an acknowledgement. A second's worth of small ones at
/// 50 ms round-trip time.
const IN_FLIGHT_MAX: usize = 1_000;
/// The same for this broker's own connections, which must not be behind.
const IN_FLIGHT_OWN_MAX: usize = 10_000;
/// The most subscriptions of a client, and the most topics in a packet.
const FILTERS_MAX: usize = 1_000;
/// The longest filter, in bytes.
const FILTER_MAX: usize = 1_000;

/// An action that a session requires.
#[derive(Debug, PartialEq, Eq)]
pub enum SessionAction {
    /// To publish this.
    Publish(PublishedMessage),
    /// To read the log for it from now on, if that is not so.
    Subscribe,
    /// To log and count that the access rules deny it something.
    Deny {
        /// The denied operation.
        operation: TopicOperation,
        /// Its topic or filter.
        topic: String,
        /// It is the first denial of the session.
        is_first: bool,
    },
    /// To end the connection, as the client requested.
    Disconnect,
}

/// The client violates the protocol: the connection ends.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

const TOO_MANY: Violation = Violation("names too many topics in one packet");

/// Retained messages that a client still gets: those of `filter` behind `after`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedCursor {
    /// The filter it subscribed to.
    pub filter: String,
    /// The last topic that it got.
    pub after: Option<String>,
}

/// A client that is connected.
#[derive(Debug)]
pub struct ClientSession {
    access: TopicAccess,
    subscriptions: ClientSubscriptions,
    retained: VecDeque<RetainedCursor>,
    /// The messages that it has not acknowledged yet, how many these may be, and the identifier given last.
    inflight: BTreeSet<u16>,
    max_inflight: usize,
    last_pkid: u16,
    /// The messages of quality of service 2 that it has not released yet.
    exactly_once: BTreeSet<u16>,
    was_denied: bool,
}

impl ClientSession {
    /// A client with these rights, one of this broker itself or not.
    pub fn new(access: TopicAccess, is_own: bool) -> Self {
        Self {
            access,
            subscriptions: ClientSubscriptions::default(),
            retained: VecDeque::new(),
            inflight: BTreeSet::new(),
            max_inflight: if is_own { IN_FLIGHT_OWN_MAX } else { IN_FLIGHT_MAX },
            last_pkid: 0,
            exactly_once: BTreeSet::new(),
            was_denied: false,
        }
    }

    /// The server's time that a packet takes. An acknowledgement that is due was paid for by the publisher.
    pub fn work(&self, packet: &Packet) -> u64 {
        let topics = if let Packet::Subscribe(Subscribe { filters, .. }) = packet {
            filters.len()
        } else if let Packet::Unsubscribe(Unsubscribe { topics, .. }) = packet {
            topics.len()
        } else {
            0
        };
        let is_due = matches!(packet, Packet::PubAck(PubAck { pkid }) if self.inflight.contains(pkid));
        if is_due { 0 } else { PACKET_COST * (1 + topics as u64) }
    }

    /// Takes a packet, and answers it at the end of `output`. A subscription gets the messages that are published
    /// behind `log_end`.
    pub fn take(
        &mut self,
        packet: Packet,
        log_end: LogPosition,
        output: &mut BytesMut,
    ) -> Result<Vec<SessionAction>, Violation> {
        match packet {
            Packet::Publish(publish) => self.publish(publish, output),
            Packet::PubRel(PubRel { pkid }) => {
                self.exactly_once.remove(&pkid);
                put(&Packet::PubComp(PubComp { pkid }), output);
                Ok(Vec::new())
            }
            Packet::PubAck(PubAck { pkid }) => {
                self.inflight.remove(&pkid);
                Ok(Vec::new())
            }
            Packet::Subscribe(Subscribe { filters, .. }) if filters.len() > FILTERS_MAX => Err(TOO_MANY),
            Packet::Unsubscribe(Unsubscribe { topics, .. }) if topics.len() > FILTERS_MAX => Err(TOO_MANY),
            Packet::Subscribe(subscribe) => Ok(self.subscribe(subscribe, log_end, output)),
            Packet::Unsubscribe(unsubscribe) => {
                self.unsubscribe(unsubscribe, output);
                Ok(Vec::new())
            }
            Packet::PingReq => {
                put(&Packet::PingResp, output);
                Ok(Vec::new())
            }
            Packet::Disconnect => Ok(vec![SessionAction::Disconnect]),
            Packet::Connect(_) => Err(Violation("connects twice")),
            Packet::ConnAck(_)
            | Packet::PubRec(_)
            | Packet::PubComp(_)
            | Packet::SubAck(_)
            | Packet::UnsubAck(_)
            | Packet::PingResp => Err(Violation("sends what a server sends")),
        }
    }

    fn unsubscribe(&mut self, Unsubscribe { pkid, topics }: Unsubscribe, output: &mut BytesMut) {
        for topic in &topics {
            self.subscriptions.remove(topic);
        }
        self.end_retained(&topics.iter().map(String::as_str).collect());
        put(&Packet::UnsubAck(UnsubAck { pkid }), output);
    }

    fn publish(&mut self, publish: Publish, output: &mut BytesMut) -> Result<Vec<SessionAction>, Violation> {
        if !is_topic(&publish.topic) {
            return Err(Violation("publishes on no topic"));
        }
        let pkid = publish.pkid;
        let is_new = match publish.qos {
            QoS::AtMostOnce => true,
            QoS::AtLeastOnce => {
                put(&Packet::PubAck(PubAck { pkid }), output);
                true
            }
            QoS::ExactlyOnce => {
                put(&Packet::PubRec(PubRec { pkid }), output);
                self.exactly_once.insert(pkid)
            }
        };
        if !self.access.can_publish(&publish.topic) {
            return Ok(vec![self.deny(TopicOperation::Publish, publish.topic)]);
        }
        Ok(is_new.then(|| SessionAction::Publish(publish.into())).into_iter().collect())
    }

    fn subscribe(&mut self, subscribe: Subscribe, since: LogPosition, output: &mut BytesMut) -> Vec<SessionAction> {
        let mut actions = vec![SessionAction::Subscribe];
        let mut codes = Vec::with_capacity(subscribe.filters.len());
        let mut granted = Vec::new();
        for filter in subscribe.filters {
            let (path, qos) = (filter.path, lower_qos(filter.qos, QoS::AtLeastOnce));
            let is_valid = is_filter(&path) && path.len() <= FILTER_MAX && path.split('/').nth(LEVELS_MAX).is_none();
            let has_place = self.subscriptions.len() < FILTERS_MAX || self.subscriptions.contains(&path);
            if is_valid && !self.access.can_subscribe(&path) {
                actions.push(self.deny(TopicOperation::Subscribe, path));
                codes.push(SubscribeReasonCode::Failure);
            } else if is_valid && has_place {
                self.subscriptions.insert(&path, GrantedSubscription { qos, since });
                granted.push(path);
                codes.push(SubscribeReasonCode::Success(qos));
            } else {
                codes.push(SubscribeReasonCode::Failure);
            }
        }
        self.begin_retained(&granted);
        put(&Packet::SubAck(SubAck::new(subscribe.pkid, codes)), output);
        actions
    }

    /// The retained messages of these filters are sent, each once, behind those of earlier filters; from the beginning if
    /// they were being sent.
    fn begin_retained(&mut self, filters: &[String]) {
        let mut begun = BTreeSet::new();
        self.end_retained(&filters.iter().map(String::as_str).collect());
        for filter in filters {
            if begun.insert(filter.as_str()) {
                self.retained.push_back(RetainedCursor { filter: filter.clone(), after: None });
            }
        }
    }

    fn end_retained(&mut self, filters: &BTreeSet<&str>) {
        self.retained.retain(|cursor| !filters.contains(cursor.filter.as_str()));
    }

    fn deny(&mut self, operation: TopicOperation, topic: String) -> SessionAction {
        SessionAction::Deny { operation, topic, is_first: !std::mem::replace(&mut self.was_denied, true) }
    }

    /// Whether it had subscribed to a filter that has `topic` when a message was published there, at a position of the log.
    /// The router may forward that later than it takes a subscription.
    pub fn had_subscribed(&self, topic: &str, at: LogPosition) -> bool {
        self.subscriptions.granted(topic).is_some_and(|subscription| subscription.since <= at)
    }

    /// How many messages may be sent to it now.
    pub fn room(&self) -> usize {
        self.max_inflight - self.inflight.len()
    }

    /// The retained messages that it gets before any other message.
    pub fn next_retained(&self) -> Option<&RetainedCursor> {
        self.retained.front()
    }

    /// It got the retained messages of the first filter up to `after`; all of them if there is none.
    pub fn advance_retained(&mut self, after: Option<String>) {
        if after.is_none() && !self.retained.is_empty() {
            self.retained.pop_front();
        } else if let Some(cursor) = self.retained.front_mut() {
            cursor.after = after;
        }
    }

    /// Sends it a message, with the lower quality of service of publisher and subscription, if it has subscribed to it.
    pub fn deliver(&mut self, message: PublishedMessage, output: &mut BytesMut) {
        let Some(granted) = self.subscriptions.granted(&message.topic) else { return };
        let qos = lower_qos(granted.qos, message.qos);
        let pkid = if qos == QoS::AtMostOnce { 0 } else { self.next_identifier() };
        let PublishedMessage { topic, payload, retain, .. } = message;
        put(&Packet::Publish(Publish { dup: false, qos, retain, topic, pkid, payload }), output);
    }

    fn next_identifier(&mut self) -> u16 {
        loop {
            self.last_pkid = self.last_pkid.checked_add(1).unwrap_or(1);
            if self.inflight.insert(self.last_pkid) {
                return self.last_pkid;
            }
        }
    }
}

/// Writing fails only for a packet above the limit, which no packet reaches.
fn put(packet: &Packet, output: &mut BytesMut) {
    let _ = packet.write(output, usize::MAX);
}

#[cfg(test)]
mod tests;
