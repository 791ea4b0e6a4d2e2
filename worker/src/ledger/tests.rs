use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::kernel::Kernel as _;
use crate::kernel::fake::Fake;
use crate::plan::{changes, install};
use crate::testing::{collision, domain, key, now};

const HOUR: Duration = Duration::from_secs(3_600);
const MINUTE: Duration = Duration::from_secs(60);
const YEAR: Duration = Duration::from_secs(365 * 86_400);

#[test]
fn a_peer_that_never_shook_hands_is_pending_for_its_grace_and_then_stale() {
    let mut world = World::with(&[key(1)]);
    world.read();
    assert_eq!(world.states(), [PeerState::Pending]);
    world.pass(Duration::from_millis(599_999));
    assert_eq!(world.states(), [PeerState::Pending]);
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
    assert_eq!(world.ledger.counts(world.now.monotonic), Counts { stale: 1, ..Counts::default() });
}

#[test]
fn at_the_first_read_the_age_of_a_handshake_is_the_wall_clocks() {
    let mut world = World::with(&[key(1), key(2)]);
    world.handshake_at(key(1), world.now.wall - 4 * HOUR);
    world.handshake_at(key(2), world.now.wall + HOUR);
    world.read();
    assert_eq!(world.states(), [PeerState::Pending, PeerState::Connected]);
    world.pass(10 * MINUTE);
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn a_key_that_comes_again_has_its_grace_again() {
    let mut world = World::with(&[key(1)]);
    world.read();
    world.pass(HOUR);
    assert_eq!(world.stale(), [key(1)]);
    assert!(!world.ledger.stands(key(1), world.now.monotonic));
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
    world.fake.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push(("10.0.0.0".parse().unwrap(), 8));
        device.peers.get_mut(&key(2)).unwrap().allowed_ips.clear();
    });
    world.read();
    world.pass(4 * HOUR);
    world.read();
    assert_eq!(world.states(), [PeerState::Stale; 3]);
    assert_eq!(world.stale(), [key(3)]);
}

#[test]
fn a_peer_removed_by_hand_is_forgotten() {
    let mut world = World::with(&[key(1), key(2)]);
    world.read();
    world.fake.alter(&domain(), |device| drop(device.peers.remove(&key(1))));
    world.read();
    assert_eq!(world.ledger.peers.len(), 1);
    assert_eq!(world.owed(), []);
}

#[test]
fn an_interface_made_anew_is_owed_every_key_of_ours() {
    for missed in [false, true] {
        let mut world = World::with(&[key(1), key(2), key(3)]);
        world.fake.alter(&domain(), |device| device.peers.get_mut(&key(3)).unwrap().allowed_ips.clear());
        world.read();
        if missed {
            world.ledger.lost();
        }
        world.fake.add(&domain());
        world.read();
        assert_eq!(world.owed(), [Step::install(key(1)), Step::install(key(2))]);
    }
}

#[test]
fn a_peer_put_back_has_its_grace_again() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    world.pass(2 * HOUR);
    world.fake.add(&domain());
    world.read();
    world.apply_owed();
    world.read();
    assert_eq!(world.states(), [PeerState::Pending]);
    world.pass(2 * HOUR);
    assert_eq!(world.stale(), [key(1)]);
}

#[test]
fn a_peer_made_anew_by_hand_has_its_grace_again() {
    let mut world = World::with(&[key(1)]);
    world.handshake(key(1));
    world.read();
    world.pass(4 * HOUR);
    world.fake.alter(&domain(), |device| device.peers.get_mut(&key(1)).unwrap().last_handshake = None);
    world.read();
    assert_eq!(world.states(), [PeerState::Pending]);
}

#[test]
fn the_other_of_two_keys_with_one_address_comes_back_when_the_later_one_goes() {
    let (first, second) = collision();
    let mut world = World::with(&[first]);
    world.read();
    world.install(&[second]);
    world.read();
    assert_eq!(world.owed(), []);
    world.fake.alter(&domain(), |device| drop(device.peers.remove(&second)));
    world.read();
    assert_eq!(changes(&world.owed()), [crate::kernel::Change::SetPeer(first, first.link_local())]);
}

#[test]
fn one_of_ours_that_lost_its_address_to_another_key_still_goes_stale() {
    let (first, second) = collision();
    let mut world = World::with(&[first]);
    world.read();
    world.install(&[second]);
    world.handshake(second);
    world.read();
    world.pass(HOUR);
    assert_eq!(world.stale(), [first]);
}

#[test]
fn waiting_keys_are_owed_in_order_of_arrival_and_the_own_key_is_not() {
    let mut world = World::with(&[]);
    let own = world.fake.device(&domain()).unwrap().public_key.unwrap();
    for key in [key(2), own, key(1)] {
        world.ledger.wants(key, world.now.monotonic);
        world.pass(MINUTE);
    }
    world.read();
    assert_eq!(world.owed(), [Step::install(key(2)), Step::install(key(1))]);
    assert!(!world.ledger.waits(&own));
}

#[test]
fn a_waiting_key_does_not_take_an_address_from_one_that_came_later() {
    let (first, second) = collision();
    for waiting in [vec![first], vec![first, second], vec![second, first, second]] {
        let mut world = World::with(&[]);
        world.read();
        for key in waiting {
            world.ledger.wants(key, world.now.monotonic);
            world.pass(MINUTE);
        }
        world.install(&[second]);
        world.read();
        world.apply_owed();
        world.read();
        assert_eq!(world.fake.device(&domain()).unwrap().peers.keys().collect::<Vec<_>>(), [&second]);
        assert!(world.ledger.waiting.is_empty());
    }
}

#[test]
fn what_is_remembered_is_owed_only_if_the_kernel_lacks_it() {
    let (first, second) = collision();
    let mut world = World::with(&[key(1), key(2), second]);
    let begun = world.now.monotonic;
    let kept = |ago| Kept { last: begun.checked_sub(ago).unwrap(), proven: true };
    for (key, kept) in [(key(1), kept(HOUR)), (key(3), kept(HOUR)), (first, kept(HOUR)), (second, kept(MINUTE))] {
        world.ledger.remember(key, kept);
    }
    world.read();
    assert_eq!(world.owed(), [Step::install(key(3))], "and none that lost its address to another");
    let noted: Vec<_> = world.ledger.take_changed().into_iter().map(|(key, kept)| (key, kept.is_some())).collect();
    let mut wanted = vec![(key(1), true), (key(2), true), (first, false), (second, true)];
    wanted.sort_unstable();
    assert_eq!(noted, wanted);
}

#[test]
fn what_somebody_altered_meanwhile_is_not_what_is_remembered() {
    let mut world = World::with(&[key(1)]);
    world.fake.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips = vec![("10.0.0.0".parse().unwrap(), 8)];
    });
    world.ledger.remember(key(1), Kept { last: world.now.monotonic, proven: true });
    world.read();
    assert_eq!(world.owed(), []);
}

#[test]
fn live_keys_are_learnt_that_have_no_peer_take_no_address_and_are_not_stale() {
    let (first, second) = collision();
    let mut world = World::with(&[key(1), second, key(6)]);
    world.fake.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.clear();
        device.peers.get_mut(&key(6)).unwrap().allowed_ips = vec![(key(5).link_local().into(), 128)];
    });
    world.read();
    world.ledger.wants(key(2), world.now.monotonic);
    let hours = |hours: u64, proven| Age(hours * 3_600, proven);
    let keys = [
        (key(1), hours(0, false)),
        (key(2), hours(0, false)),
        (first, hours(0, false)),
        (second, hours(0, false)),
        (key(3), Age(599, false)),
        (key(4), hours(8, true)),
        (key(5), hours(0, true)),
        (key(7), Age(600, false)),
        (key(8), hours(9, true)),
    ];
    let now = world.now.monotonic;
    assert_eq!(world.ledger.learn(keys, now), [key(4), key(3)], "the oldest first");
    assert!(world.ledger.waits(&key(3)) && !world.ledger.is_announced(&key(3)));
    assert!(world.ledger.learn(keys, now).is_empty(), "they wait already");
}

#[test]
fn handshakes_are_reported_once_and_again_after_a_while() {
    let mut world = World::with(&[key(1), key(2), key(3)]);
    world.fake.alter(&domain(), |device| {
        device.peers.get_mut(&key(3)).unwrap().allowed_ips.push(("10.0.0.0".parse().unwrap(), 8));
    });
    let mut reports = Vec::new();
    for minute in 0..=730 {
        if minute >= 2 {
            world.handshake(key(1));
            world.handshake(key(3));
        }
        world.read();
        if minute == 10 {
            world.ledger.report_all();
        }
        let reported = world.ledger.unreported(world.now.monotonic);
        reports.extend(reported.into_iter().map(|key| (minute, key)));
        world.pass(MINUTE);
    }
    assert_eq!(reports, [2, 10, 370, 730].map(|minute| (minute, key(1))));
}

#[test]
fn what_has_no_peer_goes_when_it_had_none_for_a_while() {
    let mut world = World::with(&[key(1)]);
    let orphan = key(2).link_local();
    let add = |device: &mut Device| assert!(device.routes.insert(orphan) && device.fdb.insert(orphan));
    world.fake.alter(&domain(), add);
    let orphaned = |world: &World| {
        let device = world.fake.device(&domain()).unwrap();
        world.ledger.orphaned(&device, world.now.monotonic)
    };
    world.read();
    assert_eq!(orphaned(&world), []);
    world.pass(ORPHANED);
    world.read();
    assert_eq!(orphaned(&world), [Change::RemoveRoute(orphan), Change::RemoveFdb(orphan)]);
    world.install(&[key(2)]);
    world.read();
    assert_eq!(orphaned(&world), []);
    // What loses its peer later has its while from then on.
    world.fake.alter(&domain(), |device| drop(device.peers.remove(&key(2))));
    world.read();
    assert_eq!(orphaned(&world), []);
}

#[test]
fn what_changes_is_told_once() {
    let mut world = World::with(&[key(1)]);
    let changed = |world: &mut World| -> Vec<_> {
        let changed = world.ledger.take_changed().into_iter();
        changed.map(|(key, kept)| (key, kept.map(|kept| (kept.last, kept.proven)))).collect()
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
    world.ledger.wants(key(2), begun);
    world.install(&[key(1)]);
    let now = world.now.monotonic;
    assert_eq!(changed(&mut world), [(key(1), Some((now, true))), (key(2), Some((begun, false)))]);
    world.fake.alter(&domain(), |device| {
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push(("10.0.0.0".parse().unwrap(), 8));
    });
    world.read();
    assert_eq!(changed(&mut world), [(key(1), None)], "somebody else's is not ours to restore");
    world.ledger.removed(&key(2));
    (0..TRIES).for_each(|_| world.ledger.refused(&key(2)));
    assert_eq!(changed(&mut world), [(key(2), None)]);
}

#[test]
fn a_flood_of_waiting_keys_crowds_out_the_oldest() {
    let mut ledger = Ledger::new(Policy { waiting: 160, ..Policy::default() });
    let start = Instant::now();
    let dropped: usize = (0..10_000).map(|n| ledger.wants(key(n), start + Duration::from_millis(n.into()))).sum();
    let kept = ledger.waiting.len();
    assert!(kept <= 160 && dropped == 10_000 - kept, "{kept} {dropped}");
    assert!((9_900..10_000).all(|n| ledger.waits(&key(n))));
}

#[test]
fn a_key_that_the_kernel_keeps_refusing_is_given_up() {
    let mut ledger = Ledger::new(Policy::default());
    ledger.wants(key(1), Instant::now());
    (1..TRIES).for_each(|_| ledger.refused(&key(1)));
    assert!(ledger.waits(&key(1)));
    ledger.refused(&key(1));
    assert!(!ledger.waits(&key(1)));
}

proptest! {
    /// The reference is the true age of each peer's last handshake and arrival by the monotonic clock. Right
    /// after a step of the wall clock a handshake may be taken for as old as the read before it, no older.
    #[test]
    fn only_quiet_peers_of_ours_past_their_grace_are_ever_stale(acts in vec(act(), 1..300)) {
        let mut world = World::with(&(0..4).map(key).collect::<Vec<_>>());
        let others = [key(0)];
        world.fake.alter(&domain(), |device| {
            device.peers.get_mut(&others[0]).unwrap().allowed_ips.push(("fd00::".parse().unwrap(), 64));
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

/// A kernel, a ledger and both clocks.
struct World {
    fake: Fake,
    ledger: Ledger,
    now: Now,
    handshakes: Duration,
}

impl World {
    fn with(keys: &[PublicKey]) -> Self {
        let now = Now { monotonic: Instant::now(), wall: SystemTime::now() };
        let (fake, ledger) = (Fake::with(&[domain()]), Ledger::new(Policy::default()));
        let world = Self { fake, ledger, now, handshakes: Duration::ZERO };
        world.apply(&install(keys.iter().copied(), None).steps);
        world
    }

    fn read(&mut self) {
        self.ledger.observe(&self.fake.device(&domain()).unwrap(), self.now);
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
        self.fake.handshake(&domain(), key, at);
    }

    fn install(&mut self, keys: &[PublicKey]) {
        self.apply(&install(keys.iter().copied(), None).steps);
        for key in keys {
            self.ledger.stands(*key, self.now.monotonic);
        }
    }

    fn apply_owed(&mut self) {
        let steps = self.owed();
        self.apply(&steps);
        for step in steps {
            self.ledger.stands(step.key, self.now.monotonic);
        }
    }

    fn apply(&self, steps: &[Step]) {
        now(self.fake.clone().apply(&domain(), &changes(steps)));
    }

    fn owed(&mut self) -> Vec<Step> {
        self.ledger.owed(&self.fake.device(&domain()).unwrap())
    }

    fn stale(&self) -> Vec<PublicKey> {
        self.ledger.stale(self.now.monotonic).into_iter().collect()
    }

    fn states(&self) -> Vec<PeerState> {
        self.ledger.peers.values().map(|entry| entry.state(&self.ledger.policy, self.now.monotonic)).collect()
    }
}
