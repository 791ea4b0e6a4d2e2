//! One WireGuard interface: found, or made, of the kernel or of a userspace program.

use std::io::ErrorKind;

use wgkex_kernel::links::{Link, LinkKind, Links};
use wgkex_kernel::{Backend, wireguard};

use super::differences::SetupStep;
use super::{Error, other_kind, refused, refused_step};

/// An interface of this name, which may not be there.
#[derive(Clone, Copy)]
pub(super) struct WireguardLink<'a> {
    pub links: &'a Links,
    pub name: &'a str,
    /// The implementation of a new one.
    pub backend: Backend,
}

impl WireguardLink<'_> {
    /// The interface, if it exists.
    pub async fn find(&self) -> Result<Option<(Link, Backend)>, Error> {
        let link = self.links.find(self.name).await.map_err(|error| refused(self.name, "look it up", error))?;
        match link {
            Some(link) if link.kind == LinkKind::Wireguard => Ok(Some((link, Backend::Kernel))),
            Some(link) if link.kind == LinkKind::Tun && wireguard::listens(self.name) => {
                Ok(Some((link, Backend::Userspace)))
            }
            Some(link) => Err(other_kind(self.name.into(), &link, "a WireGuard interface")),
            None => Ok(None),
        }
    }

    /// Creates it.
    pub async fn add(&self) -> Result<(), Error> {
        if self.backend == Backend::Kernel {
            match self.links.add_wireguard(self.name).await {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                made => return made.map_err(|error| refused_step(self.name, SetupStep::AddWireguard, error)),
            }
        }
        if wireguard::listens(self.name) {
            return Err(Error::Elsewhere(self.name.into(), wireguard::socket(self.name)));
        }
        let started = wireguard::start_userspace(self.name).await;
        started.map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                Error::NoWireguard(self.name.into())
            } else {
                refused_step(self.name, SetupStep::AddWireguard, error)
            }
        })
    }

    /// Its implementation.
    pub async fn backend(&self) -> Result<Backend, Error> {
        let missing = || refused(self.name, "look it up", ErrorKind::NotFound.into());
        Ok(self.find().await?.ok_or_else(missing)?.1)
    }
}
