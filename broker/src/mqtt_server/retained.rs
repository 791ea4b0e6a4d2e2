//! The retained messages, and the wills of clients that are connected: the state that survives a restart.
//!
//! A will that is here when the server starts is that of a client whose connection ended with the server. It is due.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use rumqttc::QoS;

use crate::mqtt_server::filter::{matches, prefix};
use crate::mqtt_server::message::PublishedMessage;

/// The most topics with a retained message.
pub(super) const TOPICS_MAX: usize = 100_000;
/// The most bytes of topics and payloads that are retained.
const BYTES_MAX: usize = 64 << 20;
/// The fraction of both that one user may fill (one divided by it), so that it keeps no other user's messages out.
pub(super) const PER_USER_FRACTION: usize = 20;
/// The most topics that one search compares, so that it does not delay others.
const SCAN_LIMIT: u64 = 2_000;
/// The most changes that wait for the disk; beyond them everything is written again.
const CHANGES_MAX: usize = 200_000;

/// The retained message of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetainedMessage {
    /// Its payload.
    pub payload: Bytes,
    /// The quality of service that it was published with.
    pub qos: QoS,
    /// The user that published it, if that is known.
    pub by: Option<Arc<str>>,
}

/// A message is not retained, as there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetainedFull;

/// Some of the retained messages of a filter.
#[derive(Debug)]
pub struct RetainedPage {
    /// The messages.
    pub messages: Vec<PublishedMessage>,
    /// Behind which topic to go on, if there may be more.
    pub after: Option<String>,
    /// How many topics were compared for that.
    pub scanned: u64,
    /// The bytes of the messages' topics and payloads.
    pub bytes: usize,
}

/// All retained messages and wills.
#[derive(Debug, Default)]
pub struct RetainedMessages {
    messages: BTreeMap<String, RetainedMessage>,
    all: Size,
    of_users: BTreeMap<Arc<str>, Size>,
    wills: BTreeMap<String, PublishedMessage>,
    changes: RetainedChanges,
}

/// How much is retained.
#[derive(Debug, Default, Clone, Copy)]
struct Size {
    topics: usize,
    bytes: usize,
}

/// The changes that are not on disk yet.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct RetainedChanges {
    /// The topics of messages that were added, changed or deleted.
    pub topics: BTreeSet<String>,
    /// The clients whose wills did.
    pub clients: BTreeSet<String>,
    /// All that is on disk is to be deleted first.
    pub needs_full_write: bool,
}

/// The changes to be written: each with its current value, none if it was deleted.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Unwritten {
    /// By topic.
    pub messages: Vec<(String, Option<RetainedMessage>)>,
    /// By client.
    pub wills: Vec<(String, Option<PublishedMessage>)>,
    /// All that is on disk is to be deleted first.
    pub needs_full_write: bool,
}

impl RetainedMessage {
    fn size(&self, topic: &str) -> usize {
        topic.len() + self.payload.len()
    }
}

impl RetainedMessages {
    /// As it was when the server ended, with the wills that are due.
    pub fn restored(
        messages: impl IntoIterator<Item = (String, RetainedMessage)>,
        wills: BTreeMap<String, PublishedMessage>,
    ) -> Self {
        let mut retained = Self::default();
        for (topic, kept) in messages {
            let _ = retained.put(topic, kept);
        }
        retained.changes = RetainedChanges { clients: wills.keys().cloned().collect(), ..RetainedChanges::default() };
        for will in wills.into_values().filter(|will| will.retain) {
            let by = retained.messages.get(&will.topic).and_then(|before| before.by.clone());
            let _ = retained.store(&will, by.as_deref());
        }
        retained
    }

    /// How many topics have a message.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Retains a message in place of the one on its topic; an empty one deletes that.
    pub fn store(&mut self, message: &PublishedMessage, by: Option<&str>) -> Result<(), RetainedFull> {
        if message.payload.is_empty() {
            if self.take(&message.topic).is_some() {
                self.changed(|changes| changes.topics.insert(message.topic.clone()));
            }
            return Ok(());
        }
        let by = by.map(|user| self.of_users.get_key_value(user).map_or_else(|| user.into(), |(user, _)| user.clone()));
        self.put(message.topic.clone(), RetainedMessage { payload: message.payload.clone(), qos: message.qos, by })?;
        self.changed(|changes| changes.topics.insert(message.topic.clone()));
        Ok(())
    }

    fn put(&mut self, topic: String, kept: RetainedMessage) -> Result<(), RetainedFull> {
        let before = self.take(&topic);
        let size = kept.size(&topic);
        let of_user = kept.by.as_ref().and_then(|user| self.of_users.get(user)).copied().unwrap_or_default();
        let fits = self.all.has_room(size, 1) && (kept.by.is_none() || of_user.has_room(size, PER_USER_FRACTION));
        match (fits, before) {
            (true, _) => self.place(topic, kept),
            (false, Some(before)) => self.place(topic, before),
            (false, None) => {}
        }
        if fits { Ok(()) } else { Err(RetainedFull) }
    }

    fn place(&mut self, topic: String, kept: RetainedMessage) {
        let size = kept.size(&topic);
        self.all.add(size);
        if let Some(user) = &kept.by {
            self.of_users.entry(user.clone()).or_default().add(size);
        }
        self.messages.insert(topic, kept);
    }

    fn take(&mut self, topic: &str) -> Option<RetainedMessage> {
        let kept = self.messages.remove(topic)?;
        let size = kept.size(topic);
        self.all.remove(size);
        if let Some(user) = &kept.by
            && let Some(of_user) = self.of_users.get_mut(user)
        {
            of_user.remove(size);
            if of_user.topics == 0 {
                self.of_users.remove(user);
            }
        }
        Some(kept)
    }

    /// The next messages of `filter` behind the topic `after`, at most so many, and as many as have so many bytes.
    pub fn find(&self, filter: &str, after: Option<&str>, (most, most_bytes): (usize, usize)) -> RetainedPage {
        let begin = prefix(filter);
        let from = after.map_or(Bound::Included(begin), Bound::Excluded);
        let mut found = RetainedPage { messages: Vec::new(), after: None, scanned: 1, bytes: 0 };
        let range = self.messages.range::<str, _>((from, Bound::Unbounded));
        for (topic, kept) in range.take_while(|(topic, _)| topic.starts_with(begin)) {
            if matches(filter, topic) {
                found.bytes += kept.size(topic);
                let RetainedMessage { payload, qos, .. } = kept.clone();
                found.messages.push(PublishedMessage { topic: topic.clone(), payload, qos, retain: true });
            }
            found.scanned += 1;
            if found.messages.len() >= most || found.bytes >= most_bytes || found.scanned > SCAN_LIMIT {
                found.after = Some(topic.clone());
                break;
            }
        }
        found
    }

    /// The message to be published when the connection of `client` is lost.
    pub fn set_will(&mut self, client: &str, will: PublishedMessage) {
        self.wills.insert(client.to_owned(), will);
        self.changed(|changes| changes.clients.insert(client.to_owned()));
    }

    /// Deletes the will of `client`; returns it.
    pub fn clear_will(&mut self, client: &str) -> Option<PublishedMessage> {
        let will = self.wills.remove(client)?;
        self.changed(|changes| changes.clients.insert(client.to_owned()));
        Some(will)
    }

    fn changed(&mut self, note: impl FnOnce(&mut RetainedChanges) -> bool) {
        if self.changes.needs_full_write {
            return;
        }
        note(&mut self.changes);
        if self.changes.topics.len() + self.changes.clients.len() > CHANGES_MAX {
            self.changes = RetainedChanges { needs_full_write: true, ..RetainedChanges::default() };
        }
    }

    /// Takes the changes since the last call, with their current values.
    pub fn take_unwritten(&mut self) -> Unwritten {
        let RetainedChanges { topics, clients, needs_full_write } = std::mem::take(&mut self.changes);
        if needs_full_write {
            let messages = self.messages.iter().map(|(topic, kept)| (topic.clone(), Some(kept.clone())));
            let wills = self.wills.iter().map(|(client, will)| (client.clone(), Some(will.clone())));
            return Unwritten { messages: messages.collect(), wills: wills.collect(), needs_full_write };
        }
        let messages = topics.into_iter().map(|topic| {
            let kept = self.messages.get(&topic).cloned();
            (topic, kept)
        });
        let wills = clients.into_iter().map(|client| {
            let will = self.wills.get(&client).cloned();
            (client, will)
        });
        Unwritten { messages: messages.collect(), wills: wills.collect(), needs_full_write }
    }

    /// Takes back changes that could not be written; next time their values of then are written.
    pub fn requeue(&mut self, unwritten: Unwritten) {
        if unwritten.needs_full_write {
            self.require_full_write();
        }
        for (topic, _) in unwritten.messages {
            self.changed(|changes| changes.topics.insert(topic));
        }
        for (client, _) in unwritten.wills {
            self.changed(|changes| changes.clients.insert(client));
        }
    }

    /// Everything is to be written again, as to a new file.
    pub fn require_full_write(&mut self) {
        self.changes = RetainedChanges { needs_full_write: true, ..RetainedChanges::default() };
    }
}

impl Size {
    /// Whether another topic with so many bytes fits that part of everything.
    fn has_room(self, bytes: usize, part: usize) -> bool {
        self.topics < TOPICS_MAX / part && self.bytes + bytes <= BYTES_MAX / part
    }

    fn add(&mut self, bytes: usize) {
        self.topics += 1;
        self.bytes += bytes;
    }

    fn remove(&mut self, bytes: usize) {
        self.topics -= 1;
        self.bytes -= bytes;
    }
}

impl Unwritten {
    /// Nothing is to be written.
    pub fn is_empty(&self) -> bool {
        !self.needs_full_write && self.messages.is_empty() && self.wills.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(retained: &RetainedMessages, filter: &str, max: usize) -> Vec<(String, String)> {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let RetainedPage { messages: some, after: next, .. } =
                retained.find(filter, after.as_deref(), (max, 1_000_000));
            assert!(some.len() <= max && some.iter().all(|message| message.retain));
            let text =
                |message: PublishedMessage| (message.topic, String::from_utf8(message.payload.to_vec()).unwrap());
            found.extend(some.into_iter().map(text));
            match next {
                Some(_) => after = next,
                None => return found,
            }
        }
    }

    #[test]
    fn the_last_message_of_a_topic_is_kept_and_an_empty_one_takes_it_away() {
        let mut retained = RetainedMessages::default();
        for (topic, payload) in [("a/b", "1"), ("a", "2"), ("ab", "3"), ("a/b", "4"), ("a/c", "5"), ("a/c", "")] {
            retained.store(&PublishedMessage::to_retain(topic, payload), None).unwrap();
        }
        let text = |pairs: &[(&str, &str)]| -> Vec<_> { pairs.iter().map(|&(a, b)| (a.into(), b.into())).collect() };
        assert_eq!(all(&retained, "a/#", 1), text(&[("a", "2"), ("a/b", "4")]));
        assert_eq!(all(&retained, "+", 10), text(&[("a", "2"), ("ab", "3")]));
        assert_eq!(all(&retained, "a/b", 10), text(&[("a/b", "4")]));
        assert_eq!(retained.len(), 3);
    }

    #[test]
    fn thousands_are_found_in_parts() {
        let mut retained = RetainedMessages::default();
        for n in 0..5000 {
            retained.store(&PublishedMessage::to_retain(&format!("t/{n:04}/x"), "1"), None).unwrap();
            retained.store(&PublishedMessage::to_retain(&format!("t/{n:04}/y"), "1"), None).unwrap();
        }
        assert_eq!(all(&retained, "t/+/y", 100).len(), 5000);
        assert_eq!(all(&retained, "t/+/z", 100).len(), 0);
        let found = retained.find("t/#", None, (100, 20));
        assert_eq!(found.messages.len(), 3, "no more than 20 bytes and one message");
        assert_eq!((found.after.as_deref(), found.scanned, found.bytes), (Some("t/0001/x"), 4, 27));
    }

    #[test]
    fn beyond_the_bounds_new_topics_are_refused_and_retained_ones_may_change() {
        let mut retained = RetainedMessages::default();
        for n in 0..TOPICS_MAX {
            retained.store(&PublishedMessage::to_retain(&n.to_string(), "1"), None).unwrap();
        }
        assert_eq!(retained.store(&PublishedMessage::to_retain("one more", "1"), None), Err(RetainedFull));
        retained.store(&PublishedMessage::to_retain("7", "2"), None).unwrap();
        retained.store(&PublishedMessage::to_retain("8", ""), None).unwrap();
        retained.store(&PublishedMessage::to_retain("one more", "1"), None).unwrap();
        let large = "x".repeat(BYTES_MAX);
        assert_eq!(retained.store(&PublishedMessage::to_retain("7", &large), None), Err(RetainedFull));
        assert_eq!(all(&retained, "7", 1), [("7".into(), "2".into())]);
    }

    #[test]
    fn a_user_that_retains_all_it_may_keeps_no_other_user_out() {
        let mut retained = RetainedMessages::default();
        let kept = (0..TOPICS_MAX)
            .filter(|n| retained.store(&PublishedMessage::to_retain(&format!("gw1/{n}"), "1"), Some("gw1")).is_ok());
        assert_eq!(kept.count(), TOPICS_MAX / PER_USER_FRACTION);
        retained.store(&PublishedMessage::to_retain("gw2/status", "1"), Some("gw2")).unwrap();
        retained.store(&PublishedMessage::to_retain("gw1/0", "2"), Some("gw1")).unwrap();
        retained.store(&PublishedMessage::to_retain("gw1/1", ""), Some("gw1")).unwrap();
        retained.store(&PublishedMessage::to_retain("gw1/more", "1"), Some("gw1")).unwrap();
        assert_eq!(retained.store(&PublishedMessage::to_retain("gw1/one more", "1"), Some("gw1")), Err(RetainedFull));
        retained.store(&PublishedMessage::to_retain("gw1/2", "1"), Some("b1")).unwrap();
        retained.store(&PublishedMessage::to_retain("gw1/one more", "1"), Some("gw1")).unwrap();
        let large = "x".repeat(BYTES_MAX / PER_USER_FRACTION);
        assert_eq!(retained.store(&PublishedMessage::to_retain("gw2/status", &large), Some("gw2")), Err(RetainedFull));
        assert_eq!(all(&retained, "gw2/status", 1), [("gw2/status".into(), "1".into())], "what was there stays");
    }

    #[test]
    fn a_will_found_at_the_start_is_due() {
        let mut before = RetainedMessages::default();
        before.store(&PublishedMessage::to_retain("gw1/status", "1"), None).unwrap();
        before.store(&PublishedMessage::to_retain("gw2/status", "1"), None).unwrap();
        before.set_will("gw1", PublishedMessage::to_retain("gw1/status", "0"));
        before.set_will("gw2", PublishedMessage::to_retain("gw2/status", "0"));
        assert_eq!(before.clear_will("gw2"), Some(PublishedMessage::to_retain("gw2/status", "0")));
        let Unwritten { messages, wills, .. } = before.take_unwritten();
        let messages = messages.into_iter().filter_map(|(topic, kept)| Some((topic, kept?)));
        let wills = wills.into_iter().filter_map(|(client, will)| Some((client, will?)));
        let mut after = RetainedMessages::restored(messages, wills.collect());
        let text = |pairs: [(&str, &str); 2]| pairs.map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(all(&after, "#", 9), text([("gw1/status", "0"), ("gw2/status", "1")]));
        let unwritten = after.take_unwritten();
        assert_eq!(unwritten.wills, [("gw1".to_owned(), None)], "it is due once");
        assert_eq!(unwritten.messages.len(), 1);
    }

    #[test]
    fn changes_that_cannot_be_written_are_bounded() {
        let mut retained = RetainedMessages::default();
        for n in 0..=CHANGES_MAX {
            retained.store(&PublishedMessage::to_retain(&n.to_string(), "1"), None).unwrap_or_default();
            retained.store(&PublishedMessage::to_retain(&n.to_string(), ""), None).unwrap();
        }
        assert_eq!(retained.changes, RetainedChanges { needs_full_write: true, ..RetainedChanges::default() });
        assert!(retained.take_unwritten().needs_full_write && retained.take_unwritten().is_empty());
    }

    proptest! {
        #[test]
        fn the_changes_lead_from_one_state_to_the_next(
            steps in prop::collection::vec(("[ab]", "[01]?", any::<bool>(), any::<bool>()), 0..40),
        ) {
            let (mut retained, mut written) = (RetainedMessages::default(), BTreeMap::new());
            for (topic, payload, writes, fails) in steps {
                retained.store(&PublishedMessage::to_retain(&topic, &payload), None).unwrap();
                if writes {
                    let unwritten = retained.take_unwritten();
                    if fails {
                        retained.requeue(unwritten);
                        continue;
                    }
                    for (topic, kept) in unwritten.messages {
                        match kept {
                            Some(kept) => drop(written.insert(topic, kept)),
                            None => drop(written.remove(&topic)),
                        }
                    }
                    prop_assert_eq!(&written, &retained.messages);
                }
            }
        }
    }
}
