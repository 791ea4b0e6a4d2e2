//! The owners of networks, of all keys that have a peer or are pending.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use wgkex_common::PublicKey;

/// A network that a key claims or has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claimant {
    pub network: IpNet,
    pub key: PublicKey,
    /// It is ours or pending: it claims the network.
    pub claims: bool,
    /// It has a peer, or had one that vanished.
    pub has_peer: bool,
}

impl Claimant {
    /// The order of the networks, in numbers: comparing these is faster.
    pub(super) fn rank(&self) -> (bool, u128, u8) {
        match self.network {
            IpNet::V4(network) => (false, network.addr().to_bits().into(), network.prefix_len()),
            IpNet::V6(network) => (true, network.addr().to_bits(), network.prefix_len()),
        }
    }
}

/// The owners of networks, and the peers that lost theirs.
#[derive(Debug, Default)]
pub(super) struct AddressOwners {
    owners: BTreeMap<IpNet, PublicKey>,
    /// Networks of peers that other programs made, with the keys of these peers.
    foreign: BTreeMap<IpNet, PublicKey>,
    /// Peers of ours whose network another key has: the next read evicts them.
    to_evict: BTreeSet<PublicKey>,
}

impl AddressOwners {
    /// Starts again with the first of each network's claimants, which are in the order of the networks; returns the
    /// others, whose claims have to be compared.
    pub(super) fn rebuild(&mut self, claimants: &[Claimant]) -> Vec<PublicKey> {
        self.to_evict.clear();
        let claims = || claimants.iter().filter(|claimant| claimant.claims);
        let mut rivals = Vec::new();
        let mut last = None;
        for claimant in claims() {
            if last.replace(claimant.network) == Some(claimant.network) {
                rivals.push(claimant.key);
            }
        }
        // A map that is collected at once has full nodes, and takes less memory.
        let mut last = None;
        let first = claims().filter(|claimant| last.replace(claimant.network) != Some(claimant.network));
        self.owners = first.map(|claimant| (claimant.network, claimant.key)).collect();
        rivals
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&IpNet, &PublicKey)> {
        self.owners.iter()
    }

    /// The keys that have one of `networks`, other than `key`.
    pub(super) fn rivals(&self, key: PublicKey, networks: &[IpNet]) -> Vec<PublicKey> {
        let owners = networks.iter().filter_map(|network| self.owners.get(network));
        owners.filter(|owner| **owner != key).copied().collect()
    }

    /// Whether `key` has all of `networks`.
    pub(super) fn owns(&self, key: &PublicKey, networks: &[IpNet]) -> bool {
        networks.iter().all(|network| self.owners.get(network) == Some(key))
    }

    /// `key` has `networks` from now on.
    pub(super) fn assign(&mut self, key: PublicKey, networks: &[IpNet]) {
        self.owners.extend(networks.iter().map(|network| (*network, key)));
        self.to_evict.remove(&key);
    }

    /// `key` has none of `networks` any more.
    pub(super) fn release(&mut self, key: &PublicKey, networks: &[IpNet]) {
        for network in networks {
            if self.owners.get(network) == Some(key) {
                self.owners.remove(network);
            }
        }
    }

    /// Forgets which networks foreign peers have.
    pub(super) fn clear_foreign(&mut self) {
        self.foreign.clear();
    }

    pub(super) fn add_foreign(&mut self, key: PublicKey, networks: impl IntoIterator<Item = IpNet>) {
        self.foreign.extend(networks.into_iter().map(|network| (network, key)));
    }

    /// Whether a peer that another program made, other than that of `key`, has one of `networks`.
    pub(super) fn is_taken_by_foreign(&self, key: &PublicKey, networks: &[IpNet]) -> bool {
        !self.foreign.is_empty()
            && networks.iter().any(|network| self.foreign.get(network).is_some_and(|holder| holder != key))
    }

    /// The peer of `key` has to be evicted.
    pub(super) fn evict(&mut self, key: PublicKey) {
        self.to_evict.insert(key);
    }

    /// The peer of `key` is gone.
    pub(super) fn evicted(&mut self, key: &PublicKey) {
        self.to_evict.remove(key);
    }

    /// Peers of ours that lost their networks.
    pub(super) fn to_evict(&self) -> &BTreeSet<PublicKey> {
        &self.to_evict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_ranks_is_that_of_networks() {
        let networks = ["0.0.0.0/0", "10.0.0.1/31", "10.0.0.1/32", "255.0.0.0/8", "::/0", "fe80::1/127", "fe80::1/128"];
        let claimant = |network: &str| Claimant {
            network: network.parse().unwrap(),
            key: PublicKey::from_bytes([1; 32]).unwrap(),
            claims: true,
            has_peer: true,
        };
        let claimants = networks.map(claimant);
        assert!(claimants.is_sorted_by_key(|claimant| claimant.network));
        assert!(claimants.is_sorted_by(|one, other| one.rank() < other.rank()));
    }
}
