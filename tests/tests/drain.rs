//! Draining gateways: by the gateway's command and by a broker's, the gateways that routers get then, and the output
//! for operators.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use wgkex_common::{Domain, PublicKey};
use wgkex_tests::admin::{Operator, printed};
use wgkex_tests::http::Http;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::message;
use wgkex_tests::process::binary;
use wgkex_tests::scripted::{Worker, WorkerBehaviour, endpoint, peers_of};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{key, wait_until, wait_within};

/// Runs `wgkex-worker` with the state of the worker `name` of a stack.
fn worker(stack: &Stack, name: &str, arguments: &[&str]) -> Output {
    let file = stack.dir().join(format!("{name}.yaml"));
    let state_dir = stack.dir().join(name);
    let yaml = format!("domains: [{DOMAIN}]\ndomain_prefixes: [ffx_]\nstate_dir: {}\n", state_dir.display());
    std::fs::write(&file, yaml).unwrap();
    let mut command = Command::new(binary("wgkex-worker"));
    command.args(arguments).env("WGKEX_CONFIG_FILE", file).output().unwrap()
}

fn as_json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn wait_for_draining(stack: &Stack, gateway: &str, value: f64) {
    stack.wait_for_metric(&format!("wgkex_broker_gateway_draining{{gateway=\"{gateway}\"}}"), value);
}

/// The gateway that a router with this key gets.
fn given(stack: &Stack, number: u32) -> String {
    let answer = stack.v2(DOMAIN, &key(number));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["Endpoint"]["Address"].as_str().unwrap().to_owned()
}

#[test]
fn a_drain_survives_a_restart_until_undrain() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let _other = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 90);
    let running = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(2);
    wait_until("gw1 serves", || (given(&stack, 1) == "gw1").then_some(()));

    let drained = worker(&stack, "gw1", &["drain", "--reason", "kernel update", "--for", "2h"]);
    assert!(drained.status.success() && printed(&drained).contains("kernel update"), "{drained:?}");
    wait_for_draining(&stack, "gw1", 1.0);
    for number in 10..15 {
        assert_eq!(given(&stack, number), "gw2.example");
    }
    let status = stack.get("/status.json").json();
    let gateway = &status["gateways"][0];
    assert_eq!((&gateway["name"], &gateway["draining"][0]["reason"]), (&json!("gw1"), &json!("kernel update")));
    assert!(stack.get("/").body.contains("draining since"), "the page");

    drop(running);
    stack.wait_for_gateways(1);
    let _again = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(2);
    wait_for_draining(&stack, "gw1", 1.0);
    assert_eq!(given(&stack, 20), "gw2.example", "also after a restart");
    let undrained = worker(&stack, "gw1", &["undrain", "--json"]);
    assert!(undrained.status.success() && as_json(&undrained) == json!({ "drain": null }), "{undrained:?}");
    wait_for_draining(&stack, "gw1", 0.0);
    let drained = as_json(&worker(&stack, "gw1", &["drain", "--json", "--reason", "disk", "--deadline", "30m"]));
    assert_eq!((&drained["drain"]["reason"], &drained["drain"]["deadline"]["percent"]), (&json!("disk"), &json!(10)));
    let wrong = worker(&stack, "gw1", &["drain", "--for", "soon"]);
    assert!(!wrong.status.success() && printed(&wrong).contains("error: for: is not a duration"), "{wrong:?}");
}

#[test]
fn a_broker_drains_an_original_at_once_and_after_a_restart_and_connected_routers_stay() {
    let (operator, yaml) = Operator::new();
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto).config(&yaml).config("rebalance: {over: 0}"));
    let _original = Worker::start(&stack, "gw1", WorkerBehaviour::Original, 5);
    let ours = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 90);
    stack.wait_for_gateways(2);
    assert_eq!(stack.v2(DOMAIN, &key(1)).json(), endpoint("gw1"));

    let drained = operator.run(&stack, &["drain", "gw1", "--reason", "new disk"]);
    assert_eq!(printed(&drained), "gw1: draining\n");
    assert_eq!(stack.v2(DOMAIN, &key(2)).json(), endpoint("gw2"), "at once");
    let _ = stack.stop_broker();
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_gateways(2);
    assert_eq!(stack.v2(DOMAIN, &key(3)).json(), endpoint("gw2"), "after a restart");
    let shown = printed(&operator.run(&stack, &["gateways"]));
    assert!(shown.contains("gw1      draining") && shown.contains("draining by this broker, since"), "{shown}");
    let explained = printed(&operator.run(&stack, &["explain", &key(4), "--domain", DOMAIN]));
    assert!(
        explained.contains("last resort: draining by this broker") && explained.contains("new disk"),
        "{explained}"
    );

    for command in ["undrain", "drain"] {
        let answer = as_json(&operator.run(&stack, &[command, "gw1", "--json"]));
        let said = [&answer["gateway"], &answer["done"], &answer["was_on"]];
        assert_eq!(said, [&json!("gw1"), &json!(true), &json!(command == "undrain")]);
    }

    // The other gateway drains: its routers stay, and it gets no others.
    assert_eq!(printed(&operator.run(&stack, &["undrain", "gw1"])), "gw1: not drained by this broker any more\n");
    assert_eq!(stack.v2(DOMAIN, &key(5)).json(), endpoint("gw1"));
    ours.probe.publish(peers_of("gw2", DOMAIN, "1"));
    wait_for_connected(&stack, "gw2", 1);
    let home = key(6);
    assert_eq!(stack.v2(DOMAIN, &home).json(), endpoint("gw2"));
    let report = json!({ "domain": DOMAIN, "keys": [home] }).to_string();
    ours.probe.publish(message("wgkex/worker/gw2/seen", report, 1, false));
    let shown = || printed(&operator.run(&stack, &["where", &home]));
    wait_until("the handshake is known", || shown().contains("at gw2").then_some(()));
    assert!(operator.run(&stack, &["drain", "gw2", "--for", "1h"]).status.success());
    assert_eq!(stack.v2(DOMAIN, &key(7)).json(), endpoint("gw1"));
    let explained = printed(&operator.run(&stack, &["explain", &home]));
    assert!(explained.contains("would get gw2, as it drains, and the router is connected there"), "{explained}");
    assert_eq!(stack.v2(DOMAIN, &home).json(), endpoint("gw2"), "it is connected there");
    assert_eq!(stack.v2(DOMAIN, &home).json(), endpoint("gw1"), "it would not ask again at once if it were");

    // This drain ends by itself, and is forgotten.
    assert!(operator.run(&stack, &["drain", "gw2", "--for", "1s"]).status.success());
    wait_for_draining(&stack, "gw2", 0.0);
    assert_eq!(
        printed(&operator.run(&stack, &["undrain", "gw2"])),
        "gw2: not drained by this broker any more (it was not)\n"
    );
    let refused = operator.run(&stack, &["drain", "gw2", "--deadline", "1h"]);
    assert!(!refused.status.success() && printed(&refused).contains("a broker cannot remove peers"), "{refused:?}");
    let refused = operator.call("POST", "/v1/drain", &json!({ "gateway": "gw2", "deadline": "1h" }));
    assert!(refused.status == 400 && refused.body.contains("wgkex-worker drain --deadline"), "{refused:?}");
    let unknown = operator.call("POST", "/v1/drain", &json!({ "gateway": "gw9" }));
    assert_eq!((unknown.status, &unknown.json()["known"]), (200, &json!(false)));
    assert_eq!(operator.call("POST", "/v1/drain", &json!({ "gateway": "a/b" })).status, 400);
}

fn domain() -> Domain {
    Domain::new(DOMAIN, &["ffx_".into()]).unwrap()
}

/// The keys with a peer at a gateway.
fn peers(gateway: &InMemory) -> BTreeSet<String> {
    gateway.kernel.device(&domain()).unwrap().peers.keys().map(PublicKey::to_string).collect()
}

/// Gives these routers handshakes at the gateway, and triggers a read of its tables.
fn connect(gateway: &InMemory, routers: &BTreeSet<String>) {
    for router in routers {
        gateway.kernel.handshake(&domain(), router.parse().unwrap(), SystemTime::now());
    }
    gateway.kernel.trigger();
}

/// The routers that have handshakes at the gateway.
fn connected(gateway: &InMemory) -> BTreeSet<String> {
    let device = gateway.kernel.device(&domain()).unwrap();
    let connected = device.peers.iter().filter(|(_, peer)| peer.last_handshake.is_some());
    connected.map(|(key, _)| key.to_string()).collect()
}

fn wait_for_connected(stack: &Stack, gateway: &str, routers: usize) {
    let series = format!("wgkex_broker_gateway_connected{{domain=\"{DOMAIN}\",gateway=\"{gateway}\"}}");
    stack.wait_for_metric(&series, f64::from(u32::try_from(routers).unwrap()));
}

/// Half of eight routers are at a gateway that drains: in two portions, a minute apart, all of them move to the other
/// one, which has the key of each. Then the gateway has all keys again.
#[test]
fn past_the_deadline_routers_go_in_portions_and_each_gets_another_gateway() {
    let stack = Stack::start(Plan::new(Bus::Embedded).config("rebalance: {over: 0}"));
    let [leaving, staying] = ["gw1", "gw2"].map(|name| InMemory::start(&stack, name));
    stack.wait_for_gateways(2);
    wait_until("both serve", || (0..2).map(|n| given(&stack, n)).collect::<BTreeSet<_>>().len().checked_sub(2));
    let (mut here, mut there) = (BTreeSet::new(), BTreeSet::new());
    for n in 10..100 {
        let routers = if given(&stack, n) == "gw1" { &mut here } else { &mut there };
        if routers.len() < 4 {
            routers.insert(key(n));
        }
        if here.len() + there.len() == 8 {
            break;
        }
    }
    connect(&leaving, &here);
    connect(&staying, &there);
    wait_for_connected(&stack, "gw1", 4);
    wait_for_connected(&stack, "gw2", 4);
    let routers: BTreeSet<String> = here.union(&there).cloned().collect();

    let drained = worker(&stack, "gw1", &["drain", "--deadline", "1s", "--percent", "50", "--reason", "new disk"]);
    assert!(drained.status.success() && printed(&drained).contains("50 % a minute"), "{drained:?}");
    wait_until("the first portion is gone", || (connected(&leaving).len() < 4).then_some(()));
    let begun = Instant::now();
    assert_eq!(connected(&leaving).len(), 2);
    let shown = wait_until("the broker knows", || {
        let shown = stack.get("/").body;
        shown.contains("peers are being removed since").then_some(shown)
    });
    assert!(shown.contains("50 % a minute: new disk"), "{shown}");
    let status = stack.get("/status.json").json();
    let deadline = &status["gateways"][0]["draining"][0]["deadline"];
    assert_eq!((&deadline["percent"], &deadline["is_over"]), (&json!(50), &json!(true)));

    // Each of the first two requests twice, like a router without a connection at first.
    let moved: BTreeSet<String> = here.difference(&connected(&leaving)).cloned().collect();
    for router in moved.iter().chain(&moved) {
        assert_eq!(stack.v2(DOMAIN, router).json()["Endpoint"]["Address"], "gw2");
        assert!(peers(&staying).contains(router), "it is there before the answer");
    }
    connect(&staying, &moved);
    let limit = Duration::from_secs(150);
    wait_within(limit, "the second portion is gone", || {
        let left = connected(&leaving).len();
        assert!(left == 2 || begun.elapsed() > Duration::from_secs(58), "{left} are left after {:?}", begun.elapsed());
        (left == 0).then_some(())
    });
    for router in &routers {
        assert_eq!(stack.v2(DOMAIN, router).json()["Endpoint"]["Address"], "gw2");
    }
    assert!(peers(&staying).is_superset(&routers), "no key is lost");
    let metrics = Http::connect(leaving.http).get("/metrics").body;
    let total =
        metrics.lines().find_map(|line| line.strip_prefix("wgkex_worker_peers_drained_total{domain=\"ffx_a\"} "));
    assert!(total.unwrap().parse::<u32>().unwrap() >= 4, "{total:?}");

    drop(leaving);
    let leaving = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(2);
    wait_for_draining(&stack, "gw1", 1.0);
    assert_eq!(given(&stack, 200), "gw2", "also after a restart");
    wait_until("its key arrived", || peers(&leaving).contains(&key(200)).then_some(()));
    assert_eq!(peers(&leaving), [key(200)].into(), "neither its state file nor a broker brings the others");
    assert!(worker(&stack, "gw1", &["undrain"]).status.success());
    wait_until("all keys are back", || peers(&leaving).is_superset(&routers).then_some(()));
    wait_until("it gets routers", || (given(&stack, 201) == "gw1").then_some(()));
}

/// Where there is no other gateway, a removed router gets the same gateway again at once, and stays.
#[test]
fn past_the_deadline_the_only_gateway_still_serves() {
    let stack = Stack::start(Plan::new(Bus::Mosquitto));
    let only = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    let routers: BTreeSet<String> = (1..4).map(key).collect();
    wait_until("it serves", || (stack.v2(DOMAIN, &key(1)).status == 200).then_some(()));
    for router in &routers {
        assert_eq!(stack.v2(DOMAIN, router).status, 200);
    }
    connect(&only, &routers);
    wait_for_connected(&stack, "gw1", 3);
    assert!(worker(&stack, "gw1", &["drain", "--deadline", "1s", "--percent", "100"]).status.success());
    wait_until("all are removed", || peers(&only).is_empty().then_some(()));
    wait_until("the broker knows", || stack.get("/").body.contains("peers are being removed since").then_some(()));
    for router in &routers {
        assert_eq!(stack.v2(DOMAIN, router).json()["Endpoint"]["Address"], "gw1");
        assert!(peers(&only).contains(router), "it is there before the answer");
    }
    connect(&only, &routers);
    wait_for_connected(&stack, "gw1", 3);
    let status = Http::connect(only.http).get("/status.json").json();
    assert_eq!((&status["peers_drained"], &status["drain"]["deadline"]["is_over"]), (&json!(3), &json!(true)));
    let wrong = worker(&stack, "gw1", &["drain", "--deadline", "1h", "--percent", "101"]);
    assert!(!wrong.status.success() && printed(&wrong).contains("error: percent: "), "{wrong:?}");
}
