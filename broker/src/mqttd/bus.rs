//! What all connections share: what is said, what is kept, and who is there.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tracing::warn;

use super::message::Message;
use super::retained::{Full, Retained, Snapshot};
use super::router::{Ear, Mouth, Router};
use crate::lock;
use crate::metrics::Metrics;

/// That there is no room is said once in this time.
const WARN: Duration = Duration::from_secs(60);

/// The bus of the embedded server.
pub struct Bus {
    router: Router,
    /// One lock for both, so that what is kept last was also said last.
    said: Mutex<Said>,
    seats: Arc<Mutex<BTreeMap<String, Place>>>,
    metrics: Metrics,
}

struct Said {
    mouth: Mouth,
    retained: Retained,
    /// When it was said last that there is no room.
    warned: Option<Instant>,
}

/// A client that is there.
struct Place {
    /// Asks it to go.
    leave: Arc<Notify>,
    /// Closed when it has gone.
    gone: watch::Receiver<()>,
}

/// The only connection of a client; when it is dropped, the next one may come.
pub struct Seat {
    client: String,
    seats: Arc<Mutex<BTreeMap<String, Place>>>,
    leave: Arc<Notify>,
    _gone: watch::Sender<()>,
}

impl Bus {
    /// A bus for so many connections, on which this is kept.
    pub fn open(retained: Retained, connections: usize, metrics: Metrics) -> anyhow::Result<Self> {
        let (router, mouth) = Router::start(connections)?;
        let said = Mutex::new(Said { mouth, retained, warned: None });
        Ok(Self { router, said, seats: Arc::default(), metrics })
    }

    /// Says a message to all who want it, and keeps it if it is to be kept.
    pub fn say(&self, seat: &Seat, message: &Message) {
        lock(&self.said).say(message, seat.user(), &self.metrics);
    }

    /// What is kept for `filter` behind the topic `after`, see [`Retained::find`].
    pub fn find(&self, filter: &str, after: Option<&str>, most: (usize, usize)) -> (Vec<Message>, Option<String>) {
        lock(&self.said).retained.find(filter, after, most)
    }

    /// Hears what is said from now on.
    pub fn listen(&self) -> anyhow::Result<Ear> {
        self.router.listen()
    }

    /// Gives `client` its seat, if fewer than `room` are taken. If it has one already, that connection is asked to go and
    /// awaited.
    pub async fn enter(&self, client: &str, room: usize) -> Option<Seat> {
        loop {
            let mut gone = {
                let mut seats = lock(&self.seats);
                let Some(place) = seats.get(client) else {
                    if seats.len() >= room {
                        return None;
                    }
                    let (leave, (sender, gone)) = (Arc::new(Notify::new()), watch::channel(()));
                    seats.insert(client.to_owned(), Place { leave: leave.clone(), gone });
                    self.metrics.mqtt_clients.set(i64::try_from(seats.len()).unwrap_or(i64::MAX));
                    let seats = self.seats.clone();
                    return Some(Seat { client: client.to_owned(), seats, leave, _gone: sender });
                };
                place.leave.notify_one();
                place.gone.clone()
            };
            // Nothing is ever sent: it ends with the sender.
            let _ = gone.changed().await;
        }
    }

    /// What is to be said when the connection in this seat is lost.
    pub fn promise(&self, seat: &Seat, will: Message) {
        lock(&self.said).retained.promise(&seat.client, will);
    }

    /// The connection has ended: says its will if it is due, and ends what it listened with.
    pub async fn leave(&self, seat: Seat, will_is_due: bool, ear: Option<Ear>) {
        self.settle(&seat, will_is_due);
        if let Some(ear) = ear {
            self.router.close(ear).await;
        }
        drop(seat);
        self.metrics.mqtt_clients.set(i64::try_from(lock(&self.seats).len()).unwrap_or(i64::MAX));
    }

    /// In one go, lest the disk should have neither the promise nor the will.
    fn settle(&self, seat: &Seat, will_is_due: bool) {
        let mut said = lock(&self.said);
        if let Some(will) = said.retained.release(&seat.client).filter(|_| will_is_due) {
            said.say(&will, seat.user(), &self.metrics);
        }
    }

    /// What is to be written to disk.
    pub fn snapshot(&self) -> Snapshot {
        lock(&self.said).retained.snapshot()
    }

    /// It could not be written.
    pub fn give_back(&self, unwritten: Snapshot) {
        lock(&self.said).retained.give_back(unwritten);
    }

    /// The file was lost: everything is to be written.
    pub fn begin_anew(&self) {
        lock(&self.said).retained.begin_anew();
    }
}

impl Said {
    fn say(&mut self, message: &Message, by: Option<&str>, metrics: &Metrics) {
        if message.retain {
            let kept = self.retained.keep(message, by);
            metrics.mqtt_retained.set(i64::try_from(self.retained.len()).unwrap_or(i64::MAX));
            if let Err(Full) = kept {
                metrics.mqtt_retained_refused.inc();
                if self.warned.is_none_or(|warned| warned.elapsed() >= WARN) {
                    self.warned = Some(Instant::now());
                    warn!(user = by, "too many retained messages: more are not kept");
                }
            }
        }
        self.mouth.say(&message.encode());
    }
}

impl Seat {
    /// The user who has it; none where there are no users.
    fn user(&self) -> Option<&str> {
        self.client.split('\n').next().filter(|user| !user.is_empty())
    }

    /// Returns when another connection wants the seat.
    pub async fn wanted(&self) {
        self.leave.notified().await;
    }
}

impl fmt::Display for Seat {
    /// User and client id.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.client.replace('\n', "/"))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.seats).remove(&self.client);
    }
}
