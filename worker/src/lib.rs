//! The gateway's side of wgkex: announced keys in over MQTT, peers, routes and FDB entries out to the kernel.

pub mod install;
pub mod kernel;
pub mod ledger;
pub mod metrics;
pub mod plan;
pub mod schedule;
pub mod setup;
#[cfg(test)]
mod testing;
