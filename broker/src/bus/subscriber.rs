//! What the broker hears on the bus. What it publishes of itself is for [`crate::bus::announcer`].
//!
//! It has two connections: one hears what workers say, which answers wait for; by the other it publishes keys, and
//! hears those of other brokers, and questions for keys.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tracing::{debug, info};
use wgkex_common::access_lists::service::{self, ListEvent};
use wgkex_common::mqtt::presence::Reporter;
use wgkex_common::mqtt::{Event, Message, MqttHandle, Publish, PublishError, SessionConfig};
use wgkex_common::sync::{SyncEvent, SyncSender};
use wgkex_common::wire::message::{Applied, Handshakes, Participant, Request, Revoked, SyncRequest};
use wgkex_common::{BrokerName, Config, PublicKey, Topic, WorkerName};

use crate::bus::askers::Askers;
use crate::bus::complaints::Complaints;
use crate::bus::metrics::Metrics;
use crate::exchange::handle::InFlightHandle;
use crate::fleet::gateways::Gateways;
use crate::fleet::live_keys::LiveKeys;
use crate::fleet::revocation::PendingRevocations;

/// Keys in one word of a worker at most: twice what one of ours says at once.
const WORDS: usize = 4_096;

/// Who this broker is to the MQTT server, and what it wants to hear. A worker on the same machine has the host name
/// as its client id, so the broker's must be another.
pub fn client(config: &Config) -> SessionConfig {
    let own = BrokerName::from(&config.name);
    SessionConfig {
        id: format!("wgkex-broker-{}", config.name),
        will: Some(status(&own, "0")),
        qos0_filters: Topic::states().into(),
        qos1_filters: vec![Topic::applied(), Topic::handshakes(), Topic::revoked()],
        optional: Vec::new(),
        echo: Some(Topic::BrokerEcho { broker: own }),
        is_secondary: false,
    }
}

/// The connection by which this broker publishes keys, and hears of them.
pub fn keys_client(config: &Config) -> SessionConfig {
    let own = || BrokerName::from(&config.name);
    let keys = config.domains.iter().map(|domain| Topic::keys(domain.name()));
    let asked =
        [Topic::BrokerRequests { broker: own() }, Topic::BrokerChunks { broker: own() }].map(|topic| topic.to_string());
    let asked = asked.into_iter().chain([Topic::worker_requests()]);
    SessionConfig {
        will: Some(hello(&own(), Vec::new())),
        qos0_filters: vec![Topic::broker_hellos()],
        echo: Some(Topic::BrokerEcho { broker: own() }),
        qos1_filters: keys.chain(asked).chain([Topic::Revocations.to_string()]).collect(),
        ..SessionConfig::secondary(format!("wgkex-broker-{}-keys", config.name))
    }
}

/// What this broker can do; an empty payload takes it back.
pub fn hello(broker: &BrokerName, payload: Vec<u8>) -> Message {
    Message::retained(Topic::BrokerHello { broker: broker.clone() }, payload)
}

/// What this broker says of itself (contract section 4).
pub fn status(broker: &BrokerName, status: &str) -> Message {
    Message::retained(Topic::BrokerStatus { broker: broker.clone() }, status)
}

/// Lets `gateways`, `in_flight`, `answers` and `live` hear what workers say, and the announcer, by `reporter`, who is there.
pub fn hand_on(
    gateways: Arc<Mutex<Gateways>>,
    (in_flight, answers): (InFlightHandle, PendingRevocations),
    live: Arc<Mutex<LiveKeys>>,
    reporter: Reporter,
    metrics: Metrics,
) -> impl FnMut(Event) {
    let mut complaints = Complaints::default();
    move |event| match event {
        Event::Up => metrics.connected.set(1),
        Event::Down => {
            metrics.connected.set(0);
            gateways.lock().on_disconnect();
            in_flight.lock().invalidate_late();
        }
        Event::Message(publish) => {
            let outcome = parsed(&publish).and_then(|topic| {
                reporter.report(&topic, &publish);
                let outcome = hear(&gateways, (&in_flight, &answers), &live, &topic, &publish);
                complaints.hear(&topic, &publish.payload, outcome.is_ok(), Instant::now());
                outcome
            });
            ignored(&metrics, &publish, outcome);
        }
    }
}

fn parsed(publish: &Publish) -> Result<Topic, &'static str> {
    Topic::parse(&publish.topic).ok_or("topic")
}

fn ignored(metrics: &Metrics, publish: &Publish, outcome: Result<(), &'static str>) {
    if let Err(reason) = outcome {
        debug!(reason, topic = publish.topic, "message ignored");
        metrics.messages_ignored.with_label_values(&[reason]).inc();
    }
}

fn hear(
    gateways: &Mutex<Gateways>,
    (in_flight, answers): (&InFlightHandle, &PendingRevocations),
    live: &Mutex<LiveKeys>,
    topic: &Topic,
    publish: &Publish,
) -> Result<(), &'static str> {
    let now = Instant::now();
    if let Topic::Revoked { worker } = topic {
        let revoked: Revoked = json(publish)?;
        if gateways.lock().is_online(worker) {
            answers.on_revoked(worker, revoked);
        }
    } else if let Topic::Applied { worker } = topic {
        let applied: Applied = json(publish)?;
        few(applied.installed.len() + applied.failed.len())?;
        let can_take = gateways.lock().can_confirm(worker, &applied.domain);
        heard_from(gateways, worker, now);
        if can_take {
            in_flight.confirmed(worker, applied);
        }
    } else if let Topic::Handshakes { worker } = topic {
        let seen: Handshakes = json(publish)?;
        few(seen.keys.len())?;
        if heard_from(gateways, worker, now) {
            prove(gateways, live, worker, &seen);
        }
    } else {
        hear_state(gateways, in_flight, topic, publish, now)?;
    }
    Ok(())
}

/// Takes what `worker` said of keys for a sign of life; true if it is one that says what becomes of keys.
fn heard_from(gateways: &Mutex<Gateways>, worker: &WorkerName, now: Instant) -> bool {
    let mut gateways = gateways.lock();
    let was_online = gateways.is_online(worker);
    let confirms = gateways.on_confirmation(worker, now);
    if confirms && !was_online {
        info!(worker = worker.as_str(), online = true, "gateway");
    }
    confirms
}

/// What one worker says at once must not keep the others waiting.
fn few(keys: usize) -> Result<(), &'static str> {
    if keys <= WORDS { Ok(()) } else { Err("payload") }
}

/// A gateway's key does not become a router's by a worker's word.
fn prove(gateways: &Mutex<Gateways>, live: &Mutex<LiveKeys>, worker: &WorkerName, seen: &Handshakes) {
    let gateways = gateways.lock();
    if !gateways.can_report(worker, &seen.domain) {
        return;
    }
    let reserved: BTreeSet<_> = seen.keys.iter().filter(|key| gateways.is_reserved(key, false)).collect();
    drop(gateways);
    let (now, mut live) = (Instant::now(), live.lock());
    for key in &seen.keys {
        if !reserved.contains(key) || live.is_routers(key) {
            live.on_handshake(worker, &seen.domain, *key, now);
        }
    }
}

/// What a gateway is. What it said of keys may not be so any more if it is gone, or has just come.
fn hear_state(
    gateways: &Mutex<Gateways>,
    in_flight: &InFlightHandle,
    topic: &Topic,
    publish: &Publish,
    now: Instant,
) -> Result<(), &'static str> {
    let state_of = topic.state_of();
    let worker = if let Some(Participant::Worker(worker)) = &state_of { Some(worker) } else { None };
    let mut gateways = gateways.lock();
    let is_online = |gateways: &Gateways| worker.is_some_and(|worker| gateways.is_online(worker));
    let was_online = is_online(&gateways);
    gateways.apply(topic, &publish.payload, publish.retain, now).map_err(|_| "payload")?;
    let online = is_online(&gateways);
    let gone = if let Topic::ConnectedPeers { domain, worker } = topic {
        let is_down = gateways.is_served(domain) && !gateways.has_online(worker, domain);
        is_down.then_some((worker, Some(domain.as_str())))
    } else {
        worker.filter(|_| online != was_online).map(|worker| (worker, None))
    };
    drop(gateways);
    if let Some((worker, domain)) = gone {
        in_flight.lock().invalidate(worker, domain);
    }
    if let Some(worker) = worker.filter(|_| online != was_online) {
        info!(worker = worker.as_str(), online, "gateway");
    }
    Ok(())
}

fn json<T: serde::de::DeserializeOwned>(publish: &Publish) -> Result<T, &'static str> {
    serde_json::from_slice(&publish.payload).map_err(|_| "payload")
}

/// Lets `live` hear the keys on the bus, `ears` and `lists` what other brokers say; `askers` takes questions for keys, and
/// the announcer, by `reporter`, what stands there as this broker's hello.
pub fn hand_on_keys(
    live: Arc<Mutex<LiveKeys>>,
    ears: SyncSender,
    lists: service::Handle,
    mut askers: Askers,
    reporter: Reporter,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => lists.on_event(ListEvent::Up),
        Event::Down => lists.on_event(ListEvent::Down),
        Event::Message(publish) => {
            let outcome = parsed(&publish).and_then(|topic| {
                reporter.report(&topic, &publish);
                hear_of_keys(&live, &ears, &lists, &mut askers, topic, &publish)
            });
            ignored(&metrics, &publish, outcome);
        }
    }
}

fn hear_of_keys(
    live: &Mutex<LiveKeys>,
    ears: &SyncSender,
    lists: &service::Handle,
    askers: &mut Askers,
    topic: Topic,
    publish: &Publish,
) -> Result<(), &'static str> {
    // What finds no place among the ears or the questions is asked again.
    if let Topic::Key { domain } = topic {
        let text = std::str::from_utf8(&publish.payload).map_err(|_| "payload")?;
        let key: PublicKey = text.parse().map_err(|_| "payload")?;
        live.lock().on_request(&domain, key, Instant::now());
    } else if let Topic::BrokerHello { .. } | Topic::BrokerChunks { .. } = topic {
        match SyncEvent::read(topic, &publish.payload) {
            Ok(heard) => {
                if let SyncEvent::Broker(name, hello) = &heard {
                    lists.on_event(ListEvent::Broker(name.clone(), hello.clone()));
                    askers.broker(name, hello.as_ref());
                }
                let _ = ears.try_send(heard);
            }
            Err(_) => askers.by_broker(json(publish)?)?,
        }
    } else if let Topic::WorkerRequests { worker } = topic {
        askers.by_worker(&worker, json(publish)?)?;
    } else if let Topic::BrokerRequests { .. } = topic {
        match json(publish)? {
            Request::Records(_) => lists.on_event(ListEvent::Asked),
            Request::Keys(question) => askers.by_anybody(question)?,
        }
    } else if topic == Topic::Revocations {
        lists.on_event(ListEvent::Records(json(publish)?));
    } else {
        return Err("topic");
    }
    Ok(())
}

/// Answers one question after the other, so that never more than one page stands in the way of new keys.
pub async fn answer(
    bus: MqttHandle,
    live: Arc<Mutex<LiveKeys>>,
    mut questions: mpsc::Receiver<SyncRequest>,
    metrics: Metrics,
) {
    while let Some(question) = questions.recv().await {
        let page = live.lock().chunk(&question, Instant::now());
        metrics.keys_given.inc_by(page.keys.len() as u64);
        let payload = serde_json::to_vec(&page).unwrap_or_default();
        if bus.publish(Message::transient(question.from.chunks(), payload)).await == Err(PublishError::SessionEnded) {
            return;
        }
    }
}

/// Hears a message of anybody's making as both connections do, for whoever makes them up: it must come to an end.
#[cfg(any(test, fuzzing))]
pub fn hear_anything(topic: &str, payload: &[u8], retained: bool) {
    use std::collections::BTreeMap;

    use wgkex_common::access_lists::service::ListService;
    use wgkex_common::mqtt::QoS;
    use wgkex_common::storage::key_store::WriteBuffer;
    use wgkex_common::sync;

    let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nlive_keys: {max: 10}\nstate_dir: /nonexistent";
    let (Ok(config), Ok(metrics)) =
        (Config::parse("", yaml, "b"), Metrics::register(&crate::metrics::Registry::default()))
    else {
        return;
    };
    let own = BrokerName::from(&config.name);
    let Ok((_keeper, lists)) = ListService::open(&config, Participant::Broker(own.clone())) else { return };
    let domains = config.domains.clone();
    let live = LiveKeys::new(&config, BTreeMap::new(), WriteBuffer::default(), Instant::now());
    let gateways = Gateways::new(&config);
    let (gateways, live) = (Arc::new(Mutex::new(gateways)), Arc::new(Mutex::new(live)));
    let ((ears, _heard), (questions, _asked)) = (sync::channel(), mpsc::channel(1));
    let mut publish = Publish::new(topic, QoS::AtMostOnce, payload);
    publish.retain = retained;
    let words = (InFlightHandle::new(domains, Arc::default()), PendingRevocations::default());
    let (reporter, _reported) = Reporter::new(Participant::Broker(own.clone()));
    hand_on(gateways, words, live.clone(), reporter.clone(), metrics.clone())(Event::Message(publish.clone()));
    let askers = Askers::new(own, questions);
    hand_on_keys(live.clone(), ears, lists, askers, reporter, metrics)(Event::Message(publish));
    assert!(live.lock().len() <= 10);
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
