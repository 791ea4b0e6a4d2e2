//! A gateway that is a server of the registry: its interface gets the peers of its clients, and is not changed
//! otherwise.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::http::Http;
use wgkex_tests::process::{Process, binary};
use wgkex_tests::{key, wait_until, wait_within};

use crate::read_only_commands::worker;

/// The time in which a change reaches the interface.
const SOON: Duration = Duration::from_secs(2);
/// `admin:s3cret`.
const LOGIN: &str = "Authorization: Basic YWRtaW46czNjcmV0";

/// A gateway whose broker has a registry, with the server `s1`; starts both programs.
fn started(host: &Host, more: &str) -> (Process, Process) {
    fs::write(host.path("/run/registry.password"), "s3cret\n").unwrap();
    configure(host, more);
    host.setup();
    let programs = (host.start_broker(), host.start_worker());
    wait_until("the server is in the registry", || {
        (call(host, "server/exists", &json!({ "server_name": "s1" })) == Some(200)).then_some(())
    });
    programs
}

fn configure(host: &Host, more: &str) {
    host.configure(&format!(
        "registry: {{enabled: true, password_file: /run/registry.password}}\n\
         servers: {{s1: {{network: 10.77.0.0/24, reserved: 20, listen_port: 52820{more}}}}}\n"
    ));
}

/// The status of a call of the registry.
fn call(host: &Host, route: &str, fields: &serde_json::Value) -> Option<u16> {
    let body = fields.to_string();
    host.inside(|| {
        let mut http = Http::try_connect("127.0.0.1:5000".parse().unwrap()).ok()?;
        Some(http.request("POST", &format!("/api/v1/{route}"), &[LOGIN], body.as_bytes()).status)
    })
}

/// The answer of a call that lists entries.
fn listed(host: &Host, route: &str) -> serde_json::Value {
    host.inside(|| {
        let mut http = Http::try_connect("127.0.0.1:5000".parse().unwrap()).unwrap();
        http.request("GET", &format!("/api/v1/{route}"), &[LOGIN], b"").json()
    })
}

fn add(host: &Host, name: &str, number: u32) {
    let fields = json!({ "client_name": name, "server_name": "s1", "public_key": key(number) });
    assert_eq!(call(host, "client/add", &fields), Some(201), "{name}");
}

fn delete(host: &Host, name: &str) {
    assert_eq!(call(host, "client/delete", &json!({ "client_name": name })), Some(200), "{name}");
}

/// Keys and allowed-ips of the server's peers.
fn peers(host: &Host) -> BTreeSet<String> {
    host.run("wg show s1 allowed-ips").lines().map(str::to_owned).collect()
}

fn peer(number: u32, last: u8) -> String {
    format!("{}\t10.77.0.{last}/32", key(number))
}

fn wait_for_peers(host: &Host, limit: Duration, expected: &[String]) {
    let expected: BTreeSet<_> = expected.iter().cloned().collect();
    wait_within(limit, "the server has the peers of its leases", || (peers(host) == expected).then_some(()));
}

/// The output of `wg` for a server's peer: its settings with its last handshake, and the bytes received and sent.
fn dumped(host: &Host, key: &str) -> (Vec<String>, [u64; 2]) {
    let line = host.wireguard("s1").into_iter().find(|line| line.starts_with(key)).expect("a peer");
    let mut fields: Vec<_> = line.split('\t').map(str::to_owned).collect();
    let counters = fields.splice(5..7, []).map(|counter| counter.parse().unwrap()).collect::<Vec<_>>();
    (fields, counters.try_into().unwrap())
}

pub fn wa24_a_client_is_a_peer_within_two_seconds_and_another_ones_handshake_and_counters_stay(lane: Lane) {
    let (gateway, client) = (Host::new("gw1", lane), Host::new("c1", lane));
    let (address, _) = gateway.connect(&client, 1);
    let _programs = started(&gateway, &format!(", endpoint: {address}"));
    assert!(gateway.run("ip -4 addr show dev s1").contains("10.77.0.1/24"));
    let connected = connect_client(&gateway, &client, lane, "c1");
    let (settings, counters) = dumped(&gateway, &connected);
    assert!(settings[4] != "0" && counters.iter().all(|counter| *counter > 0), "{settings:?} {counters:?}");
    let own = format!("{connected}\t10.77.0.21/32");
    for n in 2..5 {
        add(&gateway, "c2", n);
        wait_for_peers(&gateway, SOON, &[own.clone(), peer(n, 22)]);
        delete(&gateway, "c2");
        wait_for_peers(&gateway, SOON, std::slice::from_ref(&own));
    }
    let (settings_after, counters_after) = dumped(&gateway, &connected);
    assert_eq!(settings_after, settings);
    assert!(counters_after >= counters && counters_after[1] >= counters[1], "{counters:?}, then {counters_after:?}");
}

pub fn wa25_a_gateway_keeps_the_clients_of_its_server_through_outages_and_is_right_after_them(lane: Lane) {
    let host = Host::new("gw1", lane);
    let (mut broker, mut worker) = started(&host, "");
    let stranger = key(900);
    host.run(&format!("wg set s1 peer {stranger} allowed-ips 10.99.0.0/16 persistent-keepalive 7"));
    let foreign = format!("{stranger}\t10.99.0.0/16");
    for n in 1..5 {
        add(&host, &format!("c{n}"), n);
    }
    let all = [foreign.clone(), peer(1, 21), peer(2, 22), peer(3, 23), peer(4, 24)];
    wait_for_peers(&host, 2 * SOON, &all);

    // The worker continues without a broker, and without MQTT, whose server is the broker's. Clients deleted before it
    // has reconnected to MQTT are removed, too.
    let _ = broker.end_by(Signal::SIGKILL);
    thread::sleep(SOON);
    assert_eq!(peers(&host), all.iter().cloned().collect());
    let mut broker = host.start_broker();
    wait_until("the broker answers", || call(&host, "server/exists", &json!({ "server_name": "s1" })));
    delete(&host, "c2");
    let rest = [foreign.clone(), peer(1, 21), peer(3, 23), peer(4, 24)];
    wait_for_peers(&host, Duration::from_secs(10), &rest);
    add(&host, "c1", 11);
    let all = [foreign.clone(), peer(11, 21), peer(3, 23), peer(4, 24)];
    wait_for_peers(&host, 2 * SOON, &all);

    // A worker that starts without a broker restores its peers.
    let _ = broker.end_by(Signal::SIGKILL);
    let _ = worker.end_by(Signal::SIGKILL);
    host.run(&format!("wg set s1 peer {} remove", key(4)));
    let mut worker = host.start_worker();
    wait_for_peers(&host, Duration::from_secs(10), &all);
    let _ = worker.end_by(Signal::SIGKILL);

    // Clients deleted while the worker is down are removed when it starts, and peers that it has not made stay.
    let _broker = host.start_broker();
    wait_until("the broker answers", || call(&host, "server/exists", &json!({ "server_name": "s1" })));
    delete(&host, "c3");
    add(&host, "c5", 5);
    host.run(&format!("wg set s1 peer {} remove", key(11)));
    let _worker = host.start_worker();
    wait_for_peers(&host, Duration::from_secs(10), &[foreign.clone(), peer(11, 21), peer(5, 22), peer(4, 24)]);
    host.run(&format!("wg set s1 peer {stranger} allowed-ips 10.99.0.0/16,10.77.0.25/32"));
    assert_eq!(call(&host, "server/delete", &json!({ "server_name": "s1" })), Some(200));
    wait_within(2 * SOON, "the server has no peers but the stranger's", || {
        let peers = peers(&host);
        let is_alone = peers.len() == 1 && peers.first()?.starts_with(&stranger);
        is_alone
            .then(|| assert!(["10.99.0.0/16", "10.77.0.25/32"].iter().all(|net| peers.first().unwrap().contains(net))))
    });
}

pub fn status_doctor_and_dry_run_show_the_servers(lane: Lane) {
    let host = Host::new("gw1", lane);
    let (_broker, mut process) = started(&host, "");
    (1..4).for_each(|n| add(&host, &format!("c{n}"), n));
    wait_for_peers(&host, 2 * SOON, &[peer(1, 21), peer(2, 22), peer(3, 23)]);
    wait_until("the status has it", || {
        worker(&host, "status").1.contains("server s1 up: s1; leases 3\n").then_some(())
    });
    assert!(worker(&host, "doctor").1.contains("ok   server s1: s1 has the peers of all 3 leases"));
    assert!(worker(&host, "dry-run").1.contains("# server s1: nothing would change\n"));
    let _ = process.end_by(Signal::SIGKILL);
    host.run(&format!("wg set s1 peer {} remove", key(2)));
    let file = host.path("/run/wgkex/state/worker.leases.json");
    let before = fs::read(&file).unwrap();
    let (code, script) = worker(&host, "dry-run");
    let expected =
        format!("# server s1: 1 changes\nwg set s1 peer {} allowed-ips 10.77.0.22/32  # is missing\n", key(2));
    assert!(code == 0 && script.contains(&expected), "{script}");
    assert_eq!((peers(&host).len(), fs::read(&file).unwrap()), (2, before));

    host.run("ip link del s1");
    let _process = host.start_worker();
    let (_, shown) = wait_until("the status has what is wrong", || {
        let status = worker(&host, "status");
        status.1.contains("server s1 down: s1").then_some(status)
    });
    assert!(shown.contains("wrong: server s1: "), "{shown}");
    let (code, doctor) = worker(&host, "doctor");
    assert!(code == 3 && doctor.contains("fail server s1: s1: ") && doctor.contains("wgkex-worker setup"), "{doctor}");
}

pub fn a_client_reaches_the_server_by_the_config_that_the_command_prints(lane: Lane) {
    let (gateway, client) = (Host::new("gw1", lane), Host::new("c1", lane));
    let (address, _) = gateway.connect(&client, 1);
    let _programs = started(&gateway, &format!(", endpoint: {address}"));
    connect_client(&gateway, &client, lane, "c1");
}

/// Leases the first address for a client by the gateway's commands, and brings its tunnel up. Returns the client's key.
fn connect_client(gateway: &Host, client: &Host, lane: Lane, name: &str) -> String {
    client.run("umask 077 && wg genkey > /run/private");
    let public = client.run("wg pubkey < /run/private");
    let broker = binary("wgkex-broker").display().to_string();
    let added = gateway.run(&format!("{broker} client add {name} --server s1 --key '{public}'"));
    assert_eq!(added, format!("client {name} has the address 10.77.0.21 at s1"));
    let private = fs::read_to_string(client.path("/run/private")).unwrap();
    fs::write(gateway.path("/run/private"), private).unwrap();
    let config =
        gateway.run(&format!("{broker} client show {name} --server s1 --wg-quick --private-key-file /run/private"));
    fs::write(client.path(&format!("/run/{name}.conf")), config + "\n").unwrap();
    wg_quick_up(client, lane, &format!("/run/{name}.conf"));
    public
}

/// Starts the tunnel of a config file, and checks that it reaches the server.
fn wg_quick_up(client: &Host, lane: Lane, file: &str) {
    let userspace = if lane == Lane::Userspace { "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go " } else { "" };
    client.run(&format!(
        "mount --make-rprivate / && {userspace}wg-quick up {file} >/run/up 2>&1 || {{ cat /run/up; exit 1; }}"
    ));
    wait_until("the client reaches the server", || {
        client.try_run("ping -c 1 -W 1 10.77.0.1").status.success().then_some(())
    });
}

pub fn wa26_a_node_leases_its_address_and_its_file_follows_the_registry(lane: Lane) {
    let (gateway, client) = (Host::new("gw1", lane), Host::new("c1", lane));
    let (address, _) = gateway.connect(&client, 1);
    let (_broker, mut worker) = started(&gateway, &format!(", endpoint: {address}"));
    fs::write(client.path("/run/password"), "s3cret\n").unwrap();
    let command = |servers: &str| {
        format!(
            "{} lease --registry http://{address}:5000 --password-file /run/password --key-dir /run/keys --config-dir \
             /run/tunnels {servers}",
            binary("wgkex-node").display()
        )
    };
    assert_eq!(client.run(&command("s1")), "s1: /run/tunnels/s1.conf written");
    let files = "/run/keys/s1.key /run/tunnels/s1.conf";
    assert_eq!(client.run(&format!("stat -c %a {files}")), "600\n600");
    wg_quick_up(&client, lane, "/run/tunnels/s1.conf");
    // A second run changes nothing, here or there, and the client keeps its id in the registry.
    let state = || {
        let here = (client.run(&format!("stat -c '%i %y' {files}")), client.run("wg show s1 latest-handshakes"));
        (here, peers(&gateway), listed(&gateway, "client/list_all"))
    };
    let before = state();
    assert_eq!(client.run(&command("s1")), "s1: /run/tunnels/s1.conf unchanged");
    assert_eq!(state(), before);
    // A server that fails is named, and the others are set up; a file that the command did not write stays.
    fs::write(client.path("/run/tunnels/s2.conf"), "[Interface]\n").unwrap();
    let output = client.try_run(&command("s2 s9 s1"));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), b"s1: /run/tunnels/s1.conf unchanged\n".as_slice()));
    assert!(said.contains("error: s2: /run/tunnels/s2.conf was not written by wgkex-node"), "{said}");
    assert!(said.contains("error: s9: ") && said.contains("404: ") && !said.contains("s3cret"), "{said}");
    // A new endpoint and a new key of the server at the registry are written to the file.
    assert!(worker.end_by(Signal::SIGTERM).success());
    configure(&gateway, ", endpoint: gw.example");
    let known = gateway.run("wg show s1 public-key");
    gateway.run("umask 077 && wg genkey > /run/other && wg set s1 private-key /run/other");
    let other = gateway.run("wg show s1 public-key");
    assert!(other != known && client.run("cat /run/tunnels/s1.conf").contains(&known));
    let _worker = gateway.start_worker();
    wait_until("the registry has the endpoint", || {
        (client.run(&command("s1")) == "s1: /run/tunnels/s1.conf changed").then_some(())
    });
    let file = client.run("cat /run/tunnels/s1.conf");
    assert!(
        file.ends_with("Endpoint = gw.example:52820") && file.contains(&format!("PublicKey = {other}\n")),
        "{file}"
    );
    client.run("wg-quick strip /run/tunnels/s1.conf");
    // So is another key of the client.
    client.run("rm /run/keys/s1.key");
    assert_eq!(client.run(&command("s1")), "s1: /run/tunnels/s1.conf changed");
    let public = client.run("wg pubkey < /run/keys/s1.key");
    wait_for_peers(&gateway, 2 * SOON, &[format!("{public}\t10.77.0.21/32")]);
}

pub fn a_server_that_the_registry_does_not_take_is_named(lane: Lane) {
    let host = Host::new("gw1", lane);
    fs::write(host.path("/run/registry.password"), "s3cret\n").unwrap();
    host.configure("registry: {enabled: true, password_file: /run/registry.password}\n");
    host.setup();
    let mut broker = host.start_broker();
    wait_until("the broker is ready", || (host.get(5000, "/readyz")?.status == 200).then_some(()));
    let fields = json!({
        "server_name": "s1", "network_address": "10.78.0.0", "network_mask": 24, "public_key": key(1),
        "endpoint_address": "gw9.example", "endpoint_port": 1, "n_reserved_ips": 0, "allowed_ips": "10.78.0.0/24",
    });
    assert_eq!(call(&host, "server/add", &fields), Some(201));
    assert!(broker.end_by(Signal::SIGTERM).success());
    configure(&host, "");
    host.setup();
    let (_broker, _worker) = (host.start_broker(), host.start_worker());
    let problem = "server s1 of worker gw1 is not taken into the registry: there is a server of this name already";
    wait_until("the page has it", || host.get(5000, "/")?.body.contains(problem).then_some(()));
    let doctor = host.try_run(&format!("{} --config /run/wgkex.yaml doctor", binary("wgkex-broker").display()));
    let said = String::from_utf8(doctor.stdout).unwrap();
    assert!(said.contains(&format!("warn registry: {problem}")) && said.contains("server delete NAME"), "{said}");
    // The problem ends when the other server is deleted.
    assert_eq!(call(&host, "server/delete", &json!({ "server_name": "s1" })), Some(200));
    host.run("ip link set s1 down && ip link set s1 up");
    wait_within(Duration::from_secs(120), "the registry takes it", || {
        (!host.get(5000, "/")?.body.contains("is not taken")).then_some(())
    });
}
