//! What the tests of several modules share.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use wgkex_common::{Domain, PublicKey};

use crate::plan::{self, Step};
use crate::profiles::mesh::Mesh;

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

/// Installs `keys` as those of routers of a mesh.
pub fn install(keys: impl IntoIterator<Item = PublicKey>) -> Vec<Step> {
    plan::install(&Mesh, keys)
}

/// What a future gives that has nothing to wait for.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits"),
    }
}
