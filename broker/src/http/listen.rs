//! The socket that a server of the broker listens on.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, TcpListener};
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::sockopt::{Ipv6V6Only, ReuseAddr};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket};

/// A listener on `host`. `::` is all addresses, those of IPv4 too, also where the system separates the two by default
/// (`bindv6only`), or has no IPv6.
pub fn open(host: &str, port: u16) -> io::Result<TcpListener> {
    if host != "::" {
        return TcpListener::bind((host, port));
    }
    match everywhere(port) {
        Err(Errno::EAFNOSUPPORT) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        listener => Ok(listener?),
    }
}

fn everywhere(port: u16) -> nix::Result<TcpListener> {
    let socket = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, Ipv6V6Only, &false)?;
    // As the standard library has it: a restart does not wait for old connections.
    setsockopt(&socket, ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0)))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(TcpListener::from(socket))
}
