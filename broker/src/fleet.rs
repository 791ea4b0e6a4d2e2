//! What the broker knows of the fleet: the gateways, the live keys that they are to have, and the revocations that wait
//! for their confirmation. The previous stop of a key is [`exchange`](crate::exchange), the next one
//! [`bus`](crate::bus).

pub mod claimed;
pub mod gateways;
pub mod live_keys;
mod metrics;
pub mod revocation;

pub use self::metrics::Metrics;
