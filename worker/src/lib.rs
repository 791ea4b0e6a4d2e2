//! The gateway's side of wgkex: announced keys in over MQTT, peers, routes and FDB entries out to the kernel.
//!
//! Follow a key: [`mqtt`] hears it and hands it to [`install`], which asks [`plan`] what it means and tells the
//! [`kernel`]; what became of it goes back by [`mqtt`].

mod http;
pub mod install;
pub mod kernel;
pub mod ledger;
pub mod metrics;
mod mqtt;
pub mod plan;
pub mod schedule;
pub mod setup;
#[cfg(test)]
mod testing;

use std::pin::pin;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};
use wgkex_common::{Config, process};
use wgkex_common::config::Cleanup;

use crate::install::Installer;
use crate::kernel::Kernel;
use crate::ledger::Policy;
use crate::metrics::Metrics;
use crate::mqtt::Announcer;

/// How long the bus may take to hear that this worker goes.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long the session may take to disconnect after that.
const DISCONNECT: Duration = Duration::from_millis(500);

/// Serves the configured domains with `kernel` until `stop` returns, then says on the bus that it goes.
pub async fn run<K: Kernel>(config: Config, kernel: K, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let metrics = Metrics::new(&config.domains).context("metrics")?;
    let (installer, handle, applied) =
        Installer::new(kernel, config.domains.clone(), &policy(config.cleanup), &metrics);
    let (bus, session) = wgkex_common::mqtt::open(&config.mqtt, mqtt::client(&config))?;
    let (confirmations, confirming) = wgkex_common::mqtt::open(&config.mqtt, mqtt::publisher(&config))?;
    let hand_on = mqtt::hand_on(config.domains.clone(), handle.clone(), metrics.clone());
    let mut announcer = Announcer::new(&config, (bus, confirmations), handle.state(), applied, metrics.clone());
    let (over, stopped) = watch::channel(false);

    let installing = tokio::spawn(installer.run(process::over(stopped.clone())));
    let mut session = tokio::spawn(session.run(hand_on, process::over(stopped.clone())));
    tokio::spawn(confirming.run(drop, process::over(stopped)));
    tokio::spawn(http::serve(config.worker_listen.clone(), metrics));
    info!(version = env!("CARGO_PKG_VERSION"), worker = config.name, domains = config.domains.len(), "worker started");

    let mut stop = pin!(stop);
    tokio::select! {
        () = announcer.run() => {}
        () = &mut stop => {}
    }
    info!("worker stops");
    if timeout(FAREWELL, announcer.farewell()).await.is_err() {
        warn!("MQTT did not hear that this worker goes; its last will says so");
    }
    over.send_replace(true);
    if timeout(DISCONNECT, &mut session).await.is_err() {
        session.abort();
    }
    installing.abort();
    Ok(())
}

fn policy(cleanup: Cleanup) -> Policy {
    let Cleanup { interval, stale, grace } = cleanup;
    Policy { stale, grace, interval, ..Policy::default() }
}
