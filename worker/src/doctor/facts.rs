//! The facts about a gateway that the checks evaluate.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::path::PathBuf;

use wgkex_common::config::{ConfigProblem, Setup};
use wgkex_common::doctor::bus::{MqttFacts, Rights};
use wgkex_common::doctor::clock::ClockFacts;
use wgkex_common::doctor::files::{FileFacts, ListFacts, Running, StateFacts};
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::peer_clock::Difference;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::links::LinkKind;

use crate::leases::ServerStatus;
use crate::status::WorkerStatus;

/// All facts.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The warnings about the config.
    pub config_warnings: Vec<ConfigProblem>,
    /// Whether the config has a section `setup`.
    pub is_setup_named: bool,
    /// The listener on `worker_listen`.
    pub listener: Listener,
    /// The interfaces by which this machine reaches the internet.
    pub uplinks: BTreeSet<Uplink>,
    /// Whether this process has `CAP_NET_ADMIN`.
    pub has_net_admin: bool,
    /// The available WireGuard implementations.
    pub wireguard: WireguardSource,
    /// Each domain.
    pub domains: Vec<DomainFacts>,
    /// Each server of the registry that the config has, and the hub.
    pub servers: Vec<ServerFacts>,
    /// Other programs that may manage the interfaces.
    pub managers: Managers,
    /// The clock.
    pub clock: ClockFacts,
    /// The name of this machine's worker on the bus.
    pub worker: String,
    /// The worker that answers on `worker_listen`, if one does.
    pub running: Option<RunningWorker>,
    /// Where the state is kept.
    pub state: StateFacts,
    /// The files and directories of the access lists, by their keys in the config.
    pub lists: Vec<ListFacts>,
    /// The files without which it does not start.
    pub needed: Vec<FileFacts>,
    /// The MQTT server, and the rights of the client there.
    pub mqtt: MqttFacts<BusFacts>,
}

/// The listener on `worker_listen`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The address and port.
    pub listen: String,
    /// The process that listens there.
    pub owner: PortOwner,
    /// It answers, but not as a worker of this version.
    pub is_other_version: bool,
}

/// The interface of a default route, of IPv4 or IPv6.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// The largest packet that it takes.
    pub mtu: u32,
    /// Whether it is that of a default route of IPv6.
    pub has_ipv6: bool,
}

/// The available WireGuard implementations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WireguardSource {
    /// The kernel has it, or has a module of it.
    pub kernel: bool,
    /// There is a program `wireguard-go`.
    pub userspace: bool,
}

/// A server of the registry that this gateway is, or the hub of tenants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// Its name.
    pub name: String,
    /// Its interface.
    pub interface: String,
    /// The UDP port that the config has.
    pub listen_port: u16,
    /// The interface, if it is there; or the error of looking it up.
    pub wireguard: Result<Option<WireguardFacts>, String>,
}

/// A domain's interfaces.
#[derive(Debug, Clone)]
pub struct DomainFacts {
    /// The domain.
    pub domain: Domain,
    /// The config's section for them.
    pub setup: Setup,
    /// `wg-REST`, if it is there; or the error of looking it up.
    pub wireguard: Result<Option<WireguardFacts>, String>,
    /// `vx-REST`.
    pub vxlan: Result<Option<LinkFacts>, String>,
    /// The process that has the UDP port of `wg-REST`, or the one in the config.
    pub port_owner: PortOwner,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFacts {
    /// Its index.
    pub index: u32,
    /// Its kind.
    pub kind: LinkKind,
    /// Whether it is set up.
    pub up: bool,
    /// Its MTU.
    pub mtu: u32,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether it has an IPv4 address.
    pub has_ipv4: bool,
    /// The `rp_filter` in effect, of IPv4; 1 is strict.
    pub rp_filter: u8,
    /// The packets that it has received.
    pub received: Received,
}

/// The packets that an interface has received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// All of them.
    pub packets: u64,
    /// Those of IPv6 that were addressed to this machine.
    pub own_ipv6: u64,
}

/// `wg-REST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardFacts {
    /// As an interface.
    pub link: LinkFacts,
    /// Whether a userspace WireGuard listens for commands by its name.
    pub is_userspace: bool,
    /// Whether a userspace WireGuard may have its name, which only root can check.
    pub is_socket_inaccessible: bool,
    /// The WireGuard device; none if it is no WireGuard interface, or the error of reading it.
    pub device: Result<Option<WireguardDevice>, String>,
}

/// A WireGuard device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireguardDevice {
    /// Its own key.
    pub public_key: Option<PublicKey>,
    /// Its UDP port; 0 while it has none.
    pub port: u16,
}

/// Other programs that may manage the interfaces of domains, servers and the hub.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Managers {
    /// Whether systemd-networkd runs.
    pub networkd_runs: bool,
    /// Whether it leaves alone routes and rules that it did not make.
    pub networkd_keeps_foreign: bool,
    /// Its file for each interface that has one.
    pub networkd_files: BTreeMap<String, NetworkFile>,
    /// The units and configs of wg-quick for an interface.
    pub wg_quick: Vec<WgQuick>,
    /// Whether `NetworkManager` runs.
    pub network_manager_runs: bool,
    /// The interfaces that it manages.
    pub network_manager_manages: BTreeSet<String>,
}

/// A .network file of systemd-networkd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkFile {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it keeps routes that systemd-networkd did not make.
    pub keeps_configuration: bool,
}

/// A unit or config of wg-quick for an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WgQuick {
    /// The interface.
    pub interface: String,
    /// Its unit or its config.
    pub file: PathBuf,
    /// Whether it is started with the machine.
    pub is_enabled: bool,
}

/// The worker that answers on `worker_listen`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningWorker {
    /// Its name on the bus.
    pub name: String,
    /// Its process, and whether it can use its files, as it reports.
    pub process: Running,
    /// Why it is not connected to the MQTT server; none if it is.
    pub mqtt_cause: Option<String>,
    /// Whether it detects another program with its name.
    pub is_name_in_use: bool,
    /// Whether it can write list entries of admin calls.
    pub keeps_lists: bool,
    /// Why routers cannot use a domain there, by the domain's name; without a reason its interfaces were not read yet.
    pub domains_down: BTreeMap<String, Option<String>>,
    /// The brokers whose clock differs from its own, by name.
    pub clocks_off: BTreeMap<String, Difference>,
    /// The servers of the registry that it is.
    pub servers: BTreeMap<String, ServerStatus>,
}

impl From<WorkerStatus> for RunningWorker {
    fn from(status: WorkerStatus) -> Self {
        let down = status.domains.into_iter().filter(|(_, domain)| !domain.up);
        Self {
            name: status.worker,
            process: Running { pid: status.pid, keeps_state: status.state_kept, lists_damaged: status.lists_damaged },
            mqtt_cause: (!status.mqtt.connected).then(|| status.mqtt.cause.unwrap_or_else(|| "no connection".into())),
            is_name_in_use: status.mqtt.name_in_use,
            keeps_lists: status.lists_kept,
            domains_down: down.map(|(name, domain)| (name, domain.reason)).collect(),
            clocks_off: status.clocks_off,
            servers: status.servers,
        }
    }
}

/// The client's rights at the MQTT server, and the messages retained there of this worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BusFacts {
    /// The rights that it lacks.
    pub rights: Rights,
    /// Whether the retained status of a worker of this name is online; none if no status is retained.
    pub online: Option<bool>,
    /// The key of the WireGuard interface of each domain, as a worker of this name published it.
    pub published_keys: BTreeMap<String, PublicKey>,
}
