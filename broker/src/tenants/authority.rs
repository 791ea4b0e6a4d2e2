//! The coordinator's decisions: which session becomes a member at which address, and which member leaves. It has no IO
//! and no clock; its decisions result in [`Update`]s, for one broker or for all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgkex_common::{BrokerName, PublicKey};

use crate::tenants::frame::{HeldAddress, JoinRequest, SessionEndReason, SessionOrigin, Update};
use crate::tenants::id::TenantId;
use crate::tenants::pool::{AddressChange, TenantCounts, Tenants};
use crate::tenants::table::{JoinError, Member, MemberId};

/// How long a member has to show that it is alive, when another session joins with its key. That one is refused or has its place
/// within 5 s.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long another broker's members stay without that broker's registration, after this one became the coordinator.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(10);
/// How long joins wait for such registrations: a member that another broker has keeps its address then.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);

/// The tenants, as the coordinator has them.
#[derive(Debug)]
pub struct Authority {
    tenants: Tenants,
    members: BTreeMap<MemberId, RegisteredMember>,
    ids: BTreeMap<SessionOrigin, MemberId>,
    /// By the member that is to answer.
    probes: BTreeMap<MemberId, KeyProbe>,
    last: u64,
    /// Brokers that are to register their sessions, with when their members leave otherwise.
    unregistered_brokers: BTreeMap<BrokerName, Instant>,
    /// Those of them that are online: joins wait for these, until `settled`.
    unsettled_brokers: BTreeSet<BrokerName>,
    settled: Instant,
    /// Other brokers may give addresses, and are out of reach now.
    is_paused: bool,
    /// Joins that wait for these.
    queued_joins: Vec<RemoteJoinRequest>,
    updates: Vec<(Target, Update)>,
}

/// For which brokers an update is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// For all that have registered.
    All,
    /// For this one.
    Broker(BrokerName),
}

/// A broker's sessions, as it registers them.
#[derive(Debug, Default)]
pub struct Registration {
    /// All of them, with the addresses that they received already.
    pub sessions: Vec<(JoinRequest, Option<IpAddr>)>,
    /// Addresses that it knows to be held.
    pub held: Vec<HeldAddress>,
}

#[derive(Debug)]
struct RegisteredMember {
    tenant: TenantId,
    origin: SessionOrigin,
    key: PublicKey,
}

#[derive(Debug, Clone)]
struct RemoteJoinRequest {
    broker: BrokerName,
    join_request: JoinRequest,
}

/// Sessions that wait for the answer of a member that has their key.
#[derive(Debug)]
struct KeyProbe {
    until: Instant,
    waiting: Vec<RemoteJoinRequest>,
}

impl RemoteJoinRequest {
    fn origin(&self) -> SessionOrigin {
        SessionOrigin { broker: self.broker.clone(), session: self.join_request.session }
    }
}

impl Authority {
    /// No tenant has a member. `others` are the brokers that are to register themselves.
    pub fn new(tenants: Tenants, others: BTreeSet<BrokerName>, now: Instant) -> Self {
        Self {
            tenants,
            members: BTreeMap::new(),
            ids: BTreeMap::new(),
            probes: BTreeMap::new(),
            last: 0,
            unregistered_brokers: others.iter().map(|broker| (broker.clone(), now + REGISTRATION_TIMEOUT)).collect(),
            unsettled_brokers: others,
            settled: now + SETTLE_TIMEOUT,
            is_paused: false,
            queued_joins: Vec::new(),
            updates: Vec::new(),
        }
    }

    /// Takes over a member of the coordinator before. Its broker is to register itself.
    pub fn take_over(&mut self, tenant: &TenantId, origin: &SessionOrigin, member: &Member, now: Instant) {
        let id = self.next_id();
        if self.tenants.adopt(tenant, id, member.client.clone(), member.virtual_ip, now).is_ok() {
            self.insert(id, tenant, origin, member.client.public_key);
            self.unregistered_brokers.entry(origin.broker.clone()).or_insert(now + REGISTRATION_TIMEOUT);
        } else {
            self.updates.push((Target::All, Update::Left(tenant.clone(), member.virtual_ip)));
        }
    }

    /// Holds an address of the coordinator before.
    pub fn hold(&mut self, HeldAddress { tenant, key, address }: &HeldAddress, now: Instant) {
        self.tenants.restore(tenant, *key, *address, now);
    }

    /// How many there are.
    pub fn counts(&self) -> TenantCounts {
        self.tenants.counts()
    }

    /// Takes the updates of the decisions since the last call.
    pub fn take_updates(&mut self) -> Vec<(Target, Update)> {
        self.note_changes();
        std::mem::take(&mut self.updates)
    }

    /// A broker's registration is under way: its members stay meanwhile.
    pub fn expect(&mut self, broker: &BrokerName, now: Instant) {
        if let Some(until) = self.unregistered_brokers.get_mut(broker) {
            *until = now + REGISTRATION_TIMEOUT;
        }
    }

    /// A broker registers its sessions: members with a registered session stay, and others of this broker leave.
    pub fn register(&mut self, broker: &BrokerName, registration: Registration, now: Instant) {
        let Registration { sessions, held } = registration;
        self.unregistered_brokers.remove(broker);
        self.unsettled_brokers.remove(broker);
        let there: BTreeSet<_> = sessions
            .iter()
            .map(|(join_request, _)| (join_request.session, &join_request.tenant, join_request.client.public_key))
            .collect();
        let is_gone = |(id, RegisteredMember { tenant, origin, key }): (&MemberId, &RegisteredMember)| {
            let is_there = there.contains(&(origin.session, tenant, *key));
            (origin.broker == *broker && !is_there).then_some(*id)
        };
        let gone: Vec<_> = self.members.iter().filter_map(is_gone).collect();
        self.withdraw(|join_request| join_request.broker == *broker);
        for id in gone {
            self.remove(id, None, now);
        }
        for (join_request, address) in sessions {
            let join_request = RemoteJoinRequest { broker: broker.clone(), join_request };
            match address {
                _ if self.ids.contains_key(&join_request.origin()) => {}
                Some(address) => self.adopt(join_request, address, now),
                None => self.join_settled(join_request, now),
            }
        }
        for held in &held {
            self.hold(held, now);
        }
        self.snapshot(broker);
        self.probe_again(broker, now);
        self.join_early(now);
    }

    /// These sessions do not wait any more.
    fn withdraw(&mut self, is_over: impl Fn(&RemoteJoinRequest) -> bool) {
        let waiting = self.probes.values_mut().map(|probe| &mut probe.waiting);
        for wishes in waiting.chain([&mut self.queued_joins]) {
            wishes.retain(|join_request| !is_over(join_request));
        }
    }

    /// Probes that a broker may not have received before it registered.
    fn probe_again(&mut self, broker: &BrokerName, now: Instant) {
        for (id, probe) in &mut self.probes {
            if let Some(RegisteredMember { origin, .. }) =
                self.members.get(id).filter(|member| member.origin.broker == *broker)
            {
                probe.until = now + PROBE_TIMEOUT;
                self.updates.push((Target::Broker(broker.clone()), Update::Probe(origin.session)));
            }
        }
    }

    /// A broker is gone, and its members with it.
    pub fn broker_gone(&mut self, broker: &BrokerName, now: Instant) {
        self.unregistered_brokers.remove(broker);
        self.unsettled_brokers.remove(broker);
        self.withdraw(|join_request| join_request.broker == *broker);
        let of_broker = |(id, member): (&MemberId, &RegisteredMember)| (member.origin.broker == *broker).then_some(*id);
        for id in self.members.iter().filter_map(of_broker).collect::<Vec<_>>() {
            self.remove(id, None, now);
        }
        self.join_early(now);
    }

    /// A session wants to be a member.
    pub fn join(&mut self, broker: &BrokerName, join_request: JoinRequest, now: Instant) {
        self.join_settled(RemoteJoinRequest { broker: broker.clone(), join_request }, now);
    }

    /// A session is over.
    pub fn leave(&mut self, origin: &SessionOrigin, now: Instant) {
        self.withdraw(|join_request| {
            join_request.broker == origin.broker && join_request.join_request.session == origin.session
        });
        if let Some(id) = self.ids.get(origin) {
            self.remove(*id, None, now);
        }
    }

    /// A session answered a probe.
    pub fn alive(&mut self, origin: &SessionOrigin) {
        let probe = self.ids.get(origin).and_then(|id| self.probes.remove(id));
        for waiting in probe.into_iter().flat_map(|probe| probe.waiting) {
            self.end(&waiting.origin(), SessionEndReason::KeyInUse);
        }
    }

    /// Joins wait while other brokers may give addresses without this one.
    pub fn set_paused(&mut self, is_paused: bool, now: Instant) {
        self.is_paused = is_paused;
        self.join_early(now);
    }

    /// Ends probes, registrations and held addresses whose time is over.
    pub fn tick(&mut self, now: Instant) {
        self.tenants.expire(now);
        let silent = self.probes.iter().filter(|(_, probe)| probe.until <= now).map(|(id, _)| *id);
        for id in silent.collect::<Vec<_>>() {
            self.remove(id, Some(SessionEndReason::Silent), now);
        }
        let late =
            self.unregistered_brokers.iter().filter(|(_, until)| **until <= now).map(|(broker, _)| broker.clone());
        for broker in late.collect::<Vec<_>>() {
            self.broker_gone(&broker, now);
        }
        self.join_early(now);
    }

    /// Whether it knows the sessions of the other brokers, as far as these are online.
    pub fn is_settled(&self, now: Instant) -> bool {
        !self.is_paused && (self.unsettled_brokers.is_empty() || self.settled <= now)
    }

    fn join_early(&mut self, now: Instant) {
        if self.is_settled(now) {
            for join_request in std::mem::take(&mut self.queued_joins) {
                self.join_now(join_request, now);
            }
        }
    }

    fn join_settled(&mut self, join_request: RemoteJoinRequest, now: Instant) {
        if self.is_settled(now) {
            self.join_now(join_request, now);
        } else {
            self.queued_joins.push(join_request);
        }
    }

    fn join_now(&mut self, join_request: RemoteJoinRequest, now: Instant) {
        let id = self.next_id();
        let JoinRequest { tenant, client, .. } = &join_request.join_request;
        let joined = self.tenants.join(tenant, id, client.clone(), now);
        self.admit(join_request, id, joined, now);
    }

    /// A member of another broker, which has an address already, keeps it where it can.
    fn adopt(&mut self, join_request: RemoteJoinRequest, address: IpAddr, now: Instant) {
        let id = self.next_id();
        let JoinRequest { tenant, client, .. } = &join_request.join_request;
        let adopted = self.tenants.adopt(tenant, id, client.clone(), address, now);
        match adopted {
            Err(JoinError::NoAddress | JoinError::NoNetwork) => {
                self.end(&join_request.origin(), SessionEndReason::Conflict);
            }
            adopted => self.admit(join_request, id, adopted, now),
        }
    }

    fn admit(
        &mut self,
        join_request: RemoteJoinRequest,
        id: MemberId,
        joined: Result<Arc<Member>, JoinError>,
        now: Instant,
    ) {
        let origin = join_request.origin();
        match joined {
            Ok(member) => {
                let tenant = join_request.join_request.tenant;
                self.insert(id, &tenant, &origin, member.client.public_key);
                self.note_changes();
                self.updates.push((Target::All, Update::Joined(tenant, origin, member)));
            }
            Err(JoinError::KeyInUse(holder)) => self.probe(holder, join_request, now),
            Err(JoinError::NoAddress) => self.end(&origin, SessionEndReason::NoAddress),
            Err(JoinError::NoNetwork) => self.end(&origin, SessionEndReason::NoNetwork),
        }
    }

    /// Asks the member that has a key whether it is alive, for a newcomer with the same key.
    fn probe(&mut self, holder: MemberId, join_request: RemoteJoinRequest, now: Instant) {
        if let Some(probe) = self.probes.get_mut(&holder) {
            probe.waiting.push(join_request);
            return;
        }
        let Some(RegisteredMember { origin, .. }) = self.members.get(&holder) else { return };
        self.updates.push((Target::Broker(origin.broker.clone()), Update::Probe(origin.session)));
        self.probes.insert(holder, KeyProbe { until: now + PROBE_TIMEOUT, waiting: vec![join_request] });
    }

    /// A member leaves. The first of those that waited for its answer has its address.
    fn remove(&mut self, id: MemberId, refusal: Option<SessionEndReason>, now: Instant) {
        let Some(RegisteredMember { tenant, origin, .. }) = self.members.remove(&id) else { return };
        self.ids.remove(&origin);
        if let Some(refusal) = refusal {
            self.end(&origin, refusal);
        }
        let mut waiting = self.probes.remove(&id).into_iter().flat_map(|probe| probe.waiting);
        if let Some(first) = waiting.next() {
            self.hand_over(id, tenant, first);
        } else if let Some(member) = self.tenants.leave(&tenant, id, now) {
            self.note_changes();
            self.updates.push((Target::All, Update::Left(tenant, member.virtual_ip)));
        }
        for waiting in waiting {
            self.join_now(waiting, now);
        }
    }

    /// A member leaves, and a session that has its key, too, takes its place. The address is not free in between.
    fn hand_over(&mut self, id: MemberId, tenant: TenantId, join_request: RemoteJoinRequest) {
        let (next, origin) = (self.next_id(), join_request.origin());
        let Some(member) = self.tenants.hand_over(&tenant, id, next, join_request.join_request.client) else { return };
        self.insert(next, &tenant, &origin, member.client.public_key);
        self.note_changes();
        self.updates.push((Target::All, Update::Left(tenant.clone(), member.virtual_ip)));
        self.updates.push((Target::All, Update::Joined(tenant, origin, member)));
    }

    fn end(&mut self, origin: &SessionOrigin, refusal: SessionEndReason) {
        self.updates.push((Target::Broker(origin.broker.clone()), Update::Ended(origin.session, refusal)));
    }

    /// Sends all members and addresses to a broker that has registered.
    fn snapshot(&mut self, broker: &BrokerName) {
        self.note_changes();
        let to = |update| (Target::Broker(broker.clone()), update);
        let members = self.tenants.members().filter_map(|(tenant, id, member)| {
            let RegisteredMember { origin, .. } = self.members.get(&id)?;
            Some(to(Update::Joined(tenant.clone(), origin.clone(), member.clone())))
        });
        let addresses = self.tenants.addresses();
        let addresses = addresses.into_iter().map(|change| to(address(change)));
        let all = [to(Update::Snapshot)].into_iter().chain(members).chain(addresses).chain([to(Update::Complete)]);
        let all: Vec<_> = all.collect();
        self.updates.extend(all);
    }

    fn note_changes(&mut self) {
        let changes = self.tenants.take_changes();
        self.updates.extend(changes.into_iter().map(|change| (Target::All, address(change))));
    }

    fn insert(&mut self, id: MemberId, tenant: &TenantId, origin: &SessionOrigin, key: PublicKey) {
        self.members.insert(id, RegisteredMember { tenant: tenant.clone(), origin: origin.clone(), key });
        self.ids.insert(origin.clone(), id);
    }

    fn next_id(&mut self) -> MemberId {
        self.last += 1;
        MemberId(self.last)
    }
}

fn address(AddressChange { tenant, key, address }: AddressChange) -> Update {
    Update::Address(tenant, key, address)
}
