//! What goes over MQTT: the topics, and the JSON payloads. No IO.

pub mod message;
pub mod topic;
