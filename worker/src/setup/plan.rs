//! What is still to be done to a domain's interfaces: found and wanted in, steps out. No IO.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use wgkex_common::PublicKey;

/// The address of every gateway on its `vx-REST`, a /64.
pub const VXLAN_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A domain's interfaces as they stand.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// `wg-REST`.
    pub wireguard: Option<Wireguard>,
    /// `vx-REST`.
    pub vxlan: Option<Vxlan>,
}

/// What matters of a WireGuard interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wireguard {
    /// Its own key; `None` while it has none.
    pub public_key: Option<PublicKey>,
    /// Its UDP port; 0 while it has none.
    pub listen_port: u16,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether the kernel gives it a link-local address of its own when it comes up. That one would come before
    /// the derived one, and routers would be told to use it.
    pub auto_address: bool,
    /// Whether it is set up.
    pub up: bool,
}

/// What matters of a VXLAN interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// What is fixed when it is made.
    pub shape: Shape,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether it is set up.
    pub up: bool,
}

/// What of a VXLAN interface could only change by making it anew, with an empty flood list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The VXLAN network identifier.
    pub id: u32,
    /// The UDP port, both ways.
    pub port: u16,
    /// The address it sends from.
    pub local: Option<IpAddr>,
    /// Whether it sends through the domain's `wg-REST`.
    pub over_wireguard: bool,
}

/// A domain's interfaces as they shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The key of `wg-REST`; its address follows from it.
    pub public_key: PublicKey,
    /// The UDP port of `wg-REST`.
    pub listen_port: u16,
    /// The VXLAN network identifier of `vx-REST`.
    pub vxlan_id: u32,
    /// The UDP port of `vx-REST`.
    pub vxlan_port: u16,
}

/// One thing to do, in the order in which it must be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `wg-REST` is made.
    AddWireguard,
    /// `wg-REST` gets no address but those that are set.
    NoAutoAddress,
    /// `wg-REST` gets the key.
    SetKey,
    /// `wg-REST` gets this UDP port.
    SetPort(u16),
    /// `wg-REST` gets this address, a /128.
    AddAddress(Ipv6Addr),
    /// `wg-REST` is set up.
    UpWireguard,
    /// `vx-REST` is made.
    AddVxlan {
        /// The VXLAN network identifier.
        id: u32,
        /// The UDP port, both ways.
        port: u16,
        /// The address it sends from.
        local: Ipv6Addr,
    },
    /// `vx-REST` gets [`VXLAN_ADDRESS`].
    AddVxlanAddress,
    /// `vx-REST` is set up.
    UpVxlan,
}

/// What of an existing VXLAN interface is not as wanted and cannot be changed, such as `id 1 instead of 99`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit(pub String);

/// The steps from `found` to `wanted`. None when all is as wanted: what has been done is not done again.
pub fn differences(found: &Found, wanted: &Wanted) -> Result<Vec<Step>, Unfit> {
    let shape = wanted.shape();
    if let Some(unfit) = found.vxlan.as_ref().and_then(|vxlan| vxlan.shape.unfit(&shape)) {
        return Err(unfit);
    }
    let mut steps = wireguard(found.wireguard.as_ref(), wanted);
    steps.extend(vxlan(found.vxlan.as_ref(), wanted));
    Ok(steps)
}

fn wireguard(found: Option<&Wireguard>, wanted: &Wanted) -> Vec<Step> {
    let address = wanted.public_key.link_local();
    let fresh =
        Wireguard { public_key: None, listen_port: 0, addresses: BTreeSet::new(), auto_address: true, up: false };
    let now = found.unwrap_or(&fresh);
    chosen([
        (found.is_none(), Step::AddWireguard),
        (now.auto_address, Step::NoAutoAddress),
        (now.public_key != Some(wanted.public_key), Step::SetKey),
        (now.listen_port != wanted.listen_port, Step::SetPort(wanted.listen_port)),
        (!now.addresses.contains(&address), Step::AddAddress(address)),
        (!now.up, Step::UpWireguard),
    ])
}

fn vxlan(found: Option<&Vxlan>, wanted: &Wanted) -> Vec<Step> {
    let (id, port) = (wanted.vxlan_id, wanted.vxlan_port);
    let local = wanted.public_key.link_local();
    chosen([
        (found.is_none(), Step::AddVxlan { id, port, local }),
        (!found.is_some_and(|vxlan| vxlan.addresses.contains(&VXLAN_ADDRESS)), Step::AddVxlanAddress),
        (!found.is_some_and(|vxlan| vxlan.up), Step::UpVxlan),
    ])
}

fn chosen<const N: usize>(steps: [(bool, Step); N]) -> Vec<Step> {
    steps.into_iter().filter_map(|(due, step)| due.then_some(step)).collect()
}

impl Wanted {
    fn shape(&self) -> Shape {
        Shape {
            id: self.vxlan_id,
            port: self.vxlan_port,
            local: Some(self.public_key.link_local().into()),
            over_wireguard: true,
        }
    }
}

impl Shape {
    fn unfit(&self, wanted: &Self) -> Option<Unfit> {
        let address = |address: Option<IpAddr>| address.map_or("none".into(), |address| address.to_string());
        let differing = [
            (self.id != wanted.id).then(|| format!("id {} instead of {}", self.id, wanted.id)),
            (self.port != wanted.port).then(|| format!("port {} instead of {}", self.port, wanted.port)),
            (self.local != wanted.local)
                .then(|| format!("local address {} instead of {}", address(self.local), address(wanted.local))),
            (!self.over_wireguard && wanted.over_wireguard).then(|| "another device below it".into()),
        ];
        let differing: Vec<String> = differing.into_iter().flatten().collect();
        (!differing.is_empty()).then(|| Unfit(differing.join(", ")))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddWireguard => f.write_str("add the WireGuard interface"),
            Self::NoAutoAddress => f.write_str("switch off automatic addresses"),
            Self::SetKey => f.write_str("set the key"),
            Self::SetPort(port) => write!(f, "set the UDP port {port}"),
            Self::AddAddress(address) => write!(f, "add the address {address}"),
            Self::AddVxlan { id, port, .. } => write!(f, "add the VXLAN interface with id {id} and port {port}"),
            Self::AddVxlanAddress => write!(f, "add the address {VXLAN_ADDRESS}"),
            Self::UpWireguard | Self::UpVxlan => f.write_str("set it up"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_nothing_everything_is_made_in_an_order_that_works() {
        let local = wanted().public_key.link_local();
        assert_eq!(
            differences(&Found::default(), &wanted()),
            Ok(vec![
                Step::AddWireguard,
                Step::NoAutoAddress,
                Step::SetKey,
                Step::SetPort(51820),
                Step::AddAddress(local),
                Step::UpWireguard,
                Step::AddVxlan { id: 99, port: 8472, local },
                Step::AddVxlanAddress,
                Step::UpVxlan,
            ])
        );
    }

    #[test]
    fn only_what_differs_is_done() {
        type Spoil = fn(&mut Found);
        let local = wanted().public_key.link_local();
        let table: [(Spoil, Vec<Step>); 12] = [
            (|_| {}, vec![]),
            (|found| wg(found).public_key = None, vec![Step::SetKey]),
            (|found| wg(found).public_key = Some(other_key()), vec![Step::SetKey]),
            (|found| wg(found).listen_port = 1, vec![Step::SetPort(51820)]),
            (|found| wg(found).addresses.clear(), vec![Step::AddAddress(local)]),
            (|found| wg(found).auto_address = true, vec![Step::NoAutoAddress]),
            (|found| wg(found).up = false, vec![Step::UpWireguard]),
            (|found| assert!(wg(found).addresses.insert(Ipv6Addr::LOCALHOST)), vec![]),
            (|found| found.vxlan = None, {
                vec![Step::AddVxlan { id: 99, port: 8472, local }, Step::AddVxlanAddress, Step::UpVxlan]
            }),
            (|found| vx(found).addresses.clear(), vec![Step::AddVxlanAddress]),
            (|found| vx(found).up = false, vec![Step::UpVxlan]),
            (|found| assert!(vx(found).addresses.insert(Ipv6Addr::LOCALHOST)), vec![]),
        ];
        for (spoil, steps) in table {
            let mut found = complete();
            spoil(&mut found);
            assert_eq!(differences(&found, &wanted()), Ok(steps), "{found:?}");
        }
    }

    #[test]
    fn a_vxlan_that_would_have_to_be_made_anew_is_refused_before_anything_is_done() {
        type Spoil = fn(&mut Shape);
        let table: [(Spoil, &str); 5] = [
            (|shape| shape.id = 1, "id 1 instead of 99"),
            (|shape| shape.port = 4789, "port 4789 instead of 8472"),
            (|shape| shape.local = None, "local address none instead of fe80::27c:16ff:fec0:6c74"),
            (|shape| shape.over_wireguard = false, "another device below it"),
            (|shape| (shape.id, shape.port) = (1, 2), "id 1 instead of 99, port 2 instead of 8472"),
        ];
        for (spoil, unfit) in table {
            let mut found = complete();
            wg(&mut found).up = false;
            spoil(&mut vx(&mut found).shape);
            assert_eq!(differences(&found, &wanted()), Err(Unfit(unfit.into())));
        }
    }

    fn wg(found: &mut Found) -> &mut Wireguard {
        found.wireguard.as_mut().unwrap()
    }

    fn vx(found: &mut Found) -> &mut Vxlan {
        found.vxlan.as_mut().unwrap()
    }

    fn other_key() -> PublicKey {
        "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=".parse().unwrap()
    }

    fn wanted() -> Wanted {
        Wanted {
            public_key: "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=".parse().unwrap(),
            listen_port: 51820,
            vxlan_id: 99,
            vxlan_port: 8472,
        }
    }

    fn complete() -> Found {
        let wanted = wanted();
        Found {
            wireguard: Some(Wireguard {
                public_key: Some(wanted.public_key),
                listen_port: wanted.listen_port,
                addresses: [wanted.public_key.link_local()].into(),
                auto_address: false,
                up: true,
            }),
            vxlan: Some(Vxlan { shape: wanted.shape(), addresses: [VXLAN_ADDRESS].into(), up: true }),
        }
    }
}
