//! The states of this gateway's servers: published by [`task`](super::task) for the status and the doctor.

use serde::{Deserialize, Serialize};

/// A server of the registry at this gateway.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// The name of its WireGuard interface.
    pub interface: String,
    /// Whether its interface has the peers of all its leases.
    pub up: bool,
    /// Why not; none before the first check.
    pub reason: Option<String>,
    /// The leases that are known here.
    pub leases: u64,
}
