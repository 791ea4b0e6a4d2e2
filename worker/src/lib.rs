//! x

pub mod install;
pub mod kernel;
pub mod ledger;
pub mod metrics;
pub mod plan;
pub mod schedule;
#[cfg(test)]
mod testing;
