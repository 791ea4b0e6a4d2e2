//! The WireGuard interfaces of one machine, of domains, servers and the hub: no two have one name or one UDP port, and no two
//! servers have one network.

use std::collections::BTreeMap;

use super::diagnostics::{Diagnostics, Path};
use super::{HubSettings, ServerSettings, Setup};
use crate::Domain;

/// An owner of interfaces.
#[derive(Clone, Copy)]
pub(super) struct InterfaceOwners<'a> {
    pub domains: &'a BTreeMap<Domain, Setup>,
    pub servers: &'a BTreeMap<String, ServerSettings>,
    pub hub: Option<&'a HubSettings>,
}

impl InterfaceOwners<'_> {
    /// Compares each server, and the hub, with those before it; the domains have been compared with each other.
    pub fn check(self, diagnostics: &mut Diagnostics) {
        let Self { domains, servers, hub } = self;
        let (mut names, mut ports) = (BTreeMap::new(), BTreeMap::new());
        for (domain, setup) in domains {
            names.insert(domain.wireguard(), domain.to_string());
            names.insert(domain.vxlan(), domain.to_string());
            ports.insert(setup.listen_port, domain.to_string());
            ports.insert(setup.vxlan_port, format!("the VXLAN of {domain}"));
        }
        let servers_and_hub = servers
            .iter()
            .map(|(name, server)| {
                let path = Path::of("servers").then(name);
                (path, format!("server {name}"), &server.interface, server.listen_port)
            })
            .chain(hub.map(|hub| (Path::of("hub"), "the hub".to_owned(), &hub.interface, hub.listen_port)));
        for (path, owner, interface, port) in servers_and_hub {
            if let Some(other) = names.insert(interface.clone(), owner.clone()) {
                let complaint = format!("must be another interface than {interface}, which is that of {other}");
                diagnostics.error(&path.then("interface"), &complaint);
            }
            if let Some(other) = ports.insert(port, owner) {
                let complaint = format!("must be another port than {port}, which is that of {other}");
                diagnostics.error(&path.then("listen_port"), &complaint);
            }
        }
        let networks: Vec<_> = servers.iter().map(|(name, server)| (name, server.network)).collect();
        for (at, (name, network)) in networks.iter().enumerate() {
            let overlaps =
                |(_, other): &&(&String, _)| network.contains(other) || ipnet::IpNet::contains(other, network);
            if let Some((other, _)) = networks[..at].iter().find(overlaps) {
                let complaint = format!("must be apart from that of server {other}");
                diagnostics.error(&Path::of("servers").then(name.as_str()).then("network"), &complaint);
            }
        }
    }
}
