//! The metrics of the key exchange.

use prometheus::{Error, Histogram, IntCounter};

use crate::metrics::MetricsRegistry;

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Seconds from publishing a key to a gateway's confirmation of it.
    pub confirmation: Histogram,
    /// Gateways that did not confirm a key in their time.
    pub confirmations_missed: IntCounter,
    /// Keys of version 1 for a domain of which no gateway has ever published its state.
    pub keys_unwitnessed: IntCounter,
    /// Keys that MQTT did not acknowledge in time.
    pub publish_failures: IntCounter,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        Ok(Self {
            confirmation: registry
                .seconds("wgkex_broker_confirmation_seconds", "Time from publishing a key to its confirmation")?,
            confirmations_missed: registry
                .counter("wgkex_broker_confirmations_missed_total", "Gateways that did not confirm in time")?,
            keys_unwitnessed: registry.counter(
                "wgkex_broker_keys_unwitnessed_total",
                "Keys of v1 answered with 200 for domains of which no gateway has ever published its state",
            )?,
            publish_failures: registry
                .counter("wgkex_broker_publish_failures_total", "Keys that MQTT did not acknowledge in time")?,
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
        assert_has(&registry, &["wgkex_broker_confirmation_seconds_count 0", "wgkex_broker_publish_failures_total 0"]);
    }
}
