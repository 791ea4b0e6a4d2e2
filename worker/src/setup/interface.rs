//! The interface of a server of the registry, or of the hub of tenants: a WireGuard interface with a key and a port,
//! and an address or forwarding between its peers. Existing attributes stay, peers included; only differing ones are
//! set.

use std::io::ErrorKind;
use std::path::Path;

use ipnet::IpNet;
use tracing::info;
use wgkex_common::address::first_of;
use wgkex_common::config::{HubSettings, ServerSettings};
use wgkex_kernel::{Key, forwarding, wireguard};

use super::link::WireguardLink;
use super::{Error, made_keys, refused};

/// The desired state of an interface.
struct WantedInterface<'a> {
    key_file: &'a Path,
    listen_port: u16,
    /// The address, with the prefix length of its network.
    address: Option<IpNet>,
    /// The pool within whose groups peers reach each other; prepared before the interface is set up.
    pool: Option<&'a [(IpNet, u8)]>,
}

/// Makes the interface of a server, or completes it.
pub(super) async fn set_up_server(link: WireguardLink<'_>, server: &ServerSettings) -> Result<(), Error> {
    let ServerSettings { key_file, listen_port, network, .. } = server;
    let address = IpNet::new(first_of(*network), network.prefix_len()).ok();
    set_up(link, WantedInterface { key_file, listen_port: *listen_port, address, pool: None }).await?;
    info!(interface = link.name, "the interface of the server is set up");
    Ok(())
}

/// Makes the interface of the hub, or completes it.
pub(super) async fn set_up_hub(link: WireguardLink<'_>, hub: &HubSettings) -> Result<(), Error> {
    let HubSettings { key_file, listen_port, networks, .. } = hub;
    let pool: Vec<_> = networks.parts().collect();
    let conflict = forwarding::conflict(link.links, link.name, &pool).await;
    if let Some(network) = conflict.map_err(|error| refused(link.name, "look at the routes", error))? {
        return Err(Error::Pool(network));
    }
    set_up(link, WantedInterface { key_file, listen_port: *listen_port, address: None, pool: Some(&pool) }).await?;
    let enabled = forwarding::enable(link.links, link.name, &pool).await;
    enabled.map_err(|error| refused(link.name, "forward within tenants", error))?;
    info!(interface = link.name, "the interface of the hub is set up");
    Ok(())
}

async fn set_up(link: WireguardLink<'_>, wanted: WantedInterface<'_>) -> Result<(), Error> {
    let WireguardLink { links, name, .. } = link;
    let changed = |change| info!(interface = name, change, "interface changed");
    if link.find().await?.is_none() {
        link.add().await?;
        changed("created");
    }
    let backend = link.backend().await?;
    let device = wireguard::get(name, backend).await.map_err(|error| refused(name, "read it", error))?;
    let current = device.private_key.filter(|key| *key != Key::zero());
    let key = made_keys::load_or_make(wanted.key_file, current.as_ref())
        .map_err(|error| Error::KeyFile(name.to_owned(), error))?;
    if current.as_ref() != Some(&key) {
        wireguard::set_key(name, backend, key).await.map_err(|error| refused(name, "set its key", error))?;
        changed("its key is set");
    }
    if device.listen_port != Some(wanted.listen_port) {
        let set = wireguard::set_port(name, backend, wanted.listen_port).await;
        set.map_err(|error| refused(name, "set its port", error))?;
        changed("its port is set");
    }
    if let Some(address) = wanted.address {
        match links.add_address(name, address.addr(), address.prefix_len()).await {
            Ok(()) => changed("its address is set"),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(refused(name, "set its address", error)),
        }
    }
    if let Some(pool) = wanted.pool {
        let prepared = forwarding::prepare(links, name, pool).await;
        prepared.map_err(|error| refused(name, "keep tenants apart", error))?;
    }
    if link.find().await?.is_some_and(|(found, _)| !found.up) {
        links.up(name).await.map_err(|error| refused(name, "set it up", error))?;
        changed("set up");
    }
    Ok(())
}
