//! One gateway, by the messages of its worker: whether it is alive, which domains it serves, and how many peers it has. No
//! IO, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use wgkex_common::Domain;
use wgkex_common::wire::message::{Hello, WorkerData};

/// How long one of these counts when nothing supports it: a status, which is retained; a count or confirmation without a
/// status, after a last will that was published late; a hello that was not repeated. A little more than the minute after
/// which every worker publishes its counts again, and those of ours their hello.
const UNSUPPORTED_LIFETIME: Duration = Duration::from_secs(65);
/// How long a worker whose status is online may publish nothing. The original skips a count when its dump was interrupted.
const LIVENESS: Duration = Duration::from_secs(150);
/// The same count again within this time is a repetition for a program that has just connected: new counts are published every minute.
pub(super) const REPEATED: Duration = Duration::from_secs(50);

/// A worker's messages, and what follows from them.
#[derive(Debug, Default)]
pub(super) struct Gateway {
    /// Whether it is taken to be alive: [`Gateway::alive_until`] is not over.
    pub online: bool,
    status: Option<Status>,
    /// When it last published anything of its own, since its status was last offline.
    last_sign: Option<Instant>,
    /// When it last published a count or a confirmation, since its status was last offline.
    last_service: Option<Instant>,
    pub hello: Option<Hello>,
    /// A hello that was neither repeated nor followed by confirmations. It counts again if the worker confirms a key.
    expired_hello: Option<Hello>,
    /// When it last published a hello or a confirmation.
    hello_renewed: Option<Instant>,
    /// The hello was published since the worker was last offline, and not found as retained.
    is_hello_live: bool,
    /// It did not confirm a key in time, and has published nothing since.
    pub is_unresponsive: bool,
    /// When it was last logged that it did not.
    pub timeout_logged: Option<Instant>,
    pub data: BTreeMap<Domain, WorkerData>,
    /// Domains whose data was removed from the server, and not published again. It is still in `data` where the worker goes on
    /// counting.
    pub removed_data: BTreeSet<Domain>,
    /// Connected peers of each domain with a count, corrected by the answers given since; none if the domain is offline.
    pub peers: BTreeMap<Domain, Option<u64>>,
    /// The last new count of each domain.
    counts: BTreeMap<Domain, Count>,
    /// When the last count of each domain arrived, new or not.
    last_counted: BTreeMap<Domain, Instant>,
}

/// A status message.
#[derive(Debug, Clone, Copy)]
struct Status {
    at: Instant,
    online: bool,
}

/// A count of connected peers.
#[derive(Debug, Clone, Copy)]
struct Count {
    at: Instant,
    peers: u64,
}

/// What a count message says of a domain's peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerCount {
    /// So many are connected.
    Connected(u64),
    /// The domain is offline there.
    Offline,
    /// The retained count is removed.
    Removed,
}

impl Gateway {
    /// Whether it has ever served, as far as retained messages show.
    pub fn has_served(&self) -> bool {
        self.online
            || self.hello.is_some()
            || self.expired_hello.is_some()
            || !self.data.is_empty()
            || !self.peers.is_empty()
    }

    pub fn confirms(&self) -> bool {
        self.hello.as_ref().is_some_and(Hello::confirms)
    }

    /// The answer for a router, if this gateway can serve it now.
    pub fn serves(&self, domain: &Domain) -> Option<&WorkerData> {
        self.has_online(domain).then(|| self.data.get(domain)).flatten()
    }

    /// Whether it is online, and the domain there.
    pub fn has_online(&self, domain: &Domain) -> bool {
        self.online && self.peers.get(domain).is_some_and(Option::is_some) && self.may_serve(domain)
    }

    /// Whether it installs keys of the domain, as far as its messages show. An original that has just started has data, and
    /// installs keys, before it publishes its first count.
    pub fn installs(&self, domain: &Domain) -> bool {
        let has_begun = || !self.confirms() && !self.peers.contains_key(domain) && self.data.contains_key(domain);
        self.has_online(domain) || (self.online && has_begun())
    }

    /// False for a domain that its hello does not name: what is retained there is left from an earlier config.
    pub fn may_serve(&self, domain: &Domain) -> bool {
        self.hello.as_ref().is_none_or(|hello| hello.serves(domain.name()))
    }

    /// Whether it is online, and has data or a count of the domain, be it that the domain is offline there.
    pub fn is_at_work(&self, domain: &Domain) -> bool {
        self.online && self.may_serve(domain) && (self.data.contains_key(domain) || self.peers.contains_key(domain))
    }

    /// Whether one of its messages is about the domain.
    pub fn has_state(&self, domain: &Domain) -> bool {
        let is_named = |hello: &Hello| hello.serves(domain.name());
        self.data.contains_key(domain)
            || self.peers.contains_key(domain)
            || self.hello.as_ref().or(self.expired_hello.as_ref()).is_some_and(is_named)
    }

    /// Connected peers of all domains.
    pub fn peers(&self) -> u64 {
        self.peers.values().flatten().sum()
    }

    /// Until when it is taken to be alive. A status that nothing supports counts as long as a count without a status: either
    /// may be written by somebody else, or be a last will that was published late.
    fn alive_until(&self) -> Option<Instant> {
        match (self.status, self.last_sign, self.last_service) {
            (Some(Status { online: true, .. }), Some(sign), _) => Some(sign + LIVENESS),
            (Some(Status { online: true, at }), None, _) => Some(at + UNSUPPORTED_LIFETIME),
            // Its status is offline, or there is none: the server delivers none, or somebody removed it.
            (Some(Status { online: false, .. }) | None, _, service) => {
                service.map(|service| service + UNSUPPORTED_LIFETIME)
            }
        }
    }

    pub fn is_alive(&self, now: Instant) -> bool {
        self.alive_until().is_some_and(|until| now < until)
    }

    /// It has published something just now, `is_service` if only a worker that serves publishes that.
    fn on_sign_of_life(&mut self, is_service: bool, now: Instant) {
        self.last_sign = Some(now);
        if is_service {
            self.last_service = Some(now);
        }
        self.online = self.is_alive(now);
    }

    /// A worker of ours publishes its hello before its status. One that comes online without a hello is another program under
    /// the same name, and a hello that was found as retained is not its own.
    pub fn apply_status(&mut self, online: bool, retained: bool, now: Instant) {
        self.status = Some(Status { at: now, online });
        self.is_unresponsive = false;
        if !online {
            (self.last_sign, self.last_service, self.is_hello_live) = (None, None, false);
        }
        if online && !retained && !self.is_hello_live {
            (self.hello, self.expired_hello) = (None, None);
        }
        self.online = self.is_alive(now);
    }

    pub fn apply_hello(&mut self, hello: Option<Hello>, retained: bool, now: Instant) {
        self.is_hello_live = hello.is_some() && !retained;
        (self.hello, self.expired_hello, self.hello_renewed) = (hello, None, Some(now));
        if self.is_hello_live {
            self.on_sign_of_life(false, now);
        }
    }

    /// It published outcomes or handshakes of keys; false if it is not a worker that does.
    pub fn apply_confirmation(&mut self, now: Instant) -> bool {
        let expired = self.expired_hello.take_if(|hello| hello.confirms());
        self.hello = self.hello.take().or(expired);
        if !self.confirms() {
            return false;
        }
        (self.is_unresponsive, self.hello_renewed) = (false, Some(now));
        self.on_sign_of_life(true, now);
        true
    }

    /// A hello that is neither repeated nor followed by confirmations may be somebody else's, or left from a worker of ours
    /// that was replaced by an original.
    pub fn expire_hello(&mut self, now: Instant) {
        let is_over = |renewed: Instant| now.saturating_duration_since(renewed) >= UNSUPPORTED_LIFETIME;
        if self.online && self.hello_renewed.is_some_and(is_over) {
            self.expired_hello = self.hello.take().or_else(|| self.expired_hello.take());
        }
    }

    pub fn apply_data(&mut self, domain: Domain, data: WorkerData, retained: bool, now: Instant) {
        if !retained {
            self.on_sign_of_life(false, now);
        }
        self.removed_data.remove(&domain);
        self.data.insert(domain, data);
    }

    /// Its data of the domain was removed from the server. Says whether it counts all the same, as long as the worker goes on
    /// counting there: an original publishes its data once, when it connects.
    pub fn keeps_removed_data(&mut self, domain: &Domain, now: Instant) -> bool {
        let keeps = self.data.contains_key(domain) && self.has_counted(domain, now);
        self.removed_data.insert(domain.clone());
        if !keeps {
            self.data.remove(domain);
        }
        keeps
    }

    /// Drops removed data of domains in which it counts no longer, and returns them.
    pub fn expire_data(&mut self, now: Instant) -> Vec<Domain> {
        let is_over = |domain: &&Domain| self.data.contains_key(*domain) && !self.has_counted(domain, now);
        let over: Vec<_> = self.removed_data.iter().filter(is_over).cloned().collect();
        for domain in &over {
            self.data.remove(domain);
        }
        over
    }

    /// Whether it has recently counted its peers of the domain, or has recently come online.
    fn has_counted(&self, domain: &Domain, now: Instant) -> bool {
        let came_online = self.status.and_then(|status| status.online.then_some(status.at));
        let last = self.last_counted.get(domain).copied().max(came_online);
        last.is_some_and(|last| now.saturating_duration_since(last) < LIVENESS)
    }

    /// A count that is published once more for a newcomer says nothing of the answers given since.
    fn is_repeated(&self, domain: &Domain, peers: u64, now: Instant) -> bool {
        let is_same = |count: &Count| count.peers == peers && now.saturating_duration_since(count.at) < REPEATED;
        self.peers.get(domain).is_some_and(Option::is_some) && self.counts.get(domain).is_some_and(is_same)
    }

    pub fn apply_count(&mut self, domain: Domain, count: PeerCount, retained: bool, now: Instant) {
        self.is_unresponsive = false;
        if !retained && count != PeerCount::Removed {
            self.on_sign_of_life(matches!(count, PeerCount::Connected(_)), now);
        }
        if matches!(count, PeerCount::Connected(_)) {
            self.last_counted.insert(domain.clone(), now);
        }
        match count {
            PeerCount::Connected(peers) if self.is_repeated(&domain, peers, now) => None,
            PeerCount::Connected(peers) => {
                self.counts.insert(domain.clone(), Count { at: now, peers });
                self.peers.insert(domain, Some(peers))
            }
            PeerCount::Offline => self.peers.insert(domain, None),
            PeerCount::Removed => self.peers.remove(&domain),
        };
    }
}
