//! Clients that have not logged in: silent connections, and password guesses.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rumqttc::{Connect, ConnectReturnCode, Login, Packet};
use wgkex_tests::process::memory;
use wgkex_tests::raw_client::{RawClient, connect};
use wgkex_tests::stack::Stack;
use wgkex_tests::{DEADLINE, wait_until};

use crate::access::{TWO, as_user, join, stack};
use crate::assert_serving;

/// Background work that runs until it is dropped.
struct Ongoing {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ongoing {
    fn start(mut step: impl FnMut() + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let over = over.clone();
            move || {
                while !over.load(Ordering::Relaxed) {
                    step();
                }
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Ongoing {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn address(last: u8) -> Ipv4Addr {
    [127, 0, 0, last].into()
}

/// Sixty silent connections from each of ten addresses. Some of the closed ones are replaced.
fn silent_crowd(server: SocketAddr) -> Ongoing {
    let dial = move |last| RawClient::connect_tcp_from(address(last), server);
    let mut crowd: Vec<_> = (2..12).flat_map(|last| (0..60).map(move |_| (last, dial(last)))).collect();
    Ongoing::start(move || {
        for (last, raw) in crowd.iter_mut().filter_map(|(last, raw)| raw.has_ended().then_some((last, raw))).take(5) {
            *raw = dial(*last);
        }
        thread::sleep(Duration::from_millis(50));
    })
}

fn metric(stack: &Stack, reason: &str) -> f64 {
    stack.metric(&format!("wgkex_broker_mqtt_refused_total{{reason=\"{reason}\"}}")).unwrap_or_default()
}

/// Regression: the first gateway found no free place.
#[test]
fn silent_connections_keep_no_gateway_out() {
    let mut stack = stack(&TWO);
    let _ = join(&stack, "gw1", "gw1");
    let crowd = silent_crowd(stack.mqtt);
    wait_until("the crowd takes all places", || (metric(&stack, "full") > 0.0).then_some(()));
    for round in 0..10 {
        // An address that has logged in before, one that never has, and one with many silent connections.
        for last in [1, 100 + round, 2] {
            let code = RawClient::connect_tcp_from(address(last), stack.mqtt).log_in(&as_user("gw1", "gw1"));
            assert_eq!(code, Some(ConnectReturnCode::Success), "round {round} from 127.0.0.{last}");
        }
    }
    drop(crowd);
    assert_stands_with_users(&mut stack);
}

fn assert_stands_with_users(stack: &mut Stack) {
    let mut raw = join(stack, "gw1", "gw1");
    raw.send(&Packet::PingReq);
    assert_eq!(raw.read(), Some(Packet::PingResp));
    stack.wait_until_ready();
}

fn guess(user: &str, password: &str) -> Connect {
    Connect { login: Some(Login::new(user, password)), ..connect(user) }
}

/// Regression: all guesses were verified.
#[test]
fn password_guesses_from_one_address_are_limited_and_block_no_other_client() {
    let mut stack = stack(&TWO);
    let (server, begun) = (stack.mqtt, Instant::now());
    let mut number = 0;
    let guesses = Ongoing::start(move || {
        let mut guessers: Vec<_> = (0..30).map(|_| RawClient::connect_tcp_from(address(2), server)).collect();
        for guesser in &mut guessers {
            number += 1;
            guesser.send(&Packet::Connect(guess("gw2", &number.to_string())));
        }
        for guesser in &mut guessers {
            let code = guesser.read();
            assert!(!matches!(code, Some(Packet::ConnAck(ack)) if ack.code == ConnectReturnCode::Success));
        }
    });
    let answered = || metric(&stack, "guesses") + metric(&stack, "password");
    wait_until("many guesses are answered", || (answered() >= 100.0).then_some(()));
    // Each for the first time: a password that was right before is not verified again.
    for (last, user) in [(3, "gw1"), (2, "b")] {
        let code = RawClient::connect_tcp_from(address(last), stack.mqtt).log_in(&as_user(user, user));
        assert_eq!(code, Some(ConnectReturnCode::Success), "{user} from 127.0.0.{last}");
    }
    let (looked_at, seconds) = (metric(&stack, "password"), begun.elapsed().as_secs_f64());
    assert!(looked_at <= 6.0 + seconds, "{looked_at} guesses in {seconds} s");
    drop(guesses);
    assert_stands_with_users(&mut stack);
}

/// Thirty-two connections from each of sixteen addresses, each with a wrong password. Some of the closed ones are
/// replaced.
fn guessing_crowd(server: SocketAddr) -> Vec<Ongoing> {
    let of_address = |last| {
        let mut number = 0;
        let mut dial = move || {
            let mut raw = RawClient::connect_tcp_from(address(last), server);
            number += 1;
            raw.send(&Packet::Connect(guess(&format!("u{number}"), "wrong")));
            raw
        };
        let mut crowd: Vec<_> = (0..32).map(|_| dial()).collect();
        Ongoing::start(move || {
            crowd.iter_mut().filter_map(|raw| raw.has_ended().then_some(raw)).take(3).for_each(|raw| *raw = dial());
            thread::sleep(Duration::from_millis(50));
        })
    };
    (2..18).map(of_address).collect()
}

/// Regression: each was closed at once, without an answer, as long as others connected.
#[test]
fn password_guesses_from_many_addresses_keep_no_gateway_out() {
    let mut stack = stack(&TWO);
    let crowd = guessing_crowd(stack.mqtt);
    wait_until("the crowd takes all places", || (metric(&stack, "full") > 0.0).then_some(()));
    // Each for the first time, from a new address.
    for (last, user) in [(101, "gw1"), (102, "gw2"), (103, "b")] {
        // Without a pause: the crowd takes each free place at once.
        let begun = Instant::now();
        let log_in = || RawClient::connect_tcp_from(address(last), stack.mqtt).log_in(&as_user(user, user));
        while log_in() != Some(ConnectReturnCode::Success) {
            assert!(begun.elapsed() < DEADLINE, "{user} is not let in from 127.0.0.{last}");
        }
    }
    drop(crowd);
    assert_stands_with_users(&mut stack);
}

/// Regression: 19 MiB for each of many threads.
#[test]
fn parallel_password_guesses_take_the_memory_of_one_hash() {
    let mut stack = stack(&TWO);
    let server = stack.mqtt;
    let before = memory(stack.broker().pid());
    let guess_from = |last| {
        let is_wrong = move |n: usize| {
            let code = RawClient::connect_tcp_from(address(last), server).log_in(&guess(&format!("u{n}"), "wrong"));
            code == Some(ConnectReturnCode::NotAuthorized)
        };
        // Some may not have their turn in time.
        thread::spawn(move || (0..1_000).filter(|n| is_wrong(*n)).take(13).count())
    };
    let guessers: Vec<_> = (2..18).map(guess_from).collect();
    let wrong: usize = guessers.into_iter().map(|guesser| guesser.join().unwrap()).sum();
    let after = memory(stack.broker().pid());
    assert!(wrong >= 200, "{wrong}");
    assert!(after < before + (64 << 10), "{after} KiB, {before} KiB before {wrong} guesses");
    assert_stands_with_users(&mut stack);
}

/// Regression: an unknown name was refused in a hundredth of the time.
#[test]
fn a_wrong_name_takes_as_long_as_a_wrong_password() {
    let stack = stack(&TWO);
    let takes = |user: &str, source| {
        let mut raw = RawClient::connect_tcp_from(source, stack.mqtt);
        let begun = Instant::now();
        assert_eq!(raw.log_in(&guess(user, "wrong")), Some(ConnectReturnCode::NotAuthorized));
        begun.elapsed()
    };
    // The minimum of several attempts, of more on a busy machine.
    let (mut known, mut unknown) = (Duration::MAX, Duration::MAX);
    for round in 2..82 {
        known = known.min(takes("gw1", address(round)));
        unknown = unknown.min(takes("gw3", address(round)));
        if round > 4 && unknown > known / 3 {
            return;
        }
    }
    panic!("{unknown:?} for a wrong name, {known:?} for a wrong password");
}

/// A stop does not wait for silent connections, and later clients are accepted at once.
#[test]
fn without_users_silent_connections_keep_no_client_out_either() {
    let mut stack = crate::stack();
    let crowd = silent_crowd(stack.mqtt);
    wait_until("the crowd takes all places", || (metric(&stack, "full") > 0.0).then_some(()));
    assert_serving(&mut stack);
    drop(crowd);
}
