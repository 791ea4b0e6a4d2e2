//! Members of one tenant at different brokers of one bus.

use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_tests::key;
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::websocket::WebSocket;

/// How long the death of a broker may stay unnoticed (issue: 40 s).
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

    fn hears_of(&self, number: u32, address: &str) {
        let expected =
            json!({ "display_name": format!("N{number}"), "public_key": key(number), "virtual_ip": address });
        assert_eq!(self.message(), expected);
    }

    fn hears_leave(&self, address: &str) {
        assert_eq!(self.message(), json!({ "removed_peer": address }));
    }

    fn hears_nothing(&self) {
        assert!(self.messages.try_recv().is_err(), "{:?} heard more", self.address);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // It may be closed.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Brokers on machines of these names, at one Mosquitto.
fn brokers<const N: usize>(names: [&str; N]) -> [Stack; N] {
    let plan = |name: &str| Plan::new(Bus::Mosquitto).config("tenants: {enabled: true}").host_name(name);
    let mut mqtt = None;
    names.map(|name| {
        let mut stack = Stack::prepare(plan(name));
        match mqtt {
            None => stack.start_mosquitto(),
            Some(mqtt) => stack.mqtt = mqtt,
        }
        mqtt = Some(stack.mqtt);
        stack.write_config();
        stack.start_broker();
        stack.wait_until_ready();
        stack
    })
}

fn is_coordinator(stack: &Stack, is_one: bool) {
    stack.wait_for_metric("wgkex_broker_tenants_coordinator", f64::from(u8::from(is_one)));
}

/// Each of them is told the same wherever it is connected.
#[test]
#[ignore = "needs root: tests/run netns"]
fn members_at_different_brokers_see_each_other_and_leave_with_their_broker() {
    let [mut first, mut second] = brokers(["b1", "b2"]);
    is_coordinator(&first, true);
    is_coordinator(&second, false);
    let a = Member::join(&first, 1);
    let b = Member::join(&second, 2);
    assert_eq!((a.address.as_str(), b.address.as_str(), &b.peers), ("10.64.0.1", "10.64.0.2", &vec!["N1".to_owned()]));
    a.hears_of(2, "10.64.0.2");
    let third = Member::join(&second, 3);
    assert_eq!((third.address.as_str(), &third.peers), ("10.64.0.3", &vec!["N1".to_owned(), "N2".into()]));
    a.hears_of(3, "10.64.0.3");
    b.hears_of(3, "10.64.0.3");
    drop(third);
    a.hears_leave("10.64.0.3");
    b.hears_leave("10.64.0.3");
    for stack in [&first, &second] {
        stack.wait_for_metric("wgkex_broker_tenants_members", 2.0);
    }
    assert_eq!(
        Member::try_join(&first, 2).err().as_deref(),
        Some("1008 a member has this public_key and is connected")
    );

    // The server of the bus is away for a moment, and nobody notices.
    first.kill_and_restart_bus();
    for stack in [&mut first, &mut second] {
        stack.wait_until_ready();
    }
    let fourth = Member::join(&first, 4);
    assert_eq!(fourth.address, "10.64.0.4", "the address of the third is held");
    a.hears_of(4, "10.64.0.4");
    b.hears_of(4, "10.64.0.4");

    // The coordinator dies.
    let _ = first.broker().end_by(Signal::SIGKILL);
    let died = Instant::now();
    let mut left = [b.message(), b.message()].map(|message| message["removed_peer"].as_str().unwrap().to_owned());
    left.sort();
    assert_eq!(left, ["10.64.0.1", "10.64.0.4"]);
    assert!(died.elapsed() < DEATH, "{:?}", died.elapsed());
    is_coordinator(&second, true);
    let back = Member::join(&second, 1);
    assert_eq!((back.address.as_str(), &back.peers), ("10.64.0.1", &vec!["N2".to_owned()]));
    b.hears_of(1, "10.64.0.1");

    // It comes back, follows, and dies again.
    first.start_broker();
    first.wait_until_ready();
    let fifth = Member::join(&first, 5);
    is_coordinator(&first, false);
    assert_eq!(fifth.peers, ["N2", "N1"], "in the order of their joins");
    b.hears_of(5, &fifth.address);
    back.hears_of(5, &fifth.address);
    let _ = first.broker().end_by(Signal::SIGKILL);
    let died = Instant::now();
    b.hears_leave(&fifth.address);
    back.hears_leave(&fifth.address);
    assert!(died.elapsed() < DEATH, "{:?}", died.elapsed());
    b.hears_nothing();

    // One that stops says so at once.
    first.start_broker();
    first.wait_until_ready();
    let sixth = Member::join(&first, 6);
    b.hears_of(6, &sixth.address);
    let stopped = Instant::now();
    assert!(first.stop_broker().success());
    b.hears_leave(&sixth.address);
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());
}

/// Members that join and leave at three brokers at the same time know the truth in the end.
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
        member.hears_nothing();
    }
}
