//! The state of the fleet, as the broker knows it: the gateways on the bus, the live keys that brokers remember for
//! them, and the revocations that wait for results.
//!
//! Tasks: one, which ends drains at their time ([`drain_store`]). Owners: [`gateways`] and [`live_keys`] are each
//! behind one lock of the shared [`Fleet`], which the other rooms hold for one query; [`revocation`] has its own.
//!
//! Previous stops: [`bus`](crate::bus), with the messages of workers and brokers, and [`exchange`](crate::exchange), with a
//! router's key. Next stops: `exchange` again, which answers the router, and the sync clients of gateways and other brokers.

mod clashes;
pub(crate) mod drain_store;
pub mod drains;
pub(crate) mod election;
mod gateway;
pub mod gateways;
mod handle;
pub mod key_locations;
pub mod live_keys;
mod metrics;
pub mod reach;
pub mod revocation;
pub mod selection;
pub mod status;
mod unrequested;

pub use self::handle::{Choice, Fleet, KeyConflict};
pub use self::metrics::Metrics;
