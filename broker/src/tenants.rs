//! Tenants: programs that open a WebSocket at `/tenants/ID` get an address in the tenant's network, and learn which other
//! members there are. WireGuard itself is the members' affair.
//!
//! Members of a tenant may be connected to different brokers of a bus. One broker gives the addresses, [`crate::bus::election`] says which;
//! it has the [`authority`], which decides with [`pool`] and [`table`]. [`sessions`] are those of this broker, which learn what
//! was decided, here or there, and [`coordination`] has both together; brokers send each other [`frame`]s, numbered by
//! [`streams`]. All of that is without IO and clock.
//!
//! Tasks: [`service`] owns all of it, one task since nothing there waits; [`store`] writes the addresses behind; [`tokens`] reads
//! the file of tokens again; and one for each WebSocket, [`socket`], on the HTTP server's threads. [`message`] has the messages,
//! [`close`] the reasons for which a WebSocket is closed.
//!
//! Previous stop: the HTTP server, whose requests for `/tenants/` come to [`routes`]. Next stop: the other brokers, by MQTT.

mod authority;
mod close;
mod coordination;
mod frame;
mod id;
mod message;
mod metrics;
mod pool;
pub mod routes;
mod service;
mod sessions;
mod socket;
mod store;
mod streams;
mod table;
pub mod tokens;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tracing::info;
use wgkex_common::config::TenantSettings;
use wgkex_common::wire::message::Served;
use wgkex_common::{BrokerName, Config};

use crate::bus::election::{self, Election};

use self::coordination::Coordination;
pub use self::id::TenantId;
pub use self::metrics::{Metrics, TenantStatus};
use self::service::TenantsHandle;
pub use self::service::{TenantEvent, TenantEventSender, TenantService};
use self::sessions::Sessions;
use self::store::AddressStore;
use self::tokens::Tokens;

/// What the HTTP server needs of tenants. Clones share it.
#[derive(Debug, Clone)]
pub struct FrontDoor {
    handle: TenantsHandle,
    tokens: Option<Arc<Tokens>>,
    metrics: Metrics,
    strangers: Strangers,
}

/// Brokers that serve tenants by other rules.
type Strangers = Arc<Mutex<BTreeSet<BrokerName>>>;

impl FrontDoor {
    /// Whether their addresses are kept on the disk.
    pub fn is_kept(&self) -> bool {
        self.metrics.state_kept.get() != 0
    }

    /// Brokers that serve tenants by other rules.
    pub fn strangers(&self) -> Vec<BrokerName> {
        self.strangers.lock().iter().cloned().collect()
    }

    /// How many there are.
    pub fn status(&self) -> TenantStatus {
        self.metrics.status()
    }
}

/// The tasks of tenants, which do not run yet.
pub struct TenantTasks {
    /// It owns them.
    pub service: TenantService,
    /// It writes their addresses behind.
    pub store: AddressStore,
    /// What reads the file of tokens again, if there is one.
    pub tokens: Option<Arc<Tokens>>,
    /// Tells it of other brokers.
    pub events: TenantEventSender,
    /// What this broker tells others that it serves.
    pub served: Served,
}

/// What brokers send each other, and how they give addresses.
const PROTOCOL: u32 = 1;

/// Opens what is kept of tenants, and the file of tokens; none if the config does not enable them.
pub fn open(config: &Config, metrics: &Metrics) -> anyhow::Result<Option<(TenantTasks, FrontDoor)>> {
    let Some(settings) = &config.tenants else { return Ok(None) };
    let tokens = settings.tokens_file.as_deref().map(Tokens::open).transpose()?;
    let (store, buffer, addresses) = store::open(&config.state_dir).context("the addresses of tenants")?;
    metrics.state_kept.set(i64::from(!store.is_failing()));
    info!(addresses = addresses.len(), "tenants are served");
    let now = Instant::now();
    let since = election::since();
    let served = Served { since, rules: rules(settings) };
    let own = BrokerName::from(&config.name);
    let sessions = Sessions::new(own.clone(), addresses, buffer.clone(), metrics.clone());
    let election = Election::new(own.clone(), served.clone(), now);
    let strangers = Strangers::default();
    let tenants =
        Coordination::new(own, settings.clone(), sessions, election, since, strangers.clone(), metrics.clone());
    let (service, handle, events) = TenantService::new(tenants, buffer, metrics.clone());
    let door = FrontDoor { handle, tokens: tokens.clone(), metrics: metrics.clone(), strangers };
    Ok(Some((TenantTasks { service, store, tokens, events, served }, door)))
}

/// A digest of what brokers have to have in common to serve the same tenants.
fn rules(TenantSettings { pool, tenant_length, grace, .. }: &TenantSettings) -> String {
    let digest = Sha256::digest(format!("{PROTOCOL} {pool:?} {tenant_length} {grace:?}"));
    hex::encode(&digest[..8])
}
