//! Tenants: programs that open a WebSocket at `/tenants/ID` get an address in the tenant's network, and learn which other
//! members there are. WireGuard itself is the members' affair.
//!
//! Members of a tenant may be connected to different brokers of a bus. One broker, elected by
//! [`crate::fleet::election`], gives the addresses; it has the [`authority`], which decides with [`pool`] and
//! [`table`]. [`sessions`] are those of this broker, which receive the decisions, and [`clients`] counts them by
//! client; [`coordination`] has both the authority and the sessions; brokers send each other [`frame`]s, numbered by
//! [`streams`]. [`hub`] is the gateway by which members reach each other, if there is one. All of that is without IO
//! and clock.
//!
//! Tasks: [`service`] owns all of it, one task since nothing there waits; [`store`] writes the addresses behind;
//! [`tokens`] reads the file of tokens again; and one for each WebSocket, [`socket`], on the HTTP server's threads,
//! whose [`member_writer`] waits until its client has read the messages before. [`message`] has the messages, [`close`] the
//! reasons for which a WebSocket is closed.
//!
//! Previous stop: the HTTP server, whose requests for `/tenants/` are handled by
//! [`http::tenants`](crate::http::tenants). Next stop: the other brokers, by MQTT.

mod authority;
mod clients;
mod close;
mod coordination;
mod frame;
mod hub;
pub(crate) mod id;
mod member_writer;
pub(crate) mod message;
mod metrics;
mod pool;
mod problems;
mod service;
mod sessions;
pub(crate) mod socket;
mod store;
mod streams;
mod table;
pub mod tokens;
pub(crate) mod upgrade_request;

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tracing::info;
use wgkex_common::address::tenants::TenantNetworks;
use wgkex_common::config::TenantSettings;
use wgkex_common::wire::message::ServiceAnnouncement;
use wgkex_common::{BrokerName, Config};

use crate::fleet::election::{self, Election};

use self::clients::Clients;
use self::coordination::Coordination;
pub use self::hub::HubProblem;
use self::hub::TenantHub;
pub use self::id::TenantId;
pub use self::metrics::{Metrics, TenantStatus};
pub use self::problems::TenantProblems;
use self::service::TenantsHandle;
pub use self::service::{TenantEvent, TenantEventSender, TenantService};
use self::sessions::Sessions;
use self::store::AddressStore;
pub use self::store::FILE;
use self::tokens::Tokens;

/// The tenants, as the HTTP server uses them. Clones share it.
#[derive(Debug, Clone)]
pub struct TenantsHttpState {
    pub(crate) handle: TenantsHandle,
    pub(crate) tokens: Option<Arc<Tokens>>,
    pub(crate) metrics: Metrics,
    problems: Arc<Mutex<TenantProblems>>,
}

impl TenantsHttpState {
    /// Whether their addresses are kept on the disk.
    pub fn is_kept(&self) -> bool {
        self.metrics.state_kept.get() != 0
    }

    /// The problems that operators should know.
    pub fn problems(&self) -> TenantProblems {
        self.problems.lock().clone()
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
    /// Reads the file of tokens again, if there is one.
    pub tokens: Option<Arc<Tokens>>,
    /// Passes it the messages of other brokers.
    pub events: TenantEventSender,
    /// The service that this broker announces.
    pub announced: watch::Receiver<ServiceAnnouncement>,
}

/// The version of the frames between brokers, and of the way in which they give addresses.
const PROTOCOL: u32 = 1;

/// Opens the stored addresses of tenants, and the file of tokens; none if the config does not enable them.
pub fn open(config: &Config, metrics: &Metrics) -> anyhow::Result<Option<(TenantTasks, TenantsHttpState)>> {
    let Some(settings) = &config.tenants else { return Ok(None) };
    let tokens = settings.tokens_file.as_deref().map(Tokens::open).transpose()?;
    let (store, buffer, addresses) = store::open(&config.state_dir).context("the addresses of tenants")?;
    metrics.state_kept.set(i64::from(!store.is_failing()));
    info!(addresses = addresses.len(), "tenants are served");
    let now = Instant::now();
    let since = election::since();
    let announced = ServiceAnnouncement { since, rules: rules(settings) };
    let own = BrokerName::from(&config.name);
    let hub = settings.hub.clone().map(|worker| TenantHub::new(worker, settings.networks.clone()));
    let hub_problem = hub.as_ref().and_then(|hub| Some((hub.worker().clone(), hub.problem()?)));
    let clients = Clients::new(settings.networks.count());
    let sessions = Sessions::new(own.clone(), clients, addresses, buffer.clone(), metrics.clone()).with_hub(hub);
    let election = Election::new(own.clone(), announced, now);
    let problems = Arc::new(Mutex::new(TenantProblems { hub: hub_problem, ..TenantProblems::default() }));
    let tenants =
        Coordination::new(own, settings.clone(), sessions, election, since, problems.clone(), metrics.clone());
    let (service, handle, events) = TenantService::new(tenants, buffer, metrics.clone());
    let announced = service.announced();
    let http_state = TenantsHttpState { handle, tokens: tokens.clone(), metrics: metrics.clone(), problems };
    Ok(Some((TenantTasks { service, store, tokens, events, announced }, http_state)))
}

/// A digest of the settings that brokers must share to serve the same tenants.
fn rules(TenantSettings { networks, grace, hub, .. }: &TenantSettings) -> String {
    let TenantNetworks { pool, tenant_length } = networks;
    let hub = hub.as_ref().map_or_else(String::new, |worker| format!(" {worker:?}"));
    let digest = Sha256::digest(format!("{PROTOCOL} {pool:?} {tenant_length} {grace:?}{hub}"));
    hex::encode(&digest[..8])
}
