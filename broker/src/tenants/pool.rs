//! All tenants, and the pool of networks that they have. It has no IO and no clock.
//!
//! A tenant has a network from its first member's join until its last member has left and no address of it is held. Where
//! no network is free, the tenant without members gives up its own that has been without for the longest time. Where too many
//! addresses are held, the tenant with most of them gives up the one that it has held for the longest time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_common::address::tenants::TenantNetworks;

use crate::ipam::{Blocks, FreeList};
use crate::tenants::id::TenantId;
use crate::tenants::table::{JoinError, Joined, Member, MemberId, MemberInfo, Tenant};

/// Addresses that are held at most.
const HELD_MAX: usize = 100_000;

/// All tenants.
#[derive(Debug)]
pub struct Tenants {
    parts: Vec<Blocks>,
    free: FreeList,
    grace: Duration,
    held_max: usize,
    by_id: BTreeMap<TenantId, TenantNetwork>,
    /// Those that hold addresses, with how many.
    holding: BTreeSet<(usize, TenantId)>,
    /// Those without members, with when the last one left.
    empty: BTreeSet<(Instant, TenantId)>,
    counts: TenantCounts,
    changes: Vec<AddressChange>,
}

/// How many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantCounts {
    /// Tenants that have a network.
    pub tenants: usize,
    /// Their members.
    pub members: usize,
    /// Addresses that are held for members that left.
    pub held: usize,
}

/// The address of a key, from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressChange {
    /// In this tenant.
    pub tenant: TenantId,
    /// The key.
    pub key: PublicKey,
    /// Its address, be it a member's or held; none if it has none.
    pub address: Option<IpAddr>,
}

#[derive(Debug)]
struct TenantNetwork {
    number: u128,
    table: Tenant,
    /// Since when it has no member.
    empty: Option<Instant>,
}

impl Tenants {
    /// Without tenants. `grace`: how long an address is held.
    pub fn new(networks: &TenantNetworks, grace: Duration) -> Self {
        let parts: Vec<_> = networks.parts().filter_map(|(part, length)| Blocks::new(part, length)).collect();
        Self {
            free: FreeList::of_blocks(&parts),
            parts,
            grace,
            held_max: HELD_MAX,
            by_id: BTreeMap::new(),
            holding: BTreeSet::new(),
            empty: BTreeSet::new(),
            counts: TenantCounts::default(),
            changes: Vec::new(),
        }
    }

    /// How many there are.
    pub fn counts(&self) -> TenantCounts {
        TenantCounts { tenants: self.by_id.len(), ..self.counts }
    }

    /// All members with their tenants.
    pub fn members(&self) -> impl Iterator<Item = (&TenantId, MemberId, &Arc<Member>)> {
        self.by_id.iter().flat_map(|(id, tenant)| tenant.table.members().map(move |(member, what)| (id, member, what)))
    }

    /// Takes in a client.
    pub fn join(
        &mut self,
        id: &TenantId,
        session: MemberId,
        client: MemberInfo,
        now: Instant,
    ) -> Result<Arc<Member>, JoinError> {
        if !self.by_id.contains_key(id) {
            let number = self.take_network()?;
            self.open(id, number, now);
        }
        self.admit(id, |table| table.join(session, client))
    }

    /// Takes in a client that has this address already, by another broker or before a restart. Addresses and networks that are
    /// only held give way.
    pub fn adopt(
        &mut self,
        id: &TenantId,
        session: MemberId,
        client: MemberInfo,
        address: IpAddr,
        now: Instant,
    ) -> Result<Arc<Member>, JoinError> {
        let number = self.network_of(address).ok_or(JoinError::NoAddress)?;
        let in_the_way = self.by_id.iter().find(|(other, tenant)| (*other == id) != (tenant.number == number));
        if let Some((other, tenant)) = in_the_way {
            if !tenant.table.is_empty() {
                return Err(JoinError::NoAddress);
            }
            let other = other.clone();
            self.close(&other);
            return self.adopt(id, session, client, address, now);
        }
        if !self.by_id.contains_key(id) {
            if !self.free.take_this(number) {
                return Err(JoinError::NoNetwork);
            }
            self.open(id, number, now);
        }
        let adopted = self.admit(id, |table| table.adopt(session, client, address));
        self.close_if_unused(id);
        adopted
    }

    fn admit(
        &mut self,
        id: &TenantId,
        join: impl FnOnce(&mut Tenant) -> Result<Joined, JoinError>,
    ) -> Result<Arc<Member>, JoinError> {
        let tenant = self.by_id.get_mut(id).ok_or(JoinError::NoNetwork)?;
        let held = tenant.table.held();
        let joined = join(&mut tenant.table);
        if joined.is_ok()
            && let Some(since) = tenant.empty.take()
        {
            self.empty.remove(&(since, id.clone()));
        }
        self.count_held(id, held);
        let Joined { member, dispossessed } = joined?;
        self.counts.members += 1;
        if let Some(key) = dispossessed {
            self.note(id, key, None);
        }
        self.note(id, member.client.public_key, Some(member.virtual_ip));
        Ok(member)
    }

    /// A member leaves; none if it is none.
    pub fn leave(&mut self, id: &TenantId, session: MemberId, now: Instant) -> Option<Arc<Member>> {
        let is_held = !self.grace.is_zero();
        let tenant = self.by_id.get_mut(id)?;
        let held = tenant.table.held();
        let member = tenant.table.leave(session, is_held.then_some(now))?;
        let is_empty = tenant.table.is_empty();
        if is_empty {
            tenant.empty = Some(now);
            self.empty.insert((now, id.clone()));
        }
        self.counts.members -= 1;
        if is_held {
            self.count_held(id, held);
            self.give_up_held();
        } else {
            self.note(id, member.client.public_key, None);
            self.close_if_unused(id);
        }
        Some(member)
    }

    /// A member leaves, and a client with its key has its address at once; none if it is none.
    pub fn hand_over(
        &mut self,
        id: &TenantId,
        session: MemberId,
        next: MemberId,
        client: MemberInfo,
    ) -> Option<Arc<Member>> {
        self.by_id.get_mut(id)?.table.hand_over(session, next, client)
    }

    /// Gives up held addresses while there are too many. A tenant with few keeps them, whatever others do.
    fn give_up_held(&mut self) {
        while self.counts.held > self.held_max
            && let Some((held, id)) = self.holding.last().cloned()
        {
            let key = self.by_id.get_mut(&id).and_then(|tenant| tenant.table.give_up_oldest());
            self.count_held(&id, held);
            if let Some(key) = key {
                self.note(&id, key, None);
            }
            self.close_if_unused(&id);
        }
    }

    /// A tenant may hold another number of addresses than before.
    fn count_held(&mut self, id: &TenantId, before: usize) {
        let held = self.by_id.get(id).map_or(0, |tenant| tenant.table.held());
        self.holding.remove(&(before, id.clone()));
        if held > 0 {
            self.holding.insert((held, id.clone()));
        }
        self.counts.held = self.counts.held - before + held;
    }

    /// Frees the addresses that were held for the grace time, and the networks that no tenant needs any more.
    pub fn expire(&mut self, now: Instant) {
        let grace = self.grace;
        let expired = self.by_id.iter_mut().filter_map(|(id, tenant)| {
            let held = tenant.table.held();
            let keys = tenant.table.expire(grace, now);
            (!keys.is_empty()).then(|| (id.clone(), held, keys))
        });
        for (id, held, keys) in expired.collect::<Vec<_>>() {
            self.count_held(&id, held);
            for key in keys {
                self.note(&id, key, None);
            }
            self.close_if_unused(&id);
        }
    }

    /// Holds an address for a key, as before a restart; false if that cannot be.
    pub fn restore(&mut self, id: &TenantId, key: PublicKey, address: IpAddr, now: Instant) -> bool {
        let Some(number) = self.network_of(address) else { return false };
        if !self.by_id.contains_key(id) {
            if !self.free.take_this(number) {
                return false;
            }
            self.open(id, number, now);
        }
        let Some(tenant) = self.by_id.get_mut(id) else { return false };
        let held = tenant.table.held();
        let is_restored = tenant.table.restore(key, address, now);
        self.count_held(id, held);
        self.give_up_held();
        self.close_if_unused(id);
        is_restored
    }

    /// Takes the changes since the last call, in their order.
    pub fn take_changes(&mut self) -> Vec<AddressChange> {
        std::mem::take(&mut self.changes)
    }

    /// The address of each member and each held one, as they are to be restored.
    pub fn addresses(&self) -> Vec<AddressChange> {
        let of_tenant = |(id, tenant): (&TenantId, &TenantNetwork)| {
            let id = id.clone();
            tenant
                .table
                .addresses()
                .map(move |(key, address)| AddressChange { tenant: id.clone(), key, address })
                .collect()
        };
        self.by_id.iter().flat_map(|tenant| -> Vec<AddressChange> { of_tenant(tenant) }).collect()
    }

    fn open(&mut self, id: &TenantId, number: u128, now: Instant) {
        let Some(network) = self.network(number) else { return };
        self.by_id.insert(id.clone(), TenantNetwork { number, table: Tenant::new(network), empty: Some(now) });
        self.empty.insert((now, id.clone()));
    }

    fn take_network(&mut self) -> Result<u128, JoinError> {
        if let Some(number) = self.free.take() {
            return Ok(number);
        }
        let (_, oldest) = self.empty.first().cloned().ok_or(JoinError::NoNetwork)?;
        self.close(&oldest);
        self.free.take().ok_or(JoinError::NoNetwork)
    }

    fn close_if_unused(&mut self, id: &TenantId) {
        if self.by_id.get(id).is_some_and(|tenant| tenant.table.is_empty() && tenant.table.held() == 0) {
            self.close(id);
        }
    }

    fn close(&mut self, id: &TenantId) {
        let Some(TenantNetwork { number, table, empty }) = self.by_id.remove(id) else { return };
        if let Some(since) = empty {
            self.empty.remove(&(since, id.clone()));
        }
        self.count_held(id, table.held());
        for key in table.held_keys() {
            self.note(id, key, None);
        }
        self.free.give_back(number);
    }

    fn note(&mut self, tenant: &TenantId, key: PublicKey, address: Option<IpAddr>) {
        self.changes.push(AddressChange { tenant: tenant.clone(), key, address });
    }

    fn network(&self, mut number: u128) -> Option<IpNet> {
        for part in &self.parts {
            if number < part.size() {
                return part.network(number);
            }
            number -= part.size();
        }
        None
    }

    /// The number of the network that has this address.
    fn network_of(&self, address: IpAddr) -> Option<u128> {
        let mut before = 0;
        for part in &self.parts {
            if let Some(number) = part.number_of(address) {
                return Some(before + number);
            }
            before += part.size();
        }
        None
    }
}

#[cfg(test)]
mod tests;
