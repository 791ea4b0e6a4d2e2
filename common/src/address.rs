//! Which key has an address: several keys can derive the same address. No IO, no clock, no task.
//!
//! [`reserved`] holds the keys and addresses of gateways, which no router may have; [`claim`] decides between two
//! routers. [`tenants`] computes the networks of tenants.
//!
//! Previous stop of a gateway's reservation: the `bus` room, which receives the gateway's data. Next stops: the
//! broker's `exchange`, which checks it before it publishes a key, and the worker's `peers` before it admits one.

pub mod claim;
pub mod reserved;
pub mod tenants;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// The address after the network's: that of a server in its own network.
#[must_use]
pub fn first_of(network: IpNet) -> IpAddr {
    match network.network() {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() | 1).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() | 1).into(),
    }
}
