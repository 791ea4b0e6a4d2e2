//! Checks of workers: in the config, on the bus, and at the running broker.

use std::collections::BTreeSet;

use wgkex_common::doctor::Finding;
use wgkex_common::doctor::bus::SUBJECT;

use super::facts::{BusFacts, EmbeddedFacts, Facts};
use crate::fleet::status::{ORIGINAL, printable};
use crate::http::status::Status;

type Names<'a> = BTreeSet<&'a str>;

/// Whether the hellos of all workers are retained, and the running broker knows them.
pub(super) fn retained(facts: &Facts) -> Vec<Finding> {
    let Some(Ok(BusFacts { hellos, .. })) = facts.mqtt.as_ref().map(|mqtt| &mqtt.outcome) else { return Vec::new() };
    let retained: Names = hellos.iter().map(String::as_str).collect();
    let Ok(status) = &facts.running else {
        return vec![Finding::ok(SUBJECT, format!("workers whose hello is retained: {}", retained.len()))];
    };
    let known: Names = status.gateways.iter().map(|gateway| gateway.name.as_str()).collect();
    let online_with_hello = online_with_hello(status);
    let lost: Vec<_> = online_with_hello.difference(&retained).copied().collect();
    let unknown: Vec<_> = retained.difference(&known).copied().collect();
    let mut findings = Vec::new();
    if !lost.is_empty() {
        findings.push(Finding::warn(
            SUBJECT,
            format!(
                "the running broker knows {} workers with a hello; no hello is retained of {}",
                online_with_hello.len(),
                listed(&lost)
            ),
            "a broker that starts now does not know what they can: see whether the server keeps retained messages, and \
             whether the broker's user may read wgkex/worker/+/hello",
        ));
    }
    if !unknown.is_empty() {
        findings.push(Finding::warn(
            SUBJECT,
            format!("hellos are retained that the running broker has not received: {}", listed(&unknown)),
            "look again in a minute; then restart the broker, and look at its log",
        ));
    }
    if findings.is_empty() {
        let found = format!("workers whose hello is retained: {}, as the running broker has it", retained.len());
        findings.push(Finding::ok(SUBJECT, found));
    }
    findings
}

/// The gateways that are online and are no originals.
fn online_with_hello(status: &Status) -> Names<'_> {
    let ours = status.gateways.iter().filter(|gateway| {
        let version = gateway.version.as_deref();
        gateway.online && version.is_some_and(|version| version != ORIGINAL)
    });
    ours.map(|gateway| gateway.name.as_str()).collect()
}

/// Whether each worker that the config names is on the bus, and is a user where there are users.
pub(super) fn named(facts: &Facts) -> Vec<Finding> {
    let named: Names = facts.workers.iter().map(String::as_str).collect();
    let mut findings: Vec<_> = never_published(facts, &named).into_iter().collect();
    if let Some(EmbeddedFacts { has_users: true, workers, .. }) = &facts.embedded {
        findings.extend(users(&named, &workers.iter().map(String::as_str).collect(), facts.running.as_ref().ok()));
    }
    findings
}

/// The workers of the config of which nothing is retained. A running broker has a problem for each of them, so they are
/// no finding then.
fn never_published(facts: &Facts, named: &Names<'_>) -> Option<Finding> {
    let Some(Ok(BusFacts { retained_received, .. })) = facts.mqtt.as_ref().map(|mqtt| &mqtt.outcome) else {
        return None;
    };
    let never_published: Vec<_> = named.iter().copied().filter(|name| !retained_received.contains(*name)).collect();
    let is_announced = facts.running.is_ok() || named.is_empty();
    (!is_announced).then(|| {
        if never_published.is_empty() {
            return Finding::ok("workers", "a message of each is retained");
        }
        let found = format!("no message is retained of {}", listed(&never_published));
        Finding::warn("workers", found, "start a worker there: its host name has to be this one; or take it out")
    })
}

fn users(named: &Names<'_>, users: &Names<'_>, running: Option<&Status>) -> Vec<Finding> {
    let lacking: Vec<_> = named.difference(users).copied().collect();
    let known: Names =
        running.iter().flat_map(|status| &status.gateways).map(|gateway| gateway.name.as_str()).collect();
    let unused: Vec<_> = users.iter().copied().filter(|user| !named.contains(user) && !known.contains(user)).collect();
    let mut findings = Vec::new();
    if !lacking.is_empty() {
        findings.push(Finding::warn(
            "mqtt_listen.users",
            format!("workers names {}, which cannot connect: no user has that name", listed(&lacking)),
            "add users with these names (`wgkex-broker hash-password`): a worker's user name is its host name",
        ));
    }
    // Where neither the config names gateways nor a broker knows them, any user may be one.
    if !unused.is_empty() && (!named.is_empty() || running.is_some()) {
        findings.push(Finding::warn(
            "mqtt_listen.users",
            format!("no worker is known that uses {}", listed(&unused)),
            "start the worker of that host name, or take the user out: whoever has its password can pose as a gateway",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("mqtt_listen.users", format!("users that are workers: {}", users.len())));
    }
    findings
}

fn listed(names: &[&str]) -> String {
    printable(&names.join(", "))
}
