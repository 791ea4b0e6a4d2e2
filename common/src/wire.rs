//! The MQTT messages: the topics, and the JSON payloads. No IO, no task.
//!
//! The previous stop is the `bus` room of the program that publishes, the next one [`crate::mqtt`], which carries it to the
//! `bus` room of the program that subscribes.

pub mod drain;
pub mod ignored;
pub mod lease;
pub mod message;
pub mod name;
pub mod reject_reason;
pub mod revoke_outcome;
pub mod topic;
