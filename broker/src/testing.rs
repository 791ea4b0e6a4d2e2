//! The helpers that the tests of several rooms share.

use wgkex_common::PublicKey;

/// The `n`th of many keys.
pub fn key(n: u32) -> PublicKey {
    let mut bytes = [0x42; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    PublicKey::from_bytes(bytes).unwrap()
}
