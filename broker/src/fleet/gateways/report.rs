//! The gateways and domains as [`status`](crate::fleet::status) has them.

use std::collections::BTreeSet;
use std::time::Instant;

use wgkex_common::{Domain, WorkerName};

use super::{Gateways, LastKnown, Router, Unserved};
use crate::fleet::clashes::{self, PublishedData};
use crate::fleet::gateway::{Gateway, GatewayLoad};
use crate::fleet::reach::ReachCounts;
use crate::fleet::selection::{Shares, Tier};
use crate::fleet::status::{
    DomainGateways, DrainSource, Draining, GatewayDomain, GatewayDomainState, GatewayRating, GatewayStatus, Offline,
    Problem, ProblemKind,
};

/// The problems of domains and gateways, as far as they are found under the lock of the gateways.
#[derive(Debug, Default)]
pub struct FleetProblems {
    found: Vec<Problem>,
    /// The data that gateways publish, parts of which may clash.
    published: Vec<PublishedData>,
}

impl Gateways {
    /// The domains that no gateway serves now.
    #[must_use]
    pub fn unserved(&self) -> Vec<Unserved> {
        let unserved = self.domains.iter().filter(|domain| !self.is_any_online(domain));
        unserved.map(|domain| Unserved { domain: domain.clone(), is_known: self.is_known(domain) }).collect()
    }

    /// Every gateway on the bus, by name.
    #[must_use]
    pub fn statuses(&self, now: Instant) -> Vec<GatewayStatus> {
        let (shares, reach) = (self.shares(now), self.reach.by_gateway());
        let reach = |name: &WorkerName| reach.get(name).copied().unwrap_or_default();
        let status = |(name, gateway): (&WorkerName, &Gateway)| GatewayStatus {
            draining: self.draining(name, gateway),
            ..gateway.status(name, &shares, reach(name), now)
        };
        self.by_name.iter().map(status).collect()
    }

    /// The same for operators: until the retained states are received again, also the last known state from before the
    /// connection was lost.
    #[must_use]
    pub fn shown(&self, now: Instant) -> Vec<GatewayStatus> {
        let mut shown = self.statuses(now);
        if let Some(LastKnown { lost, gateways }) = &self.last_known {
            let present: BTreeSet<&str> = shown.iter().map(|gateway| gateway.name.as_str()).collect();
            let missing = gateways.iter().filter(|known| !present.contains(known.name.as_str()));
            let missing: Vec<_> = missing.cloned().collect();
            let last_known_secs = Some(secs(*lost, now));
            shown.extend(missing.into_iter().map(|known| GatewayStatus { last_known_secs, ..known }));
            shown.sort_by(|one, other| one.name.cmp(&other.name));
        }
        shown
    }

    /// Every domain that is served here, with its gateways.
    #[must_use]
    pub fn domain_statuses(&self) -> Vec<DomainGateways> {
        let status = |domain: &Domain| {
            let installing = self.by_name.iter().filter(|(_, gateway)| gateway.installs(domain));
            let gateways = installing.map(|(name, _)| name.as_str().to_owned()).collect();
            DomainGateways { name: domain.to_string(), gateways }
        };
        self.domains.iter().map(status).collect()
    }

    /// The drains of a gateway: the one that it publishes, and that of this broker's operator.
    fn draining(&self, name: &WorkerName, gateway: &Gateway) -> Vec<Draining> {
        let worker = gateway.drain().map(|drain| Draining { by: DrainSource::Gateway, drain: drain.clone() });
        let broker = self.drains().get(name).map(|drain| Draining { by: DrainSource::Broker, drain: drain.clone() });
        worker.into_iter().chain(broker).collect()
    }

    /// Why this worker is offline; none while it is online, or if nothing is known of it.
    #[must_use]
    pub fn offline(&self, worker: &WorkerName, now: Instant) -> Option<Offline> {
        self.by_name.get(worker)?.offline(now)
    }

    /// Each gateway in the choice for a router.
    #[must_use]
    pub fn standings(&self, router: Router<'_>) -> Vec<GatewayRating> {
        let Router { domain, current_gateway, now } = router;
        let shares = self.shares(now);
        let standing = |(name, gateway): (&WorkerName, &Gateway)| {
            let GatewayLoad { connected, assigned } = gateway.peers();
            let rank = shares.rank_for_router(self.ranked_load(name, gateway, now), current_gateway == Some(name));
            let why_last = match rank.tier {
                Tier::Unresponsive => Some("it did not confirm the last key in time".to_owned()),
                Tier::Weightless => Some("its weight is 0".to_owned()),
                Tier::Draining | Tier::Removing => {
                    let draining = self.draining(name, gateway);
                    Some(draining.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
                }
                Tier::Current | Tier::Regular | Tier::Filling => None,
            };
            let note = match rank.tier {
                Tier::Current => Some("it drains, and the router is connected there".to_owned()),
                Tier::Filling => Some("it came back, and is filled slowly (rebalance.over)".to_owned()),
                Tier::Regular | Tier::Draining | Tier::Weightless | Tier::Unresponsive | Tier::Removing => None,
            };
            GatewayRating {
                name: name.as_str().into(),
                share: shares.share(name),
                connected,
                assigned,
                target: shares.target(name),
                distance: rank.excess,
                last_resort: why_last,
                note,
                unfit: gateway.serves(domain).is_none().then(|| gateway.unfit(domain, now)),
            }
        };
        self.by_name.iter().map(standing).collect()
    }

    /// The problems of domains and gateways; none until the retained states are received.
    #[must_use]
    pub fn problems(&self, now: Instant) -> FleetProblems {
        if !self.is_synced() {
            return FleetProblems::default();
        }
        let unserved = self.unserved().into_iter().map(|unserved| Problem {
            kind: ProblemKind::DomainWithoutGateway,
            subject: unserved.domain.to_string(),
            text: unserved.to_string(),
        });
        let offline = self.weights.keys().filter_map(|name| {
            let why = match self.by_name.get(name) {
                None => "it has published nothing".to_owned(),
                Some(gateway) => gateway.offline(now)?.to_string(),
            };
            let text = format!("gateway {}, which the config names, is offline: {why}", name.as_str());
            Some(Problem { kind: ProblemKind::GatewayOffline, subject: name.as_str().into(), text })
        });
        let clocks = self.clocks_off();
        let gateways = self.unreached().chain(self.names_in_use()).chain(self.data_missing());
        let gateways = gateways.chain(self.domains_down(now)).chain(clocks);
        FleetProblems { found: unserved.chain(gateways).chain(offline).collect(), published: self.published() }
    }

    /// The gateways that report that another program seems to use their name.
    pub fn names_in_use(&self) -> impl Iterator<Item = Problem> {
        let is_suspect = |gateway: &Gateway| gateway.hello.as_ref().is_some_and(|hello| hello.name_in_use);
        self.by_name.iter().filter(move |(_, gateway)| is_suspect(gateway)).map(|(name, _)| Problem {
            kind: ProblemKind::NameInUse,
            subject: name.as_str().into(),
            text: format!(
                "gateway {}: two programs seem to use its name: the MQTT server ends its connections again and again",
                name.as_str()
            ),
        })
    }

    /// The domains that a gateway counts without having published the data that routers need.
    fn data_missing(&self) -> impl Iterator<Item = Problem> {
        self.by_name.iter().flat_map(|(name, gateway)| {
            let counted = self.domains.iter().filter(|domain| gateway.has_online(domain));
            counted.filter(|domain| gateway.serves(domain).is_none()).map(move |domain| {
                let text = format!(
                    "gateway {}, domain {domain}: it has published no data, so no router is given it",
                    name.as_str()
                );
                Problem { kind: ProblemKind::DataMissing, subject: format!("{}, {domain}", name.as_str()), text }
            })
        })
    }

    /// The domains whose interface is missing at a gateway that is online.
    fn domains_down(&self, now: Instant) -> impl Iterator<Item = Problem> {
        let online = self.by_name.iter().filter(|(_, gateway)| gateway.online);
        online.flat_map(move |(name, gateway)| {
            let served = gateway.peers.keys().filter(|domain| gateway.may_serve(domain));
            let states = served.map(move |domain| gateway.domain(domain, now));
            states.filter(|domain| matches!(domain.state, GatewayDomainState::Down(_))).map(|domain| {
                let (subject, note) = (format!("{}, {}", name.as_str(), domain.domain), domain.note(true));
                let text = format!("gateway {}, domain {}: {note}", name.as_str(), domain.domain);
                Problem { kind: ProblemKind::DomainDown, subject, text }
            })
        })
    }

    /// The gateways whose clock is not this broker's.
    fn clocks_off(&self) -> impl Iterator<Item = Problem> {
        let online = self.by_name.iter().filter(|(_, gateway)| gateway.online);
        online.filter_map(|(name, gateway)| {
            let (name, difference) = (name.as_str(), gateway.clock.difference()?);
            let text = format!("gateway {name}: its clock is {difference} this broker's: one of the two is wrong");
            Some(Problem { kind: ProblemKind::ClockOff, subject: name.into(), text })
        })
    }

    /// The gateways that routers do not reach.
    fn unreached(&self) -> impl Iterator<Item = Problem> {
        let connected = |name: &WorkerName| self.by_name.get(name).map_or(0, |gateway| gateway.peers().connected);
        let all = self.reach.by_gateway().iter();
        let suspicious = all.filter(move |(name, reached)| reached.is_suspicious(connected(name)));
        suspicious.map(|(name, ReachCounts { reached, unreached, .. })| Problem {
            kind: ProblemKind::RoutersUnreached,
            subject: name.as_str().into(),
            text: format!(
                "gateway {}: {unreached} of {} routers that were given it have no handshake there after 5 minutes: is its UDP \
                 port blocked, or its external address wrong?",
                name.as_str(),
                reached + unreached
            ),
        })
    }

    /// The data that online gateways publish.
    fn published(&self) -> Vec<PublishedData> {
        let online = self.by_name.iter().filter(|(_, gateway)| gateway.online);
        let published = online.flat_map(|(worker, gateway)| {
            let served = gateway.data.iter().filter(|(domain, _)| gateway.may_serve(domain));
            served.map(|(domain, data)| PublishedData {
                worker: worker.clone(),
                domain: domain.clone(),
                data: data.clone(),
            })
        });
        published.collect()
    }
}

impl FleetProblems {
    /// All problems. Compares the data of the gateways, without their lock.
    #[must_use]
    pub fn all(mut self) -> Vec<Problem> {
        self.found.extend(clashes::find(&self.published));
        self.found
    }
}

impl Gateway {
    fn status(&self, name: &WorkerName, shares: &Shares<'_>, reach: ReachCounts, now: Instant) -> GatewayStatus {
        let domains: BTreeSet<_> = self.data.keys().chain(self.peers.keys()).collect();
        let domains = domains.into_iter().filter(|domain| self.may_serve(domain));
        let GatewayLoad { connected, assigned } = self.peers();
        GatewayStatus {
            name: name.as_str().into(),
            online: self.online,
            draining: Vec::new(),
            version: self.version().map(str::to_owned),
            offline: self.offline(now),
            domains: domains.map(|domain| self.domain(domain, now)).collect(),
            connected,
            assigned,
            reach,
            weight: shares.weight(name),
            share: shares.share(name),
            target: shares.target(name),
            last_known_secs: None,
        }
    }

    fn domain(&self, domain: &Domain, now: Instant) -> GatewayDomain {
        let state = match self.peers.get(domain) {
            None => GatewayDomainState::NotCounted,
            Some(Some(_)) => GatewayDomainState::Up,
            Some(None) => GatewayDomainState::Down(self.down_since(domain).map(|since| secs(since, now))),
        };
        let GatewayLoad { connected, assigned } = self.peers.get(domain).copied().flatten().unwrap_or_default();
        GatewayDomain { domain: domain.to_string(), state, connected, assigned }
    }

    /// Why no router of `domain` can be given this gateway, if it does not serve the domain.
    fn unfit(&self, domain: &Domain, now: Instant) -> String {
        match (self.offline(now), self.peers.get(domain)) {
            (Some(offline), _) => format!("offline: {offline}"),
            _ if !self.may_serve(domain) => "it does not serve this domain".into(),
            (None, None) => "it has not counted its peers of this domain".into(),
            (None, Some(None)) => "the interface is missing there (-1)".into(),
            (None, Some(Some(_))) => "it has published no data of this domain".into(),
        }
    }

    /// Why it is offline; none while it is online.
    pub fn offline(&self, now: Instant) -> Option<Offline> {
        let reason = self.offline_reason()?;
        Some(Offline { reason, for_secs: self.offline_since().map(|since| secs(since, now)) })
    }
}

fn secs(since: Instant, now: Instant) -> u64 {
    now.saturating_duration_since(since).as_secs()
}
