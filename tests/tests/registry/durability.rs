//! Acknowledged changes survive a kill, and an unavailable database affects no other service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_tests::http::{Http, Response};
use wgkex_tests::postgres::{self, Postgres};
use wgkex_tests::probe::Role;
use wgkex_tests::proxy;
use wgkex_tests::scripted::{Worker, WorkerBehaviour};
use wgkex_tests::stack::DOMAIN;
use wgkex_tests::{key, wait_within};

use crate::registry_broker::{CHANGES, READS, RegistryBroker, Store, client, server, with_each_store};

/// The metric for alerts.
const STORAGE_UP: &str = "wgkex_broker_registry_storage_up";
/// The number of clients that are acknowledged and have read their address before each kill, so that it hits a registry
/// under load.
const BEFORE_A_KILL: usize = 10;
/// How long that may take, also on a busy machine.
const LOADED: Duration = Duration::from_secs(60);
/// The limit of a call while the database is unavailable.
const PATIENCE: Duration = Duration::from_secs(10);
/// The limit for the registry to be available again.
const RETURN: Duration = Duration::from_secs(20);

#[test]
fn wa23_a_kill_loses_nothing_that_was_acknowledged() {
    with_each_store(|registry| {
        registry.add_server("s1", "10.0.0.0", 16, 20);
        let is_over = AtomicBool::new(false);
        let told = AtomicUsize::new(0);
        let address = registry.stack.http;
        let acknowledged: BTreeMap<String, Acknowledged> = thread::scope(|scope| {
            let callers: Vec<_> = (0..4_u32)
                .map(|caller| {
                    let (told, is_over) = (&told, &is_over);
                    scope.spawn(move || add_until(address, caller, told, is_over))
                })
                .collect();
            for kills in 0..3 {
                wait_within(LOADED, "clients are added", || {
                    (told.load(Ordering::SeqCst) >= (kills + 1) * BEFORE_A_KILL).then_some(())
                });
                registry.restart_by(Signal::SIGKILL);
            }
            is_over.store(true, Ordering::SeqCst);
            callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect()
        });
        let config = registry.get("server/config/", &json!({ "server_name": "s1" })).json();
        let peers = config["peers"].as_array().unwrap();
        let keys: BTreeMap<_, _> = peers
            .iter()
            .map(|peer| (peer["public_key"].as_str().unwrap(), peer["ip_address"].as_str().unwrap()))
            .collect();
        assert_eq!(keys.len(), peers.len());
        assert_eq!(keys.values().collect::<BTreeSet<_>>().len(), peers.len(), "no address twice");
        for (name, Acknowledged { number, address }) in &acknowledged {
            let kept = keys.get(key(*number).as_str()).unwrap_or_else(|| panic!("{name} is lost"));
            assert!(address.as_deref().is_none_or(|address| address == *kept), "{name} had {address:?}");
        }
    });
}

/// A client whose adding was acknowledged.
struct Acknowledged {
    number: u32,
    /// The address read afterwards, if the broker answered.
    address: Option<String>,
}

/// Adds clients over and over, also while no broker listens, and returns those that were acknowledged; counts in `told`
/// those whose address was read.
fn add_until(
    broker: SocketAddr,
    caller: u32,
    told: &AtomicUsize,
    is_over: &AtomicBool,
) -> BTreeMap<String, Acknowledged> {
    let mut acknowledged = BTreeMap::new();
    let mut number = caller * 100_000;
    let begun = Instant::now();
    while !is_over.load(Ordering::SeqCst) && begun.elapsed() < 4 * LOADED {
        number += 1;
        let name = format!("c{number}");
        match post(broker, "add", &client(&name, "s1", number)) {
            Ok(answer) if answer.status == 201 => {
                let config = post(broker, "config", &json!({ "client_name": name, "server_name": "s1" }));
                let address = config.ok().filter(|answer| answer.status == 200);
                let address = address.map(|answer| answer.json()["subnet"]["lease"].as_str().unwrap().to_owned());
                told.fetch_add(usize::from(address.is_some()), Ordering::SeqCst);
                acknowledged.insert(name, Acknowledged { number, address });
            }
            Ok(_) => {}
            // The broker is not up again.
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
    acknowledged
}

#[test]
fn wa23_a_kill_loses_no_delete_and_no_new_key() {
    with_each_store(|registry| {
        registry.add_server("s1", "10.0.0.0", 16, 20);
        let (is_over, done, broker) = (AtomicBool::new(false), AtomicUsize::new(0), registry.stack.http);
        let clients: BTreeMap<String, BTreeSet<Option<u32>>> = thread::scope(|scope| {
            let callers: Vec<_> = (0..4_u32)
                .map(|caller| {
                    let (done, is_over) = (&done, &is_over);
                    scope.spawn(move || change_until(broker, caller, done, is_over))
                })
                .collect();
            for kills in 0..3 {
                wait_within(LOADED, "clients change", || {
                    (done.load(Ordering::SeqCst) >= (kills + 1) * 4 * BEFORE_A_KILL).then_some(())
                });
                registry.restart_by(Signal::SIGKILL);
            }
            is_over.store(true, Ordering::SeqCst);
            callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect()
        });
        let found = registry.get("client/list_all", &json!({})).json();
        for (name, possible) in clients {
            let key_of = |peerings: &Value| peerings.as_object()?.values().next().map(|one| one["public_key"].clone());
            let kept = key_of(&found[&name]);
            let possible: Vec<_> = possible.into_iter().map(|number| number.map(|number| json!(key(number)))).collect();
            assert!(possible.contains(&kept), "{name}: {kept:?}, and not one of {possible:?}");
        }
    });
}

/// Adds clients, gives them another key, deletes them, and adds half of them again, also while no broker listens.
/// Returns the keys by which each may exist, none if it may be deleted: the acknowledged one, and all later attempts.
fn change_until(
    broker: SocketAddr,
    caller: u32,
    done: &AtomicUsize,
    is_over: &AtomicBool,
) -> BTreeMap<String, BTreeSet<Option<u32>>> {
    let mut clients = BTreeMap::new();
    let begun = Instant::now();
    for number in caller * 100_000.. {
        if is_over.load(Ordering::SeqCst) || begun.elapsed() > 4 * LOADED {
            break;
        }
        let (client_number, step) = (number / 4, number % 4);
        let name = format!("c{client_number}");
        let possible = clients.entry(name.clone()).or_insert_with(|| BTreeSet::from([None]));
        let (answer, expected) = match step {
            2 => (post(broker, "delete", &json!({ "client_name": name })), None),
            3 if client_number % 2 == 1 => continue,
            _ => (post(broker, "add", &client(&name, "s1", number)), Some(number)),
        };
        match answer {
            Ok(answer) if answer.status < 300 => {
                *possible = BTreeSet::from([expected]);
                done.fetch_add(1, Ordering::SeqCst);
            }
            _ => {
                possible.insert(expected);
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    clients
}

/// A call about a client, while the broker may be down.
fn post(broker: SocketAddr, route: &str, body: &Value) -> std::io::Result<Response> {
    let body = body.to_string();
    let head = format!(
        "POST /api/v1/client/{route} HTTP/1.1\r\nHost: b\r\n{}\r\nContent-Length: {}\r\n\r\n",
        crate::registry_broker::LOGIN,
        body.len()
    );
    let mut http = Http::try_connect(broker)?;
    http.try_send(&[head.as_bytes(), body.as_bytes()].concat())?;
    http.try_response("POST")
}

#[test]
fn wa25_a_database_that_is_away_is_503_and_back_by_itself_and_routers_do_not_notice() {
    let mut server_of_tables = Postgres::start();
    let registry = RegistryBroker::start(&Store::Postgres(server_of_tables.database("registry")), "");
    let _worker = Worker::start(&registry.stack, "gw1", WorkerBehaviour::Confirms, 0);
    registry.stack.wait_for_gateways(1);
    registry.add_server("s1", "192.168.2.0", 24, 20);
    registry.leased("c1", "s1", 1);
    let before = registry.everything();
    for is_frozen in [false, true] {
        if is_frozen {
            server_of_tables.freeze(true);
        } else {
            server_of_tables.kill();
        }
        let fields = bodies();
        for route in READS.iter().chain(&CHANGES) {
            let begun = Instant::now();
            let answer = registry.post(&format!("{route}/"), &fields);
            assert_eq!(answer.status, 503, "{route}: {answer:?}");
            assert!(answer.header("retry-after").is_some() && begun.elapsed() < PATIENCE, "{route}");
            let unauthorized = registry.stack.connect().request("POST", &format!("/api/v1/{route}/"), &[], b"{}");
            assert_eq!(unauthorized.status, 401);
        }
        registry.stack.wait_for_metric(STORAGE_UP, 0.0);
        assert_eq!(registry.stack.v2(DOMAIN, &key(77)).status, 200, "routers do not need it");
        if is_frozen {
            server_of_tables.freeze(false);
        } else {
            server_of_tables.start_again();
        }
        wait_within(RETURN, "the registry is back", || {
            (registry.get("server/exists/", &json!({ "server_name": "s1" })).status == 200).then_some(())
        });
        assert_eq!(registry.everything(), before);
        registry.stack.wait_for_metric(STORAGE_UP, 1.0);
    }
}

/// Fields that suit every route.
fn bodies() -> Value {
    let mut fields = server("s1", "192.168.9.0", 24, 20);
    fields["client_name"] = json!("c1");
    fields
}

/// Regression: `PostgreSQL` ends such a transaction with a rollback on COMMIT, and reports no error.
#[test]
fn what_was_acknowledged_is_there_where_another_call_broke_the_transaction_of_both() {
    let replacing = proxy::ProxyMode::Replacing("ROLLBACK TO SAVEPOINT job", "ROLLBACK TO SAVEPOINT jox");
    let (database, _proxy) = postgres::database().behind(replacing);
    let registry = RegistryBroker::start(&Store::Postgres(database), "");
    registry.add_server("s1", "10.0.0.0", 16, 20);
    let mut acknowledged = Vec::new();
    let mut first = 0;
    wait_within(LOADED, "calls share a transaction with one that breaks it", || {
        let statuses: Vec<_> = thread::scope(|scope| {
            let registry = &registry;
            let add = |n: u32| scope.spawn(move || (n, registry.add_client(&format!("c{n}"), "s1", n)));
            let refused = |n: u32| scope.spawn(move || (n, registry.add_client(&format!("c{n}"), "none", n)));
            let calls: Vec<_> = (first..first + 16).map(|n| if n % 2 == 0 { add(n) } else { refused(n) }).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        first += 16;
        let (even, _): (Vec<_>, Vec<_>) = statuses.into_iter().partition(|(n, _)| n % 2 == 0);
        acknowledged.extend(even.iter().filter(|(_, status)| *status == 201).map(|(n, _)| *n));
        even.iter().any(|(_, status)| *status != 201).then_some(())
    });
    let clients = registry.get("client/list_all", &json!({})).json();
    let lost: Vec<_> = acknowledged.into_iter().filter(|n| clients[format!("c{n}")].is_null()).collect();
    assert_eq!(lost, Vec::<u32>::new());
}

/// Regression: a transaction that took more than 4 s was answered with 503.
#[test]
fn many_callers_are_served_by_a_database_that_is_far_away() {
    let line = proxy::ProxyMode::Slow { delay: Duration::from_millis(8), rate: u32::MAX };
    let (database, _proxy) = postgres::database().behind(line);
    let registry = RegistryBroker::start(&Store::Postgres(database), "");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    let begun = Instant::now();
    let statuses: Vec<_> = thread::scope(|scope| {
        let registry = &registry;
        let calls: Vec<_> =
            (0..20).map(|n| scope.spawn(move || registry.add_client(&format!("c{n}"), "s1", n))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert_eq!(statuses, [201; 20], "after {:?}", begun.elapsed());
}

#[test]
fn two_brokers_on_one_postgresql_serve_one_registry() {
    two_brokers_serve_one_registry(&Store::Postgres(postgres::database()));
}

/// Regression: of two writers, one read the data from before it waited for the other.
#[test]
fn two_brokers_serve_one_registry_whatever_isolation_is_the_databases_default() {
    let server_of_tables = Postgres::start();
    let store = Store::Postgres(server_of_tables.database("registry"));
    server_of_tables.run("registry", "ALTER DATABASE registry SET default_transaction_isolation = 'repeatable read'");
    two_brokers_serve_one_registry(&store);
}

fn two_brokers_serve_one_registry(store: &Store) {
    let (first, second) = (RegistryBroker::start(store, ""), RegistryBroker::start(store, ""));
    first.add_server("s1", "192.168.2.0", 24, 20);
    thread::scope(|scope| {
        for (registry, begin) in [(&first, 0), (&second, 50)] {
            scope.spawn(move || {
                for n in begin..begin + 50 {
                    assert_eq!(registry.add_client(&format!("c{n}"), "s1", n), 201);
                }
            });
        }
    });
    let peers = second.get("server/config/", &json!({ "server_name": "s1" })).json();
    let addresses: Vec<_> = peers["peers"].as_array().unwrap().iter().map(|peer| peer["ip_address"].clone()).collect();
    assert_eq!(addresses, (21..121).map(|last| json!(format!("192.168.2.{last}"))).collect::<Vec<_>>());
    assert_eq!(first.everything(), second.everything());
}

/// Agents trust an empty list, so a second file would remove the peers of all gateways that request there.
#[test]
#[ignore = "needs root: tests/run netns"]
fn of_two_brokers_with_sqlite_on_one_bus_the_second_refuses_and_reports_it() {
    let mut first = RegistryBroker::on_bus(&Store::Sqlite, "b1", None);
    first.add_server("s1", "192.168.2.0", 24, 20);
    let mut second = RegistryBroker::on_bus(&Store::Sqlite, "b2", Some(&first));
    second.stack.broker().wait_for_log("another broker of this bus has a registry");
    for route in READS.iter().chain(&CHANGES) {
        let answer = second.post(route, &bodies());
        assert_eq!((answer.status, answer.header("retry-after").is_some()), (503, true), "{route}");
        assert!(answer.body.contains("broker b1 has the registry of this bus"), "{route}: {}", answer.body);
    }
    let status = second.stack.get("/status.json").json();
    assert_eq!(status["registry"]["elsewhere"], "b1");
    assert_eq!(second.stack.metric(STORAGE_UP), Some(1.0), "it is not needed");
    assert!(second.stack.get("/").body.contains("broker b1 has the registry of this bus"));
    assert_eq!(first.stack.get("/status.json").json()["registry"]["elsewhere"], Value::Null);
    // Workers do not request leases from it.
    let witness = first.stack.probe(Role::new("witness", &["wgkex/broker/+/hello"]));
    let offers = |broker: &str, is_offered: bool| {
        let topic = format!("wgkex/broker/{broker}/hello");
        witness
            .next("a hello", |message| message.topic == topic && message.text().contains("\"leases\"") == is_offered);
    };
    offers("b1", true);
    offers("b2", false);
    // The first broker is killed, and starts again.
    first.restart_by(Signal::SIGKILL);
    assert_eq!(second.post("server/exists", &json!({ "server_name": "s1" })).status, 503);
    assert_eq!(first.post("server/exists", &json!({ "server_name": "s1" })).status, 200);
    // The second one is restarted while the first one and the bus are down, and starts before it.
    assert!(first.stack.stop_broker().success());
    second.restart_by(Signal::SIGTERM);
    second.stack.broker().wait_for_log("another broker has the registry, by what is kept");
    assert_eq!(second.post("server/exists", &json!({ "server_name": "s1" })).status, 503);
    first.stack.start_broker();
    first.stack.wait_until_ready();
    assert_eq!(second.post("server/exists", &json!({ "server_name": "s1" })).status, 503);
    assert_eq!(first.post("server/exists", &json!({ "server_name": "s1" })).status, 200);
    // The first broker's registry is disabled.
    first.stack.plan.config.clear();
    first.stack.write_config();
    assert!(first.stack.stop_broker().success());
    first.stack.start_broker();
    second.stack.broker().wait_for_log("this one has it");
    offers("b2", true);
    assert_eq!(second.post("server/add", &server("s9", "192.168.9.0", 24, 20)).status, 201);
}

#[test]
fn a_damaged_database_is_left_alone() {
    let mut registry = RegistryBroker::start(&Store::Sqlite, "");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    registry.stack.stop_broker();
    let file = registry.stack.state_dir().join("registry.sqlite");
    std::fs::write(&file, b"this is no database, and was one once").unwrap();
    // With the log in place, SQLite restores everything from it.
    for log in ["registry.sqlite-wal", "registry.sqlite-shm"] {
        let _ = std::fs::remove_file(registry.stack.state_dir().join(log));
    }
    registry.stack.start_broker();
    registry.stack.wait_until_ready();
    assert_eq!(registry.get("server/list_all", &json!({})).status, 503, "an empty answer would make gateways forget");
    assert_eq!(std::fs::read(&file).unwrap(), b"this is no database, and was one once");
    let line = registry.stack.broker().wait_for_log("the database cannot be used");
    assert!(line.contains("registry.sqlite") && line.contains("WARN"), "{line}");
}

#[test]
fn tables_of_another_version_in_postgresql_are_left_alone() {
    let server_of_tables = Postgres::start();
    let mut registry = RegistryBroker::start(&Store::Postgres(server_of_tables.database("registry")), "");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    registry.leased("c1", "s1", 1);
    let before = registry.everything();
    for (change, undo, cause) in [
        (
            "UPDATE wgkex_layout SET version = version + 1",
            "UPDATE wgkex_layout SET version = version - 1",
            "newer than those",
        ),
        // Tables of an unknown version prevent the first migration, which then changes nothing.
        (
            "ALTER TABLE wgkex_layout RENAME TO layout_away",
            "ALTER TABLE layout_away RENAME TO wgkex_layout",
            "already exists",
        ),
    ] {
        assert!(registry.stack.stop_broker().success());
        server_of_tables.run("registry", change);
        registry.stack.start_broker();
        registry.stack.wait_until_ready();
        for route in READS.iter().chain(&CHANGES) {
            assert_eq!(registry.post(route, &bodies()).status, 503, "{change}: {route}");
        }
        let line = registry.stack.broker().wait_for_log("the database cannot be used");
        assert!(line.contains(cause), "{line}");
        server_of_tables.run("registry", undo);
        wait_within(RETURN, "the registry is back", || {
            (registry.get("server/exists/", &json!({ "server_name": "s1" })).status == 200).then_some(())
        });
        assert_eq!(registry.everything(), before, "{change}");
    }
}
