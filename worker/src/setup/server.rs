//! The interface of a server of the registry: a WireGuard interface with the server's key, port and address. What is there stays,
//! its peers included; only what differs is set.

use std::io::ErrorKind;

use tracing::info;
use wgkex_common::address::first_of;
use wgkex_common::config::Server;
use wgkex_kernel::{Key, key_file, wireguard};

use super::link::WireguardLink;
use super::{Error, refused};

/// Makes the interface, or completes it.
pub(super) async fn set_up(link: WireguardLink<'_>, server: &Server) -> Result<(), Error> {
    let WireguardLink { links, name, .. } = link;
    let changed = |change| info!(interface = name, change, "interface changed");
    if link.find().await?.is_none() {
        link.add().await?;
        changed("created");
    }
    let backend = link.backend().await?;
    let device = wireguard::get(name, backend).await.map_err(|error| refused(name, "read it", error))?;
    let current = device.private_key.filter(|key| *key != Key::zero());
    let key = key_file::load_or_make(&server.key_file, current.as_ref())
        .map_err(|error| Error::KeyFile(name.to_owned(), error))?;
    if current.as_ref() != Some(&key) {
        wireguard::set_key(name, backend, key).await.map_err(|error| refused(name, "set its key", error))?;
        changed("its key is set");
    }
    if device.listen_port != Some(server.listen_port) {
        let set = wireguard::set_port(name, backend, server.listen_port).await;
        set.map_err(|error| refused(name, "set its port", error))?;
        changed("its port is set");
    }
    match links.add_address(name, first_of(server.network), server.network.prefix_len()).await {
        Ok(()) => changed("its address is set"),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(refused(name, "set its address", error)),
    }
    if link.find().await?.is_some_and(|(found, _)| !found.up) {
        links.up(name).await.map_err(|error| refused(name, "set it up", error))?;
        changed("set up");
    }
    info!(interface = name, "the interface of the server is set up");
    Ok(())
}
