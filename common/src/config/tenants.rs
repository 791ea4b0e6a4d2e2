//! Tenants, whose members find each other over WebSockets: `tenants`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::diagnostics::{Diagnostics, Path};
use super::value::{File, FillTime, Flag, Pool, TenantLength, Text};
use crate::WorkerName;
use crate::address::tenants::TenantNetworks;

/// The longest prefix of a tenant's network: 14 members by IPv4 or IPv6.
const LENGTH_MAX: [u8; 2] = [28, 124];
/// Networks of the pool at most: the filter program of a hub has room for them.
const POOL_MAX: usize = 64;
/// The shortest prefix of a tenant's network.
const LENGTH_MIN: u8 = 8;

/// The settings of tenants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantSettings {
    /// Their networks.
    pub networks: TenantNetworks,
    /// How long an address is held for a member that left.
    pub grace: Duration,
    /// The file of the hashes of tokens; none if no tokens are required.
    pub tokens_file: Option<PathBuf>,
    /// The worker that is their hub, if there is one.
    pub hub: Option<WorkerName>,
}

/// The checked section `tenants`.
pub(super) struct CheckedTenants {
    pub settings: TenantSettings,
    is_enabled: bool,
}

impl CheckedTenants {
    /// None unless they are enabled.
    pub fn enabled(self) -> Option<TenantSettings> {
        self.is_enabled.then_some(self.settings)
    }
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawTenants {
    pub enabled: Option<Flag>,
    pub pool: Option<Pool>,
    pub tenant_length: Option<TenantLength>,
    pub grace: Option<FillTime>,
    pub tokens_file: Option<File>,
    pub hub: Option<Text>,
}

impl RawTenants {
    /// The settings, which a hub uses even if this broker serves no tenants.
    pub fn check(self, diagnostics: &mut Diagnostics) -> CheckedTenants {
        let networks = TenantNetworks {
            pool: self.pool.map_or_else(default_pool, |pool| pool.0),
            tenant_length: self.tenant_length.map_or(20, |length| length.0),
        };
        let settings = TenantSettings {
            networks,
            grace: self.grace.map_or(Duration::from_secs(60), |grace| grace.0),
            tokens_file: self.tokens_file.map(|file| file.0.into()),
            hub: self.hub.and_then(|hub| worker(&hub.0, diagnostics)),
        };
        check_pool(&settings.networks, diagnostics);
        check_length(&settings.networks, diagnostics);
        CheckedTenants { settings, is_enabled: self.enabled.is_some_and(|flag| flag.0) }
    }
}

fn check_pool(TenantNetworks { pool, .. }: &TenantNetworks, diagnostics: &mut Diagnostics) {
    let path = Path::of("tenants.pool");
    if pool.len() > POOL_MAX {
        diagnostics.error(&path, &format!("must be {POOL_MAX} networks at most"));
    }
    let mut wrong = |network: &IpNet, complaint: &str| {
        diagnostics.invalid(&path, &Value::from(network.to_string()), complaint);
    };
    for (at, network) in pool.iter().enumerate() {
        let overlaps = |other: &&IpNet| other.contains(network) || network.contains(*other);
        if let Some(other) = pool[..at].iter().find(overlaps) {
            wrong(network, &format!("must be apart from the others, such as {other}"));
        }
        if *network != network.trunc() {
            wrong(network, &format!("must have no bits behind its length, as {}", network.trunc()));
        }
        if family(network) != family(&pool[0]) {
            wrong(network, "must be of the family of the others, either IPv4 or IPv6");
        }
    }
    if let Some(public) = pool.iter().find(|network| !is_private(network)) {
        diagnostics.warn(&path, &format!("has {public}, which is not private: members could not reach its owners"));
    }
}

fn check_length(TenantNetworks { pool, tenant_length }: &TenantNetworks, diagnostics: &mut Diagnostics) {
    let Some(first) = pool.first() else { return };
    let max = LENGTH_MAX[family(first)];
    let path = Path::of("tenants.tenant_length");
    if !(LENGTH_MIN..=max).contains(tenant_length) {
        let complaint = format!("must be a number from {LENGTH_MIN} to {max}");
        diagnostics.invalid(&path, &Value::from(*tenant_length), &complaint);
    }
    if let Some(small) = pool.iter().find(|network| network.prefix_len() > max) {
        let complaint = format!("must be a network with a prefix length of at most {max}");
        diagnostics.invalid(&Path::of("tenants.pool"), &Value::from(small.to_string()), &complaint);
    }
}

fn worker(name: &str, diagnostics: &mut Diagnostics) -> Option<WorkerName> {
    let worker = name.parse().ok();
    if worker.is_none() {
        diagnostics.error(&Path::of("tenants.hub"), "must be the host name of a worker without \"/\", \"+\" and \"#\"");
    }
    worker
}

fn default_pool() -> Vec<IpNet> {
    IpNet::new([10, 64, 0, 0].into(), 10).into_iter().collect()
}

fn family(network: &IpNet) -> usize {
    usize::from(matches!(network, IpNet::V6(_)))
}

/// Whether the network is in a private range.
fn is_private(network: &IpNet) -> bool {
    let is_private = |address: IpAddr| match address {
        IpAddr::V4(address) => {
            let [first, second, ..] = address.octets();
            address.is_private() || (first, second & 0xc0) == (100, 64)
        }
        IpAddr::V6(address) => address.is_unique_local(),
    };
    is_private(network.network()) && is_private(network.broadcast())
}
