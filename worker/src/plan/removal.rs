//! Which routes and flood entries are removed with a peer, and which are left over without a peer.

use std::collections::BTreeSet;

use ipnet::IpNet;
use wgkex_common::PublicKey;
use wgkex_kernel::{Change, Device, host};

use super::{Action, Objects, SortedCursor, Step};
use crate::profiles::Profile;

/// Removes the peers `removed` with their routes and flood entries. A route and an entry stay while one of the peers
/// that stay has the same destination.
#[must_use]
pub fn remove(profile: &dyn Profile, device: &Device, removed: &BTreeSet<PublicKey>) -> Vec<Step> {
    if removed.is_empty() {
        return Vec::new();
    }
    let staying = || device.peers.iter().filter(|(key, _)| !removed.contains(key));
    let desired = staying().filter_map(|(key, _)| profile.desired(key));
    let mut in_use: BTreeSet<IpNet> = staying().flat_map(|(_, peer)| peer.allowed_ips.iter().copied()).collect();
    desired.for_each(|peer| in_use.extend(peer.destinations()));
    let step = |key: &PublicKey| {
        let mut peer = profile.desired(key)?;
        peer.peer.allowed_ips.retain(|network| !in_use.contains(network));
        peer.flood = peer.flood.filter(|address| !in_use.contains(&host(*address)));
        Some(Step { peer, action: Action::Remove(Objects::ALL) })
    };
    removed.iter().filter(|key| device.peers.contains_key(key)).filter_map(step).collect()
}

/// Removes the peers `removed` as [`remove`] does, and routes and flood entries of the keys `denied` that have no peer.
#[must_use]
pub fn remove_denied(
    profile: &dyn Profile,
    device: &Device,
    removed: &BTreeSet<PublicKey>,
    denied: &BTreeSet<PublicKey>,
) -> Vec<Step> {
    let mut steps = remove(profile, device, removed);
    let absent: Vec<_> = denied.iter().filter(|key| !device.peers.contains_key(key)).collect();
    if !absent.is_empty() {
        let orphans = orphans(profile, device, &claimed(profile, device));
        for mut peer in absent.into_iter().filter_map(|key| profile.desired(key)) {
            peer.peer.allowed_ips.retain(|network| orphans.contains(network));
            peer.flood = peer.flood.filter(|address| orphans.contains(&host(*address)));
            if peer.destinations().next().is_some() {
                let objects = Objects { peer: false, ..Objects::ALL };
                steps.push(Step { peer, action: Action::Remove(objects) });
            }
        }
    }
    steps
}

/// Destinations that have a route or a flood entry, and no peer: left over after a crash, or after another program
/// removed only the peer. Destinations that the profile never makes, or that are within some peer's allowed-ips, are
/// not orphans. `claimed` are the destinations of the desired peers, in order.
#[must_use]
pub fn orphans(profile: &dyn Profile, device: &Device, claimed: &[IpNet]) -> BTreeSet<IpNet> {
    let (mut by_route, mut by_flood) = (SortedCursor::new(claimed), SortedCursor::new(claimed));
    let routes = device.routes.iter().copied().filter(|network| !by_route.has(network));
    let floods = device.fdb.iter().map(|address| host(*address)).filter(|network| !by_flood.has(network));
    let mut orphans: BTreeSet<IpNet> = routes.chain(floods).filter(|network| profile.is_left_over(network)).collect();
    if !orphans.is_empty() {
        let allowed: BTreeSet<_> = device.peers.values().flat_map(|peer| peer.allowed_ips.iter()).collect();
        let is_single = |network: &IpNet| network.prefix_len() == network.max_prefix_len();
        let wide: Vec<_> = allowed.iter().filter(|network| !is_single(network)).collect();
        orphans.retain(|orphan| !allowed.contains(orphan) && !wide.iter().any(|network| network.contains(orphan)));
    }
    orphans
}

/// The destinations of the desired peers of `device`, in order.
pub(super) fn claimed(profile: &dyn Profile, device: &Device) -> Vec<IpNet> {
    let mut claimed = Vec::with_capacity(device.peers.len());
    for peer in device.peers.keys().filter_map(|key| profile.desired(key)) {
        claimed.extend(peer.destinations());
    }
    claimed.sort_unstable();
    claimed
}

/// Removes the routes and flood entries of `orphans`.
#[must_use]
pub fn remove_orphans(device: &Device, orphans: &BTreeSet<IpNet>) -> Vec<Change> {
    let routes = orphans.intersection(&device.routes).map(|network| Change::RemoveRoute(*network));
    let floods = device.fdb.iter().filter(|address| orphans.contains(&host(**address)));
    routes.chain(floods.map(|address| Change::RemoveFdb(*address))).collect()
}
