//! Limits of what one client can take of the server, and for how long.

use std::time::{Duration, Instant};

use rumqttc::{Connect, Packet, QoS};
use wgkex_tests::raw_client::{RawClient, connect, connect_with_will};
use wgkex_tests::wait_until;

use crate::{assert_serving, memory, stack};

/// More memory than any client may take.
const MEMORY_LIMIT: u64 = 100 << 20;

#[test]
fn connections_without_a_connect_packet_are_closed_and_make_room() {
    let mut stack = stack();
    // More connections than may wait at once, in all states of a CONNECT.
    let mut strangers: Vec<_> = (0..600).map(|_| RawClient::connect_tcp(stack.mqtt)).collect();
    for (n, stranger) in strangers.iter_mut().enumerate() {
        stranger.send_bytes(&b"\x10\x0d\0\x04MQTT\x04\x02"[..n % 10]);
    }
    stack.wait_for_metric(r#"wgkex_broker_mqtt_refused_total{reason="full"}"#, 88.0);
    strangers.iter_mut().for_each(RawClient::wait_for_end);
    stack.wait_for_metric(r#"wgkex_broker_mqtt_refused_total{reason="slow"}"#, 512.0);
    assert_serving(&mut stack);
}

#[test]
fn a_client_that_misses_its_keep_alive_is_disconnected() {
    let mut stack = stack();
    let mut witness = RawClient::connect(stack.mqtt, "witness");
    witness.subscribe(&[("will/+", QoS::AtMostOnce)]);
    let begun = Instant::now();
    let silent = Connect { keep_alive: 1, ..connect_with_will("silent", "will/silent", "gone") };
    let (mut silent, _) = RawClient::try_connect(stack.mqtt, &silent);
    let mut for_ever = RawClient::connect(stack.mqtt, "silent for ever");
    silent.wait_for_end();
    assert!(begun.elapsed() >= Duration::from_millis(1500), "it may be silent for one and a half times as long");
    assert_eq!(witness.receive().topic, "will/silent");
    for_ever.send(&Packet::PingReq);
    assert_eq!(for_ever.read(), Some(Packet::PingResp));
    assert_serving(&mut stack);
}

#[test]
fn a_packet_that_is_too_large_ends_the_connection_before_it_is_read_whole() {
    let mut stack = stack();
    let mut raw = RawClient::connect(stack.mqtt, "raw");
    raw.publish("large", vec![0; 1_000_000], 1, false);
    assert!(matches!(raw.read(), Some(Packet::PubAck(_))), "a megabyte is not too large");
    // Only the header, of 2 MiB; and of 250 MiB before a CONNECT.
    raw.send_bytes(b"\x30\x80\x80\x80\x01");
    raw.wait_for_end();
    let mut raw = RawClient::connect_tcp(stack.mqtt);
    raw.send_bytes(b"\x10\x80\x80\x80\x7d");
    raw.wait_for_end();
    assert_serving(&mut stack);
}

#[test]
fn subscribers_that_read_nothing_take_no_memory_with_time() {
    let mut stack = stack();
    let mut deaf: Vec<_> = (0..10).map(|n| RawClient::connect(stack.mqtt, &format!("deaf-{n}"))).collect();
    for deaf in &mut deaf {
        deaf.subscribe(&[("flood", QoS::AtMostOnce)]);
    }
    let mut publisher = RawClient::connect(stack.mqtt, "publisher");
    let before = memory(&mut stack);
    for _ in 0..4_000 {
        publisher.publish("flood", vec![0; 100_000], 0, false);
    }
    publisher.publish("end", "", 1, false);
    assert!(matches!(publisher.read(), Some(Packet::PubAck(_))));
    let after = memory(&mut stack);
    assert!(after < before + MEMORY_LIMIT, "{before} bytes before, {after} after 400 MB for who reads nothing");
    assert_serving(&mut stack);
}

#[test]
fn a_client_that_asks_and_never_reads_takes_no_memory_with_time() {
    let mut stack = stack();
    let mut publisher = RawClient::connect(stack.mqtt, "publisher");
    for n in 0..2_000 {
        publisher.publish(&format!("kept/{n}"), vec![b'x'; 1_000], 0, true);
    }
    publisher.publish("kept/end", "1", 1, true);
    assert!(matches!(publisher.read(), Some(Packet::PubAck(_))));
    let before = memory(&mut stack);
    let mut greedy: Vec<_> = (0..10).map(|n| RawClient::connect(stack.mqtt, &format!("greedy-{n}"))).collect();
    for greedy in &mut greedy {
        greedy.subscribe(&[("kept/#", QoS::AtMostOnce)]);
    }
    let mut subscribe = bytes::BytesMut::new();
    let packet = rumqttc::Subscribe { pkid: 1, ..rumqttc::Subscribe::new("kept/#", QoS::AtMostOnce) };
    Packet::Subscribe(packet).write(&mut subscribe, usize::MAX).unwrap();
    Packet::PingReq.write(&mut subscribe, usize::MAX).unwrap();
    let many = subscribe.repeat(20);
    for _ in 0..100 {
        for greedy in &mut greedy {
            greedy.send_if_taken(&many);
        }
    }
    let after = memory(&mut stack);
    assert!(
        after < before + MEMORY_LIMIT,
        "{before} bytes before, {after} after many subscriptions of who reads nothing"
    );
    assert_serving(&mut stack);
}

#[test]
fn a_stop_closes_all_connections_and_the_port_is_free_at_once() {
    let mut stack = stack();
    let mut clients: Vec<_> = (0..50).map(|n| RawClient::connect(stack.mqtt, &format!("client-{n}"))).collect();
    for client in &mut clients {
        client.subscribe(&[("#", QoS::AtLeastOnce)]);
    }
    assert!(stack.stop_broker().success());
    clients.iter_mut().for_each(RawClient::wait_for_end);
    std::net::TcpListener::bind(stack.mqtt).unwrap();
    stack.start_broker();
    stack.wait_until_ready();
    wait_until("all are back", || RawClient::try_connect(stack.mqtt, &connect("client-0")).1);
    assert_serving(&mut stack);
}
