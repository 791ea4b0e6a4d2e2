//! Gateways that drain: by their own command and by a broker's, what routers get then, and what operators see.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::process::{Command, Output};

use serde_json::json;
use wgkex_tests::admin::{Operator, printed};
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::said;
use wgkex_tests::process::binary;
use wgkex_tests::scripted::{Manner, Worker, endpoint, peers_of};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{key, wait_until};

/// Runs `wgkex-worker` with the state of the worker `name` of a stack.
fn worker(stack: &Stack, name: &str, arguments: &[&str]) -> Output {
    let file = stack.dir().join(format!("{name}.yaml"));
    let state_dir = stack.dir().join(name);
    let yaml = format!("domains: [{DOMAIN}]\ndomain_prefixes: [ffx_]\nstate_dir: {}\n", state_dir.display());
    std::fs::write(&file, yaml).unwrap();
    let mut command = Command::new(binary("wgkex-worker"));
    command.args(arguments).env("WGKEX_CONFIG_FILE", file).output().unwrap()
}

fn wait_for_draining(stack: &Stack, gateway: &str, value: f64) {
    stack.wait_for_metric(&format!("wgkex_broker_gateway_draining{{gateway=\"{gateway}\"}}"), value);
}

/// Which gateway a router with this key gets.
fn given(stack: &Stack, number: u32) -> String {
    let answer = stack.v2(DOMAIN, &key(number));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["Endpoint"]["Address"].as_str().unwrap().to_owned()
}

#[test]
fn a_worker_drains_by_its_command_also_after_a_restart_until_it_is_told_otherwise() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let _other = Worker::start(&stack, "gw2", Manner::Confirms, 90);
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
    assert!(worker(&stack, "gw1", &["undrain"]).status.success());
    wait_for_draining(&stack, "gw1", 0.0);
    let wrong = worker(&stack, "gw1", &["drain", "--for", "soon"]);
    assert!(!wrong.status.success() && printed(&wrong).contains("error: for: is not a duration"), "{wrong:?}");
}

#[test]
fn a_broker_drains_an_original_at_once_and_after_a_restart_and_connected_routers_stay() {
    let (operator, yaml) = Operator::new();
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto).config(&yaml).config("rebalance: {over: 0}"));
    let _original = Worker::start(&stack, "gw1", Manner::Original, 5);
    let ours = Worker::start(&stack, "gw2", Manner::Confirms, 90);
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

    // Now the other one: its routers stay, and it gets no others.
    assert_eq!(printed(&operator.run(&stack, &["undrain", "gw1"])), "gw1: not drained by this broker any more\n");
    assert_eq!(stack.v2(DOMAIN, &key(5)).json(), endpoint("gw1"));
    ours.probe.say(peers_of("gw2", DOMAIN, "1"));
    let home = key(6);
    assert_eq!(stack.v1(DOMAIN, &home).status, 200);
    let report = json!({ "domain": DOMAIN, "keys": [home] }).to_string();
    ours.probe.say(said("wgkex/worker/gw2/seen", report, 1, false));
    let shown = || printed(&operator.run(&stack, &["where", &home]));
    wait_until("the handshake is known", || shown().contains("at gw2").then_some(()));
    assert!(operator.run(&stack, &["drain", "gw2", "--for", "1h"]).status.success());
    assert_eq!(stack.v2(DOMAIN, &key(7)).json(), endpoint("gw1"));
    assert_eq!(stack.v2(DOMAIN, &home).json(), endpoint("gw2"), "it is connected there");
    let explained = printed(&operator.run(&stack, &["explain", &home]));
    assert!(explained.contains("would get gw2, as it drains, and the router is connected there"), "{explained}");

    // It ends by itself, and is forgotten.
    assert!(operator.run(&stack, &["drain", "gw2", "--for", "1s"]).status.success());
    wait_for_draining(&stack, "gw2", 0.0);
    assert_eq!(
        printed(&operator.run(&stack, &["undrain", "gw2"])),
        "gw2: not drained by this broker any more (it was not)\n"
    );
    let unknown = operator.call("POST", "/v1/drain", &json!({ "gateway": "gw9" }));
    assert_eq!((unknown.status, &unknown.json()["known"]), (200, &json!(false)));
    assert_eq!(operator.call("POST", "/v1/drain", &json!({ "gateway": "a/b" })).status, 400);
}
