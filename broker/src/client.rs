//! Whose request it is: the one who connected, or whom a trusted proxy names in `Forwarded` (RFC 7239) or
//! `X-Forwarded-For`. No IO. Addresses are never logged.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// What counts as one client: an IPv4 address, or the /56 that a household or a server gets of IPv6.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client(IpAddr);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// Whether it is this machine: its operator, or a proxy that is not named in the config.
    #[must_use]
    pub fn is_this_machine(self) -> bool {
        self == Self::from(IpAddr::from(Ipv4Addr::LOCALHOST)) || self == Self::from(IpAddr::from(Ipv6Addr::LOCALHOST))
    }
}

impl From<IpAddr> for Client {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => Self(Ipv6Addr::from_bits(address.to_bits() >> 72 << 72).into()),
            address @ IpAddr::V4(_) => Self(address),
        }
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
pub fn is_near(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_private(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unique_local(),
    }
}

/// Who sent a request that `peer` brought, by the values of its headers in their order. A proxy adds at the right
/// what it knows, so from there on the first counts that is no trusted proxy itself. Where that is not an address,
/// or the two headers differ, one of them may come from the sender, and `peer` counts.
pub fn origin<'a>(
    peer: IpAddr,
    trusted: &[IpNet],
    forwarded: impl Iterator<Item = &'a str>,
    x_forwarded_for: impl Iterator<Item = &'a str>,
) -> IpAddr {
    let peer = peer.to_canonical();
    if !is_in(trusted, peer) {
        return peer;
    }
    let named: Vec<_> = forwarded.flat_map(|value| elements(value).unwrap_or_else(|| vec![None])).collect();
    let listed: Vec<_> = x_forwarded_for.flat_map(|value| value.split(',').map(node)).collect();
    let found = match (&named[..], &listed[..]) {
        (hops, []) | ([], hops) => stranger(hops, trusted),
        (named, listed) => stranger(named, trusted).filter(|found| stranger(listed, trusted) == Some(*found)),
    };
    found.unwrap_or(peer)
}

/// The last of the hops that is no trusted proxy, or the first of all.
fn stranger(hops: &[Option<IpAddr>], trusted: &[IpNet]) -> Option<IpAddr> {
    let mut found = None;
    for hop in hops.iter().rev() {
        found = Some((*hop)?);
        if found.is_some_and(|address| !is_in(trusted, address)) {
            break;
        }
    }
    found
}

/// What each element of a `Forwarded` says behind `for=`; none if it is not well-formed, since a quote that the sender
/// left open could swallow what the proxy wrote.
fn elements(value: &str) -> Option<Vec<Option<IpAddr>>> {
    let mut rest = value;
    let mut elements = Vec::new();
    let mut address = None;
    loop {
        let (name, after) = rest.split_once('=')?;
        let (text, after) = parameter(after)?;
        if name.trim().eq_ignore_ascii_case("for") && address.replace(node(&text)).is_some() {
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

/// A token or a quoted text at the beginning of `text`, and what follows.
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
fn node(text: &str) -> Option<IpAddr> {
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

    fn trusted() -> Vec<IpNet> {
        ["192.0.2.0/24", "2001:db8:ffff::/48"].map(|network| network.parse().unwrap()).to_vec()
    }

    fn said(peer: &str, forwarded: &[&str], x_forwarded_for: &[&str]) -> String {
        let (forwarded, listed) = (forwarded.iter().copied(), x_forwarded_for.iter().copied());
        origin(peer.parse().unwrap(), &trusted(), forwarded, listed).to_string()
    }

    #[test]
    fn only_a_trusted_proxy_is_believed() {
        for peer in ["203.0.113.9", "2001:db8::9"] {
            assert_eq!(said(peer, &["for=198.51.100.1"], &["198.51.100.1"]), peer);
        }
        for peer in [PROXY, "::ffff:192.0.2.1", "2001:db8:ffff::1"] {
            assert_eq!(said(peer, &["for=198.51.100.1"], &[]), "198.51.100.1");
        }
        assert_eq!(said(PROXY, &[], &[]), PROXY);
    }

    #[test]
    fn forwarded_names_the_last_who_is_no_proxy() {
        for (values, client) in [
            (&["for=198.51.100.1"][..], "198.51.100.1"),
            (&["For=\"198.51.100.1:4711\""], "198.51.100.1"),
            (&["for=198.51.100.1:_port"], "198.51.100.1"),
            (&["for=\"[2001:db8::17]\""], "2001:db8::17"),
            (&["for=\"[2001:db8::17]:4711\";proto=http;by=203.0.113.43"], "2001:db8::17"),
            (&["proto=https; for=\"\\1\\9\\8.51.100.1\""], "198.51.100.1"),
            (&["for=\"[::ffff:198.51.100.1]\""], "198.51.100.1"),
            // What the sender wrote stands at the left.
            (&["for=1.1.1.1, for=198.51.100.1"], "198.51.100.1"),
            (&["for=1.1.1.1", "for=198.51.100.1"], "198.51.100.1"),
            (&["for=\"x,y;z\" , for=198.51.100.1"], "198.51.100.1"),
            (&["for=unknown, for=198.51.100.1"], "198.51.100.1"),
            (&["for=1.1.1.1, for=198.51.100.1, for=192.0.2.7, for=\"[2001:db8:ffff::2]\""], "198.51.100.1"),
            (&["for=192.0.2.8, for=192.0.2.7"], "192.0.2.8"),
            // No address, or no sense.
            (&["for=unknown"], PROXY),
            (&["for=_hidden"], PROXY),
            (&["for=\"_gazonk\""], PROXY),
            (&["for=198.51.100.1, for=unknown"], PROXY),
            (&["for=198.51.100.1, proto=https"], PROXY),
            (&["for=198.51.100.1;for=198.51.100.2"], PROXY),
            (&[""], PROXY),
            (&["198.51.100.1"], PROXY),
            (&["for="], PROXY),
            (&["for=[2001:db8::17"], PROXY),
            (&["for=\"[198.51.100.1]\""], PROXY),
            (&["for=\"198.51.100.1:\""], PROXY),
            (&["for=\"fe80::1%eth0\""], PROXY),
            // A quote left open must not swallow what the proxy added.
            (&["for=1.1.1.1;x=\", for=198.51.100.1"], PROXY),
            (&["for=1.1.1.1;x=\", for=\"[2001:db8::17]\""], PROXY),
            (&["for=1.1.1.1;x=\", for=198.51.100.1;proto=\"https\""], PROXY),
            (&["for=1.1.1.1;x=\"", "for=198.51.100.1"], "198.51.100.1"),
        ] {
            assert_eq!(said(PROXY, values, &[]), client, "{values:?}");
        }
    }

    #[test]
    fn x_forwarded_for_names_the_last_who_is_no_proxy() {
        for (values, client) in [
            (&["198.51.100.1"][..], "198.51.100.1"),
            (&[" 1.1.1.1 ,198.51.100.1 "], "198.51.100.1"),
            (&["1.1.1.1", "2001:db8::17"], "2001:db8::17"),
            (&["nonsense, 198.51.100.1:4711, 192.0.2.7"], "198.51.100.1"),
            (&["[2001:db8::17]:4711"], "2001:db8::17"),
            (&["192.0.2.7"], "192.0.2.7"),
            (&["198.51.100.1, unknown"], PROXY),
            (&["198.51.100.1,"], PROXY),
            (&[""], PROXY),
        ] {
            assert_eq!(said(PROXY, &[], values), client, "{values:?}");
        }
    }

    #[test]
    fn two_headers_count_only_if_they_agree() {
        assert_eq!(said(PROXY, &["for=198.51.100.1"], &["198.51.100.1"]), "198.51.100.1");
        assert_eq!(said(PROXY, &["for=1.1.1.1"], &["198.51.100.1"]), PROXY);
        assert_eq!(said(PROXY, &["for=198.51.100.1"], &["1.1.1.1"]), PROXY);
        assert_eq!(said(PROXY, &["nonsense"], &["198.51.100.1"]), PROXY);
    }

    #[test]
    fn what_is_near_is_not_the_internet() {
        let near = |text: &str| is_near(text.parse().unwrap());
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
        fn whatever_the_sender_writes_what_the_proxy_adds_counts(
            text in "[ -~]{0,40}|(for=|\"|;|,|\\\\|[0-9.]{1,3}|proto=x){0,12}",
        ) {
            let is_proxys = |found: &str| found == "198.51.100.1" || found == PROXY;
            for added in ["for=198.51.100.1", "for=\"198.51.100.1:4711\"", "for=198.51.100.1;proto=\"https\";by=\"_x\""] {
                let found = said(PROXY, &[&format!("{text}, {added}")], &[]);
                prop_assert!(is_proxys(&found), "{text} {found}");
                prop_assert_eq!(said(PROXY, &[&text, added], &[]), "198.51.100.1");
            }
            let found = said(PROXY, &[], &[&format!("{text}, 198.51.100.1")]);
            prop_assert_eq!(found, "198.51.100.1");
        }
    }
}
