use crate::wire::message::Age;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn name(name: &str) -> BrokerName {
    name.parse().unwrap()
}

fn domain(name: &str) -> Domain {
    Domain::new(name, &["ff_".into()]).unwrap()
}

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32]).unwrap()
}

fn hello() -> Hello {
    Hello::broker(vec!["ff_a".into(), "ff_b".into()], 1)
}

fn chunk(broker: &BrokerName, request: &SyncRequest, keys: &[u8], more: bool) -> SnapshotChunk {
    let keys = keys.iter().map(|n| (key(*n), Age { age_secs: 1, has_handshake: false })).collect();
    SnapshotChunk { broker: broker.clone(), domain: request.domain.clone(), after: request.after, keys, more }
}

/// A client that has a bus, with brokers, one after the other.
struct World {
    client: SyncClient,
    now: Instant,
}

impl World {
    fn new(own: Participant, selection: PeerSelection, brokers: &[&str]) -> Self {
        let (mut client, now) = (SyncClient::new(own, selection, [domain("ff_a"), domain("ff_b")]), Instant::now());
        for broker in brokers {
            client.broker(&name(broker), Some(&hello()), now);
        }
        client.online(now, Duration::ZERO);
        Self { client, now }
    }

    fn worker(brokers: &[&str]) -> Self {
        Self::new(Participant::Worker("gw".parse().unwrap()), PeerSelection::Sticky, brokers)
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn ask(&mut self) -> Option<(BrokerName, SyncRequest)> {
        self.client.ask(self.now)
    }

    /// Makes the broker that is asked answer all requests, with no keys; returns its name.
    fn round(&mut self) -> Option<BrokerName> {
        let mut asked = None;
        while let Some((broker, request)) = self.ask() {
            assert!(self.client.apply(&chunk(&broker, &request, &[], false)));
            asked = Some(broker);
        }
        asked
    }
}

#[test]
fn all_keys_are_asked_for_page_by_page_and_domain_by_domain() {
    let mut world = World::worker(&["b1"]);
    let mut asked = Vec::new();
    for (keys, more) in [(&[1, 2][..], true), (&[7], true), (&[], false), (&[3], false)] {
        let (broker, request) = world.ask().unwrap();
        assert_eq!(world.ask(), None, "one request at a time");
        assert!(world.client.apply(&chunk(&broker, &request, keys, more)));
        assert_eq!((request.from, request.younger_than), (Participant::Worker("gw".parse().unwrap()), None));
        asked.push((request.domain, request.after));
    }
    let wanted = [("ff_a", None), ("ff_a", Some(key(2))), ("ff_a", Some(key(7))), ("ff_b", None)];
    assert_eq!(asked, wanted.map(|(domain, after)| (domain.to_owned(), after)));
    assert_eq!(world.ask(), None, "it rests");
}

#[test]
fn after_a_round_only_newer_keys_are_requested() {
    let mut world = World::worker(&["b1"]);
    world.round();
    world.pass(REQUEST_INTERVAL / 2);
    assert_eq!(world.ask(), None);
    world.pass(REQUEST_INTERVAL / 2);
    let (_, request) = world.ask().unwrap();
    assert_eq!(request.younger_than, Some(21), "since the last round began, and what was under way then");
    world.client.offline();
    world.pass(600 * SECOND);
    assert_eq!((world.ask(), world.client.due()), (None, None));
    world.client.online(world.now, Duration::ZERO);
    let (_, request) = world.ask().unwrap();
    assert_eq!(request.younger_than, Some(621), "a round that did not come to its end does not count");
}

#[test]
fn a_program_that_removed_keys_requests_all_of_them_at_once() {
    let mut world = World::worker(&["b1"]);
    world.round();
    world.client.keys_removed(world.now);
    assert_eq!(world.ask().unwrap().1.younger_than, None);
    world.client.keys_removed(world.now);
    world.client.offline();
    world.client.keys_removed(world.now);
    assert_eq!(world.ask(), None, "without a bus nobody is asked");
    world.client.online(world.now, Duration::ZERO);
    assert_eq!(world.ask().unwrap().1.younger_than, None);
}

/// Lets so much time pass, second by second, and returns the requests meanwhile.
fn asked_within(world: &mut World, time: Duration) -> Vec<(BrokerName, SyncRequest)> {
    let end = world.now + time;
    let mut asked = Vec::new();
    while world.now < end {
        world.pass(SECOND);
        asked.extend(world.ask());
    }
    asked
}

#[test]
fn one_that_does_not_answer_is_asked_again_and_then_passed_over_for_a_while() {
    let mut world = World::worker(&["b1", "b2"]);
    let first = world.round().unwrap();
    world.pass(REQUEST_INTERVAL);
    assert_eq!(world.round().as_ref(), Some(&first), "it stays with one that answers");
    world.pass(REQUEST_INTERVAL);
    assert_eq!(world.ask().unwrap().0, first);
    let asked = asked_within(&mut world, 7 * CHUNK_TIMEOUT);
    let [(again, _), (once_more, _), (second, request)] = &asked[..] else { panic!("{asked:?}") };
    assert!(*again == first && *once_more == first && *second != first);
    assert_eq!(request.younger_than, None, "the other one is asked for all");
    world.client.broker(second, None, world.now);
    assert!(asked_within(&mut world, 6 * CHUNK_TIMEOUT).iter().all(|(broker, _)| broker == second));
    assert_eq!(asked_within(&mut world, COOLDOWN)[0].0, first, "its time is over");
}

#[test]
fn another_broker_goes_on_where_the_first_one_died() {
    let mut world = World::worker(&["b1", "b2"]);
    let (first, request) = world.ask().unwrap();
    assert!(world.client.apply(&chunk(&first, &request, &[1, 2], true)));
    assert_eq!(world.ask().unwrap().1.after, Some(key(2)));
    let asked = asked_within(&mut world, 7 * CHUNK_TIMEOUT);
    let (second, request) = asked.last().unwrap();
    assert_ne!(*second, first);
    assert_eq!((request.domain.as_str(), request.after), ("ff_a", Some(key(2))));
}

#[test]
fn on_a_slow_line_a_page_may_come_late() {
    let mut world = World::worker(&["b1", "b2"]);
    let (broker, request) = world.ask().unwrap();
    let asked = asked_within(&mut world, 2 * CHUNK_TIMEOUT);
    assert_eq!(asked, [(broker.clone(), request.clone())]);
    let chunk = chunk(&broker, &request, &[1, 2], true);
    assert!(world.client.apply(&chunk));
    assert!(!world.client.apply(&chunk), "the answer to the repetition is not wanted any more");
    assert_eq!(world.ask().unwrap().1.after, Some(key(2)));
    assert!(!world.client.apply(&chunk));
}

#[test]
fn a_long_round_requests_keys_since_the_start_of_the_last_one() {
    let mut world = World::worker(&["b1"]);
    world.round();
    world.pass(300 * SECOND);
    let (broker, request) = world.ask().unwrap();
    assert_eq!(request.younger_than, Some(311));
    world.pass(2 * SECOND);
    assert!(world.client.apply(&chunk(&broker, &request, &[], false)));
    // Processing the keys of that chunk takes long.
    world.pass(60 * SECOND);
    assert_eq!(world.ask().unwrap().1.younger_than, Some(373));
}

#[test]
fn all_keys_are_asked_for_again_after_an_hour() {
    let mut world = World::worker(&["b1"]);
    let mut all = 0;
    for _ in 0..=2 * FULL_REQUEST_INTERVAL.as_secs() / REQUEST_INTERVAL.as_secs() {
        let (broker, request) = world.ask().unwrap();
        all += u32::from(request.younger_than.is_none());
        assert!(world.client.apply(&chunk(&broker, &request, &[], false)));
        world.round();
        world.pass(REQUEST_INTERVAL);
    }
    assert_eq!(all, 3);
}

#[test]
fn a_broker_that_serves_more_of_the_domains_is_asked_first() {
    for half in ["a", "z"] {
        let mut world = World::worker(&[]);
        world.client.broker(&name(half), Some(&Hello::broker(vec!["ff_b".into()], 1)), world.now);
        world.client.broker(&name("m"), Some(&hello()), world.now);
        assert_eq!(world.round(), Some(name("m")));
    }
}

#[test]
fn a_broker_is_new_when_it_comes_and_when_it_was_started_anew() {
    let mut world = World::worker(&[]);
    let domains = || vec!["ff_a".to_owned()];
    for (instance, is_new) in [(1, true), (1, false), (2, true), (2, false)] {
        assert_eq!(world.client.broker(&name("b1"), Some(&Hello::broker(domains(), instance)), world.now), is_new);
    }
    assert!(!world.client.broker(&name("b1"), None, world.now));
    assert!(world.client.broker(&name("b1"), Some(&Hello::broker(domains(), 2)), world.now));
    assert!(!world.client.broker(&name("w"), Some(&Hello::worker(domains())), world.now), "it does not answer");
}

#[test]
fn a_broker_asks_each_other_one_in_turn_and_never_itself() {
    let mut world = World::new(Participant::Broker(name("b2")), PeerSelection::RoundRobin, &["b1", "b2", "b3"]);
    let mut asked = Vec::new();
    for _ in 0..4 {
        asked.extend(world.round());
        world.pass(REQUEST_INTERVAL);
    }
    assert_eq!(asked, ["b1", "b3", "b1", "b3"].map(name));
}

#[test]
fn a_new_broker_is_asked_soon() {
    let mut world = World::worker(&[]);
    assert_eq!(world.ask(), None);
    world.client.broker(&name("b1"), Some(&hello()), world.now);
    world.pass(JITTER);
    assert!(world.ask().is_some());
}

#[test]
fn only_the_answer_to_its_question_counts() {
    let mut world = World::worker(&["b1"]);
    let (broker, request) = world.ask().unwrap();
    let right = chunk(&broker, &request, &[1], true);
    let big: Vec<_> = (1..=2).collect();
    for wrong in [
        SnapshotChunk { broker: name("b9"), ..right.clone() },
        SnapshotChunk { domain: "ff_b".into(), ..right.clone() },
        SnapshotChunk { after: Some(key(1)), ..right.clone() },
    ] {
        assert!(!world.client.apply(&wrong));
    }
    assert!(
        !world.client.apply(&SnapshotChunk {
            keys: (0..=CHUNK_KEYS_MAX)
                .map(|n| {
                    let mut bytes = [big[0]; 32];
                    bytes[..8].copy_from_slice(&n.to_be_bytes());
                    (PublicKey::from_bytes(bytes).unwrap(), Age { age_secs: 0, has_handshake: false })
                })
                .collect(),
            ..right.clone()
        })
    );
    assert!(world.client.apply(&right));
    assert!(!world.client.apply(&right), "and only once");
    let (broker, request) = world.ask().unwrap();
    // A chunk that leads back would make the round endless.
    let back = chunk(&broker, &request, &[1], true);
    assert!(world.client.apply(&back));
    assert_eq!(world.ask().unwrap().1.domain, "ff_b");
}

#[test]
fn brokers_are_bounded() {
    let mut world = World::worker(&[]);
    for n in 0..SYNC_BROKERS_MAX + 10 {
        world.client.broker(&name(&n.to_string()), Some(&hello()), world.now);
    }
    assert_eq!(world.client.brokers.len(), SYNC_BROKERS_MAX);
    assert!(
        world.client.brokers.contains_key((SYNC_BROKERS_MAX + 9).to_string().as_str()),
        "those that never answered give way"
    );
}
