//! The steps from the peers of a server's interface to those that its leases want. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_common::wire::lease::LeasedAddresses;
use wgkex_kernel::Device;

use crate::plan::{Action, Objects, Step};
use crate::profiles::{Ownership, lease};

/// The steps, and the keys whose peers cannot be set.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LeasePlan {
    /// The steps, removals first: another key may have the address.
    pub steps: Vec<Step>,
    /// Keys with a lease whose peers another program made or altered: they stay as they are.
    pub foreign: BTreeSet<PublicKey>,
}

/// The desired state: the leases, and the peers that wgkex made for a lease.
#[derive(Debug, Clone, Copy)]
pub struct WantedLeases<'a> {
    /// The networks of the server. Addresses outside of them are ignored.
    pub networks: &'a [IpNet],
    /// Its leases.
    pub leases: &'a BTreeMap<PublicKey, LeasedAddresses>,
    /// The keys of peers that wgkex made.
    pub made: &'a BTreeSet<PublicKey>,
}

/// Computes the steps for an interface with these peers.
pub fn plan(device: &Device, wanted: WantedLeases<'_>) -> LeasePlan {
    let mut plan = LeasePlan::default();
    for key in wanted.made.iter().filter(|key| !wanted.leases.contains_key(key)) {
        if device.peers.contains_key(key) {
            let peer = lease::desired(*key, device.peers[key].allowed_ips.iter().map(IpNet::addr));
            plan.steps.push(Step { peer, action: Action::Remove(Objects::ALL) });
        }
    }
    for (key, addresses) in wanted.leases {
        let is_own = |address: &IpAddr| wanted.networks.iter().any(|network| network.contains(address));
        let desired = lease::desired(*key, addresses.iter().filter(is_own));
        // WireGuard ignores a peer with the key of the interface.
        if desired.networks().is_empty() || device.public_key == Some(*key) {
            continue;
        }
        let is_ours = wanted.made.contains(key);
        match device.peers.get(key).map(|peer| desired.ownership(peer)) {
            Some(Ownership::Ours) => {}
            None | Some(Ownership::Partial) => plan.steps.push(Step::install(desired)),
            Some(Ownership::Foreign) if is_ours => plan.steps.push(Step { peer: desired, action: Action::Replace }),
            Some(Ownership::Foreign) => drop(plan.foreign.insert(*key)),
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use wgkex_kernel::{Indexes, Peer, PeerConfig};

    use super::*;
    use crate::testing::key;

    fn device(peers: &[(u32, &[&str])]) -> Device {
        let peer = |networks: &[&str]| Peer {
            allowed_ips: networks.iter().map(|network| network.parse().unwrap()).collect(),
            ..Peer::default()
        };
        Device {
            indexes: Indexes { wireguard: 1, vxlan: None },
            public_key: None,
            listen_port: 1,
            link_address: None,
            peers: peers.iter().map(|(n, networks)| (key(*n), peer(networks))).collect(),
            routes: BTreeSet::new(),
            fdb: BTreeSet::new(),
        }
    }

    fn config(n: u32, address: &str) -> PeerConfig {
        lease::desired(key(n), address.split(',').map(|address| address.parse().unwrap())).peer
    }

    #[test]
    fn peers_are_made_for_leases_and_only_those_are_removed_again() {
        let leases = [
            (1, "10.0.0.2"),
            (2, "10.0.0.3"),
            (3, "10.0.0.4"),
            (4, "10.0.0.5"),
            (5, "10.0.0.6"),
            (6, "192.0.2.1"),
            (10, "10.0.0.10,10.1.0.10,192.0.2.1"),
            (11, "10.0.0.11"),
            (12, "10.0.0.12,10.1.0.12"),
        ];
        let leases = leases.map(|(n, addresses)| {
            let addresses: Vec<IpAddr> = addresses.split(',').map(|address| address.parse().unwrap()).collect();
            (key(n), LeasedAddresses::from(&*addresses))
        });
        let leases = leases.into();
        let made = [2, 3, 7, 10, 11, 12].map(key).into();
        let device = device(&[
            (2, &["10.0.0.3/32"]),
            (3, &["10.0.0.9/32"]),
            (4, &["10.9.0.0/16"]),
            (5, &[]),
            (7, &["10.0.0.7/32"]),
            (8, &["10.0.0.8/32"]),
            (10, &["10.0.0.10/32"]),
            (11, &["10.0.0.11/32", "10.1.0.11/32"]),
            (12, &["10.0.0.12/32", "10.1.0.12/32"]),
        ]);
        let networks = ["10.0.0.0/24", "10.1.0.0/24"].map(|network| network.parse().unwrap());
        let plan = plan(&device, WantedLeases { networks: &networks, leases: &leases, made: &made });
        let shown: Vec<_> = plan.steps.iter().map(|step| (step.peer.peer.clone(), step.action)).collect();
        let expected = [
            (config(7, "10.0.0.7"), Action::Remove(Objects::ALL)),
            (config(1, "10.0.0.2"), Action::Set(Objects::ALL)),
            (config(3, "10.0.0.4"), Action::Replace),
            (config(5, "10.0.0.6"), Action::Set(Objects::ALL)),
            (config(10, "10.0.0.10,10.1.0.10"), Action::Set(Objects::ALL)),
            (config(11, "10.0.0.11"), Action::Replace),
        ];
        let mut sorted = expected.to_vec();
        sorted[1..].sort_by_key(|(peer, _)| peer.key);
        assert_eq!(shown, sorted);
        assert_eq!(plan.foreign, [key(4)].into());
    }
}
