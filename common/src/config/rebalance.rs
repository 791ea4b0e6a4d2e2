//! How fast a gateway that came back is filled: `rebalance`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::value::FillTime;

/// How a gateway gets its share of the routers again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebalance {
    /// In this time it is filled; 0 if it gets all new routers at once.
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
