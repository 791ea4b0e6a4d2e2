//! The environment of a scenario beside the kernel under test: interfaces that are created and deleted, and tables read
//! by other tools.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::memory::MemoryKernel;
use wgkex_kernel::{Kernel, Peer};

/// A table's entries as the C tools print them.
#[derive(Debug, PartialEq, Eq)]
pub struct Shown {
    /// `wg show allowed-ips`.
    pub peers: BTreeSet<String>,
    /// `ip -6 route`, protocol static.
    pub routes: BTreeSet<String>,
    /// `bridge fdb`.
    pub fdb: BTreeSet<String>,
}

pub trait Lab {
    type Kernel: Kernel;
    fn kernel(&self) -> Self::Kernel;
    /// A domain of this name, of no other test.
    fn domain(&self, name: &str) -> Domain;
    /// Creates both interfaces, up and empty, in place of older ones.
    fn make(&self, domain: &Domain);
    fn remove(&self, domain: &Domain);
    fn remove_vxlan(&self, domain: &Domain);
    fn set_up(&self, domain: &Domain, up: bool);
    /// Fails if `wg-REST` is there.
    fn assert_absent(&self, domain: &Domain);
    /// The key, the port and the address of `wg-REST`.
    fn own(&self, domain: &Domain) -> (Option<PublicKey>, u16, Option<IpAddr>);
    /// Peers, routes and FDB entries that wgkex would not make.
    fn add_foreign(&self, domain: &Domain);
    /// The routes among them that are of protocol static and in the main table.
    fn foreign_routes(&self) -> BTreeSet<IpNet>;
    fn shown(&self, domain: &Domain) -> Shown;
    /// All that is in the tables, to be compared byte for byte.
    fn tables(&self, domain: &Domain) -> String;
}

/// The `n`th key of a test.
pub fn key(n: u32) -> PublicKey {
    let mut bytes = [0x42; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

#[derive(Default)]
pub struct MemoryLab(MemoryKernel);

impl Lab for MemoryLab {
    type Kernel = MemoryKernel;

    fn kernel(&self) -> MemoryKernel {
        self.0.clone()
    }

    fn domain(&self, name: &str) -> Domain {
        Domain::new(name, &[String::new()]).unwrap()
    }

    fn make(&self, domain: &Domain) {
        self.0.add(domain);
    }

    fn remove(&self, domain: &Domain) {
        self.0.remove(domain);
    }

    fn remove_vxlan(&self, domain: &Domain) {
        self.0.remove_vxlan(domain);
    }

    fn set_up(&self, domain: &Domain, up: bool) {
        if up { self.0.set_up(domain) } else { self.0.set_down(domain) }
    }

    fn assert_absent(&self, domain: &Domain) {
        assert_eq!(self.0.device(domain), None);
    }

    fn own(&self, domain: &Domain) -> (Option<PublicKey>, u16, Option<IpAddr>) {
        let device = self.0.device(domain).unwrap();
        let address = device.public_key.unwrap().link_local();
        (device.public_key, 40_001, Some(address.into()))
    }

    fn add_foreign(&self, domain: &Domain) {
        self.0.alter(domain, |device| {
            let allowed_ips = ["10.9.0.0/24", "fe80::f/128"].iter().map(|ip| ip.parse().unwrap()).collect();
            device.peers.insert(key(u32::MAX), Peer { allowed_ips, ..Peer::default() });
            device.routes.insert("2001:db8::1/128".parse().unwrap());
            device.fdb.insert("fe80::f".parse().unwrap());
        });
    }

    fn foreign_routes(&self) -> BTreeSet<IpNet> {
        BTreeSet::from(["2001:db8::1/128".parse().unwrap()])
    }

    fn shown(&self, domain: &Domain) -> Shown {
        let device = self.0.device(domain).unwrap();
        let peer = |(key, peer): (&PublicKey, &Peer)| {
            let ips: Vec<_> = peer.allowed_ips.iter().map(ToString::to_string).collect();
            let ips = if ips.is_empty() { "(none)".into() } else { ips.join(" ") };
            format!("{key}\t{ips}")
        };
        let entry = |to| format!("00:00:00:00:00:00 dst {to} via {} self permanent", domain.wireguard());
        Shown {
            peers: device.peers.iter().map(peer).collect(),
            routes: device
                .routes
                .iter()
                .map(|to| format!("{} proto static metric 1024 pref medium", to.addr()))
                .collect(),
            fdb: device.fdb.iter().map(entry).collect(),
        }
    }

    fn tables(&self, domain: &Domain) -> String {
        format!("{:?}", self.0.device(domain))
    }
}
