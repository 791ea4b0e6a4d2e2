//! Leases: the peers of this gateway's servers, as in the registry of a broker.
//!
//! One task, [`LeaseTask::run`](task::LeaseTask::run), which `run` of the worker owns, has a separate kernel, since the
//! interfaces of servers are used by nothing else. [`source`] is the origin of the leases: the registry, or the tenants
//! at their hub; [`table`] holds the leases of a server, [`plan`] computes the steps to its peers, [`server`] combines
//! both with the times, [`brokers`] selects the broker to ask; they are pure. [`file`] stores the leases, so that a
//! worker without a broker restores its peers; [`preview`] computes the steps for `dry-run`.
//!
//! Previous stop of a lease: [`crate::bus`], which receives it; next stop: the kernel.

mod brokers;
mod file;
mod metrics;
mod plan;
mod preview;
mod server;
mod server_status;
mod source;
mod table;
mod task;

pub use self::file::FILE;
pub use self::metrics::Metrics;
pub use self::preview::{ServerPreview, preview};
pub use self::server_status::ServerStatus;
pub use self::task::{LeaseEvent, LeaseParts, LeaseReceiver, LeaseSender, LeaseTask, channel, is_needed};
