//! What the broker hears on the bus, and the greeting that tells when it has heard everything retained.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};
use wgkex_common::mqtt::{Bus, Client, Event, Link, Message, Publish};
use wgkex_common::{Config, Topic};

use crate::gateways::Gateways;
use crate::metrics::Metrics;
use crate::waiters::Waiters;

/// How long the own greeting may take to come back.
const ECHO: Duration = Duration::from_secs(2);

/// Who this broker is to the MQTT server, and what it wants to hear. A worker on the same machine has the host name
/// as its client id, so the broker's must be another.
pub fn client(config: &Config) -> Client {
    Client {
        id: format!("wgkex-broker-{}", config.name),
        will: Some(status(&config.name, "0")),
        states: Topic::states().into(),
        events: vec![Topic::applied()],
    }
}

/// The connection by which this broker publishes keys.
pub fn publisher(config: &Config) -> Client {
    Client::publisher(format!("wgkex-broker-{}-keys", config.name))
}

/// What this broker says of itself (contract section 4).
pub fn status(broker: &str, status: &str) -> Message {
    Message::state(Topic::BrokerStatus { broker: broker.into() }, status)
}

/// Lets `gateways` and `waiters` hear what comes.
pub fn hand_on(gateways: Arc<Mutex<Gateways>>, waiters: Waiters, metrics: Metrics) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => metrics.mqtt_connected.set(1),
        Event::Down => {
            metrics.mqtt_connected.set(0);
            gateways.lock().unwrap_or_else(PoisonError::into_inner).forget();
        }
        Event::Message(publish) => {
            if let Err(reason) = hear(&gateways, &waiters, &publish) {
                debug!(reason, topic = publish.topic, "message ignored");
                metrics.messages_ignored.with_label_values(&[reason]).inc();
            }
        }
    }
}

fn hear(gateways: &Mutex<Gateways>, waiters: &Waiters, publish: &Publish) -> Result<(), &'static str> {
    let topic = Topic::parse(&publish.topic).ok_or("topic")?;
    if let Topic::Applied { worker } = &topic {
        waiters.resolve(worker, serde_json::from_slice(&publish.payload).map_err(|_| "payload")?);
        return Ok(());
    }
    let mut gateways = gateways.lock().unwrap_or_else(PoisonError::into_inner);
    let (was_online, was_complete) = (gateways.is_online(&topic), gateways.complete());
    gateways.hear(&topic, &publish.payload, publish.retain).map_err(|_| "payload")?;
    let (online, complete) = (gateways.is_online(&topic), gateways.complete());
    drop(gateways);
    if let Topic::WorkerStatus { worker } = &topic
        && online != was_online
    {
        info!(worker, online, "gateway");
    }
    if complete && !was_complete {
        info!("ready: all retained states are heard");
    }
    Ok(())
}

/// Greets on every connection. The greeting comes back after everything retained, since the server keeps the order.
pub async fn greet(broker: String, bus: Bus, gateways: Arc<Mutex<Gateways>>) {
    let mut link = bus.link();
    while up(&mut link).await {
        if bus.publish(status(&broker, "1")).await.is_err() {
            return;
        }
        tokio::select! {
            () = sleep(ECHO) => assume_complete(&gateways),
            _ = link.changed() => continue,
        }
        if link.changed().await.is_err() {
            return;
        }
    }
}

/// Waits until the bus can be used; false when the session has ended.
async fn up(link: &mut watch::Receiver<Link>) -> bool {
    link.wait_for(|link| *link == Link::Up).await.is_ok()
}

fn assume_complete(gateways: &Mutex<Gateways>) {
    let mut gateways = gateways.lock().unwrap_or_else(PoisonError::into_inner);
    if !gateways.complete() {
        warn!("own status was not heard back: the MQTT server may not let this broker read wireguard-broker/+/status");
        gateways.assume_complete();
    }
}
