//! Checks that concern all domains: privileges, WireGuard, other managers of interfaces.

use wgkex_common::doctor::{CheckProblem, Finding, Level};

use crate::leases::ServerStatus;

use super::facts::{
    DomainFacts, Facts, Managers, NetworkFile, RunningWorker, ServerFacts, Uplink, WireguardDevice, WireguardFacts,
    WireguardSource,
};

/// The overhead of WireGuard: the outer IP header, 8 bytes of UDP, 32 of WireGuard.
const OVER_IPV6: u32 = 40 + 8 + 32;
const OVER_IPV4: u32 = 20 + 8 + 32;

pub(super) fn capability(has_net_admin: bool) -> Finding {
    let missing = (!has_net_admin).then(|| CheckProblem {
        found: "CAP_NET_ADMIN is missing here".into(),
        advice: "run it as root, and the worker as root or with AmbientCapabilities=CAP_NET_ADMIN".into(),
    });
    Finding::judge("privileges", Level::Fail, "CAP_NET_ADMIN is there", missing)
}

pub(super) fn wireguard(facts: &Facts) -> Finding {
    let subject = "WireGuard";
    match facts.wireguard {
        WireguardSource { kernel: true, .. } => Finding::ok(subject, "the kernel has it"),
        WireguardSource { kernel: false, userspace: true } => {
            Finding::ok(subject, "the kernel has none, wireguard-go is there, which is slower")
        }
        WireguardSource { kernel: false, userspace: false } => Finding::fail(
            subject,
            "the kernel has none, and there is no wireguard-go",
            "install a kernel with WireGuard, or `apt-get install wireguard-go`",
        ),
    }
}

/// Whether a server of the registry has its interface, and the peers of its leases, as the running worker reports.
pub(super) fn server(facts: &ServerFacts, running: Option<&RunningWorker>) -> Finding {
    let ServerFacts { name, interface, listen_port, wireguard } = facts;
    let subject = format!("server {name}");
    let wrong = match wireguard {
        Err(error) => Some(error.clone()),
        Ok(None) => Some("it is missing".into()),
        Ok(Some(WireguardFacts { link, .. })) if !link.up => Some("it is down".into()),
        Ok(Some(WireguardFacts { device, .. })) => {
            device.as_ref().map_or_else(|error| Some(error.clone()), |device| other_port(device.as_ref(), *listen_port))
        }
    };
    if let Some(wrong) = wrong {
        return Finding::fail(
            &subject,
            format!("{interface}: {wrong}"),
            "`wgkex-worker setup` makes it, or completes it",
        );
    }
    match running.map(|running| running.servers.get(name)) {
        None => Finding::ok(&subject, format!("{interface} is up, on UDP port {listen_port}")),
        Some(None) => {
            let found = "the running worker does not know it: its config was another one when it started";
            Finding::warn(&subject, found, "restart the worker")
        }
        Some(Some(status)) => running_server(&subject, status),
    }
}

fn other_port(device: Option<&WireguardDevice>, wanted: u16) -> Option<String> {
    let port = device.map(|device| device.port).filter(|port| *port != wanted)?;
    Some(format!("it listens on UDP port {port}, and {wanted} is in the config"))
}

fn running_server(subject: &str, ServerStatus { interface, up, reason, leases }: &ServerStatus) -> Finding {
    let problem = (!up).then(|| CheckProblem {
        found: format!("{interface}: {}", reason.as_deref().unwrap_or("its interface is not read yet")),
        advice: "`wgkex-worker setup` makes what is missing of the interface; `wgkex-worker dry-run` shows the peers that lack".into(),
    });
    Finding::judge(subject, Level::Fail, format!("{interface} has the peers of all {leases} leases"), problem)
}

/// Whether the MTU of the tunnels fits that of the uplinks.
pub(super) fn uplink(uplink: &Uplink, domains: &[DomainFacts]) -> Option<Finding> {
    let Uplink { name, mtu, has_ipv6 } = uplink;
    let overhead = if *has_ipv6 { OVER_IPV6 } else { OVER_IPV4 };
    let wireguard = |domain: &DomainFacts| Some(domain.wireguard.as_ref().ok()?.as_ref()?.link.mtu);
    let largest = domains.iter().filter_map(wireguard).max()?;
    let fits = mtu.saturating_sub(overhead);
    let problem = (largest > fits).then(|| CheckProblem {
        found: format!(
            "its MTU {mtu} is too small for the {largest} of a tunnel, of which WireGuard makes {}: large packets are fragmented or lost",
            largest + overhead
        ),
        advice: format!(
            "raise it, or lower those of the tunnels: wg-... to {fits}, vx-... to 70 less, and the same in the firmware of routers"
        ),
    });
    Some(Finding::judge(name, Level::Warn, format!("its MTU {mtu} has room for the {largest} of the tunnels"), problem))
}

/// Other programs that manage the interfaces of domains, servers and the hub, and may delete the worker's routes.
pub(super) fn managers(managers: &Managers) -> Vec<Finding> {
    let mut findings = networkd(managers);
    for quick in &managers.wg_quick {
        let (interface, file) = (&quick.interface, quick.file.display());
        findings.push(if quick.is_enabled {
            let found = format!("wg-quick manages it, too ({file}), and removes its peers at each start");
            Finding::fail(interface, found, format!("`systemctl disable --now wg-quick@{interface}`"))
        } else {
            let found = format!("there is a config of wg-quick for it ({file})");
            Finding::warn(interface, found, "move it away, so that it cannot be started")
        });
    }
    if managers.network_manager_runs {
        for interface in &managers.network_manager_manages {
            findings.push(Finding::warn(
                interface,
                "NetworkManager runs and is not configured to ignore it",
                "[keyfile] unmanaged-devices=interface-name:wg-*;interface-name:vx-* in a file in /etc/NetworkManager/conf.d",
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("managers", "no other program manages the interfaces"));
    }
    findings
}

fn networkd(managers: &Managers) -> Vec<Finding> {
    let level = if managers.networkd_runs { Level::Fail } else { Level::Warn };
    let keep =
        "ManageForeignRoutes=no and ManageForeignRoutingPolicyRules=no in [Network] of /etc/systemd/networkd.conf";
    let mut findings = Vec::new();
    for (interface, NetworkFile { path, keeps_configuration }) in &managers.networkd_files {
        let path = path.display();
        findings.push(if managers.networkd_keeps_foreign || *keeps_configuration {
            Finding::ok(interface, format!("systemd-networkd has {path} for it, and keeps routes of the worker"))
        } else {
            let found = format!("systemd-networkd manages it, too, by {path}, and removes routes of the worker");
            let advice =
                format!("{keep}; or KeepConfiguration=yes in [Network] of {path}, or Unmanaged=yes in its [Link]");
            Finding { level, ..Finding::warn(interface, found, advice) }
        });
    }
    if managers.networkd_runs && !managers.networkd_keeps_foreign {
        let found = "systemd-networkd runs, and removes routes and rules that it did not make when it starts";
        findings.push(Finding::warn("managers", found, keep));
    }
    findings
}
