//! What workers say of themselves, and which gateway that makes the best for the next router. No IO, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use wgkex_common::wire::message::{Hello, WorkerData};
use wgkex_common::{BrokerName, Domain, PublicKey, Reserved, Topic, WorkerName};

/// The most peers a WireGuard interface can have (drivers/net/wireguard/messages.h, `MAX_PEERS_PER_DEVICE`).
const PEERS_MAX: u64 = 1 << 20;
/// More workers or brokers than this on one bus are somebody's nonsense, and not remembered.
const NAMES_MAX: usize = 4096;

/// How long a status alone counts, as it is found on the bus; how long a count or a confirmation alone, after a last will
/// that came late; and how long a hello that is neither repeated nor followed by confirmations: a little more than the
/// minute after which every worker publishes its counts again, and those of ours their hello.
const UNSUPPORTED: Duration = Duration::from_secs(65);
/// How long a worker that says it is online may publish nothing. The original leaves a count out when its dump was
/// interrupted.
const LIVENESS: Duration = Duration::from_secs(150);
/// The same count again within this time is a repetition, and no count anew: those come every minute.
const REPEATED: Duration = Duration::from_secs(50);
/// How long nothing retained may have come before the retained states count as complete: a server keeps the order of
/// messages of one topic only (MQTT 3.1.1 section 4.6).
const QUIET: Duration = Duration::from_millis(250);
/// How long after the own status came back retained messages may keep the broker from being complete.
const QUIET_MAX: Duration = Duration::from_secs(10);

/// Every gateway and broker heard of on the bus. It forgets all when the bus is lost, and is complete once the
/// broker has heard its own status come back and nothing retained for a moment.
#[derive(Debug)]
pub struct Gateways {
    own_name: BrokerName,
    domains: BTreeSet<Domain>,
    weights: BTreeMap<WorkerName, f64>,
    workers: BTreeMap<WorkerName, Worker>,
    brokers: BTreeSet<BrokerName>,
    /// Gateways' keys. The bus may be lost: they stay.
    reserved: Reserved,
    /// Domains for which some worker has ever published its state or hello; also when the bus was lost since.
    known: BTreeSet<Domain>,
    /// When the own status came back.
    echoed: Option<Instant>,
    /// It has come back on this connection or an earlier one.
    has_heard_itself: bool,
    /// When the last retained message came.
    found: Option<Instant>,
    complete: bool,
}

#[derive(Debug, Default)]
struct Worker {
    /// Whether it is taken to be alive: [`Worker::believed_until`] is not over.
    online: bool,
    /// When its status was last said, and which.
    status: Option<(Instant, bool)>,
    /// When it last published something of itself, since it was last said to be offline.
    sign: Option<Instant>,
    /// When it last published a count or a confirmation, since it was last said to be offline.
    proof: Option<Instant>,
    hello: Option<Hello>,
    /// A hello that did not count any longer when it was old; it counts again if the worker confirms something.
    lapsed: Option<Hello>,
    /// When it last said hello or confirmed something.
    spoke: Option<Instant>,
    /// The hello was heard since the worker was last offline, not found on the bus.
    hello_is_live: bool,
    /// It did not answer in time, and has not been heard since.
    silent: bool,
    data: BTreeMap<Domain, WorkerData>,
    /// Domains whose data was removed, while the worker went on counting there.
    removed: BTreeSet<Domain>,
    /// Connected peers of each domain of which it said so; none where it said that it is offline.
    peers: BTreeMap<Domain, Option<u64>>,
    /// The last count of each domain, and when it came.
    counts: BTreeMap<Domain, (u64, Instant)>,
    /// When any count of each domain came last.
    counted: BTreeMap<Domain, Instant>,
}

/// A gateway for a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The worker's name.
    pub worker: WorkerName,
    /// Whether it says what became of each key, so that an answer may wait for that.
    pub confirms: bool,
    /// What the router is told.
    pub data: WorkerData,
}

/// The workers that can take a key of a domain now, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Online {
    /// Those that confirm.
    pub confirming: BTreeSet<WorkerName>,
    /// Those that do not: originals.
    pub others: BTreeSet<WorkerName>,
}

impl Online {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.confirming.is_empty() && self.others.is_empty()
    }
}

/// A domain that no gateway serves now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unserved {
    /// The domain.
    pub domain: Domain,
    /// Whether a gateway has ever said something of itself there. Workers before v0.2.0 say nothing.
    pub is_known: bool,
}

/// Whether a gateway hears at once that a key is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// It does, and says what became of it.
    Online,
    /// It does when it is back.
    Offline,
    /// It does not: an original, or an old version of ours.
    Cannot,
}

/// A gateway as the status page and the metrics show it.
#[derive(Debug, Clone, PartialEq)]
pub struct Overview {
    /// The worker's name.
    pub worker: WorkerName,
    /// Whether its status says so.
    pub online: bool,
    /// Its program's version; none for an original.
    pub version: Option<String>,
    /// Connected peers of each domain; none while the domain is offline there.
    pub domains: BTreeMap<Domain, Option<u64>>,
    /// Connected peers of all domains, with the answers given since it said so.
    pub peers: u64,
    /// Its weight.
    pub weight: f64,
    /// The peers it should have, by its weight.
    pub target: f64,
}

/// A payload that means nothing on its topic; what was known before stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a {0}")]
pub struct Nonsense(pub &'static str);

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = if self.is_known {
            "no gateway is online"
        } else {
            "no gateway has published its state; v1 keys are answered once MQTT took them"
        };
        write!(f, "domain {}: {why}", self.domain)
    }
}

impl Gateways {
    /// Nothing heard yet. Workers that `weights` does not name weigh 1.
    #[must_use]
    pub fn new(
        own_name: BrokerName,
        domains: BTreeSet<Domain>,
        weights: BTreeMap<WorkerName, f64>,
        reserved: Reserved,
    ) -> Self {
        Self {
            own_name,
            domains,
            weights,
            workers: BTreeMap::new(),
            brokers: BTreeSet::new(),
            reserved,
            known: BTreeSet::new(),
            echoed: None,
            has_heard_itself: false,
            found: None,
            complete: false,
        }
    }

    /// Whether no router may have `key`, as it is a gateway's or has a gateway's address; one that `is_routers` already
    /// only if the operator says so.
    #[must_use]
    pub fn forbids(&self, key: &PublicKey, is_routers: bool) -> bool {
        if is_routers { self.reserved.lists(key) } else { self.reserved.is_reserved(key) }
    }

    /// Lets ten seconds pass.
    pub fn tick(&mut self) {
        self.reserved.tick();
    }

    /// The bus is lost, and what was heard on it may change unheard.
    pub fn forget(&mut self) {
        for (name, worker) in &self.workers {
            for domain in &worker.removed {
                self.reserved.update(name, domain.name(), None);
            }
        }
        self.workers.clear();
        self.brokers.clear();
        (self.echoed, self.found, self.complete) = (None, None, false);
    }

    /// Whether all retained states have been heard.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// Whether the own status has come back since the bus was last lost.
    #[must_use]
    pub fn has_echo(&self) -> bool {
        self.echoed.is_some()
    }

    /// Whether the own status has come back on this connection or an earlier one.
    #[must_use]
    pub fn has_heard_itself(&self) -> bool {
        self.has_heard_itself
    }

    /// Takes the own status for come back although it did not: the server may not let this broker read it.
    pub fn assume_echo(&mut self, now: Instant) {
        self.echoed.get_or_insert(now);
    }

    /// Whether the retained states became complete just now.
    pub fn settle(&mut self, now: Instant) -> bool {
        let Some(echoed) = self.echoed.filter(|_| !self.complete) else { return false };
        let age = |since: Instant| now.saturating_duration_since(since);
        self.complete = age(self.found.unwrap_or(echoed).max(echoed)) >= QUIET || age(echoed) >= QUIET_MAX;
        self.complete
    }

    /// Takes those for offline that published nothing for too long, and returns their names. What others of them have said
    /// may be over, too.
    pub fn expire(&mut self, now: Instant) -> Vec<WorkerName> {
        for (name, worker) in &mut self.workers {
            worker.expire_hello(now);
            for domain in worker.expire_data(now) {
                self.reserved.update(name, domain.name(), None);
            }
        }
        let expired = self.workers.iter_mut().filter(|(_, worker)| worker.online && !worker.is_believed(now));
        let expired = expired.map(|(name, worker)| {
            worker.online = false;
            name.clone()
        });
        expired.collect()
    }

    /// Takes in one message; `retained` if it was found on the bus rather than published just now (MQTT 3.1.1 section
    /// 3.3.1.3). Topics of unknown domains, and those that say nothing about gateways, change nothing.
    pub fn hear(&mut self, topic: &Topic, payload: &[u8], retained: bool, now: Instant) -> Result<(), Nonsense> {
        if retained {
            self.found = Some(now);
        }
        if let Topic::WorkerStatus { worker } | Topic::ConnectedPeers { worker, .. } | Topic::WorkerHello { worker } =
            topic
            && payload.is_empty()
            && !self.workers.contains_key(worker)
        {
            // Somebody clears away what is left of a gateway that is gone.
            return Ok(());
        }
        if let Topic::WorkerStatus { worker } = topic {
            let online = status(payload)?;
            self.worker(worker)?.hear_status(online, retained, now);
        } else if let Topic::WorkerData { worker, domain } = topic {
            let data = WorkerData::parse(payload);
            let Some(domain) = self.domains.get(domain.as_str()).cloned() else { return Ok(()) };
            match data.map_err(|_| Nonsense("worker data"))? {
                Some(data) => self.hear_data(worker, domain, data, retained, now)?,
                None => self.hear_no_data(worker, &domain, now),
            }
        } else if let Topic::ConnectedPeers { domain, worker } = topic {
            let Some(domain) = self.domains.get(domain.as_str()).cloned() else { return Ok(()) };
            let peers = peers(payload)?;
            self.worker(worker)?.hear_peers(domain.clone(), peers, retained, now);
            if peers != Peers::Unsaid {
                self.known.insert(domain);
            }
        } else if let Topic::WorkerHello { worker } = topic {
            let hello = Hello::parse(payload).map_err(|_| Nonsense("hello"))?;
            let is_served = |domain: &&Domain| hello.as_ref().is_some_and(|hello| hello.serves(domain.name()));
            let served: Vec<_> = self.domains.iter().filter(is_served).cloned().collect();
            self.worker(worker)?.hear_hello(hello, retained, now);
            self.known.extend(served);
        } else if let Topic::BrokerStatus { broker } = topic {
            self.hear_broker(broker, payload, retained, now)?;
        }
        Ok(())
    }

    fn worker(&mut self, name: &WorkerName) -> Result<&mut Worker, Nonsense> {
        if self.workers.len() >= NAMES_MAX && !self.workers.contains_key(name) {
            return Err(Nonsense("worker's name"));
        }
        Ok(self.workers.entry(name.clone()).or_default())
    }

    fn hear_data(
        &mut self,
        worker: &WorkerName,
        domain: Domain,
        data: WorkerData,
        retained: bool,
        now: Instant,
    ) -> Result<(), Nonsense> {
        self.reserved.update(worker, domain.name(), Some(&data));
        self.worker(worker)?.hear_data(domain.clone(), data, retained, now);
        self.known.insert(domain);
        Ok(())
    }

    /// An original publishes its data when it connects, and not again: while it counts its peers, it has not gone.
    fn hear_no_data(&mut self, worker: &WorkerName, domain: &Domain, now: Instant) {
        if !self.workers.get_mut(worker).is_some_and(|worker| worker.keeps_data(domain, now)) {
            self.reserved.update(worker, domain.name(), None);
        }
    }

    fn hear_broker(
        &mut self,
        broker: &BrokerName,
        payload: &[u8],
        retained: bool,
        now: Instant,
    ) -> Result<(), Nonsense> {
        if !status(payload)? {
            self.brokers.remove(broker);
            return Ok(());
        }
        if *broker == self.own_name && !retained {
            self.echoed.get_or_insert(now);
            self.has_heard_itself = true;
        }
        if self.brokers.len() < NAMES_MAX {
            self.brokers.insert(broker.clone());
        }
        Ok(())
    }

    /// The best gateway of `domain` among those that `fits` takes: the one furthest below its target (contract
    /// section 6). One that was silent last time, or that weighs nothing, is taken only when there is no other.
    #[must_use]
    pub fn choose(&self, domain: &Domain, fits: impl Fn(&WorkerName, bool) -> bool) -> Option<Choice> {
        let all = self.all();
        let rank = |name: &WorkerName, worker: &Worker| {
            let last_resort = worker.silent || self.weight(name) == 0.0;
            #[expect(clippy::cast_precision_loss, reason = "counts of peers stay far below 2^52")]
            let excess = worker.count() as f64 - self.target(name, &all);
            (last_resort, excess)
        };
        let candidates = self.workers.iter().filter_map(|(name, worker)| {
            let data = worker.serves(domain)?;
            fits(name, worker.confirms()).then(|| (rank(name, worker), name, worker.confirms(), data))
        });
        let best = candidates.min_by(|(a, ..), (b, ..)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        best.map(|(_, name, confirms, data)| Choice { worker: name.clone(), confirms, data: data.clone() })
    }

    /// Counts an answer that names `worker`, until it says itself how many peers it has. Each other broker is
    /// taken to give as many answers as this one.
    pub fn assigned(&mut self, worker: &WorkerName, domain: &Domain) {
        let brokers = self.brokers.len().max(1) as u64;
        if let Some(Some(peers)) = self.workers.get_mut(worker).and_then(|worker| worker.peers.get_mut(domain)) {
            *peers = (*peers + brokers).min(PEERS_MAX);
        }
    }

    /// `worker` did not say in time what became of a key.
    pub fn silent(&mut self, worker: &WorkerName) {
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.silent = true;
        }
    }

    /// `worker` confirmed keys or reported handshakes, which only one that is alive does. True if it is one that says what
    /// became of keys; whether its word counts is for [`Gateways::can_take`] to say, as of before this.
    pub fn confirmed(&mut self, worker: &WorkerName, now: Instant) -> bool {
        self.workers.get_mut(worker).is_some_and(|worker| worker.hear_confirmation(now))
    }

    /// Whether this worker is one that confirms and can take a key of `domain` now: whether it is waited for, and its
    /// word on a key counts.
    #[must_use]
    pub fn can_take(&self, worker: &WorkerName, domain: &str) -> bool {
        self.has_online(worker, domain) && self.workers.get(worker).is_some_and(Worker::confirms)
    }

    /// Whether the word of this worker on keys of `domain` counts: it is one that confirms, and may serve the domain.
    #[must_use]
    pub fn speaks_for(&self, worker: &WorkerName, domain: &str) -> bool {
        let domain = self.domains.get(domain).zip(self.workers.get(worker));
        domain.is_some_and(|(domain, worker)| worker.online && worker.confirms() && worker.may_serve(domain))
    }

    /// Whether each gateway hears that a key is denied: those heard of, and those that the operator named.
    #[must_use]
    pub fn reach(&self) -> BTreeMap<WorkerName, Reach> {
        let named = self.weights.keys().map(|name| (name.clone(), Reach::Offline));
        let heard_of = self.workers.iter().filter(|(_, worker)| worker.is_somebody()).map(|(name, worker)| {
            let revokes = worker.hello.as_ref().is_some_and(Hello::revokes);
            let reach = match (worker.online, revokes) {
                (false, _) => Reach::Offline,
                (true, true) => Reach::Online,
                (true, false) => Reach::Cannot,
            };
            (name.clone(), reach)
        });
        named.chain(heard_of).collect()
    }

    /// Whether the domain is one of those that are served here.
    #[must_use]
    pub fn is_served(&self, domain: &str) -> bool {
        self.domains.contains(domain)
    }

    /// Whether this worker is online.
    #[must_use]
    pub fn is_online(&self, worker: &WorkerName) -> bool {
        self.workers.get(worker).is_some_and(|worker| worker.online)
    }

    /// Whether this worker is online, and the domain there.
    #[must_use]
    pub fn has_online(&self, worker: &WorkerName, domain: &str) -> bool {
        let (worker, domain) = (self.workers.get(worker), self.domains.get(domain));
        worker.zip(domain).is_some_and(|(worker, domain)| worker.has_online(domain))
    }

    /// Who can take a key of `domain`. An original that has just started says how many peers it has only after a
    /// while; it takes keys before that.
    #[must_use]
    pub fn online(&self, domain: &Domain) -> Online {
        let mut online = Online::default();
        for (name, worker) in self.workers.iter().filter(|(_, worker)| worker.can_take(domain)) {
            let names = if worker.confirms() { &mut online.confirming } else { &mut online.others };
            names.insert(name.clone());
        }
        online
    }

    /// Whether some worker can take a key of `domain`, and all that can say what becomes of it.
    #[must_use]
    pub fn all_confirm(&self, domain: &Domain) -> bool {
        let mut can_take = self.workers.values().filter(|worker| worker.can_take(domain)).peekable();
        can_take.peek().is_some() && can_take.all(Worker::confirms)
    }

    /// Whether any worker has ever published something of itself in `domain`.
    #[must_use]
    pub fn is_known(&self, domain: &Domain) -> bool {
        self.known.contains(domain)
    }

    /// Whether gateways of `domain` are known, and none can take a key.
    #[must_use]
    pub fn are_offline(&self, domain: &Domain) -> bool {
        self.is_known(domain) && !self.can_any_take(domain)
    }

    fn can_any_take(&self, domain: &Domain) -> bool {
        self.workers.values().any(|worker| worker.can_take(domain))
    }

    /// The domains that no gateway serves now.
    #[must_use]
    pub fn unserved(&self) -> Vec<Unserved> {
        let unserved = self.domains.iter().filter(|domain| !self.can_any_take(domain));
        unserved.map(|domain| Unserved { domain: domain.clone(), is_known: self.is_known(domain) }).collect()
    }

    /// Every worker heard of, by name.
    #[must_use]
    pub fn overview(&self) -> Vec<Overview> {
        let all = self.all();
        let overview = |(name, worker): (&WorkerName, &Worker)| Overview {
            worker: name.clone(),
            online: worker.online,
            version: worker.hello.as_ref().map(|hello| hello.version.clone()),
            domains: worker
                .data
                .keys()
                .chain(worker.peers.keys())
                .filter(|domain| worker.may_serve(domain))
                .map(|domain| (domain.clone(), worker.peers.get(domain).copied().flatten()))
                .collect(),
            peers: worker.count(),
            weight: self.weight(name),
            target: self.target(name, &all),
        };
        self.workers.iter().map(overview).collect()
    }

    fn weight(&self, worker: &WorkerName) -> f64 {
        self.weights.get(worker).copied().unwrap_or(1.0)
    }

    fn target(&self, worker: &WorkerName, all: &All) -> f64 {
        self.weight(worker) / all.weights * all.peers
    }

    fn all(&self) -> All {
        let online = || self.workers.values().filter(|worker| worker.online);
        let (configured, peers): (f64, u64) = (self.weights.values().sum(), online().map(Worker::count).sum());
        #[expect(clippy::cast_precision_loss, reason = "counts of peers and workers stay far below 2^52")]
        let (weights, peers) =
            (if configured > 0.0 { configured } else { online().count().max(1) as f64 }, peers as f64);
        All { weights, peers }
    }
}

/// What all gateways weigh, and how many peers those have that are online: the same for each gateway's target.
struct All {
    weights: f64,
    peers: f64,
}

impl Worker {
    /// Whether it ever served somebody, as far as the bus remembers.
    fn is_somebody(&self) -> bool {
        self.online || self.hello.is_some() || self.lapsed.is_some() || !self.data.is_empty() || !self.peers.is_empty()
    }

    fn confirms(&self) -> bool {
        self.hello.as_ref().is_some_and(Hello::confirms)
    }

    /// What a router is told, if this worker can serve it now.
    fn serves(&self, domain: &Domain) -> Option<&WorkerData> {
        self.has_online(domain).then(|| self.data.get(domain)).flatten()
    }

    /// Whether it is online, and the domain there.
    fn has_online(&self, domain: &Domain) -> bool {
        self.online && self.peers.get(domain).is_some_and(Option::is_some) && self.may_serve(domain)
    }

    /// Whether it is online, and the domain there as far as it said so. One that does not confirm and has not counted its
    /// peers yet takes keys if it has data.
    fn can_take(&self, domain: &Domain) -> bool {
        let has_begun = || !self.confirms() && !self.peers.contains_key(domain) && self.data.contains_key(domain);
        self.has_online(domain) || (self.online && has_begun())
    }

    /// False for a domain that is retained of a worker which says that it serves others.
    fn may_serve(&self, domain: &Domain) -> bool {
        self.hello.as_ref().is_none_or(|hello| hello.serves(domain.name()))
    }

    fn count(&self) -> u64 {
        self.peers.values().flatten().sum()
    }

    /// Until when it is taken to be alive. A status that nothing supports counts as long as a count without a status: either
    /// may be what somebody else wrote, or what a last will said that came late.
    fn believed_until(&self) -> Option<Instant> {
        match (self.status, self.sign, self.proof) {
            (Some((_, true)), Some(sign), _) => Some(sign + LIVENESS),
            (Some((since, true)), None, _) => Some(since + UNSUPPORTED),
            // Said to be offline, or no status received: a server that hands out none, or somebody removed it.
            (Some((_, false)) | None, _, proof) => proof.map(|proof| proof + UNSUPPORTED),
        }
    }

    fn is_believed(&self, now: Instant) -> bool {
        self.believed_until().is_some_and(|until| now < until)
    }

    /// It published something just now, `proof` if that is what only one that serves does.
    fn heard(&mut self, is_proof: bool, now: Instant) {
        self.sign = Some(now);
        if is_proof {
            self.proof = Some(now);
        }
        self.online = self.is_believed(now);
    }

    /// A worker of ours says hello before it says that it is online. One that comes online without is another
    /// program under the same name, and a hello found on the bus is not its own.
    fn hear_status(&mut self, online: bool, retained: bool, now: Instant) {
        self.status = Some((now, online));
        self.silent = false;
        if !online {
            (self.sign, self.proof, self.hello_is_live) = (None, None, false);
        }
        if online && !retained && !self.hello_is_live {
            (self.hello, self.lapsed) = (None, None);
        }
        self.online = self.is_believed(now);
    }

    fn hear_hello(&mut self, hello: Option<Hello>, retained: bool, now: Instant) {
        self.hello_is_live = hello.is_some() && !retained;
        (self.hello, self.lapsed, self.spoke) = (hello, None, Some(now));
        if self.hello_is_live {
            self.heard(false, now);
        }
    }

    /// Takes in that it said what became of a key, or which keys shake hands; false if it is not one that does.
    fn hear_confirmation(&mut self, now: Instant) -> bool {
        let lapsed = self.lapsed.take_if(|hello| hello.confirms());
        self.hello = self.hello.take().or(lapsed);
        if !self.confirms() {
            return false;
        }
        (self.silent, self.spoke) = (false, Some(now));
        self.heard(true, now);
        true
    }

    /// A hello that is neither repeated nor borne out may be somebody else's, or left from a worker of ours in whose place
    /// there is an original.
    fn expire_hello(&mut self, now: Instant) {
        if self.online && self.spoke.is_some_and(|spoke| now.saturating_duration_since(spoke) >= UNSUPPORTED) {
            self.lapsed = self.hello.take().or_else(|| self.lapsed.take());
        }
    }

    fn hear_data(&mut self, domain: Domain, data: WorkerData, retained: bool, now: Instant) {
        if !retained {
            self.heard(false, now);
        }
        self.removed.remove(&domain);
        self.data.insert(domain, data);
    }

    /// Its data in this domain was removed: whether it stays all the same, which it does as long as it counts there.
    fn keeps_data(&mut self, domain: &Domain, now: Instant) -> bool {
        let keeps = self.data.contains_key(domain) && self.counts_in(domain, now);
        if keeps {
            self.removed.insert(domain.clone());
        } else {
            self.data.remove(domain);
        }
        keeps
    }

    /// Drops data that was removed and does not stay any longer, and returns its domains.
    fn expire_data(&mut self, now: Instant) -> Vec<Domain> {
        let over: Vec<_> = self.removed.iter().filter(|domain| !self.counts_in(domain, now)).cloned().collect();
        for domain in &over {
            self.removed.remove(domain);
            self.data.remove(domain);
        }
        over
    }

    /// Whether it has counted its peers in this domain lately, or came online only lately.
    fn counts_in(&self, domain: &Domain, now: Instant) -> bool {
        let came = self.status.and_then(|(at, online)| online.then_some(at));
        let last = self.counted.get(domain).copied().max(came);
        last.is_some_and(|last| now.saturating_duration_since(last) < LIVENESS)
    }

    /// A count that is published once more for a newcomer says nothing of the answers given since.
    fn is_repeated(&self, domain: &Domain, peers: u64, now: Instant) -> bool {
        let is_same = |(count, at): &(u64, Instant)| *count == peers && now.saturating_duration_since(*at) < REPEATED;
        self.peers.get(domain).is_some_and(Option::is_some) && self.counts.get(domain).is_some_and(is_same)
    }

    fn hear_peers(&mut self, domain: Domain, peers: Peers, retained: bool, now: Instant) {
        self.silent = false;
        if !retained && peers != Peers::Unsaid {
            self.heard(matches!(peers, Peers::Connected(_)), now);
        }
        if matches!(peers, Peers::Connected(_)) {
            self.counted.insert(domain.clone(), now);
        }
        match peers {
            Peers::Connected(peers) if self.is_repeated(&domain, peers, now) => None,
            Peers::Connected(peers) => {
                self.counts.insert(domain.clone(), (peers, now));
                self.peers.insert(domain, Some(peers))
            }
            Peers::Offline => self.peers.insert(domain, None),
            Peers::Unsaid => self.peers.remove(&domain),
        };
    }
}

/// What a worker says of its peers in a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peers {
    /// So many are connected.
    Connected(u64),
    /// The domain is offline there.
    Offline,
    /// What was said is taken back.
    Unsaid,
}

fn peers(payload: &[u8]) -> Result<Peers, Nonsense> {
    if payload.is_empty() {
        return Ok(Peers::Unsaid);
    }
    let text = std::str::from_utf8(payload).map_err(|_| Nonsense("number of peers"))?.trim();
    if text == "-1" {
        return Ok(Peers::Offline);
    }
    let peers = text.parse().ok().filter(|peers| *peers <= PEERS_MAX);
    peers.map(Peers::Connected).ok_or(Nonsense("number of peers"))
}

fn status(payload: &[u8]) -> Result<bool, Nonsense> {
    match payload {
        b"1" => Ok(true),
        b"0" | b"" => Ok(false),
        _ => Err(Nonsense("status")),
    }
}

#[cfg(test)]
mod tests;
