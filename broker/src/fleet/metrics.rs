//! The metrics of gateways, live keys and the lists that admit keys.

use prometheus::{Error, IntGauge, IntGaugeVec};
use wgkex_common::Domain;
use wgkex_common::access_lists::metrics::ListMetrics;

use crate::fleet::gateways::GatewayStatus;
use crate::fleet::live_keys::LiveKeyCounts;
use crate::metrics::{Registry, set};

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Whether the live keys are kept on disk.
    pub state_kept: IntGauge,
    live: IntGaugeVec,
    gateways: IntGaugeVec,
    /// The state of the access lists.
    pub lists: ListMetrics,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        let metrics = Self {
            state_kept: registry.gauge("wgkex_broker_state_kept", "1 while the live keys are kept on disk")?,
            live: registry.gauges("wgkex_broker_live_keys", "Live keys by state", &["domain", "state"])?,
            gateways: registry.gauges("wgkex_broker_gateways", "Gateways by state", &["state"])?,
            lists: ListMetrics {
                damaged: registry.gauges("wgkex_broker_lists_damaged", "1 while a list cannot be read", &["list"])?,
                keys: registry.gauges("wgkex_broker_list_keys", "Keys on each list", &["list"])?,
                kept: registry
                    .gauge("wgkex_broker_lists_kept", "1 while entries made by admin calls are kept on disk")?,
                entries_refused: registry.counters(
                    "wgkex_broker_list_entries_refused_total",
                    "List entries of other brokers that were not taken in",
                    &["reason"],
                )?,
            },
        };
        metrics.set_gateways(&[]);
        Ok(metrics)
    }

    /// Takes over how many gateways are in which state.
    pub fn set_gateways(&self, gateways: &[GatewayStatus]) {
        let online = gateways.iter().filter(|gateway| gateway.online).count();
        for (state, number) in [("online", online), ("offline", gateways.len() - online)] {
            set(&self.gateways.with_label_values(&[state]), number);
        }
    }

    /// Takes over how many live keys there are.
    pub fn set_live<'a>(&self, counts: impl Iterator<Item = (&'a Domain, LiveKeyCounts)>) {
        for (domain, LiveKeyCounts { established, unestablished, unrequested }) in counts {
            for (state, number) in [("proven", established), ("unproven", unestablished), ("claimed", unrequested)] {
                set(&self.live.with_label_values(&[domain.name(), state]), number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::assert_has;

    #[test]
    fn every_series_is_there_from_the_start() {
        let registry = Registry::default();
        Metrics::register(&registry).unwrap();
        assert_has(&registry, &[r#"wgkex_broker_gateways{state="online"} 0"#]);
    }
}
