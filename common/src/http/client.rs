//! The HTTP client of the commands, which send requests to a program on this machine.

use std::time::Duration;

use ureq::Agent;

/// A client with this timeout for the connection and for each part of a response. It uses no proxy, follows no
/// redirect, and leaves the status of a response to the caller.
#[must_use]
pub fn agent(timeout: Duration) -> Agent {
    let config = Agent::config_builder().proxy(None).max_redirects(0).http_status_as_error(false);
    config.timeout_connect(Some(timeout)).timeout_per_read(Some(timeout)).build().into()
}
