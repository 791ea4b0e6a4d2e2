//! Linux: what a domain's tables say and how they change, by rtnetlink, generic netlink and, for a userspace
//! WireGuard, wireguard-control.

mod channel;
mod route;
mod wireguard;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use wgkex_common::Domain;

use self::channel::{Channel, DumpError};
use self::route::Link;
use self::wireguard::{PeerChange, WireGuard};
use crate::{Change, Device, Errno, Kernel, KernelError};

/// A large table takes seconds; what takes this long hangs, as the process of a userspace WireGuard may, and the other
/// domains must not wait for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Before listening again on a socket that fails.
const PAUSE: Duration = Duration::from_secs(1);

/// How often a domain is read anew because its interfaces were replaced meanwhile.
const READS: usize = 3;

/// Groups of events (linux/rtnetlink.h): links, and the addresses of both families.
const EVENTS: [u32; 3] = [1, 5, 9];

/// The kernel of the network namespace that the calling thread is in. Each call opens sockets of its own, on a
/// thread that may block: netlink answers at once or, with its lock held by others, late.
pub struct Netlink {
    events: TokioSocket,
    /// Calls that took longer than `patience` and have not ended.
    stuck: BTreeMap<Domain, JoinHandle<()>>,
    patience: Duration,
}

impl Netlink {
    /// Begins to listen for changes of links and addresses. Within a tokio runtime whose threads are in the network
    /// namespace that is meant.
    pub fn open() -> io::Result<Self> {
        let mut events = TokioSocket::new(NETLINK_ROUTE)?;
        events.socket_mut().bind(&SocketAddr::new(0, 0))?;
        for group in EVENTS {
            events.socket_mut().add_membership(group)?;
        }
        Ok(Self { events, stuck: BTreeMap::new(), patience: PATIENCE })
    }

    /// Waits only this long for an answer; what takes longer counts as an interface that is gone.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }
}

impl Kernel for Netlink {
    async fn read(&mut self, domain: &Domain) -> Result<Device, KernelError> {
        let task_domain = domain.clone();
        self.blocking(domain, move || read(&task_domain)).await?
    }

    async fn apply(&mut self, domain: &Domain, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let (task_domain, task_changes) = (domain.clone(), changes.to_vec());
        let count = changes.len();
        let result = self
            .blocking(domain, move || {
                Interfaces::find(&task_domain).map(|mut interfaces| interfaces.apply(&task_changes))
            })
            .await;
        result.and_then(|results| results).unwrap_or_else(|error| vec![Err(error); count])
    }

    /// What an event says does not matter, nor that some were lost to a full buffer: all is to be looked at anew.
    async fn changed(&mut self) {
        let mut event = [0; 4096];
        if let Err(error) = self.events.recv(&mut &mut event[..]).await
            && error.raw_os_error() != Some(Errno::ENOBUFS as i32)
        {
            tracing::warn!(%error, "link events unreadable");
            tokio::time::sleep(PAUSE).await;
        }
        while self.events.socket_ref().recv(&mut &mut event[..], 0).is_ok() {}
    }
}

impl Netlink {
    /// Runs `task` for `domain` on a thread that may block, of a runtime that may have only one of its own. What was
    /// begun is carried through even if nobody waits any more; until it is, nothing else is begun for that domain.
    async fn blocking<T: Send + 'static>(
        &mut self,
        domain: &Domain,
        task: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, KernelError> {
        let silent = || KernelError::Interface { interface: domain.wireguard(), state: "not answering" };
        if self.stuck.get(domain).is_some_and(|stuck| !stuck.is_finished()) {
            return Err(silent());
        }
        self.stuck.remove(domain);
        let (done, result) = oneshot::channel();
        let thread = tokio::task::spawn_blocking(move || {
            // Whoever asked may have given up.
            let _ = done.send(task());
        });
        let Ok(result) = timeout(self.patience, result).await else {
            self.stuck.insert(domain.clone(), thread);
            return Err(silent());
        };
        result.map_err(|_| KernelError::Refused { action: "run a netlink call", source: Errno::EIO })
    }
}

fn read(domain: &Domain) -> Result<Device, KernelError> {
    for _ in 0..READS {
        let mut interfaces = Interfaces::find(domain)?;
        let device = interfaces.read();
        if Interfaces::find(domain)?.indexes() == interfaces.indexes() {
            return device;
        }
    }
    Err(KernelError::Interrupted { interface: domain.wireguard(), times: READS })
}

/// A domain's interfaces, both there and up, and the sockets to ask for their tables.
struct Interfaces {
    domain: Domain,
    wireguard: Link,
    vxlan: Link,
    routes: Channel,
    peers: WireGuard,
}

impl Interfaces {
    fn find(domain: &Domain) -> Result<Self, KernelError> {
        let (wg, vx) = (domain.wireguard(), domain.vxlan());
        let opened = Channel::open(NETLINK_ROUTE).and_then(Channel::filtered);
        let mut routes = opened.map_err(|source| KernelError::Refused { action: "open netlink", source })?;
        let wireguard = usable(&wg, route::link(&mut routes, &wg))?;
        let vxlan = usable(&vx, route::link(&mut routes, &vx))?;
        let peers = if wireguard.wireguard {
            WireGuard::kernel(wireguard.index).map_err(|error| refused("open WireGuard", &wg, error))?
        } else {
            WireGuard::userspace(&wg).map_err(|state| KernelError::Interface { interface: wg, state })?
        };
        Ok(Self { domain: domain.clone(), wireguard, vxlan, routes, peers })
    }

    fn indexes(&self) -> (u32, u32) {
        (self.wireguard.index, self.vxlan.index)
    }

    fn read(&mut self) -> Result<Device, KernelError> {
        let (wg, vx) = (self.domain.wireguard(), self.domain.vxlan());
        let (wireguard, vxlan) = self.indexes();
        let table = self.peers.read().map_err(|error| unread("read peers", &wg, error))?;
        let routes = &mut self.routes;
        Ok(Device {
            indexes: (wireguard, vxlan),
            public_key: table.public_key,
            listen_port: table.listen_port,
            link_address: route::first_address(routes, wireguard)
                .map_err(|error| unread("read addresses", &wg, error))?,
            peers: table.peers,
            routes: route::routes(routes, wireguard).map_err(|error| unread("read routes", &wg, error))?,
            fdb: route::flood_list(routes, vxlan, wireguard).map_err(|error| unread("read flood list", &vx, error))?,
        })
    }

    /// All peers first, then all else: the tables do not depend on each other, so order matters only within each.
    fn apply(&mut self, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let peers: Vec<PeerChange> = changes.iter().filter_map(peer_change).collect();
        let (wireguard, vxlan) = self.indexes();
        let messages = changes.iter().filter_map(|change| route::message(change, wireguard, vxlan));
        let mut peers = self.peers.write(&peers).into_iter();
        let mut others = self.routes.order(messages).into_iter();
        let next = |change: &Change| {
            let answers = if peer_change(change).is_some() { &mut peers } else { &mut others };
            let answer = answers.next().unwrap_or(Err(Errno::EIO));
            route::outcome(change, answer).map_err(|error| self.refused(change, error))
        };
        changes.iter().map(next).collect()
    }

    fn refused(&self, change: &Change, error: Errno) -> KernelError {
        let (wg, vx) = (self.domain.wireguard(), self.domain.vxlan());
        match change {
            Change::SetPeer(..) => refused("set peer", &wg, error),
            Change::SetRoute(_) => refused("set route", &wg, error),
            Change::AddFdb(_) => refused("add flood entry", &vx, error),
            Change::RemovePeer(_) => refused("remove peer", &wg, error),
            Change::RemoveRoute(_) => refused("remove route", &wg, error),
            Change::RemoveFdb(_) => refused("remove flood entry", &vx, error),
        }
    }
}

fn peer_change(change: &Change) -> Option<PeerChange> {
    match *change {
        Change::SetPeer(key, address) => Some(PeerChange::Set(key, address)),
        Change::RemovePeer(key) => Some(PeerChange::Remove(key)),
        Change::SetRoute(_) | Change::AddFdb(_) | Change::RemoveRoute(_) | Change::RemoveFdb(_) => None,
    }
}

fn usable(interface: &str, link: Result<Link, Errno>) -> Result<Link, KernelError> {
    match link {
        Ok(link) if link.up => Ok(link),
        Ok(_) => Err(KernelError::Interface { interface: interface.into(), state: "down" }),
        Err(error) => Err(refused("find interface", interface, error)),
    }
}

/// Reads a datagram as the answer to each question that is asked, for whoever makes datagrams up: it must come to an end.
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
    let mut table = wireguard::Table::default();
    for answer in channel::messages::<GenlMessage<wireguard::Answer>>(datagram).unwrap_or_default() {
        if let netlink_packet_core::NetlinkPayload::InnerMessage(answer) = answer.payload {
            table.add_answer(answer);
        }
    }
}

#[cfg(any(test, fuzzing))]
fn payload<I>(message: &channel::Message<I>) -> Option<&I> {
    if let netlink_packet_core::NetlinkPayload::InnerMessage(inner) = &message.payload { Some(inner) } else { None }
}

/// An interface that went away or down under the call is told as if it had been so before: what was in it is gone.
fn refused(action: &'static str, interface: &str, error: Errno) -> KernelError {
    let gone = |state| KernelError::Interface { interface: interface.into(), state };
    if error == Errno::ENODEV {
        gone("missing")
    } else if error == Errno::ENETDOWN {
        gone("down")
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
        fn whatever_comes_as_an_answer_is_read_to_its_end(
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
