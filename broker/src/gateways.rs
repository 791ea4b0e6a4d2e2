//! What workers say of themselves, and which gateway that makes the best for the next router. No IO, no clock.

use std::collections::{BTreeMap, BTreeSet};

use wgkex_common::message::{Hello, WorkerData};
use wgkex_common::{Domain, PublicKey, Reserved, Topic, is_topic_level};

/// The most peers a WireGuard interface can have (drivers/net/wireguard/messages.h, `MAX_PEERS_PER_DEVICE`).
const PEERS_MAX: u64 = 1 << 20;
/// More workers or brokers than this on one bus are somebody's nonsense, and not remembered.
const NAMES_MAX: usize = 4096;

/// Every gateway and broker heard of on the bus. It forgets all when the bus is lost, and is complete once the
/// broker has heard its own greeting come back, because what is retained comes before that.
#[derive(Debug)]
pub struct Gateways {
    own_name: String,
    domains: BTreeSet<Domain>,
    weights: BTreeMap<String, f64>,
    workers: BTreeMap<String, Worker>,
    brokers: BTreeSet<String>,
    /// Gateways' keys, also of domains that are not served here. The bus may be lost: they stay.
    reserved: Reserved,
    complete: bool,
}

#[derive(Debug, Default)]
struct Worker {
    online: bool,
    hello: Option<Hello>,
    /// The hello was heard since the worker was last offline, not found on the bus.
    hello_is_live: bool,
    /// It did not answer in time, and has not been heard since.
    silent: bool,
    data: BTreeMap<Domain, WorkerData>,
    peers: BTreeMap<Domain, u64>,
}

/// A gateway for a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The worker's name.
    pub worker: String,
    /// Whether it says what became of each key, so that an answer may wait for that.
    pub confirms: bool,
    /// What the router is told.
    pub data: WorkerData,
}

/// Which kinds of worker are online in a domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Online {
    /// How many that confirm.
    pub confirming: usize,
    /// How many that do not: originals.
    pub others: usize,
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
    pub worker: String,
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

impl Gateways {
    /// Nothing heard yet. Workers that `weights` does not name weigh 1.
    #[must_use]
    pub fn new(
        own_name: String,
        domains: BTreeSet<Domain>,
        weights: BTreeMap<String, f64>,
        reserved: Reserved,
    ) -> Self {
        let (workers, brokers) = (BTreeMap::new(), BTreeSet::new());
        Self { own_name, domains, weights, workers, brokers, reserved, complete: false }
    }

    /// Whether no router may have `key`, as it is a gateway's or has a gateway's address.
    #[must_use]
    pub fn forbids(&self, key: &PublicKey) -> bool {
        self.reserved.forbids(key)
    }

    /// The bus is lost, and what was heard on it may change unheard.
    pub fn forget(&mut self) {
        self.workers.clear();
        self.brokers.clear();
        self.complete = false;
    }

    /// Whether all retained states have been heard.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// Calls it complete although the greeting did not come back: the server may not let this broker read it.
    pub fn assume_complete(&mut self) {
        self.complete = true;
    }

    /// Takes in one message; `retained` if it was found on the bus rather than said just now (MQTT 3.1.1 section
    /// 3.3.1.3). Topics of unknown domains, and those that say nothing about gateways, change nothing.
    pub fn hear(&mut self, topic: &Topic, payload: &[u8], retained: bool) -> Result<(), Nonsense> {
        match topic {
            Topic::WorkerStatus { worker } => {
                let online = status(payload)?;
                self.worker(worker)?.hear_status(online, retained);
                Ok(())
            }
            Topic::WorkerData { worker, domain } => {
                let data = WorkerData::parse(payload);
                if let Ok(data) = &data {
                    self.reserved.hear(worker, domain, data.as_ref());
                }
                let Some(domain) = self.domains.get(domain.as_str()).cloned() else { return Ok(()) };
                self.worker(worker)?.hear_data(domain, data.map_err(|_| Nonsense("worker data"))?);
                Ok(())
            }
            Topic::ConnectedPeers { domain, worker } => {
                let Some(domain) = self.domains.get(domain.as_str()).cloned() else { return Ok(()) };
                let peers = peers(payload)?;
                self.worker(worker)?.hear_peers(domain, peers);
                Ok(())
            }
            Topic::Hello { worker } => {
                let hello = Hello::parse(payload).map_err(|_| Nonsense("hello"))?;
                self.worker(worker)?.hear_hello(hello, retained);
                Ok(())
            }
            Topic::BrokerStatus { broker } => self.hear_broker(broker, payload, retained),
            Topic::Key { .. }
            | Topic::Applied { .. }
            | Topic::Seen { .. }
            | Topic::Revoked { .. }
            | Topic::Revocations
            | Topic::WorkerQuestions { .. }
            | Topic::WorkerPages { .. }
            | Topic::BrokerHello { .. }
            | Topic::Questions { .. }
            | Topic::BrokerPages { .. } => Ok(()),
        }
    }

    fn worker(&mut self, name: &str) -> Result<&mut Worker, Nonsense> {
        if !self.workers.contains_key(name) && (self.workers.len() >= NAMES_MAX || !is_topic_level(name)) {
            return Err(Nonsense("worker's name"));
        }
        Ok(self.workers.entry(name.to_owned()).or_default())
    }

    fn hear_broker(&mut self, broker: &str, payload: &[u8], retained: bool) -> Result<(), Nonsense> {
        if !status(payload)? {
            self.brokers.remove(broker);
            return Ok(());
        }
        if broker == self.own_name && !retained {
            self.complete = true;
        }
        if self.brokers.len() < NAMES_MAX {
            self.brokers.insert(broker.to_owned());
        }
        Ok(())
    }

    /// The best gateway of `domain` among those that `fits` takes: the one furthest below its target (contract
    /// section 6). One that was silent last time, or that weighs nothing, is taken only when there is no other.
    #[must_use]
    pub fn choose(&self, domain: &Domain, fits: impl Fn(&str, bool) -> bool) -> Option<Choice> {
        let all = self.peers_of_all();
        let rank = |name: &str, worker: &Worker| {
            let last_resort = worker.silent || self.weight(name) == 0.0;
            #[expect(clippy::cast_precision_loss, reason = "counts of peers stay far below 2^52")]
            let excess = worker.count() as f64 - self.target(name, all);
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
    pub fn assigned(&mut self, worker: &str, domain: &Domain) {
        let brokers = self.brokers.len().max(1) as u64;
        if let Some(peers) = self.workers.get_mut(worker).and_then(|worker| worker.peers.get_mut(domain)) {
            *peers = (*peers + brokers).min(PEERS_MAX);
        }
    }

    /// `worker` did not say in time what became of a key.
    pub fn silent(&mut self, worker: &str) {
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.silent = true;
        }
    }

    /// `worker` said what became of a key: true if it is one whose word counts.
    pub fn heard_from(&mut self, worker: &str) -> bool {
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.silent = false;
        }
        self.confirms(worker)
    }

    /// Whether this worker is online and says what became of keys.
    #[must_use]
    pub fn confirms(&self, worker: &str) -> bool {
        self.workers.get(worker).is_some_and(|worker| worker.online && worker.confirms())
    }

    /// Whether each gateway hears that a key is denied: those heard of, and those that the operator named.
    #[must_use]
    pub fn reach(&self) -> BTreeMap<String, Reach> {
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

    /// Whether this worker is online.
    #[must_use]
    pub fn is_online(&self, worker: &str) -> bool {
        self.workers.get(worker).is_some_and(|worker| worker.online)
    }

    /// Whether this worker is online, and the domain there.
    #[must_use]
    pub fn has_online(&self, worker: &str, domain: &str) -> bool {
        let (worker, domain) = (self.workers.get(worker), self.domains.get(domain));
        worker.zip(domain).is_some_and(|(worker, domain)| worker.has_online(domain))
    }

    /// Who could take a key of `domain`. An original that has just started says how many peers it has only after a
    /// minute; it takes keys before that.
    #[must_use]
    pub fn online(&self, domain: &Domain) -> Online {
        let mut online = Online::default();
        for worker in self.workers.values().filter(|worker| worker.online) {
            if worker.confirms() {
                online.confirming += usize::from(worker.has_online(domain));
            } else {
                online.others += usize::from(worker.data.contains_key(domain) || worker.peers.contains_key(domain));
            }
        }
        online
    }

    /// Every worker heard of, by name.
    #[must_use]
    pub fn overview(&self) -> Vec<Overview> {
        let all = self.peers_of_all();
        let overview = |(name, worker): (&String, &Worker)| Overview {
            worker: name.clone(),
            online: worker.online,
            version: worker.hello.as_ref().map(|hello| hello.version.clone()),
            domains: worker
                .data
                .keys()
                .chain(worker.peers.keys())
                .filter(|domain| worker.may_serve(domain))
                .map(|domain| (domain.clone(), worker.peers.get(domain).copied()))
                .collect(),
            peers: worker.count(),
            weight: self.weight(name),
            target: self.target(name, all),
        };
        self.workers.iter().map(overview).collect()
    }

    fn weight(&self, worker: &str) -> f64 {
        self.weights.get(worker).copied().unwrap_or(1.0)
    }

    fn target(&self, worker: &str, peers_of_all: u64) -> f64 {
        let configured: f64 = self.weights.values().sum();
        let online = || self.workers.values().filter(|worker| worker.online).count() as u64;
        #[expect(clippy::cast_precision_loss, reason = "counts of peers and workers stay far below 2^52")]
        let (peers, all) = (peers_of_all as f64, if configured > 0.0 { configured } else { online().max(1) as f64 });
        self.weight(worker) / all * peers
    }

    fn peers_of_all(&self) -> u64 {
        self.workers.values().filter(|worker| worker.online).map(Worker::count).sum()
    }
}

impl Worker {
    /// Whether it ever served somebody, as far as the bus remembers.
    fn is_somebody(&self) -> bool {
        self.online || self.hello.is_some() || !self.data.is_empty() || !self.peers.is_empty()
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
        self.online && self.peers.contains_key(domain) && self.may_serve(domain)
    }

    /// False for a domain that is retained of a worker which says that it serves others.
    fn may_serve(&self, domain: &Domain) -> bool {
        self.hello.as_ref().is_none_or(|hello| hello.serves(domain.name()))
    }

    fn count(&self) -> u64 {
        self.peers.values().sum()
    }

    /// A worker of ours says hello before it says that it is online. One that comes online without is another
    /// program under the same name, and a hello found on the bus is not its own.
    fn hear_status(&mut self, online: bool, retained: bool) {
        self.online = online;
        self.silent = false;
        if !online {
            self.hello_is_live = false;
        }
        if !retained && !self.hello_is_live {
            self.hello = None;
        }
    }

    fn hear_hello(&mut self, hello: Option<Hello>, retained: bool) {
        self.hello_is_live = hello.is_some() && !retained;
        self.hello = hello;
    }

    fn hear_data(&mut self, domain: Domain, data: Option<WorkerData>) {
        match data {
            Some(data) => self.data.insert(domain, data),
            None => self.data.remove(&domain),
        };
    }

    fn hear_peers(&mut self, domain: Domain, peers: Option<u64>) {
        self.silent = false;
        match peers {
            Some(peers) => self.peers.insert(domain, peers),
            None => self.peers.remove(&domain),
        };
    }
}

/// The peers of a domain, or none while the domain is offline.
fn peers(payload: &[u8]) -> Result<Option<u64>, Nonsense> {
    if payload.is_empty() || payload == b"-1" {
        return Ok(None);
    }
    let peers = std::str::from_utf8(payload).ok().and_then(|text| text.trim().parse().ok());
    peers.filter(|peers| *peers <= PEERS_MAX).map(Some).ok_or(Nonsense("number of peers"))
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
