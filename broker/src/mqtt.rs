//! What the broker hears on the bus, and the greeting that tells when it has heard everything retained.
//!
//! It has two connections: one hears what workers say, which answers wait for; by the other it publishes keys, and
//! hears those of other brokers, and questions for keys.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::{debug, info, warn};
use wgkex_common::message::{Applied, Hello, Question, Seen};
use wgkex_common::mqtt::{Bus, Client, Event, Link, Message, Publish};
use wgkex_common::sync::{Ears, Heard};
use wgkex_common::{Config, Domain, PublicKey, Topic, is_topic_level};

use crate::gateways::Gateways;
use crate::live::LiveKeys;
use crate::lock;
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
        events: vec![Topic::applied(), Topic::seen()],
        is_second: false,
    }
}

/// The connection by which this broker publishes keys, and hears of them.
pub fn keys_client(config: &Config) -> Client {
    let own = || config.name.clone();
    let keys = config.domains.iter().map(|domain| Topic::keys(domain.name()));
    let asked = [Topic::Questions { broker: own() }, Topic::BrokerPages { broker: own() }];
    Client {
        will: Some(hello(&config.name, Vec::new())),
        states: vec![Topic::broker_hellos()],
        events: keys.chain(asked.map(|topic| topic.to_string())).collect(),
        ..Client::second(format!("wgkex-broker-{}-keys", config.name))
    }
}

/// What this broker can do; an empty payload takes it back.
pub fn hello(broker: &str, payload: Vec<u8>) -> Message {
    Message::state(Topic::BrokerHello { broker: broker.into() }, payload)
}

/// What this broker says of itself (contract section 4).
pub fn status(broker: &str, status: &str) -> Message {
    Message::state(Topic::BrokerStatus { broker: broker.into() }, status)
}

/// Lets `gateways`, `waiters` and `live` hear what workers say.
pub fn hand_on(
    gateways: Arc<Mutex<Gateways>>,
    waiters: Waiters,
    live: Arc<Mutex<LiveKeys>>,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => metrics.mqtt_connected.set(1),
        Event::Down => {
            metrics.mqtt_connected.set(0);
            lock(&gateways).forget();
        }
        Event::Message(publish) => {
            ignored(&metrics, &publish, hear(&gateways, &waiters, &live, &publish));
        }
    }
}

fn ignored(metrics: &Metrics, publish: &Publish, outcome: Result<(), &'static str>) {
    if let Err(reason) = outcome {
        debug!(reason, topic = publish.topic, "message ignored");
        metrics.messages_ignored.with_label_values(&[reason]).inc();
    }
}

fn hear(
    gateways: &Mutex<Gateways>,
    waiters: &Waiters,
    live: &Mutex<LiveKeys>,
    publish: &Publish,
) -> Result<(), &'static str> {
    let topic = Topic::parse(&publish.topic).ok_or("topic")?;
    if let Topic::Applied { worker } = &topic {
        let applied: Applied = json(publish)?;
        let (domain, installed) = (applied.domain.clone(), applied.installed.clone());
        waiters.resolve(worker, applied);
        if lock(gateways).confirms(worker) {
            let (now, mut live) = (Instant::now(), lock(live));
            for key in installed {
                live.witness(&domain, key, now);
            }
        }
        return Ok(());
    }
    if let Topic::Seen { worker } = &topic {
        let seen: Seen = json(publish)?;
        if lock(gateways).confirms(worker) {
            let (now, mut live) = (Instant::now(), lock(live));
            for key in seen.keys {
                live.prove(&seen.domain, key, now);
            }
        }
        return Ok(());
    }
    let mut gateways = lock(gateways);
    let worker = if let Topic::WorkerStatus { worker } = &topic { Some(worker) } else { None };
    let state = |gateways: &Gateways| (worker.is_some_and(|worker| gateways.is_online(worker)), gateways.complete());
    let (was_online, was_complete) = state(&gateways);
    gateways.hear(&topic, &publish.payload, publish.retain).map_err(|_| "payload")?;
    let (online, complete) = state(&gateways);
    drop(gateways);
    if let Some(worker) = worker.filter(|_| online != was_online) {
        info!(worker, online, "gateway");
    }
    if complete && !was_complete {
        info!("ready: all retained states are heard");
    }
    Ok(())
}

fn json<T: serde::de::DeserializeOwned>(publish: &Publish) -> Result<T, &'static str> {
    serde_json::from_slice(&publish.payload).map_err(|_| "payload")
}

/// Lets `live` hear the keys on the bus, and `ears` what other brokers say; `questions` takes those that are asked.
pub fn hand_on_keys(
    live: Arc<Mutex<LiveKeys>>,
    ears: Ears,
    questions: mpsc::Sender<Question>,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| {
        if let Event::Message(publish) = event {
            ignored(&metrics, &publish, hear_of_keys(&live, &ears, &questions, &publish));
        }
    }
}

fn hear_of_keys(
    live: &Mutex<LiveKeys>,
    ears: &Ears,
    questions: &mpsc::Sender<Question>,
    publish: &Publish,
) -> Result<(), &'static str> {
    // What finds no place among the ears or the questions is asked again.
    match Topic::parse(&publish.topic).ok_or("topic")? {
        Topic::Key { domain } => {
            let text = std::str::from_utf8(&publish.payload).map_err(|_| "payload")?;
            let key: PublicKey = text.parse().map_err(|_| "payload")?;
            lock(live).admit(&domain, key, Instant::now());
        }
        topic @ (Topic::BrokerHello { .. } | Topic::BrokerPages { .. }) => {
            let _ = ears.try_send(Heard::read(topic, &publish.payload)?);
        }
        Topic::Questions { .. } => {
            let question: Question = json(publish)?;
            if !is_topic_level(question.from.name()) {
                return Err("payload");
            }
            let _ = questions.try_send(question);
        }
        Topic::ConnectedPeers { .. }
        | Topic::WorkerStatus { .. }
        | Topic::WorkerData { .. }
        | Topic::BrokerStatus { .. }
        | Topic::Hello { .. }
        | Topic::Applied { .. }
        | Topic::Seen { .. }
        | Topic::WorkerPages { .. } => return Err("topic"),
    }
    Ok(())
}

/// Answers one question after the other, so that never more than one page stands in the way of new keys.
pub async fn answer(bus: Bus, live: Arc<Mutex<LiveKeys>>, mut questions: mpsc::Receiver<Question>, metrics: Metrics) {
    while let Some(question) = questions.recv().await {
        let page = lock(&live).answer(&question, Instant::now());
        metrics.keys_given.inc_by(page.keys.len() as u64);
        let payload = serde_json::to_vec(&page).unwrap_or_default();
        if bus.publish(Message::event(question.from.pages(), payload)).await.is_err() {
            return;
        }
    }
}

/// Says on every connection what this broker can do, until the session ends.
pub async fn say_hello(broker: String, domains: BTreeSet<Domain>, bus: Bus) {
    let names = domains.iter().map(Domain::to_string).collect();
    let payload = serde_json::to_vec(&Hello::broker(names, fastrand::u64(..))).unwrap_or_default();
    let mut link = bus.link();
    while up(&mut link).await && bus.publish(hello(&broker, payload.clone())).await.is_ok() {
        if link.changed().await.is_err() {
            return;
        }
    }
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
    let mut gateways = lock(gateways);
    if !gateways.complete() {
        warn!("own status was not heard back: the MQTT server may not let this broker read wireguard-broker/+/status");
        gateways.assume_complete();
    }
}

/// Hears a message of anybody's making as both connections do, for whoever makes them up: it must come to an end.
#[cfg(any(test, fuzzing))]
pub fn hear_anything(topic: &str, payload: &[u8], retained: bool) {
    use std::collections::BTreeMap;

    use wgkex_common::config::{self, Cleanup};
    use wgkex_common::mqtt::QoS;
    use wgkex_common::{Reserved, sync};

    let hour = Duration::from_secs(3600);
    let (domains, metrics) =
        (Domain::new("ff_a", &["ff_".into()]).into_iter().collect::<BTreeSet<_>>(), Metrics::new());
    let Ok(metrics) = metrics else { return };
    let limits = (config::LiveKeys { max: 10, ttl: hour }, Cleanup { interval: hour, stale: hour, grace: hour });
    let live = LiveKeys::new("b".into(), limits, domains.clone(), Default::default(), Instant::now());
    let gateways = Gateways::new("b".into(), domains, BTreeMap::new(), Reserved::default());
    let (gateways, live) = (Arc::new(Mutex::new(gateways)), Arc::new(Mutex::new(live)));
    let ((ears, _heard), (questions, _asked)) = (sync::ears(), mpsc::channel(1));
    let mut publish = Publish::new(topic, QoS::AtMostOnce, payload);
    publish.retain = retained;
    hand_on(gateways, Waiters::default(), live.clone(), metrics.clone())(Event::Message(publish.clone()));
    hand_on_keys(live.clone(), ears, questions, metrics)(Event::Message(publish));
    assert!(lock(&live).len() <= 10);
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Payloads that are nearly right find more than any bytes do.
    const PAYLOADS: [&str; 8] = [
        r#"{"ExternalAddress":"x","Port":1,"PublicKey":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","LinkAddress":"x"}"#,
        r#"{"domain":"ff_a","installed":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="],"failed":{}}"#,
        r#"{"domain":"ff_a","keys":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="]}"#,
        r#"{"broker":"b","domain":"ff_a","after":null,"keys":{},"more":true}"#,
        r#"{"from":{"worker":"a/b"},"domain":"ff_a","after":null,"younger_than":18446744073709551615}"#,
        r#"{"version":"1","can":["confirm","answer"],"domains":["ff_a"],"instance":1}"#,
        "18446744073709551615",
        "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=",
    ];

    proptest! {
        #[test]
        fn whatever_is_said_on_whatever_topic_ends_nobody(
            topic in prop_oneof![
                4 => prop::sample::select(topics()),
                1 => "[a-z+#/\u{0}\u{fc}]{0,30}",
            ],
            payload in prop_oneof![
                prop::sample::select(&PAYLOADS[..]).prop_map(|text| text.as_bytes().to_vec()),
                (prop::sample::select(&PAYLOADS[..]), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(text, at, byte)| {
                    let mut bytes = text.as_bytes().to_vec();
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                    bytes
                }),
                vec(any::<u8>(), 0..100),
            ],
            retained in any::<bool>(),
        ) {
            hear_anything(&topic, &payload, retained);
        }
    }

    fn topics() -> Vec<String> {
        [
            "wireguard/ff_a/all",
            "wireguard-metrics/ff_a/w/connected_peers",
            "wireguard-worker/w/status",
            "wireguard-worker/w/ff_a/data",
            "wireguard-broker/b/status",
            "wgkex/worker/w/hello",
            "wgkex/worker/w/applied",
            "wgkex/worker/w/seen",
            "wgkex/worker/w/pages",
            "wgkex/broker/b/hello",
            "wgkex/broker/b/questions",
            "wgkex/broker/b/pages",
        ]
        .map(str::to_owned)
        .into()
    }
}
