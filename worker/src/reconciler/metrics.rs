//! The metrics of the reconciler: keys that arrive, batches, outcomes of keys, and domains.

use std::collections::BTreeSet;

use prometheus::{Error, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, exponential_buckets};
use wgkex_common::runtime::metrics::MetricsRegistry;
use wgkex_common::{Domain, RejectReason};

use crate::peers;

/// The label of a queue that was full when a key was dropped.
pub const DROPPED: [&str; 2] = ["queue", "waiting"];

/// Clones share the metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Keys that arrived over MQTT, by domain.
    pub keys_received: IntCounterVec,
    /// Keys that are in the kernel and were not before, by domain.
    pub keys_installed: IntCounterVec,
    /// Keys that arrived again and are in the kernel, by domain.
    pub keys_refreshed: IntCounterVec,
    /// Keys that are not in the kernel, by domain and reason.
    pub keys_failed: IntCounterVec,
    /// Keys whose lost peer, route or flood entry was set again, by domain.
    pub keys_restored: IntCounterVec,
    /// Live keys that brokers know and this gateway lacked, by domain.
    pub keys_learnt: IntCounterVec,
    /// Keys dropped because a queue was full, by queue: `queue` or `waiting`.
    pub keys_dropped: IntCounterVec,
    /// Keys that wait to be taken into a batch.
    pub queue_length: IntGauge,
    /// Keys per batch.
    pub batch_keys: Histogram,
    /// Seconds that the kernel took per batch.
    pub batch_duration: Histogram,
    /// Confirmations dropped because the queue to MQTT was full.
    pub confirmations_dropped: IntCounter,
    /// Whether the keys are kept on disk.
    pub state_kept: IntGauge,
    /// Failed reads of the tables, by domain.
    pub read_failures: IntCounterVec,
    /// Whether a domain's interfaces exist and can be used by routers, by domain.
    pub domain_up: IntGaugeVec,
    /// The metrics of peers.
    pub peers: peers::Metrics,
}

impl Metrics {
    /// Registers them for `domains`, each at 0.
    pub fn register(registry: &MetricsRegistry, domains: &BTreeSet<Domain>) -> Result<Self, Error> {
        let counter = |name, help| registry.counter(name, help);
        let gauge = |name, help| registry.gauge(name, help);
        let names = || domains.iter().map(Domain::name);
        let by_domain = |name, help| registry.counters_of(name, help, "domain", names());
        let metrics = Self {
            keys_received: by_domain("wgkex_worker_keys_received_total", "Keys that came over MQTT.")?,
            keys_installed: by_domain("wgkex_worker_keys_installed_total", "Keys newly in the kernel.")?,
            keys_refreshed: by_domain("wgkex_worker_keys_refreshed_total", "Keys that came again.")?,
            keys_failed: registry.counters(
                "wgkex_worker_keys_failed_total",
                "Keys that are not in the kernel.",
                &["domain", "reason"],
            )?,
            keys_restored: by_domain("wgkex_worker_keys_restored_total", "Keys of which something lost was restored.")?,
            keys_learnt: by_domain("wgkex_worker_keys_learnt_total", "Live keys from a broker that were lacking.")?,
            keys_dropped: registry.counters_of(
                "wgkex_worker_keys_dropped_total",
                "Keys that too many others crowded out.",
                "place",
                DROPPED,
            )?,
            queue_length: gauge("wgkex_worker_queue_length", "Keys that wait for a batch.")?,
            batch_keys: registry.histogram(
                "wgkex_worker_batch_keys",
                "Keys per batch.",
                exponential_buckets(1.0, 4.0, 7)?,
            )?,
            batch_duration: registry.histogram(
                "wgkex_worker_batch_duration_seconds",
                "Time in the kernel per batch.",
                exponential_buckets(0.000_25, 4.0, 9)?,
            )?,
            confirmations_dropped: counter(
                "wgkex_worker_confirmations_dropped_total",
                "Confirmations that MQTT did not take.",
            )?,
            state_kept: gauge("wgkex_worker_state_kept", "1 while the keys are kept on disk.")?,
            read_failures: by_domain("wgkex_worker_read_failures_total", "Failed reads of the tables.")?,
            domain_up: registry.gauges(
                "wgkex_worker_domain_up",
                "1 if routers can use the domain here.",
                &["domain"],
            )?,
            peers: peers::Metrics::register(registry, domains)?,
        };
        for domain in names() {
            metrics.domain_up.with_label_values(&[domain]);
            for reason in RejectReason::of_requested_keys() {
                metrics.keys_failed.with_label_values(&[domain, reason.as_ref()]);
            }
        }
        Ok(metrics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_has, domain};

    #[test]
    fn every_series_is_there_at_0_from_the_start() {
        let registry = MetricsRegistry::default();
        Metrics::register(&registry, &[domain()].into()).unwrap();
        assert_has(
            &registry,
            &[
                r#"wgkex_worker_keys_received_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_keys_installed_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_keys_refreshed_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_keys_restored_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="own key"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="reserved"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="address taken"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="full"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="denied"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="interface"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="interrupted"} 0"#,
                r#"wgkex_worker_keys_failed_total{domain="ffmuc_welt",reason="kernel"} 0"#,
                r#"wgkex_worker_keys_dropped_total{place="queue"} 0"#,
                r#"wgkex_worker_keys_dropped_total{place="waiting"} 0"#,
                r#"wgkex_worker_read_failures_total{domain="ffmuc_welt"} 0"#,
                r#"wgkex_worker_domain_up{domain="ffmuc_welt"} 0"#,
                "wgkex_worker_confirmations_dropped_total 0",
                "wgkex_worker_batch_keys_count 0",
                "wgkex_worker_batch_duration_seconds_count 0",
                "wgkex_worker_queue_length 0",
            ],
        );
    }
}
