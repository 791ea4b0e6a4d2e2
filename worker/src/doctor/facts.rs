//! What is known of a gateway when the checks decide.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::path::PathBuf;

use wgkex_common::config::{Problem, Setup};
use wgkex_common::doctor::bus::{MqttFacts, Rights};
use wgkex_common::doctor::clock::ClockFacts;
use wgkex_common::doctor::files::{FileFacts, ListFacts, Running, StateFacts};
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::peer_clock::Difference;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::links::LinkKind;

use crate::leases::ServerStatus;
use crate::status::Status;

/// Everything that is known.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What is odd in the config.
    pub config_warnings: Vec<Problem>,
    /// Whether the config has a section `setup`.
    pub is_setup_named: bool,
    /// `worker_listen`, and who listens there.
    pub listener: (String, PortOwner),
    /// The interfaces by which this machine reaches the internet.
    pub uplinks: BTreeSet<Uplink>,
    /// Whether this process has `CAP_NET_ADMIN`.
    pub has_net_admin: bool,
    /// Where WireGuard can come from.
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
    /// The MQTT server, and what it allows.
    pub mqtt: MqttFacts<BusFacts>,
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

/// Where WireGuard can come from.
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
    /// The interface, if it is there; or why that cannot be told.
    pub wireguard: Result<Option<WireguardFacts>, String>,
}

/// A domain's interfaces.
#[derive(Debug, Clone)]
pub struct DomainFacts {
    /// The domain.
    pub domain: Domain,
    /// The config's section for them.
    pub setup: Setup,
    /// `wg-REST`, if it is there; or why that is not known.
    pub wireguard: Result<Option<WireguardFacts>, String>,
    /// `vx-REST`.
    pub vxlan: Result<Option<LinkFacts>, String>,
    /// Who has the UDP port of `wg-REST`, or the one that it is to have.
    pub port_owner: PortOwner,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFacts {
    /// Its index.
    pub index: u32,
    /// What made it.
    pub kind: LinkKind,
    /// Whether it is set up.
    pub up: bool,
    /// The largest packet that it takes.
    pub mtu: u32,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether it has an IPv4 address.
    pub has_ipv4: bool,
    /// The `rp_filter` that counts for it, of IPv4; 1 is the strict one.
    pub rp_filter: u8,
    /// The packets that it has received.
    pub received: Received,
}

/// The packets that an interface has received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// All of them.
    pub packets: u64,
    /// Those of IPv6 that were for this machine.
    pub own_ipv6: u64,
}

/// `wg-REST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardFacts {
    /// As an interface.
    pub link: LinkFacts,
    /// Whether a userspace WireGuard listens for commands by its name.
    pub is_userspace: bool,
    /// Whether one may, which only root can ask.
    pub is_hidden: bool,
    /// The WireGuard device; none if it is no WireGuard interface, or why it does not answer.
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
    /// What of wg-quick there is for an interface.
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
    /// Whether it says that routes stay which systemd-networkd did not make.
    pub keeps_configuration: bool,
}

/// What of wg-quick there is for an interface.
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
    /// Its process, and the state of its files as it reports them.
    pub process: Running,
    /// Why its connection with the MQTT server does not stand; none if it does.
    pub mqtt_cause: Option<String>,
    /// Whether it finds that another program uses its name.
    pub is_name_in_use: bool,
    /// Whether it can write list entries of admin calls.
    pub keeps_lists: bool,
    /// Why routers cannot use a domain there, by the domain's name; without a reason it was not looked at yet.
    pub domains_down: BTreeMap<String, Option<String>>,
    /// The brokers whose clock is not its own, by name.
    pub clocks_off: BTreeMap<String, Difference>,
    /// The servers of the registry that it is.
    pub servers: BTreeMap<String, ServerStatus>,
}

impl From<Status> for RunningWorker {
    fn from(status: Status) -> Self {
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

/// What the MQTT server allows, and what is retained there of this worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BusFacts {
    /// What it refuses.
    pub rights: Rights,
    /// Whether a worker of this name is online; none if nothing is retained of that.
    pub online: Option<bool>,
    /// The key of the WireGuard interface of each domain, as a worker of this name published it.
    pub published_keys: BTreeMap<String, PublicKey>,
}
