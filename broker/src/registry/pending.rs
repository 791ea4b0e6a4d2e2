//! The changes of workers' servers, until the bus takes them: merged by server, so that they stay few however long that
//! takes.
//!
//! Previous stop of a change: the thread of the database, in the order of the commits. Next stop: [`super::push`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use wgkex_common::WorkerName;
use wgkex_common::wire::lease::{CHUNK_ADDRESSES_MAX, LeaseContent, LeaseMessage};

use crate::registry::store::ServerChange;

/// The most messages in flight: no router's key waits behind more of them.
const MESSAGES_IN_FLIGHT_MAX: usize = 20;
/// Messages of one server that wait at most: they do not follow one another where other brokers make the changes between.
const WAITING_PER_SERVER_MAX: usize = 8;

/// The lease messages for workers. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct PendingLeases(Arc<SharedLeases>);

#[derive(Debug, Default)]
struct SharedLeases {
    queue: Mutex<LeaseQueue>,
    added: Notify,
}

/// The messages by worker and server. Pure.
#[derive(Debug, Default)]
struct LeaseQueue {
    servers: BTreeMap<(WorkerName, String), VecDeque<LeaseMessage>>,
    /// The servers in the order of their turns.
    turns: VecDeque<(WorkerName, String)>,
}

impl PendingLeases {
    /// Adds changes.
    pub fn add(&self, changes: &[ServerChange]) {
        let mut queue = self.0.queue.lock();
        for ServerChange { worker, message } in changes {
            queue.add(worker, message.clone());
        }
        drop(queue);
        self.0.added.notify_one();
    }

    /// The next messages, as many as may be in flight at once. They have to be published in this order.
    pub async fn next(&self) -> Vec<(WorkerName, LeaseMessage)> {
        loop {
            let messages = self.0.queue.lock().take();
            if !messages.is_empty() {
                return messages;
            }
            self.0.added.notified().await;
        }
    }
}

impl LeaseQueue {
    fn add(&mut self, worker: &WorkerName, message: LeaseMessage) {
        let key = (worker.clone(), message.server.clone());
        let waiting = self.servers.entry(key.clone()).or_default();
        if waiting.is_empty() {
            self.turns.push_back(key);
        }
        merge(waiting, message);
    }

    /// One message of each server, by turns.
    fn take(&mut self) -> Vec<(WorkerName, LeaseMessage)> {
        let mut taken = Vec::new();
        while taken.len() < MESSAGES_IN_FLIGHT_MAX
            && let Some(key) = self.turns.pop_front()
        {
            let Some(mut waiting) = self.servers.remove(&key) else { continue };
            taken.extend(waiting.pop_front().map(|message| (key.0.clone(), message)));
            if !waiting.is_empty() {
                self.turns.push_back(key.clone());
                self.servers.insert(key, waiting);
            }
        }
        taken
    }
}

/// Adds a message to those that wait. If they are too many then, the worker only receives the current version, so that
/// it notices that it is behind, and requests all leases.
fn merge(waiting: &mut VecDeque<LeaseMessage>, message: LeaseMessage) {
    let version = message.version;
    if message.content == LeaseContent::Deleted {
        waiting.retain(|before| before.version.id != version.id);
        return waiting.push_back(message);
    }
    match (waiting.back_mut().filter(|last| last.version.id == version.id), message) {
        (Some(last @ LeaseMessage { content: LeaseContent::Current, .. }), _) => last.version = version,
        (
            Some(LeaseMessage { version: last, content: LeaseContent::Change(before), .. }),
            LeaseMessage { content: LeaseContent::Change(change), .. },
        ) if last.revision == change.after => {
            before.extend(change);
            *last = version;
        }
        (_, message) => waiting.push_back(message),
    }
    let is_long = |message: &LeaseMessage| match &message.content {
        LeaseContent::Change(change) => change.added.len() + change.removed.len() > CHUNK_ADDRESSES_MAX,
        LeaseContent::Chunk(_) | LeaseContent::Current | LeaseContent::Deleted => false,
    };
    if (waiting.len() > WAITING_PER_SERVER_MAX || waiting.back().is_some_and(is_long))
        && let Some(last) = waiting.pop_back()
    {
        waiting.retain(|before| before.version.id != version.id);
        waiting.push_back(LeaseMessage { content: LeaseContent::Current, ..last });
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use wgkex_common::wire::lease::{LeaseChange, LeaseVersion};

    use super::*;
    use crate::testing::key;

    fn message(id: i64, revision: i64, content: LeaseContent) -> LeaseMessage {
        LeaseMessage { server: "s1".into(), version: LeaseVersion { id, revision }, content }
    }

    /// Leads to a revision from the one before.
    fn change(id: i64, revision: i64, added: &[u32], removed: &[u32]) -> LeaseMessage {
        let added = added.iter().map(|n| (key(*n), IpAddr::from(Ipv4Addr::from(*n)).into())).collect();
        let removed = removed.iter().map(|n| key(*n)).collect();
        message(id, revision, LeaseContent::Change(LeaseChange { after: revision - 1, added, removed }))
    }

    fn merged(messages: impl IntoIterator<Item = LeaseMessage>) -> Vec<LeaseMessage> {
        let mut waiting = VecDeque::new();
        messages.into_iter().for_each(|message| merge(&mut waiting, message));
        waiting.into()
    }

    #[test]
    fn changes_that_follow_one_another_are_one() {
        let all = [change(7, 1, &[1, 2], &[]), change(7, 2, &[3], &[1]), change(7, 3, &[1], &[2])];
        let mut expected = change(7, 3, &[1, 3], &[1, 2]);
        if let LeaseContent::Change(change) = &mut expected.content {
            change.after = 0;
        }
        assert_eq!(merged(all), [expected]);
        let gap = [change(7, 1, &[1], &[]), change(7, 3, &[2], &[]), change(8, 4, &[3], &[])];
        assert_eq!(
            merged(gap.clone()),
            gap,
            "another broker made the one between, and another server has no part in it"
        );
    }

    #[test]
    fn a_server_that_is_deleted_has_no_changes_any_more() {
        let deleted = message(7, 2, LeaseContent::Deleted);
        let other = change(8, 1, &[1], &[]);
        let all = [change(7, 1, &[1], &[]), change(7, 2, &[2], &[]), deleted.clone(), other.clone()];
        assert_eq!(merged(all), [deleted, other]);
    }

    #[test]
    fn a_worker_that_missed_too_much_gets_the_current_version() {
        let current = |revision| [message(7, revision, LeaseContent::Current)];
        let many = (1..=1001).map(|n| change(7, i64::from(n), &[n], &[]));
        assert_eq!(merged(many), current(1001));
        let with_gaps = (1..=9).map(|n| change(7, 2 * n, &[], &[1]));
        assert_eq!(merged(with_gaps), current(18));
        let more = [current(4)[0].clone(), change(7, 5, &[1], &[]), change(7, 6, &[2], &[])];
        assert_eq!(merged(more), current(6));
    }

    #[test]
    fn few_messages_are_under_way_and_each_server_has_its_turn() {
        let mut queue = LeaseQueue::default();
        let worker = |n: usize| format!("gw{n}").parse::<WorkerName>().unwrap();
        for revision in [1, 3] {
            for n in 0..15 {
                queue.add(&worker(n), change(7, revision, &[1], &[]));
            }
        }
        let order = |taken: Vec<(WorkerName, LeaseMessage)>| -> Vec<_> {
            taken.into_iter().map(|(worker, message)| (worker, message.version.revision)).collect()
        };
        let expected: Vec<_> = (0..15).map(|n| (worker(n), 1)).chain((0..15).map(|n| (worker(n), 3))).collect();
        assert_eq!(order(queue.take()), expected[..MESSAGES_IN_FLIGHT_MAX]);
        assert_eq!(order(queue.take()), expected[MESSAGES_IN_FLIGHT_MAX..]);
        assert!(queue.take().is_empty() && queue.servers.is_empty());
    }
}
