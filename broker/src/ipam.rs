//! Which addresses are free: the arithmetic of pools. A pool is a range of addresses in a network
//! ([`Range`]), or a network that is cut into equal ones ([`Blocks`]); both number their members, and callers hand out
//! the lowest free number.
//!
//! Callers keep the taken numbers: in a database, of which [`lowest_free`] gets the taken numbers in order; or in
//! memory, by a [`FreeList`].
//!
//! No IO, no task, no owner. Previous stop of a request: [`crate::registry`] or [`crate::tenants`]; next stop of the
//! address: the same room, which leases it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The addresses of a network that may be handed out, numbered by their distance from the network's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    network: IpNet,
    first: u128,
    last: u128,
}

impl Range {
    /// All but the first address (the network's) and the last (the broadcast address). Empty where a network has no more
    /// than these.
    #[must_use]
    pub fn hosts(network: IpNet) -> Self {
        Self { network: network.trunc(), first: 1, last: last(network).saturating_sub(1) }
    }

    /// The same, without the addresses up to the one with the number `reserved`.
    #[must_use]
    pub fn above(network: IpNet, reserved: u128) -> Self {
        let hosts = Self::hosts(network);
        Self { first: hosts.first.max(reserved.saturating_add(1)), ..hosts }
    }

    /// The lowest number.
    #[must_use]
    pub fn first(&self) -> u128 {
        self.first
    }

    /// How many numbers there are.
    #[must_use]
    pub fn size(&self) -> u128 {
        (self.last + 1).saturating_sub(self.first)
    }

    /// Whether `number` may be handed out.
    #[must_use]
    pub fn contains(&self, number: u128) -> bool {
        (self.first..=self.last).contains(&number)
    }

    /// The address that has `number`; none beyond the network.
    #[must_use]
    pub fn address(&self, number: u128) -> Option<IpAddr> {
        address(self.network, number)
    }

    /// The number of an address that may be handed out.
    #[must_use]
    pub fn number(&self, address: IpAddr) -> Option<u128> {
        let number = bits(address).checked_sub(bits(self.network.addr()))?;
        (self.network.contains(&address) && self.contains(number)).then_some(number)
    }
}

/// A network cut into networks of one length, numbered from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    pool: IpNet,
    length: u8,
}

impl Blocks {
    /// None if a network of `length` does not fit into `pool`.
    #[must_use]
    pub fn new(pool: IpNet, length: u8) -> Option<Self> {
        (pool.prefix_len()..=pool.max_prefix_len()).contains(&length).then_some(Self { pool: pool.trunc(), length })
    }

    /// How many there are.
    #[must_use]
    pub fn size(&self) -> u128 {
        1_u128.checked_shl((self.length - self.pool.prefix_len()).into()).unwrap_or(u128::MAX)
    }

    /// The network that has `number`; none beyond the pool.
    #[must_use]
    pub fn network(&self, number: u128) -> Option<IpNet> {
        let distance = number.checked_shl((self.pool.max_prefix_len() - self.length).into())?;
        (number < self.size()).then(|| IpNet::new(address(self.pool, distance)?, self.length).ok()).flatten()
    }

    /// The number of the one that has this address.
    #[must_use]
    pub fn number_of(&self, address: IpAddr) -> Option<u128> {
        self.number(IpNet::new(address, self.length).ok()?.trunc())
    }

    /// The number of a network of these.
    #[must_use]
    pub fn number(&self, network: IpNet) -> Option<u128> {
        let distance = bits(network.addr()).checked_sub(bits(self.pool.addr()))?;
        let number = distance >> (self.pool.max_prefix_len() - self.length);
        (self.network(number) == Some(network)).then_some(number)
    }
}

/// The lowest number that is at least `from` and not in `taken`, which are numbers in rising order.
pub fn lowest_free(from: u128, taken: impl IntoIterator<Item = u128>) -> u128 {
    let mut free = from;
    for number in taken {
        if number > free {
            break;
        }
        if number == free {
            free = free.saturating_add(1);
        }
    }
    free
}

/// How far beyond the numbers handed out [`FreeList::take_this`] goes: it remembers each number between.
const SKIPPED_MAX: u128 = 1 << 16;

/// The free ones of the numbers from `first` to `last`, in memory. Its size grows with the numbers that were handed
/// out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeList {
    first: u128,
    /// Free numbers below `next`.
    returned: BTreeSet<u128>,
    /// The lowest number that was never handed out.
    next: u128,
    last: u128,
}

impl FreeList {
    /// All addresses of `range` are free.
    #[must_use]
    pub fn of_range(range: Range) -> Self {
        Self { first: range.first, returned: BTreeSet::new(), next: range.first, last: range.last }
    }

    /// All networks of a pool are free. They are numbered as those of its parts one after the other.
    #[must_use]
    pub fn of_blocks(parts: &[Blocks]) -> Self {
        let size = parts.iter().fold(0, |sum: u128, blocks| sum.saturating_add(blocks.size()));
        Self {
            first: u128::from(size == 0),
            returned: BTreeSet::new(),
            next: u128::from(size == 0),
            last: size.saturating_sub(1),
        }
    }

    /// Hands out the lowest free number; none if all are taken.
    pub fn take(&mut self) -> Option<u128> {
        if let Some(number) = self.returned.pop_first() {
            return Some(number);
        }
        let number = self.next;
        (number <= self.last).then(|| {
            self.next += 1;
            number
        })
    }

    /// Hands out this number; false if it is taken, or none of these.
    pub fn take_this(&mut self, number: u128) -> bool {
        if number < self.next {
            return self.returned.remove(&number);
        }
        let is_free = number <= self.last && number - self.next <= SKIPPED_MAX;
        if is_free {
            self.returned.extend(self.next..number);
            self.next = number + 1;
        }
        is_free
    }

    /// Takes back a number that was handed out.
    pub fn give_back(&mut self, number: u128) {
        if (self.first..self.next).contains(&number) {
            self.returned.insert(number);
        }
        while self.next.checked_sub(1).is_some_and(|below| self.returned.remove(&below)) {
            self.next -= 1;
        }
    }
}

/// The number of the last address of a network.
fn last(network: IpNet) -> u128 {
    bits(network.broadcast()) - bits(network.network())
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn address(network: IpNet, number: u128) -> Option<IpAddr> {
    if number > last(network) {
        return None;
    }
    Some(match network {
        IpNet::V4(network) => {
            IpAddr::V4(Ipv4Net::network(&network).to_bits().checked_add(u32::try_from(number).ok()?)?.into())
        }
        IpNet::V6(network) => IpAddr::V6(Ipv6Net::network(&network).to_bits().checked_add(number)?.into()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn first_address(network: &str, reserved: u128) -> Option<String> {
        let range = Range::above(net(network), reserved);
        let free = Some(lowest_free(range.first(), [])).filter(|free| range.contains(*free))?;
        Some(range.address(free)?.to_string())
    }

    #[test]
    fn neither_the_networks_address_nor_the_broadcast_address_is_handed_out() {
        for (network, reserved, first, size) in [
            ("192.168.2.0/24", 20, Some("192.168.2.21"), 234),
            ("192.168.2.0/24", 0, Some("192.168.2.1"), 254),
            ("192.168.2.0/24", 253, Some("192.168.2.254"), 1),
            ("192.168.2.0/24", 254, None, 0),
            ("10.0.0.8/29", 2, Some("10.0.0.11"), 4),
            ("10.0.0.4/30", 0, Some("10.0.0.5"), 2),
            ("10.0.0.4/31", 0, None, 0),
            ("10.0.0.4/32", 0, None, 0),
            ("fd00::/64", 20, Some("fd00::15"), (1 << 64) - 22),
            ("::/0", 0, Some("::1"), u128::MAX - 1),
            ("0.0.0.0/0", u128::MAX, None, 0),
        ] {
            let range = Range::above(net(network), reserved);
            assert_eq!(
                (first_address(network, reserved).as_deref(), range.size()),
                (first, size),
                "{network} {reserved}"
            );
        }
    }

    #[test]
    fn a_pool_is_cut_into_networks() {
        let blocks = Blocks::new(net("10.64.0.0/10"), 20).unwrap();
        assert_eq!(blocks.size(), 1024);
        for (number, network) in [(0, "10.64.0.0/20"), (1, "10.64.16.0/20"), (1023, "10.127.240.0/20")] {
            assert_eq!(blocks.network(number), Some(net(network)));
            assert_eq!(blocks.number(net(network)), Some(number));
        }
        assert_eq!(blocks.network(1024), None);
        for other in ["10.64.0.0/21", "10.128.0.0/20", "10.0.0.0/20", "fd00::/20"] {
            assert_eq!(blocks.number(net(other)), None, "{other}");
        }
        assert_eq!(Blocks::new(net("10.0.0.0/24"), 24).unwrap().network(0), Some(net("10.0.0.0/24")));
        for (pool, length) in [("10.0.0.0/24", 23), ("10.0.0.0/24", 33), ("fd00::/48", 129)] {
            assert_eq!(Blocks::new(net(pool), length), None, "{pool} {length}");
        }
        assert_eq!(Blocks::new(net("::/0"), 128).unwrap().network(7), Some(net("::7/128")));
    }

    /// An operation of a caller on a pool.
    #[derive(Debug, Clone)]
    enum PoolStep {
        Take,
        TakeThis(u128),
        GiveBack(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<PoolStep>> {
        let step = prop_oneof![
            3 => Just(PoolStep::Take),
            1 => (0_u128..20).prop_map(PoolStep::TakeThis),
            2 => any::<usize>().prop_map(PoolStep::GiveBack),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        /// The registry's way and the tenants' way agree with a plain set, and no number is handed out twice.
        #[test]
        fn the_lowest_free_number_is_handed_out(steps in steps(), reserved in 0_u128..4) {
            let range = Range::above(net("10.0.0.16/28"), reserved);
            let (mut list, mut taken) = (FreeList::of_range(range), BTreeSet::new());
            for step in steps {
                let expected = (range.first..=range.last).find(|number| !taken.contains(number));
                let free = lowest_free(range.first(), taken.iter().copied());
                prop_assert_eq!(Some(free).filter(|free| range.contains(*free)), expected);
                match step {
                    PoolStep::Take => {
                        prop_assert_eq!(list.take(), expected);
                        taken.extend(expected);
                    }
                    PoolStep::TakeThis(number) => {
                        let is_free = range.contains(number) && !taken.contains(&number);
                        prop_assert_eq!(list.take_this(number), is_free);
                        taken.extend(is_free.then_some(number));
                    }
                    PoolStep::GiveBack(index) => {
                        if let Some(number) = taken.iter().nth(index % taken.len().max(1)).copied() {
                            list.give_back(number);
                            taken.remove(&number);
                        }
                    }
                }
            }
            prop_assert!(list.returned.len() <= 20);
        }

        #[test]
        fn a_number_is_that_of_its_address(network in any::<u32>(), length in 0_u8..=32, number in any::<u64>()) {
            let range = Range::hosts(IpNet::new(IpAddr::V4(network.into()), length).unwrap());
            let number = u128::from(number) % (1 << (32 - length));
            let address = range.address(number).unwrap();
            prop_assert_eq!(range.number(address), range.contains(number).then_some(number));
        }

        #[test]
        fn networks_of_a_pool_never_overlap(a in 0_u128..1024, b in 0_u128..1024) {
            let blocks = Blocks::new(net("10.64.0.0/10"), 20).unwrap();
            let [first, second] = [a, b].map(|number| blocks.network(number).unwrap());
            prop_assert_eq!(first.contains(&second), a == b);
        }
    }
}
