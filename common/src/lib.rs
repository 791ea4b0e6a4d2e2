//! The words that broker and worker share: what a key, a domain, a topic and a message are, what the config
//! says, and the MQTT session under both.

pub mod claim;
pub mod config;
pub mod database;
mod domain;
pub mod http;
mod key;
pub mod lists;
pub mod log;
pub mod message;
pub mod mqtt;
pub mod presence;
pub mod process;
mod reserved;
mod state_file;
pub mod store;
pub mod sync;
pub mod tasks;
pub mod tls;
mod topic;

pub use config::Config;
pub use domain::{Domain, DomainError, is_topic_level};
pub use key::{Derived, KeyError, PublicKey, is_derived};
pub use reserved::Reserved;
pub use topic::Topic;
