//! `dry-run`: the changes that a worker would make in the kernel now, as equivalent commands. No IO, no task, no state.
//!
//! Previous stop of a key: [`crate::cli::dry_run`], which reads the tables and the state, and [`preview`], which plans
//! the changes; next stop: the same command, which prints them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv6Addr;

use ipnet::IpNet;
use serde::Serialize;
use wgkex_kernel::{Change, Device, Interface, Peer, PeerConfig};

use crate::plan::{Planned, Reason};
pub use crate::reconciler::preview::{PreviewParts, preview};

/// A command that is equivalent to a change of the worker, and its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Command {
    /// The command line for a shell.
    pub command: String,
    /// The reason.
    pub reason: &'static str,
}

/// The commands of `planned`, which is about these tables.
#[must_use]
pub fn commands(interface: &Interface, device: &Device, planned: &[Planned]) -> Vec<Command> {
    let commands = planned.iter().flat_map(|Planned { reason, changes }| {
        let changes = changes.iter().filter(|change| *reason == Reason::Silent || !is_applied(device, change));
        changes.map(|change| Command { command: command(interface, device, change), reason: reason.text() })
    });
    commands.collect()
}

/// Whether the change is already in the tables: the worker applies it all the same, as it is idempotent.
fn is_applied(device: &Device, change: &Change) -> bool {
    match change {
        Change::SetPeer(PeerConfig { key, allowed_ips, keepalive, preshared }) => {
            device.peers.get(key).is_some_and(|actual| {
                allowed_ips.iter().all(|network| actual.allowed_ips.contains(network))
                    && (keepalive.is_none() || *keepalive == actual.keepalive)
                    && (preshared.is_none() || *preshared == actual.preshared)
            })
        }
        Change::SetRoute(network) => device.routes.contains(network),
        Change::AddFdb(address) => device.fdb.contains(address),
        Change::ReplacePeer(peer) => {
            let has = |actual: &Peer| actual.allowed_ips.iter().all(|network| peer.allowed_ips.contains(network));
            is_applied(device, &Change::SetPeer(peer.clone())) && device.peers.get(&peer.key).is_some_and(has)
        }
        Change::RemovePeer(key) => !device.peers.contains_key(key),
        Change::RemoveRoute(network) => !device.routes.contains(network),
        Change::RemoveFdb(address) => !device.fdb.contains(address),
    }
}

/// The commands as a shell script: each reason is a comment.
#[must_use]
pub fn script(domain: &str, commands: &[Command]) -> String {
    if commands.is_empty() {
        return format!("# {domain}: nothing would change\n");
    }
    let mut script = format!("# {domain}: {} changes\n", commands.len());
    for Command { command, reason } in commands {
        let _ = writeln!(script, "{command}  # {reason}");
    }
    script
}

fn command(interface: &Interface, device: &Device, change: &Change) -> String {
    let Interface { name, vxlan } = interface;
    let vxlan = vxlan.as_ref().unwrap_or(name);
    let flood = |verb: &str, address: &Ipv6Addr| {
        format!("bridge fdb {verb} 00:00:00:00:00:00 dev {vxlan} dst {address} via {name} self permanent")
    };
    match change {
        Change::SetPeer(peer) => set_peer(name, device.peers.get(&peer.key), peer),
        Change::ReplacePeer(peer) => set_peer(name, None, peer),
        Change::RemovePeer(key) => format!("wg set {name} peer {key} remove"),
        Change::SetRoute(network) => format!("{} route add {network} dev {name} proto static", ip(network)),
        Change::RemoveRoute(network) => format!("{} route del {network} dev {name} proto static", ip(network)),
        Change::AddFdb(address) => flood("append", address),
        Change::RemoveFdb(address) => flood("del", address),
    }
}

/// `wg` replaces the allowed-ips of a peer; the worker adds to those of the existing peer, which is `keeps`.
fn set_peer(interface: &str, keeps: Option<&Peer>, peer: &PeerConfig) -> String {
    let has = keeps.map(|actual| actual.allowed_ips.iter()).into_iter().flatten();
    let networks: BTreeSet<_> = has.chain(&peer.allowed_ips).map(IpNet::to_string).collect();
    let networks = networks.into_iter().collect::<Vec<_>>().join(",");
    let keepalive = peer.keepalive.map_or_else(String::new, |every| format!(" persistent-keepalive {every}"));
    let preshared = if peer.preshared.is_some() { " preshared-key /dev/stdin" } else { "" };
    format!("wg set {interface} peer {} allowed-ips {networks}{keepalive}{preshared}", peer.key)
}

fn ip(network: &IpNet) -> &'static str {
    match network {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip -6",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::time::{Duration, Instant, SystemTime};

    use wgkex_common::access_lists::{Admission, AllowList, Entry, List};
    use wgkex_common::storage::key_store::KeyRecord;
    use wgkex_common::wire::drain::Deadline;
    use wgkex_common::{PublicKey, Reserved};
    use wgkex_kernel::{Indexes, Peer, host};

    use super::*;
    use crate::peers::{Clocks, Policy};
    use crate::profiles::mesh::Mesh;
    use crate::testing::{domain, key};

    const HOUR: Duration = Duration::from_secs(3600);

    /// The tables have these keys, whole, each with its last handshake so long ago.
    fn device(keys: &[(u32, Option<Duration>)], now: Clocks) -> Device {
        let address = |n: &u32| key(*n).link_local();
        let peer = |(n, ago): &(u32, Option<Duration>)| {
            let last_handshake = ago.map(|ago| now.wall - ago);
            (key(*n), Peer { allowed_ips: [host(address(n))].into_iter().collect(), last_handshake, ..Peer::default() })
        };
        Device {
            indexes: Indexes { wireguard: 1, vxlan: Some(2) },
            public_key: Some(key(999)),
            listen_port: 1,
            link_address: None,
            peers: keys.iter().map(peer).collect(),
            routes: keys.iter().map(|(n, _)| host(address(n))).collect(),
            fdb: keys.iter().map(|(n, _)| address(n)).collect(),
        }
    }

    fn now() -> Clocks {
        Clocks { monotonic: Instant::now() + 24 * HOUR, wall: SystemTime::now() }
    }

    fn previewed(device: &Device, remembered: &[(u32, Duration)], denied: &[u32], now: Clocks) -> Vec<String> {
        previewed_past(None, device, remembered, denied, now)
    }

    fn previewed_past(
        deadline: Option<Deadline>,
        device: &Device,
        remembered: &[(u32, Duration)],
        denied: &[u32],
        now: Clocks,
    ) -> Vec<String> {
        let record = |ago: Duration| KeyRecord { last: now.monotonic.checked_sub(ago).unwrap(), established: false };
        let denied: Vec<_> = denied.iter().map(|n| Entry::new(List::Deny, key(*n))).collect();
        let (domain, reserved) = (domain(), Reserved::default());
        let parts = PreviewParts {
            domain: &domain,
            profile: Arc::new(Mesh),
            policy: Policy::default(),
            remembered: remembered.iter().map(|(n, ago)| (key(*n), record(*ago))).collect::<BTreeMap<PublicKey, _>>(),
            admission: Arc::new(Admission::of(&denied, AllowList::Off, 0)),
            deadline,
            reserved: &reserved,
        };
        let commands = commands(&Interface::from(&domain), device, &preview(parts, device, now));
        commands.into_iter().map(|Command { command, reason }| format!("{command}  # {reason}")).collect()
    }

    /// The commands that set, or remove, the objects of a key.
    fn all(n: u32, [peer, route, flood]: [&str; 3]) -> [String; 3] {
        let (key, address) = (key(n), key(n).link_local());
        [
            if peer == "set" {
                format!("wg set wg-welt peer {key} allowed-ips {address}/128")
            } else {
                format!("wg set wg-welt peer {key} remove")
            },
            format!("ip -6 route {route} {address}/128 dev wg-welt proto static"),
            format!("bridge fdb {flood} 00:00:00:00:00:00 dev vx-welt dst {address} via wg-welt self permanent"),
        ]
    }

    fn expected_flood(n: u32) -> String {
        let [_, _, flood] = all(n, ["set", "add", "append"]);
        flood
    }

    fn because(commands: &[String], reason: Reason) -> Vec<String> {
        commands.iter().map(|command| format!("{command}  # {}", reason.text())).collect()
    }

    #[test]
    fn tables_that_are_as_they_should_be_are_left_alone() {
        let now = now();
        let device = device(&[(1, Some(HOUR)), (2, None)], now);
        assert_eq!(previewed(&device, &[(1, 2 * HOUR), (2, HOUR / 60)], &[], now), Vec::<String>::new());
    }

    #[test]
    fn what_is_missing_is_set_in_the_reconcilers_order() {
        let now = now();
        let mut device = device(&[(1, Some(HOUR)), (2, Some(HOUR))], now);
        device.routes.remove(&host(key(1).link_local()));
        device.fdb.remove(&key(2).link_local());
        let [[_, route, _], [_, _, flood]] = [1, 2].map(|n| all(n, ["set", "add", "append"]));
        let expected = because(&[route, flood], Reason::Missing);
        assert_eq!(previewed(&device, &[(1, 2 * HOUR), (2, 2 * HOUR)], &[], now), expected);
        let mut without_peer = device.clone();
        without_peer.peers.remove(&key(1));
        let [peer, _, _] = all(1, ["set", "add", "append"]);
        let again = because(&[peer, all(1, ["set", "add", "append"])[1].clone(), expected_flood(2)], Reason::Missing);
        assert_eq!(
            previewed(&without_peer, &[(1, 2 * HOUR), (2, 2 * HOUR)], &[], now),
            again,
            "what it has left is no orphan"
        );
        let whole = because(&all(3, ["set", "add", "append"]), Reason::Missing);
        assert_eq!(
            previewed(&device, &[(1, 2 * HOUR), (2, 2 * HOUR), (3, HOUR)], &[], now),
            [whole, expected].concat()
        );
    }

    #[test]
    fn what_goes_is_shown_with_its_reason() {
        let now = now();
        let removal = |n| {
            let [peer, route, flood] = all(n, ["remove", "del", "del"]);
            [route, flood, peer]
        };
        let stale = device(&[(1, Some(4 * HOUR)), (2, Some(HOUR)), (3, None), (4, None)], now);
        // The third key arrived a minute ago.
        let remembered = [(1, 5 * HOUR), (2, 5 * HOUR), (3, HOUR / 60), (4, HOUR)];
        let swept = [removal(1), removal(4)].concat();
        assert_eq!(previewed(&stale, &remembered, &[], now), because(&swept, Reason::Stale));
        let denied = previewed(&stale, &remembered, &[2], now);
        assert_eq!(denied, [because(&removal(2), Reason::Denied), because(&swept, Reason::Stale)].concat());

        let mut orphans = device(&[], now);
        orphans.routes.insert(host(key(5).link_local()));
        let [_, route, _] = all(5, ["remove", "del", "del"]);
        assert_eq!(previewed(&orphans, &[], &[], now), because(&[route], Reason::Orphaned));
    }

    #[test]
    fn past_the_deadline_of_a_drain_a_portion_goes_and_nothing_is_restored() {
        let now = now();
        let device = device(&[(1, Some(HOUR)), (2, Some(2 * HOUR))], now);
        let deadline = Deadline { at: 0, percent: 50.try_into().unwrap(), is_over: true };
        let [peer, route, flood] = all(2, ["remove", "del", "del"]);
        let remembered = [(1, 3 * HOUR), (2, 3 * HOUR), (3, HOUR / 60)];
        let expected = because(&[route, flood, peer], Reason::Drained);
        assert_eq!(previewed_past(Some(deadline), &device, &remembered, &[], now), expected);
    }

    #[test]
    fn a_peer_keeps_what_others_gave_it() {
        let now = now();
        let mut device = device(&[(1, Some(HOUR))], now);
        device.peers.get_mut(&key(1)).unwrap().allowed_ips.push("10.0.0.0/8".parse().unwrap());
        let set = set_peer("wg-welt", device.peers.get(&key(1)), &PeerConfig::at(key(1), key(1).link_local()));
        assert_eq!(set, format!("wg set wg-welt peer {} allowed-ips 10.0.0.0/8,{}/128", key(1), key(1).link_local()));
    }
}
