//! Elects the broker of a bus for a job that only one can do, such as giving the addresses of all tenants: the online
//! broker that was started first. Each broker computes the result by itself, from the retained messages of all. No IO,
//! no clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wgkex_common::BrokerName;
use wgkex_common::wire::message::ServiceAnnouncement;

/// How long a broker that was just started waits for the states of others, at most.
const ELECTION_START_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a broker may be offline until it counts as gone: a broker that reconnects is offline for a moment.
const CANDIDATE_ABSENCE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the connection to the bus may be lost until the other brokers count as gone.
const BUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Brokers that are remembered at most: more than any bus has.
const CANDIDATES_MAX: usize = 256;

/// The time by the wall clock, for [`ServiceAnnouncement::since`] of a broker that starts now.
pub fn since() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    u64::try_from(since).unwrap_or(u64::MAX)
}

/// The known brokers, of which one is elected.
#[derive(Debug)]
pub struct Election {
    own: BrokerName,
    announced: ServiceAnnouncement,
    others: BTreeMap<BrokerName, CandidateBroker>,
    /// The time from which it no longer waits for its own messages.
    decide_at: Instant,
    /// Its own status was received back, and its hello: the server delivers them behind the retained ones of other
    /// brokers.
    is_status_back: bool,
    is_hello_back: bool,
    bus_lost: Option<Instant>,
}

#[derive(Debug, Default)]
struct CandidateBroker {
    is_online: bool,
    serves: bool,
    /// The service that it announces, or announced last.
    announced: Option<ServiceAnnouncement>,
    absent_since: Option<Instant>,
    /// The announced service of a run in which it did not answer.
    passed_over: Option<ServiceAnnouncement>,
}

impl CandidateBroker {
    fn changed(&mut self, now: Instant) {
        self.absent_since = if self.is_online && self.serves { None } else { self.absent_since.or(Some(now)) };
    }

    fn announced(&self, now: Instant) -> Option<&ServiceAnnouncement> {
        let is_there =
            self.absent_since.is_none_or(|since| now.saturating_duration_since(since) < CANDIDATE_ABSENCE_TIMEOUT);
        self.announced.as_ref().filter(|_| is_there && self.passed_over != self.announced)
    }
}

impl Election {
    /// Only this broker is known, which has just started.
    pub fn new(own: BrokerName, announced: ServiceAnnouncement, now: Instant) -> Self {
        Self {
            own,
            announced,
            others: BTreeMap::new(),
            decide_at: now + ELECTION_START_TIMEOUT,
            is_status_back: false,
            is_hello_back: false,
            bus_lost: Some(now),
        }
    }

    /// A broker is online, or no longer.
    pub fn on_status(&mut self, broker: BrokerName, is_online: bool, now: Instant) {
        if broker == self.own {
            self.is_status_back |= is_online;
        } else if let Some(candidate) = self.candidate(broker, now) {
            candidate.is_online = is_online;
            candidate.changed(now);
        }
    }

    /// A broker announced its service, or withdrew it.
    pub fn on_hello(&mut self, broker: BrokerName, announced: Option<ServiceAnnouncement>, now: Instant) {
        if broker == self.own {
            self.is_hello_back |= announced.as_ref() == Some(&self.announced);
        } else if let Some(candidate) = self.candidate(broker, now) {
            candidate.serves = announced.is_some();
            candidate.announced = announced.or(candidate.announced.take());
            candidate.changed(now);
        }
    }

    /// The connection to the bus is up, or lost.
    pub fn on_bus(&mut self, is_up: bool, now: Instant) {
        self.bus_lost = if is_up { None } else { self.bus_lost.or(Some(now)) };
    }

    /// The elected broker; none until enough is known.
    pub fn elected(&self, now: Instant) -> Option<&BrokerName> {
        let is_known = self.is_status_back && self.is_hello_back;
        if !is_known && now < self.decide_at {
            return None;
        }
        let own = (self.announced.since, &self.own);
        let first = self.peers(now).map(|(name, announced)| (announced.since, name)).fold(own, Ord::min);
        Some(first.1)
    }

    /// The other brokers that have the same rules, and are online.
    pub fn peers(&self, now: Instant) -> impl Iterator<Item = (&BrokerName, &ServiceAnnouncement)> {
        let is_reached = self.bus_lost.is_none_or(|lost| now.saturating_duration_since(lost) < BUS_TIMEOUT);
        self.others(now).filter(move |(_, announced)| is_reached && announced.rules == self.announced.rules)
    }

    /// Whether other brokers may be online but out of reach, as the bus was lost a moment ago.
    pub fn is_cut_off(&self, now: Instant) -> bool {
        self.bus_lost.is_some() && self.peers(now).next().is_some()
    }

    /// The service that this broker announces.
    pub fn announced(&self) -> &ServiceAnnouncement {
        &self.announced
    }

    /// This broker stood still for so long that others may have passed it over: it ranks behind them from now on, as
    /// after a restart.
    pub fn rank_last(&mut self) {
        let others = self.others.values().filter_map(|candidate| Some(candidate.announced.as_ref()?.since));
        self.announced.since = others.fold(self.announced.since, u64::max).saturating_add(1);
    }

    /// A broker does not answer although it is online: it is not elected until it is restarted.
    pub fn skip_broker(&mut self, broker: &BrokerName) {
        if let Some(candidate) = self.others.get_mut(broker) {
            candidate.passed_over = candidate.announced.clone();
        }
    }

    /// The brokers that have other rules.
    pub fn with_other_rules(&self, now: Instant) -> impl Iterator<Item = &BrokerName> {
        self.others(now).filter(|(_, announced)| announced.rules != self.announced.rules).map(|(name, _)| name)
    }

    fn others(&self, now: Instant) -> impl Iterator<Item = (&BrokerName, &ServiceAnnouncement)> {
        self.others.iter().filter_map(move |(name, candidate)| Some((name, candidate.announced(now)?)))
    }

    /// The candidate of this name; a new one is absent at once.
    fn candidate(&mut self, broker: BrokerName, now: Instant) -> Option<&mut CandidateBroker> {
        let is_known = self.others.contains_key(&broker);
        let has_room = self.others.len() < CANDIDATES_MAX && broker != self.own;
        let long_ago = now.checked_sub(CANDIDATE_ABSENCE_TIMEOUT).unwrap_or(now);
        let new = || CandidateBroker { absent_since: Some(long_ago), ..CandidateBroker::default() };
        (is_known || has_room).then(|| self.others.entry(broker).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> BrokerName {
        name.parse().unwrap()
    }

    fn announced(since: u64, rules: &str) -> ServiceAnnouncement {
        ServiceAnnouncement { since, rules: rules.into() }
    }

    #[test]
    fn the_one_that_was_started_first_is_it_as_long_as_it_is_there() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut election = Election::new(name("b"), announced(20, "r"), start);
        let who = |election: &Election, seconds| election.elected(at(seconds)).map(ToString::to_string);
        assert_eq!((who(&election, 4), who(&election, 5).as_deref()), (None, Some("b")), "without a bus");
        election.on_bus(true, at(1));
        election.on_hello(name("b"), Some(announced(19, "r")), at(1));
        election.on_status(name("b"), true, at(1));
        assert_eq!(who(&election, 1), None, "what came is retained from the run before");
        election.on_hello(name("b"), Some(announced(20, "r")), at(1));
        assert_eq!(who(&election, 1).as_deref(), Some("b"));
        for (other, since, rules, is_online) in [
            ("a", 30, "r", true),
            ("c", 10, "r", true),
            ("d", 5, "other", true),
            ("e", 1, "r", false),
            ("f", 10, "r", true),
        ] {
            election.on_hello(name(other), Some(announced(since, rules)), at(1));
            election.on_status(name(other), is_online, at(1));
        }
        election.on_status(name("g"), true, at(1));
        assert_eq!(who(&election, 2).as_deref(), Some("c"), "of two that were started at the same time by name");
        assert_eq!(election.peers(at(2)).map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "c", "f"]);
        assert_eq!(election.with_other_rules(at(2)).map(BrokerName::as_str).collect::<Vec<_>>(), ["d"]);
        election.on_status(name("c"), false, at(3));
        assert_eq!((who(&election, 5).as_deref(), who(&election, 6).as_deref()), (Some("c"), Some("f")));
        election.on_hello(name("f"), None, at(7));
        assert_eq!((who(&election, 9).as_deref(), who(&election, 10).as_deref()), (Some("f"), Some("b")));
        election.on_status(name("c"), true, at(11));
        election.on_bus(false, at(13));
        election.on_bus(false, at(19));
        assert_eq!((who(&election, 22).as_deref(), who(&election, 23).as_deref()), (Some("c"), Some("b")));
        election.on_bus(true, at(24));
        assert_eq!(who(&election, 24).as_deref(), Some("c"));
        election.skip_broker(&name("c"));
        election.on_hello(name("f"), Some(announced(20, "r")), at(24));
        assert_eq!(who(&election, 25).as_deref(), Some("b"));
        election.rank_last();
        assert_eq!(
            (who(&election, 25).as_deref(), election.announced().since),
            (Some("f"), 31),
            "behind a, which has 30"
        );
        election.on_hello(name("c"), Some(announced(11, "r")), at(25));
        assert_eq!(who(&election, 25).as_deref(), Some("c"), "one that was started again is not passed over");
    }
}
