//! The problems of tenants that operators should know: [`coordination`](super::coordination) notes it, the status shows
//! it.

use std::collections::BTreeSet;

use wgkex_common::{BrokerName, WorkerName};

use crate::tenants::hub::HubProblem;

/// The problems that operators should know.
#[derive(Debug, Clone, Default)]
pub struct TenantProblems {
    /// Brokers that serve tenants by other rules.
    pub with_other_rules: BTreeSet<BrokerName>,
    /// The worker that is to be the hub, and why members do not learn of it.
    pub hub: Option<(WorkerName, HubProblem)>,
}
