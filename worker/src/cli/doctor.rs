//! `doctor`: gathers the facts for the checks. It reads from the kernel, the file system, the running worker and the
//! MQTT server, and changes none of them.

mod clock;
mod managers;
mod uplinks;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

use anyhow::Context as _;
use caps::{CapSet, Capability};
use clap::Args;
use tokio::runtime::Builder;
use ureq::http::StatusCode;
use wgkex_common::config::{Listen, Setup};
use wgkex_common::doctor::bus::{MqttFacts, Rights};
use wgkex_common::doctor::files::{FileFacts, ListFacts, StateFacts};
use wgkex_common::doctor::identity::{self, Sources};
use wgkex_common::doctor::sockets;
use wgkex_common::doctor::{self, Program};
use wgkex_common::mqtt::trial::{self, RetainedPublish};
use wgkex_common::wire::lease::HUB;
use wgkex_common::wire::message::WorkerData;
use wgkex_common::{Config, Domain, PublicKey, Topic, WorkerName};
use wgkex_kernel::links::{Link, LinkKind, Links};
use wgkex_kernel::{Backend, Key, wireguard};

use self::managers::{Machine, ManagedInterface};
use super::http_client::{self, StatusError};
use crate::bus::subscriber;
use crate::doctor::facts::{
    BusFacts, DomainFacts, Facts, LinkFacts, Listener, Received, RunningWorker, ServerFacts, WireguardDevice,
    WireguardFacts, WireguardSource,
};
use crate::doctor::findings;

/// The command `doctor`.
#[derive(Debug, Clone, Args)]
pub struct Doctor {
    /// Compares the clock with that of this HTTP server, such as `http://HOST:5000` of the broker
    #[arg(long, value_name = "URL")]
    broker_url: Option<String>,
    /// Check files for this user instead of the one as whom the worker runs, or its config or unit starts it
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Prints what it finds, and returns how the process ends: 0 if all is well, 1 if there are warnings, 3 if something fails
    /// or the checks cannot be made.
    #[must_use]
    pub fn run(&self, file: Option<&Path>) -> ExitCode {
        doctor::run(file, self.json, |config| Ok(findings(&self.facts(config)?)))
    }

    fn facts(&self, config: &Config) -> anyhow::Result<Facts> {
        let runtime = Builder::new_current_thread().enable_all().build().context("the runtime does not start")?;
        let (interfaces, mqtt) = runtime.block_on(async { (interfaces(config).await, mqtt(config).await) });
        // A hanging call of the kernel must not keep the process from ending.
        runtime.shutdown_background();
        let (domains, servers) = interfaces.context("netlink")?;
        let is_kernels = |domain: &DomainFacts| matches!(&domain.wireguard, Ok(Some(wireguard)) if wireguard.link.kind == LinkKind::Wireguard);
        let answer = http_client::status(&config.worker_listen);
        let is_other_version = matches!(
            answer,
            Err(StatusError::OtherHttpStatus(_, StatusCode::NOT_FOUND) | StatusError::OtherContent(..))
        );
        let running = answer.ok().map(RunningWorker::from);
        let pid = running.as_ref().and_then(worker_process);
        let sources = Sources { named: self.user.as_deref(), pid, config: config.worker_user.as_deref() };
        let user = identity::find(Program::Worker, sources);
        Ok(Facts {
            config_warnings: config.warnings.clone(),
            is_setup_named: config.is_setup_named,
            listener: Listener { is_other_version, ..listener(&config.worker_listen) },
            uplinks: uplinks::find(),
            has_net_admin: caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false),
            wireguard: WireguardSource {
                kernel: domains.iter().any(is_kernels) || has_kernel_wireguard(),
                userspace: is_program("wireguard-go"),
            },
            managers: Machine::this().managers(&managed(config)),
            domains,
            servers,
            clock: clock::facts(self.broker_url.as_deref(), running.as_ref()),
            worker: config.name.to_string(),
            running,
            state: StateFacts::of(&config.state_dir, "worker.sqlite", user.as_ref()),
            lists: ListFacts::of(&config.key_lists, user.as_ref()),
            needed: FileFacts::of(config, Program::Worker, user.as_ref()),
            mqtt,
        })
    }
}

fn listener(listen: &Listen) -> Listener {
    let address = listen.host.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let owner = sockets::of_listener(address, listen.port);
    Listener { listen: listen.to_string(), owner, is_other_version: false }
}

/// The interfaces that no other program may manage.
fn managed(config: &Config) -> Vec<ManagedInterface> {
    let of_domains = config
        .domains
        .iter()
        .flat_map(|domain| [ManagedInterface::Wireguard(domain.wireguard()), ManagedInterface::Vxlan(domain.vxlan())]);
    let servers = config.servers.values().map(|server| &server.interface);
    let others = servers.chain(config.hub.iter().map(|hub| &hub.interface));
    of_domains.chain(others.cloned().map(ManagedInterface::Wireguard)).collect()
}

/// The process of the worker that answers, if its process id is the same in this process's namespace.
fn worker_process(running: &RunningWorker) -> Option<u32> {
    Some(running.process.pid).filter(|pid| sockets::name(*pid) == "wgkex-worker")
}

async fn interfaces(config: &Config) -> io::Result<(Vec<DomainFacts>, Vec<ServerFacts>)> {
    let links = Links::open()?;
    let (mut domains, mut servers) = (Vec::new(), Vec::new());
    for (domain, setup) in &config.setup {
        domains.push(self::domain(&links, domain, setup).await);
    }
    let hub = config.hub.iter().map(|hub| (HUB, &hub.interface, hub.listen_port));
    let of_registry = config.servers.iter().map(|(name, server)| (&**name, &server.interface, server.listen_port));
    for (name, interface, listen_port) in of_registry.chain(hub) {
        let wireguard = wireguard_of(&links, interface).await;
        servers.push(ServerFacts { name: name.to_owned(), interface: interface.clone(), listen_port, wireguard });
    }
    Ok((domains, servers))
}

/// The WireGuard interface of this name, if it is there.
async fn wireguard_of(links: &Links, name: &str) -> Result<Option<WireguardFacts>, String> {
    match links.find(name).await {
        Ok(Some(link)) => Ok(Some(wireguard_facts(name, link).await)),
        Ok(None) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

async fn domain(links: &Links, domain: &Domain, setup: &Setup) -> DomainFacts {
    let (wg, vx) = (domain.wireguard(), domain.vxlan());
    let vxlan = links.find(&vx).await.map_err(|error| error.to_string());
    let wireguard = wireguard_of(links, &wg).await;
    let device = wireguard.as_ref().ok().and_then(|facts| facts.as_ref()?.device.as_ref().ok()?.as_ref());
    let port = device.map(|device| device.port).filter(|port| *port != 0).unwrap_or(setup.listen_port);
    DomainFacts {
        domain: domain.clone(),
        setup: setup.clone(),
        vxlan: vxlan.map(|link| link.map(|link| link_facts(&vx, link))),
        port_owner: sockets::of_udp(port),
        wireguard,
    }
}

async fn wireguard_facts(name: &str, link: Link) -> WireguardFacts {
    let is_userspace = link.kind == LinkKind::Tun && wireguard::listens(name);
    let backend = match link.kind {
        LinkKind::Wireguard => Some(Backend::Kernel),
        LinkKind::Tun if is_userspace => Some(Backend::Userspace),
        LinkKind::Tun | LinkKind::Vxlan(_) | LinkKind::Other(_) | LinkKind::Physical => None,
    };
    let device = match backend {
        None => Ok(None),
        Some(backend) => match wireguard::get(name, backend).await {
            Ok(device) => Ok(Some(WireguardDevice {
                public_key: device
                    .public_key
                    .filter(|_| device.private_key.is_some_and(|key| key != Key::zero()))
                    .and_then(|key| PublicKey::from_bytes(key.0).ok()),
                port: device.listen_port.unwrap_or(0),
            })),
            Err(error) => Err(error.to_string()),
        },
    };
    let is_socket_inaccessible = link.kind == LinkKind::Tun && !is_userspace && wireguard::is_socket_inaccessible(name);
    WireguardFacts { link: link_facts(name, link), is_userspace, is_socket_inaccessible, device }
}

fn link_facts(name: &str, link: Link) -> LinkFacts {
    let Link { index, kind, up, mtu, addresses, has_ipv4, auto_address: _ } = link;
    let filter = |of: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{of}/rp_filter"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    // The larger value is in effect (ip-sysctl).
    let rp_filter = filter("all").max(filter(name));
    LinkFacts { index, kind, up, mtu, addresses, has_ipv4, rp_filter, received: received(name) }
}

/// The counters of received packets of the interface, in this network namespace.
fn received(name: &str) -> Received {
    let read = |file: &str| fs::read_to_string(format!("/proc/self/net/{file}")).unwrap_or_default();
    let (all, own) = (read("dev"), read(&format!("dev_snmp6/{name}")));
    let packets = all.lines().find_map(|line| {
        let counters = line.trim_start().strip_prefix(name)?.strip_prefix(':')?;
        counters.split_whitespace().nth(1)?.parse().ok()
    });
    let own_ipv6 = own.lines().find_map(|line| line.strip_prefix("Ip6InDelivers")?.trim().parse().ok());
    Received { packets: packets.unwrap_or(0), own_ipv6: own_ipv6.unwrap_or(0) }
}

/// Whether the kernel has WireGuard, or can load it.
fn has_kernel_wireguard() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let lists = ["modules.builtin", "modules.dep"].map(|list| format!("/lib/modules/{}/{list}", release.trim()));
    let is_listed = |list: &String| fs::read_to_string(list).is_ok_and(|text| text.contains("/wireguard.ko"));
    Path::new("/sys/module/wireguard").exists() || lists.iter().any(is_listed)
}

fn is_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Connects with a separate client id. It begins with the worker's name, as that of the worker's second session does,
/// so that the worker keeps its connections.
async fn mqtt(config: &Config) -> MqttFacts<BusFacts> {
    let worker = || WorkerName::from(&config.name);
    let own: BTreeSet<String> = [Topic::WorkerStatus { worker: worker() }.to_string()]
        .into_iter()
        .chain(config.domains.iter().map(|domain| data(&worker(), domain)))
        .collect();
    let sessions = [subscriber::session(config), subscriber::secondary_session(config)];
    let (id, echo) = (format!("{}-doctor", config.name), Topic::WorkerEcho { worker: worker() });
    let trial = trial::attempt(&config.mqtt, id, &sessions, &echo, |topic| own.contains(topic)).await;
    MqttFacts::of(trial, |allowed| {
        let published = |domain: &Domain| {
            let topic = data(&worker(), domain);
            let retained = allowed.retained.iter().rfind(|retained| retained.topic == topic)?;
            let data = WorkerData::parse(&retained.payload).ok().flatten()?;
            Some((domain.to_string(), data.public_key))
        };
        BusFacts {
            online: online(&allowed.retained, &worker()),
            published_keys: config.domains.iter().filter_map(published).collect(),
            rights: Rights::from(allowed),
        }
    })
}

fn data(worker: &WorkerName, domain: &Domain) -> String {
    Topic::WorkerData { worker: worker.clone(), domain: domain.name().into() }.to_string()
}

fn online(retained: &[RetainedPublish], worker: &WorkerName) -> Option<bool> {
    let topic = Topic::WorkerStatus { worker: worker.clone() }.to_string();
    let status = retained.iter().rfind(|retained| retained.topic == topic)?;
    Some(status.payload == b"1")
}
