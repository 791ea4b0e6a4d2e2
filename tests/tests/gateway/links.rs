//! Missing, deleted and recreated interfaces.

use std::net::{Ipv4Addr, SocketAddr};

use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::probe::{Probe, message};
use wgkex_tests::process::Process;
use wgkex_tests::{key, wait_until};

use crate::serves;

pub fn interfaces_may_be_missing_deleted_and_recreated(lane: Lane) {
    let host = Host::new("gateway", lane);
    let _broker = host.start_broker();
    let mut worker = host.start_worker();
    wait_until("the broker is ready", || (host.get(5000, "/readyz")?.status == 200).then_some(()));
    let witness = host.inside(|| Probe::witness(SocketAddr::from((Ipv4Addr::LOCALHOST, 1883))));
    for rest in ["a", "b"] {
        is_down(&host, &witness, rest);
        assert_eq!(downs(&worker, rest), 1, "{}", worker.log());
    }
    for version in [1, 2] {
        assert_eq!(host.post(version, &key(0)).status, 503);
    }
    // Version 1 publishes the key all the same.
    let mut keys = vec![key(0), key(1), key(2)];
    announce(&witness, &keys[1..]);
    let received = || host.metric(9586, r#"wgkex_worker_keys_received_total{domain="test_a"}"#);
    wait_until("all keys are received", || (received()? == "3").then_some(()));
    trigger_read(&host);
    assert_eq!(downs(&worker, "a"), 1, "{}", worker.log());

    host.setup();
    all_are_there(&host, &keys);
    serves(&host);
    keys.push(key(3));
    assert_eq!(host.post(2, &key(3)).status, 200);
    let before = downs(&worker, "b");

    let failed = || host.metric(9586, r#"wgkex_worker_keys_failed_total{domain="test_a",reason="interface"}"#);
    // The second command removes only the flood list, which is one of the three objects all the same.
    for (command, n) in [("ip link del wg-a", 10), ("ip link del vx-a", 11)] {
        let (downs_before, failed_before) = (downs(&worker, "a"), failed());
        host.run(command);
        is_down(&host, &witness, "a");
        assert_eq!(host.metric(9586, r#"wgkex_worker_domain_up{domain="test_b"}"#).as_deref(), Some("1"));
        announce(&witness, &[key(n)]);
        wait_until("the key fails", || (failed()? != *failed_before.as_ref()?).then_some(()));
        trigger_read(&host);
        assert_eq!(downs(&worker, "a"), downs_before + 1, "after {command}: {}", worker.log());
        keys.push(key(n));

        // A userspace WireGuard takes some time to end, and keeps its name until then.
        let free = "ip link show wg-a || ! test -e /run/wireguard/wg-a.sock";
        wait_until("the name is free", || host.try_run(free).status.success().then_some(()));
        host.setup();
        all_are_there(&host, &keys);
        serves(&host);
        assert_eq!(host.post(2, &key(3)).status, 200);
    }
    assert_eq!(downs(&worker, "b"), before, "{}", worker.log());
    assert!(worker.is_running());
}

/// The worker has reported in its metrics, on the bus and at /readyz that it does not serve this domain.
fn is_down(host: &Host, witness: &Probe, rest: &str) {
    let up = || host.metric(9586, &format!(r#"wgkex_worker_domain_up{{domain="test_{rest}"}}"#));
    wait_until("the metric says it", || (up()? == "0").then_some(()));
    let peers = format!("wireguard-metrics/test_{rest}/gateway/connected_peers");
    witness.next("the domain is offline", |message| message.topic == peers && message.text() == "-1");
    let unready = host.get(9586, "/readyz").unwrap();
    assert!(unready.status == 503 && unready.body.contains(&format!("domain test_{rest}: ")), "{unready:?}");
}

/// Changes another link, so that the worker searches for its own again.
fn trigger_read(host: &Host) {
    let failures = || host.metric(9586, r#"wgkex_worker_read_failures_total{domain="test_a"}"#);
    let before = failures();
    host.run("ip link add other type veth peer name another && ip link del other");
    wait_until("the worker looks again", || (failures()? != *before.as_ref()?).then_some(()));
}

fn downs(worker: &Process, rest: &str) -> usize {
    let domain = format!("test_{rest}");
    worker.log().lines().filter(|line| line.contains("domain is down") && line.contains(&domain)).count()
}

/// Publishes keys as any broker of the fleet does.
fn announce(witness: &Probe, keys: &[String]) {
    witness.publish_all(keys.iter().map(|key| message("wireguard/test_a/all", key.as_str(), 0, false)));
}

fn all_are_there(host: &Host, keys: &[String]) {
    wait_until("all keys are there", || {
        let tables = host.tables("a");
        keys.iter().all(|key| tables.missing(key).is_empty()).then_some(())
    });
}
