//! The peers of an interface, by the kernel's WireGuard (generic netlink) or a userspace one (its socket, by
//! wireguard-control).

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has more attributes than matter, and new ones come")]

mod dump;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;

use ipnet::IpNet;
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use wgkex_common::PublicKey;
use wireguard_control::{Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder};

pub(super) use self::dump::DeviceDump;
#[cfg(any(test, fuzzing))]
pub(super) use self::dump::DumpMessage;
use super::channel::{Channel, DumpError, errno};
use crate::{Errno, PeerConfig};

/// Errors of the interface, or of the caller: every peer of a batch would get the same one.
const ERRORS_OF_WHOLE_BATCH: [Errno; 6] =
    [Errno::EPERM, Errno::ENOENT, Errno::EIO, Errno::ENODEV, Errno::EOPNOTSUPP, Errno::ECONNREFUSED];

/// Peers and their networks set by one message: about 24 KiB, under the 64 KiB that one netlink attribute can hold.
const OBJECTS_PER_MESSAGE_MAX: usize = 512;

/// Networks of one peer that fit a message.
const NETWORKS_MAX: usize = 1_000;

/// The WireGuard implementation of an interface.
pub(super) enum WireGuard {
    /// The kernel, for the interface of this index; the number is that of its generic netlink family.
    Kernel { channel: Channel, family: u16, index: u32 },
    /// A process that listens on the socket of this interface.
    Userspace(InterfaceName),
}

/// A peer to be set, or to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerChange<'a> {
    Set(&'a PeerConfig),
    Replace(&'a PeerConfig),
    Remove(PublicKey),
}

impl WireGuard {
    pub(super) fn kernel(index: u32) -> Result<Self, Errno> {
        let mut channel = Channel::open(NETLINK_GENERIC)?;
        let question =
            GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![GenlCtrlAttrs::FamilyName("wireguard".into())] };
        let family = channel.get(GenlMessage::from_payload(question))?.payload.nlas.iter().find_map(|nla| match nla {
            GenlCtrlAttrs::FamilyId(family) => Some(*family),
            _ => None,
        });
        Ok(Self::Kernel { channel, family: family.ok_or(Errno::EIO)?, index })
    }

    /// The error describes the interface if no process with a control socket for this user serves it.
    pub(super) fn userspace(name: &str) -> Result<Self, &'static str> {
        const OTHER: &str = "not a WireGuard interface";
        // wireguard-control would start a userspace process if there is none.
        match UnixStream::connect(format!("/var/run/wireguard/{name}.sock")) {
            Ok(_) => name.parse().map(Self::Userspace).map_err(|_| OTHER),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Err("served by a userspace WireGuard whose control socket this user may not open")
            }
            Err(_) => Err(OTHER),
        }
    }

    pub(super) fn read(&mut self) -> Result<DeviceDump, DumpError> {
        match self {
            Self::Kernel { channel, family, index } => {
                let question = message(*family, WireguardCmd::GetDevice, vec![WireguardAttribute::IfIndex(*index)]);
                channel.dump(&question, DeviceDump::add_answer)
            }
            Self::Userspace(name) => Device::get(name, Backend::Userspace)
                .map(DeviceDump::of_userspace)
                .map_err(|error| DumpError::Refused(errno(error))),
        }
    }

    /// Applies the changes in their order, in few messages; a refused change does not stop the others.
    pub(super) fn write(&mut self, changes: &[PeerChange<'_>]) -> Vec<Result<(), Errno>> {
        let mut results = Vec::with_capacity(changes.len());
        for batch in batches(changes) {
            results.extend(bisect(batch, &mut |part| self.write_whole(part)));
        }
        results
    }

    fn write_whole(&mut self, changes: &[PeerChange<'_>]) -> Result<(), Errno> {
        if changes.iter().any(|change| change.objects() > NETWORKS_MAX) {
            return Err(Errno::EMSGSIZE);
        }
        match self {
            Self::Kernel { channel, family, index } => {
                let peers = WireguardAttribute::Peers(changes.iter().map(kernel_peer).collect());
                let attributes = vec![WireguardAttribute::IfIndex(*index), peers];
                let request = message(*family, WireguardCmd::SetDevice, attributes);
                channel.request_batch([(request, 0)]).pop().unwrap_or(Ok(()))
            }
            Self::Userspace(name) => {
                let update = changes.iter().fold(DeviceUpdate::new(), add_to_update);
                update.apply(name, Backend::Userspace).map_err(userspace_errno)
            }
        }
    }
}

impl PeerChange<'_> {
    /// The peer and its networks.
    fn objects(&self) -> usize {
        match self {
            Self::Set(peer) | Self::Replace(peer) => 1 + peer.allowed_ips.len(),
            Self::Remove(_) => 1,
        }
    }
}

/// Splits the changes into batches that each fit one message; a change that fits none is a batch by itself.
fn batches<'a, 'b>(mut changes: &'a [PeerChange<'b>]) -> impl Iterator<Item = &'a [PeerChange<'b>]> {
    std::iter::from_fn(move || {
        let mut objects = 0;
        let fitting = changes.iter().take_while(|change| {
            objects += change.objects();
            objects <= OBJECTS_PER_MESSAGE_MAX
        });
        let count = fitting.count().max(1).min(changes.len());
        let batch;
        (batch, changes) = changes.split_at(count);
        (!batch.is_empty()).then_some(batch)
    })
}

/// Applies all of `items` at once; if that is refused, one half and then the other, down to the items that are refused
/// individually. Successful items of a refused batch are applied again: `apply` must be idempotent.
fn bisect<T>(items: &[T], apply: &mut impl FnMut(&[T]) -> Result<(), Errno>) -> Vec<Result<(), Errno>> {
    match apply(items) {
        Err(error) if items.len() > 1 && !ERRORS_OF_WHOLE_BATCH.contains(&error) => {
            let (first, second) = items.split_at(items.len() / 2);
            let mut results = bisect(first, apply);
            results.extend(bisect(second, apply));
            results
        }
        result => vec![result; items.len()],
    }
}

fn message(family: u16, cmd: WireguardCmd, attributes: Vec<WireguardAttribute>) -> GenlMessage<WireguardMessage> {
    let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
    message.set_resolved_family_id(family);
    message
}

fn removed_peer(key: &PublicKey) -> WireguardPeer {
    WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(*key.as_bytes()),
        WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
    ])
}

/// Other settings of the peer stay, except for the allowed-ips of a peer that is replaced.
fn kernel_peer(change: &PeerChange<'_>) -> WireguardPeer {
    let PeerConfig { key, allowed_ips, keepalive, preshared } = match *change {
        PeerChange::Set(peer) | PeerChange::Replace(peer) => peer,
        PeerChange::Remove(key) => return removed_peer(&key),
    };
    let mut attributes = vec![WireguardPeerAttribute::PublicKey(*key.as_bytes())];
    if let PeerChange::Replace(_) = change {
        attributes.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
    }
    attributes.extend(preshared.as_ref().map(|key| WireguardPeerAttribute::PresharedKey(*key.as_bytes())));
    attributes.extend(keepalive.map(|seconds| WireguardPeerAttribute::PersistentKeepalive(seconds.get())));
    attributes.push(WireguardPeerAttribute::AllowedIps(allowed_ips.iter().map(allowed_ip).collect()));
    WireguardPeer(attributes)
}

fn allowed_ip(network: &IpNet) -> WireguardAllowedIp {
    let family = match network {
        IpNet::V4(_) => WireguardAddressFamily::Ipv4,
        IpNet::V6(_) => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(network.addr()),
        WireguardAllowedIpAttr::Cidr(network.prefix_len()),
    ])
}

fn add_to_update(update: DeviceUpdate, change: &PeerChange<'_>) -> DeviceUpdate {
    let PeerConfig { key, allowed_ips, keepalive, preshared } = match *change {
        PeerChange::Set(peer) | PeerChange::Replace(peer) => peer,
        PeerChange::Remove(key) => return update.remove_peer_by_key(&Key(*key.as_bytes())),
    };
    let mut peer = PeerConfigBuilder::new(&Key(*key.as_bytes()));
    if let PeerChange::Replace(_) = change {
        peer = peer.replace_allowed_ips();
    }
    for network in allowed_ips {
        peer = peer.add_allowed_ip(network.addr(), network.prefix_len());
    }
    if let Some(seconds) = keepalive {
        peer = peer.set_persistent_keepalive_interval(seconds.get());
    }
    if let Some(key) = preshared {
        peer = peer.set_preshared_key(Key(*key.as_bytes()));
    }
    update.add_peer(peer)
}

/// wireguard-control does not return the errno of the process, only that there was an error.
fn userspace_errno(error: io::Error) -> Errno {
    if error.kind() == io::ErrorKind::InvalidInput { Errno::EINVAL } else { errno(error) }
}
