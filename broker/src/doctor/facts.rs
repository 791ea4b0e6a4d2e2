//! The facts about a broker on which the checks decide.

use std::collections::BTreeSet;
use std::path::PathBuf;

use wgkex_common::config::ConfigProblem;
use wgkex_common::doctor::bus::{MqttFacts, Rights};
use wgkex_common::doctor::clock::ClockFacts;
use wgkex_common::doctor::files::{FileFacts, ListFacts, StateFacts};
use wgkex_common::doctor::sockets::PortOwner;

use crate::http::status::Status;
use crate::tls::Validity;

/// All facts.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The warnings about the config.
    pub config_warnings: Vec<ConfigProblem>,
    /// The status of the broker that answers on `broker_listen`, or why none answers.
    pub running: Result<Status, String>,
    /// Each port that the config names.
    pub ports: Vec<PortFacts>,
    /// Each certificate that the config names.
    pub certificates: Vec<CertificateFacts>,
    /// The gateways that the config names in `workers`.
    pub workers: BTreeSet<String>,
    /// The MQTT server inside the broker, if it is that one.
    pub embedded: Option<EmbeddedFacts>,
    /// The MQTT server, if it is another one.
    pub mqtt: Option<MqttFacts<BusFacts>>,
    /// Where the state is kept.
    pub state: StateFacts,
    /// The files and directories of the access lists, by their keys in the config.
    pub lists: Vec<ListFacts>,
    /// The other files without which it does not start.
    pub needed: Vec<FileFacts>,
    /// How many tokens of tenants there are, or why their file cannot be used; none if the config names none.
    pub tokens: Option<Result<usize, String>>,
    /// How many files the running broker may open, if that is known.
    pub files: Option<usize>,
    /// The clock.
    pub clock: ClockFacts,
}

/// A port on which the broker listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortFacts {
    /// The key of the config that names it.
    pub key: &'static str,
    /// Host and port.
    pub listen: String,
    /// The process that has it; or why none can.
    pub owner: Result<PortOwner, String>,
}

/// A certificate that the broker shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// The section of the config that names its files.
    pub section: &'static str,
    /// The file of the certificate; or that of it and its key which is not there while the unit does not run.
    pub file: PathBuf,
    /// Why the broker's user cannot read it or its key.
    pub denied: Option<String>,
    /// For how long it counts, if it is there while the unit does not run; or why it cannot be used.
    pub validity: Result<Option<Validity>, String>,
}

/// The MQTT server inside the broker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EmbeddedFacts {
    /// Whether other machines reach it.
    pub is_reachable: bool,
    /// Its users, if it has any.
    pub has_users: bool,
    /// The users that are workers.
    pub workers: BTreeSet<String>,
}

/// The rights at the MQTT server, and the retained messages there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BusFacts {
    /// The rights that it refuses.
    pub rights: Rights,
    /// The workers whose hello is retained.
    pub hellos: BTreeSet<String>,
    /// The workers of which anything is retained.
    pub retained_received: BTreeSet<String>,
}
