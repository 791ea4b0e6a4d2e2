//! The processes that listen on ports, by /proc.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::{fs, io};

/// The owner of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortOwner {
    /// The port is free.
    Nobody,
    /// No process that is visible here: the kernel, or a process of another user.
    Kernel,
    /// A process.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        name: String,
    },
}

/// A socket of the kernel's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KernelSocket {
    address: IpAddr,
    port: u16,
    is_listening: bool,
    inode: u64,
}

/// The owner of this UDP port on any address, in this network namespace.
#[must_use]
pub fn of_udp(port: u16) -> PortOwner {
    owner(&["udp", "udp6"], |socket| socket.port == port)
}

/// The owner of the TCP listener that keeps others from listening there, in this network namespace.
#[must_use]
pub fn of_listener(address: IpAddr, port: u16) -> PortOwner {
    owner(&["tcp", "tcp6"], |socket| socket.is_listening && socket.port == port && overlap(socket.address, address))
}

/// The process that prevents a server from listening there, if `error` is about an address in use.
#[must_use]
pub fn taken_by(host: &str, port: u16, error: &io::Error) -> Option<String> {
    if error.kind() != io::ErrorKind::AddrInUse {
        return None;
    }
    match of_listener(host.parse().unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port) {
        PortOwner::Process { pid, name } => Some(format!("taken by process {pid} ({})", name.escape_debug())),
        PortOwner::Nobody | PortOwner::Kernel => None,
    }
}

/// Whether two sockets conflict on one port. `::` covers IPv4, too.
fn overlap(one: IpAddr, other: IpAddr) -> bool {
    let (one, other) = (one.to_canonical(), other.to_canonical());
    let covers = |wide: IpAddr, address: IpAddr| match wide {
        IpAddr::V4(wide) => wide.is_unspecified() && address.is_ipv4(),
        IpAddr::V6(wide) => wide.is_unspecified(),
    };
    one == other || covers(one, other) || covers(other, one)
}

fn owner(tables: &[&str], is_it: impl Fn(&KernelSocket) -> bool) -> PortOwner {
    let read = |table: &&str| fs::read_to_string(format!("/proc/self/net/{table}")).unwrap_or_default();
    let tables: String = tables.iter().map(read).collect();
    let names: BTreeSet<String> =
        sockets(&tables).filter(is_it).map(|socket| format!("socket:[{}]", socket.inode)).collect();
    if names.is_empty() {
        return PortOwner::Nobody;
    }
    let mut owners: Vec<_> = processes().into_iter().filter(|pid| has_open(*pid, &names)).collect();
    owners.sort_unstable();
    match owners.first() {
        None => PortOwner::Kernel,
        Some(pid) => PortOwner::Process { pid: *pid, name: name(*pid) },
    }
}

/// The sockets in tables like those in /proc/net; other lines, such as the heads, are skipped.
fn sockets(tables: &str) -> impl Iterator<Item = KernelSocket> {
    tables.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (address, port) = fields.nth(1)?.rsplit_once(':')?;
        let (address, port) = (self::address(address)?, u16::from_str_radix(port, 16).ok()?);
        let is_listening = fields.nth(1)? == "0A";
        Some(KernelSocket { address, port, is_listening, inode: fields.nth(5)?.parse().ok()? })
    })
}

/// An address as the kernel prints it: words of 32 bits, each in the byte order of this machine.
fn address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(text.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?).into())
        }
        _ => None,
    }
}

/// The processes that are visible here.
#[must_use]
pub fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The name of a process.
#[must_use]
pub fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

fn has_open(pid: u32, names: &BTreeSet<String>) -> bool {
    let is_it = |link: &Path| fs::read_link(link).is_ok_and(|to| to.to_str().is_some_and(|to| names.contains(to)));
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.into_iter().any(|file| is_it(&file.path()))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn the_sockets_of_a_port_are_found_in_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n \
            16: 00000000:CA6C 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0\n \
            17: 0100007F:1388 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 2 0 0\n \
            18: 00000000000000000000000001000000:1389 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 2 0 0\n x";
        let found: Vec<_> = sockets(table).map(|socket| (socket.port, socket.is_listening, socket.inode)).collect();
        assert_eq!(found, [(51820, false, 4711), (5000, true, 4712), (5001, true, 4713)]);
        if cfg!(target_endian = "little") {
            let addresses: Vec<_> = sockets(table).map(|socket| socket.address.to_string()).collect();
            assert_eq!(addresses, ["0.0.0.0", "127.0.0.1", "::1"]);
        }
    }

    #[test]
    fn the_process_of_a_port_is_this_one() {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(matches!(of_udp(port), PortOwner::Process { pid, .. } if pid == std::process::id()));
        drop(socket);
        assert_eq!(of_udp(port), PortOwner::Nobody);
    }

    #[test]
    fn a_listener_keeps_others_off_its_address_and_all_of_them_if_it_has_all() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let owner = |address: &str| of_listener(address.parse().unwrap(), port);
        for address in ["127.0.0.1", "0.0.0.0", "::"] {
            let found = owner(address);
            assert!(matches!(found, PortOwner::Process { pid, .. } if pid == std::process::id()), "{address}");
        }
        assert_eq!(["127.0.0.2", "::1"].map(owner), [PortOwner::Nobody, PortOwner::Nobody]);
        drop(socket);
        assert_eq!(owner("127.0.0.1"), PortOwner::Nobody);
    }
}
