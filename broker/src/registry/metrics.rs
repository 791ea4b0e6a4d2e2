//! The metrics of the registry.

use prometheus::{IntCounterVec, IntGauge};

use crate::metrics::Registry;

/// What is counted here. Gauges are up to date only when they are read.
#[derive(Clone)]
pub struct Metrics {
    pub(super) servers: IntGauge,
    pub(super) leases: IntGauge,
    pub(super) storage_up: IntGauge,
    pub(super) refused: IntCounterVec,
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            servers: registry.gauge("wgkex_broker_registry_servers", "Servers in the registry")?,
            leases: registry.gauge("wgkex_broker_registry_leases", "Addresses that clients lease in the registry")?,
            storage_up: registry.gauge(
                "wgkex_broker_registry_storage_up",
                "1 if the database of the registry can be used, 0 if not, or without a registry",
            )?,
            refused: registry.counters(
                "wgkex_broker_registry_refused_total",
                "Calls of the registry that were refused, by reason",
                &["reason"],
            )?,
        })
    }
}
