//! The MQTT server inside the broker, as clients and attackers meet it.
//!
//! Each attack was seen to succeed by taking its guard out of the server, one at a time: the endings of links, the check of
//! topics, the limits of connections, of those who wait, of packets and of what is to be sent, the keep-alive, the order of
//! wills, the client ids bound to users, users kept apart, messages without payload.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod access;
mod attacks;
mod clients;
mod fair_shares;
mod limits;
mod retained;
mod stolen_password;
mod tls;
mod unauthenticated;

use std::net::SocketAddr;

use rumqttc::QoS;
use wgkex_tests::raw_client::RawClient;
use wgkex_tests::stack::{Bus, Plan, Stack};

/// A broker that is the MQTT server.
fn stack() -> Stack {
    Stack::start(Plan::new(Bus::Embedded))
}

/// Shows that the server stands: one client still hears another, at both qualities, and the broker is still ready.
fn assert_stands(stack: &mut Stack) {
    let mut subscriber = RawClient::connect(stack.mqtt, "stands-subscriber");
    subscriber.subscribe(&[("stands/+", QoS::AtLeastOnce)]);
    let mut publisher = RawClient::connect(stack.mqtt, "stands-publisher");
    for level in [0, 1] {
        publisher.publish("stands/yes", "it does", level, false);
        let heard = subscriber.receive();
        assert_eq!((heard.topic.as_str(), &heard.payload[..], heard.qos as u8), ("stands/yes", &b"it does"[..], level));
    }
    assert!(stack.broker().is_running());
    stack.wait_until_ready();
}

/// One client that hears `filter`, and one that speaks.
fn pair(server: SocketAddr, filter: &str) -> (RawClient, RawClient) {
    let mut subscriber = RawClient::connect(server, "subscriber");
    subscriber.subscribe(&[(filter, QoS::AtLeastOnce)]);
    (subscriber, RawClient::connect(server, "publisher"))
}

/// What the broker has in memory, in bytes.
fn memory(stack: &mut Stack) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", stack.broker().pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
