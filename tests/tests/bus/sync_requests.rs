//! Requests for pages of live keys: which program receives the pages.

use serde_json::{Value, json};
use wgkex_tests::probe::{Message, Probe, Role, message};
use wgkex_tests::scripted::{Worker, WorkerBehaviour};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key};

use super::on_both;

on_both!(snapshot_chunks_go_to_the_program_that_asked_and_to_no_forged_recipient);

/// A request in the name of `from` to the broker `to`; `n` distinguishes it from others.
fn question(topic: &str, from: &Value, to: &str, n: u32) -> Message {
    let question = json!({ "from": from, "to": to, "domain": DOMAIN, "after": key(n), "younger_than": null });
    message(topic, question.to_string(), 1, false)
}

/// The number of the request that the next page on `topic` answers.
fn answered(witness: &Probe, topic: &str) -> u32 {
    let page = witness
        .next(&format!("a page on {topic}"), |message| message.topic == topic && message.text().contains("\"keys\""));
    let page: Value = serde_json::from_slice(&page.payload).expect("JSON");
    (1..100).find(|n| page["after"] == key(*n)).expect("a question of this test")
}

/// Regression: brokers did not subscribe to a worker's own topic, and a request in another's name sent pages to that
/// one.
fn snapshot_chunks_go_to_the_program_that_asked_and_to_no_forged_recipient(bus: Bus) {
    let stack = Stack::start(Plan::new(bus));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let own = host_name();
    let [shared, inbox] = ["questions", "pages"].map(|kind| format!("wgkex/broker/{own}/{kind}"));
    let witness = stack.probe(Role::new("witness", &["wgkex/worker/+/pages", "wgkex/broker/+/pages"]));
    let [old, new] = ["old", "new"].map(|name| json!({ "worker": name }));

    // A worker of an older version publishes requests on a topic that any client may write to.
    witness.publish(question(&shared, &old, &own, 1));
    assert_eq!(answered(&witness, "wgkex/worker/old/pages"), 1);
    // A worker of this version uses a topic that only it may write to; so do brokers.
    witness.publish(question("wgkex/worker/new/questions", &new, &own, 2));
    assert_eq!(answered(&witness, "wgkex/worker/new/pages"), 2);
    let hello = r#"{"version":"9","can":["answer","named questions"],"domains":[],"instance":1}"#;
    witness.publish(message("wgkex/broker/b2/hello", hello, 1, true));
    let asked = witness.next("this broker asks b2", |message| message.topic == "wgkex/broker/b2/pages");
    assert!(asked.text().contains(&format!(r#""from":{{"broker":"{own}"}}"#)), "{asked:?}");
    let b2 = json!({ "broker": "b2" });
    witness.publish(question(&inbox, &b2, &own, 3));
    assert_eq!(answered(&witness, "wgkex/broker/b2/pages"), 3);

    // Requests by others in their names, and one for another broker.
    witness.publish_all([
        question(&shared, &new, &own, 4),
        question("wgkex/worker/old/questions", &new, &own, 5),
        question("wgkex/worker/new/questions", &new, "another", 6),
        question(&shared, &b2, &own, 7),
        question(&inbox, &new, &own, 8),
        question("wgkex/worker/new/questions", &new, &own, 9),
        question(&inbox, &b2, &own, 10),
    ]);
    assert_eq!(answered(&witness, "wgkex/worker/new/pages"), 9);
    assert_eq!(answered(&witness, "wgkex/broker/b2/pages"), 10);
}
