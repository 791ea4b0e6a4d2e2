//! The peers of an interface, by the kernel's WireGuard (generic netlink) or a userspace one (its socket, by
//! wireguard-control).

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has more attributes than matter, and new ones come")]

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags, WireguardTimeSpec,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use wgkex_common::PublicKey;
use wireguard_control::{Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder};

use super::channel::{Channel, DumpError, EIO, ENODEV, ENOENT, errno};
use crate::kernel::{Errno, Peer};

const EPERM: Errno = Errno(1);
const EINVAL: Errno = Errno(22);
const EOPNOTSUPP: Errno = Errno(95);
const ECONNREFUSED: Errno = Errno(111);

/// Answers that have nothing to do with which peer was asked for.
const EVERY_ITEMS: [Errno; 6] = [EPERM, ENOENT, EIO, ENODEV, EOPNOTSUPP, ECONNREFUSED];

/// Peers set by one message: about 24 KiB, under the 64 KiB that one netlink attribute can hold.
const PEERS_AT_ONCE: usize = 256;

/// What answers for an interface's peers.
pub(super) enum WireGuard {
    /// The kernel, for the interface of this index; the number is that of its generic netlink family.
    Kernel { channel: Channel, family: u16, index: u32 },
    /// A process that listens on the socket of this interface.
    Userspace(InterfaceName),
}

/// A peer to be set, or to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerChange {
    Set(PublicKey, Ipv6Addr),
    Remove(PublicKey),
}

/// What WireGuard says of an interface.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) public_key: Option<PublicKey>,
    pub(super) listen_port: u16,
    pub(super) peers: BTreeMap<PublicKey, Peer>,
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
        Ok(Self::Kernel { channel, family: family.ok_or(EIO)?, index })
    }

    /// An error that says what the interface is instead, if no process that may be asked serves it.
    pub(super) fn userspace(name: &str) -> Result<Self, &'static str> {
        const OTHER: &str = "not a WireGuard interface";
        // wireguard-control starts a process of its own where it finds none.
        match UnixStream::connect(format!("/var/run/wireguard/{name}.sock")) {
            Ok(_) => name.parse().map(Self::Userspace).map_err(|_| OTHER),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Err("served by a userspace WireGuard whose control socket this user may not open")
            }
            Err(_) => Err(OTHER),
        }
    }

    pub(super) fn read(&mut self) -> Result<Table, DumpError> {
        match self {
            Self::Kernel { channel, family, index } => {
                let question = message(*family, WireguardCmd::GetDevice, vec![WireguardAttribute::IfIndex(*index)]);
                channel.dump(&question, Table::add_answer)
            }
            Self::Userspace(name) => Device::get(name, Backend::Userspace)
                .map(Table::of_userspace)
                .map_err(|error| DumpError::Refused(errno(error))),
        }
    }

    /// Makes the changes in their order, in few messages; one that is refused holds up no other.
    pub(super) fn write(&mut self, changes: &[PeerChange]) -> Vec<Result<(), Errno>> {
        changes.chunks(PEERS_AT_ONCE).flat_map(|chunk| isolate(chunk, &mut |part| self.write_whole(part))).collect()
    }

    fn write_whole(&mut self, changes: &[PeerChange]) -> Result<(), Errno> {
        match self {
            Self::Kernel { channel, family, index } => {
                let peers = WireguardAttribute::Peers(changes.iter().map(kernel_peer).collect());
                let attributes = vec![WireguardAttribute::IfIndex(*index), peers];
                let order = message(*family, WireguardCmd::SetDevice, attributes);
                channel.order([(order, 0)]).pop().unwrap_or(Ok(()))
            }
            Self::Userspace(name) => {
                let update = changes.iter().fold(DeviceUpdate::new(), add_to_update);
                update.apply(name, Backend::Userspace).map_err(userspace_errno)
            }
        }
    }
}

/// Applies all of `items` at once; if that is refused, one half and then the other, down to the items that are
/// refused alone. What went well in a batch that failed is done again: `apply` must not mind.
fn isolate<T>(items: &[T], apply: &mut impl FnMut(&[T]) -> Result<(), Errno>) -> Vec<Result<(), Errno>> {
    match apply(items) {
        Err(error) if items.len() > 1 && !EVERY_ITEMS.contains(&error) => {
            let (first, second) = items.split_at(items.len() / 2);
            let mut results = isolate(first, apply);
            results.extend(isolate(second, apply));
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

/// Without the flags that replace: what else the peer has stays.
fn kernel_peer(change: &PeerChange) -> WireguardPeer {
    match *change {
        PeerChange::Set(key, address) => {
            let allowed_ip = WireguardAllowedIp(vec![
                WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv6),
                WireguardAllowedIpAttr::IpAddr(address.into()),
                WireguardAllowedIpAttr::Cidr(128),
            ]);
            WireguardPeer(vec![
                WireguardPeerAttribute::PublicKey(*key.as_bytes()),
                WireguardPeerAttribute::AllowedIps(vec![allowed_ip]),
            ])
        }
        PeerChange::Remove(key) => WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(*key.as_bytes()),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ]),
    }
}

fn add_to_update(update: DeviceUpdate, change: &PeerChange) -> DeviceUpdate {
    match *change {
        PeerChange::Set(key, address) => {
            update.add_peer(PeerConfigBuilder::new(&Key(*key.as_bytes())).add_allowed_ip(address.into(), 128))
        }
        PeerChange::Remove(key) => update.remove_peer_by_key(&Key(*key.as_bytes())),
    }
}

/// wireguard-control does not say which error the process answered, only that it did.
fn userspace_errno(error: io::Error) -> Errno {
    if error.kind() == io::ErrorKind::InvalidInput { EINVAL } else { errno(error) }
}

impl Table {
    /// Both dumps split a peer that does not fit one message; only its first part has the handshake.
    fn add(
        &mut self,
        key: [u8; 32],
        allowed_ips: impl IntoIterator<Item = (IpAddr, u8)>,
        handshake: Option<SystemTime>,
    ) {
        // A peer whose key is no key cannot shake hands, and nobody asks for it by name.
        let Ok(key) = PublicKey::from_bytes(key) else { return };
        let peer = self.peers.entry(key).or_insert_with(|| Peer { allowed_ips: Vec::new(), last_handshake: None });
        peer.allowed_ips.extend(allowed_ips);
        peer.last_handshake = peer.last_handshake.or(handshake);
    }

    fn of_userspace(device: Device) -> Self {
        let mut table = Self {
            public_key: device.public_key.and_then(|key| PublicKey::from_bytes(key.0).ok()),
            listen_port: device.listen_port.unwrap_or(0),
            peers: BTreeMap::new(),
        };
        for peer in device.peers {
            let allowed_ips = peer.config.allowed_ips.iter().map(|ip| (ip.address, ip.cidr));
            table.add(peer.config.public_key.0, allowed_ips, peer.stats.last_handshake_time);
        }
        table
    }

    /// The kernel answers in parts, of which only the first tells of the interface itself.
    fn add_answer(&mut self, answer: GenlMessage<WireguardMessage>) {
        for attribute in answer.payload.attributes {
            match attribute {
                WireguardAttribute::PublicKey(key) => self.public_key = PublicKey::from_bytes(key).ok(),
                WireguardAttribute::ListenPort(port) => self.listen_port = port,
                WireguardAttribute::Peers(peers) => peers.iter().for_each(|peer| self.add_of_kernel(peer)),
                _ => {}
            }
        }
    }

    fn add_of_kernel(&mut self, peer: &WireguardPeer) {
        let (mut key, mut allowed_ips, mut handshake) = ([0; 32], &[][..], None);
        for attribute in &peer.0 {
            match attribute {
                WireguardPeerAttribute::PublicKey(bytes) => key = *bytes,
                WireguardPeerAttribute::AllowedIps(ips) => allowed_ips = ips,
                WireguardPeerAttribute::LastHandshake(time) => handshake = wall_clock(*time),
                _ => {}
            }
        }
        self.add(key, allowed_ips.iter().filter_map(prefix), handshake);
    }
}

fn prefix(allowed_ip: &WireguardAllowedIp) -> Option<(IpAddr, u8)> {
    let (mut address, mut length) = (None, None);
    for attribute in &allowed_ip.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(cidr) => length = Some(*cidr),
            _ => {}
        }
    }
    address.zip(length)
}

/// The time of no handshake is zero.
fn wall_clock(time: WireguardTimeSpec) -> Option<SystemTime> {
    let (seconds, nanos) = (u64::try_from(time.seconds).ok()?, u32::try_from(time.nano_seconds).ok()?);
    let since_epoch = Duration::new(seconds, nanos);
    (!since_epoch.is_zero()).then(|| SystemTime::UNIX_EPOCH.checked_add(since_epoch)).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bad_item_is_found_among_any_number_and_holds_up_no_other(
            bad in prop::collection::vec(prop::bool::weighted(0.1), 0..600),
        ) {
            let items: Vec<usize> = (0..bad.len()).collect();
            let mut applied = Vec::new();
            let results = isolate(&items, &mut |part: &[usize]| {
                // As the kernel does: up to the first that it refuses.
                for item in part {
                    if bad[*item] {
                        return Err(EINVAL);
                    }
                    applied.push(*item);
                }
                Ok(())
            });
            let expected: Vec<_> = bad.iter().map(|bad| if *bad { Err(EINVAL) } else { Ok(()) }).collect();
            prop_assert_eq!(results, expected);
            for item in items {
                prop_assert_eq!(applied.contains(&item), !bad[item]);
            }
        }
    }

    #[test]
    fn an_error_that_every_item_would_meet_is_met_once() {
        let mut calls = 0;
        let results = isolate(&[(); 500], &mut |_| {
            calls += 1;
            Err(ENODEV)
        });
        assert_eq!((calls, results), (1, vec![Err(ENODEV); 500]));
    }

    #[test]
    fn a_peer_that_comes_in_parts_is_one_with_the_handshake_of_its_first() {
        let (key, at) = ([7; 32], SystemTime::UNIX_EPOCH + Duration::from_secs(9));
        let ips: Vec<(IpAddr, u8)> = vec![("fe80::1".parse().unwrap(), 128), ("10.0.0.0".parse().unwrap(), 8)];
        let mut table = Table::default();
        table.add(key, ips[..1].to_vec(), Some(at));
        table.add(key, ips[1..].to_vec(), None);
        table.add([0; 32], [], None);
        let peer = Peer { allowed_ips: ips, last_handshake: Some(at) };
        assert_eq!(table.peers, BTreeMap::from([(PublicKey::from_bytes(key).unwrap(), peer)]));
    }

    #[test]
    fn no_handshake_is_none_and_a_time_before_the_epoch_too() {
        let time = |seconds, nano_seconds| wall_clock(WireguardTimeSpec { seconds, nano_seconds });
        assert_eq!((time(0, 0), time(-1, 0)), (None, None));
        assert_eq!(time(1, 5), Some(SystemTime::UNIX_EPOCH + Duration::new(1, 5)));
    }
}
