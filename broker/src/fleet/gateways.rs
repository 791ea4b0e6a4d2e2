//! The gateways and brokers on the bus, by the messages that they publish, and which gateway the next router gets. No IO,
//! no clock.
//!
//! The previous stop of a message is [`crate::bus`]; [`gateway`](super::gateway) has the state of one gateway,
//! [`selection`](super::selection) selects. The next stop of a selection is [`crate::exchange`].

mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use wgkex_common::wire::drain::Drain;
use wgkex_common::wire::message::{Hello, WorkerData};
use wgkex_common::{BrokerName, Config, Domain, KeyId, PublicKey, Reserved, Topic, WorkerName};

use crate::fleet::drains::{Drains, TooManyDrains};
use crate::fleet::gateway::{Gateway, Memory, PeerCount};
use crate::fleet::reach::ReachTracker;
use crate::fleet::selection::{CandidateGateway, DrainPhase, RankedLoad, Selection, Shares};
use crate::fleet::status::GatewayStatus;

pub use self::report::FleetProblems;

/// The most peers of a WireGuard interface (drivers/net/wireguard/messages.h, `MAX_PEERS_PER_DEVICE`).
const PEERS_MAX: u64 = 1 << 20;
/// The most workers, and the most brokers, that are remembered: more than any fleet has.
const NAMES_MAX: usize = 4096;
/// The shortest time between two log lines about late confirmations of the same gateway.
const TIMEOUT_LOG_INTERVAL: Duration = Duration::from_secs(10);
/// The retained states are complete after this time without a retained message: a server keeps the order of messages of one
/// topic only (MQTT 3.1.1 section 4.6).
const RETAINED_QUIET: Duration = Duration::from_millis(250);
/// The longest wait for retained messages after the own status was received.
const RETAINED_WAIT_MAX: Duration = Duration::from_secs(10);

/// Every gateway and broker on the bus. All of them are forgotten when the connection is lost; the retained states are
/// complete once the broker has received its own status and then no retained message for a moment.
#[derive(Debug)]
pub struct Gateways {
    own_name: BrokerName,
    domains: BTreeSet<Domain>,
    weights: BTreeMap<WorkerName, f64>,
    /// In which time a gateway that came back is filled.
    fill_time: Duration,
    /// The gateways that the operator of this broker drains. They stay.
    drains: Drains,
    by_name: BTreeMap<WorkerName, Gateway>,
    /// The remembered state of gateways from an earlier connection.
    remembered: BTreeMap<WorkerName, Memory>,
    /// The last known state, shown to operators until the retained states are received again.
    last_known: Option<LastKnown>,
    /// The brokers that are online.
    brokers: BTreeSet<BrokerName>,
    /// Gateways' keys and addresses. They stay when the connection is lost.
    reserved: Reserved,
    /// The workers that have published a state of each domain, and whose data of it was not removed since. They stay, too.
    known: BTreeMap<Domain, BTreeSet<WorkerName>>,
    /// Whether routers reach them. It stays, too.
    reach: ReachTracker,
    /// When the own status was received on this connection.
    echo: Option<Instant>,
    /// It was received on this connection or an earlier one.
    has_ever_echoed: bool,
    /// When the last retained message arrived.
    last_retained: Option<Instant>,
    is_synced: bool,
}

/// The gateways as they were when the connection was lost.
#[derive(Debug)]
struct LastKnown {
    lost: Instant,
    gateways: Vec<GatewayStatus>,
}

/// The router that a gateway is selected for.
#[derive(Debug, Clone, Copy)]
pub struct Router<'a> {
    /// Its domain.
    pub domain: &'a Domain,
    /// The gateway where it is connected: one that drains keeps it.
    pub current_gateway: Option<&'a WorkerName>,
    /// The time of its request.
    pub now: Instant,
}

/// The gateways that install keys of a domain now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Online {
    /// The gateways that confirm keys.
    pub confirming: BTreeSet<WorkerName>,
    /// The gateways that do not: originals.
    pub legacy: BTreeSet<WorkerName>,
}

impl Online {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.confirming.is_empty() && self.legacy.is_empty()
    }
}

/// A domain that no gateway serves now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unserved {
    /// The domain.
    pub domain: Domain,
    /// Whether a gateway has ever published a state of it, and not removed it. Workers before v0.2.0 publish none.
    pub is_known: bool,
}

/// Whether a gateway can remove a denied key at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reachability {
    /// It can, and reports the result.
    Online,
    /// It will when it is back.
    Offline,
    /// It cannot: an original, or an old version of ours.
    Unsupported,
}

/// A payload that is invalid on its topic, and changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a {0}")]
pub struct InvalidPayload(pub &'static str);

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = if self.is_known {
            "no gateway is online"
        } else {
            "no gateway has published its state; v1 requests get 200 without a gateway's confirmation"
        };
        write!(f, "domain {}: {why}", self.domain)
    }
}

impl Gateways {
    /// No message received yet.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            own_name: (&config.name).into(),
            domains: config.domains.clone(),
            weights: weights(config),
            fill_time: config.rebalance.over,
            drains: Drains::default(),
            by_name: BTreeMap::new(),
            remembered: BTreeMap::new(),
            last_known: None,
            brokers: BTreeSet::new(),
            reserved: Reserved::new(config.protected_keys.clone(), config.domains.clone()),
            known: BTreeMap::new(),
            reach: ReachTracker::default(),
            echo: None,
            has_ever_echoed: false,
            last_retained: None,
            is_synced: false,
        }
    }

    /// Whether `key` is a gateway's, or has a gateway's address, so that no router may have it. A key that `is_routers`
    /// already, by its handshakes, is only reserved if the operator lists it.
    #[must_use]
    pub fn is_reserved(&self, key: &PublicKey, is_routers: bool) -> bool {
        if is_routers { self.reserved.lists(key) } else { self.reserved.is_reserved(key) }
    }

    /// Whether a handshake of `key` that `worker` reports shows that the key is a router's: the operator does not list it, and
    /// the worker does not claim it as its own.
    #[must_use]
    pub fn may_report(&self, worker: &WorkerName, key: &PublicKey) -> bool {
        !self.reserved.lists(key) && !self.reserved.is_reserved_by(worker, key)
    }

    /// To be called every ten seconds: lets periods of this length end.
    pub fn tick(&mut self, now: Instant) {
        self.reserved.tick();
        self.reach.expire(now);
    }

    /// The connection is lost: states may change without notice.
    pub fn on_disconnect(&mut self, now: Instant) {
        if self.is_synced {
            self.last_known = Some(LastKnown { lost: now, gateways: self.statuses(now) });
        }
        for (name, gateway) in &self.by_name {
            for domain in &gateway.removed_data {
                self.reserved.update(name, domain.name(), None);
            }
            forget(&mut self.known, name, &gateway.removed_data);
        }
        let memories = std::mem::take(&mut self.by_name).into_iter().map(|(name, gateway)| (name, gateway.memory()));
        self.remembered.extend(memories);
        while self.remembered.len() > NAMES_MAX {
            self.remembered.pop_first();
        }
        self.brokers.clear();
        (self.echo, self.last_retained, self.is_synced) = (None, None, false);
    }

    /// Whether all retained states have been received.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Whether the own status was received on this connection.
    #[must_use]
    pub fn has_echo(&self) -> bool {
        self.echo.is_some()
    }

    /// Whether the own status was received on this connection or an earlier one.
    #[must_use]
    pub fn has_ever_echoed(&self) -> bool {
        self.has_ever_echoed
    }

    /// Continues as if the own status was received: the server may not let this broker read it.
    pub fn force_echo(&mut self, now: Instant) {
        self.echo.get_or_insert(now);
    }

    /// Whether the retained states became complete just now.
    pub fn check_synced(&mut self, now: Instant) -> bool {
        let Some(echo) = self.echo.filter(|_| !self.is_synced) else { return false };
        let age = |since: Instant| now.saturating_duration_since(since);
        self.is_synced =
            age(self.last_retained.unwrap_or(echo).max(echo)) >= RETAINED_QUIET || age(echo) >= RETAINED_WAIT_MAX;
        if self.is_synced {
            self.last_known = None;
        }
        self.is_synced
    }

    /// Marks gateways that published nothing for too long as offline, and returns their names.
    pub fn expire(&mut self, now: Instant) -> Vec<WorkerName> {
        for (name, gateway) in &mut self.by_name {
            gateway.expire_hello(now);
            for domain in gateway.expire_data(now) {
                self.reserved.update(name, domain.name(), None);
            }
        }
        let expired = self.by_name.iter_mut().filter_map(|(name, gateway)| gateway.expire(now).then(|| name.clone()));
        let expired = expired.collect();
        for (name, gateway) in &self.by_name {
            forget(&mut self.known, name, gateway.removed_data.iter().filter(|domain| !gateway.is_at_work(domain)));
        }
        expired
    }

    /// Applies one message; `retained` if the server sent it because of the subscription (MQTT 3.1.1 section 3.3.1.3).
    /// Topics of domains that are not served here, and those that are not about gateways, change nothing.
    pub fn apply(&mut self, topic: &Topic, payload: &[u8], retained: bool, now: Instant) -> Result<(), InvalidPayload> {
        let applied = self.apply_message(topic, payload, retained, now);
        if let Topic::WorkerStatus { worker }
        | Topic::WorkerData { worker, .. }
        | Topic::ConnectedPeers { worker, .. }
        | Topic::WorkerHello { worker } = topic
        {
            self.start_filling_together(worker, now);
        }
        applied
    }

    /// If a gateway has just come online, and no other has peers, all online gateways start to be filled at the same
    /// time.
    fn start_filling_together(&mut self, worker: &WorkerName, now: Instant) {
        let is_back = self.by_name.get(worker).is_some_and(|gateway| gateway.came_back == Some(now));
        let has_peers =
            |(name, gateway): (&WorkerName, &Gateway)| name != worker && gateway.online && gateway.peers().total() > 0;
        if is_back && !self.by_name.iter().any(has_peers) {
            for gateway in self.by_name.values_mut().filter(|gateway| gateway.online) {
                gateway.came_back = Some(now);
            }
        }
    }

    fn apply_message(
        &mut self,
        topic: &Topic,
        payload: &[u8],
        retained: bool,
        now: Instant,
    ) -> Result<(), InvalidPayload> {
        if retained {
            self.last_retained = Some(now);
        }
        if let Some(worker) = cleared_worker(topic, payload).filter(|worker| !self.by_name.contains_key(*worker)) {
            self.forget_stateless(worker);
            return Ok(());
        }
        if let Topic::WorkerStatus { worker } = topic {
            let online = status(payload)?;
            self.gateway(worker)?.apply_status(online, retained, now);
        } else if let Topic::WorkerData { worker, domain } = topic {
            let data = WorkerData::parse(payload);
            let Some(domain) = self.domains.get(domain.as_str()).cloned() else { return Ok(()) };
            match data.map_err(|_| InvalidPayload("worker data"))? {
                Some(data) => self.apply_data(worker, domain, data, retained, now)?,
                None => self.apply_removed_data(worker, &domain, now),
            }
        } else if let Topic::ConnectedPeers { domain, worker } = topic {
            let Some(domain) = self.domains.get(domain.as_str()).cloned() else { return Ok(()) };
            self.on_count(worker, domain, peer_count(payload)?, retained, now)?;
        } else if let Topic::WorkerHello { worker } = topic {
            self.on_hello(worker, payload, retained, now)?;
        } else if let Topic::BrokerStatus { broker } = topic {
            self.apply_broker(broker, payload, retained, now)?;
        }
        Ok(())
    }

    fn on_count(
        &mut self,
        worker: &WorkerName,
        domain: Domain,
        count: PeerCount,
        retained: bool,
        now: Instant,
    ) -> Result<(), InvalidPayload> {
        self.gateway(worker)?.apply_count(domain.clone(), count, retained, now);
        if count == PeerCount::Removed {
            self.forget_stateless(worker);
        } else {
            self.remember(worker, [domain]);
        }
        Ok(())
    }

    fn on_hello(
        &mut self,
        worker: &WorkerName,
        payload: &[u8],
        retained: bool,
        now: Instant,
    ) -> Result<(), InvalidPayload> {
        let hello = Hello::parse(payload).map_err(|_| InvalidPayload("hello"))?;
        let is_served = |domain: &&Domain| hello.as_ref().is_some_and(|hello| hello.serves(domain.name()));
        let served: Vec<_> = self.domains.iter().filter(is_served).cloned().collect();
        self.gateway(worker)?.apply_hello(hello, retained, now);
        if payload.is_empty() {
            self.forget_stateless(worker);
        } else {
            self.remember(worker, served);
        }
        Ok(())
    }

    /// A hello that `worker` sent at the time `sent` of its clock was received `now`, both in seconds of Unix time.
    pub fn on_time(&mut self, worker: &WorkerName, sent: u64, now: u64) {
        if let Some(gateway) = self.by_name.get_mut(worker) {
            gateway.clock.on_hello(sent, now);
        }
    }

    fn gateway(&mut self, name: &WorkerName) -> Result<&mut Gateway, InvalidPayload> {
        if self.by_name.len() >= NAMES_MAX && !self.by_name.contains_key(name) {
            return Err(InvalidPayload("worker's name"));
        }
        let Self { by_name, remembered, .. } = self;
        let new = || remembered.remove(name).map(Gateway::remembered).unwrap_or_default();
        Ok(by_name.entry(name.clone()).or_insert_with(new))
    }

    fn apply_data(
        &mut self,
        worker: &WorkerName,
        domain: Domain,
        data: WorkerData,
        retained: bool,
        now: Instant,
    ) -> Result<(), InvalidPayload> {
        self.reserved.update(worker, domain.name(), Some((&data).into()));
        self.gateway(worker)?.apply_data(domain.clone(), data, retained, now);
        self.remember(worker, [domain]);
        Ok(())
    }

    fn apply_removed_data(&mut self, worker: &WorkerName, domain: &Domain, now: Instant) {
        if !self.by_name.get_mut(worker).is_some_and(|gateway| gateway.keeps_removed_data(domain, now)) {
            self.reserved.update(worker, domain.name(), None);
        }
        if !self.by_name.get(worker).is_some_and(|gateway| gateway.is_at_work(domain)) {
            forget(&mut self.known, worker, [domain]);
        }
    }

    /// `worker` has published a state of each of `domains`.
    fn remember(&mut self, worker: &WorkerName, domains: impl IntoIterator<Item = Domain>) {
        for domain in domains {
            let workers = self.known.entry(domain).or_default();
            if workers.len() < NAMES_MAX && !workers.contains(worker) {
                workers.insert(worker.clone());
            }
        }
    }

    /// A retained message of `worker` was removed: forgets its domains of which no other is left.
    fn forget_stateless(&mut self, worker: &WorkerName) {
        let gateway = self.by_name.get(worker);
        let is_over = |domain: &&Domain| !gateway.is_some_and(|gateway| gateway.has_state(domain));
        forget(&mut self.known, worker, self.domains.iter().filter(is_over));
    }

    fn apply_broker(
        &mut self,
        broker: &BrokerName,
        payload: &[u8],
        retained: bool,
        now: Instant,
    ) -> Result<(), InvalidPayload> {
        if !status(payload)? {
            self.brokers.remove(broker);
            return Ok(());
        }
        if *broker == self.own_name && !retained {
            self.echo.get_or_insert(now);
            self.has_ever_echoed = true;
        }
        if self.brokers.len() < NAMES_MAX {
            self.brokers.insert(broker.clone());
        }
        Ok(())
    }

    /// The best gateway for a router among those that are `eligible`, by name and by whether they confirm.
    #[must_use]
    pub fn select(&self, router: Router<'_>, eligible: impl Fn(&WorkerName, bool) -> bool) -> Option<Selection> {
        let candidates = self.by_name.iter().filter_map(|(worker, gateway)| {
            let (data, confirms) = (gateway.serves(router.domain)?, gateway.confirms());
            let ranked_load = || self.ranked_load(worker, gateway, router.now);
            let candidate = || CandidateGateway {
                ranked_load: ranked_load(),
                data,
                confirms,
                is_current: router.current_gateway == Some(worker),
            };
            eligible(worker, confirms).then(candidate)
        });
        self.shares(router.now).select(candidates)
    }

    fn ranked_load<'a>(&self, worker: &'a WorkerName, gateway: &Gateway, now: Instant) -> RankedLoad<'a> {
        RankedLoad {
            worker,
            peers: gateway.peers().total(),
            is_unresponsive: gateway.is_unresponsive,
            drain: gateway.drain_phase().or(self.drains.get(worker).map(|_| DrainPhase::Keeps)),
            age: gateway.came_back.map(|since| now.saturating_duration_since(since)),
        }
    }

    /// Whether some gateway drains.
    #[must_use]
    pub fn is_any_draining(&self) -> bool {
        !self.drains.is_empty() || self.by_name.values().any(|gateway| gateway.drain().is_some())
    }

    /// The drains that the operator of this broker has set.
    #[must_use]
    pub fn drains(&self) -> &Drains {
        &self.drains
    }

    /// Begins with these drains.
    pub fn set_drains(&mut self, drains: Drains) {
        self.drains = drains;
    }

    /// Replaces the drains by these, and returns the previous ones.
    pub fn replace_drains(&mut self, drains: Drains, now: Instant) -> Drains {
        let before = std::mem::replace(&mut self.drains, drains);
        for worker in before.workers().filter(|worker| self.drains.get(worker).is_none()).cloned().collect::<Vec<_>>() {
            self.on_undrained(&worker, now);
        }
        before
    }

    /// Begins or ends the drain of a gateway. Returns whether it drained before.
    pub fn set_drain(
        &mut self,
        worker: &WorkerName,
        drain: Option<Drain>,
        now: Instant,
    ) -> Result<bool, TooManyDrains> {
        let was_on = self.drains.get(worker).is_some();
        match drain {
            Some(drain) => self.drains.insert(worker.clone(), drain)?,
            None if self.drains.remove(worker) => self.on_undrained(worker, now),
            None => {}
        }
        Ok(was_on)
    }

    /// Ends the drains that are over by the wall clock, and returns their gateways.
    pub fn expire_drains(&mut self, unix_now: u64, now: Instant) -> Vec<WorkerName> {
        let over = self.drains.expire(unix_now);
        for worker in &over {
            self.on_undrained(worker, now);
        }
        over
    }

    fn on_undrained(&mut self, worker: &WorkerName, now: Instant) {
        if let Some(gateway) = self.by_name.get_mut(worker) {
            gateway.came_back = Some(now);
        }
    }

    /// A router was given `worker`. It counts as a peer until the gateway's next count. Each other broker is taken to give as
    /// many answers as this one.
    pub fn on_assigned(&mut self, worker: &WorkerName, domain: &Domain) {
        let brokers = self.brokers.len().max(1) as u64;
        let peers = self.by_name.get_mut(worker).and_then(|gateway| gateway.peers.get_mut(domain));
        if let Some(Some(peers)) = peers {
            peers.assigned = (peers.assigned + brokers).min(PEERS_MAX.saturating_sub(peers.connected));
        }
    }

    /// A router's request was answered with `worker`; `is_connected` if that is the gateway that last reported handshakes of
    /// the router. Originals report none, so whether routers reach them is not known.
    pub fn on_given(&mut self, worker: &WorkerName, id: &KeyId, is_connected: bool, now: Instant) {
        if self.by_name.get(worker).is_some_and(Gateway::confirms) {
            self.reach.on_given(worker, &id.domain, id.key, is_connected, now);
        }
    }

    /// `worker` reported a handshake of a router.
    pub fn on_handshake(&mut self, worker: &WorkerName, domain: &str, key: PublicKey) {
        if let Some(domain) = self.domains.get(domain) {
            self.reach.on_handshake(worker, domain, key);
        }
    }

    /// `worker` did not confirm a key in time. True if that is to be logged: it was not in the last ten seconds.
    pub fn on_timeout(&mut self, worker: &WorkerName, now: Instant) -> bool {
        let Some(gateway) = self.by_name.get_mut(worker) else { return false };
        gateway.is_unresponsive = true;
        let is_due = gateway.timeout_logged.is_none_or(|at| now.saturating_duration_since(at) >= TIMEOUT_LOG_INTERVAL);
        if is_due {
            gateway.timeout_logged = Some(now);
        }
        is_due
    }

    /// `worker` published outcomes or handshakes of keys, so it is alive. False if it is not a worker that does; whether its
    /// outcomes count is [`Gateways::can_confirm`], as of before this.
    pub fn on_confirmation(&mut self, worker: &WorkerName, now: Instant) -> bool {
        self.by_name.get_mut(worker).is_some_and(|gateway| gateway.apply_confirmation(now))
    }

    /// Whether this worker confirms keys, and has `domain` online: requests wait for it, and its outcomes count.
    #[must_use]
    pub fn can_confirm(&self, worker: &WorkerName, domain: &str) -> bool {
        self.has_online(worker, domain) && self.by_name.get(worker).is_some_and(Gateway::confirms)
    }

    /// Whether this worker's reports of handshakes in `domain` count: it is online, confirms keys, and may serve the domain.
    #[must_use]
    pub fn can_report(&self, worker: &WorkerName, domain: &str) -> bool {
        let domain = self.domains.get(domain).zip(self.by_name.get(worker));
        domain.is_some_and(|(domain, gateway)| gateway.online && gateway.confirms() && gateway.may_serve(domain))
    }

    /// Selects by the weights and the time to fill a gateway in `config` from now on.
    pub fn reconfigure(&mut self, config: &Config) {
        (self.weights, self.fill_time) = (weights(config), config.rebalance.over);
    }

    /// Which gateways can remove a denied key: those on the bus, and those that the config names.
    #[must_use]
    pub fn reachability(&self) -> BTreeMap<WorkerName, Reachability> {
        let named = self.weights.keys().map(|name| (name.clone(), Reachability::Offline));
        let on_bus = self.by_name.iter().filter(|(_, gateway)| gateway.has_served()).map(|(name, gateway)| {
            let revokes = gateway.hello.as_ref().is_some_and(Hello::revokes);
            let reachability = match (gateway.online, revokes) {
                (false, _) => Reachability::Offline,
                (true, true) => Reachability::Online,
                (true, false) => Reachability::Unsupported,
            };
            (name.clone(), reachability)
        });
        named.chain(on_bus).collect()
    }

    /// Whether the domain is one of those that are served here.
    #[must_use]
    pub fn is_served(&self, domain: &str) -> bool {
        self.domains.contains(domain)
    }

    /// Whether the config names this worker, or a message of it was received on this connection.
    #[must_use]
    pub fn is_worker_known(&self, worker: &WorkerName) -> bool {
        self.weights.contains_key(worker) || self.by_name.contains_key(worker)
    }

    /// Whether this worker is online.
    #[must_use]
    pub fn is_online(&self, worker: &WorkerName) -> bool {
        self.by_name.get(worker).is_some_and(|gateway| gateway.online)
    }

    /// Whether this worker is online, and the domain there.
    #[must_use]
    pub fn has_online(&self, worker: &WorkerName, domain: &str) -> bool {
        let (gateway, domain) = (self.by_name.get(worker), self.domains.get(domain));
        gateway.zip(domain).is_some_and(|(gateway, domain)| gateway.has_online(domain))
    }

    /// The gateways that install keys of `domain` now.
    #[must_use]
    pub fn online(&self, domain: &Domain) -> Online {
        let mut online = Online::default();
        for (name, gateway) in self.by_name.iter().filter(|(_, gateway)| gateway.installs(domain)) {
            let names = if gateway.confirms() { &mut online.confirming } else { &mut online.legacy };
            names.insert(name.clone());
        }
        online
    }

    /// Whether some gateway installs keys of `domain` now, and all that do confirm them.
    #[must_use]
    pub fn all_confirm(&self, domain: &Domain) -> bool {
        let mut installing = self.by_name.values().filter(|gateway| gateway.installs(domain)).peekable();
        installing.peek().is_some() && installing.all(Gateway::confirms)
    }

    /// Whether any worker has ever published a state of `domain`, apart from those whose data of it was removed while they
    /// were offline there.
    #[must_use]
    pub fn is_known(&self, domain: &Domain) -> bool {
        self.known.contains_key(domain)
    }

    /// Whether gateways of `domain` are known, and none is online.
    #[must_use]
    pub fn are_offline(&self, domain: &Domain) -> bool {
        self.is_known(domain) && !self.is_any_online(domain)
    }

    fn is_any_online(&self, domain: &Domain) -> bool {
        self.by_name.values().any(|gateway| gateway.installs(domain))
    }

    fn shares(&self, now: Instant) -> Shares<'_> {
        let online = self.by_name.iter().filter(|(_, gateway)| gateway.online);
        let online = online.map(|(worker, gateway)| self.ranked_load(worker, gateway, now));
        Shares::new(&self.weights, self.fill_time, online)
    }
}

/// The worker of which the message removes a retained state: a client does that when a gateway is gone.
fn cleared_worker<'a>(topic: &'a Topic, payload: &[u8]) -> Option<&'a WorkerName> {
    if let Topic::WorkerStatus { worker } | Topic::ConnectedPeers { worker, .. } | Topic::WorkerHello { worker } = topic
    {
        payload.is_empty().then_some(worker)
    } else {
        None
    }
}

/// `worker` counts as one that never published a state of these domains.
fn forget<'a>(
    known: &mut BTreeMap<Domain, BTreeSet<WorkerName>>,
    worker: &WorkerName,
    domains: impl IntoIterator<Item = &'a Domain>,
) {
    for domain in domains {
        if let Some(workers) = known.get_mut(domain) {
            workers.remove(worker);
            if workers.is_empty() {
                known.remove(domain);
            }
        }
    }
}

fn peer_count(payload: &[u8]) -> Result<PeerCount, InvalidPayload> {
    if payload.is_empty() {
        return Ok(PeerCount::Removed);
    }
    let text = std::str::from_utf8(payload).map_err(|_| InvalidPayload("number of peers"))?.trim();
    if text == "-1" {
        return Ok(PeerCount::Offline);
    }
    let peers = text.parse().ok().filter(|peers| *peers <= PEERS_MAX);
    peers.map(PeerCount::Connected).ok_or(InvalidPayload("number of peers"))
}

fn status(payload: &[u8]) -> Result<bool, InvalidPayload> {
    match payload {
        b"1" => Ok(true),
        b"0" | b"" => Ok(false),
        _ => Err(InvalidPayload("status")),
    }
}

fn weights(config: &Config) -> BTreeMap<WorkerName, f64> {
    config.workers.iter().map(|(name, share)| (name.clone(), share.weight)).collect()
}

#[cfg(test)]
mod tests;
