//! Domains, and the gateways that serve them: `domains`, `domain_prefixes`, `workers`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::diagnostics::{Diagnostics, Path};
use super::value::{Id, Label, Share, Text};
use crate::{Domain, DomainError, WorkerName};

/// The rest of an unbalanced quote, or of one that YAML or a shell did not remove.
const QUOTED: &str = "must be a name without quotes";

/// A gateway's place in the balance (contract section 6).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatewayShare {
    /// Its share of the peers relative to the others'; finite, not negative.
    pub weight: f64,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawWorker {
    pub weight: Option<Share>,
    pub id: Option<Id>,
    pub pop: Option<Label>,
    pub location: Option<Label>,
}

/// Reports lists that are missing or empty.
pub(super) fn check_present(domains: &[Option<Text>], prefixes: &[Option<Text>], diagnostics: &mut Diagnostics) {
    for (key, is_missing) in [("domains", domains.is_empty()), ("domain_prefixes", prefixes.is_empty())] {
        if is_missing {
            diagnostics.error(&Path::of(key), "must be a list with at least one entry");
        }
    }
}

/// The domains served of those `listed`, in the order of the file.
pub(super) fn check(listed: &[Text], prefixes: Vec<Option<Text>>, diagnostics: &mut Diagnostics) -> Vec<Domain> {
    let prefixes: Vec<String> = prefixes.into_iter().flatten().map(|prefix| prefix.0).collect();
    for (index, _) in prefixes.iter().enumerate().filter(|(_, prefix)| has_quote(prefix)) {
        diagnostics.error(&Path::of("domain_prefixes").index(index), QUOTED);
    }
    let served = served(listed, &prefixes, diagnostics);
    let fits = |Text(name): &Text| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if !listed.is_empty() && !prefixes.is_empty() && !listed.iter().any(fits) {
        diagnostics.error(&Path::of("domains"), "must have at least one that begins with one of domain_prefixes");
    }
    served
}

fn served(listed: &[Text], prefixes: &[String], diagnostics: &mut Diagnostics) -> Vec<Domain> {
    let mut served: Vec<Domain> = Vec::new();
    for (index, Text(name)) in listed.iter().enumerate() {
        let path = Path::of("domains").index(index);
        match Domain::new(name, prefixes) {
            _ if has_quote(name) => diagnostics.error(&path, QUOTED),
            Ok(domain) if served.contains(&domain) => diagnostics.warn(&path, "is listed twice"),
            Ok(domain) => match served.iter().find(|other| other.interface_suffix() == domain.interface_suffix()) {
                Some(other) => diagnostics.error(&path, &same_interfaces(&domain, other)),
                None => served.push(domain),
            },
            Err(_) if prefixes.is_empty() => {}
            Err(error) => bad_domain(&path, name, &error, diagnostics),
        }
    }
    served
}

fn has_quote(name: &str) -> bool {
    name.contains(['"', '\''])
}

fn same_interfaces(domain: &Domain, other: &Domain) -> String {
    let (name, other, interface) = (domain.name(), other.name(), domain.wireguard());
    format!("{name:?} would have the interface {interface} of {other:?}, each domain needs its own")
}

fn bad_domain(path: &Path, name: &str, error: &DomainError, diagnostics: &mut Diagnostics) {
    let said =
        if diagnostics.contains_secret(name) { "the value cannot be a domain".to_owned() } else { error.to_string() };
    match error {
        DomainError::NoPrefix(_) => diagnostics.warn(path, &format!("{said} and is ignored")),
        DomainError::Interface(..) | DomainError::Topic(_) => diagnostics.error(path, &said),
    }
}

/// Workers are named by host name, which is a level of topics: a name with more would give its user the rights of
/// others.
pub(super) fn workers(
    raw: &BTreeMap<String, RawWorker>,
    diagnostics: &mut Diagnostics,
) -> BTreeMap<WorkerName, GatewayShare> {
    let mut workers = BTreeMap::new();
    for (name, raw) in raw {
        if let Ok(name) = name.parse() {
            workers.insert(name, GatewayShare { weight: raw.weight.as_ref().map_or(1.0, |weight| weight.0) });
        } else {
            let complaint = "must be a host name without \"/\", \"+\" and \"#\"";
            diagnostics.error(&Path::of("workers").then(name), complaint);
        }
    }
    workers
}
