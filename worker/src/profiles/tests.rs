//! A second profile, which works without changes of the lower rooms: leased addresses, a keepalive and a preshared key,
//! no flood entry, and never swept.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use wgkex_common::{RejectReason, Reserved};
use wgkex_kernel::memory::MemoryKernel;
use wgkex_kernel::{Change, Device, Interface, Kernel as _};

use super::mesh::{self, Mesh};
use super::*;
use crate::peers::{Clocks, KnownPeers, Policy};
use crate::plan::{self, Step};
use crate::testing::{Leases, collision, domain, install_as, key, leased_networks, now};

#[test]
fn a_peer_with_leases_is_a_peer_with_all_of_them_and_a_route_to_each() {
    let (profile, networks) = (leases(), leased_networks(1));
    let changes = plan::changes(&install_as(&profile, [key(1), key(9)]));
    let peer = profile.desired(&key(1)).unwrap().peer;
    assert_eq!((peer.allowed_ips.len(), peer.keepalive, peer.preshared.is_some()), (3, NonZeroU16::new(25), true));
    let routes = networks.map(Change::SetRoute);
    assert_eq!(changes, [[Change::SetPeer(peer)].as_slice(), &routes].concat(), "and none for a key without a lease");
}

#[test]
fn a_peer_with_leases_is_repaired_and_nothing_else_is_touched() {
    type Damage = fn(&mut Device);
    let damages: [(Damage, usize); 6] = [
        (|_| (), 0),
        (|device| assert!(device.peers.get_mut(&key(1)).unwrap().allowed_ips.pop().is_some()), 1),
        (|device| device.peers.get_mut(&key(1)).unwrap().keepalive = None, 1),
        (|device| device.peers.get_mut(&key(1)).unwrap().preshared = None, 1),
        (|device| assert!(device.routes.remove(&leased_networks(1)[1])), 3),
        (|device| device.peers.get_mut(&key(1)).unwrap().allowed_ips.push("10.99.0.0/16".parse().unwrap()), 0),
    ];
    for (n, (damage, changes)) in damages.into_iter().enumerate() {
        let mut world = World::new();
        world.memory.alter(world.interface.clone(), damage);
        let steps = world.read();
        assert_eq!(plan::changes(&steps).len(), changes, "{n}");
        let whole = world.apply(&steps);
        if changes > 0 {
            assert_eq!(whole, World::new().device(), "{n}");
        }
    }
}

#[test]
fn a_peer_with_leases_is_never_swept_and_never_evicted_and_goes_with_its_routes_when_it_is_removed() {
    let mut world = World::new();
    world.now.monotonic += Duration::from_secs(86_400);
    assert_eq!(world.read(), []);
    let stale = world.known.stale(world.now.monotonic);
    assert!(stale.is_empty(), "{stale:?}");
    for n in 3..5 {
        world.known.mark_pending(key(n), world.now.monotonic);
    }
    assert!(world.known.eviction_candidates().is_empty());

    let steps = plan::remove(world.known.profile(), &world.device(), &[key(1)].into());
    let device = world.apply(&steps);
    assert_eq!(device.peers.keys().collect::<Vec<_>>(), [&key(2)]);
    assert_eq!(device.routes, leased_networks(2).into());
}

#[test]
fn a_network_that_two_have_is_one_key_s_and_the_other_loses_all_of_its_networks() {
    let mut world = World::new();
    let mut both = leases();
    both.0.insert(key(3), [leased_networks(1)[2], leased_networks(3)[0]].into());
    world.known = KnownPeers::new(Arc::new(both), Policy::default());
    world.read();
    let (own, reserved, now) = (None, Reserved::default(), world.now.monotonic);
    let admitted = world.known.admit([key(3)], own, &reserved, now);
    assert_eq!(admitted.refused, [(key(3), RejectReason::AddressTaken)], "key 1 came first");
    let admitted = world.known.admit([key(1), key(9)], own, &reserved, now);
    assert_eq!(admitted.known.iter().map(DesiredPeer::key).collect::<Vec<_>>(), [key(1)]);
    assert_eq!(admitted.refused, [(key(9), RejectReason::Denied)], "it has no lease");
}

#[test]
fn ownership_follows_from_the_allowed_ips_in_any_order() {
    let desired = leases().desired(&key(1)).unwrap();
    let peer = |networks: &[IpNet]| Peer { allowed_ips: networks.iter().copied().collect(), ..Peer::default() };
    let [one, two, three] = leased_networks(1);
    for (networks, ownership) in [
        (&[one, two, three][..], Ownership::Ours),
        (&[three, one, two], Ownership::Ours),
        (&[two], Ownership::Partial),
        (&[], Ownership::Partial),
        (&[one, two, three, leased_networks(2)[0]], Ownership::Foreign),
        (&[leased_networks(2)[0]], Ownership::Foreign),
    ] {
        assert_eq!(desired.ownership(&peer(networks)), ownership, "{networks:?}");
    }
    let (first, second) = collision();
    let router = mesh::desired(first);
    assert_eq!(router.ownership(&peer(mesh::desired(second).networks())), Ownership::Ours);
    assert_eq!(router.ownership(&peer(&[])), Ownership::Partial);
    assert_eq!(router.ownership(&peer(&[one])), Ownership::Foreign);
}

#[test]
fn only_addresses_that_a_key_can_have_are_left_over_by_the_mesh_profile() {
    let address = key(1).link_local();
    for (destination, is_left_over) in [
        (host(address), true),
        (IpNet::new(address.into(), 127).unwrap(), false),
        ("fe80::1/128".parse().unwrap(), false),
        ("10.0.0.1/32".parse().unwrap(), false),
    ] {
        assert_eq!(Mesh.is_left_over(&destination), is_left_over, "{destination}");
    }
}

fn leases() -> Leases {
    Leases::of([1, 2])
}

/// An interface with two leases, at work.
struct World {
    memory: MemoryKernel,
    interface: Interface,
    known: KnownPeers,
    now: Clocks,
}

impl World {
    fn new() -> Self {
        let interface = leases().interface(&domain());
        let memory = MemoryKernel::with([interface.clone()]);
        let known = KnownPeers::new(Arc::new(leases()), Policy { unestablished: 1, ..Policy::default() });
        let mut world =
            Self { memory, interface, known, now: Clocks { monotonic: Instant::now(), wall: SystemTime::now() } };
        world.apply(&install_as(&leases(), [key(1), key(2)]));
        assert_eq!(world.read(), []);
        world
    }

    /// Returns the changes to be made.
    fn read(&mut self) -> Vec<Step> {
        let (device, reserved) = (self.device(), Reserved::default());
        self.known.observe(&device, &reserved, self.now);
        self.known.pending_steps(&device, &reserved)
    }

    fn apply(&mut self, steps: &[Step]) -> Device {
        let outcomes = now(self.memory.apply(&self.interface, plan::changes(steps)));
        assert!(plan::outcomes(steps, outcomes).iter().all(|(_, outcome)| outcome.is_ok()));
        self.device()
    }

    fn device(&self) -> Device {
        self.memory.device(self.interface.clone()).unwrap()
    }
}
