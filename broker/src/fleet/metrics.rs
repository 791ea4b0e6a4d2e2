//! The metrics of gateways, live keys and the lists that admit keys.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::{Error, IntGauge, IntGaugeVec};
use wgkex_common::Domain;
use wgkex_common::access_lists::metrics::ListMetrics;

use crate::fleet::live_keys::LiveKeyCounts;
use crate::fleet::reach::ReachCounts;
use crate::fleet::status::{DomainGateways, GatewayDomain, GatewayStatus};
use crate::metrics::{MetricsRegistry, set};

/// Gauges of objects that appear and vanish: an object that is gone has no series.
#[derive(Debug, Clone)]
struct KnownSeries<const LABELS: usize> {
    gauges: IntGaugeVec,
    known: Arc<Mutex<BTreeSet<[String; LABELS]>>>,
}

impl<const LABELS: usize> KnownSeries<LABELS> {
    fn new(gauges: IntGaugeVec) -> Self {
        Self { gauges, known: Arc::default() }
    }

    /// These series, and no others.
    fn set<'a>(&self, values: impl Iterator<Item = ([&'a str; LABELS], u64)>) {
        let mut known = self.known.lock();
        let mut gone = std::mem::take(&mut *known);
        for (labels, value) in values {
            self.gauges.with_label_values(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
            let labels = labels.map(str::to_owned);
            gone.remove(&labels);
            known.insert(labels);
        }
        for labels in &gone {
            // The series exists: only this code removes it.
            let _ = self.gauges.remove_label_values(labels);
        }
    }
}

/// Clones count into the same ones.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Whether the live keys are kept on disk.
    pub state_kept: IntGauge,
    live: IntGaugeVec,
    gateways: IntGaugeVec,
    gateway_up: KnownSeries<1>,
    gateway_draining: KnownSeries<1>,
    gateway_connected: KnownSeries<2>,
    gateway_assigned: KnownSeries<2>,
    gateway_routers: KnownSeries<2>,
    domain_gateways: IntGaugeVec,
    /// The state of the access lists.
    pub lists: ListMetrics,
}

impl Metrics {
    /// Registers them, each at 0.
    pub fn register(registry: &MetricsRegistry) -> Result<Self, Error> {
        let metrics = Self {
            state_kept: registry.gauge("wgkex_broker_state_kept", "1 while the live keys are kept on disk")?,
            live: registry.gauges("wgkex_broker_live_keys", "Live keys by state", &["domain", "state"])?,
            gateways: registry.gauges("wgkex_broker_gateways", "Gateways by state", &["state"])?,
            gateway_up: KnownSeries::new(registry.gauges(
                "wgkex_broker_gateway_up",
                "1 while the gateway is online",
                &["gateway"],
            )?),
            gateway_draining: KnownSeries::new(registry.gauges(
                "wgkex_broker_gateway_draining",
                "1 while the gateway gets no new routers",
                &["gateway"],
            )?),
            gateway_connected: KnownSeries::new(registry.gauges(
                "wgkex_broker_gateway_connected",
                "Peers with handshakes, by the gateway's last count",
                &["gateway", "domain"],
            )?),
            gateway_assigned: KnownSeries::new(registry.gauges(
                "wgkex_broker_gateway_assigned",
                "Answers that named the gateway since that count",
                &["gateway", "domain"],
            )?),
            gateway_routers: KnownSeries::new(registry.gauges(
                "wgkex_broker_gateway_routers",
                "Routers that this broker answered with the gateway in the last 20 minutes",
                &["gateway", "state"],
            )?),
            domain_gateways: registry.gauges(
                "wgkex_broker_domain_gateways",
                "Gateways that are online and serve the domain",
                &["domain"],
            )?,
            lists: ListMetrics {
                damaged: registry.gauges("wgkex_broker_lists_damaged", "1 while a list cannot be read", &["list"])?,
                keys: registry.gauges("wgkex_broker_list_keys", "Keys on each list", &["list"])?,
                kept: registry
                    .gauge("wgkex_broker_lists_kept", "1 while entries made by admin calls are kept on disk")?,
                entries_refused: registry.counters(
                    "wgkex_broker_list_entries_refused_total",
                    "List entries of other brokers that were not taken in",
                    &["reason"],
                )?,
            },
        };
        metrics.set_gateways(&[]);
        Ok(metrics)
    }

    /// Takes over how many gateways serve each domain.
    pub fn set_domains(&self, domains: &[DomainGateways]) {
        for DomainGateways { name, gateways } in domains {
            set(&self.domain_gateways.with_label_values(&[name]), gateways.len());
        }
    }

    /// Takes over how many gateways are in which state, and how many peers each has.
    pub fn set_gateways(&self, gateways: &[GatewayStatus]) {
        let online = gateways.iter().filter(|gateway| gateway.online).count();
        for (state, number) in [("online", online), ("offline", gateways.len() - online)] {
            set(&self.gateways.with_label_values(&[state]), number);
        }
        self.gateway_up.set(gateways.iter().map(|gateway| ([gateway.name.as_str()], gateway.online.into())));
        let draining = |gateway: &GatewayStatus| u64::from(!gateway.draining.is_empty());
        self.gateway_draining.set(gateways.iter().map(|gateway| ([gateway.name.as_str()], draining(gateway))));
        let domains =
            || gateways.iter().flat_map(|gateway| gateway.domains.iter().map(move |domain| (gateway, domain)));
        let peers = |of: fn(&GatewayDomain) -> u64| {
            domains().map(move |(gateway, domain)| ([gateway.name.as_str(), domain.domain.as_str()], of(domain)))
        };
        self.gateway_connected.set(peers(|domain| domain.connected));
        self.gateway_assigned.set(peers(|domain| domain.assigned));
        let routers = |gateway: &GatewayStatus| {
            let ReachCounts { reached, waiting, unreached } = gateway.reach;
            [("reached", reached), ("waiting", waiting), ("unreached", unreached)]
        };
        self.gateway_routers.set(gateways.iter().flat_map(|gateway| {
            let name = gateway.name.as_str();
            routers(gateway).map(move |(state, number)| ([name, state], number))
        }));
    }

    /// Takes over how many live keys there are.
    pub fn set_live<'a>(&self, counts: impl Iterator<Item = (&'a Domain, LiveKeyCounts)>) {
        for (domain, LiveKeyCounts { established, unestablished, unrequested }) in counts {
            for (state, number) in [("proven", established), ("unproven", unestablished), ("claimed", unrequested)] {
                set(&self.live.with_label_values(&[domain.name(), state]), number);
            }
        }
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
        assert_has(&registry, &[r#"wgkex_broker_gateways{state="online"} 0"#]);
    }

    #[test]
    fn a_gateway_has_series_as_long_as_it_is_known() {
        use crate::fleet::status::{DrainSource, Draining, GatewayDomainState};

        let registry = MetricsRegistry::default();
        let metrics = Metrics::register(&registry).unwrap();
        let domain =
            |connected| GatewayDomain { domain: "ff_a".into(), state: GatewayDomainState::Up, connected, assigned: 2 };
        let drain = wgkex_common::wire::drain::Drain { since: 7, until: None, reason: None, deadline: None };
        let draining = Draining { by: DrainSource::Broker, drain };
        let gateway = |name: &str, online, connected| GatewayStatus {
            name: name.into(),
            online,
            draining: if online { vec![draining.clone()] } else { Vec::new() },
            version: None,
            offline: None,
            domains: vec![domain(connected)],
            connected,
            assigned: 2,
            reach: ReachCounts { reached: 4, waiting: 5, unreached: 6 },
            weight: 1.0,
            share: 1.0,
            target: 1.0,
            last_known_secs: None,
        };
        metrics.set_gateways(&[gateway("gw1", true, 7), gateway("gw2", false, 0)]);
        metrics.set_domains(&[DomainGateways { name: "ff_a".into(), gateways: Vec::new() }]);
        assert_has(
            &registry,
            &[
                r#"wgkex_broker_gateway_up{gateway="gw1"} 1"#,
                r#"wgkex_broker_gateway_up{gateway="gw2"} 0"#,
                r#"wgkex_broker_gateway_draining{gateway="gw1"} 1"#,
                r#"wgkex_broker_gateway_draining{gateway="gw2"} 0"#,
                r#"wgkex_broker_gateway_connected{domain="ff_a",gateway="gw1"} 7"#,
                r#"wgkex_broker_gateway_assigned{domain="ff_a",gateway="gw1"} 2"#,
                r#"wgkex_broker_gateway_routers{gateway="gw1",state="reached"} 4"#,
                r#"wgkex_broker_gateway_routers{gateway="gw1",state="waiting"} 5"#,
                r#"wgkex_broker_gateway_routers{gateway="gw1",state="unreached"} 6"#,
                r#"wgkex_broker_domain_gateways{domain="ff_a"} 0"#,
            ],
        );
        metrics.set_gateways(&[gateway("gw2", true, 0)]);
        let text = String::from_utf8(registry.text().unwrap()).unwrap();
        assert!(!text.contains("gw1") && text.contains(r#"wgkex_broker_gateway_up{gateway="gw2"} 1"#), "{text}");
    }
}
