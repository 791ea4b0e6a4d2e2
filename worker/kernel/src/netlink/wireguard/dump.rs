//! Parses the answers of WireGuard to a request for an interface and its peers.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use netlink_packet_core::{DecodeError, NlasIterator, ParseableParametrized, parse_i64, parse_ip, parse_u8, parse_u16};
use netlink_packet_generic::{GenlHeader, GenlMessage};
use wgkex_common::PublicKey;
use wireguard_control::Device;

use crate::{AllowedIps, Peer, PresharedKey};

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

/// An interface and its peers, as WireGuard reports them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DeviceDump {
    pub public_key: Option<PublicKey>,
    pub listen_port: u16,
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// One message of the kernel about an interface, with the fields that are used here. The library's own parser panics if
/// the prefix length is missing.
#[derive(Debug, Default)]
pub struct DumpMessage {
    public_key: Option<[u8; 32]>,
    listen_port: Option<u16>,
    peers: Vec<PeerFragment>,
}

/// A peer, or the rest of a peer that did not fit the message before.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PeerFragment {
    pub(super) key: [u8; 32],
    pub(super) allowed_ips: AllowedIps,
    pub(super) handshake: Option<SystemTime>,
    pub(super) keepalive: Option<NonZeroU16>,
    pub(super) preshared: Option<PresharedKey>,
}

impl DeviceDump {
    /// Both dumps split a peer that does not fit one message; only its first part has more than allowed-ips.
    pub(super) fn add(&mut self, part: PeerFragment) {
        // A peer with an invalid key cannot have handshakes, and is never looked up by its key.
        let Ok(key) = PublicKey::from_bytes(part.key) else { return };
        let peer = self.peers.entry(key).or_default();
        peer.allowed_ips.extend(part.allowed_ips);
        peer.last_handshake = peer.last_handshake.or(part.handshake);
        peer.keepalive = peer.keepalive.or(part.keepalive);
        peer.preshared = peer.preshared.take().or(part.preshared);
    }

    pub(super) fn of_userspace(device: Device) -> Self {
        let mut dump = Self {
            public_key: device.public_key.and_then(|key| PublicKey::from_bytes(key.0).ok()),
            listen_port: device.listen_port.unwrap_or(0),
            peers: BTreeMap::new(),
        };
        for peer in device.peers {
            let config = peer.config;
            dump.add(PeerFragment {
                key: config.public_key.0,
                allowed_ips: config.allowed_ips.iter().filter_map(|ip| IpNet::new(ip.address, ip.cidr).ok()).collect(),
                handshake: peer.stats.last_handshake_time,
                keepalive: config.persistent_keepalive_interval.and_then(NonZeroU16::new),
                preshared: config.preshared_key.and_then(|key| PresharedKey::new(key.0)),
            });
        }
        dump
    }

    /// The kernel answers in parts, of which only the first has the attributes of the interface itself.
    pub fn add_answer(&mut self, answer: GenlMessage<DumpMessage>) {
        let DumpMessage { public_key, listen_port, peers } = answer.payload;
        if let Some(key) = public_key {
            self.public_key = PublicKey::from_bytes(key).ok();
        }
        self.listen_port = listen_port.unwrap_or(self.listen_port);
        for part in peers {
            self.add(part);
        }
    }
}

impl ParseableParametrized<[u8], GenlHeader> for DumpMessage {
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
pub(super) fn wall_clock(value: &[u8]) -> Result<Option<SystemTime>, DecodeError> {
    let (seconds, nanos) = value.split_at_checked(8).ok_or("a time of less than 8 bytes")?;
    let (seconds, nanos) = (u64::try_from(parse_i64(seconds)?), u32::try_from(parse_i64(nanos)?));
    let (Ok(seconds), Ok(nanos)) = (seconds, nanos) else { return Ok(None) };
    let since_epoch = Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanos.into()));
    let since_epoch = since_epoch.filter(|since_epoch| !since_epoch.is_zero());
    Ok(since_epoch.and_then(|since_epoch| SystemTime::UNIX_EPOCH.checked_add(since_epoch)))
}
