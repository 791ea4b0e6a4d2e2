//! One gateway, by the messages of its worker: whether it is alive, which domains it serves, and how many peers it has. No
//! IO, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Sum;
use std::time::{Duration, Instant};

use wgkex_common::Domain;
use wgkex_common::peer_clock::PeerClock;
use wgkex_common::wire::drain::Drain;
use wgkex_common::wire::message::{Hello, WorkerData};

use crate::fleet::selection::DrainPhase;
use crate::fleet::status::{ORIGINAL, OfflineReason};

/// How long one of these counts when no other message supports it: a status, which is retained; a count or confirmation
/// without a status, after a last will that was published late; a hello that was not repeated. A little more than the
/// minute after which every worker publishes its counts again, and those of ours their hello.
const UNSUPPORTED_LIFETIME: Duration = Duration::from_secs(65);
/// How long a worker whose status is online may publish nothing. The original skips a count when its dump was interrupted.
const ONLINE_SILENCE_MAX: Duration = Duration::from_secs(150);
/// A status that goes offline so soon after all domains did is that of a worker that stops: it publishes those first.
const STOP_DURATION: Duration = Duration::from_secs(5);
/// The same count again within this time is a repetition for a program that has just connected: new counts are published every minute.
pub(super) const REPEATED_COUNT_WINDOW: Duration = Duration::from_secs(50);

/// A worker's messages, and the state that follows from them.
#[derive(Debug, Default)]
pub(super) struct Gateway {
    /// Whether it is taken to be alive: [`Gateway::alive_until`] is not over.
    pub online: bool,
    /// Since when it is offline, if it is known to be.
    offline: Option<OfflineSince>,
    /// When it last came online, or stopped draining; none if it was online before this broker connected.
    pub came_back: Option<Instant>,
    /// Its program when it was last online.
    program: GatewayProgram,
    status: Option<StatusMessage>,
    /// When it last published anything of its own, since its status was last offline.
    last_sign: Option<Instant>,
    /// When it last published a count or a confirmation, since its status was last offline.
    last_service: Option<Instant>,
    pub hello: Option<Hello>,
    /// Its clock, by its hellos.
    pub clock: PeerClock,
    /// A hello that was neither repeated nor followed by confirmations. It counts again if the worker confirms a key.
    expired_hello: Option<Hello>,
    /// When it last published a hello or a confirmation.
    hello_renewed: Option<Instant>,
    /// The hello was published since the worker was last offline, and not found as retained.
    is_hello_live: bool,
    /// It did not confirm a key in time, and has published nothing since.
    pub is_unresponsive: bool,
    /// When the missing confirmation was last logged.
    pub timeout_logged: Option<Instant>,
    pub data: BTreeMap<Domain, WorkerData>,
    /// Domains whose data was removed from the server, and not published again. It is still in `data` where the worker goes on
    /// counting.
    pub removed_data: BTreeSet<Domain>,
    /// The peers of each domain with a count; none if the domain is offline.
    pub peers: BTreeMap<Domain, Option<GatewayLoad>>,
    /// When each domain that is offline here became so, if this broker has seen it.
    down_since: BTreeMap<Domain, Instant>,
    /// The last new count of each domain.
    counts: BTreeMap<Domain, Count>,
    /// When the last count of each domain arrived, new or not.
    last_counted: BTreeMap<Domain, Instant>,
}

/// The peers of a gateway in a domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GatewayLoad {
    /// Those with handshakes, by its last count.
    pub connected: u64,
    /// The answers that named it since then, those that other brokers are taken to have given included.
    pub assigned: u64,
}

impl GatewayLoad {
    /// All of them.
    #[must_use]
    pub fn total(self) -> u64 {
        self.connected + self.assigned
    }
}

impl Sum for GatewayLoad {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, each| Self {
            connected: sum.connected + each.connected,
            assigned: sum.assigned + each.assigned,
        })
    }
}

/// Since when a gateway is offline, and by which sign.
#[derive(Debug, Clone, Copy)]
struct OfflineSince {
    /// None if it was so when this broker connected.
    since: Option<Instant>,
    sign: OfflineSign,
}

#[derive(Debug, Clone, Copy)]
enum OfflineSign {
    /// Its status, which is its last will, too.
    Status,
    /// It published nothing for so long.
    Silence(Duration),
}

/// The part of a gateway's state that is kept while the connection to the MQTT server is lost.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory {
    offline: Option<OfflineSince>,
    came_back: Option<Instant>,
    program: GatewayProgram,
    clock: PeerClock,
}

/// The program of a gateway.
#[derive(Debug, Clone, Default)]
enum GatewayProgram {
    /// No message of it was received.
    #[default]
    Unknown,
    /// It has no hello.
    Original,
    /// This version of ours.
    Ours(String),
}

/// A status message.
#[derive(Debug, Clone, Copy)]
struct StatusMessage {
    at: Instant,
    online: bool,
}

/// A count of connected peers.
#[derive(Debug, Clone, Copy)]
struct Count {
    at: Instant,
    peers: u64,
}

/// The content of a count message of a domain.
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

    /// The drain that it publishes.
    pub fn drain(&self) -> Option<&Drain> {
        self.hello.as_ref()?.drain.as_ref()
    }

    /// The phase of its drain, if it publishes that it drains.
    pub fn drain_phase(&self) -> Option<DrainPhase> {
        let removes = |drain: &Drain| drain.passed_deadline().is_some();
        self.drain().map(|drain| if removes(drain) { DrainPhase::Removes } else { DrainPhase::Keeps })
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

    /// False for a domain that its hello does not name: messages retained there are left from an earlier config.
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

    /// The peers of all domains.
    pub fn peers(&self) -> GatewayLoad {
        self.peers.values().copied().flatten().sum()
    }

    /// A gateway with this remembered state.
    pub fn remembered(Memory { offline, came_back, program, clock }: Memory) -> Self {
        Self { offline, came_back, program, clock, ..Self::default() }
    }

    /// The part of its state to remember.
    pub fn memory(self) -> Memory {
        Memory { offline: self.offline, came_back: self.came_back, program: self.program, clock: self.clock }
    }

    /// The version of its program, also while it is offline; [`ORIGINAL`] for an original, none where it is not known.
    pub fn version(&self) -> Option<&str> {
        match (&self.hello, &self.program) {
            (Some(hello), _) => Some(&hello.version),
            (None, _) if self.online => Some(ORIGINAL),
            (None, GatewayProgram::Ours(version)) => Some(version),
            (None, GatewayProgram::Original) => Some(ORIGINAL),
            (None, GatewayProgram::Unknown) => None,
        }
    }

    /// Why it is offline; none while it is online.
    pub fn offline_reason(&self) -> Option<OfflineReason> {
        match self.offline {
            _ if self.online => None,
            None => Some(OfflineReason::NeverOnline),
            Some(OfflineSince { sign: OfflineSign::Silence(silence), .. }) => {
                Some(OfflineReason::Silent(silence.as_secs()))
            }
            Some(OfflineSince { sign: OfflineSign::Status, since }) if self.has_stopped(since) => {
                Some(OfflineReason::Stopped)
            }
            Some(OfflineSince { sign: OfflineSign::Status, .. }) => Some(OfflineReason::ConnectionLost),
        }
    }

    /// Since when it is offline, as far as this broker has seen.
    pub fn offline_since(&self) -> Option<Instant> {
        self.offline.filter(|_| !self.online)?.since
    }

    /// Since when the domain is offline here, be the gateway online or not.
    pub fn down_since(&self, domain: &Domain) -> Option<Instant> {
        self.down_since.get(domain).copied()
    }

    /// Whether all its domains went offline shortly before `offline`; or at all, if that is not known.
    fn has_stopped(&self, offline: Option<Instant>) -> bool {
        let all_down = !self.peers.is_empty() && self.peers.values().all(Option::is_none);
        let last = self.down_since.values().max();
        let is_close = |at: Instant| last.is_some_and(|last| at.saturating_duration_since(*last) < STOP_DURATION);
        all_down && offline.is_none_or(is_close)
    }

    /// Updates whether it is online; if it is not, `sign` is the first message that shows it.
    fn refresh(&mut self, since: Option<Instant>, sign: OfflineSign, now: Instant) {
        let is_return = !self.online && (since.is_some() || self.offline.is_some());
        self.online = self.is_alive(now);
        if self.online {
            self.came_back = self.came_back.filter(|_| !is_return).or(is_return.then_some(now));
            self.on_online();
        } else {
            self.offline.get_or_insert(OfflineSince { since, sign });
        }
    }

    fn on_online(&mut self) {
        self.offline = None;
        if self.hello.is_none() && matches!(self.program, GatewayProgram::Unknown) {
            self.program = GatewayProgram::Original;
        }
    }

    /// Marks it as offline if it published nothing for too long. Returns whether it was online before.
    pub fn expire(&mut self, now: Instant) -> bool {
        if !self.online || self.is_alive(now) {
            return false;
        }
        let at = self.status.map(|status| status.at);
        let last = self.last_sign.max(self.last_service).or(at);
        let silence = last.map_or(ONLINE_SILENCE_MAX, |last| now.saturating_duration_since(last));
        self.refresh(Some(now), OfflineSign::Silence(silence), now);
        true
    }

    /// Until when it is taken to be alive. A status that no other message supports counts as long as a count without a
    /// status: either may be from another client, or be a last will that was published late.
    fn alive_until(&self) -> Option<Instant> {
        match (self.status, self.last_sign, self.last_service) {
            (Some(StatusMessage { online: true, .. }), Some(sign), _) => Some(sign + ONLINE_SILENCE_MAX),
            (Some(StatusMessage { online: true, at }), None, _) => Some(at + UNSUPPORTED_LIFETIME),
            // Its status is offline, or there is none: the server delivers none, or a client removed it.
            (Some(StatusMessage { online: false, .. }) | None, _, service) => {
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
        let was_online = self.online;
        self.online = self.is_alive(now);
        if self.online {
            if !was_online {
                self.came_back = Some(now);
            }
            self.on_online();
        } else if was_online {
            self.offline = Some(OfflineSince { since: Some(now), sign: OfflineSign::Status });
        }
    }

    /// A worker of ours publishes its hello before its status. One that comes online without a hello is another program
    /// under the same name, and a hello that was received as retained is not its own.
    pub fn apply_status(&mut self, online: bool, retained: bool, now: Instant) {
        self.status = Some(StatusMessage { at: now, online });
        self.is_unresponsive = false;
        if !online {
            (self.last_sign, self.last_service, self.is_hello_live) = (None, None, false);
        }
        if online && !retained && !self.is_hello_live {
            (self.hello, self.expired_hello, self.program) = (None, None, GatewayProgram::Original);
        }
        // A retained status may be of any age.
        self.refresh(Some(now).filter(|_| !retained), OfflineSign::Status, now);
    }

    pub fn apply_hello(&mut self, hello: Option<Hello>, retained: bool, now: Instant) {
        self.is_hello_live = hello.is_some() && !retained;
        if self.drain().is_some() && hello.as_ref().is_some_and(|hello| hello.drain.is_none()) {
            self.came_back = Some(now);
        }
        if let Some(hello) = &hello {
            self.program = GatewayProgram::Ours(hello.version.clone());
        }
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

    /// A hello that is neither repeated nor followed by confirmations may be from another client, or left from a worker
    /// of ours that was replaced by an original.
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

    /// Its data of the domain was removed from the server. Returns whether it still counts, as it does while the worker
    /// publishes counts there: an original publishes its data once, when it connects.
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
        last.is_some_and(|last| now.saturating_duration_since(last) < ONLINE_SILENCE_MAX)
    }

    /// Whether a count was only published again for a program that has just connected: it does not include the answers
    /// since.
    fn is_repeated(&self, domain: &Domain, peers: u64, now: Instant) -> bool {
        let is_same =
            |count: &Count| count.peers == peers && now.saturating_duration_since(count.at) < REPEATED_COUNT_WINDOW;
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
        if count != PeerCount::Offline {
            self.down_since.remove(&domain);
        } else if !retained && !self.peers.get(&domain).is_some_and(Option::is_none) {
            self.down_since.insert(domain.clone(), now);
        }
        match count {
            PeerCount::Connected(peers) if self.is_repeated(&domain, peers, now) => None,
            PeerCount::Connected(peers) => {
                self.counts.insert(domain.clone(), Count { at: now, peers });
                self.peers.insert(domain, Some(GatewayLoad { connected: peers, assigned: 0 }))
            }
            PeerCount::Offline => self.peers.insert(domain, None),
            PeerCount::Removed => self.peers.remove(&domain),
        };
    }
}
