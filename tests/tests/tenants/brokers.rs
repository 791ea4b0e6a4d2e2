//! Members of one tenant at different brokers of one bus.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_common::storage::sqlite;
use wgkex_tests::probe::{Message, Role};
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::websocket::{Frame, WebSocket};
use wgkex_tests::{DEADLINE, key, wait_until, wait_within};

use crate::SCHEMA;

/// How long the end of a broker may stay undetected (issue: 40 s).
const DEATH: Duration = Duration::from_secs(40);

/// A member that reads all the time, as it has to answer pings.
struct Member {
    address: String,
    peers: Vec<String>,
    messages: Receiver<Result<Value, String>>,
    stream: TcpStream,
}

impl Member {
    fn join(stack: &Stack, number: u32) -> Self {
        Self::try_join(stack, number).unwrap_or_else(|error| panic!("{error}"))
    }

    fn try_join(stack: &Stack, number: u32) -> Result<Self, String> {
        let mut socket = WebSocket::open(stack.http, "/tenants/t").unwrap();
        socket.stream().set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let answer = socket.join(&format!("N{number}"), &key(number)).map_err(|error| error.to_string())?;
        let stream = socket.stream().try_clone().unwrap();
        let (sender, messages) = channel();
        thread::spawn(move || {
            loop {
                let message = socket.message().map_err(|error| error.to_string());
                let is_over = message.is_err();
                if sender.send(message).is_err() || is_over {
                    return;
                }
            }
        });
        let peers = answer["peers"].as_array().unwrap().iter();
        let peers = peers.map(|peer| peer["display_name"].as_str().unwrap().to_owned()).collect();
        Ok(Self { address: answer["virtual_ip"].as_str().unwrap().into(), peers, messages, stream })
    }

    fn message(&self) -> Value {
        self.messages.recv_timeout(DEATH).expect("a message").unwrap()
    }

    fn receives_join(&self, number: u32, address: &str) {
        let expected =
            json!({ "display_name": format!("N{number}"), "public_key": key(number), "virtual_ip": address });
        assert_eq!(self.message(), expected);
    }

    fn receives_leave(&self, address: &str) {
        assert_eq!(self.message(), json!({ "removed_peer": address }));
    }

    fn receives_nothing(&self) {
        assert!(self.messages.try_recv().is_err(), "{:?} heard more", self.address);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // The connection may be closed.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Brokers on machines of these names, at one Mosquitto.
fn brokers<const N: usize>(names: [&str; N]) -> [Stack; N] {
    brokers_by(&Plan::new(Bus::Mosquitto).config("tenants: {enabled: true}"), names)
}

fn brokers_by<const N: usize>(plan: &Plan, names: [&str; N]) -> [Stack; N] {
    let mut mqtt = None;
    names.map(|name| {
        let stack = broker_by(plan.clone(), name, mqtt);
        mqtt = Some(stack.mqtt);
        stack
    })
}

/// A broker on a machine of this name, at a running Mosquitto, or at a new one.
fn broker_by(plan: Plan, name: &str, mqtt: Option<SocketAddr>) -> Stack {
    let mut stack = Stack::prepare(plan.host_name(name));
    match mqtt {
        None => stack.start_mosquitto(),
        Some(mqtt) => stack.mqtt = mqtt,
    }
    stack.write_config();
    stack.start_broker();
    stack.wait_until_ready();
    stack
}

fn is_coordinator(stack: &Stack, is_one: bool) {
    stack.wait_for_metric("wgkex_broker_tenants_coordinator", f64::from(u8::from(is_one)));
}

/// Each member receives the same messages at any broker.
#[test]
#[ignore = "needs root: tests/run netns"]
fn members_at_different_brokers_see_each_other_and_leave_with_their_broker() {
    let [mut first, mut second] = brokers(["b1", "b2"]);
    is_coordinator(&first, true);
    is_coordinator(&second, false);
    let a = Member::join(&first, 1);
    let b = Member::join(&second, 2);
    assert_eq!((a.address.as_str(), b.address.as_str(), &b.peers), ("10.64.0.1", "10.64.0.2", &vec!["N1".to_owned()]));
    a.receives_join(2, "10.64.0.2");
    let third = Member::join(&second, 3);
    assert_eq!((third.address.as_str(), &third.peers), ("10.64.0.3", &vec!["N1".to_owned(), "N2".into()]));
    a.receives_join(3, "10.64.0.3");
    b.receives_join(3, "10.64.0.3");
    drop(third);
    a.receives_leave("10.64.0.3");
    b.receives_leave("10.64.0.3");
    for stack in [&first, &second] {
        stack.wait_for_metric("wgkex_broker_tenants_members", 2.0);
    }
    assert_eq!(
        Member::try_join(&first, 2).err().as_deref(),
        Some("1008 a member has this public_key and is connected")
    );

    // The MQTT server is killed and restarted, without effect on members.
    first.kill_and_restart_bus();
    for stack in [&mut first, &mut second] {
        stack.wait_until_ready();
    }
    let fourth = Member::join(&first, 4);
    assert_eq!(fourth.address, "10.64.0.4", "the address of the third is held");
    a.receives_join(4, "10.64.0.4");
    b.receives_join(4, "10.64.0.4");

    // The coordinator is killed.
    let _ = first.broker().end_by(Signal::SIGKILL);
    let died = Instant::now();
    let mut left = [b.message(), b.message()].map(|message| message["removed_peer"].as_str().unwrap().to_owned());
    left.sort();
    assert_eq!(left, ["10.64.0.1", "10.64.0.4"]);
    assert!(died.elapsed() < DEATH, "{:?}", died.elapsed());
    is_coordinator(&second, true);
    let back = Member::join(&second, 1);
    assert_eq!((back.address.as_str(), &back.peers), ("10.64.0.1", &vec!["N2".to_owned()]));
    b.receives_join(1, "10.64.0.1");

    // It starts again as a follower, and is killed again.
    first.start_broker();
    first.wait_until_ready();
    let fifth = Member::join(&first, 5);
    is_coordinator(&first, false);
    assert_eq!(fifth.peers, ["N2", "N1"], "in the order of their joins");
    b.receives_join(5, &fifth.address);
    back.receives_join(5, &fifth.address);
    let _ = first.broker().end_by(Signal::SIGKILL);
    let died = Instant::now();
    b.receives_leave(&fifth.address);
    back.receives_leave(&fifth.address);
    assert!(died.elapsed() < DEATH, "{:?}", died.elapsed());
    b.receives_nothing();

    // A broker that stops announces it at once.
    first.start_broker();
    first.wait_until_ready();
    let sixth = Member::join(&first, 6);
    b.receives_join(6, &sixth.address);
    let stopped = Instant::now();
    assert!(first.stop_broker().success());
    b.receives_leave(&sixth.address);
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());
}

/// The brokers are stopped by SIGSTOP: their connections stay, and no last will is published.
#[test]
#[ignore = "needs root: tests/run netns"]
fn members_of_a_broker_that_falls_silent_leave_and_joins_end_in_time_until_then() {
    let plan = Plan::new(Bus::Mosquitto).config("tenants: {enabled: true}");
    let plan = Plan { mqtt: ", keepalive: 0".into(), ..plan };
    let [mut first, second, mut third] = brokers_by(&plan, ["b1", "b2", "b3"]);
    is_coordinator(&first, true);
    let (a, b, c) = (Member::join(&first, 1), Member::join(&second, 2), Member::join(&third, 3));
    a.receives_join(2, &b.address);
    a.receives_join(3, &c.address);
    b.receives_join(3, &c.address);

    third.broker().signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    a.receives_leave(&c.address);
    b.receives_leave(&c.address);
    assert!(stopped.elapsed() < DEATH, "{:?}", stopped.elapsed());

    first.broker().signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let refused = Member::try_join(&second, 4).err().unwrap_or_default();
    assert!(refused.starts_with("1013 "), "{refused}");
    // 5 s, and a margin for a busy machine.
    assert!(stopped.elapsed() < Duration::from_secs(8), "{:?}", stopped.elapsed());
    b.receives_leave(&a.address);
    assert!(stopped.elapsed() < DEATH, "{:?}", stopped.elapsed());
    let back = Member::join(&second, 1);
    assert_eq!((back.address.as_str(), &back.peers), (a.address.as_str(), &vec!["N2".to_owned()]));
    b.receives_join(1, &back.address);

    // It continues, as a follower of the new coordinator.
    first.broker().signal(Signal::SIGCONT);
    is_coordinator(&first, false);
    // The other broker accepts its sessions again once both know the coordinator: a second for each of its
    // registrations.
    std::thread::sleep(Duration::from_secs(3));
    let new = wait_until("the first broker has a place for a member", || Member::try_join(&first, 5).ok());
    b.receives_join(5, &new.address);
    back.receives_join(5, &new.address);
}

/// Any such frame would go to the coordinator, over the session that also carries routers' keys.
#[test]
#[ignore = "needs root: tests/run netns"]
fn what_a_member_sends_unasked_goes_to_no_other_broker() {
    let [first, second] = brokers(["b1", "b2"]);
    is_coordinator(&first, true);
    is_coordinator(&second, false);
    let witness = first.probe(Role::new("witness", &["wgkex/broker/+/tenants"]));
    let mut member = WebSocket::open(second.http, "/tenants/t").unwrap();
    member.join("N1", &key(1)).unwrap();
    for _ in 0..500 {
        for (first, payload) in [(0x8a, "probe"), (0x8a, ""), (0x81, "probe"), (0x82, "probe")] {
            member.send(first, payload.as_bytes()).unwrap();
        }
    }
    // The ping is sent after all of them.
    member.send(0x89, b"x").unwrap();
    while member.receive().unwrap() != Frame::Control {}
    drop(member);
    let is_request = |kind: &str, text: &str| text.contains(&format!(r#"{{"{kind}":"#));
    witness.next("its leave", |said| is_request("leave", &said.text()));
    let frames: Vec<_> = witness.received().iter().map(Message::text).filter(|text| !text.contains("[]")).collect();
    assert!(frames.iter().any(|text| is_request("join", text)), "{frames:?}");
    assert!(!frames.iter().any(|text| is_request("alive", text)), "{frames:?}");
}

/// With a long grace time many addresses are held, which a broker sends to another one when they connect.
#[test]
#[ignore = "needs root: tests/run netns"]
fn brokers_that_know_100_000_held_addresses_find_together_and_no_member_leaves() {
    const HELD: u32 = 100_000;
    const FILL: &str = "
        WITH RECURSIVE all_numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM all_numbers WHERE n < 99999),
            numbers(tenant, host, n) AS (SELECT n / 4000, n % 4000 + 1, n FROM all_numbers)
        INSERT INTO addresses SELECT 'held ' || tenant, CAST(printf('%032d', n) AS BLOB),
            printf('10.%d.%d.%d', 64 + tenant / 16, tenant % 16 * 16 + host / 256, host % 256) FROM numbers";
    let plan = || Plan::new(Bus::Mosquitto).config("tenants: {enabled: true, grace: 86400}");
    let mut first = broker_by(plan(), "b1", None);
    assert!(first.stop_broker().success());
    let file = first.state_dir().join("tenants.sqlite");
    let filled = sqlite::open(&file, SCHEMA).unwrap().execute(FILL, []).unwrap();
    assert_eq!(filled, HELD as usize);
    first.start_broker();
    first.wait_until_ready();
    is_coordinator(&first, true);
    let [second, third] = ["b2", "b3"].map(|name| broker_by(plan(), name, Some(first.mqtt)));
    // A join is queued behind all that a broker receives at its start, and times out after 5 s.
    let join = |stack, number| wait_until("it is a member", || Member::try_join(stack, number).ok());
    let (b, c) = (join(&second, 2), join(&third, 3));
    b.receives_join(3, &c.address);
    for stack in [&second, &third] {
        // A join that timed out may leave a held address, for which another one is given up.
        wait_within(2 * DEADLINE, "the addresses are known", || {
            let held = stack.metric("wgkex_broker_tenants_held_addresses")?;
            (held >= f64::from(HELD - 100)).then_some(())
        });
    }
    let _ = first.broker().end_by(Signal::SIGKILL);
    is_coordinator(&second, true);
    let d = wait_until("the third has registered", || Member::try_join(&third, 4).ok());
    b.receives_join(4, &d.address);
    c.receives_join(4, &d.address);
    assert_eq!(d.peers, ["N2", "N3"]);
}

/// Members that join and leave at three brokers at the same time have the right peers in the end.
#[test]
#[ignore = "needs root: tests/run netns"]
fn members_at_three_brokers_that_join_at_once_have_different_addresses_and_all_know_all() {
    let stacks = brokers(["b1", "b2", "b3"]);
    let join = |number: u32| Member::join(&stacks[number as usize % 3], number);
    let members: Vec<_> = thread::scope(|scope| {
        let joining: Vec<_> = (0..90).map(|number| scope.spawn(move || (number, join(number)))).collect();
        joining.into_iter().map(|joining| joining.join().unwrap()).collect()
    });
    let mut addresses: Vec<_> = members.iter().map(|(_, member)| member.address.clone()).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 90);
    let last = Member::join(&stacks[2], 1000);
    assert_eq!(last.peers.len(), 90);
    for (number, member) in &members {
        let mut known = member.peers.clone();
        while known.len() < 90 {
            known.push(member.message()["display_name"].as_str().unwrap().to_owned());
        }
        known.sort();
        let mut expected: Vec<_> = (0..90).filter(|other| other != number).map(|other| format!("N{other}")).collect();
        expected.push("N1000".into());
        expected.sort();
        assert_eq!(known, expected);
        member.receives_nothing();
    }
}
