//! The broker's HTTP server under too many keys, connections or bytes, and with clients that send none.
//!
//! Each attack succeeds if its guard is removed from the program: the share of the queue, the last answer, the order of
//! limits, the watchdog of connections, the room in a full table, the cap of a client, the limit of open files, the
//! backlog, the trusted proxies, the time for a body, the filter of the log.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::print_stdout, reason = "what was measured, for who wants to see it")]

mod connections;
mod keys;
mod known_keys;
mod unread_answers;

use std::fs::File;

use wgkex_tests::scripted::{Worker, WorkerBehaviour};
use wgkex_tests::stack::{Bus, Plan, Stack};

/// A lock for tests that measure times, or need most of the allowed open files: only one of them runs at a time, also
/// among other processes. It is held until the value is dropped.
fn alone() -> File {
    let lock = File::create(std::env::temp_dir().join(format!("wgkex-test-alone-{}", nix::unistd::getuid())));
    let lock = lock.unwrap();
    lock.lock().unwrap();
    lock
}

/// A broker with this plan, and a gateway that confirms.
fn stack_with(plan: Plan) -> (Stack, Worker) {
    let stack = Stack::start(plan);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    (stack, worker)
}

fn plan(config: &str) -> Plan {
    Plan::new(Bus::Mosquitto).config(config)
}

/// The resident memory of the broker, in KiB.
fn memory(stack: &mut Stack) -> u32 {
    wgkex_tests::process::memory(stack.broker().pid())
}
