//! Helpers that the tests of several modules share.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use ipnet::IpNet;
use wgkex_common::runtime::metrics::MetricsRegistry;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::{Interface, PeerConfig, PresharedKey};

use crate::peers::dedup_keep_last;
use crate::plan::Step;
use crate::profiles::mesh::Mesh;
use crate::profiles::{DesiredPeer, Profile, Sweep};

/// A domain with the interfaces `wg-welt` and `vx-welt`.
pub fn domain() -> Domain {
    Domain::new("ffmuc_welt", &["ffmuc_".into()]).unwrap()
}

/// The `n`th of many keys.
pub fn key(n: u32) -> PublicKey {
    let mut bytes = [0x42; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}

/// The contract's two keys with one address (section 3).
pub fn collision() -> (PublicKey, PublicKey) {
    let parse = |text: &str| text.parse().unwrap();
    (parse("fAKaBGbh8TB6KaToe27fkEi9ghZwYGi6sOvHDXG2PLI="), parse("3c+xZQV94mSS+WVbTdDrC58V7h9hA3uIECwx0uu1kpg="))
}

/// Installs `keys`, which arrived in this order, as those of routers of a mesh.
pub fn install(keys: impl IntoIterator<Item = PublicKey>) -> Vec<Step> {
    install_as(&Mesh, keys)
}

/// Installs those of `keys` that have a desired peer.
pub fn install_as(profile: &dyn Profile, keys: impl IntoIterator<Item = PublicKey>) -> Vec<Step> {
    dedup_keep_last(keys).iter().filter_map(|key| profile.desired(key)).map(Step::install).collect()
}

/// A second profile: peers with leased addresses, a keepalive and a preshared key, no flood entry, never swept. A key without a lease has none.
#[derive(Debug, Default)]
pub struct Leases(pub BTreeMap<PublicKey, Vec<IpNet>>);

impl Leases {
    /// Leases of the networks of each of these keys.
    pub fn of(keys: impl IntoIterator<Item = u8>) -> Self {
        Self(keys.into_iter().map(|n| (key(n.into()), leased_networks(n).into())).collect())
    }
}

/// Networks of the `n`th key.
pub fn leased_networks(n: u8) -> [IpNet; 3] {
    [format!("10.9.{n}.0/24"), format!("fd00:{n}::/64"), format!("fd01::{n}/128")]
        .map(|network| network.parse().unwrap())
}

impl Profile for Leases {
    fn interface(&self, domain: &Domain) -> Interface {
        Interface { name: domain.wireguard(), vxlan: None }
    }

    fn desired(&self, key: &PublicKey) -> Option<DesiredPeer> {
        let networks = self.0.get(key)?;
        let (keepalive, preshared) = (NonZeroU16::new(25), PresharedKey::new([5; 32]));
        let peer = PeerConfig { keepalive, preshared, ..PeerConfig::new(*key, networks.iter().copied()) };
        Some(DesiredPeer { peer, routes: true, flood: None, sweep: Sweep::Never })
    }

    fn is_left_over(&self, _: &IpNet) -> bool {
        false
    }
}

/// Fails unless each of these lines is in the text.
pub fn assert_has(registry: &MetricsRegistry, lines: &[&str]) {
    let text = String::from_utf8(registry.text().unwrap()).unwrap();
    for line in lines {
        assert!(text.lines().any(|found| found == *line), "{line} is missing in\n{text}");
    }
}

/// The result of a future that is ready at once.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}
