//! Checks of the MQTT server: the connection, what it allows, and who else is there by this worker's name.

use wgkex_common::mqtt::Fault;
use wgkex_common::mqtt::trial::{Echo, Failure};

use super::Finding;
use super::facts::{BusFacts, DomainFacts, Facts};

const SUBJECT: &str = "MQTT";
const RIGHTS: &str = "give the worker's user its rights: `wgkex-broker mqtt-acl` prints them for Mosquitto and EMQX";

pub(super) fn mqtt(facts: &Facts) -> Vec<Finding> {
    let server = &facts.mqtt.server;
    match &facts.mqtt.outcome {
        Err(Failure { fault, cause }) => vec![Finding::fail(SUBJECT, format!("{server}: {cause}"), advice(*fault))],
        Ok(bus) => {
            let connected = Finding::ok(SUBJECT, format!("{server} lets the worker in"));
            let rights = [subscriptions(bus), echo(bus.echo)];
            [connected].into_iter().chain(rights).chain([namesake(facts, bus)]).collect()
        }
    }
}

fn advice(fault: Fault) -> &'static str {
    match fault {
        Fault::Password => "set mqtt.username and mqtt.password to what the server knows",
        Fault::ClientId => "set mqtt.username to the host name of this machine",
        Fault::Tls => {
            "check mqtt.tls and mqtt.broker_port, that mqtt.broker_url is a name in the server's certificate, and that mqtt.ca_file names who signed it"
        }
        Fault::NoTls => "set mqtt.tls to true if the server has TLS on this port, or mqtt.broker_port to one without",
        Fault::Busy => "correct mqtt.username and mqtt.password, then wait a minute; the broker's log names the cause",
        Fault::Server => "start the MQTT server, or correct mqtt.broker_url and mqtt.broker_port",
    }
}

fn subscriptions(bus: &BusFacts) -> Finding {
    let refused = |filters: &[String]| format!("the server refuses to let it subscribe to {}", filters.join(", "));
    match (&bus.refused[..], &bus.refused_optional[..]) {
        ([], []) => Finding::ok(SUBJECT, "it may subscribe to all that it needs"),
        ([], optional) => Finding::warn(SUBJECT, refused(optional), RIGHTS),
        (required, _) => Finding::fail(SUBJECT, refused(required), RIGHTS),
    }
}

fn echo(echo: Echo) -> Finding {
    match echo {
        Echo::Came => Finding::ok(SUBJECT, "what it publishes below wgkex/ comes back"),
        Echo::Lost => Finding::warn(
            SUBJECT,
            "what it publishes below wgkex/ does not come back: brokers get no confirmations",
            RIGHTS,
        ),
        Echo::Closed => Finding::warn(
            SUBJECT,
            "the server ends the connection when it publishes below wgkex/: brokers get no confirmations",
            RIGHTS,
        ),
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
    let is_here = facts.running.is_some() || matches!(facts.state.holder, Ok(Some(_)));
    let is_here_connected = facts.running.as_ref().is_some_and(|running| running.is_connected);
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

/// Whether what is published as this worker's has another key than the interface here.
fn is_anothers(domain: &DomainFacts, bus: &BusFacts) -> bool {
    let published = bus.published_keys.get(domain.domain.name());
    let wireguard = domain.wireguard.as_ref().ok().and_then(|facts| facts.as_ref());
    let own = wireguard.and_then(|facts| facts.device.as_ref().ok()?.as_ref()?.public_key);
    matches!((published, own), (Some(published), Some(own)) if *published != own) && bus.online == Some(true)
}
