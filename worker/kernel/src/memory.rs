//! A kernel in memory: the same tables and manners as Linux, and handles by which a test looks at them and
//! breaks them while a worker owns the other end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use wgkex_common::{Domain, PublicKey};

use crate::{Change, Device, Errno, Kernel, KernelError, Peer};

/// An in-memory kernel. Clones are handles to the same tables.
#[derive(Debug, Clone, Default)]
pub struct MemoryKernel {
    state: Arc<Mutex<State>>,
    events: Arc<Notify>,
}

/// How long the kernel takes, beside no time at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Delays {
    /// For each call of `read`.
    pub read: Duration,
    /// For each call of `apply`.
    pub apply: Duration,
    /// For each change of a call of `apply`, on top.
    pub change: Duration,
}

#[derive(Debug, Default)]
struct State {
    domains: HashMap<Domain, Interfaces>,
    last_index: u32,
    refused: BTreeSet<Change>,
    read_error: Option<KernelError>,
    delays: Delays,
    reads: usize,
    applies: Vec<(Domain, Vec<Change>)>,
}

#[derive(Debug)]
struct Interfaces {
    device: Device,
    /// Whose allowed-ip each is: Linux has one owner for each, too.
    owners: HashMap<(IpAddr, u8), PublicKey>,
    wireguard: Link,
    vxlan: Link,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    Down,
    Missing,
}

impl MemoryKernel {
    /// A kernel with the two interfaces of each of `domains`, as [`add`](Self::add) makes them.
    #[must_use]
    pub fn with(domains: &[Domain]) -> Self {
        let kernel = Self::default();
        for domain in domains {
            kernel.add(domain);
        }
        kernel
    }

    /// Makes both interfaces of `domain`, up and empty, in place of older ones. The key, the port and the
    /// address are made from the interface's index.
    pub fn add(&self, domain: &Domain) {
        let mut state = self.lock();
        let interfaces = Interfaces::new(state.last_index + 1, state.last_index + 2);
        state.last_index += 2;
        state.domains.insert(domain.clone(), interfaces);
        self.events.notify_one();
    }

    /// Deletes both interfaces of `domain` with all that is in them.
    pub fn remove(&self, domain: &Domain) {
        self.lock().domains.remove(domain);
        self.events.notify_one();
    }

    /// Takes `wg-REST` down, and its routes with it, as Linux does.
    pub fn set_down(&self, domain: &Domain) {
        self.links(domain, |interfaces| {
            interfaces.wireguard = Link::Down;
            interfaces.device.routes.clear();
        });
    }

    /// Takes `wg-REST` up again.
    pub fn set_up(&self, domain: &Domain) {
        self.links(domain, |interfaces| interfaces.wireguard = Link::Up);
    }

    /// Deletes `vx-REST` alone, with its flood list.
    pub fn remove_vxlan(&self, domain: &Domain) {
        self.links(domain, |interfaces| {
            interfaces.vxlan = Link::Missing;
            interfaces.device.fdb.clear();
        });
    }

    /// Makes `vx-REST` anew beside a `wg-REST` that stayed.
    pub fn add_vxlan(&self, domain: &Domain) {
        let index = {
            let mut state = self.lock();
            state.last_index += 1;
            state.last_index
        };
        self.links(domain, |interfaces| {
            interfaces.vxlan = Link::Up;
            interfaces.device.indexes.1 = index;
            interfaces.device.fdb.clear();
        });
    }

    /// The tables of `domain` as they are; `None` without interfaces. Counts as no read.
    #[must_use]
    pub fn device(&self, domain: &Domain) -> Option<Device> {
        self.lock().domains.get(domain).map(|interfaces| interfaces.device.clone())
    }

    /// Alters the tables of `domain` behind the worker's back, without an event. Nothing without interfaces.
    pub fn alter(&self, domain: &Domain, change: impl FnOnce(&mut Device)) {
        if let Some(interfaces) = self.lock().domains.get_mut(domain) {
            change(&mut interfaces.device);
            interfaces.owners = owners(&interfaces.device.peers);
        }
    }

    /// Has the peer `key` shake hands at `at`; nothing if there is no such peer.
    pub fn handshake(&self, domain: &Domain, key: PublicKey, at: SystemTime) {
        self.alter(domain, |device| {
            if let Some(peer) = device.peers.get_mut(&key) {
                peer.last_handshake = Some(at);
            }
        });
    }

    /// Answers exactly this change with an error, from now on, in every domain.
    pub fn refuse(&self, change: Change) {
        self.lock().refused.insert(change);
    }

    /// Takes back every [`refuse`](Self::refuse).
    pub fn refuse_nothing(&self) {
        self.lock().refused.clear();
    }

    /// Answers every read with this error, from now on; `None` reads well again.
    pub fn fail_reads(&self, error: Option<KernelError>) {
        self.lock().read_error = error;
    }

    /// Takes this long from the next call on.
    pub fn delay(&self, delays: Delays) {
        self.lock().delays = delays;
    }

    /// Reports a change of links or addresses that has not happened.
    pub fn trigger(&self) {
        self.events.notify_one();
    }

    /// How many reads were asked for so far.
    #[must_use]
    pub fn reads(&self) -> usize {
        self.lock().reads
    }

    /// The calls of `apply` since the last time this was asked, in their order, also those that failed.
    #[must_use]
    pub fn take_applies(&self) -> Vec<(Domain, Vec<Change>)> {
        std::mem::take(&mut self.lock().applies)
    }

    fn links(&self, domain: &Domain, change: impl FnOnce(&mut Interfaces)) {
        if let Some(interfaces) = self.lock().domains.get_mut(domain) {
            change(interfaces);
        }
        self.events.notify_one();
    }

    /// A test's assertion that failed under the lock must not fail everything after it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Kernel for MemoryKernel {
    async fn read(&mut self, domain: &Domain) -> Result<Device, KernelError> {
        let delay = self.lock().delays.read;
        pause(delay).await;
        let mut state = self.lock();
        state.reads += 1;
        if let Some(error) = &state.read_error {
            return Err(error.clone());
        }
        state.usable(domain).map(|interfaces| interfaces.device.clone())
    }

    async fn apply(&mut self, domain: &Domain, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let delays = self.lock().delays;
        pause(delays.apply + delays.change * u32::try_from(changes.len()).unwrap_or(u32::MAX)).await;
        let mut state = self.lock();
        state.applies.push((domain.clone(), changes.to_vec()));
        let refused = std::mem::take(&mut state.refused);
        let results = match state.usable(domain) {
            Err(missing) => changes.iter().map(|_| Err(missing.clone())).collect(),
            Ok(interfaces) => changes.iter().map(|change| interfaces.apply(change, &refused)).collect(),
        };
        state.refused = refused;
        results
    }

    async fn changed(&mut self) {
        self.events.notified().await;
    }
}

/// No timer for no time, so that a runtime without one serves.
async fn pause(delay: Duration) {
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
}

impl State {
    fn usable(&mut self, domain: &Domain) -> Result<&mut Interfaces, KernelError> {
        let missing = KernelError::Interface { interface: domain.wireguard(), state: "missing" };
        let interfaces = self.domains.get_mut(domain).ok_or(missing)?;
        for (link, interface) in [(interfaces.wireguard, domain.wireguard()), (interfaces.vxlan, domain.vxlan())] {
            match link {
                Link::Up => {}
                Link::Down => return Err(KernelError::Interface { interface, state: "down" }),
                Link::Missing => return Err(KernelError::Interface { interface, state: "missing" }),
            }
        }
        Ok(interfaces)
    }
}

impl Interfaces {
    fn new(wireguard: u32, vxlan: u32) -> Self {
        let mut bytes = [0x77; 32];
        bytes[..4].copy_from_slice(&wireguard.to_be_bytes());
        let public_key = PublicKey::from_bytes(bytes).ok();
        let device = Device {
            indexes: (wireguard, vxlan),
            public_key,
            listen_port: u16::try_from(40_000 + wireguard).unwrap_or(u16::MAX),
            link_address: public_key.map(|key| key.link_local().into()),
            peers: BTreeMap::new(),
            routes: BTreeSet::new(),
            fdb: BTreeSet::new(),
        };
        Self { device, owners: HashMap::new(), wireguard: Link::Up, vxlan: Link::Up }
    }

    fn apply(&mut self, change: &Change, refused: &BTreeSet<Change>) -> Result<(), KernelError> {
        if refused.contains(change) {
            return Err(KernelError::Refused { action: "refused by the test", source: Errno::EINVAL });
        }
        match *change {
            Change::SetPeer(key, address) => self.set_peer(key, address),
            Change::SetRoute(address) => drop(self.device.routes.insert(address)),
            Change::AddFdb(address) => drop(self.device.fdb.insert(address)),
            Change::RemovePeer(key) => self.remove_peer(key),
            Change::RemoveRoute(address) => drop(self.device.routes.remove(&address)),
            Change::RemoveFdb(address) => drop(self.device.fdb.remove(&address)),
        }
        Ok(())
    }

    /// Linux says nothing and does nothing when an interface is given its own key as a peer, and it takes an
    /// allowed-ip from the peer that has it (`set_peer` and `add` in drivers/net/wireguard).
    fn set_peer(&mut self, key: PublicKey, address: Ipv6Addr) {
        if self.device.public_key == Some(key) {
            return;
        }
        let ip = (IpAddr::V6(address), 128);
        let before = self.owners.insert(ip, key);
        let peers = &mut self.device.peers;
        if let Some(other) = before.filter(|other| *other != key).and_then(|other| peers.get_mut(&other)) {
            other.allowed_ips.retain(|allowed| *allowed != ip);
        }
        let peer = peers.entry(key).or_insert_with(|| Peer { allowed_ips: Vec::new(), last_handshake: None });
        if before != Some(key) {
            peer.allowed_ips.push(ip);
        }
    }

    fn remove_peer(&mut self, key: PublicKey) {
        for ip in self.device.peers.remove(&key).into_iter().flat_map(|peer| peer.allowed_ips) {
            self.owners.remove(&ip);
        }
    }
}

fn owners(peers: &BTreeMap<PublicKey, Peer>) -> HashMap<(IpAddr, u8), PublicKey> {
    peers.iter().flat_map(|(key, peer)| peer.allowed_ips.iter().map(|ip| (*ip, *key))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> (MemoryKernel, MemoryKernel, Domain, [PublicKey; 2]) {
        let domain = Domain::new("d", &[String::new()]).unwrap();
        let handle = MemoryKernel::with(std::slice::from_ref(&domain));
        let keys = [7, 8].map(|n| PublicKey::from_bytes([n; 32]).unwrap());
        (handle.clone(), handle, domain, keys)
    }

    #[tokio::test]
    async fn exactly_what_a_test_refuses_is_refused_until_it_is_taken_back() {
        let (handle, mut kernel, domain, keys) = start();
        let changes = keys.map(|key| Change::SetPeer(key, key.link_local()));
        handle.refuse(changes[0]);
        let refused = KernelError::Refused { action: "refused by the test", source: Errno::EINVAL };
        assert_eq!(kernel.apply(&domain, &changes).await, [Err(refused), Ok(())]);
        handle.refuse_nothing();
        assert_eq!(kernel.apply(&domain, &changes).await, [Ok(()), Ok(())]);
        assert_eq!(handle.take_applies(), vec![(domain.clone(), changes.to_vec()); 2]);
        assert_eq!(handle.take_applies(), []);
    }

    #[tokio::test]
    async fn a_test_sets_what_reads_give_and_counts_them() {
        let (handle, mut kernel, domain, [key, _]) = start();
        let interrupted = KernelError::Interrupted { interface: domain.wireguard(), times: 3 };
        handle.fail_reads(Some(interrupted.clone()));
        assert_eq!(kernel.read(&domain).await, Err(interrupted));
        handle.fail_reads(None);
        kernel.apply(&domain, &[Change::SetPeer(key, key.link_local())]).await;
        handle.handshake(&domain, key, SystemTime::UNIX_EPOCH);
        let device = kernel.read(&domain).await.unwrap();
        assert_eq!(device.peers[&key].last_handshake, Some(SystemTime::UNIX_EPOCH));
        assert_eq!((handle.reads(), handle.device(&domain)), (2, Some(device)));
    }

    #[tokio::test]
    async fn an_event_between_two_waits_is_not_lost() {
        let (handle, mut kernel, domain, _) = start();
        kernel.changed().await; // its making
        handle.trigger();
        handle.remove_vxlan(&domain);
        kernel.changed().await;
        assert!(tokio::time::timeout(Duration::from_millis(20), kernel.changed()).await.is_err());
    }

    #[tokio::test]
    async fn it_takes_the_time_it_is_told_to() {
        let (handle, mut kernel, domain, keys) = start();
        let [read, apply, change] = [10, 20, 30].map(Duration::from_millis);
        handle.delay(Delays { read, apply, change });
        let begin = std::time::Instant::now();
        kernel.read(&domain).await.unwrap();
        kernel.apply(&domain, &keys.map(Change::RemovePeer)).await;
        assert!(begin.elapsed() >= Duration::from_millis(10 + 20 + 2 * 30));
    }
}
