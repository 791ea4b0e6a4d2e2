//! The metrics of the HTTP servers.

use prometheus::{Error, HistogramVec, IntCounterVec, IntGauge};
use strum::VariantNames as _;
use wgkex_common::http::connections::Closed;

use crate::exchange::Rejection;
use crate::metrics::MetricsRegistry;

/// The versions of the key exchange, as labels.
pub const APIS: [&str; 2] = ["v1", "v2"];

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Keys that were answered with 200, by API.
    pub keys_accepted: IntCounterVec,
    /// Keys that were not, by API and reason.
    pub keys_refused: IntCounterVec,
    /// Seconds from a request's arrival to its answer, by route and status.
    pub duration: HistogramVec,
    /// Connections that are open.
    pub connections: IntGauge,
    /// Connections that were closed before their time, by reason.
    pub connections_closed: IntCounterVec,
    /// Whether two programs use one client id of MQTT, as far as this broker sees.
    pub name_in_use: IntGauge,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        let refused = "wgkex_broker_keys_refused_total";
        let keys_refused = registry.counters(refused, "Keys refused", &["api", "reason"])?;
        for api in APIS {
            for reason in Rejection::VARIANTS.iter().copied() {
                keys_refused.with_label_values(&[api, reason]);
            }
        }
        Ok(Self {
            keys_accepted: registry.counters_of(
                "wgkex_broker_keys_accepted_total",
                "Keys answered with 200",
                "api",
                APIS,
            )?,
            keys_refused,
            duration: registry.seconds_by(
                "wgkex_broker_http_request_duration_seconds",
                "Time to answer a request",
                &["route", "status"],
            )?,
            connections: registry.gauge("wgkex_broker_http_connections", "Connections that are open")?,
            connections_closed: registry.counters_of(
                "wgkex_broker_http_connections_closed_total",
                "Connections closed before their time",
                "reason",
                Closed::ALL.map(Closed::reason),
            )?,
            name_in_use: registry
                .gauge("wgkex_broker_mqtt_name_in_use", "1 while two programs seem to use one MQTT client id")?,
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
        assert_has(
            &registry,
            &[
                r#"wgkex_broker_keys_accepted_total{api="v2"} 0"#,
                r#"wgkex_broker_keys_refused_total{api="v1",reason="not_confirmed"} 0"#,
                r#"wgkex_broker_keys_refused_total{api="v2",reason="limit_client"} 0"#,
                r#"wgkex_broker_http_connections_closed_total{reason="idle"} 0"#,
                "wgkex_broker_mqtt_name_in_use 0",
            ],
        );
    }
}
