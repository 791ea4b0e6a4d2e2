//! Leases: the peers of this gateway's servers, as the registry of a broker has them.
//!
//! One task, [`LeaseTask::run`](task::LeaseTask::run), which `run` of the worker owns, has a kernel of its own, since the interfaces
//! of servers are no others'. [`source`] is where the leases come from: the registry, or, at their hub, the tenants; [`table`] is what is known
//! of a server's leases, [`plan`] the steps to its peers, [`server`] both together with the times, [`brokers`] whom to ask; they are pure.
//! [`file`] keeps them, so that a worker without a broker restores its peers; [`preview`] is what one would do that runs.
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
pub use self::task::{LeaseEvent, LeaseParts, LeaseSender, LeaseTask, channel, is_needed};
