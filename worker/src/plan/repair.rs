//! Missing objects of peers that are in the kernel.

use std::cell::LazyCell;
use std::collections::BTreeMap;

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_kernel::Device;

use super::{Action, Objects, Step};
use crate::profiles::{DesiredPeer, Ownership};

/// Sets the missing objects of `ours`, as far as they have a peer in `device`.
///
/// A peer to which another program gave other allowed-ips is left alone, and so is one that lacks a network which
/// another peer has: setting it would take it from that peer.
#[must_use]
pub fn repair(device: &Device, ours: impl IntoIterator<Item = DesiredPeer>) -> Vec<Step> {
    let holders = LazyCell::new(|| holders(device));
    let missing = |peer: DesiredPeer| {
        let actual = device.peers.get(&peer.key())?;
        let is_free = |network: &IpNet| holders.get(network).is_none_or(|holder| *holder == peer.key());
        let sets_peer = match peer.ownership(actual) {
            Ownership::Ours => peer.lacks_settings(actual),
            Ownership::Partial if peer.networks().iter().all(is_free) => true,
            Ownership::Partial | Ownership::Foreign => return None,
        };
        let lacks_route = peer.networks().iter().any(|network| !device.routes.contains(network));
        let lacks_flood = peer.flood.is_some_and(|address| !device.fdb.contains(&address));
        let objects = Objects { peer: sets_peer, routes: peer.routes && lacks_route, flood: lacks_flood };
        (objects != Objects::NONE).then_some(Step { peer, action: Action::Set(objects) })
    };
    ours.into_iter().filter_map(missing).collect()
}

/// The peer that has each allowed-ip.
fn holders(device: &Device) -> BTreeMap<IpNet, PublicKey> {
    let peers = device.peers.iter();
    peers.flat_map(|(key, peer)| peer.allowed_ips.iter().map(|network| (*network, *key))).collect()
}
