//! The origin of an interface's leases: the registry, whose server it is, or the tenants, whose hub it is.

use ipnet::IpNet;
use wgkex_common::config::{HubSettings, ServerSettings};
use wgkex_common::wire::lease::{AnnouncedHub, AnnouncedServer};
use wgkex_common::wire::message::Hello;
use wgkex_kernel::Device;

/// The owners of the addresses that the peers of an interface have.
#[derive(Debug, Clone)]
pub enum LeaseSource {
    /// Clients of a server of the registry.
    Registry(ServerSettings),
    /// Members of tenants.
    Tenants(HubSettings),
}

/// The kinds of leases that a broker has.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// Those of a registry.
    pub(super) registry: bool,
    /// Those of tenants.
    pub(super) tenants: bool,
}

impl From<&Hello> for Offer {
    fn from(hello: &Hello) -> Self {
        Self { registry: hello.has_leases(), tenants: hello.tenants.is_some() }
    }
}

/// The description of an interface that a worker publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announced {
    /// A server of the registry.
    Server(AnnouncedServer),
    /// The hub of tenants.
    Hub(AnnouncedHub),
}

impl LeaseSource {
    /// The name of the interface.
    pub fn interface(&self) -> &str {
        match self {
            Self::Registry(server) => &server.interface,
            Self::Tenants(hub) => &hub.interface,
        }
    }

    /// The networks that leases may be in.
    pub fn networks(&self) -> &[IpNet] {
        match self {
            Self::Registry(server) => std::slice::from_ref(&server.network),
            Self::Tenants(hub) => &hub.networks.pool,
        }
    }

    /// Whether a broker has such leases.
    pub fn is_at(&self, broker: Offer) -> bool {
        match self {
            Self::Registry(_) => broker.registry,
            Self::Tenants(_) => broker.tenants,
        }
    }

    /// The description of the interface for brokers; none while the interface has no key or no port.
    pub fn announced(&self, device: &Device, external_name: &str) -> Option<Announced> {
        let public_key = device.public_key.filter(|_| device.listen_port != 0)?;
        let endpoint = |own: &Option<String>| own.clone().unwrap_or_else(|| external_name.to_owned());
        Some(match self {
            Self::Registry(ServerSettings { network, reserved, endpoint: own, allowed_ips, .. }) => {
                Announced::Server(AnnouncedServer {
                    public_key,
                    network: *network,
                    reserved: *reserved,
                    endpoint_address: endpoint(own),
                    endpoint_port: device.listen_port,
                    allowed_ips: allowed_ips.clone().unwrap_or_else(|| network.to_string()),
                })
            }
            Self::Tenants(HubSettings { endpoint: own, networks, .. }) => Announced::Hub(AnnouncedHub {
                public_key,
                endpoint_address: endpoint(own),
                endpoint_port: device.listen_port,
                networks: networks.clone(),
            }),
        })
    }
}
