//! The broker: routers' keys in over HTTP, out to the gateways over MQTT, and their confirmations back into the answer.
//!
//! The path of a key: [`http`] reads it; [`exchange`] checks and publishes it and waits; [`bus`] receives the outcomes;
//! [`fleet`] selects the gateway, and remembers the key for gateways that lack it later.
//!
//! `wgkex_common::access_lists` decides which keys are admitted; operators change that by the calls that [`cli`] makes.
//! [`doctor`] decides what is wrong with a broker.
//! [`mqtt_server`] is the MQTT server for all of that, unless the config names another one.
//!
//! [`registry`] and [`tenants`] are separate interfaces: their keys reach gateways only as leases, of servers and of
//! the hub ([`registry::push`]).
//!
//! Tasks: [`run`] starts and supervises all of them, as a list of named services.

mod bus;
pub mod cli;
mod client_ip;
pub mod database;
pub mod doctor;
pub mod exchange;
mod file_watcher;
pub mod fleet;
mod http;
pub mod ipam;
mod metrics;
pub mod mqtt_server;
pub mod registry;
mod tenants;
#[cfg(test)]
mod testing;
mod tls;
mod token_buckets;

use std::future::pending;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use governor::clock::MonotonicClock;
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{error, info};
use wgkex_common::access_lists::records_file;
use wgkex_common::access_lists::service::{Handle, ListService, ListUpdate};
use wgkex_common::config::{Https, Listen, Secret};
use wgkex_common::doctor::sockets::taken_by;
use wgkex_common::http::connections::{Capacity, Closed, Connections};
use wgkex_common::http::listener::{everywhere, prepare};
use wgkex_common::mqtt::presence::Reporter;
use wgkex_common::mqtt::{ConnectionState, MqttHandle, MqttSession};
use wgkex_common::runtime::heartbeat::Heartbeat;
use wgkex_common::runtime::logged_once::LoggedOnce;
use wgkex_common::runtime::reload::{self, KeyUse};
use wgkex_common::runtime::services::Services;
use wgkex_common::storage::key_store::{self, Clocks, KeyStore};
use wgkex_common::storage::versions::{self, StateFile};
use wgkex_common::sync::{self, PeerSelection, SyncClient, SyncReceiver, SyncSender};
use wgkex_common::wire::message::{ServiceAnnouncement, SnapshotChunk};
use wgkex_common::wire::name::Participant;
use wgkex_common::{BrokerName, Config, Domain};

use crate::bus::announcer::Announcer;
use crate::bus::invalid_messages::InvalidMessages;
use crate::bus::online_log::OnlineLog;
use crate::bus::requesters::Requesters;
#[cfg(fuzzing)]
pub use crate::bus::subscriber::receive_anything;
use crate::bus::sync_queue::SyncQueue;
use crate::bus::{subscriber, sync_server};
use crate::exchange::Exchange;
use crate::exchange::handle::InFlightHandle;
use crate::exchange::publisher::KeyPublisher;
use crate::exchange::rate_limit::RateLimits;
use crate::fleet::Fleet;
use crate::fleet::drain_store::{self, DrainStore};
use crate::fleet::gateways::Gateways;
use crate::fleet::live_keys::LiveKeys;
use crate::fleet::revocation::PendingRevocations;
use crate::http::admin::Admin;
use crate::http::{App, RefusedDomains, UnnamedProxies};
use crate::metrics::MetricsRegistry;
use crate::mqtt_server::{ClientProblems, MqttServer, retained_store};
use crate::registry::lease_events::{RegistryEventReceiver, RegistryEventSender};
use crate::registry::push::{self, LeasePublisher};
use crate::tenants::{TenantEventSender, TenantService, TenantTasks, TenantsHttpState};
use crate::tls::Certificate;

/// How long the MQTT server may take to acknowledge this broker's farewell.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a session may take to disconnect, and the disk to take the last changes.
const BROKER_TASKS_STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the embedded MQTT server may take to stop.
const SERVER_STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often expired live keys are removed, idle rate limits, and clients of the registry that were long silent.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(10);
/// How often to check for idle connections.
const IDLE_CHECK: Duration = Duration::from_secs(1);

/// How a running broker uses the keys of a changed config.
fn key_use() -> KeyUse {
    KeyUse {
        live: vec!["workers", "rebalance"],
        unused: vec![
            "worker_listen",
            "worker_user",
            "peers",
            "forget_idle_after",
            "setup",
            "externalName",
            "servers",
            "hub",
        ],
        of_commands: Vec::new(),
    }
}

/// The state that several services use.
struct Broker {
    config: Config,
    fleet: Fleet,
    exchange: Exchange,
    lists: Handle,
    revocations: PendingRevocations,
    drains: DrainStore,
    /// The clients that the embedded MQTT server had trouble with.
    client_problems: ClientProblems,
    /// The session that receives messages of workers.
    bus: MqttHandle,
    /// The session that publishes keys.
    keys: MqttHandle,
    /// The registry of servers and clients, if it is enabled.
    registry: Option<registry::Registry>,
    metrics: Metrics,
}

/// Each room's metrics.
#[derive(Clone)]
struct Metrics {
    all: MetricsRegistry,
    bus: bus::Metrics,
    exchange: exchange::Metrics,
    fleet: fleet::Metrics,
    http: http::Metrics,
    mqtt_server: mqtt_server::Metrics,
    registry: registry::Metrics,
    tenants: tenants::Metrics,
}

/// The receivers of other brokers' messages, and the services that this broker announces to them.
struct SharedServices {
    leases: RegistryEventSender,
    holder: registry::holder::RegistryHolder,
    tenant_events: Option<TenantEventSender>,
    announced_tenants: Option<watch::Receiver<ServiceAnnouncement>>,
}

/// The ports that the config names, bound.
struct Listeners {
    plain: TcpListener,
    tls: Option<(TcpListener, Arc<Certificate>)>,
    /// With the hash of the token that admin calls need.
    admin: Option<(TcpListener, Secret)>,
}

/// Serves routers until `stop` returns. An error is one that an operator must mend, as a port that is taken, or names a
/// task that ended by itself.
///
/// The services are stopped in the reverse order of their start: requests in flight still need MQTT for their answers,
/// the farewell needs the sessions, and all of them need the embedded server.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let (_broker, services) = start(config).await?;
    Ok(services.run_until("broker", stop).await?)
}

/// Starts all services.
async fn start(config: Config) -> anyhow::Result<(Broker, Services)> {
    let metrics = Metrics::register().context("metrics")?;
    versions::check(&config.state_dir, &state_files(&config))?;
    let (list_service, lists) = ListService::open(&config, Participant::Broker((&config.name).into()))?;
    // Before the ports: of a second broker on the same machine, the state names the process of the first.
    let (fleet, store) = fleet(&config, &lists)?;
    metrics.fleet.state_kept.set(i64::from(!store.is_failing()));
    let listeners = Listeners::bind(&config)?;
    let embedded = config.mqtt_listen.as_ref();
    let embedded =
        embedded.map(|listen| MqttServer::start(listen, &config.state_dir, &metrics.mqtt_server)).transpose()?;
    let server = embedded.as_ref().map_or_else(|| config.mqtt.clone(), |embedded| embedded.access(&config.mqtt));
    let [(bus, session), (keys, keys_session)] =
        wgkex_common::mqtt::open_pair(&server, subscriber::session(&config), subscriber::secondary_session(&config))?;
    let exchange = exchange(&config, fleet.clone(), &lists, metrics.exchange.clone());
    let drains = DrainStore::open(&config, fleet.clone())?;
    let revocations = PendingRevocations::default();
    let client_problems = embedded.as_ref().map(MqttServer::problems).unwrap_or_default();
    let (leases, lease_events) = registry::lease_events::channel();
    let holder = registry::holder::RegistryHolder::open(&config)?;
    let (registry, database_end) = open_registry(&config, &holder, &metrics.registry).await?.unzip();
    let (tenant_tasks, tenants_http) = tenants::open(&config, &metrics.tenants)?.unzip();
    let of_tenants = tenant_tasks.as_ref().map(|tasks| (tasks.events.clone(), tasks.announced.clone()));
    let (tenant_events, announced_tenants) = of_tenants.unzip();
    let broker =
        Broker { config, fleet, exchange, lists, revocations, drains, client_problems, bus, keys, registry, metrics };

    let mut services = Services::default();
    if let Some(embedded) = embedded {
        start_mqtt_server(&mut services, embedded, broker.bus.connection_state());
    }
    broker.start_storage(&mut services, store, list_service, holder.clone());
    if let Some(end) = database_end {
        services.background().spawn("the database", |_| async move { drop(end.await) });
    }
    let shared = SharedServices { leases, holder, tenant_events, announced_tenants };
    broker.start_bus(&mut services, session, keys_session, shared);
    broker.start_registry(&mut services, lease_events);
    let service = tenant_tasks.map(|tasks| broker.start_tenant_files(&mut services, tasks));
    broker.start_http(&mut services, listeners, tenants_http)?;
    // Stopped before the HTTP server, which waits for its WebSockets to end.
    if let Some(service) = service {
        services
            .group(BROKER_TASKS_STOP_TIMEOUT, None)
            .spawn("the tenants", |stop| service.run(broker.keys.clone(), stop));
    }
    let Config { name, broker_listen, .. } = &broker.config;
    info!(version = env!("CARGO_PKG_VERSION"), broker = name.as_str(), %broker_listen, "broker started");
    Ok((broker, services))
}

/// The registry, if it is enabled, and the end of its database's thread.
async fn open_registry(
    config: &Config,
    holder: &registry::holder::RegistryHolder,
    metrics: &registry::Metrics,
) -> anyhow::Result<Option<(registry::Registry, oneshot::Receiver<()>)>> {
    let Some(enabled) = &config.registry else { return Ok(None) };
    let (registry, end) = registry::Registry::open(config, enabled, holder.clone(), metrics.clone())?;
    registry.check_for_servers().await;
    Ok(Some((registry, end)))
}

/// The embedded MQTT server, the task that watches it by the broker's own session, and the one that loads its
/// certificate again.
fn start_mqtt_server(services: &mut Services, embedded: MqttServer, connection: watch::Receiver<ConnectionState>) {
    let (certificate, heartbeat) = (embedded.certificate(), Heartbeat::default());
    services
        .group(SERVER_STOP_TIMEOUT, None)
        .spawn_watched("the MQTT server", heartbeat.clone(), |stop| serve_mqtt(embedded, stop));
    services.background().spawn("the check of the MQTT server", |_| check_mqtt_server(connection, heartbeat));
    if let Some(certificate) = certificate {
        services.background().spawn("the certificate of the MQTT server", |_| certificate.watch());
    }
}

/// The files that a broker with this config keeps in `state_dir`.
fn state_files(config: &Config) -> Vec<StateFile> {
    let registry = config.registry.is_some();
    let files = [
        (true, key_store::BROKER_FILE),
        (true, records_file::BROKER_FILE),
        (true, drain_store::FILE),
        (config.mqtt_listen.is_some(), retained_store::FILE),
        (registry && config.storage.url.is_none(), registry::FILE),
        (registry, registry::holder::FILE),
        (config.tenants.is_some(), tenants::FILE),
    ];
    files.into_iter().filter(|(is_used, _)| *is_used).map(|(_, file)| file).collect()
}

impl Broker {
    fn start_storage(
        &self,
        services: &mut Services,
        store: KeyStore,
        list_service: ListService,
        holder: registry::holder::RegistryHolder,
    ) {
        let state_kept = self.metrics.fleet.state_kept.clone();
        services
            .group(BROKER_TASKS_STOP_TIMEOUT, Some("the disk did not take the last state in time"))
            .spawn("the state file", |stop| store.run(move |is_kept| state_kept.set(i64::from(is_kept)), stop))
            .spawn("the access lists", |stop| {
                list_service.run(
                    self.keys.clone(),
                    apply_lists(self.fleet.clone(), self.exchange.clone(), self.metrics.fleet.clone()),
                    stop,
                )
            })
            .spawn("the registry's holder", |stop| holder.run(stop));
    }

    /// The two sessions, and the tasks that handle their messages.
    fn start_bus(
        &self,
        services: &mut Services,
        session: MqttSession,
        keys_session: MqttSession,
        shared: SharedServices,
    ) {
        let Self { config, fleet, exchange: Exchange { in_flight, .. }, bus, keys, .. } = self;
        let (name, online_log) = (BrokerName::from(&config.name), OnlineLog::default());
        let (reporter, presence_events) = Reporter::new(Participant::Broker(name.clone()));
        let (sync_sender, sync_events) = sync::channel();
        let sync_requests = SyncQueue::default();
        let requesters = Requesters::new(name.clone(), sync_requests.clone());
        let mut primary = self.primary(reporter.clone(), online_log.clone(), &shared);
        let mut secondary = self.secondary(reporter, sync_sender, requesters, &shared);
        let handles = [bus.clone(), keys.clone()];
        let announcer = Announcer::new(
            config,
            handles.clone(),
            presence_events,
            self.lists.snapshot(),
            fleet.clone(),
            in_flight.clone(),
            online_log,
        )
        .with_services(shared.announced_tenants, shared.holder);
        let [of_session, of_keys] = [session.heartbeat(), keys_session.heartbeat()];
        services
            .group(BROKER_TASKS_STOP_TIMEOUT, None)
            .spawn_watched("the MQTT session", of_session, |stop| {
                session.run(move |event| primary.on_event(event), stop)
            })
            .spawn_watched("the MQTT session for keys", of_keys, |stop| {
                keys_session.run(move |event| secondary.on_event(event), stop)
            });
        self.start_keys(services, sync_requests, sync_events);
        services
            .group(BROKER_TASKS_STOP_TIMEOUT, Some("the disk did not take the last drains in time"))
            .spawn("the drains", |stop| self.drains.clone().run(stop));
        services
            .group(2 * FAREWELL_TIMEOUT, None)
            .spawn("the announcer", |stop| announce(announcer, name, handles, stop));
    }

    /// The receiver of the session for what workers publish.
    fn primary(&self, reporter: Reporter, online_log: OnlineLog, shared: &SharedServices) -> subscriber::Primary {
        subscriber::Primary {
            fleet: self.fleet.clone(),
            in_flight: self.exchange.in_flight.clone(),
            revocations: self.revocations.clone(),
            reporter,
            online_log,
            invalid: InvalidMessages::default(),
            tenants: shared.tenant_events.clone(),
            registry: shared.holder.clone(),
            metrics: self.metrics.bus.clone(),
        }
    }

    /// The receiver of the session for keys.
    fn secondary(
        &self,
        reporter: Reporter,
        sync: SyncSender,
        requesters: Requesters,
        shared: &SharedServices,
    ) -> subscriber::Secondary {
        subscriber::Secondary {
            fleet: self.fleet.clone(),
            sync,
            lists: self.lists.clone(),
            requesters,
            leases: self.registry.is_some().then(|| shared.leases.clone()),
            tenants: shared.tenant_events.clone(),
            registry: shared.holder.clone(),
            reporter,
            metrics: self.metrics.bus.clone(),
        }
    }

    /// The tasks that publish, exchange and expire keys.
    fn start_keys(&self, services: &mut Services, sync_requests: SyncQueue, sync_events: SyncReceiver) {
        let Self { config, fleet, exchange, keys, .. } = self;
        let own = Participant::Broker((&config.name).into());
        let client = SyncClient::new(own, PeerSelection::RoundRobin, config.domains.clone());
        let metrics = self.metrics.bus.clone();
        services
            .background()
            .spawn("the sync server", |_| sync_server::run(keys.clone(), fleet.clone(), sync_requests, metrics))
            .spawn("the sync client", |_| sync::run(client, keys.clone(), sync_events, on_chunk(fleet.clone()), || {}))
            .spawn("the publisher of keys", |_| {
                let in_flight = exchange.in_flight.clone();
                KeyPublisher { in_flight, bus: keys.clone(), fleet: fleet.clone() }.run()
            })
            .spawn("the expiry", |_| expire(fleet.clone(), exchange.clone(), self.registry.clone()))
            .spawn("the config", |_| {
                let fleet = fleet.clone();
                reload::on_hangup(config.clone(), key_use(), move |config| fleet.gateways().reconfigure(config))
            });
    }

    /// The tasks that write and read the files of tenants. Returns their service, which is to be started last.
    fn start_tenant_files(&self, services: &mut Services, tasks: TenantTasks) -> TenantService {
        let TenantTasks { service, store, tokens, .. } = tasks;
        let state_kept = self.metrics.tenants.state_kept.clone();
        services
            .group(BROKER_TASKS_STOP_TIMEOUT, Some("the disk did not take the last addresses of tenants in time"))
            .spawn("the addresses of tenants", |stop| {
                store.run(move |is_kept| state_kept.set(i64::from(is_kept)), stop)
            });
        if let Some(tokens) = tokens {
            services.background().spawn("the tokens of tenants", |_| tokens.watch());
        }
        service
    }

    /// The servers for routers and operators, and the task that reports this broker's state to the service manager.
    fn start_http(
        &self,
        services: &mut Services,
        listeners: Listeners,
        tenants: Option<TenantsHttpState>,
    ) -> anyhow::Result<()> {
        let app = self.app(tenants);
        services.background().spawn("the idle connections", |_| evict_idle(app.connections.clone()));
        if let Some((listener, token_hash)) = listeners.admin {
            let server = http::admin::server(listener, self.admin(token_hash))?;
            services.spawn("admin_listen", |stop| serve("admin_listen", server, stop));
            info!(admin_listen = %self.config.admin_listen, "admin calls are served");
        }
        let observed = app.clone();
        services.spawn_service_manager(move || observed.not_ready_reason());
        let budget = self.config.confirm.budget;
        let plain = http::server(listeners.plain, None, app.clone(), budget)?;
        let tls = listeners.tls.map(|(listener, certificate)| {
            let server = http::server(listener, Some(certificate.server()?), app, budget)?;
            anyhow::Ok((server, certificate))
        });
        let tls = tls.transpose()?;
        // Each ends when its requests are answered, at the latest when the budget of a request is spent.
        services.group(Duration::MAX, None).spawn("broker_listen", |stop| serve("broker_listen", plain, stop));
        if let Some((server, certificate)) = tls {
            services.spawn("broker_listen.tls", |stop| serve("broker_listen.tls", server, stop));
            let listen = self.config.https.as_ref().map(|https| https.listen.to_string());
            info!(https_listen = listen, "HTTPS listens");
            services.background().spawn("the certificate", |_| certificate.watch());
        }
        Ok(())
    }

    /// The state of the servers for routers.
    fn app(&self, tenants: Option<TenantsHttpState>) -> App {
        let (trusted, unnamed_proxies) = (Arc::from(self.config.trusted_proxies.clone()), Arc::default());
        let Metrics { http: metrics, fleet: fleet_metrics, all: all_metrics, .. } = self.metrics.clone();
        let capacity = if tenants.is_some() { Capacity::of_fleet_and_upgraded() } else { Capacity::of_fleet() };
        let connections = connections(capacity, Arc::clone(&trusted), Arc::clone(&unnamed_proxies), metrics.clone());
        let started = Instant::now();
        App {
            domains: self.config.domains.clone(),
            exchange: self.exchange.clone(),
            fleet: self.fleet.clone(),
            links: [&self.bus, &self.keys].map(MqttHandle::connection_state),
            name_suspects: [&self.bus, &self.keys].map(MqttHandle::name_suspect),
            client_problems: self.client_problems.clone(),
            connections,
            trusted,
            unnamed_proxies,
            metrics,
            fleet_metrics,
            all_metrics,
            registry: self.registry.clone(),
            refused_domains: Arc::new(Mutex::new(RefusedDomains::new(started))),
            tenants,
            started,
        }
    }

    /// The tasks that publish leases to the gateways that are servers.
    fn start_registry(&self, services: &mut Services, events: RegistryEventReceiver) {
        if let Some(registry) = &self.registry {
            let publisher =
                LeasePublisher::new(registry.clone(), self.keys.clone(), (&self.config.name).into(), events);
            services
                .background()
                .spawn("the publisher of leases", |_| publisher.run())
                .spawn("the publisher of changed leases", |_| {
                    push::publish_changes(registry.pending(), self.keys.clone())
                })
                .spawn("the counts of the registry", |_| registry.clone().count());
        }
    }

    fn admin(&self, token_hash: Secret) -> Admin {
        Admin {
            lists: self.lists.clone(),
            exchange: self.exchange.clone(),
            fleet: self.fleet.clone(),
            revocations: self.revocations.clone(),
            drains: self.drains.clone(),
            bus: self.keys.clone(),
            domains: self.config.domains.clone(),
            token_hash,
        }
    }
}

impl Metrics {
    fn register() -> Result<Self, prometheus::Error> {
        let all = MetricsRegistry::default();
        let version = all.gauges("wgkex_broker_build_info", "1, with the version", &["version"])?;
        version.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Self {
            bus: bus::Metrics::register(&all)?,
            exchange: exchange::Metrics::register(&all)?,
            fleet: fleet::Metrics::register(&all)?,
            http: http::Metrics::register(&all)?,
            mqtt_server: mqtt_server::Metrics::register(&all)?,
            registry: registry::Metrics::register(&all)?,
            tenants: tenants::Metrics::register(&all)?,
            all,
        })
    }
}

impl Listeners {
    fn bind(config: &Config) -> anyhow::Result<Self> {
        let plain = listen("broker_listen", &config.broker_listen.host, config.broker_listen.port)?;
        Ok(Self { plain, admin: listen_for_admin(config)?, tls: config.https.clone().map(open_https).transpose()? })
    }
}

fn exchange(config: &Config, fleet: Fleet, lists: &Handle, metrics: exchange::Metrics) -> Exchange {
    Exchange {
        fleet,
        in_flight: InFlightHandle::new(config.domains.clone(), lists.admission()),
        limits: Arc::new(RateLimits::new(config.limits, &MonotonicClock)),
        warned_domains: Arc::default(),
        refused: Arc::new(Mutex::new(LoggedOnce::new(Instant::now()))),
        lists: lists.snapshot(),
        confirm: config.confirm,
        metrics,
    }
}

/// Runs a listener until `stop` returns and its requests are answered, or until it fails, which is logged with the reason.
async fn serve(listener: &'static str, server: http::HttpServer, stop: impl Future<Output = ()>) {
    if let Err(error) = server.run(stop).await {
        error!(listener, %error, "listener failed");
    }
}

/// Runs the embedded MQTT server until `stop` returns, or until it ends.
async fn serve_mqtt(mut server: MqttServer, stop: impl Future<Output = ()>) {
    tokio::select! {
        _ = server.ended() => {}
        () = stop => server.stop().await,
    }
}

/// The embedded MQTT server makes progress while this broker's own session is connected to it. If one of the server's
/// threads is stuck, the session's echoes do not come back, and it reconnects in vain: only a restart of the program
/// helps. The session's own heartbeat goes on then, as with a server elsewhere that is down.
async fn check_mqtt_server(mut connection: watch::Receiver<ConnectionState>, heartbeat: Heartbeat) {
    loop {
        let is_up = *connection.borrow_and_update() == ConnectionState::Up;
        let changed = connection.changed();
        let changed = if is_up { heartbeat.wait_for(changed).await } else { changed.await };
        if changed.is_err() {
            return pending().await;
        }
    }
}

/// Publishes this broker's presence until `stop` returns, and then its farewell; or until a session ends.
async fn announce(
    announcer: Announcer,
    name: BrokerName,
    [bus, keys]: [MqttHandle; 2],
    stop: impl Future<Output = ()>,
) {
    tokio::select! {
        biased;
        // The announcer is dropped before the farewell: it would contradict that.
        () = stop => {}
        () = announcer.run() => return,
    }
    let (hello, status) = (subscriber::hello(&name, Vec::new()), subscriber::status(&name, "0"));
    let _ = timeout(FAREWELL_TIMEOUT, async { tokio::join!(keys.publish(hello), bus.publish(status)) }).await;
}

/// The listener for admin calls, and the hash of the token that they need, if there is one.
fn listen_for_admin(config: &Config) -> anyhow::Result<Option<(TcpListener, Secret)>> {
    let Config { admin_listen, admin_token_hash, .. } = config;
    let listener = |hash| Ok((listen("admin_listen", &admin_listen.host, admin_listen.port)?, hash));
    admin_token_hash.clone().map(listener).transpose()
}

/// The listener for HTTPS, and its certificate.
fn open_https(https: Https) -> anyhow::Result<(TcpListener, Arc<Certificate>)> {
    let listener = listen("broker_listen.tls", &https.listen.host, https.listen.port)?;
    Ok((listener, Certificate::open("broker_listen.tls", https.cert_file, https.key_file)?))
}

/// No gateway, and the live keys as they were when this broker ended, as far as `lists` admit them; and the task that
/// writes these to disk.
fn fleet(config: &Config, lists: &Handle) -> anyhow::Result<(Fleet, KeyStore)> {
    let ttl = Some(config.live_keys.ttl);
    let (store, buffer, remembered) =
        KeyStore::open(&config.state_dir, key_store::BROKER_FILE, &config.domains, ttl, Clocks::read())?;
    let mut live = LiveKeys::new(config, remembered, buffer, Instant::now());
    info!(keys = live.len(), "live keys");
    live.apply(lists.admission());
    Ok((Fleet::new(Gateways::new(config), live), store))
}

/// Merges the snapshots of other brokers into the live keys.
fn on_chunk(fleet: Fleet) -> impl FnMut(Domain, SnapshotChunk) -> std::future::Ready<()> {
    move |_, chunk| {
        fleet.live().on_chunk(&chunk, Instant::now());
        std::future::ready(())
    }
}

async fn evict_idle(connections: Connections) {
    loop {
        sleep(IDLE_CHECK).await;
        connections.close_idle();
    }
}

/// The connections of routers, none of which is open yet.
fn connections(
    capacity: Capacity,
    trusted: Arc<[IpNet]>,
    missed: Arc<UnnamedProxies>,
    metrics: http::Metrics,
) -> Connections {
    let peer_kind = move |peer| client_ip::peer_kind(peer, &trusted, missed.is_any());
    let closed = move |closed: Closed| metrics.connections_closed.with_label_values(&[closed.reason()]).inc();
    Connections::new(capacity, peer_kind, closed)
}

/// Applies changed access lists to the keys in flight and to the live keys.
fn apply_lists(fleet: Fleet, exchange: Exchange, metrics: fleet::Metrics) -> impl FnMut(ListUpdate<'_>) {
    move |update| {
        metrics.lists.set(&update);
        exchange.in_flight.apply(update.admission.clone());
        fleet.live().apply(update.admission.clone());
    }
}

async fn expire(fleet: Fleet, exchange: Exchange, registry: Option<registry::Registry>) {
    loop {
        sleep(EXPIRY_INTERVAL).await;
        fleet.gateways().tick(Instant::now());
        exchange.limits.evict_idle();
        if let Some(registry) = &registry {
            registry.login.forget_old();
        }
        exchange.in_flight.expire();
        let expired = fleet.live().expire(Instant::now());
        if expired > 0 {
            info!(expired, "live keys are forgotten");
        }
    }
}

fn listen(key: &str, host: &str, port: u16) -> anyhow::Result<TcpListener> {
    let bound = if host == "::" { everywhere(port) } else { TcpListener::bind((host, port)) };
    bound.and_then(prepare).map_err(|error| {
        let owner = taken_by(host, port, &error).map_or_else(String::new, |owner| format!(": {owner}"));
        anyhow!("{key} {}: {error}{owner}", Listen { host: host.to_owned(), port })
    })
}

#[cfg(test)]
mod tests {
    use wgkex_common::runtime::heartbeat::HEARTBEAT_INTERVAL;

    use super::*;

    /// The tasks that the service manager watches, with these lines in the config.
    async fn watched(more: &str) -> Vec<&'static str> {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().display();
        let yaml = format!("domains: [x_a]\ndomain_prefixes: [x_]\nstate_dir: {state_dir}\n{more}");
        let mut config = Config::parse("f", &yaml, "b").unwrap();
        // Any free port, which the config does not allow.
        config.broker_listen = Listen { host: "127.0.0.1".into(), port: 0 };
        if let Some(listen) = &mut config.mqtt_listen {
            listen.address.set_port(0);
        }
        start(config).await.unwrap().1.watched()
    }

    #[tokio::test]
    async fn the_service_manager_watches_the_sessions_and_the_brokers_own_mqtt_server() {
        let sessions = ["the MQTT session", "the MQTT session for keys"];
        assert_eq!(watched("mqtt: {broker_url: 127.0.0.1}").await, sessions);
        assert_eq!(watched("").await, [&["the MQTT server"], &sessions[..]].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn the_mqtt_server_makes_progress_while_this_broker_is_connected_to_it() {
        let (heartbeat, minute) = (Heartbeat::default(), Duration::from_secs(60));
        let (connection, state) = watch::channel(ConnectionState::Down("not yet".into()));
        tokio::spawn(check_mqtt_server(state, heartbeat.clone()));
        sleep(minute).await;
        assert!(heartbeat.age() >= minute);
        connection.send_replace(ConnectionState::Up);
        sleep(minute).await;
        assert!(heartbeat.age() <= HEARTBEAT_INTERVAL);
        for reason in ["lost", "refused"] {
            connection.send_replace(ConnectionState::Down(reason.into()));
            sleep(minute).await;
        }
        assert!(heartbeat.age() + HEARTBEAT_INTERVAL >= 2 * minute, "{:?}", heartbeat.age());
    }
}
