//! The running broker's status of itself and of its fleet.

use wgkex_common::doctor::bus::SUBJECT;
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::doctor::{Finding, Level};

use super::facts::Facts;
use super::listeners::{RESTART, is_broker};
use crate::fleet::status::{Problem, ProblemKind, age, printable};
use crate::http::status::Status;

const BROKER_SUBJECT: &str = "broker";
const FLEET: &str = "fleet";

/// Whether it runs, and each of its problems.
pub(super) fn broker(facts: &Facts) -> Vec<Finding> {
    match &facts.running {
        Ok(status) => {
            let mut findings = vec![runs(status)];
            findings.extend(status.problems.iter().map(problem));
            if status.problems.is_empty() {
                let online = status.gateways.iter().filter(|gateway| gateway.online).count();
                findings.push(Finding::ok(FLEET, format!("gateways online: {online}, and no problem")));
            }
            findings
        }
        Err(error) => vec![does_not_answer(facts, error)],
    }
}

fn runs(Status { version, uptime_secs, ready, .. }: &Status) -> Finding {
    let runs = format!("version {} runs, for {}", printable(version), age(*uptime_secs));
    if *ready {
        Finding::ok(BROKER_SUBJECT, format!("{runs}, and is ready"))
    } else {
        Finding::fail(BROKER_SUBJECT, format!("{runs}, and is not ready: routers get a 503"), "see why below")
    }
}

fn does_not_answer(facts: &Facts, error: &str) -> Finding {
    let listen = facts.ports.iter().find(|port| port.key == "broker_listen");
    if listen.is_none_or(|port| port.owner == Ok(PortOwner::Nobody)) {
        let found = "none runs here: what only a running one knows is not checked";
        return Finding::warn(BROKER_SUBJECT, found, "`systemctl start wgkex-broker`; its log has the reason");
    }
    let advice = if listen.is_some_and(|port| matches!(&port.owner, Ok(owner) if is_broker(owner))) {
        RESTART
    } else {
        "if it is a broker, `systemctl restart wgkex-broker` and look at its log; else see below which process has the port"
    };
    Finding::fail(BROKER_SUBJECT, printable(error), advice)
}

fn problem(Problem { kind, text, .. }: &Problem) -> Finding {
    let subject = match kind {
        ProblemKind::NotReady | ProblemKind::StateNotKept | ProblemKind::ListsNotKept => BROKER_SUBJECT,
        ProblemKind::ProxyNotTrusted => "trusted_proxies",
        ProblemKind::AllowListUnread | ProblemKind::ListDamaged => "lists",
        ProblemKind::NameInUse => SUBJECT,
        ProblemKind::ClockOff => "clock",
        ProblemKind::RegistryElsewhere
        | ProblemKind::RegistryUnavailable
        | ProblemKind::RegistryEmptied
        | ProblemKind::ServerRefused => "registry",
        ProblemKind::TenantsApart | ProblemKind::TenantsHub => "tenants",
        ProblemKind::DomainWithoutGateway
        | ProblemKind::SameKey
        | ProblemKind::SameLinkAddress
        | ProblemKind::SameExternalAddress
        | ProblemKind::RoutersUnreached
        | ProblemKind::DataMissing
        | ProblemKind::DomainDown
        | ProblemKind::GatewayOffline => FLEET,
    };
    Finding { level: level(*kind), ..Finding::warn(subject, printable(text), advice(*kind)) }
}

/// It fails where routers are not served.
fn level(kind: ProblemKind) -> Level {
    match kind {
        ProblemKind::NotReady
        | ProblemKind::DomainWithoutGateway
        | ProblemKind::AllowListUnread
        | ProblemKind::ListDamaged
        | ProblemKind::SameKey
        | ProblemKind::SameLinkAddress
        | ProblemKind::SameExternalAddress
        | ProblemKind::NameInUse
        | ProblemKind::DataMissing
        | ProblemKind::RegistryElsewhere
        | ProblemKind::RegistryUnavailable
        | ProblemKind::RegistryEmptied => Level::Fail,
        ProblemKind::StateNotKept
        | ProblemKind::ListsNotKept
        | ProblemKind::ProxyNotTrusted
        | ProblemKind::RoutersUnreached
        | ProblemKind::ClockOff
        | ProblemKind::DomainDown
        | ProblemKind::ServerRefused
        | ProblemKind::TenantsApart
        | ProblemKind::TenantsHub
        | ProblemKind::GatewayOffline => Level::Warn,
    }
}

fn advice(kind: ProblemKind) -> &'static str {
    match kind {
        ProblemKind::NotReady => "see the lines about MQTT, and its log",
        ProblemKind::DomainWithoutGateway => {
            "`wgkex-broker gateways` shows why; run `wgkex-worker doctor` on a gateway that is to serve it, or take it out of \
             domains"
        }
        ProblemKind::AllowListUnread | ProblemKind::ListDamaged => "its log has the reason, with the line",
        ProblemKind::StateNotKept | ProblemKind::ListsNotKept => {
            "see the lines about the state, and whether the disk is full or read-only"
        }
        ProblemKind::SameKey => {
            "give one of them a key of its own: take away its key file, and run `wgkex-worker setup`"
        }
        ProblemKind::SameLinkAddress => "give one of them a link address of its own: it follows from its key",
        ProblemKind::SameExternalAddress => "correct externalName or setup.listen_port of one of them",
        ProblemKind::NameInUse => "give each machine a host name of its own, and each program a machine of its own",
        ProblemKind::ProxyNotTrusted => {
            "add its address to trusted_proxies, and have it send X-Forwarded-For or Forwarded; then restart the broker"
        }
        ProblemKind::RoutersUnreached => {
            "open its UDP port in each firewall on the way, or correct externalName; see `wgkex-worker doctor` there"
        }
        ProblemKind::RegistryElsewhere => "give both brokers the same PostgreSQL by storage, or disable one registry",
        ProblemKind::ServerRefused => {
            "give it a name and a network of its own in `servers` there, or delete the other one: `wgkex-broker server delete NAME`"
        }
        ProblemKind::RegistryUnavailable => "its log has the reason; look at storage, and at the server that it names",
        ProblemKind::RegistryEmptied => {
            "see whether storage names the right database; what becomes of gateways is in docs/registry.md, \"An empty database\""
        }
        ProblemKind::TenantsApart => "give all brokers the same tenants.pool, tenant_length, grace and hub",
        ProblemKind::TenantsHub => {
            "set hub.enabled at that gateway, and the same tenants.pool and tenant_length; run `wgkex-worker setup` there"
        }
        ProblemKind::ClockOff => "synchronise both machines: `timedatectl set-ntp true`, or chrony",
        ProblemKind::DataMissing | ProblemKind::DomainDown => "run `wgkex-worker doctor` there",
        ProblemKind::GatewayOffline => "run `wgkex-worker doctor` there, or take it out of workers",
    }
}
