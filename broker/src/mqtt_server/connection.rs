//! The connection of one admitted client: packets between its socket and its [`ClientSession`], until either ends it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use rumqttc::{Packet, mqttbytes};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::task::yield_now;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout};
use tracing::warn;

use crate::mqtt_server::broker::{ClientSlot, MessageBroker};
use crate::mqtt_server::handshake::ClientStream;
use crate::mqtt_server::log::{Lagged, LogMessage, LogReader};
use crate::mqtt_server::message::PublishedMessage;
use crate::mqtt_server::metrics::Metrics;
use crate::mqtt_server::quota::{
    Account, COMPARED_TOPIC_COST, Cost, DELIVERY_COST, Offence, ReservedBytes, ThrottleReason,
};
use crate::mqtt_server::retained::RetainedPage;
use crate::mqtt_server::session::{ClientSession, SessionAction};

/// The largest packet. The longest of the bus, 2,000 confirmations, has 100 kB.
const RECEIVED_PACKET_MAX: usize = 1 << 20;
/// The most bytes that wait to be written; then no more messages are taken from the log.
const OUTPUT_MAX: usize = 64 << 10;
/// The same for this broker's own connections: they are behind the log only if this is full.
const OUTPUT_OWN_MAX: usize = 8 << 20;
/// The most bytes that are read at once, and so processed before other connections have their turn.
const INPUT_MAX: usize = 16 << 10;
/// The longest that a client may read nothing.
const STALLED_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that a packet larger than [`INPUT_MAX`] may be incomplete.
const UNFINISHED_TIMEOUT: Duration = Duration::from_secs(30);
/// The shortest pause of a client that is slowed down: a timer is too coarse for one pause per packet.
const PAUSE_STEP: Duration = Duration::from_millis(10);
/// The type of a PUBLISH packet, in the upper half of its first byte.
const PUBLISH: u8 = 3;
/// The longest part of a topic that is logged, in characters.
const TOPIC_SHOWN_MAX: usize = 100;
/// How often to count how long a client keeps its reader from reading.
const WAIT_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often to check the time limits.
const LIMITS_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// The client sent DISCONNECT.
    Disconnect,
    /// It did not, and this is why: its will is due.
    Lost(&'static str),
}

/// An event of a connection.
enum ConnectionEvent {
    /// Another connection takes over its slot.
    TakenOver,
    /// It is time to check the time limits.
    Tick { now: Instant, has_output: bool },
    /// Its pause is over.
    Resumed,
    /// A message was published that the client may have subscribed to.
    Published(Result<LogMessage, Lagged>),
    /// So many bytes were read.
    Read(io::Result<usize>),
    /// Some bytes were written.
    Written(io::Result<()>),
    /// More of the retained messages can be sent.
    Retained,
    /// Nothing, for as long as the client may keep its reader from reading without a count.
    Waited,
}

/// Nothing is read before `until`, and received data is left in the buffer.
#[derive(Debug, Clone, Copy)]
struct Pause {
    until: Instant,
    reason: ThrottleReason,
}

/// A client's connection.
pub struct ClientConnection {
    reader: ReadHalf<Box<dyn ClientStream>>,
    writer: WriteHalf<Box<dyn ClientStream>>,
    input: BytesMut,
    output: BytesMut,
    /// Written data may still be in the stream.
    unflushed: bool,
    session: ClientSession,
    log_reader: Option<LogReader>,
    broker: Arc<MessageBroker>,
    metrics: Metrics,
    account: Account,
    keep_alive: Option<Duration>,
    last_read: Instant,
    last_write: Instant,
    paused: Option<Pause>,
    /// Memory for a large packet that is not whole yet, and since when.
    unfinished: Option<(ReservedBytes, Instant)>,
    /// More of the retained messages can be sent at once.
    has_more: bool,
}

/// The parts with which the connection of an admitted client starts.
pub struct ConnectionParts {
    /// The TCP or TLS stream.
    pub stream: Box<dyn ClientStream>,
    /// The data that the client sent behind its CONNECT.
    pub input: BytesMut,
    /// The data to be sent to it first.
    pub output: BytesMut,
    /// Its session.
    pub session: ClientSession,
    /// The account of its user.
    pub account: Account,
    /// Its keep-alive; none for one that may be silent for ever.
    pub keep_alive: Option<Duration>,
    /// Takes the messages that it publishes.
    pub broker: Arc<MessageBroker>,
    /// The metrics.
    pub metrics: Metrics,
}

impl ClientConnection {
    /// The connection of a client that was admitted just now.
    pub fn new(start: ConnectionParts) -> Self {
        let ConnectionParts { stream, input, output, session, account, keep_alive, broker, metrics } = start;
        let (reader, writer) = tokio::io::split(stream);
        let now = Instant::now();
        Self {
            reader,
            writer,
            input,
            output,
            unflushed: false,
            session,
            log_reader: None,
            broker,
            metrics,
            account,
            keep_alive,
            last_read: now,
            last_write: now,
            paused: None,
            unfinished: None,
            has_more: false,
        }
    }

    /// Runs until the end. The caller closes the reader.
    pub async fn run(mut self, slot: &ClientSlot) -> (ConnectionEnd, Option<LogReader>) {
        let mut tick = interval(LIMITS_CHECK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Err(end) = self.process_input(slot) {
                return (end, self.log_reader);
            }
            let event = self.next_in_time(slot, &mut tick).await;
            if let Err(end) = self.handle(event, slot) {
                return (end, self.log_reader);
            }
        }
    }

    /// Waits for the next event. If it depends on the client when its reader reads on, and others may have to wait for
    /// that, the time counts.
    async fn next_in_time(&mut self, slot: &ClientSlot, tick: &mut Interval) -> ConnectionEvent {
        if !self.holds_up_reader() {
            return self.next(slot, tick).await;
        }
        let began = Instant::now();
        let event = timeout(WAIT_CHECK_INTERVAL, self.next(slot, tick)).await.unwrap_or(ConnectionEvent::Waited);
        let now = Instant::now();
        if let Some(log_reader) = &mut self.log_reader
            && log_reader.is_awaited()
            && self.account.charge_wait(now - began, now)
        {
            log_reader.leave();
        }
        event
    }

    /// Whether it depends on the client when the next message is taken from the log: on its reading, its
    /// acknowledgements, or its rate. This broker's own connections are waited for however long that takes.
    fn holds_up_reader(&self) -> bool {
        let waits_for_retained = self.session.next_retained().is_some() && self.exceeds_rate();
        !self.account.is_own && (!self.has_output_room() || self.session.room() == 0 || waits_for_retained)
    }

    fn exceeds_rate(&self) -> bool {
        self.paused.is_some_and(|pause| pause.reason == ThrottleReason::Rate)
    }

    /// Waits for the next event. Output is written last, so that it is written together; only much output is written
    /// first.
    async fn next(&mut self, slot: &ClientSlot, tick: &mut Interval) -> ConnectionEvent {
        let can_deliver = self.has_output_room() && self.session.next_retained().is_none() && self.session.room() > 0;
        // This broker's own messages are few; they must not wait until it reads.
        let can_read = self.paused.is_none() && (self.has_output_room() || self.account.is_own);
        let (has_output, is_much) = (!self.output.is_empty() || self.unflushed, self.output.len() >= OUTPUT_MAX);
        self.make_room();
        let mut input = (&mut self.input).limit(INPUT_MAX);
        let resumes = until(self.paused.map(|pause| pause.until));
        let publishes = next(&mut self.log_reader, &self.session);
        let reads = self.reader.read_buf(&mut input);
        let writes = write(&mut self.writer, &mut self.output, &mut self.unflushed);
        if is_much {
            return tokio::select! {
                biased;
                () = slot.takeover() => ConnectionEvent::TakenOver,
                now = tick.tick() => ConnectionEvent::Tick { now, has_output },
                () = resumes => ConnectionEvent::Resumed,
                written = writes => ConnectionEvent::Written(written),
                message = publishes, if can_deliver => ConnectionEvent::Published(message),
                read = reads, if can_read => ConnectionEvent::Read(read),
            };
        }
        tokio::select! {
            biased;
            () = slot.takeover() => ConnectionEvent::TakenOver,
            now = tick.tick() => ConnectionEvent::Tick { now, has_output },
            () = resumes => ConnectionEvent::Resumed,
            message = publishes, if can_deliver => ConnectionEvent::Published(message),
            read = reads, if can_read => ConnectionEvent::Read(read),
            written = writes, if has_output => ConnectionEvent::Written(written),
            () = yield_now(), if self.has_more => ConnectionEvent::Retained,
        }
    }

    fn handle(&mut self, event: ConnectionEvent, slot: &ClientSlot) -> Result<(), ConnectionEnd> {
        match event {
            ConnectionEvent::TakenOver => return Err(ConnectionEnd::Lost("taken over")),
            ConnectionEvent::Tick { now, has_output } => {
                if !has_output {
                    self.last_write = now;
                }
                self.timed_out(now).map_or(Ok(()), Err)?;
            }
            ConnectionEvent::Resumed => {
                self.paused = None;
                // It may have sent something meanwhile.
                self.last_read = Instant::now();
            }
            ConnectionEvent::Published(Ok(message)) => {
                if let Some(message) = PublishedMessage::decode(&message.bytes) {
                    self.session.deliver(message, &mut self.output);
                }
            }
            // When it reconnects it gets the retained messages, and requests the others.
            ConnectionEvent::Published(Err(Lagged)) => return Err(ConnectionEnd::Lost("too slow")),
            ConnectionEvent::Read(Ok(0)) => return Err(ConnectionEnd::Lost("closed")),
            ConnectionEvent::Read(Ok(_)) => {
                slot.note_activity();
                self.last_read = Instant::now();
            }
            ConnectionEvent::Written(Ok(())) => self.last_write = Instant::now(),
            ConnectionEvent::Read(Err(_)) | ConnectionEvent::Written(Err(_)) => {
                return Err(ConnectionEnd::Lost("connection lost"));
            }
            ConnectionEvent::Retained | ConnectionEvent::Waited => {}
        }
        Ok(())
    }

    fn has_output_room(&self) -> bool {
        self.output.len() < if self.account.is_own { OUTPUT_OWN_MAX } else { OUTPUT_MAX }
    }

    fn timed_out(&self, now: Instant) -> Option<ConnectionEnd> {
        let unfinished = self.unfinished.as_ref().map(|(_, since)| *since);
        if self.account.is_own {
            None
        } else if self.log_reader.as_ref().is_some_and(LogReader::is_lapped) {
            Some(ConnectionEnd::Lost("too slow"))
        } else if unfinished.is_some_and(|since| now.saturating_duration_since(since) > UNFINISHED_TIMEOUT) {
            Some(ConnectionEnd::Lost("a packet that does not end"))
        } else {
            let keep_alive = self.keep_alive.filter(|_| self.paused.is_none());
            timed_out(now, keep_alive.map(|keep_alive| (self.last_read, keep_alive)), self.last_write)
        }
    }

    /// Makes room for input, and frees the memory of large output.
    fn make_room(&mut self) {
        self.input.reserve(INPUT_MAX);
        if self.output.is_empty() && self.output.capacity() > OUTPUT_MAX {
            self.output = BytesMut::new();
        }
    }

    /// Frees the memory of a large packet: the data received behind it is in the same buffer.
    fn shrink(&mut self) {
        let mut rest = BytesMut::with_capacity(self.input.len() + INPUT_MAX);
        rest.extend_from_slice(&self.input);
        self.input = rest;
    }

    /// Takes the received packets, and sends some of the retained messages.
    fn process_input(&mut self, slot: &ClientSlot) -> Result<(), ConnectionEnd> {
        self.take_packets(slot)?;
        self.has_more = false;
        if !self.exceeds_rate() && self.session.room() > 0 && self.output.len() < OUTPUT_MAX {
            self.send_retained(slot);
        }
        Ok(())
    }

    fn take_packets(&mut self, slot: &ClientSlot) -> Result<(), ConnectionEnd> {
        loop {
            if self.paused.is_some() {
                return Ok(());
            }
            // Only PUBLISH packets wait: others may wait for this client's acknowledgements.
            let publishes = self.input.first().is_some_and(|first| first >> 4 == PUBLISH);
            if publishes && self.broker.must_wait(&self.account) {
                self.pause(ThrottleReason::Behind, PAUSE_STEP);
                return Ok(());
            }
            let before = self.input.len();
            match Packet::read(&mut self.input, RECEIVED_PACKET_MAX) {
                Ok(packet) => {
                    self.unfinished = None;
                    let bytes = before - self.input.len();
                    if bytes > INPUT_MAX {
                        self.shrink();
                    }
                    let cost = Cost { work: self.session.work(&packet), bytes: bytes as u64 };
                    let actions = self.session.take(packet, self.broker.log_end(), &mut self.output);
                    for action in actions.map_err(|violation| ConnectionEnd::Lost(violation.0))? {
                        self.execute(action, slot)?;
                    }
                    self.charge(cost, slot);
                }
                Err(mqttbytes::Error::InsufficientBytes(missing)) => {
                    self.expect(before + missing, slot);
                    return Ok(());
                }
                Err(mqttbytes::Error::PayloadSizeLimitExceeded(_)) => {
                    return Err(ConnectionEnd::Lost("too large a packet"));
                }
                Err(_) => return Err(ConnectionEnd::Lost("speaks no MQTT 3.1.1")),
            }
        }
    }

    /// A packet of so many bytes has begun: a large one is read once there is memory for all of it.
    fn expect(&mut self, bytes: usize, slot: &ClientSlot) {
        if bytes <= INPUT_MAX || self.unfinished.is_some() {
            return;
        }
        match self.account.reserve(bytes) {
            Some(held) => self.unfinished = Some((held, Instant::now())),
            None => self.slow_down(ThrottleReason::Unfinished, PAUSE_STEP, slot),
        }
    }

    /// Sends some of the retained messages of a filter.
    fn send_retained(&mut self, slot: &ClientSlot) {
        let Some(cursor) = self.session.next_retained() else { return };
        let most = (self.session.room(), OUTPUT_MAX - self.output.len());
        let RetainedPage { messages, after, scanned, bytes } =
            self.broker.find(&cursor.filter, cursor.after.as_deref(), most);
        let cost =
            Cost { work: scanned * COMPARED_TOPIC_COST + messages.len() as u64 * DELIVERY_COST, bytes: bytes as u64 };
        for message in messages {
            self.session.deliver(message, &mut self.output);
        }
        self.session.advance_retained(after);
        self.has_more =
            self.session.next_retained().is_some() && self.session.room() > 0 && self.output.len() < OUTPUT_MAX;
        self.charge(cost, slot);
    }

    fn charge(&mut self, cost: Cost, slot: &ClientSlot) {
        let wait = self.account.charge(cost, Instant::now());
        if !wait.is_zero() {
            self.has_more = false;
            self.slow_down(ThrottleReason::Rate, wait.max(PAUSE_STEP), slot);
        }
    }

    /// Pauses for a reason that is the user's.
    fn slow_down(&mut self, reason: ThrottleReason, wait: Duration, slot: &ClientSlot) {
        self.pause(reason, wait);
        if self.account.may_warn(Offence::Excess) {
            warn!(client = %slot, reason = reason.reason(), "exceeds its rate limit: is slowed down");
        }
    }

    fn pause(&mut self, reason: ThrottleReason, wait: Duration) {
        self.paused = Some(Pause { until: Instant::now() + wait, reason });
        self.metrics.slowed.with_label_values(&[reason.reason()]).inc();
    }

    fn execute(&mut self, action: SessionAction, slot: &ClientSlot) -> Result<(), ConnectionEnd> {
        match action {
            SessionAction::Publish(message) => self.broker.publish(slot, &message),
            SessionAction::Subscribe if self.log_reader.is_none() => {
                self.log_reader = Some(
                    self.broker
                        .subscribe(self.account.is_own)
                        .map_err(|_| ConnectionEnd::Lost("no place to listen"))?,
                );
            }
            SessionAction::Subscribe => {}
            SessionAction::Deny { operation, topic, is_first } => {
                self.metrics.denied.with_label_values(&[operation.word()]).inc();
                if is_first && self.account.may_warn(Offence::Forbidden) {
                    let topic: String = topic.chars().take(TOPIC_SHOWN_MAX).collect();
                    warn!(client = %slot, verb = operation.word(), topic, "not allowed: the publish is acknowledged and dropped, or the subscription refused");
                }
            }
            SessionAction::Disconnect => return Err(ConnectionEnd::Disconnect),
        }
        Ok(())
    }
}

/// Why a client counts as gone: nothing was read from it for longer than its keep-alive, or it took no output for too
/// long.
fn timed_out(now: Instant, last_read: Option<(Instant, Duration)>, last_write: Instant) -> Option<ConnectionEnd> {
    if last_read.is_some_and(|(last_read, keep_alive)| now.saturating_duration_since(last_read) > keep_alive) {
        return Some(ConnectionEnd::Lost("silent"));
    }
    (now.saturating_duration_since(last_write) > STALLED_TIMEOUT).then_some(ConnectionEnd::Lost("reads nothing"))
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn next(log_reader: &mut Option<LogReader>, session: &ClientSession) -> Result<LogMessage, Lagged> {
    match log_reader {
        Some(log_reader) => {
            fn topic(message: &LogMessage) -> &str {
                PublishedMessage::topic_of(&message.bytes).unwrap_or_default()
            }
            log_reader.next(|message| session.had_subscribed(topic(message), message.at)).await
        }
        None => std::future::pending().await,
    }
}

/// Writes some of the output, or flushes the stream. Dropping the future loses nothing.
async fn write(
    writer: &mut WriteHalf<Box<dyn ClientStream>>,
    output: &mut BytesMut,
    unflushed: &mut bool,
) -> io::Result<()> {
    if output.is_empty() {
        writer.flush().await?;
        *unflushed = false;
        return Ok(());
    }
    let written = writer.write_buf(output).await?;
    *unflushed = true;
    if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_gone_when_it_is_silent_or_reads_nothing_for_too_long() {
        let now = Instant::now() + Duration::from_secs(1000);
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).unwrap();
        let limit = Duration::from_secs(7);
        for (last_read, last_write, expected) in [
            (Some((ago(7), limit)), ago(30), None),
            (Some((ago(8), limit)), ago(0), Some(ConnectionEnd::Lost("silent"))),
            (None, ago(30), None),
            (None, ago(31), Some(ConnectionEnd::Lost("reads nothing"))),
            (Some((now + limit, limit)), now + limit, None),
        ] {
            assert_eq!(timed_out(now, last_read, last_write), expected);
        }
    }
}
