//! The command `client import`: the clients of a `wireguard_api` broker, with their addresses, read by its own calls.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::{Value, json};
use ureq::Agent;
use wgkex_common::config::password_in;
use wgkex_common::http::client::agent;

use crate::cli::http_client::BROKER_TIMEOUT;
use crate::cli::registry_json::{addresses_by_key, peerings, text_of};

/// The largest answer, in bytes.
const ANSWER_MAX: u64 = 64 << 20;

/// Where clients come from.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The URL of the other broker, with its port
    url: String,
    /// The user there
    #[arg(long, default_value = "admin")]
    user: String,
    /// The file with the password there
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,
    /// Removes the clients that the other broker does not have, from the servers that both have
    #[arg(long)]
    pub(super) prune: bool,
}

/// The other broker.
pub struct OtherRegistry {
    url: String,
    authorization: String,
    agent: Agent,
}

/// The clients and servers of the other broker.
pub struct OtherClients {
    /// The fields of `client/add` for each client with an address, which it is to have here, too.
    pub new: Vec<Value>,
    /// The names of its servers.
    servers: BTreeSet<String>,
    /// The name of each client with that of its server, with an address or without one.
    peerings: BTreeSet<(String, String)>,
}

impl OtherClients {
    /// Those of the clients here that are not there, with the name of the server, which is there.
    pub fn missing<'a>(&self, clients: &'a Value) -> Vec<(&'a str, &'a str)> {
        let here = peerings(clients).map(|(name, peering)| (name, text_of(&peering["server"])));
        let is_missing = |(name, server): &(&str, &str)| {
            self.servers.contains(*server) && !self.peerings.contains(&((*name).to_owned(), (*server).to_owned()))
        };
        here.filter(is_missing).collect()
    }
}

impl ImportArgs {
    /// The broker that they name.
    pub fn open(self) -> anyhow::Result<OtherRegistry> {
        let Self { url, user, password_file, prune: _ } = self;
        ensure!(url.starts_with("http://"), "{url} must begin with http://: that broker has no HTTPS of its own");
        let password = password_in(&password_file);
        let password = password.map_err(anyhow::Error::msg).with_context(|| password_file.display().to_string())?;
        let authorization = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        Ok(OtherRegistry { url: url.trim_end_matches('/').to_owned(), authorization, agent: agent(BROKER_TIMEOUT) })
    }
}

impl OtherRegistry {
    /// Its clients.
    pub fn clients(&self) -> anyhow::Result<OtherClients> {
        let of_all = self.get("server/list_all", &json!({}))?;
        let clients = self.get("client/list_all", &json!({}))?;
        let servers: BTreeSet<_> = peerings(&clients).map(|(_, peering)| text_of(&peering["server"])).collect();
        let addresses = servers.into_iter().map(|server| {
            let config = self.get("server/config/", &json!({ "server_name": server }))?;
            Ok((server, addresses_by_key(&config)))
        });
        let addresses: BTreeMap<_, _> = addresses.collect::<anyhow::Result<_>>()?;
        let peering = |(name, peering): (&str, &Value)| (name.to_owned(), text_of(&peering["server"]).to_owned());
        Ok(OtherClients {
            new: peerings(&clients).filter_map(|(name, peering)| new_client(name, peering, &addresses)).collect(),
            servers: of_all.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect(),
            peerings: peerings(&clients).map(peering).collect(),
        })
    }

    /// The other broker expects JSON in the body of a GET, and reports errors by the status alone.
    fn get(&self, route: &str, fields: &Value) -> anyhow::Result<Value> {
        let url = format!("{}/api/v1/{route}", self.url);
        let request = self.agent.get(&url).header("Authorization", &self.authorization);
        let request = request.header("Content-Type", "application/json").force_send_body();
        let answer = request.send(fields.to_string()).map_err(ureq::Error::into_io);
        let mut answer = answer.with_context(|| format!("no broker answers at {url}"))?;
        if answer.status() != 200 {
            bail!("{url} answers {}: are user and password right?", answer.status());
        }
        let text = answer.body_mut().with_config().limit(ANSWER_MAX).read_to_string().map_err(ureq::Error::into_io)?;
        serde_json::from_str(&text).with_context(|| format!("what {url} answers is not JSON"))
    }
}

/// None for a client without an address: the original keeps clients for which it had no room.
fn new_client(name: &str, peering: &Value, addresses: &BTreeMap<&str, BTreeMap<String, String>>) -> Option<Value> {
    let [server, key] = ["server", "public_key"].map(|field| text_of(&peering[field]));
    let lease = addresses.get(server)?.get(key)?;
    Some(json!({ "client_name": name, "server_name": server, "public_key": key, "lease": lease }))
}
