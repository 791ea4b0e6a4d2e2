//! The client of a connection or request, which limits are counted by: the address that connected, or the one that a
//! trusted proxy names in `Forwarded` (RFC 7239) or `X-Forwarded-For`. No IO, no task, no state. Addresses of clients are never logged.
//!
//! Previous stop: [`crate::http`] and the handshake of [`crate::mqtt_server`]; next stop: their limits.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use wgkex_common::http::connections::PeerKind;

/// A client, as limits count it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Client {
    /// This machine's operator, who connects from loopback without a proxy.
    Local,
    /// An IPv4 address, or the /56 that a household or a server gets of IPv6.
    Address(IpAddr),
    /// All clients whose proxy does not pass on their addresses.
    Unnamed,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// Whether it is this machine's operator.
    #[must_use]
    pub fn is_this_machine(self) -> bool {
        self == Self::Local
    }
}

impl From<IpAddr> for Client {
    /// The client that connects from this address.
    fn from(address: IpAddr) -> Self {
        if is_local(address) { Self::Local } else { Self::Address(client_prefix(address)) }
    }
}

/// The address that stands for all of one client.
fn client_prefix(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 72 << 72).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// Whether it is the address that this machine's own programs have for each other.
fn is_local(address: IpAddr) -> bool {
    let address = address.to_canonical();
    address == IpAddr::V4(Ipv4Addr::LOCALHOST) || address == IpAddr::V6(Ipv6Addr::LOCALHOST)
}

/// The kind of peer that a connection has, before any data was received on it. `is_proxied`: a proxy at this machine's
/// address that is not trusted has sent a request; then no connection from there is exempt from limits.
#[must_use]
pub fn peer_kind(peer: IpAddr, trusted: &[IpNet], is_proxied: bool) -> PeerKind {
    if is_in(trusted, peer) {
        PeerKind::Proxy
    } else if is_local(peer) && !is_proxied {
        PeerKind::Local
    } else {
        PeerKind::Client(client_prefix(peer))
    }
}

/// Whether `address` is in one of the networks.
#[must_use]
pub fn is_in(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// Whether `address` is this machine's, or of a network that is not the internet: where an operator's own proxy is.
#[must_use]
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_private(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unique_local(),
    }
}

/// The client of a request on a connection from `peer`; `address` is its [`address_of_request`].
pub fn client_of_request(peer: IpAddr, trusted: &[IpNet], address: Option<IpAddr>) -> Client {
    match address {
        None => Client::Unnamed,
        Some(address) if is_in(trusted, peer) => Client::Address(client_prefix(address)),
        Some(address) => address.into(),
    }
}

/// The address of the client of a request on a connection from `peer`, by the values of its headers in their order. A
/// proxy appends the address of its own client at the right, so the last hop that is not a trusted proxy counts. If
/// that is not an address, or the two headers differ, the sender may have written one of them, and the client is not
/// known; nor is it if a proxy on this machine is not trusted. `is_proxied`: the request has a header that only proxies
/// add.
pub fn address_of_request<'a>(
    peer: IpAddr,
    trusted: &[IpNet],
    is_proxied: bool,
    forwarded: impl Iterator<Item = &'a str>,
    x_forwarded_for: impl Iterator<Item = &'a str>,
) -> Option<IpAddr> {
    if !is_in(trusted, peer) {
        return (!is_local(peer) || !is_proxied).then(|| peer.to_canonical());
    }
    let named: Vec<_> = forwarded.flat_map(|value| elements(value).unwrap_or_else(|| vec![None])).collect();
    let listed: Vec<_> = x_forwarded_for.flat_map(|value| value.split(',').map(parse_hop)).collect();
    match (&named[..], &listed[..]) {
        (hops, []) | ([], hops) => first_untrusted(hops, trusted),
        (named, listed) => {
            first_untrusted(named, trusted).filter(|found| first_untrusted(listed, trusted) == Some(*found))
        }
    }
}

/// The last of the hops that is no trusted proxy, or the first of all.
fn first_untrusted(hops: &[Option<IpAddr>], trusted: &[IpNet]) -> Option<IpAddr> {
    let mut found = None;
    for hop in hops.iter().rev() {
        found = Some((*hop)?);
        if found.is_some_and(|address| !is_in(trusted, address)) {
            break;
        }
    }
    found
}

/// The `for=` of each element of a `Forwarded`; none if it is not well-formed, since a quote that the sender left open
/// could hide the hop that the proxy appended.
fn elements(value: &str) -> Option<Vec<Option<IpAddr>>> {
    let mut rest = value;
    let mut elements = Vec::new();
    let mut address = None;
    loop {
        let (name, after) = rest.split_once('=')?;
        let (text, after) = parameter(after)?;
        if name.trim().eq_ignore_ascii_case("for") && address.replace(parse_hop(&text)).is_some() {
            return None;
        }
        let after = after.trim_start();
        rest = after.get(1..).unwrap_or_default();
        match after.bytes().next() {
            Some(b';') => {}
            Some(b',') => elements.push(address.take().flatten()),
            None => {
                elements.push(address.flatten());
                return Some(elements);
            }
            Some(_) => return None,
        }
    }
}

/// A token or a quoted text at the beginning of `text`, and the rest.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (token, rest) = text.split_at(text.find([';', ',']).unwrap_or(text.len()));
        return (!token.contains('"')).then(|| (token.trim_end().to_owned(), rest));
    };
    let mut plain = String::new();
    let mut chars = quoted.chars();
    loop {
        match chars.next()? {
            '"' => return Some((plain, chars.as_str())),
            '\\' => plain.push(chars.next()?),
            char => plain.push(char),
        }
    }
}

/// The address of a hop, which may have brackets and a port; none for `unknown`, for an invented name, for nonsense.
fn parse_hop(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let is_port =
        |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let address = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((address, port))) if port.is_empty() || port.strip_prefix(':').is_some_and(is_port) => {
            address.parse::<Ipv6Addr>().ok()?.into()
        }
        Some(_) => return None,
        None => text.parse::<IpAddr>().ok().or_else(|| {
            let (address, port) = text.split_once(':')?;
            if is_port(port) { address.parse().ok() } else { None }
        })?,
    };
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROXY: &str = "192.0.2.1";
    const UNNAMED: &str = "unnamed";
    const LOCAL: &str = "local";

    fn trusted() -> Vec<IpNet> {
        ["192.0.2.0/24", "2001:db8:ffff::/48"].map(|network| network.parse().unwrap()).to_vec()
    }

    /// The client of a request with these headers: an address, [`UNNAMED`] or [`LOCAL`].
    fn client_of(peer: &str, forwarded: &[&str], x_forwarded_for: &[&str]) -> String {
        let is_proxied = !forwarded.is_empty() || !x_forwarded_for.is_empty();
        let (forwarded, listed) = (forwarded.iter().copied(), x_forwarded_for.iter().copied());
        let (peer, trusted) = (peer.parse().unwrap(), trusted());
        let address = address_of_request(peer, &trusted, is_proxied, forwarded, listed);
        match client_of_request(peer, &trusted, address) {
            Client::Address(address) => address.to_string(),
            Client::Unnamed => UNNAMED.into(),
            Client::Local => LOCAL.into(),
        }
    }

    #[test]
    fn only_a_trusted_proxy_is_believed() {
        for peer in ["203.0.113.9", "2001:db8::"] {
            assert_eq!(client_of(peer, &["for=198.51.100.1"], &["198.51.100.1"]), peer);
        }
        for peer in [PROXY, "::ffff:192.0.2.1", "2001:db8:ffff::1"] {
            assert_eq!(client_of(peer, &["for=198.51.100.1"], &[]), "198.51.100.1");
        }
        assert_eq!(client_of(PROXY, &[], &[]), UNNAMED);
    }

    #[test]
    fn an_address_is_the_whole_one() {
        let address = |peer: &str, listed: &[&str]| {
            address_of_request(
                peer.parse().unwrap(),
                &trusted(),
                !listed.is_empty(),
                [].into_iter(),
                listed.iter().copied(),
            )
        };
        for (peer, listed, expected) in [
            ("2001:db8::1:2:3", vec![], Some("2001:db8::1:2:3")),
            ("::ffff:203.0.113.9", vec!["198.51.100.1"], Some("203.0.113.9")),
            (PROXY, vec!["2001:db8::1:2:3"], Some("2001:db8::1:2:3")),
            (PROXY, vec![], None),
            ("127.0.0.1", vec![], Some("127.0.0.1")),
            ("127.0.0.1", vec!["198.51.100.1"], None),
        ] {
            assert_eq!(address(peer, &listed), expected.map(|address| address.parse().unwrap()), "{peer} {listed:?}");
        }
    }

    /// Seen to fail when the proxy's address stood for an unknown sender: on loopback it had no limit.
    #[test]
    fn only_a_client_on_loopback_that_is_no_proxy_has_no_limit() {
        for peer in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(client_of(peer, &[], &[]), LOCAL, "{peer}");
            for value in ["", "nonsense", "for=unknown", "198.51.100.1", "127.0.0.1"] {
                assert_eq!(client_of(peer, &[value], &[]), UNNAMED, "{peer} {value}");
                assert_eq!(client_of(peer, &[], &[value]), UNNAMED, "{peer} {value}");
            }
        }
        let trusted: [IpNet; 2] = ["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()];
        for peer in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let peer = peer.parse().unwrap();
            let client_of = |forwarded: Option<&'static str>, listed: Option<&'static str>| {
                let address = address_of_request(peer, &trusted, true, forwarded.into_iter(), listed.into_iter());
                client_of_request(peer, &trusted, address)
            };
            assert!(client_of(None, None) == Client::Unnamed && client_of(Some("x"), None) == Client::Unnamed);
            assert!(client_of(Some("for=1.1.1.1"), Some("2.2.2.2")) == Client::Unnamed);
            assert!(client_of(None, Some("127.0.0.1")) == Client::Address(Ipv4Addr::LOCALHOST.into()));
        }
    }

    #[test]
    fn connections_of_this_machine_have_a_limit_once_a_proxy_was_seen_there() {
        let (local, proxy): (IpAddr, IpAddr) = (Ipv4Addr::LOCALHOST.into(), PROXY.parse().unwrap());
        let router = IpAddr::from([198, 51, 100, 1]);
        for (peer, is_proxied, expected) in [
            (local, false, PeerKind::Local),
            (local, true, PeerKind::Client(local)),
            (proxy, false, PeerKind::Proxy),
            (proxy, true, PeerKind::Proxy),
            (router, false, PeerKind::Client(router)),
        ] {
            assert_eq!(peer_kind(peer, &trusted(), is_proxied), expected);
        }
    }

    #[test]
    fn forwarded_names_the_last_hop_that_is_no_proxy() {
        for (values, client) in [
            (&["for=198.51.100.1"][..], "198.51.100.1"),
            (&["For=\"198.51.100.1:4711\""], "198.51.100.1"),
            (&["for=198.51.100.1:_port"], "198.51.100.1"),
            (&["for=\"[2001:db8::17]\""], "2001:db8::"),
            (&["for=\"[2001:db8::17]:4711\";proto=http;by=203.0.113.43"], "2001:db8::"),
            (&["proto=https; for=\"\\1\\9\\8.51.100.1\""], "198.51.100.1"),
            (&["for=\"[::ffff:198.51.100.1]\""], "198.51.100.1"),
            // The hops that the sender wrote are at the left.
            (&["for=1.1.1.1, for=198.51.100.1"], "198.51.100.1"),
            (&["for=1.1.1.1", "for=198.51.100.1"], "198.51.100.1"),
            (&["for=\"x,y;z\" , for=198.51.100.1"], "198.51.100.1"),
            (&["for=unknown, for=198.51.100.1"], "198.51.100.1"),
            (&["for=1.1.1.1, for=198.51.100.1, for=192.0.2.7, for=\"[2001:db8:ffff::2]\""], "198.51.100.1"),
            (&["for=192.0.2.8, for=192.0.2.7"], "192.0.2.8"),
            // No address, or no sense.
            (&["for=unknown"], UNNAMED),
            (&["for=_hidden"], UNNAMED),
            (&["for=\"_gazonk\""], UNNAMED),
            (&["for=198.51.100.1, for=unknown"], UNNAMED),
            (&["for=198.51.100.1, proto=https"], UNNAMED),
            (&["for=198.51.100.1;for=198.51.100.2"], UNNAMED),
            (&[""], UNNAMED),
            (&["198.51.100.1"], UNNAMED),
            (&["for="], UNNAMED),
            (&["for=[2001:db8::17"], UNNAMED),
            (&["for=\"[198.51.100.1]\""], UNNAMED),
            (&["for=\"198.51.100.1:\""], UNNAMED),
            (&["for=\"fe80::1%eth0\""], UNNAMED),
            // A quote left open must not hide the hop that the proxy appended.
            (&["for=1.1.1.1;x=\", for=198.51.100.1"], UNNAMED),
            (&["for=1.1.1.1;x=\", for=\"[2001:db8::17]\""], UNNAMED),
            (&["for=1.1.1.1;x=\", for=198.51.100.1;proto=\"https\""], UNNAMED),
            (&["for=1.1.1.1;x=\"", "for=198.51.100.1"], "198.51.100.1"),
        ] {
            assert_eq!(client_of(PROXY, values, &[]), client, "{values:?}");
        }
    }

    #[test]
    fn x_forwarded_for_names_the_last_hop_that_is_no_proxy() {
        for (values, client) in [
            (&["198.51.100.1"][..], "198.51.100.1"),
            (&[" 1.1.1.1 ,198.51.100.1 "], "198.51.100.1"),
            (&["1.1.1.1", "2001:db8::17"], "2001:db8::"),
            (&["nonsense, 198.51.100.1:4711, 192.0.2.7"], "198.51.100.1"),
            (&["[2001:db8::17]:4711"], "2001:db8::"),
            (&["192.0.2.7"], "192.0.2.7"),
            (&["198.51.100.1, unknown"], UNNAMED),
            (&["198.51.100.1,"], UNNAMED),
            (&[""], UNNAMED),
        ] {
            assert_eq!(client_of(PROXY, &[], values), client, "{values:?}");
        }
    }

    #[test]
    fn two_headers_count_only_if_they_agree() {
        assert_eq!(client_of(PROXY, &["for=198.51.100.1"], &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(client_of(PROXY, &["for=1.1.1.1"], &["198.51.100.1"]), UNNAMED);
        assert_eq!(client_of(PROXY, &["for=198.51.100.1"], &["1.1.1.1"]), UNNAMED);
        assert_eq!(client_of(PROXY, &["nonsense"], &["198.51.100.1"]), UNNAMED);
    }

    #[test]
    fn private_networks_are_not_the_internet() {
        let near = |text: &str| is_private(text.parse().unwrap());
        assert!(["127.0.0.9", "10.1.2.3", "192.168.1.1", "::1", "fd00::1", "::ffff:10.0.0.1"].into_iter().all(near));
        assert!(!["203.0.113.9", "2001:db8::1", "0.0.0.0"].into_iter().any(near));
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_a_56_of_ipv6() {
        let client = |text: &str| Client::from(text.parse::<IpAddr>().unwrap());
        for (one, other, same) in [
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "::ffff:192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("2001:db8:0:100::1", "2001:db8:0:1ff:ffff:ffff:ffff:ffff", true),
            ("2001:db8:0:100::1", "2001:db8:0:200::1", false),
        ] {
            assert_eq!(client(one) == client(other), same, "{one} {other}");
        }
        assert_eq!(format!("{:?}", client("192.0.2.1")), "Client");
    }

    proptest! {
        #[test]
        fn whatever_the_sender_writes_the_proxys_hop_counts(
            text in "[ -~]{0,40}|(for=|\"|;|,|\\\\|[0-9.]{1,3}|proto=x){0,12}",
        ) {
            let is_proxys = |found: &str| found == "198.51.100.1" || found == UNNAMED;
            for added in ["for=198.51.100.1", "for=\"198.51.100.1:4711\"", "for=198.51.100.1;proto=\"https\";by=\"_x\""] {
                let found = client_of(PROXY, &[&format!("{text}, {added}")], &[]);
                prop_assert!(is_proxys(&found), "{text} {found}");
                prop_assert_eq!(client_of(PROXY, &[&text, added], &[]), "198.51.100.1");
            }
            let found = client_of(PROXY, &[], &[&format!("{text}, 198.51.100.1")]);
            prop_assert_eq!(found, "198.51.100.1");
        }
    }
}
