//! Reconciles the kernel's tables: installs keys that arrive, restores lost objects, sweeps stale peers.
//!
//! One task, in [`task`], owns the kernel and the state of every domain; `run` of the worker owns the task. Other tasks
//! reach it by a [`ReconcilerHandle`]; publishing cannot block it: states go into a `watch`, reports into bounded
//! queues ([`reports`]). The state of a domain, in [`domain`], decides what is done there, and is pure; [`driver`]
//! executes that. [`schedule`] has the times.
//!
//! Previous stop of a key: [`crate::bus`]; next stops: [`crate::peers`] and [`crate::plan`], then the kernel; its
//! outcome goes back by [`reports`] to [`crate::bus`].

mod domain;
mod driver;
mod handle;
mod metrics;
mod portions;
pub mod reports;
pub mod schedule;
mod task;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use wgkex_common::PublicKey;
use wgkex_common::wire::message::Age;

pub use self::domain::preview;
pub use self::handle::{ReconcilerHandle, WaitingKeys};
pub use self::metrics::{DROPPED, Metrics};
pub use self::reports::{DomainState, DomainStates, Reports};
pub use self::task::{Reconciler, ReconcilerParts};
use crate::peers::Clocks;

/// Live keys with their ages.
type KeySnapshot = BTreeMap<PublicKey, Age>;

/// The monotonic clock, which tests can pause.
fn clock() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn clocks() -> Clocks {
    Clocks { monotonic: clock(), wall: SystemTime::now() }
}
