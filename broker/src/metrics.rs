//! What the broker counts, in Prometheus's text format: base units, no key and no address in a label.

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector,
};
use wgkex_common::Domain;
use wgkex_common::access_lists::service::ListUpdate;
use wgkex_common::access_lists::{List, files};
use wgkex_common::http::connections::Closed;

use crate::exchange::Refusal;
use crate::fleet::gateways::Overview;
use crate::fleet::live_keys::Counts;
use crate::mqtt_server;
use crate::mqtt_server::acl::Operation;

/// The ways a key can come.
pub const APIS: [&str; 2] = ["v1", "v2"];

/// Why an MQTT message is ignored: its topic is none of ours, or its payload means nothing there.
pub const IGNORED: [&str; 2] = ["topic", "payload"];

/// Seconds, from what a local gateway takes to more than the longest budget in use.
const SECONDS: [f64; 13] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The broker's metrics. Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    /// Keys that were answered with 200, by API.
    pub keys_accepted: IntCounterVec,
    /// Keys that were not, by API and reason, one of [`Refusal::REASONS`].
    pub keys_refused: IntCounterVec,
    /// Seconds from a request's arrival to its answer, by route and status.
    pub http_duration: HistogramVec,
    /// Connections that were closed before their time, by reason, one of [`Closed::REASONS`].
    pub connections_closed: IntCounterVec,
    /// Seconds from publishing a key to a gateway's confirmation of it.
    pub confirmation: Histogram,
    /// Gateways that did not confirm a key in their time.
    pub confirmations_missed: IntCounter,
    /// Keys of version 1 for a domain of which no gateway has ever published its state.
    pub keys_unwitnessed: IntCounter,
    /// Keys that MQTT did not acknowledge in time.
    pub publish_failures: IntCounter,
    /// MQTT messages that mean nothing, by reason, one of [`IGNORED`].
    pub messages_ignored: IntCounterVec,
    /// Live keys given to gateways and brokers that asked.
    pub keys_given: IntCounter,
    /// Whether the live keys are kept on disk.
    pub state_kept: IntGauge,
    /// Whether MQTT is connected.
    pub mqtt_connected: IntGauge,
    connections: IntGauge,
    /// Clients of the embedded MQTT server.
    pub mqtt_clients: IntGauge,
    /// Connections that it did not let in, by reason, see [`mqtt_server::Refusal`].
    pub mqtt_refused: IntCounterVec,
    /// How often it read nothing from a client for a while, by reason, see [`mqtt_server::Slowed`].
    pub mqtt_slowed: IntCounterVec,
    /// What its users wanted and may not, by operation (label `verb`).
    pub mqtt_forbidden: IntCounterVec,
    /// Topics of which it keeps a message.
    pub mqtt_retained: IntGauge,
    /// Messages that it had no room to keep.
    pub mqtt_retained_refused: IntCounter,
    live: IntGaugeVec,
    gateways: IntGaugeVec,
    lists_damaged: IntGaugeVec,
    list_keys: IntGaugeVec,
    lists_kept: IntGauge,
    list_entries_refused: IntCounterVec,
}

impl Metrics {
    /// All metrics, there and at 0.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name, help| register(&registry, IntCounter::new(name, help)?);
        let counters =
            |name, help, labels: &[&str]| register(&registry, IntCounterVec::new(Opts::new(name, help), labels)?);
        let gauge = |name, help| register(&registry, IntGauge::new(name, help)?);
        let gauges =
            |name, help, labels: &[&str]| register(&registry, IntGaugeVec::new(Opts::new(name, help), labels)?);
        let version = gauges("wgkex_broker_build_info", "1, with the version", &["version"])?;
        version.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            keys_accepted: counters("wgkex_broker_keys_accepted_total", "Keys answered with 200", &["api"])?,
            keys_refused: counters("wgkex_broker_keys_refused_total", "Keys refused", &["api", "reason"])?,
            http_duration: register(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new("wgkex_broker_http_request_duration_seconds", "Time to answer a request")
                        .buckets(SECONDS.into()),
                    &["route", "status"],
                )?,
            )?,
            connections: gauge("wgkex_broker_http_connections", "Connections that are open")?,
            connections_closed: counters(
                "wgkex_broker_http_connections_closed_total",
                "Connections closed before their time",
                &["reason"],
            )?,
            confirmation: register(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "wgkex_broker_confirmation_seconds",
                        "Time from publishing a key to its confirmation",
                    )
                    .buckets(SECONDS.into()),
                )?,
            )?,
            confirmations_missed: counter(
                "wgkex_broker_confirmations_missed_total",
                "Gateways that did not confirm in time",
            )?,
            keys_unwitnessed: counter(
                "wgkex_broker_keys_unwitnessed_total",
                "Keys of v1 answered with 200 for domains of which no gateway has ever published its state",
            )?,
            publish_failures: counter(
                "wgkex_broker_publish_failures_total",
                "Keys that MQTT did not acknowledge in time",
            )?,
            messages_ignored: counters(
                "wgkex_broker_mqtt_messages_ignored_total",
                "MQTT messages that mean nothing",
                &["reason"],
            )?,
            keys_given: counter("wgkex_broker_keys_given_total", "Live keys given to whoever asked for them")?,
            state_kept: gauge("wgkex_broker_state_kept", "1 while the live keys are kept on disk")?,
            live: gauges("wgkex_broker_live_keys", "Live keys by state", &["domain", "state"])?,
            mqtt_connected: gauge("wgkex_broker_mqtt_connected", "1 while MQTT is connected")?,
            lists_damaged: gauges("wgkex_broker_lists_damaged", "1 while a list cannot be read", &["list"])?,
            list_keys: gauges("wgkex_broker_list_keys", "Keys on each list", &["list"])?,
            lists_kept: gauge("wgkex_broker_lists_kept", "1 while entries made by admin calls are kept on disk")?,
            list_entries_refused: counters(
                "wgkex_broker_list_entries_refused_total",
                "List entries of other brokers that were not taken in",
                &["reason"],
            )?,
            mqtt_clients: gauge("wgkex_broker_mqtt_clients", "Clients of the embedded MQTT server")?,
            mqtt_refused: counters(
                "wgkex_broker_mqtt_refused_total",
                "Connections that the embedded MQTT server did not let in",
                &["reason"],
            )?,
            mqtt_slowed: counters(
                "wgkex_broker_mqtt_slowed_total",
                "Times that the embedded MQTT server read nothing from a client for a while",
                &["reason"],
            )?,
            mqtt_forbidden: counters(
                "wgkex_broker_mqtt_forbidden_total",
                "What users of the embedded MQTT server wanted to do and may not",
                &["verb"],
            )?,
            mqtt_retained: gauge(
                "wgkex_broker_mqtt_retained",
                "Topics with a message kept by the embedded MQTT server",
            )?,
            mqtt_retained_refused: counter(
                "wgkex_broker_mqtt_retained_refused_total",
                "Messages that the embedded MQTT server had no room to keep",
            )?,
            gateways: gauges("wgkex_broker_gateways", "Gateways by state", &["state"])?,
            registry,
        };
        metrics.begin();
        Ok(metrics)
    }

    fn begin(&self) {
        for api in APIS {
            self.keys_accepted.with_label_values(&[api]);
            for reason in Refusal::REASONS {
                self.keys_refused.with_label_values(&[api, reason]);
            }
        }
        for reason in IGNORED {
            self.messages_ignored.with_label_values(&[reason]);
        }
        for reason in Closed::REASONS {
            self.connections_closed.with_label_values(&[reason]);
        }
        for refusal in mqtt_server::Refusal::ALL {
            self.mqtt_refused.with_label_values(&[refusal.reason()]);
        }
        for slowed in mqtt_server::Slowed::ALL {
            self.mqtt_slowed.with_label_values(&[slowed.reason()]);
        }
        for operation in Operation::ALL {
            self.mqtt_forbidden.with_label_values(&[operation.word()]);
        }
        self.set_gateways(&[]);
    }

    /// Takes over how many gateways are in which state.
    pub fn set_gateways(&self, gateways: &[Overview]) {
        let online = gateways.iter().filter(|gateway| gateway.online).count();
        for (state, number) in [("online", online), ("offline", gateways.len() - online)] {
            self.gateways.with_label_values(&[state]).set(i64::try_from(number).unwrap_or(i64::MAX));
        }
    }

    /// Takes over how many connections there are.
    pub fn set_connections(&self, open: usize) {
        self.connections.set(i64::try_from(open).unwrap_or(i64::MAX));
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

    /// Takes over how many live keys there are.
    pub fn set_live<'a>(&self, counts: impl Iterator<Item = (&'a Domain, Counts)>) {
        for (domain, Counts { proven, unproven, claimed }) in counts {
            for (state, number) in [("proven", proven), ("unproven", unproven), ("claimed", claimed)] {
                self.live.with_label_values(&[domain.name(), state]).set(i64::try_from(number).unwrap_or(i64::MAX));
            }
        }
    }

    /// The text that Prometheus scrapes.
    pub fn text(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_there_from_the_start() {
        let text = String::from_utf8(Metrics::new().unwrap().text().unwrap()).unwrap();
        for line in [
            r#"wgkex_broker_keys_accepted_total{api="v2"} 0"#,
            r#"wgkex_broker_keys_refused_total{api="v1",reason="not_confirmed"} 0"#,
            r#"wgkex_broker_keys_refused_total{api="v2",reason="limit_client"} 0"#,
            r#"wgkex_broker_http_connections_closed_total{reason="idle"} 0"#,
            r#"wgkex_broker_gateways{state="online"} 0"#,
            "wgkex_broker_confirmation_seconds_count 0",
            "wgkex_broker_publish_failures_total 0",
            "wgkex_broker_mqtt_connected 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
    }
}
