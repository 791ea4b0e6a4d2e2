//! The steps from a domain's actual interfaces to those in the config. No IO.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use wgkex_common::PublicKey;
use wgkex_kernel::links::VxlanAttributes;

/// The address of every gateway on its `vx-REST`, a /64.
pub const VXLAN_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A domain's actual interfaces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actual {
    /// `wg-REST`.
    pub wireguard: Option<Wireguard>,
    /// `vx-REST`.
    pub vxlan: Option<Vxlan>,
}

/// The attributes of a WireGuard interface that setup compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wireguard {
    /// Its own key; `None` while it has none.
    pub public_key: Option<PublicKey>,
    /// Its UDP port; 0 while it has none.
    pub listen_port: u16,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether the kernel adds a link-local address when the interface is set up. It would come before the derived one,
    /// and would be the address that routers get.
    pub auto_address: bool,
    /// Whether it is set up.
    pub up: bool,
}

/// The attributes of a VXLAN interface that setup compares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The attributes that are fixed when it is created.
    pub shape: VxlanSettings,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether it is set up.
    pub up: bool,
}

/// The attributes of a VXLAN interface that can only be changed by creating it again, with an empty flood list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanSettings {
    /// The VXLAN network identifier.
    pub id: u32,
    /// The UDP port, both ways.
    pub port: u16,
    /// The address it sends from.
    pub local: Option<IpAddr>,
    /// Whether it sends through the domain's `wg-REST`.
    pub over_wireguard: bool,
}

/// A domain's desired interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desired {
    /// The key of `wg-REST`; its address follows from it.
    pub public_key: PublicKey,
    /// The UDP port of `wg-REST`.
    pub listen_port: u16,
    /// The VXLAN network identifier of `vx-REST`.
    pub vxlan_id: u32,
    /// The UDP port of `vx-REST`.
    pub vxlan_port: u16,
}

/// One step, in the order in which they must be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetupStep {
    /// `wg-REST` is made.
    AddWireguard,
    /// The kernel adds no link-local address to `wg-REST`.
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

/// An attribute of an existing VXLAN interface that differs and cannot be changed, such as `id 1 instead of 99`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incompatible(pub String);

/// The steps from `actual` to `desired`; none if they are equal.
pub fn differences(actual: &Actual, desired: &Desired) -> Result<Vec<SetupStep>, Incompatible> {
    let shape = desired.shape();
    if let Some(incompatible) = actual.vxlan.as_ref().and_then(|vxlan| vxlan.shape.incompatible(&shape)) {
        return Err(incompatible);
    }
    let mut steps = wireguard(actual.wireguard.as_ref(), desired);
    steps.extend(vxlan(actual.vxlan.as_ref(), desired));
    Ok(steps)
}

fn wireguard(actual: Option<&Wireguard>, desired: &Desired) -> Vec<SetupStep> {
    let address = desired.public_key.link_local();
    let fresh =
        Wireguard { public_key: None, listen_port: 0, addresses: BTreeSet::new(), auto_address: true, up: false };
    let now = actual.unwrap_or(&fresh);
    chosen([
        (actual.is_none(), SetupStep::AddWireguard),
        (now.auto_address, SetupStep::NoAutoAddress),
        (now.public_key != Some(desired.public_key), SetupStep::SetKey),
        (now.listen_port != desired.listen_port, SetupStep::SetPort(desired.listen_port)),
        (!now.addresses.contains(&address), SetupStep::AddAddress(address)),
        (!now.up, SetupStep::UpWireguard),
    ])
}

fn vxlan(actual: Option<&Vxlan>, desired: &Desired) -> Vec<SetupStep> {
    let (id, port) = (desired.vxlan_id, desired.vxlan_port);
    let local = desired.public_key.link_local();
    chosen([
        (actual.is_none(), SetupStep::AddVxlan { id, port, local }),
        (!actual.is_some_and(|vxlan| vxlan.addresses.contains(&VXLAN_ADDRESS)), SetupStep::AddVxlanAddress),
        (!actual.is_some_and(|vxlan| vxlan.up), SetupStep::UpVxlan),
    ])
}

fn chosen<const N: usize>(steps: [(bool, SetupStep); N]) -> Vec<SetupStep> {
    steps.into_iter().filter_map(|(due, step)| due.then_some(step)).collect()
}

impl Desired {
    fn shape(&self) -> VxlanSettings {
        VxlanSettings {
            id: self.vxlan_id,
            port: self.vxlan_port,
            local: Some(self.public_key.link_local().into()),
            over_wireguard: true,
        }
    }
}

impl VxlanSettings {
    /// The VXLAN attributes of an existing interface; `wireguard` is the index of `wg-REST`.
    pub fn of(vxlan: &VxlanAttributes, wireguard: Option<u32>) -> Self {
        let VxlanAttributes { id, port, local, under } = *vxlan;
        Self { id, port, local, over_wireguard: under.is_some() && under == wireguard }
    }

    fn incompatible(&self, desired: &Self) -> Option<Incompatible> {
        let address = |address: Option<IpAddr>| address.map_or("none".into(), |address| address.to_string());
        let differing = [
            (self.id != desired.id).then(|| format!("id {} instead of {}", self.id, desired.id)),
            (self.port != desired.port).then(|| format!("port {} instead of {}", self.port, desired.port)),
            (self.local != desired.local)
                .then(|| format!("local address {} instead of {}", address(self.local), address(desired.local))),
            (!self.over_wireguard && desired.over_wireguard).then(|| "another device below it".into()),
        ];
        let differing: Vec<String> = differing.into_iter().flatten().collect();
        (!differing.is_empty()).then(|| Incompatible(differing.join(", ")))
    }
}

impl fmt::Display for SetupStep {
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
        let local = desired().public_key.link_local();
        assert_eq!(
            differences(&Actual::default(), &desired()),
            Ok(vec![
                SetupStep::AddWireguard,
                SetupStep::NoAutoAddress,
                SetupStep::SetKey,
                SetupStep::SetPort(51820),
                SetupStep::AddAddress(local),
                SetupStep::UpWireguard,
                SetupStep::AddVxlan { id: 99, port: 8472, local },
                SetupStep::AddVxlanAddress,
                SetupStep::UpVxlan,
            ])
        );
    }

    #[test]
    fn only_differences_make_steps() {
        type Spoil = fn(&mut Actual);
        let local = desired().public_key.link_local();
        let table: [(Spoil, Vec<SetupStep>); 12] = [
            (|_| {}, vec![]),
            (|actual| wg(actual).public_key = None, vec![SetupStep::SetKey]),
            (|actual| wg(actual).public_key = Some(other_key()), vec![SetupStep::SetKey]),
            (|actual| wg(actual).listen_port = 1, vec![SetupStep::SetPort(51820)]),
            (|actual| wg(actual).addresses.clear(), vec![SetupStep::AddAddress(local)]),
            (|actual| wg(actual).auto_address = true, vec![SetupStep::NoAutoAddress]),
            (|actual| wg(actual).up = false, vec![SetupStep::UpWireguard]),
            (|actual| assert!(wg(actual).addresses.insert(Ipv6Addr::LOCALHOST)), vec![]),
            (|actual| actual.vxlan = None, {
                vec![SetupStep::AddVxlan { id: 99, port: 8472, local }, SetupStep::AddVxlanAddress, SetupStep::UpVxlan]
            }),
            (|actual| vx(actual).addresses.clear(), vec![SetupStep::AddVxlanAddress]),
            (|actual| vx(actual).up = false, vec![SetupStep::UpVxlan]),
            (|actual| assert!(vx(actual).addresses.insert(Ipv6Addr::LOCALHOST)), vec![]),
        ];
        for (spoil, steps) in table {
            let mut actual = complete();
            spoil(&mut actual);
            assert_eq!(differences(&actual, &desired()), Ok(steps), "{actual:?}");
        }
    }

    #[test]
    fn a_vxlan_that_would_have_to_be_made_anew_is_refused_before_anything_is_done() {
        type Spoil = fn(&mut VxlanSettings);
        let table: [(Spoil, &str); 5] = [
            (|shape| shape.id = 1, "id 1 instead of 99"),
            (|shape| shape.port = 4789, "port 4789 instead of 8472"),
            (|shape| shape.local = None, "local address none instead of fe80::27c:16ff:fec0:6c74"),
            (|shape| shape.over_wireguard = false, "another device below it"),
            (|shape| (shape.id, shape.port) = (1, 2), "id 1 instead of 99, port 2 instead of 8472"),
        ];
        for (spoil, incompatible) in table {
            let mut actual = complete();
            wg(&mut actual).up = false;
            spoil(&mut vx(&mut actual).shape);
            assert_eq!(differences(&actual, &desired()), Err(Incompatible(incompatible.into())));
        }
    }

    fn wg(actual: &mut Actual) -> &mut Wireguard {
        actual.wireguard.as_mut().unwrap()
    }

    fn vx(actual: &mut Actual) -> &mut Vxlan {
        actual.vxlan.as_mut().unwrap()
    }

    fn other_key() -> PublicKey {
        "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=".parse().unwrap()
    }

    fn desired() -> Desired {
        Desired {
            public_key: "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=".parse().unwrap(),
            listen_port: 51820,
            vxlan_id: 99,
            vxlan_port: 8472,
        }
    }

    fn complete() -> Actual {
        let desired = desired();
        Actual {
            wireguard: Some(Wireguard {
                public_key: Some(desired.public_key),
                listen_port: desired.listen_port,
                addresses: [desired.public_key.link_local()].into(),
                auto_address: false,
                up: true,
            }),
            vxlan: Some(Vxlan { shape: desired.shape(), addresses: [VXLAN_ADDRESS].into(), up: true }),
        }
    }
}
