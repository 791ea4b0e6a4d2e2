//! The commands `server` and `client`: calls of the registry on this machine's broker, with user and password of the config.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use ipnet::IpNet;
use qrcode::QrCode;
use qrcode::render::unicode::Dense1x2;
use serde_json::{Value, json};
use wgkex_common::Config;
use wgkex_common::config::Listen;
use wgkex_common::style::Style;

use crate::cli::http_client::{BROKER_TIMEOUT, BrokerCall, BrokerClient};
use crate::cli::import::{ImportArgs, OtherClients};
use crate::cli::print_or_complain;
use crate::cli::registry_json::{addresses_by_key, peerings, text_of};
use crate::cli::table::{Cell, table};
use crate::registry::login::password;

/// The exit codes.
const ENDS: &str =
    "Exits with 0, or with 1 if the broker cannot be reached or refuses the call. Needs registry.password_file.";
/// The placeholder of a private key that is not given.
const NO_PRIVATE_KEY: &str = "PRIVATE_KEY_OF_THE_CLIENT";

/// What an operator does about the servers of the registry.
#[derive(Debug, Subcommand)]
#[command(after_help = ENDS)]
pub enum ServerCommand {
    /// Adds a server, whose clients lease addresses of its network
    #[command(after_help = ENDS)]
    Add(ServerArgs),
    /// Shows all servers
    #[command(after_help = ENDS)]
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows a server, its own address and its clients
    #[command(after_help = ENDS)]
    Show {
        /// The server's name
        name: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Removes a server with all its leases
    #[command(after_help = ENDS)]
    Delete {
        /// The server's name
        name: String,
    },
}

/// A server to be added.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// The server's name
    name: String,
    /// Its WireGuard public key
    #[arg(long)]
    key: String,
    /// The network of its addresses, as 192.168.2.0/24; the first one is its own
    #[arg(long)]
    network: IpNet,
    /// The addresses after the network's that no client gets
    #[arg(long, default_value_t = 0)]
    reserved: u64,
    /// Where clients reach it: a host name or an address
    #[arg(long, value_name = "HOST")]
    endpoint: String,
    /// Its UDP port
    #[arg(long, default_value_t = 51820)]
    port: u16,
    /// What clients send to it, separated by commas, as 192.168.2.0/24; its network if left out
    #[arg(long, value_name = "NETWORKS")]
    allowed_ips: Option<String>,
}

/// What an operator does about the clients of the registry.
#[derive(Debug, Subcommand)]
#[command(after_help = ENDS)]
pub enum ClientCommand {
    /// Gives a client an address at a server, or another key there
    #[command(after_help = ENDS)]
    Add {
        /// The client's name
        name: String,
        /// The server's name
        #[arg(long)]
        server: String,
        /// The client's WireGuard public key
        #[arg(long)]
        key: String,
    },
    /// Adds the clients of another registry, such as a `wireguard_api` broker, with the addresses that they have there
    #[command(after_help = ENDS)]
    Import(ImportArgs),
    /// Shows all clients
    #[command(after_help = ENDS)]
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Shows what a client has to know to reach a server
    #[command(after_help = ENDS)]
    Show(ShowClient),
    /// Removes a client from all servers
    #[command(after_help = ENDS)]
    Delete {
        /// The client's name
        name: String,
        /// Only from this server
        #[arg(long)]
        server: Option<String>,
    },
}

/// How a client is shown.
#[derive(Debug, Args)]
pub struct ShowClient {
    /// The client's name
    name: String,
    /// The server's name
    #[arg(long)]
    server: String,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// As a file for wg-quick
    #[arg(long, conflicts_with = "json")]
    wg_quick: bool,
    /// As a code that the WireGuard app of a telephone reads
    #[arg(long, conflicts_with_all = ["json", "wg_quick"], requires = "private_key_file")]
    qr: bool,
    /// The file with the client's private key, for --wg-quick and --qr; it stays on this machine
    #[arg(long, value_name = "FILE")]
    private_key_file: Option<PathBuf>,
}

impl ServerCommand {
    /// Makes the call, and returns the exit code.
    #[must_use]
    pub fn run(self, file: Option<&Path>) -> ExitCode {
        print_or_complain(RegistryClient::open(file).and_then(|client| self.text(&client)))
    }

    fn text(self, client: &RegistryClient) -> anyhow::Result<String> {
        match self {
            Self::Add(new) => {
                let (name, note) = (new.name.clone(), new.note());
                client.call("server/add", &new.fields())?;
                let own = client.call("server/wireguard_ip", &json!({ "server_name": name }))?;
                Ok(format!("server {name} is added, its own address is {}\n{note}", text_of(&own["server_wg_ip"])))
            }
            Self::List { json } => {
                let servers = client.call("server/list_all", &json!({}))?;
                Ok(if json { format!("{servers:#}\n") } else { servers_table(&servers) })
            }
            Self::Show { name, json } => client.show_server(&name, json),
            Self::Delete { name } => {
                client.call("server/exists", &json!({ "server_name": name }))?;
                client.call("server/delete", &json!({ "server_name": name }))?;
                Ok(format!("server {name} is deleted, with all its leases\n"))
            }
        }
    }
}

impl ServerArgs {
    /// The note about such a server.
    fn note(&self) -> &'static str {
        let is_ipv4 = matches!(self.network, IpNet::V4(_)) && self.endpoint.parse::<Ipv6Addr>().is_err();
        if is_ipv4 { "" } else { "note: agents of wireguard_api cannot use it, they know IPv4 alone\n" }
    }

    fn fields(self) -> Value {
        let Self { name, key, network, reserved, endpoint, port, allowed_ips } = self;
        json!({
            "server_name": name,
            "public_key": key,
            "network_address": network.addr(),
            "network_mask": network.prefix_len(),
            "n_reserved_ips": reserved,
            "endpoint_address": endpoint,
            "endpoint_port": port,
            "allowed_ips": allowed_ips.unwrap_or_else(|| network.to_string()),
        })
    }
}

impl ClientCommand {
    /// Makes the call, and returns the exit code.
    #[must_use]
    pub fn run(self, file: Option<&Path>) -> ExitCode {
        print_or_complain(RegistryClient::open(file).and_then(|client| self.text(&client)))
    }

    fn text(self, client: &RegistryClient) -> anyhow::Result<String> {
        match self {
            Self::Add { name, server, key } => {
                let fields = json!({ "client_name": name, "server_name": server, "public_key": key });
                client.call("client/add", &fields)?;
                let config = client.client_config(&name, &server)?;
                Ok(format!("client {name} has the address {} at {server}\n", text_of(&config["subnet"]["lease"])))
            }
            Self::Import(origin) => {
                let prunes = origin.prune;
                client.import(&origin.open()?.clients()?, prunes)
            }
            Self::List { json } => {
                let clients = client.call("client/list_all", &json!({}))?;
                if json { Ok(format!("{clients:#}\n")) } else { client.clients_table(&clients) }
            }
            Self::Show(show) => show.text(client),
            Self::Delete { name, server: None } => {
                client.call("client/delete", &json!({ "client_name": name }))?;
                Ok(format!("client {name} has no lease any more\n"))
            }
            Self::Delete { name, server: Some(server) } => {
                client.call("server/remove_peer", &json!({ "client_name": name, "server_name": server }))?;
                Ok(format!("client {name} has no lease at {server} any more\n"))
            }
        }
    }
}

impl ShowClient {
    fn text(&self, client: &RegistryClient) -> anyhow::Result<String> {
        let config = client.client_config(&self.name, &self.server)?;
        if self.json {
            return Ok(format!("{config:#}\n"));
        }
        let private_key = self.private_key()?;
        let file = wg_quick(&config, private_key.as_deref().unwrap_or(NO_PRIVATE_KEY));
        if self.wg_quick {
            return Ok(file);
        }
        if self.qr {
            let code = QrCode::new(file).context("the config is too long for a code")?;
            return Ok(code.render::<Dense1x2>().build() + "\n");
        }
        let [server, subnet] = [&config["server"], &config["subnet"]];
        Ok(format!(
            "address      {}\nserver       {}\nserver key   {}\nallowed-ips  {}\n",
            text_of(&subnet["lease"]),
            endpoint(server),
            text_of(&server["public_key"]),
            text_of(&subnet["allowed_ips"]),
        ))
    }

    fn private_key(&self) -> anyhow::Result<Option<String>> {
        let read = |file: &PathBuf| {
            let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let key = text.strip_suffix('\n').unwrap_or(&text);
            let is_key = STANDARD.decode(key).is_ok_and(|key| key.len() == 32);
            ensure!(
                is_key,
                "{} must have one line with a WireGuard private key, as wg genkey prints it",
                file.display()
            );
            Ok(key.to_owned())
        };
        self.private_key_file.as_ref().map(read).transpose()
    }
}

/// This machine's broker, as the user of the registry.
struct RegistryClient(BrokerClient);

impl RegistryClient {
    fn open(file: Option<&Path>) -> anyhow::Result<Self> {
        let config = Config::load(file)?;
        let Some(registry) = &config.registry else {
            bail!("registry.enabled is not true in the config, so the broker has no registry");
        };
        let password = password(registry)?;
        Ok(Self(BrokerClient::for_registry(&config, &registry.user, &password, BROKER_TIMEOUT)))
    }

    fn call(&self, route: &str, fields: &Value) -> anyhow::Result<Value> {
        self.0.send(BrokerCall::post(&format!("/api/v1/{route}"), fields))
    }

    fn client_config(&self, client: &str, server: &str) -> anyhow::Result<Value> {
        self.call("client/config", &json!({ "client_name": client, "server_name": server }))
    }

    /// The addresses are requested from each server.
    fn clients_table(&self, clients: &Value) -> anyhow::Result<String> {
        let servers: BTreeSet<_> = peerings(clients).map(|(_, peering)| text_of(&peering["server"])).collect();
        let addresses = servers.into_iter().map(|server| Ok((server, self.addresses(server)?)));
        Ok(clients_table(clients, &addresses.collect::<anyhow::Result<_>>()?))
    }

    /// The addresses of a server's clients, by key.
    fn addresses(&self, server: &str) -> anyhow::Result<BTreeMap<String, String>> {
        Ok(addresses_by_key(&self.call("server/config", &json!({ "server_name": server }))?))
    }

    /// Adds clients, and names those that cannot be. Those that are not there are removed before that, as others may have their
    /// addresses there, or are named.
    fn import(&self, origin: &OtherClients, prunes: bool) -> anyhow::Result<String> {
        let here = self.call("client/list_all", &json!({}))?;
        let missing = origin.missing(&here);
        if prunes {
            for (name, server) in &missing {
                self.call("server/remove_peer", &json!({ "client_name": name, "server_name": server }))?;
            }
        }
        let missing = missing_text(&missing, prunes);
        match self.add_all(&origin.new) {
            Ok(added) => Ok(added + &missing),
            Err(error) => bail!("{error}\n{}", missing.trim_end()),
        }
    }

    fn add_all(&self, clients: &[Value]) -> anyhow::Result<String> {
        let add = |client: &Value| {
            let error = self.call("client/add", client).err()?;
            let [name, server, lease] = ["client_name", "server_name", "lease"].map(|field| text_of(&client[field]));
            Some(format!("{name} with {lease} at {server}: {error}"))
        };
        let refused: Vec<_> = clients.iter().filter_map(add).collect();
        ensure!(
            refused.is_empty(),
            "{} of {} clients are not added:\n{}",
            refused.len(),
            clients.len(),
            refused.join("\n")
        );
        Ok(format!("{} clients have the addresses that they have there\n", clients.len()))
    }

    fn show_server(&self, name: &str, is_json: bool) -> anyhow::Result<String> {
        let fields = json!({ "server_name": name });
        let own = self.call("server/wireguard_ip", &fields)?;
        let peers = self.call("server/config", &fields)?;
        let servers = self.call("server/list_all", &json!({}))?;
        let server = &servers[name];
        if is_json {
            let shown = json!({ "server": server, "server_wg_ip": own["server_wg_ip"], "peers": peers["peers"] });
            return Ok(format!("{shown:#}\n"));
        }
        let peers: Vec<_> = peers["peers"].as_array().into_iter().flatten().map(peer_row).collect();
        Ok(format!(
            "address   {}\nendpoint  {}\nkey       {}\n\n{}",
            text_of(&own["server_wg_ip"]),
            endpoint(server),
            text_of(&server["public_key"]),
            table(["ADDRESS", "CLIENT'S KEY"], &peers, Style::of_stdout()),
        ))
    }
}

/// The text about the clients that the other broker does not have.
fn missing_text(missing: &[(&str, &str)], are_removed: bool) -> String {
    let (count, names) = (missing.len(), missing.iter().map(|(name, server)| format!("{name} at {server}\n")));
    let what = match (count, are_removed) {
        (0, _) => return String::new(),
        (_, true) => format!("{count} clients are not there, and are removed here:\n"),
        (_, false) => format!("{count} clients are not there, and stay here; --prune removes them:\n"),
    };
    what + &names.collect::<String>()
}

fn peer_row(peer: &Value) -> [Cell; 2] {
    ["ip_address", "public_key"].map(|field| Cell::text(text_of(&peer[field])))
}

fn servers_table(servers: &Value) -> String {
    let row = |(name, server): (&String, &Value)| {
        [Cell::text(name), Cell::text(&endpoint(server)), Cell::text(text_of(&server["public_key"]))]
    };
    let rows: Vec<_> = servers.as_object().into_iter().flatten().map(row).collect();
    table(["SERVER", "ENDPOINT", "KEY"], &rows, Style::of_stdout())
}

/// With the addresses by server and key.
fn clients_table(clients: &Value, addresses: &BTreeMap<&str, BTreeMap<String, String>>) -> String {
    let row = |(name, peering): (&str, &Value)| {
        let [server, key] = ["server", "public_key"].map(|field| text_of(&peering[field]));
        let address = addresses.get(server).and_then(|of_server| of_server.get(key));
        [name, server, address.map_or("-", String::as_str), key].map(Cell::text)
    };
    let rows: Vec<_> = peerings(clients).map(row).collect();
    table(["CLIENT", "SERVER", "ADDRESS", "KEY"], &rows, Style::of_stdout())
}

/// The file that `wg-quick` reads (wg-quick(8)).
fn wg_quick(config: &Value, private_key: &str) -> String {
    let [server, subnet] = [&config["server"], &config["subnet"]];
    let mut file = String::from("[Interface]\n");
    let _ = writeln!(file, "PrivateKey = {private_key}");
    let _ = writeln!(file, "Address = {}", text_of(&subnet["lease"]));
    let _ = writeln!(file, "\n[Peer]\nPublicKey = {}", text_of(&server["public_key"]));
    let _ = writeln!(file, "AllowedIPs = {}", text_of(&subnet["allowed_ips"]));
    let _ = writeln!(file, "Endpoint = {}", endpoint(server));
    file
}

/// Host and port.
fn endpoint(server: &Value) -> String {
    let port = server["endpoint_port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or_default();
    Listen { host: text_of(&server["endpoint_address"]).to_owned(), port }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Value {
        json!({
            "server": { "endpoint_address": "2001:db8::1", "endpoint_port": 5128, "public_key": "K=" },
            "subnet": { "allowed_ips": "192.168.2.0/24", "lease": "192.168.2.21" },
        })
    }

    #[test]
    fn a_clients_config_is_a_file_for_wg_quick() {
        let expected = "[Interface]\nPrivateKey = P=\nAddress = 192.168.2.21\n\n[Peer]\nPublicKey = K=\n\
                        AllowedIPs = 192.168.2.0/24\nEndpoint = [2001:db8::1]:5128\n";
        assert_eq!(wg_quick(&config(), "P="), expected);
    }

    #[test]
    fn the_lists_are_tables() {
        let servers = json!({ "s1": { "endpoint_address": "gw", "endpoint_port": 1, "public_key": "K=" } });
        assert_eq!(servers_table(&servers), "SERVER  ENDPOINT  KEY\ns1      gw:1      K=\n");
        let clients = json!({ "c1": { "1": { "public_key": "K=", "server": "s1" } }, "c2": {} });
        let addresses = [("s1", [("K=".to_owned(), "10.0.0.2".to_owned())].into())].into();
        let shown = |address| format!("CLIENT  SERVER  ADDRESS   KEY\nc1      s1      {address}  K=\n");
        assert_eq!(clients_table(&clients, &addresses), shown("10.0.0.2"));
        let gone = clients_table(&clients, &BTreeMap::new());
        assert_eq!(gone, "CLIENT  SERVER  ADDRESS  KEY\nc1      s1      -        K=\n");
    }
}
