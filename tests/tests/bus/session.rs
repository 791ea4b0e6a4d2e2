//! A broker's session from its start to its end, byte by byte.

use nix::sys::signal::Signal;
use wgkex_tests::probe::{Message, Probe, message};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, data, endpoint, key_for, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key, wait_until};

use super::{LONG, on_both};

on_both!(a_session_is_the_contracts_to_the_byte);

fn own_status(payload: &str) -> Message {
    message(format!("wireguard-broker/{}/status", host_name()), payload, 1, true)
}

/// The message as an existing subscriber receives it: live, without the retain flag.
fn live(message: Message) -> Message {
    Message { retain: false, ..message }
}

fn assert_received(witness: &Probe, expected: &[Message]) {
    wait_until("the whole session", || (contracts(witness).len() >= expected.len()).then_some(()));
    assert_eq!(contracts(witness), expected);
    let own = witness.received().into_iter().filter(|message| is_own(message) && !message.topic.ends_with("/echo"));
    let own: Vec<_> = own.collect();
    let topic = format!("wgkex/broker/{}/hello", host_name());
    assert!(
        own.len() >= 2 && own.iter().all(|message| message.topic == topic),
        "what it can do, and that it is gone: {own:?}"
    );
}

/// The received messages on the contract's topics. Some seconds after a worker's start the broker publishes its status
/// once more: a slow test receives that, too.
fn contracts(witness: &Probe) -> Vec<Message> {
    let mut received: Vec<_> = witness.received().into_iter().filter(|message| !is_own(message)).collect();
    let mut is_first = true;
    received.retain(|message| {
        message.payload != b"1" || message.topic != own_status("1").topic || std::mem::take(&mut is_first)
    });
    received
}

/// Whether the topic is one to which originals do not subscribe.
fn is_own(message: &Message) -> bool {
    message.topic.starts_with("wgkex/")
}

/// With the embedded server the probe connects after the greeting, and loses its connection with the server.
fn a_session_is_the_contracts_to_the_byte(bus: Bus) {
    let mut stack = Stack::prepare(Plan::new(bus).config(LONG));
    let witness = if bus == Bus::Embedded {
        stack.start_broker();
        stack.wait_until_ready();
        let witness = stack.witness();
        wait_until("the greeting", || (!contracts(&witness).is_empty()).then_some(()));
        witness
    } else {
        stack.start_mosquitto();
        let witness = stack.witness();
        stack.start_broker();
        stack.wait_until_ready();
        witness
    };
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Original, 3);
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(1)).json(), endpoint("gw1"));
    assert_eq!(stack.v1(DOMAIN, &key(2)).status, 200);
    assert_eq!(stack.v2("ffx_none", &key(3)).status, 400);
    worker.probe.publish(status("gw1", "0"));
    stack.wait_for_gateways(0);
    assert!(stack.stop_broker().success());
    let greeting = if bus == Bus::Embedded { own_status("1") } else { live(own_status("1")) };
    let expected = [
        greeting,
        live(data("gw1", DOMAIN)),
        live(peers_of("gw1", DOMAIN, "3")),
        live(status("gw1", "1")),
        key_for(DOMAIN, &key(1)),
        key_for(DOMAIN, &key(2)),
        live(status("gw1", "0")),
        live(own_status("0")),
    ];
    if bus == Bus::Embedded {
        // The last message of a broker that stops its own MQTT server may be lost.
        assert_eq!(contracts(&witness)[..7], expected[..7]);
    } else {
        assert_received(&witness, &expected);
        let late: Vec<_> = found(&stack).into_iter().filter(|message| !is_own(message)).collect();
        assert_eq!(late.len(), 4, "{late:?}");
        for state in [data("gw1", DOMAIN), peers_of("gw1", DOMAIN, "3"), status("gw1", "0"), own_status("0")] {
            assert!(late.contains(&state), "{state:?} in {late:?}");
        }
    }
}

/// All retained messages. A message of this client marks their end.
fn found(stack: &Stack) -> Vec<Message> {
    let late = stack.probe(wgkex_tests::probe::Role::new("late", &["#"]));
    late.publish(message("test/end", "", 1, false));
    let _ = late.next_on("test/end");
    late.received().into_iter().filter(|message| message.retain).collect()
}

#[test]
fn a_killed_brokers_will_is_published_and_every_connection_begins_with_hello_and_status() {
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto));
    let topic = own_status("1").topic;
    let witness = stack.witness();
    assert_eq!(witness.next_on(&topic), own_status("1"));
    let _ = stack.broker().end_by(Signal::SIGKILL);
    assert_eq!(witness.next_on(&topic), live(own_status("0")));
    stack.start_broker();
    assert_eq!(witness.next_on(&topic), live(own_status("1")));
    stack.wait_until_ready();
    stack.kill_and_restart_bus();
    witness.wait_for_session(2);
    assert_eq!(witness.next_on(&topic).payload, b"1");
    stack.wait_until_ready();
    assert!(found(&stack).contains(&own_status("1")));
    assert!(stack.stop_broker().success());
    assert_eq!(witness.next("the farewell", |message| message.topic == topic && message.payload == b"0").qos, 1);
}
