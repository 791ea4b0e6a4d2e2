//! The worker's two MQTT sessions (contract section 4). By the first, keys come in and states go out; by the second, what
//! became of keys goes out, and live keys and list records come in.
//!
//! Tasks: each session has one of its own, which hands each message to [`subscriber`], whose functions wait for nothing; the
//! [`publisher`] has another, which owns what was published on this connection. `run` of the worker owns all three.
//! Previous stop of a key: a broker; next stop: [`crate::reconciler`].

mod metrics;
pub mod publisher;
pub mod subscriber;

pub use self::metrics::Metrics;
