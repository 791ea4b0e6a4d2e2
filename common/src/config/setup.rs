//! The interfaces that `wgkex-worker setup` makes: `setup`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::diagnostics::{Diagnostics, Path};
use super::value::{Directory, Port, Text, Vni, port};
use crate::Domain;

/// The interfaces of a domain, as `wgkex-worker setup` makes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// The file of the gateway's private key.
    pub key_file: PathBuf,
    /// The UDP port of `wg-REST`; no two domains have the same.
    pub listen_port: u16,
    /// The network identifier of `vx-REST`, 1 to 16777215.
    pub vxlan_id: u32,
    /// The UDP port of `vx-REST`.
    pub vxlan_port: u16,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawSetup {
    pub key_dir: Option<Directory>,
    pub listen_port: Option<Port>,
    pub vxlan_id: Option<Vni>,
    pub vxlan_port: Option<Port>,
    pub domains: BTreeMap<String, RawSetupDomain>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawSetupDomain {
    pub listen_port: Option<Port>,
    pub vxlan_id: Option<Vni>,
    pub vxlan_port: Option<Port>,
}

impl RawSetup {
    /// Whether anything is set.
    pub fn is_named(&self) -> bool {
        let Self { key_dir, listen_port, vxlan_id, vxlan_port, domains } = self;
        key_dir.is_some() || listen_port.is_some() || vxlan_id.is_some() || vxlan_port.is_some() || !domains.is_empty()
    }

    /// The directory of private keys.
    pub fn key_dir(&self) -> PathBuf {
        self.key_dir.as_ref().map_or("/etc/wgkex", |dir| &dir.0).into()
    }

    /// For `domains`, those served of the `listed` ones.
    pub fn check(&self, listed: &[Text], domains: &[Domain], diagnostics: &mut Diagnostics) -> BTreeMap<Domain, Setup> {
        for name in self.domains.keys().filter(|name| !listed.iter().any(|listed| listed.0 == **name)) {
            diagnostics.error(&Path::of("setup.domains").then(name), "must be one of domains");
        }
        let key_dir = self.key_dir();
        let first_port = port(self.listen_port.as_ref(), 51820);
        let default = RawSetupDomain::default();
        let mut interfaces = BTreeMap::new();
        for (domain, counted) in domains.iter().zip(u32::from(first_port)..) {
            let own = self.domains.get(domain.name()).unwrap_or(&default);
            let vni = own.vxlan_id.as_ref().or(self.vxlan_id.as_ref());
            let vxlan_port = own.vxlan_port.as_ref().or(self.vxlan_port.as_ref());
            let setup = Setup {
                key_file: key_dir.join(format!("{}.key", domain.wireguard())),
                listen_port: own
                    .listen_port
                    .as_ref()
                    .map_or_else(|| counted_port(counted, domain, diagnostics), |port| port.0),
                vxlan_id: vni.map_or(99, |id| id.0),
                vxlan_port: port(vxlan_port, 8472),
            };
            interfaces.insert(domain.clone(), setup);
        }
        check_udp_ports(domains, &interfaces, diagnostics);
        interfaces
    }
}

fn counted_port(counted: u32, domain: &Domain, diagnostics: &mut Diagnostics) -> u16 {
    u16::try_from(counted).unwrap_or_else(|_| {
        let complaint = format!("must be lower, as it counts up to {counted} for {domain}, and 65535 is the last port");
        diagnostics.error(&Path::of("setup.listen_port"), &complaint);
        0
    })
}

/// A UDP port serves one WireGuard interface, and not VXLAN at the same time; VXLANs may share theirs.
fn check_udp_ports(domains: &[Domain], interfaces: &BTreeMap<Domain, Setup>, diagnostics: &mut Diagnostics) {
    let vxlan: BTreeSet<u16> = interfaces.values().map(|setup| setup.vxlan_port).collect();
    let mut taken: BTreeMap<u16, &Domain> = BTreeMap::new();
    for (domain, setup) in domains.iter().filter_map(|domain| interfaces.get_key_value(domain)) {
        let port = setup.listen_port;
        let path = Path::of("setup.domains").then(domain.name()).then("listen_port");
        if port == 0 {
            continue; // reported where it was counted
        }
        if vxlan.contains(&port) {
            diagnostics.error(&path, &format!("must be another port than {port}, which is a vxlan_port"));
        }
        if let Some(other) = taken.insert(port, domain) {
            diagnostics.error(&path, &format!("must be another port than {port}, which is that of {other}"));
        }
    }
}
