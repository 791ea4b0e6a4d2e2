//! A listener for many clients, and whether it still listens. The kernel closes one that somebody destroys from outside
//! (`ss -K`); accept then fails for ever, and actix tries it again for ever.

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

/// How often a listener is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Connections that the kernel keeps until they are accepted; a fleet comes at once.
const BACKLOG: i32 = 4_096;
/// What the kernel keeps of an answer that is not read, in bytes; it counts its own costs in.
const KERNEL_BUFFER: usize = 128 << 10;

/// A listener on all addresses, those of IPv4 too, also where the system separates the two by default (`bindv6only`), or has
/// no IPv6.
pub fn everywhere(port: u16) -> io::Result<TcpListener> {
    match on_both(port) {
        Err(Errno::EAFNOSUPPORT) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        listener => Ok(listener?),
    }
}

fn on_both(port: u16) -> nix::Result<TcpListener> {
    let socket = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, Ipv6V6Only, &false)?;
    // As the standard library has it: a restart does not wait for old connections.
    setsockopt(&socket, ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0)))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(TcpListener::from(socket))
}

/// The listener, with a queue that is as long as a fleet needs, and connections for which the kernel keeps little.
pub fn prepare(listener: TcpListener) -> io::Result<TcpListener> {
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
