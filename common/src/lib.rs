//! The words that broker and worker share: what a key, a domain, a topic and a message are, what the config
//! says, and the MQTT session under both.

pub mod access_lists;
pub mod address;
pub mod config;
mod domain;
pub mod http;
mod key;
pub mod mqtt;
pub mod runtime;
pub mod storage;
pub mod sync;
pub mod wire;

pub use address::reserved::Reserved;
pub use config::Config;
pub use domain::{Domain, DomainError, is_topic_level};
pub use key::{Derived, KeyError, PublicKey, is_derived};
pub use wire::reject_reason::RejectReason;
pub use wire::topic::Topic;
