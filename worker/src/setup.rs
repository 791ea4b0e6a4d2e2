//! `wgkex-worker setup`: makes a domain's `wg-REST` and `vx-REST`, and deletes them.
//!
//! No task: a command, which ends when all is done. It reads the interfaces, [`differences`] computes the steps to the
//! state in the config, and each is applied by [`wgkex_kernel::links`] or [`wgkex_kernel::wireguard`]; the interfaces
//! of servers and of the hub are made in [`interface`].
//!
//! Owner: the process of the command. Previous stop: the config; next stop: the kernel, whose interfaces the worker later
//! serves. No router's key passes here, only the gateway's own, in its key file.

mod differences;
mod interface;
mod link;
mod made_keys;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use caps::{CapSet, Capability};
use ipnet::IpNet;
use nix::errno::Errno;
use tracing::info;
use wgkex_common::config::{HubSettings, ServerSettings, Setup};
use wgkex_common::{Config, Domain, KeyError, PublicKey};
use wgkex_kernel::key_file::KeyFileError;
use wgkex_kernel::links::{Link, LinkKind, Links, VxlanAttributes};
use wgkex_kernel::{Backend, Key, forwarding, wireguard};

use self::differences::{Actual, Desired, SetupStep, VXLAN_ADDRESS, Vxlan, VxlanSettings, Wireguard, differences};
use self::link::WireguardLink;

/// Why the setup failed. Each error is one line that names the interface or the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This process may not change interfaces.
    #[error("{0}: CAP_NET_ADMIN is missing: run as root or with this capability")]
    Capability(String),
    /// IPv6 is off, so there is no link-local address.
    #[error("{0}: IPv6 is off for this interface: it needs net.ipv6.conf.{0}.disable_ipv6 = 0")]
    Ipv6(String),
    /// An interface of another kind has the name.
    #[error("{interface} is {kind} and not {wanted}: left as it is")]
    OtherKind {
        /// Its name.
        interface: String,
        /// Its kind.
        kind: String,
        /// The expected kind.
        wanted: &'static str,
    },
    /// A VXLAN interface that would have to be created again.
    #[error("{interface} has {incompatible}: left as it is; `wgkex-worker setup --remove` first, then it is made anew")]
    Incompatible {
        /// Its name.
        interface: String,
        /// The attribute that differs from the config.
        incompatible: String,
    },
    /// Neither the kernel has WireGuard, nor is wireguard-go installed.
    #[error("{0}: the kernel has no WireGuard and there is no wireguard-go: apt-get install wireguard-go")]
    NoWireguard(String),
    /// The control socket belongs to an interface of another network namespace.
    #[error("{0}: a userspace WireGuard of this name runs in another network namespace (it listens at {1})")]
    Elsewhere(String, PathBuf),
    /// This machine has a route into the pool: its addresses could not be told apart from those of members.
    #[error(
        "tenants.pool: this machine has a route to {0}, and what it sends there would go to the hub: choose another pool, at the \
         brokers too"
    )]
    Pool(IpNet),
    /// The key file could not be used.
    #[error("{0}: {1}")]
    KeyFile(String, KeyFileError),
    /// The key in the file has no usable public key.
    #[error("{0}: {1}")]
    Key(String, KeyError),
    /// The kernel, or the userspace WireGuard, returned an error.
    #[error("{interface}: {action}: {source}")]
    Refused {
        /// Its name.
        interface: String,
        /// The failed action.
        action: String,
        /// The error.
        source: io::Error,
    },
}

/// Makes the interfaces of each domain and server, and that of the hub, or completes them. Existing ones stay, their
/// peers included; only differing attributes are set. A new WireGuard interface is the kernel's, or wireguard-go's
/// where the kernel has no WireGuard or `backend` is [`Backend::Userspace`]. Nothing is changed as long as one of the
/// domains cannot be set up as in the config.
pub async fn setup(config: &Config, backend: Backend) -> Result<(), Error> {
    let links = open(&config.setup)?;
    let mut plans = Vec::new();
    for (domain, setup) in &config.setup {
        let site = LocalDomain { links: &links, domain, backend };
        let (key, steps) = site.plan(setup).await?;
        plans.push((site, key, steps));
    }
    for (site, key, steps) in plans {
        for step in &steps {
            site.apply(*step, &key).await?;
            info!(interface = site.name_for(*step), %step, "interface changed");
        }
        info!(domain = %site.domain, changes = steps.len(), "domain is set up");
    }
    let link = |name| WireguardLink { links: &links, name, backend };
    for server in config.servers.values() {
        interface::set_up_server(link(&server.interface), server).await?;
    }
    // The config may have had another hub before.
    for interface in forwarding::interfaces(&links).await.map_err(|error| refused("ip rule", "read them", error))? {
        if config.hub.as_ref().is_none_or(|hub| hub.interface != interface) {
            delete(&links, &interface).await?;
            disable_hub(&links, Some(&interface)).await?;
        }
    }
    match &config.hub {
        Some(hub) => interface::set_up_hub(link(&hub.interface), hub).await?,
        None => disable_hub(&links, None).await?,
    }
    Ok(())
}

/// Deletes the interfaces of each domain and server, and that of the hub. A missing one is no error; the key files
/// stay. Nothing is deleted as long as one of the names belongs to an interface of another kind.
pub async fn remove(config: &Config) -> Result<(), Error> {
    let links = open(&config.setup)?;
    let mut doomed = Vec::new();
    for domain in config.setup.keys() {
        let site = LocalDomain { links: &links, domain, backend: Backend::Kernel };
        doomed.extend(site.vxlan().await?.map(|_| (domain.vxlan(), None)));
        doomed.extend(site.wireguard().await?.map(|(_, backend)| (domain.wireguard(), Some(backend))));
    }
    let servers = config.servers.values().map(|ServerSettings { interface, .. }| interface);
    for interface in servers.chain(config.hub.iter().map(|HubSettings { interface, .. }| interface)) {
        let link = WireguardLink { links: &links, name: interface, backend: Backend::Kernel };
        doomed.extend(link.find().await?.map(|(_, backend)| (interface.clone(), Some(backend))));
    }
    for (interface, backend) in doomed {
        delete_link(&links, &interface, backend).await?;
    }
    disable_hub(&links, None).await
}

/// Deletes a WireGuard interface, if it is there.
async fn delete(links: &Links, interface: &str) -> Result<(), Error> {
    let link = WireguardLink { links, name: interface, backend: Backend::Kernel };
    match link.find().await? {
        Some((_, backend)) => delete_link(links, interface, Some(backend)).await,
        None => Ok(()),
    }
}

async fn delete_link(links: &Links, interface: &str, backend: Option<Backend>) -> Result<(), Error> {
    links.delete(interface).await.map_err(|error| refused(interface, "delete it", error))?;
    if backend == Some(Backend::Userspace) {
        wireguard::ended(interface).await.map_err(|error| refused(interface, "end wireguard-go", error))?;
    }
    info!(interface, "interface deleted");
    Ok(())
}

/// Deletes the rules of a hub whose interface is deleted: without its rules, members' packets could leave by any
/// interface, so the interface goes first.
async fn disable_hub(links: &Links, interface: Option<&str>) -> Result<(), Error> {
    forwarding::disable(links, interface).await.map_err(|error| refused("ip rule", "delete those of a hub", error))
}

fn open(domains: &BTreeMap<Domain, Setup>) -> Result<Links, Error> {
    let first = domains.keys().next().map(Domain::wireguard).unwrap_or_default();
    // If the capabilities cannot be read, the kernel decides.
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(true) {
        return Err(Error::Capability(first));
    }
    Links::open().map_err(|error| refused(&first, "open netlink", error))
}

/// A domain on this machine.
struct LocalDomain<'a> {
    links: &'a Links,
    domain: &'a Domain,
    backend: Backend,
}

impl LocalDomain<'_> {
    async fn plan(&self, setup: &Setup) -> Result<(Key, Vec<SetupStep>), Error> {
        let (actual, current) = self.find().await?;
        let interface = self.domain.wireguard();
        let key = made_keys::load_or_make(&setup.key_file, current.as_ref())
            .map_err(|error| Error::KeyFile(interface.clone(), error))?;
        let desired = Desired {
            public_key: PublicKey::from_bytes(key.get_public().0).map_err(|error| Error::Key(interface, error))?,
            listen_port: setup.listen_port,
            vxlan_id: setup.vxlan_id,
            vxlan_port: setup.vxlan_port,
        };
        let steps = differences(&actual, &desired).map_err(|incompatible| Error::Incompatible {
            interface: self.domain.vxlan(),
            incompatible: incompatible.0,
        })?;
        Ok((key, steps))
    }

    /// The existing interfaces, and the private key of `wg-REST` if it has one.
    async fn find(&self) -> Result<(Actual, Option<Key>), Error> {
        let mut actual = Actual::default();
        let mut current = None;
        let wireguard = self.wireguard().await?;
        let index = wireguard.as_ref().map(|(link, _)| link.index);
        if let Some((link, backend)) = wireguard {
            let name = self.domain.wireguard();
            let device = wireguard::get(&name, backend).await.map_err(|error| refused(&name, "read it", error))?;
            current = device.private_key.filter(|key| *key != Key::zero());
            actual.wireguard = Some(Wireguard {
                public_key: device.public_key.and_then(|key| PublicKey::from_bytes(key.0).ok()),
                listen_port: device.listen_port.unwrap_or(0),
                addresses: link.addresses,
                auto_address: link.auto_address,
                up: link.up,
            });
        }
        if let Some((link, attributes)) = self.vxlan().await? {
            let shape = VxlanSettings::of(&attributes, index);
            actual.vxlan = Some(Vxlan { shape, addresses: link.addresses, up: link.up });
        }
        Ok((actual, current))
    }

    /// `wg-REST`, if it is there.
    async fn wireguard(&self) -> Result<Option<(Link, Backend)>, Error> {
        self.link(&self.domain.wireguard()).find().await
    }

    fn link<'a>(&'a self, name: &'a str) -> WireguardLink<'a> {
        WireguardLink { links: self.links, name, backend: self.backend }
    }

    /// `vx-REST`, if it is there.
    async fn vxlan(&self) -> Result<Option<(Link, VxlanAttributes)>, Error> {
        let name = self.domain.vxlan();
        let link = self.links.find(&name).await.map_err(|error| refused(&name, "look it up", error))?;
        let Some(link) = link else { return Ok(None) };
        match link.kind {
            LinkKind::Vxlan(attributes) => Ok(Some((link, attributes))),
            LinkKind::Wireguard | LinkKind::Tun | LinkKind::Other(_) | LinkKind::Physical => {
                Err(other_kind(name, &link, "a VXLAN interface"))
            }
        }
    }

    async fn apply(&self, step: SetupStep, key: &Key) -> Result<(), Error> {
        let (links, wg, vx) = (self.links, &self.domain.wireguard(), &self.domain.vxlan());
        let done = match step {
            SetupStep::AddWireguard => return self.link(wg).add().await,
            SetupStep::NoAutoAddress => links.no_auto_address(wg).await,
            SetupStep::SetKey => wireguard::set_key(wg, self.link(wg).backend().await?, key.clone()).await,
            SetupStep::SetPort(port) => wireguard::set_port(wg, self.link(wg).backend().await?, port).await,
            SetupStep::AddAddress(address) => links.add_address(wg, address, 128).await,
            SetupStep::UpWireguard => links.up(wg).await,
            SetupStep::AddVxlan { id, port, local } => links.add_vxlan(vx, id, port, local, wg).await,
            SetupStep::AddVxlanAddress => links.add_address(vx, VXLAN_ADDRESS, 64).await,
            SetupStep::UpVxlan => links.up(vx).await,
        };
        done.map_err(|error| refused_step(&self.name_for(step), step, error))
    }

    fn name_for(&self, step: SetupStep) -> String {
        match step {
            SetupStep::AddVxlan { .. } | SetupStep::AddVxlanAddress | SetupStep::UpVxlan => self.domain.vxlan(),
            SetupStep::AddWireguard
            | SetupStep::NoAutoAddress
            | SetupStep::SetKey
            | SetupStep::SetPort(_)
            | SetupStep::AddAddress(_)
            | SetupStep::UpWireguard => self.domain.wireguard(),
        }
    }
}

fn other_kind(interface: String, link: &Link, wanted: &'static str) -> Error {
    let kind = match &link.kind {
        LinkKind::Tun => "a TUN device without a WireGuard behind it".into(),
        LinkKind::Wireguard => "of kind wireguard".into(),
        LinkKind::Vxlan(_) => "of kind vxlan".into(),
        LinkKind::Other(kind) => format!("of kind {kind}"),
        LinkKind::Physical => "a device of no kind".into(),
    };
    Error::OtherKind { interface, kind, wanted }
}

fn refused_step(interface: &str, step: SetupStep, error: io::Error) -> Error {
    // The kernel's errors where IPv6 is off for the interface, and where it is off altogether.
    let ipv6_is_off = matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported)
        && matches!(step, SetupStep::NoAutoAddress | SetupStep::AddAddress(_) | SetupStep::AddVxlanAddress)
        && error.raw_os_error() != Some(Errno::EPERM as i32);
    if ipv6_is_off { Error::Ipv6(interface.into()) } else { refused(interface, &step.to_string(), error) }
}

fn refused(interface: &str, action: &str, source: io::Error) -> Error {
    if source.raw_os_error() == Some(Errno::EPERM as i32) {
        return Error::Capability(interface.into());
    }
    Error::Refused { interface: interface.into(), action: action.into(), source }
}
