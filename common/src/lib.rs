//! The code that broker and worker share. [`PublicKey`] and [`Domain`] are used everywhere; each room is a part of the
//! way of a key: [`wire`] the topics and messages, [`mqtt`] the session that carries them, [`access_lists`] which keys
//! are admitted, [`address`] which key has an address, [`sync`] how a program gets missing live keys, [`storage`] the
//! state over a restart, [`drain`] which gateways get no new routers, [`peer_clock`] whose clock is wrong. All of these
//! use [`config`], [`http`] and [`runtime`], and [`style`], [`time_text`] and [`tls`]; [`cli`] and [`doctor`] have the
//! common parts of the commands.

pub mod access_lists;
pub mod address;
pub mod cli;
pub mod config;
pub mod doctor;
mod domain;
pub mod drain;
pub mod http;
mod key;
mod key_id;
pub mod mqtt;
pub mod peer_clock;
pub mod runtime;
pub mod storage;
pub mod style;
pub mod sync;
pub mod time_text;
pub mod tls;
pub mod wire;

pub use address::reserved::Reserved;
pub use config::Config;
pub use domain::{Domain, DomainError, is_topic_level};
pub use key::{Derived, KeyError, PublicKey, is_derived};
pub use key_id::KeyId;
pub use wire::name::{BrokerName, HostName, WorkerName};
pub use wire::reject_reason::RejectReason;
pub use wire::topic::Topic;
