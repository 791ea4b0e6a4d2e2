//! One client that was let in: packets between its socket and its [`Session`], until one of both ends it.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rumqttc::{Packet, mqttbytes};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tracing::warn;

use super::admit::Stream;
use super::bus::{Bus, Seat};
use super::message::Message;
use super::router::{Ear, Missed};
use super::session::{Deed, Session};
use crate::metrics::Metrics;

/// The largest packet. The longest of the bus, 2,000 confirmations, has 100 kB.
const PACKET_MAX: usize = 1 << 20;
/// What waits to be written is not added to beyond this.
const OUTPUT: usize = 64 << 10;
/// How much is read at once.
const INPUT: usize = 4 << 10;
/// A client that takes nothing for so long is gone.
const STALLED: Duration = Duration::from_secs(30);
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
    silence: Option<Duration>,
    heard: Instant,
    taken: Instant,
}

impl Connection {
    /// The connection of a client that sent `input` behind its CONNECT and is to get `output` first.
    pub fn new(
        stream: Box<dyn Stream>,
        (input, output): (BytesMut, BytesMut),
        session: Session,
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
            silence,
            heard: now,
            taken: now,
        }
    }

    /// Runs until the end. What it listened with is the caller's to close.
    pub async fn run(mut self, seat: &Seat) -> (End, Option<Ear>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let went_on = match self.work_off(seat) {
                Ok(()) => self.wait(seat, &mut tick).await,
                Err(end) => Err(end),
            };
            if let Err(end) = went_on {
                return (end, self.ear);
            }
        }
    }

    /// Waits for one thing to happen. What is to be sent is written last: together.
    async fn wait(&mut self, seat: &Seat, tick: &mut Interval) -> Result<(), End> {
        let has_place = self.output.len() < OUTPUT;
        let may_hear = has_place && self.session.backlog().is_none() && self.session.room() > 0;
        let has_written = !self.output.is_empty() || self.unflushed;
        self.make_room();
        tokio::select! {
            biased;
            () = seat.wanted() => return Err(End::Lost("taken over")),
            now = tick.tick() => {
                if !has_written {
                    self.taken = now;
                }
                overdue(now, self.silence.map(|silence| (self.heard, silence)), self.taken).map_or(Ok(()), Err)?;
            }
            said = next(&mut self.ear, &self.session), if may_hear => match said.map(|said| Message::decode(&said)) {
                Ok(Some(message)) => self.session.deliver(message, &mut self.output),
                Ok(None) => {}
                // When it is back it hears what is kept, and asks for what is not.
                Err(Missed) => return Err(End::Lost("too slow")),
            },
            read = self.reader.read_buf(&mut self.input), if has_place => match read {
                Ok(0) => return Err(End::Lost("closed")),
                Ok(_) => self.heard = Instant::now(),
                Err(_) => return Err(End::Lost("connection lost")),
            },
            written = write(&mut self.writer, &mut self.output, &mut self.unflushed), if has_written => match written {
                Ok(()) => self.taken = Instant::now(),
                Err(_) => return Err(End::Lost("connection lost")),
            },
        }
        Ok(())
    }

    /// Makes room to read, and gives back what large packets took.
    fn make_room(&mut self) {
        for buffer in [&mut self.input, &mut self.output] {
            if buffer.is_empty() && buffer.capacity() > OUTPUT {
                *buffer = BytesMut::new();
            }
        }
        self.input.reserve(INPUT);
    }

    /// Takes the packets that have come, and sends what is kept, as far as there is place for it.
    fn work_off(&mut self, seat: &Seat) -> Result<(), End> {
        loop {
            match Packet::read(&mut self.input, PACKET_MAX) {
                Ok(packet) => {
                    let deeds = self.session.take(packet, &mut self.output);
                    for deed in deeds.map_err(|violation| End::Lost(violation.0))? {
                        self.do_it(deed, seat)?;
                    }
                }
                Err(mqttbytes::Error::InsufficientBytes(_)) => break,
                Err(mqttbytes::Error::PayloadSizeLimitExceeded(_)) => return Err(End::Lost("too large a packet")),
                Err(_) => return Err(End::Lost("speaks no MQTT 3.1.1")),
            }
        }
        while let Some(backlog) = self.session.backlog()
            && let Some(place) = OUTPUT.checked_sub(self.output.len())
            && self.session.room() > 0
        {
            let most = (self.session.room(), place);
            let (messages, after) = self.bus.find(&backlog.filter, backlog.after.as_deref(), most);
            for message in messages {
                self.session.deliver(message, &mut self.output);
            }
            self.session.went_on(after);
        }
        Ok(())
    }

    fn do_it(&mut self, deed: Deed, seat: &Seat) -> Result<(), End> {
        match deed {
            Deed::Say(message) => self.bus.say(seat, &message),
            Deed::Listen if self.ear.is_none() => {
                self.ear = Some(self.bus.listen().map_err(|_| End::Lost("no place to listen"))?);
            }
            Deed::Listen => {}
            Deed::Forbid { verb, topic, is_first } => {
                self.metrics.mqtt_forbidden.with_label_values(&[verb.word()]).inc();
                if is_first {
                    let topic: String = topic.chars().take(TOPIC_SHOWN).collect();
                    warn!(client = %seat, verb = verb.word(), topic, "not allowed: is acknowledged, and no more");
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

async fn next(ear: &mut Option<Ear>, session: &Session) -> Result<Bytes, Missed> {
    match ear {
        Some(ear) => ear.next(|said| session.wants(Message::topic_of(said).unwrap_or_default())).await,
        None => std::future::pending().await,
    }
}

/// Writes some of it, or what the stream still holds. Dropping the future loses nothing.
async fn write(
    writer: &mut WriteHalf<Box<dyn Stream>>,
    output: &mut BytesMut,
    unflushed: &mut bool,
) -> std::io::Result<()> {
    if output.is_empty() {
        writer.flush().await?;
        *unflushed = false;
        return Ok(());
    }
    let written = writer.write_buf(output).await?;
    *unflushed = true;
    if written == 0 { Err(std::io::ErrorKind::WriteZero.into()) } else { Ok(()) }
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
