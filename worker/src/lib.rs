//! The gateway's side of wgkex: receives announced keys over MQTT, and sets peers, routes and FDB entries in the
//! kernel.
//!
//! Follow a key: [`bus`] receives it and queues it for the [`reconciler`], whose driver of the domain refuses what a list
//! denies; [`peers`] decides whether there is room for it, [`profiles`] makes its desired peer, [`plan`] the changes, and
//! [`wgkex_kernel`] applies them. The outcome goes back by [`bus`].
//!
//! Tasks: [`run`] starts all of them and owns them, in a list of [`Services`]: the state file, the access lists, the
//! reconciler, the drain, the two MQTT sessions, the sync client, the request of live keys after a drain, the tick of
//! reserved keys, the reload of the config on SIGHUP, the publisher, the [`leases`] where this gateway is a server or a
//! hub, the HTTP server (`worker_listen`) and the reports to the service manager.

mod bus;
pub mod cli;
pub mod doctor;
mod drain;
pub mod dry_run;
mod http;
mod leases;
mod lists;
pub mod peers;
pub mod plan;
pub mod profiles;
pub mod reconciler;
pub mod setup;
pub mod status;
#[cfg(test)]
mod testing;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use wgkex_common::access_lists::metrics::ListMetrics;
use wgkex_common::access_lists::records_file;
use wgkex_common::access_lists::service::{self, ListService};
use wgkex_common::config::MqttAddress;
use wgkex_common::mqtt::presence::{PresenceEvent, Reporter};
use wgkex_common::mqtt::{MqttHandle, MqttSession};
use wgkex_common::runtime::metrics::MetricsRegistry;
use wgkex_common::runtime::reload::{self, KeyUse};
use wgkex_common::runtime::services::Services;
use wgkex_common::storage::key_store::{self, Clocks, KeyStore};
use wgkex_common::storage::versions::{self, StateFile};
use wgkex_common::sync::{self, PeerSelection, SyncClient, SyncReceiver};
use wgkex_common::wire::drain::Drain;
use wgkex_common::wire::message::SnapshotChunk;
use wgkex_common::wire::name::Participant;
use wgkex_common::{Config, Domain, Reserved};
use wgkex_kernel::Kernel;

use crate::bus::broker_clocks::{BrokerClocks, ClocksOff};
use crate::bus::publisher::{self, Publisher};
use crate::bus::subscriber;
#[cfg(fuzzing)]
pub use crate::bus::subscriber::receive_anything;
use crate::drain::DrainWatch;
use crate::leases::{LeaseParts, LeaseReceiver, LeaseSender, LeaseTask, ServerStatus};
use crate::peers::Policy;
use crate::profiles::mesh::Mesh;
use crate::reconciler::{Reconciler, ReconcilerHandle, ReconcilerParts, Reports};

/// How long the MQTT server may take to acknowledge the status offline.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// How often to check which published keys and addresses of other gateways have been stable long enough to be reserved.
const STABLE_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a session may take to disconnect, and the disk to take the last changes.
const WORKER_TASKS_STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// The effect of each changed key of the config on a running worker that was started with `config`.
fn key_use(config: &Config) -> KeyUse {
    let of_brokers = [
        "workers",
        "broker_listen",
        "trusted_proxies",
        "rebalance",
        "limits",
        "live_keys.max",
        "confirm_timeout",
        "confirm_budget",
        "admin_listen",
        "admin_token_hash",
        "storage",
        "storage_password_file",
        "registry",
    ];
    // If no server is named, the worker connects to that of the broker on its machine.
    let mqtt_listen = match config.mqtt.server {
        MqttAddress::External { .. } => vec!["mqtt_listen"],
        MqttAddress::Embedded(_) | MqttAddress::Own(_) => {
            vec!["mqtt_listen.tls", "mqtt_listen.users", "mqtt_listen.max_connections"]
        }
    };
    // The hub forwards within the networks of tenants.
    let tenants = match config.hub {
        None => vec!["tenants"],
        Some(_) => vec!["tenants.enabled", "tenants.hub", "tenants.grace", "tenants.tokens_file"],
    };
    KeyUse {
        live: Vec::new(),
        unused: [of_brokers.to_vec(), mqtt_listen, tenants].concat(),
        of_commands: vec![("setup", "wgkex-worker setup")],
    }
}

/// The state that several services share.
struct Worker {
    config: Config,
    metrics: Metrics,
    lists: service::Handle,
    reconciler: ReconcilerHandle,
    /// The session that receives keys and publishes the worker's states.
    bus: MqttHandle,
    /// The session that publishes the outcomes of keys.
    confirmations: MqttHandle,
    /// Whether the gateway drains.
    drain: watch::Receiver<Option<Drain>>,
    /// The brokers whose clock differs from this gateway's.
    clocks_off: watch::Receiver<ClocksOff>,
    /// The states of the registry's servers on this gateway.
    servers: watch::Receiver<BTreeMap<String, ServerStatus>>,
}

/// Each room's metrics.
struct Metrics {
    registry: MetricsRegistry,
    bus: bus::Metrics,
    lists: ListMetrics,
    reconciler: reconciler::Metrics,
    leases: leases::Metrics,
}

/// The files of a worker in `state_dir`.
const STATE_FILES: [StateFile; 4] =
    [key_store::WORKER_FILE, records_file::WORKER_FILE, wgkex_common::drain::WORKER_FILE, leases::FILE];

/// Serves the configured domains with `kernel`, and servers with the kernel that `servers_kernel` opens, until `stop`
/// returns, then publishes that the worker is offline. The error names a task that ended by itself, or the reason why
/// the worker cannot start.
///
/// The services are stopped in the reverse order of their start: the publisher's last messages need the sessions, and
/// the last changes of the reconciler have to be written to disk.
pub async fn run<K: Kernel>(
    config: Config,
    kernel: K,
    servers_kernel: impl FnOnce() -> io::Result<K>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let services = start(config, kernel, servers_kernel)?;
    Ok(services.run_until("worker", stop).await?)
}

/// Starts all services.
fn start<K: Kernel>(
    config: Config,
    kernel: K,
    servers_kernel: impl FnOnce() -> io::Result<K>,
) -> anyhow::Result<Services> {
    let metrics = Metrics::register(&config).context("metrics")?;
    versions::check(&config.state_dir, &STATE_FILES)?;
    let (list_service, lists) = ListService::open(&config, Participant::Worker((&config.name).into()))?;
    let (store, buffer, remembered) =
        KeyStore::open(&config.state_dir, key_store::WORKER_FILE, &config.domains, None, Clocks::read())?;
    info!(keys = remembered.len(), "keys remembered");
    let reserved = watch::Sender::new(Reserved::new(config.protected_keys.clone(), config.domains.clone()));
    let watch_drain = DrainWatch::open(&config.state_dir, metrics.bus.draining.clone());
    let (task, reconciler, reports) = Reconciler::new(ReconcilerParts {
        kernel,
        domains: config.domains.clone(),
        profile: Arc::new(Mesh),
        policy: Policy::from(&config),
        buffer,
        remembered,
        reserved: reserved.subscribe(),
        gate: lists.gate(),
        drain: watch_drain.receiver(),
        metrics: metrics.reconciler.clone(),
    });
    // Before any key is installed: a denied key is not restored, even if it was denied while this worker was not
    // running.
    reconciler.set_admission(lists.admission(), []);
    lists.close_gate();
    let [(bus, session), (confirmations, confirming)] = wgkex_common::mqtt::open_pair(
        &config.mqtt,
        subscriber::session(&config),
        subscriber::secondary_session(&config),
    )?;
    let (lease_sender, lease_events) = leases::channel();
    let lease_task = open_leases(&config, &metrics, confirmations.clone(), lease_events, servers_kernel)?;
    let servers = lease_task.as_ref().map_or_else(|| watch::Sender::default().subscribe(), LeaseTask::states);
    let clocks = BrokerClocks::default();
    let (drain, clocks_off) = (watch_drain.receiver(), clocks.clocks_off());
    let worker = Worker { config, metrics, lists, reconciler, bus, confirmations, drain, clocks_off, servers };

    let tasks = Tasks {
        reconciler: task,
        sessions: [session, confirming],
        reports,
        reserved,
        store,
        lists: list_service,
        drain: watch_drain,
        leases: lease_task,
        lease_sender,
        clocks,
    };
    let services = worker.start(tasks);
    let Config { name, domains, .. } = &worker.config;
    info!(version = env!("CARGO_PKG_VERSION"), worker = name.as_str(), domains = domains.len(), "worker started");
    Ok(services)
}

/// The tasks that a worker starts, and the parts that they alone use.
struct Tasks<K> {
    reconciler: Reconciler<K>,
    /// The session that receives keys, and the one that publishes their outcomes.
    sessions: [MqttSession; 2],
    reports: Reports,
    reserved: watch::Sender<Reserved>,
    store: KeyStore,
    lists: ListService,
    drain: DrainWatch,
    leases: Option<LeaseTask<K>>,
    lease_sender: LeaseSender,
    clocks: BrokerClocks,
}

/// The task for servers and the hub, if the config has any.
fn open_leases<K: Kernel>(
    config: &Config,
    metrics: &Metrics,
    bus: MqttHandle,
    events: LeaseReceiver,
    kernel: impl FnOnce() -> io::Result<K>,
) -> anyhow::Result<Option<LeaseTask<K>>> {
    if !leases::is_needed(config) {
        return Ok(None);
    }
    let (kernel, metrics) = (kernel().context("netlink")?, metrics.leases.clone());
    Ok(Some(LeaseTask::open(config, LeaseParts { kernel, bus, events, metrics })?))
}

impl Worker {
    fn start<K: Kernel>(&self, tasks: Tasks<K>) -> Services {
        let Tasks { reconciler, sessions, drain, leases, .. } = tasks;
        let mut services = Services::default();
        self.start_storage(&mut services, tasks.store, tasks.lists);
        let heartbeat = reconciler.heartbeat();
        services
            .group(WORKER_TASKS_STOP_TIMEOUT, None)
            .spawn_watched("the reconciler", heartbeat, |stop| reconciler.run(stop));
        // Before the publisher, which ends when the drain watch ends, and has to publish the status offline.
        services.background().spawn("the drain", |_| drain.run());
        self.start_bus(&mut services, sessions, tasks.reports, tasks.reserved, tasks.lease_sender, tasks.clocks);
        if let Some(task) = leases {
            services
                .group(WORKER_TASKS_STOP_TIMEOUT, Some("the disk did not take the last leases in time"))
                .spawn_watched("the leases", task.heartbeat(), |stop| task.run(stop));
        }
        self.start_http(&mut services);
        services
    }

    fn start_storage(&self, services: &mut Services, store: KeyStore, list_service: ListService) {
        let state_kept = self.metrics.reconciler.state_kept.clone();
        state_kept.set(i64::from(!store.is_failing()));
        let apply_lists = lists::apply(self.reconciler.clone(), self.metrics.lists.clone());
        services
            .group(WORKER_TASKS_STOP_TIMEOUT, Some("the disk did not take the last state in time"))
            .spawn("the state file", |stop| store.run(move |is_kept| state_kept.set(i64::from(is_kept)), stop))
            .spawn("the access lists", |stop| list_service.run(self.confirmations.clone(), apply_lists, stop));
    }

    /// Starts the two sessions, and the services that handle what they receive.
    fn start_bus(
        &self,
        services: &mut Services,
        [session, confirming]: [MqttSession; 2],
        reports: Reports,
        reserved: watch::Sender<Reserved>,
        leases: LeaseSender,
        clocks: BrokerClocks,
    ) {
        let Self { config, lists, reconciler, .. } = self;
        let (sync_sender, sync_events) = sync::channel();
        let resync = drain::sync_again(self.drain.clone(), sync_sender.clone());
        let (reporter, presence_events) = Reporter::new(Participant::Worker((&config.name).into()));
        let publisher = self.publisher(reports, presence_events);
        let metrics = self.metrics.bus.clone();
        let (ticking, domains) = (reserved.clone(), config.domains.clone());
        let on_event =
            subscriber::on_event(domains, reconciler.clone(), reserved, lists.clone(), reporter, metrics.clone());
        let on_confirming_event =
            subscriber::on_secondary_event(reconciler.clone(), sync_sender, lists.clone(), leases, clocks, metrics);
        let [of_session, of_confirming] = [session.heartbeat(), confirming.heartbeat()];
        services
            .group(WORKER_TASKS_STOP_TIMEOUT, None)
            .spawn_watched("the MQTT session", of_session, |stop| session.run(on_event, stop))
            .spawn_watched("the MQTT session for confirmations", of_confirming, |stop| {
                confirming.run(on_confirming_event, stop)
            });
        self.start_sync(services, sync_events);
        services
            .background()
            .spawn("the keys after a drain", |_| resync)
            .spawn("the reserved keys", |_| tick(ticking))
            .spawn("the config", |_| reload::on_hangup(config.clone(), key_use(config), |_| {}));
        services.group(2 * FAREWELL_TIMEOUT, None).spawn("the publisher", |stop| publish(publisher, stop));
    }

    /// The publisher of this worker's state and of `reports`.
    fn publisher(&self, reports: Reports, presence_events: mpsc::Receiver<PresenceEvent>) -> Publisher {
        let parts = publisher::PublisherParts {
            bus: self.bus.clone(),
            confirmations: self.confirmations.clone(),
            state: self.reconciler.state(),
            drain: self.drain.clone(),
            reports,
            presence_events,
            metrics: self.metrics.bus.clone(),
        };
        Publisher::new(&self.config, parts)
    }

    /// Starts the client that requests the live keys of brokers.
    fn start_sync(&self, services: &mut Services, events: SyncReceiver) {
        let own = Participant::Worker((&self.config.name).into());
        let client = SyncClient::new(own, PeerSelection::Sticky, self.config.domains.clone());
        let (learning, greeted) = (self.reconciler.clone(), self.reconciler.clone());
        let learn = move |domain, chunk| learn(learning.clone(), domain, chunk);
        services.background().spawn("the sync client", |_| {
            sync::run(client, self.confirmations.clone(), events, learn, move || greeted.reconnected())
        });
    }

    /// Starts the services that report the worker's state: to Prometheus, and to the service manager.
    fn start_http(&self, services: &mut Services) {
        let state = http::HttpState {
            registry: self.metrics.registry.clone(),
            links: [&self.bus, &self.confirmations].map(MqttHandle::connection_state),
            name_suspects: [&self.bus, &self.confirmations].map(MqttHandle::name_suspect),
            name_in_use: self.metrics.bus.name_in_use.clone(),
            domains: self.reconciler.state(),
            servers: self.servers.clone(),
            drain: self.drain.clone(),
            clocks_off: self.clocks_off.clone(),
            name: self.config.name.to_string(),
            served: self.config.domains.clone(),
            started: Instant::now(),
            lists: self.metrics.lists.clone(),
            reconciler: self.metrics.reconciler.clone(),
            waiting: self.reconciler.waiting(),
        };
        let (listen, served) = (self.config.worker_listen.clone(), state.clone());
        services
            .background()
            .spawn("worker_listen", |_| http::serve(listen, served))
            .spawn_service_manager(move || state.not_ready_reason());
    }
}

impl Metrics {
    fn register(config: &Config) -> Result<Self, prometheus::Error> {
        let registry = MetricsRegistry::default();
        let version =
            registry.gauges("wgkex_worker_build_info", "Always 1; the label names the program.", &["version"])?;
        version.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            bus: bus::Metrics::register(&registry)?,
            lists: lists::register(&registry)?,
            reconciler: reconciler::Metrics::register(&registry, &config.domains)?,
            leases: leases::Metrics::register(&registry, config)?,
            registry,
        })
    }
}

/// Publishes states and outcomes until `stop` returns, and then the status offline; or until a session ends.
async fn publish(mut publisher: Publisher, stop: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        () = stop => {}
        () = publisher.run() => return,
    }
    if timeout(FAREWELL_TIMEOUT, publisher.announce_offline()).await.is_err() {
        warn!("the offline status was not acknowledged in time; the last will replaces it");
    }
}

/// Ticks `reserved`, so that published keys and addresses of other gateways are reserved once they have been stable
/// long enough.
async fn tick(reserved: watch::Sender<Reserved>) {
    loop {
        sleep(STABLE_CHECK_INTERVAL).await;
        reserved.send_modify(Reserved::tick);
    }
}

/// Passes the live keys of a chunk to the reconciler, which installs those that are missing.
async fn learn(reconciler: ReconcilerHandle, domain: Domain, chunk: SnapshotChunk) {
    reconciler.learn(domain, chunk.keys).await;
}

#[cfg(test)]
mod tests {
    use wgkex_kernel::memory::MemoryKernel;

    use super::*;

    fn unused(more: &str) -> Vec<&'static str> {
        let yaml = format!("domains: [x_a]\ndomain_prefixes: [x_]\n{more}");
        key_use(&Config::parse("f", &yaml, "gw1").unwrap()).unused
    }

    /// The tasks that the service manager watches, with these lines in the config.
    fn watched(more: &str) -> Vec<&'static str> {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().display();
        let yaml = format!("domains: [x_a]\ndomain_prefixes: [x_]\nstate_dir: {state_dir}\n{more}");
        let config = Config::parse("f", &yaml, "gw1").unwrap();
        let kernel = MemoryKernel::with(&config.domains);
        start(config, kernel.clone(), || Ok(kernel)).unwrap().watched()
    }

    /// The tasks that use the kernel or MQTT connections.
    #[tokio::test]
    async fn the_service_manager_watches_the_sessions_and_the_tasks_of_the_kernel() {
        let always = ["the reconciler", "the MQTT session", "the MQTT session for confirmations"];
        assert_eq!(watched(""), always);
        let server = "servers: {s1: {network: 10.77.0.0/24, listen_port: 52820}}";
        assert_eq!(watched(server), [&always[..], &["the leases"]].concat());
        assert_eq!(watched("hub: {enabled: true}"), [&always[..], &["the leases"]].concat());
    }

    #[test]
    fn keys_of_brokers_in_a_shared_file_need_no_restart_of_the_worker() {
        let own = unused("");
        assert!(own.contains(&"mqtt_listen.users") && !own.contains(&"mqtt_listen"), "{own:?}");
        assert!(
            own.contains(&"live_keys.max") && !own.contains(&"live_keys"),
            "it reports handshakes by the ttl: {own:?}"
        );
        assert!(own.contains(&"tenants") && unused("mqtt: {broker_url: h}").contains(&"mqtt_listen"));
        let hub = unused("hub: {enabled: true}");
        assert!(hub.contains(&"tenants.tokens_file") && !hub.contains(&"tenants"), "{hub:?}");
    }
}
