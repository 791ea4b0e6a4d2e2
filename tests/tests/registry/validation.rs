//! Valid and invalid fields of servers and clients.

use serde_json::{Value, json};

use crate::registry_broker::{RegistryBroker, Store, client, server, with, with_each_store};

fn assert_refused(registry: &RegistryBroker, route: &str, fields: &Value, field: &str) {
    let answer = registry.post(route, fields);
    assert_eq!(answer.status, 400, "{fields}: {answer:?}");
    assert_eq!(answer.json()["error"]["field"], field, "{fields}: {answer:?}");
}

#[test]
fn wa17_invalid_fields_are_refused_and_change_nothing() {
    with_each_store(|registry| {
        let good = server("s1", "192.168.2.0", 24, 20);
        let key = good["public_key"].as_str().unwrap().to_owned();
        let wrong: [(&str, &[Value]); 8] = [
            (
                "network_address",
                &[json!("192.168.2"), json!("x"), json!("192.168.2.5"), json!(""), json!(7), json!("192.168.2.0/24")],
            ),
            (
                "network_mask",
                &[json!(0), json!(31), json!(33), json!("24"), json!(true), json!(24.0), json!(-1), json!(u64::MAX)],
            ),
            (
                "public_key",
                &[json!(key[..43]), json!(format!("{key}x")), json!(format!("{key}\n")), json!(7), json!("")],
            ),
            (
                "endpoint_address",
                &[json!("a b"), json!(""), json!("300.1.2.3"), json!("-x"), json!("x/y"), json!("h:1"), json!("a..b")],
            ),
            ("endpoint_port", &[json!(0), json!(65536), json!("5128"), json!(true), json!(5128.0)]),
            ("n_reserved_ips", &[json!(-1), json!("7"), json!(300), json!(255), json!(true), json!(2.0)]),
            (
                "allowed_ips",
                &[json!("garbage"), json!(""), json!("10.0.0.0/33"), json!("10.0.0.0/8,"), json!(["10.0.0.0/8"])],
            ),
            ("server_name", &[json!(""), json!("a/b"), json!(".a"), json!("a\nb"), json!("x".repeat(254)), json!(7)]),
        ];
        for (field, values) in wrong {
            for value in values.iter().chain([&Value::Null]) {
                assert_refused(registry, "server/add/", &with(&good, field, value.clone()), field);
            }
            let mut missing = good.clone();
            missing.as_object_mut().unwrap().remove(field);
            assert_refused(registry, "server/add/", &missing, field);
        }
        assert_eq!(registry.everything(), json!({ "clients": {}, "servers": {} }));
        registry.add_server("s1", "192.168.2.0", 24, 20);
        for (field, value) in [
            ("client_name", json!("")),
            ("client_name", json!("a\u{7f}")),
            ("client_name", json!("x".repeat(254))),
            ("public_key", json!("x")),
        ] {
            assert_refused(registry, "client/add/", &with(&client("c1", "s1", 1), field, value), field);
        }
        assert_eq!(registry.everything()["clients"], json!({}));
    });
}

#[test]
fn the_bounds_are_allowed() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    let base = server("s0", "10.0.0.0", 24, 20);
    let allowed = [
        ("a", "10.1.0.0", 30, json!({ "n_reserved_ips": 2 })),
        ("b", "128.0.0.0", 1, json!({ "endpoint_port": 1 })),
        ("c", "10.2.0.0", 24, json!({ "n_reserved_ips": 254, "endpoint_port": 65535 })),
        ("d", "10.3.0.0", 24, json!({ "endpoint_address": "gw-1.example.org" })),
        ("e", "10.4.0.0", 24, json!({ "endpoint_address": "2001:db8::1" })),
        ("f", "10.5.0.0", 24, json!({ "allowed_ips": "10.0.0.0/8, fd00::/64,192.0.2.1" })),
        ("g", "fd00::", 126, json!({ "n_reserved_ips": 0 })),
    ];
    for (name, network, mask, more) in allowed {
        let mut fields = server(name, network, mask, 0);
        fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = registry.post("server/add/", &fields);
        assert_eq!(answer.status, 201, "{name}: {answer:?}");
    }
    registry.leased("c", "f", 1);
    let config = registry.get("client/config/", &json!({ "client_name": "c", "server_name": "f" })).json();
    assert_eq!(config["subnet"]["allowed_ips"], "10.0.0.0/8, fd00::/64,192.0.2.1", "as it came");
    assert_eq!(registry.post("server/add/", &base).status, 201);
}

#[test]
fn names_are_kept_and_found_as_they_came() {
    with_each_store(|registry| {
        let names = [
            "a",
            "A",
            "%",
            "_",
            "a'b\"c`d",
            "é",
            "e\u{301}",
            "x y",
            "\\",
            "日本",
            &"ü".repeat(253),
            "a.b",
            "'; DROP TABLE servers; --",
        ];
        for (n, name) in names.iter().enumerate() {
            registry.add_server(name, &format!("10.0.{n}.0"), 24, 0);
        }
        for (n, name) in names.iter().enumerate() {
            let own = registry.get("server/wireguard_ip/", &json!({ "server_name": name })).json();
            assert_eq!(own["server_wg_ip"], format!("10.0.{n}.1"), "{name}");
            assert_eq!(
                registry.leased(&name.replacen('ü', "/", 1), "a", u32::try_from(n).unwrap()),
                format!("10.0.0.{}", n + 2)[..].to_owned()
            );
        }
        let listed = registry.get("server/list_all", &json!({})).json();
        assert!(names.iter().all(|name| listed.get(*name).is_some()), "{listed}");
        registry.post("client/delete/", &json!({ "client_name": "%" }));
        assert_eq!(registry.get("client/list_all", &json!({})).json().as_object().unwrap().len(), names.len() - 1);
    });
}

#[test]
fn wa18_what_another_server_has_is_refused() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        let before = registry.everything();
        let other = server("s2", "192.168.4.0", 24, 20);
        let networks =
            [("192.168.2.0", 24), ("192.168.0.0", 16), ("192.168.2.128", 25), ("192.168.2.0", 30), ("128.0.0.0", 1)];
        let mut conflicts = vec![
            (with(&other, "server_name", json!("s1")), "server_name"),
            (with(&other, "public_key", server("s1", "192.168.2.0", 24, 20)["public_key"].clone()), "public_key"),
        ];
        conflicts.extend(networks.map(|(network, mask)| {
            (
                with(
                    &with(&with(&other, "network_address", json!(network)), "network_mask", json!(mask)),
                    "n_reserved_ips",
                    json!(0),
                ),
                "network_address",
            )
        }));
        for (fields, field) in conflicts {
            let answer = registry.post("server/add/", &fields);
            assert_eq!((answer.status, answer.json()["error"]["field"].as_str()), (409, Some(field)), "{fields}");
        }
        assert_eq!(registry.everything(), before);
        registry.add_server("s3", "192.168.3.0", 24, 20);
        registry.add_server("s6", "fd00::", 64, 20);
        registry.add_client("c1", "s1", 1);
        let of_client = with(&other, "public_key", client("c1", "s1", 1)["public_key"].clone());
        assert_eq!(registry.post("server/add/", &of_client).status, 409, "a client has the key");
    });
}

#[test]
fn wa19_a_bad_key_is_found_before_an_unknown_server() {
    with_each_store(|registry| {
        assert_eq!(registry.add_client("c1", "nowhere", 1), 404);
        assert_refused(
            registry,
            "client/add/",
            &with(&client("c1", "nowhere", 1), "public_key", json!("x")),
            "public_key",
        );
    });
}
