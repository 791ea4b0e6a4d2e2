//! The kernel's links, addresses, routes and flood lists (rtnetlink): the messages that read and change them, and the
//! meaning of the answers.

#![expect(clippy::wildcard_enum_match_arm, reason = "netlink has more attributes than matter, and new ones come")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::channel::{Channel, DumpError};
use crate::{Change, Errno, Indexes};

/// The all-zero MAC address: its destinations receive broadcast and unknown-unicast frames.
const FLOOD: [u8; 6] = [0; 6];

/// The attributes of a link that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkStatus {
    pub(super) index: u32,
    pub(super) up: bool,
    /// Whether it is the kernel's own WireGuard.
    pub(super) wireguard: bool,
}

/// Looks a link up by its name: `ENODEV` if there is none.
pub(super) fn link(channel: &mut Channel, name: &str) -> Result<LinkStatus, Errno> {
    let mut question = LinkMessage::default();
    question.attributes =
        vec![LinkAttribute::IfName(name.into()), LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    link_of(&channel.get(Message::GetLink(question))?)
}

pub(super) fn link_of(answer: &Message) -> Result<LinkStatus, Errno> {
    match answer {
        Message::NewLink(link) => Ok(LinkStatus {
            index: link.header.index,
            up: link.header.flags.contains(LinkFlags::Up),
            wireguard: is_wireguard(link),
        }),
        _ => Err(Errno::EIO),
    }
}

fn is_wireguard(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => info.contains(&LinkInfo::Kind(InfoKind::Wireguard)),
        _ => false,
    })
}

/// The first address of a link, in the order that `ip address` shows.
pub(super) fn first_address(channel: &mut Channel, index: u32) -> Result<Option<IpAddr>, DumpError> {
    let mut question = AddressMessage::default();
    question.header.index = index;
    channel.dump(&Message::GetAddress(question), |first, answer| find_address(first, &answer, index))
}

pub(super) fn find_address(first: &mut Option<IpAddr>, answer: &Message, index: u32) {
    if let Message::NewAddress(address) = answer
        && address.header.index == index
    {
        *first = first.or_else(|| local(address));
    }
}

/// An address of a point-to-point link also lists the peer's address; only `IFA_LOCAL` is the interface's own.
fn local(message: &AddressMessage) -> Option<IpAddr> {
    let attributes = &message.attributes;
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// The destinations of routes of protocol static in the main table that leave by `wireguard`.
pub(super) fn routes(channel: &mut Channel, wireguard: u32, with_ipv4: bool) -> Result<BTreeSet<IpNet>, DumpError> {
    let mut dump = |family| {
        let mut question = static_routes(family);
        question.header.kind = RouteType::Unspec;
        question.attributes = vec![RouteAttribute::Oif(wireguard)];
        channel.dump(&Message::GetRoute(question), |routes, answer| add_route(routes, &answer, wireguard))
    };
    let mut routes: BTreeSet<IpNet> = dump(AddressFamily::Inet6)?;
    if with_ipv4 {
        routes.append(&mut dump(AddressFamily::Inet)?);
    }
    Ok(routes)
}

pub(super) fn add_route(routes: &mut BTreeSet<IpNet>, answer: &Message, wireguard: u32) {
    if let Message::NewRoute(route) = answer {
        routes.extend(destination(route, wireguard));
    }
}

fn destination(route: &RouteMessage, wireguard: u32) -> Option<IpNet> {
    let header = &route.header;
    let ours = header.table == RouteHeader::RT_TABLE_MAIN
        && header.protocol == RouteProtocol::Static
        && route.attributes.contains(&RouteAttribute::Oif(wireguard));
    let address = route.attributes.iter().filter(|_| ours).find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet6(destination)) => Some(IpAddr::V6(*destination)),
        RouteAttribute::Destination(RouteAddress::Inet(destination)) => Some(IpAddr::V4(*destination)),
        _ => None,
    });
    IpNet::new(address?, header.destination_prefix_length).ok()
}

/// The destinations of `vxlan`'s flood list that leave by `wireguard`, on its own port and network.
pub(super) fn flood_list(channel: &mut Channel, vxlan: u32, wireguard: u32) -> Result<BTreeSet<Ipv6Addr>, DumpError> {
    let mut question = NeighbourMessage::default();
    question.header.family = AddressFamily::Bridge;
    question.header.ifindex = vxlan;
    channel.dump(&Message::GetNeighbour(question), |list, answer| add_destination(list, &answer, vxlan, wireguard))
}

pub(super) fn add_destination(list: &mut BTreeSet<Ipv6Addr>, answer: &Message, vxlan: u32, wireguard: u32) {
    if let Message::NewNeighbour(entry) = answer
        && entry.header.ifindex == vxlan
    {
        list.extend(flood_destination(entry, wireguard));
    }
}

fn flood_destination(entry: &NeighbourMessage, wireguard: u32) -> Option<Ipv6Addr> {
    let (mut flood, mut by, mut destination) = (false, false, None);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => flood = mac[..] == FLOOD,
            NeighbourAttribute::IfIndex(index) => by = *index == wireguard,
            NeighbourAttribute::Destination(address) => destination = ipv6(address),
            // Port and network are listed only where they differ from the interface's own: this is not the entry that
            // we would make.
            NeighbourAttribute::Port(_) | NeighbourAttribute::Vni(_) => return None,
            _ => {}
        }
    }
    destination.filter(|_| flood && by)
}

/// The address attribute of a bridge entry has no family: 16 bytes are IPv6.
fn ipv6(address: &NeighbourAddress) -> Option<Ipv6Addr> {
    match address {
        NeighbourAddress::Inet6(address) => Some(*address),
        NeighbourAddress::Other(bytes) => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(Ipv6Addr::from),
        _ => None,
    }
}

/// The message and flags for a change; `None` for changes of peers, which are not made by rtnetlink.
///
/// A route is appended, not replaced: "replace" takes any route to the destination, also another domain's by another
/// interface, as the same key may be in two domains. A flood entry is deleted with its destination: without one Linux
/// deletes all of them.
pub(super) fn message(change: &Change, indexes: Indexes) -> Option<(Message, u16)> {
    const ADD: u16 = NLM_F_CREATE | NLM_F_APPEND;
    let Indexes { wireguard, vxlan } = indexes;
    match *change {
        Change::SetRoute(to) => Some((Message::NewRoute(route(to, wireguard)), ADD)),
        Change::RemoveRoute(to) => Some((Message::DelRoute(route(to, wireguard)), 0)),
        Change::AddFdb(to) => Some((Message::NewNeighbour(flood_entry(to, wireguard, vxlan)), ADD)),
        Change::RemoveFdb(to) => Some((Message::DelNeighbour(flood_entry(to, wireguard, vxlan)), 0)),
        Change::SetPeer(_) | Change::ReplacePeer(_) | Change::RemovePeer(_) => None,
    }
}

/// Interprets the kernel's answer to a change: "already there" and "already gone" are success.
pub(super) fn outcome(change: &Change, answer: Result<(), Errno>) -> Result<(), Errno> {
    match (change, answer) {
        (Change::SetRoute(_) | Change::AddFdb(_), Err(Errno::EEXIST))
        | (Change::RemoveRoute(_) | Change::RemoveFdb(_), Err(Errno::ENOENT | Errno::ESRCH)) => Ok(()),
        (_, answer) => answer,
    }
}

fn route(destination: IpNet, wireguard: u32) -> RouteMessage {
    let (family, address) = match destination.network() {
        IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address)),
        IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address)),
    };
    let mut route = static_routes(family);
    // A route of IPv4 without a gateway needs the scope link (`fib_check_nh` in net/ipv4); IPv6 has no such scope.
    route.header.scope = if destination.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    route.header.destination_prefix_length = destination.prefix_len();
    route.attributes = vec![RouteAttribute::Destination(address), RouteAttribute::Oif(wireguard)];
    route
}

fn static_routes(family: AddressFamily) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family;
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    route
}

/// `NeighbourFlags::Own` is `NTF_SELF`: the entry is the VXLAN's, not that of a bridge above it.
fn flood_entry(destination: Ipv6Addr, wireguard: u32, vxlan: Option<u32>) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    // No interface has the index 0, so Linux refuses an entry for an interface without a VXLAN.
    entry.header.ifindex = vxlan.unwrap_or_default();
    entry.header.state = NeighbourState::Permanent;
    entry.header.flags = NeighbourFlags::Own;
    entry.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(FLOOD.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(destination)),
        NeighbourAttribute::IfIndex(wireguard),
    ];
    entry
}
