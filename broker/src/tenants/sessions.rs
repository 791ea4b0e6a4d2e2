//! This broker's sessions, and the state that they know: all members with their addresses, by the updates of the
//! coordinator. It waits for no session: a message to a member is put into the member's queue, and a member whose queue
//! is full is dropped.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bytestring::ByteString;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use wgkex_common::BrokerName;

use crate::client_ip::Client;
use crate::tenants::clients::Clients;
use crate::tenants::close::CloseCause;
use crate::tenants::frame::{CoordinatorRequest, JoinRequest, SessionEndReason, SessionId, SessionOrigin, Update};
use crate::tenants::hub::TenantHub;
use crate::tenants::id::TenantId;
use crate::tenants::message::{Form, Welcome, announcement, hub_change, removal};
use crate::tenants::metrics::{Leave, Metrics};
use crate::tenants::pool::TenantCounts;
use crate::tenants::store::{AddressBuffer, Addresses, TenantKey};
use crate::tenants::table::Member;

/// How a session is reached.
#[derive(Debug)]
pub struct SessionLink {
    /// Its client.
    pub client: Client,
    /// The form of the messages that it gets.
    pub form: Form,
    /// Takes the messages that it is to send.
    pub queue: mpsc::Sender<Outgoing>,
    /// Has room for one probe: a ping whose answer is to be reported. It does not wait for the messages in the queue.
    pub probes: mpsc::Sender<()>,
    /// Why it is to end.
    pub end: oneshot::Sender<CloseCause>,
}

impl SessionLink {
    /// Queues a message for the session; false if there is no room. A session that has ended is about to leave, and not
    /// slow.
    fn takes(&self, outgoing: Outgoing) -> bool {
        !matches!(self.queue.try_send(outgoing), Err(TrySendError::Full(_)))
    }

    /// Asks the member whether it is alive.
    fn probe(&self) {
        // If there is no room, a probe is pending already.
        let _ = self.probes.try_send(());
    }
}

/// A message that a session is to send.
#[derive(Debug)]
pub enum Outgoing {
    /// The answer to its join: it is a member.
    Answer(Box<Welcome>),
    /// A message about another member.
    Text(ByteString),
}

/// The sessions, and all members that are known.
#[derive(Debug)]
pub struct Sessions {
    own: BrokerName,
    by_id: BTreeMap<SessionId, TenantSession>,
    clients: Clients,
    members: Members,
    addresses: Addresses,
    /// The part of a snapshot that was received so far.
    partial: Option<(Members, Addresses)>,
    last_order: u64,
    hub: Option<TenantHub>,
    kept: AddressBuffer,
    metrics: Metrics,
}

/// By tenant and address.
type Members = BTreeMap<TenantId, BTreeMap<IpAddr, KnownMember>>;

#[derive(Debug, Clone)]
struct KnownMember {
    origin: SessionOrigin,
    member: Arc<Member>,
    /// Larger than that of all members that joined before.
    order: u64,
}

#[derive(Debug)]
struct TenantSession {
    join_request: JoinRequest,
    link: SessionLink,
    since: Instant,
    /// The address in its answer; none before that.
    address: Option<IpAddr>,
}

/// A message to several members, in both forms.
struct Broadcast {
    plain: ByteString,
    with_endpoints: ByteString,
}

impl Sessions {
    /// The sessions of a broker of this name without clients, whose disk has these addresses.
    pub fn new(own: BrokerName, clients: Clients, addresses: Addresses, kept: AddressBuffer, metrics: Metrics) -> Self {
        let (by_id, members) = (BTreeMap::new(), Members::new());
        Self { own, by_id, clients, members, addresses, partial: None, last_order: 0, hub: None, kept, metrics }
    }

    /// With a hub, which is to have all addresses.
    pub fn with_hub(mut self, hub: Option<TenantHub>) -> Self {
        self.hub = hub;
        for ((_, key), address) in &self.addresses {
            self.hub.iter_mut().for_each(|hub| hub.on_address(*key, None, Some(*address)));
        }
        self
    }

    /// The hub, if there is to be one.
    pub fn hub(&mut self) -> Option<&mut TenantHub> {
        self.hub.as_mut()
    }

    /// The hub has changed: sends that to the members that requested it. Returns the requests for the coordinator.
    pub fn on_hub_change(&mut self) -> Vec<CoordinatorRequest> {
        let mut slow = Vec::new();
        for TenantSession { join_request, link, address, .. } in
            self.by_id.values().filter(|session| session.link.form.hub)
        {
            let Some(address) = address else { continue };
            let peer = self.hub.as_ref().and_then(|hub| hub.peer(*address));
            if !link.takes(Outgoing::Text(hub_change(peer.as_ref()).into())) {
                slow.push(join_request.session);
            }
        }
        let mut requests = Vec::new();
        self.drop_slow(slow, &mut requests);
        requests
    }

    /// A session wants to be a member. False if its client may not have it: it has ended then.
    pub fn insert(&mut self, join_request: JoinRequest, link: SessionLink, now: Instant) -> bool {
        if !self.clients.may_join(link.client, &join_request.tenant) {
            // It may have ended by itself.
            let _ = link.end.send(CloseCause::TooManyTenants);
            return false;
        }
        self.clients.add(link.client, join_request.tenant.clone());
        self.by_id.insert(join_request.session, TenantSession { join_request, link, since: now, address: None });
        true
    }

    fn take(&mut self, session: SessionId) -> Option<TenantSession> {
        let taken = self.by_id.remove(&session)?;
        self.clients.remove(taken.link.client, &taken.join_request.tenant);
        Some(taken)
    }

    /// A session is over. False if it was removed before.
    pub fn remove(&mut self, session: SessionId, leave: Leave) -> bool {
        let removed = self.take(session);
        if removed.as_ref().is_some_and(|session| session.address.is_some()) {
            self.metrics.leaves.with_label_values(&[<&str>::from(leave)]).inc();
        }
        removed.is_some()
    }

    /// All sessions, as they are registered.
    pub fn all(&self) -> impl Iterator<Item = (&JoinRequest, Option<IpAddr>)> {
        self.by_id.values().map(|session| (&session.join_request, session.address))
    }

    /// Sessions that wait for an address since before `then`.
    pub fn waiting(&self, then: Instant) -> Vec<SessionId> {
        let waits = |session: &TenantSession| session.address.is_none() && session.since <= then;
        self.by_id.values().filter(|session| waits(session)).map(|session| session.join_request.session).collect()
    }

    /// Ends a session; false if it has ended.
    pub fn end(&mut self, session: SessionId, cause: CloseCause) -> bool {
        let Some(TenantSession { link, address, .. }) = self.take(session) else { return false };
        if address.is_some() {
            let leave = if cause == CloseCause::Silent {
                Leave::Silent
            } else if cause == CloseCause::Slow {
                Leave::Slow
            } else {
                Leave::Refused
            };
            self.metrics.leaves.with_label_values(&[<&str>::from(leave)]).inc();
        }
        // It may have ended by itself.
        let _ = link.end.send(cause);
        true
    }

    /// All members that are known, of all brokers.
    pub fn members(&self) -> impl Iterator<Item = (&TenantId, &SessionOrigin, &Arc<Member>)> {
        self.members.iter().flat_map(|(tenant, members)| {
            members.values().map(move |KnownMember { origin, member, .. }| (tenant, origin, member))
        })
    }

    /// The addresses of members and those that are held.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// How many there are.
    pub fn counts(&self) -> TenantCounts {
        let members = self.members.values().map(BTreeMap::len).sum();
        TenantCounts { tenants: self.members.len(), members, held: self.addresses.len().saturating_sub(members) }
    }

    /// A damaged database was created again: writes all addresses to it.
    pub fn write_all(&self) {
        for (entry, address) in &self.addresses {
            self.kept.note(entry.clone(), Some(*address));
        }
    }

    /// A registration is sent: drops the part of a snapshot that was received before it.
    pub fn forget_partial(&mut self) {
        self.partial = None;
    }

    /// Applies an update; returns the requests for the coordinator that follow from it.
    pub fn apply(&mut self, update: Update) -> Vec<CoordinatorRequest> {
        let mut requests = Vec::new();
        match update {
            Update::Snapshot => self.partial = Some(Default::default()),
            Update::Complete => {
                if let Some((members, addresses)) = self.partial.take() {
                    self.replace_members(&members, &mut requests);
                    self.replace_addresses(addresses);
                }
            }
            Update::Joined(tenant, origin, member) => {
                self.last_order += 1;
                self.joined(tenant, KnownMember { origin, member, order: self.last_order }, &mut requests);
            }
            Update::Left(tenant, address) => self.left(&tenant, address, &mut requests),
            Update::Address(tenant, key, address) => self.set_address((tenant, key), address),
            Update::Probe(session) => match self.by_id.get(&session) {
                Some(TenantSession { link, .. }) => link.probe(),
                None => requests.push(CoordinatorRequest::Leave(session)),
            },
            Update::Ended(session, refusal) => drop(self.end(session, refusal.into())),
        }
        requests
    }

    fn joined(&mut self, tenant: TenantId, known: KnownMember, requests: &mut Vec<CoordinatorRequest>) {
        let address = known.member.virtual_ip;
        if let Some((members, _)) = &mut self.partial {
            members.entry(tenant).or_default().insert(address, known);
            return;
        }
        let members = self.members.entry(tenant.clone()).or_default();
        if members.get(&address).is_some_and(|other| other.is_same(&known)) {
            return;
        }
        members.insert(address, known.clone());
        if known.origin.broker == self.own {
            self.answer(known.origin.session, &tenant, address, requests);
        }
        let slow = self.broadcast(&tenant, address, &Broadcast::announcement(&known.member));
        self.drop_slow(slow, requests);
    }

    /// Sends a session its answer: it is a member.
    fn answer(&mut self, session: SessionId, tenant: &TenantId, own: IpAddr, requests: &mut Vec<CoordinatorRequest>) {
        let Some(found) = self.by_id.get_mut(&session) else { return };
        if found.address.is_some_and(|address| address != own) {
            self.end(session, SessionEndReason::Conflict.into());
            requests.push(CoordinatorRequest::Leave(session));
        } else if found.address.replace(own).is_none() {
            let peers = self.members.get(tenant).into_iter().flatten().filter(|(address, _)| **address != own);
            let mut peers: Vec<_> = peers.map(|(_, known)| known).collect();
            peers.sort_by_key(|known| known.order);
            let peers = peers.into_iter().map(|known| known.member.clone()).collect();
            let hub = self.hub.as_ref().filter(|_| found.link.form.hub).and_then(|hub| hub.peer(own));
            let welcome = Box::new(Welcome { virtual_ip: own, peers, hub });
            if found.link.queue.try_send(Outgoing::Answer(welcome)).is_ok() {
                self.metrics.joins.inc();
            } else {
                // Its session has ended.
                self.take(session);
                requests.push(CoordinatorRequest::Leave(session));
            }
        }
    }

    fn left(&mut self, tenant: &TenantId, address: IpAddr, requests: &mut Vec<CoordinatorRequest>) {
        let members = if let Some((members, _)) = &mut self.partial { members } else { &mut self.members };
        let Some(of_tenant) = members.get_mut(tenant) else { return };
        let is_known = of_tenant.remove(&address).is_some();
        if of_tenant.is_empty() {
            members.remove(tenant);
        }
        if is_known && self.partial.is_none() {
            let slow = self.broadcast(tenant, address, &Broadcast::removal(address));
            self.drop_slow(slow, requests);
        }
    }

    /// Sends a message to this broker's members of a tenant except one; returns those that have no room for it.
    fn broadcast(&self, tenant: &TenantId, except: IpAddr, message: &Broadcast) -> Vec<SessionId> {
        let mut slow = Vec::new();
        for (address, KnownMember { origin, .. }) in self.members.get(tenant).into_iter().flatten() {
            if *address == except || origin.broker != self.own {
                continue;
            }
            let Some(TenantSession { link, .. }) = self.by_id.get(&origin.session) else { continue };
            if !link.takes(Outgoing::Text(message.text(link.form))) {
                slow.push(origin.session);
            }
        }
        slow
    }

    fn drop_slow(&mut self, slow: Vec<SessionId>, requests: &mut Vec<CoordinatorRequest>) {
        for session in slow {
            self.end(session, CloseCause::Slow);
            requests.push(CoordinatorRequest::Leave(session));
        }
    }

    /// Replaces the known members by those of a snapshot: sessions receive the difference.
    fn replace_members(&mut self, members: &Members, requests: &mut Vec<CoordinatorRequest>) {
        for (tenant, known) in missing(&self.members, members) {
            self.left(&tenant, known.member.virtual_ip, requests);
        }
        for (tenant, known) in missing(members, &self.members) {
            self.joined(tenant, known, requests);
        }
        let is_member = |TenantSession { join_request, address, .. }: &TenantSession| {
            let known =
                members.get(&join_request.tenant).zip(*address).and_then(|(members, address)| members.get(&address));
            known.is_some_and(|KnownMember { origin, .. }| {
                origin.broker == self.own && origin.session == join_request.session
            })
        };
        let lost = self.by_id.values().filter(|session| session.address.is_some() && !is_member(session));
        for session in lost.map(|session| session.join_request.session).collect::<Vec<_>>() {
            self.end(session, SessionEndReason::Conflict.into());
            requests.push(CoordinatorRequest::Leave(session));
        }
    }

    fn replace_addresses(&mut self, addresses: Addresses) {
        let gone: Vec<_> = self.addresses.keys().filter(|entry| !addresses.contains_key(*entry)).cloned().collect();
        for entry in gone {
            self.set_address(entry, None);
        }
        for (entry, address) in addresses {
            self.set_address(entry, Some(address));
        }
    }

    fn set_address(&mut self, entry: TenantKey, address: Option<IpAddr>) {
        let addresses = match &mut self.partial {
            Some((_, addresses)) => addresses,
            None => &mut self.addresses,
        };
        let before = match address {
            Some(address) => addresses.insert(entry.clone(), address),
            None => addresses.remove(&entry),
        };
        if self.partial.is_none() && before != address {
            self.hub.iter_mut().for_each(|hub| hub.on_address(entry.1, before, address));
            self.kept.note(entry, address);
        }
    }
}

impl KnownMember {
    fn is_same(&self, other: &Self) -> bool {
        self.origin == other.origin && self.member == other.member
    }
}

/// The members of `all` that are not among `there`, in the order of their joins.
fn missing(all: &Members, there: &Members) -> Vec<(TenantId, KnownMember)> {
    let mut missing = Vec::new();
    for (tenant, members) in all {
        let there = there.get(tenant);
        let is_there = |address: &IpAddr, known: &KnownMember| {
            there.and_then(|there| there.get(address)).is_some_and(|same| same.is_same(known))
        };
        let of_tenant = members.iter().filter(|(address, known)| !is_there(address, known));
        missing.extend(of_tenant.map(|(_, known)| (tenant.clone(), known.clone())));
    }
    missing.sort_by_key(|(_, known)| known.order);
    missing
}

impl Broadcast {
    fn announcement(member: &Member) -> Self {
        let form = |endpoints| Form { endpoints, ..Form::default() };
        let [plain, with_endpoints] = [false, true].map(|endpoints| announcement(member, form(endpoints)).into());
        Self { plain, with_endpoints }
    }

    fn removal(virtual_ip: IpAddr) -> Self {
        let text = ByteString::from(removal(virtual_ip));
        Self { plain: text.clone(), with_endpoints: text }
    }

    fn text(&self, form: Form) -> ByteString {
        if form.endpoints { self.with_endpoints.clone() } else { self.plain.clone() }
    }
}
