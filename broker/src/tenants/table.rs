//! One tenant's table: its members with their addresses, and the addresses that are held for members that left. It has
//! no IO and no clock.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use wgkex_common::PublicKey;

use crate::ipam::{FreeList, Range};

/// The number of a member at the broker that gives addresses; no other has the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u64);

/// The data of a client that joins: its own, and the address of its connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// As it was given.
    pub display_name: String,
    /// Its key.
    pub public_key: PublicKey,
    /// The address that it connects from, if it wants that to be shown, and if that is known.
    pub endpoint: Option<IpAddr>,
}

/// A member of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its address in the tenant's network.
    pub virtual_ip: IpAddr,
    /// Its data from the join.
    pub client: MemberInfo,
}

/// Why a client cannot join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinError {
    /// This member has the key.
    KeyInUse(MemberId),
    /// Members have all addresses.
    NoAddress,
    /// Tenants with members have all networks.
    NoNetwork,
}

/// A new member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// The member.
    pub member: Arc<Member>,
    /// The key whose held address it got.
    pub dispossessed: Option<PublicKey>,
}

/// The members of a tenant, and the addresses of its network.
#[derive(Debug)]
pub struct Tenant {
    range: Range,
    /// Neither taken nor held.
    free: FreeList,
    members: BTreeMap<MemberId, Arc<Member>>,
    sessions: HashMap<PublicKey, MemberId>,
    held: HashMap<PublicKey, HeldNumber>,
    /// The same, the one that is held for the longest time first.
    oldest: BTreeSet<(HeldNumber, PublicKey)>,
}

/// An address that its last member may have back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct HeldNumber {
    since: Instant,
    number: u128,
}

impl Tenant {
    /// All addresses of `network` are free.
    pub fn new(network: IpNet) -> Self {
        let range = Range::hosts(network);
        Self {
            range,
            free: FreeList::of_range(range),
            members: BTreeMap::new(),
            sessions: HashMap::new(),
            held: HashMap::new(),
            oldest: BTreeSet::new(),
        }
    }

    /// Its members, in the order in which they joined.
    pub fn members(&self) -> impl Iterator<Item = (MemberId, &Arc<Member>)> {
        self.members.iter().map(|(session, member)| (*session, member))
    }

    /// Whether it has no member.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// How many addresses are held.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Takes in a client. It gets the address that is held for its key, else the lowest free one, else the one that is held
    /// for the longest time.
    pub fn join(&mut self, session: MemberId, client: MemberInfo) -> Result<Joined, JoinError> {
        let key = client.public_key;
        if let Some(holder) = self.sessions.get(&key) {
            return Err(JoinError::KeyInUse(*holder));
        }
        let (number, dispossessed) = self.take_address(key).ok_or(JoinError::NoAddress)?;
        let virtual_ip = self.range.address(number).ok_or(JoinError::NoAddress)?;
        Ok(self.insert(session, Member { virtual_ip, client }, dispossessed))
    }

    /// Takes in a client that has this address already. Another key for which it is held loses it.
    pub fn adopt(&mut self, session: MemberId, client: MemberInfo, virtual_ip: IpAddr) -> Result<Joined, JoinError> {
        let key = client.public_key;
        if let Some(holder) = self.sessions.get(&key) {
            return Err(JoinError::KeyInUse(*holder));
        }
        let number = self.range.number(virtual_ip).ok_or(JoinError::NoAddress)?;
        let holder = self.oldest.iter().find(|(held, _)| held.number == number).map(|(_, key)| *key);
        if holder.is_none() && !self.free.take_this(number) {
            return Err(JoinError::NoAddress);
        }
        if let Some(number) = self.unhold(key).filter(|held| *held != number) {
            self.free.give_back(number);
        }
        let dispossessed = holder.filter(|holder| *holder != key);
        if let Some(other) = dispossessed {
            self.unhold(other);
        }
        Ok(self.insert(session, Member { virtual_ip, client }, dispossessed))
    }

    fn insert(&mut self, session: MemberId, member: Member, dispossessed: Option<PublicKey>) -> Joined {
        let member = Arc::new(member);
        self.members.insert(session, member.clone());
        self.sessions.insert(member.client.public_key, session);
        Joined { member, dispossessed }
    }

    /// A member leaves; none if it is none. Its address is held from `since` on, or free at once.
    pub fn leave(&mut self, session: MemberId, since: Option<Instant>) -> Option<Arc<Member>> {
        let member = self.members.remove(&session)?;
        self.sessions.remove(&member.client.public_key);
        if let Some(number) = self.range.number(member.virtual_ip) {
            match since {
                Some(since) => self.hold(member.client.public_key, HeldNumber { since, number }),
                None => self.free.give_back(number),
            }
        }
        Some(member)
    }

    /// A member leaves, and a client with its key has its address at once; none if it is none.
    pub fn hand_over(&mut self, session: MemberId, next: MemberId, client: MemberInfo) -> Option<Arc<Member>> {
        let Member { virtual_ip, .. } = *self.members.remove(&session)?;
        Some(self.insert(next, Member { virtual_ip, client }, None).member)
    }

    /// Holds an address for a key, as before a restart; false if that cannot be, as for a member.
    pub fn restore(&mut self, key: PublicKey, address: IpAddr, since: Instant) -> bool {
        let is_there = self.held.contains_key(&key) || self.sessions.contains_key(&key);
        let number = self.range.number(address).filter(|_| !is_there);
        let Some(number) = number.filter(|number| self.free.take_this(*number)) else { return false };
        self.hold(key, HeldNumber { since, number });
        true
    }

    /// Frees the addresses that were held for `grace`, and returns for which keys.
    pub fn expire(&mut self, grace: Duration, now: Instant) -> Vec<PublicKey> {
        let mut expired = Vec::new();
        while let Some((HeldNumber { since, number }, key)) = self.oldest.first().copied() {
            if now.saturating_duration_since(since) < grace {
                break;
            }
            self.unhold(key);
            self.free.give_back(number);
            expired.push(key);
        }
        expired
    }

    /// Frees the address that is held for the longest time, and returns for which key; none if none is held.
    pub fn give_up_oldest(&mut self) -> Option<PublicKey> {
        let (_, key) = self.oldest.first().copied()?;
        let number = self.unhold(key)?;
        self.free.give_back(number);
        Some(key)
    }

    /// The keys for which addresses are held.
    pub fn held_keys(&self) -> impl Iterator<Item = PublicKey> {
        self.oldest.iter().map(|(_, key)| *key)
    }

    /// Each key with its address, be it a member's or held.
    pub fn addresses(&self) -> impl Iterator<Item = (PublicKey, Option<IpAddr>)> {
        let members = self.members.values().map(|member| (member.client.public_key, Some(member.virtual_ip)));
        members.chain(self.oldest.iter().map(|(held, key)| (*key, self.range.address(held.number))))
    }

    /// An address for a key, and the key that it was held for, if that is another one.
    fn take_address(&mut self, key: PublicKey) -> Option<(u128, Option<PublicKey>)> {
        if let Some(number) = self.unhold(key).or_else(|| self.free.take()) {
            return Some((number, None));
        }
        let (oldest, other) = self.oldest.first().copied()?;
        self.unhold(other);
        Some((oldest.number, Some(other)))
    }

    fn hold(&mut self, key: PublicKey, held: HeldNumber) {
        self.held.insert(key, held);
        self.oldest.insert((held, key));
    }

    fn unhold(&mut self, key: PublicKey) -> Option<u128> {
        let held = self.held.remove(&key)?;
        self.oldest.remove(&(held, key));
        Some(held.number)
    }
}
