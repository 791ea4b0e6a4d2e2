//! The changes of an interface's tables, from what they are and what is desired: no IO, no clock, no log.
//!
//! Previous stop of a key: [`crate::peers`], which admits it; next stop: [`wgkex_kernel`], which makes the changes.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_kernel::{Change, Device, KernelError, Outcomes, host};

use crate::profiles::{DesiredPeer, Ownership, Profile};

/// What to do about one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What the key is to be, or was.
    pub peer: DesiredPeer,
    /// Which of its objects are set, or removed.
    pub action: Action,
}

/// Setting or removing some of a key's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// They are to be there.
    Set(Objects),
    /// They are to be gone.
    Remove(Objects),
    /// The peer is to be as one that has just come: without endpoint, handshake and counters.
    Renew,
}

/// Some of the things that a key is in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objects {
    /// The peer with its allowed-ips.
    pub peer: bool,
    /// Its routes, if it has any.
    pub routes: bool,
    /// Its entry in the flood list, if it has one.
    pub flood: bool,
}

/// Installs `keys` in order of arrival. Of a key that came twice the last counts, so that the tables end as if each
/// had been applied alone.
#[must_use]
pub fn install(profile: &dyn Profile, keys: impl IntoIterator<Item = PublicKey>) -> Vec<Step> {
    dedup_keep_last(keys).iter().filter_map(|key| profile.desired(key)).map(Step::install).collect()
}

/// Every key once, in the order of their last arrivals.
#[must_use]
pub fn dedup_keep_last(keys: impl IntoIterator<Item = PublicKey>) -> Vec<PublicKey> {
    let mut keys: Vec<_> = keys.into_iter().collect();
    let mut seen = BTreeSet::new();
    keys.reverse();
    keys.retain(|key| seen.insert(*key));
    keys.reverse();
    keys
}

/// Sets what is missing of the objects of `ours`, as far as they have a peer in `device`.
///
/// A peer to which somebody gave other allowed-ips is left alone, and so is one that lacks a network which another peer
/// has: to give it back would take it from that one.
#[must_use]
pub fn repair(device: &Device, ours: impl IntoIterator<Item = DesiredPeer>) -> Vec<Step> {
    let holders = LazyCell::new(|| holders(device));
    let missing = |peer: DesiredPeer| {
        let actual = device.peers.get(&peer.key())?;
        let is_free = |network: &IpNet| holders.get(network).is_none_or(|holder| *holder == peer.key());
        let sets_peer = match peer.ownership(actual) {
            Ownership::Ours => peer.lacks_settings(actual),
            Ownership::Partial if peer.networks().iter().all(is_free) => true,
            Ownership::Partial | Ownership::Foreign => return None,
        };
        let lacks_route = peer.networks().iter().any(|network| !device.routes.contains(network));
        let lacks_flood = peer.flood.is_some_and(|address| !device.fdb.contains(&address));
        let objects = Objects { peer: sets_peer, routes: peer.routes && lacks_route, flood: lacks_flood };
        (objects != Objects::NONE).then_some(Step { peer, action: Action::Set(objects) })
    };
    ours.into_iter().filter_map(missing).collect()
}

/// Removes the peers `removed` with their routes and flood entries. A route and an entry stay while one of the peers
/// that stay has the same destination.
#[must_use]
pub fn remove(profile: &dyn Profile, device: &Device, removed: &BTreeSet<PublicKey>) -> Vec<Step> {
    if removed.is_empty() {
        return Vec::new();
    }
    let staying = || device.peers.iter().filter(|(key, _)| !removed.contains(key));
    let desired = staying().filter_map(|(key, _)| profile.desired(key));
    let mut in_use: BTreeSet<IpNet> = staying().flat_map(|(_, peer)| peer.allowed_ips.iter().copied()).collect();
    desired.for_each(|peer| in_use.extend(peer.destinations()));
    let step = |key: &PublicKey| {
        let mut peer = profile.desired(key)?;
        peer.peer.allowed_ips.retain(|network| !in_use.contains(network));
        peer.flood = peer.flood.filter(|address| !in_use.contains(&host(*address)));
        Some(Step { peer, action: Action::Remove(Objects::ALL) })
    };
    removed.iter().filter(|key| device.peers.contains_key(key)).filter_map(step).collect()
}

/// Removes the peers `removed` as [`remove`] does, and of the keys `denied` also what is left without a peer.
#[must_use]
pub fn remove_denied(
    profile: &dyn Profile,
    device: &Device,
    removed: &BTreeSet<PublicKey>,
    denied: &BTreeSet<PublicKey>,
) -> Vec<Step> {
    let mut steps = remove(profile, device, removed);
    let absent: Vec<_> = denied.iter().filter(|key| !device.peers.contains_key(key)).collect();
    if !absent.is_empty() {
        let orphans = orphans(profile, device, &claimed(profile, device));
        for mut peer in absent.into_iter().filter_map(|key| profile.desired(key)) {
            peer.peer.allowed_ips.retain(|network| orphans.contains(network));
            peer.flood = peer.flood.filter(|address| orphans.contains(&host(*address)));
            if peer.destinations().next().is_some() {
                let objects = Objects { peer: false, ..Objects::ALL };
                steps.push(Step { peer, action: Action::Remove(objects) });
            }
        }
    }
    steps
}

/// Destinations that have a route or a flood entry, and no peer: what a crash, or somebody who removed only the peer,
/// left behind. What the profile would never make is somebody else's, and so is what some peer may send from.
/// `claimed` are the destinations of the peers that there are to be, in order.
#[must_use]
pub fn orphans(profile: &dyn Profile, device: &Device, claimed: &[IpNet]) -> BTreeSet<IpNet> {
    let (mut by_route, mut by_flood) = (SortedCursor::new(claimed), SortedCursor::new(claimed));
    let routes = device.routes.iter().copied().filter(|network| !by_route.has(network));
    let floods = device.fdb.iter().map(|address| host(*address)).filter(|network| !by_flood.has(network));
    let mut orphans: BTreeSet<IpNet> = routes.chain(floods).filter(|network| profile.is_left_over(network)).collect();
    if !orphans.is_empty() {
        let allowed: BTreeSet<_> = device.peers.values().flat_map(|peer| peer.allowed_ips.iter()).collect();
        let is_single = |network: &IpNet| network.prefix_len() == network.max_prefix_len();
        let wide: Vec<_> = allowed.iter().filter(|network| !is_single(network)).collect();
        orphans.retain(|orphan| !allowed.contains(orphan) && !wide.iter().any(|network| network.contains(orphan)));
    }
    orphans
}

/// The destinations of what the peers of `device` are to be, in order.
fn claimed(profile: &dyn Profile, device: &Device) -> Vec<IpNet> {
    let mut claimed = Vec::with_capacity(device.peers.len());
    for peer in device.peers.keys().filter_map(|key| profile.desired(key)) {
        claimed.extend(peer.destinations());
    }
    claimed.sort_unstable();
    claimed
}

/// Asks which of many things are among others, both in the same order: in one go through them.
pub struct SortedCursor<'a, T: 'a, I: Iterator<Item = &'a T>>(Peekable<I>);

impl<'a, T: Ord + 'a, I: Iterator<Item = &'a T>> SortedCursor<'a, T, I> {
    /// Asks among these, which are in order.
    pub fn new(items: impl IntoIterator<IntoIter = I>) -> Self {
        Self(items.into_iter().peekable())
    }

    /// Whether `item` is among them; no item comes before the one that was asked for last.
    pub fn has(&mut self, item: &T) -> bool {
        while self.0.next_if(|other| *other < item).is_some() {}
        self.0.peek().is_some_and(|other| *other == item)
    }
}

/// Removes the routes and flood entries of `orphans`.
#[must_use]
pub fn remove_orphans(device: &Device, orphans: &BTreeSet<IpNet>) -> Vec<Change> {
    let routes = orphans.intersection(&device.routes).map(|network| Change::RemoveRoute(*network));
    let floods = device.fdb.iter().filter(|address| orphans.contains(&host(**address)));
    routes.chain(floods.map(|address| Change::RemoveFdb(*address))).collect()
}

/// All changes of `steps`, in their order.
#[must_use]
pub fn changes(steps: &[Step]) -> Vec<Change> {
    let mut changes = Vec::with_capacity(3 * steps.len());
    for step in steps {
        step.add_changes(&mut changes);
    }
    changes
}

/// What became of each key of `steps`, given what became of their [`changes`]: done only if all of it was done, else
/// the first error.
#[must_use]
pub fn outcomes(steps: &[Step], applied: Outcomes) -> Vec<(PublicKey, Result<(), KernelError>)> {
    let mut applied = applied.into_iter();
    let outcome = |step: &Step| {
        let mut outcome = Ok(());
        for (_, result) in applied.by_ref().take(step.change_count()) {
            outcome = outcome.and(result);
        }
        (step.key(), outcome)
    };
    steps.iter().map(outcome).collect()
}

/// Which peer has which allowed-ip.
#[must_use]
pub fn holders(device: &Device) -> BTreeMap<IpNet, PublicKey> {
    let peers = device.peers.iter();
    peers.flat_map(|(key, peer)| peer.allowed_ips.iter().map(|network| (*network, *key))).collect()
}

impl Step {
    /// Installs a peer in full, whatever is there.
    #[must_use]
    pub fn install(peer: DesiredPeer) -> Self {
        Self { peer, action: Action::Set(Objects::ALL) }
    }

    /// Makes a peer forget where its router was.
    #[must_use]
    pub fn renew(peer: DesiredPeer) -> Self {
        Self { peer, action: Action::Renew }
    }

    /// The key that it is about.
    #[must_use]
    pub fn key(&self) -> PublicKey {
        self.peer.key()
    }

    /// The peer comes first and goes last: what a crash leaves half done still has its peer, by which it is found again.
    fn add_changes(&self, changes: &mut Vec<Change>) {
        let (key, networks) = (self.key(), self.peer.networks());
        let networks = |objects: Objects| networks.iter().copied().filter(move |_| self.peer.routes && objects.routes);
        let flood = |objects: Objects| self.peer.flood.filter(|_| objects.flood);
        match self.action {
            Action::Set(objects) => {
                changes.extend(objects.peer.then(|| Change::SetPeer(self.peer.peer.clone())));
                changes.extend(networks(objects).map(Change::SetRoute));
                changes.extend(flood(objects).map(Change::AddFdb));
            }
            Action::Remove(objects) => {
                changes.extend(networks(objects).map(Change::RemoveRoute));
                changes.extend(flood(objects).map(Change::RemoveFdb));
                changes.extend(objects.peer.then_some(Change::RemovePeer(key)));
            }
            Action::Renew => changes.extend([Change::RemovePeer(key), Change::SetPeer(self.peer.peer.clone())]),
        }
    }

    fn change_count(&self) -> usize {
        match self.action {
            Action::Set(objects) | Action::Remove(objects) => {
                let routes = if self.peer.routes && objects.routes { self.peer.networks().len() } else { 0 };
                usize::from(objects.peer) + routes + usize::from(objects.flood && self.peer.flood.is_some())
            }
            Action::Renew => 2,
        }
    }
}

impl Objects {
    /// All of them.
    pub const ALL: Self = Self { peer: true, routes: true, flood: true };
    /// None of them.
    pub const NONE: Self = Self { peer: false, routes: false, flood: false };
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;
    use wgkex_kernel::memory::MemoryKernel;
    use wgkex_kernel::{Errno, Interface, Kernel as _, Peer, PeerConfig};

    use super::*;
    use crate::profiles::mesh::{self, Mesh};
    use crate::testing::{collision, domain, key, now};

    #[test]
    fn a_key_is_a_peer_a_route_and_a_flood_entry() {
        let key: PublicKey = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=".parse().unwrap();
        let address: Ipv6Addr = "fe80::2a6:8fff:fe21:5465".parse().unwrap();
        let wanted =
            [Change::SetPeer(PeerConfig::at(key, address)), Change::SetRoute(host(address)), Change::AddFdb(address)];
        assert_eq!(changes(&install(&Mesh, [key])), wanted);
    }

    #[test]
    fn keys_keep_their_order_and_are_merged() {
        for (keys, wanted) in [(vec![3, 1, 2], vec![3, 1, 2]), (vec![1, 2, 1], vec![2, 1]), (vec![], vec![])] {
            let steps = install(&Mesh, keys.into_iter().map(key));
            assert_eq!(
                steps.iter().map(Step::key).collect::<Vec<_>>(),
                wanted.into_iter().map(key).collect::<Vec<_>>()
            );
        }
    }

    type Damage = fn(&mut Device, Ipv6Addr);

    #[test]
    fn a_repair_sets_only_what_is_missing() {
        let whole = device(&[key(1)]);
        assert_eq!(repair(&whole, owned([key(1), key(2)])), []);
        let address = key(1).link_local();
        let cases: [(Damage, Change); 3] = [
            (|device, address| assert!(device.routes.remove(&host(address))), Change::SetRoute(host(address))),
            (|device, address| assert!(device.fdb.remove(&address)), Change::AddFdb(address)),
            (|device, _| peer(device, 1).allowed_ips.clear(), Change::SetPeer(PeerConfig::at(key(1), address))),
        ];
        for (damage, change) in cases {
            let mut device = whole.clone();
            damage(&mut device, address);
            assert_eq!(changes(&repair(&device, owned([key(1)]))), [change]);
        }
    }

    #[test]
    fn a_repair_leaves_alone_what_somebody_else_altered() {
        let mut device = device(&[key(1), key(2)]);
        peer(&mut device, 1).allowed_ips.push("10.0.0.0/8".parse().unwrap());
        peer(&mut device, 2).allowed_ips = ["fe80::1/128".parse().unwrap()].into();
        device.routes.clear();
        assert_eq!(repair(&device, owned([key(1), key(2)])), []);
    }

    #[test]
    fn a_repair_does_not_take_an_address_from_another_peer() {
        let (first, second) = collision();
        let mut device = device(&[first, second]);
        assert_eq!(mesh::desired(first).ownership(&device.peers[&first]), Ownership::Partial);
        device.routes.clear();
        assert_eq!(changes(&repair(&device, owned([first, second]))), [Change::SetRoute(host(second.link_local()))]);
        device.peers.remove(&second);
        assert_eq!(
            changes(&repair(&device, owned([first])))[0],
            Change::SetPeer(PeerConfig::at(first, first.link_local()))
        );
    }

    #[test]
    fn a_sweep_removes_all_three_and_the_peer_last() {
        let (device, address) = (device(&[key(1), key(2)]), key(1).link_local());
        let wanted = [Change::RemoveRoute(host(address)), Change::RemoveFdb(address), Change::RemovePeer(key(1))];
        assert_eq!(changes(&remove(&Mesh, &device, &[key(1), key(9)].into())), wanted);
    }

    #[test]
    fn route_and_flood_entry_stay_while_another_peer_lives_at_the_address() {
        let (first, second) = collision();
        let both = device(&[first, second]);
        assert_eq!(changes(&remove(&Mesh, &both, &[first].into())), [Change::RemovePeer(first)]);
        assert_eq!(changes(&remove(&Mesh, &both, &[second].into())), [Change::RemovePeer(second)]);
        assert_eq!(changes(&remove(&Mesh, &both, &[first, second].into())).len(), 6);

        let mut moved = device(&[key(1), key(2)]);
        peer(&mut moved, 2).allowed_ips.push(host(key(1).link_local()));
        assert_eq!(changes(&remove(&Mesh, &moved, &[key(1)].into())), [Change::RemovePeer(key(1))]);
    }

    #[test]
    fn a_denied_key_goes_with_all_that_is_left_of_it_and_nothing_of_others() {
        let mut device = device(&[key(1), key(2), key(3)]);
        let [one, two] = [1, 2].map(|n| key(n).link_local());
        device.peers.remove(&key(2));
        let denied = [key(1), key(2), key(9)].into();
        let wanted = [
            Change::RemoveRoute(host(one)),
            Change::RemoveFdb(one),
            Change::RemovePeer(key(1)),
            Change::RemoveRoute(host(two)),
            Change::RemoveFdb(two),
        ];
        assert_eq!(changes(&remove_denied(&Mesh, &device, &[key(1)].into(), &denied)), wanted);
        peer(&mut device, 3).allowed_ips.push(host(two));
        assert_eq!(
            changes(&remove_denied(&Mesh, &device, &[].into(), &denied)),
            [],
            "somebody else has the address now"
        );
    }

    #[test]
    fn what_has_no_peer_is_an_orphan_unless_no_key_can_have_its_address() {
        let mut device = device(&[key(1), key(2)]);
        peer(&mut device, 2).allowed_ips = [host(key(3).link_local())].into();
        peer(&mut device, 2).allowed_ips.push("fe80::2ff:0:0:0/80".parse().unwrap());
        let in_network: Ipv6Addr = "fe80::2ff:ff:fe00:1".parse().unwrap();
        device.routes.insert(host(in_network));
        let foreign: Ipv6Addr = "fe80::1".parse().unwrap();
        device.routes.extend([key(3).link_local(), key(4).link_local(), foreign].map(host));
        device.fdb.extend([key(4).link_local(), key(5).link_local(), foreign]);
        let orphans = orphans(&Mesh, &device, &claimed(&Mesh, &device));
        assert_eq!(orphans, [key(4).link_local(), key(5).link_local()].map(host).into());
        let mut removed = remove_orphans(&device, &orphans);
        removed.sort_unstable();
        let mut wanted = [
            Change::RemoveRoute(host(key(4).link_local())),
            Change::RemoveFdb(key(4).link_local()),
            Change::RemoveFdb(key(5).link_local()),
        ];
        wanted.sort_unstable();
        assert_eq!(removed, wanted);
    }

    #[test]
    fn a_key_is_done_only_if_all_of_it_is() {
        let bad = KernelError::Refused { action: "x", source: Errno::EINVAL };
        let steps = install(&Mesh, [key(1), key(2), key(3)]);
        let mut applied: Vec<_> = changes(&steps).into_iter().map(|change| (change, Ok(()))).collect();
        applied[4].1 = Err(bad.clone());
        applied[5].1 = Err(KernelError::Refused { action: "y", source: Errno::EINVAL });
        let outcomes = outcomes(&steps, applied);
        assert_eq!(outcomes, [(key(1), Ok(())), (key(2), Err(bad)), (key(3), Ok(()))]);
    }

    proptest! {
        #[test]
        fn installing_twice_equals_once_and_together_equals_one_by_one(keys in vec(any_key(), 0..12)) {
            let memory = MemoryKernel::with(&[domain()]);
            apply(&memory, &install(&Mesh, keys.clone()));
            let once = memory.device(&domain());
            apply(&memory, &install(&Mesh, keys.clone()));
            prop_assert_eq!(&memory.device(&domain()), &once);

            let single = one_by_one(&keys);
            prop_assert_eq!(single.device(&domain()), once);
        }

        #[test]
        fn a_repair_leaves_nothing_to_repair(
            keys in btree_set(any_key(), 0..12),
            damage in vec((any_key(), 0..3), 0..12),
        ) {
            let memory = MemoryKernel::with(&[domain()]);
            apply(&memory, &install(&Mesh, keys.clone()));
            for (key, what) in damage {
                memory.alter(&domain(), |device| match (what, device.peers.get_mut(&key)) {
                    (0, Some(peer)) => peer.allowed_ips.clear(),
                    (1, _) => drop(device.routes.remove(&host(key.link_local()))),
                    _ => drop(device.fdb.remove(&key.link_local())),
                });
            }
            apply(&memory, &repair(&memory.device(&domain()).unwrap(), owned(keys.clone())));
            let device = memory.device(&domain()).unwrap();
            prop_assert_eq!(repair(&device, owned(keys.clone())), []);
            for key in keys {
                prop_assert!(device.routes.contains(&host(key.link_local())) && device.fdb.contains(&key.link_local()));
            }
        }

        #[test]
        fn a_sweep_twice_equals_once_and_leaves_the_others_whole(
            keys in btree_set(any_key(), 0..12),
            stale in btree_set(any_key(), 0..12),
        ) {
            let memory = one_by_one(&keys.iter().copied().collect::<Vec<_>>());
            let before = memory.device(&domain()).unwrap();
            let steps = remove(&Mesh, &before, &stale);
            apply(&memory, &steps);
            let once = memory.device(&domain()).unwrap();
            apply(&memory, &steps);
            prop_assert_eq!(&memory.device(&domain()).unwrap(), &once);
            prop_assert_eq!(remove(&Mesh, &once, &stale), []);
            for key in keys.difference(&stale) {
                prop_assert_eq!(&once.peers[key], &before.peers[key]);
                prop_assert!(once.routes.contains(&host(key.link_local())) && once.fdb.contains(&key.link_local()));
            }
        }
    }

    fn any_key() -> impl Strategy<Value = PublicKey> {
        let (first, second) = collision();
        prop_oneof![4 => (1..9_u32).prop_map(key), 1 => Just(first), 1 => Just(second)]
    }

    fn device(keys: &[PublicKey]) -> Device {
        one_by_one(keys).device(&domain()).unwrap()
    }

    fn one_by_one(keys: &[PublicKey]) -> MemoryKernel {
        let memory = MemoryKernel::with(&[domain()]);
        for key in keys {
            apply(&memory, &[Step::install(mesh::desired(*key))]);
        }
        memory
    }

    fn owned(keys: impl IntoIterator<Item = PublicKey>) -> impl Iterator<Item = DesiredPeer> {
        keys.into_iter().map(mesh::desired)
    }

    fn peer(device: &mut Device, n: u32) -> &mut Peer {
        device.peers.get_mut(&key(n)).unwrap()
    }

    fn apply(memory: &MemoryKernel, steps: &[Step]) {
        let applied = now(memory.clone().apply(&Interface::from(&domain()), changes(steps)));
        assert!(applied.iter().all(|(_, result)| result.is_ok()));
    }
}
