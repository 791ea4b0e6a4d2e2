//! The messages by which a broker's registry and the worker that is one of its servers keep the same leases. A revision names
//! the state of one server after a change; who knows revision `n` and gets the change after `n` has missed nothing. The addresses
//! of tenants' members come to the worker that is their hub in the same way, as those of the server [`HUB`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::address::tenants::TenantNetworks;
use crate::{BrokerName, PublicKey};

/// A chunk takes no more keys when it has so many addresses.
pub const CHUNK: usize = 1000;
/// Servers of one worker at most.
pub const SERVERS_MAX: usize = 16;
/// The longest list of allowed-ips, and the longest endpoint.
const TEXT_MAX: usize = 4096;
/// The name that the hub of tenants has among the servers of a worker. The registry has no server with a slash in its name.
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

/// What a worker publishes of its interface for the members of tenants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedHub {
    /// The key of its interface.
    pub public_key: PublicKey,
    /// Where members reach it.
    pub endpoint_address: String,
    /// Its UDP port.
    pub endpoint_port: u16,
    /// What it forwards within.
    pub networks: TenantNetworks,
}

/// What a worker publishes of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedServer {
    /// The key of its interface.
    pub public_key: PublicKey,
    /// The network of its addresses.
    pub network: IpNet,
    /// Clients get no addresses up to that with this number.
    pub reserved: u64,
    /// Where clients reach it.
    pub endpoint_address: String,
    /// Its UDP port.
    pub endpoint_port: u16,
    /// What clients send to it.
    pub allowed_ips: String,
}

impl AnnouncedServers {
    /// None if there are more than a worker may have, or one is longer than it may be.
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

/// Which state of a server's leases is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseVersion {
    /// Another number means another server, of the same name perhaps.
    pub id: i64,
    /// Higher with each change, and never again that of another state, also where a copy of the database was restored.
    pub revision: i64,
}

impl LeaseVersion {
    /// Whether it is an earlier state of the same server.
    #[must_use]
    pub fn is_before(&self, other: &Self) -> bool {
        self.id == other.id && self.revision < other.revision
    }
}

/// A worker asks a broker for the leases of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The broker.
    pub to: BrokerName,
    /// The server's name.
    pub server: String,
    /// What the worker has.
    pub known: Option<LeaseVersion>,
}

/// What a broker publishes to a worker about the leases of one of its servers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseMessage {
    /// The server's name.
    pub server: String,
    /// The state that this leads to.
    pub version: LeaseVersion,
    /// What it has of that.
    pub content: LeaseContent,
}

impl LeaseMessage {
    /// The messages that have all leases of a server.
    pub fn snapshot(
        server: &str,
        version: LeaseVersion,
        leases: impl Iterator<Item = (PublicKey, LeasedAddresses)>,
    ) -> Vec<Self> {
        let (mut leases, mut messages) = (leases.peekable(), Vec::new());
        for number in 0.. {
            let (mut chunk, mut size) = (BTreeMap::new(), 0);
            while let Some((key, addresses)) = leases.next_if(|_| size < CHUNK) {
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

/// What a [`LeaseMessage`] has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseContent {
    /// A change.
    Change(LeaseChange),
    /// A part of all leases.
    Chunk(LeaseChunk),
    /// Nothing: the worker has this version.
    Current,
    /// The server was deleted.
    Deleted,
}

/// What one change did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseChange {
    /// The revision that it changes.
    pub after: i64,
    /// Keys that have no lease any more.
    #[serde(default)]
    pub removed: BTreeSet<PublicKey>,
    /// Keys that have one now.
    #[serde(default)]
    pub added: BTreeMap<PublicKey, LeasedAddresses>,
}

impl LeaseChange {
    /// Adds what the next change does.
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
    /// Whether no other follows.
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
