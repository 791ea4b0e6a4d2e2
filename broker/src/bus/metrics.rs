//! The metrics of messages that the broker receives by MQTT.

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge};
use wgkex_common::wire::ignored::Ignored;

use crate::metrics::MetricsRegistry;

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Messages that were ignored, by reason.
    pub messages_ignored: IntCounterVec,
    /// Live keys in snapshot chunks.
    pub keys_given: IntCounter,
    /// Whether MQTT is connected.
    pub connected: IntGauge,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        Ok(Self {
            messages_ignored: registry.counters_of(
                "wgkex_broker_mqtt_messages_ignored_total",
                "MQTT messages that mean nothing",
                "reason",
                [Ignored::Topic, Ignored::Payload],
            )?,
            keys_given: registry
                .counter("wgkex_broker_keys_given_total", "Live keys given to whoever asked for them")?,
            connected: registry.gauge("wgkex_broker_mqtt_connected", "1 while MQTT is connected")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::assert_has;

    #[test]
    fn every_series_is_there_from_the_start() {
        let registry = MetricsRegistry::default();
        Metrics::register(&registry).unwrap();
        assert_has(&registry, &["wgkex_broker_mqtt_connected 0"]);
    }
}
