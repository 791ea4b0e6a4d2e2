//! The metrics of MQTT.

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge};
use wgkex_common::runtime::metrics::MetricsRegistry;
use wgkex_common::wire::ignored::Ignored;

/// Clones share the metrics.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// MQTT messages that a worker ignores, by reason.
    pub messages_ignored: IntCounterVec,
    /// Whether MQTT is connected.
    pub connected: IntGauge,
    /// Whether another program may use the name of this worker.
    pub name_in_use: IntGauge,
    /// Whether the gateway drains.
    pub draining: IntGauge,
    /// MQTT messages that could not be published.
    pub publish_failures: IntCounter,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        Ok(Self {
            messages_ignored: registry.counters_of(
                "wgkex_worker_messages_ignored_total",
                "MQTT messages without sense.",
                "reason",
                [Ignored::Topic, Ignored::Domain, Ignored::Payload],
            )?,
            connected: registry.gauge("wgkex_worker_mqtt_connected", "1 while MQTT is connected.")?,
            name_in_use: registry.gauge(
                "wgkex_worker_mqtt_name_in_use",
                "1 while another program seems to use this worker's MQTT client ids.",
            )?,
            draining: registry.gauge("wgkex_worker_draining", "1 while the gateway gets no new routers.")?,
            publish_failures: registry
                .counter("wgkex_worker_mqtt_publish_failures_total", "Messages that could not be published.")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_has;

    #[test]
    fn every_series_is_there_at_0_from_the_start() {
        let registry = MetricsRegistry::default();
        Metrics::register(&registry).unwrap();
        assert_has(
            &registry,
            &[
                r#"wgkex_worker_messages_ignored_total{reason="payload"} 0"#,
                "wgkex_worker_mqtt_connected 0",
                "wgkex_worker_mqtt_name_in_use 0",
                "wgkex_worker_draining 0",
                "wgkex_worker_mqtt_publish_failures_total 0",
            ],
        );
    }
}
