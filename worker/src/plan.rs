//! What a domain's tables must be told, from what they are and what is wanted: no IO, no clock, no log.
//! [`crate::reconciler`] asks, [`wgkex_kernel`] does it.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::net::{IpAddr, Ipv6Addr};

use wgkex_common::wire::message::Applied;
use wgkex_common::{Derived, PublicKey};

use wgkex_kernel::{Change, Device, Errno, KernelError, Peer};

/// What is made of an answer that did not come.
const NO_ANSWER: KernelError = KernelError::Refused { action: "apply a change", source: Errno::EIO };

/// Why a key is refused that is the interface's own.
pub const OWN_KEY: &str = "own key";

/// Why a key is refused that a gateway has, or whose address a gateway has.
pub const RESERVED: &str = Applied::RESERVED;

/// Why a key is refused whose address another has.
pub const ADDRESS_TAKEN: &str = Applied::ADDRESS_TAKEN;

/// Why a key is refused for which there is no room.
pub const FULL: &str = Applied::FULL;

/// Why a key is refused that the lists do not let come.
pub const DENIED: &str = Applied::DENIED;

/// Why a key no longer stands that did.
pub const REMOVED: &str = Applied::REMOVED;

/// Why keys are refused that the kernel would take.
pub const REFUSALS: [&str; 5] = [OWN_KEY, RESERVED, ADDRESS_TAKEN, FULL, DENIED];

/// Why the peer of a denied key stays.
pub const ALTERED: &str = "altered by somebody else";

/// What to do about one key: up to three changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The key it is about.
    pub key: PublicKey,
    /// The address derived from it.
    pub address: Ipv6Addr,
    /// Which of its three objects are set, or removed.
    pub action: Action,
}

/// Setting or removing some of a key's three objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// They are to be there.
    Set(Objects),
    /// They are to be gone.
    Remove(Objects),
    /// The peer is to be as one that has just come: without endpoint, handshake and counters.
    Renew,
}

/// Some of the three things that a key is in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objects {
    /// The peer with its allowed-ip.
    pub peer: bool,
    /// The route.
    pub route: bool,
    /// The entry in the flood list.
    pub fdb: bool,
}

/// Whose a peer is, by its allowed-ips alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Exactly the derived address: wgkex made it.
    Ours,
    /// None at all: one of ours whose address a later key took, or one that somebody is still making.
    Bare,
    /// Anything else: somebody else made or altered it.
    Foreign,
}

/// Installs `keys` in order of arrival. Of a key that came twice the last counts, so that the tables end as if each
/// had been applied alone.
#[must_use]
pub fn install(keys: impl IntoIterator<Item = PublicKey>) -> Vec<Step> {
    merged(keys).into_iter().map(Step::install).collect()
}

/// Every key once, in the order of their last arrivals.
#[must_use]
pub fn merged(keys: impl IntoIterator<Item = PublicKey>) -> Vec<PublicKey> {
    let mut keys: Vec<_> = keys.into_iter().collect();
    let mut seen = BTreeSet::new();
    keys.reverse();
    keys.retain(|key| seen.insert(*key));
    keys.reverse();
    keys
}

/// Sets what is missing of the three objects of `ours`, keys that have a peer in `device`, with their addresses.
///
/// A peer to which somebody gave other allowed-ips is left alone, and so is one whose address another peer has: to give
/// it back would take it from that one.
#[must_use]
pub fn repair(device: &Device, ours: impl IntoIterator<Item = (PublicKey, Ipv6Addr)>) -> Vec<Step> {
    let held = LazyCell::new(|| holders(device));
    let missing = |(key, address): (PublicKey, Ipv6Addr)| {
        let peer = device.peers.get(&key)?;
        let peer = match shape_at(address, peer) {
            Shape::Ours => false,
            Shape::Bare if !held.contains_key(&address) => true,
            Shape::Bare | Shape::Foreign => return None,
        };
        let objects = Objects { peer, route: !device.routes.contains(&address), fdb: !device.fdb.contains(&address) };
        (objects != Objects::NONE).then_some(Step { key, address, action: Action::Set(objects) })
    };
    ours.into_iter().filter_map(missing).collect()
}

/// Removes the peers `stale` with their routes and flood entries. Route and entry stay while one of the peers
/// that stay lives at the same address.
#[must_use]
pub fn sweep(device: &Device, stale: &BTreeSet<PublicKey>) -> Vec<Step> {
    if stale.is_empty() {
        return Vec::new();
    }
    let staying = || device.peers.iter().filter(|(key, _)| !stale.contains(key));
    let derived = staying().map(|(key, _)| key.link_local());
    let allowed = staying().flat_map(|(_, peer)| addresses_of(peer));
    let in_use: BTreeSet<Ipv6Addr> = derived.chain(allowed).collect();
    let remove = |key: &PublicKey| {
        let address = key.link_local();
        let alone = !in_use.contains(&address);
        Step { key: *key, address, action: Action::Remove(Objects { peer: true, route: alone, fdb: alone }) }
    };
    stale.iter().filter(|key| device.peers.contains_key(key)).map(remove).collect()
}

/// Removes the peers `expelled` as [`sweep`] does, and of the keys `denied` also what is left without a peer.
#[must_use]
pub fn expel(device: &Device, expelled: &BTreeSet<PublicKey>, denied: &BTreeSet<PublicKey>) -> Vec<Step> {
    let mut steps = sweep(device, expelled);
    let absent: Vec<_> = denied.iter().filter(|key| !device.peers.contains_key(key)).collect();
    if !absent.is_empty() {
        let orphans = orphans(device, &derived(device));
        let left = absent.into_iter().map(|key| (*key, key.link_local()));
        let left = left.filter(|(_, address)| orphans.contains(address));
        let rest = Objects { peer: false, ..Objects::ALL };
        steps.extend(left.map(|(key, address)| Step { key, address, action: Action::Remove(rest) }));
    }
    steps
}

/// Addresses that have a route or a flood entry, and no peer: what a crash, or somebody who removed only the peer,
/// left behind. Addresses that no key can have are somebody else's, and so are those that some peer may send from.
/// `derived` are the addresses that the peers' keys derive, in order.
#[must_use]
pub fn orphans(device: &Device, derived: &[Derived]) -> BTreeSet<Ipv6Addr> {
    let mut derived = Among::new(derived);
    let entries = device.routes.union(&device.fdb).filter_map(|address| Derived::of(*address));
    let without = entries.filter(|address| !derived.has(address));
    let mut orphans: BTreeSet<Ipv6Addr> = without.map(Ipv6Addr::from).collect();
    if !orphans.is_empty() {
        let in_use: BTreeSet<Ipv6Addr> = device.peers.values().flat_map(addresses_of).collect();
        let allowed = device.peers.values().flat_map(|peer| &peer.allowed_ips);
        let networks: BTreeSet<_> = allowed.filter(|(_, length)| *length < 128).collect();
        let in_network = |address| networks.iter().any(|(network, length)| covers(*network, *length, address));
        orphans.retain(|address| !in_use.contains(address) && !in_network(*address));
    }
    orphans
}

/// Asks which of many things are among others, both in the same order: in one go through them.
pub struct Among<'a, T: 'a, I: Iterator<Item = &'a T>>(Peekable<I>);

impl<'a, T: Ord + 'a, I: Iterator<Item = &'a T>> Among<'a, T, I> {
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

/// The addresses that the keys of the peers derive, in order.
fn derived(device: &Device) -> Vec<Derived> {
    let mut derived: Vec<_> = device.peers.keys().map(PublicKey::derived).collect();
    derived.sort_unstable();
    derived
}

fn covers(network: IpAddr, length: u8, address: Ipv6Addr) -> bool {
    let IpAddr::V6(network) = network else { return false };
    let differ = network.to_bits() ^ address.to_bits();
    differ.leading_zeros() >= u32::from(length)
}

/// Removes the routes and flood entries of `orphans`.
#[must_use]
pub fn clear(device: &Device, orphans: &BTreeSet<Ipv6Addr>) -> Vec<Change> {
    let routes = orphans.intersection(&device.routes).map(|address| Change::RemoveRoute(*address));
    let fdb = orphans.intersection(&device.fdb).map(|address| Change::RemoveFdb(*address));
    routes.chain(fdb).collect()
}

/// All changes of `steps`, in their order.
#[must_use]
pub fn changes(steps: &[Step]) -> Vec<Change> {
    steps.iter().flat_map(Step::changes).collect()
}

/// What became of each key of `steps`, given what the kernel said of their [`changes`]: done only if all of it
/// was done, else the first error.
pub fn outcomes(
    steps: &[Step],
    results: Vec<Result<(), KernelError>>,
) -> impl Iterator<Item = (PublicKey, Result<(), KernelError>)> {
    let mut results = results.into_iter();
    steps.iter().map(move |step| {
        let answers: Vec<_> = step.changes().map(|_| results.next().unwrap_or(Err(NO_ANSWER))).collect();
        (step.key, answers.into_iter().collect())
    })
}

/// Which peer has which address as an allowed-ip of its own.
#[must_use]
pub fn holders(device: &Device) -> BTreeMap<Ipv6Addr, PublicKey> {
    let peers = device.peers.iter();
    peers.flat_map(|(key, peer)| addresses_of(peer).map(|address| (address, *key))).collect()
}

/// Whose the peer of `key` is.
#[must_use]
pub fn shape(key: &PublicKey, peer: &Peer) -> Shape {
    match peer.allowed_ips[..] {
        [] => Shape::Bare,
        [(IpAddr::V6(_), 128)] => shape_at(key.link_local(), peer),
        _ => Shape::Foreign,
    }
}

/// The same, for the peer whose key derives `address`.
#[must_use]
pub fn shape_at(address: Ipv6Addr, peer: &Peer) -> Shape {
    match peer.allowed_ips[..] {
        [] => Shape::Bare,
        [(IpAddr::V6(only), 128)] if only == address => Shape::Ours,
        _ => Shape::Foreign,
    }
}

/// The addresses that a peer has as allowed-ips of its own.
pub fn addresses_of(peer: &Peer) -> impl Iterator<Item = Ipv6Addr> {
    peer.allowed_ips.iter().filter_map(|allowed| match *allowed {
        (IpAddr::V6(address), 128) => Some(address),
        _ => None,
    })
}

impl Step {
    /// Installs `key` in full, whatever is there.
    #[must_use]
    pub fn install(key: PublicKey) -> Self {
        Self { key, address: key.link_local(), action: Action::Set(Objects::ALL) }
    }

    /// Makes the peer of `key` forget where its router was.
    #[must_use]
    pub fn renew(key: PublicKey) -> Self {
        Self { key, address: key.link_local(), action: Action::Renew }
    }

    /// Its changes. The peer comes first and goes last: what a crash leaves half done still has its peer, by
    /// which it is found again.
    pub fn changes(&self) -> impl Iterator<Item = Change> + use<> {
        let Self { key, address, action } = *self;
        let pairs = match action {
            Action::Set(objects) => [
                (objects.peer, Change::SetPeer(key, address)),
                (objects.route, Change::SetRoute(address)),
                (objects.fdb, Change::AddFdb(address)),
            ],
            Action::Remove(objects) => [
                (objects.route, Change::RemoveRoute(address)),
                (objects.fdb, Change::RemoveFdb(address)),
                (objects.peer, Change::RemovePeer(key)),
            ],
            Action::Renew => [
                (true, Change::RemovePeer(key)),
                (true, Change::SetPeer(key, address)),
                (false, Change::RemovePeer(key)),
            ],
        };
        pairs.into_iter().filter_map(|(asked, change)| asked.then_some(change))
    }
}

impl Objects {
    /// All three.
    pub const ALL: Self = Self { peer: true, route: true, fdb: true };
    /// None of them.
    pub const NONE: Self = Self { peer: false, route: false, fdb: false };
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{collision, domain, key, now};
    use wgkex_kernel::Kernel as _;
    use wgkex_kernel::memory::MemoryKernel;

    #[test]
    fn a_key_is_a_peer_a_route_and_a_flood_entry() {
        let key: PublicKey = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=".parse().unwrap();
        let address: Ipv6Addr = "fe80::2a6:8fff:fe21:5465".parse().unwrap();
        let wanted = [Change::SetPeer(key, address), Change::SetRoute(address), Change::AddFdb(address)];
        assert_eq!(changes(&install([key])), wanted);
    }

    #[test]
    fn keys_keep_their_order_and_are_merged() {
        for (keys, wanted) in [(vec![3, 1, 2], vec![3, 1, 2]), (vec![1, 2, 1], vec![2, 1]), (vec![], vec![])] {
            let steps = install(keys.into_iter().map(key));
            assert_eq!(
                steps.iter().map(|step| step.key).collect::<Vec<_>>(),
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
            (|device, address| assert!(device.routes.remove(&address)), Change::SetRoute(address)),
            (|device, address| assert!(device.fdb.remove(&address)), Change::AddFdb(address)),
            (|device, _| peer(device, 1).allowed_ips.clear(), Change::SetPeer(key(1), address)),
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
        peer(&mut device, 1).allowed_ips.push(("10.0.0.0".parse().unwrap(), 8));
        peer(&mut device, 2).allowed_ips = vec![("fe80::1".parse().unwrap(), 128)];
        device.routes.clear();
        assert_eq!(repair(&device, owned([key(1), key(2)])), []);
    }

    #[test]
    fn a_repair_does_not_take_an_address_from_another_peer() {
        let (first, second) = collision();
        let mut device = device(&[first, second]);
        assert_eq!(shape(&first, &device.peers[&first]), Shape::Bare);
        device.routes.clear();
        assert_eq!(changes(&repair(&device, owned([first, second]))), [Change::SetRoute(second.link_local())]);
        device.peers.remove(&second);
        assert_eq!(changes(&repair(&device, owned([first])))[0], Change::SetPeer(first, first.link_local()));
    }

    #[test]
    fn a_sweep_removes_all_three_and_the_peer_last() {
        let (device, address) = (device(&[key(1), key(2)]), key(1).link_local());
        let wanted = [Change::RemoveRoute(address), Change::RemoveFdb(address), Change::RemovePeer(key(1))];
        assert_eq!(changes(&sweep(&device, &[key(1), key(9)].into())), wanted);
    }

    #[test]
    fn route_and_flood_entry_stay_while_another_peer_lives_at_the_address() {
        let (first, second) = collision();
        let both = device(&[first, second]);
        assert_eq!(changes(&sweep(&both, &[first].into())), [Change::RemovePeer(first)]);
        assert_eq!(changes(&sweep(&both, &[second].into())), [Change::RemovePeer(second)]);
        assert_eq!(changes(&sweep(&both, &[first, second].into())).len(), 6);

        let mut moved = device(&[key(1), key(2)]);
        peer(&mut moved, 2).allowed_ips.push((key(1).link_local().into(), 128));
        assert_eq!(changes(&sweep(&moved, &[key(1)].into())), [Change::RemovePeer(key(1))]);
    }

    #[test]
    fn a_denied_key_goes_with_all_that_is_left_of_it_and_nothing_of_others() {
        let mut device = device(&[key(1), key(2), key(3)]);
        let [one, two] = [1, 2].map(|n| key(n).link_local());
        device.peers.remove(&key(2));
        let denied = [key(1), key(2), key(9)].into();
        let wanted = [
            Change::RemoveRoute(one),
            Change::RemoveFdb(one),
            Change::RemovePeer(key(1)),
            Change::RemoveRoute(two),
            Change::RemoveFdb(two),
        ];
        assert_eq!(changes(&expel(&device, &[key(1)].into(), &denied)), wanted);
        peer(&mut device, 3).allowed_ips.push((two.into(), 128));
        assert_eq!(changes(&expel(&device, &[].into(), &denied)), [], "somebody else has the address now");
    }

    #[test]
    fn what_has_no_peer_is_an_orphan_unless_no_key_can_have_its_address() {
        let mut device = device(&[key(1), key(2)]);
        peer(&mut device, 2).allowed_ips = vec![(key(3).link_local().into(), 128)];
        let network = ("fe80::2ff:0:0:0".parse().unwrap(), 80);
        peer(&mut device, 2).allowed_ips.push(network);
        let in_network: Ipv6Addr = "fe80::2ff:ff:fe00:1".parse().unwrap();
        device.routes.insert(in_network);
        let foreign: Ipv6Addr = "fe80::1".parse().unwrap();
        device.routes.extend([key(3).link_local(), key(4).link_local(), foreign]);
        device.fdb.extend([key(4).link_local(), key(5).link_local(), foreign]);
        let orphans = orphans(&device, &derived(&device));
        assert_eq!(orphans, [key(4).link_local(), key(5).link_local()].into());
        let mut removed = clear(&device, &orphans);
        removed.sort_unstable();
        let mut wanted = [
            Change::RemoveRoute(key(4).link_local()),
            Change::RemoveFdb(key(4).link_local()),
            Change::RemoveFdb(key(5).link_local()),
        ];
        wanted.sort_unstable();
        assert_eq!(removed, wanted);
    }

    #[test]
    fn a_key_is_done_only_if_all_of_it_is() {
        let bad = KernelError::Refused { action: "x", source: Errno::EINVAL };
        let steps = install([key(1), key(2), key(3)]);
        let mut results = vec![Ok(()); 7];
        results[4] = Err(bad.clone());
        let outcomes: Vec<_> = outcomes(&steps, results).collect();
        assert_eq!(outcomes, [(key(1), Ok(())), (key(2), Err(bad)), (key(3), Err(NO_ANSWER))]);
    }

    proptest! {
        #[test]
        fn installing_twice_equals_once_and_together_equals_one_by_one(keys in vec(any_key(), 0..12)) {
            let memory = MemoryKernel::with(&[domain()]);
            apply(&memory, &install(keys.clone()));
            let once = memory.device(&domain());
            apply(&memory, &install(keys.clone()));
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
            apply(&memory, &install(keys.clone()));
            for (key, what) in damage {
                memory.alter(&domain(), |device| match (what, device.peers.get_mut(&key)) {
                    (0, Some(peer)) => peer.allowed_ips.clear(),
                    (1, _) => drop(device.routes.remove(&key.link_local())),
                    _ => drop(device.fdb.remove(&key.link_local())),
                });
            }
            apply(&memory, &repair(&memory.device(&domain()).unwrap(), owned(keys.clone())));
            let device = memory.device(&domain()).unwrap();
            prop_assert_eq!(repair(&device, owned(keys.clone())), []);
            for key in keys {
                prop_assert!(device.routes.contains(&key.link_local()) && device.fdb.contains(&key.link_local()));
            }
        }

        #[test]
        fn a_sweep_twice_equals_once_and_leaves_the_others_whole(
            keys in btree_set(any_key(), 0..12),
            stale in btree_set(any_key(), 0..12),
        ) {
            let memory = one_by_one(&keys.iter().copied().collect::<Vec<_>>());
            let before = memory.device(&domain()).unwrap();
            let steps = sweep(&before, &stale);
            apply(&memory, &steps);
            let once = memory.device(&domain()).unwrap();
            apply(&memory, &steps);
            prop_assert_eq!(&memory.device(&domain()).unwrap(), &once);
            prop_assert_eq!(sweep(&once, &stale), []);
            for key in keys.difference(&stale) {
                prop_assert_eq!(&once.peers[key], &before.peers[key]);
                prop_assert!(once.routes.contains(&key.link_local()) && once.fdb.contains(&key.link_local()));
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
            apply(&memory, &[Step::install(*key)]);
        }
        memory
    }

    fn owned(keys: impl IntoIterator<Item = PublicKey>) -> impl Iterator<Item = (PublicKey, Ipv6Addr)> {
        keys.into_iter().map(|key| (key, key.link_local()))
    }

    fn peer(device: &mut Device, n: u32) -> &mut Peer {
        device.peers.get_mut(&key(n)).unwrap()
    }

    fn apply(memory: &MemoryKernel, steps: &[Step]) {
        let results = now(memory.clone().apply(&domain(), &changes(steps)));
        assert!(results.iter().all(Result::is_ok));
    }
}
