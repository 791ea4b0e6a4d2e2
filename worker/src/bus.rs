//! The worker's two MQTT sessions (contract section 4). By the first, keys come in and states go out; by the second, what
//! became of keys goes out, and live keys and list records come in.
//!
//! The sessions run in tasks of their own and hand each message to [`subscriber`], which waits for nothing. The task of
//! [`publisher`] owns what was published on this connection.

mod metrics;
pub mod publisher;
pub mod subscriber;

pub use self::metrics::Metrics;
