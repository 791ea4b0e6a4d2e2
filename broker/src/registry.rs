//! The registry: servers, their clients, and the addresses that these lease, as the system `wireguard_api` has them, over its
//! REST interface.
//!
//! Tasks: those of [`push`], which publish leases to the gateways, [`Registry::count`], and [`RegistryHolder::run`]; the
//! thread of [`crate::database`] owns the tables. Previous stop of a request: the HTTP server's routes
//! ([`http::registry`](crate::http::registry)), which read it into checked values ([`model`]). [`store`] decides within
//! a transaction, and [`crate::ipam`] which address is free.

mod call_error;
pub mod holder;
pub mod lease_events;
pub mod login;
mod login_limit;
mod metrics;
pub mod model;
pub mod pending;
pub mod push;
pub mod store;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use parking_lot::Mutex;
use prometheus::IntGauge;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};
use wgkex_common::config::{self, Config, Secret};
use wgkex_common::storage::schema::Schema;
use wgkex_common::storage::versions::StateFile;
use wgkex_common::{BrokerName, WorkerName};

use crate::database::{AccessMode, Database, DatabaseState, Location, Migrations, Transaction};
use crate::registry::holder::RegistryHolder;
use crate::registry::login::{Login, password_of};
use crate::registry::pending::PendingLeases;
use crate::registry::store::{ConfigCache, RegistryCounts, ServerChange};

pub use self::call_error::{CallError, CallRefusal};
pub(crate) use self::login_limit::LoginRefusal;
pub use self::metrics::Metrics;

/// Large answers that callers do not share, at the same time.
const LARGE_ANSWERS: usize = 4;
/// How long the start waits for the database.
const COUNT_TIMEOUT: Duration = Duration::from_secs(1);
/// How often servers and leases are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(15);

/// The tables.
pub const MIGRATIONS: Migrations = Migrations(&[store::CREATE_TABLES, store::ADD_RETURNED_NUMBERS]);

/// The file in `state_dir`, where the tables are in no `PostgreSQL`.
pub const FILE: StateFile = StateFile::sqlite("registry.sqlite", Schema { migrations: MIGRATIONS.0 });

/// The state that the routes share. Clones share it.
#[derive(Clone)]
pub struct Registry {
    database: Database,
    pub(crate) login: Arc<Login>,
    holder: RegistryHolder,
    /// Whether the config of a client is open to every caller that knows its name.
    pub(crate) is_client_config_open: bool,
    /// Lists of servers' clients as they were sent last.
    pub(crate) config_cache: ConfigCache,
    /// Places for large answers that callers do not share.
    pub(crate) large_answers: Arc<Semaphore>,
    /// Receives the changes of workers' servers.
    pending: PendingLeases,
    refused: RefusedServers,
    pub(crate) metrics: Metrics,
}

/// Servers of workers that are not taken into the registry, by worker and name, with the reason.
type RefusedServers = Arc<Mutex<BTreeMap<(WorkerName, String), String>>>;

/// The registry at one time, for the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// `SQLite` or `PostgreSQL`.
    pub storage: String,
    /// Whether the database can be used.
    pub storage_up: bool,
    /// The broker that has the registry instead of this one.
    pub elsewhere: Option<BrokerName>,
    /// The file that records that there were servers, if the database has no tables now.
    #[serde(default)]
    pub emptied: Option<String>,
    /// How many servers there are, counted at most 15 s ago.
    pub servers: u64,
    /// How many addresses clients lease.
    pub leases: u64,
}

impl Registry {
    /// Opens it, as the config names it. The receiver ends with the thread of the database, which is tried at the first call:
    /// keys are exchanged without it.
    pub fn open(
        config: &Config,
        registry: &config::RegistrySettings,
        holder: RegistryHolder,
        metrics: Metrics,
    ) -> anyhow::Result<(Self, oneshot::Receiver<()>)> {
        let login = Arc::new(Login::read(registry)?);
        let (database, end) = Database::start(location(config)?, MIGRATIONS, holder.mark())?;
        Ok((
            Self {
                database,
                login,
                holder,
                is_client_config_open: registry.open_client_config,
                config_cache: ConfigCache::default(),
                large_answers: Arc::new(Semaphore::new(LARGE_ANSWERS)),
                pending: PendingLeases::default(),
                refused: RefusedServers::default(),
                metrics,
            },
            end,
        ))
    }

    /// The changes that are to be published.
    #[must_use]
    pub fn pending(&self) -> PendingLeases {
        self.pending.clone()
    }

    /// Checks whether there are servers now. If so, that is recorded: it is announced to other brokers, and shows a
    /// later loss of the tables.
    pub async fn check_for_servers(&self) {
        let counts = timeout(COUNT_TIMEOUT, self.database.run(AccessMode::Read, store::counts, |_| {})).await;
        if let Ok(Ok(counts)) = counts {
            self.on_counts(counts).await;
        }
    }

    async fn on_counts(&self, counts: RegistryCounts) {
        if counts.servers > 0 && !self.holder.is_filled() {
            self.holder.set_filled().await;
        }
    }

    /// Counts servers and leases from time to time, for the metrics.
    pub async fn count(self) {
        loop {
            if let Ok(counts @ RegistryCounts { servers, leases }) = self.read(store::counts).await {
                self.on_counts(counts).await;
                self.metrics.servers.set(i64::try_from(servers).unwrap_or(i64::MAX));
                self.metrics.leases.set(i64::try_from(leases).unwrap_or(i64::MAX));
            }
            sleep(COUNT_INTERVAL).await;
        }
    }

    /// Brings the gauge of the database up to date.
    pub fn set_metrics(&self) {
        self.metrics.storage_up.set(self.is_storage_up().into());
    }

    /// A database that was not tried yet, or that is not used, as at a broker that does not have the registry, counts as one that
    /// can be used.
    fn is_storage_up(&self) -> bool {
        self.holder.other().is_some() || !matches!(self.database.state(), DatabaseState::Down(_))
    }

    /// Its state now.
    #[must_use]
    pub fn status(&self) -> RegistryStatus {
        let number = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or_default();
        RegistryStatus {
            storage: if self.holder.is_of_one() { "SQLite" } else { "PostgreSQL" }.into(),
            storage_up: self.is_storage_up(),
            elsewhere: self.holder.other(),
            emptied: self.holder.mark().lost_rows().map(|file| file.display().to_string()),
            servers: number(&self.metrics.servers),
            leases: number(&self.metrics.leases),
        }
    }

    /// Servers of workers that are not taken into the registry, with the reason.
    #[must_use]
    pub fn refused(&self) -> BTreeMap<(WorkerName, String), String> {
        self.refused.lock().clone()
    }

    async fn require_holder(&self) -> Result<(), CallError> {
        self.holder.settled().await;
        self.holder.other().map_or(Ok(()), |broker| Err(CallError::Elsewhere(broker)))
    }

    pub(crate) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        self.require_holder().await?;
        self.database.run(AccessMode::Read, work, |_| {}).await
    }

    /// Makes a change, and queues the changes of workers' servers for publication.
    pub(crate) async fn change(
        &self,
        work: impl FnOnce(&mut Transaction<'_>, SystemTime) -> Result<Vec<ServerChange>, CallError> + Send + 'static,
    ) -> Result<(), CallError> {
        self.require_holder().await?;
        let pending = self.pending.clone();
        let publish = move |changes: &Vec<ServerChange>| pending.add(changes);
        let work = |tables: &mut Transaction<'_>| work(tables, SystemTime::now());
        self.database.run(AccessMode::Write, work, publish).await?;
        if !self.holder.is_filled() {
            self.check_for_servers().await;
        }
        Ok(())
    }
}

/// Where the tables are.
fn location(config: &Config) -> anyhow::Result<Location> {
    let Some(url) = &config.storage.url else {
        return Ok(Location::File(FILE.path(&config.state_dir)));
    };
    let server = url.parse().with_context(|| "storage: must be postgres://USER@HOST:PORT/DATABASE")?;
    let password = config.storage.password_file.as_deref();
    let password = password.map(|file| password_of("storage_password_file", file).map(Secret::new)).transpose()?;
    Ok(Location::Server(Box::new(server), password))
}
