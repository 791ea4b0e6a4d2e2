//! Gateways that are servers receive changes made at a broker, also after a loss of its database or of their state.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::postgres::{self, Postgres};
use wgkex_tests::probe::{Probe, Role, message};
use wgkex_tests::{key, wait_until, wait_within};

use crate::registry_broker::{CHANGES, LOGIN, READS, RegistryBroker, Store, client, server, with_each_store};

/// The server of the gateway.
const SERVER: &str = "{network: 10.77.0.0/24, reserved: 20, listen_port: 52820}";
/// The time in which a gateway receives a change.
const SOON: Duration = Duration::from_secs(2);
/// More clients than the broker's session and its queue have room for messages.
const MANY: u32 = 2000;
/// The database file and SQLite's log beside it.
const FILES: [&str; 2] = ["registry.sqlite", "registry.sqlite-wal"];

fn wait_for_server(registry: &RegistryBroker, name: &str) {
    wait_until("the server is in the registry", || {
        (registry.post("server/exists", &json!({ "server_name": name })).status == 200).then_some(())
    });
}

fn wait_for_peers(gateway: &InMemory, numbers: impl IntoIterator<Item = u32>) {
    let expected: BTreeSet<_> = numbers.into_iter().map(key).collect();
    wait_until("the gateway has the peers of its leases", || (gateway.peers("s1") == expected).then_some(()));
}

fn add(registry: &RegistryBroker, server: &str, numbers: impl IntoIterator<Item = u32>) {
    for n in numbers {
        assert_eq!(registry.add_client(&format!("{server}-{n}"), server, n), 201, "{n}");
    }
}

fn delete(registry: &RegistryBroker, server: &str, n: u32) {
    delete_client(registry, &format!("{server}-{n}"));
}

fn delete_client(registry: &RegistryBroker, name: &str) {
    assert_eq!(registry.post("client/delete/", &json!({ "client_name": name })).status, 200);
}

/// Replaces the database files by those of another directory.
fn copy(from: &Path, to: &Path) {
    for file in FILES {
        let _ = fs::remove_file(to.join(file));
        if from.join(file).exists() {
            fs::copy(from.join(file), to.join(file)).unwrap();
        }
    }
}

/// The `ETag` of a server's clients.
fn tag(registry: &RegistryBroker, server: &str) -> String {
    let path = format!("/api/v1/server/config?server_name={server}");
    registry.stack.connect().request("HEAD", &path, &[LOGIN], b"").header("etag").unwrap().to_owned()
}

/// Runs `change` while the broker is stopped.
fn while_stopped(registry: &mut RegistryBroker, change: impl FnOnce()) {
    assert!(registry.stack.stop_broker().success());
    change();
    registry.stack.start_broker();
    registry.stack.wait_until_ready();
}

/// Regression: revisions counted changes, so that changes after the restore had the numbers of lost ones, and the
/// gateway ignored them as old.
#[test]
fn a_restored_copy_of_the_database_reaches_gateways_and_no_version_comes_twice() {
    let mut registry = RegistryBroker::start(&Store::Sqlite, "");
    let (state, backup) = (registry.stack.state_dir(), registry.stack.dir().join("backup"));
    fs::create_dir(&backup).unwrap();
    let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
    wait_for_server(&registry, "s1");
    registry.add_server("s2", "192.168.2.0", 24, 20);
    add(&registry, "s1", 1..4);
    wait_for_peers(&gateway, 1..4);
    while_stopped(&mut registry, || copy(&state, &backup));

    add(&registry, "s1", 4..9);
    delete(&registry, "s1", 1);
    wait_for_peers(&gateway, 2..9);
    let lost: BTreeSet<_> = (101..106)
        .map(|n| {
            add(&registry, "s2", [n]);
            tag(&registry, "s2")
        })
        .collect();
    while_stopped(&mut registry, || copy(&backup, &state));
    wait_for_peers(&gateway, 1..4);
    for n in 111..116 {
        add(&registry, "s2", [n]);
        assert!(!lost.contains(&tag(&registry, "s2")), "an agent would keep the lost clients");
    }
    add(&registry, "s1", 11..14);
    wait_for_peers(&gateway, (1..4).chain(11..14));
    delete(&registry, "s1", 2);
    wait_for_peers(&gateway, [1, 3, 11, 12, 13]);

    // The gateway is down meanwhile, and there are as many changes as were lost.
    drop(gateway);
    while_stopped(&mut registry, || copy(&backup, &state));
    add(&registry, "s1", 21..25);
    let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
    wait_for_peers(&gateway, (1..4).chain(21..25));
}

/// Checks that all calls are refused, and that log, page, hello and doctor report it.
fn assert_emptied(registry: &mut RegistryBroker) {
    let fields = with_client(server("s1", "10.77.0.0", 24, 20));
    for route in READS.iter().chain(&CHANGES) {
        assert_eq!(registry.post(route, &fields).status, 503, "{route}");
    }
    let line = registry.stack.broker().wait_for_log("the database is empty");
    assert!(
        line.contains("ERROR") && line.contains("state/broker.registry.json while this broker is stopped"),
        "{line}"
    );
    let problem = "has no tables, but had servers before: its calls are refused";
    assert!(registry.stack.get("/").body.contains(problem));
    let witness = registry.stack.probe(Role::new("witness", &["wgkex/broker/+/hello"]));
    witness.next("a hello that offers no leases", |message| {
        !message.payload.is_empty() && !message.text().contains("\"leases\"")
    });
    let doctor = registry.stack.program("wgkex-broker", &["doctor"]);
    let line = doctor.wait_for_log(problem);
    assert!(line.contains("fail registry: ") && line.contains("broker.registry.json"), "{line}");
}

/// Fields that suit every route.
fn with_client(mut fields: Value) -> Value {
    fields["client_name"] = json!("c1");
    fields
}

/// Regression: the tables were created anew, and the gateway lost all peers within a second.
#[test]
fn gateways_keep_their_peers_where_the_tables_are_gone_until_an_operator_confirms_that() {
    let mut registry = RegistryBroker::start(&Store::Sqlite, "");
    let (state, backup) = (registry.stack.state_dir(), registry.stack.dir().join("backup"));
    let remove = |dir: &Path| FILES.map(|file| drop(fs::remove_file(dir.join(file))));
    fs::create_dir(&backup).unwrap();
    let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
    wait_for_server(&registry, "s1");
    add(&registry, "s1", 1..4);
    wait_for_peers(&gateway, 1..4);
    while_stopped(&mut registry, || copy(&state, &backup));
    for is_there in [false, true] {
        while_stopped(&mut registry, || {
            remove(&state);
            if is_there {
                fs::write(state.join(FILES[0]), "").unwrap();
            }
        });
        assert_emptied(&mut registry);
        // The gateway requests its leases within a second, and announces its servers again.
        thread::sleep(2 * SOON);
        assert_eq!(gateway.peers("s1"), (1..4).map(key).collect());
    }
    while_stopped(&mut registry, || copy(&backup, &state));
    wait_for_server(&registry, "s1");
    add(&registry, "s1", [4]);
    wait_for_peers(&gateway, 1..5);

    while_stopped(&mut registry, || {
        remove(&state);
        fs::remove_file(state.join("broker.registry.json")).unwrap();
    });
    wait_for_server(&registry, "s1");
    wait_for_peers(&gateway, []);
}

#[test]
fn an_empty_postgresql_database_is_not_taken_for_the_one_that_had_servers() {
    let [first, other] = [postgres::database(), postgres::database()];
    let mut registry = RegistryBroker::start(&Store::Postgres(first.clone()), "");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    registry.leased("c1", "s1", 1);
    let before = registry.everything();
    for (database, is_empty) in [(&other, true), (&first, false)] {
        let config = registry.stack.plan.config.replace(&first.url, &database.url).replace(&other.url, &database.url);
        registry.stack.plan.config = config;
        registry.stack.write_config();
        while_stopped(&mut registry, || {});
        if is_empty {
            assert_emptied(&mut registry);
        }
    }
    assert_eq!(registry.everything(), before);
}

/// Each call is answered by one of two brokers, which share only the database and the bus.
#[test]
#[ignore = "needs root: tests/run netns"]
fn two_brokers_on_one_postgresql_and_one_bus_are_one_registry_and_each_pushes() {
    let store = Store::Postgres(postgres::database());
    let first = RegistryBroker::on_bus(&store, "b1", None);
    let second = RegistryBroker::on_bus(&store, "b2", Some(&first));
    let registries = [&first, &second];
    let gateway = InMemory::start_server(&first.stack, "gw1", "s1", SERVER);
    wait_for_server(&second, "s1");
    wait_until("the gateway has all leases of its server", || {
        let kept = fs::read_to_string(first.stack.dir().join("gw1/worker.leases.json")).ok()?;
        kept.contains("\"revision\"").then_some(())
    });

    // Equal calls at both have one result.
    let mut added =
        at_once(&registries, |registry| registry.post("server/add", &server("s2", "192.168.2.0", 24, 20)).status);
    added.sort_unstable();
    assert_eq!(added, [vec![201], vec![409; 19]].concat());
    assert_eq!(at_once(&registries, |registry| registry.add_client("same", "s2", 1000)), [201; 20]);
    let leases = first.get("server/config", &json!({ "server_name": "s2" })).json();
    assert_eq!(leases["peers"].as_array().unwrap().len(), 1, "{leases}");

    // The broker that answers has informed the gateway.
    for (n, registry) in (0..20).zip(registries.into_iter().cycle()) {
        add(registry, "s1", [n]);
        wait_within(SOON, "the gateway has the client", || gateway.peers("s1").contains(&key(n)).then_some(()));
    }
    for (n, registry) in (0..20).zip(registries.into_iter().rev().cycle()) {
        delete(registry, "s1", n);
        let is_there = || gateway.peers("s1").contains(&key(n));
        wait_within(SOON, "the gateway has it no more", || (!is_there()).then_some(()));
    }

    // One broker deletes clients while the other adds some.
    for round in 0..20 {
        let numbers = 2000 + 4 * round..2004 + 4 * round;
        thread::scope(|scope| {
            scope.spawn(|| add(&first, "s1", numbers.clone()));
            scope.spawn(|| numbers.clone().for_each(|n| delete(&second, "s1", n)));
        });
    }
    let leases = first.get("server/config", &json!({ "server_name": "s1" })).json();
    assert_eq!(leases, second.get("server/config", &json!({ "server_name": "s1" })).json());
    let keys: BTreeSet<_> = leases["peers"].as_array().unwrap().iter().map(|peer| text(&peer["public_key"])).collect();
    wait_within(2 * SOON, "the gateway has what the registry has", || (gateway.peers("s1") == keys).then_some(()));
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// The statuses for ten callers at each broker at the same time.
fn at_once(registries: &[&RegistryBroker; 2], call: impl Fn(&RegistryBroker) -> u16 + Sync) -> Vec<u16> {
    thread::scope(|scope| {
        let call = &call;
        let calls: Vec<_> = (0..20).map(|n| scope.spawn(move || call(registries[n % 2]))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    })
}

/// Publishes the hello of a worker with this server, as at its start.
fn announce(registry: &RegistryBroker, worker: &str, name: &str, number: u32, network: &str) -> Probe {
    let server = json!({
        "public_key": key(number), "network": network, "reserved": 20, "endpoint_address": "gw.example",
        "endpoint_port": 52820, "allowed_ips": network,
    });
    let servers = json!({ "servers": { name: server } }).to_string();
    let topic = format!("wgkex/worker/{worker}/servers");
    registry.stack.probe(Role::new(worker, &[]).greeting(vec![message(topic, servers, 1, true)]))
}

/// Regression: a request for the leases of such a server was not answered.
#[test]
fn a_gateway_whose_server_was_deleted_and_given_away_while_it_was_away_loses_its_peers() {
    with_each_store(|registry| {
        let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
        wait_for_server(registry, "s1");
        add(registry, "s1", 1..4);
        wait_for_peers(&gateway, 1..4);
        drop(gateway);
        assert_eq!(registry.post("server/delete/", &json!({ "server_name": "s1" })).status, 200);
        let _other = announce(registry, "gw2", "s1", 900, "10.77.0.0/24");
        wait_for_server(registry, "s1");
        add(registry, "s1", [9]);
        let witness = registry.stack.probe(Role::new("witness", &["wgkex/worker/gw1/leases"]));
        let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
        assert!(witness.next_on("wgkex/worker/gw1/leases").text().contains("\"content\":\"deleted\""));
        wait_for_peers(&gateway, []);
        wait_until("it keeps none on disk", || {
            let kept = fs::read_to_string(registry.stack.dir().join("gw1/worker.leases.json")).ok()?;
            kept.contains("\"version\":null").then_some(())
        });
    });
}

/// Its clients are still in the registry, under the worker's former name.
#[test]
fn a_gateway_that_has_another_name_keeps_its_peers() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
    wait_for_server(&registry, "s1");
    add(&registry, "s1", 1..4);
    wait_for_peers(&gateway, 1..4);
    drop(gateway);
    let state = |name: &str| registry.stack.dir().join(name);
    fs::rename(state("gw1"), state("gw9")).unwrap();
    let witness = registry.stack.probe(Role::new("witness", &["wgkex/worker/gw9/lease-requests"]));
    let gateway = InMemory::start_server(&registry.stack, "gw9", "s1", SERVER);
    wait_for_peers(&gateway, 1..4);
    for _ in 0..2 {
        // The second request shows that the first was not answered.
        witness.next_on("wgkex/worker/gw9/lease-requests");
    }
    wait_for_peers(&gateway, 1..4);
}

/// The gateway's worker keeps running. Clients deleted while it receives no messages are removed afterwards.
#[test]
fn wa25_a_gateway_keeps_its_peers_without_mqtt_broker_or_database_and_is_right_after_that() {
    let mut server_of_tables = Postgres::start();
    let store = Store::Postgres(server_of_tables.database("registry"));
    let mut registry = RegistryBroker::on_mosquitto(&store);
    // On a bus to which the gateway is not connected.
    let other = RegistryBroker::start(&store, "");
    let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", SERVER);
    wait_for_server(&registry, "s1");
    add(&registry, "s1", 1..6);
    wait_for_peers(&gateway, 1..6);
    let stays = |numbers: Range<u32>| {
        thread::sleep(SOON);
        assert_eq!(gateway.peers("s1"), numbers.map(key).collect());
    };

    let _ = registry.stack.mosquitto().end_by(Signal::SIGKILL);
    delete(&registry, "s1", 1);
    stays(1..6);
    registry.stack.start_mosquitto();
    wait_for_peers(&gateway, 2..6);

    let _ = registry.stack.broker().end_by(Signal::SIGKILL);
    delete(&other, "s1", 2);
    stays(2..6);
    registry.stack.start_broker();
    registry.stack.wait_until_ready();
    wait_for_peers(&gateway, 3..6);

    server_of_tables.kill();
    let last = json!({ "client_name": "s1-3" });
    assert_eq!(registry.post("client/delete/", &last).status, 503);
    stays(3..6);
    server_of_tables.start_again();
    wait_until("the client is deleted", || (registry.post("client/delete/", &last).status == 200).then_some(()));
    wait_for_peers(&gateway, 4..6);
}

/// Regression: changes beyond the queue of the broker's session were lost, and the gateway received them a minute
/// later.
#[test]
fn what_changes_while_the_bus_stands_still_reaches_gateways_when_it_goes_on() {
    let mut registry = RegistryBroker::on_mosquitto(&Store::Sqlite);
    let gateway = InMemory::start_server(&registry.stack, "gw1", "s1", "{network: 10.76.0.0/16, listen_port: 52820}");
    wait_for_server(&registry, "s1");
    add(&registry, "s1", [0]);
    wait_for_peers(&gateway, [0]);
    // The gateway has requested all leases, and does not request them again.
    thread::sleep(2 * SOON);
    registry.stack.mosquitto().signal(Signal::SIGSTOP);
    thread::scope(|scope| {
        for caller in 0..8 {
            let registry = &registry;
            scope.spawn(move || {
                let mut connection = registry.connect();
                for n in (1..MANY).filter(|n| n % 8 == caller) {
                    assert_eq!(connection.post("client/add/", &client(&format!("s1-{n}"), "s1", n)).status, 201);
                }
            });
        }
    });
    registry.stack.mosquitto().signal(Signal::SIGCONT);
    let expected: BTreeSet<_> = (0..MANY).map(key).collect();
    wait_within(Duration::from_secs(20), "the gateway has all", || (gateway.peers("s1") == expected).then_some(()));
}

/// Regression: the server had to be deleted first, although no client would lose a lease.
#[test]
fn a_server_has_another_network_as_long_as_no_client_has_a_lease() {
    with_each_store(|registry| {
        let own =
            |registry: &RegistryBroker| registry.get("server/wireguard_ip", &json!({ "server_name": "s1" })).json();
        let wait_for = |registry: &RegistryBroker, address: &str| {
            wait_until("the server has the network", || (own(registry)["server_wg_ip"] == address).then_some(()));
        };
        for (network, address) in [("10.77.0.0/24", "10.77.0.1"), ("10.78.0.0/16", "10.78.0.1")] {
            let _worker = announce(registry, "gw1", "s1", 900, network);
            wait_for(registry, address);
        }
        assert_eq!(registry.leased("c1", "s1", 1), "10.78.0.21");
        let _worker = announce(registry, "gw1", "s1", 900, "10.79.0.0/24");
        let problem = "server s1 of worker gw1 is not taken into the registry: the server's clients have leases";
        wait_until("the page has it", || registry.stack.get("/").body.contains(problem).then_some(()));
        assert_eq!(own(registry)["server_wg_ip"], "10.78.0.1");
        assert_eq!(registry.lease("c1", "s1").as_deref(), Some("10.78.0.21"));
        // The registry accepts the new network as soon as the client is deleted.
        delete_client(registry, "c1");
        let _worker = announce(registry, "gw1", "s1", 900, "10.79.0.0/24");
        wait_for(registry, "10.79.0.1");
    });
}

/// Regression: it was in the registry only at the broker's next hello, a minute later.
#[test]
fn a_server_that_is_announced_while_the_database_is_away_is_in_the_registry_soon_after_its_return() {
    let mut server_of_tables = Postgres::start();
    let registry = RegistryBroker::start(&Store::Postgres(server_of_tables.database("registry")), "");
    registry.add_server("s2", "192.168.2.0", 24, 20);
    server_of_tables.kill();
    let _workers = [("gw1", "s1", 900, "10.77.0.0/24"), ("gw3", "s3", 901, "10.78.0.0/24")]
        .map(|(worker, name, number, network)| announce(&registry, worker, name, number, network));
    for _ in 0..3 {
        assert_eq!(registry.post("server/exists", &json!({ "server_name": "s2" })).status, 503);
    }
    server_of_tables.start_again();
    wait_within(Duration::from_secs(20), "the servers are in the registry", || {
        let servers = registry.get("server/list_all", &json!({}));
        (servers.status == 200 && servers.json().as_object().unwrap().len() == 3).then_some(())
    });
}
