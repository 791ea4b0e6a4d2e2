//! What stands on the bus, and what living programs are: whoever makes them differ, they are the same again within a minute.

use std::time::{Duration, Instant};

use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::{Probe, Role, Said, said};
use wgkex_tests::scripted::{applied, data, hello, key_topic, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key, wait_within};

use super::on_both;

on_both!(
    a_living_gateways_states_heal_whoever_disturbs_them,
    a_living_brokers_states_heal_whoever_disturbs_them,
    an_original_is_alive_as_long_as_it_counts,
    what_nobody_retains_is_published_for_who_comes_up,
);

/// Within a minute, on a machine that does other things, too.
const HEALED: Duration = Duration::from_secs(90);

/// Waits for `is_so`, and returns how long that took.
fn within_a_minute(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    wait_within(HEALED, what, || is_so().then_some(()));
    begun.elapsed()
}

/// What is retained on `topic`, as a newcomer finds it.
fn retained(stack: &Stack, topic: &str) -> Option<Said> {
    let newcomer = stack.probe(Role::new("newcomer", &[topic]));
    newcomer.say(said("test/end", "", 1, false));
    newcomer.heard().into_iter().find(|said| said.retain)
}

/// Failed before for each but the count.
fn a_living_gateways_states_heal_whoever_disturbs_them(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let _worker = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(0)).status, 200);
    let stranger = stack.probe(Role::new("stranger", &[]));
    let empty = |said: Said| Said { payload: Vec::new(), ..said };
    let disturbances = [
        // A last will that is published late.
        status("gw1", "0"),
        empty(status("gw1", "")),
        empty(data("gw1", DOMAIN)),
        data("gw1", DOMAIN),
        peers_of("gw1", DOMAIN, "-1"),
        empty(peers_of("gw1", DOMAIN, "")),
        peers_of("gw1", DOMAIN, "4000"),
        empty(hello("gw1")),
    ];
    let before: Vec<_> = disturbances.iter().map(|disturbance| retained(&stack, &disturbance.topic)).collect();
    assert!(before.iter().all(Option::is_some), "{before:?}");
    for disturbance in &disturbances {
        stranger.say(disturbance.clone());
    }
    for (disturbance, before) in disturbances.iter().zip(&before) {
        within_a_minute(&format!("{disturbance:?} heals"), || retained(&stack, &disturbance.topic) == *before);
    }
    within_a_minute("routers are served", || stack.v2(DOMAIN, &key(1)).status == 200);
    assert_eq!(stack.v1(DOMAIN, &key(2)).status, 200);
    let page = stack.get("/").body;
    assert!(page.contains(DOMAIN) && !page.contains("original") && !page.contains("(4000)"), "{page}");
}

/// Failed before for both.
fn a_living_brokers_states_heal_whoever_disturbs_them(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let stranger = stack.probe(Role::new("stranger", &[]));
    let topics = [format!("wireguard-broker/{}/status", host_name()), format!("wgkex/broker/{}/hello", host_name())];
    let before = topics.each_ref().map(|topic| retained(&stack, topic));
    assert!(before.iter().all(Option::is_some), "{before:?}");
    for (topic, payload) in topics.iter().zip(["0", ""]) {
        stranger.say(said(topic.clone(), payload, 1, true));
    }
    for (topic, before) in topics.iter().zip(&before) {
        within_a_minute(&format!("{topic} heals"), || retained(&stack, topic) == *before);
    }
}

/// Failed before: a last will that comes late decided for good.
fn an_original_is_alive_as_long_as_it_counts(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let original = stack.probe(Role::new("gw1", &[]));
    original.say_all([data("gw1", DOMAIN), status("gw1", "1"), peers_of("gw1", DOMAIN, "3")]);
    stack.wait_for_gateways(1);
    original.say(status("gw1", "0"));
    stack.wait_for_gateways(0);
    original.say(peers_of("gw1", DOMAIN, "4"));
    stack.wait_for_gateways(1);
    assert_eq!((stack.v1(DOMAIN, &key(1)).status, stack.v2(DOMAIN, &key(2)).status), (200, 200));
}

/// Failed before: what was written decided for good.
#[test]
fn a_dead_gateway_that_is_said_to_be_alive_is_dead_again_within_a_minute() {
    let stack = Stack::start(Plan::new(Bus::Mosquitto));
    let dead = ["dead1", "dead2"];
    let stranger = stack.probe(Role::new("stranger", &[]));
    for dead in dead {
        stranger.say_all([data(dead, DOMAIN), peers_of(dead, DOMAIN, "3"), status(dead, "1"), status(dead, "0")]);
    }
    stack.wait_for_gateways(0);
    stranger.say(status("dead1", "1"));
    stranger.say(peers_of("dead2", DOMAIN, "0"));
    stack.wait_for_gateways(2);
    let online = "wgkex_broker_gateways{state=\"online\"}";
    let took = within_a_minute("they are taken for offline", || stack.metric(online) == Some(0.0));
    assert!(took > Duration::from_secs(30), "an original counts once a minute: {took:?}");
}

/// On a server that hands out nothing retained, or not all of it: programs that come up are given it by those that are there.
fn what_nobody_retains_is_published_for_who_comes_up(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let _worker = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    // It comes up without a subscription to what is retained.
    let live = |role: &Probe, topic: &str| role.next(topic, |said| said.topic == topic && !said.retain);
    for (n, name) in ["wireguard-worker/gw2/status", "wireguard-broker/b2/status"].into_iter().enumerate() {
        let newcomer = stack.probe(Role::new(&format!("newcomer{n}"), &["#"]));
        newcomer.say(said(name, "1", 1, true));
        for topic in [
            "wgkex/worker/gw1/hello".to_owned(),
            format!("wireguard-worker/gw1/{DOMAIN}/data"),
            format!("wireguard-metrics/{DOMAIN}/gw1/connected_peers"),
            "wireguard-worker/gw1/status".to_owned(),
            format!("wireguard-broker/{}/status", host_name()),
            format!("wgkex/broker/{}/hello", host_name()),
        ] {
            live(&newcomer, &topic);
        }
    }
}

/// Failed before: its confirmation counted for nothing, and nobody published its key.
#[test]
fn a_confirmation_shows_that_a_gateway_is_alive() {
    let stack = Stack::start(Plan::new(Bus::Mosquitto));
    let gateway = stack.probe(Role::new("gw1", &[&key_topic(DOMAIN)]));
    gateway.say_all([hello("gw1"), data("gw1", DOMAIN), peers_of("gw1", DOMAIN, "3"), status("gw1", "0")]);
    assert_eq!(stack.v1(DOMAIN, &key(1)).status, 503);
    assert_eq!(gateway.next_on(&key_topic(DOMAIN)).text(), key(1));
    gateway.say(applied("gw1", DOMAIN, &key(1)));
    stack.wait_for_gateways(1);
}
