//! The gateway's side of wgkex: announced keys in over MQTT, peers, routes and FDB entries out to the kernel.
//!
//! Follow a key: [`bus`] receives it and hands it to the [`reconciler`], which asks [`plan`] what it means and has the
//! [`wgkex_kernel`] do that; what became of it goes back by [`bus`].

mod bus;
mod http;
pub mod metrics;
pub mod peers;
pub mod plan;
pub mod profiles;
pub mod reconciler;
pub mod setup;
#[cfg(test)]
mod testing;

use std::pin::pin;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};
use wgkex_common::access_lists::service::{ListService, ListUpdate};
use wgkex_common::access_lists::{List, Verdict};
use wgkex_common::config::{Cleanup, Peers};
use wgkex_common::mqtt::presence::Reporter;
use wgkex_common::runtime::process;
use wgkex_common::runtime::tasks::{Ended, Tasks};
use wgkex_common::storage::key_store::{Clocks, KeyStore};
use wgkex_common::sync::{self, PeerSelection, SyncClient};
use wgkex_common::wire::message::{Participant, SnapshotChunk};
use wgkex_common::{Config, Domain, Reserved};
use wgkex_kernel::Kernel;

use crate::bus::Announcer;
#[cfg(fuzzing)]
pub use crate::bus::hear_anything;
use crate::metrics::Metrics;
use crate::peers::Policy;
use crate::reconciler::{Handle, Installer};

/// How long the bus may take to hear that this worker goes.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often it is looked which words of gateways have stood for long enough.
const TICK: Duration = Duration::from_secs(10);
/// How long the session may take to disconnect after that.
const DISCONNECT: Duration = Duration::from_millis(500);

/// Serves the configured domains with `kernel` until `stop` returns, then says on the bus that it goes.
pub async fn run<K: Kernel>(config: Config, kernel: K, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let metrics = Metrics::new(&config.domains).context("metrics")?;
    let (keeper, lists) = ListService::open(&config, Participant::Worker(config.name.clone()))?;
    let (store, journal, remembered) =
        KeyStore::open(&config.state_dir, "worker", &config.domains, None, Clocks::read())?;
    info!(keys = remembered.len(), "keys remembered");
    let (reserving, reserved) = watch::channel(Reserved::new(config.protected_keys.clone(), config.domains.clone()));
    let (known, ticking) = ((journal, remembered), reserving.clone());
    let (installer, handle, said) =
        Installer::new(kernel, config.domains.clone(), &policy(&config), known, &reserved, &metrics);
    let installer = installer.held_by(lists.gate());
    // Before it does anything: what may not be here is not put back, also if that was said while nobody listened here.
    handle.admit(lists.admission(), []);
    lists.close_gate();
    let [(bus, session), (confirmations, confirming)] =
        wgkex_common::mqtt::open_pair(&config.mqtt, bus::client(&config), bus::second(&config))?;
    let (ears, heard) = sync::channel();
    let (reporter, presence_events) = Reporter::new(Participant::Worker(config.name.clone()));
    let hand_on =
        bus::hand_on(config.domains.clone(), handle.clone(), reserving, lists.clone(), reporter, metrics.clone());
    let hand_on_pages = bus::hand_on_pages(handle.clone(), ears, lists, metrics.clone());
    let tell = tell(handle.clone(), metrics.clone());
    let asker =
        SyncClient::new(Participant::Worker(config.name.clone()), PeerSelection::Sticky, config.domains.clone());
    let state = handle.state();
    let (told, greeted) = (handle.clone(), handle);
    let list_bus = confirmations.clone();
    let learn = move |domain, page: SnapshotChunk| learn(told.clone(), domain, page);
    let asking = sync::run(asker, confirmations.clone(), heard, learn, move || greeted.reconnected());
    let mut announcer = Announcer::new(&config, (bus, confirmations), state, said, presence_events, metrics.clone());
    let (over, stopped) = watch::channel(false);

    let (mut tasks, mut sessions, mut disk) = (Tasks::default(), Tasks::default(), Tasks::default());
    tasks.spawn("what owns the kernel", installer.run(process::over(stopped.clone())));
    sessions.spawn("the MQTT session", session.run(hand_on, process::over(stopped.clone())));
    tasks.spawn("the MQTT session of confirmations", confirming.run(hand_on_pages, process::over(stopped.clone())));
    let kept = metrics.state_kept.clone();
    disk.spawn("the keeper of the lists", keeper.run(list_bus, tell, process::over(stopped.clone())));
    disk.spawn("the state file", store.run(move |is_kept| kept.set(i64::from(is_kept)), process::over(stopped)));
    tasks.spawn("what asks brokers", asking);
    tasks.spawn("the look for words that stand", tick(ticking));
    tasks.spawn("worker_listen", http::serve(config.worker_listen.clone(), metrics));
    info!(version = env!("CARGO_PKG_VERSION"), worker = config.name, domains = config.domains.len(), "worker started");

    let mut stop = pin!(stop);
    let result: anyhow::Result<()> = tokio::select! {
        biased;
        ended = tasks.ended() => Err(ended.into()),
        ended = sessions.ended() => Err(ended.into()),
        ended = disk.ended() => Err(ended.into()),
        () = announcer.run() => Err(Ended("the announcer").into()),
        () = &mut stop => Ok(()),
    };
    info!("worker stops");
    if timeout(FAREWELL, announcer.farewell()).await.is_err() {
        warn!("MQTT did not hear that this worker goes; its last will says so");
    }
    over.send_replace(true);
    let _ = sessions.finish(DISCONNECT).await;
    for task in disk.finish(DISCONNECT).await {
        error!(task, "the disk did not take the last state in time");
    }
    result
}

/// Lets what gateways say of themselves grow old.
async fn tick(reserved: watch::Sender<Reserved>) {
    loop {
        sleep(TICK).await;
        reserved.send_modify(Reserved::tick);
    }
}

fn policy(config: &Config) -> Policy {
    let Cleanup { interval, stale, grace } = config.cleanup;
    let Peers { max: peers, unproven: unestablished } = config.peers;
    let report = wgkex_common::address::claim::handshake_report_interval(config.live_keys.ttl, stale);
    let forget = config.forget_idle_after;
    Policy { stale, grace, interval, report, unestablished, forget, peers, ..Policy::default() }
}

/// Tells the installer who may come, and which keys were denied just now.
fn tell(handle: Handle, metrics: Metrics) -> impl FnMut(ListUpdate<'_>) {
    move |news| {
        metrics.set_lists(&news);
        let is_denied = |key| news.admission.verdict("", key) == Verdict::Denied;
        let denied = news.records.iter().filter(|record| record.entry.list == List::Deny);
        let denied = denied.filter(|record| record.present && is_denied(&record.entry.key));
        handle.admit(news.admission.clone(), denied.map(|record| (record.entry.key, record.at)));
    }
}

/// Has the installer look at the keys of a page.
async fn learn(handle: Handle, domain: Domain, page: SnapshotChunk) {
    handle.learn(domain, page.keys).await;
}
