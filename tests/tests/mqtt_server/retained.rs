//! Retained messages and last wills.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use rumqttc::{ConnectReturnCode, Packet, Publish, QoS, Unsubscribe};
use wgkex_tests::raw_client::{RawClient, connect, connect_with_will};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, endpoint, peers_of, status};
use wgkex_tests::stack::{DOMAIN, Stack};
use wgkex_tests::{key, wait_until};

use crate::{assert_serving, pair, stack};

const MANY: usize = 10_000;

/// Retains a message on each of `kept/0` to `kept/9999`.
fn keep_many(stack: &Stack) {
    let mut publisher = RawClient::connect(stack.mqtt, "publisher");
    for n in 0..MANY {
        publisher.publish(&format!("kept/{n}"), "1", 1, true);
        assert!(matches!(publisher.read(), Some(Packet::PubAck(_))));
    }
}

/// The retained messages that match `filter`; a message of this client, which is not retained, marks their end.
fn found(raw: &mut RawClient, filter: &str, qos: QoS) -> Vec<Publish> {
    raw.subscribe(&[(filter, qos), ("end", QoS::AtMostOnce)]);
    raw.publish("end", "", 0, false);
    std::iter::from_fn(|| Some(raw.receive()).filter(|received| received.topic != "end")).collect()
}

#[test]
fn ten_thousand_messages_reach_each_subscription_at_each_qos() {
    let mut stack = stack();
    keep_many(&stack);
    let mut finder = RawClient::connect(stack.mqtt, "finder");
    for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::AtLeastOnce] {
        let found = found(&mut finder, "kept/+", qos);
        assert!(found.iter().all(|message| message.retain && message.qos == qos));
        assert_eq!(found.iter().map(|message| &message.topic).collect::<BTreeSet<_>>().len(), MANY);
        assert_eq!(found.len(), MANY);
    }
    assert_eq!(found(&mut finder, "kept/77", QoS::AtMostOnce).len(), 1);
    stack.wait_until_ready();
    assert!(stack.metric("wgkex_broker_mqtt_retained").is_some_and(|kept| kept >= 10_000.0));
}

/// rumqttd's router forwards messages after they were acknowledged, also to a later subscription.
#[test]
fn a_subscription_has_what_was_published_before_it_as_retained_only() {
    let stack = stack();
    let (mut subscriber, mut publisher) = pair(stack.mqtt, "other");
    for round in 0..500 {
        let last = format!("{round}: last");
        for payload in ["first", &last] {
            publisher.publish("before/x", payload, 1, true);
            assert!(matches!(publisher.read(), Some(Packet::PubAck(_))));
        }
        let received = found(&mut subscriber, "before/+", QoS::AtLeastOnce);
        let received: Vec<_> = received.iter().map(|message| (&message.payload[..], message.retain)).collect();
        assert_eq!(received, [(last.as_bytes(), true)]);
        subscriber.send(&Packet::Unsubscribe(Unsubscribe { pkid: 5, topics: vec!["before/+".into()] }));
        assert!(matches!(subscriber.read(), Some(Packet::UnsubAck(_))));
    }
}

#[test]
fn subscribers_receive_updates_without_the_retain_flag_and_an_empty_message_clears_the_topic() {
    let mut stack = stack();
    let (mut subscriber, mut publisher) = pair(stack.mqtt, "kept");
    for payload in ["1", "2", ""] {
        publisher.publish("kept", payload, 1, true);
        let received = subscriber.receive();
        assert_eq!((received.retain, &received.payload[..]), (false, payload.as_bytes()));
        let kept: Vec<_> =
            found(&mut subscriber, "kept", QoS::AtLeastOnce).into_iter().map(|kept| kept.payload).collect();
        assert_eq!(kept, if payload.is_empty() { vec![] } else { vec![payload] });
    }
    assert_serving(&mut stack);
}

#[test]
fn the_will_is_published_at_every_end_but_a_disconnect() {
    let mut stack = stack();
    let mut witness = RawClient::connect(stack.mqtt, "witness");
    witness.subscribe(&[("will/+", QoS::AtLeastOnce)]);
    let join = |n: u32| {
        let (raw, code) =
            RawClient::try_connect(stack.mqtt, &connect_with_will("mortal", &format!("will/{n}"), "gone"));
        assert_eq!(code, Some(ConnectReturnCode::Success));
        raw
    };
    join(1).close();
    assert_eq!(witness.receive().topic, "will/1");
    let mut taken_over = join(2);
    let mut nonsense = join(3);
    assert_eq!(witness.receive().topic, "will/2");
    taken_over.wait_for_end();
    nonsense.send_bytes(b"\xff\xff\xff\xff\xff\xff");
    assert_eq!(witness.receive().topic, "will/3");
    let mut polite = join(4);
    polite.send(&Packet::Disconnect);
    polite.wait_for_end();
    join(5).close();
    let received = witness.receive();
    assert_eq!((received.topic.as_str(), received.retain), ("will/5", false), "no will after a farewell");
    let found: Vec<_> = found(&mut witness, "will/+", QoS::AtMostOnce).into_iter().map(|kept| kept.topic).collect();
    assert_eq!(found, ["will/1", "will/2", "will/3", "will/5"]);
    assert_serving(&mut stack);
}

#[test]
fn a_publish_after_a_session_takeover_wins_over_the_old_will() {
    let stack = stack();
    for n in 0..50 {
        let (mut raw, _) = RawClient::try_connect(stack.mqtt, &connect_with_will("gw1", "gw1/status", "0"));
        raw.publish("gw1/status", format!("1 {n}"), 1, true);
        assert!(matches!(raw.read(), Some(Packet::PubAck(_))));
        let kept = found(&mut raw, "gw1/status", QoS::AtMostOnce);
        assert_eq!(kept.last().map(|kept| kept.payload.to_vec()), Some(format!("1 {n}").into_bytes()));
        std::mem::forget(raw);
    }
}

/// A client that reconnects publishes its state again; for others, the last will is published when the server starts
/// again.
#[test]
fn states_survive_a_restart_and_a_worker_that_does_not_come_back_is_offline() {
    let mut stack = stack();
    let stays = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 3);
    let goes = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(2);
    let (mut left, _) = RawClient::try_connect(stack.mqtt, &connect("left"));
    left.publish("kept", "1", 1, true);
    assert!(matches!(left.read(), Some(Packet::PubAck(_))));
    // Its DISCONNECT discards its last will.
    left.send(&Packet::Disconnect);
    left.wait_for_end();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        wait_until_written(&stack, signal.as_str());
        let sessions = stays.probe.sessions();
        let _ = stack.broker().end_by(signal);
        stack.start_broker();
        stays.probe.wait_for_session(sessions + 1);
        stack.wait_until_ready();
        for topic in ["kept", &peers_of("gw1", DOMAIN, "3").topic] {
            let mut finder = RawClient::connect(stack.mqtt, "finder");
            assert_eq!(found(&mut finder, topic, QoS::AtMostOnce).len(), 1, "{topic} after {signal}");
        }
        stack.wait_for_gateways(2);
    }
    wait_until_written(&stack, "end");
    let _ = stack.broker().end_by(Signal::SIGKILL);
    goes.probe.drop_connection();
    stack.start_broker();
    stack.wait_until_ready();
    let mut finder = RawClient::connect(stack.mqtt, "finder");
    let kept = found(&mut finder, &status("gw2", "0").topic, QoS::AtMostOnce);
    assert_eq!(kept.iter().map(|kept| &kept.payload[..]).collect::<Vec<_>>(), [b"0"]);
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(1)).json(), endpoint("gw1"));
    drop(stays);
}

/// Waits until all earlier messages are on disk: publishes another message, and waits until that is written.
fn wait_until_written(stack: &Stack, name: &str) {
    let topic = format!("written/{name}");
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    raw.publish(&topic, "1", 1, true);
    assert!(matches!(raw.read(), Some(Packet::PubAck(_))));
    wait_until("it is written", || {
        let files = ["mqtt-retained.sqlite", "mqtt-retained.sqlite-wal"].map(|name| stack.state_dir().join(name));
        let has = |bytes: Vec<u8>| bytes.windows(topic.len()).any(|part| part == topic.as_bytes());
        files.iter().any(|file| std::fs::read(file).is_ok_and(has)).then_some(())
    });
}
