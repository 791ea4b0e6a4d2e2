use std::net::Ipv6Addr;

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use wgkex_kernel::memory::MemoryKernel;
use wgkex_kernel::{Device, Errno, Interface, Kernel as _, Peer, PeerConfig, host};

use super::removal::claimed;
use super::*;
use crate::profiles::Ownership;
use crate::profiles::mesh::{self, Mesh};
use crate::testing::{collision, domain, install, key, now};

#[test]
fn a_key_is_a_peer_a_route_and_a_flood_entry() {
    let key: PublicKey = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=".parse().unwrap();
    let address: Ipv6Addr = "fe80::2a6:8fff:fe21:5465".parse().unwrap();
    let wanted =
        [Change::SetPeer(PeerConfig::at(key, address)), Change::SetRoute(host(address)), Change::AddFdb(address)];
    assert_eq!(changes(&install([key])), wanted);
}

#[test]
fn keys_keep_their_order_and_are_merged() {
    for (keys, wanted) in [(vec![3, 1, 2], vec![3, 1, 2]), (vec![1, 2, 1], vec![2, 1]), (vec![], vec![])] {
        let steps = install(keys.into_iter().map(key));
        assert_eq!(steps.iter().map(Step::key).collect::<Vec<_>>(), wanted.into_iter().map(key).collect::<Vec<_>>());
    }
}

type Damage = fn(&mut Device, Ipv6Addr);

#[test]
fn a_repair_sets_only_missing_objects() {
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
fn a_repair_skips_peers_that_another_program_altered() {
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
fn a_denied_key_is_removed_with_its_orphans_and_nothing_of_others() {
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
    assert_eq!(changes(&remove_denied(&Mesh, &device, &[].into(), &denied)), [], "somebody else has the address now");
}

#[test]
fn a_destination_without_a_peer_is_an_orphan_if_a_key_can_have_it() {
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
fn a_key_is_done_only_if_all_its_changes_are() {
    let bad = KernelError::Refused { action: "x", source: Errno::EINVAL };
    let steps = install([key(1), key(2), key(3)]);
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
