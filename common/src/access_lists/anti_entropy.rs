//! Which brokers to request records from, and when: brokers publish a digest of their records, and a program with
//! another digest requests them. No IO, no clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::BrokerName;
use crate::wire::message::{Hello, Requester};

/// Brokers that are remembered at most.
const LIST_BROKERS_MAX: usize = 4096;
/// How long to wait for the effect of the first request before it is sent again; doubled each time.
const REQUEST_RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest pause between two requests to the same broker.
const REQUEST_RETRY_MAX: Duration = Duration::from_secs(60);
/// All records are broadcast no more often than this, however many requests come.
const BROADCAST_INTERVAL: Duration = Duration::from_secs(1);
/// The longest pause between two broadcasts for requests on the topic on which anybody may publish.
const SHARED_PAUSE_MAX: Duration = Duration::from_secs(8);
/// The most requesters that are remembered, and how long after their last request.
const REQUESTERS_MAX: usize = 4096;
const REQUESTER_LIFETIME: Duration = Duration::from_secs(120);
/// Retained messages are received within this time after subscribing, if there are any.
const WAIT_FOR_RETAINED: Duration = Duration::from_millis(100);
/// How long to wait for retained hellos when no broker is known.
const WAIT_FOR_HELLOS: Duration = Duration::from_millis(500);
/// The longest time that keys wait for records.
const GATE_MAX: Duration = Duration::from_secs(3);
/// The same if attempts to connect fail, so that no broker can answer.
const GATE_MAX_OFFLINE: Duration = Duration::from_millis(250);

/// The state of the exchange of records with brokers.
#[derive(Debug)]
pub(super) struct AntiEntropy {
    /// This broker's own name; none for a worker.
    own: Option<BrokerName>,
    brokers: BTreeMap<BrokerName, OtherBroker>,
    connection: BusState,
    /// The program's other session is connected: this one will be soon.
    is_server_reachable: bool,
    /// The programs that requested all records.
    requesters: BTreeMap<Requester, Requests>,
    broadcast_at: Option<Instant>,
    /// The digest of the records at the last check whether to broadcast them.
    last_digest: String,
}

/// The requests of one requester.
#[derive(Debug)]
struct Requests {
    last: Instant,
    /// The records have not been broadcast since the request.
    is_waiting: bool,
    /// When the records were last broadcast for it, and how often unchanged.
    answered: Option<Instant>,
    times: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BusState {
    /// The first attempt has no result yet.
    Connecting,
    /// Lost, or the last attempt failed.
    Down,
    /// Subscribed since then; retained hellos are being received.
    Up(Instant),
}

#[derive(Debug)]
struct OtherBroker {
    digest: String,
    names_records: bool,
    requested_at: Option<Instant>,
    tries: u32,
}

impl AntiEntropy {
    pub fn new(own: Option<BrokerName>) -> Self {
        Self {
            own,
            brokers: BTreeMap::new(),
            connection: BusState::Connecting,
            is_server_reachable: false,
            requesters: BTreeMap::new(),
            broadcast_at: None,
            last_digest: String::new(),
        }
    }

    /// The session is up.
    pub fn up(&mut self, now: Instant) {
        self.connection = BusState::Up(now);
    }

    /// Whether the program's other session is connected.
    pub fn set_server_reachable(&mut self, is_reachable: bool) {
        self.is_server_reachable = is_reachable;
    }

    /// The connection is lost, so brokers may change without notice; or an attempt to connect failed.
    pub fn down(&mut self) {
        self.connection = BusState::Down;
        self.brokers.clear();
    }

    /// Handles the hello of a broker; none if it is cleared.
    pub fn broker(&mut self, name: &BrokerName, hello: Option<&Hello>) {
        let names_records = hello.is_some_and(Hello::names_records);
        let digest = hello.filter(|hello| hello.answers()).and_then(|hello| hello.records.clone());
        let Some(digest) = digest.filter(|_| self.own.as_ref() != Some(name)) else {
            self.brokers.remove(name);
            return;
        };
        if let Some(known) = self.brokers.get_mut(name).filter(|known| known.digest == digest) {
            known.names_records = names_records;
            return;
        }
        if self.brokers.len() < LIST_BROKERS_MAX || self.brokers.contains_key(name) {
            self.brokers.insert(name.clone(), OtherBroker { digest, names_records, requested_at: None, tries: 0 });
        }
    }

    /// Whether requests for records to this broker go to a topic that belongs to the requesting program.
    pub fn names_records(&self, broker: &BrokerName) -> bool {
        self.brokers.get(broker).is_some_and(|broker| broker.names_records)
    }

    /// A program requests all records.
    pub fn on_request(&mut self, requester: Requester, now: Instant) {
        let is_over = |requests: &Requests| now.saturating_duration_since(requests.last) >= REQUESTER_LIFETIME;
        if self.requesters.len() >= REQUESTERS_MAX && !self.requesters.contains_key(&requester) {
            self.requesters.retain(|_, requests| !is_over(requests));
            if self.requesters.len() >= REQUESTERS_MAX {
                return;
            }
        }
        let new = || Requests { last: now, is_waiting: true, answered: None, times: 0 };
        let requests = self.requesters.entry(requester).or_insert_with(new);
        if is_over(requests) {
            requests.times = 0;
        }
        (requests.last, requests.is_waiting) = (now, true);
    }

    /// The brokers to send a request to now, given the own digest.
    pub fn brokers_to_request(&mut self, digest: &str, now: Instant) -> Vec<BrokerName> {
        let mut names = Vec::new();
        for (name, broker) in &mut self.brokers {
            let pause = (REQUEST_RETRY_MIN * 2_u32.pow(broker.tries.min(6))).min(REQUEST_RETRY_MAX);
            if broker.digest == digest {
                (broker.requested_at, broker.tries) = (None, 0);
            } else if broker.requested_at.is_none_or(|asked| now.saturating_duration_since(asked) >= pause) {
                broker.tries += u32::from(broker.requested_at.is_some());
                broker.requested_at = Some(now);
                names.push(name.clone());
            }
        }
        names
    }

    /// Whether all records, which have this digest, are to be published now; they count as published then. The same ones are
    /// published for the same requester with growing pauses, half as long as those of
    /// [`AntiEntropy::brokers_to_request`].
    pub fn should_broadcast(&mut self, digest: &str, now: Instant) -> bool {
        if self.last_digest != digest {
            digest.clone_into(&mut self.last_digest);
            self.requesters.values_mut().for_each(|requests| requests.times = 0);
        }
        let long_ago = self.broadcast_at.is_none_or(|at| now.saturating_duration_since(at) >= BROADCAST_INTERVAL);
        let is_due = long_ago
            && self.own.is_some()
            && self.requesters.iter().any(|(requester, requests)| requests.is_due(requester, now));
        if is_due {
            self.broadcast_at = Some(now);
            for requests in self.requesters.values_mut().filter(|requests| requests.is_waiting) {
                (requests.is_waiting, requests.answered) = (false, Some(now));
                requests.times = requests.times.saturating_add(1);
            }
        }
        is_due
    }

    /// Whether a gate that was closed at `closed_at` opens: either the records of all brokers are known, or the time
    /// limit is over, which is an error.
    pub fn gate_state(&self, closed_at: Instant, digest: &str, now: Instant) -> Option<Result<(), TimedOut>> {
        let for_long = |since: Instant, time| now.saturating_duration_since(since) >= time;
        let agree = self.brokers.values().all(|broker| broker.digest == digest);
        let settled = if self.brokers.is_empty() { WAIT_FOR_HELLOS } else { WAIT_FOR_RETAINED };
        let longest = match self.connection {
            BusState::Up(since) if agree && for_long(since, settled) => return Some(Ok(())),
            BusState::Down if !self.is_server_reachable => GATE_MAX_OFFLINE,
            BusState::Up(_) | BusState::Connecting | BusState::Down => GATE_MAX,
        };
        for_long(closed_at, longest).then_some(Err(TimedOut))
    }
}

impl Requests {
    fn is_due(&self, requester: &Requester, now: Instant) -> bool {
        let longest = match requester {
            Requester::Named(_) => REQUEST_RETRY_MAX / 2,
            Requester::Shared => SHARED_PAUSE_MAX,
        };
        let pause =
            if self.times == 0 { Duration::ZERO } else { REQUEST_RETRY_MIN / 2 * 2_u32.pow(self.times.min(7) - 1) };
        let is_over = |answered: Instant| now.saturating_duration_since(answered) >= pause.min(longest);
        self.is_waiting && self.answered.is_none_or(is_over)
    }
}

/// The records were not received in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimedOut;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::name::Participant;

    const MS: Duration = Duration::from_millis(1);

    fn name(name: &str) -> BrokerName {
        name.parse().unwrap()
    }

    fn hello(digest: Option<&str>) -> Hello {
        Hello { records: digest.map(str::to_owned), ..Hello::broker(Vec::new(), 1) }
    }

    fn anti_entropy(own: Option<&str>, brokers: &[(&str, &str)]) -> (AntiEntropy, Instant) {
        let (mut anti_entropy, now) = (AntiEntropy::new(own.map(name)), Instant::now());
        anti_entropy.up(now);
        for (broker, digest) in brokers {
            anti_entropy.broker(&name(broker), Some(&hello(Some(digest))));
        }
        (anti_entropy, now)
    }

    #[test]
    fn a_broker_with_other_records_is_asked_with_growing_pauses() {
        let (mut anti_entropy, begun) = anti_entropy(None, &[("b1", "x"), ("b2", "y")]);
        assert_eq!(anti_entropy.brokers_to_request("y", begun), [name("b1")]);
        let mut asked = Vec::new();
        for second in 1..300 {
            if !anti_entropy.brokers_to_request("y", begun + second * 1000 * MS).is_empty() {
                asked.push(second);
            }
        }
        assert_eq!(asked, [1, 3, 7, 15, 31, 63, 123, 183, 243]);
        assert!(anti_entropy.brokers_to_request("x", begun + 300_000 * MS) == [name("b2")], "b1 agrees now");
        anti_entropy.broker(&name("b1"), Some(&hello(Some("z"))));
        assert_eq!(anti_entropy.brokers_to_request("y", begun + 300_000 * MS), [name("b1")], "it says another one");
    }

    #[test]
    fn only_other_brokers_that_answer_and_publish_a_digest_are_asked() {
        let (mut anti_entropy, now) = anti_entropy(Some("own"), &[("own", "x"), ("b1", "x"), ("b2", "x")]);
        anti_entropy.broker(&name("old"), Some(&hello(None)));
        anti_entropy.broker(&name("w"), Some(&Hello::worker(Vec::new())));
        anti_entropy.broker(&name("b2"), None);
        assert_eq!(anti_entropy.brokers_to_request("y", now), [name("b1")]);
        anti_entropy.down();
        assert!(anti_entropy.brokers_to_request("z", now).is_empty());
        for n in 0..5_000 {
            anti_entropy.broker(&name(&n.to_string()), Some(&hello(Some("x"))));
        }
        assert_eq!(anti_entropy.brokers.len(), LIST_BROKERS_MAX);
    }

    #[test]
    fn a_broker_broadcasts_at_most_once_a_second() {
        let (mut broker, begun) = anti_entropy(Some("own"), &[]);
        let mut said = 0;
        for ms in 0..3_500 {
            broker.on_request(worker(&ms.to_string()), begun + ms * MS);
            said += u32::from(broker.should_broadcast("x", begun + ms * MS));
        }
        assert_eq!(said, 4);
        assert!(
            broker.should_broadcast("x", begun + 10_000 * MS) && !broker.should_broadcast("x", begun + 20_000 * MS),
            "nobody asked again"
        );
        let (mut gateway, now) = anti_entropy(None, &[]);
        gateway.on_request(Requester::Shared, now);
        assert!(!gateway.should_broadcast("x", now));
    }

    fn worker(name: &str) -> Requester {
        Requester::Named(Participant::Worker(name.parse().unwrap()))
    }

    /// Failed when each request was answered: all records were published once a second, for ever.
    #[test]
    fn the_same_records_are_published_for_the_same_requester_with_growing_pauses() {
        let broadcasts = |requester: &Requester, seconds: &[u32]| {
            let (mut broker, begun) = anti_entropy(Some("own"), &[]);
            let at = |second: &u32| begun + *second * 1000 * MS;
            let due = |second: &&u32| {
                broker.on_request(requester.clone(), at(second));
                broker.should_broadcast("x", at(second))
            };
            seconds.iter().filter(due).copied().collect::<Vec<_>>()
        };
        let always: Vec<_> = (0..100).collect();
        assert_eq!(broadcasts(&worker("thief"), &always), [0, 1, 2, 4, 8, 16, 32, 62, 92]);
        assert_eq!(
            broadcasts(&Requester::Shared, &always),
            [0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96]
        );
        let as_programs_ask = [0, 1, 3, 7, 15, 31, 63, 123, 183];
        assert_eq!(broadcasts(&worker("gw"), &as_programs_ask), as_programs_ask);
    }

    #[test]
    fn a_requester_that_has_just_started_and_other_records_wait_for_no_pause_of_a_requester() {
        let (mut broker, begun) = anti_entropy(Some("own"), &[]);
        let mut asks = |requester: Requester, digest: &str, second: u32| {
            broker.on_request(requester, begun + second * 1000 * MS);
            broker.should_broadcast(digest, begun + second * 1000 * MS)
        };
        let thief = || worker("thief");
        let said = (0..50).filter(|second| asks(thief(), "x", *second)).count();
        assert_eq!(said, 7);
        assert!(asks(worker("gw"), "x", 50) && !asks(thief(), "x", 51));
        assert!(asks(thief(), "y", 52), "there are others now");
    }

    #[test]
    fn the_requesters_that_are_remembered_are_bounded() {
        let (mut broker, now) = anti_entropy(Some("own"), &[]);
        (0..2 * REQUESTERS_MAX).for_each(|n| broker.on_request(worker(&n.to_string()), now));
        assert_eq!(broker.requesters.len(), REQUESTERS_MAX);
        broker.on_request(worker("later"), now + REQUESTER_LIFETIME);
        assert_eq!(broker.requesters.len(), 1);
    }

    #[test]
    fn keys_wait_until_the_records_agree_and_not_for_ever() {
        let after = |anti_entropy: &AntiEntropy, begun, ms| anti_entropy.gate_state(begun, "x", begun + ms * MS);
        let (agreeing, begun) = anti_entropy(None, &[("b1", "x"), ("b2", "x")]);
        assert_eq!([99, 100].map(|ms| after(&agreeing, begun, ms)), [None, Some(Ok(()))]);
        let (other, begun) = anti_entropy(None, &[("b1", "x"), ("b2", "y")]);
        assert_eq!([2_999, 3_000].map(|ms| after(&other, begun, ms)), [None, Some(Err(TimedOut))]);
        let (nobody, begun) = anti_entropy(None, &[]);
        assert_eq!([499, 500].map(|ms| after(&nobody, begun, ms)), [None, Some(Ok(()))]);
        let connecting = AntiEntropy::new(None);
        assert_eq!([2_999, 3_000].map(|ms| after(&connecting, begun, ms)), [None, Some(Err(TimedOut))]);
        let (mut unreachable, begun) = anti_entropy(None, &[]);
        unreachable.down();
        assert_eq!([249, 250].map(|ms| after(&unreachable, begun, ms)), [None, Some(Err(TimedOut))]);
        unreachable.set_server_reachable(true);
        assert_eq!([250, 2_999, 3_000].map(|ms| after(&unreachable, begun, ms)), [None, None, Some(Err(TimedOut))]);
    }
}
