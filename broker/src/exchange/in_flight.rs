//! The keys in flight: each request for a key from the POST to its answer, as one state machine. No IO, no clock.
//!
//! A key is queued, then published, then confirmed by gateways. A request that times out before that leaves the key
//! late: confirmations received from then on answer the router's next request. The answer to a router that repeats its
//! request too often is cached for some seconds. Of each gateway only the last outcome is kept, so none can crowd out
//! those of others.
//!
//! Requests come from [`crate::exchange`] by [`InFlightHandle`](super::handle::InFlightHandle), outcomes from
//! [`crate::bus`]; the [`publisher`](super::publisher) takes the queued keys.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use wgkex_common::access_lists::Admission;
use wgkex_common::{Domain, KeyId, PublicKey, RejectReason, WorkerName};

/// The most unestablished keys that are published and not acknowledged, of the 100 messages that may be.
const UNESTABLISHED_SENT_MAX: usize = 64;
/// The most keys that are published and not acknowledged: so many that the MQTT session never lacks one.
const SENT_MAX: usize = 128;
/// The most keys in each queue, that of established keys and that of the others; in a flood, more are of no use.
const QUEUED_MAX: usize = 8_192;
/// The longest that a key is queued or unacknowledged: its router repeats its request sooner.
const WAIT_MAX: Duration = Duration::from_secs(120);
/// How long a late key is kept: its router repeats its request every minute.
const RETRY_WINDOW: Duration = Duration::from_secs(120);
/// The most late keys; half of these places are for established ones.
const LATE_MAX: usize = 32_768;
/// How long an answer is cached: its gateway may be offline by then.
const ANSWER_TTL: Duration = Duration::from_secs(3);
/// The most answers that are cached.
const CACHED_ANSWERS_MAX: usize = 4_096;

/// The outcomes of a key since a request for it began.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Confirmations {
    /// The gateways that have it in their kernel.
    pub installed: BTreeSet<WorkerName>,
    /// The gateways that do not, and why.
    pub rejected: BTreeMap<WorkerName, RejectReason>,
}

/// A place in the queue of publications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuePlace {
    /// The number of the publication.
    pub publication: u64,
    /// Whether it was queued before.
    pub is_joined: bool,
}

/// A request: it begins with `begun`, and waits for `publication`.
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
    /// Whether the key has had a handshake.
    pub is_established: bool,
    /// When it was queued.
    pub since: Instant,
}

/// How much is in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlightLoad {
    /// Keys that wait to be published.
    pub queued: usize,
    /// Keys that are published and not acknowledged.
    pub unacknowledged: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// For how long the oldest of these has waited.
    pub oldest: Option<Duration>,
}

/// Where one key is on its way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlightTrace {
    /// For how long it has been queued.
    pub queued: Option<Duration>,
    /// Publications that are not acknowledged.
    pub unacknowledged: usize,
    /// Requests that wait for it.
    pub waiting: usize,
    /// A request for it timed out so long ago; confirmations are kept for the next one.
    pub late: Option<Duration>,
    /// Its outcomes so far at each gateway.
    pub outcomes: BTreeMap<WorkerName, Result<(), RejectReason>>,
}

/// All keys in flight. Numbers of requests, publications and outcomes are from one counter: their order is their order in
/// time.
#[derive(Debug)]
pub struct InFlight {
    domains: BTreeSet<Domain>,
    admission: Arc<Admission>,
    last: u64,
    keys: HashMap<KeyId, Flight>,
    /// The keys for which requests wait.
    waiting: HashSet<KeyId>,
    /// When each request that waits began, by its number.
    begun: BTreeMap<u64, Instant>,
    established: PublishQueue,
    unestablished: PublishQueue,
    /// How many keys are late.
    late_keys: usize,
    /// The keys with a cached answer, each once, by the time of the first such answer; a newer one is noticed when that expires.
    answers: VecDeque<CachedKey>,
    /// When the outcomes of a worker so far became invalid, in a domain or in all.
    invalidated: HashMap<(WorkerName, Option<Domain>), u64>,
}

/// The keys of one kind on their way to the MQTT server.
#[derive(Debug, Default)]
struct PublishQueue {
    /// The keys to publish, in order.
    keys: VecDeque<KeyId>,
    /// How many are published and not acknowledged.
    sent: usize,
}

/// A key with a cached answer.
#[derive(Debug)]
struct CachedKey {
    since: Instant,
    key: KeyId,
}

#[derive(Debug, Default)]
struct Flight {
    queued: Option<Queued>,
    /// Publications that are not acknowledged.
    sent: BTreeSet<u64>,
    /// The last publication that was acknowledged, and the last that was given up.
    acknowledged: u64,
    failed: u64,
    /// The requests that wait, by when they began.
    requests: BTreeSet<u64>,
    /// The last outcome of each gateway, and the number of the newest.
    outcomes: BTreeMap<WorkerName, InstallOutcome>,
    last_outcome: u64,
    late: Option<LateConfirmations>,
    answer: Option<CachedAnswer>,
    changed: Arc<Notify>,
}

/// The outcome of a key at a gateway.
#[derive(Debug)]
struct InstallOutcome {
    number: u64,
    result: Result<(), RejectReason>,
}

#[derive(Debug)]
struct Queued {
    number: u64,
    is_established: bool,
    since: Instant,
}

#[derive(Debug)]
struct LateConfirmations {
    since: Instant,
    after: u64,
}

/// An answer to a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedAnswer {
    since: Instant,
    /// The gateway in it; none by version 1.
    pub worker: Option<WorkerName>,
}

fn is_over(since: Instant, limit: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) >= limit
}

impl Flight {
    /// A publication of whose outcomes a request that begins now misses none: queued, or sent with no outcome since.
    fn joinable(&self) -> Option<u64> {
        let queued = self.queued.as_ref().map(|queued| queued.number);
        queued.or_else(|| self.sent.last().copied().filter(|sent| *sent > self.last_outcome))
    }

    fn needs_outcomes(&self) -> bool {
        !self.requests.is_empty() || self.late.is_some() || !self.sent.is_empty()
    }

    fn is_idle(&self) -> bool {
        !self.needs_outcomes() && self.queued.is_none() && self.answer.is_none()
    }
}

impl InFlight {
    /// No key of these domains is in flight.
    #[must_use]
    pub fn new(domains: BTreeSet<Domain>, admission: Arc<Admission>) -> Self {
        Self {
            domains,
            admission,
            last: 0,
            keys: HashMap::new(),
            waiting: HashSet::new(),
            begun: BTreeMap::new(),
            established: PublishQueue::default(),
            unestablished: PublishQueue::default(),
            late_keys: 0,
            answers: VecDeque::new(),
            invalidated: HashMap::new(),
        }
    }

    fn queue(&mut self, is_established: bool) -> &mut PublishQueue {
        if is_established { &mut self.established } else { &mut self.unestablished }
    }

    /// Begins a request for `key`: joins its publication, or queues one. None if too many keys are queued.
    pub fn request(&mut self, key: &KeyId, is_established: bool, now: Instant) -> Option<Ticket> {
        let QueuePlace { publication, is_joined } = self.publish(key, is_established, now)?;
        self.last += 1;
        let begun = self.last;
        let flight = self.keys.entry(key.clone()).or_default();
        flight.requests.insert(begun);
        self.waiting.insert(key.clone());
        self.begun.insert(begun, now);
        Some(Ticket { begun, publication, is_joined, changed: Arc::clone(&flight.changed) })
    }

    /// Queues a publication of `key`, unless there is one to join.
    pub fn publish(&mut self, key: &KeyId, is_established: bool, now: Instant) -> Option<QueuePlace> {
        if let Some(number) = self.keys.get(key).and_then(Flight::joinable) {
            self.promote(key, is_established);
            return Some(QueuePlace { publication: number, is_joined: true });
        }
        let queue = &mut self.queue(is_established).keys;
        if queue.len() >= QUEUED_MAX {
            return None;
        }
        queue.push_back(key.clone());
        self.last += 1;
        let number = self.last;
        self.keys.entry(key.clone()).or_default().queued = Some(Queued { number, is_established, since: now });
        Some(QueuePlace { publication: number, is_joined: false })
    }

    /// Moves a queued key that became established to the queue of those, if there is room.
    fn promote(&mut self, key: &KeyId, is_established: bool) {
        let Self {
            unestablished: PublishQueue { keys: unestablished, .. },
            established: PublishQueue { keys: established, .. },
            ..
        } = self;
        let queued = self.keys.get_mut(key).and_then(|flight| flight.queued.as_mut());
        if let Some(queued) =
            queued.filter(|queued| is_established && !queued.is_established && established.len() < QUEUED_MAX)
        {
            queued.is_established = true;
            unestablished.retain(|other| other != key);
            established.push_back(key.clone());
        }
    }

    /// The next key to publish, if more may be sent now: established keys first.
    pub fn next(&mut self, now: Instant) -> Option<Publication> {
        loop {
            if self.established.sent + self.unestablished.sent >= SENT_MAX {
                return None;
            }
            let key = match self.established.keys.pop_front() {
                Some(key) => key,
                None if self.unestablished.sent < UNESTABLISHED_SENT_MAX => self.unestablished.keys.pop_front()?,
                None => return None,
            };
            let Some(flight) = self.keys.get_mut(&key) else { continue };
            let Some(Queued { number, is_established, since }) = flight.queued.take() else { continue };
            flight.sent.insert(number);
            self.queue(is_established).sent += 1;
            let publication = Publication { key, number, is_established, since };
            if !self.is_given_up(&publication, now) {
                return Some(publication);
            }
            self.settle(&publication, false);
        }
    }

    /// Whether an unacknowledged key is denied meanwhile, or took too long.
    #[must_use]
    pub fn is_given_up(&self, Publication { key, since, .. }: &Publication, now: Instant) -> bool {
        is_over(*since, WAIT_MAX, now) || self.admission.denies(key.domain.name(), &key.key)
    }

    /// The MQTT server acknowledged the key, or it was given up.
    pub fn settle(&mut self, Publication { key, number, is_established, .. }: &Publication, is_acknowledged: bool) {
        let Some(flight) = self.keys.get_mut(key).filter(|flight| flight.sent.contains(number)) else { return };
        flight.sent.remove(number);
        let last = if is_acknowledged { &mut flight.acknowledged } else { &mut flight.failed };
        *last = (*last).max(*number);
        flight.changed.notify_waiters();
        self.queue(*is_established).sent -= 1;
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

    /// Records the outcomes of keys of a domain at `worker`. Most of these keys are not in flight here.
    pub fn confirmed(
        &mut self,
        worker: &WorkerName,
        domain: &str,
        outcomes: impl IntoIterator<Item = (PublicKey, Result<(), RejectReason>)>,
    ) {
        let Some(domain) = self.domains.get(domain) else { return };
        self.last += 1;
        for (key, result) in outcomes {
            let id = KeyId { domain: domain.clone(), key };
            if let Some(flight) = self.keys.get_mut(&id).filter(|flight| flight.needs_outcomes()) {
                flight.outcomes.insert(worker.clone(), InstallOutcome { number: self.last, result });
                flight.last_outcome = self.last;
                flight.changed.notify_waiters();
            }
        }
    }

    /// The outcomes at `worker` are invalid, in this domain or in all: it went offline, or restarted.
    pub fn invalidate(&mut self, worker: &WorkerName, domain: Option<&str>) {
        let concerns = |key: &KeyId| domain.is_none_or(|domain| domain == key.domain.name());
        if self.late_keys > 0 {
            self.last += 1;
            let domain = domain.and_then(|domain| self.domains.get(domain)).cloned();
            self.invalidated.insert((worker.clone(), domain), self.last);
        }
        for key in self.waiting.iter().filter(|key| concerns(key)) {
            if let Some(flight) = self.keys.get_mut(key) {
                flight.outcomes.remove(worker);
                flight.changed.notify_waiters();
            }
        }
    }

    /// All outcomes of late keys are invalid: the connection is lost.
    pub fn invalidate_late(&mut self) {
        self.forget_late();
        self.drop_idle();
    }

    fn forget_late(&mut self) {
        for flight in self.keys.values_mut() {
            flight.late = None;
        }
        self.late_keys = 0;
        self.invalidated.clear();
    }

    /// The outcomes of the key since the request began. A key that was removed may be installed once more, so that one is left
    /// out.
    #[must_use]
    pub fn confirmations(&self, key: &KeyId, begun: u64) -> Confirmations {
        let mut confirmations = Confirmations::default();
        let outcomes = self.keys.get(key).into_iter().flat_map(|flight| &flight.outcomes);
        for (worker, outcome) in outcomes.filter(|(_, outcome)| outcome.number > begun) {
            match &outcome.result {
                Ok(()) => drop(confirmations.installed.insert(worker.clone())),
                Err(RejectReason::Removed) => {}
                Err(reason) => drop(confirmations.rejected.insert(worker.clone(), reason.clone())),
            }
        }
        confirmations
    }

    /// A request ends.
    pub fn end(&mut self, key: &KeyId, begun: u64) {
        self.begun.remove(&begun);
        let Some(flight) = self.keys.get_mut(key) else { return };
        flight.requests.remove(&begun);
        if flight.requests.is_empty() {
            self.waiting.remove(key);
        }
        self.drop_if_idle(key);
    }

    /// A request timed out before its key was confirmed: outcomes from now on are kept for the router's next one, if there is
    /// room.
    pub fn timed_out(&mut self, key: &KeyId, is_established: bool, now: Instant) {
        let max = if is_established { LATE_MAX } else { LATE_MAX / 2 };
        if self.late_keys >= max {
            return;
        }
        let flight = self.keys.entry(key.clone()).or_default();
        self.late_keys += usize::from(flight.late.is_none());
        flight.late = Some(LateConfirmations { since: now, after: self.last });
    }

    /// Takes the gateways that confirmed `key` after a request for it timed out.
    #[must_use]
    pub fn take_late(&mut self, key: &KeyId, now: Instant) -> BTreeSet<WorkerName> {
        let installed = self.late(key, now);
        if self.keys.get_mut(key).is_some_and(|flight| flight.late.take().is_some()) {
            self.late_keys -= 1;
            self.drop_if_idle(key);
        }
        installed
    }

    /// The gateways that confirmed `key` after a request for it timed out.
    #[must_use]
    pub fn late(&self, key: &KeyId, now: Instant) -> BTreeSet<WorkerName> {
        let Some(flight) = self.keys.get(key) else { return BTreeSet::new() };
        let Some(late) = &flight.late else { return BTreeSet::new() };
        let is_invalid = |worker: &WorkerName, number: u64| {
            let invalidated = |domain: Option<&Domain>| self.invalidated.get(&(worker.clone(), domain.cloned()));
            [None, Some(&key.domain)].into_iter().filter_map(invalidated).any(|invalidated| *invalidated >= number)
        };
        let is_over = is_over(late.since, RETRY_WINDOW, now);
        let installed = flight.outcomes.iter().filter(|(worker, InstallOutcome { number, result })| {
            result.is_ok() && *number > late.after && !is_over && !is_invalid(worker, *number)
        });
        installed.map(|(worker, _)| worker.clone()).collect()
    }

    /// How much is in flight.
    #[must_use]
    pub fn load(&self, now: Instant) -> InFlightLoad {
        let queues = [&self.established, &self.unestablished];
        // A key that became established is behind younger ones; that of a request counts by the request.
        let fronts = queues.into_iter().filter_map(|queue| self.keys.get(queue.keys.front()?)?.queued.as_ref());
        let oldest = fronts.map(|queued| queued.since).chain(self.begun.values().next().copied()).min();
        InFlightLoad {
            queued: queues.iter().map(|queue| queue.keys.len()).sum(),
            unacknowledged: queues.iter().map(|queue| queue.sent).sum(),
            waiting: self.begun.len(),
            oldest: oldest.map(|since| now.saturating_duration_since(since)),
        }
    }

    /// Where `key` is on its way; none if it is not in flight.
    #[must_use]
    pub fn trace(&self, key: &KeyId, now: Instant) -> Option<FlightTrace> {
        let flight = self.keys.get(key)?;
        let age = |since: Instant| now.saturating_duration_since(since);
        let outcomes = flight.outcomes.iter().map(|(worker, outcome)| (worker.clone(), outcome.result.clone()));
        Some(FlightTrace {
            queued: flight.queued.as_ref().map(|queued| age(queued.since)),
            unacknowledged: flight.sent.len(),
            waiting: flight.requests.len(),
            late: flight.late.as_ref().map(|late| age(late.since)).filter(|age| *age < RETRY_WINDOW),
            outcomes: outcomes.collect(),
        })
    }

    /// Caches the answer to the router of `key`, if there is room.
    pub fn cache(&mut self, key: &KeyId, worker: Option<WorkerName>, now: Instant) {
        if self.answers.len() >= CACHED_ANSWERS_MAX {
            self.expire_answers(now);
        }
        if self.answers.len() < CACHED_ANSWERS_MAX {
            let answer = &mut self.keys.entry(key.clone()).or_default().answer;
            if answer.is_none() {
                self.answers.push_back(CachedKey { since: now, key: key.clone() });
            }
            *answer = Some(CachedAnswer { since: now, worker });
        }
    }

    /// The cached answer to the router of `key`.
    #[must_use]
    pub fn cached(&self, key: &KeyId, now: Instant) -> Option<&CachedAnswer> {
        let answer = self.keys.get(key)?.answer.as_ref();
        answer.filter(|answer| !is_over(answer.since, ANSWER_TTL, now))
    }

    /// Applies other access lists: keys that it denies leave the queues.
    pub fn apply(&mut self, admission: Arc<Admission>, now: Instant) {
        self.admission = admission;
        self.forget_late();
        self.give_up_queued(now);
        self.drop_idle();
    }

    /// Drops entries whose time is over.
    pub fn expire(&mut self, now: Instant) {
        for flight in self.keys.values_mut() {
            self.late_keys -= usize::from(flight.late.take_if(|late| is_over(late.since, RETRY_WINDOW, now)).is_some());
        }
        if self.late_keys == 0 {
            self.invalidated.clear();
        }
        self.expire_answers(now);
        self.give_up_queued(now);
        self.drop_idle();
    }

    fn expire_answers(&mut self, now: Instant) {
        while self.answers.front().is_some_and(|cached| is_over(cached.since, ANSWER_TTL, now))
            && let Some(CachedKey { key, .. }) = self.answers.pop_front()
        {
            let Some(flight) = self.keys.get_mut(&key) else { continue };
            flight.answer.take_if(|answer| is_over(answer.since, ANSWER_TTL, now));
            match &flight.answer {
                Some(newer) => self.answers.push_back(CachedKey { since: newer.since, key }),
                None => self.drop_if_idle(&key),
            }
        }
    }

    fn give_up_queued(&mut self, now: Instant) {
        let Self { keys, admission, established, unestablished, .. } = self;
        for queue in [established, unestablished] {
            queue.keys.retain(|key| {
                let Some(flight) = keys.get_mut(key) else { return false };
                let denied = admission.denies(key.domain.name(), &key.key);
                let given_up = flight.queued.take_if(|queued| denied || is_over(queued.since, WAIT_MAX, now));
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
            } else if !flight.needs_outcomes() {
                flight.outcomes.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests;
