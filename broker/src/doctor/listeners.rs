//! Checks of where the broker listens: the ports, their certificates, and which clients may connect to its MQTT server.

use std::time::Duration;

use wgkex_common::doctor::Finding;
use wgkex_common::doctor::sockets::PortOwner;

use super::facts::{CertificateFacts, EmbeddedFacts, PortFacts};
use crate::fleet::status::printable;
use crate::http::status::Status;
use crate::tls::Validity;

/// The name of the broker's process.
const BROKER_PROGRAM: &str = "wgkex-broker";
/// The advice for a broker that does not answer.
pub(super) const RESTART: &str = "look at its log (`journalctl -u wgkex-broker`), and `systemctl restart wgkex-broker`";
const DAY: Duration = Duration::from_secs(86_400);
/// A certificate that ends sooner should have been renewed.
const SOON: Duration = Duration::from_secs(30 * 86_400);

/// Whether it is a process of the broker, whether or not it answers.
pub(super) fn is_broker(owner: &PortOwner) -> bool {
    matches!(owner, PortOwner::Process { name, .. } if name == BROKER_PROGRAM)
}

/// Whether the broker has the port, or can have it.
pub(super) fn port(PortFacts { key, listen, owner }: &PortFacts, running: Option<&Status>) -> Finding {
    let other = || format!("end that, or set {key} to another port; `ss -tlnp` shows which process has it");
    match (owner, running) {
        (Err(error), _) => {
            let advice = format!("set {key} to an address of this machine, or to \"::\" for all");
            Finding::fail(key, format!("no program can listen on {listen}: {error}"), advice)
        }
        (Ok(PortOwner::Nobody), None) => Finding::ok(key, format!("{listen} is free")),
        (Ok(PortOwner::Nobody), Some(_)) => Finding::fail(
            key,
            format!("the running broker does not listen on {listen}"),
            "restart it: it was started with another config",
        ),
        (Ok(owner @ PortOwner::Process { pid, .. }), None) if is_broker(owner) => {
            Finding::warn(key, format!("process {pid} ({BROKER_PROGRAM}) has {listen}, and does not answer"), RESTART)
        }
        // It may have another number in its container.
        (Ok(owner @ PortOwner::Process { pid, .. }), Some(status)) if *pid == status.pid || is_broker(owner) => {
            Finding::ok(key, format!("the running broker listens on {listen}"))
        }
        (Ok(PortOwner::Process { pid, name }), _) => {
            Finding::fail(key, format!("{listen} is taken by process {pid} ({})", printable(name)), other())
        }
        (Ok(PortOwner::Kernel), Some(_)) => {
            Finding::ok(key, format!("a process listens on {listen}; only root sees which one"))
        }
        (Ok(PortOwner::Kernel), None) => {
            Finding::fail(key, format!("{listen} is taken by a process that is not seen from here"), other())
        }
    }
}

/// Whether the certificate can be used, and for how long.
pub(super) fn certificate(facts: &CertificateFacts) -> Finding {
    let CertificateFacts { section, file, denied, validity } = facts;
    let (file, renew) = (file.display(), "renew it; the running broker reads it again by itself");
    let readable = "let the broker's user read both files (chmod, chown)";
    let days = |duration: &Duration| duration.as_secs() / DAY.as_secs();
    match (denied, validity) {
        (Some(denied), _) => Finding::fail(section, denied.clone(), readable),
        (None, Err(error)) => Finding::fail(
            section,
            error.clone(),
            format!("name a certificate and its own key as PEM in {section}.cert_file and .key_file"),
        ),
        (None, Ok(None)) => {
            Finding::ok(section, format!("{file} is there only while the unit runs: it is not checked"))
        }
        (None, Ok(Some(Validity::NotYet))) => {
            Finding::fail(section, format!("{file} is not valid yet"), "see whether the clock is right, or renew it")
        }
        (None, Ok(Some(Validity::Expired(ago)))) => {
            Finding::fail(section, format!("{file} has expired, {} days ago", days(ago)), renew)
        }
        (None, Ok(Some(Validity::Left(left)))) if *left < SOON => {
            Finding::warn(section, format!("{file} expires in {} days", days(left)), renew)
        }
        (None, Ok(Some(Validity::Left(left)))) => {
            Finding::ok(section, format!("{file} has its key, and expires in {} days", days(left)))
        }
    }
}

/// Whether the tokens of tenants can be used.
pub(super) fn tokens(tokens: &Result<usize, String>) -> Finding {
    let key = "tenants.tokens_file";
    match tokens {
        Ok(0) => {
            Finding::warn(key, "has no token: no client can join a tenant", "wgkex-broker tenant-token ID makes one")
        }
        Ok(count) => Finding::ok(key, format!("has {count} tokens")),
        Err(problem) => Finding::fail(key, problem.clone(), "correct it; the running broker uses what it read before"),
    }
}

/// Which clients may connect to the MQTT server inside the broker.
pub(super) fn embedded(facts: &EmbeddedFacts) -> Finding {
    let key = "mqtt_listen";
    match facts {
        EmbeddedFacts { has_users: true, .. } => Finding::ok(key, "users and their passwords are required"),
        EmbeddedFacts { is_reachable: false, .. } => {
            Finding::ok(key, "only programs of this machine reach it, and each may do everything")
        }
        EmbeddedFacts { is_reachable: true, .. } => Finding::fail(
            key,
            "other machines reach it, and each may do everything",
            "set mqtt_listen.users; `wgkex-broker hash-password` makes the hashes",
        ),
    }
}
