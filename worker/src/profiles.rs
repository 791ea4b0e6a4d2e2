//! The desired peer of a key, by the kind of device that it belongs to.
//!
//! A [`Profile`] makes a [`DesiredPeer`] of each key. Nothing below this room knows a kind: [`crate::plan`] compares
//! desired peers with the tables, [`crate::peers`] remembers which keys have them. [`mesh`] is the profile of routers of
//! a mesh, [`lease`] that of clients of a server.
//!
//! No task, no state. Previous stop of a key: [`crate::peers`], which admits it; next stop: [`crate::plan`].

pub mod lease;
pub mod mesh;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::net::Ipv6Addr;

use ipnet::IpNet;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::{Interface, Peer, PeerConfig, host};

/// Whether the sweep may remove a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    /// Yes, once the peer is stale.
    WhenStale,
    /// No.
    Never,
}

/// The desired objects of one key in a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPeer {
    /// The peer: its key, allowed-ips, keepalive and preshared key.
    pub peer: PeerConfig,
    /// Whether each of its allowed-ips has a route.
    pub routes: bool,
    /// Its destination in the flood list, if it has one.
    pub flood: Option<Ipv6Addr>,
    /// Whether the sweep removes it.
    pub sweep: Sweep,
}

/// The owner of a peer, by its allowed-ips alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// It has exactly what its profile gives it: wgkex made it.
    Ours,
    /// It lacks some of these, or has none: one of ours whose address a later key took, or one that another program is
    /// still making.
    Partial,
    /// It has other ones: another program made or altered it.
    Foreign,
}

/// Makes desired peers of keys.
pub trait Profile: Debug + Send + Sync + 'static {
    /// The WireGuard interface of `domain`, with the VXLAN interface on top of it.
    fn interface(&self, domain: &Domain) -> Interface;

    /// The desired peer of `key`; `None` for a key without a peer.
    fn desired(&self, key: &PublicKey) -> Option<DesiredPeer>;

    /// Whether a route or a flood entry to `destination` without a peer was left over by this profile. Destinations
    /// that it never makes belong to other programs.
    fn is_left_over(&self, destination: &IpNet) -> bool;
}

impl DesiredPeer {
    /// The key.
    #[must_use]
    pub fn key(&self) -> PublicKey {
        self.peer.key
    }

    /// The networks that it claims.
    #[must_use]
    pub fn networks(&self) -> &[IpNet] {
        &self.peer.allowed_ips
    }

    /// The owner of its actual peer.
    #[must_use]
    pub fn ownership(&self, actual: &Peer) -> Ownership {
        let desired = self.networks();
        match actual.allowed_ips[..] {
            [] => Ownership::Partial,
            // Nearly every peer has a single network.
            [one] if desired == [one] => Ownership::Ours,
            [..] if actual.allowed_ips.iter().any(|network| !desired.contains(network)) => Ownership::Foreign,
            [..] if desired.iter().all(|network| actual.allowed_ips.contains(network)) => Ownership::Ours,
            [..] => Ownership::Partial,
        }
    }

    /// Whether its actual peer lacks its keepalive or its preshared key.
    #[must_use]
    pub fn lacks_settings(&self, actual: &Peer) -> bool {
        let PeerConfig { keepalive, preshared, .. } = &self.peer;
        (keepalive.is_some() && *keepalive != actual.keepalive)
            || (preshared.is_some() && *preshared != actual.preshared)
    }

    /// All its destinations in the kernel, those of routes and that of the flood entry.
    pub fn destinations(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.networks().iter().copied().chain(self.flood.map(host))
    }
}
