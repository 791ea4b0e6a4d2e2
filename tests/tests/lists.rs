//! Access lists, from files and by admin calls: the real broker with scripted gateways, and a worker on the kernel in
//! memory with a scripted broker.
//!
//! If a guard is removed, a test here, in `faults/lists.rs` or beside the code fails: the token, the order of the
//! lists, ends of entries, damaged files, digests, the wait for the revocation list, refusals at broker and worker,
//! removals, queued and owed steps, and state on disk.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_common::access_lists::records::Records;
use wgkex_common::access_lists::{Entry, List};
use wgkex_common::time_text::unix;
use wgkex_tests::admin::{Operator, printed};
use wgkex_tests::http::{Http, Response};
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::{Message, Probe, Role, message};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, data, key_for, key_topic, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key, wait_until};

/// A broker with `config` and one gateway that confirms, and its operator.
fn scene(config: &str) -> (Stack, Worker, Operator) {
    let (operator, more) = Operator::new();
    let stack = Stack::start(Plan::new(Bus::Embedded).config(config).config(&more));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    (stack, worker, operator)
}

fn statuses(stack: &Stack, key: &str) -> [u16; 2] {
    [stack.v1(DOMAIN, key).status, stack.v2(DOMAIN, key).status]
}

fn wait_for_status(stack: &Stack, key: &str, status: u16) {
    wait_until(&format!("a router hears {status}"), || (stack.v2(DOMAIN, key).status == status).then_some(()));
}

/// A gateway that can revoke, and reports `outcome` for every key that a record denies.
fn revoking(stack: &Stack, name: &str, outcome: &'static str) -> Probe {
    let hello = r#"{"version":"9","can":["confirm","revoke"]}"#;
    let greeting = vec![message(format!("wgkex/worker/{name}/hello"), hello, 1, true), status(name, "1")];
    let topic = format!("wgkex/worker/{name}/revoked");
    stack.probe(Role::new(name, &["wgkex/revocations"]).greeting(greeting).answer(move |received| {
        let records: Vec<Value> = serde_json::from_slice(&received.payload).unwrap();
        let denied = records.iter().filter(|record| record["on"] == true && !outcome.is_empty());
        let answer = |record: &Value| {
            let key = record["key"].as_str().unwrap();
            message(topic.clone(), json!({ "at": record["at"], "keys": { key: outcome } }).to_string(), 1, false)
        };
        denied.map(answer).collect::<Vec<Message>>()
    }))
}

#[test]
fn a_denied_key_gets_403_without_the_reason_and_reaches_no_gateway() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deny.yaml");
    fs::write(&file, format!("{}: {{reason: SPAM, name: ATTIC}}\n", key(1))).unwrap();
    let (mut stack, _worker, _) = scene(&format!("blacklist_file: {}", file.display()));
    let witness = stack.witness();
    for answer in [stack.v1(DOMAIN, &key(1)), stack.v2(DOMAIN, &key(1))] {
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert_eq!((answer.status, message.as_str()), (403, "this key is not accepted here"));
        assert!(!answer.body.contains("SPAM") && !answer.body.contains("ATTIC"), "{answer:?}");
    }
    assert_eq!(statuses(&stack, &key(2)), [200, 200]);
    witness.next_on(&key_topic(DOMAIN));
    assert!(!witness.received().iter().any(|message| message.text().contains(&key(1))), "{:?}", witness.received());
    assert_eq!(stack.metric(r#"wgkex_broker_keys_refused_total{api="v2",reason="denied"}"#), Some(1.0));
    let log = stack.broker().log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("key refused")).collect();
    assert!(lines.len() == 1 && lines[0].contains(r#"reason="denied""#) && lines[0].contains(DOMAIN), "once: {log}");
    assert!(lines[0].contains(&key(1)[..8]) && !log.contains(&key(1)) && !log.contains("SPAM"), "{log}");
}

#[test]
fn a_list_that_changes_is_read_again_and_a_damaged_one_keeps_the_last_good_one() {
    let dir = tempfile::tempdir().unwrap();
    let (file, keys) = (dir.path().join("deny.yaml"), dir.path().join("keys"));
    fs::create_dir(&keys).unwrap();
    fs::write(&file, "[]").unwrap();
    let config = format!(
        "blacklist_file: {}\nkey_lists: {{deny_dir: {}}}\nallowlist: {{refresh_interval: 0.1}}",
        file.display(),
        keys.display()
    );
    let (mut stack, _worker, _) = scene(&config);
    assert_eq!(statuses(&stack, &key(1)), [200, 200]);
    fs::write(&file, format!("- {}\n", key(1))).unwrap();
    wait_for_status(&stack, &key(1), 403);
    fs::write(keys.join("node-2"), key(2)).unwrap();
    wait_for_status(&stack, &key(2), 403);

    let damaged = r#"wgkex_broker_lists_damaged{list="blacklist_file"}"#;
    assert_eq!(stack.metric(damaged), Some(0.0));
    fs::write(&file, format!("- {}\n- nonsense\n", key(3))).unwrap();
    stack.wait_for_metric(damaged, 1.0);
    assert_eq!((statuses(&stack, &key(1)), statuses(&stack, &key(3))), ([403, 403], [200, 200]));
    let line = stack.broker().wait_for_log("list is damaged");
    assert!(line.contains("blacklist_file") && line.contains("entry 2"), "{line}");
    fs::remove_file(&file).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(statuses(&stack, &key(1)), [403, 403], "a list that is gone, too");
    fs::write(&file, format!("- {}\n", key(3))).unwrap();
    stack.wait_for_metric(damaged, 0.0);
    assert_eq!((statuses(&stack, &key(1)), statuses(&stack, &key(3))), ([200, 200], [403, 403]));
    assert_eq!(stack.metric(r#"wgkex_broker_list_keys{list="deny"}"#), Some(2.0));
    assert!(!stack.broker().log().contains(&key(1)));
}

#[test]
fn sighup_reads_the_lists_again_and_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deny.yaml");
    fs::write(&file, "").unwrap();
    let config = format!("blacklist_file: {}\nallowlist: {{refresh_interval: 86400}}", file.display());
    let (mut stack, _worker, _) = scene(&config);
    // A file that was being written at the start is read a second time soon after.
    std::thread::sleep(Duration::from_secs(2));
    fs::write(&file, format!("- {}\n", key(1))).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(statuses(&stack, &key(1)), [200, 200], "nobody looked");
    stack.broker().signal(Signal::SIGHUP);
    wait_for_status(&stack, &key(1), 403);
    assert!(stack.broker().is_running());
}

#[test]
fn only_listed_keys_come_where_there_is_an_allow_list_and_deny_beats_it() {
    let dir = tempfile::tempdir().unwrap();
    let (allow, deny) = (dir.path().join("allow.yaml"), dir.path().join("deny.yaml"));
    fs::write(&allow, format!("{DOMAIN}: [\"{}\", \"{}\"]\nffx_b: [\"{}\"]\n", key(1), key(2), key(3))).unwrap();
    fs::write(&deny, format!("- {}\n", key(2))).unwrap();
    let config = format!("allowlist: {{enabled: true, file: {}}}\nblacklist_file: {}", allow.display(), deny.display());
    let (stack, _worker, operator) = scene(&config);
    let all = || [1, 2, 3, 4].map(|n| statuses(&stack, &key(n)));
    assert_eq!(all(), [[200; 2], [403; 2], [403; 2], [403; 2]]);
    for (command, list) in [("allow", "allow"), ("trust", "trusted")] {
        for options in [&["--json"][..], &["--json", "--remove"]] {
            let done = operator.run(&stack, &[&[command, &key(5)], options].concat());
            let answer: Value = serde_json::from_slice(&done.stdout).unwrap();
            assert_eq!([&answer["list"], &answer["done"]], [&json!(list), &json!(true)], "{command} {options:?}");
        }
    }
    let allowed = operator.run(&stack, &["allow", &key(4), "--domain", DOMAIN, "--name", "attic"]);
    assert!(allowed.status.success(), "{}", printed(&allowed));
    assert_eq!(all(), [[200; 2], [403; 2], [403; 2], [200; 2]]);
    let allowed = operator.run(&stack, &["allow", &key(2)]);
    assert!(allowed.status.success(), "{}", printed(&allowed));
    assert_eq!(statuses(&stack, &key(2)), [403; 2], "it is denied, too");
    assert!(operator.run(&stack, &["allow", &key(4), "--domain", DOMAIN, "--remove"]).status.success());
    assert_eq!(statuses(&stack, &key(4)), [403; 2]);
}

#[test]
fn a_revocation_reports_the_outcome_of_each_gateway() {
    let (stack, original, operator) = scene("workers: {named: {weight: 1}}");
    original.probe.publish(message("wgkex/worker/gw1/hello", "", 1, true));
    let _gone = revoking(&stack, "gw2", "removed");
    let _absent = revoking(&stack, "gw3", "absent");
    let _altered = revoking(&stack, "gw4", "altered by somebody else");
    let _ = stack.probe(Role::new("gw5", &[]).greeting(vec![data("gw5", DOMAIN), status("gw5", "0")]));
    stack.wait_for_gateways(4);
    let revoked = operator.run(&stack, &["revoke", &key(1), "--reason", "spam", "--for", "7d"]);
    let text = printed(&revoked);
    assert_eq!(revoked.status.code(), Some(2), "{text}");
    let mut lines = text.lines();
    assert!(lines.next().unwrap().starts_with("revoked, until 20"), "{text}");
    let expected = [
        "gw1: cannot (an original, or an old version)",
        "gw2: removed",
        "gw3: was not there",
        "gw4: failed: altered by somebody else",
        "gw5: offline (applies it when it is back, before it takes keys)",
        "named: offline (applies it when it is back, before it takes keys)",
    ];
    assert_eq!(lines.collect::<Vec<_>>(), expected);

    // The broker waits two seconds for a gateway without a report.
    let _silent = revoking(&stack, "gw6", "");
    stack.wait_for_gateways(5);
    let begun = Instant::now();
    let answer = operator.call("POST", "/v1/revoke", &json!({ "key": key(2) })).json();
    assert!((1.9..10.0).contains(&begun.elapsed().as_secs_f64()), "{:?}", begun.elapsed());
    assert_eq!(answer["gateways"]["gw6"], "no answer");
    assert_eq!((&answer["done"], &answer["kept"], &answer["published"]), (&json!(false), &json!(true), &json!(true)));
}

#[test]
fn a_revocation_that_is_done_everywhere_is_success_and_is_lifted_by_its_end_or_by_hand() {
    let (operator, more) = Operator::new();
    let stack = Stack::start(Plan::new(Bus::Embedded).config(&more));
    let _worker = revoking(&stack, "gw1", "removed");
    stack.wait_for_gateways(1);
    // No gateway serves the domain, so 503 means that the lists accept the key.
    assert_eq!(statuses(&stack, &key(1)), [503, 503]);
    let revoked = operator.run(&stack, &["revoke", &key(1)]);
    assert!(revoked.status.success(), "{}", printed(&revoked));
    assert_eq!(printed(&revoked), "revoked\ngw1: removed\n");
    let answer = |arguments: &[&str]| -> Value {
        serde_json::from_slice(&operator.run(&stack, &[arguments, &["--json"]].concat()).stdout).unwrap()
    };
    assert_eq!(answer(&["unrevoke", &key(1)])["still_by"], json!([]));
    let revoked = answer(&["revoke", &key(1)]);
    assert_eq!([&revoked["gateways"], &revoked["done"]], [&json!({ "gw1": "removed" }), &json!(true)]);
    assert_eq!(statuses(&stack, &key(1)), [403, 403]);
    let lifted = operator.run(&stack, &["unrevoke", &key(1)]);
    assert!(lifted.status.success(), "{}", printed(&lifted));
    assert_eq!(statuses(&stack, &key(1)), [503, 503]);

    assert!(operator.run(&stack, &["revoke", &key(1), "--for", "3s"]).status.success());
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 403);
    wait_for_status(&stack, &key(1), 503);

    let bad = operator.run(&stack, &["revoke", &key(1), "--for", "soon"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(printed(&bad).contains("for: is not a duration"), "{}", printed(&bad));
}

#[test]
fn revocations_survive_a_restart_and_are_sent_on_request() {
    let (operator, more) = Operator::new();
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto).config(&more));
    assert!(operator.run(&stack, &["revoke", &key(1), "--reason", "spam"]).status.success());
    assert!(operator.run(&stack, &["trust", &key(2)]).status.success());
    let _ = stack.broker().end_by(Signal::SIGKILL);
    stack.start_broker();
    stack.wait_until_ready();
    // No gateway ever published its state, so v1 publishes a key that the lists accept.
    assert_eq!((statuses(&stack, &key(1)), statuses(&stack, &key(2))), ([403, 403], [200, 503]));

    let witness = stack.probe(Role::new("asker", &["#"]));
    let broker = host_name();
    let hello = witness.next_on(&format!("wgkex/broker/{broker}/hello"));
    let hello: Value = serde_json::from_slice(&hello.payload).unwrap();
    assert_eq!(hello["revocations"].as_str().unwrap().len(), 32, "{hello}");
    let question = json!({ "from": { "worker": "asker" }, "revocations": true }).to_string();
    witness.publish(message(format!("wgkex/broker/{broker}/questions"), question, 1, false));
    let records: Vec<Value> = serde_json::from_slice(&witness.next_on("wgkex/revocations").payload).unwrap();
    let about: Vec<_> = records.iter().map(|record| (record["list"].clone(), record["key"].clone())).collect();
    assert_eq!(about, [(json!("deny"), json!(key(1))), (json!("trusted"), json!(key(2)))]);
    // A program of this version requests on its own topic.
    assert!(hello["can"].as_array().unwrap().contains(&json!("named records")), "{hello}");
    let question = json!({ "from": { "worker": "asker" }, "to": broker, "revocations": true }).to_string();
    witness.publish(message("wgkex/worker/asker/questions", question, 1, false));
    witness.next_on("wgkex/revocations");
    let retained: Vec<_> = witness.received().into_iter().filter(|message| message.retain).collect();
    assert!(!retained.iter().any(|message| message.text().contains(&key(1))), "{retained:?}");
}

#[test]
fn a_revocation_without_disk_or_mqtt_takes_effect_here_and_is_reported_as_partial() {
    let (operator, more) = Operator::new();
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto).config(&more));
    // No directory can be created there.
    fs::write(stack.state_dir(), "").unwrap();
    stack.start_mosquitto();
    stack.start_broker();
    stack.wait_until_ready();
    let revoked = operator.run(&stack, &["revoke", &key(1)]);
    assert!(revoked.status.code() == Some(2) && printed(&revoked).contains("the disk"), "{}", printed(&revoked));
    for arguments in [&["trust", &key(1)][..], &["unrevoke", &key(3)], &["drain", "gw1"], &["undrain", "gw1"]] {
        let partly = operator.run(&stack, arguments);
        assert_eq!(partly.status.code(), Some(2), "{arguments:?}: {}", printed(&partly));
    }
    assert_eq!(statuses(&stack, &key(1)), [403, 403]);
    stack.wait_for_metric("wgkex_broker_lists_kept", 0.0);
    fs::remove_file(stack.state_dir()).unwrap();
    stack.wait_for_metric("wgkex_broker_lists_kept", 1.0);

    let _ = stack.mosquitto().end_by(Signal::SIGKILL);
    let revoked = operator.run(&stack, &["revoke", &key(2)]);
    assert!(revoked.status.code() == Some(2) && printed(&revoked).contains("MQTT"), "{}", printed(&revoked));
    assert!(!printed(&revoked).contains("the disk"), "{}", printed(&revoked));
    let _ = stack.broker().end_by(Signal::SIGKILL);
    stack.start_mosquitto();
    stack.start_broker();
    stack.wait_until_ready();
    assert_eq!([1, 2].map(|n| statuses(&stack, &key(n))), [[403; 2]; 2]);
}

#[test]
fn records_of_another_broker_are_merged_and_invalid_ones_ignored() {
    let (stack, worker, operator) = scene("");
    let deny = |n: u32, at: u64, on: bool| json!({ "list": "deny", "key": key(n), "at": at, "on": on });
    let publish = |payload: String| worker.probe.publish(message("wgkex/revocations", payload, 1, false));
    for nonsense in ["", "x", "[]", "{}", r#"[{"list":"x"}]"#, r#"[{"list":"deny","key":"x","at":1,"on":true}]"#] {
        publish(nonsense.to_owned());
    }
    // Records with times far in the future.
    let ms = 1000 * unix(SystemTime::now());
    publish(
        json!([deny(1, u64::MAX, true), deny(1, 4_000_000_000_000, true), deny(4, ms + 7_200_000, true)]).to_string(),
    );
    // In the wrong order: the later record is valid.
    let now = ms + 1_800_000;
    publish(json!([deny(2, now + 1, false), deny(2, now, true), deny(3, now, true)]).to_string());
    wait_for_status(&stack, &key(3), 403);
    assert_eq!([1, 2, 4].map(|n| statuses(&stack, &key(n))), [[200; 2]; 3]);
    stack.wait_for_metric("wgkex_broker_list_entries_refused_total{reason=\"future\"}", 2.0);
    stack.wait_for_metric("wgkex_broker_list_entries_refused_total{reason=\"unsound\"}", 1.0);
    // The record's time is ahead of the clock, and an operator here can lift it all the same.
    assert!(operator.run(&stack, &["unrevoke", &key(3)]).status.success());
    assert_eq!(statuses(&stack, &key(3)), [200; 2]);
}

/// Regression: with 10,000 entries a revocation was refused with 507; and entries after the 20,000th were dropped
/// silently.
#[test]
fn a_full_list_still_takes_revocations_and_reports_entries_without_room() {
    let (mut stack, worker, operator) = scene("");
    let now = 1000 * unix(SystemTime::now());
    let fill = |range: std::ops::Range<u32>| {
        let records: Vec<_> = range.map(|n| json!({ "list": "deny", "key": key(n), "at": now, "on": true })).collect();
        let payloads = records.chunks(500).map(|records| serde_json::to_string(records).unwrap());
        worker.probe.publish_all(payloads.map(|payload| message("wgkex/revocations", payload, 1, false)));
    };
    fill(1_000..11_000);
    stack.wait_for_metric("wgkex_broker_list_keys{list=\"deny\"}", 10_000.0);
    let revoke = |n: u32| operator.call("POST", "/v1/revoke", &json!({ "key": key(n) }));
    assert_eq!((revoke(1).status, statuses(&stack, &key(1))), (200, [403, 403]));
    let trusted = operator.call("POST", "/v1/lists/trusted", &json!({ "key": key(2) }));
    assert_refused(&trusted, 507, "what is taken off a list makes room");
    fill(11_000..21_100);
    stack.wait_for_metric("wgkex_broker_list_keys{list=\"deny\"}", 20_000.0);
    wait_until("what does not fit is counted", || {
        stack.metric("wgkex_broker_list_entries_refused_total{reason=\"full\"}").filter(|refused| *refused > 0.0)
    });
    stack.broker().wait_for_log("list entries of other brokers are refused");
    assert_eq!(statuses(&stack, &key(1)), [403, 403], "it is the newest");
    assert_refused(&revoke(3), 507, "what is taken off a list makes room");
    assert_eq!(operator.call("POST", "/v1/unrevoke", &json!({ "key": key(15_000) })).status, 200);
    assert_eq!(revoke(3).status, 200);
}

fn assert_refused(response: &Response, status: u16, named: &str) {
    let json = response.json();
    let message = json["error"]["message"].as_str().unwrap_or_else(|| panic!("{response:?}"));
    assert_eq!(response.status, status, "{response:?}");
    assert!(message.contains(named), "{response:?}");
}

#[test]
fn admin_calls_need_the_token() {
    let (stack, _worker, operator) = scene("");
    let token = &operator.token;
    let wrong = [
        String::new(),
        "Authorization: Bearer ".into(),
        "Authorization: Bearer x".into(),
        format!("Authorization: Bearer {}", &token[1..]),
        format!("Authorization: Bearer {token}{token}"),
        format!("Authorization: Basic {token}"),
        format!("Authorization: {token}"),
        format!("X-Token: {token}"),
    ];
    for header in &wrong {
        let headers: &[&str] = if header.is_empty() { &[] } else { &[header] };
        for (method, path) in [("POST", "/v1/revoke"), ("GET", "/v1/keys"), ("GET", "/nothing"), ("PUT", "/v1/revoke")]
        {
            let body = json!({ "key": key(1) }).to_string();
            let answer = Http::connect(operator.address).request(method, path, headers, body.as_bytes());
            assert_refused(&answer, 401, "token");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
    }
    assert_eq!(statuses(&stack, &key(1)), [200, 200]);
    let lower = format!("authorization: bearer {token}");
    assert_eq!(Http::connect(operator.address).request("GET", "/v1/keys", &[&lower], b"").status, 200);

    let out = operator.run(&stack, &["list"]);
    assert!(out.status.success(), "{}", printed(&out));
    let stranger = Operator { token: "x".into(), ..operator };
    let refused = stranger.run(&stack, &["revoke", &key(1)]);
    assert!(refused.status.code() == Some(1) && printed(&refused).contains("token"), "{}", printed(&refused));
}

#[test]
fn without_a_hash_there_are_no_admin_calls() {
    let (operator, more) = Operator::new();
    let listen = more.lines().next().unwrap();
    let stack = Stack::start(Plan::new(Bus::Embedded).config(listen));
    assert!(Http::try_connect(operator.address).is_err());
    let refused = operator.run(&stack, &["revoke", &key(1)]);
    assert!(
        refused.status.code() == Some(1) && printed(&refused).contains("admin_token_hash"),
        "{}",
        printed(&refused)
    );
}

#[test]
fn a_mistake_in_a_call_is_named_and_changes_nothing() {
    let (stack, _worker, operator) = scene("");
    let good = key(1);
    for (method, path, body, status, named) in [
        ("POST", "/v1/revoke", Value::Null, 400, "JSON"),
        ("POST", "/v1/revoke", json!([good]), 400, "JSON"),
        ("POST", "/v1/revoke", json!({}), 400, "key"),
        ("POST", "/v1/revoke", json!({ "key": "x" }), 400, "key"),
        ("POST", "/v1/revoke", json!({ "key": good, "for": "1 week" }), 400, "for"),
        ("POST", "/v1/revoke", json!({ "key": good, "reason": "x".repeat(1000) }), 400, "reason"),
        ("POST", "/v1/revoke", json!({ "key": good, "reason": "x".repeat(70_000) }), 413, "too large"),
        ("POST", "/v1/lists/allow", json!({ "key": good, "domain": "ffx_none" }), 400, "domain"),
        ("POST", "/v1/lists/nothing", json!({ "key": good }), 404, "list"),
        ("GET", "/v1/keys?list=x", Value::Null, 400, "list"),
        ("GET", "/v1/revoke", Value::Null, 405, "method"),
        ("PUT", "/v1/lists/deny", Value::Null, 405, "method"),
        ("GET", "/", Value::Null, 404, "nothing"),
    ] {
        assert_refused(&operator.call(method, path, &body), status, named);
    }
    assert_eq!(operator.call("GET", "/v1/keys", &Value::Null).json(), json!({ "keys": [] }));
    assert_eq!(statuses(&stack, &good), [200, 200]);
}

#[test]
fn admin_calls_are_logged_at_every_level_without_a_key() {
    let (mut stack, _worker, operator) = scene("log_level: ERROR");
    let bearer = ["Authorization: Bearer x"];
    let wrong = Http::connect(operator.address).request("GET", "/v1/keys", &bearer, b"");
    assert!(wrong.status == 401 && wrong.body.contains("the token is wrong: admin_token_hash"), "{wrong:?}");
    let none = Http::connect(operator.address).request("GET", "/v1/keys", &[], b"");
    assert!(none.status == 401 && none.body.contains("a token is needed"), "{none:?}");
    let body = json!({ "key": key(1), "reason": "SECRET-REASON" });
    assert_eq!(operator.call("POST", "/v1/revoke", &body).status, 200);
    assert_eq!(operator.call("POST", "/v1/unrevoke", &json!({ "key": &key(1)[1..] })).status, 400);
    assert_eq!(operator.call("POST", "/v1/unrevoke", &json!({ "key": key(1) })).status, 200);
    assert_eq!(operator.call("GET", "/v1/keys", &Value::Null).status, 200);
    stack.broker().wait_for_log("call=\"list\"");
    let log = stack.broker().log();
    let audit: Vec<_> = log.lines().filter(|line| line.contains("wgkex_audit")).collect();
    assert_eq!(audit.len(), 6, "{log}");
    for (line, outcome) in
        audit.iter().zip(["unauthorized", "unauthorized", "not done everywhere", "key: not a", "done", "ok"])
    {
        assert!(line.contains(outcome), "{outcome}: {line}");
    }
    assert!(audit[2].contains(&key(1)[..8]) && audit[2].contains("deny"), "{}", audit[2]);
    for hidden in [&key(1)[..], "SECRET-REASON", &operator.token] {
        assert!(!log.contains(hidden), "{log}");
    }
}

#[test]
fn entries_are_shown_with_their_source() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deny.yaml");
    fs::write(&file, format!("{}: {{reason: old, until: 2090-01-01}}\n", key(1))).unwrap();
    let (stack, _worker, operator) =
        scene(&format!("blacklist_file: {}\nkey_whitelist: [\"{}\"]", file.display(), key(2)));
    let _ = operator.run(&stack, &["revoke", &key(3), "--reason", "new", "--name", "Attic"]);
    let list = |arguments: &[&str]| {
        let out = operator.run(&stack, &[&["list"], arguments].concat());
        assert!(out.status.success(), "{}", printed(&out));
        printed(&out)
    };
    let of_file = format!("deny    {}  until: 2090-01-01T00:00:00Z  by: blacklist_file  reason: old\n", key(1));
    let of_config = format!("trusted {}  by: key_whitelist\n", key(2));
    let by_call = format!("deny    {}  name: Attic  by: admin  reason: new\n", key(3));
    assert_eq!(list(&[]), format!("{by_call}{of_file}{of_config}"));
    assert_eq!(list(&["--list", "deny"]), format!("{by_call}{of_file}"));
    assert_eq!(list(&["--list", "revoked"]), by_call);
    assert_eq!(list(&["--name", "attic"]), by_call);
    let json: Value = serde_json::from_str(&list(&["--json", "--list", "trusted"])).unwrap();
    assert_eq!(json, json!({ "keys": [{ "list": "trusted", "key": key(2), "source": "key_whitelist" }] }));
    // An admin call does not remove an entry of a file, and the answer names the file.
    let lifted = operator.run(&stack, &["unrevoke", &key(1)]);
    assert!(printed(&lifted).contains("still on the list deny by blacklist_file"), "{}", printed(&lifted));
    assert_eq!(statuses(&stack, &key(1)), [403, 403]);
}

/// A broker `b1` that publishes this digest, and receives the messages and requests of `gw1`.
fn scripted_broker(stack: &Stack, digest: &str) -> Probe {
    let hello = json!({ "version": "9", "can": ["answer"], "domains": [DOMAIN], "revocations": digest }).to_string();
    let filters =
        ["wgkex/broker/b1/questions", "wireguard-worker/gw1/status", "wgkex/worker/gw1/applied", "wgkex/revocations"];
    stack.probe(Role::new("b1", &filters).greeting(vec![message("wgkex/broker/b1/hello", hello, 1, true)]))
}

fn asks_for_records(message: &Message) -> bool {
    message.topic == "wgkex/broker/b1/questions" && message.text().contains("revocations")
}

#[test]
fn a_worker_installs_no_key_before_it_has_the_revocation_list() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_mosquitto();
    let now = unix(SystemTime::now());
    let mut records = Records::default();
    let record = records.change(Entry::new(List::Deny, key(1).parse().unwrap()), true, now * 1000).unwrap();
    let broker = scripted_broker(&stack, &records.digest(now));
    let worker = InMemory::start(&stack, "gw1");
    broker.next("the worker is online", |received| {
        *received == Message { retain: received.retain, ..status("gw1", "1") }
    });
    broker.publish_all([key_for(DOMAIN, &key(1)), key_for(DOMAIN, &key(2))]);
    broker.next("the worker asks for records", asks_for_records);
    thread::sleep(Duration::from_millis(500));
    assert!(worker.kernel.take_applies().is_empty(), "both keys wait");
    broker.publish(message("wgkex/revocations", serde_json::to_string(&[&record]).unwrap(), 1, false));
    let applied: Value = serde_json::from_slice(&broker.next_on("wgkex/worker/gw1/applied").payload).unwrap();
    assert_eq!(applied, json!({ "domain": DOMAIN, "installed": [key(2)], "failed": { key(1): "denied" } }));
    let changes: Vec<_> = worker.kernel.take_applies().into_iter().flat_map(|(_, changes)| changes).collect();
    assert!(InMemory::took(&changes, &key(2)) && !InMemory::took(&changes, &key(1)));
}

#[test]
fn a_worker_waits_at_most_three_seconds_for_the_revocation_list() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_mosquitto();
    let broker = scripted_broker(&stack, "of records that never come");
    let _worker = InMemory::start(&stack, "gw1");
    broker.next("the worker is online", |received| {
        *received == Message { retain: received.retain, ..status("gw1", "1") }
    });
    let online = Instant::now();
    broker.publish(key_for(DOMAIN, &key(1)));
    broker.next_on("wgkex/worker/gw1/applied");
    let waited = online.elapsed();
    assert!(waited > Duration::from_secs(2), "{waited:?}");
    // The worker waits once per connection: a broker with another digest delays no key.
    let other = json!({ "version": "9", "can": ["answer"], "revocations": "another" }).to_string();
    broker.publish(message("wgkex/broker/b1/hello", other, 1, true));
    broker.next("the worker asks for records", asks_for_records);
    let again = Instant::now();
    broker.publish(key_for(DOMAIN, &key(2)));
    broker.next_on("wgkex/worker/gw1/applied");
    assert!(again.elapsed() < Duration::from_secs(2), "{:?}", again.elapsed());
}
