//! Tenants: programs that open a WebSocket at `/tenants/ID` get an address in the tenant's network, and learn which other
//! members there are. WireGuard itself is the members' affair.
//!
//! Tasks: [`service`] owns all tenants, one task for all since nothing there waits; [`store`] writes their addresses behind;
//! [`tokens`] reads the file of tokens again; and one for each WebSocket, [`socket`], on the HTTP server's threads.
//! Decisions are made in [`pool`] and [`table`], without IO and clock; [`message`] has the messages, [`close`] the reasons
//! for which a WebSocket is closed.
//!
//! Previous stop: the HTTP server, whose requests for `/tenants/` come to [`routes`]. Next stop: none.

mod close;
mod id;
mod message;
mod metrics;
mod pool;
pub mod routes;
mod service;
mod socket;
mod store;
mod table;
pub mod tokens;

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use tracing::{info, warn};
use wgkex_common::Config;
use wgkex_common::config::TenantSettings;

pub use self::id::TenantId;
pub use self::metrics::{Metrics, TenantStatus};
use self::pool::Tenants;
pub use self::service::TenantService;
use self::service::TenantsHandle;
use self::store::AddressStore;
use self::tokens::Tokens;

/// What the HTTP server needs of tenants. Clones share it.
#[derive(Debug, Clone)]
pub struct FrontDoor {
    handle: TenantsHandle,
    tokens: Option<Arc<Tokens>>,
    metrics: Metrics,
}

impl FrontDoor {
    /// Whether their addresses are kept on the disk.
    pub fn is_kept(&self) -> bool {
        self.metrics.state_kept.get() != 0
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
}

/// Opens what is kept of tenants, and the file of tokens; none if the config does not enable them.
pub fn open(config: &Config, metrics: &Metrics) -> anyhow::Result<Option<(TenantTasks, FrontDoor)>> {
    let Some(settings) = &config.tenants else { return Ok(None) };
    let tokens = settings.tokens_file.as_deref().map(Tokens::open).transpose()?;
    let (store, buffer, addresses) = store::open(&config.state_dir).context("the addresses of tenants")?;
    metrics.state_kept.set(i64::from(!store.is_failing()));
    let TenantSettings { pool, tenant_length, grace, .. } = settings;
    let mut tenants = Tenants::new(pool, *tenant_length, *grace);
    let now = Instant::now();
    let mut lost = 0_usize;
    for ((tenant, key), address) in addresses {
        if !tenants.restore(&tenant, key, address, now) {
            buffer.note((tenant, key), None);
            lost += 1;
        }
    }
    if lost > 0 {
        warn!(
            addresses = lost,
            "addresses of tenants are given up: they do not fit tenants.pool and tenants.tenant_length"
        );
    }
    info!(held = tenants.counts().held, networks = %tenants.networks(), "tenants are served");
    let (service, handle) = TenantService::new(tenants, buffer, metrics.clone());
    let door = FrontDoor { handle, tokens: tokens.clone(), metrics: metrics.clone() };
    Ok(Some((TenantTasks { service, store, tokens }, door)))
}
