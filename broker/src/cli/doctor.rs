//! `doctor`: gathers the facts for the checks. It reads from the running broker, the file system, the kernel and the
//! MQTT server, and changes none of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::runtime::Builder;
use wgkex_common::config::{Https, Listen, MqttAddress, MqttListen, Role};
use wgkex_common::doctor::access::{FileAccess, Identity, Need, UnknownUser, find};
use wgkex_common::doctor::bus::{MqttFacts, Rights};
use wgkex_common::doctor::clock::{ClockFacts, is_synchronised};
use wgkex_common::doctor::files::{FileFacts, ListFacts, StateFacts};
use wgkex_common::doctor::identity::{self, Sources};
use wgkex_common::doctor::{self, Program, sockets};
use wgkex_common::mqtt::trial::{self, RetainedPublish};
use wgkex_common::{BrokerName, Config, Topic, WorkerName};

use crate::bus::subscriber;
use crate::cli::http_client::BrokerClient;
use crate::cli::status::fetch_status;
use crate::doctor::facts::{BusFacts, CertificateFacts, EmbeddedFacts, Facts, PortFacts};
use crate::doctor::findings;
use crate::http::status::Status;
use crate::tenants::tokens;
use crate::tls;

/// How long the running broker may take to answer.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// The command `doctor`.
#[derive(Debug, Clone, Args)]
pub struct Doctor {
    /// Check files for this user instead of the one as whom the broker runs, or its unit starts it
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Prints the findings, and returns the exit code: 0 if all is well, 1 if there are warnings, 3 if something fails
    /// or the checks cannot be made.
    #[must_use]
    pub fn run(&self, file: Option<&Path>) -> ExitCode {
        doctor::run(file, self.json, |config| Ok(findings(&self.facts(config)?)))
    }

    fn facts(&self, config: &Config) -> anyhow::Result<Facts> {
        let runtime = Builder::new_current_thread().enable_all().build().context("the runtime does not start")?;
        let mqtt = runtime.block_on(mqtt(config));
        // A server whose name does not resolve must not keep the process from its end.
        runtime.shutdown_background();
        let running = fetch_status(&BrokerClient::for_anybody(config, STATUS_TIMEOUT)).map(|sample| sample.status);
        let running = running.map_err(|error| format!("{error:#}"));
        let pid = running.as_ref().ok().and_then(broker_process);
        let sources = Sources { named: self.user.as_deref(), pid, config: None };
        let user = identity::find(Program::Broker, sources);
        Ok(Facts {
            config_warnings: config.warnings.clone(),
            ports: ports(config),
            certificates: certificates(config, user.as_ref()),
            workers: config.workers.keys().map(|name| name.as_str().to_owned()).collect(),
            embedded: config.mqtt_listen.as_ref().map(embedded),
            mqtt,
            state: StateFacts::of(&config.state_dir, "broker.sqlite", user.as_ref()),
            lists: ListFacts::of(&config.key_lists, user.as_ref()),
            needed: needed(config, user.as_ref()),
            tokens: config.tenants.as_ref().and_then(|tenants| tenants.tokens_file.as_deref()).map(tokens::count),
            files: pid.and_then(files),
            clock: ClockFacts { is_synchronised: is_synchronised(), ..ClockFacts::default() },
            running,
        })
    }
}

/// The process of the broker that answers, if it has the same number here as it has itself.
fn broker_process(status: &Status) -> Option<u32> {
    Some(status.pid).filter(|pid| sockets::name(*pid) == "wgkex-broker")
}

/// How many files a process may open.
fn files(pid: u32) -> Option<usize> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    Some(line.split_whitespace().next()?.parse().unwrap_or(usize::MAX))
}

fn ports(config: &Config) -> Vec<PortFacts> {
    let https = config.https.as_ref().map(|https| &https.listen);
    let admin = config.admin_token_hash.as_ref().map(|_| &config.admin_listen);
    let http = [("broker_listen", Some(&config.broker_listen)), ("broker_listen.tls", https), ("admin_listen", admin)];
    let http = http.into_iter().filter_map(|(key, listen)| Some((key, listen?.clone())));
    let mqtt = config.mqtt_listen.as_ref().map(|MqttListen { address, .. }| {
        ("mqtt_listen", Listen { host: address.ip().to_string(), port: address.port() })
    });
    http.chain(mqtt).map(|(key, listen)| port(key, &listen)).collect()
}

fn port(key: &'static str, listen: &Listen) -> PortFacts {
    let owner = || {
        let mut addresses = (&listen.host[..], listen.port).to_socket_addrs()?;
        let address = addresses.next().context("the name has no address")?;
        if !address.ip().is_unspecified() {
            // Whether this machine has the address, at a port that is free.
            TcpListener::bind((address.ip(), 0))?;
        }
        anyhow::Ok(sockets::of_listener(address.ip(), address.port()))
    };
    PortFacts { key, listen: listen.to_string(), owner: owner().map_err(|error| format!("{error:#}")) }
}

fn certificates(config: &Config, user: Result<&Identity, &UnknownUser>) -> Vec<CertificateFacts> {
    let https = config.https.as_ref().map(|Https { cert_file, key_file, .. }| (cert_file, key_file));
    let embedded = config.mqtt_listen.as_ref().and_then(|listen| listen.tls.as_ref()).map(|(file, key)| (file, key));
    let own = config.mqtt.tls.as_ref().and_then(|tls| tls.own.as_ref()).map(|(file, key)| (file, key));
    let named = [("broker_listen.tls", https), ("mqtt_listen.tls", embedded), ("mqtt", own)];
    let named = named.into_iter().filter_map(|(section, files)| Some((section, files?)));
    named.map(|(section, (file, key_file))| certificate(section, file, key_file, user)).collect()
}

fn certificate(
    section: &'static str,
    file: &Path,
    key_file: &Path,
    user: Result<&Identity, &UnknownUser>,
) -> CertificateFacts {
    let name = user.map_or_else(|unknown| &unknown.name, |user| &user.name);
    let accesses = [file, key_file].map(|path| (path, find(path, user, Need::Read)));
    let denied = accesses.iter().find_map(|(path, access)| match access {
        FileAccess::Denied(reason) => Some(format!("{name} cannot read {}: {reason}", path.display())),
        FileAccess::Granted
        | FileAccess::Creatable
        | FileAccess::OnlyFor(_)
        | FileAccess::OnlyWhileRunning
        | FileAccess::Unknown(_) => None,
    });
    let credential = accesses.iter().find(|(_, access)| *access == FileAccess::OnlyWhileRunning);
    let validity = match credential {
        Some(_) => Ok(None),
        None => tls::validity(section, file, key_file).map(Some).map_err(|error| error.to_string()),
    };
    let file = credential.map_or(file, |(path, _)| path);
    CertificateFacts { section, file: PathBuf::from(file), denied, validity }
}

/// The files without which it does not start, certificates and their keys apart.
fn needed(config: &Config, user: Result<&Identity, &UnknownUser>) -> Vec<FileFacts> {
    let is_of_certificate = |key: &str| key.ends_with(".cert_file") || key.ends_with(".key_file");
    let mut files = FileFacts::of(config, Program::Broker, user);
    files.retain(|file| !is_of_certificate(file.key));
    files
}

fn embedded(MqttListen { address, users, .. }: &MqttListen) -> EmbeddedFacts {
    let workers = users.iter().filter(|(_, user)| user.role == Role::Worker);
    EmbeddedFacts {
        is_reachable: !address.ip().is_loopback(),
        has_users: !users.is_empty(),
        workers: workers.map(|(name, _)| name.clone()).collect(),
    }
}

/// Connects to another server as a client of its own, so that the running broker keeps its connections. That inside the
/// broker has no password for the doctor, and would show nothing more.
async fn mqtt(config: &Config) -> Option<MqttFacts<BusFacts>> {
    let MqttAddress::External { .. } = config.mqtt.server else { return None };
    let sessions = [subscriber::session(config), subscriber::secondary_session(config)];
    let echo = Topic::BrokerEcho { broker: BrokerName::from(&config.name) };
    let id = format!("wgkex-broker-{}-doctor", config.name);
    let wanted = |topic: &str| Topic::parse(topic).is_some_and(|topic| worker_of(&topic).is_some());
    let trial = trial::attempt(&config.mqtt, id, &sessions, &echo, wanted).await;
    Some(MqttFacts::of(trial, |allowed| BusFacts {
        rights: Rights::from(allowed),
        hellos: workers(&allowed.retained, |topic| matches!(topic, Topic::WorkerHello { .. })),
        retained_received: workers(&allowed.retained, |_| true),
    }))
}

/// The workers of which such a topic is retained.
fn workers(retained: &[RetainedPublish], is_it: fn(&Topic) -> bool) -> BTreeSet<String> {
    let topics = retained.iter().filter_map(|retained| Topic::parse(&retained.topic));
    topics.filter(is_it).filter_map(|topic| Some(worker_of(&topic)?.as_str().to_owned())).collect()
}

/// The worker whose state it is.
fn worker_of(topic: &Topic) -> Option<&WorkerName> {
    if let Topic::WorkerStatus { worker }
    | Topic::WorkerHello { worker }
    | Topic::WorkerData { worker, .. }
    | Topic::ConnectedPeers { worker, .. } = topic
    {
        Some(worker)
    } else {
        None
    }
}
