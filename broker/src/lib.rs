//! The broker: routers' keys in over HTTP, out to the gateways over MQTT, and their word back into the answer.
//!
//! Follow a key: [`http`] reads it, [`exchange`] checks, publishes and waits, [`fleet`] knows which gateway is the best
//! and keeps the key for gateways that lack it later, [`bus`] receives what became of it.
//!
//! `wgkex_common::access_lists` says which keys may come; operators change that by the calls that [`cli`] makes. Unless
//! another one is named, [`mqtt_server`] is the MQTT server for all of that.

mod bus;
pub mod cli;
pub mod exchange;
pub mod fleet;
mod http;
mod metrics;
pub mod mqtt_server;
mod tls;

use std::future::pending;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::future::join_all;
use governor::clock::MonotonicClock;
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::{error, info};
use wgkex_common::access_lists::service::{ListService, ListUpdate};
use wgkex_common::config::{Https, Secret};
use wgkex_common::http::connections::{Capacity, Closed, Connections, prepare};
use wgkex_common::mqtt::presence::Reporter;
use wgkex_common::runtime::process;
use wgkex_common::runtime::tasks::{Ended, Tasks};
use wgkex_common::storage::key_store::{Clocks, KeyStore};
use wgkex_common::sync::{self, PeerSelection, SyncClient};
use wgkex_common::wire::message::{Participant, SnapshotChunk};
use wgkex_common::{Config, Domain, Reserved};

use crate::bus::announcer::Announcer;
use crate::bus::askers::Askers;
use crate::bus::subscriber;
#[cfg(fuzzing)]
pub use crate::bus::subscriber::hear_anything;
use crate::exchange::Exchange;
use crate::exchange::rate_limit::Limits;
use crate::exchange::turns::Turns;
use crate::exchange::waiters::Waiters;
use crate::fleet::gateways::Gateways;
use crate::fleet::live_keys::LiveKeys;
use crate::fleet::revocation::Answers;
use crate::http::App;
use crate::http::admin::Admin;
use crate::http::client_ip;
use crate::metrics::Metrics;
use crate::mqtt_server::MqttServer;
use crate::tls::Certificate;

/// How long the bus may take to hear that this broker goes.
const FAREWELL: Duration = Duration::from_secs(1);
/// Questions that wait at most for their answers; who gets none asks again.
const QUESTIONS: usize = 1024;
/// How often the live keys are searched for those whose time is over, and the limits for what is used no more.
const EXPIRE: Duration = Duration::from_secs(10);
/// How often the connections are searched for idle ones.
const TIDY: Duration = Duration::from_secs(1);

/// Serves routers until `stop` returns. An error is one that an operator must mend: a port that is taken.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let listener = listen("broker_listen", &config.broker_listen.host, config.broker_listen.port)?;
    let admin_listener = listen_for_admin(&config)?;
    let metrics = Metrics::new().context("metrics")?;
    let secure = config.https.clone().map(open_https).transpose()?;
    let limits = Arc::new(Limits::new(config.limits, MonotonicClock));
    let (trusted, proxy_missed) = (Arc::from(config.trusted_proxies.clone()), Arc::default());
    let connections = connections(Arc::clone(&trusted), Arc::clone(&proxy_missed), metrics.clone());
    let (keeper, lists) = ListService::open(&config, Participant::Broker(config.name.clone()))?;
    let gateways = Arc::new(Mutex::new(gateways(&config)));
    let (waiters, answers) = (Waiters::default(), Answers::default());
    let embedded = config.mqtt_listen.as_ref();
    let mut embedded = embedded.map(|listen| MqttServer::start(listen, &config.state_dir, &metrics)).transpose()?;
    let server = embedded.as_ref().map_or_else(|| config.mqtt.clone(), |embedded| embedded.access(&config.mqtt));
    let [(bus, session), (keys, publishing)] =
        wgkex_common::mqtt::open_pair(&server, subscriber::client(&config), subscriber::keys_client(&config))?;
    let (live, store) = live_keys(&config)?;
    live.lock().obey(lists.admission());
    let (ears, heard) = sync::channel();
    let links = [bus.connection_state(), keys.connection_state()];
    let waiting = (waiters.clone(), answers.clone());
    let (reporter, presence_events) = Reporter::new(Participant::Broker(config.name.clone()));
    let hand_on = subscriber::hand_on(gateways.clone(), waiting, live.clone(), reporter.clone(), metrics.clone());
    let (question_sender, questions) = mpsc::channel(QUESTIONS);
    let askers = Askers::new(config.name.clone(), question_sender);
    let hand_on_keys = subscriber::hand_on_keys(live.clone(), ears, lists.clone(), askers, reporter, metrics.clone());
    let buses = [bus.clone(), keys.clone()];
    let announcer =
        Announcer::new(&config, buses, presence_events, lists.snapshot(), gateways.clone(), waiters.clone());
    let exchange = Exchange {
        gateways: gateways.clone(),
        waiters: waiters.clone(),
        turns: Turns::new(keys.clone(), live.clone(), lists.admission()),
        live: live.clone(),
        limits: limits.clone(),
        answers: Arc::default(),
        unwitnessed: Arc::default(),
        lists: lists.snapshot(),
        confirm: config.confirm,
        metrics: metrics.clone(),
    };
    let asker =
        SyncClient::new(Participant::Broker(config.name.clone()), PeerSelection::RoundRobin, config.domains.clone());
    let (over, stopped) = watch::channel(false);

    let [mut tasks, mut sessions, mut disk, mut announcing] = [(); 4].map(|()| Tasks::default());
    let kept = metrics.state_kept.clone();
    let kept = move |is_kept| kept.set(i64::from(is_kept));
    disk.spawn("the state file", store.run(kept, process::over(stopped.clone())));
    let tell = tell(live.clone(), waiters.clone(), exchange.turns.clone(), metrics.clone());
    disk.spawn("the keeper of the lists", keeper.run(keys.clone(), tell, process::over(stopped.clone())));
    sessions.spawn("the MQTT session that hears workers", session.run(hand_on, process::over(stopped.clone())));
    sessions.spawn("the MQTT session of the keys", publishing.run(hand_on_keys, process::over(stopped)));
    announcing.spawn("the announcer", announcer.run());
    if let Some((listener, token_hash)) = admin_listener {
        let (gateways, bus) = (gateways.clone(), keys.clone());
        let admin = Admin { lists, gateways, answers, bus, domains: config.domains.clone(), token_hash };
        tasks.spawn("admin_listen", serve("admin_listen", http::admin::server(listener, admin)?));
        info!(admin_listen = %config.admin_listen, "admin calls are taken");
    }
    tasks.spawn("what answers questions", subscriber::answer(keys.clone(), live.clone(), questions, metrics.clone()));
    tasks.spawn("what asks other brokers", sync::run(asker, keys.clone(), heard, learn(live.clone()), || {}));
    tasks.spawn("the look for what is over", expire(exchange.clone()));
    tasks.spawn("the look for idle connections", tidy(connections.clone()));
    let app = App { domains: config.domains.clone(), exchange, links, connections, trusted, proxy_missed, metrics };
    let plain = http::server(listener, None, app.clone(), config.confirm.budget)?;
    let mut handles = vec![plain.handle()];
    tasks.spawn("broker_listen", serve("broker_listen", plain));
    if let Some((listener, certificate)) = secure {
        let server = http::server(listener, Some(certificate.server()?), app, config.confirm.budget)?;
        handles.push(server.handle());
        tasks.spawn("broker_listen.tls", serve("broker_listen.tls", server));
        tasks.spawn("the look at certificates", certificate.watch());
    }
    let Config { name: broker, broker_listen, .. } = &config;
    info!(version = env!("CARGO_PKG_VERSION"), broker, %broker_listen, "broker started");

    let ended = tokio::select! {
        ended = tasks.ended() => Err(ended),
        ended = sessions.ended() => Err(ended),
        ended = disk.ended() => Err(ended),
        ended = announcing.ended() => Err(ended),
        ended = server_ended(embedded.as_mut()) => Err(ended),
        () = stop => Ok(()),
    };
    info!("broker stops");
    // Requests under way still need the bus.
    join_all(handles.iter().map(|handle| handle.stop(true))).await;
    // It would publish again what the goodbye takes back.
    drop(announcing);
    let (hello, status) = (subscriber::hello(&config.name, Vec::new()), subscriber::status(&config.name, "0"));
    let _ = timeout(FAREWELL, async { tokio::join!(keys.publish(hello), bus.publish(status)) }).await;
    over.send_replace(true);
    let (_, unwritten) = tokio::join!(sessions.finish(FAREWELL), disk.finish(FAREWELL));
    for task in unwritten {
        error!(task, "the disk did not take the last state in time");
    }
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    Ok(ended?)
}

/// Returns when a listener ends; why, the log says.
async fn serve(listener: &'static str, server: http::Server) {
    if let Err(error) = server.await {
        error!(listener, %error, "listener failed");
    }
}

/// Returns when the MQTT server ends, if there is one.
async fn server_ended(server: Option<&mut MqttServer>) -> Ended {
    match server {
        Some(server) => server.ended().await,
        None => pending().await,
    }
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
    Ok((listener, Certificate::open("broker_listen.tls", (https.cert_file, https.key_file))?))
}

/// The live keys, as this broker knew them when it ended, and what keeps them.
fn live_keys(config: &Config) -> anyhow::Result<(Arc<Mutex<LiveKeys>>, KeyStore)> {
    let ttl = Some(config.live_keys.ttl);
    let (store, journal, known) = KeyStore::open(&config.state_dir, "broker", &config.domains, ttl, Clocks::read())?;
    let domains = config.domains.clone();
    let live = LiveKeys::new(
        config.name.clone(),
        (config.live_keys, config.cleanup),
        domains,
        (journal, known),
        Instant::now(),
    );
    info!(keys = live.len(), "live keys");
    Ok((Arc::new(Mutex::new(live)), store))
}

/// Takes in what other brokers know.
fn learn(live: Arc<Mutex<LiveKeys>>) -> impl FnMut(Domain, SnapshotChunk) -> std::future::Ready<()> {
    move |_, page| {
        live.lock().learn(&page, Instant::now());
        std::future::ready(())
    }
}

async fn tidy(connections: Connections) {
    loop {
        sleep(TIDY).await;
        connections.tidy();
    }
}

/// The connections of routers, none of which is open yet.
fn connections(trusted: Arc<[IpNet]>, proxy_missed: Arc<AtomicBool>, metrics: Metrics) -> Connections {
    let seat = move |peer| client_ip::seat(peer, &trusted, proxy_missed.load(Ordering::Relaxed));
    let closed = move |closed: Closed| metrics.connections_closed.with_label_values(&[closed.reason()]).inc();
    Connections::new(Capacity::of_fleet(), seat, closed)
}

/// Tells the live keys who may come. What gateways said before may be about a key that was denied meanwhile.
fn tell(live: Arc<Mutex<LiveKeys>>, waiters: Waiters, turns: Turns, metrics: Metrics) -> impl FnMut(ListUpdate<'_>) {
    move |news| {
        metrics.set_lists(&news);
        waiters.forget_all();
        turns.obey(news.admission.clone());
        live.lock().obey(news.admission.clone());
    }
}

async fn expire(exchange: Exchange) {
    loop {
        sleep(EXPIRE).await;
        exchange.gateways().tick();
        exchange.limits.tidy();
        exchange.waiters.tidy(Instant::now());
        exchange.turns.look();
        let expired = exchange.live().expire(Instant::now());
        if expired > 0 {
            info!(expired, "live keys are forgotten");
        }
    }
}

fn listen(key: &str, host: &str, port: u16) -> anyhow::Result<TcpListener> {
    let bound = http::listen::open(host, port);
    bound.and_then(prepare).with_context(|| format!("{key} {host}:{port}"))
}

fn gateways(config: &Config) -> Gateways {
    let weights = config.workers.iter().map(|(name, worker)| (name.clone(), worker.weight)).collect();
    let reserved = Reserved::new(config.protected_keys.clone(), config.domains.clone());
    Gateways::new(config.name.clone(), config.domains.clone(), weights, reserved)
}
