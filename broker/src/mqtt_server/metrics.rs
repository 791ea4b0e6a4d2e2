//! The metrics of the embedded MQTT server.

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge};
use strum::VariantNames as _;

use crate::metrics::MetricsRegistry;
use crate::mqtt_server::acl::TopicOperation;
use crate::mqtt_server::handshake::ConnectRefusal;
use crate::mqtt_server::quota::ThrottleReason;

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Clients that are connected.
    pub clients: IntGauge,
    /// Connections that were not admitted, by reason.
    pub refused: IntCounterVec,
    /// Clients that connected while they were connected.
    pub takeovers: IntCounter,
    /// How often nothing was read from a client for a while, by reason.
    pub slowed: IntCounterVec,
    /// Operations that the access rules denied to users, by operation (label `verb`).
    pub denied: IntCounterVec,
    /// Topics with a retained message.
    pub retained: IntGauge,
    /// Messages that there was no room to retain.
    pub retained_refused: IntCounter,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        Ok(Self {
            clients: registry.gauge("wgkex_broker_mqtt_clients", "Clients of the embedded MQTT server")?,
            refused: registry.counters_of(
                "wgkex_broker_mqtt_refused_total",
                "Connections that the embedded MQTT server did not let in",
                "reason",
                ConnectRefusal::VARIANTS.iter().copied(),
            )?,
            takeovers: registry.counter(
                "wgkex_broker_mqtt_takeovers_total",
                "Connections of the embedded MQTT server that ended since their client connected again",
            )?,
            slowed: registry.counters_of(
                "wgkex_broker_mqtt_slowed_total",
                "Times that the embedded MQTT server read nothing from a client for a while",
                "reason",
                ThrottleReason::VARIANTS.iter().copied(),
            )?,
            denied: registry.counters_of(
                "wgkex_broker_mqtt_forbidden_total",
                "What users of the embedded MQTT server wanted to do and may not",
                "verb",
                TopicOperation::ALL.map(TopicOperation::word),
            )?,
            retained: registry
                .gauge("wgkex_broker_mqtt_retained", "Topics with a message kept by the embedded MQTT server")?,
            retained_refused: registry.counter(
                "wgkex_broker_mqtt_retained_refused_total",
                "Messages that the embedded MQTT server had no room to keep",
            )?,
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
        let reasons = ["protocol", "slow", "version", "client_id", "password", "guesses", "will", "full"];
        let refused = reasons.map(|reason| format!("wgkex_broker_mqtt_refused_total{{reason=\"{reason}\"}} 0"));
        assert_has(&registry, &refused.each_ref().map(String::as_str));
        assert_has(
            &registry,
            &[
                r#"wgkex_broker_mqtt_slowed_total{reason="rate"} 0"#,
                r#"wgkex_broker_mqtt_slowed_total{reason="unfinished"} 0"#,
                r#"wgkex_broker_mqtt_slowed_total{reason="behind"} 0"#,
            ],
        );
    }
}
