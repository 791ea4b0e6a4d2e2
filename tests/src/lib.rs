//! Support for black-box tests: the real programs, real MQTT servers, and scripted clients in place of other programs. The
//! tests themselves are in `tests/`.
#![expect(clippy::missing_panics_doc, reason = "a helper that finds something wrong fails the test that uses it")]

use std::time::{Duration, Instant};

pub mod admin;
pub mod gateway;
pub mod http;
pub mod in_memory;
pub mod many_routers;
pub mod nats;
pub mod postgres;
pub mod probe;
pub mod process;
pub mod proxy;
pub mod rabbitmq;
pub mod raw_client;
pub mod scripted;
pub mod scripted_server;
pub mod stack;
pub mod unread_answers;
pub mod websocket;

/// How long a test waits for a condition; long enough for a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `found` returns something, and fails after [`DEADLINE`], naming `what`. At most half of the time is spent
/// in `found`, which may start programs: the programs under test need the CPUs.
pub fn wait_until<T>(what: &str, found: impl FnMut() -> Option<T>) -> T {
    wait_within(DEADLINE, what, found)
}

/// The same with another limit.
pub fn wait_within<T>(limit: Duration, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        let checked = Instant::now();
        if let Some(found) = found() {
            return found;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(checked.elapsed().clamp(Duration::from_millis(5), Duration::from_millis(500)));
    }
}

/// The `n`th key of a test: valid, and different for each number.
#[must_use]
pub fn key(n: u32) -> String {
    let mut bytes = [0x42; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    wgkex_common::PublicKey::from_bytes(bytes).expect("a valid key").to_string()
}

/// The name under which programs of this machine publish: its host name.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname().expect("a host name").to_string_lossy().into_owned()
}
