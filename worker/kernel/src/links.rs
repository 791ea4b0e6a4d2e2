//! Interfaces by rtnetlink: look one up, make it, change it, delete it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use futures_util::TryStreamExt as _;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use nix::errno::Errno;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVxlan, LinkWireguard};

/// The interfaces of the network namespace in which it was opened.
pub struct Links(Handle);

/// The kind of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// The kernel's WireGuard.
    Wireguard,
    /// A TUN device, as a userspace WireGuard has it.
    Tun,
    /// The kernel's VXLAN.
    Vxlan(VxlanAttributes),
    /// Another kind, by the kernel's name for it.
    Other(String),
    /// No kind: a physical interface.
    Physical,
}

/// The attributes of a VXLAN interface that cannot be changed after it is created.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VxlanAttributes {
    /// The VXLAN network identifier.
    pub id: u32,
    /// The UDP port, both ways.
    pub port: u16,
    /// The address it sends from.
    pub local: Option<IpAddr>,
    /// The index of the interface that it sends through.
    pub under: Option<u32>,
}

/// An interface as rtnetlink shows it.
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its kind.
    pub kind: LinkKind,
    /// Whether the kernel gives it a link-local address when it comes up.
    pub auto_address: bool,
    /// Whether it is set up.
    pub up: bool,
    /// Its MTU.
    pub mtu: u32,
    /// Its IPv6 addresses.
    pub addresses: BTreeSet<Ipv6Addr>,
    /// Whether it has an IPv4 address.
    pub has_ipv4: bool,
}

impl Links {
    /// Opens a netlink socket. Must be called within a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.0
    }

    /// The interface of that name, if there is one.
    pub async fn find(&self, name: &str) -> io::Result<Option<Link>> {
        match self.0.link().get().match_name(name).execute().try_next().await.map_err(plain) {
            Ok(Some(message)) => {
                let addresses = self.addresses(message.header.index).await?;
                Ok(Some(Link::new(&message, &addresses)))
            }
            Ok(None) => Ok(None),
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn addresses(&self, index: u32) -> io::Result<Vec<IpAddr>> {
        let request = self.0.address().get().set_link_index_filter(index);
        let messages: Vec<_> = request.execute().try_collect().await.map_err(plain)?;
        let attributes = messages.into_iter().flat_map(|message| message.attributes);
        Ok(attributes.filter_map(|attribute| address(&attribute)).collect())
    }

    /// Makes an interface of the kernel's WireGuard.
    pub async fn add_wireguard(&self, name: &str) -> io::Result<()> {
        self.0.link().add(LinkWireguard::new(name).build()).execute().await.map_err(plain)
    }

    /// Makes a VXLAN interface over the interface `under`.
    pub async fn add_vxlan(&self, name: &str, id: u32, port: u16, local: Ipv6Addr, under: &str) -> io::Result<()> {
        let under = self.index(under).await?;
        let message = LinkVxlan::new(name, id).port(port).local6(local).dev(under).build();
        self.0.link().add(message).execute().await.map_err(plain)
    }

    /// Keeps the kernel from giving the interface addresses of its own.
    pub async fn no_auto_address(&self, name: &str) -> io::Result<()> {
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let message = LinkUnspec::new_with_name(name);
        self.change(message.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![mode]))).await
    }

    /// Sets the interface up.
    pub async fn up(&self, name: &str) -> io::Result<()> {
        self.change(LinkUnspec::new_with_name(name).up()).await
    }

    async fn change(&self, message: LinkMessageBuilder<LinkUnspec>) -> io::Result<()> {
        self.0.link().change(message.build()).execute().await.map_err(plain)
    }

    /// Gives the interface an address.
    pub async fn add_address(&self, name: &str, address: impl Into<IpAddr>, prefix: u8) -> io::Result<()> {
        let index = self.index(name).await?;
        self.0.address().add(index, address.into(), prefix).execute().await.map_err(plain)
    }

    /// Deletes the interface; a missing one is no error.
    pub async fn delete(&self, name: &str) -> io::Result<()> {
        match self.find(name).await? {
            Some(link) => self.0.link().del(link.index).execute().await.map_err(plain),
            None => Ok(()),
        }
    }

    /// Its index.
    pub(crate) async fn index(&self, name: &str) -> io::Result<u32> {
        let link = self.find(name).await?;
        link.map(|link| link.index).ok_or_else(|| io::Error::other(format!("{name} is missing")))
    }
}

impl Link {
    fn new(message: &LinkMessage, addresses: &[IpAddr]) -> Self {
        let ipv6 = |address: &IpAddr| if let IpAddr::V6(address) = address { Some(*address) } else { None };
        let mut link = Self {
            index: message.header.index,
            kind: LinkKind::Physical,
            auto_address: false,
            up: message.header.flags.contains(LinkFlags::Up),
            mtu: 0,
            addresses: addresses.iter().filter_map(ipv6).collect(),
            has_ipv4: addresses.iter().any(IpAddr::is_ipv4),
        };
        for attribute in &message.attributes {
            if let LinkAttribute::LinkInfo(infos) = attribute {
                link.kind = LinkKind::new(infos);
            } else if let LinkAttribute::Mtu(mtu) = attribute {
                link.mtu = *mtu;
            } else if let LinkAttribute::AfSpecUnspec(specs) = attribute {
                link.auto_address = specs.iter().any(gives_addresses);
            }
        }
        link
    }
}

impl LinkKind {
    fn new(infos: &[LinkInfo]) -> Self {
        let kind = infos.iter().find_map(|info| if let LinkInfo::Kind(kind) = info { Some(kind) } else { None });
        match kind {
            Some(InfoKind::Wireguard) => Self::Wireguard,
            Some(InfoKind::Tun) => Self::Tun,
            Some(InfoKind::Vxlan) => Self::Vxlan(infos.iter().find_map(vxlan).unwrap_or_default()),
            Some(kind) => Self::Other(kind.to_string()),
            None => Self::Physical,
        }
    }
}

fn vxlan(info: &LinkInfo) -> Option<VxlanAttributes> {
    let LinkInfo::Data(InfoData::Vxlan(attributes)) = info else { return None };
    let mut vxlan = VxlanAttributes::default();
    for attribute in attributes {
        if let InfoVxlan::Id(id) = attribute {
            vxlan.id = *id;
        } else if let InfoVxlan::Port(port) = attribute {
            vxlan.port = *port;
        } else if let InfoVxlan::Local(local) = attribute {
            vxlan.local = Some((*local).into());
        } else if let InfoVxlan::Local6(local) = attribute {
            vxlan.local = Some((*local).into());
        } else if let InfoVxlan::Link(under) = attribute {
            vxlan.under = Some(*under);
        }
    }
    Some(vxlan)
}

fn address(attribute: &AddressAttribute) -> Option<IpAddr> {
    if let AddressAttribute::Address(address) = attribute { Some(*address) } else { None }
}

fn gives_addresses(spec: &AfSpecUnspec) -> bool {
    let AfSpecUnspec::Inet6(attributes) = spec else { return false };
    attributes
        .iter()
        .any(|attribute| matches!(attribute, AfSpecInet6::AddrGenMode(mode) if *mode != In6AddrGenMode::None))
}

/// The error number of a netlink answer, as the standard library's error.
pub(crate) fn plain(error: rtnetlink::Error) -> io::Error {
    if let rtnetlink::Error::NetlinkError(answer) = error {
        answer.to_io()
    } else {
        io::Error::other(error.to_string())
    }
}
