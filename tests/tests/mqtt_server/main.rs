//! The MQTT server inside the broker, as clients and attackers meet it.
//!
//! Each attack was seen to succeed by taking its guard out of the server, one at a time: the endings of links, the check of
//! topics, the limits of connections, of those who wait, of packets and of what is to be sent, the keep-alive, the order of
//! wills, the client ids bound to users, users kept apart, messages without payload.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod access;
mod attacks;
mod clients;
mod limits;
mod retained;
mod shares;
mod stolen;
mod strangers;
mod tls;

use std::net::SocketAddr;

use rumqttc::QoS;
use wgkex_tests::raw::Raw;
use wgkex_tests::stack::{Bus, Plan, Stack};

/// A broker that is the MQTT server.
fn stack() -> Stack {
    Stack::start(Plan::new(Bus::Embedded))
}

/// Shows that the server stands: one client still hears another, at both qualities, and the broker is still ready.
fn assert_stands(stack: &mut Stack) {
    let mut hearer = Raw::connect(stack.mqtt, "stands-hearer");
    hearer.subscribe(&[("stands/+", QoS::AtLeastOnce)]);
    let mut sayer = Raw::connect(stack.mqtt, "stands-sayer");
    for level in [0, 1] {
        sayer.publish("stands/yes", "it does", level, false);
        let heard = hearer.hear();
        assert_eq!((heard.topic.as_str(), &heard.payload[..], heard.qos as u8), ("stands/yes", &b"it does"[..], level));
    }
    assert!(stack.broker().is_running());
    stack.wait_until_ready();
}

/// One client that hears `filter`, and one that speaks.
fn pair(server: SocketAddr, filter: &str) -> (Raw, Raw) {
    let mut hearer = Raw::connect(server, "hearer");
    hearer.subscribe(&[(filter, QoS::AtLeastOnce)]);
    (hearer, Raw::connect(server, "sayer"))
}

/// What the broker has in memory, in bytes.
fn memory(stack: &mut Stack) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", stack.broker().pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
