//! Keys that wait for their turn to be published. Their routers may be told meanwhile to come again: by then the key is
//! there. No key waits twice, and what never shook hands does not hold up what did.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use wgkex_common::access_lists::Admission;
use wgkex_common::mqtt::{Message, MqttHandle};
use wgkex_common::{Domain, PublicKey, Topic};

use crate::fleet::live_keys::LiveKeys;

/// Keys that never shook hands and are on their way to the MQTT server at most, of the 100 messages that may be.
const UNPROVEN_UNDER_WAY: usize = 64;
/// Keys that wait at most, those that shook hands and the others each; of more there is no use in a storm.
const QUEUED: usize = 8_192;
/// No key waits longer to be published: its router comes again sooner.
const LONGEST: Duration = Duration::from_secs(120);

/// What becomes of a key that is to be published.
#[derive(Debug)]
pub enum Turn {
    /// It waits; says in the end whether it was published.
    Taken(JoinHandle<bool>),
    /// It waits already.
    Waits,
    /// Too many others wait.
    None,
}

type Subject = (Domain, PublicKey);

/// The queues. Clones share them.
#[derive(Clone)]
pub struct Turns {
    bus: MqttHandle,
    live: Arc<Mutex<LiveKeys>>,
    admission: Arc<Mutex<Arc<Admission>>>,
    under_way: Arc<Semaphore>,
    places: [Arc<Semaphore>; 2],
    /// Those that wait for a turn.
    waiting: Arc<Mutex<HashSet<Subject>>>,
    look: Arc<Notify>,
}

impl Turns {
    /// Nobody waits yet. What is published on `bus` is `live` from then on.
    #[must_use]
    pub fn new(bus: MqttHandle, live: Arc<Mutex<LiveKeys>>, admission: Arc<Admission>) -> Self {
        let places = [QUEUED, QUEUED].map(|places| Arc::new(Semaphore::new(places)));
        let under_way = Arc::new(Semaphore::new(UNPROVEN_UNDER_WAY));
        let admission = Arc::new(Mutex::new(admission));
        Self { bus, live, admission, under_way, places, waiting: Arc::default(), look: Arc::default() }
    }

    /// Has `key` published in its turn, whoever waits for that; once more if it waits already, unless that is `enough`.
    #[must_use]
    pub fn take(&self, domain: &Domain, key: PublicKey, is_proven: bool, enough: bool) -> Turn {
        let Ok(place) = self.places[usize::from(is_proven)].clone().try_acquire_owned() else { return Turn::None };
        let subject = (domain.clone(), key);
        let permit = if is_proven {
            Permit::Unneeded
        } else {
            self.under_way.clone().try_acquire_owned().map_or(Permit::Awaited, Permit::Had)
        };
        let is_awaited = matches!(permit, Permit::Awaited);
        if is_awaited && !self.waiting.lock().insert(subject.clone()) && enough {
            return Turn::Waits;
        }
        let waits = is_awaited.then(|| Waits { turns: self.clone(), subject: subject.clone() });
        let (turns, since) = (self.clone(), Instant::now());
        Turn::Taken(tokio::spawn(async move {
            let _place = place;
            let mut published = pin!(turns.publish(permit, waits, &subject, since));
            loop {
                let looked = turns.look.notified();
                if turns.is_over(&subject, since) {
                    return false;
                }
                tokio::select! {
                    biased;
                    is_published = &mut published => return is_published,
                    () = looked => {}
                }
            }
        }))
    }

    /// Takes over who may come, and takes back what may not.
    pub fn obey(&self, admission: Arc<Admission>) {
        *self.admission.lock() = admission;
        self.look();
    }

    /// Takes back what waits for too long.
    pub fn look(&self) {
        self.look.notify_waiters();
    }

    fn is_over(&self, (domain, key): &Subject, since: Instant) -> bool {
        since.elapsed() > LONGEST || self.admission.lock().denies(domain.name(), key)
    }

    /// Publishes the key in its turn. Dropped before the message is under way this takes it back.
    async fn publish(&self, permit: Permit, waits: Option<Waits>, subject: &Subject, since: Instant) -> bool {
        let _permit = match permit {
            Permit::Unneeded => None,
            Permit::Had(permit) => Some(permit),
            Permit::Awaited => self.under_way.clone().acquire_owned().await.ok(),
        };
        drop(waits);
        if self.is_over(subject, since) {
            return false;
        }
        let (domain, key) = subject;
        let message = Message::transient(Topic::Key { domain: domain.name().into() }, key.to_string());
        let is_published = self.bus.publish(message).await.is_ok();
        if is_published {
            self.live.lock().admit(domain.name(), *key, Instant::now().into_std());
        }
        is_published
    }
}

/// What a key needs to be under way to the MQTT server.
enum Permit {
    /// It shook hands.
    Unneeded,
    /// There was one for it.
    Had(OwnedSemaphorePermit),
    /// It waits for one.
    Awaited,
}

/// A key that waits for a turn, until this is dropped.
struct Waits {
    turns: Turns,
    subject: Subject,
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.turns.waiting.lock().remove(&self.subject);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;
    use wgkex_common::Config;
    use wgkex_common::access_lists::{AllowList, Entry, List};

    use super::*;
    use crate::bus::subscriber;

    fn key(n: usize) -> PublicKey {
        let mut bytes = [0x42; 32];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        PublicKey::from_bytes(bytes).unwrap()
    }

    /// Queues before a bus that takes nothing; and what keeps it from ending.
    fn turns() -> (Turns, Domain, impl Sized) {
        let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
        let config = Config::parse("", yaml, "b").unwrap();
        let (bus, session) = wgkex_common::mqtt::open(&config.mqtt, subscriber::keys_client(&config)).unwrap();
        let (live_keys, domain) = ((config.live_keys, config.cleanup), config.domains.first().unwrap().clone());
        let now = Instant::now().into_std();
        let live = LiveKeys::new("b".into(), live_keys, config.domains.clone(), Default::default(), now);
        (Turns::new(bus, Arc::new(Mutex::new(live)), Arc::default()), domain, session)
    }

    /// Takes all turns that there are, until it is dropped.
    async fn hold(turns: &Turns) -> impl Sized + use<> {
        turns.under_way.clone().acquire_many_owned(u32::try_from(UNPROVEN_UNDER_WAY).unwrap()).await
    }

    #[tokio::test]
    async fn a_queue_has_so_many_places_and_no_key_takes_two() {
        let (turns, domain, _bus) = turns();
        let _others = hold(&turns).await;
        for n in 1..QUEUED {
            assert!(matches!(turns.take(&domain, key(n), false, true), Turn::Taken(_)));
            assert!(matches!(turns.take(&domain, key(n), false, true), Turn::Waits));
        }
        assert!(matches!(turns.take(&domain, key(1), false, false), Turn::Taken(_)), "unless it has to know");
        assert!(matches!(turns.take(&domain, key(QUEUED), false, true), Turn::None));
        assert!(matches!(turns.take(&domain, key(QUEUED), true, true), Turn::Taken(_)), "the proven have their own");
    }

    #[tokio::test]
    async fn only_so_many_that_never_shook_hands_are_under_way_at_once() {
        let (turns, domain, _bus) = turns();
        for n in 0..UNPROVEN_UNDER_WAY {
            assert!(matches!(turns.take(&domain, key(n), false, true), Turn::Taken(_)));
        }
        assert_eq!(turns.under_way.available_permits(), 0);
        assert!(matches!(turns.take(&domain, key(0), true, true), Turn::Taken(_)));
        assert!(matches!(turns.take(&domain, key(100), false, true), Turn::Taken(_)));
        assert_eq!(turns.waiting.lock().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_whose_turn_comes_too_late_is_not_published_and_may_come_again() {
        let (turns, domain, _bus) = turns();
        let others = hold(&turns).await;
        let Turn::Taken(late) = turns.take(&domain, key(0), false, true) else { panic!("there is a place") };
        sleep(LONGEST + Duration::from_secs(1)).await;
        drop(others);
        assert!(!late.await.unwrap());
        assert!(matches!(turns.take(&domain, key(0), false, true), Turn::Taken(_)));
    }

    /// Fails where only those that wait for a turn are looked at: what shook hands waited for the bus for ever.
    #[tokio::test(start_paused = true)]
    async fn what_the_bus_does_not_take_is_taken_back_after_the_longest_time() {
        let (turns, domain, _bus) = turns();
        let take = |n, is_proven| match turns.take(&domain, key(n), is_proven, true) {
            Turn::Taken(published) => published,
            Turn::Waits | Turn::None => panic!("there is a place"),
        };
        let late: Vec<_> = (0..100).flat_map(|n| [take(n, true), take(1_000 + n, false)]).collect();
        sleep(LONGEST.mul_f64(0.99)).await;
        turns.look();
        let last = take(2_000, true);
        sleep(Duration::from_secs(2)).await;
        assert!(late.iter().all(|published| !published.is_finished()));
        turns.look();
        for published in late {
            assert!(!published.await.unwrap());
        }
        assert!(!last.is_finished() && turns.places[0].available_permits() == QUEUED);
        assert!(turns.waiting.lock().is_empty());
        let denied = [Entry::new(List::Deny, key(2_000))];
        turns.obey(Arc::new(Admission::of(&denied, AllowList::Off, 0)));
        assert!(!last.await.unwrap(), "nor does what is denied meanwhile wait any longer");
    }
}
