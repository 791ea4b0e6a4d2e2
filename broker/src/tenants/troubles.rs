//! The troubles of tenants that operators should know: [`coordination`](super::coordination) notes it, the status shows
//! it.

use std::collections::BTreeSet;

use wgkex_common::{BrokerName, WorkerName};

use crate::tenants::hub::HubTrouble;

/// The troubles that operators should know.
#[derive(Debug, Clone, Default)]
pub struct Troubles {
    /// Brokers that serve tenants by other rules.
    pub strangers: BTreeSet<BrokerName>,
    /// The worker that is to be the hub, and why members do not learn of it.
    pub hub: Option<(WorkerName, HubTrouble)>,
}
