//! Who has a UDP port, by /proc.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::doctor::facts::PortOwner;

/// The owner of this port on any address, in this network namespace.
pub(super) fn owner(port: u16) -> PortOwner {
    let tables = ["udp", "udp6"].map(|table| fs::read_to_string(format!("/proc/self/net/{table}")).unwrap_or_default());
    let inodes: BTreeSet<u64> = tables.iter().flat_map(|table| inodes(table, port)).collect();
    if inodes.is_empty() {
        return PortOwner::Nobody;
    }
    let names: BTreeSet<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let mut owners: Vec<_> = processes().into_iter().filter(|pid| has_open(*pid, &names)).collect();
    owners.sort_unstable();
    match owners.first() {
        None => PortOwner::Kernel,
        Some(pid) => PortOwner::Process { pid: *pid, name: name(*pid) },
    }
}

/// The sockets of a table of /proc/net/udp that have this port.
fn inodes(table: &str, port: u16) -> Vec<u64> {
    let inode = |line: &str| {
        let mut fields = line.split_whitespace();
        let (_, found) = fields.nth(1)?.rsplit_once(':')?;
        let is_it = u16::from_str_radix(found, 16) == Ok(port);
        fields.nth(7).filter(|_| is_it)?.parse().ok()
    };
    table.lines().skip(1).filter_map(inode).collect()
}

/// The processes that this one sees.
pub(super) fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What a process is called.
pub(super) fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

fn has_open(pid: u32, names: &BTreeSet<String>) -> bool {
    let is_it = |link: &Path| fs::read_link(link).is_ok_and(|to| to.to_str().is_some_and(|to| names.contains(to)));
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.into_iter().any(|file| is_it(&file.path()))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn the_sockets_of_a_port_are_found_in_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n \
            16: 00000000:CA6C 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0\n \
            17: 0100007F:CA6D 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4712 2 0 0\n x";
        assert_eq!(inodes(table, 51820), [4711]);
        assert_eq!(inodes(table, 51822), Vec::<u64>::new());
    }

    #[test]
    fn the_process_of_a_port_is_this_one() {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(matches!(owner(port), PortOwner::Process { pid, .. } if pid == std::process::id()));
        drop(socket);
        assert_eq!(owner(port), PortOwner::Nobody);
    }
}
