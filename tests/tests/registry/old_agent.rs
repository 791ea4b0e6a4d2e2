//! The agent of `wireguard_api`, simulated by its requests and the files that it writes: as a gateway it adds its
//! server and polls for its peers, as a client it leases an address at each of its servers.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};
use wgkex_tests::http::Response;
use wgkex_tests::key;

use crate::registry_broker::{LOGIN, RegistryBroker, Store, server, with_each_store};

/// The private key of a file that the agent writes; any key serves here.
const PRIVATE_KEY: &str = "6Hl7K8kyzNhCjJJlqlJjMGMPTzMMTX8RB1eDWMNJTH8=";

/// The request of Go's HTTP client for a call of the agent, on a connection of its own.
fn send(registry: &RegistryBroker, method: &str, route: &str, login: Option<&str>, fields: &Value) -> Response {
    let body = fields.to_string();
    let login = login.map(|login| format!("{login}\r\n")).unwrap_or_default();
    let head = format!(
        "{method} /api/v1/{route} HTTP/1.1\r\nHost: {}\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: {}\r\n{login}\
         Content-Type: application/json;\r\nAccept-Encoding: gzip\r\n\r\n",
        registry.stack.http,
        body.len()
    );
    let mut http = registry.stack.connect();
    http.send(&[head.as_bytes(), body.as_bytes()].concat());
    http.response(method)
}

fn get(registry: &RegistryBroker, route: &str, fields: &Value) -> Response {
    send(registry, "GET", route, Some(LOGIN), fields)
}

/// The agent of a gateway.
struct Gateway<'a> {
    registry: &'a RegistryBroker,
    /// The server in its config.
    server: Value,
    /// The answer of its last poll.
    polled: String,
}

impl<'a> Gateway<'a> {
    /// Starts as the agent does: it adds the server if that is unknown, and writes its own address.
    fn start(registry: &'a RegistryBroker, server: Value) -> (Self, String) {
        let name = json!({ "server_name": server["server_name"] });
        if get(registry, "server/exists/", &name).status != 200 {
            let added = send(registry, "POST", "server/add/", Some(LOGIN), &server);
            assert_eq!(added.status, 201, "{added:?}");
        }
        let own = get(registry, "server/wireguard_ip/", &name).json();
        let (port, mask) = (&server["endpoint_port"], &server["network_mask"]);
        let own = own["server_wg_ip"].as_str().unwrap();
        let interface =
            format!("[Interface]\nPrivateKey = {PRIVATE_KEY}\nListenPort = {port}\nAddress = {own}/{mask}\n");
        (Self { registry, server, polled: String::new() }, interface)
    }

    /// The peers that a poll writes; none if the answer is that of the last one.
    fn poll(&mut self) -> Option<String> {
        let answer = get(self.registry, "server/config/", &json!({ "server_name": self.server["server_name"] }));
        assert_eq!(answer.status, 200, "any other answer would take all peers away");
        if answer.body == self.polled {
            return None;
        }
        let config = answer.json();
        self.polled = answer.body;
        let peers = config["peers"].as_array().unwrap().iter().map(|peer| {
            let [address, key] = ["ip_address", "public_key"].map(|field| peer[field].as_str().unwrap());
            format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {address}/32\n")
        });
        Some(peers.collect())
    }
}

/// The file that the agent of a client writes for a server. Older ones request the config without a password.
fn lease(registry: &RegistryBroker, name: &str, server: &str, number: u32, login: Option<&str>) -> String {
    let new = json!({ "client_name": name, "server_name": server, "public_key": key(number) });
    let added = send(registry, "POST", "client/add/", Some(LOGIN), &new);
    assert_eq!((added.status, added.body.as_str()), (201, ""));
    let answer = send(registry, "GET", "client/config/", login, &json!({ "client_name": name, "server_name": server }));
    assert_eq!(answer.status, 200, "{answer:?}");
    let config = answer.json();
    let [server, subnet] = [&config["server"], &config["subnet"]];
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    format!(
        "[Interface]\nAddress = {}\nPrivateKey = {PRIVATE_KEY}\n[Peer]\nPublicKey = {}\nAllowedIPs = {}\nEndpoint = {}:{}\n",
        text(&subnet["lease"]),
        text(&server["public_key"]),
        text(&subnet["allowed_ips"]),
        text(&server["endpoint_address"]),
        server["endpoint_port"].as_u64().unwrap(),
    )
}

/// Checks that `wg-quick` accepts the text.
fn assert_is_config(registry: &RegistryBroker, text: &str) {
    let file = registry.stack.dir().join("s1.conf");
    fs::write(&file, text).unwrap();
    let output = Command::new("wg-quick").arg("strip").arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_old_agent_works_unchanged_as_a_gateway_and_as_a_client() {
    with_each_store(|registry| {
        let settings = server("s1", "192.168.2.0", 24, 20);
        let own_key = settings["public_key"].as_str().unwrap().to_owned();
        let (mut gateway, interface) = Gateway::start(registry, settings.clone());
        let expected =
            format!("[Interface]\nPrivateKey = {PRIVATE_KEY}\nListenPort = 5128\nAddress = 192.168.2.1/24\n");
        assert_eq!(interface, expected);
        assert_eq!((gateway.poll(), gateway.poll()), (Some(String::new()), None));

        let file = lease(registry, "laptop", "s1", 1, Some(LOGIN));
        let expected = format!(
            "[Interface]\nAddress = 192.168.2.21\nPrivateKey = {PRIVATE_KEY}\n[Peer]\nPublicKey = {own_key}\n\
             AllowedIPs = 192.168.2.0/24\nEndpoint = 203.0.113.5:5128\n"
        );
        assert_eq!(file, expected);
        assert_is_config(registry, &file);
        lease(registry, "phone", "s1", 2, Some(LOGIN));
        let peer = |number, last| format!("[Peer]\nPublicKey = {}\nAllowedIPs = 192.168.2.{last}/32\n", key(number));
        assert_eq!((gateway.poll(), gateway.poll()), (Some(peer(1, 21) + &peer(2, 22)), None));
        assert_is_config(registry, &(interface.clone() + &peer(1, 21) + &peer(2, 22)));

        // Clients without their file request again; a gateway that starts again finds its server.
        assert_eq!(lease(registry, "laptop", "s1", 1, Some(LOGIN)), expected);
        assert_eq!(gateway.poll(), None, "nothing is new");
        let (mut gateway, again) = Gateway::start(registry, settings);
        assert_eq!((again, gateway.poll()), (interface, Some(peer(1, 21) + &peer(2, 22))));
        let gone = send(registry, "POST", "client/delete/", Some(LOGIN), &json!({ "client_name": "laptop" }));
        assert_eq!((gone.status, gateway.poll()), (200, Some(peer(2, 22))));
    });
}

#[test]
fn an_older_agent_asks_for_its_config_without_a_password() {
    let registry = RegistryBroker::start(&Store::Sqlite, "open_client_config: true");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    assert!(lease(&registry, "laptop", "s1", 1, None).contains("Address = 192.168.2.21\n"));
}
