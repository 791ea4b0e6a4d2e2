//! What goes over MQTT: the topics, and the JSON payloads. No IO.

pub mod message;
pub mod reject_reason;
pub mod topic;
