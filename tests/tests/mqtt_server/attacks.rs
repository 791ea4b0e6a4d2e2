//! Attacks that end rumqttd's own server, or damage its state, run against ours.

use std::thread;
use std::time::{Duration, Instant};

use rumqttc::{Connect, ConnectReturnCode, Packet, Protocol, PubAck, PubRec, QoS, SubscribeReasonCode, Unsubscribe};
use wgkex_tests::raw_client::{RawClient, connect};
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::wait_until;

use crate::{assert_serving, pair, stack};

#[test]
fn a_topic_whose_first_character_is_not_ascii_is_a_topic() {
    let mut stack = stack();
    let (mut subscriber, mut publisher) = pair(stack.mqtt, "#");
    for topic in ["ü/x", "ü", "😀", "/", "a//b"] {
        publisher.publish(topic, "1", 1, false);
        let received = loop {
            let received = subscriber.receive();
            if !received.topic.starts_with('w') {
                break received;
            }
        };
        assert_eq!(received.topic, topic);
    }
    assert_serving(&mut stack);
}

#[test]
fn any_client_id_may_connect_twice() {
    let mut stack = stack();
    for id in ["a+b", "$SYS", "#", "a/b", "ü", "+$#/"] {
        let mut first = RawClient::connect(stack.mqtt, id);
        let _second = RawClient::connect(stack.mqtt, id);
        first.wait_for_end();
    }
    let mut last = RawClient::connect(stack.mqtt, "shared");
    for _ in 0..5 {
        let next = RawClient::connect(stack.mqtt, "shared");
        last.wait_for_end();
        last = next;
    }
    let line = stack.broker().wait_for_log("two programs use this name");
    assert!(line.contains("WARN") && line.contains("client=\"shared\""), "{line}");
    stack.wait_for_metric("wgkex_broker_mqtt_takeovers_total", 11.0);
    for id in ["a\nb", "a\0b"] {
        let (_, code) = RawClient::try_connect(stack.mqtt, &connect(id));
        assert!(matches!(code, None | Some(ConnectReturnCode::BadClientId)), "{id:?}: {code:?}");
    }
    assert_serving(&mut stack);
}

#[test]
fn a_full_server_refuses_every_new_client_and_admits_one_when_there_is_room() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded).listen("max_connections: 10"));
    let mut clients: Vec<_> = (0..10).map(|n| RawClient::connect(stack.mqtt, &format!("client-{n}"))).collect();
    for _ in 0..50 {
        let (_, code) = RawClient::try_connect(stack.mqtt, &connect("one more"));
        assert_eq!(code, Some(ConnectReturnCode::ServiceUnavailable));
    }
    stack.wait_for_metric(r#"wgkex_broker_mqtt_refused_total{reason="full"}"#, 50.0);
    clients.truncate(5);
    wait_until("there is room", || {
        let (_, code) = RawClient::try_connect(stack.mqtt, &connect("one more"));
        (code == Some(ConnectReturnCode::Success)).then_some(())
    });
    assert_serving(&mut stack);
}

#[test]
fn another_version_of_mqtt_is_refused_with_the_reason() {
    let mut stack = stack();
    let mut five = connect("five");
    five.protocol = Protocol::V5;
    assert_eq!(RawClient::try_connect(stack.mqtt, &five).1, Some(ConnectReturnCode::RefusedProtocolVersion));
    // With a property, and a PUBLISH with properties right behind it.
    let mut raw = RawClient::connect_tcp(stack.mqtt);
    raw.send_bytes(b"\x10\x15\0\x04MQTT\x05\x02\0\x3c\x05\x11\0\0\0\x0a\0\x03abc\x30\x0a\0\x01a\x05\x02\0\0\0\x01x");
    assert!(matches!(raw.read(), Some(Packet::ConnAck(ack)) if ack.code == ConnectReturnCode::RefusedProtocolVersion));
    raw.wait_for_end();
    assert_serving(&mut stack);
}

/// Subscribers that read nothing connect and end in all ways, while two publishers publish as fast as they can.
#[test]
fn slow_subscribers_that_leave_during_a_flood_disturb_no_other_client() {
    let mut stack = stack();
    let server = stack.mqtt;
    let end = Instant::now() + Duration::from_secs(20);
    let flood = |name: &'static str| {
        thread::spawn(move || {
            let mut publisher = RawClient::connect(server, name);
            while Instant::now() < end {
                for _ in 0..100 {
                    publisher.publish("flood/x", vec![b'x'; 1000], 0, false);
                }
            }
        })
    };
    let floods = [flood("flood-1"), flood("flood-2")];
    let churns: Vec<_> = (0..4).map(|n| thread::spawn(move || churn(server, n, end))).collect();
    for flood in floods {
        flood.join().unwrap();
    }
    let rounds: u32 = churns.into_iter().map(|churn| churn.join().unwrap()).sum();
    assert!(rounds > 50, "only {rounds} subscribers came and went");
    assert_serving(&mut stack);
}

fn churn(server: std::net::SocketAddr, n: u32, end: Instant) -> u32 {
    let mut round = 0;
    while Instant::now() < end {
        round += 1;
        let mut raw = RawClient::connect(server, &format!("churn-{n}"));
        let level = if round % 2 == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce };
        raw.subscribe(&[("flood/#", level), ("#", level)]);
        thread::sleep(Duration::from_millis(u64::from(round % 7)));
        match round % 4 {
            0 => raw.send(&Packet::Disconnect),
            1 => raw.close(),
            // The next one takes over its client id.
            2 => drop(RawClient::connect(server, &format!("churn-{n}"))),
            _ => raw.send(&Packet::Unsubscribe(Unsubscribe { pkid: 5, topics: vec!["#".into(), "never".into()] })),
        }
    }
    round
}

#[test]
fn an_invalid_filter_is_refused_and_valid_ones_of_the_same_packet_are_granted() {
    let mut stack = stack();
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    let (zero, good) = (QoS::AtMostOnce, SubscribeReasonCode::Success(QoS::AtMostOnce));
    for bad in ["a#/b", "#/a", "a+", "", "$SYS/#", "$share/g/a"] {
        assert_eq!(raw.subscribe(&[("x", zero), (bad, zero), ("y", zero)]), [good, SubscribeReasonCode::Failure, good]);
    }
    raw.publish("x", "1", 0, false);
    assert_eq!(raw.receive().topic, "x");
    assert_serving(&mut stack);
}

#[test]
fn acknowledgements_may_come_in_any_order_and_without_a_message() {
    let mut stack = stack();
    let (mut subscriber, mut publisher) = pair(stack.mqtt, "a");
    let mut identifiers = Vec::new();
    for _ in 0..100 {
        publisher.publish("a", "1", 1, false);
        let Some(Packet::Publish(publish)) = subscriber.read() else { panic!("no message") };
        identifiers.push(publish.pkid);
    }
    for pkid in identifiers.into_iter().rev().chain([1, 1, 4711]) {
        subscriber.send(&Packet::PubAck(PubAck { pkid }));
    }
    for _ in 0..200 {
        publisher.publish("a", "2", 1, false);
        assert_eq!(&subscriber.receive().payload[..], b"2");
    }
    assert_serving(&mut stack);
}

#[test]
fn an_empty_message_without_the_retain_flag_clears_nothing() {
    let mut stack = stack();
    let mut publisher = RawClient::connect(stack.mqtt, "publisher");
    publisher.publish("kept", "1", 1, true);
    publisher.publish("kept", "", 1, false);
    for _ in 0..2 {
        let _ = publisher.read();
    }
    publisher.subscribe(&[("kept", QoS::AtMostOnce)]);
    let received = publisher.receive();
    assert!(received.retain && &received.payload[..] == b"1", "{received:?}");
    assert_serving(&mut stack);
}

#[test]
fn invalid_packets_end_their_own_connection_only() {
    let mut stack = stack();
    let cases: [&[u8]; 9] = [
        b"\xff\xff\xff\xff\xff\xff",
        b"\x30\x05\0\xffabc",
        b"\x30\x03\0\x01+",
        b"\x30\x02\0\0",
        b"\x36\x05\0\x01a\0\x01",
        b"\x32\x05\0\x01a\0\0",
        b"\x82\x00",
        b"\x20\x02\0\0",
        b"\x30\x04\0\x02\xff\xfe",
    ];
    for bytes in cases {
        let mut raw = RawClient::connect(stack.mqtt, "raw");
        raw.send_bytes(bytes);
        raw.wait_for_end();
    }
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    raw.send(&Packet::Connect(Connect::new("raw")));
    raw.wait_for_end();
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    raw.send(&Packet::PubRec(PubRec { pkid: 1 }));
    raw.wait_for_end();
    for first in [&b"\xc0\0"[..], b"\x30\x03\0\x01a", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\xa5"] {
        let mut raw = RawClient::connect_tcp(stack.mqtt);
        raw.send_bytes(first);
        raw.wait_for_end();
    }
    assert_serving(&mut stack);
}

#[test]
fn unsubscribing_from_an_unknown_filter_is_acknowledged() {
    let mut stack = stack();
    let (mut subscriber, mut publisher) = pair(stack.mqtt, "a/#");
    subscriber.send(&Packet::Unsubscribe(Unsubscribe { pkid: 7, topics: vec!["b".into(), "a/b".into()] }));
    assert!(matches!(subscriber.read(), Some(Packet::UnsubAck(ack)) if ack.pkid == 7));
    publisher.publish("a/b", "1", 0, false);
    assert_eq!(subscriber.receive().topic, "a/b");
    subscriber.send(&Packet::Unsubscribe(Unsubscribe { pkid: 8, topics: vec!["a/#".into()] }));
    assert!(matches!(subscriber.read(), Some(Packet::UnsubAck(ack)) if ack.pkid == 8));
    publisher.publish("a/b", "2", 0, false);
    subscriber.subscribe(&[("c", QoS::AtMostOnce)]);
    publisher.publish("c", "3", 0, false);
    assert_eq!(subscriber.receive().topic, "c");
    assert_serving(&mut stack);
}
