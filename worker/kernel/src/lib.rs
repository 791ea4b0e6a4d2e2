//! The Linux interfaces that wgkex uses; nothing here decides which peers there are.
//!
//! [`Kernel`] is the trait for the tables of existing interfaces: read them, apply changes. [`netlink`] is Linux,
//! [`memory`] a kernel in memory for tests. [`links`], [`wireguard`] and [`key_file`] create the interfaces themselves;
//! [`forwarding`] is used by the hub of tenants in addition.
//!
//! Tasks: none; [`netlink`] runs each call on a thread that may block. Owners: the worker's reconciler has one kernel,
//! for the domains, and its leases have another, for servers and the hub; `setup`, `dry-run` and the doctor have theirs
//! while they run. Previous stop of a key: the worker's plan; this is the last stop, and the result of each change goes
//! back to the owner.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
pub use nix::errno::Errno;
use smallvec::SmallVec;
use wgkex_common::PublicKey;
pub use wireguard_control::{Backend, Key};

pub mod forwarding;
pub mod key_file;
pub mod links;
#[cfg(any(test, feature = "memory"))]
pub mod memory;
pub mod netlink;
pub mod wireguard;

/// The networks of a peer. A single one, which nearly every peer has, takes no allocation.
pub type AllowedIps = SmallVec<[IpNet; 1]>;

/// An interface with peers, by its name, and the VXLAN interface on top of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interface {
    /// The name of the WireGuard interface.
    pub name: String,
    /// The name of the VXLAN interface on top of it, whose flood list is in the tables then.
    pub vxlan: Option<String>,
}

impl Interface {
    /// The interface whose flood list it is; its own name where there is none.
    fn flood_list(&self) -> &str {
        self.vxlan.as_ref().unwrap_or(&self.name)
    }
}

/// The interface indexes of an interface and of the VXLAN interface on top of it; they differ from earlier ones after
/// one was created again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Indexes {
    /// That of the WireGuard interface.
    pub wireguard: u32,
    /// That of the VXLAN interface, if there is to be one.
    pub vxlan: Option<u32>,
}

/// The tables of an interface at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Which interfaces these tables are of.
    pub indexes: Indexes,
    /// The interface's own key; `None` while it has none.
    pub public_key: Option<PublicKey>,
    /// The UDP port that WireGuard listens on; 0 while it has none.
    pub listen_port: u16,
    /// The first address on the interface.
    pub link_address: Option<IpAddr>,
    /// Every peer of the interface, also those that wgkex did not make.
    pub peers: BTreeMap<PublicKey, Peer>,
    /// Destinations of the routes of protocol static in the main table that leave by the interface: those of IPv6, and
    /// those of IPv4 if a peer has such an allowed-ip.
    pub routes: BTreeSet<IpNet>,
    /// Destinations in the flood list: entries of the all-zero MAC of the VXLAN interface that leave by this one.
    pub fdb: BTreeSet<Ipv6Addr>,
}

/// A peer of a WireGuard interface, as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its allowed-ips, in no particular order.
    pub allowed_ips: AllowedIps,
    /// The wall-clock time of its last handshake; `None` if it never had one.
    pub last_handshake: Option<SystemTime>,
    /// The persistent keepalive in seconds; `None` if it is off.
    pub keepalive: Option<NonZeroU16>,
    /// The preshared key.
    pub preshared: Option<PresharedKey>,
}

/// A WireGuard preshared key. It is not logged.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PresharedKey(Arc<[u8; 32]>);

impl PresharedKey {
    /// `None` for the key of zeros, which means that there is none.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Option<Self> {
        (bytes != [0; 32]).then(|| Self(Arc::new(bytes)))
    }

    /// The key.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// The desired state of a peer of a WireGuard interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerConfig {
    /// Its public key.
    pub key: PublicKey,
    /// Networks to be added to its allowed-ips; it keeps others.
    pub allowed_ips: AllowedIps,
    /// The persistent keepalive in seconds; `None` leaves it unchanged.
    pub keepalive: Option<NonZeroU16>,
    /// The preshared key; `None` leaves it unchanged.
    pub preshared: Option<PresharedKey>,
}

impl PeerConfig {
    /// A peer with these networks, without keepalive and preshared key.
    #[must_use]
    pub fn new(key: PublicKey, allowed_ips: impl IntoIterator<Item = IpNet>) -> Self {
        Self { key, allowed_ips: allowed_ips.into_iter().collect(), keepalive: None, preshared: None }
    }

    /// A peer with this single address.
    #[must_use]
    pub fn at(key: PublicKey, address: Ipv6Addr) -> Self {
        Self::new(key, [host(address)])
    }
}

/// The network of one address.
#[must_use]
pub fn host(address: Ipv6Addr) -> IpNet {
    IpNet::from(IpAddr::V6(address))
}

/// One change of an interface's tables. Each change is idempotent: "already there" and "already gone" are success.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// The peer exists and has these networks and settings; others that it has stay.
    SetPeer(PeerConfig),
    /// The peer exists with these settings, and its allowed-ips are exactly these. Its session stays.
    ReplacePeer(PeerConfig),
    /// A static route to this network leaves by the interface.
    SetRoute(IpNet),
    /// The flood list has this destination by the interface.
    AddFdb(Ipv6Addr),
    /// The peer is gone.
    RemovePeer(PublicKey),
    /// The static route is gone.
    RemoveRoute(IpNet),
    /// The flood list does not have this destination.
    RemoveFdb(Ipv6Addr),
}

/// The result of each change, in the order of the changes.
pub type Outcomes = Vec<(Change, Result<(), KernelError>)>;

/// Why a call of the kernel failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The interface is not there, or is there and is down, so its tables cannot be used.
    #[error("interface {interface} is {state}")]
    Interface {
        /// The one that cannot be used.
        interface: String,
        /// `missing`, `down`, or `not a WireGuard interface` and the like.
        state: &'static str,
    },
    /// A dump was interrupted by concurrent changes too often.
    #[error("dump of {interface} was interrupted {times} times")]
    Interrupted {
        /// The interface, or the table, that was read.
        interface: String,
        /// How often it was tried.
        times: usize,
    },
    /// The kernel, or the userspace WireGuard, answered with an error.
    #[error("{action}: {source}")]
    Refused {
        /// The failed action, without keys and addresses.
        action: &'static str,
        /// The kernel's error number.
        source: Errno,
    },
}

/// A kernel with WireGuard and VXLAN interfaces. It has one owner, which makes one call at a time.
pub trait Kernel: Send + 'static {
    /// Reads the tables of an interface, whole: an interrupted dump is repeated, never returned.
    fn read(&mut self, interface: &Interface) -> impl Future<Output = Result<Device, KernelError>> + Send;

    /// Applies `changes` and returns each one, in the same order, with its result. Their order is kept within each of
    /// the three tables, which do not depend on one another. A failed change does not stop the others. An error of
    /// [`KernelError::Interface`] means that no change of that interface is in effect: the interface was not usable, or
    /// it was deleted meanwhile with all that was in it.
    fn apply(&mut self, interface: &Interface, changes: Vec<Change>) -> impl Future<Output = Outcomes> + Send;

    /// Returns when the links, or the addresses on them, may have changed since the last call, so that tables read
    /// before may be outdated. Cancel-safe; a change between two calls is not lost.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

/// Each of `changes` with the same error.
fn failed(changes: impl IntoIterator<Item = Change>, error: &KernelError) -> Outcomes {
    changes.into_iter().map(|change| (change, Err(error.clone()))).collect()
}
