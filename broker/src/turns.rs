//! Keys that wait for their turn to be published. Their routers may be told meanwhile to come again: by then the key is
//! there. No key waits twice, and what never shook hands does not hold up what did.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use wgkex_common::lists::keeper::View;
use wgkex_common::mqtt::{Bus, Message};
use wgkex_common::{Domain, PublicKey, Topic};

use crate::live::LiveKeys;
use crate::lock;

/// Keys that never shook hands and are on their way to the MQTT server at most, of the 100 messages that may be.
const UNPROVEN_UNDER_WAY: usize = 64;
/// Keys that wait at most, those that shook hands and the others each; of more there is no use in a storm.
const QUEUED: usize = 8_192;
/// No key waits longer: its router comes again sooner.
const LONGEST: Duration = Duration::from_secs(120);

/// Becomes true when the key is published, and ends without if it is not to be.
pub type Turn = watch::Receiver<bool>;

type Subject = (Domain, PublicKey);

/// The queues. Clones share them.
#[derive(Clone)]
pub struct Turns {
    bus: Bus,
    live: Arc<Mutex<LiveKeys>>,
    lists: watch::Receiver<View>,
    under_way: Arc<Semaphore>,
    places: [Arc<Semaphore>; 2],
    waiting: Arc<Mutex<HashMap<Subject, Turn>>>,
}

impl Turns {
    /// Nobody waits yet. What is published on `bus` is `live` from then on.
    #[must_use]
    pub fn new(bus: Bus, live: Arc<Mutex<LiveKeys>>, lists: watch::Receiver<View>) -> Self {
        let places = [QUEUED, QUEUED].map(|places| Arc::new(Semaphore::new(places)));
        let under_way = Arc::new(Semaphore::new(UNPROVEN_UNDER_WAY));
        Self { bus, live, lists, under_way, places, waiting: Arc::default() }
    }

    /// Has `key` published in its turn, whoever waits for that; none if too many others wait.
    #[must_use]
    pub fn take(&self, domain: &Domain, key: PublicKey, is_proven: bool) -> Option<Turn> {
        let subject = (domain.clone(), key);
        let mut waiting = lock(&self.waiting);
        if let Some(turn) = waiting.get(&subject) {
            return Some(turn.clone());
        }
        let place = self.places[usize::from(is_proven)].clone().try_acquire_owned().ok()?;
        let (published, turn) = watch::channel(false);
        waiting.insert(subject.clone(), turn.clone());
        drop(waiting);
        let turns = self.clone();
        tokio::spawn(async move {
            let _place = place;
            let is_published = timeout(LONGEST, turns.publish(&subject, is_proven)).await == Ok(true);
            lock(&turns.waiting).remove(&subject);
            published.send_if_modified(|published| std::mem::replace(published, is_published) != is_published);
        });
        Some(turn)
    }

    async fn publish(&self, (domain, key): &Subject, is_proven: bool) -> bool {
        let _place = if is_proven { None } else { Some(self.under_way.acquire().await) };
        // It may have been revoked while it waited.
        if self.lists.borrow().admission.refuses(domain.name(), key) {
            return false;
        }
        let message = Message::event(Topic::Key { domain: domain.name().into() }, key.to_string());
        let is_published = self.bus.publish(message).await.is_ok();
        if is_published {
            lock(&self.live).admit(domain.name(), *key, Instant::now().into_std());
        }
        is_published
    }
}

#[cfg(test)]
mod tests {
    use wgkex_common::Config;
    use wgkex_common::lists::keeper::Keeper;
    use wgkex_common::message::Party;

    use super::*;
    use crate::mqtt;

    fn key(n: usize) -> PublicKey {
        let mut bytes = [0x42; 32];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        PublicKey::from_bytes(bytes).unwrap()
    }

    /// Queues before a bus that takes nothing; and what keeps it from ending.
    fn turns() -> (Turns, Domain, impl Sized) {
        let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
        let config = Config::parse("", yaml, "b").unwrap();
        let (keeper, lists) = Keeper::open(&config, Party::Broker("b".into()));
        let (bus, session) = wgkex_common::mqtt::open(&config.mqtt, mqtt::keys_client(&config)).unwrap();
        let (live_keys, domain) = ((config.live_keys, config.cleanup), config.domains.first().unwrap().clone());
        let now = Instant::now().into_std();
        let live = LiveKeys::new("b".into(), live_keys, config.domains.clone(), Default::default(), now);
        (Turns::new(bus, Arc::new(Mutex::new(live)), lists.view()), domain, (keeper, session))
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_has_so_many_places_and_no_key_takes_two() {
        let (turns, domain, _bus) = turns();
        for _ in 0..2 {
            assert!((0..QUEUED).all(|n| turns.take(&domain, key(n), false).is_some()));
        }
        assert!(turns.take(&domain, key(QUEUED), false).is_none());
        assert!(turns.take(&domain, key(QUEUED), true).is_some(), "who shook hands has a queue of his own");
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_waits_too_long_is_not_published_any_more_and_may_come_again() {
        let (turns, domain, _bus) = turns();
        let mut waiting: Vec<_> = (0..QUEUED).map(|n| turns.take(&domain, key(n), false).unwrap()).collect();
        let begun = Instant::now();
        for turn in &mut waiting {
            assert!(turn.wait_for(|published| *published).await.is_err());
        }
        assert_eq!(begun.elapsed().as_secs(), LONGEST.as_secs());
        assert!(lock(&turns.waiting).is_empty());
        assert!(turns.take(&domain, key(0), false).is_some());
    }
}
