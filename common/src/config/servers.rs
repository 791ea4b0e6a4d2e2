//! The servers of the registry that this gateway is: `servers`.

use std::collections::BTreeMap;
use std::path::{Path as FilePath, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::diagnostics::{Diagnostics, Path};
use super::value::{Host, Net, Port, Text, Whole, port};

/// The longest name of an interface (`IFNAMSIZ` of linux/if.h, less the zero at its end).
const INTERFACE_MAX: usize = 15;
/// The requirement for the name of an interface.
pub(super) const INTERFACE_COMPLAINT: &str =
    "must be the name of an interface: 1 to 15 characters, without blanks and \"/\"";

/// A server: a WireGuard interface whose clients lease addresses from the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    /// The WireGuard interface.
    pub interface: String,
    /// The file of its private key.
    pub key_file: PathBuf,
    /// Its UDP port.
    pub listen_port: u16,
    /// The network of its addresses; the first one is its own.
    pub network: IpNet,
    /// The first addresses of the network, up to this number, are not leased.
    pub reserved: u64,
    /// The endpoint for clients; none for `externalName`.
    pub endpoint: Option<String>,
    /// The allowed-ips of clients for this server, separated by commas; none for `network`.
    pub allowed_ips: Option<String>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawServer {
    pub interface: Option<Text>,
    pub listen_port: Option<Port>,
    pub network: Option<Net>,
    pub reserved: Option<Whole>,
    pub endpoint: Option<Host>,
    pub allowed_ips: Option<Text>,
}

/// All servers; their key files are in `key_dir`.
pub(super) fn check(
    servers: BTreeMap<String, RawServer>,
    key_dir: &FilePath,
    diagnostics: &mut Diagnostics,
) -> BTreeMap<String, ServerSettings> {
    let check = |(name, raw): (String, RawServer)| {
        let path = Path::of("servers").then(&*name);
        let server = raw.check(&name, key_dir, &path, diagnostics)?;
        Some((name, server))
    };
    servers.into_iter().filter_map(check).collect()
}

impl RawServer {
    fn check(
        self,
        name: &str,
        key_dir: &FilePath,
        path: &Path,
        diagnostics: &mut Diagnostics,
    ) -> Option<ServerSettings> {
        let interface = self.interface.map_or_else(|| name.to_owned(), |interface| interface.0);
        if !is_interface(&interface) {
            diagnostics.error(&path.then("interface"), INTERFACE_COMPLAINT);
        }
        let Some(Net(network)) = self.network else {
            diagnostics.error(&path.then("network"), "is missing: it must be a network such as 192.168.2.0/24");
            return None;
        };
        if network.prefix_len() + 2 > network.max_prefix_len() || network.prefix_len() == 0 {
            diagnostics.error(&path.then("network"), "must have room for addresses: at most /30, or /126 for IPv6");
        }
        if network != network.trunc() {
            let complaint = format!("must have no bits behind its length, as {}", network.trunc());
            diagnostics.invalid(&path.then("network"), &Value::from(network.to_string()), &complaint);
        }
        Some(ServerSettings {
            key_file: key_dir.join(format!("{interface}.key")),
            interface,
            listen_port: port(self.listen_port.as_ref(), 51840),
            network: network.trunc(),
            reserved: self.reserved.map_or(0, |reserved| reserved.0),
            endpoint: self.endpoint.map(|endpoint| endpoint.0),
            allowed_ips: self.allowed_ips.map(|allowed| allowed.0),
        })
    }
}

/// Whether an interface may have this name.
pub(super) fn is_interface(name: &str) -> bool {
    (1..=INTERFACE_MAX).contains(&name.len())
        && ![".", ".."].contains(&name)
        && !name.contains(|char: char| char.is_whitespace() || char.is_control() || char == '/' || char == ':')
}
