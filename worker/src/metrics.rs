//! What the worker counts, in Prometheus's text format: base units, no key and no address in a label.

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector, exponential_buckets,
};
use wgkex_common::access_lists::service::ListUpdate;
use wgkex_common::access_lists::{List, files};
use wgkex_common::{Domain, RejectReason};

use crate::peers::Counts;

/// Why a key did not come to stand; also what a confirmation says of it.
pub const FAILURES: [RejectReason; 8] = [
    RejectReason::OwnKey,
    RejectReason::Reserved,
    RejectReason::AddressTaken,
    RejectReason::Full,
    RejectReason::Denied,
    RejectReason::Interface,
    RejectReason::Interrupted,
    RejectReason::Kernel,
];

/// The worker's metrics. Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    /// Keys that came over MQTT, by domain.
    pub keys_received: IntCounterVec,
    /// Keys that stand in the kernel and did not before, by domain.
    pub keys_installed: IntCounterVec,
    /// Keys that came again and stand, by domain.
    pub keys_refreshed: IntCounterVec,
    /// Keys that did not come to stand, by domain and reason, one of [`FAILURES`].
    pub keys_failed: IntCounterVec,
    /// Keys dropped because too many came, by the place that was full: `queue` or `waiting`.
    pub keys_dropped: IntCounterVec,
    /// Confirmations dropped because MQTT did not take them.
    pub confirmations_dropped: IntCounter,
    /// MQTT messages that say nothing to a worker, by reason, one of [`IGNORED`].
    pub messages_ignored: IntCounterVec,
    /// Keys per batch.
    pub batch_keys: Histogram,
    /// Seconds that the kernel took per batch.
    pub batch_duration: Histogram,
    /// Keys that wait to be taken into a batch.
    pub queue_length: IntGauge,
    peers: IntGaugeVec,
    /// Keys whose lost peer, route or flood entry was set again, by domain.
    pub keys_restored: IntCounterVec,
    /// Live keys that brokers know and this gateway lacked, by domain.
    pub keys_learnt: IntCounterVec,
    /// Routes and flood entries without a peer that were removed, by domain.
    pub orphans_removed: IntCounterVec,
    /// Whether the keys are kept on disk.
    pub state_kept: IntGauge,
    /// Peers removed because their keys may not be here, by domain.
    pub peers_revoked: IntCounterVec,
    lists_damaged: IntGaugeVec,
    list_keys: IntGaugeVec,
    lists_kept: IntGauge,
    list_entries_refused: IntCounterVec,
    /// Looks for stale peers, by domain.
    pub sweeps: IntCounterVec,
    /// Stale peers removed, by domain.
    pub peers_removed: IntCounterVec,
    /// Peers removed because others needed their place or have their address, by domain.
    pub peers_ousted: IntCounterVec,
    /// Silent peers whose endpoint the kernel was made to forget, by domain.
    pub peers_forgotten: IntCounterVec,
    /// Failed reads of the tables, by domain.
    pub read_failures: IntCounterVec,
    /// Whether a domain's interfaces are there and fit for routers, by domain.
    pub domain_up: IntGaugeVec,
    /// Whether MQTT is connected.
    pub mqtt_connected: IntGauge,
    /// MQTT messages that could not be published.
    pub mqtt_publish_failures: IntCounter,
}

/// Why a message is ignored: its topic is none of ours, its domain is not served, its payload is no key.
pub const IGNORED: [&str; 3] = ["topic", "domain", "payload"];

/// Why keys are dropped.
const DROPPED: [&str; 2] = ["queue", "waiting"];

const STATES: [&str; 4] = ["connected", "idle", "pending", "stale"];

impl Metrics {
    /// The metrics of a worker of `domains`, all of them there and at 0.
    pub fn new<'a>(domains: impl IntoIterator<Item = &'a Domain>) -> Result<Self, prometheus::Error> {
        let metrics = Self::register(Registry::new())?;
        for domain in domains {
            metrics.begin(domain.name());
        }
        for reason in IGNORED {
            metrics.messages_ignored.with_label_values(&[reason]);
        }
        for place in DROPPED {
            metrics.keys_dropped.with_label_values(&[place]);
        }
        Ok(metrics)
    }

    fn register(registry: Registry) -> Result<Self, prometheus::Error> {
        let r = &registry;
        info(r)?;
        Ok(Self {
            keys_received: counters(r, "keys_received", "Keys that came over MQTT.", &["domain"])?,
            keys_installed: counters(r, "keys_installed", "Keys newly in the kernel.", &["domain"])?,
            keys_refreshed: counters(r, "keys_refreshed", "Keys that came again.", &["domain"])?,
            keys_failed: counters(r, "keys_failed", "Keys that are not in the kernel.", &["domain", "reason"])?,
            keys_dropped: counters(r, "keys_dropped", "Keys that too many others crowded out.", &["place"])?,
            confirmations_dropped: counter(r, "confirmations_dropped", "Confirmations that MQTT did not take.")?,
            messages_ignored: counters(r, "messages_ignored", "MQTT messages without sense.", &["reason"])?,
            batch_keys: histogram(r, "batch_keys", "Keys per batch.", exponential_buckets(1.0, 4.0, 7)?)?,
            batch_duration: histogram(
                r,
                "batch_duration_seconds",
                "Time in the kernel per batch.",
                exponential_buckets(0.000_25, 4.0, 9)?,
            )?,
            queue_length: gauge(r, "queue_length", "Keys that wait for a batch.")?,
            peers: gauges(r, "peers", "Peers, each in one state.", &["domain", "state"])?,
            keys_restored: counters(r, "keys_restored", "Keys of which something lost was restored.", &["domain"])?,
            keys_learnt: counters(r, "keys_learnt", "Live keys from a broker that were lacking.", &["domain"])?,
            orphans_removed: counters(
                r,
                "orphans_removed",
                "Routes and flood entries without a peer that were removed.",
                &["domain"],
            )?,
            state_kept: gauge(r, "state_kept", "1 while the keys are kept on disk.")?,
            peers_revoked: counters(r, "peers_revoked", "Peers of keys that may not be here, removed.", &["domain"])?,
            lists_damaged: gauges(r, "lists_damaged", "1 while a list cannot be read.", &["list"])?,
            list_keys: gauges(r, "list_keys", "Keys on each list.", &["list"])?,
            lists_kept: gauge(r, "lists_kept", "1 while entries made by admin calls are kept on disk.")?,
            list_entries_refused: counters(
                r,
                "list_entries_refused",
                "List entries of brokers that were not taken in.",
                &["reason"],
            )?,
            sweeps: counters(r, "sweeps", "Looks for stale peers.", &["domain"])?,
            peers_removed: counters(r, "peers_removed", "Stale peers removed.", &["domain"])?,
            peers_ousted: counters(r, "peers_ousted", "Peers that others took the place of.", &["domain"])?,
            peers_forgotten: counters(r, "peers_forgotten", "Silent peers whose endpoint is forgotten.", &["domain"])?,
            read_failures: counters(r, "read_failures", "Failed reads of the tables.", &["domain"])?,
            domain_up: gauges(r, "domain_up", "1 if routers can use the domain here.", &["domain"])?,
            mqtt_connected: gauge(r, "mqtt_connected", "1 while MQTT is connected.")?,
            mqtt_publish_failures: counter(r, "mqtt_publish_failures", "Messages that could not be published.")?,
            registry,
        })
    }

    fn begin(&self, domain: &str) {
        let by_domain = [
            &self.keys_received,
            &self.keys_installed,
            &self.keys_refreshed,
            &self.keys_restored,
            &self.keys_learnt,
            &self.orphans_removed,
            &self.peers_revoked,
            &self.sweeps,
            &self.peers_removed,
            &self.read_failures,
        ];
        for counter in by_domain {
            counter.with_label_values(&[domain]);
        }
        for reason in FAILURES {
            self.keys_failed.with_label_values(&[domain, reason.as_ref()]);
        }
        self.domain_up.with_label_values(&[domain]);
        self.set_peers(domain, Counts::default());
    }

    /// Takes over how the lists are.
    pub fn set_lists(&self, news: &ListUpdate<'_>) {
        for list in files::SOURCES {
            self.lists_damaged.with_label_values(&[list]).set(i64::from(news.damaged.contains(&list)));
        }
        for list in List::ALL {
            let keys = i64::try_from(news.admission.len(list)).unwrap_or(i64::MAX);
            self.list_keys.with_label_values(&[list.name()]).set(keys);
        }
        self.lists_kept.set(i64::from(news.is_kept));
        for (reason, number) in news.refused.by_reason() {
            let refused = self.list_entries_refused.with_label_values(&[reason]);
            refused.inc_by(number.saturating_sub(refused.get()));
        }
    }

    /// Sets how many peers of `domain` are in which state.
    pub fn set_peers(&self, domain: &str, counts: Counts) {
        let Counts { connected, idle, pending, stale } = counts;
        for (state, count) in STATES.into_iter().zip([connected, idle, pending, stale]) {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.peers.with_label_values(&[domain, state]).set(count);
        }
    }

    /// All of it in the text format.
    pub fn text(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

fn info(registry: &Registry) -> Result<(), prometheus::Error> {
    let info = gauges(registry, "build_info", "Always 1; the label says which program this is.", &["version"])?;
    info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    Ok(())
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    enlist(registry, IntCounter::with_opts(opts(&format!("{name}_total"), help))?)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    enlist(registry, IntCounterVec::new(opts(&format!("{name}_total"), help), labels)?)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    enlist(registry, IntGauge::with_opts(opts(name, help))?)
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    enlist(registry, IntGaugeVec::new(opts(name, help), labels)?)
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: Vec<f64>) -> Result<Histogram, prometheus::Error> {
    enlist(registry, Histogram::with_opts(HistogramOpts::from(opts(name, help)).buckets(buckets))?)
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("wgkex").subsystem("worker")
}

fn enlist<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::domain;

    #[test]
    fn every_series_is_there_at_0_from_the_start() {
        let text = String::from_utf8(Metrics::new([&domain()]).unwrap().text().unwrap()).unwrap();
        for series in [
            r#"keys_received_total{domain="ffmuc_welt"} 0"#,
            r#"keys_installed_total{domain="ffmuc_welt"} 0"#,
            r#"keys_refreshed_total{domain="ffmuc_welt"} 0"#,
            r#"keys_restored_total{domain="ffmuc_welt"} 0"#,
            r#"keys_failed_total{domain="ffmuc_welt",reason="own key"} 0"#,
            r#"keys_failed_total{domain="ffmuc_welt",reason="address taken"} 0"#,
            r#"keys_failed_total{domain="ffmuc_welt",reason="denied"} 0"#,
            r#"keys_failed_total{domain="ffmuc_welt",reason="interface"} 0"#,
            r#"keys_failed_total{domain="ffmuc_welt",reason="interrupted"} 0"#,
            r#"keys_failed_total{domain="ffmuc_welt",reason="kernel"} 0"#,
            r#"keys_dropped_total{place="queue"} 0"#,
            r#"keys_dropped_total{place="waiting"} 0"#,
            r#"messages_ignored_total{reason="payload"} 0"#,
            r#"peers{domain="ffmuc_welt",state="stale"} 0"#,
            r#"sweeps_total{domain="ffmuc_welt"} 0"#,
            r#"peers_removed_total{domain="ffmuc_welt"} 0"#,
            r#"read_failures_total{domain="ffmuc_welt"} 0"#,
            r#"domain_up{domain="ffmuc_welt"} 0"#,
            "confirmations_dropped_total 0",
            "batch_keys_count 0",
            "batch_duration_seconds_count 0",
            "queue_length 0",
            "mqtt_connected 0",
            "mqtt_publish_failures_total 0",
        ] {
            assert!(text.contains(&format!("\nwgkex_worker_{series}\n")), "{series} is not in\n{text}");
        }
        assert!(text.contains(&format!(r#"wgkex_worker_build_info{{version="{}"}} 1"#, env!("CARGO_PKG_VERSION"))));
    }

    #[test]
    fn peers_are_counted_in_one_state_each() {
        let metrics = Metrics::new([&domain()]).unwrap();
        metrics.set_peers("ffmuc_welt", Counts { connected: 1, idle: 2, pending: 3, stale: 4 });
        let text = String::from_utf8(metrics.text().unwrap()).unwrap();
        for (state, count) in STATES.into_iter().zip(1..) {
            assert!(text.contains(&format!(r#"peers{{domain="ffmuc_welt",state="{state}"}} {count}"#)));
        }
    }
}
