//! The commands `server` and `client`.

use serde_json::{Value, json};
use wgkex_tests::key;

use crate::registry_broker::{RegistryBroker, Store};

/// The output of a command of the broker if it succeeds; else its errors.
fn run(registry: &RegistryBroker, arguments: &[&str]) -> Result<String, String> {
    let mut process = registry.stack.program("wgkex-broker", arguments);
    let status = process.wait();
    if status.success() { Ok(process.log()) } else { Err(process.log()) }
}

#[test]
fn servers_and_clients_are_managed_by_commands() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    let (server_key, client_key) = (key(1), key(2));
    let add = [
        "server",
        "add",
        "s1",
        "--key",
        &server_key,
        "--network",
        "192.168.2.0/24",
        "--reserved",
        "20",
        "--endpoint",
        "gw.example.org",
        "--port",
        "5128",
    ];
    assert_eq!(run(&registry, &add).unwrap(), "server s1 is added, its own address is 192.168.2.1\n");
    assert!(run(&registry, &add).unwrap_err().contains("there is a server of this name already"));
    let add = ["client", "add", "c1", "--server", "s1", "--key", &client_key];
    assert_eq!(run(&registry, &add).unwrap(), "client c1 has the address 192.168.2.21 at s1\n");
    let listed: Value = serde_json::from_str(&run(&registry, &["server", "list", "--json"]).unwrap()).unwrap();
    assert_eq!(listed, registry.get("server/list_all", &json!({})).json());
    let table = run(&registry, &["client", "list"]).unwrap();
    let row = format!("c1      s1      192.168.2.21  {client_key}\n");
    assert_eq!(table, format!("CLIENT  SERVER  ADDRESS       KEY\n{row}"));
    let shown = run(&registry, &["server", "show", "s1"]).unwrap();
    assert!(
        shown.contains("address   192.168.2.1\nendpoint  gw.example.org:5128\n") && shown.contains(&client_key),
        "{shown}"
    );
    let private_key = key(77);
    std::fs::write(registry.stack.dir().join("private"), format!("{private_key}\n")).unwrap();
    let private = registry.stack.dir().join("private").display().to_string();
    let show = ["client", "show", "c1", "--server", "s1"];
    let file = run(&registry, &[&show[..], &["--wg-quick", "--private-key-file", &private]].concat()).unwrap();
    let expected = format!(
        "[Interface]\nPrivateKey = {private_key}\nAddress = 192.168.2.21\n\n[Peer]\nPublicKey = {server_key}\n\
         AllowedIPs = 192.168.2.0/24\nEndpoint = gw.example.org:5128\n"
    );
    assert_eq!(file, expected);
    std::fs::write(registry.stack.dir().join("other"), format!("{private_key}\nPostUp = true\n")).unwrap();
    let other = registry.stack.dir().join("other").display().to_string();
    let refused = run(&registry, &[&show[..], &["--wg-quick", "--private-key-file", &other]].concat());
    assert!(refused.unwrap_err().contains("must have one line with a WireGuard private key"));
    let code = run(&registry, &[&show[..], &["--qr", "--private-key-file", &private]].concat()).unwrap();
    assert!(code.lines().count() > 15 && code.contains('█'), "{code}");
    let text = run(&registry, &show).unwrap();
    assert!(text.contains("address      192.168.2.21\n"), "{text}");
    assert!(run(&registry, &["client", "show", "c2", "--server", "s1"]).unwrap_err().contains("no lease"));
    run(&registry, &["client", "delete", "c1", "--server", "s1"]).unwrap();
    assert_eq!(registry.lease("c1", "s1"), None);
    run(&registry, &["server", "delete", "s1"]).unwrap();
    let note = "note: agents of wireguard_api cannot use it, they know IPv4 alone\n";
    for (network, endpoint, own) in
        [("fd00::/64", "gw.example.org", "fd00::1"), ("192.168.3.0/24", "2001:db8::1", "192.168.3.1")]
    {
        let add = ["server", "add", "s6", "--key", &server_key, "--network", network, "--endpoint", endpoint];
        assert_eq!(run(&registry, &add).unwrap(), format!("server s6 is added, its own address is {own}\n{note}"));
        run(&registry, &["server", "delete", "s6"]).unwrap();
    }
    assert!(run(&registry, &["server", "delete", "s1"]).unwrap_err().contains("no server of this name"));
}

#[test]
fn clients_of_another_registry_are_imported_with_their_addresses() {
    let [origin, registry] = [(); 2].map(|()| RegistryBroker::start(&Store::Sqlite, ""));
    for registry in [&origin, &registry] {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        registry.add_server("s2", "192.168.3.0", 24, 20);
    }
    for (name, server, number) in [("c1", "s1", 1), ("c2", "s1", 2), ("c3", "s1", 3), ("c2", "s2", 2), ("c3", "s2", 3)]
    {
        origin.leased(name, server, number);
    }
    origin.post("client/delete/", &json!({ "client_name": "c2" }));
    let password = origin.stack.dir().join("password").display().to_string();
    let url = format!("http://{}", origin.stack.http);
    let import = ["client", "import", &url, "--password-file", &password];
    let config = |registry: &RegistryBroker, server: &str| {
        registry.get("server/config", &json!({ "server_name": server })).json()
    };
    for _ in 0..2 {
        assert_eq!(run(&registry, &import).unwrap(), "3 clients have the addresses that they have there\n");
        for server in ["s1", "s2"] {
            assert_eq!(config(&registry, server), config(&origin, server));
            assert_eq!(registry.lease("c3", server), origin.lease("c3", server));
        }
    }
    // A client that cannot be added is named, and one that does not exist can be removed.
    registry.add_server("s3", "192.168.4.0", 24, 20);
    registry.leased("c9", "s3", 9);
    registry.leased("c9", "s1", 9);
    let named = "3 clients have the addresses that they have there\n1 clients are not there, and stay here; --prune removes them:\n";
    assert_eq!(run(&registry, &import).unwrap(), format!("{named}c9 at s1\n"));
    origin.leased("c4", "s1", 4);
    let refused = run(&registry, &import).unwrap_err();
    let named = "1 of 4 clients are not added:\nc4 with 192.168.2.22 at s1: another client has this address";
    assert!(refused.contains(named), "{refused}");
    let prune = [&import[..], &["--prune"]].concat();
    let named = "4 clients have the addresses that they have there\n1 clients are not there, and are removed here:\n";
    assert_eq!(run(&registry, &prune).unwrap(), format!("{named}c9 at s1\n"));
    assert_eq!(config(&registry, "s1"), config(&origin, "s1"));
    assert!(registry.lease("c9", "s3").is_some(), "that server is not there");
    assert_eq!(run(&registry, &prune).unwrap(), "4 clients have the addresses that they have there\n");
    std::fs::write(origin.stack.dir().join("wrong"), "wr0ng\n").unwrap();
    let wrong = origin.stack.dir().join("wrong").display().to_string();
    let refused = run(&registry, &["client", "import", &url, "--password-file", &wrong]).unwrap_err();
    assert!(refused.contains("are user and password right?"), "{refused}");
}

#[test]
fn a_command_names_what_is_missing() {
    let mut registry = RegistryBroker::prepare(&Store::Sqlite, "");
    assert!(run(&registry, &["client", "list"]).unwrap_err().contains("no broker answers"));
    registry.stack.plan.config = String::new();
    registry.stack.write_config();
    assert!(run(&registry, &["client", "list"]).unwrap_err().contains("registry.enabled"));
}
