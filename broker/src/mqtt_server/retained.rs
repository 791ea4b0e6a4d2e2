//! What is kept for who subscribes later, and the last wills of who is connected: the state that survives a restart.
//!
//! A will that stands here when the server starts is that of somebody whose connection ended with the server. It is due.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use rumqttc::QoS;

use crate::mqtt_server::filter::{matches, prefix};
use crate::mqtt_server::message::Message;

/// So many topics have a message kept at most.
pub(super) const TOPICS: usize = 100_000;
/// So many bytes of topics and payloads are kept at most.
const BYTES: usize = 64 << 20;
/// One user has this part of both at most, so that nobody keeps another's messages out.
pub(super) const SHARE: usize = 20;
/// So many topics are looked at in one go, lest others wait.
const LOOKED_AT: u64 = 2_000;
/// Beyond so many changes that could not be written, everything is to be written again.
const CHANGES: usize = 200_000;

/// A payload and the quality it was said with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// What was said.
    pub payload: Bytes,
    /// How it was said.
    pub qos: QoS,
    /// Which user said it, if that is known.
    pub by: Option<Arc<str>>,
}

/// Why a message is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Some of what is kept for a filter.
#[derive(Debug)]
pub struct Found {
    /// The messages.
    pub messages: Vec<Message>,
    /// Behind which topic to go on, if there may be more.
    pub after: Option<String>,
    /// How many topics were looked at for that.
    pub looked_at: u64,
    /// The bytes of the messages' topics and payloads.
    pub bytes: usize,
}

/// Everything kept.
#[derive(Debug, Default)]
pub struct Retained {
    messages: BTreeMap<String, Kept>,
    all: Size,
    of_users: BTreeMap<Arc<str>, Size>,
    wills: BTreeMap<String, Message>,
    changes: Changes,
}

/// How much is kept.
#[derive(Debug, Default, Clone, Copy)]
struct Size {
    topics: usize,
    bytes: usize,
}

/// What is not on disk yet.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The topics of messages that came, changed or went.
    pub topics: BTreeSet<String>,
    /// The clients whose wills did.
    pub clients: BTreeSet<String>,
    /// All that is on disk is to go first.
    pub anew: bool,
}

/// What is to be written: each with what it is now, none if it is gone.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// By topic.
    pub messages: Vec<(String, Option<Kept>)>,
    /// By client.
    pub wills: Vec<(String, Option<Message>)>,
    /// All that is on disk is to go first.
    pub anew: bool,
}

impl Kept {
    fn size(&self, topic: &str) -> usize {
        topic.len() + self.payload.len()
    }
}

impl Retained {
    /// As it was when the server ended, with the wills that are due.
    pub fn restored(messages: impl IntoIterator<Item = (String, Kept)>, wills: BTreeMap<String, Message>) -> Self {
        let mut retained = Self::default();
        for (topic, kept) in messages {
            let _ = retained.put(topic, kept);
        }
        retained.changes = Changes { clients: wills.keys().cloned().collect(), ..Changes::default() };
        for will in wills.into_values().filter(|will| will.retain) {
            let by = retained.messages.get(&will.topic).and_then(|before| before.by.clone());
            let _ = retained.keep(&will, by.as_deref());
        }
        retained
    }

    /// How many topics have a message.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Keeps a message in place of the one on its topic; an empty one takes that away.
    pub fn keep(&mut self, message: &Message, by: Option<&str>) -> Result<(), Full> {
        if message.payload.is_empty() {
            if self.take(&message.topic).is_some() {
                self.changed(|changes| changes.topics.insert(message.topic.clone()));
            }
            return Ok(());
        }
        let by = by.map(|user| self.of_users.get_key_value(user).map_or_else(|| user.into(), |(user, _)| user.clone()));
        self.put(message.topic.clone(), Kept { payload: message.payload.clone(), qos: message.qos, by })?;
        self.changed(|changes| changes.topics.insert(message.topic.clone()));
        Ok(())
    }

    fn put(&mut self, topic: String, kept: Kept) -> Result<(), Full> {
        let before = self.take(&topic);
        let size = kept.size(&topic);
        let of_user = kept.by.as_ref().and_then(|user| self.of_users.get(user)).copied().unwrap_or_default();
        let fits = self.all.has_room(size, 1) && (kept.by.is_none() || of_user.has_room(size, SHARE));
        match (fits, before) {
            (true, _) => self.place(topic, kept),
            (false, Some(before)) => self.place(topic, before),
            (false, None) => {}
        }
        if fits { Ok(()) } else { Err(Full) }
    }

    fn place(&mut self, topic: String, kept: Kept) {
        let size = kept.size(&topic);
        self.all.add(size);
        if let Some(user) = &kept.by {
            self.of_users.entry(user.clone()).or_default().add(size);
        }
        self.messages.insert(topic, kept);
    }

    fn take(&mut self, topic: &str) -> Option<Kept> {
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
    pub fn find(&self, filter: &str, after: Option<&str>, (most, most_bytes): (usize, usize)) -> Found {
        let begin = prefix(filter);
        let from = after.map_or(Bound::Included(begin), Bound::Excluded);
        let mut found = Found { messages: Vec::new(), after: None, looked_at: 1, bytes: 0 };
        let range = self.messages.range::<str, _>((from, Bound::Unbounded));
        for (topic, kept) in range.take_while(|(topic, _)| topic.starts_with(begin)) {
            if matches(filter, topic) {
                found.bytes += kept.size(topic);
                let Kept { payload, qos, .. } = kept.clone();
                found.messages.push(Message { topic: topic.clone(), payload, qos, retain: true });
            }
            found.looked_at += 1;
            if found.messages.len() >= most || found.bytes >= most_bytes || found.looked_at > LOOKED_AT {
                found.after = Some(topic.clone());
                break;
            }
        }
        found
    }

    /// What is to be said when the connection of `client` is lost.
    pub fn promise(&mut self, client: &str, will: Message) {
        self.wills.insert(client.to_owned(), will);
        self.changed(|changes| changes.clients.insert(client.to_owned()));
    }

    /// Takes the promise back.
    pub fn release(&mut self, client: &str) -> Option<Message> {
        let will = self.wills.remove(client)?;
        self.changed(|changes| changes.clients.insert(client.to_owned()));
        Some(will)
    }

    fn changed(&mut self, note: impl FnOnce(&mut Changes) -> bool) {
        if self.changes.anew {
            return;
        }
        note(&mut self.changes);
        if self.changes.topics.len() + self.changes.clients.len() > CHANGES {
            self.changes = Changes { anew: true, ..Changes::default() };
        }
    }

    /// What changed since the last time, as it is now.
    pub fn snapshot(&mut self) -> Snapshot {
        let Changes { topics, clients, anew } = std::mem::take(&mut self.changes);
        if anew {
            let messages = self.messages.iter().map(|(topic, kept)| (topic.clone(), Some(kept.clone())));
            let wills = self.wills.iter().map(|(client, will)| (client.clone(), Some(will.clone())));
            return Snapshot { messages: messages.collect(), wills: wills.collect(), anew };
        }
        let messages = topics.into_iter().map(|topic| {
            let kept = self.messages.get(&topic).cloned();
            (topic, kept)
        });
        let wills = clients.into_iter().map(|client| {
            let will = self.wills.get(&client).cloned();
            (client, will)
        });
        Snapshot { messages: messages.collect(), wills: wills.collect(), anew }
    }

    /// Takes back what could not be written; it is written as it is next time.
    pub fn give_back(&mut self, unwritten: Snapshot) {
        if unwritten.anew {
            self.begin_anew();
        }
        for (topic, _) in unwritten.messages {
            self.changed(|changes| changes.topics.insert(topic));
        }
        for (client, _) in unwritten.wills {
            self.changed(|changes| changes.clients.insert(client));
        }
    }

    /// Everything is to be written again, as to a new file.
    pub fn begin_anew(&mut self) {
        self.changes = Changes { anew: true, ..Changes::default() };
    }
}

impl Size {
    /// Whether another topic with so many bytes fits that part of everything.
    fn has_room(self, bytes: usize, part: usize) -> bool {
        self.topics < TOPICS / part && self.bytes + bytes <= BYTES / part
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

impl Snapshot {
    /// Nothing is to be written.
    pub fn is_empty(&self) -> bool {
        !self.anew && self.messages.is_empty() && self.wills.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(topic: &str, payload: &str) -> Message {
        Message { topic: topic.into(), payload: payload.to_owned().into(), qos: QoS::AtLeastOnce, retain: true }
    }

    fn all(retained: &Retained, filter: &str, max: usize) -> Vec<(String, String)> {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let Found { messages: some, after: next, .. } = retained.find(filter, after.as_deref(), (max, 1_000_000));
            assert!(some.len() <= max && some.iter().all(|message| message.retain));
            let text = |message: Message| (message.topic, String::from_utf8(message.payload.to_vec()).unwrap());
            found.extend(some.into_iter().map(text));
            match next {
                Some(_) => after = next,
                None => return found,
            }
        }
    }

    #[test]
    fn the_last_message_of_a_topic_is_kept_and_an_empty_one_takes_it_away() {
        let mut retained = Retained::default();
        for (topic, payload) in [("a/b", "1"), ("a", "2"), ("ab", "3"), ("a/b", "4"), ("a/c", "5"), ("a/c", "")] {
            retained.keep(&message(topic, payload), None).unwrap();
        }
        let text = |pairs: &[(&str, &str)]| -> Vec<_> { pairs.iter().map(|&(a, b)| (a.into(), b.into())).collect() };
        assert_eq!(all(&retained, "a/#", 1), text(&[("a", "2"), ("a/b", "4")]));
        assert_eq!(all(&retained, "+", 10), text(&[("a", "2"), ("ab", "3")]));
        assert_eq!(all(&retained, "a/b", 10), text(&[("a/b", "4")]));
        assert_eq!(retained.len(), 3);
    }

    #[test]
    fn thousands_are_found_in_parts() {
        let mut retained = Retained::default();
        for n in 0..5000 {
            retained.keep(&message(&format!("t/{n:04}/x"), "1"), None).unwrap();
            retained.keep(&message(&format!("t/{n:04}/y"), "1"), None).unwrap();
        }
        assert_eq!(all(&retained, "t/+/y", 100).len(), 5000);
        assert_eq!(all(&retained, "t/+/z", 100).len(), 0);
        let found = retained.find("t/#", None, (100, 20));
        assert_eq!(found.messages.len(), 3, "no more than 20 bytes and one message");
        assert_eq!((found.after.as_deref(), found.looked_at, found.bytes), (Some("t/0001/x"), 4, 27));
    }

    #[test]
    fn what_is_beyond_the_bounds_is_refused_and_what_is_there_may_still_change() {
        let mut retained = Retained::default();
        for n in 0..TOPICS {
            retained.keep(&message(&n.to_string(), "1"), None).unwrap();
        }
        assert_eq!(retained.keep(&message("one more", "1"), None), Err(Full));
        retained.keep(&message("7", "2"), None).unwrap();
        retained.keep(&message("8", ""), None).unwrap();
        retained.keep(&message("one more", "1"), None).unwrap();
        let large = "x".repeat(BYTES);
        assert_eq!(retained.keep(&message("7", &large), None), Err(Full));
        assert_eq!(all(&retained, "7", 1), [("7".into(), "2".into())]);
    }

    #[test]
    fn a_user_that_keeps_all_it_can_keeps_nobody_else_out() {
        let mut retained = Retained::default();
        let kept = (0..TOPICS).filter(|n| retained.keep(&message(&format!("gw1/{n}"), "1"), Some("gw1")).is_ok());
        assert_eq!(kept.count(), TOPICS / SHARE);
        retained.keep(&message("gw2/status", "1"), Some("gw2")).unwrap();
        retained.keep(&message("gw1/0", "2"), Some("gw1")).unwrap();
        retained.keep(&message("gw1/1", ""), Some("gw1")).unwrap();
        retained.keep(&message("gw1/more", "1"), Some("gw1")).unwrap();
        assert_eq!(retained.keep(&message("gw1/one more", "1"), Some("gw1")), Err(Full));
        retained.keep(&message("gw1/2", "1"), Some("b1")).unwrap();
        retained.keep(&message("gw1/one more", "1"), Some("gw1")).unwrap();
        let large = "x".repeat(BYTES / SHARE);
        assert_eq!(retained.keep(&message("gw2/status", &large), Some("gw2")), Err(Full));
        assert_eq!(all(&retained, "gw2/status", 1), [("gw2/status".into(), "1".into())], "what was there stays");
    }

    #[test]
    fn a_will_found_at_the_start_is_due() {
        let mut before = Retained::default();
        before.keep(&message("gw1/status", "1"), None).unwrap();
        before.keep(&message("gw2/status", "1"), None).unwrap();
        before.promise("gw1", message("gw1/status", "0"));
        before.promise("gw2", message("gw2/status", "0"));
        assert_eq!(before.release("gw2"), Some(message("gw2/status", "0")));
        let Snapshot { messages, wills, .. } = before.snapshot();
        let messages = messages.into_iter().filter_map(|(topic, kept)| Some((topic, kept?)));
        let wills = wills.into_iter().filter_map(|(client, will)| Some((client, will?)));
        let mut after = Retained::restored(messages, wills.collect());
        let text = |pairs: [(&str, &str); 2]| pairs.map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(all(&after, "#", 9), text([("gw1/status", "0"), ("gw2/status", "1")]));
        let snapshot = after.snapshot();
        assert_eq!(snapshot.wills, [("gw1".to_owned(), None)], "it is due once");
        assert_eq!(snapshot.messages.len(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_bounded() {
        let mut retained = Retained::default();
        for n in 0..=CHANGES {
            retained.keep(&message(&n.to_string(), "1"), None).unwrap_or_default();
            retained.keep(&message(&n.to_string(), ""), None).unwrap();
        }
        assert_eq!(retained.changes, Changes { anew: true, ..Changes::default() });
        assert!(retained.snapshot().anew && retained.snapshot().is_empty());
    }

    proptest! {
        #[test]
        fn the_changes_lead_from_one_state_to_the_next(
            steps in prop::collection::vec(("[ab]", "[01]?", any::<bool>(), any::<bool>()), 0..40),
        ) {
            let (mut retained, mut written) = (Retained::default(), BTreeMap::new());
            for (topic, payload, writes, fails) in steps {
                retained.keep(&message(&topic, &payload), None).unwrap();
                if writes {
                    let snapshot = retained.snapshot();
                    if fails {
                        retained.give_back(snapshot);
                        continue;
                    }
                    for (topic, kept) in snapshot.messages {
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
