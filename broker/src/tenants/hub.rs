//! The hub: the gateway by which members reach each other that cannot do so directly. It has a peer for each address of
//! a tenant, a member's or held, and forwards within a tenant's network. No IO and no clock.
//!
//! Each broker knows it by its worker's announcement, and passes it on to members that request it. The coordinator
//! publishes the addresses to the worker, as the registry publishes leases to a server.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use wgkex_common::address::tenants::TenantNetworks;
use wgkex_common::config::Listen;
use wgkex_common::wire::lease::{
    AnnouncedHub, CHUNK_ADDRESSES_MAX, HUB, LeaseChange, LeaseContent, LeaseMessage, LeaseVersion, LeasedAddresses,
};
use wgkex_common::{PublicKey, WorkerName};

use crate::tenants::message::HubPeer;

/// The longest time between two messages with the current version, by which the worker notices missed changes.
const VERSION_INTERVAL: Duration = Duration::from_secs(10);
/// Messages that are sent at once, at most.
const MESSAGES_PER_SEND_MAX: usize = 20;
/// The most addresses of one key, the oldest ones: a peer takes no more in one message.
const ADDRESSES_MAX: usize = 512;

/// The hub of the tenants.
#[derive(Debug)]
pub struct TenantHub {
    worker: WorkerName,
    networks: TenantNetworks,
    announced: Option<AnnouncedHub>,
    /// All addresses of tenants, in the order in which each key got its own.
    addresses: BTreeMap<PublicKey, Vec<IpAddr>>,
    /// Keys whose addresses changed since the last message.
    changed: BTreeSet<PublicKey>,
    /// None unless this broker publishes them.
    version: Option<LeaseVersion>,
    outgoing: VecDeque<LeaseMessage>,
    version_sent: Option<Instant>,
    problem: Option<HubProblem>,
}

/// Why members do not learn of the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubProblem {
    /// Its worker announces none.
    Missing,
    /// It forwards within other networks than tenants have here.
    OtherNetworks,
}

impl TenantHub {
    /// The hub is to be the worker of this name. No address is known.
    pub fn new(worker: WorkerName, networks: TenantNetworks) -> Self {
        Self {
            worker,
            networks,
            announced: None,
            addresses: BTreeMap::new(),
            changed: BTreeSet::new(),
            version: None,
            outgoing: VecDeque::new(),
            version_sent: None,
            problem: Some(HubProblem::Missing),
        }
    }

    /// The worker that is to be the hub.
    pub fn worker(&self) -> &WorkerName {
        &self.worker
    }

    /// Why members do not learn of the hub.
    pub fn problem(&self) -> Option<HubProblem> {
        self.problem
    }

    /// A worker announced its hub, or withdrew it. True if members must receive a change.
    pub fn on_announced(&mut self, worker: &WorkerName, announced: Option<AnnouncedHub>) -> bool {
        if *worker != self.worker {
            return false;
        }
        // The worker may have just connected: the version is sent to it at once.
        self.version_sent = None;
        let problem = match &announced {
            None => Some(HubProblem::Missing),
            Some(hub) if hub.networks != self.networks => Some(HubProblem::OtherNetworks),
            Some(_) => None,
        };
        if std::mem::replace(&mut self.problem, problem) != problem {
            let missing = "the hub of tenants is gone: its worker has none any more";
            let other = "the hub of tenants is not used: its worker has other tenants.pool or tenant_length";
            match problem {
                None => info!(%worker, "the hub of tenants is ready"),
                Some(HubProblem::Missing) => warn!(%worker, "{missing}"),
                Some(HubProblem::OtherNetworks) => warn!(%worker, "{other}"),
            }
        }
        let announced = announced.filter(|_| problem.is_none());
        let is_changed = self.announced != announced;
        self.announced = announced;
        is_changed
    }

    /// How a member with this address configures it.
    pub fn peer(&self, address: IpAddr) -> Option<HubPeer> {
        let AnnouncedHub { public_key, endpoint_address, endpoint_port, .. } = self.announced.as_ref()?;
        let endpoint = Listen { host: endpoint_address.clone(), port: *endpoint_port }.to_string();
        Some(HubPeer { public_key: *public_key, endpoint, allowed_ips: self.networks.of(address)? })
    }

    /// In some tenant, a key has another address than before.
    pub fn on_address(&mut self, key: PublicKey, before: Option<IpAddr>, address: Option<IpAddr>) {
        let addresses = self.addresses.entry(key).or_default();
        // The same one may be that of another tenant already, as when networks change hands.
        if let Some(at) = addresses.iter().position(|known| Some(*known) == before) {
            addresses.remove(at);
        }
        addresses.extend(address);
        if addresses.is_empty() {
            self.addresses.remove(&key);
        }
        if self.version.is_some() {
            self.changed.insert(key);
        }
    }

    /// This broker publishes from now on; `id` is another one each time.
    pub fn lead(&mut self, id: u64) {
        let id = i64::try_from(id).unwrap_or(i64::MAX);
        self.version = Some(LeaseVersion { id, revision: 0 });
        (self.version_sent, self.outgoing) = (None, VecDeque::new());
        self.changed.clear();
    }

    /// Another broker publishes.
    pub fn follow(&mut self) {
        self.version = None;
        self.outgoing.clear();
        self.changed.clear();
    }

    /// The worker requests the addresses that it lacks. While other messages for it wait it gets no answer, and repeats
    /// the request.
    pub fn on_request(&mut self, worker: &WorkerName, known: Option<LeaseVersion>) {
        if *worker != self.worker || self.announced.is_none() || !self.outgoing.is_empty() {
            return;
        }
        self.note_changes();
        let Some(version) = self.version else { return };
        if known == Some(version) {
            return self.push_version(version);
        }
        self.outgoing.clear();
        let all = self.addresses.iter().map(|(key, addresses)| (*key, leased(addresses)));
        self.outgoing.extend(LeaseMessage::snapshot(HUB, version, all));
    }

    /// The messages for the worker that are to be sent now.
    pub fn take_messages(&mut self, now: Instant) -> Vec<LeaseMessage> {
        self.note_changes();
        let Some(version) = self.version.filter(|_| self.announced.is_some()) else {
            self.outgoing.clear();
            return Vec::new();
        };
        if self.outgoing.is_empty()
            && self.version_sent.is_none_or(|then| now.saturating_duration_since(then) >= VERSION_INTERVAL)
        {
            self.version_sent = Some(now);
            self.push_version(version);
        }
        self.outgoing.drain(..self.outgoing.len().min(MESSAGES_PER_SEND_MAX)).collect()
    }

    fn push_version(&mut self, version: LeaseVersion) {
        self.outgoing.push_back(message(version, LeaseContent::Current));
    }

    /// Queues messages about the changes since the last call.
    fn note_changes(&mut self) {
        let Some(version) = &mut self.version else { return self.changed.clear() };
        let mut changed = std::mem::take(&mut self.changed).into_iter().peekable();
        while changed.peek().is_some() {
            let (mut change, mut size) = (LeaseChange { after: version.revision, ..LeaseChange::default() }, 0);
            while let Some(key) = changed.next_if(|_| size < CHUNK_ADDRESSES_MAX) {
                let leased = self.addresses.get(&key).map(|addresses| leased(addresses));
                size += leased.as_ref().map_or(1, |leased| leased.iter().count());
                match leased {
                    Some(leased) => drop(change.added.insert(key, leased)),
                    None => drop(change.removed.insert(key)),
                }
            }
            version.revision += 1;
            self.outgoing.push_back(message(*version, LeaseContent::Change(change)));
        }
    }
}

fn leased(addresses: &[IpAddr]) -> LeasedAddresses {
    LeasedAddresses::from(&addresses[..addresses.len().min(ADDRESSES_MAX)])
}

fn message(version: LeaseVersion, content: LeaseContent) -> LeaseMessage {
    LeaseMessage { server: HUB.to_owned(), version, content }
}

#[cfg(test)]
mod tests;
