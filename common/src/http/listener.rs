//! A listener for many clients, and a check that it still listens. The kernel closes a listener that an administrator
//! destroys (`ss -K`); accept then fails for ever, and actix repeats it for ever.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::sockopt::{AcceptConn, Ipv6V6Only, ReuseAddr, SndBuf};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, getsockopt, listen, setsockopt, socket,
};
use tokio::time::sleep;

/// The interval of checks of a listener.
const LISTENER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The backlog of connections that are not accepted yet: a whole fleet may connect at once.
const BACKLOG: i32 = 4_096;
/// The kernel's send buffer for a connection, in bytes, including its overhead.
const KERNEL_BUFFER: usize = 128 << 10;

/// A listener on all addresses of IPv6 and IPv4, also where the system separates the two by default (`bindv6only`), or
/// has no IPv6.
pub fn everywhere(port: u16) -> io::Result<TcpListener> {
    match on_both(port) {
        Err(Errno::EAFNOSUPPORT) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        listener => Ok(listener?),
    }
}

fn on_both(port: u16) -> nix::Result<TcpListener> {
    let socket = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, Ipv6V6Only, &false)?;
    // As in the standard library: a restart does not wait for old connections.
    setsockopt(&socket, ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0)))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(TcpListener::from(socket))
}

/// Sets the listener's backlog to that of a fleet, and a small send buffer for its connections.
pub fn prepare(listener: TcpListener) -> io::Result<TcpListener> {
    setsockopt(&listener, SndBuf, &(KERNEL_BUFFER / 2))?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// Whether the kernel still listens on `listener` (`SO_ACCEPTCONN`, socket(7)).
#[must_use]
pub fn is_listening(listener: &impl AsFd) -> bool {
    getsockopt(listener, AcceptConn).unwrap_or(false)
}

/// Returns when the kernel no longer listens on `listener`, at most a second later.
pub async fn closed(listener: TcpListener) {
    while is_listening(&listener) {
        sleep(LISTENER_CHECK_INTERVAL).await;
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
