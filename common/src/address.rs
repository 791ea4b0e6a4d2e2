//! Which key has an address: several keys can derive the same one. No IO, no clock, no task.
//!
//! [`reserved`] has the keys and addresses of gateways, which no router may have; [`claim`] decides between two routers. The
//! broker asks both before it publishes a key, the worker before it installs one.

pub mod claim;
pub mod reserved;
