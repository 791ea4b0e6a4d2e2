use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU16;
use std::time::{Duration, SystemTime};

use netlink_packet_core::{DecodeError, Emitable as _, ParseableParametrized as _};
use netlink_packet_generic::GenlHeader;
use proptest::prelude::*;

use super::dump::{PeerFragment, wall_clock};
use super::*;
use crate::{AllowedIps, Peer, PresharedKey};

proptest! {
    #[test]
    fn a_bad_item_is_found_among_any_number_and_holds_up_no_other(
        bad in prop::collection::vec(prop::bool::weighted(0.1), 0..600),
    ) {
        let items: Vec<usize> = (0..bad.len()).collect();
        let mut applied = Vec::new();
        let results = bisect(&items, &mut |part: &[usize]| {
            // As the kernel does: applies changes up to the first that it refuses.
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

fn decode(attributes: &[u8]) -> Result<DeviceDump, DecodeError> {
    let mut dump = DeviceDump::default();
    let header = GenlHeader { cmd: 0, version: 1 };
    dump.add_answer(GenlMessage::from_parts(header, DumpMessage::parse_with_param(attributes, header)?));
    Ok(dump)
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
    let read = decode(&device(&[7; 32], &time(9, 5), &address.octets(), &[128])).unwrap();
    let at = SystemTime::UNIX_EPOCH + Duration::new(9, 5);
    let peer = Peer { allowed_ips: networks(&["::1/128"]), last_handshake: Some(at), ..Peer::default() };
    assert_eq!(read.public_key.map(|key| *key.as_bytes()), Some([9; 32]));
    assert_eq!(read.listen_port, u16::from_ne_bytes([0x39, 0x30]));
    assert_eq!(read.peers, BTreeMap::from([(PublicKey::from_bytes([7; 32]).unwrap(), peer)]));
    let v4 = decode(&device(&[7; 32], &time(0, 0), &[10, 1, 2, 0], &[24])).unwrap();
    assert_eq!(v4.peers.into_values().next().unwrap().allowed_ips, networks(&["10.1.2.0/24"]));

    for (key, time, address, length) in [
        (&[7; 31][..], &time(9, 5)[..], &address.octets()[..], &[128][..]),
        (&[7; 32], &[0; 7], &address.octets(), &[128]),
        (&[7; 32], &[0; 12], &address.octets(), &[128]),
        (&[7; 32], &time(9, 5), &[0; 5], &[128]),
        (&[7; 32], &time(9, 5), &address.octets(), &[]),
    ] {
        assert!(decode(&device(key, time, address, length)).is_err(), "{key:?} {time:?} {address:?} {length:?}");
    }
    let whole = device(&[7; 32], &time(9, 5), &address.octets(), &[128]);
    for end in 0..whole.len() {
        drop(decode(&whole[..end]));
    }
}

#[test]
fn a_peer_that_comes_in_parts_is_one_with_the_handshake_of_its_first() {
    let (key, at) = ([7; 32], SystemTime::UNIX_EPOCH + Duration::from_secs(9));
    let mut dump = DeviceDump::default();
    let fragment = |ip| PeerFragment { key, allowed_ips: networks(&[ip]), ..PeerFragment::default() };
    let (keepalive, preshared) = (NonZeroU16::new(25), PresharedKey::new([5; 32]));
    let more = PeerFragment { handshake: Some(at), keepalive, preshared: preshared.clone(), ..fragment("fe80::1/128") };
    dump.add(more);
    dump.add(fragment("10.0.0.0/8"));
    dump.add(PeerFragment::default());
    let allowed_ips = networks(&["fe80::1/128", "10.0.0.0/8"]);
    let peer = Peer { allowed_ips, last_handshake: Some(at), keepalive, preshared };
    assert_eq!(dump.peers, BTreeMap::from([(PublicKey::from_bytes(key).unwrap(), peer)]));
}

/// The attributes of a request for a peer have the same numbers as those of the answer.
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
    assert_eq!(decode(&bytes).unwrap().peers, BTreeMap::from([(key, peer)]));
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
