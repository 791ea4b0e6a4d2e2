use crate::message::Ages;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn domain(name: &str) -> Domain {
    Domain::new(name, &["ff_".into()]).unwrap()
}

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32]).unwrap()
}

fn page(broker: &str, question: &Question, keys: &[u8], more: bool) -> Page {
    let keys = keys.iter().map(|n| (key(*n), Ages(1, 1, false))).collect();
    Page { broker: broker.into(), domain: question.domain.clone(), after: question.after, keys, more }
}

/// An asker that has a bus, with brokers, one after the other.
struct World {
    asker: Asker,
    now: Instant,
}

impl World {
    fn new(own: Party, manner: Manner, brokers: &[&str]) -> Self {
        let (mut asker, now) = (Asker::new(own, manner, [domain("ff_a"), domain("ff_b")]), Instant::now());
        for broker in brokers {
            asker.broker(broker, true, now);
        }
        asker.online(now);
        Self { asker, now }
    }

    fn worker(brokers: &[&str]) -> Self {
        Self::new(Party::Worker("gw".into()), Manner::One, brokers)
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn ask(&mut self) -> Option<(String, Question)> {
        self.asker.ask(self.now)
    }

    /// Has the broker that is asked answer everything that it is asked, with no keys; says who it was.
    fn round(&mut self) -> Option<String> {
        let mut asked = None;
        while let Some((broker, question)) = self.ask() {
            assert!(self.asker.hear(&page(&broker, &question, &[], false)));
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
        let (broker, question) = world.ask().unwrap();
        assert_eq!(world.ask(), None, "one question at a time");
        assert!(world.asker.hear(&page(&broker, &question, keys, more)));
        assert_eq!((question.from, question.younger_than), (Party::Worker("gw".into()), None));
        asked.push((question.domain, question.after));
    }
    let wanted = [("ff_a", None), ("ff_a", Some(key(2))), ("ff_a", Some(key(7))), ("ff_b", None)];
    assert_eq!(asked, wanted.map(|(domain, after)| (domain.to_owned(), after)));
    assert_eq!(world.ask(), None, "it rests");
}

#[test]
fn then_it_asks_for_what_came_since() {
    let mut world = World::worker(&["b1"]);
    world.round();
    world.pass(PERIOD / 2);
    assert_eq!(world.ask(), None);
    world.pass(PERIOD / 2);
    let (_, question) = world.ask().unwrap();
    assert_eq!(question.younger_than, Some(21), "since the last round began, and what was under way then");
    world.asker.offline();
    world.pass(600 * SECOND);
    assert_eq!((world.ask(), world.asker.due()), (None, None));
    world.asker.online(world.now);
    let (_, question) = world.ask().unwrap();
    assert_eq!(question.younger_than, Some(621), "a round that did not come to its end does not count");
}

#[test]
fn one_that_does_not_answer_is_passed_over_for_a_while() {
    let mut world = World::worker(&["b1", "b2"]);
    let first = world.round().unwrap();
    world.pass(PERIOD);
    assert_eq!(world.round().as_ref(), Some(&first), "it stays with one that answers");
    world.pass(PERIOD);
    assert_eq!(world.ask().unwrap().0, first);
    world.pass(PATIENCE);
    let (second, question) = world.ask().unwrap();
    assert_ne!(second, first);
    assert_eq!(question.younger_than, None, "the other one is asked for all");
    world.asker.broker(&second, false, world.now);
    world.pass(PATIENCE);
    assert_eq!(world.ask(), None, "nobody is left");
    world.asker.broker(&first, true, world.now);
    world.pass(PERIOD);
    assert_eq!(world.ask().unwrap().0, first);
}

#[test]
fn on_a_slow_line_late_answers_count_until_another_broker_is_asked() {
    let mut world = World::worker(&["b1"]);
    for (keys, more) in [(&[1, 2][..], true), (&[7], false), (&[3], false)] {
        let (broker, question) = world.ask().unwrap();
        world.pass(PATIENCE);
        assert_eq!(world.ask(), None, "there is no other");
        world.pass(SECOND);
        let page = page(&broker, &question, keys, more);
        assert!(world.asker.hear(&page));
        assert!(!world.asker.hear(&page), "once");
    }
    assert!(world.ask().unwrap().1.younger_than.is_some(), "it has all");

    let mut world = World::worker(&["b1", "b2"]);
    let (first, question) = world.ask().unwrap();
    world.pass(PATIENCE);
    let (second, _) = world.ask().unwrap();
    assert_ne!(first, second);
    assert!(!world.asker.hear(&page(&first, &question, &[1], false)));
}

#[test]
fn a_broker_asks_each_other_one_in_turn_and_never_itself() {
    let mut world = World::new(Party::Broker("b2".into()), Manner::Each, &["b1", "b2", "b3"]);
    let mut asked = Vec::new();
    for _ in 0..4 {
        asked.extend(world.round());
        world.pass(PERIOD);
    }
    assert_eq!(asked, ["b1", "b3", "b1", "b3"]);
}

#[test]
fn a_new_broker_is_asked_soon() {
    let mut world = World::worker(&[]);
    assert_eq!(world.ask(), None);
    world.asker.broker("b1", true, world.now);
    assert_eq!(world.asker.due(), Some(world.now));
    assert!(world.ask().is_some());
}

#[test]
fn only_the_answer_to_its_question_counts() {
    let mut world = World::worker(&["b1"]);
    let (broker, question) = world.ask().unwrap();
    let right = page(&broker, &question, &[1], true);
    let big: Vec<_> = (1..=2).collect();
    for wrong in [
        Page { broker: "b9".into(), ..right.clone() },
        Page { domain: "ff_b".into(), ..right.clone() },
        Page { after: Some(key(1)), ..right.clone() },
    ] {
        assert!(!world.asker.hear(&wrong));
    }
    assert!(
        !world.asker.hear(&Page {
            keys: (0..=PAGE)
                .map(|n| {
                    let mut bytes = [big[0]; 32];
                    bytes[..8].copy_from_slice(&n.to_be_bytes());
                    (PublicKey::from_bytes(bytes).unwrap(), Ages(0, 0, false))
                })
                .collect(),
            ..right.clone()
        })
    );
    assert!(world.asker.hear(&right));
    assert!(!world.asker.hear(&right), "and only once");
    let (broker, question) = world.ask().unwrap();
    // One that leads back would be asked for ever.
    let back = page(&broker, &question, &[1], true);
    assert!(world.asker.hear(&back));
    assert_eq!(world.ask().unwrap().1.domain, "ff_b");
}

#[test]
fn brokers_are_bounded() {
    let mut world = World::worker(&[]);
    for n in 0..BROKERS + 10 {
        world.asker.broker(&n.to_string(), true, world.now);
    }
    assert_eq!(world.asker.brokers.len(), BROKERS);
}
