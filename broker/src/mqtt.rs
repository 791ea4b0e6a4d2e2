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
use wgkex_common::lists::keeper::{self, Heard as HeardOfLists, View};
use wgkex_common::message::{Applied, Asked, Hello, Question, Seen};
use wgkex_common::mqtt::{Bus, Client, Event, Link, Message, Publish};
use wgkex_common::sync::{Ears, Heard};
use wgkex_common::{Config, Domain, PublicKey, Topic};

use crate::askers::Askers;
use crate::complaints::Complaints;
use crate::gateways::Gateways;
use crate::live::LiveKeys;
use crate::lock;
use crate::metrics::Metrics;
use crate::revoke::Answers;
use crate::waiters::Waiters;

/// Changes of the lists that come within this time are one to those who hear of them.
const AT_ONCE: Duration = Duration::from_millis(200);
/// How long the own greeting may take to come back.
const ECHO: Duration = Duration::from_secs(2);

/// Who this broker is to the MQTT server, and what it wants to hear. A worker on the same machine has the host name
/// as its client id, so the broker's must be another.
pub fn client(config: &Config) -> Client {
    Client {
        id: format!("wgkex-broker-{}", config.name),
        will: Some(status(&config.name, "0")),
        states: Topic::states().into(),
        events: vec![Topic::applied(), Topic::seen(), Topic::revoked()],
        is_second: false,
    }
}

/// The connection by which this broker publishes keys, and hears of them.
pub fn keys_client(config: &Config) -> Client {
    let own = || config.name.clone();
    let keys = config.domains.iter().map(|domain| Topic::keys(domain.name()));
    let asked =
        [Topic::Questions { broker: own() }, Topic::BrokerPages { broker: own() }].map(|topic| topic.to_string());
    let asked = asked.into_iter().chain([Topic::worker_questions()]);
    Client {
        will: Some(hello(&config.name, Vec::new())),
        states: vec![Topic::broker_hellos()],
        events: keys.chain(asked).chain([Topic::Revocations.to_string()]).collect(),
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

/// Lets `gateways`, `waiters`, `answers` and `live` hear what workers say.
pub fn hand_on(
    gateways: Arc<Mutex<Gateways>>,
    (waiters, answers): (Waiters, Answers),
    live: Arc<Mutex<LiveKeys>>,
    metrics: Metrics,
) -> impl FnMut(Event) {
    let mut complaints = Complaints::default();
    move |event| match event {
        Event::Up => metrics.mqtt_connected.set(1),
        Event::Down => {
            metrics.mqtt_connected.set(0);
            lock(&gateways).forget();
            waiters.forget_all();
        }
        Event::Message(publish) => {
            let outcome = hear(&gateways, (&waiters, &answers), &live, &publish);
            complaints.hear(&publish.topic, &publish.payload, outcome.is_ok(), Instant::now());
            ignored(&metrics, &publish, outcome);
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
    (waiters, answers): (&Waiters, &Answers),
    live: &Mutex<LiveKeys>,
    publish: &Publish,
) -> Result<(), &'static str> {
    let topic = Topic::parse(&publish.topic).ok_or("topic")?;
    if let Topic::Revoked { worker } = &topic {
        answers.resolve(worker, json(publish)?);
    } else if let Topic::Applied { worker } = &topic {
        let applied: Applied = json(publish)?;
        if lock(gateways).confirms(worker) {
            witness(live, &applied);
            waiters.resolve(worker, applied);
        }
    } else if let Topic::Seen { worker } = &topic {
        let seen: Seen = json(publish)?;
        if lock(gateways).confirms(worker) {
            prove(live, &seen);
        }
    } else {
        hear_state(gateways, waiters, &topic, publish)?;
    }
    Ok(())
}

fn witness(live: &Mutex<LiveKeys>, applied: &Applied) {
    let (now, mut live) = (Instant::now(), lock(live));
    for key in &applied.installed {
        live.witness(&applied.domain, *key, now);
    }
}

fn prove(live: &Mutex<LiveKeys>, seen: &Seen) {
    let (now, mut live) = (Instant::now(), lock(live));
    for key in &seen.keys {
        live.prove(&seen.domain, *key, now);
    }
}

/// What a gateway is. What it said of keys may not be so any more if it is gone, or has just come.
fn hear_state(
    gateways: &Mutex<Gateways>,
    waiters: &Waiters,
    topic: &Topic,
    publish: &Publish,
) -> Result<(), &'static str> {
    let mut gateways = lock(gateways);
    let worker = if let Topic::WorkerStatus { worker } = topic { Some(worker) } else { None };
    let state = |gateways: &Gateways| (worker.is_some_and(|worker| gateways.is_online(worker)), gateways.complete());
    let (was_online, was_complete) = state(&gateways);
    gateways.hear(topic, &publish.payload, publish.retain).map_err(|_| "payload")?;
    let (online, complete) = state(&gateways);
    let gone = if let Topic::ConnectedPeers { domain, worker } = topic {
        (!gateways.has_online(worker, domain)).then_some((worker, Some(domain.as_str())))
    } else {
        worker.filter(|_| !publish.retain).map(|worker| (worker, None))
    };
    drop(gateways);
    if let Some((worker, domain)) = gone {
        waiters.forget(worker, domain);
    }
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

/// Lets `live` hear the keys on the bus, `ears` and `lists` what other brokers say; `askers` takes questions for keys.
pub fn hand_on_keys(
    live: Arc<Mutex<LiveKeys>>,
    ears: Ears,
    lists: keeper::Handle,
    mut askers: Askers,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => lists.heard(HeardOfLists::Up),
        Event::Down => lists.heard(HeardOfLists::Down),
        Event::Message(publish) => {
            ignored(&metrics, &publish, hear_of_keys(&live, &ears, &lists, &mut askers, &publish));
        }
    }
}

fn hear_of_keys(
    live: &Mutex<LiveKeys>,
    ears: &Ears,
    lists: &keeper::Handle,
    askers: &mut Askers,
    publish: &Publish,
) -> Result<(), &'static str> {
    // What finds no place among the ears or the questions is asked again.
    match Topic::parse(&publish.topic).ok_or("topic")? {
        Topic::Key { domain } => {
            let text = std::str::from_utf8(&publish.payload).map_err(|_| "payload")?;
            let key: PublicKey = text.parse().map_err(|_| "payload")?;
            lock(live).admit(&domain, key, Instant::now());
        }
        topic @ (Topic::BrokerHello { .. } | Topic::BrokerPages { .. }) => match Heard::read(topic, &publish.payload) {
            Ok(heard) => {
                if let Heard::Broker(name, hello) = &heard {
                    lists.heard(HeardOfLists::Broker(name.clone(), hello.clone()));
                    askers.broker(name, hello.as_ref());
                }
                let _ = ears.try_send(heard);
            }
            Err(_) => askers.by_broker(json(publish)?)?,
        },
        Topic::WorkerQuestions { worker } => askers.by_worker(&worker, json(publish)?)?,
        Topic::Questions { .. } => match json(publish)? {
            Asked::Records(_) => lists.heard(HeardOfLists::Asked),
            Asked::Keys(question) => askers.by_anybody(question)?,
        },
        Topic::Revocations => lists.heard(HeardOfLists::Records(json(publish)?)),
        Topic::ConnectedPeers { .. }
        | Topic::WorkerStatus { .. }
        | Topic::WorkerData { .. }
        | Topic::BrokerStatus { .. }
        | Topic::Hello { .. }
        | Topic::Applied { .. }
        | Topic::Seen { .. }
        | Topic::Revoked { .. }
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

/// Says on every connection, and whenever the records that it shares are other ones, what this broker can do, until the
/// session ends.
pub async fn say_hello(broker: String, domains: BTreeSet<Domain>, bus: Bus, mut lists: watch::Receiver<View>) {
    let names: Vec<_> = domains.iter().map(Domain::to_string).collect();
    let instance = fastrand::u64(..);
    let mut link = bus.link();
    while up(&mut link).await {
        let digest = lists.borrow_and_update().digest.clone();
        let greeting = Hello { records: Some(digest.clone()), ..Hello::broker(names.clone(), instance) };
        let payload = serde_json::to_vec(&greeting).unwrap_or_default();
        if bus.publish(hello(&broker, payload)).await.is_err() {
            return;
        }
        tokio::select! {
            changed = link.changed() => if changed.is_err() { return },
            is_over = other_than(&mut lists, &digest) => {
                if is_over {
                    return;
                }
                sleep(AT_ONCE).await;
            }
        }
    }
}

/// Waits for another digest; true when there will be none.
async fn other_than(lists: &mut watch::Receiver<View>, digest: &str) -> bool {
    lists.wait_for(|view| view.digest != digest).await.is_err()
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

    use wgkex_common::lists::keeper::Keeper;
    use wgkex_common::message::Party;
    use wgkex_common::mqtt::QoS;
    use wgkex_common::{Reserved, sync};

    let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nlive_keys: {max: 10}\nstate_dir: /nonexistent";
    let (Ok(config), Ok(metrics)) = (Config::parse("", yaml, "b"), Metrics::new()) else { return };
    let (_keeper, lists) = Keeper::open(&config, Party::Broker("b".into()));
    let Config { domains, live_keys, cleanup, .. } = config;
    let live = LiveKeys::new("b".into(), (live_keys, cleanup), domains.clone(), Default::default(), Instant::now());
    let gateways = Gateways::new("b".into(), domains, BTreeMap::new(), Reserved::default());
    let (gateways, live) = (Arc::new(Mutex::new(gateways)), Arc::new(Mutex::new(live)));
    let ((ears, _heard), (questions, _asked)) = (sync::ears(), mpsc::channel(1));
    let mut publish = Publish::new(topic, QoS::AtMostOnce, payload);
    publish.retain = retained;
    let words = (Waiters::default(), Answers::default());
    hand_on(gateways, words, live.clone(), metrics.clone())(Event::Message(publish.clone()));
    let askers = Askers::new("b".into(), questions);
    hand_on_keys(live.clone(), ears, lists, askers, metrics)(Event::Message(publish));
    assert!(lock(&live).len() <= 10);
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Payloads that are nearly right find more than any bytes do.
    const PAYLOADS: [&str; 11] = [
        r#"{"ExternalAddress":"x","Port":1,"PublicKey":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","LinkAddress":"x"}"#,
        r#"{"domain":"ff_a","installed":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="],"failed":{}}"#,
        r#"{"domain":"ff_a","keys":["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="]}"#,
        r#"{"broker":"b","domain":"ff_a","after":null,"keys":{},"more":true}"#,
        r#"{"from":{"worker":"a/b"},"domain":"ff_a","after":null,"younger_than":18446744073709551615}"#,
        r#"{"from":{"worker":"a"},"to":"b","domain":"ff_a","after":null,"younger_than":0}"#,
        r#"{"version":"1","can":["confirm","answer"],"domains":["ff_a"],"instance":1}"#,
        r#"[{"key":"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=","list":"deny","at":1,"on":true}]"#,
        r#"{"domain":"ff_a","at":{},"keys":{"TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=":"removed"}}"#,
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
            "wgkex/worker/a/questions",
            "wgkex/worker/w/pages",
            "wgkex/broker/b/hello",
            "wgkex/broker/b/questions",
            "wgkex/broker/b/pages",
            "wgkex/worker/w/revoked",
            "wgkex/revocations",
        ]
        .map(str::to_owned)
        .into()
    }
}
