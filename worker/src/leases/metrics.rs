//! The metrics of this gateway's servers.

use prometheus::{Error, IntGaugeVec};
use wgkex_common::Config;
use wgkex_common::runtime::metrics::MetricsRegistry;

use super::server::sources;

/// By server.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub(super) leases: IntGaugeVec,
    pub(super) up: IntGaugeVec,
}

impl Metrics {
    /// Registers them, with a series for each server of the config.
    pub fn register(registry: &MetricsRegistry, config: &Config) -> Result<Self, Error> {
        let by_server = |name, help| registry.gauges(name, help, &["server"]);
        let metrics = Self {
            leases: by_server("wgkex_worker_server_leases", "Leases of the server that are known here.")?,
            up: by_server(
                "wgkex_worker_server_up",
                "1 if the server's interface is there and has the peers of all its leases, 0 otherwise.",
            )?,
        };
        for (server, _) in sources(config) {
            metrics.leases.with_label_values(&[server.as_str()]).set(0);
            metrics.up.with_label_values(&[server.as_str()]).set(0);
        }
        Ok(metrics)
    }
}
