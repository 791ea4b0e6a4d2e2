mod drain;

use std::collections::BTreeSet;
use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use wgkex_common::access_lists::{Admission, AllowList, Entry, List};
use wgkex_common::runtime::metrics::MetricsRegistry;
use wgkex_common::storage::key_store::{KeyRecord, Keys, WriteBuffer};
use wgkex_common::wire::message::{Age, Applied, Revoked};
use wgkex_common::wire::revoke_outcome::RevokeOutcome;
use wgkex_common::{KeyId, PublicKey, RejectReason, Reserved};
use wgkex_kernel::memory::{Delays, MemoryKernel};
use wgkex_kernel::{Change, Device, Errno, Interface, Kernel as _, KernelError, PeerConfig, host};

use super::task::TaskEvent;
use super::{
    DomainState, DomainStates, KeySnapshot, Metrics, Reconciler, ReconcilerHandle, ReconcilerParts, Reports, clocks,
};
use crate::peers::{Clocks, Policy};
use crate::plan;
use crate::profiles::Profile as _;
use crate::profiles::mesh::Mesh;
use crate::testing::{Leases, collision, domain, install, key, leased_networks};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

#[tokio::test(start_paused = true)]
async fn a_key_is_confirmed_when_all_three_objects_stand() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1]);
    assert_eq!(gateway.confirmed().await.installed, [key(1)]);
    assert!(gateway.stands(key(1)));
    assert_eq!(gateway.applies(), [plan::changes(&install([key(1)]))]);
    assert_eq!(gateway.metrics.keys_installed.with_label_values(&["ffmuc_welt"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn while_the_kernel_is_busy_the_next_batch_collects_keys_in_order_without_repeats() {
    let mut gateway = Gateway::start();
    gateway.up().await;
    gateway.memory.delay(Delays { apply: Duration::from_secs(1), ..Delays::default() });
    gateway.enqueue([0]);
    sleep(Duration::from_millis(500)).await;
    for n in (1..=100).chain([7, 7]) {
        gateway.enqueue([n]);
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(gateway.confirmed().await.installed, [key(0)]);
    let wanted: Vec<_> = (1..=6).chain(8..=100).chain([7]).map(key).collect();
    assert_eq!(gateway.confirmed().await.installed, wanted);
    let batches: Vec<_> = gateway.applies().iter().map(Vec::len).collect();
    assert_eq!(batches, [3, 300]);
}

#[tokio::test(start_paused = true)]
async fn keys_of_a_storm_are_batched_and_a_single_later_key_is_not_delayed() {
    let gateway = Gateway::start();
    gateway.up().await;
    let (call, gap) = (Duration::from_millis(10), Duration::from_millis(6));
    gateway.memory.delay(Delays { apply: call, ..Delays::default() });
    for n in 0..100 {
        gateway.enqueue([n]);
        sleep(gap).await;
    }
    sleep(MINUTE / 2).await;
    assert!(gateway.all_stand(0..100));
    // Applied one by one 100 keys would take a second; as batches they take 600 ms.
    let batches = gateway.applies().len();
    assert!((25..=35).contains(&batches), "{batches}");

    for n in 100..103 {
        sleep(call).await;
        let begun = Instant::now();
        gateway.enqueue([n]);
        while !gateway.stands(key(n)) {
            sleep(Duration::from_millis(1)).await;
        }
        assert!(begun.elapsed() <= call + Duration::from_millis(1), "{:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn one_bad_key_fails_alone_and_is_confirmed_when_it_can_be_done() {
    let mut gateway = Gateway::start();
    gateway.settle().await;
    gateway.memory.refuse(Change::SetRoute(host(key(2).link_local())));
    gateway.enqueue([1, 2, 3]);
    let applied = gateway.confirmed().await;
    assert_eq!(applied.installed, [key(1), key(3)]);
    assert_eq!(applied.failed, [(key(2), RejectReason::Kernel)].into());

    gateway.memory.refuse_nothing();
    let again = timeout(Duration::from_secs(5), gateway.confirmed()).await.unwrap();
    assert_eq!(again.installed, [key(2)]);
    assert!(gateway.all_stand(1..=3));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_always_refused_is_given_up() {
    let mut gateway = Gateway::start();
    gateway.up().await;
    gateway.memory.refuse(Change::SetPeer(PeerConfig::at(key(2), key(2).link_local())));
    gateway.enqueue([2]);
    assert_eq!(gateway.confirmed().await.failed.len(), 1);
    sleep(HOUR).await;
    gateway.applies();
    sleep(HOUR).await;
    assert_eq!(gateway.applies(), [] as [Vec<Change>; 0]);
}

#[tokio::test(start_paused = true)]
async fn the_own_key_is_refused_by_name_and_never_reaches_the_kernel() {
    let mut gateway = Gateway::start();
    let own = gateway.device().public_key.unwrap();
    gateway.handle.enqueue(id(own));
    assert_eq!(gateway.confirmed().await.failed, [(own, RejectReason::OwnKey)].into());
    assert_eq!(gateway.applies(), [] as [Vec<Change>; 0]);
    assert_eq!(gateway.metrics.keys_failed.with_label_values(&["ffmuc_welt", "own key"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_key_is_applied_again_after_any_outside_change() {
    let mut gateway = Gateway::start();
    for _ in 0..2 {
        gateway.enqueue([1]);
        assert_eq!(gateway.confirmed().await.installed, [key(1)]);
        assert!(gateway.stands(key(1)));
        gateway.memory.alter(&domain(), |device| device.routes.clear());
    }
    assert_eq!(gateway.metrics.keys_refreshed.with_label_values(&["ffmuc_welt"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn keys_that_came_before_their_interface_are_installed_when_it_comes() {
    let mut gateway = Gateway::on(MemoryKernel::default(), Policy::default());
    gateway.enqueue([1, 2]);
    let wanted = [(key(1), RejectReason::Interface), (key(2), RejectReason::Interface)].into();
    assert_eq!(gateway.confirmed().await.failed, wanted);
    assert_eq!(gateway.state(), Some(DomainState::Down { reason: "interface wg-welt is missing".into() }));

    gateway.memory.add(&domain());
    assert_eq!(gateway.confirmed().await.installed, [key(1), key(2)]);
    assert!(gateway.stands(key(1)) && gateway.stands(key(2)));
    let device = gateway.device();
    let (port, public_key) = (device.listen_port, device.public_key.unwrap());
    let link_address = device.link_address.unwrap();
    assert_eq!(gateway.state(), Some(DomainState::Up { port, public_key, link_address, connected: 0 }));
}

#[tokio::test(start_paused = true)]
async fn an_interface_made_anew_is_full_again() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..3_000);
    gateway.settle().await;
    gateway.memory.remove(&domain());
    gateway.settle().await;
    assert!(matches!(gateway.state(), Some(DomainState::Down { .. })));
    gateway.memory.add(&domain());
    gateway.settle().await;
    assert!(gateway.all_stand(0..3_000));

    gateway.memory.add(&domain());
    gateway.settle().await;
    assert!(gateway.all_stand(0..3_000));
}

#[tokio::test(start_paused = true)]
async fn only_objects_lost_with_the_vxlan_are_restored() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1, 2]);
    gateway.confirmed().await;
    gateway.memory.remove_vxlan(&domain());
    gateway.settle().await;
    assert!(matches!(gateway.state(), Some(DomainState::Down { .. })));
    gateway.applies();
    gateway.enqueue([2]);
    assert_eq!(gateway.confirmed().await.failed, [(key(2), RejectReason::Interface)].into());
    assert_eq!(gateway.applies(), [] as [Vec<Change>; 0]);
    gateway.memory.add_vxlan(&domain());
    gateway.settle().await;
    let mut changes = plan::changes(&install([key(2)]));
    changes.push(Change::AddFdb(key(1).link_local()));
    assert_eq!(gateway.applies(), [changes]);
    assert_eq!(gateway.metrics.keys_restored.with_label_values(&["ffmuc_welt"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn objects_lost_with_a_link_are_restored_when_it_is_up_again() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1]);
    gateway.confirmed().await;
    gateway.memory.set_down(&domain());
    gateway.settle().await;
    assert_eq!(gateway.state(), Some(DomainState::Down { reason: "interface wg-welt is down".into() }));
    gateway.memory.alter(&domain(), |device| device.peers.clear());
    gateway.memory.set_up(&domain());
    gateway.settle().await;
    assert!(gateway.stands(key(1)));
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_goes_in_the_middle_of_a_storm_loses_no_key() {
    let mut gateway = Gateway::start();
    gateway.up().await;
    gateway.memory.delay(Delays {
        read: Duration::from_millis(50),
        apply: Duration::from_millis(5),
        ..Delays::default()
    });
    for n in 0..2_000 {
        gateway.enqueue([n]);
        match n {
            500 => gateway.memory.remove(&domain()),
            700 | 1_500 => gateway.memory.add(&domain()),
            _ => {}
        }
        sleep(Duration::from_millis(1)).await;
    }
    gateway.settle().await;
    assert!(gateway.all_stand(0..2_000));
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_routers_cannot_use_is_down_and_takes_keys_all_the_same() {
    for (lack, reason) in [
        ((|device| device.public_key = None) as fn(&mut Device), "interface wg-welt has no private key"),
        (|device| device.link_address = None, "interface wg-welt has no address"),
        (|device| device.listen_port = 0, "interface wg-welt has no listen port"),
    ] {
        let mut gateway = Gateway::start();
        gateway.memory.alter(&domain(), lack);
        gateway.handle.refresh();
        gateway.settle().await;
        assert_eq!(gateway.state(), Some(DomainState::Down { reason: reason.into() }));
        gateway.enqueue([1]);
        assert_eq!(gateway.confirmed().await.installed, [key(1)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_came_just_before_a_sweep_survives_it_and_not_the_next() {
    let mut gateway = Gateway::start();
    sleep(55 * MINUTE).await;
    gateway.enqueue([1]);
    sleep(10 * MINUTE).await;
    assert!(gateway.stands(key(1)));
    gateway.settle().await;
    sleep(HOUR).await;
    assert!(!gateway.device().peers.contains_key(&key(1)));
    assert_eq!(gateway.confirmed().await.failed, [(key(1), RejectReason::Removed)].into());
    assert_eq!(gateway.device().routes.len() + gateway.device().fdb.len(), 0);
    assert_eq!(gateway.metrics.peers.sweeps.with_label_values(&["ffmuc_welt"]).get(), 2);
    assert_eq!(gateway.metrics.peers.stale.with_label_values(&["ffmuc_welt"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_large_sweep_goes_in_parts_and_ends() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..2_000);
    gateway.settle().await;
    gateway.applies();
    sleep(HOUR + MINUTE).await;
    assert_eq!(gateway.device().peers.len(), 0);
    assert!(gateway.applies().iter().all(|changes| changes.len() <= 3 * 512));
}

#[tokio::test(start_paused = true)]
async fn removals_that_fail_are_left_to_the_next_sweep() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..600);
    gateway.settle().await;
    (0..600).for_each(|n| gateway.memory.refuse(Change::RemovePeer(key(n))));
    sleep(HOUR).await;
    let reads = gateway.memory.reads();
    sleep(10 * MINUTE).await;
    assert!(gateway.memory.reads() - reads < 20, "{}", gateway.memory.reads() - reads);
    gateway.memory.refuse_nothing();
    sleep(HOUR).await;
    assert_eq!(gateway.device().peers.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_first_of_two_keys_with_one_address_keeps_it_until_it_is_gone() {
    let (first, second) = collision();
    let mut gateway = Gateway::start();
    gateway.handle.enqueue(id(second));
    assert_eq!(gateway.confirmed().await.installed, [second]);
    sleep(9 * MINUTE).await;
    gateway.handle.enqueue(id(first));
    assert_eq!(gateway.confirmed().await.failed, [(first, RejectReason::AddressTaken)].into());
    assert!(gateway.stands(second));
    sleep(2 * MINUTE).await;
    gateway.handle.enqueue(id(first));
    assert_eq!(gateway.confirmed().await.installed, [first]);
    sleep(2 * MINUTE).await;
    assert!(gateway.stands(first) && !gateway.device().peers.contains_key(&second));
    assert_eq!(gateway.metrics.peers.evicted.with_label_values(&["ffmuc_welt"]).get(), 1);
}

#[tokio::test(start_paused = true)]
async fn of_two_keys_with_one_address_in_one_batch_only_the_smaller_is_confirmed() {
    let (first, second) = collision();
    let mut gateway = Gateway::start();
    gateway.handle.enqueue(id(second));
    gateway.handle.enqueue(id(first));
    let said = gateway.confirmed().await;
    assert_eq!((said.installed, said.failed), (vec![first], [(second, RejectReason::AddressTaken)].into()));
    sleep(10 * MINUTE).await;
    assert!(gateway.stands(first));
}

#[tokio::test(start_paused = true)]
async fn a_flood_never_makes_more_peers_without_a_handshake_than_are_allowed_and_holds_up_no_known_key() {
    let policy = Policy { unestablished: 1_000, ..Policy::default() };
    let mut gateway = Gateway::on(MemoryKernel::with(&[domain()]), policy);
    let mut said = BTreeSet::new();
    gateway.enqueue(0..100);
    sleep(Duration::from_secs(20)).await;
    (0..100).for_each(|n| gateway.memory.handshake(&domain(), key(n), SystemTime::now()));
    sleep(2 * MINUTE).await;
    gateway.memory.delay(Delays { change: Duration::from_micros(100), ..Delays::default() });
    for part in 0..10 {
        gateway.enqueue(1_000 + part * 1_000..2_000 + part * 1_000);
        let asked = Instant::now();
        gateway.enqueue([part]);
        while !record(&mut said, gateway.confirmed().await).contains(&key(part)) {}
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        assert!(gateway.device().peers.len() <= 1_100, "{}", gateway.device().peers.len());
    }
    assert!(gateway.all_stand(0..100));
    while let Ok(Some(applied)) = timeout(MINUTE, gateway.said.applied.recv()).await {
        record(&mut said, applied);
    }
    assert!(gateway.all_stand(0..100) && gateway.device().peers.len() <= 1_100);
    assert!(said.iter().eq(gateway.device().peers.keys()), "whoever was told that it stands was told when it went");
}

/// Failed when room was made for one key at a time, with a read for each.
#[tokio::test(start_paused = true)]
async fn at_the_bound_room_is_made_in_portions_and_not_by_a_read_for_each_key() {
    let policy = Policy { unestablished: 1_600, ..Policy::default() };
    let mut gateway = Gateway::on(MemoryKernel::with(&[domain()]), policy);
    gateway.enqueue(0..1_600);
    gateway.settle().await;
    assert!(gateway.all_stand(0..1_600), "nobody goes before somebody needs the place");
    (0..10).for_each(|n| gateway.memory.handshake(&domain(), key(n), SystemTime::now()));
    let (reads, mut said) = (gateway.memory.reads(), BTreeSet::new());
    let mut waited = 0;
    for n in 10_000..11_000 {
        let asked = Instant::now();
        gateway.enqueue([n]);
        while !record(&mut said, gateway.confirmed().await).contains(&key(n)) {}
        waited += usize::from(!asked.elapsed().is_zero());
        assert!(gateway.device().peers.len() <= 1_610, "{}", gateway.device().peers.len());
        sleep(Duration::from_millis(1)).await;
    }
    let reads = gateway.memory.reads() - reads;
    assert!(reads <= 15 && waited <= 15, "{reads} reads, {waited} keys waited for one");
    assert!(gateway.all_stand((0..10).chain(10_000..11_000)), "who shook hands meanwhile stays, and the newest");
}

/// Failed when the result of a read was used against peers without a time limit.
#[tokio::test(start_paused = true)]
async fn a_peer_that_shakes_hands_during_a_slow_eviction_stays() {
    let policy = Policy { unestablished: 8_000, ..Policy::default() };
    let mut gateway = Gateway::on(MemoryKernel::with(&[domain()]), policy);
    gateway.enqueue(0..8_000);
    gateway.settle().await;
    gateway.memory.delay(Delays { change: Duration::from_millis(2), ..Delays::default() });
    gateway.enqueue([10_000]);
    while gateway.device().peers.contains_key(&key(0)) {
        sleep(Duration::from_millis(10)).await;
    }
    let stay: Vec<_> = gateway.device().peers.into_keys().filter(|key| *key < self::key(500)).collect();
    assert!(stay.len() > 300, "a portion takes many calls");
    sleep(Duration::from_millis(1_500)).await;
    let stay: Vec<_> = stay.into_iter().filter(|key| gateway.stands(*key)).collect();
    for key in &stay {
        gateway.memory.handshake(&domain(), *key, SystemTime::now());
    }
    assert!(!stay.is_empty());
    sleep(MINUTE).await;
    assert!(stay.iter().all(|key| gateway.stands(*key)));
    assert!(gateway.stands(key(10_000)));
}

/// Updates the set of installed keys by a report, and returns those newly installed.
fn record(standing: &mut BTreeSet<PublicKey>, Applied { installed, failed, .. }: Applied) -> BTreeSet<PublicKey> {
    standing.retain(|key| !failed.contains_key(key));
    standing.extend(&installed);
    installed.into_iter().collect()
}

#[tokio::test(start_paused = true)]
async fn after_24_hours_live_and_foreign_peers_are_unchanged_by_clock_steps() {
    let mut gateway = Still::start();
    let foreign: [IpNet; 2] = ["10.1.0.0/16", "fd00::1/128"].map(|network| network.parse().unwrap());
    gateway.keys([1, 2, 3]).await;
    gateway.memory.alter(&domain(), |device| {
        let mut peer = device.peers[&key(1)].clone();
        peer.allowed_ips.extend(foreign);
        device.peers.insert(key(8), peer.clone());
        peer.allowed_ips.clear();
        device.peers.insert(key(9), peer);
        device.routes.insert(host("fe80::9".parse().unwrap()));
    });
    let before = gateway.memory.device(&domain()).unwrap();
    for minute in 0..24 * 60 {
        match minute {
            200 | 900 => gateway.now.wall += HOUR,
            400 => gateway.now.wall -= 2 * HOUR,
            600 => gateway.now.wall += 365 * 24 * HOUR,
            1_200 => gateway.now.wall -= 730 * 24 * HOUR,
            _ => {}
        }
        if minute % 2 == 0 {
            gateway.memory.handshake(&domain(), key(1), gateway.now.wall);
        }
        gateway.minute().await;
    }
    let mut after = gateway.memory.device(&domain()).unwrap();
    for key in [key(8), key(9)] {
        assert_eq!(after.peers[&key], before.peers[&key]);
    }
    assert_eq!(after.peers.keys().copied().collect::<Vec<_>>(), [key(1), key(8), key(9)]);
    assert!(after.routes.remove(&host("fe80::9".parse().unwrap())));
    assert_eq!(after.routes, [host(key(1).link_local())].into());
    assert_eq!(after.fdb, [key(1).link_local()].into());
}

#[tokio::test(start_paused = true)]
async fn foreign_peers_count_as_connected_too() {
    let mut gateway = Still::start();
    gateway.keys([1, 2]).await;
    gateway.memory.alter(&domain(), |device| device.peers.get_mut(&key(1)).unwrap().allowed_ips.clear());
    gateway.memory.handshake(&domain(), key(1), gateway.now.wall);
    gateway.minute().await;
    for (state, count) in [("connected", 1), ("pending", 1), ("idle", 0)] {
        let peers = gateway.metrics.peers.by_state.with_label_values(&["ffmuc_welt", state]);
        assert_eq!(peers.get(), count, "{state}");
    }
}

/// Failed when a peer that vanished from an interface that stays was forgotten.
#[tokio::test(start_paused = true)]
async fn vanished_peers_are_back_within_a_minute_with_route_and_flood_entry() {
    let vanishing: [fn(&mut Device); 5] = [
        |device| drop(device.peers.remove(&key(1))),
        |device| device.peers.retain(|key, _| key.link_local().segments()[7] % 2 == 0),
        |device| device.peers.clear(),
        |device| {
            device.peers.clear();
            device.routes.clear();
            device.fdb.clear();
        },
        |device| {
            device.peers.clear();
            device.public_key = Some(key(5_000));
        },
    ];
    let mut gateway = Gateway::start();
    gateway.enqueue(0..1_000);
    gateway.settle().await;
    for vanish in vanishing {
        gateway.memory.alter(&domain(), vanish);
        assert!(!gateway.all_stand(0..1_000));
        sleep(MINUTE).await;
        assert!(gateway.all_stand(0..1_000));
    }
    assert_eq!(gateway.metrics.keys_installed.with_label_values(&["ffmuc_welt"]).get(), 1_000);
    assert!(gateway.metrics.keys_restored.with_label_values(&["ffmuc_welt"]).get() > 3_000);
    assert_eq!(gateway.metrics.peers.orphans.with_label_values(&["ffmuc_welt"]).get(), 0);
    assert!(gateway.said.applied.try_recv().is_err(), "nobody waits for a word on them");
}

#[tokio::test(start_paused = true)]
async fn peers_that_were_adopted_or_remembered_come_back_as_well() {
    let memory = MemoryKernel::with(&[domain()]);
    memory.clone().apply(&Interface::from(&domain()), plan::changes(&install([key(1), key(3)]))).await;
    let (reconciler, _handle, _said) = remembering(memory.clone(), 2..4);
    tokio::spawn(reconciler.run(pending()));
    sleep(MINUTE).await;
    memory.alter(&domain(), |device| device.peers.clear());
    sleep(MINUTE).await;
    let device = memory.device(&domain()).unwrap();
    assert!((1..=3).all(|n| stands_in(&device, key(n))));
}

#[tokio::test(start_paused = true)]
async fn denied_swept_evicted_and_altered_peers_do_not_come_back() {
    let policy = Policy { unestablished: 20, ..Policy::default() };
    let mut gateway = Gateway::on(MemoryKernel::with(&[domain()]), policy);
    let peers = |gateway: &Gateway| gateway.device().peers.into_keys().collect::<Vec<_>>();
    gateway.enqueue(0..20);
    gateway.settle().await;
    gateway.enqueue([20]);
    sleep(MINUTE).await;
    assert_eq!(peers(&gateway), (1..=20).map(key).collect::<Vec<_>>(), "the oldest made room");
    gateway.handle.set_admission(denying([1]), []);
    gateway.settle().await;
    gateway.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(2)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
    });
    sleep(MINUTE).await;
    gateway.memory.alter(&domain(), |device| device.peers.clear());
    gateway.handle.set_admission(denying([1, 3]), []);
    sleep(MINUTE).await;
    assert_eq!(peers(&gateway), (4..=20).map(key).collect::<Vec<_>>());
    sleep(HOUR).await;
    assert_eq!(peers(&gateway), [], "all are stale");
    sleep(HOUR).await;
    assert_eq!(peers(&gateway), []);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_was_swept_stays_away_although_something_of_it_could_not_be_removed() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1, 2]);
    gateway.settle().await;
    gateway.memory.refuse(Change::RemoveFdb(key(1).link_local()));
    gateway.memory.refuse(Change::RemovePeer(key(2)));
    sleep(HOUR).await;
    assert_eq!(gateway.device().peers.into_keys().collect::<Vec<_>>(), [key(2)]);
    gateway.memory.refuse_nothing();
    sleep(HOUR).await;
    let device = gateway.device();
    assert_eq!((device.peers.len(), device.routes.len(), device.fdb.len()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_interface_emptied_again_and_again_keeps_only_established_peers() {
    let mut gateway = Still::start();
    gateway.keys(0..4).await;
    for n in 0..2 {
        gateway.memory.handshake(&domain(), key(n), gateway.now.wall);
    }
    for minute in 0..5 * 60 {
        gateway.minute().await;
        gateway.memory.handshake(&domain(), key(0), gateway.now.wall);
        if minute == 60 {
            let device = gateway.memory.device(&domain()).unwrap();
            assert!(stands_in(&device, key(0)) && stands_in(&device, key(1)), "it shook hands not two hours ago");
        }
        if minute % 3 > 0 {
            gateway.minute().await;
        }
        gateway.memory.alter(&domain(), |device| device.peers.clear());
    }
    gateway.minute().await;
    let device = gateway.memory.device(&domain()).unwrap();
    assert_eq!(device.peers.keys().collect::<Vec<_>>(), [&key(0)]);
}

#[tokio::test(start_paused = true)]
async fn tables_that_cannot_be_read_leave_the_last_state_and_are_tried_ever_more_rarely() {
    let mut gateway = Gateway::start();
    gateway.up().await;
    let (state, reads) = (gateway.state(), gateway.memory.reads());
    gateway.memory.fail_reads(Some(KernelError::Interrupted { interface: "wg-welt".into(), times: 5 }));
    sleep(20 * MINUTE).await;
    assert!((24..40).contains(&(gateway.memory.reads() - reads)), "{}", gateway.memory.reads() - reads);
    assert_eq!(gateway.state(), state);
    gateway.enqueue([1]);
    assert_eq!(gateway.confirmed().await.installed, [key(1)]);
}

#[tokio::test(start_paused = true)]
async fn no_key_is_confirmed_before_the_first_read_of_the_tables() {
    let memory = MemoryKernel::with(&[domain()]);
    memory.fail_reads(Some(KernelError::Refused { action: "read", source: Errno::EPERM }));
    let mut gateway = Gateway::on(memory, Policy::default());
    gateway.enqueue([1]);
    assert_eq!(gateway.confirmed().await.failed, [(key(1), RejectReason::Kernel)].into());
    assert_eq!(gateway.state(), None);
    gateway.memory.fail_reads(None);
    assert_eq!(gateway.confirmed().await.installed, [key(1)]);
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_link_events_costs_few_reads() {
    let gateway = Gateway::start();
    gateway.up().await;
    let reads = gateway.memory.reads();
    for _ in 0..1_000 {
        gateway.memory.trigger();
        sleep(Duration::from_millis(1)).await;
    }
    let reads = gateway.memory.reads() - reads;
    assert!((5..=12).contains(&reads), "{reads}");
}

#[tokio::test(start_paused = true)]
async fn a_new_key_does_not_wait_for_a_large_backlog() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..20_000);
    gateway.settle().await;
    gateway.memory.delay(Delays { change: Duration::from_millis(1), ..Delays::default() });
    gateway.memory.add(&domain());
    sleep(Duration::from_secs(2)).await;
    while gateway.said.applied.try_recv().is_ok() {}
    gateway.enqueue([50_000]);
    let asked = Instant::now();
    while !gateway.stands(key(50_000)) {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert!(gateway.device().peers.len() < 20_000);
}

#[tokio::test(start_paused = true)]
async fn a_pending_key_keeps_its_address_while_the_interface_is_missing() {
    let (first, second) = collision();
    let mut gateway = Gateway::start();
    gateway.enqueue(0..2_000);
    gateway.settle().await;
    gateway.handle.enqueue(id(first));
    gateway.settle().await;
    gateway.memory.delay(Delays { change: Duration::from_millis(1), ..Delays::default() });
    gateway.memory.add(&domain());
    sleep(Duration::from_secs(1)).await;
    gateway.handle.enqueue(id(second));
    gateway.settle().await;
    assert!(gateway.all_stand(0..2_000) && gateway.stands(first));
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_keys_starves_neither_reads_nor_pending_keys() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..2_000);
    gateway.settle().await;
    gateway.memory.delay(Delays { apply: Duration::from_millis(10), ..Delays::default() });
    gateway.memory.add(&domain());
    let reads = gateway.memory.reads();
    for n in 0..30_000 {
        gateway.enqueue([100_000 + n % 100]);
        sleep(Duration::from_millis(5)).await;
    }
    assert!(gateway.all_stand(0..2_000));
    assert!((3..10).contains(&(gateway.memory.reads() - reads)), "{}", gateway.memory.reads() - reads);
}

#[tokio::test(start_paused = true)]
async fn confirmations_are_of_bounded_size_and_never_block() {
    let mut gateway = Gateway::start();
    gateway.up().await;
    gateway.enqueue(0..4_096);
    for _ in 0..4_096 / 512 {
        assert_eq!(gateway.confirmed().await.installed.len(), 512, "what is new comes in parts");
    }
    gateway.enqueue(0..4_096);
    let sizes = [gateway.confirmed().await, gateway.confirmed().await, gateway.confirmed().await];
    assert_eq!(sizes.map(|applied| applied.installed.len()), [2_000, 2_000, 96]);

    for n in 0..500 {
        gateway.enqueue([n]);
        sleep(Duration::from_millis(1)).await;
    }
    assert!(gateway.stands(key(499)));
    assert_eq!(gateway.metrics.confirmations_dropped.get(), 500 - 256);
}

#[tokio::test(start_paused = true)]
async fn queues_are_bounded_while_the_interface_or_the_task_is_missing() {
    let mut gateway = Gateway::on(MemoryKernel::default(), Policy { pending: 1_000, ..Policy::default() });
    for chunk in 0..100 {
        gateway.enqueue(chunk * 1_000..(chunk + 1) * 1_000);
        sleep(Duration::from_millis(1)).await;
    }
    assert!(gateway.metrics.keys_dropped.with_label_values(&["waiting"]).get() >= 99_000);
    gateway.memory.add(&domain());
    gateway.settle().await;
    assert!((900..=1_000).contains(&gateway.device().peers.len()));
    assert!(gateway.stands(key(99_999)));

    let (_installer, handle, _said) = reconciler(MemoryKernel::default(), &Policy::default());
    for n in 0..=65_536 {
        handle.enqueue(id(key(n)));
    }
    assert_eq!(handle.metrics.keys_dropped.with_label_values(&["queue"]).get(), 1);
    assert_eq!(handle.metrics.queue_length.get(), 65_536);
}

#[tokio::test(start_paused = true)]
async fn missing_live_keys_are_installed_and_the_others_left_as_they_are() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..100);
    gateway.settle().await;
    gateway.applies();
    gateway.handle.learn(domain(), live(50..150)).await;
    sleep(MINUTE).await;
    assert!(gateway.all_stand(0..150));
    let changes: usize = gateway.applies().iter().map(Vec::len).sum();
    assert_eq!(changes, 3 * 50, "what stands is not touched");
    assert_eq!(gateway.metrics.keys_learnt.with_label_values(&["ffmuc_welt"]).get(), 50);
    assert!(gateway.said.applied.try_recv().is_err(), "nobody waits for a word on them");

    // Its own key is not one that it lacks.
    let own = gateway.device().public_key.unwrap();
    gateway.handle.learn(domain(), [(own, Age { age_secs: 0, has_handshake: false })].into()).await;
    gateway.settle().await;
    assert_eq!(gateway.applies(), Vec::<Vec<Change>>::new());
}

#[tokio::test(start_paused = true)]
async fn live_keys_come_no_faster_than_they_go_in_and_delay_no_new_key() {
    let mut gateway = Gateway::start();
    gateway.settle().await;
    gateway.memory.delay(Delays { change: Duration::from_millis(1), ..Delays::default() });
    let handle = gateway.handle.clone();
    let learning = tokio::spawn(async move {
        for page in 0..20 {
            handle.learn(domain(), live(page * 1_000..(page + 1) * 1_000)).await;
        }
    });
    sleep(Duration::from_secs(5)).await;
    assert!(!learning.is_finished());
    gateway.enqueue([50_000]);
    let asked = Instant::now();
    while !gateway.stands(key(50_000)) {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    learning.await.unwrap();
    gateway.settle().await;
    assert!(gateway.all_stand(0..20_000));
}

#[tokio::test(start_paused = true)]
async fn live_keys_wait_for_their_interface() {
    let mut gateway = Gateway::on(MemoryKernel::default(), Policy::default());
    gateway.settle().await;
    gateway.handle.learn(domain(), live(0..10)).await;
    gateway.settle().await;
    gateway.memory.add(&domain());
    gateway.settle().await;
    assert!(gateway.all_stand(0..10));
}

#[tokio::test(start_paused = true)]
async fn a_denied_key_is_removed_whole_and_not_installed_again() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..10);
    gateway.settle().await;
    gateway.handle.set_admission(denying([1, 2, 50]), [1, 50].map(|n| (key(n), 7)));
    let said = gateway.said.revoked.recv().await.unwrap();
    assert_eq!(
        said,
        Revoked { at: 7, keys: [(key(1), RevokeOutcome::Removed), (key(50), RevokeOutcome::Absent)].into() }
    );
    assert_eq!(gateway.metrics.peers.denied.with_label_values(&["ffmuc_welt"]).get(), 2);
    let said = gateway.confirmed().await;
    assert_eq!((said.installed, said.failed), (vec![], [1, 2].map(|n| (key(n), RejectReason::Denied)).into()));
    gateway.enqueue([1, 20]);
    let said = gateway.confirmed().await;
    assert_eq!((said.installed, said.failed), (vec![key(20)], [(key(1), RejectReason::Denied)].into()));
    gateway.handle.learn(domain(), live(0..3)).await;
    sleep(10 * MINUTE).await;
    let device = gateway.device();
    for n in [1, 2] {
        let address = key(n).link_local();
        assert!(
            !device.peers.contains_key(&key(n))
                && !device.routes.contains(&host(address))
                && !device.fdb.contains(&address)
        );
    }
    assert!(gateway.all_stand([0].into_iter().chain(3..10)));

    gateway.handle.set_admission(denying([]), []);
    gateway.enqueue([1]);
    assert_eq!(gateway.confirmed().await.installed, [key(1)]);
}

#[tokio::test(start_paused = true)]
async fn remembered_denied_keys_are_not_installed() {
    let memory = MemoryKernel::with(&[domain()]);
    let (reconciler, handle, _said) = remembering(memory.clone(), 1..4);
    handle.set_admission(denying([1]), []);
    tokio::spawn(reconciler.run(pending()));
    sleep(MINUTE).await;
    assert_eq!(memory.device(&domain()).unwrap().peers.into_keys().collect::<Vec<_>>(), [key(2), key(3)]);
    let applied = memory.take_applies().into_iter().flat_map(|(_, changes)| changes);
    assert_eq!(applied.filter(|change| matches!(change, Change::SetPeer(..))).count(), 2, "not even for a moment");
}

#[tokio::test(start_paused = true)]
async fn a_denied_peer_that_others_altered_stays_and_is_reported() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1, 2]);
    gateway.settle().await;
    gateway.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
    });
    let before = gateway.device();
    gateway.handle.set_admission(denying([1]), [(key(1), 7)]);
    let said = gateway.said.revoked.recv().await.unwrap();
    assert_eq!(said.keys, [(key(1), RevokeOutcome::Failed(RejectReason::Altered))].into());
    sleep(10 * MINUTE).await;
    assert_eq!(gateway.device(), before);
}

#[tokio::test(start_paused = true)]
async fn a_failed_removal_is_tried_again() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1, 2, 3]);
    gateway.settle().await;
    gateway.memory.refuse(Change::RemovePeer(key(1)));
    gateway.handle.set_admission(denying([1]), [(key(1), 7)]);
    assert_eq!(
        gateway.said.revoked.recv().await.unwrap().keys,
        [(key(1), RevokeOutcome::Failed(RejectReason::Kernel))].into()
    );
    gateway.memory.refuse_nothing();
    sleep(2 * MINUTE).await;
    assert!(!gateway.device().peers.contains_key(&key(1)));

    // An interface that was deleted and created again has no slot for it either.
    gateway.memory.remove(&domain());
    sleep(MINUTE).await;
    gateway.handle.set_admission(denying([1, 2]), [(key(2), 8)]);
    assert_eq!(
        gateway.said.revoked.recv().await.unwrap().keys,
        [(key(2), RevokeOutcome::Failed(RejectReason::Interface))].into()
    );
    gateway.memory.add(&domain());
    sleep(2 * MINUTE).await;
    assert_eq!(gateway.device().peers.into_keys().collect::<Vec<_>>(), [key(3)]);
}

#[tokio::test(start_paused = true)]
async fn orphans_of_a_denied_key_are_removed_at_once() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1]);
    gateway.settle().await;
    gateway.memory.alter(&domain(), |device| drop(device.peers.remove(&key(1))));
    gateway.handle.set_admission(denying([1]), [(key(1), 7)]);
    assert_eq!(gateway.said.revoked.recv().await.unwrap().keys, [(key(1), RevokeOutcome::Removed)].into());
    let device = gateway.device();
    assert!(device.routes.is_empty() && device.fdb.is_empty());
}

#[tokio::test(start_paused = true)]
async fn keys_that_wait_for_their_interface_are_denied_too() {
    let mut gateway = Gateway::on(MemoryKernel::default(), Policy::default());
    gateway.enqueue([1, 2]);
    gateway.settle().await;
    gateway.handle.set_admission(denying([1]), [(key(1), 7)]);
    assert_eq!(gateway.said.revoked.recv().await.unwrap().keys.len(), 1);
    gateway.memory.add(&domain());
    gateway.settle().await;
    assert_eq!(gateway.device().peers.into_keys().collect::<Vec<_>>(), [key(2)]);
}

#[tokio::test(start_paused = true)]
async fn keys_that_are_owed_are_denied_too() {
    let mut gateway = Gateway::start();
    gateway.settle().await;
    gateway.memory.delay(Delays { change: Duration::from_millis(1), ..Delays::default() });
    gateway.handle.learn(domain(), live(0..1_500)).await;
    sleep(Duration::from_millis(100)).await;
    assert!(gateway.device().peers.is_empty(), "the first slice is under way");
    // Those of the last slice.
    gateway.handle.set_admission(denying(1_400..1_500), []);
    gateway.settle().await;
    assert!(gateway.all_stand(0..1_400));
    let applied: Vec<_> = gateway.applies().into_iter().flatten().collect();
    assert!((1_400..1_500).all(|n| !applied.contains(&Change::SetPeer(PeerConfig::at(key(n), key(n).link_local())))));
}

#[tokio::test(start_paused = true)]
async fn peers_not_on_the_allow_list_are_removed() {
    let mut gateway = Gateway::start();
    gateway.enqueue([1, 2]);
    gateway.settle().await;
    let allowing = |allow_list| Arc::new(Admission::of(&[Entry::new(List::Allow, key(1))], allow_list, 0));
    gateway.handle.set_admission(allowing(AllowList::Unread), []);
    gateway.enqueue([3]);
    assert_eq!(gateway.confirmed().await.failed, [(key(3), RejectReason::Denied)].into());
    gateway.settle().await;
    assert!(gateway.all_stand([1, 2]), "nobody goes because of a list that could not be read");
    gateway.handle.set_admission(allowing(AllowList::Read), []);
    gateway.settle().await;
    assert_eq!(gateway.device().peers.into_keys().collect::<Vec<_>>(), [key(1)]);
}

#[tokio::test(start_paused = true)]
async fn many_denied_peers_are_removed_in_slices() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..2_000);
    gateway.settle().await;
    gateway.applies();
    gateway.handle.set_admission(Arc::new(Admission::of(&[Entry::new(List::Allow, key(1))], AllowList::Read, 0)), []);
    gateway.settle().await;
    assert_eq!(gateway.device().peers.into_keys().collect::<Vec<_>>(), [key(1)]);
    let sizes: Vec<_> = gateway.applies().iter().map(Vec::len).collect();
    assert!(sizes.iter().all(|size| *size <= 3 * 512), "{sizes:?}");
}

#[tokio::test(start_paused = true)]
async fn trusted_peers_are_never_swept_and_denied_all_the_same() {
    let mut gateway = Still::start();
    gateway.keys([1, 2]).await;
    let trusted = Entry::new(List::Trusted, key(1));
    let trusting = |denied: &[Entry]| Arc::new(Admission::of(denied.iter().chain([&trusted]), AllowList::Off, 0));
    gateway.handle().set_admission(trusting(&[]), []);
    gateway.reconciler.handle(TaskEvent::AdmissionChanged, gateway.now).await;
    for _ in 0..5 * 60 {
        gateway.minute().await;
    }
    assert_eq!(gateway.memory.device(&domain()).unwrap().peers.into_keys().collect::<Vec<_>>(), [key(1)]);
    gateway.handle().set_admission(trusting(&[Entry::new(List::Deny, key(1))]), []);
    gateway.reconciler.handle(TaskEvent::AdmissionChanged, gateway.now).await;
    assert!(gateway.memory.device(&domain()).unwrap().peers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn keys_wait_while_they_are_held_those_that_came_and_those_that_are_remembered() {
    let memory = MemoryKernel::with(&[domain()]);
    let (gate, held) = watch::channel(Some(std::time::Instant::now()));
    let start = ReconcilerParts { remembered: remembered(4..7), gate: held, ..start_with(memory.clone()) };
    let (reconciler, handle, mut said) = Reconciler::new(start);
    tokio::spawn(reconciler.run(pending()));
    handle.enqueue(id(key(1)));
    let learning = tokio::spawn({
        let handle = handle.clone();
        async move {
            for _ in 0..3 {
                handle.learn(domain(), live(2..4)).await;
            }
        }
    });
    sleep(HOUR).await;
    assert!(memory.device(&domain()).unwrap().peers.is_empty() && !learning.is_finished());
    handle.set_admission(denying([1, 2, 4]), []);
    gate.send_replace(None);
    assert_eq!(said.applied.recv().await.unwrap().failed.len(), 1);
    sleep(MINUTE).await;
    assert_eq!(memory.device(&domain()).unwrap().peers.into_keys().collect::<Vec<_>>(), [key(3), key(5), key(6)]);
    let applied = memory.take_applies().into_iter().flat_map(|(_, changes)| changes);
    assert_eq!(applied.filter(|change| matches!(change, Change::SetPeer(..))).count(), 3, "not even for a moment");
}

#[tokio::test(start_paused = true)]
async fn handshakes_are_reported_and_again_after_a_reconnect() {
    let mut gateway = Gateway::start();
    gateway.enqueue(0..3_000);
    gateway.settle().await;
    for n in 0..3_000 {
        gateway.memory.handshake(&domain(), key(n), SystemTime::now());
    }
    for _ in 0..2 {
        gateway.handle.reconnected();
        sleep(MINUTE).await;
        let reports = [gateway.said.handshakes.recv().await.unwrap(), gateway.said.handshakes.recv().await.unwrap()];
        assert_eq!(
            reports
                .map(|seen| (seen.domain, seen.keys.len()))
                .each_ref()
                .map(|(domain, keys)| (domain.as_str(), *keys)),
            [("ffmuc_welt", 2_000), ("ffmuc_welt", 1_000)]
        );
        assert!(gateway.said.handshakes.try_recv().is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn route_and_flood_entry_of_a_vanished_peer_are_removed() {
    let mut gateway = Gateway::start();
    gateway.enqueue([2]);
    gateway.settle().await;
    gateway.memory.alter(&domain(), |device| {
        device.routes.insert(host(key(1).link_local()));
        device.fdb.insert(key(1).link_local());
    });
    sleep(3 * MINUTE).await;
    let device = gateway.device();
    assert_eq!((device.routes, device.fdb), ([host(key(2).link_local())].into(), [key(2).link_local()].into()));
    assert_eq!(gateway.metrics.peers.orphans.with_label_values(&["ffmuc_welt"]).get(), 2);
}

#[tokio::test(start_paused = true)]
async fn stopping_does_not_wait_for_a_slow_kernel() {
    let gateway = Gateway::start();
    gateway.up().await;
    gateway.memory.delay(Delays { read: 10 * MINUTE, ..Delays::default() });
    gateway.handle.refresh();
    sleep(Duration::from_secs(1)).await;
    let asked = Instant::now();
    gateway.stop.send(()).unwrap();
    gateway.task.await.unwrap();
    assert!(asked.elapsed() < Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_when_every_handle_is_dropped() {
    let gateway = Gateway::start();
    gateway.up().await;
    drop(gateway.handle);
    timeout(MINUTE, gateway.task).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_key_with_leases_is_installed_confirmed_and_restored_as_one_of_a_router_is() {
    let profile = Leases::of([1]);
    let interface = profile.interface(&domain());
    let memory = MemoryKernel::with([interface.clone()]);
    let start = ReconcilerParts { profile: Arc::new(profile), ..start_with(memory.clone()) };
    let (reconciler, handle, mut reports) = Reconciler::new(start);
    let task = tokio::spawn(reconciler.run(std::future::pending()));
    for n in [1, 9] {
        handle.enqueue(id(key(n)));
    }
    let applied = timeout(MINUTE, reports.applied.recv()).await.unwrap().unwrap();
    assert_eq!(applied.installed, [key(1)]);
    assert_eq!(applied.failed, [(key(9), RejectReason::Denied)].into(), "it has no lease");
    let whole = memory.device(interface.clone()).unwrap();
    assert_eq!((whole.peers.len(), &whole.routes, whole.fdb.len()), (1, &leased_networks(1).into(), 0));

    memory.alter(interface.clone(), |device| {
        device.peers.clear();
        device.routes.clear();
    });
    sleep(2 * MINUTE).await;
    assert_eq!(memory.device(interface.clone()), Some(whole.clone()), "what vanished is put back");
    sleep(48 * HOUR).await;
    assert_eq!(memory.device(interface), Some(whole), "and no sweep takes it");
    task.abort();
}

/// A reconciler at work on a kernel in memory.
struct Gateway {
    memory: MemoryKernel,
    handle: ReconcilerHandle,
    said: Reports,
    metrics: Metrics,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Gateway {
    fn start() -> Self {
        Self::on(MemoryKernel::with(&[domain()]), Policy::default())
    }

    fn on(memory: MemoryKernel, policy: Policy) -> Self {
        let parts = reconciler(memory.clone(), &policy);
        Self::of(memory, parts)
    }

    fn of(
        memory: MemoryKernel,
        (reconciler, handle, said): (Reconciler<MemoryKernel>, ReconcilerHandle, Reports),
    ) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(reconciler.run(async { drop(stopped.await) }));
        Self { memory, metrics: handle.metrics.clone(), handle, said, stop, task }
    }

    fn enqueue(&self, keys: impl IntoIterator<Item = u32>) {
        for n in keys {
            self.handle.enqueue(id(key(n)));
        }
    }

    async fn confirmed(&mut self) -> Applied {
        timeout(10 * MINUTE, self.said.applied.recv()).await.unwrap().unwrap()
    }

    async fn up(&self) {
        let is_up = |state: &DomainStates| matches!(state.get(&domain()), Some(DomainState::Up { .. }));
        timeout(MINUTE, self.handle.state().wait_for(is_up)).await.unwrap().unwrap();
    }

    /// Long enough for everything that follows from the last event, and shorter than the count interval.
    async fn settle(&mut self) {
        sleep(Duration::from_secs(20)).await;
        while self.said.applied.try_recv().is_ok() {}
    }

    fn state(&self) -> Option<DomainState> {
        self.handle.state().borrow().get(&domain()).cloned()
    }

    fn device(&self) -> Device {
        self.memory.device(&domain()).unwrap()
    }

    fn stands(&self, key: PublicKey) -> bool {
        stands_in(&self.device(), key)
    }

    fn all_stand(&self, keys: impl IntoIterator<Item = u32>) -> bool {
        let device = self.device();
        keys.into_iter().all(|n| stands_in(&device, key(n)))
    }

    fn applies(&self) -> Vec<Vec<Change>> {
        self.memory.take_applies().into_iter().map(|(_, changes)| changes).collect()
    }
}

/// A reconciler to which events and both clocks are passed.
struct Still {
    memory: MemoryKernel,
    reconciler: Reconciler<MemoryKernel>,
    metrics: Metrics,
    now: Clocks,
    others: (ReconcilerHandle, Reports),
}

impl Still {
    fn start() -> Self {
        let memory = MemoryKernel::with(&[domain()]);
        let (reconciler, handle, said) = reconciler(memory.clone(), &Policy::default());
        Self { memory, reconciler, metrics: handle.metrics.clone(), now: clocks(), others: (handle, said) }
    }

    fn handle(&self) -> &ReconcilerHandle {
        &self.others.0
    }

    async fn keys(&mut self, keys: impl IntoIterator<Item = u32>) {
        self.minute().await;
        let keys = keys.into_iter().map(|n| id(key(n))).collect();
        self.reconciler.handle(TaskEvent::Keys(keys), self.now).await;
    }

    /// A minute passes, and everything that is due after it is done.
    async fn minute(&mut self) {
        self.now.monotonic += MINUTE;
        self.now.wall += MINUTE;
        self.reconciler.handle(TaskEvent::ReadDue(domain()), self.now).await;
        while self.reconciler.domains[&domain()].has_backlog() {
            self.reconciler.handle(TaskEvent::BacklogReady(domain()), self.now).await;
        }
    }
}

fn id(key: PublicKey) -> KeyId {
    KeyId { domain: domain(), key }
}

fn denying(keys: impl IntoIterator<Item = u32>) -> Arc<Admission> {
    let entries: Vec<_> = keys.into_iter().map(|n| Entry::new(List::Deny, key(n))).collect();
    Arc::new(Admission::of(&entries, AllowList::Off, 0))
}

fn live(keys: std::ops::Range<u32>) -> KeySnapshot {
    keys.map(|n| (key(n), Age { age_secs: 60, has_handshake: false })).collect()
}

fn reconciler(memory: MemoryKernel, policy: &Policy) -> (Reconciler<MemoryKernel>, ReconcilerHandle, Reports) {
    Reconciler::new(ReconcilerParts { policy: *policy, ..start_with(memory) })
}

/// A reconciler that remembers established keys.
fn remembering(
    memory: MemoryKernel,
    keys: std::ops::Range<u32>,
) -> (Reconciler<MemoryKernel>, ReconcilerHandle, Reports) {
    Reconciler::new(ReconcilerParts { remembered: remembered(keys), ..start_with(memory) })
}

fn remembered(keys: std::ops::Range<u32>) -> Keys {
    let record = KeyRecord { last: std::time::Instant::now(), established: true };
    keys.map(|n| (id(key(n)), record)).collect()
}

fn start_with(memory: MemoryKernel) -> ReconcilerParts<MemoryKernel> {
    ReconcilerParts {
        kernel: memory,
        domains: [domain()].into(),
        profile: Arc::new(Mesh),
        policy: Policy::default(),
        buffer: WriteBuffer::default(),
        remembered: Keys::default(),
        reserved: watch::channel(Reserved::default()).1,
        gate: watch::channel(None).1,
        drain: watch::channel(None).1,
        metrics: Metrics::register(&MetricsRegistry::default(), &[domain()].into()).unwrap(),
    }
}

fn stands_in(device: &Device, key: PublicKey) -> bool {
    let address = key.link_local();
    let peer = device.peers.get(&key).is_some_and(|peer| peer.allowed_ips[..] == [host(address)]);
    peer && device.routes.contains(&host(address)) && device.fdb.contains(&address)
}
