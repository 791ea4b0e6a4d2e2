//! The real worker with a scripted original broker, compared byte by byte (contract section 4). Needs root.

use std::net::{Ipv4Addr, SocketAddr};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::probe::{Message, Probe, Role, message};
use wgkex_tests::process::Process;
use wgkex_tests::{key, wait_until};

const GATEWAY_NAME: &str = "gateway";

/// A gateway at a Mosquitto without a broker of ours, and an original broker that receives every message.
struct Scene {
    host: Host,
    _mosquitto: Process,
    broker: Probe,
}

impl Scene {
    fn new() -> Self {
        let host = Host::new(GATEWAY_NAME, Lane::Userspace);
        host.configure("mqtt: {broker_url: 127.0.0.1}\n");
        host.setup();
        let mosquitto = host.start_mosquitto();
        let will = message("wireguard-broker/old/status", "0", 1, true);
        let role = Role::new("old", &["wireguard-worker/#", "wireguard-metrics/#", "wgkex/#"]).will(will);
        let broker = connect(&host, role);
        broker.publish(message("wireguard-broker/old/status", "1", 1, true));
        Self { host, _mosquitto: mosquitto, broker }
    }

    fn connect(&self, role: Role) -> Probe {
        connect(&self.host, role)
    }

    /// The messages that the broker has received, except those that a session publishes to itself.
    fn all_received(&self) -> Vec<Message> {
        self.broker.received().into_iter().filter(|message| !message.topic.ends_with("/echo")).collect()
    }

    /// Waits until the broker has received so many messages from `first` on, and returns them.
    fn received(&self, first: usize, number: usize) -> Vec<Message> {
        let mut received = Vec::new();
        wait_until(&format!("{number} messages from {first} on"), || {
            received = self.all_received();
            (received.len() >= first + number).then_some(())
        });
        received.drain(first..first + number).map(Message::undated).collect()
    }

    fn data(&self, rest: &str, port: u16) -> Message {
        let public_key = self.host.run(&format!("wg show wg-{rest} public-key"));
        let address =
            self.host.run(&format!("ip -6 -o addr show dev wg-{rest} | awk '{{sub(\"/.*\", \"\", $4); print $4}}'"));
        let data = format!(
            r#"{{"ExternalAddress":"{GATEWAY_NAME}","Port":{port},"PublicKey":"{public_key}","LinkAddress":"{address}"}}"#
        );
        message(format!("wireguard-worker/{GATEWAY_NAME}/test_{rest}/data"), data, 1, false)
    }
}

fn connect(host: &Host, role: Role) -> Probe {
    host.inside(|| Probe::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, 1883)), role))
}

fn status(status: &str) -> Message {
    message(format!("wireguard-worker/{GATEWAY_NAME}/status"), status, 1, false)
}

fn peers(rest: &str, peers: &str, qos: u8) -> Message {
    message(format!("wireguard-metrics/test_{rest}/{GATEWAY_NAME}/connected_peers"), peers, qos, false)
}

fn hello(payload: &str) -> Message {
    message(format!("wgkex/worker/{GATEWAY_NAME}/hello"), payload, 1, false)
}

fn applied(domain: &str, keys: &[String]) -> Message {
    let keys = serde_json::to_string(keys).expect("JSON");
    let payload = format!(r#"{{"domain":"{domain}","installed":{keys},"failed":{{}}}}"#);
    message(format!("wgkex/worker/{GATEWAY_NAME}/applied"), payload, 1, false)
}

/// The messages of a worker on every connection: hello and states, then its online status, and the hello again.
fn greeting(scene: &Scene) -> [Message; 7] {
    let hello = || hello(r#"{"version":"0.1.0","can":["confirm","revoke"],"domains":["test_a","test_b"]}"#);
    [
        hello(),
        scene.data("a", 51820),
        peers("a", "0", 0),
        scene.data("b", 51821),
        peers("b", "0", 0),
        status("1"),
        hello(),
    ]
}

/// At its start a worker may be online before it has read its kernel; the other messages keep their order.
fn assert_greets(scene: &Scene, first: usize) {
    let mut received = scene.received(first, 7);
    let place = received
        .iter()
        .position(|message| *message == status("1"))
        .unwrap_or_else(|| panic!("not online: {received:?}"));
    assert!(place > 0, "hello comes before the status: {received:?}");
    let online: Vec<_> = received.drain(place..place + 2).collect();
    received.extend(online);
    assert_eq!(received, greeting(scene));
}

#[test]
#[ignore = "needs root: tests/run"]
fn a_workers_session_with_an_original_broker_is_the_contracts_to_the_byte() {
    let scene = Scene::new();
    let mut worker = scene.host.start_worker();
    assert_greets(&scene, 0);

    // The original publishes with QoS 0; a community's own tool may address one gateway instead of all.
    let mut so_far = 7;
    for (n, (topic, domain)) in (0..).zip([("all", "test_a"), ("gw", "test_a"), ("all", "test_b")]) {
        let key = key(n);
        scene.broker.publish(message(format!("wireguard/{domain}/{topic}"), key.as_str(), 0, false));
        assert_eq!(scene.received(so_far, 1), [applied(domain, std::slice::from_ref(&key))]);
        let rest = domain.trim_start_matches("test_");
        assert_eq!(scene.host.tables(rest).missing(&key), Vec::<String>::new());
        so_far += 1;
    }

    // Another client of its name ends its connection; the worker publishes its states again on the next one.
    scene.connect(Role::new(GATEWAY_NAME, &[])).drop_connection();
    assert_eq!(scene.received(so_far, 1), [status("0")]);
    assert_eq!(scene.received(so_far + 1, 7), greeting(&scene));
    so_far += 8;

    assert!(worker.end_by(Signal::SIGTERM).success());
    let farewell = [peers("a", "-1", 1), peers("b", "-1", 1), hello(""), status("0")];
    assert_eq!(scene.received(so_far, 4), farewell);
    so_far += 4;

    let mut worker = scene.host.start_worker();
    assert_greets(&scene, so_far);
    so_far += 7;
    let _ = worker.end_by(Signal::SIGKILL);
    assert_eq!(scene.received(so_far, 1), [status("0")]);
    assert_eq!(scene.all_received().len(), so_far + 1, "and nothing else");
}

#[test]
#[ignore = "needs root: tests/run"]
fn a_workers_states_are_retained_for_an_original_broker_that_starts_later() {
    let scene = Scene::new();
    let mut worker = scene.host.start_worker();
    let _ = scene.received(0, 7);
    let assert_found = |states: [Message; 5]| {
        let late = scene.connect(Role::new("late", &["#"]));
        for state in states {
            assert_eq!(late.next_on(&state.topic), Message { retain: true, ..state });
        }
    };
    let (a, b) = (scene.data("a", 51820), scene.data("b", 51821));
    assert_found([a.clone(), peers("a", "0", 0), b.clone(), peers("b", "0", 0), status("1")]);
    assert!(worker.end_by(Signal::SIGTERM).success());
    assert_found([a, peers("a", "-1", 1), b, peers("b", "-1", 1), status("0")]);
}
