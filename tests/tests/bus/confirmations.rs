//! When a router is answered, and with which gateway, depending on the gateways' reports about its key.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use wgkex_tests::http::Response;
use wgkex_tests::key;
use wgkex_tests::probe::Message;
use wgkex_tests::scripted::{
    Worker, WorkerBehaviour, applied, endpoint, failed, hello, key_for, key_topic, peers_of, status,
};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::wait_until;

use super::{AT_ONCE, LONG, Router, SHORT, assert_unavailable, on_both};

on_both!(
    an_original_is_not_waited_for,
    no_router_is_sent_to_an_offline_gateway,
    the_answer_comes_only_after_the_gateway_has_the_key,
    a_silent_gateway_is_followed_by_the_next_best_after_the_timeout,
    a_gateway_that_refuses_is_followed_by_the_next_best_at_once,
    invalid_confirmations_are_ignored,
    a_late_or_repeated_confirmation_answers_no_other_request,
    a_late_confirmation_answers_the_routers_next_request_at_once,
    a_late_confirmation_is_not_used_when_it_may_be_outdated,
    silence_of_all_gateways_is_503_when_the_budget_is_spent,
    rejections_of_all_gateways_are_503_at_once,
    all_full_is_429_at_once_and_one_with_room_is_enough,
    an_original_worker_is_the_fallback_when_the_others_are_silent,
    version_1_is_answered_when_any_gateway_has_the_key,
    version_1_falls_back_to_originals,
    version_1_is_published_and_503_where_all_gateways_are_offline,
    version_1_is_not_answered_from_memory_when_all_gateways_are_offline,
    version_1_is_answered_where_no_gateway_ever_published_its_state,
    one_broken_gateway_beside_a_healthy_one_keeps_no_router_waiting,
    a_second_best_that_is_slow_is_waited_for_although_another_is_broken,
    no_router_is_sent_to_a_gateway_where_its_domain_is_offline,
);

fn stack(bus: Bus, config: &str) -> Stack {
    Stack::start(Plan::new(bus).config(config))
}

fn an_original_is_not_waited_for(bus: Bus) {
    let stack = stack(bus, LONG);
    let witness = stack.witness();
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Original, 3);
    stack.wait_for_gateways(1);
    let (v2, took) = Router::v2(&stack, &key(1)).answer();
    assert_eq!((v2.status, v2.json()), (200, endpoint("gw1")));
    assert!(v2.body.contains(r#""Port":"40011""#), "{v2:?}");
    assert!(took < AT_ONCE, "{took:?}");
    let (v1, took) = Router::v1(&stack, &key(2)).answer();
    assert_eq!((v1.status, v1.body.as_str()), (200, r#"{"Message":"OK"}"#));
    assert!(took < AT_ONCE, "{took:?}");
    for key in [key(1), key(2)] {
        assert_eq!(key.len(), 44);
        assert_eq!(witness.next_on(&key_topic(DOMAIN)), key_for(DOMAIN, &key));
    }
}

fn no_router_is_sent_to_an_offline_gateway(bus: Bus) {
    let stack = stack(bus, LONG);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Original, 3);
    stack.wait_for_gateways(1);
    let serves = || stack.v2(DOMAIN, &key(1)).status == 200;
    assert!(serves());
    worker.probe.publish(peers_of("gw1", DOMAIN, "-1"));
    wait_until("-1 is heard", || (!serves()).then_some(()));
    assert_unavailable(&stack.v2(DOMAIN, &key(1)));
    worker.probe.publish(peers_of("gw1", DOMAIN, "0"));
    wait_until("0 is heard", || serves().then_some(()));
    worker.probe.publish(status("gw1", "0"));
    stack.wait_for_gateways(0);
    assert_unavailable(&stack.v2(DOMAIN, &key(1)));
    worker.probe.publish(status("gw1", "1"));
    stack.wait_for_gateways(1);
    assert!(serves());
    worker.probe.drop_connection();
    stack.wait_for_gateways(0);
    assert_unavailable(&stack.v2(DOMAIN, &key(1)));
    assert_unavailable(&stack.v1(DOMAIN, &key(1)));
}

fn the_answer_comes_only_after_the_gateway_has_the_key(bus: Bus) {
    let stack = stack(bus, LONG);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    stack.wait_for_gateways(1);
    for n in 0..3 {
        let router = Router::v2(&stack, &key(n));
        assert_eq!(worker.probe.next_on(&key_topic(DOMAIN)).text(), key(n));
        router.assert_waits();
        worker.probe.publish(applied("gw1", DOMAIN, &key(n)));
        let (response, _) = router.answer();
        assert_eq!((response.status, response.json()), (200, endpoint("gw1")));
    }
}

fn a_silent_gateway_is_followed_by_the_next_best_after_the_timeout(bus: Bus) {
    let stack = stack(bus, "confirm_timeout: 1\nconfirm_budget: 20");
    let _best = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let _next = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 100);
    let _last = Worker::start(&stack, "gw3", WorkerBehaviour::Confirms, 1000);
    stack.wait_for_gateways(3);
    let (response, took) = Router::v2(&stack, &key(1)).answer();
    assert_eq!((response.status, response.json()), (200, endpoint("gw2")));
    assert!(took >= Duration::from_secs(1) && took < AT_ONCE, "{took:?}");
    // A gateway that did not confirm is not tried first again, so that the next router does not wait.
    let (response, _) = Router::v2(&stack, &key(2)).answer();
    assert_eq!(response.json(), endpoint("gw2"));
    assert_eq!(stack.metric("wgkex_broker_confirmations_missed_total"), Some(1.0));
}

fn a_gateway_that_refuses_is_followed_by_the_next_best_at_once(bus: Bus) {
    let stack = stack(bus, LONG);
    let _best = Worker::start(&stack, "gw1", WorkerBehaviour::Refuses, 0);
    let _next = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 100);
    stack.wait_for_gateways(2);
    let (response, took) = Router::v2(&stack, &key(1)).answer();
    assert_eq!((response.status, response.json()), (200, endpoint("gw2")));
    assert!(took < AT_ONCE, "{took:?}");
}

fn invalid_confirmations_are_ignored(bus: Bus) {
    let plan = Plan::new(bus).config(SHORT).domains([DOMAIN, "ffx_b"]);
    let stack = Stack::start(plan);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let gone = Worker::start(&stack, "gone", WorkerBehaviour::Silent, 0);
    gone.probe.publish(status("gone", "0"));
    stack.wait_for_gateways(1);
    let original = stack.witness();
    let malformed = |payload: &str| wgkex_tests::probe::message("wgkex/worker/gw1/applied", payload, 1, false);
    original.publish_all([applied("gw1", DOMAIN, &key(1)), malformed("")]);
    stack.wait_for_metric("wgkex_broker_mqtt_messages_ignored_total{reason=\"payload\"}", 1.0);
    let router = Router::v2(&stack, &key(1));
    let _ = worker.probe.next_on(&key_topic(DOMAIN));
    original.publish_all([
        applied("stranger", DOMAIN, &key(1)),
        applied("gone", DOMAIN, &key(1)),
        applied("gw1", "ffx_b", &key(1)),
        applied("gw1", "ffx_none", &key(1)),
        applied("gw1", DOMAIN, &key(2)),
        failed("stranger", DOMAIN, &key(1), "refused"),
        malformed(&key(1)),
        malformed(&format!(r#"["{}"]"#, key(1))),
        malformed(&format!(r#"{{"domain":"{DOMAIN}","installed":"{}"}}"#, key(1))),
        malformed(""),
    ]);
    let (response, took) = router.answer();
    assert_unavailable(&response);
    assert!(took >= Duration::from_secs(2), "{took:?}");
    // The same key, from the right one, counts.
    let router = Router::v2(&stack, &key(1));
    let _ = worker.probe.next_on(&key_topic(DOMAIN));
    worker.probe.publish(applied("gw1", DOMAIN, &key(1)));
    assert_eq!(router.answer().0.json(), endpoint("gw1"));
}

fn a_late_or_repeated_confirmation_answers_no_other_request(bus: Bus) {
    let stack = stack(bus, SHORT);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    stack.wait_for_gateways(1);
    assert_unavailable(&Router::v2(&stack, &key(1)).answer().0);
    worker.probe.publish(applied("gw1", DOMAIN, &key(1)));
    let router = Router::v2(&stack, &key(2));
    worker.probe.publish_all([applied("gw1", DOMAIN, &key(1)), applied("gw1", DOMAIN, &key(1))]);
    assert_unavailable(&router.answer().0);
    let router = Router::v2(&stack, &key(3));
    worker.probe.next("the third key", |message| message.text() == key(3));
    worker.probe.publish_all((0..3).map(|_| applied("gw1", DOMAIN, &key(3))));
    assert_eq!(router.answer().0.status, 200);
    assert_unavailable(&Router::v2(&stack, &key(4)).answer().0);
}

fn a_late_confirmation_answers_the_routers_next_request_at_once(bus: Bus) {
    let stack = stack(bus, SHORT);
    let _best = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let next = Worker::start(&stack, "gw2", WorkerBehaviour::Silent, 1000);
    stack.wait_for_gateways(2);
    let witness = stack.witness();
    for (n, ask) in [(1, Stack::v1), (2, Stack::v2)] as [(u32, fn(&Stack, &str, &str) -> Response); 2] {
        assert_unavailable(&ask(&stack, DOMAIN, &key(n)));
        say(&stack, &next, applied("gw2", DOMAIN, &key(n)));
        let response = ask(&stack, DOMAIN, &key(n));
        assert_eq!(response.status, 200);
        assert!(n == 1 || response.json() == endpoint("gw2"), "{response:?}");
    }
    // Every request is published; an answer from memory is sent without waiting for that.
    let mut received = [(); 4].map(|()| witness.next_on(&key_topic(DOMAIN)).text());
    received.sort();
    assert_eq!(received, [1, 1, 2, 2].map(key));
}

fn a_late_confirmation_is_not_used_when_it_may_be_outdated(bus: Bus) {
    let stack = stack(bus, SHORT);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    stack.wait_for_gateways(1);
    let peers = |peers| peers_of("gw1", DOMAIN, peers);
    let changes: [&[Message]; 4] = [
        &[peers("-1"), peers("0")],
        &[status("gw1", "0"), hello("gw1"), status("gw1", "1")],
        &[failed("gw1", DOMAIN, &key(3), "refused")],
        &[failed("gw1", DOMAIN, &key(4), "removed")],
    ];
    for (n, change) in (1..).zip(changes) {
        assert_unavailable(&stack.v2(DOMAIN, &key(n)));
        worker.probe.publish(applied("gw1", DOMAIN, &key(n)));
        for message in change {
            say(&stack, &worker, message.clone());
        }
        assert_unavailable(&stack.v2(DOMAIN, &key(n)));
        assert_unavailable(&stack.v1(DOMAIN, &key(n)));
    }
}

#[test]
fn a_late_confirmation_is_not_used_after_the_lists_changed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deny.yaml");
    fs::write(&file, "[]").unwrap();
    let lists = format!("blacklist_file: {}\nallowlist: {{refresh_interval: 0.1}}", file.display());
    let stack = stack(Bus::Embedded, &format!("{SHORT}\n{lists}"));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    stack.wait_for_gateways(1);
    assert_unavailable(&stack.v2(DOMAIN, &key(1)));
    say(&stack, &worker, applied("gw1", DOMAIN, &key(1)));
    // Denied for a moment: gateways that apply the list have removed the key.
    for (text, denied) in [(format!("- {}\n", key(1)), 1.0), ("[]".to_owned(), 0.0)] {
        fs::write(&file, text).unwrap();
        let is_read = || (stack.metric(r#"wgkex_broker_list_keys{list="deny"}"#) == Some(denied)).then_some(());
        wait_until("the list is read", is_read);
    }
    assert_unavailable(&stack.v2(DOMAIN, &key(1)));
}

/// Publishes a message, and returns when the broker has received it.
fn say(stack: &Stack, worker: &Worker, message: Message) {
    let ignored = || stack.metric("wgkex_broker_mqtt_messages_ignored_total{reason=\"payload\"}").unwrap_or_default();
    let before = ignored();
    worker.probe.publish_all([
        message,
        wgkex_tests::probe::message(format!("wgkex/worker/{}/applied", worker.name), "", 1, false),
    ]);
    wait_until("the broker has heard a worker", || (ignored() > before).then_some(()));
}

/// More unknown keys than may be in flight: the others are queued until the server is back.
#[test]
fn queued_keys_are_published_even_after_their_requests_timed_out() {
    let mut stack = stack(Bus::Mosquitto, SHORT);
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let witness = stack.witness();
    stack.mosquitto().signal(Signal::SIGSTOP);
    let routers: Vec<_> = (0..150).map(|n| Router::v2(&stack, &key(n))).collect();
    for router in routers {
        assert_unavailable(&router.answer().0);
    }
    stack.mosquitto().signal(Signal::SIGCONT);
    let mut missing: BTreeSet<_> = (0..150).map(key).collect();
    while !missing.is_empty() {
        missing.remove(&witness.next_on(&key_topic(DOMAIN)).text());
    }
}

fn silence_of_all_gateways_is_503_when_the_budget_is_spent(bus: Bus) {
    let stack = stack(bus, SHORT);
    let _first = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let _second = Worker::start(&stack, "gw2", WorkerBehaviour::Silent, 0);
    stack.wait_for_gateways(2);
    for router in [Router::v2(&stack, &key(1)), Router::v1(&stack, &key(2))] {
        let (response, took) = router.answer();
        assert_unavailable(&response);
        assert!(took >= Duration::from_secs(2) && took < AT_ONCE, "{took:?}");
    }
}

fn rejections_of_all_gateways_are_503_at_once(bus: Bus) {
    let stack = stack(bus, LONG);
    let _first = Worker::start(&stack, "gw1", WorkerBehaviour::Refuses, 0);
    let _second = Worker::start(&stack, "gw2", WorkerBehaviour::Refuses, 0);
    stack.wait_for_gateways(2);
    for router in [Router::v2(&stack, &key(1)), Router::v1(&stack, &key(2))] {
        let (response, took) = router.answer();
        assert_unavailable(&response);
        assert!(took < AT_ONCE, "{took:?}");
    }
}

fn all_full_is_429_at_once_and_one_with_room_is_enough(bus: Bus) {
    let stack = stack(bus, LONG);
    let _first = Worker::start(&stack, "gw1", WorkerBehaviour::Full, 0);
    let _second = Worker::start(&stack, "gw2", WorkerBehaviour::Full, 0);
    stack.wait_for_gateways(2);
    for (api, router) in [("v2", Router::v2(&stack, &key(1))), ("v1", Router::v1(&stack, &key(2)))] {
        let (response, took) = router.answer();
        assert_eq!((response.status, response.header("retry-after")), (429, Some("60")), "{response:?}");
        assert!(response.json()["error"]["message"].is_string(), "{response:?}");
        assert!(took < AT_ONCE, "{took:?}");
        let refused = format!(r#"wgkex_broker_keys_refused_total{{api="{api}",reason="full"}}"#);
        assert_eq!(stack.metric(&refused), Some(1.0));
    }
    let _with_room = Worker::start(&stack, "gw3", WorkerBehaviour::Confirms, 100);
    stack.wait_for_gateways(3);
    let (response, _) = Router::v2(&stack, &key(1)).answer();
    assert_eq!((response.status, response.json()), (200, endpoint("gw3")));
}

fn an_original_worker_is_the_fallback_when_the_others_are_silent(bus: Bus) {
    let stack = stack(bus, "confirm_timeout: 1\nconfirm_budget: 20");
    let _ours = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let _original = Worker::start(&stack, "gw2", WorkerBehaviour::Original, 1000);
    stack.wait_for_gateways(2);
    let (response, took) = Router::v2(&stack, &key(1)).answer();
    assert_eq!((response.status, response.json()), (200, endpoint("gw2")));
    assert!(took >= Duration::from_secs(1) && took < AT_ONCE, "{took:?}");
}

fn version_1_is_answered_when_any_gateway_has_the_key(bus: Bus) {
    let stack = stack(bus, LONG);
    let first = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let second = Worker::start(&stack, "gw2", WorkerBehaviour::Silent, 1000);
    stack.wait_for_gateways(2);
    let router = Router::v1(&stack, &key(1));
    for worker in [&first, &second] {
        assert_eq!(worker.probe.next_on(&key_topic(DOMAIN)), key_for(DOMAIN, &key(1)));
    }
    router.assert_waits();
    second.probe.publish(applied("gw2", DOMAIN, &key(1)));
    let (response, _) = router.answer();
    assert_eq!((response.status, response.body.as_str()), (200, r#"{"Message":"OK"}"#));
}

fn version_1_falls_back_to_originals(bus: Bus) {
    let stack = stack(bus, "confirm_timeout: 1\nconfirm_budget: 20");
    let _ours = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let _original = Worker::start(&stack, "gw2", WorkerBehaviour::Original, 0);
    stack.wait_for_gateways(2);
    let (response, took) = Router::v1(&stack, &key(1)).answer();
    assert_eq!(response.status, 200);
    assert!(took >= Duration::from_secs(1) && took < AT_ONCE, "{took:?}");
}

/// Regression: nothing was published on the key's topic.
fn version_1_is_published_and_503_where_all_gateways_are_offline(bus: Bus) {
    let stack = Stack::start(Plan::new(bus).config(LONG).domains([DOMAIN, "ffx_b"]));
    let witness = stack.witness();
    let worker = stack.probe(wgkex_tests::probe::Role::new("gw1", &[]));
    worker.publish_all([
        hello("gw1"),
        peers_of("gw1", DOMAIN, "-1"),
        peers_of("gw1", "ffx_b", "0"),
        status("gw1", "1"),
    ]);
    stack.wait_for_gateways(1);
    let text = format!("ready\ndomain {DOMAIN}: no gateway is online\n");
    assert_eq!((stack.get("/readyz").status, stack.get("/readyz").body), (200, text));
    assert!(stack.get("/").body.contains(&format!("domain {DOMAIN}: no gateway is online")));
    // A router falls back to v1 if v2 fails.
    for n in [1, 2] {
        assert_unavailable(&stack.v2(DOMAIN, &key(n)));
        assert_unavailable(&stack.v1(DOMAIN, &key(n)));
        assert_eq!(witness.next_on(&key_topic(DOMAIN)), key_for(DOMAIN, &key(n)));
    }
    let live = format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="unproven"}}"#);
    stack.wait_for_metric(&live, 2.0);
    assert_eq!(stack.v2("ffx_b", &key(3)).status, 503, "online, and no data");
}

/// Fails with a broker that repeats the last answer whatever the gateways' states are.
fn version_1_is_not_answered_from_memory_when_all_gateways_are_offline(bus: Bus) {
    let often = "limits: {per_client: {burst: 0}, per_key: {burst: 1, per_second: 0.001}}";
    let stack = stack(bus, &format!("{LONG}\n{often}"));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    assert_eq!([1, 1, 1, 1].map(|n| stack.v1(DOMAIN, &key(n)).status), [200; 4]);
    worker.probe.publish(status("gw1", "0"));
    stack.wait_for_gateways(0);
    assert_unavailable(&stack.v1(DOMAIN, &key(1)));
}

/// Regression: the answer was 503.
fn version_1_is_answered_where_no_gateway_ever_published_its_state(bus: Bus) {
    let mut stack = stack(bus, LONG);
    let witness = stack.witness();
    let text = "no gateway has published its state; v1 requests get 200 without a gateway's confirmation";
    assert!(stack.get("/readyz").body.contains(text) && stack.get("/").body.contains(text));
    for n in [1, 2] {
        let (response, took) = Router::v1(&stack, &key(n)).answer();
        assert_eq!((response.status, response.body.as_str()), (200, r#"{"Message":"OK"}"#));
        assert!(took < AT_ONCE, "{took:?}");
        assert_eq!(witness.next_on(&key_topic(DOMAIN)), key_for(DOMAIN, &key(n)));
    }
    assert_eq!(stack.metric("wgkex_broker_keys_unwitnessed_total"), Some(2.0));
    let warned = stack.broker().wait_for_log("no gateway has ever published its state");
    assert!(warned.contains("WARN"), "{warned}");
    assert_eq!(stack.broker().log().matches("no gateway has ever published its state").count(), 1, "once");
    assert_unavailable(&stack.v2(DOMAIN, &key(3)));
    // From its first message on it is a gateway like any other.
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Original, 0);
    stack.wait_for_gateways(1);
    worker.probe.publish(status("gw1", "0"));
    stack.wait_for_gateways(0);
    assert_unavailable(&stack.v1(DOMAIN, &key(4)));
}

/// Regression with `Down` (v1: 503 for most requests) and with the two that are offline (v1: the same).
fn one_broken_gateway_beside_a_healthy_one_keeps_no_router_waiting(bus: Bus) {
    let stack = stack(bus, LONG);
    let _healthy = Worker::start(&stack, "healthy", WorkerBehaviour::Slow, 1000);
    let broken = [
        ("down", WorkerBehaviour::Down),
        ("full", WorkerBehaviour::Full),
        ("refuses", WorkerBehaviour::Refuses),
        ("offline1", WorkerBehaviour::OfflineButRefuses),
        ("offline2", WorkerBehaviour::OfflineButConfirms),
        ("original", WorkerBehaviour::OriginalDown),
    ];
    for (place, (name, manner)) in (1..).zip(broken) {
        let broken = Worker::start(&stack, name, manner, 0);
        wait_until("the broker knows it", || stack.get("/").body.contains(name).then_some(()));
        for n in 0..3 {
            let n = place * 100 + n * 2;
            let (v1, took) = Router::v1(&stack, &key(n)).answer();
            assert_eq!(v1.status, 200, "{name}: {v1:?}");
            assert!(took < AT_ONCE, "{name}: {took:?}");
            let (v2, took) = Router::v2(&stack, &key(n + 1)).answer();
            let is_true = v2.json() == endpoint("healthy")
                || (manner == WorkerBehaviour::OfflineButConfirms && v2.json() == endpoint(name));
            assert!(is_true && took < AT_ONCE, "{name}: {v2:?} after {took:?}");
        }
        // The worker's confirmation of the last key may arrive after this.
        wait_until("it is offline", || {
            broken.probe.publish(status(name, "0"));
            (stack.metric("wgkex_broker_gateways{state=\"online\"}") == Some(1.0)).then_some(())
        });
    }
}

/// Regression: v2 gave up when the broken gateway had rejected the key and the best one had timed out.
fn a_second_best_that_is_slow_is_waited_for_although_another_is_broken(bus: Bus) {
    let stack = stack(bus, "confirm_timeout: 1\nconfirm_budget: 20");
    let _best = Worker::start(&stack, "gw1", WorkerBehaviour::Silent, 0);
    let slow = Worker::start(&stack, "gw2", WorkerBehaviour::Silent, 100);
    let _down = Worker::start(&stack, "gw3", WorkerBehaviour::Down, 0);
    stack.wait_for_gateways(3);
    let router = Router::v2(&stack, &key(1));
    assert_eq!(slow.probe.next_on(&key_topic(DOMAIN)).text(), key(1));
    stack.wait_for_metric("wgkex_broker_confirmations_missed_total", 1.0);
    router.assert_waits();
    slow.probe.publish(applied("gw2", DOMAIN, &key(1)));
    let (response, _) = router.answer();
    assert_eq!((response.status, response.json()), (200, endpoint("gw2")));
}

/// Regression for the original in v1: its retained data made it online.
fn no_router_is_sent_to_a_gateway_where_its_domain_is_offline(bus: Bus) {
    let stack = stack(bus, SHORT);
    let mut workers = Vec::new();
    for (online, manner) in (1..).zip([WorkerBehaviour::OriginalDown, WorkerBehaviour::Down]) {
        workers.push(Worker::start(&stack, &format!("gw{online}"), manner, 0));
        stack.wait_for_gateways(online);
        assert_unavailable(&stack.v1(DOMAIN, &key(1)));
        assert_unavailable(&stack.v2(DOMAIN, &key(2)));
    }
}
