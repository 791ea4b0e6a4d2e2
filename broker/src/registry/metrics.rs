//! The metrics of the registry.

use prometheus::{IntCounterVec, IntGauge};

use crate::metrics::MetricsRegistry;

/// The metrics of the registry. Gauges are up to date only when they are read.
#[derive(Clone)]
pub struct Metrics {
    pub(super) servers: IntGauge,
    pub(super) leases: IntGauge,
    pub(super) storage_up: IntGauge,
    pub(crate) refused: IntCounterVec,
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, prometheus::Error> {
        let storage_up = registry.gauge(
            "wgkex_broker_registry_storage_up",
            "0 if the database of the registry cannot be used, 1 otherwise, also without a registry",
        )?;
        storage_up.set(1);
        Ok(Self {
            servers: registry.gauge("wgkex_broker_registry_servers", "Servers in the registry")?,
            leases: registry.gauge("wgkex_broker_registry_leases", "Addresses that clients lease in the registry")?,
            storage_up,
            refused: registry.counters(
                "wgkex_broker_registry_refused_total",
                "Calls of the registry that were refused, by reason",
                &["reason"],
            )?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::assert_has;

    #[test]
    fn without_a_registry_no_storage_is_down() {
        let registry = MetricsRegistry::default();
        Metrics::register(&registry).unwrap();
        assert_has(&registry, &["wgkex_broker_registry_storage_up 1"]);
    }
}
