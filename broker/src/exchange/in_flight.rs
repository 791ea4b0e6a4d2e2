//! The keys in flight: each request for a key from the POST to its answer, as one state machine. No IO, no clock.
//!
//! A key is queued, then published, then confirmed by gateways. A request that ends before that leaves the key late: what
//! gateways confirm from then on answers the router's next request. An answer to a router that asks too often is kept for
//! some seconds. Of each gateway only the last outcome is kept, so that none can crowd out those of others.
//!
//! Requests come from [`crate::exchange`] by [`Keys`](super::keys::Keys), outcomes from [`crate::bus`]; the
//! [`publisher`](super::publisher) takes what is queued.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use wgkex_common::access_lists::Admission;
use wgkex_common::{Domain, PublicKey, RejectReason, WorkerName};

/// Keys that never shook hands and are published but not acknowledged at most, of the 100 messages that may be.
const UNPROVEN_SENT: usize = 64;
/// Keys that are published but not acknowledged at most: so many that the MQTT session never lacks one.
const SENT: usize = 128;
/// Keys that are queued at most, those that shook hands and the others each; of more there is no use in a storm.
const QUEUED: usize = 8_192;
/// No key is queued or unacknowledged for longer: its router asks again sooner.
const LONGEST: Duration = Duration::from_secs(120);
/// How long a late key is kept: its router asks again every minute.
const RETRY_WINDOW: Duration = Duration::from_secs(120);
/// Late keys at most; half of it are for those that shook hands.
const LATE: usize = 32_768;
/// How long an answer is kept: what it says of gateways may be outdated by then.
const ANSWER_TTL: Duration = Duration::from_secs(3);
/// Answers at most.
const ANSWERS: usize = 4_096;

/// A key in a domain, as a router sends it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId {
    /// The domain.
    pub domain: Domain,
    /// The key.
    pub key: PublicKey,
}

/// What gateways said of a key since a request for it began.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Confirmations {
    /// Those that have it in their kernel.
    pub installed: BTreeSet<WorkerName>,
    /// Those that do not, and why.
    pub rejected: BTreeMap<WorkerName, RejectReason>,
}

/// A request's place: it begins with `begun`, and its key is published by `publication`.
#[derive(Debug, Clone)]
pub struct Ticket {
    /// Only outcomes after this count.
    pub begun: u64,
    /// Which publication it waits for.
    pub publication: u64,
    /// Whether that was queued by an earlier request.
    pub is_joined: bool,
    /// Notified when anything of the key changes.
    pub changed: Arc<Notify>,
}

/// A key to publish now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// The key.
    pub key: KeyId,
    /// Its number.
    pub number: u64,
    /// Whether the key ever shook hands.
    pub is_proven: bool,
    /// When it was queued.
    pub since: Instant,
}

/// All keys in flight. Numbers of requests, publications and outcomes are from one counter: their order is their order in
/// time.
#[derive(Debug)]
pub struct InFlight {
    domains: BTreeSet<Domain>,
    policy: Arc<Admission>,
    last: u64,
    keys: HashMap<KeyId, Flight>,
    /// The keys for which requests wait.
    waiting: HashSet<KeyId>,
    /// Unproven keys and proven ones, each with the first to publish first.
    queues: [VecDeque<KeyId>; 2],
    /// How many of both are published and not acknowledged.
    sent: [usize; 2],
    late: usize,
    /// The keys that have answers, each once, and from when they are. What an answer replaces is seen when it is over.
    answers: VecDeque<(Instant, KeyId)>,
    /// When what a worker had said so far became void, in a domain or in all.
    void: HashMap<(WorkerName, Option<Domain>), u64>,
}

#[derive(Debug, Default)]
struct Flight {
    queued: Option<Queued>,
    /// Publications under way to the MQTT server.
    sent: BTreeSet<u64>,
    /// The last publication that was acknowledged, and the last that was given up.
    acknowledged: u64,
    failed: u64,
    /// The requests that wait, by when they began.
    requests: BTreeSet<u64>,
    /// The last outcome of each gateway, and when it came; and when the last of all came.
    outcomes: BTreeMap<WorkerName, (u64, Result<(), RejectReason>)>,
    last_outcome: u64,
    late: Option<Late>,
    answer: Option<Answer>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Queued {
    number: u64,
    is_proven: bool,
    since: Instant,
}

#[derive(Debug)]
struct Late {
    since: Instant,
    after: u64,
}

/// What a router was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    since: Instant,
    /// The gateway that it was given; none by version 1.
    pub worker: Option<WorkerName>,
}

fn is_over(since: Instant, limit: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) >= limit
}

impl Flight {
    /// A publication whose outcomes a request that begins now gets all: queued, or sent with none arrived since.
    fn joinable(&self) -> Option<u64> {
        let queued = self.queued.as_ref().map(|queued| queued.number);
        queued.or_else(|| self.sent.last().copied().filter(|sent| *sent > self.last_outcome))
    }

    fn listens(&self) -> bool {
        !self.requests.is_empty() || self.late.is_some() || !self.sent.is_empty()
    }

    fn is_idle(&self) -> bool {
        !self.listens() && self.queued.is_none() && self.answer.is_none()
    }
}

impl InFlight {
    /// No key of these domains is in flight.
    #[must_use]
    pub fn new(domains: BTreeSet<Domain>, policy: Arc<Admission>) -> Self {
        Self {
            domains,
            policy,
            last: 0,
            keys: HashMap::new(),
            waiting: HashSet::new(),
            queues: Default::default(),
            sent: [0; 2],
            late: 0,
            answers: VecDeque::new(),
            void: HashMap::new(),
        }
    }

    /// Begins a request for `key`: joins the publication that waits, or queues one. None if too many keys are queued.
    pub fn request(&mut self, key: &KeyId, is_proven: bool, now: Instant) -> Option<Ticket> {
        let (publication, is_joined) = self.publish(key, is_proven, now)?;
        self.last += 1;
        let begun = self.last;
        let flight = self.keys.entry(key.clone()).or_default();
        flight.requests.insert(begun);
        self.waiting.insert(key.clone());
        Some(Ticket { begun, publication, is_joined, changed: Arc::clone(&flight.changed) })
    }

    /// Has `key` published: by a publication that waits for that already, or by one more. Returns its number, and whether
    /// it was there.
    pub fn publish(&mut self, key: &KeyId, is_proven: bool, now: Instant) -> Option<(u64, bool)> {
        if let Some(number) = self.keys.get(key).and_then(Flight::joinable) {
            self.promote(key, is_proven);
            return Some((number, true));
        }
        let queue = &mut self.queues[usize::from(is_proven)];
        if queue.len() >= QUEUED {
            return None;
        }
        queue.push_back(key.clone());
        self.last += 1;
        let number = self.last;
        self.keys.entry(key.clone()).or_default().queued = Some(Queued { number, is_proven, since: now });
        Some((number, false))
    }

    /// A queued key that has shaken hands since goes to the queue of its like, if there is a place.
    fn promote(&mut self, key: &KeyId, is_proven: bool) {
        let [unproven, proven] = &mut self.queues;
        let queued = self.keys.get_mut(key).and_then(|flight| flight.queued.as_mut());
        if let Some(queued) = queued.filter(|queued| is_proven && !queued.is_proven && proven.len() < QUEUED) {
            queued.is_proven = true;
            unproven.retain(|other| other != key);
            proven.push_back(key.clone());
        }
    }

    /// The next key to publish, if more may be sent now: proven ones first.
    pub fn next(&mut self, now: Instant) -> Option<Publication> {
        loop {
            let [unproven, proven] = self.sent;
            let queue = match () {
                () if unproven + proven >= SENT => return None,
                () if !self.queues[1].is_empty() => 1,
                () if unproven < UNPROVEN_SENT => 0,
                () => return None,
            };
            let key = self.queues[queue].pop_front()?;
            let Some(flight) = self.keys.get_mut(&key) else { continue };
            let Some(Queued { number, is_proven, since }) = flight.queued.take() else { continue };
            flight.sent.insert(number);
            self.sent[usize::from(is_proven)] += 1;
            let publication = Publication { key, number, is_proven, since };
            if !self.is_given_up(&publication, now) {
                return Some(publication);
            }
            self.published(&publication, false);
        }
    }

    /// Whether a key that is not acknowledged yet is denied meanwhile, or took too long.
    #[must_use]
    pub fn is_given_up(&self, Publication { key, since, .. }: &Publication, now: Instant) -> bool {
        is_over(*since, LONGEST, now) || self.policy.denies(key.domain.name(), &key.key)
    }

    /// The MQTT server acknowledged the key, or it was given up.
    pub fn published(&mut self, Publication { key, number, is_proven, .. }: &Publication, is_acknowledged: bool) {
        let Some(flight) = self.keys.get_mut(key).filter(|flight| flight.sent.contains(number)) else { return };
        flight.sent.remove(number);
        self.sent[usize::from(*is_proven)] -= 1;
        let last = if is_acknowledged { &mut flight.acknowledged } else { &mut flight.failed };
        *last = (*last).max(*number);
        flight.changed.notify_waiters();
        self.drop_if_idle(key);
    }

    /// Whether the publication of a request was acknowledged; none while that is open.
    #[must_use]
    pub fn is_published(&self, key: &KeyId, publication: u64) -> Option<bool> {
        match self.keys.get(key) {
            Some(flight) if flight.acknowledged >= publication => Some(true),
            Some(flight) if flight.failed < publication => None,
            _ => Some(false),
        }
    }

    /// `worker` said what became of keys in a domain. Most of them are not in flight here.
    pub fn confirmed(
        &mut self,
        worker: &WorkerName,
        domain: &str,
        outcomes: impl IntoIterator<Item = (PublicKey, Result<(), RejectReason>)>,
    ) {
        let Some(domain) = self.domains.get(domain) else { return };
        self.last += 1;
        for (key, outcome) in outcomes {
            let id = KeyId { domain: domain.clone(), key };
            if let Some(flight) = self.keys.get_mut(&id).filter(|flight| flight.listens()) {
                flight.outcomes.insert(worker.clone(), (self.last, outcome));
                flight.last_outcome = self.last;
                flight.changed.notify_waiters();
            }
        }
    }

    /// What `worker` said may not be so any more, in this domain or in all.
    pub fn removed(&mut self, worker: &WorkerName, domain: Option<&str>) {
        let concerns = |key: &KeyId| domain.is_none_or(|domain| domain == key.domain.name());
        if self.late > 0 {
            self.last += 1;
            let domain = domain.and_then(|domain| self.domains.get(domain)).cloned();
            self.void.insert((worker.clone(), domain), self.last);
        }
        for key in self.waiting.iter().filter(|key| concerns(key)) {
            if let Some(flight) = self.keys.get_mut(key) {
                flight.outcomes.remove(worker);
                flight.changed.notify_waiters();
            }
        }
    }

    /// What anybody said of late keys may not be so any more.
    pub fn removed_all(&mut self) {
        self.forget_late();
        self.drop_idle();
    }

    fn forget_late(&mut self) {
        for flight in self.keys.values_mut() {
            flight.late = None;
        }
        self.late = 0;
        self.void.clear();
    }

    /// What gateways said of the key since the request began. One that was removed may be under way once more.
    #[must_use]
    pub fn confirmations(&self, key: &KeyId, begun: u64) -> Confirmations {
        let mut confirmations = Confirmations::default();
        let outcomes = self.keys.get(key).into_iter().flat_map(|flight| &flight.outcomes);
        for (worker, (_, outcome)) in outcomes.filter(|(_, (said, _))| *said > begun) {
            match outcome {
                Ok(()) => drop(confirmations.installed.insert(worker.clone())),
                Err(RejectReason::Removed) => {}
                Err(reason) => drop(confirmations.rejected.insert(worker.clone(), reason.clone())),
            }
        }
        confirmations
    }

    /// A request ends.
    pub fn end(&mut self, key: &KeyId, begun: u64) {
        let Some(flight) = self.keys.get_mut(key) else { return };
        flight.requests.remove(&begun);
        if flight.requests.is_empty() {
            self.waiting.remove(key);
        }
        self.drop_if_idle(key);
    }

    /// A request's time is over before a gateway took its key: what is said from now on is for the router's next one, if
    /// there is room.
    pub fn timed_out(&mut self, key: &KeyId, is_proven: bool, now: Instant) {
        let max = if is_proven { LATE } else { LATE / 2 };
        if self.late >= max {
            return;
        }
        let flight = self.keys.entry(key.clone()).or_default();
        self.late += usize::from(flight.late.is_none());
        flight.late = Some(Late { since: now, after: self.last });
    }

    /// The gateways that have `key` by what they said since a request for it timed out; once.
    #[must_use]
    pub fn take_late(&mut self, key: &KeyId, now: Instant) -> BTreeSet<WorkerName> {
        let Some(flight) = self.keys.get_mut(key) else { return BTreeSet::new() };
        let Some(late) = flight.late.take() else { return BTreeSet::new() };
        self.late -= 1;
        let is_void = |worker: &WorkerName, said: u64| {
            let void = |domain: Option<&Domain>| self.void.get(&(worker.clone(), domain.cloned()));
            [None, Some(&key.domain)].into_iter().filter_map(void).any(|void| *void >= said)
        };
        let installed = flight.outcomes.iter().filter(|(worker, (said, outcome))| {
            outcome.is_ok() && *said > late.after && !is_over(late.since, RETRY_WINDOW, now) && !is_void(worker, *said)
        });
        let installed = installed.map(|(worker, _)| worker.clone()).collect();
        self.drop_if_idle(key);
        installed
    }

    /// Keeps what the router of `key` is answered, if there is room.
    pub fn answered(&mut self, key: &KeyId, worker: Option<WorkerName>, now: Instant) {
        if self.answers.len() >= ANSWERS {
            self.expire_answers(now);
        }
        if self.answers.len() < ANSWERS {
            let answer = &mut self.keys.entry(key.clone()).or_default().answer;
            if answer.is_none() {
                self.answers.push_back((now, key.clone()));
            }
            *answer = Some(Answer { since: now, worker });
        }
    }

    /// What the router of `key` was answered a moment ago.
    #[must_use]
    pub fn last_answer(&self, key: &KeyId, now: Instant) -> Option<&Answer> {
        let answer = self.keys.get(key)?.answer.as_ref();
        answer.filter(|answer| !is_over(answer.since, ANSWER_TTL, now))
    }

    /// Applies another access policy: what it denies leaves the queues.
    pub fn apply(&mut self, policy: Arc<Admission>, now: Instant) {
        self.policy = policy;
        self.forget_late();
        self.give_up_queued(now);
        self.drop_idle();
    }

    /// Drops what took too long.
    pub fn expire(&mut self, now: Instant) {
        for flight in self.keys.values_mut() {
            self.late -= usize::from(flight.late.take_if(|late| is_over(late.since, RETRY_WINDOW, now)).is_some());
        }
        if self.late == 0 {
            self.void.clear();
        }
        self.expire_answers(now);
        self.give_up_queued(now);
        self.drop_idle();
    }

    fn expire_answers(&mut self, now: Instant) {
        while self.answers.front().is_some_and(|(since, _)| is_over(*since, ANSWER_TTL, now))
            && let Some((_, key)) = self.answers.pop_front()
        {
            let Some(flight) = self.keys.get_mut(&key) else { continue };
            flight.answer.take_if(|answer| is_over(answer.since, ANSWER_TTL, now));
            match &flight.answer {
                Some(newer) => self.answers.push_back((newer.since, key)),
                None => self.drop_if_idle(&key),
            }
        }
    }

    fn give_up_queued(&mut self, now: Instant) {
        let (keys, policy) = (&mut self.keys, &self.policy);
        for queue in &mut self.queues {
            queue.retain(|key| {
                let Some(flight) = keys.get_mut(key) else { return false };
                let denied = policy.denies(key.domain.name(), &key.key);
                let given_up = flight.queued.take_if(|queued| denied || is_over(queued.since, LONGEST, now));
                if let Some(Queued { number, .. }) = &given_up {
                    flight.failed = *number;
                    flight.changed.notify_waiters();
                }
                given_up.is_none()
            });
        }
    }

    fn drop_idle(&mut self) {
        self.keys.retain(|_, flight| !flight.is_idle());
    }

    fn drop_if_idle(&mut self, key: &KeyId) {
        if let Some(flight) = self.keys.get_mut(key) {
            if flight.is_idle() {
                self.keys.remove(key);
            } else if !flight.listens() {
                flight.outcomes.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests;
