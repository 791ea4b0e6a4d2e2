//! Forwarding between the peers of one interface, each only within its own group: the hub of tenants needs this in
//! addition to peers. A pool is a set of networks of one family, each with the prefix length of the groups that it is
//! divided into.
//!
//! A packet received on the interface is dropped by [`filter`] unless a peer sends it to a peer of the same group.
//! Packets that pass are routed by a separate routing table, which is used only for them and for this machine's own
//! packets to the pool: packets from other interfaces do not leave by this one, and packets from this one do not leave
//! by another.

mod filter;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage};
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use crate::links::{Links, plain};

/// The routing table of the hub; `wg-quick` uses 51820 and those after it.
const ROUTING_TABLE: u32 = 51_830;
/// The priority of the rules that select this table: before the main table. The rules at the next priority reject all
/// other packets of the interface.
const RULE_PRIORITY: u32 = 5_183;
/// The protocol number that marks the rules as wgkex's (`FRA_PROTOCOL` of `linux/fib_rules.h`; programs have numbers
/// from 5 on).
const ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(119);
/// The input interface that the kernel uses for packets of this machine itself.
const LOOPBACK: &str = "lo";
/// Both families.
const FAMILIES: [(IpVersion, AddressFamily); 2] =
    [(IpVersion::V4, AddressFamily::Inet), (IpVersion::V6, AddressFamily::Inet6)];
/// The priority of the filter among those of the interface.
const FILTER_PRIORITY: u16 = 1;
/// `ETH_P_ALL` of `linux/if_ether.h`.
const ALL_PACKETS: u16 = 3;
/// `TCA_BPF_OPS_LEN` of `linux/pkt_cls.h`.
const OPS_LEN: u16 = 4;
/// `TCA_BPF_OPS`.
const OPS: u16 = 5;

/// Installs the filter and the rules that keep groups apart, before an interface is set up. Existing ones stay; rules
/// for another pool are deleted.
pub async fn prepare(links: &Links, interface: &str, pool: &[(IpNet, u8)]) -> io::Result<()> {
    set_filter(links, links.index(interface).await?, pool).await?;
    let wanted = rules(interface, pool);
    for (version, family) in FAMILIES {
        let there = own_rules(links, version).await?;
        // A rule of another interface stays: it keeps that interface from forwarding by the main table.
        let is_known = |rule: &RuleMessage| iif(rule).is_some_and(|iif| iif == interface || iif == LOOPBACK);
        for rule in there.iter().filter(|rule| is_known(rule) && !wanted.iter().any(|wanted| is_same(wanted, rule))) {
            links.handle().rule().del(rule.clone()).execute().await.map_err(plain)?;
        }
        let missing = |rule: &&RuleMessage| !there.iter().any(|there| is_same(rule, there));
        for rule in wanted.iter().filter(|rule| rule.header.family == family).filter(missing) {
            let mut request = links.handle().rule().add();
            *request.message_mut() = rule.clone();
            request.execute().await.map_err(plain)?;
        }
    }
    Ok(())
}

/// Enables forwarding between the peers of an interface that is up, within their groups. Repeating it is harmless.
pub async fn enable(links: &Links, interface: &str, pool: &[(IpNet, u8)]) -> io::Result<()> {
    prepare(links, interface, pool).await?;
    let index = links.index(interface).await?;
    for (network, _) in pool {
        set_route(links, index, *network).await?;
    }
    forward(interface, pool)
}

/// The interfaces that have rules of a hub.
pub async fn interfaces(links: &Links) -> io::Result<BTreeSet<String>> {
    let mut interfaces = BTreeSet::new();
    for (version, _) in FAMILIES {
        let rules = own_rules(links, version).await?;
        interfaces.extend(rules.iter().filter_map(iif).filter(|iif| *iif != LOOPBACK).map(str::to_owned));
    }
    Ok(interfaces)
}

/// A network of the pool that this machine reaches by another interface: with the rules its own packets there would go
/// to the hub. None if no other interface has a route into the pool.
pub async fn conflict(links: &Links, interface: &str, pool: &[(IpNet, u8)]) -> io::Result<Option<IpNet>> {
    let own = links.find(interface).await?.map(|link| link.index);
    let overlaps = |other: &IpNet| pool.iter().any(|(network, _)| network.contains(other) || other.contains(network));
    let query = if is_ipv4(pool) {
        RouteMessageBuilder::<Ipv4Addr>::new().build()
    } else {
        RouteMessageBuilder::<Ipv6Addr>::new().build()
    };
    let mut routes = links.handle().route().get(query).execute();
    while let Some(route) = routes.try_next().await.map_err(plain)? {
        let (destination, index) = destination(&route);
        let is_others = index.is_some() && index != own;
        // The default route overlaps every pool, and is no conflict.
        if let Some(network) = destination.filter(|network| is_others && network.prefix_len() > 0 && overlaps(network))
        {
            return Ok(Some(network));
        }
    }
    Ok(None)
}

/// The pool is of one family.
fn is_ipv4(pool: &[(IpNet, u8)]) -> bool {
    pool.iter().all(|(network, _)| matches!(network, IpNet::V4(_)))
}

fn destination(route: &RouteMessage) -> (Option<IpNet>, Option<u32>) {
    let (mut address, mut index) = (None, None);
    for attribute in &route.attributes {
        if let RouteAttribute::Destination(RouteAddress::Inet(to)) = attribute {
            address = Some(IpAddr::from(*to));
        } else if let RouteAttribute::Destination(RouteAddress::Inet6(to)) = attribute {
            address = Some(IpAddr::from(*to));
        } else if let RouteAttribute::Oif(oif) = attribute {
            index = Some(*oif);
        }
    }
    let length = route.header.destination_prefix_length;
    (address.and_then(|address| IpNet::new(address, length).ok()), index)
}

/// Removes the rules of an interface, or all rules; the filter and the routes are deleted with the interface, which has
/// to be deleted before.
pub async fn disable(links: &Links, interface: Option<&str>) -> io::Result<()> {
    let is_doomed = |rule: &RuleMessage| interface.is_none_or(|interface| iif(rule) == Some(interface));
    for (version, _) in FAMILIES {
        for rule in own_rules(links, version).await?.into_iter().filter(is_doomed) {
            links.handle().rule().del(rule).execute().await.map_err(plain)?;
        }
    }
    Ok(())
}

async fn set_filter(links: &Links, index: u32, pool: &[(IpNet, u8)]) -> io::Result<()> {
    let index = i32::try_from(index).map_err(io::Error::other)?;
    match links.handle().qdisc().add(index).ingress().execute().await.map_err(plain) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let program = filter::program(pool);
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let code: Vec<u8> = program.iter().flat_map(|instruction| instruction.bytes()).collect();
    let options = [
        TcFilterBpfOption::Other(DefaultNla::new(OPS_LEN, length.to_ne_bytes().into())),
        TcFilterBpfOption::Other(DefaultNla::new(OPS, code)),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let mut message = TcMessage::with_index(index);
    message.header.parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
    message.header.handle = 1.into();
    message.header.info = TcHandle { major: FILTER_PRIORITY, minor: ALL_PACKETS.to_be() }.into();
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.into()),
        TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()),
    ];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE;
    let mut answers = links.handle().clone().request(request).map_err(plain)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}

async fn set_route(links: &Links, index: u32, network: IpNet) -> io::Result<()> {
    let route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(network.addr(), network.prefix_len())
        .map_err(io::Error::other)?
        .output_interface(index)
        .table_id(ROUTING_TABLE)
        .protocol(RouteProtocol::Static)
        .scope(RouteScope::Link)
        .build();
    links.handle().route().add(route).replace().execute().await.map_err(plain)
}

/// Packets received on the interface are routed by the table or rejected. Packets from this machine to the pool are,
/// too: ICMP errors, which must not leave by another interface with a part of a peer's packet, and the lookups of
/// reverse path filtering (`rp_filter`).
fn rules(interface: &str, pool: &[(IpNet, u8)]) -> Vec<RuleMessage> {
    let of_pool = if is_ipv4(pool) { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let to_table = RuleAction::ToTable;
    let mut rules = vec![rule(of_pool, interface, RULE_PRIORITY, to_table)];
    for (network, _) in pool {
        let mut own = rule(of_pool, LOOPBACK, RULE_PRIORITY, to_table);
        own.header.dst_len = network.prefix_len();
        own.attributes.push(RuleAttribute::Destination(network.addr()));
        rules.push(own);
    }
    let others = [AddressFamily::Inet, AddressFamily::Inet6];
    rules.extend(others.map(|family| rule(family, interface, RULE_PRIORITY + 1, RuleAction::Prohibit)));
    rules
}

fn rule(family: AddressFamily, interface: &str, priority: u32, action: RuleAction) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header = RuleHeader { family, action, ..RuleHeader::default() };
    rule.attributes = vec![
        RuleAttribute::Iifname(interface.into()),
        RuleAttribute::Priority(priority),
        RuleAttribute::Protocol(ROUTE_PROTOCOL),
    ];
    if action == RuleAction::ToTable {
        rule.attributes.push(RuleAttribute::Table(ROUTING_TABLE));
    }
    rule
}

/// Compares only the attributes that were set: the kernel reports more.
fn is_same(wanted: &RuleMessage, there: &RuleMessage) -> bool {
    let key = |RuleHeader { family, src_len, dst_len, action, .. }: &RuleHeader| (*family, *src_len, *dst_len, *action);
    key(&wanted.header) == key(&there.header)
        && wanted.attributes.iter().all(|attribute| there.attributes.contains(attribute))
}

fn iif(rule: &RuleMessage) -> Option<&str> {
    rule.attributes
        .iter()
        .find_map(|attribute| if let RuleAttribute::Iifname(name) = attribute { Some(name.as_str()) } else { None })
}

async fn own_rules(links: &Links, version: IpVersion) -> io::Result<Vec<RuleMessage>> {
    let is_own = |rule: &RuleMessage| rule.attributes.contains(&RuleAttribute::Protocol(ROUTE_PROTOCOL));
    let rules = links.handle().rule().get(version).execute().map(|rule| rule.map_err(plain));
    Ok(rules.try_collect::<Vec<_>>().await?.into_iter().filter(is_own).collect())
}

/// Enables forwarding. IPv4 has a setting for each interface; IPv6 has one for all interfaces, which is the operator's
/// decision. A process that may configure interfaces cannot always read this setting.
fn forward(interface: &str, pool: &[(IpNet, u8)]) -> io::Result<()> {
    let is_ipv4 = is_ipv4(pool);
    let conf = if is_ipv4 { format!("ipv4/conf/{interface}") } else { "ipv6/conf/all".to_owned() };
    let file = format!("/proc/sys/net/{conf}/forwarding");
    let is_on = match fs::read_to_string(&file) {
        Ok(content) => content.trim() != "0",
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if is_on || (is_ipv4 && fs::write(file, "1").is_ok()) {
        return Ok(());
    }
    let key = conf.replace('/', ".");
    Err(io::Error::other(format!("the kernel does not forward for it: set net.{key}.forwarding=1")))
}
