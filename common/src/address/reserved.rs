//! Keys and addresses that no router may have: those of the gateways themselves, which are peers of one another.
//!
//! A worker's data reserves one key for each domain that is served here, and nothing else: a stolen password must not
//! lock routers out. A value that changes all the time reserves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use crate::{Domain, PublicKey, WorkerName, is_derived};

/// Gateways at most, counted per domain; a real fleet has fewer.
const RESERVED_GATEWAYS_MAX: usize = 16_384;
/// A value that changes sooner than so many [ticks](Reserved::tick) after the last change is reserved once it has been
/// stable for as long.
const STABLE_TICKS: u64 = 6;

/// Reserved keys and addresses: those that the operator lists, and those that gateways publish.
#[derive(Debug, Clone, Default)]
pub struct Reserved {
    listed: BTreeSet<PublicKey>,
    listed_addresses: BTreeSet<Ipv6Addr>,
    /// The domains whose gateways reserve keys.
    domains: BTreeSet<Domain>,
    gateways: BTreeMap<WorkerDomain, Published>,
    /// Gateways with a value that is not reserved yet.
    unstable: BTreeSet<WorkerDomain>,
    /// How many gateways reserve each key and address.
    keys: BTreeMap<PublicKey, usize>,
    addresses: BTreeMap<Ipv6Addr, usize>,
    ticks: u64,
}

/// The published key and address of a gateway's interface in a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayPeer {
    /// Its key.
    pub key: PublicKey,
    /// Its link address; none if the published text is no address.
    pub address: Option<Ipv6Addr>,
}

/// A worker and a domain, as in the topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct WorkerDomain {
    worker: WorkerName,
    domain: String,
}

/// The values that a gateway published.
#[derive(Debug, Clone, Copy, Default)]
struct Published {
    key: Observed<PublicKey>,
    address: Observed<Ipv6Addr>,
}

/// The last published value, and whether it is reserved.
#[derive(Debug, Clone, Copy)]
struct Observed<T> {
    last: Option<T>,
    is_effective: bool,
    /// The tick of the last change; none if the value never changed.
    changed: Option<u64>,
}

impl<T> Default for Observed<T> {
    fn default() -> Self {
        Self { last: None, is_effective: false, changed: None }
    }
}

impl<T: Copy + PartialEq> Observed<T> {
    fn update(&mut self, value: Option<T>, tick: u64) {
        if value != self.last {
            (self.last, self.is_effective) = (value, self.is_stable(tick));
            self.changed = Some(tick);
        }
    }

    fn is_stable(&self, tick: u64) -> bool {
        self.changed.is_none_or(|changed| tick >= changed + STABLE_TICKS)
    }

    fn settle(&mut self, tick: u64) {
        self.is_effective |= self.is_stable(tick);
    }

    fn effective(&self) -> Option<T> {
        self.last.filter(|_| self.is_effective)
    }
}

impl Published {
    fn settle(&mut self, tick: u64) {
        self.key.settle(tick);
        self.address.settle(tick);
    }

    fn is_effective(&self) -> bool {
        self.key.is_effective && self.address.is_effective
    }

    fn addresses(&self) -> impl Iterator<Item = Ipv6Addr> + use<> {
        self.key.effective().map(|key| key.link_local()).into_iter().chain(self.address.effective())
    }
}

impl Reserved {
    /// Reserves the keys that the operator lists. No gateway is known yet; those of other domains than `domains` are
    /// ignored.
    #[must_use]
    pub fn new(listed: BTreeSet<PublicKey>, domains: BTreeSet<Domain>) -> Self {
        let listed_addresses = listed.iter().map(PublicKey::link_local).collect();
        Self { listed, listed_addresses, domains, ..Self::default() }
    }

    /// Handles the data that a worker published for a domain; none if it was cleared.
    pub fn update(&mut self, worker: &WorkerName, domain: &str, peer: Option<GatewayPeer>) {
        let gateway = WorkerDomain { worker: worker.clone(), domain: domain.to_owned() };
        let is_known = self.gateways.contains_key(&gateway);
        let may_be_new = peer.is_some() && self.domains.contains(domain) && self.gateways.len() < RESERVED_GATEWAYS_MAX;
        if is_known || may_be_new {
            let tick = self.ticks;
            self.change(gateway, |published| {
                published.key.update(peer.map(|peer| peer.key), tick);
                published.address.update(peer.and_then(own_address), tick);
            });
        }
    }

    /// Advances the time by one tick: ten seconds in both programs.
    pub fn tick(&mut self) {
        self.ticks += 1;
        let tick = self.ticks;
        for gateway in std::mem::take(&mut self.unstable) {
            self.change(gateway, |published| published.settle(tick));
        }
    }

    fn change(&mut self, gateway: WorkerDomain, change: impl FnOnce(&mut Published)) {
        let published = self.gateways.entry(gateway.clone()).or_default();
        let before = *published;
        change(published);
        let now = *published;
        if now.is_effective() {
            self.unstable.remove(&gateway);
        } else {
            self.unstable.insert(gateway);
        }
        now.key.effective().iter().for_each(|key| *self.keys.entry(*key).or_default() += 1);
        now.addresses().for_each(|address| *self.addresses.entry(address).or_default() += 1);
        before.key.effective().iter().for_each(|key| release(&mut self.keys, key));
        before.addresses().for_each(|address| release(&mut self.addresses, &address));
    }

    /// Whether no router may have `key`: it is reserved, or derives a reserved address. A key that a router already has
    /// stays its own, unless the operator [`Self::lists`] it.
    #[must_use]
    pub fn is_reserved(&self, key: &PublicKey) -> bool {
        self.has_key(key) || self.has_address(&key.link_local())
    }

    /// Whether the operator lists `key`, or one that derives the same address: then no router may have it.
    #[must_use]
    pub fn lists(&self, key: &PublicKey) -> bool {
        self.listed.contains(key) || self.listed_addresses.contains(&key.link_local())
    }

    /// Whether the data of `worker` reserve `key`, or its address.
    #[must_use]
    pub fn is_reserved_by(&self, worker: &WorkerName, key: &PublicKey) -> bool {
        let domains = self.domains.iter().map(|domain| domain.name().to_owned());
        let gateways = domains.map(|domain| WorkerDomain { worker: worker.clone(), domain });
        let mut published = gateways.filter_map(|gateway| self.gateways.get(&gateway));
        published.any(|published| {
            published.key.effective() == Some(*key) || published.addresses().any(|address| address == key.link_local())
        })
    }

    /// Whether it is the key of a gateway, or listed.
    #[must_use]
    pub fn has_key(&self, key: &PublicKey) -> bool {
        self.listed.contains(key) || self.keys.contains_key(key)
    }

    /// Whether it is the address of a gateway, or derived from a reserved key.
    #[must_use]
    pub fn has_address(&self, address: &Ipv6Addr) -> bool {
        self.listed_addresses.contains(address) || self.addresses.contains_key(address)
    }
}

fn release<T: Ord>(counts: &mut BTreeMap<T, usize>, one: &T) {
    if let Some(count) = counts.get_mut(one) {
        *count -= 1;
        if *count == 0 {
            counts.remove(one);
        }
    }
}

/// The published link address, unless it is one that a key can derive: the gateway's own is reserved by its key, and no
/// gateway may reserve a router's.
fn own_address(peer: GatewayPeer) -> Option<Ipv6Addr> {
    peer.address.filter(|address| !is_derived(*address))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::from_bytes([byte; 32]).unwrap()
    }

    fn worker(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn peer(key: PublicKey, address: &str) -> GatewayPeer {
        GatewayPeer { key, address: address.parse().ok() }
    }

    fn reserved(listed: &[u8]) -> Reserved {
        let domains = ["ff_a", "ff_b"].map(|name| Domain::new(name, &["ff_".into()]).unwrap());
        Reserved::new(listed.iter().map(|byte| key(*byte)).collect(), domains.into())
    }

    fn pass(reserved: &mut Reserved, ticks: u64) {
        (0..ticks).for_each(|_| reserved.tick());
    }

    #[test]
    fn a_gateways_key_and_address_are_reserved_until_it_publishes_others() {
        let mut reserved = reserved(&[9]);
        let routers = key(3).link_local();
        assert!(reserved.is_reserved(&key(9)) && reserved.lists(&key(9)) && !reserved.is_reserved(&key(1)));
        reserved.update(&worker("gw"), "ff_a", Some(peer(key(1), &routers.to_string())));
        assert!(reserved.has_key(&key(1)) && reserved.has_address(&key(1).link_local()) && !reserved.lists(&key(1)));
        assert!(!reserved.is_reserved(&key(3)), "no gateway takes a router's address");
        // When an interface is made, its key is published first, and then its address.
        reserved.update(&worker("gw"), "ff_a", Some(peer(key(1), "fe80::1")));
        assert!(reserved.has_address(&"fe80::1".parse().unwrap()));
        pass(&mut reserved, STABLE_TICKS);
        reserved.update(&worker("gw"), "ff_a", Some(peer(key(2), "no address")));
        assert!(reserved.is_reserved(&key(2)) && !reserved.is_reserved(&key(1)) && !reserved.is_reserved(&key(3)));
        assert!(!reserved.has_address(&"fe80::1".parse().unwrap()));
        reserved.update(&worker("gw"), "ff_b", Some(peer(key(1), "fe80::1")));
        reserved.update(&worker("gw"), "ff_a", None);
        assert!(reserved.is_reserved(&key(1)) && !reserved.is_reserved(&key(2)) && reserved.is_reserved(&key(9)));
    }

    #[test]
    fn a_key_is_reserved_by_the_worker_that_claims_it_or_its_address() {
        let mut reserved = reserved(&[9]);
        reserved.update(&worker("gw"), "ff_b", Some(peer(key(1), "fe80::1")));
        assert!(reserved.is_reserved_by(&worker("gw"), &key(1)));
        assert!(!reserved.is_reserved_by(&worker("gw"), &key(2)) && !reserved.is_reserved_by(&worker("gw"), &key(9)));
        assert!(!reserved.is_reserved_by(&worker("other"), &key(1)));
        reserved.update(&worker("gw"), "ff_b", None);
        assert!(!reserved.is_reserved_by(&worker("gw"), &key(1)));
    }

    /// Failed when data for any domain were reserved.
    #[test]
    fn gateways_of_domains_that_are_not_served_reserve_nothing() {
        let mut reserved = reserved(&[]);
        for n in 10..200 {
            reserved.update(&worker("gw"), &n.to_string(), Some(peer(key(n), "fe80::1")));
            assert!(!reserved.is_reserved(&key(n)));
        }
        assert!(reserved.gateways.is_empty() && !reserved.has_address(&"fe80::1".parse().unwrap()));
    }

    /// Failed when each value was reserved at once: the last key was reserved however often it changed.
    #[test]
    fn changing_worker_data_reserves_nothing_until_it_is_stable() {
        let mut reserved = reserved(&[]);
        for n in 10..60 {
            reserved.update(&worker("gw"), "ff_a", Some(peer(key(n), &format!("fe80::{n}"))));
            assert_eq!(reserved.is_reserved(&key(n)), n == 10, "the first word counts, {n}");
            reserved.update(&worker("gw"), "ff_a", None);
            pass(&mut reserved, STABLE_TICKS - 1);
        }
        reserved.update(&worker("gw"), "ff_a", Some(peer(key(7), "fe80::7")));
        assert!(!reserved.is_reserved(&key(7)));
        pass(&mut reserved, STABLE_TICKS);
        assert!(reserved.is_reserved(&key(7)) && reserved.has_address(&"fe80::7".parse().unwrap()));
        assert!(reserved.unstable.is_empty() && reserved.keys.len() == 1 && reserved.addresses.len() == 2);
    }

    #[test]
    fn nonsense_in_any_number_is_not_remembered() {
        let mut reserved = reserved(&[]);
        for number in 0..RESERVED_GATEWAYS_MAX {
            let gateway = WorkerDomain { worker: worker(&number.to_string()), domain: "ff_a".into() };
            reserved.gateways.insert(gateway, Published::default());
        }
        reserved.update(&worker("one more"), "ff_a", Some(peer(key(2), "fe80::1")));
        assert!(!reserved.is_reserved(&key(2)));
        reserved.update(&worker("1"), "ff_a", Some(peer(key(2), "fe80::1")));
        assert!(reserved.is_reserved(&key(2)));
    }

    proptest! {
        #[test]
        fn the_reserved_counts_equal_a_recount(
            words in prop::collection::vec((0..3_u8, 0..2_u8, prop::option::of((1..6_u8, 0..3_u8)), 0..8_u64), 0..60),
        ) {
            let mut reserved = reserved(&[]);
            for (name, domain, published, ticks) in words {
                let peer = published.map(|(n, address)| peer(key(n), &format!("fe80::{address}")));
                reserved.update(&worker(&name.to_string()), ["ff_a", "ff_b"][usize::from(domain)], peer);
                pass(&mut reserved, ticks);
                let (mut keys, mut addresses) = (BTreeMap::new(), BTreeMap::new());
                for published in reserved.gateways.values() {
                    published.key.effective().iter().for_each(|key| *keys.entry(*key).or_default() += 1_usize);
                    published.addresses().for_each(|address| *addresses.entry(address).or_default() += 1_usize);
                }
                prop_assert_eq!((&reserved.keys, &reserved.addresses), (&keys, &addresses));
                prop_assert!(reserved.keys.len() <= 6, "one for each worker and domain");
            }
        }
    }
}
