//! Routers of a mesh: a key is one address that derives from it, a route there and an entry in the flood list of the
//! VXLAN interface. Their peers are swept when they are stale (contract section 3).

use ipnet::IpNet;
use wgkex_common::{Derived, Domain, PublicKey};
use wgkex_kernel::{Interface, PeerConfig};

use super::{DesiredPeer, Profile, Sweep};

/// The profile of routers of a mesh.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mesh;

/// `wg-REST` of a domain, which carries `vx-REST`.
#[must_use]
pub fn interface(domain: &Domain) -> Interface {
    Interface { name: domain.wireguard(), vxlan: Some(domain.vxlan()) }
}

/// The desired peer of a router's key.
#[must_use]
pub fn desired(key: PublicKey) -> DesiredPeer {
    let address = key.link_local();
    DesiredPeer { peer: PeerConfig::at(key, address), routes: true, flood: Some(address), sweep: Sweep::WhenStale }
}

impl Profile for Mesh {
    fn interface(&self, domain: &Domain) -> Interface {
        interface(domain)
    }

    fn desired(&self, key: &PublicKey) -> Option<DesiredPeer> {
        Some(desired(*key))
    }

    /// An address that cannot be derived from a key belongs to another program.
    fn is_left_over(&self, destination: &IpNet) -> bool {
        match destination {
            IpNet::V6(network) => network.prefix_len() == 128 && Derived::of(network.addr()).is_some(),
            IpNet::V4(_) => false,
        }
    }
}
