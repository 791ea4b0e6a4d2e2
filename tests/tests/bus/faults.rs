//! Faults that must not occur: a payload that ends the broker, and a wrong answer.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use wgkex_tests::http::{Http, ask};
use wgkex_tests::probe::{Message, Role, message};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, endpoint};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V1, V2};
use wgkex_tests::{host_name, key, wait_until};

use super::on_both;

on_both!(a_broker_survives_any_payload, no_answer_is_wrong_when_the_mqtt_server_is_killed);

fn topics() -> Vec<String> {
    let host = host_name();
    [
        "wireguard/ffx_a/all",
        "wireguard/ffx_none/all",
        "wireguard-metrics/ffx_a/gw9/connected_peers",
        "wireguard-metrics/ffx_none/gw9/connected_peers",
        "wireguard-metrics/ffx_a//connected_peers",
        "wireguard-worker/gw9/status",
        "wireguard-worker/gw9/ffx_a/data",
        "wireguard-worker/gw9/ffx_none/data",
        "wireguard-worker//ffx_a/data",
        "wireguard-broker/other/status",
        "wgkex/worker/gw9/hello",
        "wgkex/worker/gw9/applied",
        "wgkex/worker/gw1/applied",
        "wgkex/nobody/gw9/knows",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([format!("wireguard-broker/{host}/status/more")])
    .collect()
}

fn payloads() -> Vec<Vec<u8>> {
    let texts: [&[u8]; 22] = [
        b"",
        b"x",
        b"-2",
        b"1e9",
        b"99999999999999999999999999",
        b"NaN",
        b" 1 ",
        b"\x00",
        b"\xff\xfe\x80",
        b"null",
        b"{}",
        b"[]",
        b"{",
        br#"{"ExternalAddress": 1, "Port": "x", "PublicKey": [], "LinkAddress": null}"#,
        br#"{"ExternalAddress": "a", "Port": -1, "PublicKey": "x", "LinkAddress": "y"}"#,
        br#"{"ExternalAddress": "a", "Port": 99999, "PublicKey": "x", "LinkAddress": "y"}"#,
        br#"{"version": 1, "can": "confirm"}"#,
        br#"{"version": "1", "can": [1, null, {}]}"#,
        br#"{"domain": 1, "installed": {}, "failed": []}"#,
        br#"{"domain": "ffx_a", "installed": ["x"], "failed": {"y": 1}}"#,
        br#"{"domain": "ffx_none"}"#,
        b"<script>alert(1)</script>",
    ];
    let deep = [b"[".repeat(100_000), b"{\"a\":".repeat(50_000)];
    // A little less than the largest packet of the embedded server.
    let large = [b"9".repeat(1 << 20), b"\xff".repeat(1 << 20)].map(|mut large| {
        large.truncate(large.len() - 100);
        large
    });
    texts.into_iter().map(<[u8]>::to_vec).chain(deep).chain(large).collect()
}

fn a_broker_survives_any_payload(bus: Bus) {
    let mut stack = Stack::start(Plan::new(bus));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let stranger = stack.probe(Role::new("stranger", &[]));
    for topic in topics() {
        for payload in payloads() {
            stranger.publish_all([message(&topic, payload.clone(), 0, false), message(&topic, payload, 1, true)]);
        }
        let response = stack.v2(DOMAIN, &key(1));
        assert_eq!((response.status, response.json()), (200, endpoint("gw1")), "after {topic}");
    }
    assert!(stack.broker().is_running());
    assert_eq!(stack.get("/readyz").status, 200);
    assert!(!stack.get("/").body.contains("<script"), "a stranger's text is only text");
    if bus == Bus::Mosquitto {
        let _ = stack.stop_broker();
        stack.start_broker();
        stack.wait_until_ready();
        assert_eq!(stack.v2(DOMAIN, &key(2)).json(), endpoint("gw1"));
    }
}

/// Keys, and the statuses of the answers to their routers.
type Answers = Mutex<Vec<(String, u16)>>;

fn lock(answers: &Answers) -> MutexGuard<'_, Vec<(String, u16)>> {
    answers.lock().expect("nobody fails with the lock")
}

/// Routers request without a pause while the bus is killed and restarted. The key of each 200 is at the gateway.
fn no_answer_is_wrong_when_the_mqtt_server_is_killed(bus: Bus) {
    let mut stack = Stack::start(Plan::new(bus));
    let gateway = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let routers: Vec<_> = (0..4)
        .map(|router| {
            let (stop, answered, http) = (stop.clone(), answered.clone(), stack.http);
            thread::spawn(move || ask_until(&stop, http, router * 1_000_000, &answered))
        })
        .collect();
    let accepted = |answered: &Answers| lock(answered).iter().filter(|(_, status)| *status == 200).count();
    for round in 1..=3 {
        wait_until("routers are served", || (accepted(&answered) >= round * 50).then_some(()));
        stack.kill_and_restart_bus();
        let before = accepted(&answered);
        wait_until("routers are served again", || (accepted(&answered) > before + 10).then_some(()));
    }
    stop.store(true, Ordering::Relaxed);
    for router in routers {
        router.join().expect("a router that always gets an answer");
    }
    let at_gateway: BTreeSet<_> = gateway.probe.received().iter().map(Message::text).collect();
    for (key, status) in &*lock(&answered) {
        assert!([200, 503].contains(status), "{status}");
        assert!(*status != 200 || at_gateway.contains(key), "{key} got a 200 and is not there");
    }
}

fn ask_until(stop: &AtomicBool, http: std::net::SocketAddr, first: u32, answered: &Answers) {
    for n in first.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (key, path) = (key(n), if n % 2 == 0 { V1 } else { V2 });
        // With the embedded server the broker is down, too.
        let response = Http::try_connect(http).and_then(|mut http| {
            http.send(request(path, &ask(DOMAIN, &key)).as_bytes());
            http.try_response("POST")
        });
        match response {
            Ok(response) => lock(answered).push((key, response.status)),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn request(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: broker\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}
