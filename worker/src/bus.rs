//! The worker's two MQTT sessions (contract section 4). The first receives keys and publishes states; the second publishes
//! the results of keys, and receives live keys and list records.
//!
//! Tasks: each session has one of its own, which hands each message to [`subscriber`], whose functions wait for nothing; the
//! [`publisher`] has another, which owns what was published on this connection. `run` of the worker owns all three.
//! Previous stop of a key: a broker; next stop: [`crate::reconciler`].

pub mod broker_clocks;
mod metrics;
pub mod publisher;
pub mod subscriber;

pub use self::metrics::Metrics;
