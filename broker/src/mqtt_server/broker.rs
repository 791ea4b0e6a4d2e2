//! What all connections share: what is said, what is kept, and who is there.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tracing::warn;

use crate::metrics::Metrics;
use crate::mqtt_server::log::{Ear, Mouth, Router};
use crate::mqtt_server::message::Message;
use crate::mqtt_server::quota::{Account, Rarely};
use crate::mqtt_server::retained::{Found, Full, Retained, Snapshot};

/// That there is no room is said once in this time.
const WARN: Duration = Duration::from_secs(60);

/// The bus of the embedded server.
pub struct Bus {
    router: Router,
    /// One lock for both, so that what is kept last was also said last.
    said: Mutex<Said>,
    /// This broker's own connections are behind what is said.
    is_behind: AtomicBool,
    seats: Arc<Mutex<BTreeMap<String, Place>>>,
    began: Instant,
    metrics: Metrics,
}

struct Said {
    mouth: Mouth,
    retained: Retained,
    /// That there is no room was said.
    warned: Rarely,
}

/// A client that is there.
struct Place {
    /// Asks it to go.
    leave: Arc<Notify>,
    /// Closed when it has gone.
    gone: watch::Receiver<()>,
    /// When something came from it last, in nanoseconds since the bus began.
    heard: Arc<AtomicU64>,
}

/// The only connection of a client; when it is dropped, the next one may come.
pub struct Seat {
    client: String,
    seats: Arc<Mutex<BTreeMap<String, Place>>>,
    leave: Arc<Notify>,
    heard: Arc<AtomicU64>,
    began: Instant,
    _gone: watch::Sender<()>,
}

impl Bus {
    /// A bus for so many connections, on which this is kept.
    pub fn open(retained: Retained, connections: usize, metrics: Metrics) -> anyhow::Result<Self> {
        let (router, mouth) = Router::start(connections)?;
        let said = Mutex::new(Said { mouth, retained, warned: Rarely::default() });
        let (seats, is_behind, began) = (Arc::default(), AtomicBool::new(false), Instant::now());
        Ok(Self { router, said, is_behind, seats, began, metrics })
    }

    /// Says a message to all who want it, and keeps it if it is to be kept.
    pub fn say(&self, seat: &Seat, message: &Message) {
        let mut said = self.said.lock();
        said.say(message, seat.user(), &self.metrics);
        self.look_behind(&mut said);
    }

    /// Whether nothing more should be said until this broker's own connections have heard what was. It is theirs all the
    /// same to say something.
    pub fn is_behind(&self) -> bool {
        self.is_behind.load(Ordering::Relaxed) && self.look_behind(&mut self.said.lock())
    }

    fn look_behind(&self, said: &mut Said) -> bool {
        let is_behind = said.mouth.is_behind();
        self.is_behind.store(is_behind, Ordering::Relaxed);
        is_behind
    }

    /// What is kept for `filter` behind the topic `after`, see [`Retained::find`].
    pub fn find(&self, filter: &str, after: Option<&str>, most: (usize, usize)) -> Found {
        self.said.lock().retained.find(filter, after, most)
    }

    /// Hears what is said from now on; this broker's own connections hear all of it.
    pub fn listen(&self, is_own: bool) -> anyhow::Result<Ear> {
        let mut ear = self.router.listen()?;
        if is_own {
            self.said.lock().mouth.accompany(&mut ear);
        }
        Ok(ear)
    }

    /// Gives `client` its seat, if fewer than `room` are taken. If it has one already, that connection is asked to go and
    /// awaited; and if its user has all that it may have, the one that was silent for longest.
    pub async fn enter(&self, client: &str, account: &Account, room: usize) -> Option<Seat> {
        loop {
            let mut gone = {
                let mut seats = self.seats.lock();
                let Some(place) = seats.get(client).or_else(|| too_many(&seats, client, account.seats)) else {
                    if seats.len() >= room {
                        return None;
                    }
                    return Some(self.seat(&mut seats, client));
                };
                place.leave.notify_one();
                place.gone.clone()
            };
            // Nothing is ever sent: it ends with the sender.
            let _ = gone.changed().await;
        }
    }

    fn seat(&self, seats: &mut BTreeMap<String, Place>, client: &str) -> Seat {
        let (leave, (sender, gone)) = (Arc::new(Notify::new()), watch::channel(()));
        let heard = Arc::new(AtomicU64::new(nanos(self.began)));
        seats.insert(client.to_owned(), Place { leave: leave.clone(), gone, heard: heard.clone() });
        self.metrics.mqtt_clients.set(i64::try_from(seats.len()).unwrap_or(i64::MAX));
        let (client, seats, began) = (client.to_owned(), self.seats.clone(), self.began);
        Seat { client, seats, leave, heard, began, _gone: sender }
    }

    /// What is to be said when the connection in this seat is lost.
    pub fn promise(&self, seat: &Seat, will: Message) {
        self.said.lock().retained.promise(&seat.client, will);
    }

    /// The connection has ended: says its will if it is due, and ends what it listened with.
    pub async fn leave(&self, seat: Seat, will_is_due: bool, ear: Option<Ear>) {
        self.settle(&seat, will_is_due);
        if let Some(ear) = ear {
            self.router.close(ear).await;
        }
        drop(seat);
        self.metrics.mqtt_clients.set(i64::try_from(self.seats.lock().len()).unwrap_or(i64::MAX));
    }

    /// In one go, lest the disk should have neither the promise nor the will.
    fn settle(&self, seat: &Seat, will_is_due: bool) {
        let mut said = self.said.lock();
        if let Some(will) = said.retained.release(&seat.client).filter(|_| will_is_due) {
            said.say(&will, seat.user(), &self.metrics);
            self.look_behind(&mut said);
        }
    }

    /// What is to be written to disk.
    pub fn snapshot(&self) -> Snapshot {
        self.said.lock().retained.snapshot()
    }

    /// It could not be written.
    pub fn give_back(&self, unwritten: Snapshot) {
        self.said.lock().retained.give_back(unwritten);
    }

    /// The file was lost: everything is to be written.
    pub fn begin_anew(&self) {
        self.said.lock().retained.begin_anew();
    }
}

impl Said {
    fn say(&mut self, message: &Message, by: Option<&str>, metrics: &Metrics) {
        if message.retain {
            let kept = self.retained.keep(message, by);
            metrics.mqtt_retained.set(i64::try_from(self.retained.len()).unwrap_or(i64::MAX));
            if let Err(Full) = kept {
                metrics.mqtt_retained_refused.inc();
                if self.warned.is_due(WARN) {
                    warn!(user = by, "too many retained messages: more are not kept");
                }
            }
        }
        self.mouth.say(&message.encode());
    }
}

/// Of the seats of `client`'s user the one from which nothing came for longest, if there are `most` of them.
fn too_many<'a>(seats: &'a BTreeMap<String, Place>, client: &str, most: usize) -> Option<&'a Place> {
    if seats.len() < most {
        return None;
    }
    let user = client.split_inclusive('\n').next().unwrap_or_default();
    let of_user = seats.range(user.to_owned()..).take_while(|(name, _)| name.starts_with(user)).map(|(_, place)| place);
    let (count, longest) = of_user.fold((0, None), |(count, longest): (usize, Option<&Place>), place| {
        let is_longer = longest.is_none_or(|longest| place.heard() < longest.heard());
        (count + 1, if is_longer { Some(place) } else { longest })
    });
    longest.filter(|_| count >= most)
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Place {
    fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }
}

impl Seat {
    /// Something came from who has it.
    pub fn touch(&self) {
        self.heard.store(nanos(self.began), Ordering::Relaxed);
    }

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
        self.seats.lock().remove(&self.client);
    }
}
