//! The log that carries every published message to every connection: the only place that knows rumqttd.
//!
//! rumqttd's router does three things here: it keeps the last 16 MiB of messages in order, wakes each reader when there
//! is more, and drops the oldest however slow a reader is. Everything else is ours, around it: the listener, TLS and
//! login ([`super::handshake`]), the protocol with clients ([`super::session`], [`super::connection`]), topic filters
//! ([`super::subscriptions`]), access rules ([`super::acl`]), retained messages and wills ([`super::retained`]), and
//! quotas ([`super::quota`]). That is because the router breaks on client ids, topics, filters, acknowledgements and
//! ends of connections that it does not expect; so nothing that clients send reaches it unwrapped. One link publishes
//! all messages on one topic, as bytes of [`super::message`]; each [`LogReader`] is a link that subscribes to that
//! topic and picks the messages that its client subscribed to. Every message has its position in the log with it, so
//! that a reader notices when it has missed some.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bytes::{BufMut as _, Bytes, BytesMut};
use parking_lot::Mutex;
use rumqttd::local::{LinkBuilder, LinkRx, LinkTx};
use rumqttd::protocol::{Disconnect, DisconnectReasonCode, Packet};
use rumqttd::{Notification, RouterConfig};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::mqtt_server::progress::{LogProgress, ReaderPosition};

/// The topic of all messages.
const TOPIC: &str = "bus";
/// The topic of one message, for which a reader waits when it is closed.
const BARRIER: &str = "barrier";
/// The bytes of a segment: the log drops whole segments, read or not.
const SEGMENT: usize = 1 << 20;
/// How many segments there are: 16 MiB are more than any publisher may be ahead of the readers.
const SEGMENTS: usize = 16;
/// The most messages that are forwarded to a reader at once; with 200 of them in its queue it gets no more.
const FORWARD_BATCH: u64 = 10;
/// The bytes of a position.
const POSITION: usize = size_of::<u64>();
/// The bytes that the log counts for a message beside its payload.
const FRAME: usize = 4 + TOPIC.len();
/// How long to wait for a place in the router's queue.
const QUEUE_RETRY: Duration = Duration::from_millis(1);

/// A position in the log, in bytes since the server started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPosition(u64);

/// A message of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogMessage {
    /// Where it begins.
    pub at: LogPosition,
    /// Its bytes.
    pub bytes: Bytes,
}

type Dial = dyn Fn(&str) -> anyhow::Result<(LinkTx, LinkRx)> + Send + Sync;

/// The router, on a thread of its own that ends with the process.
pub struct Log {
    /// The type of the router's queue has no name outside of rumqttd.
    dial: Box<Dial>,
    /// The names of links that ended: the router remembers each name for ever.
    reader_names: Mutex<ReaderNames>,
    /// The writer's link, in which nothing arrives. It ends with the router.
    replies: tokio::sync::Mutex<LinkRx>,
    progress: ProgressOfAll,
}

/// How far all readers are.
#[derive(Default, Clone)]
struct ProgressOfAll {
    clients: Arc<LogProgress>,
    own: Arc<LogProgress>,
}

#[derive(Default)]
struct ReaderNames {
    free: Vec<usize>,
    given: usize,
}

/// The link that publishes all messages.
pub struct LogWriter {
    /// The position behind all that was published.
    end: u64,
    link: LinkTx,
    progress: ProgressOfAll,
}

impl Log {
    /// A log for so many readers.
    pub fn start(readers: usize) -> anyhow::Result<(Self, LogWriter)> {
        let config = RouterConfig {
            max_connections: readers + 10,
            max_outgoing_packet_count: FORWARD_BATCH,
            max_segment_size: SEGMENT,
            max_segment_count: SEGMENTS,
            initialized_filters: Some(vec![TOPIC.into(), BARRIER.into()]),
            ..RouterConfig::default()
        };
        let queue = rumqttd::Router::new(0, config).spawn();
        let dial = Box::new(move |name: &str| match LinkBuilder::new(name, queue.clone()).build() {
            Ok((link, incoming, _)) => Ok((link, incoming)),
            Err(error) => Err(anyhow!("the MQTT router: {error}")),
        });
        let (mut link, replies) = dial("writer")?;
        link.publish(BARRIER, Bytes::from_static(b"!")).context("the MQTT router")?;
        let progress = ProgressOfAll::default();
        let writer = LogWriter { end: 0, link, progress: progress.clone() };
        Ok((Self { dial, reader_names: Mutex::default(), replies: replies.into(), progress }, writer))
    }

    /// Returns when the router has ended, which is a failure.
    pub async fn ended(&self) {
        let mut replies = self.replies.lock().await;
        while replies.next().await.is_ok() {}
    }

    /// The position behind all that was published.
    pub fn end(&self) -> LogPosition {
        LogPosition(self.progress.clients.end())
    }

    /// How many bytes the last reader has not read yet, see [`LogProgress::lag`].
    pub fn lag(&self) -> u64 {
        self.lag_of_clients().max(self.progress.own.lag())
    }

    /// The same for the readers of clients.
    pub fn lag_of_clients(&self) -> u64 {
        self.progress.clients.lag()
    }

    /// A reader of messages published from now on, for this broker itself or a client. It has to be closed.
    pub fn subscribe(&self, is_own: bool) -> anyhow::Result<LogReader> {
        let name = self.reader_names(|names| {
            names.free.pop().unwrap_or_else(|| {
                names.given += 1;
                names.given
            })
        });
        let (mut link, mut incoming) = (self.dial)(&name.to_string())?;
        link.subscribe(TOPIC).context("the MQTT router")?;
        // The router takes all messages of the writer at once, also later ones, before it takes the subscription.
        while !is_granted(incoming.recv().context("the MQTT router")?) {}
        let position = ReaderPosition::at_end(if is_own { &self.progress.own } else { &self.progress.clients });
        Ok(LogReader { name, link, incoming, next: None, position })
    }

    /// Closes a reader. The router must have nothing to do for a link that it removes, or others wait for that, and breaks
    /// on packets from a link that it has removed. So the subscription ends first, then nothing may be in flight any more,
    /// as the answer to the barrier shows, and DISCONNECT is the last packet.
    pub async fn close(&self, reader: LogReader) {
        let LogReader { name, mut link, mut incoming, position, .. } = reader;
        drop(position);
        let _ = link.unsubscribe(TOPIC);
        loop {
            match incoming.next().await {
                Ok(Some(Notification::Unschedule)) => drop(incoming.ready()),
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
            sleep(QUEUE_RETRY).await;
        }
        while !matches!(incoming.next().await, Ok(Some(Notification::Shadow(_))) | Err(_)) {}
        let disconnect = Disconnect { reason_code: DisconnectReasonCode::NormalDisconnection };
        if link.send(Packet::Disconnect(disconnect, None)).await.is_ok() {
            while incoming.next().await.is_ok() {}
            self.reader_names(|names| names.free.push(name));
        }
    }

    fn reader_names<T>(&self, change: impl FnOnce(&mut ReaderNames) -> T) -> T {
        change(&mut self.reader_names.lock())
    }
}

impl LogWriter {
    /// Publishes it to all readers. Blocks while the router has more to do than it may queue.
    pub fn publish(&mut self, message: &[u8]) {
        let mut placed = BytesMut::with_capacity(POSITION + message.len());
        placed.put_u64(self.end);
        placed.put_slice(message);
        self.end = position_after(self.end, placed.len());
        // It fails only when the router has ended, and the server ends then, too: see [`Log::ended`].
        let _ = self.link.publish(Bytes::from_static(TOPIC.as_bytes()), placed.freeze());
        self.progress.clients.publish(self.end);
        self.progress.own.publish(self.end);
    }
}

/// Whether the router has taken a subscription. It forwards nothing before that.
fn is_granted(notification: Option<Notification>) -> bool {
    matches!(notification.and_then(Into::into), Some(Packet::SubAck(..)))
}

/// The position behind a message of so many bytes at `position`.
fn position_after(position: u64, bytes: usize) -> u64 {
    position + (bytes + FRAME) as u64
}

/// A reader of the log, for one connection.
pub struct LogReader {
    name: usize,
    link: LinkTx,
    incoming: LinkRx,
    /// The position of the next message.
    next: Option<u64>,
    /// Its position, as publishers see it.
    position: ReaderPosition,
}

/// The log does not have the reader's next message any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lagged;

impl LogReader {
    /// The next message that `is_wanted`. Dropping the future loses nothing.
    pub async fn next(&mut self, is_wanted: impl Fn(&LogMessage) -> bool) -> Result<LogMessage, Lagged> {
        loop {
            match self.incoming.next().await {
                Ok(Some(Notification::Forward(forward))) => {
                    let message = self.check_position(forward.publish.payload)?;
                    if is_wanted(&message) {
                        return Ok(message);
                    }
                }
                // The router waits until its last portion is taken.
                Ok(Some(Notification::Unschedule)) => {
                    let _ = self.incoming.ready();
                    yield_now().await;
                }
                Ok(_) => {}
                // The router has ended: the server is about to end.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Whether publishers may have to wait for it.
    pub fn is_awaited(&self) -> bool {
        self.position.is_awaited()
    }

    /// Whether the log has dropped the message that it would read next. Its client may keep it from reading, and so
    /// from noticing that.
    pub fn is_lapped(&self) -> bool {
        self.position.is_left_behind((SEGMENT * SEGMENTS) as u64)
    }

    /// No publisher waits for it from now on: it is to be closed.
    pub fn leave(&mut self) {
        self.position.leave();
    }

    /// A message without its position, which has to be the next.
    fn check_position(&mut self, mut placed: Bytes) -> Result<LogMessage, Lagged> {
        let size = placed.len();
        let bytes = placed.split_off(POSITION.min(size));
        let position = placed[..].try_into().map(u64::from_be_bytes).map_err(|_| Lagged)?;
        let follows = self.next.is_none_or(|next| position == next);
        let next = position_after(position, size);
        self.next = Some(next);
        self.position.advance(next);
        if follows { Ok(LogMessage { at: LogPosition(position), bytes }) } else { Err(Lagged) }
    }
}

#[cfg(test)]
impl Log {
    /// Makes the router panic: it does so at a request from a link that it has removed.
    pub(super) async fn break_router(&self) {
        let mut reader = self.subscribe(false).unwrap();
        let disconnect = Disconnect { reason_code: DisconnectReasonCode::NormalDisconnection };
        reader.link.send(Packet::Disconnect(disconnect, None)).await.unwrap();
        while reader.incoming.next().await.is_ok() {}
        reader.link.shadow(BARRIER).unwrap();
    }
}

#[cfg(test)]
impl LogPosition {
    /// A position for tests.
    pub(super) const fn new(bytes: u64) -> Self {
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use tokio::time::timeout;

    use super::*;

    /// The router serves 100 links and then checks whether there is more to do. It must not find one there that it has
    /// removed: it would take that for "no", and the rest would wait until the next message.
    #[tokio::test(flavor = "multi_thread")]
    async fn closing_a_reader_keeps_no_other_waiting() {
        let (log, mut writer) = Log::start(300).unwrap();
        let log = Arc::new(log);
        let mut readers: Vec<LogReader> = (0..250).map(|_| log.subscribe(false).unwrap()).collect();
        for round in 0..300 {
            let reader = readers.remove(100);
            let closing = tokio::spawn({
                let log = log.clone();
                async move { log.close(reader).await }
            });
            // At any moment of the ending: a timer is too coarse for that.
            let moment = Instant::now() + Duration::from_micros(fastrand::u64(..300));
            while Instant::now() < moment {}
            writer.publish(b"x");
            for reader in &mut readers {
                let heard = timeout(Duration::from_secs(5), reader.next(|_| true)).await;
                assert!(heard.is_ok(), "a reader waits in round {round}");
            }
            closing.await.unwrap();
            readers.push(log.subscribe(false).unwrap());
        }
    }

    #[tokio::test]
    async fn a_reader_that_is_too_slow_notices_that_it_missed_something() {
        let (log, mut writer) = Log::start(10).unwrap();
        let mut reader = log.subscribe(false).unwrap();
        let large = vec![0; 1 << 16];
        (0..1_000).for_each(|_| writer.publish(&large));
        let mut heard = 0;
        let missed = loop {
            match timeout(Duration::from_secs(5), reader.next(|_| true)).await.unwrap() {
                Ok(_) => heard += 1,
                Err(missed) => break missed,
            }
            writer.publish(&large);
        };
        assert!(missed == Lagged && heard < 1_000, "{heard}");
        log.close(reader).await;
    }

    /// Twice as much as the log holds is published. It was seen to miss some with a log of 4 MiB.
    #[tokio::test]
    async fn a_reader_that_is_waited_for_misses_nothing() {
        const MOST: u64 = 4 << 20;
        let (log, mut writer) = Log::start(10).unwrap();
        let mut reader = log.subscribe(false).unwrap();
        writer.publish(b"first");
        assert!(reader.next(|_| true).await.is_ok() && log.lag() < MOST);
        let large = vec![0; 1 << 20];
        for _ in 0..2 * SEGMENTS {
            while log.lag() > MOST {
                assert!(timeout(Duration::from_secs(5), reader.next(|_| true)).await.unwrap().is_ok());
            }
            writer.publish(&large);
        }
        assert!(log.lag() > MOST);
        for _ in 0..3 {
            reader.next(|_| true).await.unwrap();
        }
        assert!(log.lag() < MOST, "it is close again");
        (0..4).for_each(|_| writer.publish(&large));
        assert!(log.lag() > MOST);
        log.close(reader).await;
        assert_eq!(log.lag(), 0, "no reader is behind that is gone");
    }

    /// Seen to fail where the reader is given before the router has the subscription: the message was lost.
    #[tokio::test]
    async fn a_reader_misses_nothing_that_is_published_after_it_subscribes_while_others_publish() {
        let (log, writer) = Log::start(10).unwrap();
        let writer = Arc::new(Mutex::new(writer));
        for round in 0..300_u32 {
            // Far less than the log holds: a slow reader misses none of it.
            let others = std::thread::spawn({
                let writer = writer.clone();
                move || (0..10_000).for_each(|_| writer.lock().publish(b"of others"))
            });
            let mut reader = log.subscribe(false).unwrap();
            let marker = [b"marker".as_slice(), &round.to_be_bytes()].concat();
            writer.lock().publish(&marker);
            let found = timeout(Duration::from_secs(30), reader.next(|message| message.bytes[..] == marker)).await;
            assert_eq!(found.expect("nothing is missed").unwrap().bytes, marker, "round {round}");
            others.join().unwrap();
            log.close(reader).await;
        }
    }

    #[tokio::test]
    async fn a_reader_reads_in_order_what_is_published_after_it_subscribes_and_names_are_used_again() {
        let (log, mut writer) = Log::start(10).unwrap();
        for _ in 0..100 {
            writer.publish(b"before");
            let mut reader = log.subscribe(false).unwrap();
            for n in 0..1000u16 {
                writer.publish(&n.to_be_bytes());
            }
            for n in 0..1000u16 {
                assert_eq!(reader.next(|_| true).await.unwrap().bytes, &n.to_be_bytes()[..]);
            }
            log.close(reader).await;
        }
        assert_eq!(log.reader_names(|names| names.given), 1);
    }
}
