//! The fields of a call of the registry: checked values from the JSON, or the invalid field. No IO.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::str::FromStr;

use ipnet::IpNet;
use serde_json::{Map, Value};
use wgkex_common::PublicKey;

use crate::ipam::Range;

/// The longest name, in characters.
const NAME_MAX: usize = 253;

/// The fields of a call, as received.
#[derive(Debug, Default)]
pub struct CallFields(pub Map<String, Value>);

/// An invalid field of a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidField {
    /// The key in the JSON.
    pub field: &'static str,
    /// The rule that it breaks.
    pub problem: &'static str,
}

/// The name of a server. `Display` gives it as received.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerName(String);

/// The name of a client.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientName(String);

/// Where a server is reached: a host name or an address, and a UDP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerEndpoint {
    /// As received.
    pub address: String,
    /// The port.
    pub port: NonZeroU16,
}

/// A server to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewServer {
    /// Its name.
    pub name: ServerName,
    /// Its key.
    pub public_key: PublicKey,
    /// The network of its addresses.
    pub network: IpNet,
    /// Clients get no addresses up to that with this number.
    pub reserved: u64,
    /// Where it is reached.
    pub endpoint: ServerEndpoint,
    /// The networks that its clients send to it, as received.
    pub allowed_ips: String,
}

/// A client to be added to a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewClient {
    /// Its name.
    pub name: ClientName,
    /// The server.
    pub server: ServerName,
    /// Its key.
    pub public_key: PublicKey,
    /// The address that it is to have; the lowest free one if it names none.
    pub lease: Option<IpAddr>,
}

impl ServerName {
    /// As received.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl ClientName {
    /// As received.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ServerName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_name = is_name(text) && !text.contains('/') && !text.starts_with('.');
        let problem = "must have 1 to 253 characters, without \"/\" and control characters, and not begin with a dot";
        is_name.then(|| Self(text.to_owned())).ok_or(problem)
    }
}

impl FromStr for ClientName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem = "must have 1 to 253 characters, without control characters";
        is_name(text).then(|| Self(text.to_owned())).ok_or(problem)
    }
}

fn is_name(text: &str) -> bool {
    (1..=NAME_MAX).contains(&text.chars().count()) && !text.contains(char::is_control)
}

impl NewServer {
    /// The addresses that its clients may lease: neither the network's, nor its own, nor the broadcast address.
    #[must_use]
    pub fn leases(&self) -> Range {
        leases(self.network, self.reserved)
    }
}

/// The addresses that clients of a server with this network may lease.
#[must_use]
pub fn leases(network: IpNet, reserved: u64) -> Range {
    Range::above(network, u128::from(reserved).max(1))
}

impl CallFields {
    /// The server that a call names.
    pub fn server_name(&self) -> Result<ServerName, InvalidField> {
        self.parsed("server_name")
    }

    /// The client that a call names.
    pub fn client_name(&self) -> Result<ClientName, InvalidField> {
        self.parsed("client_name")
    }

    /// A client, its key first, as the original checks it.
    pub fn new_client(&self) -> Result<NewClient, InvalidField> {
        Ok(NewClient {
            public_key: self.public_key("public_key")?,
            name: self.client_name()?,
            server: self.server_name()?,
            lease: self.lease()?,
        })
    }

    fn lease(&self) -> Result<Option<IpAddr>, InvalidField> {
        if !self.0.contains_key("lease") {
            return Ok(None);
        }
        let address = self.text("lease")?.parse();
        address.map(Some).map_err(|_| invalid("lease", "must be an IPv4 or IPv6 address"))
    }

    /// A server.
    pub fn new_server(&self) -> Result<NewServer, InvalidField> {
        let network = self.network()?;
        Ok(NewServer {
            name: self.server_name()?,
            public_key: self.public_key("public_key")?,
            network,
            reserved: self.reserved(network)?,
            endpoint: self.endpoint()?,
            allowed_ips: self.allowed_ips()?,
        })
    }

    fn network(&self) -> Result<IpNet, InvalidField> {
        let address = self.text("network_address")?.parse::<IpAddr>();
        let address = address.map_err(|_| invalid("network_address", "must be an IPv4 or IPv6 address"))?;
        let (most, problem) = match address {
            IpAddr::V4(_) => (30, "must be a whole number from 1 to 30"),
            IpAddr::V6(_) => (126, "must be a whole number from 1 to 126"),
        };
        let mask = self.whole("network_mask", 1, most, problem)?;
        let network = u8::try_from(mask).ok().and_then(|mask| IpNet::new(address, mask).ok());
        let network = network.ok_or_else(|| invalid("network_mask", problem))?;
        let problem = "must be the first address of its network: bits that network_mask leaves to hosts must be 0";
        if network.addr() == network.network() { Ok(network) } else { Err(invalid("network_address", problem)) }
    }

    fn reserved(&self, network: IpNet) -> Result<u64, InvalidField> {
        let most = u64::try_from(Range::hosts(network).size()).unwrap_or(u64::MAX);
        self.whole("n_reserved_ips", 0, most, "must be a whole number from 0 to the number of addresses less 2")
    }

    /// The key that a client is to have already; none if any will do.
    pub fn known_key(&self) -> Result<Option<PublicKey>, InvalidField> {
        let field = "with_public_key";
        if self.0.contains_key(field) { self.public_key(field).map(Some) } else { Ok(None) }
    }

    fn public_key(&self, field: &'static str) -> Result<PublicKey, InvalidField> {
        let problem = "must be a WireGuard public key: 44 characters of canonical base64, not a point of small order";
        self.text(field)?.parse().map_err(|_| invalid(field, problem))
    }

    fn endpoint(&self) -> Result<ServerEndpoint, InvalidField> {
        let address = self.text("endpoint_address")?;
        if !is_host(address) {
            return Err(invalid("endpoint_address", "must be an IPv4 or IPv6 address, or a host name"));
        }
        let problem = "must be a whole number from 1 to 65535";
        let port = self.whole("endpoint_port", 1, u16::MAX.into(), problem)?;
        let port = u16::try_from(port).ok().and_then(NonZeroU16::new);
        Ok(ServerEndpoint { address: address.to_owned(), port: port.ok_or_else(|| invalid("endpoint_port", problem))? })
    }

    fn allowed_ips(&self) -> Result<String, InvalidField> {
        let text = self.text("allowed_ips")?;
        let is_net = |part: &str| part.parse::<IpNet>().is_ok() || part.parse::<IpAddr>().is_ok();
        let problem = "must be networks or addresses, separated by commas, such as 192.168.2.0/24, fd00::/64";
        let is_list = text.split(',').all(|part| is_net(part.trim_matches([' ', '\t'])));
        is_list.then(|| text.to_owned()).ok_or_else(|| invalid("allowed_ips", problem))
    }

    fn parsed<T: FromStr<Err = &'static str>>(&self, field: &'static str) -> Result<T, InvalidField> {
        self.text(field)?.parse().map_err(|problem| invalid(field, problem))
    }

    fn text(&self, field: &'static str) -> Result<&str, InvalidField> {
        match self.0.get(field) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(invalid(field, "must be a text")),
            None => Err(invalid(field, "is missing: it must be a text")),
        }
    }

    fn whole(&self, field: &'static str, least: u64, most: u64, problem: &'static str) -> Result<u64, InvalidField> {
        let number = self.0.get(field).and_then(Value::as_u64);
        number.filter(|number| (least..=most).contains(number)).ok_or_else(|| invalid(field, problem))
    }
}

fn invalid(field: &'static str, problem: &'static str) -> InvalidField {
    InvalidField { field, problem }
}

/// Whether a text is an address or a host name (RFC 1123 section 2.1). A name that ends in a number would be an
/// address.
fn is_host(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_name = name.len() <= NAME_MAX && name.split('.').all(is_label);
    text.parse::<IpAddr>().is_ok() || is_name && !name.rsplit('.').next().is_some_and(is_number)
}
