//! The worker's read-only commands: `status` and `dry-run`.

use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;
use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::process::binary;
use wgkex_tests::{key, wait_until};

use crate::{Single, end};

/// Runs the worker's program with these arguments; returns its exit code and output.
pub fn worker(host: &Host, arguments: &str) -> (i32, String) {
    let output = host.try_run(&format!("{} --config /run/wgkex.yaml {arguments}", binary("wgkex-worker").display()));
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().expect("an exit code"), String::from_utf8_lossy(&text).into_owned())
}

pub fn status_shows_what_is_served_and_what_is_wrong(lane: Lane) {
    let Single { broker, worker: process, host } = Single::new(lane, "");
    assert_eq!(host.post(2, &key(0)).status, 200);
    wait_until("all is well", || (worker(&host, "status").0 == 0).then_some(()));
    // The tables are read about once in 45 s. Regression: it was 0 until then.
    let never_connected = || {
        let status: Value = serde_json::from_str(&worker(&host, "status --json").1).unwrap();
        status["domains"]["test_a"]["peers"]["never_connected"].as_u64().unwrap()
    };
    for n in 1..5 {
        let before = never_connected();
        assert_eq!(host.post(2, &key(n)).status, 200);
        assert!(never_connected() > before, "it is counted at once");
    }
    let (code, text) = worker(&host, "status");
    for said in [
        "worker gateway, version ",
        ": all well\nMQTT connected\n",
        "domain test_a up: wg-a, vx-a, UDP port 51820; peers: connected 0, idle 0, never connected ",
        "domain test_b up: wg-b, vx-b, UDP port 51821",
        "installed ",
        "waiting: 0 in the queue, 0 pending\n",
    ] {
        assert!(code == 0 && text.contains(said), "{said} is not in {text}");
    }
    let (code, text) = worker(&host, "status --json");
    let json: Value = serde_json::from_str(&text).unwrap();
    assert!(
        code == 0 && json["domains"]["test_a"]["up"] == true && json["problems"] == Value::Array(Vec::new()),
        "{text}"
    );
    for public in [key(0), host.run("wg show wg-a public-key"), link_local(&key(0))] {
        assert!(!text.contains(&public), "{text}");
    }
    let options = host.run("curl -s -i -X OPTIONS http://127.0.0.1:9586/status.json");
    assert!(options.starts_with("HTTP/1.1 200") && options.contains("GET, HEAD, OPTIONS"), "{options}");
    assert!(host.run("curl -s -I http://127.0.0.1:9586/status.json").starts_with("HTTP/1.1 200"));

    let watch = host.start("watch", &binary("wgkex-worker"), &["status", "--watch"], &[]);
    watch.wait_for_log("0/s");
    assert!(!watch.log().contains('\x1b'), "no colours, nobody looks: {}", watch.log());
    drop(broker);
    watch.wait_for_log("wrong: MQTT: ");
    drop(watch);
    let (code, text) = worker(&host, "status");
    assert!(
        code == 3 && text.contains("MQTT not connected\n") && text.contains("wrong: MQTT: 127.0.0.1:1883: "),
        "{text}"
    );
    host.run("ip link set wg-b down");
    wait_until("the domain is down", || {
        worker(&host, "status").1.contains("wrong: domain test_b: interface wg-b is down").then_some(())
    });
    drop(process);
    let (code, text) = worker(&host, "status");
    assert!(code == 1 && text.contains("worker_listen 127.0.0.1:9586: is the worker running?"), "{text}");
}

pub fn dry_run_shows_what_the_worker_would_change_and_changes_nothing(lane: Lane) {
    let Single { broker: _broker, worker: mut process, host } = Single::new(lane, "");
    let nothing = "# test_a: nothing would change\n# test_b: nothing would change\n";
    // The state file is written a moment later. Regression: the new peer was shown as a stale one.
    for n in 0..5 {
        assert_eq!(host.post(2, &key(n)).status, 200);
        assert_eq!(worker(&host, "dry-run"), (0, nothing.to_owned()), "{n}");
    }
    assert_eq!(host.metric(9586, "wgkex_worker_state_kept").as_deref(), Some("1"));
    end(&mut process, Signal::SIGTERM);

    let node = |n| link_local(&key(n));
    host.run(&format!("ip -6 route del {}/128 dev wg-a proto static", node(0)));
    host.run(&format!("bridge fdb del 00:00:00:00:00:00 dev vx-a dst {} via wg-a", node(1)));
    host.run(&format!("wg set wg-a peer {} remove", key(2)));
    let before = (host.tables("a"), host.wireguard("wg-a"), state(&host));
    let (code, script) = worker(&host, "dry-run");
    for line in [
        "# test_a: 3 changes\n".to_owned(),
        format!("ip -6 route add {}/128 dev wg-a proto static  # is missing\n", node(0)),
        format!("bridge fdb append 00:00:00:00:00:00 dev vx-a dst {} via wg-a self permanent  # is missing\n", node(1)),
        format!("wg set wg-a peer {} allowed-ips {}/128  # is missing\n", key(2), node(2)),
    ] {
        assert!(code == 0 && script.contains(&line), "{line} is not in {script}");
    }
    let (code, text) = worker(&host, "dry-run --json");
    let json: Value = serde_json::from_str(&text).unwrap();
    assert!(code == 0 && json["test_a"]["changes"].as_array().is_some_and(|changes| changes.len() == 3), "{text}");
    assert_eq!((host.tables("a"), host.wireguard("wg-a"), state(&host)), before);

    // The printed script makes the same changes as the worker.
    host.run(&script);
    assert_eq!(worker(&host, "dry-run"), (0, nothing.to_owned()));
    host.run("ip link del vx-b");
    let (code, text) = worker(&host, "dry-run");
    assert!(code == 1 && text.contains("# test_b: interface vx-b is missing\n"), "{text}");
}

/// All state files with their content.
fn state(host: &Host) -> Vec<(String, Vec<u8>)> {
    let files = std::fs::read_dir(host.path("/run/wgkex/state")).unwrap().map(|entry| entry.unwrap().path());
    let named = |file: &Path| (file.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(file).unwrap());
    let mut files: Vec<_> = files.map(|file| named(&file)).filter(|(name, _)| name.starts_with("worker")).collect();
    files.sort();
    files
}
