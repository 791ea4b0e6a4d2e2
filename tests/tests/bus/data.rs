//! Data and hellos of gateways, in forms that other programs may write, and in forms that cannot be used.

use wgkex_tests::key;
use wgkex_tests::probe::{Role, message};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, data, endpoint, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};

use super::on_both;

on_both!(
    a_port_may_be_a_text,
    invalid_payloads_are_logged_once_with_gateway_and_cause,
    what_the_page_shows_of_a_gateway_is_bounded,
);

/// Regression: the answer was 503, as the data was ignored.
fn a_port_may_be_a_text(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let mut text = data("gw1", DOMAIN);
    text.payload = text.text().replace("40011", "\"40011\"").into();
    let _original =
        stack.probe(Role::new("gw1", &[]).greeting(vec![text, peers_of("gw1", DOMAIN, "0"), status("gw1", "1")]));
    stack.wait_for_gateways(1);
    let answer = stack.v2(DOMAIN, &key(1));
    assert_eq!((answer.status, answer.json()), (200, endpoint("gw1")));
}

/// Regression: none of them was logged, except at level DEBUG.
fn invalid_payloads_are_logged_once_with_gateway_and_cause(bus: Bus) {
    let mut stack = Stack::start(Plan::new(bus));
    let gateway = stack.probe(Role::new("gw2", &[]));
    let of_data = |from: &str, to: &str| data("gw2", DOMAIN).text().replace(from, to);
    let own = |topic: &str| format!("wgkex/worker/gw2/{topic}");
    let peers = format!("wireguard-metrics/{DOMAIN}/gw2/connected_peers");
    let of_domain = format!("wireguard-worker/gw2/{DOMAIN}/data");
    let cases = [
        (&of_domain, of_data("40011", "\"http\""), "data", "Port is not a port"),
        (&of_domain, of_data("\"PublicKey\"", "\"Key\""), "data", "PublicKey is missing"),
        (&of_domain, of_data("gw2.example", ""), "data", "ExternalAddress is missing"),
        (&of_domain, "x".into(), "data", "is not a JSON object"),
        (&own("hello"), r#"{"version": 1}"#.into(), "hello", "version is not a short text"),
        (&peers, "many".into(), "connected_peers", "is not a number of peers"),
        (&"wireguard-worker/gw2/status".to_owned(), "2".into(), "status", "is neither 1 nor 0"),
        (&own("applied"), r#"{"domain": 1}"#.into(), "applied", "is not the JSON"),
    ];
    for (topic, payload, ..) in &cases {
        for _ in 0..3 {
            gateway.publish(message(topic.as_str(), payload.as_str(), 1, false));
        }
    }
    let ignored = "wgkex_broker_mqtt_messages_ignored_total{reason=\"payload\"}";
    stack.wait_for_metric(ignored, 24.0);
    let lines_about = |stack: &mut Stack, cause: &str| {
        let log = stack.broker().log();
        log.lines().filter(|line| line.contains(cause)).map(str::to_owned).collect::<Vec<_>>()
    };
    for (_, _, what, cause) in &cases {
        let lines = lines_about(&mut stack, cause);
        assert_eq!(lines.len(), 1, "{cause}: {lines:?}");
        for part in [" WARN ", "gateway=\"gw2\"", &format!("what=\"{what}\"")] {
            assert!(lines[0].contains(part), "{part}: {lines:?}");
        }
    }
    // A payload that is wrong again after a right one is logged again.
    gateway.publish_all([data("gw2", DOMAIN), message(of_domain.as_str(), "x", 1, false)]);
    stack.wait_for_metric(ignored, 25.0);
    assert_eq!(lines_about(&mut stack, "is not a JSON object").len(), 2);
}

/// Regression: both hellos were accepted, and the page showed the whole version.
fn what_the_page_shows_of_a_gateway_is_bounded(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    for length in [10_000, 100_000] {
        let hello = format!(r#"{{"version":"{}","can":["confirm"]}}"#, "v".repeat(length));
        worker.probe.publish(message("wgkex/worker/gw1/hello", hello, 1, true));
        worker.probe.publish(message(
            format!("wgkex/worker/{}/hello", "n".repeat(300)),
            r#"{"version":"9","can":[]}"#,
            1,
            false,
        ));
    }
    stack.wait_for_metric("wgkex_broker_mqtt_messages_ignored_total{reason=\"payload\"}", 2.0);
    stack.wait_for_metric("wgkex_broker_mqtt_messages_ignored_total{reason=\"topic\"}", 2.0);
    let page = stack.get("/").body;
    assert!(page.len() < 10_000 && page.contains("gw1") && !page.contains("vvv") && !page.contains("nnn"), "{page}");
}
