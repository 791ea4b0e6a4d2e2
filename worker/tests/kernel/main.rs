//! One suite for every kernel: in memory (`memory`), Linux with a userspace WireGuard (`netns`), Linux with its own
//! (`vm`). The Linux lanes read the tables with wg, ip and bridge as well as with the code under test.

#![expect(clippy::unwrap_used, reason = "the lint knows test functions, not what they call")]

mod lab;
mod linux;

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use tokio::time::timeout;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::{Change, Device, Errno, Interface, Kernel, KernelError, Peer, PeerConfig, PresharedKey, host};

use lab::{Lab, MemoryLab, key};
use linux::{Linux, WireGuard};

/// The timeout for expected events, on the slowest machine.
const SOON: Duration = Duration::from_secs(30);

/// How long to wait for events that must not happen.
const A_WHILE: Duration = Duration::from_millis(500);

macro_rules! lane {
    ($lane:ident, $wireguard:expr, $($scenario:ident)*) => {
        mod $lane {
            use super::*;
            $(
                #[test]
                #[ignore = "needs root: cargo test -p wgkex-worker --test kernel -- --ignored netns (vm: in tests/vm/run)"]
                fn $scenario() {
                    Linux::run($wireguard, async |lab| super::$scenario(&lab).await);
                }
            )*
        }
    };
}

macro_rules! suite {
    (every kernel: $($scenario:ident)* ; linux: $($of_linux:ident)* ;) => {
        mod memory {
            use super::*;
            $(
                #[tokio::test]
                async fn $scenario() {
                    super::$scenario(&MemoryLab::default()).await;
                }
            )*
        }
        lane!(netns, WireGuard::Userspace, $($scenario)* $($of_linux)*);
        lane!(vm, WireGuard::Kernel, $($scenario)* $($of_linux)*);
    };
}

suite! {
    every kernel:
        a_key_has_its_peer_route_and_flood_entry
        applying_twice_is_as_good_as_once
        removing_leaves_nothing_and_may_be_repeated
        what_others_made_stays_as_it_is
        a_missing_or_downed_interface_is_named_and_nothing_is_applied
        an_interface_made_anew_has_other_indexes_and_is_noticed
        own_changes_are_no_event
        the_own_key_is_no_peer
        an_address_moves_to_the_peer_that_has_it_last
        a_peer_may_have_many_networks_a_keepalive_and_a_preshared_key
        one_key_may_be_in_two_domains
        twenty_thousand_keys_go_in_at_once;
    linux:
        a_key_that_comes_again_keeps_handshake_endpoint_counters_and_other_addresses
        a_peer_with_many_addresses_is_read_as_one
        a_tun_without_wireguard_is_not_taken_for_one
        an_error_is_reported_for_its_own_change
        a_dump_among_changes_is_whole_or_none;
}

lane!(netns_alone, WireGuard::Userspace, one_peer_too_many_holds_up_no_other a_process_that_hangs_holds_up_no_other_domain);

fn install(key: PublicKey) -> [Change; 3] {
    let node = key.link_local();
    [Change::SetPeer(PeerConfig::at(key, node)), Change::SetRoute(host(node)), Change::AddFdb(node)]
}

fn hosts(addresses: &BTreeSet<Ipv6Addr>) -> BTreeSet<IpNet> {
    addresses.iter().copied().map(host).collect()
}

fn uninstall(key: PublicKey) -> [Change; 3] {
    let node = key.link_local();
    [Change::RemovePeer(key), Change::RemoveRoute(host(node)), Change::RemoveFdb(node)]
}

async fn apply(kernel: &mut impl Kernel, domain: &Domain, changes: &[Change]) {
    for (change, result) in changes.iter().zip(results(kernel, domain, changes).await) {
        assert_eq!(result, Ok(()), "{change:?}");
    }
}

/// The result of each change, after a check that the kernel returns them in the same order.
async fn results(kernel: &mut impl Kernel, domain: &Domain, changes: &[Change]) -> Vec<Result<(), KernelError>> {
    let outcomes = kernel.apply(&Interface::from(domain), changes.to_vec()).await;
    assert!(outcomes.iter().map(|(change, _)| change).eq(changes));
    outcomes.into_iter().map(|(_, result)| result).collect()
}

/// A domain with its interfaces, a kernel, and its tables as they are read.
async fn start<L: Lab>(lab: &L) -> (Domain, L::Kernel, Device) {
    let domain = lab.domain("a");
    lab.make(&domain);
    let mut kernel = lab.kernel();
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    (domain, kernel, device)
}

async fn a_key_has_its_peer_route_and_flood_entry<L: Lab>(lab: &L) {
    let (domain, mut kernel, empty) = start(lab).await;
    assert!(empty.peers.is_empty() && empty.routes.is_empty() && empty.fdb.is_empty(), "{empty:?}");
    assert_eq!((empty.public_key, empty.listen_port, empty.link_address), lab.own(&domain));

    let keys = [key(1), key(2), key(3)];
    apply(&mut kernel, &domain, &keys.map(install).concat()).await;

    let nodes: BTreeSet<_> = keys.iter().map(PublicKey::link_local).collect();
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!((&device.routes, &device.fdb, device.indexes), (&hosts(&nodes), &nodes, empty.indexes));
    assert_eq!(device.peers.keys().copied().collect::<BTreeSet<_>>(), BTreeSet::from(keys));
    for key in keys {
        assert_eq!(device.peers[&key].allowed_ips[..], [host(key.link_local())]);
        assert_eq!(device.peers[&key].last_handshake, None);
    }
    let shown = lab.shown(&domain);
    assert_eq!((shown.peers.len(), shown.routes.len(), shown.fdb.len()), (3, 3, 3), "{shown:?}");
    for (key, node) in keys.iter().map(|key| (key, key.link_local())) {
        assert!(shown.peers.contains(&format!("{key}\t{node}/128")), "{shown:?}");
        assert!(shown.routes.contains(&format!("{node} proto static metric 1024 pref medium")), "{shown:?}");
        let entry = format!("00:00:00:00:00:00 dst {node} via {} self permanent", domain.wireguard());
        assert!(shown.fdb.contains(&entry), "{shown:?}");
    }
}

async fn applying_twice_is_as_good_as_once<L: Lab>(lab: &L) {
    let (domain, mut kernel, _) = start(lab).await;
    let changes = [key(1), key(2)].map(install).concat();
    apply(&mut kernel, &domain, &changes).await;
    let (once, tables) = (kernel.read(&Interface::from(&domain)).await.unwrap(), lab.tables(&domain));
    apply(&mut kernel, &domain, &changes).await;
    apply(&mut kernel, &domain, &[changes.clone(), changes].concat()).await;
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap(), once);
    assert_eq!(lab.tables(&domain), tables);
}

async fn removing_leaves_nothing_and_may_be_repeated<L: Lab>(lab: &L) {
    let (domain, mut kernel, empty) = start(lab).await;
    let tables = lab.tables(&domain);
    apply(&mut kernel, &domain, &uninstall(key(1))).await;
    apply(&mut kernel, &domain, &[key(1), key(2)].map(install).concat()).await;
    apply(&mut kernel, &domain, &uninstall(key(1))).await;
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!(device.peers.keys().copied().collect::<Vec<_>>(), [key(2)]);
    assert_eq!((device.routes.len(), device.fdb.len()), (1, 1));
    apply(&mut kernel, &domain, &[key(1), key(2), key(2), key(1)].map(uninstall).concat()).await;
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap(), empty);
    assert_eq!(lab.tables(&domain), tables);
}

async fn what_others_made_stays_as_it_is<L: Lab>(lab: &L) {
    let (domain, mut kernel, _) = start(lab).await;
    lab.add_foreign(&domain);
    let (before, tables) = (kernel.read(&Interface::from(&domain)).await.unwrap(), lab.tables(&domain));
    assert_eq!(before.peers.keys().copied().collect::<Vec<_>>(), [key(u32::MAX)]);
    assert_eq!(before.routes, lab.foreign_routes());
    assert_eq!(before.fdb, BTreeSet::from(["fe80::f".parse().unwrap()]));
    let keys: Vec<_> = (1..=500).map(key).collect();
    let installs: Vec<_> = keys.iter().copied().flat_map(install).collect();
    apply(&mut kernel, &domain, &installs).await;
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap().peers.len(), before.peers.len() + 500);
    assert_ne!(lab.tables(&domain), tables);
    let uninstalls: Vec<_> = keys.iter().copied().flat_map(uninstall).collect();
    apply(&mut kernel, &domain, &uninstalls).await;
    assert_eq!(lab.tables(&domain), tables);
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap(), before);
}

async fn a_missing_or_downed_interface_is_named_and_nothing_is_applied<L: Lab>(lab: &L) {
    async fn expect(kernel: &mut impl Kernel, domain: &Domain, interface: String, state: &'static str) {
        let error = KernelError::Interface { interface, state };
        assert_eq!(kernel.read(&Interface::from(domain)).await, Err(error.clone()));
        assert_eq!(results(kernel, domain, &install(key(1))).await, vec![Err(error); 3]);
    }
    let (domain, mut kernel, _) = start(lab).await;
    let (wg, vx) = (domain.wireguard(), domain.vxlan());

    lab.set_up(&domain, false);
    expect(&mut kernel, &domain, wg.clone(), "down").await;
    lab.set_up(&domain, true);
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert!(device.peers.is_empty() && device.routes.is_empty() && device.fdb.is_empty(), "{device:?}");

    lab.remove_vxlan(&domain);
    expect(&mut kernel, &domain, vx.clone(), "missing").await;
    lab.remove(&domain);
    expect(&mut kernel, &domain, wg.clone(), "missing").await;
    lab.assert_absent(&domain);
}

/// Waits until the effects of creating interfaces, such as the check for duplicate addresses, are over.
async fn settle(kernel: &mut impl Kernel) {
    while timeout(A_WHILE * 4, kernel.changed()).await.is_ok() {}
}

async fn an_interface_made_anew_has_other_indexes_and_is_noticed<L: Lab>(lab: &L) {
    let (domain, mut kernel, before) = start(lab).await;
    apply(&mut kernel, &domain, &install(key(1))).await;
    settle(&mut kernel).await;

    lab.make(&domain);
    timeout(SOON, kernel.changed()).await.expect("an event");
    let after = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_ne!(after.indexes.wireguard, before.indexes.wireguard);
    assert_ne!(after.indexes.vxlan, before.indexes.vxlan);
    assert!(after.peers.is_empty() && after.routes.is_empty() && after.fdb.is_empty(), "{after:?}");

    settle(&mut kernel).await;
    lab.remove(&domain);
    timeout(SOON, kernel.changed()).await.expect("an event");
}

async fn own_changes_are_no_event<L: Lab>(lab: &L) {
    let (domain, mut kernel, _) = start(lab).await;
    // On a busy machine the interface's own addresses may settle late (RFC 4862 section 5.4); own changes never do.
    for _ in 0..5 {
        settle(&mut kernel).await;
        apply(&mut kernel, &domain, &install(key(1))).await;
        kernel.read(&Interface::from(&domain)).await.unwrap();
        apply(&mut kernel, &domain, &uninstall(key(1))).await;
        if timeout(A_WHILE, kernel.changed()).await.is_err() {
            return;
        }
    }
    panic!("each change is an event");
}

async fn the_own_key_is_no_peer<L: Lab>(lab: &L) {
    let (domain, mut kernel, device) = start(lab).await;
    let own = device.public_key.expect("a key");
    apply(&mut kernel, &domain, &[Change::SetPeer(PeerConfig::at(own, own.link_local())), install(key(1))[0].clone()])
        .await;
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap().peers.into_keys().collect::<Vec<_>>(), [key(1)]);
}

async fn an_address_moves_to_the_peer_that_has_it_last<L: Lab>(lab: &L) {
    let (domain, mut kernel, _) = start(lab).await;
    let node = key(1).link_local();
    let set = |n| Change::SetPeer(PeerConfig::at(key(n), node));
    apply(&mut kernel, &domain, &[set(1), set(2), set(3), set(2)]).await;
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    let owned = |n| device.peers[&key(n)].allowed_ips.to_vec();
    assert_eq!([owned(1), owned(2), owned(3)], [vec![], vec![host(node)], vec![]]);
    assert!(lab.shown(&domain).peers.contains(&format!("{}\t(none)", key(1))));

    apply(&mut kernel, &domain, &[Change::RemovePeer(key(2)), set(1)]).await;
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!(device.peers[&key(1)].allowed_ips[..], [host(node)]);
}

async fn a_peer_may_have_many_networks_a_keepalive_and_a_preshared_key<L: Lab>(lab: &L) {
    let (domain, mut kernel, empty) = start(lab).await;
    let networks = ["10.9.1.0/24", "10.9.2.7/32", "fd00:1::/64", "fd00:2::7/128"].map(|text| text.parse().unwrap());
    let (keepalive, preshared) = (NonZeroU16::new(25), PresharedKey::new([5; 32]));
    let config = PeerConfig { keepalive, preshared: preshared.clone(), ..PeerConfig::new(key(1), networks) };
    let routes = networks.map(Change::SetRoute);
    let changes = [[Change::SetPeer(config.clone())].as_slice(), &routes].concat();
    apply(&mut kernel, &domain, &changes).await;
    apply(&mut kernel, &domain, &changes).await;
    let read = |device: &Device| {
        let Peer { allowed_ips, keepalive, preshared, .. } = device.peers[&key(1)].clone();
        (allowed_ips.into_iter().collect::<BTreeSet<_>>(), keepalive, preshared)
    };
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!(read(&device), (networks.into(), keepalive, preshared.clone()));
    assert_eq!((device.routes, device.fdb.len()), (networks.into(), 0));

    // Objects that are not named by the changes stay, and so do existing ones.
    apply(&mut kernel, &domain, &install(key(1))).await;
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    let more = networks.into_iter().chain([host(key(1).link_local())]).collect();
    assert_eq!(read(&device), (more, keepalive, preshared));

    apply(&mut kernel, &domain, &uninstall(key(1))).await;
    apply(&mut kernel, &domain, &networks.map(Change::RemoveRoute)).await;
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap(), empty);
}

async fn one_key_may_be_in_two_domains<L: Lab>(lab: &L) {
    let (one, mut kernel, _) = start(lab).await;
    let two = lab.domain("b");
    lab.make(&two);
    for domain in [&one, &two, &one] {
        apply(&mut kernel, domain, &install(key(1))).await;
    }
    for domain in [&one, &two] {
        let device = kernel.read(&Interface::from(domain)).await.unwrap();
        assert_eq!((device.peers.len(), device.routes.len(), device.fdb.len()), (1, 1, 1), "{domain}");
    }
    let tables = lab.tables(&one);
    apply(&mut kernel, &two, &uninstall(key(1))).await;
    assert_eq!(lab.tables(&one), tables);
    assert!(kernel.read(&Interface::from(&two)).await.unwrap().routes.is_empty());
}

async fn twenty_thousand_keys_go_in_at_once<L: Lab>(lab: &L) {
    let (domain, mut kernel, empty) = start(lab).await;
    let keys: Vec<_> = (0..20_000).map(key).collect();
    let installs: Vec<_> = keys.iter().copied().flat_map(install).collect();
    apply(&mut kernel, &domain, &installs).await;
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    let nodes: BTreeSet<_> = keys.iter().map(PublicKey::link_local).collect();
    assert_eq!((device.peers.len(), nodes.len()), (20_000, 20_000));
    assert!(device.routes == hosts(&nodes) && device.fdb == nodes);
    assert!(keys.iter().all(|key| device.peers[key].allowed_ips[..] == [host(key.link_local())]));
    let shown = lab.shown(&domain);
    assert_eq!((shown.peers.len(), shown.routes.len(), shown.fdb.len()), (20_000, 20_000, 20_000));

    let uninstalls: Vec<_> = keys.iter().copied().flat_map(uninstall).collect();
    apply(&mut kernel, &domain, &uninstalls).await;
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap(), empty);
}

async fn a_key_that_comes_again_keeps_handshake_endpoint_counters_and_other_addresses(lab: &Linux) {
    let (domain, mut kernel, _) = start(lab).await;
    let node = lab.make_node(&domain);
    apply(&mut kernel, &domain, &install(node)).await;
    linux::wg(&domain, &format!("peer {node} allowed-ips 10.9.0.0/24,{}/128", node.link_local()));
    lab.shake_hands(&domain, node).await;

    let before = linux::shown_peer(&domain, node);
    let read = kernel.read(&Interface::from(&domain)).await.unwrap();
    let handshake = read.peers[&node].last_handshake.expect("a handshake");
    assert!(handshake.elapsed().unwrap() < SOON * 2);
    for _ in 0..3 {
        apply(&mut kernel, &domain, &install(node)).await;
    }
    let after = linux::shown_peer(&domain, node);
    assert_eq!(after.rest, before.rest);
    // WireGuard itself may send packets meanwhile.
    assert!(after.counters.iter().zip(&before.counters).all(|(after, before)| after >= before), "{after:?} {before:?}");
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap(), read);
    assert_eq!(read.peers[&node].allowed_ips.len(), 2);

    // The comparison would also hold if WireGuard kept all this for a peer that is removed and added again.
    apply(&mut kernel, &domain, &[Change::RemovePeer(node), install(node)[0].clone()]).await;
    assert_ne!(linux::shown_peer(&domain, node).rest, before.rest);
}

async fn a_peer_with_many_addresses_is_read_as_one(lab: &Linux) {
    let (domain, mut kernel, _) = start(lab).await;
    let keys: Vec<_> = (0..500).map(key).collect();
    // One peer has more than a message of a dump can hold.
    let others = |n: usize| if n == 250 { 2000 } else { 1 + n % 7 };
    let peer = |(n, key): (usize, &PublicKey)| {
        let ips: Vec<_> = (0..others(n)).map(|ip| format!("fd00::{n}:{ip}/128")).collect();
        format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {}\n", ips.join(","))
    };
    linux::add_config(&domain, &keys.iter().enumerate().map(peer).collect::<String>());
    let installs: Vec<_> = keys.iter().copied().flat_map(install).collect();
    apply(&mut kernel, &domain, &installs).await;
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!(device.peers.len(), keys.len());
    for (n, key) in keys.iter().enumerate() {
        assert_eq!(device.peers[key].allowed_ips.len(), 1 + others(n), "{n}");
    }
}

async fn a_tun_without_wireguard_is_not_taken_for_one(lab: &Linux) {
    let (domain, mut kernel, _) = start(lab).await;
    lab.remove(&domain);
    let interface = domain.wireguard();
    linux::run(&format!("ip tuntap add {interface} mode tun"));
    linux::run(&format!("ip link set {interface} up"));
    linux::run(&format!(
        "ip link add {} up type vxlan id 1 local fe80::1 dev {interface} dstport 8472",
        domain.vxlan()
    ));
    let error = KernelError::Interface { interface, state: "not a WireGuard interface" };
    assert_eq!(kernel.read(&Interface::from(&domain)).await, Err(error.clone()));
    assert_eq!(results(&mut kernel, &domain, &install(key(1))).await, vec![Err(error); 3]);
}

async fn an_error_is_reported_for_its_own_change(lab: &Linux) {
    let (domain, mut kernel, _) = start(lab).await;
    // Room for one MAC address, which is taken: Linux refuses every flood entry.
    lab.remove_vxlan(&domain);
    linux::make_vxlan(&domain, "maxaddress 1");
    linux::run(&format!("bridge fdb append 02:00:00:00:00:01 dst fe80::f dev {}", domain.vxlan()));
    let keys: Vec<_> = (0..300).map(key).collect();
    let installs: Vec<_> = keys.iter().copied().flat_map(install).collect();
    let full = KernelError::Refused { action: "add flood entry", source: Errno::ENOSPC };
    let expected: Vec<_> = keys.iter().flat_map(|_| [Ok(()), Ok(()), Err(full.clone())]).collect();
    assert_eq!(results(&mut kernel, &domain, &installs).await, expected);
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!((device.peers.len(), device.routes.len(), device.fdb.len()), (300, 300, 0));
}

/// wireguard-go has a limit that can be reached. Linux itself has no limit of peers.
async fn one_peer_too_many_holds_up_no_other(lab: &Linux) {
    const LIMIT: u32 = 1 << 16;
    let (domain, mut kernel, _) = start(lab).await;
    let set = |n| Change::SetPeer(PeerConfig::at(key(n), key(n).link_local()));
    apply(&mut kernel, &domain, &(0..LIMIT - 1).map(set).collect::<Vec<_>>()).await;
    let refused = KernelError::Refused { action: "set peer", source: Errno::EINVAL };
    let moved = Change::SetPeer(PeerConfig::at(key(1), "fe80::1".parse().unwrap()));
    let changes = [set(LIMIT - 1), set(LIMIT), moved, set(LIMIT + 1), Change::RemovePeer(key(0)), set(LIMIT + 2)];
    let results = results(&mut kernel, &domain, &changes).await;
    assert_eq!(results, [Ok(()), Err(refused.clone()), Ok(()), Err(refused), Ok(()), Ok(())]);
    let device = kernel.read(&Interface::from(&domain)).await.unwrap();
    assert_eq!(device.peers.len(), LIMIT as usize);
    assert_eq!(device.peers[&key(1)].allowed_ips.len(), 2);
    assert!(device.peers.contains_key(&key(LIMIT + 2)) && !device.peers.contains_key(&key(LIMIT)));
}

async fn a_process_that_hangs_holds_up_no_other_domain(lab: &Linux) {
    let (hanging, well) = (lab.domain("k"), lab.domain("l"));
    lab.make(&hanging);
    lab.make(&well);
    let mut kernel = lab.kernel().with_timeout(A_WHILE);
    lab.freeze(&hanging, true);
    let silent = KernelError::Interface { interface: hanging.wireguard(), state: "not answering" };
    assert_eq!(kernel.read(&Interface::from(&hanging)).await, Err(silent.clone()));
    let change = Change::SetPeer(PeerConfig::at(key(1), key(1).link_local()));
    assert_eq!(
        timeout(A_WHILE / 2, results(&mut kernel, &hanging, std::slice::from_ref(&change))).await.unwrap(),
        [Err(silent)]
    );
    apply(&mut kernel, &well, &[change]).await;
    lab.freeze(&hanging, false);
    timeout(SOON, async {
        while kernel.read(&Interface::from(&hanging)).await.is_err() {
            tokio::time::sleep(A_WHILE / 10).await;
        }
    })
    .await
    .unwrap();
}

async fn a_dump_among_changes_is_whole_or_none(lab: &Linux) {
    let (domain, mut kernel, _) = start(lab).await;
    let set = |key: PublicKey| Change::SetPeer(PeerConfig::at(key, key.link_local()));
    apply(&mut kernel, &domain, &(0..1000).map(|n| set(key(n))).collect::<Vec<_>>()).await;

    let done = Arc::new(AtomicBool::new(false));
    let (mut other, others_domain, others_done) = (lab.kernel(), domain.clone(), Arc::clone(&done));
    // Every second peer is removed and added again, among them those at which a dump is continued.
    let task = tokio::spawn(async move {
        let keys = || (0..1000).step_by(2).map(key);
        while !others_done.load(Ordering::Relaxed) {
            apply(&mut other, &others_domain, &keys().map(Change::RemovePeer).collect::<Vec<_>>()).await;
            apply(&mut other, &others_domain, &keys().map(set).collect::<Vec<_>>()).await;
        }
    });
    for _ in 0..20 {
        match kernel.read(&Interface::from(&domain)).await {
            Ok(device) => assert!((1..1000).step_by(2).all(|n| device.peers.contains_key(&key(n)))),
            Err(error) => assert_eq!(error, KernelError::Interrupted { interface: domain.wireguard(), times: 10 }),
        }
    }
    done.store(true, Ordering::Relaxed);
    task.await.unwrap();
    assert_eq!(kernel.read(&Interface::from(&domain)).await.unwrap().peers.len(), 1000);
}
