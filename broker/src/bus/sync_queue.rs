//! The sync requests that wait for their chunks. Requesters take turns, with one request each, and pause for some time after
//! each chunk, so that none keeps another one waiting, or the broker busy. No IO.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::sleep_until;
use wgkex_common::wire::message::{Requester, SyncRequest};

/// The most requesters with a topic of their own, and the most requests on the shared topic. One too many is dropped: its
/// sender sends it again.
const REQUESTERS_MAX: usize = 4096;
const SHARED_MAX: usize = 1024;
/// A requester pauses for this many times as long as its chunk took to collect: so it uses a fifth of one core at most.
const PAUSE_FACTOR: u32 = 4;
/// The most bytes a second for a requester, 60,000 keys: every client waits for the messages that the broker publishes.
const BYTES_PER_SECOND: u64 = 4 << 20;

/// The queue between the session and the sync server. Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct SyncQueue(Arc<QueueState>);

#[derive(Debug, Default)]
struct QueueState {
    queues: Mutex<RequestQueues>,
    has_request: Notify,
}

/// The requests by requester.
#[derive(Debug, Default)]
struct RequestQueues {
    requests: BTreeMap<Requester, VecDeque<SyncRequest>>,
    /// The requesters with requests, in the order of their turns.
    order: VecDeque<Requester>,
    /// The end of the pause of each requester that received a chunk.
    pauses: BTreeMap<Requester, Instant>,
}

/// The next step of the sync server.
#[derive(Debug, PartialEq, Eq)]
enum NextStep {
    Answer(Requester, SyncRequest),
    /// Every requester that waits pauses until then.
    Pause(Instant),
    /// No request waits.
    Idle,
}

impl SyncQueue {
    /// Queues a request. It replaces one of the same program that waits: a client sends the next one when it has its chunk, or
    /// gave that up.
    pub fn push(&self, requester: Requester, request: SyncRequest) {
        self.0.queues.lock().push(requester, request);
        self.0.has_request.notify_one();
    }

    /// The next request, once there is one.
    pub async fn next(&self) -> (Requester, SyncRequest) {
        loop {
            let turn = self.0.queues.lock().next(Instant::now());
            match turn {
                NextStep::Answer(requester, request) => return (requester, request),
                NextStep::Pause(until) => {
                    tokio::select! {
                        () = sleep_until(until.into()) => {}
                        () = self.0.has_request.notified() => {}
                    }
                }
                NextStep::Idle => self.0.has_request.notified().await,
            }
        }
    }

    /// A requester got its chunk of so many bytes, which took so long to collect.
    pub fn on_answered(&self, requester: Requester, took: Duration, bytes: usize) {
        self.0.queues.lock().pause(requester, Instant::now() + pause(took, bytes));
    }
}

/// The pause after a chunk.
fn pause(took: Duration, bytes: usize) -> Duration {
    (PAUSE_FACTOR * took).max(Duration::from_micros(1_000_000 * bytes as u64 / BYTES_PER_SECOND))
}

impl RequestQueues {
    fn push(&mut self, requester: Requester, request: SyncRequest) {
        if let Some(waiting) = self.requests.get_mut(&requester) {
            if let Some(before) = waiting.iter_mut().find(|waiting| waiting.from == request.from) {
                *before = request;
            } else if waiting.len() < SHARED_MAX {
                waiting.push_back(request);
            }
        } else if self.requests.len() < REQUESTERS_MAX {
            self.order.push_back(requester.clone());
            self.requests.insert(requester, [request].into());
        }
    }

    fn next(&mut self, now: Instant) -> NextStep {
        self.pauses.retain(|_, until| *until > now);
        let Some(place) = self.order.iter().position(|requester| !self.pauses.contains_key(requester)) else {
            let soonest = self.order.iter().filter_map(|requester| self.pauses.get(requester)).min();
            return soonest.map_or(NextStep::Idle, |until| NextStep::Pause(*until));
        };
        let turn = self.order.remove(place).and_then(|requester| {
            let waiting = self.requests.get_mut(&requester)?;
            let request = waiting.pop_front()?;
            if waiting.is_empty() {
                self.requests.remove(&requester);
            } else {
                self.order.push_back(requester.clone());
            }
            Some(NextStep::Answer(requester, request))
        });
        turn.unwrap_or(NextStep::Idle)
    }

    fn pause(&mut self, requester: Requester, until: Instant) {
        self.pauses.insert(requester, until);
    }
}

#[cfg(test)]
impl SyncQueue {
    /// Takes the next request, if there is one.
    pub fn take(&self) -> Option<SyncRequest> {
        match self.0.queues.lock().next(Instant::now()) {
            NextStep::Answer(_, request) => Some(request),
            NextStep::Pause(_) | NextStep::Idle => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use wgkex_common::wire::name::Participant;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn worker(name: &str) -> Participant {
        Participant::Worker(name.parse().unwrap())
    }

    fn request(from: &str, n: u64) -> SyncRequest {
        SyncRequest { from: worker(from), to: None, domain: "d".into(), after: None, younger_than: Some(n) }
    }

    fn push(queues: &mut RequestQueues, from: &str, n: u64) {
        queues.push(Requester::Named(worker(from)), request(from, n));
    }

    /// The next requests: the sender and the number of each.
    fn drain(queues: &mut RequestQueues, now: Instant) -> Vec<(String, u64)> {
        let mut drained = Vec::new();
        while let NextStep::Answer(_, request) = queues.next(now) {
            drained.push((request.from.name().to_owned(), request.younger_than.unwrap()));
        }
        drained
    }

    #[test]
    fn a_requester_waits_for_one_chunk_of_each_other_however_many_requests_these_send() {
        let (mut queues, now) = (RequestQueues::default(), Instant::now());
        for n in 0..10_000 {
            push(&mut queues, "thief", n);
            queues.push(Requester::Shared, request(&format!("made-up-{}", n % 3), n));
        }
        push(&mut queues, "gw", 1);
        push(&mut queues, "gw", 2);
        let expected = [("thief", 9_999), ("made-up-0", 9_999), ("gw", 2), ("made-up-1", 9_997), ("made-up-2", 9_998)];
        assert_eq!(drain(&mut queues, now), expected.map(|(from, n)| (from.to_owned(), n)));
        assert_eq!(queues.next(now), NextStep::Idle);
    }

    #[test]
    fn a_requester_pauses_for_its_chunk_and_delays_no_other() {
        let (mut queues, now) = (RequestQueues::default(), Instant::now());
        queues.pause(Requester::Named(worker("thief")), now + 20 * MS);
        push(&mut queues, "thief", 1);
        assert_eq!(queues.next(now), NextStep::Pause(now + 20 * MS));
        push(&mut queues, "gw", 2);
        assert_eq!(drain(&mut queues, now + 19 * MS), [("gw".to_owned(), 2)]);
        assert_eq!(drain(&mut queues, now + 20 * MS), [("thief".to_owned(), 1)]);
        assert!(queues.pauses.is_empty());
    }

    #[test]
    fn the_pause_after_a_chunk_is_longer_for_more_work_and_for_more_bytes() {
        assert_eq!(pause(5 * MS, 100), 20 * MS);
        assert_eq!(pause(MS, 1 << 20), 250 * MS);
    }

    #[test]
    fn what_waits_is_bounded() {
        let (mut queues, now) = (RequestQueues::default(), Instant::now());
        for n in 0..2 * REQUESTERS_MAX {
            queues.push(Requester::Shared, request(&n.to_string(), 0));
            push(&mut queues, &n.to_string(), 0);
        }
        assert_eq!(drain(&mut queues, now).len(), REQUESTERS_MAX - 1 + SHARED_MAX);
        assert!(queues.requests.is_empty() && queues.order.is_empty());
    }
}
