//! One task that publishes the queued keys, established ones first, and adds each to the live keys once the MQTT server
//! has acknowledged it. It takes them from [`in_flight`](super::in_flight); [`crate::bus`] receives the outcomes.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use wgkex_common::mqtt::{Message, MqttHandle};
use wgkex_common::{KeyId, Topic};

use super::handle::InFlightHandle;
use super::in_flight::Publication;
use crate::fleet::Fleet;

/// The task's state.
pub struct KeyPublisher {
    /// The keys that are queued.
    pub in_flight: InFlightHandle,
    /// The session that publishes them.
    pub bus: MqttHandle,
    /// Remembers the keys that are acknowledged.
    pub fleet: Fleet,
}

impl KeyPublisher {
    /// Publishes until it is dropped.
    pub async fn run(self) {
        let mut sent = FuturesUnordered::new();
        loop {
            while let Some(publication) = self.next() {
                sent.push(self.publish(publication));
            }
            tokio::select! {
                Some(()) = sent.next() => {}
                () = self.in_flight.queued.notified() => {}
            }
        }
    }

    fn next(&self) -> Option<Publication> {
        self.in_flight.lock().next(Instant::now().into_std())
    }

    async fn publish(&self, publication: Publication) {
        let is_acknowledged = self.is_acknowledged(&publication).await;
        if is_acknowledged {
            self.on_acknowledged(&publication.key, Instant::now().into_std());
        }
        self.in_flight.lock().settle(&publication, is_acknowledged);
    }

    /// The key is live from now on, with the outcomes of workers that confirmed it before the MQTT server acknowledged it.
    fn on_acknowledged(&self, id: &KeyId, now: std::time::Instant) {
        let (domain, mut live) = (id.domain.name(), self.fleet.live());
        live.on_request(domain, id.key, now);
        let outcomes = self.in_flight.lock().trace(id, now).unwrap_or_default().outcomes;
        for (worker, outcome) in outcomes {
            live.on_outcome(&worker, domain, &id.key, outcome.is_ok(), now);
        }
    }

    /// A publication is given up by dropping this future: before the message is written, that withdraws it.
    async fn is_acknowledged(&self, publication: &Publication) -> bool {
        let key = &publication.key;
        let topic = Topic::Key { domain: key.domain.name().into() };
        let mut acknowledged = std::pin::pin!(self.bus.publish(Message::transient(topic, key.key.to_string())));
        loop {
            let review = self.in_flight.review.notified();
            tokio::select! {
                biased;
                acknowledged = &mut acknowledged => return acknowledged.is_ok(),
                () = review => {}
            }
            if self.in_flight.lock().is_given_up(publication, Instant::now().into_std()) {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::str::FromStr as _;
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::time::sleep;
    use wgkex_common::access_lists::{Admission, AllowList, Entry, List};
    use wgkex_common::mqtt::MqttSession;
    use wgkex_common::storage::key_store::WriteBuffer;
    use wgkex_common::wire::message::Applied;
    use wgkex_common::{Config, Domain, PublicKey, WorkerName};

    use super::*;
    use crate::bus::subscriber;
    use crate::fleet::gateways::Gateways;
    use crate::fleet::live_keys::LiveKeys;

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([0x42 + n; 32]).unwrap()
    }

    /// A publisher with no key, its domain, and its session, which is not connected.
    fn publisher() -> (KeyPublisher, Domain, MqttSession) {
        let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
        let config = Config::parse("", yaml, "b").unwrap();
        let (bus, session) = wgkex_common::mqtt::open(&config.mqtt, subscriber::secondary_session(&config)).unwrap();
        let live = LiveKeys::new(&config, BTreeMap::new(), WriteBuffer::default(), Instant::now().into_std());
        let in_flight = InFlightHandle::new(config.domains.clone(), Arc::default());
        let fleet = Fleet::new(Gateways::new(&config), live);
        (KeyPublisher { in_flight, bus, fleet }, config.domains.first().unwrap().clone(), session)
    }

    /// Regression: `where` showed no gateway for a key that a worker confirmed before the server acknowledged it.
    #[tokio::test]
    async fn a_confirmation_counts_that_is_received_before_the_acknowledgement() {
        let (publisher, domain, _session) = publisher();
        let (id, now) = (KeyId { domain, key: key(1) }, Instant::now().into_std());
        let _request = publisher.in_flight.request(&id, false).unwrap();
        let publication = publisher.next().unwrap();
        let worker = WorkerName::from_str("gw1").unwrap();
        let applied = Applied { domain: "ff_a".into(), installed: vec![id.key], failed: BTreeMap::new() };
        publisher.in_flight.confirmed(&worker, applied);
        publisher.on_acknowledged(&publication.key, now);
        let trace = publisher.fleet.live().trace(&id.key, now);
        let confirmed: Vec<_> = trace.iter().flat_map(|trace| &trace.locations.confirmed).collect();
        assert_eq!(confirmed, [&worker]);
    }

    /// Fails if only queued keys are checked: keys that were passed to the bus were never given up.
    #[tokio::test(start_paused = true)]
    async fn an_unacknowledged_key_is_given_up_after_the_longest_wait_or_when_it_is_denied() {
        let (publisher, domain, _session) = publisher();
        let keys = publisher.in_flight.clone();
        tokio::spawn(publisher.run());
        let id = |n| KeyId { domain: domain.clone(), key: key(n) };
        let soon = || Instant::now() + Duration::from_millis(1);
        let (late, denied) = (keys.request(&id(1), true).unwrap(), keys.request(&id(2), false).unwrap());
        let waits = |request: &crate::exchange::handle::PendingRequest| !request.is_over();
        sleep(Duration::from_secs(119)).await;
        let last = keys.request(&id(3), true).unwrap();
        keys.expire();
        assert!(!late.is_published(soon()).await && waits(&late) && waits(&denied));
        keys.apply(Arc::new(Admission::of(&[Entry::new(List::Deny, key(2))], AllowList::Off, 0)));
        assert!(!denied.is_published(soon()).await && !waits(&denied) && waits(&late));
        sleep(Duration::from_secs(2)).await;
        keys.expire();
        assert!(!late.is_published(soon()).await && !waits(&late) && waits(&last));
    }
}
