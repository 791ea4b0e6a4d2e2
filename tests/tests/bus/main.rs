//! The broker's MQTT messages, published and received (contract sections 4 and 6), with scripted workers: every test
//! runs with the embedded MQTT server and with Mosquitto.

mod confirmations;
mod data;
mod faults;
mod gateway_selection;
mod presence;
mod server;
mod session;
mod sync_requests;

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use wgkex_tests::DEADLINE;
use wgkex_tests::http::{Http, Response, ask};
use wgkex_tests::stack::{DOMAIN, Stack, V1, V2};

/// Runs each test on both kinds of bus.
macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod embedded {
            $(#[test] fn $test() { super::$test(wgkex_tests::stack::Bus::Embedded); })*
        }
        mod mosquitto {
            $(#[test] fn $test() { super::$test(wgkex_tests::stack::Bus::Mosquitto); })*
        }
    };
}
use on_both;

/// Timeouts longer than any test's machine needs: an answer before them did not wait for them.
const LONG: &str = "confirm_timeout: 20\nconfirm_budget: 25";
/// The limit for an answer without waiting, less than [`LONG`].
const AT_ONCE: Duration = Duration::from_secs(10);
/// Timeouts short enough for a test to wait for.
const SHORT: &str = "confirm_timeout: 1\nconfirm_budget: 2";

/// A router that waits for its answer.
struct Router {
    answer: Receiver<(Response, Duration)>,
}

impl Router {
    fn v1(stack: &Stack, key: &str) -> Self {
        Self::ask(stack, V1, key)
    }

    fn v2(stack: &Stack, key: &str) -> Self {
        Self::ask(stack, V2, key)
    }

    fn ask(stack: &Stack, path: &'static str, key: &str) -> Self {
        let (sender, answer) = channel();
        let (server, body) = (stack.http, ask(DOMAIN, key));
        thread::spawn(move || {
            let begun = Instant::now();
            let response = Http::connect(server).post(path, &body);
            // The test may have failed meanwhile.
            let _ = sender.send((response, begun.elapsed()));
        });
        Self { answer }
    }

    /// The answer, and how long it took.
    fn answer(self) -> (Response, Duration) {
        self.answer.recv_timeout(DEADLINE).expect("an answer")
    }

    /// Fails if there is an answer already.
    fn assert_waits(&self) {
        let early = self.answer.recv_timeout(Duration::from_millis(300));
        assert_eq!(early, Err(RecvTimeoutError::Timeout), "an answer before its time");
    }
}

/// Checks that a router gets 503 with Retry-After.
fn assert_unavailable(response: &Response) {
    assert_eq!(response.status, 503, "{response:?}");
    let after: u32 = response.header("retry-after").expect("Retry-After").parse().expect("seconds");
    assert!((1..=60).contains(&after), "{response:?}");
    assert!(response.json()["error"]["message"].is_string(), "{response:?}");
}
