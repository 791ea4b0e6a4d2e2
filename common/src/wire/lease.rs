//! The messages that keep the leases of a broker's registry and of the worker that is one of its servers equal. A
//! revision names the state of one server after a change; a worker with revision `n` that receives the change after `n`
//! has missed nothing. The addresses of tenants' members are sent to the worker that is their hub in the same way, as
//! those of the server [`HUB`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::address::tenants::TenantNetworks;
use crate::{BrokerName, PublicKey};

/// A chunk that has so many addresses is full.
pub const CHUNK_ADDRESSES_MAX: usize = 1000;
/// Servers of one worker at most.
pub const SERVERS_MAX: usize = 16;
/// The longest list of allowed-ips, and the longest endpoint.
const TEXT_MAX: usize = 4096;
/// The name of the hub of tenants among the servers of a worker. No server of the registry has a slash in its name.
pub const HUB: &str = "tenants/hub";

/// The servers that a worker is, by name; retained.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedServers {
    /// By name.
    pub servers: BTreeMap<String, AnnouncedServer>,
    /// The hub of tenants, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<AnnouncedHub>,
}

/// The data of its hub that a worker publishes for the members of tenants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedHub {
    /// The key of its interface.
    pub public_key: PublicKey,
    /// The host of the endpoint for members.
    pub endpoint_address: String,
    /// Its UDP port.
    pub endpoint_port: u16,
    /// The networks within which it forwards.
    pub networks: TenantNetworks,
}

/// The data of a server that a worker publishes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedServer {
    /// The key of its interface.
    pub public_key: PublicKey,
    /// The network of its addresses.
    pub network: IpNet,
    /// The first addresses of the network, up to this number, are not leased.
    pub reserved: u64,
    /// The host of the endpoint for clients.
    pub endpoint_address: String,
    /// Its UDP port.
    pub endpoint_port: u16,
    /// The allowed-ips of clients for this server.
    pub allowed_ips: String,
}

impl AnnouncedServers {
    /// None if there are more servers than a worker may have, or a text is too long.
    #[must_use]
    pub fn bounded(self) -> Option<Self> {
        let is_bounded = |server: &AnnouncedServer| {
            server.endpoint_address.len() <= TEXT_MAX && server.allowed_ips.len() <= TEXT_MAX
        };
        let is_hub_bounded = |hub: &AnnouncedHub| hub.endpoint_address.len() <= TEXT_MAX;
        let is_bounded = self.servers.values().all(is_bounded) && self.hub.iter().all(is_hub_bounded);
        (self.servers.len() <= SERVERS_MAX && is_bounded).then_some(self)
    }
}

/// The version of a server's leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseVersion {
    /// Differs between servers, also of the same name.
    pub id: i64,
    /// Increases with each change, and is never used again for another state, even after a copy of the database was
    /// restored.
    pub revision: i64,
}

impl LeaseVersion {
    /// Whether it is an earlier state of the same server.
    #[must_use]
    pub fn is_before(&self, other: &Self) -> bool {
        self.id == other.id && self.revision < other.revision
    }
}

/// The request of a worker to a broker for the leases of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The broker.
    pub to: BrokerName,
    /// The server's name.
    pub server: String,
    /// The version that the worker has.
    pub known: Option<LeaseVersion>,
}

/// A message of a broker to a worker about the leases of one of its servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseMessage {
    /// The server's name.
    pub server: String,
    /// The version that this leads to.
    pub version: LeaseVersion,
    /// The content of the message.
    pub content: LeaseContent,
}

impl LeaseMessage {
    /// The messages with all leases of a server.
    pub fn snapshot(
        server: &str,
        version: LeaseVersion,
        leases: impl Iterator<Item = (PublicKey, LeasedAddresses)>,
    ) -> Vec<Self> {
        let (mut leases, mut messages) = (leases.peekable(), Vec::new());
        for number in 0.. {
            let (mut chunk, mut size) = (BTreeMap::new(), 0);
            while let Some((key, addresses)) = leases.next_if(|_| size < CHUNK_ADDRESSES_MAX) {
                size += addresses.iter().count();
                chunk.insert(key, addresses);
            }
            let is_last = leases.peek().is_none();
            let content = LeaseContent::Chunk(LeaseChunk { number, is_last, leases: chunk });
            messages.push(Self { server: server.to_owned(), version, content });
            if is_last {
                break;
            }
        }
        messages
    }
}

/// The content of a [`LeaseMessage`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseContent {
    /// A change.
    Change(LeaseChange),
    /// A part of all leases.
    Chunk(LeaseChunk),
    /// The worker has this version already.
    Current,
    /// The server was deleted.
    Deleted,
}

/// One change of leases.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseChange {
    /// The revision to which it applies.
    pub after: i64,
    /// Keys that no longer have a lease.
    #[serde(default)]
    pub removed: BTreeSet<PublicKey>,
    /// Keys that have a new lease.
    #[serde(default)]
    pub added: BTreeMap<PublicKey, LeasedAddresses>,
}

impl LeaseChange {
    /// Merges the next change into this one.
    pub fn extend(&mut self, next: Self) {
        for key in &next.removed {
            self.added.remove(key);
        }
        self.removed.extend(next.removed);
        self.added.extend(next.added);
    }
}

/// A part of all leases of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseChunk {
    /// 0 for the first one.
    pub number: u32,
    /// Whether it is the last one.
    pub is_last: bool,
    /// The leases.
    pub leases: BTreeMap<PublicKey, LeasedAddresses>,
}

/// The addresses of a key. A client of a server has one; a member of several tenants has one in each of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LeasedAddresses {
    /// Just this one.
    One(IpAddr),
    /// All of these.
    Several(Vec<IpAddr>),
}

impl LeasedAddresses {
    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        let (one, several) = match self {
            Self::One(address) => (Some(*address), None),
            Self::Several(addresses) => (None, Some(addresses)),
        };
        one.into_iter().chain(several.into_iter().flatten().copied())
    }
}

impl From<IpAddr> for LeasedAddresses {
    fn from(address: IpAddr) -> Self {
        Self::One(address)
    }
}

impl From<&[IpAddr]> for LeasedAddresses {
    fn from(addresses: &[IpAddr]) -> Self {
        match addresses {
            [address] => Self::One(*address),
            _ => Self::Several(addresses.into()),
        }
    }
}
