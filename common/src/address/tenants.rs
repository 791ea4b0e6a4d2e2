//! The networks of tenants: a pool, cut into networks of one size.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Which networks tenants have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantNetworks {
    /// Networks of one family that do not overlap.
    pub pool: Vec<IpNet>,
    /// The prefix length of the networks that they are cut into; one that is no larger than these is one of them.
    pub tenant_length: u8,
}

impl TenantNetworks {
    /// Each network of the pool, with the prefix length of those that it is cut into.
    pub fn parts(&self) -> impl Iterator<Item = (IpNet, u8)> {
        self.pool.iter().map(|network| (*network, self.tenant_length.max(network.prefix_len())))
    }

    /// How many tenants there may be.
    #[must_use]
    pub fn count(&self) -> u128 {
        self.parts().map(|(network, length)| 1_u128 << (length - network.prefix_len())).sum()
    }

    /// The network of the tenant that has this address.
    #[must_use]
    pub fn of(&self, address: IpAddr) -> Option<IpNet> {
        let (_, length) = self.parts().find(|(network, _)| network.contains(&address))?;
        IpNet::new(address, length).ok().map(|network| network.trunc())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_of_the_network_of_its_tenant() {
        let networks = TenantNetworks {
            pool: ["10.64.0.0/10", "192.168.1.0/24"].map(|network| network.parse().unwrap()).into(),
            tenant_length: 20,
        };
        assert_eq!(networks.count(), 1025);
        for (address, expected) in [
            ("10.64.0.1", Some("10.64.0.0/20")),
            ("10.127.255.254", Some("10.127.240.0/20")),
            ("10.128.0.1", None),
            ("192.168.1.7", Some("192.168.1.0/24")),
            ("192.168.2.7", None),
            ("fd00::1", None),
        ] {
            let expected = expected.map(|network| network.parse::<IpNet>().unwrap());
            assert_eq!(networks.of(address.parse().unwrap()), expected, "{address}");
        }
    }
}
