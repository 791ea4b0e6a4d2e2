//! Gateways that publish a value that must be unique: the key of a copied config, a link address, the address and port
//! that routers connect to. No IO, no clock.

use std::collections::{BTreeMap, BTreeSet};

use wgkex_common::wire::message::WorkerData;
use wgkex_common::{Domain, WorkerName};

use crate::fleet::status::{Problem, ProblemKind, printable};

/// The data that a gateway publishes of a domain.
#[derive(Debug, Clone)]
pub(super) struct PublishedData {
    pub worker: WorkerName,
    pub domain: Domain,
    pub data: WorkerData,
}

/// Each clash once, with the names of its gateways.
pub(super) fn find(published: &[PublishedData]) -> Vec<Problem> {
    let keys = shared(published, |each| each.data.public_key);
    let addresses = shared(published, |each| (&each.domain, each.data.link_address.as_str()));
    let endpoints = shared(published, |each| (each.data.external_address.as_str(), each.data.port));
    let same_key = keys.into_values().map(|group| {
        group.problem(ProblemKind::SameKey, "have the same WireGuard key: routers reach only one of them")
    });
    let same_address = addresses.into_iter().map(|((domain, address), group)| {
        group.problem(
            ProblemKind::SameLinkAddress,
            &format!("have the same link address {} in domain {domain}", printable(address)),
        )
    });
    let same_endpoint = endpoints.into_iter().filter(|(_, group)| group.keys.len() > 1);
    let same_endpoint = same_endpoint.map(|((address, port), group)| {
        let what = format!("publish the same address {}:{port} with different keys", printable(address));
        group.problem(ProblemKind::SameExternalAddress, &what)
    });
    same_key.chain(same_address).chain(same_endpoint).collect()
}

/// The gateways that publish the same value.
struct ClashingGateways<'a> {
    workers: BTreeSet<&'a WorkerName>,
    keys: BTreeSet<wgkex_common::PublicKey>,
}

impl ClashingGateways<'_> {
    fn problem(&self, kind: ProblemKind, what: &str) -> Problem {
        let names: Vec<_> = self.workers.iter().map(|worker| worker.as_str()).collect();
        let subject = names.join(", ");
        Problem { kind, text: format!("gateways {subject} {what}"), subject }
    }
}

/// The gateways of each value that several publish.
fn shared<'a, K: Ord>(
    published: &'a [PublishedData],
    what: impl Fn(&'a PublishedData) -> K,
) -> BTreeMap<K, ClashingGateways<'a>> {
    let mut groups: BTreeMap<K, ClashingGateways<'a>> = BTreeMap::new();
    for each in published {
        let new = || ClashingGateways { workers: BTreeSet::new(), keys: BTreeSet::new() };
        let group = groups.entry(what(each)).or_insert_with(new);
        group.workers.insert(&each.worker);
        group.keys.insert(each.data.public_key);
    }
    groups.retain(|_, group| group.workers.len() > 1);
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";
    const B: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    fn found(published: &[(&str, &str, &str, u16, &str, &str)]) -> Vec<(ProblemKind, String, String)> {
        let published: Vec<_> = published
            .iter()
            .map(|(worker, domain, external, port, key, link)| {
                let data = WorkerData {
                    external_address: (*external).into(),
                    port: *port,
                    public_key: key.parse().unwrap(),
                    link_address: (*link).into(),
                };
                let domain = Domain::new(domain, &["ff_".into()]).unwrap();
                PublishedData { worker: worker.parse().unwrap(), domain, data }
            })
            .collect();
        find(&published).into_iter().map(|problem| (problem.kind, problem.subject, problem.text)).collect()
    }

    #[test]
    fn what_two_gateways_share_is_named_and_what_one_repeats_is_not() {
        assert_eq!(found(&[("gw1", "ff_a", "x", 1, A, "fe80::1"), ("gw1", "ff_b", "x", 1, A, "fe80::1")]), []);
        assert_eq!(found(&[("gw1", "ff_a", "x", 1, A, "fe80::1"), ("gw2", "ff_a", "x", 2, B, "fe80::2")]), []);
        assert_eq!(found(&[("gw1", "ff_a", "x", 1, A, "fe80::1"), ("gw2", "ff_b", "y", 1, B, "fe80::1")]), []);
        let cloned = found(&[("gw1", "ff_a", "x", 1, A, "fe80::1"), ("gw2", "ff_b", "y", 1, A, "fe80::2")]);
        let text = "gateways gw1, gw2 have the same WireGuard key: routers reach only one of them";
        assert_eq!(cloned, [(ProblemKind::SameKey, "gw1, gw2".into(), text.into())]);
        assert!(!text.contains(A));
        let address = found(&[("gw1", "ff_a", "x", 1, A, "fe80::1"), ("gw2", "ff_a", "y", 1, B, "fe80::1")]);
        let text = "gateways gw1, gw2 have the same link address fe80::1 in domain ff_a";
        assert_eq!(address, [(ProblemKind::SameLinkAddress, "gw1, gw2".into(), text.into())]);
        let endpoint =
            found(&[("gw1", "ff_a", "x\u{1b}", 1, A, "fe80::1"), ("gw2", "ff_b", "x\u{1b}", 1, B, "fe80::1")]);
        let text = "gateways gw1, gw2 publish the same address x?:1 with different keys";
        assert_eq!(endpoint, [(ProblemKind::SameExternalAddress, "gw1, gw2".into(), text.into())]);
    }
}
