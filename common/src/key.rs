//! A router's WireGuard public key, parsed once at the edge, and the link-local address derived from it.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};

/// A Curve25519 public key that can take part in a handshake: 32 bytes, none of the points of small order.
///
/// `Display` and serde give the 44 characters of the wire; `Debug` gives the 8 that logs may show.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// Why a text or 32 bytes are no valid public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not the canonical base64 of 32 bytes (contract section 1).
    #[error("not a WireGuard public key: 44 characters of canonical base64 are expected")]
    Malformed,
    /// One of the points of small order, with which every handshake has the same, known secret.
    #[error("not a usable WireGuard public key: a point of small order")]
    SmallOrder,
}

/// The u-coordinates of small order, little-endian, top bit clear. X25519 ignores that bit (RFC 7748 section 5),
/// so each stands for two encodings; the last three are the unreduced forms of -1, 0 and 1.
const SMALL_ORDER: [[u8; 32]; 7] = [
    point(b"0000000000000000000000000000000000000000000000000000000000000000"),
    point(b"0100000000000000000000000000000000000000000000000000000000000000"),
    point(b"e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    point(b"5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    point(b"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    point(b"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    point(b"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
];

const fn point(hex: &[u8; 64]) -> [u8; 32] {
    const fn nibble(digit: u8) -> u8 {
        if digit.is_ascii_digit() { digit - b'0' } else { digit - b'a' + 10 }
    }
    let mut bytes = [0; 32];
    let mut i = 0;
    while i < 32 {
        bytes[i] = nibble(hex[2 * i]) << 4 | nibble(hex[2 * i + 1]);
        i += 1;
    }
    bytes
}

impl PublicKey {
    /// The key of 32 raw bytes, as in netlink messages.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        let mut point = bytes;
        point[31] &= 0x7f;
        if SMALL_ORDER.contains(&point) {
            return Err(KeyError::SmallOrder);
        }
        Ok(Self(bytes))
    }

    /// The 32 raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The node's link-local address (contract section 3): 40 bits of the MD5 over the base64 text and one
    /// newline, shaped like an EUI-64 address under `fe80::/64`.
    #[must_use]
    pub fn link_local(&self) -> Ipv6Addr {
        self.derived().into()
    }

    /// The part of [`Self::link_local`] that depends on the key.
    #[must_use]
    pub fn derived(&self) -> Derived {
        let mut line = [b'\n'; 45];
        // The 44 characters of a key always fit.
        let _ = STANDARD.encode_slice(self.0, &mut line);
        let digest = Md5::digest(line);
        Derived([digest[0], digest[1], digest[2], digest[3], digest[4]])
    }
}

/// The bytes in which addresses that are derived from keys differ. Their order is that of the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Derived([u8; 5]);

impl Derived {
    /// None if no key can derive the address.
    #[must_use]
    pub fn of(address: Ipv6Addr) -> Option<Self> {
        let bytes = address.octets();
        let is_derived = bytes[..9] == [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x02] && bytes[11..13] == [0xff, 0xfe];
        is_derived.then(|| Self([bytes[9], bytes[10], bytes[13], bytes[14], bytes[15]]))
    }
}

impl From<Derived> for Ipv6Addr {
    fn from(Derived(own): Derived) -> Self {
        Self::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x02, own[0], own[1], 0xff, 0xfe, own[2], own[3], own[4]])
    }
}

/// Whether `address` has the form of addresses that are derived from keys, so that it may be a node's.
#[must_use]
pub fn is_derived(address: Ipv6Addr) -> bool {
    Derived::of(address).is_some()
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = STANDARD.decode(text).map_err(|_| KeyError::Malformed)?;
        Self::from_bytes(bytes.try_into().map_err(|_| KeyError::Malformed)?)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.8}", self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use x25519_dalek::{PublicKey as Point, StaticSecret};

    use super::*;

    #[test]
    fn link_local_addresses_are_those_of_the_contract() {
        for (key, address) in [
            ("o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=", "fe80::2a6:8fff:fe21:5465"),
            ("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=", "fe80::27c:16ff:fec0:6c74"),
            ("fAKaBGbh8TB6KaToe27fkEi9ghZwYGi6sOvHDXG2PLI=", "fe80::219:20ff:fe4d:5dc7"),
            ("3c+xZQV94mSS+WVbTdDrC58V7h9hA3uIECwx0uu1kpg=", "fe80::219:20ff:fe4d:5dc7"),
        ] {
            assert_eq!(key.parse::<PublicKey>().unwrap().link_local().to_string(), address);
        }
    }

    #[test]
    fn only_the_canonical_text_of_32_bytes_is_a_key() {
        let good = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";
        for bad in [
            String::new(),
            "=".repeat(44),
            good[..43].to_owned(),
            format!("{good}\n"),
            format!(" {good}"),
            format!("{good}{good}"),
            good.replace("kg=", "kh="), // bits set that no byte uses
            good.replace('+', "-"),
            format!("{}=", &good[..42]),
            format!("{}\u{e9}g=", &good[..40]),
        ] {
            assert_eq!(bad.parse::<PublicKey>(), Err(KeyError::Malformed), "{bad:?}");
        }
    }

    #[test]
    fn points_of_small_order_are_refused_in_both_encodings() {
        let secret = StaticSecret::from([0x5a; 32]);
        for mut bytes in SMALL_ORDER {
            for top in [0, 0x80] {
                bytes[31] |= top;
                assert!(!secret.diffie_hellman(&Point::from(bytes)).was_contributory());
                assert_eq!(STANDARD.encode(bytes).parse::<PublicKey>(), Err(KeyError::SmallOrder));
            }
        }
    }

    #[test]
    fn debug_shows_no_more_than_logs_may() {
        let key: PublicKey = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=".parse().unwrap();
        assert_eq!(format!("{key:?}"), "o52Ge+Rp");
    }

    proptest! {
        #[test]
        fn any_other_32_bytes_are_a_key_and_survive_the_wire(bytes: [u8; 32]) {
            let key = PublicKey::from_bytes(bytes).unwrap();
            prop_assert_eq!(key.to_string().parse(), Ok(key));
            prop_assert_eq!(key.to_string().len(), 44);
            prop_assert_eq!(key.link_local().segments()[..4].to_vec(), vec![0xfe80, 0, 0, 0]);
        }

        #[test]
        fn any_text_is_refused_or_comes_out_as_it_went_in(text in "[A-Za-z0-9+/=\n]{40,48}") {
            if let Ok(key) = text.parse::<PublicKey>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }
}
