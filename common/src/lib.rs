//! The words that broker and worker share: what a key, a domain, a topic and a message are, what the config
//! says, and the MQTT session under both.

mod domain;
mod key;
pub mod message;
mod topic;

pub use domain::{Domain, DomainError, is_topic_level};
pub use key::{KeyError, PublicKey};
pub use topic::Topic;
