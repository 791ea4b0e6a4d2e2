//! The registry: servers, their clients, and the addresses that these lease, as the system `wireguard_api` has them, over its
//! REST interface.
//!
//! Tasks: [`push`], which brings leases to the gateways; the thread of [`crate::database`] owns the tables. Previous stop of a request: the HTTP server's
//! routes ([`routes`]), which read it into checked values ([`model`]). [`store`] decides within a transaction, and
//! [`crate::ipam`] which address is free.

mod login;
mod metrics;
pub mod model;
pub mod push;
pub mod routes;
pub mod store;

use std::fs;

use anyhow::Context as _;
use tokio::sync::oneshot;
use wgkex_common::config::{self, Config, Secret};

use crate::database::{Access, Database, DatabaseError, Location, Migrations, State, Transaction};
use crate::registry::login::Login;
use crate::registry::push::{LeaseEvent, LeaseSender};
use crate::registry::store::{Counts, ServerChange};

pub use self::metrics::Metrics;
pub use self::store::Refusal;

/// The tables.
pub const MIGRATIONS: Migrations = Migrations(&[store::CREATE_TABLES]);

/// What the routes share. Clones share it.
#[derive(Clone)]
pub struct Registry {
    database: Database,
    login: Login,
    /// Whether the config of a client is open to everybody who knows its name.
    is_client_config_open: bool,
    /// What changed at workers' servers goes there.
    leases: LeaseSender,
    metrics: Metrics,
}

/// Why a call was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// For what is in the registry.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// For the state of the database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl Registry {
    /// Opens it, as the config names it. The receiver ends with the thread of the database, which is tried at the first call:
    /// keys are exchanged without it.
    pub fn open(
        config: &Config,
        registry: &config::Registry,
        leases: LeaseSender,
        metrics: Metrics,
    ) -> anyhow::Result<(Self, oneshot::Receiver<()>)> {
        let login = Login::read(registry)?;
        let (database, end) = Database::start(location(config)?, MIGRATIONS)?;
        Ok((Self { database, login, is_client_config_open: registry.open_client_config, leases, metrics }, end))
    }

    /// How much there is, for the status and the metrics.
    pub async fn counts(&self) -> Result<Counts, CallError> {
        self.read(store::counts).await
    }

    /// Brings the gauges up to date, if the database can be used.
    pub async fn set_metrics(&self) {
        let counts = self.counts().await;
        self.metrics.storage_up.set(counts.is_ok().into());
        if let Ok(Counts { servers, leases }) = counts {
            self.metrics.servers.set(i64::try_from(servers).unwrap_or(i64::MAX));
            self.metrics.leases.set(i64::try_from(leases).unwrap_or(i64::MAX));
        }
    }

    /// Whether the database can be used.
    #[must_use]
    pub fn state(&self) -> State {
        self.database.state()
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        self.database.run(Access::Read, work, |_| {}).await
    }

    /// Changes something, and has what changed at workers' servers published.
    async fn change(
        &self,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<Vec<ServerChange>, CallError> + Send + 'static,
    ) -> Result<(), CallError> {
        let leases = self.leases.clone();
        let publish = move |changes: &Vec<ServerChange>| {
            if !changes.is_empty() {
                let _ = leases.try_send(LeaseEvent::Changed(changes.clone()));
            }
        };
        self.database.run(Access::Write, work, publish).await.map(drop)
    }
}

/// Where the tables are.
fn location(config: &Config) -> anyhow::Result<Location> {
    let Some(url) = &config.storage.url else {
        return Ok(Location::File(config.state_dir.join("registry.sqlite")));
    };
    let server = url.parse().with_context(|| "storage: must be postgres://USER@HOST:PORT/DATABASE")?;
    let password = config.storage.password_file.as_ref().map(|file| {
        let text = fs::read_to_string(file).with_context(|| format!("storage_password_file {}", file.display()))?;
        anyhow::Ok(Secret::new(text.trim_end_matches(['\n', '\r']).to_owned()))
    });
    Ok(Location::Server(Box::new(server), password.transpose()?))
}
