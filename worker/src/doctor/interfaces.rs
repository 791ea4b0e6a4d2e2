//! Checks of a domain's interfaces.

use std::net::Ipv6Addr;

use wgkex_common::config::Setup;
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::doctor::{CheckProblem, Finding, Level};
use wgkex_kernel::links::{LinkKind, VxlanAttributes};

use super::facts::{DomainFacts, LinkFacts, WireguardDevice, WireguardFacts};

/// The overhead of VXLAN over IPv6: Ethernet 14, VXLAN 8, UDP 8, IPv6 40.
const VXLAN_OVERHEAD: u32 = 70;
/// The smallest MTU of IPv6, and the largest fragment that BATMAN makes.
const MTU_MIN: u32 = 1280;

/// After so many packets for this machine from a tunnel and none from the VXLAN in it, the VXLAN has another id than
/// routers have.
const MISMATCH_AFTER: u64 = 100;

const SETUP: &str = "run `wgkex-worker setup`, or what else makes it";

/// Every check of a domain; `is_setup_named` if the config has a section for the interfaces.
pub(super) fn domain(facts: &DomainFacts, is_setup_named: bool) -> Vec<Finding> {
    let (wg, vx) = (facts.domain.wireguard(), facts.domain.vxlan());
    let mut findings = Vec::new();
    let wireguard = match &facts.wireguard {
        Err(error) => {
            findings.push(Finding::fail(&wg, format!("it cannot be read: {error}"), "run the doctor as root"));
            None
        }
        Ok(None) => {
            findings.push(Finding::fail(&wg, "it is missing", SETUP));
            findings.extend(taken_before_setup(&wg, &facts.setup, &facts.port_owner));
            None
        }
        Ok(Some(wireguard)) => {
            findings.extend(self::wireguard(&wg, wireguard, facts, is_setup_named));
            Some(wireguard)
        }
    };
    match &facts.vxlan {
        Err(error) => {
            findings.push(Finding::fail(&vx, format!("it cannot be read: {error}"), "run the doctor as root"));
        }
        Ok(None) => findings.push(Finding::fail(&vx, "it is missing", SETUP)),
        Ok(Some(link)) => findings.extend(vxlan(&vx, link, (&wg, wireguard), &facts.setup, is_setup_named)),
    }
    findings
}

fn taken_before_setup(wg: &str, setup: &Setup, owner: &PortOwner) -> Option<Finding> {
    let holder = match owner {
        PortOwner::Nobody => return None,
        PortOwner::Kernel => "something in the kernel".to_owned(),
        PortOwner::Process { pid, name } => format!("process {pid} ({name})"),
    };
    let found = format!("its configured UDP port {} is taken by {holder}", setup.listen_port);
    Some(Finding::fail(wg, found, "end that, or set another setup.listen_port"))
}

fn wireguard(wg: &str, facts: &WireguardFacts, domain: &DomainFacts, is_setup_named: bool) -> Vec<Finding> {
    let WireguardFacts { link, is_userspace, is_socket_inaccessible, device } = facts;
    let kind = match &link.kind {
        LinkKind::Wireguard => "the kernel's WireGuard",
        LinkKind::Tun if *is_userspace => "a userspace WireGuard",
        LinkKind::Tun if *is_socket_inaccessible => {
            let found = "it is a TUN device: only root sees whether it belongs to a userspace WireGuard";
            return vec![Finding::warn(wg, found, "run this as root")];
        }
        kind @ (LinkKind::Tun | LinkKind::Vxlan(_) | LinkKind::Other(_) | LinkKind::Physical) => {
            let found = format!("it is {}, and not a WireGuard interface", described(kind));
            return vec![Finding::fail(
                wg,
                found,
                format!("take that away (`ip link del {wg}`) or rename it; then {SETUP}"),
            )];
        }
    };
    let mut findings = vec![is_up(wg, link, kind)];
    match device {
        Ok(None) => {}
        Err(error) => {
            let advice = "run the doctor as root, or as the owner of the userspace WireGuard";
            findings.push(Finding::fail(wg, format!("WireGuard does not answer: {error}"), advice));
        }
        Ok(Some(device)) => {
            let key = device.public_key.is_none().then(|| CheckProblem::new("it has no private key", SETUP));
            findings.push(Finding::judge(wg, Level::Fail, "it has a private key", key));
            let is_kernels = link.kind == LinkKind::Wireguard;
            findings.extend(port(wg, *device, is_kernels, domain, is_setup_named));
        }
    }
    findings.push(address(wg, link));
    findings.extend(rp_filter(wg, link));
    findings
}

fn is_up(name: &str, link: &LinkFacts, kind: &str) -> Finding {
    let down = (!link.up).then(|| CheckProblem::new("it is down", format!("`ip link set {name} up`")));
    Finding::judge(name, Level::Fail, format!("{kind}, up"), down)
}

/// The UDP port of the device, and whether the device really listens on it.
fn port(
    wg: &str,
    device: WireguardDevice,
    is_kernels: bool,
    domain: &DomainFacts,
    is_setup_named: bool,
) -> Vec<Finding> {
    let (port, wanted) = (device.port, domain.setup.listen_port);
    if port == 0 {
        return vec![no_port(wg, wanted, &domain.port_owner)];
    }
    let again = listen_again(wg, port);
    let bound = match &domain.port_owner {
        PortOwner::Nobody => Finding::fail(wg, format!("nothing listens on its UDP port {port}"), again),
        PortOwner::Process { pid, name } if is_kernels || !name.starts_with("wireguard") => {
            let found = format!("its UDP port {port} is taken by process {pid} ({name})");
            Finding::fail(wg, found, format!("end that, then {again}; or set another port"))
        }
        PortOwner::Kernel | PortOwner::Process { .. } => Finding::ok(wg, format!("it listens on UDP port {port}")),
    };
    let differs = is_setup_named && port != wanted;
    let differing = differs.then(|| {
        let found = format!("its UDP port is {port}, and {wanted} in the config");
        Finding::warn(wg, found, format!("routers get port {port}: let it through, or run `wgkex-worker setup`"))
    });
    [bound].into_iter().chain(differing).collect()
}

/// This command makes a userspace WireGuard open its sockets again; setting it down and up does not.
fn listen_again(wg: &str, port: u16) -> String {
    format!("`wg set {wg} listen-port {port}`")
}

/// A userspace WireGuard reports port 0 if another program has its port.
fn no_port(wg: &str, wanted: u16, owner: &PortOwner) -> Finding {
    match owner {
        PortOwner::Process { pid, name } => {
            let found = format!("it has no UDP port: the configured {wanted} is taken by process {pid} ({name})");
            Finding::fail(wg, found, format!("end that, then {}; or set another port", listen_again(wg, wanted)))
        }
        PortOwner::Nobody | PortOwner::Kernel => Finding::fail(wg, "it has no UDP port", SETUP),
    }
}

fn address(wg: &str, link: &LinkFacts) -> Finding {
    if link.addresses.is_empty() {
        return Finding::fail(wg, "it has no IPv6 address", SETUP);
    }
    let is_global = !link.addresses.iter().any(Ipv6Addr::is_unicast_link_local);
    let global = is_global.then(|| {
        let found = "its addresses are all global: routers expect a gateway at a link-local one (fe80::/10)";
        CheckProblem::new(found, SETUP)
    });
    Finding::judge(wg, Level::Warn, "it has a link address", global)
}

fn rp_filter(name: &str, link: &LinkFacts) -> Option<Finding> {
    let is_strict = link.has_ipv4 && link.rp_filter == 1;
    is_strict.then(|| {
        let found = "it has an IPv4 address, and rp_filter is strict: answers that take another way are dropped";
        Finding::warn(name, found, format!("set net.ipv4.conf.all.rp_filter and net.ipv4.conf.{name}.rp_filter to 2"))
    })
}

fn vxlan(
    vx: &str,
    link: &LinkFacts,
    (wg, wireguard): (&str, Option<&WireguardFacts>),
    setup: &Setup,
    is_setup_named: bool,
) -> Vec<Finding> {
    let attributes = match &link.kind {
        LinkKind::Vxlan(attributes) => attributes,
        kind @ (LinkKind::Wireguard | LinkKind::Tun | LinkKind::Other(_) | LinkKind::Physical) => {
            let found = format!("it is {}, and not a VXLAN interface", described(kind));
            return vec![Finding::fail(
                vx,
                found,
                format!("take that away (`ip link del {vx}`) or rename it; then {SETUP}"),
            )];
        }
    };
    let mut findings = vec![is_up(vx, link, "VXLAN")];
    findings.extend(shape(vx, attributes, setup, is_setup_named));
    if let Some(wireguard) = wireguard {
        findings.push(path(vx, attributes, (wg, &wireguard.link)));
        findings.push(mtu((vx, link.mtu), (wg, wireguard.link.mtu)));
        findings.extend(vxlan_id_mismatch((vx, link), (wg, &wireguard.link), attributes));
    }
    findings.extend(rp_filter(vx, link));
    findings
}

/// The network identifier and port, which must be those of the routers.
fn shape(vx: &str, attributes: &VxlanAttributes, setup: &Setup, is_setup_named: bool) -> [Finding; 2] {
    let level = if is_setup_named { Level::Fail } else { Level::Warn };
    let anew = "`wgkex-worker setup --remove`, then `wgkex-worker setup`";
    let check = |what: &str, key: &str, is: u32, wanted: u32| {
        let differs = (is != wanted).then(|| {
            let found = format!("its {what} is {is}, and {wanted} in the config");
            CheckProblem::new(found, format!("make it anew ({anew}), or set setup.{key} if routers have {is}"))
        });
        Finding::judge(vx, level, format!("its {what} is {is}"), differs)
    };
    [
        check("VXLAN id", "vxlan_id", attributes.id, setup.vxlan_id),
        check("VXLAN port", "vxlan_port", attributes.port.into(), setup.vxlan_port.into()),
    ]
}

/// The VXLAN sends through the domain's WireGuard, from an address that routers know.
fn path(vx: &str, attributes: &VxlanAttributes, (wg, link): (&str, &LinkFacts)) -> Finding {
    let is_own = |address: &std::net::IpAddr| match address {
        std::net::IpAddr::V6(address) => link.addresses.contains(address),
        std::net::IpAddr::V4(_) => false,
    };
    let wrong = match attributes.local {
        _ if attributes.under != Some(link.index) => Some(format!("the device under it is not {wg}")),
        None => Some("it has no local address".into()),
        Some(local) if !is_own(&local) => Some(format!("its local address {local} is not one of {wg}")),
        Some(_) => None,
    };
    let problem =
        wrong.map(|wrong| CheckProblem::new(wrong, format!("make it anew: `ip link del {vx}`, then {SETUP}")));
    Finding::judge(vx, Level::Fail, format!("it sends through {wg}, from its address"), problem)
}

/// Most packets from the tunnels are VXLAN. The kernel silently drops those with another network identifier.
fn vxlan_id_mismatch(
    (vx, link): (&str, &LinkFacts),
    (wg, outer): (&str, &LinkFacts),
    attributes: &VxlanAttributes,
) -> Option<Finding> {
    let (packets, VxlanAttributes { id, port, .. }) = (outer.received.own_ipv6, attributes);
    (link.received.packets == 0 && packets >= MISMATCH_AFTER).then(|| {
        let found = format!(
            "it has never received anything, although {packets} packets came by {wg}: do routers have another VXLAN id \
             than {id}, or another port than {port}?"
        );
        Finding::warn(
            vx,
            found,
            "set setup.vxlan_id and setup.vxlan_port as the firmware has them; if it was made just now, look again",
        )
    })
}

fn mtu((vx, inner): (&str, u32), (wg, outer): (&str, u32)) -> Finding {
    let (fits, least) = (outer.saturating_sub(VXLAN_OVERHEAD), MTU_MIN + VXLAN_OVERHEAD);
    let problem = if outer < least {
        let found = format!(
            "the MTU {outer} of {wg} is too small: VXLAN takes {VXLAN_OVERHEAD} of it, BATMAN and IPv6 need {MTU_MIN}"
        );
        Some(CheckProblem::new(
            found,
            format!("`ip link set {wg} mtu 1420`, at least {least}, and {vx} {VXLAN_OVERHEAD} less"),
        ))
    } else if inner > fits {
        let found = format!("its MTU {inner} is too large: {wg} has {outer}, and VXLAN takes {VXLAN_OVERHEAD} of it");
        Some(CheckProblem::new(found, format!("`ip link set {vx} mtu {fits}`")))
    } else if inner < MTU_MIN {
        let found = format!("its MTU {inner} is too small: BATMAN and IPv6 need {MTU_MIN}");
        Some(CheckProblem::new(found, format!("`ip link set {vx} mtu {fits}`")))
    } else {
        None
    };
    Finding::judge(vx, Level::Fail, format!("its MTU {inner} fits into the {outer} of {wg}"), problem)
}

fn described(kind: &LinkKind) -> String {
    match kind {
        LinkKind::Tun => "a TUN device without a WireGuard behind it".into(),
        LinkKind::Wireguard => "of kind wireguard".into(),
        LinkKind::Vxlan(_) => "of kind vxlan".into(),
        LinkKind::Other(kind) => format!("of kind {kind}"),
        LinkKind::Physical => "a device of no kind".into(),
    }
}
