//! Whether a listener still listens. The kernel closes one that somebody destroys from outside (`ss -K`); accept then
//! fails for ever, and actix tries it again for ever.

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::AcceptConn;
use tokio::time::sleep;

/// How often a listener is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Whether the kernel takes connections for `listener` (`SO_ACCEPTCONN`, socket(7)).
#[must_use]
pub fn is_listening(listener: &impl AsFd) -> bool {
    getsockopt(listener, AcceptConn).unwrap_or(false)
}

/// Returns when the kernel takes no connections for `listener` any more, at most a second later.
pub async fn closed(listener: TcpListener) {
    while is_listening(&listener) {
        sleep(LOOK).await;
    }
}
