//! A listener for many clients, and whether it still listens. The kernel closes one that somebody destroys from outside
//! (`ss -K`); accept then fails for ever, and actix tries it again for ever.

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::sockopt::{AcceptConn, SndBuf};
use nix::sys::socket::{Backlog, getsockopt, listen, setsockopt};
use tokio::time::sleep;

/// How often a listener is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Connections that the kernel keeps until they are accepted; a fleet comes at once.
const BACKLOG: i32 = 4_096;
/// What the kernel keeps of an answer that is not read, in bytes; it counts its own costs in.
const KERNEL_BUFFER: usize = 128 << 10;

/// The listener, with a queue that is as long as a fleet needs, and connections for which the kernel keeps little.
pub fn prepare(listener: TcpListener) -> std::io::Result<TcpListener> {
    setsockopt(&listener, SndBuf, &(KERNEL_BUFFER / 2))?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Whether the kernel takes connections for `listener` (`SO_ACCEPTCONN`, socket(7)).
#[must_use]
pub fn is_listening(listener: &impl AsFd) -> bool {
    getsockopt(listener, AcceptConn).unwrap_or(false)
}

/// Returns when the kernel takes no connections for `listener` any more, at most a second later.
pub async fn closed(listener: TcpListener) {
    while is_listening(&listener) {
        sleep(CHECK_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backlog_takes_a_whole_fleet() {
        let listener = prepare(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        let (server, patience) = (listener.local_addr().unwrap(), Duration::from_secs(5));
        let waiting: Vec<_> = (0..400).map(|_| std::net::TcpStream::connect_timeout(&server, patience)).collect();
        assert!(waiting.iter().all(Result::is_ok), "nobody accepts yet");
    }
}
