//! The metrics of what comes over MQTT.

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge};

use crate::metrics::Registry;

/// Why an MQTT message is ignored: its topic is none of ours, or its payload means nothing there.
const IGNORED: [&str; 2] = ["topic", "payload"];

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Messages that mean nothing, by reason.
    pub messages_ignored: IntCounterVec,
    /// Live keys given to gateways and brokers that asked.
    pub keys_given: IntCounter,
    /// Whether MQTT is connected.
    pub connected: IntGauge,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            messages_ignored: registry.counters_of(
                "wgkex_broker_mqtt_messages_ignored_total",
                "MQTT messages that mean nothing",
                "reason",
                IGNORED,
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

    #[test]
    fn every_series_is_there_from_the_start() {
        let registry = Registry::default();
        Metrics::register(&registry).unwrap();
        registry.assert_has(&["wgkex_broker_mqtt_connected 0"]);
    }
}
