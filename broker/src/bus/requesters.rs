//! Which sync requests are answered. A program of this version requests keys on a topic on which only it may publish; a
//! request in its name on the topic on which every client may publish is from another program, and its chunks would go
//! to a program that has not requested them. Programs of older versions request there, and are answered.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use wgkex_common::wire::ignored::Ignored;
use wgkex_common::wire::message::{Hello, Requester, SyncRequest};
use wgkex_common::wire::name::Participant;
use wgkex_common::{BrokerName, WorkerName};

use crate::bus::sync_queue::SyncQueue;

/// A worker requests keys every 10 seconds. A worker without a request for this long may run an older version now.
const REQUEST_LIFETIME: Duration = Duration::from_secs(60);
/// The most workers, and the most brokers, that are remembered.
const REQUESTER_NAMES_MAX: usize = 4096;
/// The longest name of a domain in a request, in bytes.
const DOMAIN_MAX: usize = 255;

/// The programs that request keys on topics of their own, and the queue of requests to answer.
#[derive(Debug)]
pub struct Requesters {
    /// This broker.
    own: BrokerName,
    requests: SyncQueue,
    /// When each worker last requested keys on its own topic.
    workers: BTreeMap<WorkerName, Instant>,
    /// The brokers that request keys on their own topic.
    brokers: BTreeSet<BrokerName>,
}

impl Requesters {
    /// No request yet to the broker `own`; `requests` is the queue.
    #[must_use]
    pub fn new(own: BrokerName, requests: SyncQueue) -> Self {
        Self { own, requests, workers: BTreeMap::new(), brokers: BTreeSet::new() }
    }

    /// A request on a topic on which only this worker may publish; every broker receives it.
    pub fn on_worker_request(&mut self, worker: &WorkerName, request: SyncRequest) -> Result<(), Ignored> {
        let is_for_this_broker = self.is_for_this_broker(worker, &request.from, request.to.as_ref())?;
        self.on_worker(worker, Instant::now());
        if is_for_this_broker {
            self.enqueue(Requester::Named(request.from.clone()), request)?;
        }
        Ok(())
    }

    /// Whether a request on a worker's own topic is for this broker. An error if its `from` names another program.
    pub fn is_for_this_broker(
        &self,
        worker: &WorkerName,
        from: &Participant,
        to: Option<&BrokerName>,
    ) -> Result<bool, Ignored> {
        let is_in_its_name = matches!(from, Participant::Worker(from) if from == worker);
        if is_in_its_name { Ok(to == Some(&self.own)) } else { Err(Ignored::Payload) }
    }

    /// A request on a topic on which only brokers may publish.
    pub fn on_broker_request(&self, request: SyncRequest) -> Result<(), Ignored> {
        if !matches!(request.from, Participant::Broker(_)) {
            return Err(Ignored::Payload);
        }
        self.enqueue(Requester::Named(request.from.clone()), request)
    }

    /// A request on the topic of older versions, which may be in another program's name.
    pub fn on_shared_topic(&self, request: SyncRequest) -> Result<(), Ignored> {
        if self.has_own_topic(&request.from, Instant::now()) {
            return Err(Ignored::Payload);
        }
        self.enqueue(Requester::Shared, request)
    }

    fn enqueue(&self, requester: Requester, request: SyncRequest) -> Result<(), Ignored> {
        if request.domain.len() > DOMAIN_MAX {
            return Err(Ignored::Payload);
        }
        self.requests.push(requester, request);
        Ok(())
    }

    fn on_worker(&mut self, worker: &WorkerName, now: Instant) {
        if self.workers.len() >= REQUESTER_NAMES_MAX && !self.workers.contains_key(worker) {
            self.workers.retain(|_, requested| is_recent(*requested, now));
        }
        if self.workers.len() < REQUESTER_NAMES_MAX || self.workers.contains_key(worker) {
            self.workers.insert(worker.clone(), now);
        }
    }

    /// A broker published its hello, or removed it.
    pub fn on_broker(&mut self, broker: &BrokerName, hello: Option<&Hello>) {
        if !hello.is_some_and(Hello::names_requests) {
            self.brokers.remove(broker);
        } else if self.brokers.len() < REQUESTER_NAMES_MAX {
            self.brokers.insert(broker.clone());
        }
    }

    /// Whether the program requests keys on a topic of its own.
    fn has_own_topic(&self, from: &Participant, now: Instant) -> bool {
        match from {
            Participant::Worker(worker) => self.workers.get(worker).is_some_and(|last| is_recent(*last, now)),
            Participant::Broker(broker) => self.brokers.contains(broker),
        }
    }
}

fn is_recent(requested: Instant, now: Instant) -> bool {
    now.saturating_duration_since(requested) < REQUEST_LIFETIME
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn requesters() -> (Requesters, SyncQueue) {
        let requests = SyncQueue::default();
        (Requesters::new("own".parse().unwrap(), requests.clone()), requests)
    }

    fn request(from: Participant, to: Option<&str>) -> SyncRequest {
        SyncRequest { from, to: to.map(|to| to.parse().unwrap()), domain: "d".into(), after: None, younger_than: None }
    }

    #[test]
    fn a_request_is_answered_to_the_program_that_sent_it() {
        let (mut requesters, requests) = requesters();
        let [worker, other, broker] = [
            Participant::Worker(name("gw")),
            Participant::Worker(name("x")),
            Participant::Broker("b".parse().unwrap()),
        ];
        let is_answered = |result: Result<(), Ignored>| (result.is_ok(), requests.take().is_some());
        assert_eq!(
            is_answered(requesters.on_worker_request(&name("gw"), request(worker.clone(), Some("own")))),
            (true, true)
        );
        assert_eq!(
            is_answered(requesters.on_worker_request(&name("gw"), request(worker.clone(), Some("another")))),
            (true, false)
        );
        assert_eq!(
            is_answered(requesters.on_worker_request(&name("gw"), request(other.clone(), Some("own")))),
            (false, false)
        );
        assert_eq!(is_answered(requesters.on_broker_request(request(broker, None))), (true, true));
        assert_eq!(is_answered(requesters.on_broker_request(request(other.clone(), None))), (false, false));
        assert_eq!(is_answered(requesters.on_shared_topic(request(other, None))), (true, true));
        assert_eq!(is_answered(requesters.on_shared_topic(request(worker, None))), (false, false));
        let long =
            SyncRequest { domain: "d".repeat(DOMAIN_MAX + 1), ..request(Participant::Worker(name("old")), None) };
        assert_eq!(is_answered(requesters.on_shared_topic(long)), (false, false));
        let no_name = r#"{"from":{"worker":"a/b"},"domain":"d","after":null,"younger_than":null}"#;
        assert!(serde_json::from_str::<SyncRequest>(no_name).is_err());
    }

    #[test]
    fn a_program_that_requests_on_its_own_topic_does_not_do_so_elsewhere() {
        let ((mut requesters, _requests), now) = (requesters(), Instant::now());
        let [new, old] = ["new", "old"].map(|name| Participant::Worker(self::name(name)));
        requesters.on_worker(&name("new"), now);
        let asks_elsewhere = |requesters: &Requesters, from, seconds| {
            !requesters.has_own_topic(from, now + Duration::from_secs(seconds))
        };
        assert!(!asks_elsewhere(&requesters, &new, 59) && asks_elsewhere(&requesters, &old, 0));
        assert!(asks_elsewhere(&requesters, &new, 60), "an older version has taken its place");
        let new_broker: BrokerName = "new".parse().unwrap();
        let broker = Participant::Broker(new_broker.clone());
        assert!(!requesters.has_own_topic(&broker, now));
        requesters.on_broker(&new_broker, Some(&Hello::broker(Vec::new(), 1)));
        assert!(requesters.has_own_topic(&broker, now));
        requesters.on_broker(
            &new_broker,
            Some(&Hello { capabilities: vec![Hello::ANSWER.into()], ..Hello::broker(Vec::new(), 2) }),
        );
        assert!(!requesters.has_own_topic(&broker, now));
    }

    #[test]
    fn the_programs_that_are_remembered_are_bounded() {
        let ((mut requesters, _requests), now) = (requesters(), Instant::now());
        for n in 0..2 * REQUESTER_NAMES_MAX {
            requesters.on_worker(&name(&n.to_string()), now);
            requesters.on_broker(&n.to_string().parse().unwrap(), Some(&Hello::broker(Vec::new(), 1)));
        }
        assert_eq!((requesters.workers.len(), requesters.brokers.len()), (REQUESTER_NAMES_MAX, REQUESTER_NAMES_MAX));
        requesters.on_worker(&name("later"), now + REQUEST_LIFETIME);
        assert_eq!(requesters.workers.len(), 1);
    }
}
