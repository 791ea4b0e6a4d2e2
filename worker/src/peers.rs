//! The memory of an interface's peers from one read of its tables to the next: when their keys arrived, how long they
//! have been silent by the monotonic clock, and which keys are to be in the kernel and are not.
//!
//! [`KnownPeers`] is the public type. The observed peers are in [`table`], keys that are not completely in the kernel
//! in [`pending`], the owners of networks in [`owners`], and the number of further peers that fit in [`capacity`]; each
//! of these updates its own counters. [`arrivals`] handles keys that arrive, [`departures`] peers that are removed. No
//! IO, no clock, no log: the time is passed in.
//!
//! No task: [`KnownPeers`] is part of the state of a domain, which the reconciler's task owns. Previous stop of a key:
//! [`crate::reconciler`]; next stops: [`crate::profiles`], and [`crate::plan`].

mod arrivals;
mod capacity;
mod compact_instant;
mod departures;
mod metrics;
mod owners;
mod pending;
mod policy;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use wgkex_common::access_lists::Admission;
pub use wgkex_common::storage::key_store::Clocks;
use wgkex_common::storage::key_store::KeyRecord;
use wgkex_common::{PublicKey, Reserved};
use wgkex_kernel::{Change, Device, Indexes};

pub use self::arrivals::{Admitted, Missing, dedup_keep_last};
use self::capacity::PeerCapacity;
pub use self::departures::Drainable;
pub(crate) use self::departures::ORPHANED;
pub use self::metrics::Metrics;
use self::owners::{AddressOwners, Claimant};
use self::pending::{Pending, PendingKey};
pub use self::policy::{PeerCounts, PeerState, Policy};
use self::table::{PeerEntry, PeerTable};
use crate::plan::{self, SortedCursor, Step};
use crate::profiles::{DesiredPeer, Ownership, Profile};

/// The memory of one interface: 100 to 170 bytes per peer, beside the tables while they are read.
#[derive(Debug)]
pub struct KnownPeers {
    profile: Arc<dyn Profile>,
    policy: Policy,
    /// Which keys are admitted; used here for the trusted keys.
    admission: Arc<Admission>,
    /// The indexes of the last read; `None` while an interface is missing, and before the first read.
    indexes: Option<Indexes>,
    last_read: Option<Instant>,
    table: PeerTable,
    pending: Pending,
    owners: AddressOwners,
    /// Since when a destination has a route or a flood entry without a peer.
    orphans: BTreeMap<IpNet, Instant>,
    /// Keys whose record has changed since the last [`Self::take_changed`].
    changed: BTreeSet<PublicKey>,
}

impl KnownPeers {
    /// Remembers nothing yet.
    #[must_use]
    pub fn new(profile: Arc<dyn Profile>, policy: Policy) -> Self {
        Self {
            profile,
            policy,
            admission: Arc::default(),
            indexes: None,
            last_read: None,
            table: PeerTable::default(),
            pending: Pending::default(),
            owners: AddressOwners::default(),
            orphans: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    /// The profile that makes desired peers of keys.
    #[must_use]
    pub fn profile(&self) -> &dyn Profile {
        &*self.profile
    }

    /// Applies a new admission: a trusted key keeps its peer and its address however long it is silent.
    pub fn apply_admission(&mut self, admission: Arc<Admission>) {
        self.admission = admission;
    }

    /// Remembers, before the first read, a key of the last run of this program: if the kernel lacks it, it is pending.
    pub fn remember(&mut self, key: PublicKey, record: KeyRecord) {
        self.pending.insert(key, PendingKey::from_elsewhere(record.last.into(), record.established));
    }

    /// Takes in a read of the tables. Returns how many peers of ours vanished from an interface that stayed.
    ///
    /// For whatever reason a peer of ours vanished, its key is pending again: only a [`removed`](Self::removed) key is
    /// gone. A `reserved` key or address is never ours.
    pub fn observe(&mut self, device: &Device, reserved: &Reserved, now: Clocks) -> usize {
        let stayed = self.indexes == Some(device.indexes);
        let vanished = self.table.take_over(device, &mut self.pending, &mut self.changed, now.monotonic);
        self.forget_altered(device);
        let mut claimants = self.observe_peers(device, reserved, now);
        self.settle_owners(&mut claimants, now.monotonic);
        self.pending.release_slots();
        self.observe_orphans(device, reserved, &claimants, now.monotonic);
        self.indexes = Some(device.indexes);
        self.last_read = Some(now.monotonic);
        if stayed { vanished } else { 0 }
    }

    /// Forgets the pending state of keys whose peer is complete, or was altered by another program, unless the key was
    /// announced.
    fn forget_altered(&mut self, device: &Device) {
        let Self { pending, profile, .. } = self;
        pending.retain(|key, pending| {
            let ownership = |peer| profile.desired(key).map(|desired| desired.ownership(peer));
            let altered = device.peers.get(key).is_some_and(|peer| ownership(peer) != Some(Ownership::Partial));
            pending.announced || !altered
        });
    }

    /// Updates which peers are ours, and their handshakes; returns the networks that they have, or are to have.
    fn observe_peers(&mut self, device: &Device, reserved: &Reserved, now: Clocks) -> Vec<Claimant> {
        let since_last_read = self.last_read.map(|read| now.monotonic.saturating_duration_since(read));
        let Self { profile, table, owners, changed, .. } = self;
        let mut claimants = Vec::with_capacity(device.peers.len());
        owners.clear_foreign();
        table.observe(device, changed, |key, peer, entry| {
            let desired = profile.desired(key);
            let networks = desired.as_ref().map_or(&[][..], DesiredPeer::networks);
            entry.observe(peer, now, since_last_read);
            let is_free = || !reserved.has_key(key) && !networks.iter().any(|network| has_address(reserved, network));
            let may_be_ours = is_free() || (entry.is_admitted_and_established() && !reserved.lists(key));
            let ownership = entry.set_ownership(desired.as_ref(), peer, may_be_ours);
            if ownership == Ownership::Foreign {
                owners.add_foreign(*key, peer.allowed_ips.iter().copied());
            }
            let claimant =
                |network: &IpNet| Claimant { network: *network, key: *key, claims: entry.ours, has_peer: true };
            claimants.extend(networks.iter().map(claimant));
            ownership == Ownership::Partial || desired.is_some_and(|desired| desired.lacks_settings(peer))
        });
        claimants
    }

    /// Decides which key has which network, by all that this read showed.
    fn settle_owners(&mut self, claimants: &mut Vec<Claimant>, now: Instant) {
        for key in self.pending.keys() {
            let desired = self.profile.desired(key);
            let networks = desired.as_ref().map_or(&[][..], DesiredPeer::networks);
            let has_peer = self.table.vanished(key).is_some();
            let claim = |&network| Claimant { network, key: *key, claims: true, has_peer };
            claimants.extend(networks.iter().map(claim));
        }
        claimants.sort_by_key(Claimant::rank);
        for key in self.owners.rebuild(claimants) {
            if let Some(desired) = self.profile.desired(&key) {
                self.claim(&desired, now);
            }
        }
    }

    fn observe_orphans(&mut self, device: &Device, reserved: &Reserved, claimants: &[Claimant], now: Instant) {
        let with_peer = claimants.iter().filter(|claimant| claimant.has_peer);
        let claimed: Vec<_> = with_peer.map(|claimant| claimant.network).collect();
        let mut orphans = plan::orphans(&*self.profile, device, &claimed);
        orphans.retain(|network| !has_address(reserved, network));
        self.orphans.retain(|network, _| orphans.contains(network));
        for network in orphans {
            self.orphans.entry(network).or_insert(now);
        }
    }

    /// An interface is missing, so that nothing known of the tables is valid.
    pub fn lost(&mut self) {
        self.indexes = None;
    }

    /// The steps that set pending keys, in full, as far as there is room, and missing objects of peers of ours. Keys
    /// that may not be set are no longer pending.
    pub fn pending_steps(&mut self, device: &Device, reserved: &Reserved) -> Vec<Step> {
        let mut steps = self.give_slots(device.public_key, reserved);
        let again = self.pending.keys().filter(|key| self.table.contains(key));
        steps.extend(again.filter_map(|key| self.profile.desired(key)).map(Step::install));
        let damaged = self.damaged(device).into_iter().filter(|key| {
            let is_free =
                || !reserved.is_reserved(key) || (self.is_admitted_and_established(key) && !reserved.lists(key));
            self.table.has_ours(key) && !self.pending.contains(key) && is_free()
        });
        steps.extend(plan::repair(device, damaged.filter_map(|key| self.profile.desired(&key))));
        steps
    }

    /// Keys that have a network without a route or a flood entry, or a peer with a missing setting: few of all, so they
    /// are found in one pass through the tables, which have the same order.
    fn damaged(&self, device: &Device) -> BTreeSet<PublicKey> {
        let (mut routes, mut floods) = (SortedCursor::new(&device.routes), SortedCursor::new(&device.fdb));
        let mut lacks_flood = |network| single_address(network).is_some_and(|address| !floods.has(&address));
        let lack = self.owners.iter().filter(|(network, _)| !routes.has(network) || lacks_flood(network));
        let incomplete = self.table.incomplete().iter();
        let owns =
            |key: &&PublicKey| self.profile.desired(key).is_some_and(|peer| self.owners.owns(key, peer.networks()));
        lack.map(|(_, key)| *key).chain(incomplete.filter(owns).copied()).collect()
    }

    /// Removes routes and flood entries that have had no peer for a while.
    #[must_use]
    pub fn orphaned(&self, device: &Device, now: Instant) -> Vec<Change> {
        let old = self.orphans.iter().filter(|(_, since)| now.saturating_duration_since(**since) >= ORPHANED);
        plan::remove_orphans(device, &old.map(|(network, _)| *network).collect())
    }

    /// Marks all keys as changed.
    pub fn change_all(&mut self) {
        self.changed.extend(self.table.iter().map(|(key, _)| key).chain(self.pending.keys()));
    }

    /// The keys that have changed since the last call, each with its new record; none if it is gone.
    pub fn take_changed(&mut self) -> Vec<(PublicKey, Option<KeyRecord>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|key| (key, self.record(&key))).collect()
    }

    fn record(&self, key: &PublicKey) -> Option<KeyRecord> {
        let standing = self.table.known(key).filter(|entry| entry.ours);
        let pending = self.pending.get(key);
        let arrived = standing.map(|entry| entry.arrived).or_else(|| Some(pending?.arrived))?;
        let established = standing.is_some_and(PeerEntry::is_established)
            || pending.is_some_and(|pending| pending.handshake_elsewhere.is_some());
        Some(KeyRecord { last: arrived.into(), established })
    }

    /// The connected peers of ours that were not reported for [`Policy::report`], or since [`Self::report_all`]. They
    /// count as reported from now on.
    pub fn unreported(&mut self, now: Instant) -> Vec<PublicKey> {
        self.table.take_unreported(&self.policy, now)
    }

    /// Earlier reports may be lost: all peers are to be reported again.
    pub fn report_all(&mut self) {
        self.table.report_all();
    }

    /// How many peers are in which state, judged by the last read.
    #[must_use]
    pub fn counts(&self, now: Instant) -> PeerCounts {
        self.table.counts(&self.policy, now)
    }

    /// Whether `key` is pending.
    #[must_use]
    pub fn is_pending(&self, key: &PublicKey) -> bool {
        self.pending.contains(key)
    }

    /// Whether `key` arrived over MQTT and is not completely in the kernel, so that a broker may wait for its outcome.
    #[must_use]
    pub fn is_announced(&self, key: &PublicKey) -> bool {
        self.pending.get(key).is_some_and(|pending| pending.announced)
    }

    /// The number of keys that arrived and are not completely in the kernel, and the arrival of the oldest.
    #[must_use]
    pub fn waiting(&self) -> (usize, Option<Instant>) {
        let (number, oldest) = self.pending.announced();
        (number, oldest.map(Instant::from))
    }

    /// Whether the peer of `key` vanished, and the key has not arrived since.
    #[must_use]
    pub fn has_vanished(&self, key: &PublicKey) -> bool {
        self.table.vanished(key).is_some() && !self.is_announced(key)
    }

    /// Whether `key` has a peer of ours, as last read, or is pending.
    #[must_use]
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.pending.contains(key) || self.table.has_ours(key)
    }
}

/// Whether `network` is a single reserved address.
fn has_address(reserved: &Reserved, network: &IpNet) -> bool {
    single_address(network).is_some_and(|address| reserved.has_address(&address))
}

/// The address of an IPv6 network with a single address.
fn single_address(network: &IpNet) -> Option<Ipv6Addr> {
    match network {
        IpNet::V6(network) => (network.prefix_len() == 128).then_some(network.addr()),
        IpNet::V4(_) => None,
    }
}

#[cfg(test)]
mod tests;
