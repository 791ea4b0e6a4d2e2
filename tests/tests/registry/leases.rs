//! The address that a client gets, and when it becomes free.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Barrier;
use std::thread;

use serde_json::json;
use wgkex_tests::key;

use crate::registry_broker::{RegistryBroker, client, server, with, with_each_store};

/// The addresses of a server's clients, in order, and their keys.
fn peers(registry: &RegistryBroker, server: &str) -> Vec<(String, String)> {
    let config = registry.get("server/config/", &json!({ "server_name": server })).json();
    let peers = config["peers"].as_array().unwrap().iter().map(|peer| {
        assert_eq!(peer.as_object().unwrap().len(), 2, "{peer}");
        let text = |field: &str| peer[field].as_str().unwrap().to_owned();
        (text("ip_address"), text("public_key"))
    });
    peers.collect()
}

/// The ids and servers of a client's peerings.
fn peerings(registry: &RegistryBroker, name: &str) -> Vec<(String, String)> {
    let clients = registry.get("client/list_all", &json!({})).json();
    let peerings = clients[name].as_object().into_iter().flatten();
    peerings.map(|(id, peering)| (id.clone(), peering["server"].as_str().unwrap().to_owned())).collect()
}

#[test]
fn wa6_wa8_leases_begin_behind_the_reserved_addresses_and_the_lowest_free_one_is_next() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        for (name, number, address) in [("c1", 1, "192.168.2.21"), ("c2", 2, "192.168.2.22"), ("c3", 3, "192.168.2.23")]
        {
            assert_eq!(registry.leased(name, "s1", number), address);
        }
        let expected = [21, 22, 23].map(|last| (format!("192.168.2.{last}"), key(last - 20)));
        assert_eq!(peers(registry, "s1"), expected);
        assert_eq!(registry.post("client/delete/", &json!({ "client_name": "c2" })).status, 200);
        assert_eq!(registry.leased("c4", "s1", 4), "192.168.2.22");
        assert_eq!(registry.leased("c5", "s1", 5), "192.168.2.24");
    });
}

/// As for clients that are imported from another registry.
#[test]
fn a_client_can_name_the_address_that_it_is_to_have() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        let add = |name: &str, number: u32, lease: &str| {
            let fields = with(&client(name, "s1", number), "lease", json!(lease));
            let answer = registry.post("client/add/", &fields);
            (answer.status, (answer.status > 299).then(|| answer.json()["error"]["field"].as_str().unwrap().to_owned()))
        };
        let refused = |status: u16| (status, Some("lease".to_owned()));
        for (name, number, last) in [("c1", 1, 23), ("c2", 2, 21), ("c3", 3, 25), ("c1", 1, 23), ("c1", 11, 23)] {
            assert_eq!(add(name, number, &format!("192.168.2.{last}")), (201, None), "{name} {last}");
            assert_eq!(registry.lease(name, "s1"), Some(format!("192.168.2.{last}")));
        }
        let before = registry.everything();
        assert_eq!(add("c4", 4, "192.168.2.23"), refused(409), "it is another client's");
        assert_eq!(add("c1", 11, "192.168.2.24"), refused(409), "the client has another one");
        for wrong in ["192.168.2.20", "192.168.2.255", "192.168.3.30", "fd00::30", "x"] {
            assert_eq!(add("c4", 4, wrong), refused(400), "{wrong}");
        }
        assert_eq!(registry.everything(), before);
        // Others get the addresses in between.
        let leased: Vec<_> = (5..8).map(|n| registry.leased(&format!("c{n}"), "s1", n)).collect();
        assert_eq!(leased, ["192.168.2.22", "192.168.2.24", "192.168.2.26"]);
        registry.post("client/delete/", &json!({ "client_name": "c1" }));
        assert_eq!(add("c8", 8, "192.168.2.23"), (201, None), "it was given back");
        assert_eq!(registry.leased("c9", "s1", 9), "192.168.2.27");
    });
}

/// Clients are added and deleted in random order; a plain set determines the address that each one gets.
#[test]
fn the_lowest_free_address_is_leased_whoever_left_before() {
    with_each_store(|registry| {
        registry.add_server("s1", "10.0.0.0", 27, 5);
        let mut connection = registry.connect();
        let mut leased = BTreeMap::new();
        let mut state: u32 = 1;
        for round in 0..150 {
            state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            let n = (state >> 16) % 30;
            let name = format!("c{n}");
            if leased.remove(&n).is_some() {
                assert_eq!(connection.post("client/delete/", &json!({ "client_name": name })).status, 200);
                continue;
            }
            let free = (6..31).find(|last| !leased.values().any(|taken| taken == last));
            let added = connection.post("client/add/", &client(&name, "s1", n)).status;
            assert_eq!(added, if free.is_some() { 201 } else { 503 }, "{round}");
            leased.extend(free.map(|last| (n, last)));
            let expected = free.map(|last| format!("10.0.0.{last}"));
            assert_eq!(registry.lease(&name, "s1"), expected, "{round}");
        }
    });
}

#[test]
fn wa9_a_full_network_refuses_and_keeps_no_trace() {
    with_each_store(|registry| {
        registry.add_server("s1", "10.0.0.8", 29, 2);
        let leased: Vec<_> = (1..5).map(|n| registry.leased(&format!("c{n}"), "s1", n)).collect();
        assert_eq!(leased, ["10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.14"]);
        let before = registry.everything();
        let full = registry.post("client/add/", &client("c5", "s1", 5));
        assert_eq!((full.status, full.json()["error"]["field"].as_str()), (503, Some("server_name")));
        assert_eq!(registry.everything(), before);
        assert_eq!(registry.leased("c2", "s1", 22), "10.0.0.12", "a member of a full network may have another key");
        registry.post("client/delete/", &json!({ "client_name": "c3" }));
        assert_eq!(registry.leased("c5", "s1", 5), "10.0.0.13");
    });
}

#[test]
fn wa10_the_servers_own_address_is_never_leased() {
    with_each_store(|registry| {
        registry.add_server("s1", "10.0.0.16", 28, 0);
        let leased: Vec<_> = (1..14).map(|n| registry.leased(&format!("c{n}"), "s1", n)).collect();
        assert_eq!(leased, (18..31).map(|last| format!("10.0.0.{last}")).collect::<Vec<_>>());
        assert_eq!(registry.add_client("c14", "s1", 14), 503);
        registry.add_server("s2", "10.0.1.0", 24, 254);
        assert_eq!(registry.add_client("c1", "s2", 1), 503, "all its addresses are reserved");
    });
}

#[test]
fn leases_of_ipv6() {
    with_each_store(|registry| {
        registry.add_server("s6", "fd00::", 64, 20);
        let own = registry.get("server/wireguard_ip/", &json!({ "server_name": "s6" })).json();
        assert_eq!(own, json!({ "server_wg_ip": "fd00::1" }));
        assert_eq!([registry.leased("c1", "s6", 1), registry.leased("c2", "s6", 2)], ["fd00::15", "fd00::16"]);
        registry.add_server("t6", "fd00:1::", 126, 0);
        assert_eq!(registry.leased("c3", "t6", 3), "fd00:1::2");
        assert_eq!(registry.add_client("c4", "t6", 4), 503);
    });
}

#[test]
fn wa11_wa12_a_client_that_comes_again_keeps_its_address_and_loses_nothing_if_it_is_refused() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        for n in 1..4 {
            registry.leased(&format!("c{n}"), "s1", n);
        }
        registry.post("client/delete/", &json!({ "client_name": "c1" }));
        let before = peerings(registry, "c2");
        assert_eq!(registry.leased("c2", "s1", 9), "192.168.2.22", "although a lower one is free");
        assert_ne!(peerings(registry, "c2"), before, "its id is another one");
        let keys: Vec<_> = peers(registry, "s1").into_iter().map(|(_, key)| key).collect();
        assert_eq!(keys, [key(9), key(3)]);
        assert_eq!(registry.leased("c2", "s1", 9), "192.168.2.22", "the same again");
        let before = registry.everything();
        assert_eq!(registry.add_client("c2", "s1", 3), 409, "the key of c3");
        assert_eq!(registry.everything(), before);
        assert_eq!(registry.lease("c2", "s1").unwrap(), "192.168.2.22");
    });
}

#[test]
fn wa13_wa14_wa15_one_client_at_several_servers() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        registry.add_server("s2", "192.168.3.0", 24, 20);
        assert_eq!([registry.add_client("c1", "s1", 1), registry.add_client("c1", "s2", 1)], [201, 201]);
        let both = peerings(registry, "c1");
        assert_eq!(both.iter().map(|(_, server)| server.as_str()).collect::<BTreeSet<_>>(), ["s1", "s2"].into());
        assert!(both.iter().all(|(id, _)| id.parse::<u64>().is_ok()), "{both:?}");
        assert_eq!(registry.add_client("c2", "s1", 1), 409, "another client has the key");
        let own = server("s2", "192.168.3.0", 24, 20)["public_key"].clone();
        let of_server = json!({ "client_name": "c3", "server_name": "s1", "public_key": own });
        assert_eq!(registry.post("client/add/", &of_server).status, 409, "a server has the key");
        let from_s1 = json!({ "client_name": "c1", "server_name": "s1" });
        for _ in 0..2 {
            let removed = registry.post("server/remove_peer/", &from_s1);
            assert_eq!((removed.status, removed.body.as_str()), (200, ""));
            assert_eq!(peerings(registry, "c1").into_iter().map(|(_, server)| server).collect::<Vec<_>>(), ["s2"]);
        }
        registry.post("server/remove_peer/", &json!({ "client_name": "c1", "server_name": "s2" }));
        assert_eq!(registry.get("client/list_all", &json!({})).json(), json!({}), "it goes with its last peering");
        registry.add_client("c1", "s1", 1);
        registry.add_client("c1", "s2", 1);
        for _ in 0..2 {
            let deleted = registry.post("client/delete/", &json!({ "client_name": "c1" }));
            assert_eq!((deleted.status, deleted.body.as_str()), (200, ""));
            assert_eq!(registry.get("client/list_all", &json!({})).json(), json!({}));
        }
        assert_eq!(registry.leased("c4", "s1", 4), "192.168.2.21");
    });
}

#[test]
fn wa16_a_deleted_server_takes_its_leases_along() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        registry.add_server("s2", "192.168.3.0", 24, 20);
        for (name, at, number) in [("c1", "s1", 1), ("c1", "s2", 1), ("c2", "s1", 2)] {
            registry.leased(name, at, number);
        }
        for _ in 0..2 {
            let deleted = registry.post("server/delete/", &json!({ "server_name": "s1" }));
            assert_eq!((deleted.status, deleted.body.as_str()), (200, ""));
        }
        assert_eq!((peerings(registry, "c1").len(), peerings(registry, "c2").len()), (1, 0));
        registry.add_server("s1", "192.168.2.0", 24, 20);
        assert_eq!(registry.leased("c2", "s1", 2), "192.168.2.21");
    });
}

#[test]
fn wa21_many_at_once_get_different_addresses() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        let registry = &*registry;
        let all_connected = Barrier::new(100);
        let connections: Vec<_> = (0..100).map(|number| (number, registry.connect())).collect();
        thread::scope(|scope| {
            for (number, mut connection) in connections {
                let all_connected = &all_connected;
                scope.spawn(move || {
                    all_connected.wait();
                    let added = connection.post("client/add/", &client(&format!("c{number}"), "s1", number));
                    assert_eq!(added.status, 201, "{added:?}");
                });
            }
        });
        assert_eq!(peers(registry, "s1").into_iter().map(|(_, key)| key).collect::<BTreeSet<_>>().len(), 100);
        let addresses: Vec<_> = peers(registry, "s1").into_iter().map(|(address, _)| address).collect();
        assert_eq!(addresses, (21..121).map(|last| format!("192.168.2.{last}")).collect::<Vec<_>>());
    });
}

#[test]
fn simultaneous_equal_calls_have_one_result() {
    with_each_store(|registry| {
        let registry = &*registry;
        let statuses = |route: &'static str, fields: &serde_json::Value| -> Vec<u16> {
            thread::scope(|scope| {
                let calls: Vec<_> = (0..20).map(|_| scope.spawn(|| registry.post(route, fields).status)).collect();
                calls.into_iter().map(|call| call.join().unwrap()).collect()
            })
        };
        let mut added = statuses("server/add/", &server("s1", "192.168.2.0", 24, 20));
        added.sort_unstable();
        assert_eq!(added, [vec![201], vec![409; 19]].concat());
        assert_eq!(statuses("client/add/", &client("c1", "s1", 1)), [201; 20], "the same lease each time");
        assert_eq!((peers(registry, "s1").len(), peerings(registry, "c1").len()), (1, 1));
    });
}

#[test]
fn a_server_that_is_deleted_meanwhile_leaves_no_orphan() {
    with_each_store(|registry| {
        let registry = &*registry;
        for round in 0..5 {
            registry.add_server("s1", "192.168.2.0", 24, 20);
            thread::scope(|scope| {
                for n in 0..8 {
                    scope.spawn(move || {
                        let status = registry.add_client(&format!("c{n}"), "s1", round * 8 + n);
                        assert!([201, 404].contains(&status), "{status}");
                    });
                }
                scope
                    .spawn(|| assert_eq!(registry.post("server/delete/", &json!({ "server_name": "s1" })).status, 200));
            });
            assert_eq!(registry.everything(), json!({ "clients": {}, "servers": {} }));
        }
    });
}
