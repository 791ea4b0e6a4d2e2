//! Keys and addresses that no router may have: those of the gateways themselves, which are peers of one another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use crate::message::WorkerData;
use crate::{PublicKey, is_derived};

/// Gateways heard of at most, a domain of each counting by itself; more are somebody's nonsense,
const GATEWAYS_MAX: usize = 4_096;
/// and so are more domains of one.
const DOMAINS_MAX: usize = 64;

/// What is reserved: what the operator lists, and what gateways say of themselves on the bus.
#[derive(Debug, Clone, Default)]
pub struct Reserved {
    listed: BTreeSet<PublicKey>,
    /// By worker and domain, as they stand in the topic.
    gateways: BTreeMap<(String, String), (PublicKey, Option<Ipv6Addr>)>,
    keys: BTreeSet<PublicKey>,
    addresses: BTreeSet<Ipv6Addr>,
}

impl Reserved {
    /// The keys that the operator lists; no gateway is known yet.
    #[must_use]
    pub fn new(listed: BTreeSet<PublicKey>) -> Self {
        let mut reserved = Self { listed, ..Self::default() };
        reserved.count();
        reserved
    }

    /// What a worker says of itself in a domain; none if it took that back.
    pub fn hear(&mut self, worker: &str, domain: &str, data: Option<&WorkerData>) {
        let gateway = (worker.to_owned(), domain.to_owned());
        let said = data.map(|data| (data.public_key, own_address(data)));
        let before = match said {
            Some(said) if self.has_place(&gateway) => self.gateways.insert(gateway, said),
            Some(_) => return,
            None => self.gateways.remove(&gateway),
        };
        if before != said {
            self.count();
        }
    }

    fn has_place(&self, gateway: &(String, String)) -> bool {
        let domains = self.gateways.range((gateway.0.clone(), String::new())..);
        let domains = domains.take_while(|((worker, _), _)| *worker == gateway.0).count();
        self.gateways.contains_key(gateway) || (self.gateways.len() < GATEWAYS_MAX && domains < DOMAINS_MAX)
    }

    fn count(&mut self) {
        let keys = || self.listed.iter().copied().chain(self.gateways.values().map(|(key, _)| *key));
        let said = self.gateways.values().filter_map(|(_, address)| *address);
        let addresses = keys().map(|key| key.link_local()).chain(said).collect();
        (self.keys, self.addresses) = (keys().collect(), addresses);
    }

    /// Whether no router may have `key`: it is reserved, or derives a reserved address.
    #[must_use]
    pub fn forbids(&self, key: &PublicKey) -> bool {
        self.has_key(key) || self.has_address(&key.link_local())
    }

    /// Whether it is the key of a gateway, or listed.
    #[must_use]
    pub fn has_key(&self, key: &PublicKey) -> bool {
        self.keys.contains(key)
    }

    /// Whether it is the address of a gateway, or derived from a reserved key.
    #[must_use]
    pub fn has_address(&self, address: &Ipv6Addr) -> bool {
        self.addresses.contains(address)
    }
}

/// The link address that a gateway says it has, unless it is one that another key derives: no gateway takes a router's.
fn own_address(data: &WorkerData) -> Option<Ipv6Addr> {
    let address = data.link_address.parse().ok()?;
    (!is_derived(address) || address == data.public_key.link_local()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).unwrap()
    }

    fn data(public_key: PublicKey, link_address: &str) -> WorkerData {
        WorkerData { external_address: "gw".into(), port: 1, public_key, link_address: link_address.into() }
    }

    #[test]
    fn what_a_gateway_says_of_itself_is_reserved_until_it_says_otherwise() {
        let mut reserved = Reserved::new([key(9)].into());
        let routers = key(3).link_local();
        assert!(reserved.forbids(&key(9)) && !reserved.forbids(&key(1)));
        reserved.hear("gw", "d", Some(&data(key(1), &routers.to_string())));
        assert!(reserved.has_key(&key(1)) && reserved.has_address(&key(1).link_local()));
        assert!(!reserved.forbids(&key(3)), "no gateway takes a router's address");
        reserved.hear("gw", "d", Some(&data(key(1), "fe80::1")));
        assert!(reserved.has_address(&"fe80::1".parse().unwrap()));
        reserved.hear("gw", "d", Some(&data(key(2), "no address")));
        assert!(reserved.forbids(&key(2)) && !reserved.forbids(&key(1)) && !reserved.forbids(&key(3)));
        reserved.hear("gw", "other", Some(&data(key(1), "fe80::1")));
        reserved.hear("gw", "d", None);
        assert!(reserved.forbids(&key(1)) && !reserved.forbids(&key(2)) && reserved.forbids(&key(9)));
    }

    #[test]
    fn one_gateway_has_only_so_many_domains() {
        let mut reserved = Reserved::default();
        for n in 0..=DOMAINS_MAX {
            let other = PublicKey::from_bytes([u8::try_from(n + 10).unwrap(); 32]).unwrap();
            reserved.hear("gw", &n.to_string(), Some(&data(other, "fe80::1")));
            assert_eq!(reserved.forbids(&other), n < DOMAINS_MAX);
        }
        reserved.hear("gw2", "d", Some(&data(key(1), "fe80::1")));
        assert!(reserved.forbids(&key(1)));
    }

    #[test]
    fn nonsense_in_any_number_is_not_remembered() {
        let mut reserved = Reserved::default();
        for number in 0..=GATEWAYS_MAX {
            reserved.gateways.insert((number.to_string(), "d".into()), (key(1), None));
        }
        reserved.hear("one more", "d", Some(&data(key(2), "fe80::1")));
        assert!(!reserved.forbids(&key(2)));
    }
}
