//! The messages that the broker receives and publishes by MQTT, on two sessions: one for messages of workers, for which
//! answers to routers wait, and one for keys and long messages.
//!
//! Tasks: the two sessions, which pass each message to [`subscriber`]; [`announcer`], which publishes this broker's presence;
//! [`sync_server`], which answers requests for live keys. Keys themselves are published by [`crate::exchange`].
//!
//! The previous stop of a message is a worker or another broker. Next stops: [`crate::exchange`] for outcomes of keys,
//! [`crate::fleet`] for states, keys and results of revocations, the access lists for records.

pub mod announcer;
pub mod invalid_messages;
mod metrics;
pub mod online_log;
mod problem_log;
pub mod requesters;
pub mod subscriber;
pub mod sync_queue;
pub mod sync_server;

pub use self::metrics::Metrics;

/// The most gateways whose log lines are counted: more than any fleet has.
const LOGGED_GATEWAYS_MAX: usize = 4096;
