//! The state that all connections share: the log, the retained messages with the wills, and which clients are
//! connected.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tracing::warn;

use crate::metrics::set;
use crate::mqtt_server::client_problems::ClientProblems;
use crate::mqtt_server::log::{Log, LogPosition, LogReader, LogWriter};
use crate::mqtt_server::message::PublishedMessage;
use crate::mqtt_server::metrics::Metrics;
use crate::mqtt_server::quota::{Account, LogThrottle};
use crate::mqtt_server::retained::{RetainedFull, RetainedMessages, RetainedPage, Unwritten};
use crate::mqtt_server::takeovers::client_id;

/// The shortest time between two warnings that there is no room.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);
/// How far the last reader may be behind for a user that publishes much at once to go on; it is less than for the
/// others, so that they need not wait for its messages.
const LAG_OF_BURST_MAX: u64 = 4 << 20;
/// The same for every client.
const LAG_MAX: u64 = 8 << 20;
/// The same for this broker itself, and for the readers of clients only: it reads its own messages after that.
const LAG_OF_OWN_MAX: u64 = 12 << 20;
/// How often to check whether a will can be published.
const WILL_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The state of the embedded server. Every connection has a part in it by its [`ClientSlot`].
pub struct MessageBroker {
    log: Log,
    /// One lock for both, so that the message retained last on a topic was also published last.
    shared: Mutex<BrokerState>,
    clients: Arc<Mutex<BTreeMap<String, ConnectedClient>>>,
    /// The clients that it had trouble with.
    pub problems: ClientProblems,
    began: Instant,
    metrics: Metrics,
}

struct BrokerState {
    writer: LogWriter,
    retained: RetainedMessages,
    /// When the warning that there is no room was logged.
    warned: LogThrottle,
}

/// A client that is connected.
struct ConnectedClient {
    /// Asks its connection to end.
    takeover: Arc<Notify>,
    /// Closed when it has ended.
    gone: watch::Receiver<()>,
    /// When data was last received from it, in nanoseconds since the server started.
    last_read: Arc<AtomicU64>,
}

/// The only connection of a client; when it is dropped, the next one may be registered.
pub struct ClientSlot {
    client: String,
    clients: Arc<Mutex<BTreeMap<String, ConnectedClient>>>,
    takeover: Arc<Notify>,
    last_read: Arc<AtomicU64>,
    began: Instant,
    _gone: watch::Sender<()>,
}

impl MessageBroker {
    /// A broker for so many connections, with these retained messages.
    pub fn open(retained: RetainedMessages, connections: usize, metrics: Metrics) -> anyhow::Result<Self> {
        let (log, writer) = Log::start(connections)?;
        let shared = Mutex::new(BrokerState { writer, retained, warned: LogThrottle::default() });
        Ok(Self {
            log,
            shared,
            clients: Arc::default(),
            problems: ClientProblems::default(),
            began: Instant::now(),
            metrics,
        })
    }

    /// Publishes a message to all subscribers, and retains it if it is to be retained.
    pub fn publish(&self, slot: &ClientSlot, message: &PublishedMessage) {
        self.shared.lock().publish(message, slot.user(), &self.metrics);
    }

    /// Whether a client has to wait before it publishes, until others have read the published messages.
    pub fn must_wait(&self, account: &Account) -> bool {
        if account.is_own {
            return self.log.lag_of_clients() > LAG_OF_OWN_MAX;
        }
        let lag = self.log.lag();
        lag > LAG_MAX || (lag > LAG_OF_BURST_MAX && account.is_bursting(Instant::now().into()))
    }

    /// The retained messages of `filter` behind the topic `after`, see [`RetainedMessages::find`].
    pub fn find(&self, filter: &str, after: Option<&str>, most: (usize, usize)) -> RetainedPage {
        self.shared.lock().retained.find(filter, after, most)
    }

    /// The position of the log behind all that was published.
    pub fn log_end(&self) -> LogPosition {
        self.log.end()
    }

    /// A reader of messages published from now on, for this broker itself or a client.
    pub fn subscribe(&self, is_own: bool) -> anyhow::Result<LogReader> {
        self.log.subscribe(is_own)
    }

    /// Returns when the log has ended, without which nothing is delivered.
    pub async fn log_ended(&self) {
        self.log.ended().await;
    }

    /// Gives `client` a slot, if fewer than `room` are taken. If it has one already, that connection is asked to end, and
    /// awaited; if its user has all slots of its account, the connection of that user that has been silent for longest.
    pub async fn register(&self, client: &str, account: &Account, room: usize) -> Option<ClientSlot> {
        if self.clients.lock().contains_key(client) {
            self.on_takeover(client);
        }
        loop {
            let mut gone = {
                let mut clients = self.clients.lock();
                let Some(connected) =
                    clients.get(client).or_else(|| longest_silent(&clients, client, account.max_clients))
                else {
                    if clients.len() >= room {
                        return None;
                    }
                    return Some(self.slot(&mut clients, client));
                };
                connected.takeover.notify_one();
                connected.gone.clone()
            };
            // Nothing is ever sent: it ends with the sender.
            let _ = gone.changed().await;
        }
    }

    fn on_takeover(&self, client: &str) {
        self.metrics.takeovers.inc();
        if self.problems.on_takeover(client, Instant::now()) {
            warn!(
                client = client_id(client),
                "two programs use this name as their client id: each ends the other's connection"
            );
        }
    }

    fn slot(&self, clients: &mut BTreeMap<String, ConnectedClient>, client: &str) -> ClientSlot {
        let (takeover, (sender, gone)) = (Arc::new(Notify::new()), watch::channel(()));
        let last_read = Arc::new(AtomicU64::new(nanos(self.began)));
        clients.insert(
            client.to_owned(),
            ConnectedClient { takeover: takeover.clone(), gone, last_read: last_read.clone() },
        );
        set(&self.metrics.clients, clients.len());
        let (client, clients, began) = (client.to_owned(), self.clients.clone(), self.began);
        ClientSlot { client, clients, takeover, last_read, began, _gone: sender }
    }

    /// The message to be published when the connection in this slot is lost.
    pub fn set_will(&self, slot: &ClientSlot, will: PublishedMessage) {
        self.shared.lock().retained.set_will(&slot.client, will);
    }

    /// The connection has ended: publishes its will if it is due, and closes its reader.
    pub async fn unregister(&self, slot: ClientSlot, will_is_due: bool, mut reader: Option<LogReader>) {
        if let Some(reader) = &mut reader {
            reader.leave();
        }
        while will_is_due && self.log.lag() > LAG_MAX {
            sleep(WILL_RETRY_INTERVAL).await;
        }
        self.publish_will(&slot, will_is_due);
        if let Some(reader) = reader {
            self.log.close(reader).await;
        }
        drop(slot);
        set(&self.metrics.clients, self.clients.lock().len());
    }

    /// Under one lock, lest the disk should have neither the will nor the message that it becomes.
    fn publish_will(&self, slot: &ClientSlot, will_is_due: bool) {
        let mut shared = self.shared.lock();
        if let Some(will) = shared.retained.clear_will(&slot.client).filter(|_| will_is_due) {
            shared.publish(&will, slot.user(), &self.metrics);
        }
    }

    /// Takes the changes to be written to disk.
    pub fn take_unwritten(&self) -> Unwritten {
        self.shared.lock().retained.take_unwritten()
    }

    /// Takes back changes that could not be written.
    pub fn requeue(&self, unwritten: Unwritten) {
        self.shared.lock().retained.requeue(unwritten);
    }

    /// The file was lost: everything is to be written.
    pub fn require_full_write(&self) {
        self.shared.lock().retained.require_full_write();
    }
}

#[cfg(test)]
impl MessageBroker {
    /// Ends the log.
    pub(super) async fn break_log(&self) {
        self.log.break_router().await;
    }
}

impl BrokerState {
    fn publish(&mut self, message: &PublishedMessage, by: Option<&str>, metrics: &Metrics) {
        if message.retain {
            let kept = self.retained.store(message, by);
            set(&metrics.retained, self.retained.len());
            if let Err(RetainedFull) = kept {
                metrics.retained_refused.inc();
                if self.warned.is_due(WARNING_INTERVAL) {
                    warn!(user = by, "too many retained messages: more are not kept");
                }
            }
        }
        self.writer.publish(&message.encode());
    }
}

/// The client of `client`'s user from which no data was received for the longest time, if the user has `most` clients.
fn longest_silent<'a>(
    clients: &'a BTreeMap<String, ConnectedClient>,
    client: &str,
    most: usize,
) -> Option<&'a ConnectedClient> {
    if clients.len() < most {
        return None;
    }
    let user = client.split_inclusive('\n').next().unwrap_or_default();
    let of_user =
        clients.range(user.to_owned()..).take_while(|(name, _)| name.starts_with(user)).map(|(_, connected)| connected);
    let (count, longest) = of_user.fold((0, None), |(count, longest): (usize, Option<&ConnectedClient>), connected| {
        let is_longer = longest.is_none_or(|longest| connected.last_read() < longest.last_read());
        (count + 1, if is_longer { Some(connected) } else { longest })
    });
    longest.filter(|_| count >= most)
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl ConnectedClient {
    fn last_read(&self) -> u64 {
        self.last_read.load(Ordering::Relaxed)
    }
}

impl ClientSlot {
    /// Data was received from the client.
    pub fn note_activity(&self) {
        self.last_read.store(nanos(self.began), Ordering::Relaxed);
    }

    /// The client's user; none where there are no users.
    fn user(&self) -> Option<&str> {
        self.client.split('\n').next().filter(|user| !user.is_empty())
    }

    /// Returns when another connection wants the slot.
    pub async fn takeover(&self) {
        self.takeover.notified().await;
    }
}

impl fmt::Display for ClientSlot {
    /// User and client id.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.client.replace('\n', "/"))
    }
}

impl Drop for ClientSlot {
    fn drop(&mut self) {
        self.clients.lock().remove(&self.client);
    }
}
