//! Linux: the tables of an interface and their changes, by rtnetlink, generic netlink and, for a userspace
//! WireGuard, wireguard-control.

mod channel;
mod route;
mod wireguard;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::channel::{Channel, DumpError};
use self::route::LinkStatus;
use self::wireguard::{PeerChange, WireGuard};
use crate::{Change, Device, Errno, Indexes, Interface, Kernel, KernelError, Outcomes, Peer, failed};

/// The timeout of a call. A large table takes seconds; a longer call hangs, as the process of a userspace WireGuard
/// may, and must not delay the other interfaces.
const NETLINK_TIMEOUT: Duration = Duration::from_secs(30);

/// The pause before listening again on a socket that failed.
const LISTEN_PAUSE: Duration = Duration::from_secs(1);

/// How often an interface is read again because its interfaces were replaced meanwhile.
const READS_MAX: usize = 3;

/// Groups of events (linux/rtnetlink.h): links, and the addresses of both families.
const EVENT_GROUPS: [u32; 3] = [1, 5, 9];

/// The kernel of the network namespace that the calling thread is in. Each call opens sockets of its own, on a
/// thread that may block: netlink answers at once or, with its lock held by others, late.
pub struct Netlink {
    events: TokioSocket,
    /// Calls that took longer than `timeout` and have not ended.
    stuck: BTreeMap<Interface, JoinHandle<()>>,
    timeout: Duration,
}

impl Netlink {
    /// Begins to listen for changes of links and addresses. Within a tokio runtime whose threads are in the network
    /// namespace that is meant.
    pub fn open() -> io::Result<Self> {
        let mut events = TokioSocket::new(NETLINK_ROUTE)?;
        events.socket_mut().bind(&SocketAddr::new(0, 0))?;
        for group in EVENT_GROUPS {
            events.socket_mut().add_membership(group)?;
        }
        Ok(Self { events, stuck: BTreeMap::new(), timeout: NETLINK_TIMEOUT })
    }

    /// Sets the timeout of calls; after it an interface counts as not usable.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

impl Kernel for Netlink {
    async fn read(&mut self, interface: &Interface) -> Result<Device, KernelError> {
        let task_interface = interface.clone();
        self.blocking(interface, move || read(&task_interface)).await?
    }

    async fn apply(&mut self, interface: &Interface, changes: Vec<Change>) -> Outcomes {
        let task_interface = interface.clone();
        // Shared: a hanging thread keeps its reference.
        let changes = Arc::new(changes);
        let task_changes = Arc::clone(&changes);
        let results = self
            .blocking(interface, move || {
                OpenInterface::find(&task_interface).map(|mut interfaces| interfaces.apply(&task_changes))
            })
            .await;
        let changes = Arc::unwrap_or_clone(changes);
        match results.and_then(|results| results) {
            Ok(results) => changes.into_iter().zip(results).collect(),
            Err(error) => failed(changes, &error),
        }
    }

    /// The content of an event does not matter, nor that some were lost to a full buffer: all tables are read again.
    async fn changed(&mut self) {
        let mut event = [0; 4096];
        if let Err(error) = self.events.recv(&mut &mut event[..]).await
            && error.raw_os_error() != Some(Errno::ENOBUFS as i32)
        {
            tracing::warn!(%error, "link events unreadable");
            tokio::time::sleep(LISTEN_PAUSE).await;
        }
        while self.events.socket_ref().recv(&mut &mut event[..], 0).is_ok() {}
    }
}

impl Netlink {
    /// Runs `task` for `interface` on a blocking thread, since the runtime may have a single worker thread. `task` is
    /// completed even if the caller stops waiting; until then no other task is started for that interface.
    async fn blocking<T: Send + 'static>(
        &mut self,
        interface: &Interface,
        task: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, KernelError> {
        let silent = || unusable(&interface.name, "not answering");
        if self.stuck.get(interface).is_some_and(|stuck| !stuck.is_finished()) {
            return Err(silent());
        }
        self.stuck.remove(interface);
        let (done, result) = oneshot::channel();
        let thread = tokio::task::spawn_blocking(move || {
            // The caller may have stopped waiting.
            let _ = done.send(task());
        });
        let Ok(result) = timeout(self.timeout, result).await else {
            self.stuck.insert(interface.clone(), thread);
            return Err(silent());
        };
        result.map_err(|_| KernelError::Refused { action: "run a netlink call", source: Errno::EIO })
    }
}

fn read(interface: &Interface) -> Result<Device, KernelError> {
    for _ in 0..READS_MAX {
        let mut interfaces = OpenInterface::find(interface)?;
        let device = interfaces.read();
        if OpenInterface::find(interface)?.indexes == interfaces.indexes {
            return device;
        }
    }
    Err(KernelError::Interrupted { interface: interface.name.clone(), times: READS_MAX })
}

/// An interface and the VXLAN interface on it, both up, and the sockets for requests of their tables.
struct OpenInterface<'a> {
    interface: &'a Interface,
    indexes: Indexes,
    routes: Channel,
    peers: WireGuard,
}

impl<'a> OpenInterface<'a> {
    fn find(interface: &'a Interface) -> Result<Self, KernelError> {
        let opened = Channel::open(NETLINK_ROUTE).and_then(Channel::filtered);
        let mut routes = opened.map_err(|source| KernelError::Refused { action: "open netlink", source })?;
        let name = &interface.name;
        let wireguard = usable(name, route::link(&mut routes, name))?;
        let vxlan = interface.vxlan.as_ref().map(|vxlan| usable(vxlan, route::link(&mut routes, vxlan))).transpose()?;
        let peers = if wireguard.wireguard {
            WireGuard::kernel(wireguard.index).map_err(|error| refused("open WireGuard", name, error))?
        } else {
            WireGuard::userspace(name).map_err(|state| unusable(name, state))?
        };
        let indexes = Indexes { wireguard: wireguard.index, vxlan: vxlan.map(|vxlan| vxlan.index) };
        Ok(Self { interface, indexes, routes, peers })
    }

    fn read(&mut self) -> Result<Device, KernelError> {
        let Indexes { wireguard, vxlan } = self.indexes;
        let (name, routes) = (&self.interface.name, &mut self.routes);
        let table = self.peers.read().map_err(|error| unread("read peers", name, error))?;
        let link_address =
            route::first_address(routes, wireguard).map_err(|error| unread("read addresses", name, error))?;
        let is_ipv4 = |peer: &Peer| peer.allowed_ips.iter().any(|network| matches!(network, IpNet::V4(_)));
        let with_ipv4 = table.peers.values().any(is_ipv4);
        let destinations =
            route::routes(routes, wireguard, with_ipv4).map_err(|error| unread("read routes", name, error))?;
        let fdb = vxlan.map(|vxlan| route::flood_list(routes, vxlan, wireguard)).transpose();
        let fdb = fdb.map_err(|error| unread("read flood list", self.interface.flood_list(), error))?;
        Ok(Device {
            indexes: self.indexes,
            public_key: table.public_key,
            listen_port: table.listen_port,
            link_address,
            peers: table.peers,
            routes: destinations,
            fdb: fdb.unwrap_or_default(),
        })
    }

    /// All peers first, then all else: the tables do not depend on each other, so order matters only within each.
    fn apply(&mut self, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let peers: Vec<PeerChange> = changes.iter().filter_map(peer_change).collect();
        let indexes = self.indexes;
        let messages = changes.iter().filter_map(|change| route::message(change, indexes));
        let mut peers = self.peers.write(&peers).into_iter();
        let mut others = self.routes.request_batch(messages).into_iter();
        let mut results = Vec::with_capacity(changes.len());
        for change in changes {
            let answers = if peer_change(change).is_some() { &mut peers } else { &mut others };
            let answer = answers.next().unwrap_or(Err(Errno::EIO));
            results.push(route::outcome(change, answer).map_err(|error| self.refused(change, error)));
        }
        results
    }

    fn refused(&self, change: &Change, error: Errno) -> KernelError {
        let name = &self.interface.name;
        match change {
            Change::SetPeer(_) | Change::ReplacePeer(_) => refused("set peer", name, error),
            Change::SetRoute(_) => refused("set route", name, error),
            Change::AddFdb(_) => refused("add flood entry", self.interface.flood_list(), error),
            Change::RemovePeer(_) => refused("remove peer", name, error),
            Change::RemoveRoute(_) => refused("remove route", name, error),
            Change::RemoveFdb(_) => refused("remove flood entry", self.interface.flood_list(), error),
        }
    }
}

fn peer_change(change: &Change) -> Option<PeerChange<'_>> {
    match change {
        Change::SetPeer(peer) => Some(PeerChange::Set(peer)),
        Change::ReplacePeer(peer) => Some(PeerChange::Replace(peer)),
        Change::RemovePeer(key) => Some(PeerChange::Remove(*key)),
        Change::SetRoute(_) | Change::AddFdb(_) | Change::RemoveRoute(_) | Change::RemoveFdb(_) => None,
    }
}

fn usable(interface: &str, link: Result<LinkStatus, Errno>) -> Result<LinkStatus, KernelError> {
    match link {
        Ok(link) if link.up => Ok(link),
        Ok(_) => Err(unusable(interface, "down")),
        Err(error) => Err(refused("find interface", interface, error)),
    }
}

fn unusable(interface: &str, state: &'static str) -> KernelError {
    KernelError::Interface { interface: interface.into(), state }
}

/// Parses a datagram as the answer to each request, for fuzz tests: parsing must terminate.
#[cfg(any(test, fuzzing))]
pub fn read_answer(datagram: &[u8]) {
    use netlink_packet_generic::GenlMessage;
    use netlink_packet_route::RouteNetlinkMessage;

    let (mut address, mut routes, mut list) = Default::default();
    let answers = channel::messages::<RouteNetlinkMessage>(datagram).unwrap_or_default();
    for answer in answers.iter().filter_map(payload) {
        let _ = route::link_of(answer);
        route::find_address(&mut address, answer, 1);
        route::add_route(&mut routes, answer, 1);
        route::add_destination(&mut list, answer, 1, 1);
    }
    let mut dump = wireguard::DeviceDump::default();
    for answer in channel::messages::<GenlMessage<wireguard::DumpMessage>>(datagram).unwrap_or_default() {
        if let netlink_packet_core::NetlinkPayload::InnerMessage(answer) = answer.payload {
            dump.add_answer(answer);
        }
    }
}

#[cfg(any(test, fuzzing))]
fn payload<I>(message: &netlink_packet_core::NetlinkMessage<I>) -> Option<&I> {
    if let netlink_packet_core::NetlinkPayload::InnerMessage(inner) = &message.payload { Some(inner) } else { None }
}

/// An interface that was deleted or set down during the call is reported as if it had been so before: its peers are
/// gone.
fn refused(action: &'static str, interface: &str, error: Errno) -> KernelError {
    if error == Errno::ENODEV {
        unusable(interface, "missing")
    } else if error == Errno::ENETDOWN {
        unusable(interface, "down")
    } else {
        KernelError::Refused { action, source: error }
    }
}

fn unread(action: &'static str, interface: &str, error: DumpError) -> KernelError {
    match error {
        DumpError::Interrupted(times) => KernelError::Interrupted { interface: interface.into(), times },
        DumpError::Refused(error) => refused(action, interface, error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_answer_is_read_to_its_end(
            kind in prop_oneof![Just(16_u16), Just(20), Just(24), Just(28), any::<u16>()],
            flags in any::<u16>(),
            mut payload in vec(any::<u8>(), 0..300),
            cut in 0..20_usize,
        ) {
            let length = u32::try_from(payload.len() + 16 - cut.min(payload.len())).unwrap();
            let mut datagram = Vec::new();
            datagram.extend(length.to_ne_bytes());
            datagram.extend(kind.to_ne_bytes());
            datagram.extend(flags.to_ne_bytes());
            datagram.extend([0; 8]);
            datagram.append(&mut payload);
            read_answer(&datagram);
            read_answer(&datagram[..datagram.len() - cut.min(datagram.len())]);
        }
    }
}
