use proptest::prelude::*;
use wgkex_common::access_lists::{AllowList, Entry, List};

use super::*;

fn key(n: usize) -> PublicKey {
    let mut bytes = [0x42; 32];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

fn domains() -> [Domain; 2] {
    ["ff_a", "ff_b"].map(|name| Domain::new(name, &["ff_".into()]).unwrap())
}

fn id(domain: usize, n: usize) -> KeyId {
    KeyId { domain: domains()[domain].clone(), key: key(n) }
}

fn in_flight() -> InFlight {
    InFlight::new(domains().into(), Arc::default())
}

fn worker(name: &str) -> WorkerName {
    name.parse().unwrap()
}

fn installed(table: &mut InFlight, name: &str, KeyId { domain, key }: &KeyId) {
    table.confirmed(&worker(name), domain.name(), [(*key, Ok(()))]);
}

fn rejected(table: &mut InFlight, name: &str, KeyId { domain, key }: &KeyId, reason: RejectReason) {
    table.confirmed(&worker(name), domain.name(), [(*key, Err(reason))]);
}

fn names(names: &BTreeSet<WorkerName>) -> Vec<&str> {
    names.iter().map(WorkerName::as_str).collect()
}

/// Takes the publications that may be sent now.
fn send(table: &mut InFlight, now: Instant) -> Vec<Publication> {
    std::iter::from_fn(|| table.next(now)).collect()
}

#[test]
fn an_outcome_reaches_every_request_for_that_key_in_that_domain_and_no_other() {
    let (mut table, now) = (in_flight(), Instant::now());
    let [ours, elsewhere, another] = [id(0, 1), id(1, 1), id(0, 2)];
    installed(&mut table, "early", &ours);
    let [first, second, in_b, other] =
        [&ours, &ours, &elsewhere, &another].map(|key| table.request(key, true, now).unwrap().begun);
    installed(&mut table, "gw1", &ours);
    rejected(&mut table, "gw2", &ours, RejectReason::Full);
    for begun in [first, second] {
        let Confirmations { installed, rejected } = table.confirmations(&ours, begun);
        assert_eq!(names(&installed), ["gw1"]);
        assert_eq!(rejected, [(worker("gw2"), RejectReason::Full)].into());
    }
    assert_eq!(table.confirmations(&elsewhere, in_b), Confirmations::default());
    assert_eq!(table.confirmations(&another, other), Confirmations::default());
    let later = table.request(&ours, true, now).unwrap().begun;
    assert_eq!(table.confirmations(&ours, later), Confirmations::default(), "what was said before is for others");
    rejected(&mut table, "gw1", &ours, RejectReason::Removed);
    assert_eq!(names(&table.confirmations(&ours, first).installed), [""; 0]);
}

#[test]
fn the_load_is_what_waits_and_a_trace_takes_nothing() {
    let (mut table, now) = (in_flight(), Instant::now());
    let [first, second] = [id(0, 1), id(0, 2)];
    let at = |seconds| now + Duration::from_secs(seconds);
    assert_eq!((table.load(now), table.trace(&first, now)), (InFlightLoad::default(), None));
    let begun = table.request(&first, true, now).unwrap().begun;
    let _ = table.publish(&second, false, at(1));
    let load = InFlightLoad { queued: 2, unacknowledged: 0, waiting: 1, oldest: Some(Duration::from_secs(3)) };
    assert_eq!(table.load(at(3)), load);
    let sent = send(&mut table, at(3));
    assert_eq!((table.load(at(3)).queued, table.load(at(3)).unacknowledged), (0, 2));
    for publication in &sent {
        table.settle(publication, true);
    }
    table.timed_out(&first, true, at(4));
    table.end(&first, begun);
    assert_eq!(table.load(at(4)), InFlightLoad::default());
    installed(&mut table, "gw1", &first);
    for _ in 0..2 {
        let trace = table.trace(&first, at(6)).unwrap();
        assert_eq!((trace.late, trace.waiting, trace.queued), (Some(Duration::from_secs(2)), 0, None));
        assert_eq!(trace.outcomes, [(worker("gw1"), Ok(()))].into());
        assert_eq!(names(&table.late(&first, at(6))), ["gw1"], "looking takes nothing");
    }
    assert_eq!(names(&table.take_late(&first, at(6))), ["gw1"]);
    assert_eq!(table.trace(&first, at(6)), None);
}

#[test]
fn a_gateway_that_goes_has_no_key_any_more() {
    let (mut table, now) = (in_flight(), Instant::now());
    let keys = [id(0, 1), id(1, 1)];
    let begun = keys.each_ref().map(|key| table.request(key, true, now).unwrap().begun);
    let has = |table: &InFlight| [0, 1].map(|n| table.confirmations(&keys[n], begun[n]).installed.len());
    for worker in ["gw1", "gw2"] {
        for key in &keys {
            installed(&mut table, worker, key);
        }
    }
    table.invalidate(&worker("gw1"), Some("ff_a"));
    assert_eq!(has(&table), [1, 2]);
    table.invalidate(&worker("gw2"), None);
    assert_eq!(has(&table), [0, 1]);
}

#[test]
fn late_confirmations_are_kept_for_the_routers_next_request() {
    let (mut table, now) = (in_flight(), Instant::now());
    let [ours, other, elsewhere] = [id(0, 1), id(0, 2), id(1, 1)];
    let time_out = |table: &mut InFlight| {
        let begun = table.request(&ours, true, now).unwrap().begun;
        installed(table, "unread", &ours);
        table.timed_out(&ours, true, now);
        table.end(&ours, begun);
    };
    time_out(&mut table);
    for worker in ["gw1", "gw2", "gw3", "gw4"] {
        installed(&mut table, worker, &ours);
    }
    rejected(&mut table, "gw2", &ours, RejectReason::Full);
    rejected(&mut table, "gw4", &ours, RejectReason::Removed);
    installed(&mut table, "gw1", &elsewhere);
    installed(&mut table, "gw1", &other);
    assert!(table.take_late(&elsewhere, now).is_empty() && table.take_late(&other, now).is_empty());
    table.invalidate(&worker("gw1"), Some("ff_a"));
    installed(&mut table, "gw1", &ours);
    table.invalidate(&worker("gw1"), Some("ff_b"));
    installed(&mut table, "gw5", &ours);
    table.invalidate(&worker("gw5"), None);
    assert_eq!(names(&table.take_late(&ours, now)), ["gw1", "gw3"], "who lost it since does not have it");
    assert!(table.take_late(&ours, now).is_empty(), "the next request has to ask");
    time_out(&mut table);
    installed(&mut table, "gw1", &ours);
    assert!(table.take_late(&ours, now + RETRY_WINDOW).is_empty(), "it is too long ago");
    time_out(&mut table);
    table.invalidate(&worker("gw1"), None);
    table.expire(now + RETRY_WINDOW);
    assert!(table.late_keys == 0 && table.invalidated.is_empty());
}

#[test]
fn late_keys_of_a_flood_are_bounded() {
    let (mut table, now) = (in_flight(), Instant::now());
    (0..LATE_MAX).for_each(|n| table.timed_out(&id(0, n), false, now));
    assert_eq!(table.late_keys, LATE_MAX / 2, "routers that are known have places all the same");
    (0..2 * LATE_MAX).for_each(|n| table.timed_out(&id(0, n), true, now));
    assert_eq!((table.late_keys, table.keys.len()), (LATE_MAX, LATE_MAX));
    table.invalidate_late();
    assert!(table.late_keys == 0 && table.keys.is_empty());
}

#[test]
fn a_worker_with_many_outcomes_crowds_out_no_other() {
    let (mut table, now) = (in_flight(), Instant::now());
    let ours = id(0, 1);
    let begun = table.request(&ours, true, now).unwrap().begun;
    table.timed_out(&ours, true, now);
    for _ in 0..1_000 {
        installed(&mut table, "thief", &ours);
        table.invalidate(&worker("thief"), None);
    }
    installed(&mut table, "gw", &ours);
    assert_eq!(names(&table.confirmations(&ours, begun).installed), ["gw"]);
    assert!(table.keys[&ours].outcomes.len() == 1 && table.invalidated.len() == 1);
    assert_eq!(names(&table.take_late(&ours, now)), ["gw"]);
}

#[test]
fn a_request_that_ends_leaves_nothing_behind() {
    let (mut table, now) = (in_flight(), Instant::now());
    let ours = id(0, 1);
    let [first, second] = [(); 2].map(|()| table.request(&ours, true, now).unwrap());
    let sent = send(&mut table, now);
    table.settle(&sent[0], true);
    assert_eq!(table.is_published(&ours, first.publication), Some(true));
    table.end(&ours, first.begun);
    assert_eq!(table.keys.len(), 1);
    table.end(&ours, second.begun);
    assert!(table.keys.is_empty() && table.waiting.is_empty());
}

#[test]
fn an_answer_is_given_again_while_it_is_fresh_and_only_so_many_are_kept() {
    let (mut table, now) = (in_flight(), Instant::now());
    table.cache(&id(0, 1), Some(worker("gw1")), now);
    table.cache(&id(0, 2), None, now);
    let soon = now + ANSWER_TTL.mul_f64(0.99);
    assert_eq!(table.cached(&id(0, 1), soon).unwrap().worker, Some(worker("gw1")));
    assert_eq!(table.cached(&id(0, 2), soon).unwrap().worker, None);
    assert_eq!(table.cached(&id(1, 1), soon), None);
    assert_eq!(table.cached(&id(0, 1), now + ANSWER_TTL), None);
    (0..CACHED_ANSWERS_MAX + 10).for_each(|n| table.cache(&id(0, n), None, now));
    assert_eq!((table.answers.len(), table.keys.len()), (CACHED_ANSWERS_MAX, CACHED_ANSWERS_MAX));
    table.cache(&id(1, 0), None, now + ANSWER_TTL);
    assert_eq!((table.answers.len(), table.keys.len()), (1, 1));
}

#[test]
fn a_queue_has_so_many_places_and_no_key_takes_two() {
    let (mut table, now) = (in_flight(), Instant::now());
    for n in 0..QUEUED_MAX {
        assert!(!table.request(&id(0, n), false, now).unwrap().is_joined);
        assert!(table.request(&id(0, n), false, now).unwrap().is_joined);
    }
    assert!(table.request(&id(0, QUEUED_MAX), false, now).is_none());
    assert!(table.request(&id(0, QUEUED_MAX), true, now).is_some(), "the established have their own");
    assert_eq!((table.unestablished.keys.len(), table.established.keys.len()), (QUEUED_MAX, 1));
    assert!(table.request(&id(0, 7), true, now).unwrap().is_joined, "one that shook hands meanwhile changes over");
    assert_eq!((table.unestablished.keys.len(), table.established.keys.len()), (QUEUED_MAX - 1, 2));
}

#[test]
fn only_so_many_that_never_shook_hands_are_sent_at_once_and_the_others_go_first() {
    let (mut table, now) = (in_flight(), Instant::now());
    (0..1_000).for_each(|n| drop(table.request(&id(0, n), false, now)));
    assert_eq!(send(&mut table, now).len(), UNESTABLISHED_SENT_MAX);
    (1_000..2_000).for_each(|n| drop(table.request(&id(0, n), true, now)));
    let sent = send(&mut table, now);
    assert_eq!(sent.len(), SENT_MAX - UNESTABLISHED_SENT_MAX);
    assert!(sent.iter().all(|publication| publication.is_established));
    table.settle(&sent[0], true);
    assert_eq!(table.next(now).unwrap().key, id(0, 1_000 + SENT_MAX - UNESTABLISHED_SENT_MAX));
    assert_eq!(table.next(now), None);
}

#[test]
fn a_request_joins_a_sent_publication_only_until_the_first_outcome() {
    let (mut table, now) = (in_flight(), Instant::now());
    let ours = id(0, 1);
    let first = table.request(&ours, true, now).unwrap();
    let sent = send(&mut table, now);
    assert_eq!(table.request(&ours, true, now).unwrap().publication, first.publication);
    installed(&mut table, "gw1", &ours);
    let third = table.request(&ours, true, now).unwrap();
    assert!(!third.is_joined && third.publication > first.publication);
    table.settle(&sent[0], true);
    assert_eq!([&first, &third].map(|ticket| table.is_published(&ours, ticket.publication)), [Some(true), None]);
}

#[test]
fn a_key_that_waits_too_long_or_is_denied_is_given_up() {
    let (mut table, now) = (in_flight(), Instant::now());
    let [late, denied] = [id(0, 1), id(0, 2)];
    let ticket = table.request(&late, false, now).unwrap();
    let nearly = now + WAIT_MAX.mul_f64(0.99);
    let other = table.request(&denied, true, nearly).unwrap();
    table.expire(nearly);
    assert_eq!(table.is_published(&late, ticket.publication), None);
    table.expire(now + WAIT_MAX);
    assert_eq!(table.is_published(&late, ticket.publication), Some(false));
    assert!(!table.request(&late, false, now + WAIT_MAX).unwrap().is_joined, "it may come again");
    let admission = Admission::of(&[Entry::new(List::Deny, key(2))], AllowList::Off, 0);
    table.apply(Arc::new(admission), nearly);
    assert_eq!(table.is_published(&denied, other.publication), Some(false));
    assert_eq!((table.unestablished.keys.len(), table.established.keys.len()), (1, 0));
    drop(table.request(&denied, true, nearly));
    assert_eq!(send(&mut table, nearly).len(), 1, "nor is it published later");
    let sent = Publication { key: denied, number: 0, is_established: true, since: nearly };
    assert!(table.is_given_up(&sent, nearly));
}

#[derive(Debug, Clone)]
enum Step {
    Request(usize, bool),
    Publish(usize, bool),
    Send,
    Acknowledge(bool),
    Confirm(usize, usize, bool),
    Remove(usize, bool),
    RemoveAll,
    End(usize, bool),
    TakeLate(usize),
    Answer(usize),
    Expire,
    Deny(usize),
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    prop_oneof![
        4 => (0..6_usize, any::<bool>()).prop_map(|(key, established)| Request(key, established)),
        1 => (0..6_usize, any::<bool>()).prop_map(|(key, established)| Publish(key, established)),
        3 => Just(Send),
        3 => any::<bool>().prop_map(Acknowledge),
        3 => (0..3_usize, 0..6_usize, any::<bool>()).prop_map(|(worker, key, ok)| Confirm(worker, key, ok)),
        1 => (0..3_usize, any::<bool>()).prop_map(|(worker, all)| Remove(worker, all)),
        1 => Just(RemoveAll),
        3 => (0..6_usize, any::<bool>()).prop_map(|(request, late)| End(request, late)),
        1 => (0..6_usize).prop_map(TakeLate),
        1 => (0..6_usize).prop_map(Answer),
        1 => Just(Expire),
        1 => (0..6_usize).prop_map(Deny),
    ]
}

/// Every counter of the table equals a recount, and no idle entry is kept.
fn recount(table: &InFlight) {
    let count = |wanted: &dyn Fn(&Flight) -> bool| table.keys.values().filter(|flight| wanted(flight)).count();
    assert_eq!(table.late_keys, count(&|flight| flight.late.is_some()));
    assert_eq!(table.answers.len(), count(&|flight| flight.answer.is_some()));
    let sent = table.established.sent + table.unestablished.sent;
    assert_eq!(sent, table.keys.values().map(|flight| flight.sent.len()).sum::<usize>());
    assert_eq!(count(&Flight::is_idle), 0);
    assert_eq!(table.waiting.len(), count(&|flight| !flight.requests.is_empty()));
    let waits = |key: &usize| table.keys.get(&id(key % 2, *key)).is_some_and(|flight| !flight.requests.is_empty());
    assert_eq!((0..6).filter(waits).map(|n| id(n % 2, n)).collect::<HashSet<_>>(), table.waiting);
    for (PublishQueue { keys: queue, .. }, is_established) in
        [(&table.unestablished, false), (&table.established, true)]
    {
        let queued: HashSet<_> = queue.iter().collect();
        assert_eq!(queued.len(), queue.len(), "no key is queued twice");
        let is_queued =
            |flight: &Flight| flight.queued.as_ref().is_some_and(|queued| queued.is_established == is_established);
        assert_eq!(queue.len(), count(&is_queued));
        assert!(queue.iter().all(|key| is_queued(&table.keys[key])));
    }
    assert!(table.invalidated.is_empty() || table.late_keys > 0 || table.invalidated.len() <= 9);
}

proptest! {
    #[test]
    fn whatever_happens_the_numbers_are_those_of_a_recount(steps in prop::collection::vec((step(), 0..40_u64), 0..120)) {
        let (mut table, mut now) = (in_flight(), Instant::now());
        let (mut requests, mut sent) = (VecDeque::new(), VecDeque::new());
        let key = |n: usize| id(n % 2, n);
        for (step, seconds) in steps {
            now += Duration::from_secs(seconds);
            match step {
                Step::Request(n, established) => {
                    requests.extend(table.request(&key(n), established, now).map(|ticket| (key(n), ticket.begun)));
                }
                Step::Publish(n, established) => drop(table.publish(&key(n), established, now)),
                Step::Send => sent.extend(table.next(now)),
                Step::Acknowledge(ok) => sent.pop_front().iter().for_each(|sent| table.settle(sent, ok)),
                Step::Confirm(worker, n, true) => installed(&mut table, &worker.to_string(), &key(n)),
                Step::Confirm(worker, n, false) => {
                    rejected(&mut table, &worker.to_string(), &key(n), RejectReason::Full);
                }
                Step::Remove(name, all) => table.invalidate(&worker(&name.to_string()), (!all).then_some("ff_a")),
                Step::RemoveAll => table.invalidate_late(),
                Step::End(n, late) => {
                    if let Some((key, begun)) = requests.remove(n) {
                        if late {
                            table.timed_out(&key, n % 2 == 0, now);
                        }
                        table.end(&key, begun);
                    }
                }
                Step::TakeLate(n) => drop(table.take_late(&key(n), now)),
                Step::Answer(n) => table.cache(&key(n), None, now),
                Step::Expire => table.expire(now),
                Step::Deny(n) => {
                    let denied = [Entry::new(List::Deny, key(n).key)];
                    table.apply(Arc::new(Admission::of(&denied, AllowList::Off, 0)), now);
                }
            }
            recount(&table);
        }
        for (key, begun) in &requests {
            table.end(key, *begun);
        }
        for sent in &sent {
            table.settle(sent, true);
        }
        while let Some(sent) = table.next(now) {
            table.settle(&sent, true);
        }
        table.expire(now + RETRY_WINDOW);
        prop_assert!(table.keys.is_empty());
    }
}
