//! Checks of the MQTT server: the connection, the client's rights, and other programs with this worker's name.

use wgkex_common::doctor::bus::{SUBJECT, no_connection, rights};
use wgkex_common::doctor::{Finding, Program};

use super::facts::{BusFacts, DomainFacts, Facts};
use super::process;

pub(super) fn mqtt(facts: &Facts) -> Vec<Finding> {
    let server = &facts.mqtt.server;
    match &facts.mqtt.outcome {
        Err(failure) => vec![no_connection(Program::Worker, server, failure)],
        Ok(bus) => {
            let mut findings = rights(Program::Worker, server, &bus.rights);
            findings.extend(facts.running.as_ref().and_then(process::mqtt));
            findings.push(namesake(facts, bus));
            findings
        }
    }
}

/// Whether another machine has the same name.
fn namesake(facts: &Facts, bus: &BusFacts) -> Finding {
    let (name, advice) = (
        &facts.worker,
        "give each machine a host name of its own (`hostnamectl set-hostname`), and restart its worker",
    );
    if let Some(domain) = facts.domains.iter().find(|domain| is_anothers(domain, bus)) {
        let found =
            format!("a worker on another machine, or with other interfaces, publishes as {name} in {}", domain.domain);
        return Finding::fail(SUBJECT, found, advice);
    }
    if facts.running.as_ref().is_some_and(|running| running.is_name_in_use) {
        let found = format!(
            "the server ends the connections of the running worker {name} again and again: another program may use its name"
        );
        return Finding::fail(SUBJECT, found, advice);
    }
    let is_here = facts.running.is_some() || matches!(facts.state.holder, Ok(Some(_)));
    let is_here_connected = facts.running.as_ref().is_some_and(|running| running.mqtt_cause.is_none());
    match bus.online {
        Some(true) if !is_here => {
            let found = format!("a worker {name} is online, and none runs here");
            Finding::fail(
                SUBJECT,
                found,
                format!("if it was not killed a moment ago, another machine has this name: {advice}"),
            )
        }
        Some(false) | None if is_here_connected => {
            let found = format!("nothing is retained that shows worker {name} online, although it is connected");
            Finding::warn(SUBJECT, found, "look again in a minute; then see whether another machine has this name")
        }
        Some(_) | None => Finding::ok(SUBJECT, format!("no other worker is called {name}")),
    }
}

/// Whether the data retained under this worker's name has another key than the interface here.
fn is_anothers(domain: &DomainFacts, bus: &BusFacts) -> bool {
    let published = bus.published_keys.get(domain.domain.name());
    let wireguard = domain.wireguard.as_ref().ok().and_then(|facts| facts.as_ref());
    let own = wireguard.and_then(|facts| facts.device.as_ref().ok()?.as_ref()?.public_key);
    matches!((published, own), (Some(published), Some(own)) if *published != own) && bus.online == Some(true)
}
