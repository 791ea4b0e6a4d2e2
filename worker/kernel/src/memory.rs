//! A kernel in memory with the same tables and behaviour as Linux, and handles by which a test reads and breaks the
//! tables while a worker owns the kernel.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use wgkex_common::{Domain, PublicKey};

use crate::{Change, Device, Errno, Indexes, Interface, Kernel, KernelError, Outcomes, Peer, PeerConfig, failed};

/// An in-memory kernel. Clones are handles to the same tables.
#[derive(Debug, Clone, Default)]
pub struct MemoryKernel {
    state: Arc<Mutex<KernelState>>,
    events: Arc<Notify>,
}

/// Artificial delays of the kernel's calls.
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
struct KernelState {
    interfaces: HashMap<Interface, InterfaceTables>,
    last_index: u32,
    refused: BTreeSet<Change>,
    read_error: Option<KernelError>,
    delays: Delays,
    reads: usize,
    applies: Vec<(Interface, Vec<Change>)>,
}

#[derive(Debug)]
struct InterfaceTables {
    device: Device,
    /// The owner of each allowed-ip: as on Linux, each has one.
    owners: HashMap<IpNet, PublicKey>,
    wireguard: LinkState,
    vxlan: LinkState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LinkState {
    Up,
    Down,
    Missing,
}

/// Tests name interfaces by their domains: `wg-REST` carries `vx-REST`.
impl From<&Domain> for Interface {
    fn from(domain: &Domain) -> Self {
        Self { name: domain.wireguard(), vxlan: Some(domain.vxlan()) }
    }
}

impl MemoryKernel {
    /// A kernel with `interfaces`, as [`add`](Self::add) makes each.
    #[must_use]
    pub fn with<I: Into<Interface>>(interfaces: impl IntoIterator<Item = I>) -> Self {
        let kernel = Self::default();
        for interface in interfaces {
            kernel.add(interface);
        }
        kernel
    }

    /// Makes the interface and its VXLAN interface, up and empty, in place of older ones. The key, the port and the address
    /// are made from the interface's index.
    pub fn add(&self, interface: impl Into<Interface>) {
        let interface = interface.into();
        let mut state = self.lock();
        let (wireguard, vxlan) = (state.last_index + 1, state.last_index + 2);
        state.last_index += 2;
        let indexes = Indexes { wireguard, vxlan: interface.vxlan.as_ref().map(|_| vxlan) };
        state.interfaces.insert(interface, InterfaceTables::new(indexes));
        self.events.notify_one();
    }

    /// Deletes the interface and the VXLAN interface on it, with all tables of both.
    pub fn remove(&self, interface: impl Into<Interface>) {
        self.lock().interfaces.remove(&interface.into());
        self.events.notify_one();
    }

    /// Takes the WireGuard interface down, and its routes with it, as Linux does.
    pub fn set_down(&self, interface: impl Into<Interface>) {
        self.links(interface, |tables| {
            tables.wireguard = LinkState::Down;
            tables.device.routes.clear();
        });
    }

    /// Takes the WireGuard interface up again.
    pub fn set_up(&self, interface: impl Into<Interface>) {
        self.links(interface, |tables| tables.wireguard = LinkState::Up);
    }

    /// Deletes the VXLAN interface alone, with its flood list.
    pub fn remove_vxlan(&self, interface: impl Into<Interface>) {
        self.links(interface, |tables| {
            tables.vxlan = LinkState::Missing;
            tables.device.fdb.clear();
        });
    }

    /// Makes the VXLAN interface again on one that stayed.
    pub fn add_vxlan(&self, interface: impl Into<Interface>) {
        let index = {
            let mut state = self.lock();
            state.last_index += 1;
            state.last_index
        };
        self.links(interface, |tables| {
            tables.vxlan = LinkState::Up;
            tables.device.indexes.vxlan = Some(index);
            tables.device.fdb.clear();
        });
    }

    /// The tables as they are; `None` without the interface. Counts as no read.
    #[must_use]
    pub fn device(&self, interface: impl Into<Interface>) -> Option<Device> {
        self.lock().interfaces.get(&interface.into()).map(|tables| tables.device.clone())
    }

    /// Changes the tables without an event, as another program would. Does nothing if the interface is missing.
    pub fn alter(&self, interface: impl Into<Interface>, change: impl FnOnce(&mut Device)) {
        if let Some(tables) = self.lock().interfaces.get_mut(&interface.into()) {
            change(&mut tables.device);
            tables.owners = owners(&tables.device.peers);
        }
    }

    /// Sets the last handshake of the peer `key` to `at`; does nothing if there is no such peer.
    pub fn handshake(&self, interface: impl Into<Interface>, key: PublicKey, at: SystemTime) {
        self.alter(interface, |device| {
            if let Some(peer) = device.peers.get_mut(&key) {
                peer.last_handshake = Some(at);
            }
        });
    }

    /// Makes exactly this change fail with an error, from now on, on every interface.
    pub fn refuse(&self, change: Change) {
        self.lock().refused.insert(change);
    }

    /// Takes back every [`refuse`](Self::refuse).
    pub fn refuse_nothing(&self) {
        self.lock().refused.clear();
    }

    /// Makes every read fail with this error, from now on; `None` ends that.
    pub fn fail_reads(&self, error: Option<KernelError>) {
        self.lock().read_error = error;
    }

    /// Sets the delays of all later calls.
    pub fn delay(&self, delays: Delays) {
        self.lock().delays = delays;
    }

    /// Reports a change of links or addresses that has not happened.
    pub fn trigger(&self) {
        self.events.notify_one();
    }

    /// The number of reads so far.
    #[must_use]
    pub fn reads(&self) -> usize {
        self.lock().reads
    }

    /// The calls of `apply` since the last call of this function, in their order, also the failed ones.
    #[must_use]
    pub fn take_applies(&self) -> Vec<(Interface, Vec<Change>)> {
        std::mem::take(&mut self.lock().applies)
    }

    fn links(&self, interface: impl Into<Interface>, change: impl FnOnce(&mut InterfaceTables)) {
        if let Some(tables) = self.lock().interfaces.get_mut(&interface.into()) {
            change(tables);
        }
        self.events.notify_one();
    }

    /// A failed assertion of one test under the lock must not make all later calls fail.
    fn lock(&self) -> MutexGuard<'_, KernelState> {
        self.state.lock()
    }
}

impl Kernel for MemoryKernel {
    async fn read(&mut self, interface: &Interface) -> Result<Device, KernelError> {
        let delay = self.lock().delays.read;
        pause(delay).await;
        let mut state = self.lock();
        state.reads += 1;
        if let Some(error) = &state.read_error {
            return Err(error.clone());
        }
        state.usable(interface).map(|tables| tables.device.clone())
    }

    async fn apply(&mut self, interface: &Interface, changes: Vec<Change>) -> Outcomes {
        let delays = self.lock().delays;
        pause(delays.apply + delays.change * u32::try_from(changes.len()).unwrap_or(u32::MAX)).await;
        let mut state = self.lock();
        state.applies.push((interface.clone(), changes.clone()));
        let refused = std::mem::take(&mut state.refused);
        let applied = match state.usable(interface) {
            Err(missing) => failed(changes, &missing),
            Ok(tables) => changes.into_iter().map(|change| tables.apply(change, &refused)).collect(),
        };
        state.refused = refused;
        applied
    }

    async fn changed(&mut self) {
        self.events.notified().await;
    }
}

/// No timer for a delay of zero, so that a runtime without timers works.
async fn pause(delay: Duration) {
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
}

impl KernelState {
    fn usable(&mut self, interface: &Interface) -> Result<&mut InterfaceTables, KernelError> {
        let unusable = |name: &String, state| KernelError::Interface { interface: name.clone(), state };
        let tables = self.interfaces.get_mut(interface).ok_or_else(|| unusable(&interface.name, "missing"))?;
        let vxlan = interface.vxlan.iter().map(|name| (tables.vxlan, name));
        for (link, name) in [(tables.wireguard, &interface.name)].into_iter().chain(vxlan) {
            match link {
                LinkState::Up => {}
                LinkState::Down => return Err(unusable(name, "down")),
                LinkState::Missing => return Err(unusable(name, "missing")),
            }
        }
        Ok(tables)
    }
}

impl InterfaceTables {
    fn new(indexes: Indexes) -> Self {
        let mut bytes = [0x77; 32];
        bytes[..4].copy_from_slice(&indexes.wireguard.to_be_bytes());
        let public_key = PublicKey::from_bytes(bytes).ok();
        let device = Device {
            indexes,
            public_key,
            listen_port: u16::try_from(40_000 + indexes.wireguard).unwrap_or(u16::MAX),
            link_address: public_key.map(|key| key.link_local().into()),
            peers: BTreeMap::new(),
            routes: BTreeSet::new(),
            fdb: BTreeSet::new(),
        };
        Self { device, owners: HashMap::new(), wireguard: LinkState::Up, vxlan: LinkState::Up }
    }

    fn apply(&mut self, change: Change, refused: &BTreeSet<Change>) -> (Change, Result<(), KernelError>) {
        if refused.contains(&change) {
            let error = KernelError::Refused { action: "refused by the test", source: Errno::EINVAL };
            return (change, Err(error));
        }
        match &change {
            Change::SetPeer(peer) => self.set_peer(peer),
            Change::ReplacePeer(peer) => {
                self.set_peer(peer);
                if let Some(actual) = self.device.peers.get_mut(&peer.key) {
                    actual.allowed_ips.retain(|network| peer.allowed_ips.contains(network));
                }
            }
            Change::SetRoute(network) => drop(self.device.routes.insert(*network)),
            Change::AddFdb(address) => drop(self.device.fdb.insert(*address)),
            Change::RemovePeer(key) => self.remove_peer(key),
            Change::RemoveRoute(network) => drop(self.device.routes.remove(network)),
            Change::RemoveFdb(address) => drop(self.device.fdb.remove(address)),
        }
        (change, Ok(()))
    }

    /// Linux ignores a peer with the interface's own key without an error, and it takes an allowed-ip from the peer
    /// that has it (`set_peer` and `add` in drivers/net/wireguard).
    fn set_peer(&mut self, config: &PeerConfig) {
        let PeerConfig { key, allowed_ips, keepalive, preshared } = config;
        if self.device.public_key == Some(*key) {
            return;
        }
        let peers = &mut self.device.peers;
        peers.entry(*key).or_default();
        for network in allowed_ips {
            let before = self.owners.insert(*network, *key).filter(|before| before != key);
            if let Some(other) = before.and_then(|before| peers.get_mut(&before)) {
                other.allowed_ips.retain(|allowed| allowed != network);
            }
        }
        let Some(peer) = peers.get_mut(key) else { return };
        for network in allowed_ips {
            if !peer.allowed_ips.contains(network) {
                peer.allowed_ips.push(*network);
            }
        }
        peer.keepalive = keepalive.or(peer.keepalive);
        peer.preshared = preshared.clone().or(peer.preshared.take());
    }

    fn remove_peer(&mut self, key: &PublicKey) {
        for network in self.device.peers.remove(key).into_iter().flat_map(|peer| peer.allowed_ips) {
            self.owners.remove(&network);
        }
    }
}

fn owners(peers: &BTreeMap<PublicKey, Peer>) -> HashMap<IpNet, PublicKey> {
    peers.iter().flat_map(|(key, peer)| peer.allowed_ips.iter().map(|network| (*network, *key))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> (MemoryKernel, MemoryKernel, Interface, [PublicKey; 2]) {
        let domain = Domain::new("d", &[String::new()]).unwrap();
        let handle = MemoryKernel::with([&domain]);
        let keys = [7, 8].map(|n| PublicKey::from_bytes([n; 32]).unwrap());
        (handle.clone(), handle, Interface::from(&domain), keys)
    }

    #[tokio::test]
    async fn exactly_the_refused_changes_fail_until_the_refusal_is_lifted() {
        let (handle, mut kernel, interface, keys) = start();
        let changes = keys.map(|key| Change::SetPeer(PeerConfig::at(key, key.link_local())));
        handle.refuse(changes[0].clone());
        let refused = KernelError::Refused { action: "refused by the test", source: Errno::EINVAL };
        assert_eq!(results(&mut kernel, &interface, &changes).await, [Err(refused), Ok(())]);
        handle.refuse_nothing();
        assert_eq!(results(&mut kernel, &interface, &changes).await, [Ok(()), Ok(())]);
        assert_eq!(handle.take_applies(), vec![(interface.clone(), changes.to_vec()); 2]);
        assert_eq!(handle.take_applies(), []);
    }

    async fn results(
        kernel: &mut MemoryKernel,
        interface: &Interface,
        changes: &[Change],
    ) -> Vec<Result<(), KernelError>> {
        let applied = kernel.apply(interface, changes.to_vec()).await;
        assert!(applied.iter().map(|(change, _)| change).eq(changes));
        applied.into_iter().map(|(_, result)| result).collect()
    }

    #[tokio::test]
    async fn a_test_sets_what_reads_give_and_counts_them() {
        let (handle, mut kernel, interface, [key, _]) = start();
        let interrupted = KernelError::Interrupted { interface: interface.name.clone(), times: 3 };
        handle.fail_reads(Some(interrupted.clone()));
        assert_eq!(kernel.read(&interface).await, Err(interrupted));
        handle.fail_reads(None);
        kernel.apply(&interface, vec![Change::SetPeer(PeerConfig::at(key, key.link_local()))]).await;
        handle.handshake(interface.clone(), key, SystemTime::UNIX_EPOCH);
        let device = kernel.read(&interface).await.unwrap();
        assert_eq!(device.peers[&key].last_handshake, Some(SystemTime::UNIX_EPOCH));
        assert_eq!((handle.reads(), handle.device(interface.clone())), (2, Some(device)));
    }

    #[tokio::test]
    async fn an_event_between_two_waits_is_not_lost() {
        let (handle, mut kernel, interface, _) = start();
        kernel.changed().await; // its making
        handle.trigger();
        handle.remove_vxlan(interface.clone());
        kernel.changed().await;
        assert!(tokio::time::timeout(Duration::from_millis(20), kernel.changed()).await.is_err());
    }

    #[tokio::test]
    async fn configured_delays_are_kept() {
        let (handle, mut kernel, interface, keys) = start();
        let [read, apply, change] = [10, 20, 30].map(Duration::from_millis);
        handle.delay(Delays { read, apply, change });
        let begin = std::time::Instant::now();
        kernel.read(&interface).await.unwrap();
        kernel.apply(&interface, keys.map(Change::RemovePeer).to_vec()).await;
        assert!(begin.elapsed() >= Duration::from_millis(10 + 20 + 2 * 30));
    }
}
