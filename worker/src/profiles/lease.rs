//! Clients of a server of the registry: a key has the address that it leases, no route of its own, since the server's network has
//! one, and no entry in a flood list. Nothing but the end of its lease removes its peer.

use std::net::IpAddr;

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_kernel::PeerConfig;

use super::{DesiredPeer, Sweep};

/// What a key is to be that leases this address.
#[must_use]
pub fn desired(key: PublicKey, address: IpAddr) -> DesiredPeer {
    let peer = PeerConfig::new(key, [IpNet::from(address)]);
    DesiredPeer { peer, routes: false, flood: None, sweep: Sweep::Never }
}
