//! A broker with a registry, and calls of its API.

use std::fs;

use serde_json::{Value, json};
use wgkex_tests::http::{Http, Response};
use wgkex_tests::key;
use wgkex_tests::postgres::{self, Database};
use wgkex_tests::stack::{Bus, Plan, Stack};

/// `admin:s3cret`.
pub const LOGIN: &str = "Authorization: Basic YWRtaW46czNjcmV0";
const JSON: &str = "Content-Type: application/json;";

/// The storage of the tables.
#[derive(Debug, Clone)]
pub enum Store {
    Sqlite,
    Postgres(Database),
}

/// The routes, without the slash at the end: those that only read, and those that change something.
pub const READS: [&str; 6] =
    ["client/list_all", "server/list_all", "server/config", "server/wireguard_ip", "server/exists", "client/config"];
pub const CHANGES: [&str; 5] = ["server/add", "client/add", "client/delete", "server/delete", "server/remove_peer"];

/// A broker with a registry.
pub struct RegistryBroker {
    pub stack: Stack,
}

/// Runs a test with either store.
pub fn with_each_store(test: impl Fn(&mut RegistryBroker)) {
    for store in [Store::Sqlite, Store::Postgres(postgres::database())] {
        test(&mut RegistryBroker::start(&store, ""));
    }
}

impl RegistryBroker {
    /// A broker, with more of `registry` in its config, that is ready.
    pub fn start(store: &Store, more: &str) -> Self {
        let mut registry = Self::prepare(store, more);
        registry.stack.start_broker();
        registry.stack.wait_until_ready();
        registry
    }

    pub fn prepare(store: &Store, more: &str) -> Self {
        let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
        let dir = stack.dir().to_owned();
        fs::write(dir.join("password"), "s3cret\n").unwrap();
        fs::write(dir.join("store.password"), postgres::PASSWORD).unwrap();
        let dir = dir.display();
        let storage = match store {
            Store::Sqlite => String::new(),
            Store::Postgres(database) => {
                format!("storage: {}\nstorage_password_file: {dir}/store.password\n", database.url)
            }
        };
        stack.plan.config = format!("{storage}registry: {{enabled: true, password_file: {dir}/password, {more}}}\n");
        stack.write_config();
        Self { stack }
    }

    /// A broker that is ready, whose bus is another program.
    pub fn on_mosquitto(store: &Store) -> Self {
        let mut registry = Self::prepare(store, "");
        registry.stack.plan.bus = Bus::Mosquitto;
        registry.stack.start_mosquitto();
        registry.stack.write_config();
        registry.stack.start_broker();
        registry.stack.wait_until_ready();
        registry
    }

    /// A broker of this name that is ready, on the bus of the first one; without a first one, on its own bus. Needs
    /// root.
    pub fn on_bus(store: &Store, name: &str, first: Option<&Self>) -> Self {
        let mut registry = Self::prepare(store, "");
        let config = std::mem::take(&mut registry.stack.plan.config);
        registry.stack.plan = Plan::new(Bus::Mosquitto).config(&config).host_name(name);
        match first {
            Some(first) => registry.stack.mqtt = first.stack.mqtt,
            None => registry.stack.start_mosquitto(),
        }
        registry.stack.write_config();
        registry.stack.start_broker();
        registry.stack.wait_until_ready();
        registry
    }

    pub fn restart_by(&mut self, signal: nix::sys::signal::Signal) {
        let _ = self.stack.broker().end_by(signal);
        self.stack.start_broker();
        self.stack.wait_until_ready();
    }

    pub fn connect(&self) -> Caller {
        Caller(self.stack.connect())
    }

    pub fn get(&self, route: &str, fields: &Value) -> Response {
        self.connect().get(route, fields)
    }

    pub fn post(&self, route: &str, fields: &Value) -> Response {
        self.connect().post(route, fields)
    }

    /// Adds a server with an endpoint in the documentation's addresses, and fails if that is refused.
    pub fn add_server(&self, name: &str, network: &str, mask: u8, reserved: u64) {
        let added = self.post("server/add/", &server(name, network, mask, reserved));
        assert_eq!((added.status, added.body.as_str()), (201, ""), "{name}");
    }

    pub fn add_client(&self, name: &str, server: &str, number: u32) -> u16 {
        self.post("client/add/", &client(name, server, number)).status
    }

    /// The address that a client has at a server.
    pub fn lease(&self, name: &str, server: &str) -> Option<String> {
        let config = self.get("client/config/", &json!({ "client_name": name, "server_name": server }));
        (config.status == 200).then(|| config.json()["subnet"]["lease"].as_str().unwrap().to_owned())
    }

    /// Adds a client, and returns its address.
    pub fn leased(&self, name: &str, server: &str, number: u32) -> String {
        assert_eq!(self.add_client(name, server, number), 201, "{name} at {server}");
        self.lease(name, server).unwrap()
    }

    /// All readable data.
    pub fn everything(&self) -> Value {
        let [clients, servers] = ["client/list_all", "server/list_all"].map(|route| self.get(route, &json!({})).json());
        json!({ "clients": clients, "servers": servers })
    }
}

/// A connection with the right user and password.
pub struct Caller(pub Http);

impl Caller {
    pub fn get(&mut self, route: &str, fields: &Value) -> Response {
        self.0.request("GET", &format!("/api/v1/{route}"), &[LOGIN, JSON], fields.to_string().as_bytes())
    }

    pub fn post(&mut self, route: &str, fields: &Value) -> Response {
        self.0.request("POST", &format!("/api/v1/{route}"), &[LOGIN, JSON], fields.to_string().as_bytes())
    }
}

/// The fields of a server, whose key has a number by its name.
pub fn server(name: &str, network: &str, mask: u8, reserved: u64) -> Value {
    let number = name.bytes().fold(1_000_000, |number: u32, byte| number.wrapping_mul(31).wrapping_add(byte.into()));
    json!({
        "server_name": name,
        "network_address": network,
        "network_mask": mask,
        "public_key": key(number | 1 << 31),
        "endpoint_address": "203.0.113.5",
        "endpoint_port": 5128,
        "n_reserved_ips": reserved,
        "allowed_ips": format!("{network}/{mask}"),
    })
}

/// The fields of a client.
pub fn client(name: &str, server: &str, number: u32) -> Value {
    json!({ "client_name": name, "server_name": server, "public_key": key(number) })
}

/// The fields with another value of one of them.
pub fn with(fields: &Value, field: &str, value: Value) -> Value {
    let mut fields = fields.clone();
    fields[field] = value;
    fields
}
