//! The brokers that have leases, and the selection of those to ask next. Pure.

use std::collections::BTreeMap;

use wgkex_common::BrokerName;

use super::source::{LeaseSource, Offer};

/// Brokers that are remembered at most.
const OFFERS_MAX: usize = 1024;

/// The brokers that have leases of this worker's servers.
#[derive(Debug, Default)]
pub(super) struct Brokers {
    offers: BTreeMap<BrokerName, Offer>,
    /// The broker that was last asked for leases of the registry.
    asked: Option<BrokerName>,
}

impl Brokers {
    /// A broker offers leases.
    pub fn on_online(&mut self, name: BrokerName, offer: Offer) {
        if self.offers.len() < OFFERS_MAX {
            self.offers.insert(name, offer);
        }
    }

    /// A broker no longer has leases, or is offline: its answer or its last change may be lost. Returns the leases for
    /// which another broker has to be asked.
    pub fn on_offline(&mut self, name: &BrokerName) -> Option<Offer> {
        let gone = self.offers.remove(name)?;
        let is_elsewhere = self.offers.values().any(|offer| offer.registry);
        (gone.registry && is_elsewhere).then_some(Offer { registry: true, tenants: false })
    }

    /// The brokers to ask for the leases of a source: the next one of those with a registry; all of those with tenants,
    /// since only one of them knows the leases.
    pub fn next(&mut self, source: &LeaseSource) -> Vec<BrokerName> {
        let brokers: Vec<_> =
            self.offers.iter().filter(|(_, offer)| source.is_at(**offer)).map(|(name, _)| name.clone()).collect();
        if let LeaseSource::Tenants(_) = source {
            return brokers;
        }
        let is_later = |name: &&BrokerName| self.asked.as_ref().is_none_or(|asked| *name > asked);
        let next = brokers.iter().find(is_later).or_else(|| brokers.first()).cloned();
        if next.is_some() {
            self.asked.clone_from(&next);
        }
        next.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use wgkex_common::config::Config;

    use super::*;
    use crate::leases::server::sources;

    const REGISTRY: Offer = Offer { registry: true, tenants: false };
    const TENANTS: Offer = Offer { registry: false, tenants: true };

    fn name(name: &str) -> BrokerName {
        name.parse().unwrap()
    }

    fn server() -> LeaseSource {
        let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nservers: {s1: {network: 10.77.0.0/24, listen_port: 1}}";
        sources(&Config::parse("", yaml, "gw1").unwrap()).remove(0).1
    }

    #[test]
    fn each_broker_with_a_registry_has_its_turn() {
        let (mut brokers, server) = (Brokers::default(), server());
        assert!(brokers.next(&server).is_empty());
        for (broker, offer) in [("a", REGISTRY), ("b", TENANTS), ("c", REGISTRY)] {
            brokers.on_online(name(broker), offer);
        }
        let asked: Vec<_> = (0..3).flat_map(|_| brokers.next(&server)).collect();
        assert_eq!(asked, ["a", "c", "a"].map(name));
    }

    /// A regression test: no broker was asked before the hourly request or the answer timeout.
    #[test]
    fn another_broker_is_asked_where_one_goes_away() {
        let mut brokers = Brokers::default();
        for (broker, offer) in [("a", REGISTRY), ("b", TENANTS), ("c", REGISTRY)] {
            brokers.on_online(name(broker), offer);
        }
        let server = server();
        assert_eq!(brokers.next(&server), [name("a")]);
        let to_ask = brokers.on_offline(&name("a")).unwrap();
        assert!(server.is_at(to_ask));
        assert_eq!(brokers.next(&server), [name("c")]);
        assert!(brokers.on_offline(&name("a")).is_none(), "it was away already");
        assert!(brokers.on_offline(&name("b")).is_none(), "it had none of a registry");
        assert!(brokers.on_offline(&name("c")).is_none(), "there is no other one");
    }
}
