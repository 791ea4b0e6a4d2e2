use proptest::collection::vec;
use proptest::prelude::*;
use wgkex_common::wire::name::Participant;

use super::*;
use crate::testing::key;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

const CLEANUP: Cleanup =
    Cleanup { interval: HOUR, stale: Duration::from_secs(3 * 3600), grace: Duration::from_secs(600) };

fn domain() -> Domain {
    Domain::new("ff_a", &["ff_".into()]).unwrap()
}

fn id(n: u32) -> KeyId {
    KeyId { domain: domain(), key: key(n) }
}

fn config(max: usize) -> Config {
    let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
    let config = Config::parse("", yaml, "b1").unwrap();
    Config { live_keys: config::LiveKeyLimits { max, ttl: DAY }, cleanup: CLEANUP, ..config }
}

fn live(max: usize) -> (LiveKeys, Instant) {
    let now = Instant::now();
    (LiveKeys::new(&config(max), Keys::new(), WriteBuffer::default(), now), Instant::now())
}

/// A key that a router sent, and that has a handshake.
fn prove(live: &mut LiveKeys, key: PublicKey, now: Instant) {
    live.on_request("ff_a", key, now);
    live.on_handshake(&"gw".parse().unwrap(), "ff_a", key, now);
}

fn question() -> SyncRequest {
    SyncRequest {
        from: Participant::Worker("gw".parse().unwrap()),
        to: None,
        domain: "ff_a".into(),
        after: None,
        younger_than: None,
    }
}

fn page_of_none() -> SnapshotChunk {
    SnapshotChunk {
        broker: "b2".parse().unwrap(),
        domain: "ff_a".into(),
        after: None,
        keys: BTreeMap::new(),
        more: false,
    }
}

/// All keys that a sync client receives.
fn all(live: &LiveKeys, mut question: SyncRequest, now: Instant) -> Vec<PublicKey> {
    let mut keys = Vec::new();
    loop {
        let page = live.chunk(&question, now);
        assert!(page.keys.len() <= CHUNK_KEYS_MAX);
        keys.extend(page.keys.into_keys());
        question.after = keys.last().copied();
        if !page.more {
            return keys;
        }
    }
}

#[test]
fn an_asker_gets_every_key_once_in_pages() {
    let (mut live, now) = live(10_000);
    for n in (0..2_500).rev() {
        live.on_request("ff_a", key(n), now);
    }
    live.on_request("ff_none", key(9_999), now);
    assert_eq!(all(&live, question(), now), (0..2_500).map(key).collect::<Vec<_>>());
    let page = live.chunk(&question(), now);
    assert_eq!((page.keys.len(), page.more, page.broker.as_str()), (CHUNK_KEYS_MAX, true, "b1"));
    let none = live.chunk(&SyncRequest { domain: "ff_none".into(), ..question() }, now);
    assert!(none.keys.is_empty() && !none.more && none.domain == "ff_none", "and so the asker goes on");
}

#[test]
fn a_key_is_live_for_its_time_after_its_last_update() {
    let (mut live, now) = live(10);
    live.on_request("ff_a", key(1), now);
    live.on_request("ff_a", key(2), now);
    live.on_handshake(&"gw".parse().unwrap(), "ff_a", key(2), now + HOUR);
    live.on_request("ff_a", key(3), now);
    live.on_request("ff_a", key(3), now + 2 * HOUR);
    for (at, left) in [(23 * HOUR, &[1, 2, 3][..]), (DAY, &[2, 3]), (DAY + HOUR, &[3]), (DAY + 2 * HOUR, &[])] {
        let left: Vec<_> = left.iter().copied().map(key).collect();
        assert_eq!(all(&live, question(), now + at), left, "nobody is given what is over");
        live.expire(now + at);
        assert_eq!(live.len(), left.len());
    }
}

#[test]
fn a_key_is_traced_with_its_gateways_wherever_it_is_known() {
    let (mut live, now) = live(10);
    let [gw1, gw2] = ["gw1", "gw2"].map(|name| name.parse::<WorkerName>().unwrap());
    assert_eq!(live.trace(&key(1), now), []);
    live.on_handshake(&gw1, "ff_a", key(1), now);
    let claimed = live.trace(&key(1), now + SECOND).remove(0);
    assert_eq!((claimed.state, claimed.first, claimed.last), (KeyState::Claimed, None, SECOND));
    assert_eq!(claimed.locations.handshakes, Some(gw1.clone()));
    live.on_request("ff_a", key(1), now);
    let traced = live.trace(&key(1), now).remove(0);
    assert_eq!((traced.state, traced.locations.handshakes), (KeyState::Established, Some(gw1.clone())));
    live.on_request("ff_a", key(2), now);
    live.on_outcome(&gw1, "ff_a", &key(2), true, now);
    live.on_outcome(&gw2, "ff_a", &key(2), true, now + SECOND);
    live.on_outcome(&gw1, "ff_a", &key(2), false, now + SECOND);
    live.on_outcome(&gw1, "ff_a", &key(3), true, now);
    assert_eq!(live.trace(&key(3), now), [], "an outcome makes no key live");
    let traced = live.trace(&key(2), now + 3 * SECOND).remove(0);
    assert_eq!((traced.state, traced.last_handshake, traced.last), (KeyState::Unestablished, None, 3 * SECOND));
    assert_eq!((traced.locations.confirmed, traced.locations.handshakes), (vec![gw2.clone()], None));
    live.on_handshake(&gw2, "ff_a", key(2), now + HOUR);
    live.on_request("ff_a", key(2), now + 2 * HOUR);
    let traced = live.trace(&key(2), now + 2 * HOUR).remove(0);
    assert_eq!((traced.first, traced.last, traced.last_handshake), (Some(2 * HOUR), Duration::ZERO, Some(HOUR)));
    assert_eq!((traced.locations.confirmed, traced.locations.handshakes), (vec![gw2.clone()], Some(gw2)));
}

#[test]
fn only_recent_updates_answer_a_request_for_those() {
    let (mut live, now) = live(10);
    let young = |live: &LiveKeys, now| all(live, SyncRequest { younger_than: Some(20), ..question() }, now);
    live.on_request("ff_a", key(1), now);
    live.on_request("ff_a", key(2), now);
    live.on_request("ff_a", key(3), now + HOUR);
    assert_eq!(young(&live, now + HOUR), [key(3)]);
    // Another broker has known the key for long, and this one receives it only now.
    let later = now + HOUR + 60 * SECOND;
    let page = SnapshotChunk {
        keys: [
            (key(4), Age { age_secs: 3_600, has_handshake: true }),
            (key(2), Age { age_secs: 3_660, has_handshake: false }),
        ]
        .into(),
        ..page_of_none()
    };
    live.on_chunk(&page, later);
    assert_eq!(young(&live, later), [key(4)], "what it knew is no news");
    let given = live.chunk(&SyncRequest { after: Some(key(3)), ..question() }, later);
    assert_eq!(given.keys, [(key(4), Age { age_secs: 3_600, has_handshake: true })].into());
    let older = page.keys.into_iter().map(|(key, Age { age_secs: age, has_handshake: established })| {
        (key, Age { age_secs: age + 19, has_handshake: established })
    });
    live.on_chunk(&SnapshotChunk { keys: older.collect(), ..page_of_none() }, later + 19 * SECOND);
    assert_eq!(young(&live, later + 20 * SECOND), [], "nor is what it is told again");
}

#[test]
fn pages_that_are_long_on_their_way_bring_no_news() {
    let (mut one, now) = live(10);
    let mut other = live(10).0;
    one.on_request("ff_a", key(1), now);
    let mut now = now;
    for _ in 0..100 {
        let page = one.chunk(&question(), now);
        now += 5 * SECOND;
        other.on_chunk(&page, now);
        std::mem::swap(&mut one, &mut other);
    }
    let young = SyncRequest { younger_than: Some(400), ..question() };
    assert!(one.chunk(&young, now).keys.is_empty() && other.chunk(&young, now).keys.is_empty());
}

#[test]
fn after_a_restart_everything_is_news() {
    let now = Instant::now();
    let known: Keys = [(id(1), KeyRecord { last: now.checked_sub(HOUR).unwrap(), established: true })].into();
    let live = LiveKeys::new(&config(10), known, WriteBuffer::default(), now);
    let young = live.chunk(&SyncRequest { younger_than: Some(20), ..question() }, now + SECOND);
    assert_eq!(young.keys, [(key(1), Age { age_secs: 3_601, has_handshake: true })].into());
}

#[test]
fn keys_that_expire_at_another_broker_are_not_merged() {
    let (mut live, now) = live(10);
    let keys = [
        (key(1), Age { age_secs: u64::MAX, has_handshake: true }),
        (key(2), Age { age_secs: 86_400, has_handshake: true }),
    ]
    .into();
    live.on_chunk(&SnapshotChunk { keys, ..page_of_none() }, now);
    assert!(live.is_empty());
}

/// Fails if a worker's report makes a key live: such a key was sent to sync clients, and evicted keys with a handshake.
#[test]
fn a_reported_handshake_makes_no_key_live_and_counts_once_a_router_requests_it() {
    let (mut live, now) = live(16);
    let counts = |live: &LiveKeys| live.counts().map(|(_, counts)| counts).collect::<Vec<_>>();
    for n in 0..16 {
        prove(&mut live, key(n), now);
    }
    for n in 100..10_000 {
        live.on_handshake(&"thief".parse().unwrap(), "ff_a", key(n), now + HOUR);
        live.on_handshake(&"thief".parse().unwrap(), "ff_none", key(n), now + HOUR);
    }
    assert_eq!(all(&live, question(), now + HOUR), (0..16).map(key).collect::<Vec<_>>());
    assert_eq!(counts(&live), [LiveKeyCounts { established: 16, unestablished: 0, unrequested: 2 }]);
    assert_eq!(live.is_established(&domain(), &key(100)), None, "nor does it let a key past a limit");
    assert!(!live.is_routers(&key(100)) && live.is_routers(&key(0)));
    assert!([0, 100].iter().all(|n| live.has_handshake(&key(*n))) && !live.has_handshake(&key(102)));
    live.expire(now + DAY);
    live.on_request("ff_a", key(100), now + DAY);
    assert_eq!(live.is_established(&domain(), &key(100)), Some(false), "it was said too long ago");
    live.on_handshake(&"gw".parse().unwrap(), "ff_a", key(101), now + DAY);
    live.on_request("ff_a", key(101), now + DAY + HOUR);
    assert_eq!(live.is_established(&domain(), &key(101)), Some(true));
    assert_eq!(counts(&live), [LiveKeyCounts { established: 1, unestablished: 1, unrequested: 0 }]);
    live.on_handshake(&"gw".parse().unwrap(), "ff_a", key(101), now + DAY + 2 * HOUR);
    assert_eq!(live.chunk(&question(), now + DAY + 2 * HOUR).keys[&key(101)], Age { age_secs: 0, has_handshake: true });
}

#[test]
fn too_many_keys_push_out_the_oldest_that_never_shook_hands() {
    let (mut live, now) = live(160);
    for n in 0..100 {
        live.on_request("ff_a", key(n), now + n * SECOND);
        if n % 2 == 0 {
            live.on_handshake(&"gw".parse().unwrap(), "ff_a", key(n), now + n * SECOND);
        }
    }
    for n in 1_000..11_000 {
        live.on_request("ff_a", key(n), now + n * SECOND);
        assert!(live.len() <= 160);
    }
    let left = all(&live, question(), now + 11_000 * SECOND);
    assert!((0..100).step_by(2).all(|n| left.contains(&key(n))), "the established ones stay");
    assert!((10_950..11_000).all(|n| left.contains(&key(n))), "and the newest");
    for n in 20_000..20_200 {
        prove(&mut live, key(n), now + n * SECOND);
    }
    assert!(live.len() <= 160);
    assert!(all(&live, question(), now + 20_200 * SECOND).contains(&key(20_199)));
}

/// The contract's two keys with one address (section 3); the first is the smaller.
fn collision() -> (PublicKey, PublicKey) {
    let parse = |text: &str| text.parse().unwrap();
    (parse("fAKaBGbh8TB6KaToe27fkEi9ghZwYGi6sOvHDXG2PLI="), parse("3c+xZQV94mSS+WVbTdDrC58V7h9hA3uIECwx0uu1kpg="))
}

#[test]
fn an_address_is_taken_while_its_owner_is_in_its_grace_or_proven() {
    let (first, second) = collision();
    let taken = |live: &LiveKeys, key, at| live.is_taken("ff_a", key, at);
    let (mut live, now) = live(10);
    assert!(!taken(&live, second, now));
    live.on_request("ff_a", second, now);
    live.on_request("ff_a", second, now + 500 * SECOND);
    let end = now + CLEANUP.grace;
    assert!(taken(&live, first, now + 599 * SECOND) && !taken(&live, first, end), "a repeat does not make it longer");
    assert!(!taken(&live, second, now) && !live.is_taken("ff_none", first, now));
    live.on_handshake(&"gw".parse().unwrap(), "ff_a", second, end);
    // A report of a handshake is at most as old as the time between two reports.
    let alive = 2 * CLEANUP.stale;
    assert!(taken(&live, first, now + alive) && !taken(&live, first, end + alive));
}

#[test]
fn of_two_keys_with_one_address_only_the_better_founded_is_live() {
    let (first, second) = collision();
    let known = |live: &LiveKeys, at| all(live, question(), at);
    let (mut live, now) = live(10);
    live.on_request("ff_a", second, now);
    live.on_request("ff_a", first, now + 10 * SECOND);
    assert_eq!(known(&live, now + 10 * SECOND), [second], "the older");
    live.on_handshake(&"thief".parse().unwrap(), "ff_a", first, now + 20 * SECOND);
    assert_eq!(known(&live, now + 20 * SECOND), [second], "by one worker's word no key takes another's address");
    let page = SnapshotChunk { keys: [(first, Age { age_secs: 0, has_handshake: true })].into(), ..page_of_none() };
    live.on_chunk(&page, now + 20 * SECOND);
    assert_eq!(known(&live, now + 20 * SECOND), [first], "the established one");
    live.on_request("ff_a", second, now + 30 * SECOND);
    assert_eq!(known(&live, now + 30 * SECOND), [first]);
    assert_eq!(live.expire(now + 2 * DAY), 1);
    assert!(!live.is_taken("ff_a", second, now + 2 * DAY));
    for order in [[first, second], [second, first]] {
        let (mut live, now) = self::live(10);
        for key in order {
            live.on_request("ff_a", key, now);
        }
        assert_eq!(known(&live, now), [first], "of two at once the same at every broker");
    }
}

/// Fails if a key without a handshake, requested within its grace time, has a better claim than that of a router that
/// was silent for some hours: with one key after the other a stranger kept that router out without limit.
#[test]
fn a_router_that_comes_back_has_its_address_again_from_any_that_never_shook_hands() {
    let (router, stranger) = collision();
    let known = |live: &LiveKeys, at| all(live, question(), at);
    for is_first in [false, true] {
        let (mut live, now) = live(100);
        prove(&mut live, router, now);
        let gone = now + 2 * CLEANUP.stale;
        if is_first {
            assert!(!live.is_taken("ff_a", stranger, gone), "while it is away another may come");
            live.on_request("ff_a", stranger, gone);
            assert_eq!(known(&live, gone), [stranger]);
            assert_eq!(live.is_established(&domain(), &router), Some(true), "it is known all the same");
        }
        let back = gone + 60 * SECOND;
        assert!(!live.is_taken("ff_a", router, back));
        live.on_request("ff_a", router, back);
        live.on_request("ff_a", router, back + 60 * SECOND);
        live.on_request("ff_a", stranger, back + 60 * SECOND);
        assert_eq!(known(&live, back + 60 * SECOND), [router], "{is_first}");
        let end = back + CLEANUP.grace;
        assert!(
            live.is_taken("ff_a", stranger, end.checked_sub(SECOND).unwrap()) && !live.is_taken("ff_a", stranger, end)
        );
        live.on_handshake(&"gw".parse().unwrap(), "ff_a", router, end);
        assert!(live.is_taken("ff_a", stranger, end + CLEANUP.stale));
    }
}

#[test]
fn a_router_that_was_away_too_long_or_whose_address_shakes_hands_for_another_waits() {
    let (router, other) = collision();
    let (mut live, now) = live(32);
    let gone = now + 2 * CLEANUP.stale;
    prove(&mut live, router, now);
    prove(&mut live, other, gone);
    assert!(live.is_taken("ff_a", router, gone + HOUR), "the other one shakes hands");
    prove(&mut live, other, now + 23 * HOUR);
    live.expire(now + DAY);
    assert!(live.is_taken("ff_a", router, now + DAY), "it does so still");
    assert_eq!(live.is_established(&domain(), &router), None, "and the first is forgotten");
    // Requests alone keep no address for ever.
    for hours in 20..48 {
        live.on_request("ff_a", other, gone + hours * HOUR);
    }
    assert!(!live.is_taken("ff_a", router, gone + 47 * HOUR + SECOND));
}

#[test]
fn only_so_many_that_lost_their_address_are_remembered() {
    let (router, stranger) = collision();
    let (mut live, now) = live(15);
    prove(&mut live, router, now);
    live.on_request("ff_a", stranger, now + DAY);
    assert_eq!(live.is_established(&domain(), &router), None, "there is no room for one in so few");
}

/// Fails where a start puts every key into the write buffer: all of them were written again.
#[test]
fn a_start_writes_nothing_that_is_on_disk() {
    let now = Instant::now();
    let known = |keys: &[PublicKey]| {
        let kept = KeyRecord { last: now, established: false };
        keys.iter().map(|key| (KeyId { domain: domain(), key: *key }, kept)).collect::<Keys>()
    };
    let start = |max, keys: &[PublicKey]| {
        let write_buffer = WriteBuffer::default();
        let live = LiveKeys::new(&config(max), known(keys), write_buffer.clone(), now);
        (live.len(), write_buffer.len())
    };
    let keys: Vec<_> = (0..100).map(key).collect();
    assert_eq!(start(100, &keys), (100, 0));
    assert_eq!(start(50, &keys), (47, 53), "what goes is taken from disk");
    let (first, second) = collision();
    assert_eq!(start(100, &[first, second]), (1, 1));
}

#[test]
fn remembered_keys_are_bounded_too() {
    let now = Instant::now();
    let kept = KeyRecord { last: now, established: false };
    let known = (0..100).map(|n| (id(n), kept)).collect();
    let live = LiveKeys::new(&config(10), known, WriteBuffer::default(), now);
    assert_eq!(live.len(), 10);
}

proptest! {
    #[test]
    fn brokers_that_exchange_snapshots_have_the_same_keys(
        first in vec((0..40_u32, 0..100_u64, any::<bool>()), 0..60),
        second in vec((0..40_u32, 0..100_u64, any::<bool>()), 0..60),
    ) {
        let (mut one, now) = live(1_000);
        let mut other = live(1_000).0;
        for (live, words) in [(&mut one, &first), (&mut other, &second)] {
            for (n, at, proves) in words {
                let at = now + Duration::from_secs(*at);
                if *proves { prove(live, key(*n), at) } else { live.on_request("ff_a", key(*n), at) }
            }
        }
        let now = now + HOUR;
        other.on_chunk(&one.chunk(&question(), now), now);
        one.on_chunk(&other.chunk(&question(), now), now);
        let known = |live: &LiveKeys| -> Vec<_> {
            live.chunk(&question(), now).keys.into_iter().map(|(key, age)| (key, age.has_handshake)).collect()
        };
        prop_assert_eq!(known(&one), known(&other));
        one.expire(now + DAY.saturating_sub(Duration::from_secs(3_550)));
        for live in [&one, &other] {
            let established = known(live).iter().filter(|(_, established)| *established).count();
            let counts = LiveKeyCounts { established, unestablished: live.len() - established, unrequested: 0 };
            prop_assert_eq!(live.counts().map(|(_, counts)| counts).collect::<Vec<_>>(), [counts]);
        }
    }
}

#[test]
fn denied_keys_are_forgotten_and_come_by_no_way() {
    use wgkex_common::access_lists::{AllowList, Entry, List};
    let (mut live, now) = live(10);
    live.on_request("ff_a", key(1), now);
    live.on_request("ff_a", key(2), now);
    let denied = [Entry::new(List::Deny, key(1))];
    live.apply(Arc::new(Admission::of(&denied, AllowList::Off, 0)));
    assert_eq!(all(&live, question(), now), [key(2)]);
    live.on_request("ff_a", key(1), now);
    live.on_handshake(&"gw".parse().unwrap(), "ff_a", key(1), now);
    live.on_chunk(
        &SnapshotChunk {
            keys: [
                (key(1), Age { age_secs: 0, has_handshake: true }),
                (key(3), Age { age_secs: 0, has_handshake: true }),
            ]
            .into(),
            ..page_of_none()
        },
        now,
    );
    assert_eq!(all(&live, question(), now), [key(2), key(3)]);
    live.apply(Arc::default());
    live.on_request("ff_a", key(1), now);
    assert_eq!(live.len(), 3);
}

#[test]
fn a_routers_current_gateway_is_where_this_run_of_the_broker_sent_it_whatever_workers_report() {
    let (mut live, now) = live(10);
    let [gateway, thief]: [WorkerName; 2] = ["gw", "thief"].map(|name| name.parse().unwrap());
    live.on_handshake(&thief, "ff_a", key(1), now);
    live.on_request("ff_a", key(1), now);
    assert_eq!((live.last_with_handshakes(&id(1)), live.current_gateway(&id(1), now)), (Some(&thief), None));
    live.on_given(&id(1), &gateway, now);
    live.on_handshake(&gateway, "ff_a", key(1), now);
    assert_eq!(live.current_gateway(&id(1), now), Some(&gateway));
    live.on_request("ff_a", key(1), now + HOUR);
    assert_eq!(live.current_gateway(&id(1), now + HOUR), Some(&gateway), "it stays when the router comes again");
    live.on_given(&id(2), &gateway, now);
    assert_eq!(live.current_gateway(&id(2), now), None, "a key that is not live");
}
