//! The MQTT server inside the broker, tested with clients and attackers.
//!
//! Each attack succeeds if its guard is removed from the server: the ends of connections, the check of topics, the
//! limits of connections, of waiting clients, of packets and of queued messages, the keep-alive, the order of wills,
//! the client ids bound to users, the isolation of users, messages without payload.

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

/// Checks that the server works: a client receives another's messages, with either quality of service, and the broker
/// is ready.
fn assert_serving(stack: &mut Stack) {
    let mut subscriber = RawClient::connect(stack.mqtt, "stands-subscriber");
    subscriber.subscribe(&[("stands/+", QoS::AtLeastOnce)]);
    let mut publisher = RawClient::connect(stack.mqtt, "stands-publisher");
    for level in [0, 1] {
        publisher.publish("stands/yes", "it does", level, false);
        let received = subscriber.receive();
        assert_eq!(
            (received.topic.as_str(), &received.payload[..], received.qos as u8),
            ("stands/yes", &b"it does"[..], level)
        );
    }
    assert!(stack.broker().is_running());
    stack.wait_until_ready();
}

/// A subscriber to `filter`, and a publisher.
fn pair(server: SocketAddr, filter: &str) -> (RawClient, RawClient) {
    let mut subscriber = RawClient::connect(server, "subscriber");
    subscriber.subscribe(&[(filter, QoS::AtLeastOnce)]);
    (subscriber, RawClient::connect(server, "publisher"))
}

/// The resident memory of the broker, in bytes.
fn memory(stack: &mut Stack) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", stack.broker().pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
