//! One stolen password: a worker's messages harm only its own gateway.

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::{Value, json};
use wgkex_tests::probe::{Message, Probe, Role, message};
use wgkex_tests::process::hash;
use wgkex_tests::scripted::{Worker, WorkerBehaviour, applied, endpoint, hello, key_topic, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key};

/// The contract's two keys with one address.
const TWINS: [&str; 2] =
    ["fAKaBGbh8TB6KaToe27fkEi9ghZwYGi6sOvHDXG2PLI=", "3c+xZQV94mSS+WVbTdDrC58V7h9hA3uIECwx0uu1kpg="];

/// A server with two workers as users.
fn stack(config: &str) -> Stack {
    let users = ["gw1", "gw2"].map(|name| format!("{name}: {{password_hash: \"{}\"}}", hash(name)));
    Stack::start(Plan::new(Bus::Embedded).config(config).listen(&format!("users: {{{}}}", users.join(", "))))
}

/// Logs later probes in as this user.
fn log_in(stack: &mut Stack, name: &str) {
    stack.plan.credentials = Some((name.into(), name.into()));
}

fn gateway(stack: &mut Stack, name: &str, manner: WorkerBehaviour) -> Worker {
    log_in(stack, name);
    Worker::start(stack, name, manner, 0)
}

fn keys(numbers: Range<u32>) -> Vec<String> {
    numbers.map(key).collect()
}

fn seen(worker: &str, keys: &[String]) -> Message {
    let payload = json!({ "domain": DOMAIN, "keys": keys });
    message(format!("wgkex/worker/{worker}/seen"), payload.to_string(), 1, false)
}

fn installed(worker: &str, keys: &[String]) -> Message {
    let payload = json!({ "domain": DOMAIN, "installed": keys, "failed": {} });
    message(format!("wgkex/worker/{worker}/applied"), payload.to_string(), 1, false)
}

/// A worker's data, with any key.
fn data(worker: &str, domain: &str, key: &str) -> Message {
    let data = json!({ "ExternalAddress": "gw", "Port": 1, "PublicKey": key, "LinkAddress": "fe80::1" });
    message(format!("wireguard-worker/{worker}/{domain}/data"), data.to_string(), 1, true)
}

fn proven() -> String {
    format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="proven"}}"#)
}

/// Waits until the broker has received all earlier messages of a worker. The key `n` must be new.
fn wait_until_received(stack: &Stack, worker: &Worker, n: u32) {
    let before = stack.metric(&proven()).unwrap();
    assert_eq!(stack.v1(DOMAIN, &key(n)).status, 200);
    worker.probe.publish(seen(&worker.name, &[key(n)]));
    stack.wait_for_metric(&proven(), before + 1.0);
}

/// All live keys, as in the snapshot for a gateway without any.
fn live_keys(stack: &Stack, worker: &str) -> BTreeSet<String> {
    let pages = format!("wgkex/worker/{worker}/pages");
    let asker = Probe::connect(stack.mqtt, Role::new(&format!("{worker}-asks"), &[&pages]).credentials(worker, worker));
    let mut all = BTreeSet::new();
    loop {
        let after = all.last();
        let question = json!({ "from": { "worker": worker }, "domain": DOMAIN, "after": after, "younger_than": null });
        let questions = format!("wgkex/broker/{}/questions", host_name());
        asker.publish(message(questions, question.to_string(), 1, false));
        let page: Value = serde_json::from_slice(&asker.next_on(&pages).payload).unwrap();
        let keys = page["keys"].as_object().unwrap().keys().cloned();
        all.extend(keys);
        if page["more"] == false {
            return all;
        }
    }
}

/// Regression: a worker's report counted like a router's request: 320 keys of the thief were live, those of routers
/// with handshakes were not, and no limit applied to the thief's.
#[test]
fn keys_that_only_one_worker_reports_reach_no_gateway_and_evict_no_key() {
    let mut stack = stack("live_keys: {max: 320}\nlimits: {per_domain: {burst: 202, per_second: 0.001}}");
    let honest = gateway(&mut stack, "gw1", WorkerBehaviour::Confirms);
    let thief = gateway(&mut stack, "gw2", WorkerBehaviour::Confirms);
    stack.wait_for_gateways(2);
    for key in keys(0..200) {
        assert_eq!(stack.v1(DOMAIN, &key).status, 200);
    }
    honest.probe.publish(seen("gw1", &keys(0..200)));
    stack.wait_for_metric(&proven(), 200.0);

    for begin in (1_000..11_000).step_by(1_000) {
        let spoken_of = keys(begin..begin + 1_000);
        thief.probe.publish_all([installed("gw2", &spoken_of), seen("gw2", &spoken_of)]);
    }
    wait_until_received(&stack, &thief, 200);
    let live = |state| stack.metric(&format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="{state}"}}"#));
    assert_eq!((live("proven"), live("unproven")), (Some(201.0), Some(0.0)));
    assert!(live("claimed").unwrap() <= 320.0, "what it says is bounded");
    assert_eq!(live_keys(&stack, "gw1"), keys(0..201).into_iter().collect());

    // A key that a router sends after a worker reported its handshake is proven at once; the report exempts no key from
    // a limit.
    assert_eq!(stack.v1(DOMAIN, &key(1_000)).status, 200);
    stack.wait_for_metric(&proven(), 202.0);
    assert_eq!(stack.v1(DOMAIN, &key(1_001)).status, 429);
}

/// Fails with a broker that reserves every key in a worker's data: the routers of 64 made-up domains got 403, and so
/// did the connected one, and the one whose address another key derives.
#[test]
fn a_worker_reserves_no_routers_key() {
    let mut stack = stack("");
    let honest = gateway(&mut stack, "gw1", WorkerBehaviour::Confirms);
    let thief = gateway(&mut stack, "gw2", WorkerBehaviour::Confirms);
    stack.wait_for_gateways(2);
    let routers = [key(1), TWINS[0].to_owned()];
    for router in &routers {
        assert_eq!(stack.v2(DOMAIN, router).status, 200);
    }
    honest.probe.publish(seen("gw1", &routers));
    stack.wait_for_metric(&proven(), 2.0);

    thief.probe.publish_all((100..200).map(|n| data("gw2", &format!("ffx_made_up_{n}"), &key(n))));
    for (n, own) in [(201, key(1)), (202, TWINS[1].to_owned())] {
        thief.probe.publish(data("gw2", DOMAIN, &own));
        wait_until_received(&stack, &thief, n);
        for router in &routers {
            assert_eq!((stack.v1(DOMAIN, router).status, stack.v2(DOMAIN, router).status), (200, 200), "{n}");
        }
    }
    let refused: Vec<_> = (100..200).filter(|n| stack.v1(DOMAIN, &key(*n)).status != 200).collect();
    assert!(refused.is_empty(), "made-up domains count: {refused:?}");

    // Data that changes all the time reserves one key at most.
    thief.probe.publish_all((300..340).map(|n| data("gw2", DOMAIN, &key(n))));
    wait_until_received(&stack, &thief, 203);
    let refused: Vec<_> = (300..340).filter(|n| stack.v1(DOMAIN, &key(*n)).status != 200).collect();
    assert!(refused.len() <= 1, "{refused:?}");
    assert_eq!(stack.v1(DOMAIN, &wgkex_tests::scripted::gateway_key("gw1")).status, 403, "a gateway's own stays so");
}

/// Fails if a report of a key that another worker claims does not count: after a broker lost its live keys, its router
/// got 403.
#[test]
fn a_handshake_that_another_worker_reports_makes_a_claimed_key_a_routers() {
    let mut stack = stack("");
    let honest = gateway(&mut stack, "gw1", WorkerBehaviour::Confirms);
    log_in(&mut stack, "gw2");
    let thief = stack.probe(Role::new("gw2", &[]));
    // A worker's first data counts at once, a change after a minute.
    thief.publish_all([hello("gw2"), peers_of("gw2", DOMAIN, "0"), data("gw2", DOMAIN, &key(1)), status("gw2", "1")]);
    stack.wait_for_gateways(2);
    let claimed = format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="claimed"}}"#);
    thief.publish(seen("gw2", &[key(1), key(2)]));
    stack.wait_for_metric(&claimed, 1.0);
    assert_eq!(stack.v1(DOMAIN, &key(1)).status, 403, "the worker that claims it reports nothing of it");
    honest.probe.publish(seen("gw1", &[key(1)]));
    stack.wait_for_metric(&claimed, 2.0);
    assert_eq!((stack.v1(DOMAIN, &key(1)).status, stack.v2(DOMAIN, &key(1)).status), (200, 200));
    drop(thief);
}

/// The hello of a draining worker.
fn draining(worker: &str) -> Message {
    let hello = r#"{"version":"1","can":["confirm"],"drain":{"since":7}}"#;
    message(format!("wgkex/worker/{worker}/hello"), hello, 1, true)
}

fn is_draining(stack: &Stack, worker: &str) {
    stack.wait_for_metric(&format!("wgkex_broker_gateway_draining{{gateway=\"{worker}\"}}"), 1.0);
}

/// Fails if only the last report of a handshake decides where a router is connected: it got the thief's gateway, with
/// which it never had a handshake, although its own gateway had reported handshakes.
#[test]
fn a_worker_that_drains_keeps_no_router_that_the_broker_sent_elsewhere() {
    let mut stack = stack("rebalance: {over: 0}");
    let honest = gateway(&mut stack, "gw1", WorkerBehaviour::Confirms);
    let thief = gateway(&mut stack, "gw2", WorkerBehaviour::Confirms);
    stack.wait_for_gateways(2);
    thief.probe.publish(peers_of("gw2", DOMAIN, "500"));
    stack.wait_for_metric(&format!(r#"wgkex_broker_gateway_connected{{domain="{DOMAIN}",gateway="gw2"}}"#), 500.0);
    let routers = keys(0..20);
    for router in &routers {
        assert_eq!(stack.v2(DOMAIN, router).json(), endpoint("gw1"));
    }
    honest.probe.publish(seen("gw1", &routers[..10]));
    stack.wait_for_metric(&proven(), 10.0);

    thief.probe.publish_all([seen("gw2", &routers), draining("gw2")]);
    stack.wait_for_metric(&proven(), 20.0);
    wait_until_received(&stack, &thief, 100);
    is_draining(&stack, "gw2");
    for router in &routers {
        assert_eq!(stack.v2(DOMAIN, router).json(), endpoint("gw1"));
    }
}

/// Fails with a broker for which a draining gateway keeps such a router for ever.
#[test]
fn a_router_that_was_sent_back_to_its_gateway_and_requests_again_at_once_gets_another() {
    let mut stack = stack("rebalance: {over: 0}");
    let honest = gateway(&mut stack, "gw1", WorkerBehaviour::Confirms);
    let thief = gateway(&mut stack, "gw2", WorkerBehaviour::Confirms);
    stack.wait_for_gateways(2);
    honest.probe.publish(peers_of("gw1", DOMAIN, "500"));
    stack.wait_for_metric(&format!(r#"wgkex_broker_gateway_connected{{domain="{DOMAIN}",gateway="gw1"}}"#), 500.0);
    let router = key(1);
    assert_eq!(stack.v2(DOMAIN, &router).json(), endpoint("gw2"), "by its share");
    thief.probe.publish_all([seen("gw2", std::slice::from_ref(&router)), draining("gw2")]);
    stack.wait_for_metric(&proven(), 1.0);
    is_draining(&stack, "gw2");
    assert_eq!(stack.v2(DOMAIN, &router).json(), endpoint("gw2"), "it may be connected there, and be restarted");
    for n in 100..103 {
        thief.probe.publish(seen("gw2", std::slice::from_ref(&router)));
        wait_until_received(&stack, &thief, n);
        assert_eq!(stack.v2(DOMAIN, &router).json(), endpoint("gw1"), "it is not");
    }
}

/// Fails if the confirmation of any worker counts in any domain.
#[test]
fn a_worker_confirms_nothing_in_a_domain_that_it_does_not_serve() {
    let mut stack = stack("confirm_timeout: 1\nconfirm_budget: 1");
    let _silent = gateway(&mut stack, "gw1", WorkerBehaviour::Silent);
    log_in(&mut stack, "gw2");
    let hello = r#"{"version":"1","can":["confirm"],"domains":["ffx_b"]}"#;
    let greeting =
        [message("wgkex/worker/gw2/hello", hello, 1, true), peers_of("gw2", "ffx_b", "0"), status("gw2", "1")];
    let role = Role::new("gw2", &["wireguard/+/+"]).greeting(greeting.into());
    let _other = stack.probe(role.answer(|received| match &received.topic {
        topic if *topic == key_topic(DOMAIN) => vec![applied("gw2", DOMAIN, &received.text())],
        _ => Vec::new(),
    }));
    stack.wait_for_gateways(2);
    assert_eq!(stack.v1(DOMAIN, &key(1)).status, 503);
}
