//! One client that was let in: packets between its socket and its [`Session`], until one of both ends it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use rumqttc::{Packet, mqttbytes};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::task::yield_now;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};
use tracing::warn;

use crate::metrics::Metrics;
use crate::mqtt_server::broker::{Bus, Seat};
use crate::mqtt_server::handshake::Stream;
use crate::mqtt_server::log::{Ear, Missed};
use crate::mqtt_server::message::Message;
use crate::mqtt_server::quota::{Account, Cost, DELIVERY, Held, LOOK, Offence};
use crate::mqtt_server::retained::Found;
use crate::mqtt_server::session::{Deed, Session};

/// The largest packet. The longest of the bus, 2,000 confirmations, has 100 kB.
const PACKET_MAX: usize = 1 << 20;
/// What waits to be written is not added to beyond this.
const OUTPUT: usize = 64 << 10;
/// The same for this broker's own connections: they are behind what is said only if this is full.
const OUTPUT_OWN: usize = 8 << 20;
/// How much is read at once, and so worked off before others have their turn.
const INPUT: usize = 16 << 10;
/// A client that takes nothing for so long is gone.
const STALLED: Duration = Duration::from_secs(30);
/// So is one whose packet, which is larger than what is read at once, does not end for so long.
const UNFINISHED: Duration = Duration::from_secs(30);
/// The shortest time for which a client is slowed down: for each packet alone it would be a timer's coarse time.
const PAUSE: Duration = Duration::from_millis(10);
/// So much of a topic is shown.
const TOPIC_SHOWN: usize = 100;
/// How often it is looked for.
const TICK: Duration = Duration::from_secs(1);

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client said goodbye.
    Farewell,
    /// It did not, and this is why: its will is due.
    Lost(&'static str),
}

/// Why nothing is read from a client for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slowed {
    /// Its user takes more than it may.
    Rate,
    /// Its user has too many packets that are not whole.
    Unfinished,
    /// This broker's own connections are behind.
    Behind,
}

impl Slowed {
    /// Every reason, by the word that metrics have for it.
    pub const REASONS: [&str; 3] = ["rate", "unfinished", "behind"];

    fn reason(self) -> &'static str {
        Self::REASONS[self as usize]
    }
}

/// What happens to a connection.
enum Event {
    /// Another one wants its seat.
    Wanted,
    /// A second has passed, at this moment; and whether something was to be written.
    Tick(Instant, bool),
    /// It was slowed down for long enough.
    Resumed,
    /// Somebody said something that the client subscribed to.
    Heard(Result<Bytes, Missed>),
    /// So many bytes have come.
    Read(io::Result<usize>),
    /// Some bytes were written.
    Written(io::Result<()>),
    /// There is more to send of what is kept.
    More,
}

/// A client's connection.
pub struct Connection {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    input: BytesMut,
    output: BytesMut,
    /// What was written may still be in the stream.
    unflushed: bool,
    session: Session,
    ear: Option<Ear>,
    bus: Arc<Bus>,
    metrics: Metrics,
    account: Account,
    silence: Option<Duration>,
    heard: Instant,
    taken: Instant,
    /// Nothing is read before this, and what has come is left.
    paused: Option<Instant>,
    /// Memory for a large packet that is not whole yet, and since when.
    unfinished: Option<(Held, Instant)>,
    /// More of what is kept can be sent at once.
    has_more: bool,
}

impl Connection {
    /// The connection of a client that sent `input` behind its CONNECT and is to get `output` first.
    pub fn new(
        stream: Box<dyn Stream>,
        (input, output): (BytesMut, BytesMut),
        (session, account): (Session, Account),
        silence: Option<Duration>,
        (bus, metrics): (Arc<Bus>, Metrics),
    ) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        let now = Instant::now();
        Self {
            reader,
            writer,
            input,
            output,
            unflushed: false,
            session,
            ear: None,
            bus,
            metrics,
            account,
            silence,
            heard: now,
            taken: now,
            paused: None,
            unfinished: None,
            has_more: false,
        }
    }

    /// Runs until the end. What it listened with is the caller's to close.
    pub async fn run(mut self, seat: &Seat) -> (End, Option<Ear>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Err(end) = self.work_off(seat) {
                return (end, self.ear);
            }
            let event = self.next(seat, &mut tick).await;
            if let Err(end) = self.handle(event, seat) {
                return (end, self.ear);
            }
        }
    }

    /// Waits for one thing to happen. What is to be sent is written last: together. Only if that is much it comes first.
    async fn next(&mut self, seat: &Seat, tick: &mut Interval) -> Event {
        let may_hear = self.has_place() && self.session.backlog().is_none() && self.session.room() > 0;
        // What this broker sends itself is little; it must not wait until it reads.
        let may_read = self.paused.is_none() && (self.has_place() || self.account.is_own);
        let (has_output, is_much) = (!self.output.is_empty() || self.unflushed, self.output.len() >= OUTPUT);
        self.make_room();
        let mut input = (&mut self.input).limit(INPUT);
        let resumes = until(self.paused);
        let hears = next(&mut self.ear, &self.session);
        let reads = self.reader.read_buf(&mut input);
        let writes = write(&mut self.writer, &mut self.output, &mut self.unflushed);
        if is_much {
            return tokio::select! {
                biased;
                () = seat.wanted() => Event::Wanted,
                now = tick.tick() => Event::Tick(now, has_output),
                () = resumes => Event::Resumed,
                written = writes => Event::Written(written),
                said = hears, if may_hear => Event::Heard(said),
                read = reads, if may_read => Event::Read(read),
            };
        }
        tokio::select! {
            biased;
            () = seat.wanted() => Event::Wanted,
            now = tick.tick() => Event::Tick(now, has_output),
            () = resumes => Event::Resumed,
            said = hears, if may_hear => Event::Heard(said),
            read = reads, if may_read => Event::Read(read),
            written = writes, if has_output => Event::Written(written),
            () = yield_now(), if self.has_more => Event::More,
        }
    }

    fn handle(&mut self, event: Event, seat: &Seat) -> Result<(), End> {
        match event {
            Event::Wanted => return Err(End::Lost("taken over")),
            Event::Tick(now, has_output) => {
                if !has_output {
                    self.taken = now;
                }
                self.overdue(now).map_or(Ok(()), Err)?;
            }
            Event::Resumed => {
                self.paused = None;
                // It may have said something meanwhile.
                self.heard = Instant::now();
            }
            Event::Heard(Ok(said)) => {
                if let Some(message) = Message::decode(&said) {
                    self.session.deliver(message, &mut self.output);
                }
            }
            // When it is back it hears what is kept, and asks for what is not.
            Event::Heard(Err(Missed)) => return Err(End::Lost("too slow")),
            Event::Read(Ok(0)) => return Err(End::Lost("closed")),
            Event::Read(Ok(_)) => {
                seat.touch();
                self.heard = Instant::now();
            }
            Event::Written(Ok(())) => self.taken = Instant::now(),
            Event::Read(Err(_)) | Event::Written(Err(_)) => return Err(End::Lost("connection lost")),
            Event::More => {}
        }
        Ok(())
    }

    fn has_place(&self) -> bool {
        self.output.len() < if self.account.is_own { OUTPUT_OWN } else { OUTPUT }
    }

    fn overdue(&self, now: Instant) -> Option<End> {
        let unfinished = self.unfinished.as_ref().map(|(_, since)| *since);
        if self.account.is_own {
            None
        } else if unfinished.is_some_and(|since| now.saturating_duration_since(since) > UNFINISHED) {
            Some(End::Lost("a packet that does not end"))
        } else {
            let silence = self.silence.filter(|_| self.paused.is_none());
            overdue(now, silence.map(|silence| (self.heard, silence)), self.taken)
        }
    }

    /// Makes room to read, and gives back what much to send took.
    fn make_room(&mut self) {
        self.input.reserve(INPUT);
        if self.output.is_empty() && self.output.capacity() > OUTPUT {
            self.output = BytesMut::new();
        }
    }

    /// Gives back what a large packet took: what came behind it is in the same memory.
    fn shrink(&mut self) {
        let mut rest = BytesMut::with_capacity(self.input.len() + INPUT);
        rest.extend_from_slice(&self.input);
        self.input = rest;
    }

    /// Takes the packets that have come, and sends some of what is kept.
    fn work_off(&mut self, seat: &Seat) -> Result<(), End> {
        self.take_packets(seat)?;
        self.has_more = false;
        if self.paused.is_none() && self.session.room() > 0 && self.output.len() < OUTPUT {
            self.send_kept(seat);
        }
        Ok(())
    }

    fn take_packets(&mut self, seat: &Seat) -> Result<(), End> {
        loop {
            if !self.account.is_own && self.bus.is_behind() {
                self.pause(Slowed::Behind, PAUSE);
            }
            if self.paused.is_some() {
                return Ok(());
            }
            let before = self.input.len();
            match Packet::read(&mut self.input, PACKET_MAX) {
                Ok(packet) => {
                    self.unfinished = None;
                    let bytes = before - self.input.len();
                    if bytes > INPUT {
                        self.shrink();
                    }
                    let cost = Cost { work: self.session.work(&packet), bytes: bytes as u64 };
                    let deeds = self.session.take(packet, &mut self.output);
                    for deed in deeds.map_err(|violation| End::Lost(violation.0))? {
                        self.do_it(deed, seat)?;
                    }
                    self.charge(cost, seat);
                }
                Err(mqttbytes::Error::InsufficientBytes(missing)) => {
                    self.expect(before + missing, seat);
                    return Ok(());
                }
                Err(mqttbytes::Error::PayloadSizeLimitExceeded(_)) => return Err(End::Lost("too large a packet")),
                Err(_) => return Err(End::Lost("speaks no MQTT 3.1.1")),
            }
        }
    }

    /// A packet of so many bytes has begun: a large one is read once there is memory for all of it.
    fn expect(&mut self, bytes: usize, seat: &Seat) {
        if bytes <= INPUT || self.unfinished.is_some() {
            return;
        }
        match self.account.hold(bytes) {
            Some(held) => self.unfinished = Some((held, Instant::now())),
            None => self.slow_down(Slowed::Unfinished, PAUSE, seat),
        }
    }

    /// Sends a portion of what is kept for a filter.
    fn send_kept(&mut self, seat: &Seat) {
        let Some(backlog) = self.session.backlog() else { return };
        let most = (self.session.room(), OUTPUT - self.output.len());
        let Found { messages, after, looked_at, bytes } =
            self.bus.find(&backlog.filter, backlog.after.as_deref(), most);
        let cost = Cost { work: looked_at * LOOK + messages.len() as u64 * DELIVERY, bytes: bytes as u64 };
        for message in messages {
            self.session.deliver(message, &mut self.output);
        }
        self.session.went_on(after);
        self.has_more = self.session.backlog().is_some() && self.session.room() > 0 && self.output.len() < OUTPUT;
        self.charge(cost, seat);
    }

    fn charge(&mut self, cost: Cost, seat: &Seat) {
        let wait = self.account.charge(cost, Instant::now());
        if !wait.is_zero() {
            self.has_more = false;
            self.slow_down(Slowed::Rate, wait.max(PAUSE), seat);
        }
    }

    /// Pauses for a reason that is the user's.
    fn slow_down(&mut self, reason: Slowed, wait: Duration, seat: &Seat) {
        self.pause(reason, wait);
        if self.account.may_warn(Offence::Excess) {
            warn!(client = %seat, reason = reason.reason(), "does more than it may: is slowed down");
        }
    }

    fn pause(&mut self, reason: Slowed, wait: Duration) {
        self.paused = Some(Instant::now() + wait);
        self.metrics.mqtt_slowed.with_label_values(&[reason.reason()]).inc();
    }

    fn do_it(&mut self, deed: Deed, seat: &Seat) -> Result<(), End> {
        match deed {
            Deed::Say(message) => self.bus.say(seat, &message),
            Deed::Listen if self.ear.is_none() => {
                self.ear = Some(self.bus.listen(self.account.is_own).map_err(|_| End::Lost("no place to listen"))?);
            }
            Deed::Listen => {}
            Deed::Forbid { operation, topic, is_first } => {
                self.metrics.mqtt_forbidden.with_label_values(&[operation.word()]).inc();
                if is_first && self.account.may_warn(Offence::Forbidden) {
                    let topic: String = topic.chars().take(TOPIC_SHOWN).collect();
                    warn!(client = %seat, verb = operation.word(), topic, "not allowed: is acknowledged, and no more");
                }
            }
            Deed::End => return Err(End::Farewell),
        }
        Ok(())
    }
}

/// Why a client is as good as gone: it was `heard` too long ago, if its silence is limited, or has `taken` nothing that is
/// to be written.
fn overdue(now: Instant, heard: Option<(Instant, Duration)>, taken: Instant) -> Option<End> {
    if heard.is_some_and(|(heard, silence)| now.saturating_duration_since(heard) > silence) {
        return Some(End::Lost("silent"));
    }
    (now.saturating_duration_since(taken) > STALLED).then_some(End::Lost("reads nothing"))
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

async fn next(ear: &mut Option<Ear>, session: &Session) -> Result<Bytes, Missed> {
    match ear {
        Some(ear) => ear.next(|said| session.wants(Message::topic_of(said).unwrap_or_default())).await,
        None => std::future::pending().await,
    }
}

/// Writes some of it, or what the stream still holds. Dropping the future loses nothing.
async fn write(writer: &mut WriteHalf<Box<dyn Stream>>, output: &mut BytesMut, unflushed: &mut bool) -> io::Result<()> {
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
        for (heard, taken, expected) in [
            (Some((ago(7), limit)), ago(30), None),
            (Some((ago(8), limit)), ago(0), Some(End::Lost("silent"))),
            (None, ago(30), None),
            (None, ago(31), Some(End::Lost("reads nothing"))),
            (Some((now + limit, limit)), now + limit, None),
        ] {
            assert_eq!(overdue(now, heard, taken), expected);
        }
    }
}
