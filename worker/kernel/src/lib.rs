//! What wgkex needs from Linux, and nothing of what it decides.
//!
//! [`Kernel`] is the seam to the tables of interfaces that stand: read them, apply changes. [`netlink`] is Linux,
//! [`memory`] a kernel in memory for tests. [`links`], [`wireguard`] and [`key_file`] make the interfaces themselves.
//!
//! A key comes here from the worker's plan and goes no further; what became of it goes back to the reconciler.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::SystemTime;

pub use nix::errno::Errno;
use wgkex_common::{Domain, PublicKey};
pub use wireguard_control::{Backend, Key};

pub mod key_file;
pub mod links;
#[cfg(any(test, feature = "memory"))]
pub mod memory;
pub mod netlink;
pub mod wireguard;

/// The tables of a domain's interfaces at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The indexes of `wg-REST` and `vx-REST`; other ones than before mean that an interface was made anew.
    pub indexes: (u32, u32),
    /// The interface's own key; `None` while it has none.
    pub public_key: Option<PublicKey>,
    /// The UDP port `wg-REST` listens on; 0 while it has none.
    pub listen_port: u16,
    /// The first address on `wg-REST`.
    pub link_address: Option<IpAddr>,
    /// Every peer of `wg-REST`, also those that wgkex did not make.
    pub peers: BTreeMap<PublicKey, Peer>,
    /// Destinations of /128 routes of protocol static in the main table that leave by `wg-REST`.
    pub routes: BTreeSet<Ipv6Addr>,
    /// Destinations in the flood list of `vx-REST`: entries of the all-zero MAC that leave by `wg-REST`.
    pub fdb: BTreeSet<Ipv6Addr>,
}

/// A peer of a WireGuard interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its allowed-ips with their prefix lengths, in no order that means anything.
    pub allowed_ips: Vec<(IpAddr, u8)>,
    /// The wall-clock time of its last handshake; `None` if there was none.
    pub last_handshake: Option<SystemTime>,
}

/// One thing to be so in a domain's tables. Each may be asked for again without harm: "already there" and
/// "already gone" are success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// The peer exists and has this /128 among its allowed-ips; nothing else of it changes.
    SetPeer(PublicKey, Ipv6Addr),
    /// A static route to this /128 leaves by `wg-REST`.
    SetRoute(Ipv6Addr),
    /// The flood list of `vx-REST` has this destination by `wg-REST`.
    AddFdb(Ipv6Addr),
    /// The peer is gone.
    RemovePeer(PublicKey),
    /// The static route is gone.
    RemoveRoute(Ipv6Addr),
    /// The flood list does not have this destination.
    RemoveFdb(Ipv6Addr),
}

/// Why the kernel did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The interface is not there, or is there and is down, so its tables cannot be used.
    #[error("interface {interface} is {state}")]
    Interface {
        /// `wg-REST` or `vx-REST`.
        interface: String,
        /// `missing`, `down`, or `not a WireGuard interface` and the like.
        state: &'static str,
    },
    /// A dump was interrupted by other changes more often than it is worth repeating.
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
        /// What was asked, without keys and addresses.
        action: &'static str,
        /// The answer.
        source: Errno,
    },
}

impl KernelError {
    /// One word for metrics, from a fixed set: `interface`, `interrupted` or `kernel`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Interface { .. } => "interface",
            Self::Interrupted { .. } => "interrupted",
            Self::Refused { .. } => "kernel",
        }
    }
}

/// A kernel with WireGuard and VXLAN interfaces. One owner asks; nobody else writes through it meanwhile.
pub trait Kernel: Send + 'static {
    /// Reads the tables of a domain, whole: an interrupted dump is repeated, never returned.
    fn read(&mut self, domain: &Domain) -> impl Future<Output = Result<Device, KernelError>> + Send;

    /// Applies `changes` and says of each, in the same order, what became of it. Their order holds within each of
    /// the three tables, which do not depend on one another. One that fails does not hold up the others. An error
    /// of [`KernelError::Interface`] means that nothing asked of that interface is there: it was not usable, or it
    /// went away meanwhile with all that was in it.
    fn apply(
        &mut self,
        domain: &Domain,
        changes: &[Change],
    ) -> impl Future<Output = Vec<Result<(), KernelError>>> + Send;

    /// Returns when the links, or the addresses on them, may have changed since the last call, so that what was
    /// read before may be wrong. Cancel-safe; a change between two calls is not lost.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}
