//! The metrics of peers: how many are in which state, and how many are removed and why.

use std::collections::BTreeSet;

use prometheus::{Error, IntCounterVec, IntGaugeVec};
use wgkex_common::Domain;
use wgkex_common::runtime::metrics::MetricsRegistry;

use super::PeerCounts;

/// Clones share the metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Peers, by domain and state.
    pub by_state: IntGaugeVec,
    /// Sweeps for stale peers, by domain.
    pub sweeps: IntCounterVec,
    /// Stale peers removed, by domain.
    pub stale: IntCounterVec,
    /// Peers evicted because others needed their slot or have their address, by domain.
    pub evicted: IntCounterVec,
    /// Peers removed because their keys are not admitted, by domain.
    pub denied: IntCounterVec,
    /// Peers removed by a drain past its deadline, by domain.
    pub drained: IntCounterVec,
    /// Idle peers whose endpoint was removed from the kernel, by domain.
    pub renewed: IntCounterVec,
    /// Routes and flood entries without a peer that were removed, by domain.
    pub orphans: IntCounterVec,
}

impl Metrics {
    /// Registers them for `domains`, all at 0.
    pub fn register(registry: &MetricsRegistry, domains: &BTreeSet<Domain>) -> Result<Self, Error> {
        let by_domain = |name, help| {
            let names = domains.iter().map(Domain::name);
            registry.counters_of(name, help, "domain", names)
        };
        let metrics = Self {
            by_state: registry.gauges("wgkex_worker_peers", "Peers, each in one state.", &["domain", "state"])?,
            sweeps: by_domain("wgkex_worker_sweeps_total", "Looks for stale peers.")?,
            stale: by_domain("wgkex_worker_peers_removed_total", "Stale peers removed.")?,
            evicted: by_domain("wgkex_worker_peers_ousted_total", "Peers that others took the place of.")?,
            denied: by_domain("wgkex_worker_peers_revoked_total", "Peers of keys that may not be here, removed.")?,
            drained: by_domain("wgkex_worker_peers_drained_total", "Peers removed by a drain past its deadline.")?,
            renewed: by_domain("wgkex_worker_peers_forgotten_total", "Silent peers whose endpoint is forgotten.")?,
            orphans: by_domain(
                "wgkex_worker_orphans_removed_total",
                "Routes and flood entries without a peer that were removed.",
            )?,
        };
        for domain in domains {
            metrics.set_counts(domain, PeerCounts::default());
        }
        Ok(metrics)
    }

    /// Counts new peers of `domain`.
    pub fn add_new(&self, domain: &Domain, peers: u64) {
        let peers = i64::try_from(peers).unwrap_or(i64::MAX);
        self.by_state.with_label_values(&[domain.name(), "pending"]).add(peers);
    }

    /// Sets how many peers of `domain` are in which state.
    pub fn set_counts(&self, domain: &Domain, PeerCounts { connected, idle, new, stale }: PeerCounts) {
        for (state, count) in [("connected", connected), ("idle", idle), ("pending", new), ("stale", stale)] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.by_state.with_label_values(&[domain.name(), state]).set(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_has, domain};

    #[test]
    fn every_series_is_there_from_the_start() {
        let registry = MetricsRegistry::default();
        Metrics::register(&registry, &[domain()].into()).unwrap();
        assert_has(
            &registry,
            &[
                r#"wgkex_worker_peers{domain="ffmuc_welt",state="stale"} 0"#,
                r#"wgkex_worker_sweeps_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_peers_removed_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_peers_drained_total{domain="ffmuc_welt"} 0"#,
            ],
        );
    }

    #[test]
    fn peers_are_counted_in_one_state_each() {
        let registry = MetricsRegistry::default();
        let metrics = Metrics::register(&registry, &[domain()].into()).unwrap();
        metrics.set_counts(&domain(), PeerCounts { connected: 1, idle: 2, new: 3, stale: 4 });
        for (state, count) in ["connected", "idle", "pending", "stale"].into_iter().zip(1..) {
            assert_has(&registry, &[&format!(r#"wgkex_worker_peers{{domain="ffmuc_welt",state="{state}"}} {count}"#)]);
        }
    }
}
