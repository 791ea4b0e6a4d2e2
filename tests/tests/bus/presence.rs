//! Retained states and the states of running programs: if a message makes them differ, they are equal again within a
//! minute.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wgkex_tests::http::Http;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::{Message, Probe, Role, message};
use wgkex_tests::scripted::{applied, data, hello, key_topic, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key, wait_until, wait_within};

use super::{SHORT, on_both};

on_both!(
    an_online_gateway_republishes_states_that_another_program_overwrote,
    an_online_broker_republishes_states_that_another_program_overwrote,
    an_original_worker_is_online_while_it_publishes_peer_counts,
    an_original_workers_overwritten_states_are_corrected_although_published_once,
    cleared_retained_messages_change_no_state,
    a_retained_confirmation_is_no_sign_of_life,
    a_domain_whose_only_data_is_removed_is_served_as_before,
    a_flapping_gateway_is_logged_rarely,
    states_are_published_again_for_a_program_that_starts_where_the_server_retains_nothing,
);

/// Within a minute, on a busy machine.
const HEALED: Duration = Duration::from_secs(90);

/// Waits for `is_so`, and returns how long that took.
fn within_a_minute(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    wait_within(HEALED, what, || is_so().then_some(()));
    begun.elapsed()
}

/// The retained message on `topic`, as a new client receives it, without its time.
fn retained(stack: &Stack, topic: &str) -> Option<Message> {
    let newcomer = stack.probe(Role::new("newcomer", &[topic]));
    newcomer.publish(message("test/end", "", 1, false));
    newcomer.received().into_iter().find(|message| message.retain).map(Message::undated)
}

fn empty(message: Message) -> Message {
    Message { payload: Vec::new(), ..message }
}

fn with(message: Message, payload: &str) -> Message {
    Message { payload: payload.into(), ..message }
}

/// Fails with a broker for which any message counts: the dead gateway was online for 65 s after each start of the
/// broker.
fn a_retained_confirmation_is_no_sign_of_life(bus: Bus) {
    let mut stack = Stack::start(Plan::new(bus));
    let stranger = stack.probe(Role::new("stranger", &[]));
    let states = [hello("dead"), data("dead", DOMAIN), peers_of("dead", DOMAIN, "0"), status("dead", "0")];
    let confirmation = Message { retain: true, ..applied("dead", DOMAIN, &key(1)) };
    stranger.publish_all(states.into_iter().chain([confirmation]));
    let _ = stack.stop_broker();
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_metric("wgkex_broker_mqtt_messages_ignored_total{reason=\"topic\"}", 1.0);
    assert_eq!(stack.metric("wgkex_broker_gateways{state=\"online\"}"), Some(0.0));
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 503);
}

/// Fails with a broker that keeps a domain with data until it ends: v1 stayed at 503.
fn a_domain_whose_only_data_is_removed_is_served_as_before(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let stranger = stack.probe(Role::new("stranger", &[]));
    let wait_for = |status: u16| within_a_minute("v1 answers", || stack.v1(DOMAIN, &key(1)).status == status);
    wait_for(200);
    stranger.publish(data("gw1", DOMAIN));
    wait_for(503);
    stranger.publish(empty(data("gw1", DOMAIN)));
    wait_for(200);
}

/// Fails with a broker that logs each change.
fn a_flapping_gateway_is_logged_rarely(bus: Bus) {
    let mut stack = Stack::start(Plan::new(bus));
    let stranger = stack.probe(Role::new("stranger", &[]));
    stranger.publish_all((0..501).map(|n| status("gw1", if n % 2 == 0 { "1" } else { "0" })));
    stranger.publish(with(status("gw1", ""), "all of them are received"));
    stack.wait_for_metric("wgkex_broker_mqtt_messages_ignored_total{reason=\"payload\"}", 1.0);
    stack.wait_for_gateways(1);
    let log = stack.broker().log();
    let lines = log.lines().filter(|line| line.contains("worker=\"gw1\"")).count();
    assert!((1..=10).contains(&lines), "{lines} lines");
}

/// Regression for each but the count.
fn an_online_gateway_republishes_states_that_another_program_overwrote(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let _worker = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(0)).status, 200);
    let stranger = stack.probe(Role::new("stranger", &[]));
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
        stranger.publish(disturbance.clone());
    }
    for (disturbance, before) in disturbances.iter().zip(&before) {
        within_a_minute(&format!("{disturbance:?} heals"), || retained(&stack, &disturbance.topic) == *before);
    }
    within_a_minute("routers are served", || stack.v2(DOMAIN, &key(1)).status == 200);
    assert_eq!(stack.v1(DOMAIN, &key(2)).status, 200);
    let page = stack.get("/").body;
    assert!(page.contains(DOMAIN) && !page.contains("original") && !page.contains("(4000)"), "{page}");
}

/// Regression for both.
fn an_online_broker_republishes_states_that_another_program_overwrote(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let stranger = stack.probe(Role::new("stranger", &[]));
    let topics = [format!("wireguard-broker/{}/status", host_name()), format!("wgkex/broker/{}/hello", host_name())];
    let before = topics.each_ref().map(|topic| retained(&stack, topic));
    assert!(before.iter().all(Option::is_some), "{before:?}");
    for (topic, payload) in topics.iter().zip(["0", ""]) {
        stranger.publish(message(topic.clone(), payload, 1, true));
    }
    for (topic, before) in topics.iter().zip(&before) {
        within_a_minute(&format!("{topic} heals"), || retained(&stack, topic) == *before);
    }
}

/// Regression: a late last will kept the worker offline for good.
fn an_original_worker_is_online_while_it_publishes_peer_counts(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let original = stack.probe(Role::new("gw1", &[]));
    original.publish_all([data("gw1", DOMAIN), status("gw1", "1"), peers_of("gw1", DOMAIN, "3")]);
    stack.wait_for_gateways(1);
    original.publish(status("gw1", "0"));
    stack.wait_for_gateways(0);
    original.publish(peers_of("gw1", DOMAIN, "4"));
    stack.wait_for_gateways(1);
    assert_eq!((stack.v1(DOMAIN, &key(1)).status, stack.v2(DOMAIN, &key(2)).status), (200, 200));
}

/// Regression for the hellos, and for removed data. Each gateway is an original, the only one of its domain.
fn an_original_workers_overwritten_states_are_corrected_although_published_once(bus: Bus) {
    type Disturb<'a> = &'a dyn Fn(&str, &str) -> Message;
    let transient = |message: Message| Message { retain: false, ..message };
    let serves = |domain: &str| format!(r#"{{"version":"9","can":["confirm"],"domains":[{domain}]}}"#);
    let disturbances: &[(&str, Disturb)] = &[
        ("ffx_a", &|gateway, domain| with(hello(gateway), &serves(&format!("{domain:?}")))),
        ("ffx_b", &|gateway, _| with(hello(gateway), &serves(""))),
        ("ffx_c", &|gateway, domain| empty(data(gateway, domain))),
        ("ffx_d", &|gateway, domain| transient(empty(data(gateway, domain)))),
        ("ffx_e", &|gateway, domain| with(data(gateway, domain), "garbage")),
        ("ffx_f", &|gateway, domain| with(data(gateway, domain), "{}")),
        ("ffx_g", &|gateway, _| empty(status(gateway, ""))),
        ("ffx_h", &|gateway, _| status(gateway, "garbage")),
        ("ffx_i", &|gateway, domain| empty(peers_of(gateway, domain, ""))),
        ("ffx_k", &|gateway, domain| peers_of(gateway, domain, "-1")),
    ];
    let domains: Vec<_> = disturbances.iter().map(|(domain, _)| *domain).collect();
    let gateway = |domain: &str| format!("gw-{domain}");
    let stack = Stack::start(Plan::new(bus).config(SHORT).domains(domains.clone()));
    let originals = stack.probe(Role::new("originals", &[]));
    for domain in &domains {
        let gateway = gateway(domain);
        originals.publish_all([data(&gateway, domain), status(&gateway, "1"), peers_of(&gateway, domain, "3")]);
    }
    stack.wait_for_gateways(10);
    let stranger = stack.probe(Role::new("stranger", &[]));
    for (domain, disturb) in disturbances {
        stranger.publish(disturb(&gateway(domain), domain));
    }
    let mut counted = Instant::now();
    let mut ask = |domain: &str| {
        if counted.elapsed() > Duration::from_secs(30) {
            originals.publish_all(domains.iter().map(|domain| peers_of(&gateway(domain), domain, "4")));
            counted = Instant::now();
        }
        (stack.v1(domain, &key(1)).status, stack.v2(domain, &key(2)).status)
    };
    let begun = Instant::now();
    let mut ill = domains.clone();
    while !ill.is_empty() {
        assert!(begun.elapsed() < HEALED, "not healed: {ill:?}");
        ill.retain(|domain| ask(domain) != (200, 200));
        thread::sleep(Duration::from_millis(500));
    }
    assert!(domains.iter().all(|domain| ask(domain) == (200, 200)), "it lasts");
}

/// Regression: the broker waited for a second count.
#[test]
fn an_original_worker_whose_status_was_lost_is_online_at_its_next_peer_count() {
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto).domains(["ffx_a", "ffx_b", "ffx_c"]));
    let originals = stack.probe(Role::new("originals", &[]));
    let gateways = [("gw1", "ffx_a"), ("gw2", "ffx_b"), ("gw3", "ffx_c")];
    for (gateway, domain) in gateways {
        originals.publish_all([data(gateway, domain), status(gateway, "1"), peers_of(gateway, domain, "3")]);
    }
    stack.wait_for_gateways(3);
    assert!(stack.stop_broker().success());
    originals.publish_all([status("gw1", "garbage"), empty(status("gw2", ""))]);
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_gateways(1);
    for (gateway, domain) in &gateways[..2] {
        assert_eq!(stack.v2(domain, &key(1)).status, 503);
        originals.publish(peers_of(gateway, domain, "3"));
    }
    stack.wait_for_gateways(3);
    for (_, domain) in gateways {
        assert_eq!((stack.v1(domain, &key(1)).status, stack.v2(domain, &key(2)).status), (200, 200));
    }
}

/// Regression: 503 for good, as the broker took gateways for known there.
fn cleared_retained_messages_change_no_state(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let operator = stack.probe(Role::new("operator", &[]));
    let left = [data("gone", DOMAIN), peers_of("gone", DOMAIN, ""), status("gone", ""), hello("gone")];
    operator.publish_all(left.map(empty));
    // This gateway serves no domain; once it is online the broker has received all earlier messages.
    operator.publish(status("marker", "1"));
    stack.wait_for_gateways(1);
    assert_eq!(stack.v1(DOMAIN, &key(1)).status, 200);
    let ready = stack.get("/readyz").body;
    assert!(ready.contains("no gateway has published its state"), "{ready}");
    let page = stack.get("/").body;
    assert!(page.contains("marker") && !page.contains("gone"), "{page}");
}

/// Regression: the forged status kept the gateway online for good.
#[test]
fn a_stopped_gateway_with_a_forged_online_status_is_offline_again_within_a_minute() {
    let stack = Stack::start(Plan::new(Bus::Mosquitto));
    let dead = ["dead1", "dead2"];
    let stranger = stack.probe(Role::new("stranger", &[]));
    for dead in dead {
        stranger.publish_all([data(dead, DOMAIN), peers_of(dead, DOMAIN, "3"), status(dead, "1"), status(dead, "0")]);
    }
    stack.wait_for_gateways(0);
    stranger.publish(status("dead1", "1"));
    stranger.publish(peers_of("dead2", DOMAIN, "0"));
    // No status of this gateway was ever received.
    stranger.publish(peers_of("dead3", DOMAIN, "0"));
    stack.wait_for_gateways(3);
    let online = "wgkex_broker_gateways{state=\"online\"}";
    let took = within_a_minute("they are taken for offline", || stack.metric(online) == Some(0.0));
    assert!(took > Duration::from_secs(30), "an original counts once a minute: {took:?}");
}

/// On a server that delivers no retained messages, or not all: programs that start receive them from running ones.
fn states_are_published_again_for_a_program_that_starts_where_the_server_retains_nothing(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let _worker = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    // The newcomer receives only live messages, not retained ones.
    let live = |role: &Probe, topic: &str| role.next(topic, |message| message.topic == topic && !message.retain);
    for (n, name) in ["wireguard-worker/gw2/status", "wireguard-broker/b2/status"].into_iter().enumerate() {
        let newcomer = stack.probe(Role::new(&format!("newcomer{n}"), &["#"]));
        newcomer.publish(message(name, "1", 1, true));
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

/// By brokers' hellos, so that the gateway's operator sees it.
#[test]
fn a_worker_names_a_broker_whose_clock_is_off() {
    let stack = Stack::start(Plan::new(Bus::Mosquitto));
    let worker = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    let broker = stack.probe(Role::new("b9", &[]));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for sent in [now - 3_600, now - 3_540] {
        let hello = format!(r#"{{"version":"9","can":[],"time":{sent}}}"#);
        broker.publish(message("wgkex/broker/b9/hello", hello, 1, true));
    }
    wait_until("it is named", || {
        let status = Http::connect(worker.http).get("/status.json").json();
        let problem = status["problems"][0].as_str()?;
        problem
            .starts_with("clock: that of broker b9 is 3")
            .then(|| assert!(problem.contains("s behind this gateway's")))
    });
}

/// Regression: its confirmation was ignored, and nobody published its key.
#[test]
fn a_confirmation_makes_a_gateway_responsive_again() {
    let stack = Stack::start(Plan::new(Bus::Mosquitto));
    let gateway = stack.probe(Role::new("gw1", &[&key_topic(DOMAIN)]));
    gateway.publish_all([hello("gw1"), data("gw1", DOMAIN), peers_of("gw1", DOMAIN, "3"), status("gw1", "0")]);
    assert_eq!(stack.v1(DOMAIN, &key(1)).status, 503);
    assert_eq!(gateway.next_on(&key_topic(DOMAIN)).text(), key(1));
    gateway.publish(applied("gw1", DOMAIN, &key(1)));
    stack.wait_for_gateways(1);
}
