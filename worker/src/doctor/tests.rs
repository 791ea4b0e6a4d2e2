use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use serde_json::json;
use wgkex_common::PublicKey;
use wgkex_common::config::Setup;
use wgkex_common::doctor::access::FileAccess;
use wgkex_common::doctor::bus::{MqttFacts, Rights};
use wgkex_common::doctor::clock::ClockFacts;
use wgkex_common::doctor::files::{FileFacts, ListFacts, Running, StateFacts};
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::doctor::{Level, report, worst};
use wgkex_common::mqtt::Fault;
use wgkex_common::mqtt::trial::{ConnectFailure, EchoOutcome};
use wgkex_common::peer_clock::Difference;
use wgkex_common::storage::process_lock::LockHolder;
use wgkex_common::style::Style;
use wgkex_kernel::links::{LinkKind, VxlanAttributes};

use super::facts::*;
use super::*;
use crate::leases::ServerStatus;
use crate::status::WorkerStatus;
use crate::testing::{domain, key};

type Spoil = fn(&mut Facts);

const LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 2, 2, 2, 2);
const GLOBAL: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// A gateway without problems, with its worker running.
fn well() -> Facts {
    let mut facts = stopped();
    facts.running = Some(running());
    facts.listener.owner = PortOwner::Process { pid: 7, name: "wgkex-worker".into() };
    facts.state.holder = Ok(Some(LockHolder { pid: Some(7), program: None }));
    bus(&mut facts).online = Some(true);
    bus(&mut facts).published_keys = [("ffmuc_welt".to_owned(), key(1))].into();
    facts
}

/// The same gateway, and its worker does not run.
fn stopped() -> Facts {
    let link = |index, kind, mtu| LinkFacts {
        index,
        kind,
        up: true,
        mtu,
        addresses: [LOCAL].into(),
        has_ipv4: false,
        rp_filter: 1,
        received: Received { packets: 1_000, own_ipv6: 1_000 },
    };
    let vxlan = VxlanAttributes { id: 99, port: 8472, local: Some(LOCAL.into()), under: Some(1) };
    let device = WireguardDevice { public_key: Some(key(1)), port: 51820 };
    let wireguard = WireguardFacts {
        link: link(1, LinkKind::Wireguard, 1420),
        is_userspace: false,
        is_socket_inaccessible: false,
        device: Ok(Some(device)),
    };
    Facts {
        config_warnings: Vec::new(),
        is_setup_named: true,
        listener: Listener { listen: "127.0.0.1:9586".into(), owner: PortOwner::Nobody, is_other_version: false },
        uplinks: [Uplink { name: "eth0".into(), mtu: 1500, has_ipv6: true }].into(),
        has_net_admin: true,
        wireguard: WireguardSource { kernel: true, userspace: false },
        domains: vec![DomainFacts {
            domain: domain(),
            setup: Setup { key_file: "/k".into(), listen_port: 51820, vxlan_id: 99, vxlan_port: 8472 },
            wireguard: Ok(Some(wireguard)),
            vxlan: Ok(Some(link(2, LinkKind::Vxlan(vxlan), 1350))),
            port_owner: PortOwner::Kernel,
        }],
        managers: Managers { networkd_keeps_foreign: true, ..Managers::default() },
        clock: ClockFacts { is_synchronised: Some(true), ..ClockFacts::default() },
        worker: "gw01".into(),
        running: None,
        servers: Vec::new(),
        state: StateFacts { dir: "/state".into(), user: "root".into(), access: FileAccess::Granted, holder: Ok(None) },
        lists: vec![ListFacts {
            key: "blacklist_file",
            path: "/list".into(),
            access: FileAccess::Granted,
            damage: None,
        }],
        needed: vec![FileFacts { key: "mqtt.ca_file", path: "/ca".into(), access: FileAccess::Granted }],
        mqtt: MqttFacts {
            server: "mqtt:1883".into(),
            outcome: Ok(BusFacts {
                rights: Rights { echo: EchoOutcome::Received, ..Rights::default() },
                online: Some(false),
                ..BusFacts::default()
            }),
        },
    }
}

fn running() -> RunningWorker {
    let process = Running { pid: 7, keeps_state: true, lists_damaged: Vec::new() };
    RunningWorker {
        name: "gw01".into(),
        process,
        mqtt_cause: None,
        is_name_in_use: false,
        keeps_lists: true,
        domains_down: BTreeMap::new(),
        clocks_off: BTreeMap::new(),
        servers: BTreeMap::new(),
    }
}

fn wg(facts: &mut Facts) -> &mut WireguardFacts {
    facts.domains[0].wireguard.as_mut().unwrap().as_mut().unwrap()
}

fn vx(facts: &mut Facts) -> &mut LinkFacts {
    facts.domains[0].vxlan.as_mut().unwrap().as_mut().unwrap()
}

fn attributes(facts: &mut Facts) -> &mut VxlanAttributes {
    let LinkKind::Vxlan(attributes) = &mut vx(facts).kind else { panic!("it is a VXLAN") };
    attributes
}

fn bus(facts: &mut Facts) -> &mut BusFacts {
    facts.mqtt.outcome.as_mut().unwrap()
}

fn process(name: &str) -> PortOwner {
    PortOwner::Process { pid: 7, name: name.into() }
}

fn no_mqtt(facts: &mut Facts, fault: Fault) {
    facts.mqtt.outcome = Err(ConnectFailure { fault, cause: "the cause".into() });
}

/// The findings that are not ok.
fn problems(facts: &Facts) -> Vec<Finding> {
    findings(facts).into_iter().filter(|finding| finding.level != Level::Ok).collect()
}

/// Each spoiled fact makes one more finding, at this level, with these words in its text and its advice.
fn each_is_found(begin: fn() -> Facts, table: &[(Level, Spoil, &str, &str)]) {
    let before = problems(&begin());
    for (level, spoil, found, advice) in table {
        let mut facts = begin();
        spoil(&mut facts);
        let problems: Vec<_> = problems(&facts).into_iter().filter(|problem| !before.contains(problem)).collect();
        assert_eq!(problems.len(), 1, "{found}: {problems:?}");
        let line = format!("{}: {}", problems[0].subject, problems[0].found);
        assert_eq!(problems[0].level, *level, "{line}");
        assert!(line.contains(found), "{found} is not in {line}");
        let said = problems[0].advice.as_deref().unwrap_or_default();
        assert!(said.contains(advice), "{advice} is not in {said}");
    }
}

#[test]
fn a_gateway_on_which_all_is_well_has_only_ok_lines_and_a_stopped_worker_is_a_finding() {
    let all = findings(&well());
    assert!(worst(&all) == Level::Ok && all.len() > 15, "{all:?}");
    let problems = problems(&stopped());
    assert!(problems.len() == 1 && problems[0].level == Level::Warn, "{problems:?}");
    assert!(problems[0].found.starts_with("no worker runs here"), "{problems:?}");
    assert!(problems[0].advice.as_ref().is_some_and(|advice| advice.contains("systemctl start wgkex-worker")));
}

/// The problems that `wgkex-worker status` prints.
#[test]
fn each_problem_of_the_running_workers_status_is_a_finding() {
    type SpoilStatus = fn(&mut WorkerStatus);
    let status = || -> WorkerStatus {
        serde_json::from_value(json!({
            "version": "1", "worker": "gw01", "pid": 7, "uptime_seconds": 9,
            "mqtt": { "connected": true, "cause": null },
            "domains": { "ffmuc_welt": {
                "wireguard": "wg-welt", "vxlan": "vx-welt", "up": true, "reason": null, "port": 51820,
                "peers": { "connected": 0, "idle": 0, "never_connected": 0, "stale": 0 },
            } },
            "keys": { "received": 0, "installed": 0, "refreshed": 0, "restored": 0, "failed": 0, "dropped": 0 },
            "batches": { "batches": 0, "keys": 0, "seconds": 0.0 },
            "queue": 0, "pending": 0, "oldest_pending_seconds": null, "state_kept": true, "lists_kept": true,
            "lists_damaged": [], "problems": [],
        }))
        .unwrap()
    };
    let table: [(SpoilStatus, Level, &str); 9] = [
        (|_| {}, Level::Ok, ""),
        (
            |status| (status.mqtt.connected, status.mqtt.cause) = (false, Some("refused".into())),
            Level::Fail,
            "MQTT: the running worker is not connected: refused",
        ),
        (|status| status.mqtt.name_in_use = true, Level::Fail, "MQTT: the server ends the connections of the running"),
        (
            |status| status.domains.values_mut().for_each(|domain| domain.up = false),
            Level::Warn,
            "ffmuc_welt: the running worker has not read its interfaces yet",
        ),
        (
            |status| {
                let domain = status.domains.get_mut("ffmuc_welt").unwrap();
                (domain.up, domain.reason) = (false, Some("denied".into()));
            },
            Level::Fail,
            "ffmuc_welt: the running worker cannot use it: denied",
        ),
        (|status| status.state_kept = false, Level::Warn, "state: the running worker cannot keep keys on the disk"),
        (|status| status.lists_kept = false, Level::Warn, "state: the running worker cannot keep list entries"),
        (
            |status| status.lists_damaged = vec!["blacklist_file".into()],
            Level::Fail,
            "blacklist_file: the running worker cannot read /list",
        ),
        (
            |status| status.clocks_off = [("b1".to_owned(), Difference::Ahead(61))].into(),
            Level::Warn,
            "clock: that of broker b1 is 61 s ahead",
        ),
    ];
    for (spoil, level, found) in table {
        let mut status = status();
        spoil(&mut status);
        assert_eq!(status.find_problems().is_empty(), level == Level::Ok, "{found}");
        let running = RunningWorker::from(status);
        let clock = ClockFacts { brokers: running.clocks_off.clone(), ..well().clock };
        let problems = problems(&Facts { running: Some(running), clock, ..well() });
        assert_eq!(problems.len(), usize::from(level != Level::Ok), "{found}: {problems:?}");
        for problem in problems {
            let line = format!("{}: {}", problem.subject, problem.found);
            assert!(problem.level == level && line.starts_with(found), "{found}: {problem:?}");
        }
    }
}

/// The timeout of the doctor's requests is five seconds.
#[test]
fn a_worker_that_does_not_answer_is_to_be_restarted_and_its_port_not_to_be_changed() {
    let hung = || {
        let mut facts = stopped();
        facts.listener.owner = process("wgkex-worker");
        facts.state.holder = Ok(Some(LockHolder { pid: Some(7), program: None }));
        facts
    };
    let problems: Vec<_> = problems(&hung()).into_iter().filter(|problem| problem.subject != "state").collect();
    assert!(problems.len() == 1 && problems[0].level == Level::Fail, "{problems:?}");
    assert_eq!(problems[0].found, "process 7 (wgkex-worker) has 127.0.0.1:9586, and does not answer there");
    let advice = problems[0].advice.as_deref().unwrap();
    assert!(advice.contains("log") && advice.contains("systemctl restart wgkex-worker"), "{advice}");
}

/// As after an upgrade without a restart.
#[test]
fn a_worker_of_another_version_is_to_be_restarted() {
    let mut facts = stopped();
    facts.listener.owner = process("wgkex-worker");
    facts.listener.is_other_version = true;
    facts.state.holder = Ok(Some(LockHolder { pid: Some(7), program: None }));
    let problems: Vec<_> = problems(&facts).into_iter().filter(|problem| problem.subject != "state").collect();
    assert!(problems.len() == 1 && problems[0].level == Level::Warn, "{problems:?}");
    let found = "process 7 (wgkex-worker) has 127.0.0.1:9586, and is of another version than this doctor";
    assert_eq!(problems[0].found, found);
}

#[test]
fn each_trouble_of_interfaces_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (Level::Fail, |facts| facts.domains[0].vxlan = Ok(None), "vx-welt: it is missing", "wgkex-worker setup"),
            (Level::Fail, |facts| wg(facts).link.up = false, "wg-welt: it is down", "ip link set wg-welt up"),
            (Level::Fail, |facts| vx(facts).up = false, "vx-welt: it is down", "ip link set vx-welt up"),
            (
                Level::Fail,
                |facts| wg(facts).device = Err("no".into()),
                "wg-welt: WireGuard does not answer: no",
                "as root",
            ),
            (
                Level::Fail,
                |facts| wg(facts).device = Ok(Some(WireguardDevice { public_key: None, port: 51820 })),
                "wg-welt: it has no private key",
                "setup",
            ),
            (
                Level::Fail,
                |facts| wg(facts).device = Ok(Some(WireguardDevice { public_key: Some(key(1)), port: 0 })),
                "wg-welt: it has no UDP port",
                "setup",
            ),
            (
                Level::Fail,
                |facts| {
                    wg(facts).device = Ok(Some(WireguardDevice { public_key: Some(key(1)), port: 0 }));
                    facts.domains[0].port_owner = process("openvpn");
                },
                "it has no UDP port: the configured 51820 is taken by process 7 (openvpn)",
                "wg set wg-welt listen-port 51820",
            ),
            (
                Level::Warn,
                |facts| wg(facts).device = Ok(Some(WireguardDevice { public_key: Some(key(1)), port: 40011 })),
                "its UDP port is 40011, and 51820 in the config",
                "routers get port 40011",
            ),
            (
                Level::Warn,
                |facts| {
                    wg(facts).link.addresses = [GLOBAL].into();
                    attributes(facts).local = Some(GLOBAL.into());
                },
                "wg-welt: its addresses are all global",
                "wgkex-worker setup",
            ),
            (
                Level::Fail,
                |facts| facts.domains[0].port_owner = process("openvpn"),
                "its UDP port 51820 is taken by process 7 (openvpn)",
                "end that",
            ),
            (
                Level::Fail,
                |facts| facts.domains[0].port_owner = PortOwner::Nobody,
                "nothing listens on its UDP port 51820",
                "wg set wg-welt listen-port 51820",
            ),
        ],
    );
}

#[test]
fn each_trouble_of_a_vxlan_and_of_kinds_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (
                Level::Fail,
                |facts| attributes(facts).id = 7,
                "vx-welt: its VXLAN id is 7, and 99 in the config",
                "setup.vxlan_id",
            ),
            (
                Level::Fail,
                |facts| attributes(facts).port = 1,
                "its VXLAN port is 1, and 8472 in the config",
                "setup.vxlan_port",
            ),
            (
                Level::Fail,
                |facts| attributes(facts).local = None,
                "vx-welt: it has no local address",
                "ip link del vx-welt",
            ),
            (
                Level::Fail,
                |facts| attributes(facts).local = Some(Ipv6Addr::LOCALHOST.into()),
                "its local address ::1 is not one of wg-welt",
                "ip link del vx-welt",
            ),
            (
                Level::Fail,
                |facts| attributes(facts).under = Some(9),
                "the device under it is not wg-welt",
                "ip link del",
            ),
            (
                Level::Fail,
                |facts| vx(facts).mtu = 1400,
                "vx-welt: its MTU 1400 is too large",
                "ip link set vx-welt mtu 1350",
            ),
            (
                Level::Fail,
                |facts| vx(facts).mtu = 1279,
                "vx-welt: its MTU 1279 is too small",
                "ip link set vx-welt mtu 1350",
            ),
            (Level::Fail, |facts| wg(facts).link.mtu = 1349, "the MTU 1349 of wg-welt is too small", "at least 1350"),
            (
                Level::Fail,
                |facts| wg(facts).link.kind = LinkKind::Other("dummy".into()),
                "wg-welt: it is of kind dummy, and not a WireGuard interface",
                "ip link del wg-welt",
            ),
            (
                Level::Fail,
                |facts| wg(facts).link.kind = LinkKind::Tun,
                "it is a TUN device without a WireGuard behind it",
                "ip link del wg-welt",
            ),
            (
                Level::Warn,
                |facts| (wg(facts).link.kind, wg(facts).is_socket_inaccessible) = (LinkKind::Tun, true),
                "it is a TUN device: only root sees whether it belongs to a userspace WireGuard",
                "run this as root",
            ),
            (
                Level::Fail,
                |facts| vx(facts).kind = LinkKind::Physical,
                "a device of no kind, and not a VXLAN",
                "ip link del",
            ),
            (
                Level::Warn,
                |facts| vx(facts).received.packets = 0,
                "vx-welt: it has never received anything, although 1000 packets came by wg-welt",
                "setup.vxlan_id",
            ),
            (
                Level::Warn,
                |facts| vx(facts).has_ipv4 = true,
                "vx-welt: it has an IPv4 address, and rp_filter is strict",
                "to 2",
            ),
        ],
    );
    let mut quiet = well();
    (vx(&mut quiet).received, wg(&mut quiet).link.received) =
        (Received::default(), Received { packets: 9, own_ipv6: 9 });
    assert_eq!(worst(&findings(&quiet)), Level::Ok);
    let mut loose = well();
    (vx(&mut loose).has_ipv4, vx(&mut loose).rp_filter) = (true, 2);
    assert_eq!(worst(&findings(&loose)), Level::Ok);
}

#[test]
fn a_domain_that_the_running_worker_cannot_use_is_named_unless_its_interfaces_have_the_cause() {
    let mut facts = well();
    let down = [("ffmuc_welt".to_owned(), Some("denied".to_owned()))].into();
    facts.running = Some(RunningWorker { domains_down: down, ..running() });
    let failures = |facts: &Facts| {
        let findings = findings(facts).into_iter().filter(|finding| finding.level == Level::Fail);
        findings.map(|finding| finding.found).collect::<Vec<_>>()
    };
    assert_eq!(failures(&facts), ["the running worker cannot use it: denied"]);
    facts.domains[0].vxlan = Ok(None);
    assert_eq!(failures(&facts), ["it is missing"]);
}

#[test]
fn a_missing_wireguard_interface_is_named_together_with_the_process_at_its_port() {
    let mut facts = well();
    facts.domains[0].wireguard = Ok(None);
    facts.domains[0].port_owner = PortOwner::Nobody;
    let missing = |facts: &Facts| {
        let findings = findings(facts);
        findings
            .iter()
            .filter(|finding| finding.level == Level::Fail)
            .map(|finding| finding.found.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(missing(&facts), ["it is missing"]);
    facts.domains[0].port_owner = process("openvpn");
    assert_eq!(missing(&facts)[1], "its configured UDP port 51820 is taken by process 7 (openvpn)");
}

#[test]
fn a_userspace_wireguard_is_as_good_as_the_kernels() {
    let mut facts = well();
    facts.wireguard = WireguardSource { kernel: false, userspace: true };
    (wg(&mut facts).link.kind, wg(&mut facts).is_userspace) = (LinkKind::Tun, true);
    facts.domains[0].port_owner = process("wireguard-go");
    assert_eq!(worst(&findings(&facts)), Level::Ok);
}

/// Interfaces that other programs made need no section `setup`: its defaults are not compared with them.
#[test]
fn defaults_of_setup_are_no_demands() {
    let mut facts = well();
    facts.is_setup_named = false;
    attributes(&mut facts).id = 7;
    wg(&mut facts).device = Ok(Some(WireguardDevice { public_key: Some(key(1)), port: 40011 }));
    assert_eq!(worst(&findings(&facts)), Level::Warn);
}

#[test]
fn each_trouble_of_the_machine_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (Level::Fail, |facts| facts.has_net_admin = false, "privileges: CAP_NET_ADMIN is missing", "as root"),
            (
                Level::Warn,
                |facts| facts.uplinks.extend([Uplink { name: "eth1".into(), mtu: 1400, has_ipv6: true }]),
                "eth1: its MTU 1400 is too small for the 1420 of a tunnel, of which WireGuard makes 1500",
                "wg-... to 1320",
            ),
            (
                Level::Warn,
                |facts| facts.uplinks.extend([Uplink { name: "eth1".into(), mtu: 1479, has_ipv6: false }]),
                "eth1: its MTU 1479 is too small for the 1420 of a tunnel, of which WireGuard makes 1480",
                "wg-... to 1419",
            ),
            (Level::Fail, |facts| facts.wireguard.kernel = false, "there is no wireguard-go", "apt-get install"),
            (
                Level::Warn,
                |facts| network_file(facts, false),
                "wg-welt: systemd-networkd manages it, too, by /etc/a.network",
                "ManageForeignRoutes=no and ManageForeignRoutingPolicyRules=no in [Network] of /etc/systemd/networkd.conf; or KeepC",
            ),
            (
                Level::Warn,
                |facts| (facts.managers.networkd_runs, facts.managers.networkd_keeps_foreign) = (true, false),
                "managers: systemd-networkd runs, and removes routes",
                "ManageForeignRoutes=no",
            ),
            (
                Level::Fail,
                |facts| {
                    facts.managers.wg_quick =
                        vec![WgQuick { interface: "wg-welt".into(), file: "/f".into(), is_enabled: true }];
                },
                "wg-welt: wg-quick manages it, too (/f)",
                "systemctl disable --now wg-quick@wg-welt",
            ),
            (
                Level::Warn,
                |facts| {
                    facts.managers.wg_quick =
                        vec![WgQuick { interface: "wg-welt".into(), file: "/f".into(), is_enabled: false }];
                },
                "there is a config of wg-quick for it (/f)",
                "move it away",
            ),
            (
                Level::Warn,
                |facts| {
                    facts.managers.network_manager_runs = true;
                    facts.managers.network_manager_manages = ["vx-welt".to_owned()].into();
                },
                "vx-welt: NetworkManager runs",
                "unmanaged-devices",
            ),
        ],
    );
}

fn network_file(facts: &mut Facts, keeps_configuration: bool) {
    facts.managers.networkd_keeps_foreign = false;
    let file = NetworkFile { path: "/etc/a.network".into(), keeps_configuration };
    facts.managers.networkd_files = [("wg-welt".to_owned(), file)].into();
}

#[test]
fn a_network_file_fails_while_networkd_runs_unless_that_keeps_routes_of_others() {
    let level = |spoil: Spoil| {
        let mut facts = well();
        network_file(&mut facts, false);
        facts.managers.networkd_runs = true;
        spoil(&mut facts);
        let findings = findings(&facts);
        findings.iter().find(|finding| finding.found.contains("/etc/a.network")).unwrap().level
    };
    assert_eq!(level(|_| {}), Level::Fail);
    assert_eq!(level(|facts| network_file(facts, true)), Level::Ok);
    assert_eq!(level(|facts| facts.managers.networkd_keeps_foreign = true), Level::Ok);
}

#[test]
fn an_uplink_without_ipv6_needs_less_room() {
    let mut facts = well();
    facts.uplinks = [Uplink { name: "eth1".into(), mtu: 1480, has_ipv6: false }].into();
    assert_eq!(worst(&findings(&facts)), Level::Ok);
}

#[test]
fn the_clock_is_compared_where_it_can_be() {
    let server = |seconds| Some(Ok(Duration::from_secs(seconds)));
    for (server, is_synchronised, level) in [
        (None, Some(true), Level::Ok),
        (None, Some(false), Level::Warn),
        (None, None, Level::Warn),
        (server(5), None, Level::Ok),
        (server(5), Some(true), Level::Ok),
        (server(5), Some(false), Level::Warn),
        (server(6), Some(true), Level::Warn),
        (server(3599), Some(true), Level::Warn),
        (server(3600), Some(true), Level::Fail),
        (Some(Err("refused".into())), Some(true), Level::Warn),
    ] {
        let facts = Facts { clock: ClockFacts { server, is_synchronised, ..ClockFacts::default() }, ..well() };
        assert_eq!(worst(&findings(&facts)), level, "{:?}", facts.clock);
    }
}

#[test]
fn a_broker_whose_clock_the_running_worker_finds_off_is_named() {
    for (difference, level, found) in [
        (Difference::Behind(3_599), Level::Warn, "that of broker b1 is 3599 s behind this machine's"),
        (Difference::Ahead(3_600), Level::Fail, "that of broker b1 is 3600 s ahead of this machine's"),
    ] {
        let brokers = [("b1".to_owned(), difference), ("b2".to_owned(), Difference::Ahead(61))].into();
        let facts = Facts { clock: ClockFacts { brokers, ..well().clock }, ..well() };
        let findings = findings(&facts);
        let clock = findings.iter().find(|finding| finding.subject == "clock").unwrap();
        assert!(clock.level == level && clock.found.starts_with(found), "{clock:?}");
        assert!(clock.advice.as_ref().unwrap().contains("timedatectl set-ntp true"), "{clock:?}");
    }
}

/// The user of the doctor may differ from that of the worker.
#[test]
fn what_the_running_worker_reads_and_writes_it_may() {
    let mut facts = well();
    facts.state.access = FileAccess::Denied("mode 700".into());
    facts.lists[0].access = FileAccess::Denied("mode 600".into());
    assert_eq!(worst(&findings(&facts)), Level::Ok);
}

#[test]
fn each_trouble_of_files_is_named_with_what_to_do() {
    each_is_found(
        stopped,
        &[
            (
                Level::Fail,
                |facts| facts.listener.owner = PortOwner::Process { pid: 9, name: "exporter".into() },
                "worker_listen: 127.0.0.1:9586 is taken by process 9 (exporter), which does not answer as a worker",
                "another port",
            ),
            (
                Level::Fail,
                |facts| facts.state.access = FileAccess::Denied("it is read-only".into()),
                "state: root cannot write to /state: it is read-only",
                "install -d -m 700 -o root /state",
            ),
            (
                Level::Warn,
                |facts| facts.state.access = FileAccess::OnlyFor("wgkex".into()),
                "/state is writable for wgkex and not for root",
                "start the worker as wgkex",
            ),
            (
                Level::Warn,
                |facts| {
                    facts.state.holder = Ok(Some(LockHolder { pid: Some(8), program: Some("wgkex-worker".into()) }));
                },
                "process 8 (wgkex-worker) has the state file, and no worker answers",
                "log",
            ),
            (
                Level::Fail,
                |facts| {
                    *facts = well();
                    facts.state.holder = Ok(Some(LockHolder { pid: Some(8), program: None }));
                },
                "two workers on one machine",
                "end one",
            ),
            (Level::Warn, |facts| facts.state.holder = Err("denied".into()), "cannot be determined: denied", "as root"),
            (
                Level::Fail,
                |facts| facts.lists[0].access = FileAccess::Creatable,
                "blacklist_file: /list is missing",
                "write it",
            ),
            (
                Level::Warn,
                |facts| facts.lists[0].access = FileAccess::OnlyFor("wgkex".into()),
                "/list is readable for wgkex and not for root",
                "start the worker as wgkex",
            ),
            (
                Level::Fail,
                |facts| facts.lists[0].access = FileAccess::Denied("mode 600".into()),
                "root cannot read /list: mode 600",
                "chmod",
            ),
            (
                Level::Fail,
                |facts| facts.needed[0].access = FileAccess::Denied("mode 600".into()),
                "mqtt.ca_file: root cannot read /ca: mode 600",
                "chmod",
            ),
            (
                Level::Fail,
                |facts| {
                    *facts = well();
                    let mut running = running();
                    running.process.lists_damaged = vec!["blacklist_file".into()];
                    facts.running = Some(running);
                },
                "the running worker cannot read /list, or it is damaged",
                "log",
            ),
        ],
    );
}

#[test]
fn each_trouble_of_mqtt_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (Level::Fail, |facts| no_mqtt(facts, Fault::Password), "MQTT: mqtt:1883: the cause", "mqtt.password"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::ClientId), "the cause", "host name"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::Tls), "the cause", "mqtt.ca_file"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::NoTls), "the cause", "mqtt.tls to true"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::Busy), "the cause", "mqtt.password"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::Server), "the cause", "start the MQTT server"),
            (
                Level::Fail,
                |facts| bus(facts).rights.refused = vec!["wireguard/x/+".into()],
                "subscribe to wireguard/x/+",
                "mqtt-acl",
            ),
            (
                Level::Warn,
                |facts| bus(facts).rights.refused_optional = vec!["a/b".into()],
                "subscribe to a/b",
                "mqtt-acl",
            ),
            (Level::Warn, |facts| bus(facts).rights.echo = EchoOutcome::Lost, "does not come back", "mqtt-acl"),
            (Level::Warn, |facts| bus(facts).rights.echo = EchoOutcome::Closed, "ends the connection", "mqtt-acl"),
            (
                Level::Fail,
                |facts| bus(facts).published_keys = [("ffmuc_welt".to_owned(), key(2))].into(),
                "publishes as gw01 in ffmuc_welt",
                "host name",
            ),
            (
                Level::Warn,
                |facts| bus(facts).online = Some(false),
                "nothing is retained that shows worker gw01 online",
                "again",
            ),
        ],
    );
}

#[test]
fn a_worker_of_this_name_that_is_online_elsewhere_is_named() {
    each_is_found(
        stopped,
        &[(
            Level::Fail,
            |facts| bus(facts).online = Some(true),
            "a worker gw01 is online, and none runs here",
            "host name",
        )],
    );
}

#[test]
fn the_report_has_a_line_for_each_and_no_key() {
    let mut facts = well();
    attributes(&mut facts).id = 7;
    let findings = findings(&facts);
    let text = report(&findings, Style::Plain);
    assert!(text.contains("\nfail vx-welt: its VXLAN id is 7, and 99 in the config; make it anew"), "{text}");
    assert!(text.contains("\nok   config: it is valid\n") || text.starts_with("ok   config: it is valid\n"), "{text}");
    assert!(text.ends_with(&format!("checks: {}, warnings: 0, failures: 1\n", findings.len())), "{text}");
    let own: PublicKey = key(1);
    assert!(!text.contains(&own.to_string()));
}

#[test]
fn servers_are_compared_with_the_config_and_the_running_worker() {
    let found = |spoil: fn(&mut WireguardFacts) -> bool, running: Option<&RunningWorker>| {
        let mut facts = well();
        let mut wireguard = wg(&mut facts).clone();
        let wireguard = spoil(&mut wireguard).then_some(wireguard);
        let server =
            ServerFacts { name: "s1".into(), interface: "wg-s1".into(), listen_port: 51820, wireguard: Ok(wireguard) };
        let Finding { level, subject, found, .. } = machine::server(&server, running);
        assert_eq!(subject, "server s1");
        (level, found)
    };
    let there = |_: &mut WireguardFacts| true;
    assert_eq!(found(there, None), (Level::Ok, "wg-s1 is up, on UDP port 51820".into()));
    assert_eq!(found(|_| false, None), (Level::Fail, "wg-s1: it is missing".into()));
    let down = |wireguard: &mut WireguardFacts| {
        wireguard.link.up = false;
        true
    };
    assert_eq!(found(down, None), (Level::Fail, "wg-s1: it is down".into()));
    let moved = |wireguard: &mut WireguardFacts| {
        wireguard.device = Ok(Some(WireguardDevice { public_key: None, port: 4444 }));
        true
    };
    let expected = "wg-s1: it listens on UDP port 4444, and 51820 is in the config";
    assert_eq!(found(moved, None), (Level::Fail, expected.into()));
    let mut worker = running();
    let (level, text) = found(there, Some(&worker));
    assert!(level == Level::Warn && text.starts_with("the running worker does not know it"), "{text}");
    let status = ServerStatus { interface: "wg-s1".into(), up: true, reason: None, leases: 7 };
    worker.servers.insert("s1".into(), status.clone());
    assert_eq!(found(there, Some(&worker)), (Level::Ok, "wg-s1 has the peers of all 7 leases".into()));
    worker.servers.insert("s1".into(), ServerStatus { up: false, reason: Some("it is odd".into()), ..status });
    assert_eq!(found(there, Some(&worker)), (Level::Fail, "wg-s1: it is odd".into()));
}
