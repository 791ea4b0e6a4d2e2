//! The broker: routers' keys in over HTTP, out to the gateways over MQTT, and their word back into the answer.
//!
//! Follow a key: [`http`] reads it, [`exchange`] checks, publishes and waits, [`gateways`] says which gateway is the
//! best, [`waiters`] brings what [`mqtt`] hears of it.

mod embedded;
pub mod exchange;
pub mod gateways;
mod http;
mod metrics;
mod mqtt;
mod page;
pub mod waiters;

use std::future::pending;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::info;
use wgkex_common::{Config, process};
use wgkex_common::config::Server;

use crate::exchange::Exchange;
use crate::gateways::Gateways;
use crate::http::App;
use crate::metrics::Metrics;
use crate::waiters::Waiters;

/// How long the bus may take to hear that this broker goes.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often the embedded MQTT server is looked for while it starts.
const PROBE: Duration = Duration::from_millis(10);

/// Serves routers until `stop` returns. An error is one that an operator must mend: a port that is taken.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let listener = listen("broker_listen", &config.broker_listen.host, config.broker_listen.port)?;
    if let Server::Embedded(listen_mqtt) = config.mqtt.server {
        // Taken, it is somebody else's server, which must not be spoken to.
        listen("mqtt_listen", &listen_mqtt.ip().to_string(), listen_mqtt.port())?;
    }
    let metrics = Metrics::new().context("metrics")?;
    let gateways = Arc::new(Mutex::new(gateways(&config)));
    let waiters = Waiters::default();
    let (bus, session) = wgkex_common::mqtt::open(&config.mqtt, mqtt::client(&config))?;
    let (keys, publishing) = wgkex_common::mqtt::open(&config.mqtt, mqtt::publisher(&config))?;
    let links = [bus.link(), keys.link()];
    let hand_on = mqtt::hand_on(gateways.clone(), waiters.clone(), metrics.clone());
    let exchange = Exchange::new(gateways.clone(), waiters, keys, config.confirm, metrics.clone());
    let (over, stopped) = watch::channel(false);

    let embedded = serve_embedded(&config.mqtt.server);
    let server_is_up = embedded_listens(config.mqtt.server.clone());
    let sessions = tokio::spawn(async move {
        server_is_up.await;
        tokio::join!(session.run(hand_on, process::over(stopped.clone())), publishing.run(drop, process::over(stopped)))
    });
    tokio::spawn(mqtt::greet(config.name.clone(), bus.clone(), gateways));
    let app = App { domains: config.domains.clone(), exchange, links, metrics };
    let server = http::server(listener, app, config.confirm.budget)?;
    let handle = server.handle();
    let mut server = tokio::spawn(server);
    let Config { name: broker, broker_listen, .. } = &config;
    info!(version = env!("CARGO_PKG_VERSION"), broker, %broker_listen, "broker started");

    let result = tokio::select! {
        error = embedded => Err(error),
        ended = &mut server => ended.context("HTTP")?.context("HTTP"),
        () = stop => Ok(()),
    };
    info!("broker stops");
    // Requests under way still need the bus.
    handle.stop(true).await;
    let _ = timeout(FAREWELL, bus.publish(mqtt::status(&config.name, "0"))).await;
    over.send_replace(true);
    let _ = timeout(FAREWELL, sessions).await;
    result
}

fn listen(key: &str, host: &str, port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((host, port)).with_context(|| format!("{key} {host}:{port}"))
}

fn gateways(config: &Config) -> Gateways {
    let weights = config.workers.iter().map(|(name, worker)| (name.clone(), worker.weight)).collect();
    Gateways::new(config.name.clone(), config.domains.clone(), weights)
}

/// Serves the bus, if it is this broker that does; else waits for ever.
async fn serve_embedded(server: &Server) -> anyhow::Error {
    match server {
        Server::Embedded(listen) => embedded::serve(*listen).await,
        Server::External { .. } => pending().await,
    }
}

/// Returns when this broker's own MQTT server can be connected to, so that no attempt fails before that.
async fn embedded_listens(server: Server) {
    if let Server::Embedded(listen) = server {
        while tokio::net::TcpStream::connect(listen).await.is_err() {
            sleep(PROBE).await;
        }
    }
}
