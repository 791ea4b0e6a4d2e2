//! What one client may and gets (MQTT 3.1.1), from its CONNECT on: packets in, packets and deeds out, no IO.
//!
//! Every session is a clean one: who comes back subscribes again.

use std::collections::{BTreeMap, BTreeSet};

use bytes::BytesMut;
use rumqttc::{
    Packet, PubAck, PubComp, PubRec, PubRel, Publish, QoS, SubAck, Subscribe, SubscribeReasonCode, UnsubAck,
    Unsubscribe,
};

use super::filter::{is_filter, is_topic, matches};
use super::message::{Message, lower};
use crate::access::{Access, Verb};

/// So many messages are under way to a client at most; the next one waits for an acknowledgement.
const INFLIGHT: usize = 100;
/// So many subscriptions a client has at most.
const FILTERS: usize = 1_000;
/// The longest filter, in bytes.
const FILTER_MAX: usize = 1_000;

/// What has to be done for a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Deed {
    /// To say this.
    Say(Message),
    /// To listen for it from now on, if that is not so.
    Listen,
    /// To tell that it wanted what it may not.
    Forbid {
        /// What it wanted to do.
        verb: Verb,
        /// With which topic or filter.
        topic: String,
        /// It did not before.
        is_first: bool,
    },
    /// To end the connection, as it asked for.
    End,
}

/// The client does what no client may: the connection ends.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

/// Kept messages that a client still gets: those of `filter` behind `after`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backlog {
    /// The filter it subscribed to.
    pub filter: String,
    /// The last topic that it got.
    pub after: Option<String>,
}

/// A client that is connected.
#[derive(Debug)]
pub struct Session {
    access: Access,
    filters: BTreeMap<String, QoS>,
    backlog: Vec<Backlog>,
    /// What it has not acknowledged yet, and the identifier given last.
    inflight: BTreeSet<u16>,
    last: u16,
    /// What it said exactly once, and has not let go yet.
    exactly_once: BTreeSet<u16>,
    was_forbidden: bool,
}

impl Session {
    /// A client that may do this.
    pub fn new(access: Access) -> Self {
        Self {
            access,
            filters: BTreeMap::new(),
            backlog: Vec::new(),
            inflight: BTreeSet::new(),
            last: 0,
            exactly_once: BTreeSet::new(),
            was_forbidden: false,
        }
    }

    /// Takes a packet, and answers it at the end of `output`.
    pub fn take(&mut self, packet: Packet, output: &mut BytesMut) -> Result<Vec<Deed>, Violation> {
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
            Packet::Subscribe(subscribe) => Ok(self.subscribe(subscribe, output)),
            Packet::Unsubscribe(Unsubscribe { pkid, topics }) => {
                self.filters.retain(|filter, _| !topics.contains(filter));
                self.backlog.retain(|backlog| !topics.contains(&backlog.filter));
                put(&Packet::UnsubAck(UnsubAck { pkid }), output);
                Ok(Vec::new())
            }
            Packet::PingReq => {
                put(&Packet::PingResp, output);
                Ok(Vec::new())
            }
            Packet::Disconnect => Ok(vec![Deed::End]),
            Packet::Connect(_) => Err(Violation("connects twice")),
            Packet::ConnAck(_)
            | Packet::PubRec(_)
            | Packet::PubComp(_)
            | Packet::SubAck(_)
            | Packet::UnsubAck(_)
            | Packet::PingResp => Err(Violation("sends what a server sends")),
        }
    }

    fn publish(&mut self, publish: Publish, output: &mut BytesMut) -> Result<Vec<Deed>, Violation> {
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
        if !self.access.may_say(&publish.topic) {
            return Ok(vec![self.forbid(Verb::Say, publish.topic)]);
        }
        Ok(is_new.then(|| Deed::Say(publish.into())).into_iter().collect())
    }

    fn subscribe(&mut self, subscribe: Subscribe, output: &mut BytesMut) -> Vec<Deed> {
        let mut deeds = vec![Deed::Listen];
        let mut codes = Vec::with_capacity(subscribe.filters.len());
        for filter in subscribe.filters {
            let (path, qos) = (filter.path, lower(filter.qos, QoS::AtLeastOnce));
            let has_place = self.filters.contains_key(&path) || self.filters.len() < FILTERS;
            if is_filter(&path) && path.len() <= FILTER_MAX && !self.access.may_hear(&path) {
                deeds.push(self.forbid(Verb::Hear, path));
                codes.push(SubscribeReasonCode::Failure);
            } else if is_filter(&path) && path.len() <= FILTER_MAX && has_place {
                self.backlog.retain(|backlog| backlog.filter != path);
                self.backlog.push(Backlog { filter: path.clone(), after: None });
                self.filters.insert(path, qos);
                codes.push(SubscribeReasonCode::Success(qos));
            } else {
                codes.push(SubscribeReasonCode::Failure);
            }
        }
        put(&Packet::SubAck(SubAck::new(subscribe.pkid, codes)), output);
        deeds
    }

    fn forbid(&mut self, verb: Verb, topic: String) -> Deed {
        Deed::Forbid { verb, topic, is_first: !std::mem::replace(&mut self.was_forbidden, true) }
    }

    /// Whether it subscribed to a filter that has `topic`.
    pub fn wants(&self, topic: &str) -> bool {
        self.filters.keys().any(|filter| matches(filter, topic))
    }

    /// How many messages may be sent to it now.
    pub fn room(&self) -> usize {
        INFLIGHT - self.inflight.len()
    }

    /// What it gets before anything else.
    pub fn backlog(&self) -> Option<&Backlog> {
        self.backlog.first()
    }

    /// It got the backlog's messages up to `after`; all of them if there is none.
    pub fn went_on(&mut self, after: Option<String>) {
        if after.is_none() && !self.backlog.is_empty() {
            self.backlog.remove(0);
        } else if let Some(backlog) = self.backlog.first_mut() {
            backlog.after = after;
        }
    }

    /// Sends it a message, with the lower quality of those that it was said with and subscribed to, if it wants it.
    pub fn deliver(&mut self, message: Message, output: &mut BytesMut) {
        let fitting = self.filters.iter().filter(|(filter, _)| matches(filter, &message.topic));
        let Some(granted) = fitting.map(|(_, qos)| *qos).reduce(higher) else { return };
        let qos = lower(granted, message.qos);
        let pkid = if qos == QoS::AtMostOnce { 0 } else { self.next_identifier() };
        let Message { topic, payload, retain, .. } = message;
        put(&Packet::Publish(Publish { dup: false, qos, retain, topic, pkid, payload }), output);
    }

    fn next_identifier(&mut self) -> u16 {
        loop {
            self.last = self.last.checked_add(1).unwrap_or(1);
            if self.inflight.insert(self.last) {
                return self.last;
            }
        }
    }
}

fn higher(one: QoS, other: QoS) -> QoS {
    if one > other { one } else { other }
}

/// Only packets that are too large cannot be written, and no one is as large as may be.
fn put(packet: &Packet, output: &mut BytesMut) {
    let _ = packet.write(output, usize::MAX);
}

#[cfg(test)]
mod tests;
