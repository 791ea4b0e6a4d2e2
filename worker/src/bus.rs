//! The worker's two MQTT sessions (contract section 4). The first receives keys and publishes states; the second publishes
//! the results of keys, and receives live keys and list records.
//!
//! Tasks: each session has one task, which passes each message to [`subscriber`], whose functions never wait; the
//! [`publisher`] has another, which remembers what was published on this connection. `run` of the worker owns all
//! three. Previous stop of a key: a broker; next stop: [`crate::reconciler`].

pub mod broker_clocks;
mod metrics;
pub mod publisher;
pub mod subscriber;

pub use self::metrics::Metrics;
