//! The registry: servers, their clients, and the addresses that these lease, as the system `wireguard_api` has them, over its
//! REST interface.
//!
//! Tasks: [`push`], which brings leases to the gateways, and [`Registry::count`]; the thread of [`crate::database`] owns the
//! tables. Previous stop of a request: the HTTP server's routes ([`routes`]), which read it into checked values ([`model`]).
//! [`store`] decides within a transaction, and [`crate::ipam`] which address is free.

pub mod holder;
pub mod login;
mod metrics;
pub mod model;
pub mod push;
pub mod routes;
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

use crate::database::{Access, Database, DatabaseError, Location, Migrations, State, Transaction};
use crate::registry::holder::Holder;
use crate::registry::login::{Login, password_of};
use crate::registry::push::{LeaseEvent, LeaseSender};
use crate::registry::store::{ConfigCache, Counts, ServerChange};

pub use self::metrics::Metrics;
pub use self::store::Refusal;

/// Large answers that callers do not share, at the same time.
const LARGE_ANSWERS: usize = 4;
/// How long the start waits for the database.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// How often servers and leases are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(15);

/// The tables.
pub const MIGRATIONS: Migrations = Migrations(&[store::CREATE_TABLES, store::ADD_RETURNED_NUMBERS]);

/// The file in `state_dir`, where the tables are in no `PostgreSQL`.
pub const FILE: StateFile = StateFile::sqlite("registry.sqlite", Schema { migrations: MIGRATIONS.0 });

/// What the routes share. Clones share it.
#[derive(Clone)]
pub struct Registry {
    database: Database,
    login: Login,
    holder: Holder,
    /// Whether the config of a client is open to everybody who knows its name.
    is_client_config_open: bool,
    /// Lists of servers' clients as they were sent last.
    config_cache: ConfigCache,
    /// Places for large answers that callers do not share.
    large_answers: Arc<Semaphore>,
    /// What changed at workers' servers goes there.
    leases: LeaseSender,
    refused: RefusedServers,
    metrics: Metrics,
}

/// Servers of workers that are not taken into the registry, by worker and name, with the reason.
type RefusedServers = Arc<Mutex<BTreeMap<(WorkerName, String), String>>>;

/// Why a call was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// For what is in the registry.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// For the state of the database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Another broker has the registry.
    #[error("broker {0} has the registry of this bus, and with SQLite only one can have it")]
    Elsewhere(BrokerName),
}

/// The registry at one time, for the status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// `SQLite` or `PostgreSQL`.
    pub storage: String,
    /// Whether the database can be used.
    pub storage_up: bool,
    /// The broker that has the registry instead of this one.
    pub elsewhere: Option<BrokerName>,
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
        registry: &config::Registry,
        leases: LeaseSender,
        holder: Holder,
        metrics: Metrics,
    ) -> anyhow::Result<(Self, oneshot::Receiver<()>)> {
        let login = Login::read(registry)?;
        let (database, end) = Database::start(location(config)?, MIGRATIONS)?;
        Ok((
            Self {
                database,
                login,
                holder,
                is_client_config_open: registry.open_client_config,
                config_cache: ConfigCache::default(),
                large_answers: Arc::new(Semaphore::new(LARGE_ANSWERS)),
                leases,
                refused: RefusedServers::default(),
                metrics,
            },
            end,
        ))
    }

    /// Looks whether there are servers now, which others are told of.
    pub async fn look(&self) {
        if self.holder.is_empty() {
            let counts = timeout(LOOK_TIMEOUT, self.database.run(Access::Read, store::counts, |_| {})).await;
            if matches!(counts, Ok(Ok(Counts { servers: 1.., .. }))) {
                self.holder.set_filled();
            }
        }
    }

    /// Counts servers and leases from time to time, for the metrics.
    pub async fn count(self) {
        loop {
            let counts = self.read(store::counts).await;
            if let Ok(Counts { servers, leases }) = counts {
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

    /// A database that was not tried yet, as at a broker that does not have the registry, counts as one that can be used.
    fn is_storage_up(&self) -> bool {
        !matches!(self.database.state(), State::Down(_))
    }

    /// What it is now.
    #[must_use]
    pub fn status(&self) -> RegistryStatus {
        let number = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or_default();
        RegistryStatus {
            storage: if self.holder.is_of_one() { "SQLite" } else { "PostgreSQL" }.into(),
            storage_up: self.is_storage_up(),
            elsewhere: self.holder.other(),
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

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        self.require_holder().await?;
        self.database.run(Access::Read, work, |_| {}).await
    }

    /// Changes something, and has what changed at workers' servers published.
    async fn change(
        &self,
        work: impl FnOnce(&mut Transaction<'_>, SystemTime) -> Result<Vec<ServerChange>, CallError> + Send + 'static,
    ) -> Result<(), CallError> {
        self.require_holder().await?;
        let leases = self.leases.clone();
        let publish = move |changes: &Vec<ServerChange>| {
            if !changes.is_empty() {
                let _ = leases.try_send(LeaseEvent::Changed(changes.clone()));
            }
        };
        let work = |tables: &mut Transaction<'_>| work(tables, SystemTime::now());
        self.database.run(Access::Write, work, publish).await?;
        self.look().await;
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
