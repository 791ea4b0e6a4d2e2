//! The broker: routers' keys in over HTTP, out to the gateways over MQTT, and their word back into the answer.
//!
//! Follow a key: [`http`] reads it, [`exchange`] checks, publishes and waits, [`gateways`] says which gateway is the
//! best, [`waiters`] brings what [`mqtt`] hears of it. [`live`] remembers it, for gateways that lack it later.
//! Unless another one is named, [`mqttd`] is the MQTT server for all of that.

pub mod access;
pub mod exchange;
pub mod gateways;
mod http;
pub mod live;
mod metrics;
mod mqtt;
mod mqttd;
mod page;
pub mod password;
pub mod waiters;

use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::info;
use wgkex_common::message::{Page, Party};
use wgkex_common::store::{Now, Store};
use wgkex_common::sync::{self, Asker, Manner};
use wgkex_common::{Config, Domain, process};

use crate::exchange::Exchange;
use crate::gateways::Gateways;
use crate::http::App;
use crate::live::LiveKeys;
use crate::metrics::Metrics;
use crate::mqttd::Mqttd;
use crate::waiters::Waiters;

/// How long the bus may take to hear that this broker goes.
const FAREWELL: Duration = Duration::from_secs(1);
/// Questions that wait at most for their answers; who gets none asks again.
const QUESTIONS: usize = 1024;
/// How often the live keys are searched for those whose time is over.
const EXPIRE: Duration = Duration::from_secs(10);

/// Serves routers until `stop` returns. An error is one that an operator must mend: a port that is taken.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let listener = listen("broker_listen", &config.broker_listen.host, config.broker_listen.port)?;
    let metrics = Metrics::new().context("metrics")?;
    let embedded = config.mqtt_listen.as_ref();
    let embedded = embedded.map(|listen| Mqttd::start(listen, &config.state_dir, &metrics)).transpose()?;
    let server = embedded.as_ref().map_or_else(|| config.mqtt.clone(), |embedded| embedded.access(&config.mqtt));
    let gateways = Arc::new(Mutex::new(gateways(&config)));
    let waiters = Waiters::default();
    let (bus, session) = wgkex_common::mqtt::open(&server, mqtt::client(&config))?;
    let (keys, publishing) = wgkex_common::mqtt::open(&server, mqtt::keys_client(&config))?;
    let (live, store) = live_keys(&config);
    let (ears, heard) = sync::ears();
    let links = [bus.link(), keys.link()];
    let hand_on = mqtt::hand_on(gateways.clone(), waiters.clone(), live.clone(), metrics.clone());
    let (question_sender, questions) = mpsc::channel(QUESTIONS);
    let hand_on_keys = mqtt::hand_on_keys(live.clone(), ears, question_sender, metrics.clone());
    let exchange = Exchange {
        gateways: gateways.clone(),
        waiters,
        keys: keys.clone(),
        live: live.clone(),
        confirm: config.confirm,
        metrics: metrics.clone(),
    };
    let asker = Asker::new(Party::Broker(config.name.clone()), Manner::Each, config.domains.clone());
    let (over, stopped) = watch::channel(false);

    let kept = metrics.state_kept.clone();
    let storing = tokio::spawn(store.run(move |is_kept| kept.set(i64::from(is_kept)), process::over(stopped.clone())));
    let sessions = tokio::spawn(async move {
        let stop = || process::over(stopped.clone());
        tokio::join!(session.run(hand_on, stop()), publishing.run(hand_on_keys, stop()))
    });
    tokio::spawn(mqtt::say_hello(config.name.clone(), config.domains.clone(), keys.clone()));
    tokio::spawn(mqtt::answer(keys.clone(), live.clone(), questions, metrics.clone()));
    tokio::spawn(sync::run(asker, keys.clone(), heard, learn(live.clone()), || {}));
    tokio::spawn(expire(live));
    tokio::spawn(mqtt::greet(config.name.clone(), bus.clone(), gateways));
    let app = App { domains: config.domains.clone(), exchange, links, metrics };
    let server = http::server(listener, app, config.confirm.budget)?;
    let handle = server.handle();
    let mut server = tokio::spawn(server);
    let Config { name: broker, broker_listen, .. } = &config;
    info!(version = env!("CARGO_PKG_VERSION"), broker, %broker_listen, "broker started");

    let result = tokio::select! {
        ended = &mut server => ended.context("HTTP")?.context("HTTP"),
        () = stop => Ok(()),
    };
    info!("broker stops");
    // Requests under way still need the bus.
    handle.stop(true).await;
    let (hello, status) = (mqtt::hello(&config.name, Vec::new()), mqtt::status(&config.name, "0"));
    let _ = timeout(FAREWELL, async { tokio::join!(keys.publish(hello), bus.publish(status)) }).await;
    over.send_replace(true);
    let _ = timeout(FAREWELL, async { tokio::join!(sessions, storing) }).await;
    if let Some(embedded) = embedded {
        embedded.stop().await;
    }
    result
}

/// The live keys, as this broker knew them when it ended, and what keeps them.
fn live_keys(config: &Config) -> (Arc<Mutex<LiveKeys>>, Store) {
    let ttl = Some(config.live_keys.ttl);
    let (store, journal, known) = Store::open(&config.state_dir, "broker", &config.domains, ttl, Now::read());
    let domains = config.domains.clone();
    let live = LiveKeys::new(config.name.clone(), config.live_keys, domains, (journal, known), Instant::now());
    info!(keys = live.len(), "live keys");
    (Arc::new(Mutex::new(live)), store)
}

/// Takes in what other brokers know.
fn learn(live: Arc<Mutex<LiveKeys>>) -> impl FnMut(Domain, Page) -> std::future::Ready<()> {
    move |_, page| {
        lock(&live).learn(&page, Instant::now());
        std::future::ready(())
    }
}

async fn expire(live: Arc<Mutex<LiveKeys>>) {
    loop {
        sleep(EXPIRE).await;
        let expired = lock(&live).expire(Instant::now());
        if expired > 0 {
            info!(expired, "live keys are forgotten");
        }
    }
}

/// Nothing that panics holds a lock, and panics end the process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(key: &str, host: &str, port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((host, port)).with_context(|| format!("{key} {host}:{port}"))
}

fn gateways(config: &Config) -> Gateways {
    let weights = config.workers.iter().map(|(name, worker)| (name.clone(), worker.weight)).collect();
    Gateways::new(config.name.clone(), config.domains.clone(), weights)
}
