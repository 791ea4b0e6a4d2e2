//! The MQTT messages that the worker receives: keys, for the reconciler; the data that other gateways publish, which
//! reserve keys and addresses; live keys and list records of brokers.
//!
//! Previous stop of a key: the MQTT session; next stop: [`crate::reconciler`].

use std::collections::BTreeSet;

use tokio::sync::watch;
use tracing::debug;
use wgkex_common::access_lists::service::{self, ListEvent};
use wgkex_common::address::reserved::GatewayPeer;
use wgkex_common::mqtt::presence::Reporter;
use wgkex_common::mqtt::{Event, Message, Publish, SessionConfig};
use wgkex_common::sync::{SyncEvent, SyncSender};
use wgkex_common::wire::ignored::{self, Ignored};
use wgkex_common::wire::message::WorkerData;
use wgkex_common::{Config, Domain, KeyId, Reserved, Topic, WorkerName};

use crate::bus::Metrics;
use crate::bus::broker_clocks::BrokerClocks;
use crate::leases::{LeaseEvent, LeaseSender};
use crate::reconciler::ReconcilerHandle;

/// The session that receives keys and publishes the states of this worker.
pub fn session(config: &Config) -> SessionConfig {
    let worker = || WorkerName::from(&config.name);
    SessionConfig {
        id: config.name.to_string(),
        will: Some(Message::retained(Topic::WorkerStatus { worker: worker() }, "0")),
        qos0_filters: vec![Topic::worker_data()],
        qos1_filters: config.domains.iter().map(|domain| Topic::keys(domain.name())).collect(),
        optional: vec![
            Topic::worker_statuses(),
            Topic::broker_statuses(),
            Topic::ConnectedPeers { domain: "+".into(), worker: worker() }.to_string(),
            Topic::WorkerHello { worker: worker() }.to_string(),
        ],
        echo: Some(Topic::WorkerEcho { worker: worker() }),
        is_secondary: false,
    }
}

/// The session on which the worker publishes the outcomes of keys, and requests live keys that it may lack.
pub fn secondary_session(config: &Config) -> SessionConfig {
    let worker = || WorkerName::from(&config.name);
    SessionConfig {
        qos0_filters: vec![Topic::broker_hellos()],
        qos1_filters: [Topic::WorkerChunks { worker: worker() }, Topic::Revocations]
            .into_iter()
            .chain(
                (!config.servers.is_empty() || config.hub.is_some()).then(|| Topic::WorkerLeases { worker: worker() }),
            )
            .map(|topic| topic.to_string())
            .collect(),
        echo: Some(Topic::WorkerEcho { worker: worker() }),
        ..SessionConfig::secondary(format!("{}-applied", config.name))
    }
}

/// Passes keys to the reconciler, the data that other gateways publish to `reserved`, and status messages to the
/// publisher, by `reporter`; other messages are counted and ignored. After each connect keys wait for the records of
/// `lists`.
pub fn on_event(
    domains: BTreeSet<Domain>,
    handle: ReconcilerHandle,
    reserved: watch::Sender<Reserved>,
    lists: service::Handle,
    reporter: Reporter,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => {
            lists.on_event(ListEvent::ServerReachable(true));
            lists.close_gate();
            metrics.connected.set(1);
        }
        Event::Down => {
            lists.on_event(ListEvent::ServerReachable(false));
            metrics.connected.set(0);
        }
        Event::Message(publish) => {
            let topic = Topic::received(&publish.topic, publish.retain);
            let is_state = topic.as_ref().is_some_and(|topic| reporter.report(topic, &publish));
            let outcome = match topic {
                Some(Topic::WorkerData { worker, domain }) => reserve(&reserved, &worker, &domain, &publish.payload),
                Some(Topic::WorkerStatus { .. } | Topic::BrokerStatus { .. }) => Ok(()),
                _ if is_state => Ok(()),
                topic => key(&domains, topic, &publish).map(|key| handle.enqueue(key)),
            };
            if let Err(reason) = outcome {
                ignore(&metrics, &publish, reason);
            }
        }
    }
}

fn reserve(
    reserved: &watch::Sender<Reserved>,
    worker: &WorkerName,
    domain: &str,
    payload: &[u8],
) -> Result<(), Ignored> {
    let data = WorkerData::parse(payload).map_err(|_| Ignored::Payload)?;
    reserved.send_modify(|reserved| reserved.update(worker, domain, data.as_ref().map(GatewayPeer::from)));
    Ok(())
}

/// Passes the hellos of brokers to the sync client (`sync`), to `lists` and to `leases`; live keys to `sync`, list
/// records to `lists`, leases to `leases`; and the times in the hellos to `clocks`.
pub fn on_secondary_event(
    handle: ReconcilerHandle,
    sync: SyncSender,
    lists: service::Handle,
    leases: LeaseSender,
    mut clocks: BrokerClocks,
    metrics: Metrics,
) -> impl FnMut(Event) {
    move |event| match event {
        Event::Up => {
            handle.reconnected();
            lists.on_event(ListEvent::Up);
        }
        Event::Down => {
            lists.on_event(ListEvent::Down);
            clocks.on_down();
        }
        // A message for a full queue is dropped; the task requests it again.
        Event::Message(publish) => {
            clocks.on_message(&publish);
            if let Err(reason) = receive(&sync, &lists, &leases, &publish) {
                ignore(&metrics, &publish, reason);
            }
        }
    }
}

fn ignore(metrics: &Metrics, publish: &Publish, reason: Ignored) {
    let reason = reason.as_ref();
    debug!(reason, topic = publish.topic, "message ignored");
    metrics.messages_ignored.with_label_values(&[reason]).inc();
}

/// The key in a message, or the reason why it has none.
fn key(domains: &BTreeSet<Domain>, topic: Option<Topic>, publish: &Publish) -> Result<KeyId, Ignored> {
    let Some(Topic::Key { domain }) = topic else { return Err(Ignored::Topic) };
    let domain = domains.get(domain.as_str()).ok_or(Ignored::Domain)?;
    Ok(KeyId { domain: domain.clone(), key: ignored::key(&publish.payload)? })
}

/// Passes a message of a broker on, or returns the reason why it is ignored.
fn receive(sync: &SyncSender, lists: &service::Handle, leases: &LeaseSender, publish: &Publish) -> Result<(), Ignored> {
    let topic = Topic::received(&publish.topic, publish.retain).ok_or(Ignored::Topic)?;
    if topic == Topic::Revocations {
        lists.on_event(ListEvent::Records(ignored::json(&publish.payload)?));
        return Ok(());
    }
    if let Topic::WorkerLeases { .. } = topic {
        // If the queue is full, the task requests the leases again.
        let _ = leases.try_send(LeaseEvent::Leases(ignored::json(&publish.payload)?));
        return Ok(());
    }
    let event = SyncEvent::read(topic, &publish.payload)?;
    if let SyncEvent::Broker(name, hello) = &event {
        let _ = leases.try_send(LeaseEvent::Broker(name.clone(), hello.clone()));
        lists.on_event(ListEvent::Broker(name.clone(), hello.clone().map(Box::new)));
    }
    let _ = sync.try_send(event);
    Ok(())
}

/// Handles any message as both sessions do, for fuzz tests: it must terminate.
#[cfg(any(test, fuzzing))]
pub fn receive_anything(topic: &str, payload: &[u8]) {
    let publish = Publish::new(topic, wgkex_common::mqtt::QoS::AtMostOnce, payload);
    let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
    let Ok(config) = Config::parse("", yaml, "w") else { return };
    let opened =
        service::ListService::open(&config, wgkex_common::wire::name::Participant::Worker((&config.name).into()));
    let Ok((_service, lists)) = opened else { return };
    let (sync, _events) = wgkex_common::sync::channel();
    let (leases, _lease_events) = crate::leases::channel();
    let reserved = watch::Sender::new(Reserved::default());
    if let Some(Topic::WorkerData { worker, domain }) = Topic::parse(topic) {
        let _ = reserve(&reserved, &worker, &domain, payload);
    }
    let _ = (key(&config.domains, Topic::parse(topic), &publish), receive(&sync, &lists, &leases, &publish));
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use wgkex_common::mqtt::QoS;

    use super::*;

    proptest! {
        #[test]
        fn any_message_on_any_topic_is_survived(
            topic in prop_oneof![
                Just("wireguard/ff_a/all".to_owned()),
                Just("wireguard-worker/w/ff_a/data".to_owned()),
                Just("wgkex/worker/w/pages".to_owned()),
                Just("wgkex/worker/w/leases".to_owned()),
                Just("wgkex/broker/b/hello".to_owned()),
                Just("wgkex/revocations".to_owned()),
                "[a-z+#/\\u{0}\\u{fc}]{0,30}",
            ],
            payload in prop_oneof![vec(any::<u8>(), 0..100), "[\\[{\"a-z:0-9,}\\]]{0,60}".prop_map(String::into_bytes)],
        ) {
            receive_anything(&topic, &payload);
        }
    }

    #[test]
    fn only_a_key_on_a_topic_of_a_served_domain_is_taken() {
        let domains: BTreeSet<_> = [Domain::new("ff_a", &["ff_".into()]).unwrap()].into();
        let text = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";
        let heard = |topic: &str, payload: &[u8]| {
            let publish = Publish::new(topic, QoS::AtMostOnce, payload);
            key(&domains, Topic::parse(topic), &publish).map(|KeyId { domain, key }| (domain, key.to_string()))
        };
        for topic in ["wireguard/ff_a/all", "wireguard/ff_a/gw04", "wireguard/ff_a/x"] {
            let domain = domains.first().unwrap().clone();
            assert_eq!(heard(topic, text.as_bytes()), Ok((domain, text.to_owned())));
        }
        assert_eq!(heard("wireguard/ff_b/all", text.as_bytes()), Err(Ignored::Domain));
        assert_eq!(heard("wireguard-worker/a/status", b"1"), Err(Ignored::Topic));
        for payload in [b"".as_slice(), b"x", b"\xff\xfe", &text.as_bytes()[1..], format!("{text}\n").as_bytes()] {
            assert_eq!(heard("wireguard/ff_a/all", payload), Err(Ignored::Payload));
        }
    }
}
