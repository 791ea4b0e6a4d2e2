//! rumqttd's router, as a log that everybody who listens reads at a pace of their own.
//!
//! The router breaks on client ids, topics, filters, acknowledgements and endings of connections that it does not
//! expect. So it sees nothing of what clients send: everything is said by one link, on one topic, and each [`Ear`] hears
//! all of it and picks what it wants. The log is bounded, and an ear that is too slow misses the oldest. Everything has
//! its position in the log with it, so that it notices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bytes::{BufMut as _, Bytes, BytesMut};
use parking_lot::Mutex;
use rumqttd::local::{LinkBuilder, LinkRx, LinkTx};
use rumqttd::protocol::{Disconnect, DisconnectReasonCode, Packet};
use rumqttd::{Notification, RouterConfig};
use tokio::task::yield_now;
use tokio::time::sleep;

/// What everything is said on.
const TOPIC: &str = "bus";
/// Has one message, which an ear that ends asks for.
const BARRIER: &str = "barrier";
/// The log is kept in segments until these are full, read or not.
const SEGMENT: usize = 1 << 20;
/// How many segments there are: 8 MiB hold 20,000 keys several times.
const SEGMENTS: usize = 8;
/// An ear that must miss nothing is behind when so much was said that it has not heard,
const BEHIND: u64 = 4 << 20;
/// and is not any more when it is less than this.
const CLOSE: u64 = 2 << 20;
/// So many messages are added to an ear's at once; beyond 200, it gets no more before it has taken these.
const AT_ONCE: u64 = 10;
/// The bytes of a position.
const POSITION: usize = size_of::<u64>();
/// What the log counts for a message beside its payload.
const FRAME: usize = 4 + TOPIC.len();
/// How long to wait for a place in the router's queue.
const PAUSE: Duration = Duration::from_millis(1);

type Dial = dyn Fn(&str) -> anyhow::Result<(LinkTx, LinkRx)> + Send + Sync;

/// The router, on a thread of its own that ends with the process.
pub struct Router {
    /// The type of the router's queue has no name outside of rumqttd.
    dial: Box<Dial>,
    /// The names of links that ended: the router remembers each name for ever.
    names: Mutex<Names>,
}

#[derive(Default)]
struct Names {
    free: Vec<usize>,
    given: usize,
}

/// The one who says everything.
pub struct Mouth {
    /// The position behind all that was said.
    said: u64,
    link: LinkTx,
    _replies: LinkRx,
    /// Where those ears are that must miss nothing.
    followers: Vec<Weak<AtomicU64>>,
    is_behind: bool,
}

impl Router {
    /// A router for so many ears.
    pub fn start(ears: usize) -> anyhow::Result<(Self, Mouth)> {
        let config = RouterConfig {
            max_connections: ears + 10,
            max_outgoing_packet_count: AT_ONCE,
            max_segment_size: SEGMENT,
            max_segment_count: SEGMENTS,
            initialized_filters: Some(vec![TOPIC.into(), BARRIER.into()]),
            ..RouterConfig::default()
        };
        let queue = rumqttd::Router::new(0, config).spawn();
        let dial = Box::new(move |name: &str| match LinkBuilder::new(name, queue.clone()).build() {
            Ok((link, heard, _)) => Ok((link, heard)),
            Err(error) => Err(anyhow!("the MQTT router: {error}")),
        });
        let (mut link, replies) = dial("mouth")?;
        link.publish(BARRIER, Bytes::from_static(b"!")).context("the MQTT router")?;
        let mouth = Mouth { said: 0, link, _replies: replies, followers: Vec::new(), is_behind: false };
        Ok((Self { dial, names: Mutex::default() }, mouth))
    }

    /// An ear that hears what is said from now on. It has to be closed.
    pub fn listen(&self) -> anyhow::Result<Ear> {
        let name = self.names(|names| {
            names.free.pop().unwrap_or_else(|| {
                names.given += 1;
                names.given
            })
        });
        let (mut link, heard) = (self.dial)(&name.to_string())?;
        link.subscribe(TOPIC).context("the MQTT router")?;
        Ok(Ear { name, link, heard, next: None, place: None })
    }

    /// Ends an ear. The router must have nothing to do for a link that it forgets, or others wait for that, and breaks on
    /// words from one that it has forgotten. So the subscription ends first, then nothing may be under way any more, as
    /// the answer to the barrier shows, and the farewell is the last word.
    pub async fn close(&self, ear: Ear) {
        let Ear { name, mut link, mut heard, .. } = ear;
        let _ = link.unsubscribe(TOPIC);
        loop {
            match heard.next().await {
                Ok(Some(Notification::Unschedule)) => drop(heard.ready()),
                Ok(Some(notification)) => {
                    if let Some(Packet::UnsubAck(..)) = notification.into() {
                        break;
                    }
                }
                Ok(None) => {}
                Err(_) => break,
            }
        }
        while link.shadow(BARRIER).is_err() {
            sleep(PAUSE).await;
        }
        while !matches!(heard.next().await, Ok(Some(Notification::Shadow(_))) | Err(_)) {}
        let farewell = Disconnect { reason_code: DisconnectReasonCode::NormalDisconnection };
        if link.send(Packet::Disconnect(farewell, None)).await.is_ok() {
            while heard.next().await.is_ok() {}
            self.names(|names| names.free.push(name));
        }
    }

    fn names<T>(&self, change: impl FnOnce(&mut Names) -> T) -> T {
        change(&mut self.names.lock())
    }
}

impl Mouth {
    /// Says it to all ears. Blocks while the router has more to do than it may queue.
    pub fn say(&mut self, said: &[u8]) {
        let mut placed = BytesMut::with_capacity(POSITION + said.len());
        placed.put_u64(self.said);
        placed.put_slice(said);
        self.said = behind(self.said, placed.len());
        // Without a router there is no process either.
        let _ = self.link.publish(Bytes::from_static(TOPIC.as_bytes()), placed.freeze());
    }

    /// This ear must miss nothing: [`Self::is_behind`] says when nobody should say more.
    pub fn accompany(&mut self, ear: &mut Ear) {
        let place = Arc::new(AtomicU64::new(u64::MAX));
        self.followers.retain(|follower| follower.strong_count() > 0);
        self.followers.push(Arc::downgrade(&place));
        ear.place = Some(place);
    }

    /// Whether one of the ears that must miss nothing is far behind, or was and has not caught up yet.
    pub fn is_behind(&mut self) -> bool {
        let places = self.followers.iter().filter_map(Weak::upgrade).map(|place| place.load(Ordering::Relaxed));
        let lag = self.said.saturating_sub(places.min().unwrap_or(u64::MAX));
        self.is_behind = lag > if self.is_behind { CLOSE } else { BEHIND };
        self.is_behind
    }
}

/// The position behind a message of so many bytes at `position`.
fn behind(position: u64, bytes: usize) -> u64 {
    position + (bytes + FRAME) as u64
}

/// One who listens.
pub struct Ear {
    name: usize,
    link: LinkTx,
    heard: LinkRx,
    /// The position of what is to be heard next.
    next: Option<u64>,
    /// The same for the [`Mouth`], if this ear must miss nothing. As long as it has heard nothing, it is not behind.
    place: Option<Arc<AtomicU64>>,
}

/// Some of what was said was too long ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missed;

impl Ear {
    /// What is said next that `wanted` wants. Dropping the future loses nothing.
    pub async fn next(&mut self, wanted: impl Fn(&Bytes) -> bool) -> Result<Bytes, Missed> {
        loop {
            match self.heard.next().await {
                Ok(Some(Notification::Forward(forward))) => {
                    let said = self.follow(forward.publish.payload)?;
                    if wanted(&said) {
                        return Ok(said);
                    }
                }
                // The router waits until its last portion is taken.
                Ok(Some(Notification::Unschedule)) => {
                    let _ = self.heard.ready();
                    yield_now().await;
                }
                Ok(_) => {}
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// What is said without its position, which has to be the next.
    fn follow(&mut self, mut placed: Bytes) -> Result<Bytes, Missed> {
        let bytes = placed.len();
        let said = placed.split_off(POSITION.min(bytes));
        let position = placed[..].try_into().map(u64::from_be_bytes).map_err(|_| Missed)?;
        let follows = self.next.is_none_or(|next| position == next);
        let next = behind(position, bytes);
        self.next = Some(next);
        if let Some(place) = &self.place {
            place.store(next, Ordering::Relaxed);
        }
        if follows { Ok(said) } else { Err(Missed) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use tokio::time::timeout;

    use super::*;

    /// The router serves 100 links and then looks whether there is more to do. It must not find one there that it forgot:
    /// it would take that for "no", and the rest would wait until something else is said.
    #[tokio::test(flavor = "multi_thread")]
    async fn an_ear_that_ends_keeps_no_other_waiting() {
        let (router, mut mouth) = Router::start(300).unwrap();
        let router = Arc::new(router);
        let mut ears: Vec<Ear> = (0..250).map(|_| router.listen().unwrap()).collect();
        for round in 0..300 {
            let ear = ears.remove(100);
            let closing = tokio::spawn({
                let router = router.clone();
                async move { router.close(ear).await }
            });
            // At any moment of the ending: a timer is too coarse for that.
            let moment = Instant::now() + Duration::from_micros(fastrand::u64(..300));
            while Instant::now() < moment {}
            mouth.say(b"x");
            for ear in &mut ears {
                let heard = timeout(Duration::from_secs(5), ear.next(|_| true)).await;
                assert!(heard.is_ok(), "somebody waits in round {round}");
            }
            closing.await.unwrap();
            ears.push(router.listen().unwrap());
        }
    }

    #[tokio::test]
    async fn an_ear_that_is_too_slow_notices_that_it_missed_something() {
        let (router, mut mouth) = Router::start(10).unwrap();
        let mut ear = router.listen().unwrap();
        let large = vec![0; 1 << 16];
        (0..1_000).for_each(|_| mouth.say(&large));
        let mut heard = 0;
        let missed = loop {
            match timeout(Duration::from_secs(5), ear.next(|_| true)).await.unwrap() {
                Ok(_) => heard += 1,
                Err(missed) => break missed,
            }
            mouth.say(&large);
        };
        assert!(missed == Missed && heard < 1_000, "{heard}");
        router.close(ear).await;
    }

    /// Twice as much as the log holds is said. It was seen to miss some with a log of 4 MiB.
    #[tokio::test]
    async fn an_ear_that_must_miss_nothing_holds_up_those_who_look() {
        let (router, mut mouth) = Router::start(10).unwrap();
        let mut ear = router.listen().unwrap();
        mouth.accompany(&mut ear);
        mouth.say(b"first");
        assert!(ear.next(|_| true).await.is_ok() && !mouth.is_behind());
        let large = vec![0; 1 << 20];
        for _ in 0..16 {
            while mouth.is_behind() {
                assert!(timeout(Duration::from_secs(5), ear.next(|_| true)).await.unwrap().is_ok());
            }
            mouth.say(&large);
        }
        assert!(mouth.is_behind());
        for _ in 0..3 {
            ear.next(|_| true).await.unwrap();
        }
        assert!(!mouth.is_behind(), "it is close again");
        (0..4).for_each(|_| mouth.say(&large));
        assert!(mouth.is_behind());
        router.close(ear).await;
        assert!(!mouth.is_behind(), "nobody is behind who is gone");
    }

    #[tokio::test]
    async fn an_ear_hears_what_is_said_after_it_listens_in_order_and_names_are_used_again() {
        let (router, mut mouth) = Router::start(10).unwrap();
        for _ in 0..100 {
            mouth.say(b"before");
            let mut ear = router.listen().unwrap();
            for n in 0..1000u16 {
                mouth.say(&n.to_be_bytes());
            }
            for n in 0..1000u16 {
                assert_eq!(ear.next(|_| true).await.unwrap(), &n.to_be_bytes()[..]);
            }
            router.close(ear).await;
        }
        assert_eq!(router.names(|names| names.given), 1);
    }
}
