//! The identity of a key in requests and in stored records: a key in a domain.

use crate::{Domain, PublicKey};

/// A key in a domain. The same key in two domains is two.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId {
    /// The domain.
    pub domain: Domain,
    /// The key.
    pub key: PublicKey,
}
