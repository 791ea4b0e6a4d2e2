//! A tunnel, made from the registry's answer: each part is validated before it is written into a file that `wg-quick`
//! reads, since an injected line there could be a command. No IO.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::Deserialize;
use wgkex_common::PublicKey;
use wgkex_common::config::Listen;

use crate::files::MARK;

/// The longest name of an interface (`IFNAMSIZ` of `linux/if.h`, less the zero at its end).
const NAME_MAX: usize = 15;
/// The longest name of a host (RFC 1035, section 2.3.4).
const HOST_MAX: usize = 253;

/// A name that `wg-quick` allows for an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceName(String);

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InterfaceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_allowed = |char: char| char.is_ascii_alphanumeric() || "_=+.-".contains(char);
        let is_name =
            (1..=NAME_MAX).contains(&text.len()) && text.chars().all(is_allowed) && ![".", ".."].contains(&text);
        if !is_name {
            return Err("must be a name of an interface: 1 to 15 of A-Z a-z 0-9 _ = + . -".into());
        }
        Ok(Self(text.to_owned()))
    }
}

/// The answer of `client/config` (seed: exactly these keys).
#[derive(Debug, Deserialize)]
pub struct ClientConfig {
    server: ServerPart,
    subnet: SubnetPart,
    /// The client's key, if the broker was asked for one with this key.
    public_key: Option<PublicKey>,
}

impl ClientConfig {
    /// Whether the broker returned this key as the client's.
    pub fn is_of(&self, key: &PublicKey) -> bool {
        self.public_key.as_ref() == Some(key)
    }
}

#[derive(Debug, Deserialize)]
struct ServerPart {
    endpoint_address: String,
    endpoint_port: u16,
    public_key: String,
}

#[derive(Debug, Deserialize)]
struct SubnetPart {
    allowed_ips: String,
    lease: IpAddr,
}

/// The parameters of a tunnel to a server.
#[derive(Debug, PartialEq, Eq)]
pub struct Tunnel {
    address: IpAddr,
    public_key: PublicKey,
    allowed_ips: Vec<IpNet>,
    endpoint: String,
}

/// Why an answer cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// The server's key is no valid public key.
    #[error("server.public_key: {0}")]
    Key(String),
    /// The endpoint is no `host:port`.
    #[error("server.endpoint_address: must be an address or a host name")]
    Endpoint,
    /// The list of allowed-ips has an entry that is no network.
    #[error("subnet.allowed_ips: must be networks, separated by commas")]
    AllowedIps,
}

impl Tunnel {
    /// Validates an answer of the registry.
    pub fn new(ClientConfig { server, subnet, .. }: ClientConfig) -> Result<Self, TunnelError> {
        let ServerPart { endpoint_address, endpoint_port, public_key } = server;
        let networks = subnet.allowed_ips.split(',').map(|network| {
            let network = network.trim();
            network.parse().or_else(|_| network.parse::<IpAddr>().map(IpNet::from))
        });
        Ok(Self {
            address: subnet.lease,
            public_key: public_key
                .parse()
                .map_err(|error: wgkex_common::KeyError| TunnelError::Key(error.to_string()))?,
            allowed_ips: networks.collect::<Result<_, _>>().map_err(|_| TunnelError::AllowedIps)?,
            endpoint: endpoint(&endpoint_address, endpoint_port).ok_or(TunnelError::Endpoint)?,
        })
    }

    /// The file that `wg-quick` reads (wg-quick(8)).
    pub fn file(&self, private_key: &str) -> String {
        let Self { address, public_key, allowed_ips, endpoint } = self;
        let networks = allowed_ips.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "{MARK}[Interface]\nPrivateKey = {private_key}\nAddress = {address}\n\n\
             [Peer]\nPublicKey = {public_key}\nAllowedIPs = {networks}\nEndpoint = {endpoint}\n"
        )
    }
}

fn endpoint(host: &str, port: u16) -> Option<String> {
    let is_allowed = |char: char| char.is_ascii_alphanumeric() || "-._".contains(char);
    let is_name = (1..=HOST_MAX).contains(&host.len()) && host.chars().all(is_allowed);
    let is_host = is_name || host.parse::<Ipv6Addr>().is_ok();
    (is_host && port != 0).then(|| Listen { host: host.to_owned(), port }.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    fn answer(pointer: &str, value: &Value) -> Value {
        let mut answer = json!({
            "server": { "endpoint_address": "gw1.example", "endpoint_port": 5128, "public_key": KEY },
            "subnet": { "allowed_ips": "192.168.2.0/24,10.0.0.1", "lease": "192.168.2.21" },
        });
        if !pointer.is_empty() {
            *answer.pointer_mut(pointer).unwrap() = value.clone();
        }
        answer
    }

    fn tunnel(pointer: &str, value: &Value) -> Result<Tunnel, String> {
        let config: ClientConfig = serde_json::from_value(answer(pointer, value)).map_err(|error| error.to_string())?;
        Tunnel::new(config).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_has_what_the_registry_answers() {
        let file = tunnel("", &Value::Null).unwrap().file("P=");
        let expected = format!(
            "{MARK}[Interface]\nPrivateKey = P=\nAddress = 192.168.2.21\n\n[Peer]\nPublicKey = {KEY}\n\
             AllowedIPs = 192.168.2.0/24, 10.0.0.1/32\nEndpoint = gw1.example:5128\n"
        );
        assert_eq!(file, expected);
        let file = tunnel("/server/endpoint_address", &json!("2001:db8::1")).unwrap().file("P=");
        assert!(file.ends_with("Endpoint = [2001:db8::1]:5128\n"), "{file}");
    }

    #[test]
    fn nothing_unchecked_gets_into_the_file() {
        for (pointer, value) in [
            ("/server/endpoint_address", json!("x\nPostUp = touch /tmp/x")),
            ("/server/endpoint_address", json!("")),
            ("/server/endpoint_address", json!("a b")),
            ("/server/endpoint_port", json!(0)),
            ("/server/endpoint_port", json!(65536)),
            ("/server/public_key", json!(format!("{KEY}\nPostUp = x"))),
            ("/server/public_key", json!("")),
            ("/subnet/allowed_ips", json!("192.168.2.0/24\nPostUp = x")),
            ("/subnet/allowed_ips", json!("")),
            ("/subnet/lease", json!("192.168.2.21\nPostUp = x")),
            ("/subnet/lease", json!("192.168.2.21/24")),
            ("/subnet", json!([])),
        ] {
            assert!(tunnel(pointer, &value).is_err(), "{pointer} {value}");
        }
    }

    #[test]
    fn the_name_of_an_interface_is_one_that_wg_quick_allows() {
        for name in ["s1", "wg_a=b+c.d-e", "a23456789012345"] {
            assert_eq!(name.parse::<InterfaceName>().unwrap().to_string(), name);
        }
        for name in ["", ".", "..", "a/b", "a b", "a;b", "\u{fc}", "a234567890123456"] {
            assert!(name.parse::<InterfaceName>().is_err(), "{name:?}");
        }
    }
}
