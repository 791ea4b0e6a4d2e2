//! How fast the share of a returned gateway grows: `rebalance`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::value::FillTime;

/// How a gateway regains its share of the routers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebalance {
    /// The time until it has its full share; 0 if it has that at once.
    pub over: Duration,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawRebalance {
    pub over: Option<FillTime>,
}

impl RawRebalance {
    pub fn check(&self) -> Rebalance {
        Rebalance { over: self.over.as_ref().map_or(Duration::from_secs(900), |over| over.0) }
    }
}
