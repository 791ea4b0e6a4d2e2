//! The peers of an interface, by the kernel's WireGuard (generic netlink) or a userspace one (its socket, by
//! wireguard-control).

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has more attributes than matter, and new ones come")]

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::num::NonZeroU16;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use netlink_packet_core::{DecodeError, NlasIterator, ParseableParametrized, parse_i64, parse_ip, parse_u8, parse_u16};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlHeader, GenlMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use wgkex_common::PublicKey;
use wireguard_control::{Backend, Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder};

use super::channel::{Channel, DumpError, errno};
use crate::{AllowedIps, Errno, Peer, PeerConfig, PresharedKey};

// linux/wireguard.h: enum wgdevice_attribute, wgpeer_attribute, wgallowedip_attribute.
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_LISTEN_PORT: u16 = 6;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_PRESHARED_KEY: u16 = 2;
const WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: u16 = 5;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// Errors of the interface, or of the caller, that every peer of a batch meets.
const BATCH_WIDE: [Errno; 6] =
    [Errno::EPERM, Errno::ENOENT, Errno::EIO, Errno::ENODEV, Errno::EOPNOTSUPP, Errno::ECONNREFUSED];

/// Peers and their networks set by one message: about 24 KiB, under the 64 KiB that one netlink attribute can hold.
const OBJECTS_AT_ONCE: usize = 512;

/// Networks of one peer that fit a message.
const NETWORKS_MAX: usize = 1_000;

/// What answers for an interface's peers.
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
    Remove(PublicKey),
}

/// What WireGuard says of an interface.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) public_key: Option<PublicKey>,
    pub(super) listen_port: u16,
    pub(super) peers: BTreeMap<PublicKey, Peer>,
}

/// One message of the kernel about an interface, as far as it matters here. The library's own reading of it panics
/// where the length of a prefix is missing.
#[derive(Debug, Default)]
pub(super) struct Answer {
    public_key: Option<[u8; 32]>,
    listen_port: Option<u16>,
    peers: Vec<PeerFragment>,
}

/// A peer, or what of it did not fit the message before.
#[derive(Debug, Default, PartialEq, Eq)]
struct PeerFragment {
    key: [u8; 32],
    allowed_ips: AllowedIps,
    handshake: Option<SystemTime>,
    keepalive: Option<NonZeroU16>,
    preshared: Option<PresharedKey>,
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

impl PeerChange<'_> {
    /// The peer and its networks.
    fn objects(&self) -> usize {
        match self {
            Self::Set(peer) => 1 + peer.allowed_ips.len(),
            Self::Remove(_) => 1,
        }
    }
}

/// The changes in parts that each fit a message; one that fits none is a part of its own.
fn batches<'a, 'b>(mut changes: &'a [PeerChange<'b>]) -> impl Iterator<Item = &'a [PeerChange<'b>]> {
    std::iter::from_fn(move || {
        let mut objects = 0;
        let fitting = changes.iter().take_while(|change| {
            objects += change.objects();
            objects <= OBJECTS_AT_ONCE
        });
        let count = fitting.count().max(1).min(changes.len());
        let batch;
        (batch, changes) = changes.split_at(count);
        (!batch.is_empty()).then_some(batch)
    })
}

/// Applies all of `items` at once; if that is refused, one half and then the other, down to the items that are
/// refused alone. What went well in a batch that failed is done again: `apply` must not mind.
fn bisect<T>(items: &[T], apply: &mut impl FnMut(&[T]) -> Result<(), Errno>) -> Vec<Result<(), Errno>> {
    match apply(items) {
        Err(error) if items.len() > 1 && !BATCH_WIDE.contains(&error) => {
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

/// Without the flags that replace: what else the peer has stays.
fn kernel_peer(change: &PeerChange<'_>) -> WireguardPeer {
    let PeerConfig { key, allowed_ips, keepalive, preshared } = match *change {
        PeerChange::Set(peer) => peer,
        PeerChange::Remove(key) => {
            return WireguardPeer(vec![
                WireguardPeerAttribute::PublicKey(*key.as_bytes()),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
            ]);
        }
    };
    let mut attributes = vec![WireguardPeerAttribute::PublicKey(*key.as_bytes())];
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
        PeerChange::Set(peer) => peer,
        PeerChange::Remove(key) => return update.remove_peer_by_key(&Key(*key.as_bytes())),
    };
    let mut peer = PeerConfigBuilder::new(&Key(*key.as_bytes()));
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

/// wireguard-control does not say which error the process answered, only that it did.
fn userspace_errno(error: io::Error) -> Errno {
    if error.kind() == io::ErrorKind::InvalidInput { Errno::EINVAL } else { errno(error) }
}

impl Table {
    /// Both dumps split a peer that does not fit one message; only its first part has more than allowed-ips.
    fn add(&mut self, part: PeerFragment) {
        // A peer whose key is no key cannot shake hands, and nobody asks for it by name.
        let Ok(key) = PublicKey::from_bytes(part.key) else { return };
        let peer = self.peers.entry(key).or_default();
        peer.allowed_ips.extend(part.allowed_ips);
        peer.last_handshake = peer.last_handshake.or(part.handshake);
        peer.keepalive = peer.keepalive.or(part.keepalive);
        peer.preshared = peer.preshared.take().or(part.preshared);
    }

    fn of_userspace(device: Device) -> Self {
        let mut table = Self {
            public_key: device.public_key.and_then(|key| PublicKey::from_bytes(key.0).ok()),
            listen_port: device.listen_port.unwrap_or(0),
            peers: BTreeMap::new(),
        };
        for peer in device.peers {
            let config = peer.config;
            table.add(PeerFragment {
                key: config.public_key.0,
                allowed_ips: config.allowed_ips.iter().filter_map(|ip| IpNet::new(ip.address, ip.cidr).ok()).collect(),
                handshake: peer.stats.last_handshake_time,
                keepalive: config.persistent_keepalive_interval.and_then(NonZeroU16::new),
                preshared: config.preshared_key.and_then(|key| PresharedKey::new(key.0)),
            });
        }
        table
    }

    /// The kernel answers in parts, of which only the first tells of the interface itself.
    pub(super) fn add_answer(&mut self, answer: GenlMessage<Answer>) {
        let Answer { public_key, listen_port, peers } = answer.payload;
        if let Some(key) = public_key {
            self.public_key = PublicKey::from_bytes(key).ok();
        }
        self.listen_port = listen_port.unwrap_or(self.listen_port);
        for part in peers {
            self.add(part);
        }
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Answer {
    fn parse_with_param(attributes: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        let mut answer = Self::default();
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            match attribute.kind() {
                WGDEVICE_A_PUBLIC_KEY => answer.public_key = Some(key(attribute.value())?),
                WGDEVICE_A_LISTEN_PORT => answer.listen_port = Some(parse_u16(attribute.value())?),
                WGDEVICE_A_PEERS => {
                    for peer in NlasIterator::new(attribute.value()) {
                        answer.peers.push(PeerFragment::parse(peer?.value())?);
                    }
                }
                _ => {}
            }
        }
        Ok(answer)
    }
}

impl PeerFragment {
    fn parse(attributes: &[u8]) -> Result<Self, DecodeError> {
        let mut part = Self::default();
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            match attribute.kind() {
                WGPEER_A_PUBLIC_KEY => part.key = key(attribute.value())?,
                WGPEER_A_PRESHARED_KEY => part.preshared = PresharedKey::new(key(attribute.value())?),
                WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL => {
                    part.keepalive = NonZeroU16::new(parse_u16(attribute.value())?);
                }
                WGPEER_A_LAST_HANDSHAKE_TIME => part.handshake = wall_clock(attribute.value())?,
                WGPEER_A_ALLOWEDIPS => {
                    for allowed_ip in NlasIterator::new(attribute.value()) {
                        part.allowed_ips.extend(prefix(allowed_ip?.value())?);
                    }
                }
                _ => {}
            }
        }
        Ok(part)
    }
}

fn prefix(attributes: &[u8]) -> Result<Option<IpNet>, DecodeError> {
    let (mut address, mut length) = (None, None);
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        match attribute.kind() {
            WGALLOWEDIP_A_IPADDR => address = Some(parse_ip(attribute.value())?),
            WGALLOWEDIP_A_CIDR_MASK => length = Some(parse_u8(attribute.value())?),
            _ => {}
        }
    }
    Ok(address.zip(length).and_then(|(address, length)| IpNet::new(address, length).ok()))
}

fn key(value: &[u8]) -> Result<[u8; 32], DecodeError> {
    value.try_into().map_err(|_| format!("a key of {} bytes, not 32", value.len()).into())
}

/// A `__kernel_timespec`: seconds and nanoseconds. The time of no handshake is zero.
fn wall_clock(value: &[u8]) -> Result<Option<SystemTime>, DecodeError> {
    let (seconds, nanos) = value.split_at_checked(8).ok_or("a time of less than 8 bytes")?;
    let (seconds, nanos) = (u64::try_from(parse_i64(seconds)?), u32::try_from(parse_i64(nanos)?));
    let (Ok(seconds), Ok(nanos)) = (seconds, nanos) else { return Ok(None) };
    let since_epoch = Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanos.into()));
    let since_epoch = since_epoch.filter(|since_epoch| !since_epoch.is_zero());
    Ok(since_epoch.and_then(|since_epoch| SystemTime::UNIX_EPOCH.checked_add(since_epoch)))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use netlink_packet_core::Emitable as _;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bad_item_is_found_among_any_number_and_holds_up_no_other(
            bad in prop::collection::vec(prop::bool::weighted(0.1), 0..600),
        ) {
            let items: Vec<usize> = (0..bad.len()).collect();
            let mut applied = Vec::new();
            let results = bisect(&items, &mut |part: &[usize]| {
                // As the kernel does: up to the first that it refuses.
                for item in part {
                    if bad[*item] {
                        return Err(Errno::EINVAL);
                    }
                    applied.push(*item);
                }
                Ok(())
            });
            let expected: Vec<_> = bad.iter().map(|bad| if *bad { Err(Errno::EINVAL) } else { Ok(()) }).collect();
            prop_assert_eq!(results, expected);
            for item in items {
                prop_assert_eq!(applied.contains(&item), !bad[item]);
            }
        }
    }

    #[test]
    fn an_error_that_every_item_would_meet_is_met_once() {
        let mut calls = 0;
        let results = bisect(&[(); 500], &mut |_| {
            calls += 1;
            Err(Errno::ENODEV)
        });
        assert_eq!((calls, results), (1, vec![Err(Errno::ENODEV); 500]));
    }

    /// An attribute, filled up to the next multiple of four bytes.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len() + 4).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn time(seconds: i64, nanos: i64) -> Vec<u8> {
        [seconds.to_ne_bytes(), nanos.to_ne_bytes()].concat()
    }

    fn told(attributes: &[u8]) -> Result<Table, DecodeError> {
        let mut table = Table::default();
        let header = GenlHeader { cmd: 0, version: 1 };
        table.add_answer(GenlMessage::from_parts(header, Answer::parse_with_param(attributes, header)?));
        Ok(table)
    }

    /// An interface whose only peer has this key, last handshake and allowed-ip.
    fn device(key: &[u8], handshake: &[u8], address: &[u8], length: &[u8]) -> Vec<u8> {
        let nested = 1 << 15;
        let ip = [attribute(1, &[10, 0]), attribute(2, address), attribute(3, length)].concat();
        let ips = attribute(nested | 9, &attribute(nested, &ip));
        let peer = [attribute(1, key), attribute(4, &[0; 28]), attribute(6, handshake), ips].concat();
        let peers = attribute(nested | 8, &attribute(nested, &peer));
        [attribute(2, b"wg-welt\0"), attribute(4, &[9; 32]), attribute(6, &[0x39, 0x30]), peers].concat()
    }

    #[test]
    fn an_answer_is_read_and_one_with_a_value_of_another_size_is_an_error() {
        let address = Ipv6Addr::LOCALHOST;
        let read = told(&device(&[7; 32], &time(9, 5), &address.octets(), &[128])).unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::new(9, 5);
        let peer = Peer { allowed_ips: networks(&["::1/128"]), last_handshake: Some(at), ..Peer::default() };
        assert_eq!(read.public_key.map(|key| *key.as_bytes()), Some([9; 32]));
        assert_eq!(read.listen_port, u16::from_ne_bytes([0x39, 0x30]));
        assert_eq!(read.peers, BTreeMap::from([(PublicKey::from_bytes([7; 32]).unwrap(), peer)]));
        let v4 = told(&device(&[7; 32], &time(0, 0), &[10, 1, 2, 0], &[24])).unwrap();
        assert_eq!(v4.peers.into_values().next().unwrap().allowed_ips, networks(&["10.1.2.0/24"]));

        for (key, time, address, length) in [
            (&[7; 31][..], &time(9, 5)[..], &address.octets()[..], &[128][..]),
            (&[7; 32], &[0; 7], &address.octets(), &[128]),
            (&[7; 32], &[0; 12], &address.octets(), &[128]),
            (&[7; 32], &time(9, 5), &[0; 5], &[128]),
            (&[7; 32], &time(9, 5), &address.octets(), &[]),
        ] {
            assert!(told(&device(key, time, address, length)).is_err(), "{key:?} {time:?} {address:?} {length:?}");
        }
        let whole = device(&[7; 32], &time(9, 5), &address.octets(), &[128]);
        for end in 0..whole.len() {
            drop(told(&whole[..end]));
        }
    }

    #[test]
    fn a_peer_that_comes_in_parts_is_one_with_the_handshake_of_its_first() {
        let (key, at) = ([7; 32], SystemTime::UNIX_EPOCH + Duration::from_secs(9));
        let mut table = Table::default();
        let fragment = |ip| PeerFragment { key, allowed_ips: networks(&[ip]), ..PeerFragment::default() };
        let (keepalive, preshared) = (NonZeroU16::new(25), PresharedKey::new([5; 32]));
        let more =
            PeerFragment { handshake: Some(at), keepalive, preshared: preshared.clone(), ..fragment("fe80::1/128") };
        table.add(more);
        table.add(fragment("10.0.0.0/8"));
        table.add(PeerFragment::default());
        let allowed_ips = networks(&["fe80::1/128", "10.0.0.0/8"]);
        let peer = Peer { allowed_ips, last_handshake: Some(at), keepalive, preshared };
        assert_eq!(table.peers, BTreeMap::from([(PublicKey::from_bytes(key).unwrap(), peer)]));
    }

    /// What is asked of the kernel for a peer is what it answers of one: the attributes have the same numbers.
    #[test]
    fn all_that_a_peer_is_to_have_is_in_the_message() {
        let config = PeerConfig {
            key: PublicKey::from_bytes([7; 32]).unwrap(),
            allowed_ips: networks(&["10.1.2.0/24", "fd00::5/128", "fd00:1::/56"]),
            keepalive: NonZeroU16::new(25),
            preshared: PresharedKey::new([5; 32]),
        };
        let attributes = WireguardAttribute::Peers(vec![kernel_peer(&PeerChange::Set(&config))]);
        let mut bytes = vec![0; attributes.buffer_len()];
        attributes.emit(&mut bytes);
        let PeerConfig { key, allowed_ips, keepalive, preshared } = config;
        let peer = Peer { allowed_ips, last_handshake: None, keepalive, preshared };
        assert_eq!(told(&bytes).unwrap().peers, BTreeMap::from([(key, peer)]));
    }

    #[test]
    fn a_peer_of_which_nothing_else_is_asked_keeps_its_keepalive_and_preshared_key() {
        let config = PeerConfig::at(PublicKey::from_bytes([7; 32]).unwrap(), Ipv6Addr::LOCALHOST);
        let WireguardPeer(attributes) = kernel_peer(&PeerChange::Set(&config));
        assert_eq!(attributes.len(), 2, "{attributes:?}");
    }

    #[test]
    fn a_message_has_as_many_peers_as_fit_and_their_order_stays() {
        let key = PublicKey::from_bytes([7; 32]).unwrap();
        let with = |count| PeerConfig::new(key, std::iter::repeat_n(IpNet::from(IpAddr::from([10, 0, 0, 1])), count));
        let peers: Vec<_> = [300, 1, 300, 600, 1, 1].map(with).into();
        let changes: Vec<_> = peers.iter().map(PeerChange::Set).chain([PeerChange::Remove(key)]).collect();
        let batches: Vec<_> = batches(&changes).collect();
        assert_eq!(batches.iter().map(|batch| batch.len()).collect::<Vec<_>>(), [2, 1, 1, 3]);
        assert_eq!(batches.concat(), changes);
        let mesh = PeerConfig::at(key, Ipv6Addr::LOCALHOST);
        let many = vec![PeerChange::Set(&mesh); 600];
        assert_eq!(super::batches(&many).map(<[_]>::len).collect::<Vec<_>>(), [256, 256, 88]);
    }

    fn networks(texts: &[&str]) -> AllowedIps {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn no_handshake_is_none_and_a_time_that_is_none_too() {
        for (seconds, nanos) in [(0, 0), (-1, 0), (1, -1), (i64::MAX, i64::from(u32::MAX))] {
            assert_eq!(wall_clock(&time(seconds, nanos)).unwrap(), None, "{seconds} {nanos}");
        }
        assert_eq!(wall_clock(&time(1, 5)).unwrap(), Some(SystemTime::UNIX_EPOCH + Duration::new(1, 5)));
    }
}
