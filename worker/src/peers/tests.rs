use std::time::{Duration, SystemTime};

use proptest::collection::vec;
use proptest::prelude::*;
use wgkex_common::RejectReason;
use wgkex_common::address::reserved::GatewayPeer;
use wgkex_common::wire::message::Age;
use wgkex_kernel::memory::MemoryKernel;
use wgkex_kernel::{Interface, Kernel as _, host};

use super::pending::INSTALL_TRIES_MAX;
use super::*;
use crate::plan::changes;
use crate::profiles::mesh::{self, Mesh};
use crate::testing::{collision, domain, install, key, now};

const HOUR: Duration = Duration::from_secs(3_600);
const MINUTE: Duration = Duration::from_secs(60);
const YEAR: Duration = Duration::from_secs(365 * 86_400);

#[test]
fn a_peer_that_never_shook_hands_is_pending_for_its_grace_and_then_stale() {
    let mut world = World::with(&[key(1)]);
    world.read();
    assert_eq!(world.states(), [PeerState::New]);
    world.pass(Duration::from_millis(599_999));
    assert_eq!(world.states(), [PeerState::New]);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.states(), [PeerState::Stale]);
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn a_peer_is_connected_for_three_minutes_and_stale_after_three_hours() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    for (passes, state) in [
        (Duration::ZERO, PeerState::Connected),
        (Duration::from_millis(179_999), PeerState::Connected),
        (Duration::from_millis(1), PeerState::Idle),
        (Duration::from_millis(10_619_999), PeerState::Idle),
        (Duration::from_millis(1), PeerState::Stale),
    ] {
        world.pass(passes);
        assert_eq!(world.states(), [state]);
    }
    assert_eq!(world.known.counts(world.now.monotonic), PeerCounts { stale: 1, ..PeerCounts::default() });
}

#[test]
fn a_shorter_stale_timeout_applies_to_connected_peers_too() {
    let mut world = World::with(&[key(1)]);
    world.known.policy = Policy { stale: MINUTE, grace: MINUTE, ..Policy::default() };
    world.handshake(key(1));
    world.read();
    world.pass(Duration::from_millis(59_999));
    assert_eq!(world.states(), [PeerState::Connected]);
    world.pass(Duration::from_millis(1));
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn at_the_first_read_the_age_of_a_handshake_is_the_wall_clocks() {
    let mut world = World::with(&[key(1), key(2)]);
    world.handshake_at(key(1), world.now.wall - 4 * HOUR);
    world.handshake_at(key(2), world.now.wall + HOUR);
    world.read();
    assert_eq!(world.states(), [PeerState::New, PeerState::Connected]);
    world.pass(10 * MINUTE);
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn a_key_that_comes_again_has_its_grace_again() {
    let mut world = World::with(&[key(1)]);
    world.read();
    world.pass(HOUR);
    assert_eq!(world.stale(), [key(1)]);
    assert!(!world.known.mark_installed(key(1), world.now.monotonic));
    assert_eq!(world.stale(), []);
    world.pass(10 * MINUTE);
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn no_step_of_the_wall_clock_makes_a_live_peer_stale() {
    for ahead in [true, false] {
        for step in [HOUR, YEAR] {
            let mut world = World::with(&[key(1)]);
            world.handshake(key(1));
            world.read();
            for minute in 0..400 {
                if minute == 100 {
                    world.step(ahead, step);
                }
                if minute % 2 == 0 {
                    world.handshake(key(1));
                }
                world.read();
                assert_eq!(world.states(), [PeerState::Connected], "{ahead} {step:?} {minute}");
                world.pass(MINUTE);
            }
        }
    }
}

#[test]
fn a_handshake_just_before_a_step_is_no_older_than_the_read_before_it() {
    let mut world = World::with(&[key(1)]);
    world.read();
    world.handshake(key(1));
    world.step(true, YEAR);
    world.pass(MINUTE);
    world.read();
    assert_eq!(world.states(), [PeerState::Connected]);
}

#[test]
fn peers_that_wgkex_did_not_make_are_counted_and_never_stale_for_the_sweep() {
    let mut world = World::with(&[key(1), key(2), key(3)]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
        device.peers.get_mut(&key(2)).unwrap().allowed_ips.clear();
    });
    world.read();
    world.pass(4 * HOUR);
    world.read();
    assert_eq!(world.states(), [PeerState::Stale; 3]);
    assert_eq!(world.stale(), [key(3)]);
}

/// Failed when such a peer was taken for one that an operator removed.
#[test]
fn a_peer_that_vanished_is_owed_and_stays_in_the_state_file() {
    let mut world = World::with(&[key(1), key(2), key(3), key(4)]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(3)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
    });
    world.handshake(key(1));
    world.read();
    let before: Vec<_> = [1, 2].map(|n| world.known.record(&key(n))).into();
    world.known.take_changed();
    world.pass(MINUTE);
    world.vanish(&[key(1), key(2), key(3)]);
    assert_eq!(world.read(), 2, "what others made is theirs to remove");
    assert_eq!(world.owed(), [Step::install(mesh::desired(key(1))), Step::install(mesh::desired(key(2)))]);
    let changed = world.known.take_changed();
    let wanted = [(key(1), before[0]), (key(2), before[1]), (key(3), None)];
    assert_eq!(changed, wanted);
    assert!(before[0].is_some_and(|kept| kept.established));
    assert_eq!(world.read(), 0, "and is not said twice");
    world.restore();
    assert_eq!(world.read(), 0);
    assert_eq!((world.owed(), world.known.table.len()), (vec![], 3));
}

/// Failed when its past was forgotten, and it was taken for a new one.
#[test]
fn a_vanished_peer_keeps_its_claim_and_its_stale_time() {
    let (first, second) = collision();
    let mut world = World::with(&[first, key(2)]);
    world.known.policy = Policy { unestablished: 1, ..Policy::default() };
    world.handshake(first);
    world.read();
    assert_eq!(world.known.unreported(world.now.monotonic), [first]);
    world.pass(HOUR);
    world.vanish(&[first, key(2)]);
    world.read();
    assert_eq!(
        world.come(&[second]),
        [(second, RejectReason::AddressTaken)],
        "nor is its address free while it is away"
    );
    world.restore();
    for _ in 0..2 {
        world.read();
        assert_eq!(world.come(&[second]), [(second, RejectReason::AddressTaken)]);
        assert_eq!(world.states(), [PeerState::New, PeerState::Idle]);
        assert_eq!(world.known.unreported(world.now.monotonic), []);
    }
    // They cannot be evicted for others.
    world.come(&[key(3)]);
    assert_eq!(world.known.eviction_candidates(), [key(2)].into());
    world.pass(2 * HOUR);
    world.read();
    assert!(world.stale().contains(&first));
    world.handshake(first);
    world.read();
    assert!(!world.stale().contains(&first));
}

#[test]
fn a_key_that_comes_while_its_peer_is_away_stands_as_before() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    for is_noticed in [false, true] {
        world.pass(MINUTE);
        world.vanish(&[key(1)]);
        if is_noticed {
            world.read();
        }
        assert_eq!(world.come(&[key(1)]), []);
        world.read();
        assert_eq!(world.states(), [PeerState::Connected]);
        assert!(world.known.record(&key(1)).is_some_and(|kept| kept.last == world.now.monotonic && kept.established));
    }
}

#[test]
fn a_peer_that_vanishes_again_and_again_becomes_stale() {
    let mut world = World::with(&[key(1), key(2)]);
    world.handshake(key(1));
    world.read();
    for minute in 0..=180 {
        assert_eq!(world.known.table.iter_vanished().count(), 0);
        world.vanish(&[key(1), key(2)]);
        world.read();
        world.known.forget_stale(world.now.monotonic);
        // Once it has its grace again, for having been put back.
        let stays = [(key(1), minute < 180), (key(2), minute < 10)];
        for (key, stays) in stays {
            assert_eq!(world.known.is_pending(&key), stays, "{key:?} {minute}");
        }
        world.restore();
        world.read();
        world.pass(MINUTE);
    }
    assert_eq!((world.known.table.len(), world.known.table.iter_vanished().count(), world.owed()), (0, 0, vec![]));
}

#[test]
fn peers_of_an_interface_that_returns_have_their_grace_again() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    world.known.lost();
    world.pass(5 * HOUR);
    world.memory.add(&domain());
    world.read();
    world.known.forget_stale(world.now.monotonic);
    world.restore();
    world.read();
    assert_eq!(world.states(), [PeerState::New]);
    world.pass(10 * MINUTE);
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn a_vanished_peer_that_another_program_puts_back_has_its_past() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    world.vanish(&[key(1)]);
    world.read();
    world.apply(&[Step::install(mesh::desired(key(1)))]);
    world.read();
    assert_eq!(
        (world.states(), world.owed(), world.known.is_pending(&key(1))),
        (vec![PeerState::Connected], vec![], false)
    );
    assert!(world.known.table.iter_vanished().next().is_none());
}

#[test]
fn routes_and_entries_of_a_peer_that_is_to_be_put_back_are_no_orphans() {
    let mut world = World::with(&[key(1)]);
    world.read();
    world.vanish(&[key(1)]);
    for _ in 0..3 {
        world.read();
        world.pass(MINUTE);
        assert_eq!(world.known.orphaned(&world.memory.device(&domain()).unwrap(), world.now.monotonic), []);
    }
}

#[test]
fn an_interface_made_anew_is_owed_every_key_of_ours() {
    for missed in [false, true] {
        let mut world = World::with(&[key(1), key(2), key(3)]);
        world.memory.alter(&domain(), |device| device.peers.get_mut(&key(3)).unwrap().allowed_ips.clear());
        world.read();
        if missed {
            world.known.lost();
        }
        world.memory.add(&domain());
        world.read();
        assert_eq!(world.owed(), [Step::install(mesh::desired(key(1))), Step::install(mesh::desired(key(2)))]);
    }
}

#[test]
fn a_peer_put_back_has_its_grace_again() {
    let mut world = World::with(&[key(1), key(2)]);
    world.handshake(key(1));
    world.read();
    world.pass(2 * HOUR);
    world.memory.add(&domain());
    world.read();
    world.restore();
    world.read();
    assert_eq!(world.states(), [PeerState::Idle, PeerState::New], "the first is established");
    world.pass(2 * HOUR);
    assert_eq!(world.stale(), [key(1), key(2)]);
}

#[test]
fn a_peer_made_anew_by_hand_has_its_grace_again() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    world.pass(4 * HOUR);
    world.memory.alter(&domain(), |device| device.peers.get_mut(&key(1)).unwrap().last_handshake = None);
    world.read();
    assert_eq!(world.states(), [PeerState::New]);
}

#[test]
fn a_key_is_refused_while_the_owner_of_its_address_is_in_its_grace_or_proven() {
    let (first, second) = collision();
    for (owner, other) in [(first, second), (second, first)] {
        let mut world = World::with(&[]);
        world.read();
        assert_eq!(world.come(&[owner]), []);
        world.pass(MINUTE);
        assert_eq!(world.come(&[other]), [(other, RejectReason::AddressTaken)]);
        world.handshake(owner);
        world.read();
        world.pass(2 * HOUR + 59 * MINUTE);
        world.read();
        assert_eq!(world.come(&[other, key(1)]), [(other, RejectReason::AddressTaken)], "and holds up no other");
        assert_eq!(world.come(&[owner]), []);
        world.read();
        assert_eq!(world.peers(), [owner, key(1)].into());
        assert_eq!(world.known.eviction_candidates(), [].into());
    }
}

#[test]
fn an_address_passes_on_when_its_owner_is_gone_and_the_owners_peer_is_removed() {
    let (first, second) = collision();
    for quiet in [10 * MINUTE, 3 * HOUR] {
        let mut world = World::with(&[]);
        world.read();
        world.come(&[first]);
        if quiet > HOUR {
            world.handshake(first);
        }
        world.read();
        world.pass(quiet);
        world.come(&[first]);
        assert_eq!(world.come(&[second]), [], "asking for an address does not keep it");
        world.read();
        assert_eq!(world.known.eviction_candidates(), [first].into());
        assert_eq!(world.come(&[first]), [(first, RejectReason::AddressTaken)]);
        world.make_room();
        assert_eq!(world.peers(), [second].into());
        let device = world.memory.device(&domain()).unwrap();
        assert_eq!(mesh::desired(second).ownership(&device.peers[&second]), Ownership::Ours);
        assert!(device.routes.contains(&host(second.link_local())) && device.fdb.contains(&second.link_local()));
    }
}

#[test]
fn of_two_that_come_at_once_the_same_one_has_the_address_everywhere() {
    let (first, second) = collision();
    let orders: [&[&[PublicKey]]; 4] =
        [&[&[first, second]], &[&[second, first]], &[&[first], &[second]], &[&[second], &[first]]];
    for order in orders {
        let mut world = World::with(&[]);
        world.read();
        for keys in order {
            world.come(keys);
            world.pass(Duration::from_secs(4));
        }
        world.read();
        world.make_room();
        world.read();
        world.apply_owed();
        assert_eq!(world.peers(), [first.min(second)].into(), "{order:?}");
        assert_eq!(world.come(&[first.max(second)]), [(first.max(second), RejectReason::AddressTaken)]);
        let device = world.memory.device(&domain()).unwrap();
        assert_eq!((device.routes.len(), device.fdb.len()), (1, 1));
    }
}

#[test]
fn a_key_that_shakes_hands_elsewhere_keeps_its_address_here() {
    let (first, second) = collision();
    let mut world = World::with(&[]);
    world.read();
    world.come(&[first]);
    world.pass(HOUR);
    world.learn(&[(first, Age { age_secs: 60, has_handshake: true })]);
    assert_eq!(world.come(&[second]), [(second, RejectReason::AddressTaken)]);
    world.pass(9 * HOUR);
    assert_eq!(world.come(&[second]), []);
}

#[test]
fn reserved_keys_are_refused_and_their_peers_never_swept_or_altered() {
    let (first, second) = collision();
    let gateway = |key| GatewayPeer { key, address: "fe80::1".parse().ok() };
    let mut world = World::with(&[first, key(2)]);
    world.reserved = Reserved::new([key(2)].into(), [domain()].into());
    world.reserved.update(&"gw".parse().unwrap(), domain().name(), Some(gateway(first)));
    world.reserved.update(&"gw2".parse().unwrap(), domain().name(), Some(gateway(key(3))));
    world.memory.alter(&domain(), |device| {
        device.routes.clear();
        device.fdb.insert(key(3).link_local());
    });
    world.read();
    let reserved = [first, second, key(2), key(3)];
    assert_eq!(world.come(&reserved), reserved.map(|key| (key, RejectReason::Reserved)));
    world.learn(&reserved.map(|key| (key, Age { age_secs: 0, has_handshake: false })));
    world.known.mark_pending(key(3), world.now.monotonic);
    world.pass(4 * HOUR);
    world.read();
    assert_eq!((world.stale(), world.owed()), (vec![], vec![]));
    assert_eq!(world.known.orphaned(&world.memory.device(&domain()).unwrap(), world.now.monotonic), []);
    world.reserved.update(&"gw".parse().unwrap(), domain().name(), None);
    world.read();
    assert_eq!(world.stale(), [first], "what is a gateway's no longer is a peer like others");
}

/// Failed when the data of a worker reserved whatever key it named.
#[test]
fn an_established_key_cannot_be_reserved_by_worker_data() {
    let (first, second) = collision();
    let mut world = World::with(&[]);
    world.reserved = Reserved::new([].into(), [domain()].into());
    world.come(&[first]);
    world.learn(&[(first, Age { age_secs: 0, has_handshake: true })]);
    for (worker, claimed) in [("gw", first), ("gw2", second)] {
        let peer = GatewayPeer { key: claimed, address: "fe80::1".parse().ok() };
        world.reserved.update(&worker.parse().unwrap(), domain().name(), Some(peer));
        world.read();
        assert!(world.reserved.is_reserved(&first));
        assert_eq!(world.come(&[first]), []);
    }
    assert_eq!(world.come(&[second]), [(second, RejectReason::Reserved)]);
}

#[test]
fn an_address_that_another_program_gave_to_another_peer_is_not_taken() {
    let mut world = World::with(&[key(1), key(2)]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push(host(key(3).link_local()));
    });
    world.read();
    assert_eq!(
        world.come(&[key(3), key(1)]),
        [(key(3), RejectReason::AddressTaken)],
        "its own peer is set again all the same"
    );
}

#[test]
fn a_flood_pushes_out_only_the_oldest_that_never_shook_hands() {
    let mut world = World::with(&[]);
    world.known.policy = Policy { unestablished: 20, ..Policy::default() };
    world.read();
    let established: Vec<_> = (0..5).map(key).collect();
    world.come(&established);
    for key in &established {
        world.handshake(*key);
    }
    for n in 100..200 {
        world.read();
        world.make_room();
        world.apply_owed();
        assert_eq!(world.come(&[key(n)]), []);
        assert_eq!(world.come(&established), [], "what is known needs no room");
        world.pass(Duration::from_secs(1));
        assert!(world.peers().len() <= 25, "{}", world.peers().len());
    }
    world.read();
    world.make_room();
    world.apply_owed();
    let newest = (180..200).map(key);
    assert_eq!(world.peers(), established.into_iter().chain(newest).collect());
}

#[test]
fn where_one_has_to_go_a_portion_goes_with_it_and_none_without_need() {
    let mut world = World::with(&[]);
    world.known.policy = Policy { unestablished: 160, ..Policy::default() };
    world.read();
    for n in 0..160 {
        world.come(&[key(n)]);
        world.pass(Duration::from_secs(1));
    }
    world.read();
    assert_eq!(world.known.eviction_candidates(), [].into(), "there is no need");
    world.come(&[key(160), key(161)]);
    world.handshake(key(3));
    world.read();
    // Of 159 a sixteenth, and one, for which the third has made no room.
    assert_eq!(world.known.eviction_candidates(), (0..3).chain(4..11).map(key).collect());
    world.make_room();
    world.apply_owed();
    for n in 162..171 {
        assert_eq!(world.come(&[key(n)]), []);
        assert!(world.peers().contains(&key(n)), "it has room at once");
    }
    world.come(&[key(171)]);
    assert!(!world.peers().contains(&key(171)));
    assert!(world.known.lacks_room());
}

#[test]
fn too_many_of_before_go_when_one_comes() {
    let mut world = World::with(&(0..30).map(key).collect::<Vec<_>>());
    world.known.policy = Policy { unestablished: 10, ..Policy::default() };
    world.read();
    assert_eq!(world.known.eviction_candidates(), [].into());
    world.come(&[key(30)]);
    assert_eq!(world.known.eviction_candidates().len(), 21);
    world.make_room();
    world.apply_owed();
    assert_eq!(world.peers().len(), 10);
}

#[test]
fn a_silent_peer_forgets_where_its_router_was_and_is_stale_no_sooner_for_it() {
    let mut world = World::with(&[key(1), key(2), key(3)]);
    world.known.policy = Policy { forget_endpoint_after: Some(10 * MINUTE), ..Policy::default() };
    world.handshake(key(1));
    world.read();
    world.pass(Duration::from_secs(599));
    world.handshake(key(2));
    world.read();
    assert_eq!(world.known.idle(10, world.now.monotonic), []);
    world.pass(MINUTE);
    assert_eq!(world.known.idle(10, world.now.monotonic), [key(1)]);
    world.apply(&[Step::renew(mesh::desired(key(1)))]);
    world.known.mark_renewed(&key(1));
    let device = world.memory.device(&domain()).unwrap();
    assert_eq!(
        (mesh::desired(key(1)).ownership(&device.peers[&key(1)]), device.peers[&key(1)].last_handshake),
        (Ownership::Ours, None)
    );
    world.pass(2 * HOUR);
    world.read();
    assert_eq!(world.known.idle(10, world.now.monotonic), [key(2)], "and not again");
    assert!(!world.stale().contains(&key(1)));
    world.handshake(key(1));
    world.read();
    world.pass(3 * HOUR);
    world.read();
    assert_eq!(world.stale(), [key(1), key(2), key(3)]);
}

#[test]
fn a_full_interface_takes_no_new_key() {
    let mut world = World::with(&[key(1), key(2)]);
    world.known.policy = Policy { peers: 3, ..Policy::default() };
    world.handshake(key(1));
    world.handshake(key(2));
    world.read();
    assert_eq!(world.come(&[key(3)]), []);
    world.handshake(key(3));
    world.read();
    assert_eq!(world.come(&[key(4), key(1)]), [(key(4), RejectReason::Full)]);
    assert_eq!(world.peers().len(), 3);
}

#[test]
fn waiting_keys_are_owed_in_order_of_arrival_and_the_own_key_is_not() {
    let mut world = World::with(&[]);
    let own = world.memory.device(&domain()).unwrap().public_key.unwrap();
    for key in [key(2), own, key(1)] {
        world.known.mark_pending(key, world.now.monotonic);
        world.pass(MINUTE);
    }
    world.read();
    assert_eq!(world.owed(), [Step::install(mesh::desired(key(2))), Step::install(mesh::desired(key(1)))]);
    assert!(!world.known.is_pending(&own));
}

#[test]
fn a_remembered_key_is_pending_only_if_the_kernel_lacks_it() {
    let (first, second) = collision();
    let mut world = World::with(&[key(1), key(2), second]);
    let begun = world.now.monotonic;
    let kept = |ago, established| KeyRecord { last: begun.checked_sub(ago).unwrap(), established };
    for (key, kept) in [
        (key(1), kept(HOUR, true)),
        (key(3), kept(HOUR, true)),
        (first, kept(HOUR, false)),
        (second, kept(MINUTE, true)),
    ] {
        world.known.remember(key, kept);
    }
    world.read();
    assert_eq!(world.owed(), [Step::install(mesh::desired(key(3)))], "and none that lost its address to another");
    let noted: Vec<_> = world.known.take_changed().into_iter().map(|(key, kept)| (key, kept.is_some())).collect();
    let mut wanted = vec![(key(1), true), (key(2), true), (first, false), (second, true)];
    wanted.sort_unstable();
    assert_eq!(noted, wanted);
}

#[test]
fn a_remembered_established_key_stays_established_without_a_handshake_in_the_kernel() {
    let mut world = World::with(&[key(1), key(2)]);
    world.known.policy = Policy { unestablished: 1, ..Policy::default() };
    world.known.remember(key(1), KeyRecord { last: world.now.monotonic, established: true });
    world.read();
    assert!(world.known.record(&key(1)).is_some_and(|kept| kept.established));
    world.come(&[key(3)]);
    assert_eq!(world.known.eviction_candidates(), [key(2)].into());
}

#[test]
fn a_peer_altered_meanwhile_replaces_the_remembered_key() {
    let mut world = World::with(&[key(1)]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips = ["10.0.0.0/8".parse().unwrap()].into();
    });
    world.known.remember(key(1), KeyRecord { last: world.now.monotonic, established: true });
    world.read();
    assert_eq!(world.owed(), []);
}

#[test]
fn live_keys_are_learnt_that_have_no_peer_take_no_address_and_are_not_stale() {
    let (first, second) = collision();
    let mut world = World::with(&[key(1), second, key(6)]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.clear();
        device.peers.get_mut(&key(6)).unwrap().allowed_ips = [host(key(5).link_local())].into();
    });
    world.read();
    world.known.mark_pending(key(2), world.now.monotonic);
    let hours = |hours: u64, established| Age { age_secs: hours * 3_600, has_handshake: established };
    let keys = [
        (key(1), hours(0, false)),
        (key(2), hours(0, false)),
        (first, hours(0, false)),
        (second, hours(0, false)),
        (key(3), Age { age_secs: 599, has_handshake: false }),
        (key(4), hours(8, true)),
        (key(5), hours(0, true)),
        (key(7), Age { age_secs: 600, has_handshake: false }),
        (key(8), hours(9, true)),
    ];
    assert_eq!(world.learn(&keys), [key(4), key(3)], "the oldest first");
    assert!(world.known.is_pending(&key(3)) && !world.known.is_announced(&key(3)));
    assert_eq!(world.learn(&keys), [], "they wait already");
}

#[test]
fn a_live_key_without_a_handshake_pushes_out_none_that_came_after_it() {
    let mut world = World::with(&[]);
    world.known.policy = Policy { unestablished: 3, ..Policy::default() };
    world.read();
    for n in 0..3 {
        world.install(&[key(n)]);
        world.pass(MINUTE);
    }
    world.read();
    let live = [
        (key(3), Age { age_secs: 240, has_handshake: false }),
        (key(4), Age { age_secs: 180, has_handshake: false }),
        (key(5), Age { age_secs: 240, has_handshake: true }),
        (key(6), Age { age_secs: 60, has_handshake: false }),
    ];
    assert_eq!(world.learn(&live), [key(5)], "who shook hands has a place");
    assert!([3, 4].iter().all(|n| !world.known.is_pending(&key(*n))));
    assert!(world.known.is_pending(&key(6)));
    assert_eq!(world.known.eviction_candidates(), [key(0)].into());
    world.known.policy.unestablished = 5;
    assert_eq!(world.learn(&live), [key(3)], "there is room for one");
}

#[test]
fn of_many_live_keys_as_many_wait_as_are_newer_than_the_peers_that_go_for_them() {
    let mut world = World::with(&[]);
    world.known.policy = Policy { unestablished: 4, ..Policy::default() };
    world.read();
    // They arrived 200, 100, 100 and 100 s ago.
    world.install(&[key(0)]);
    world.pass(Duration::from_secs(100));
    world.install(&[key(1), key(2), key(3)]);
    world.pass(Duration::from_secs(100));
    world.read();
    let live: Vec<_> = (10..30).map(|n| (key(n), Age { age_secs: 150, has_handshake: false })).collect();
    assert_eq!(world.learn(&live), []);
    assert_eq!((10..30).filter(|n| world.known.is_pending(&key(*n))).count(), 1);
    assert_eq!(world.known.eviction_candidates(), [key(0)].into());
}

#[test]
fn live_keys_that_can_never_have_a_place_do_not_wait_for_one() {
    let mut world = World::with(&[]);
    world.known.policy = Policy { peers: 2, pending: 8, ..Policy::default() };
    world.read();
    world.install(&[key(0), key(1)]);
    world.handshake(key(0));
    world.handshake(key(1));
    world.read();
    assert_eq!(world.come(&[key(2)]), [(key(2), RejectReason::Full)]);
    assert_eq!(world.learn(&[(key(2), Age { age_secs: 0, has_handshake: false })]), []);
    assert!(!world.known.is_pending(&key(2)));
    let established: Vec<_> = (10..30).map(|n| (key(n), Age { age_secs: 0, has_handshake: true })).collect();
    assert_eq!(world.learn(&established), []);
    assert!((10..30).filter(|n| world.known.is_pending(&key(*n))).count() <= 8, "and of others only so many");
}

#[test]
fn a_key_that_waits_and_has_a_place_does_not_take_another() {
    let mut world = World::with(&[]);
    world.known.policy = Policy { peers: 1, ..Policy::default() };
    world.read();
    world.known.mark_pending(key(0), world.now.monotonic);
    world.known.take_slot(&key(0));
    assert_eq!(world.come(&[key(0)]), []);
    assert_eq!(world.peers(), [key(0)].into());
}

#[test]
fn handshakes_are_reported_once_and_again_after_a_while() {
    let mut world = World::with(&[key(1), key(2), key(3)]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(3)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
    });
    let mut reports = Vec::new();
    for minute in 0..=730 {
        if minute >= 2 {
            world.handshake(key(1));
            world.handshake(key(3));
        }
        world.read();
        if minute == 10 {
            world.known.report_all();
        }
        let reported = world.known.unreported(world.now.monotonic);
        reports.extend(reported.into_iter().map(|key| (minute, key)));
        world.pass(MINUTE);
    }
    assert_eq!(reports, [2, 10, 370, 730].map(|minute| (minute, key(1))));
}

#[test]
fn an_orphan_is_removed_after_a_while_without_a_peer() {
    let mut world = World::with(&[key(1)]);
    let orphan = key(2).link_local();
    let add = |device: &mut Device| assert!(device.routes.insert(host(orphan)) && device.fdb.insert(orphan));
    world.memory.alter(&domain(), add);
    let orphaned = |world: &World| {
        let device = world.memory.device(&domain()).unwrap();
        world.known.orphaned(&device, world.now.monotonic)
    };
    world.read();
    assert_eq!(orphaned(&world), []);
    world.pass(ORPHANED);
    world.read();
    assert_eq!(orphaned(&world), [Change::RemoveRoute(host(orphan)), Change::RemoveFdb(orphan)]);
    world.install(&[key(2)]);
    world.read();
    assert_eq!(orphaned(&world), []);
    // The time without a peer counts from the loss of the peer.
    world.vanish(&[key(2)]);
    world.known.removed(&key(2));
    world.read();
    assert_eq!(orphaned(&world), []);
}

#[test]
fn each_change_is_reported_once() {
    let mut world = World::with(&[key(1)]);
    let changed = |world: &mut World| -> Vec<_> {
        let changed = world.known.take_changed().into_iter();
        changed.map(|(key, kept)| (key, kept.map(|kept| (kept.last, kept.established)))).collect()
    };
    world.read();
    let begun = world.now.monotonic;
    assert_eq!(changed(&mut world), [(key(1), Some((begun, false)))]);
    world.pass(MINUTE);
    world.read();
    assert_eq!(changed(&mut world), []);
    world.handshake(key(1));
    world.read();
    assert_eq!(changed(&mut world), [(key(1), Some((begun, true)))]);
    world.known.mark_pending(key(2), begun);
    world.install(&[key(1)]);
    let now = world.now.monotonic;
    assert_eq!(changed(&mut world), [(key(1), Some((now, true))), (key(2), Some((begun, false)))]);
    world.memory.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
    });
    world.read();
    assert_eq!(changed(&mut world), [(key(1), None)], "somebody else's is not ours to restore");
    world.known.removed(&key(2));
    (0..INSTALL_TRIES_MAX).for_each(|_| world.known.refused(&key(2)));
    assert_eq!(changed(&mut world), [(key(2), None)]);
}

#[test]
fn a_flood_of_waiting_keys_crowds_out_the_oldest() {
    let mut known = KnownPeers::new(Arc::new(Mesh), Policy { pending: 160, ..Policy::default() });
    let start = Instant::now();
    let dropped: usize = (0..10_000).map(|n| known.mark_pending(key(n), start + Duration::from_millis(n.into()))).sum();
    let kept = known.pending.len();
    assert!(kept <= 160 && dropped == 10_000 - kept, "{kept} {dropped}");
    assert!((9_900..10_000).all(|n| known.is_pending(&key(n))));
}

#[test]
fn a_key_that_the_kernel_keeps_refusing_is_given_up() {
    let mut known = KnownPeers::new(Arc::new(Mesh), Policy::default());
    known.mark_pending(key(1), Instant::now());
    (1..INSTALL_TRIES_MAX).for_each(|_| known.refused(&key(1)));
    assert!(known.is_pending(&key(1)));
    known.refused(&key(1));
    assert!(!known.is_pending(&key(1)));
}

proptest! {
    /// The reference is the true age of each peer's last handshake and arrival by the monotonic clock. Right
    /// after a step of the wall clock a handshake may be taken for as old as the read before it, no older.
    #[test]
    fn only_quiet_peers_of_ours_past_their_grace_are_ever_stale(acts in vec(act(), 1..300)) {
        let mut world = World::with(&(0..4).map(key).collect::<Vec<_>>());
        let others = [key(0)];
        world.memory.alter(&domain(), |device| {
            device.peers.get_mut(&others[0]).unwrap().allowed_ips.push("fd00::/64".parse().unwrap());
        });
        let (mut handshakes, mut arrivals) = (BTreeMap::new(), BTreeMap::new());
        let start = world.now.monotonic;
        let mut slack = Duration::ZERO;
        world.read();
        for act in acts {
            match act {
                Act::Step(ahead, step) => {
                    world.step(ahead, step);
                    slack = 10 * MINUTE;
                }
                Act::Handshake(n) => {
                    world.handshake(key(n));
                    handshakes.insert(key(n), world.now.monotonic);
                }
                Act::Arrive(n) => {
                    world.install(&[key(n)]);
                    arrivals.insert(key(n), world.now.monotonic);
                }
                Act::Pass(passes) => {
                    world.pass(passes);
                    world.read();
                }
            }
            if !matches!(act, Act::Pass(_)) {
                continue; // nobody is judged but right after a read
            }
            for key in world.stale() {
                let since = |times: &BTreeMap<PublicKey, Instant>| times.get(&key).map(|time| world.now.monotonic - *time);
                prop_assert!(!others.contains(&key));
                prop_assert!(since(&handshakes).is_none_or(|quiet| quiet + slack >= 3 * HOUR));
                prop_assert!(since(&arrivals).unwrap_or(world.now.monotonic - start) >= 10 * MINUTE);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Act {
    Step(bool, Duration),
    Handshake(u32),
    Arrive(u32),
    Pass(Duration),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        1 => (any::<bool>(), prop_oneof![Just(MINUTE / 2), Just(HOUR), Just(YEAR)]).prop_map(|(ahead, by)| Act::Step(ahead, by)),
        2 => (0..4_u32).prop_map(Act::Handshake),
        1 => (0..4_u32).prop_map(Act::Arrive),
        20 => (1..=600_u64).prop_map(|seconds| Act::Pass(Duration::from_secs(seconds))),
    ]
}

/// A kernel, a known and both clocks.
struct World {
    memory: MemoryKernel,
    known: KnownPeers,
    reserved: Reserved,
    now: Clocks,
    handshakes: Duration,
}

impl World {
    fn with(keys: &[PublicKey]) -> Self {
        let now = Clocks { monotonic: Instant::now(), wall: SystemTime::now() };
        let (memory, known) = (MemoryKernel::with(&[domain()]), KnownPeers::new(Arc::new(Mesh), Policy::default()));
        let world = Self { memory, known, reserved: Reserved::default(), now, handshakes: Duration::ZERO };
        world.apply(&install(keys.iter().copied()));
        world
    }

    fn read(&mut self) -> usize {
        self.known.observe(&self.memory.device(&domain()).unwrap(), &self.reserved, self.now)
    }

    /// Another program removes these peers.
    fn vanish(&self, keys: &[PublicKey]) {
        self.memory.alter(&domain(), |device| device.peers.retain(|key, _| !keys.contains(key)));
    }

    /// Vanished peers are put back.
    fn restore(&mut self) {
        let steps = self.owed();
        self.apply(&steps);
        for step in steps {
            self.known.restore(step.key(), self.now.monotonic);
        }
    }

    /// Keys arrive and are installed as far as there is room; returns the rejected ones.
    fn come(&mut self, keys: &[PublicKey]) -> Vec<(PublicKey, RejectReason)> {
        let own = self.memory.device(&domain()).unwrap().public_key;
        let admission = self.known.admit(keys.iter().copied(), own, &self.reserved, self.now.monotonic);
        self.install(&[admission.known, admission.new].concat().iter().map(DesiredPeer::key).collect::<Vec<_>>());
        for key in admission.deferred {
            self.known.mark_pending(key, self.now.monotonic);
        }
        admission.refused
    }

    fn learn(&mut self, keys: &[(PublicKey, Age)]) -> Vec<PublicKey> {
        self.known.learn(keys.iter().copied(), None, &self.reserved, self.now.monotonic).next
    }

    fn make_room(&mut self) {
        let surplus = self.known.eviction_candidates();
        self.apply(&plan::remove(&Mesh, &self.memory.device(&domain()).unwrap(), &surplus));
        for key in &surplus {
            self.known.removed(key);
        }
    }

    fn peers(&self) -> BTreeSet<PublicKey> {
        self.memory.device(&domain()).unwrap().peers.into_keys().collect()
    }

    fn pass(&mut self, passes: Duration) {
        self.now.monotonic += passes;
        self.now.wall += passes;
    }

    fn step(&mut self, ahead: bool, step: Duration) {
        self.now.wall = if ahead { self.now.wall + step } else { self.now.wall - step };
    }

    /// No two at the same nanosecond, also if the wall clock was set back in between.
    fn handshake(&mut self, key: PublicKey) {
        self.handshakes += Duration::from_nanos(1);
        self.handshake_at(key, self.now.wall + self.handshakes);
    }

    fn handshake_at(&self, key: PublicKey, at: SystemTime) {
        self.memory.handshake(&domain(), key, at);
    }

    fn install(&mut self, keys: &[PublicKey]) {
        self.apply(&install(keys.iter().copied()));
        for key in keys {
            self.known.mark_installed(*key, self.now.monotonic);
        }
    }

    fn apply_owed(&mut self) {
        let steps = self.owed();
        self.apply(&steps);
        for step in steps {
            self.known.mark_installed(step.key(), self.now.monotonic);
        }
    }

    fn apply(&self, steps: &[Step]) {
        now(self.memory.clone().apply(&Interface::from(&domain()), changes(steps)));
    }

    fn owed(&mut self) -> Vec<Step> {
        self.known.pending_steps(&self.memory.device(&domain()).unwrap(), &self.reserved)
    }

    fn stale(&self) -> Vec<PublicKey> {
        self.known.stale(self.now.monotonic).into_iter().collect()
    }

    fn states(&self) -> Vec<PeerState> {
        self.known.table.iter().map(|(_, entry)| entry.state(&self.known.policy, self.now.monotonic)).collect()
    }
}

/// An event that changes the known peers.
#[derive(Debug, Clone)]
enum Happening {
    Come(Vec<u32>),
    /// They arrive, and the kernel refuses them.
    Fail(u32),
    TakeSlot(u32),
    GiveSlots,
    /// They are live elsewhere, with a handshake or not.
    Learn(Vec<u32>, bool, u64),
    Remember(u32, bool),
    Vanish(Vec<u32>),
    PutBack,
    Handshake(u32),
    Refuse(u32),
    Remove(u32),
    Disown(u32),
    Deny(u32),
    Evict,
    Sweep,
    Read,
    Pass(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    let one = || 0..12_u32;
    let many = || vec(0..12_u32, 0..6);
    prop_oneof![
        4 => many().prop_map(Happening::Come),
        1 => one().prop_map(Happening::Fail),
        1 => one().prop_map(Happening::TakeSlot),
        1 => Just(Happening::GiveSlots),
        2 => (many(), any::<bool>(), 0..900_u64).prop_map(|(keys, shaken, age)| Happening::Learn(keys, shaken, age)),
        1 => (one(), any::<bool>()).prop_map(|(n, established)| Happening::Remember(n, established)),
        2 => many().prop_map(Happening::Vanish),
        1 => Just(Happening::PutBack),
        2 => one().prop_map(Happening::Handshake),
        1 => one().prop_map(Happening::Refuse),
        1 => one().prop_map(Happening::Remove),
        1 => one().prop_map(Happening::Disown),
        1 => one().prop_map(Happening::Deny),
        1 => Just(Happening::Evict),
        1 => Just(Happening::Sweep),
        3 => Just(Happening::Read),
        1 => (1..4_000_u64).prop_map(Happening::Pass),
    ]
}

/// Two of them have the same address.
fn one_of(n: u32) -> PublicKey {
    let (first, second) = collision();
    [first, second].into_iter().nth(n as usize).unwrap_or(key(n))
}

impl World {
    fn happen(&mut self, happening: Happening) {
        let now = self.now.monotonic;
        let keys = |numbers: &[u32]| numbers.iter().copied().map(one_of).collect::<Vec<_>>();
        match happening {
            Happening::Come(numbers) => drop(self.come(&keys(&numbers))),
            Happening::Fail(n) => drop(self.known.mark_pending(one_of(n), now)),
            Happening::TakeSlot(n) => self.known.take_slot(&one_of(n)),
            Happening::GiveSlots => drop(self.known.give_slots(None, &self.reserved)),
            Happening::Learn(numbers, has_handshake, age_secs) => {
                let age = Age { age_secs, has_handshake };
                self.learn(&keys(&numbers).into_iter().map(|key| (key, age)).collect::<Vec<_>>());
            }
            Happening::Remember(n, established) => self.known.remember(one_of(n), KeyRecord { last: now, established }),
            Happening::Vanish(numbers) => self.vanish(&keys(&numbers)),
            Happening::PutBack => self.restore(),
            Happening::Handshake(n) => self.handshake(one_of(n)),
            Happening::Refuse(n) => (0..INSTALL_TRIES_MAX).for_each(|_| self.known.refused(&one_of(n))),
            Happening::Remove(n) => self.remove(&[one_of(n)].into()),
            Happening::Disown(n) => self.known.mark_foreign(&one_of(n)),
            Happening::Deny(n) => {
                let denied = self.known.remove_denied(|key| *key == one_of(n));
                self.remove(&denied.into_keys().collect());
            }
            Happening::Evict => self.make_room(),
            Happening::Sweep => {
                self.remove(&self.known.stale(now));
                self.known.forget_stale(now);
            }
            Happening::Read => drop(self.read()),
            Happening::Pass(seconds) => self.pass(Duration::from_secs(seconds)),
        }
    }

    fn remove(&mut self, keys: &BTreeSet<PublicKey>) {
        self.apply(&plan::remove(&Mesh, &self.memory.device(&domain()).unwrap(), keys));
        for key in keys {
            self.known.removed(key);
        }
    }

    /// Fails where a counter or an index differs from its computation from scratch.
    fn assert_counted(&self) {
        let KnownPeers { table, pending, owners, .. } = &self.known;
        assert_eq!(table.unestablished(), table.recount());
        assert_eq!(pending.slots(), pending.recount());
        for (key, _) in table.iter_vanished() {
            assert!(pending.contains(key) && !table.contains(key), "{key:?} vanished");
        }
        for key in owners.to_evict() {
            assert!(table.contains(key), "{key:?} is to be evicted");
        }
        for (network, key) in owners.iter() {
            assert!(table.contains(key) || pending.contains(key), "{key:?} has {network}");
        }
    }
}

proptest! {
    #[test]
    fn every_counter_equals_a_recount_after_any_steps(happenings in vec(happening(), 0..80)) {
        let mut world = World::with(&[]);
        world.known.policy = Policy { unestablished: 4, peers: 8, pending: 6, ..Policy::default() };
        for happening in happenings {
            world.happen(happening);
            world.assert_counted();
        }
    }
}
