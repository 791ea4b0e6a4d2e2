//! The HTTP client of the commands, which ask a program on this machine.

use std::time::Duration;

use ureq::Agent;

/// A client that waits at most so long for a connection and for each part of an answer. It takes no proxy, follows no
/// redirect, and leaves the status of an answer to the caller.
#[must_use]
pub fn agent(timeout: Duration) -> Agent {
    let config = Agent::config_builder().proxy(None).max_redirects(0).http_status_as_error(false);
    config.timeout_connect(Some(timeout)).timeout_per_read(Some(timeout)).build().into()
}
