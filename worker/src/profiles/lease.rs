//! Clients of a server of the registry, and members of tenants at their hub: a key has the address that it leases, or one in each
//! tenant; no route of its own, since the network has one, and no entry in a flood list. Nothing but the end of its lease
//! removes its peer.

use std::net::IpAddr;

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_kernel::PeerConfig;

use super::{DesiredPeer, Sweep};

/// The desired peer of a key that leases these addresses.
#[must_use]
pub fn desired(key: PublicKey, addresses: impl IntoIterator<Item = IpAddr>) -> DesiredPeer {
    let peer = PeerConfig::new(key, addresses.into_iter().map(IpNet::from));
    DesiredPeer { peer, routes: false, flood: None, sweep: Sweep::Never }
}
