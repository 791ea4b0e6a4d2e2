//! The handle of the [`ListService`](super::ListService), and the notifications that it sends.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::BrokerName;
use crate::access_lists::records::{Record, RecordsFull, RefusedRecords};
use crate::access_lists::{Admission, Entry};
use crate::wire::message::{Hello, Requester};

/// Queued commands at most. Brokers publish their records again, so further commands are dropped.
pub const COMMANDS_MAX: usize = 1024;

/// The current state of the lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListSnapshot {
    /// Which keys are admitted.
    pub admission: Arc<Admission>,
    /// The digest of the records, equal in all programs with the same ones.
    pub digest: String,
    /// The lists that cannot be read now, of [`SOURCES`](crate::access_lists::files::SOURCES).
    pub damaged: Vec<&'static str>,
    /// The sources of allowed keys that could not be read since the start.
    pub unread: Vec<&'static str>,
    /// Whether all records are on the disk, or about to be.
    pub is_kept: bool,
}

/// A change of the lists, for the rest of the program.
#[derive(Debug)]
pub struct ListUpdate<'a> {
    /// Which keys are admitted now.
    pub admission: &'a Arc<Admission>,
    /// Records that were made, or received for the first time.
    pub records: &'a [Record],
    /// The lists that cannot be read, of [`SOURCES`](crate::access_lists::files::SOURCES).
    pub damaged: &'a [&'static str],
    /// Whether all records are on the disk, or about to be.
    pub is_kept: bool,
    /// Records of other programs that were rejected since the start; up to a minute behind.
    pub refused: RefusedRecords,
}

/// A message or state change of the sessions that concerns the lists.
#[derive(Debug)]
pub enum ListEvent {
    /// Connected: messages published from now on are received, and retained ones.
    Up,
    /// Not connected.
    Down,
    /// Whether the program's other session is connected, so that this one probably can connect, too.
    ServerReachable(bool),
    /// The hello of a broker; none if it is cleared.
    Broker(BrokerName, Option<Box<Hello>>),
    /// Records of another program.
    Records(Vec<Record>),
    /// A request for all records.
    Asked(Requester),
}

/// A record that was made.
#[derive(Debug)]
pub struct Changed {
    /// The record, for everybody else.
    pub record: Record,
    /// Whether the key was on the list by another record.
    pub was_present: bool,
    /// Resolves when it is on the disk; an error if it cannot be written now.
    pub persisted: oneshot::Receiver<()>,
}

/// An entry as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedEntry {
    /// The entry.
    #[serde(flatten)]
    pub entry: Entry,
    /// The key of the config that names its source; `admin` for an admin call.
    pub source: &'static str,
    /// When the admin call was, in seconds of Unix time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
}

/// The [`ListedEntry::source`] of entries that were made by an admin call.
pub const BY_CALL: &str = "admin";

/// A command to the service.
#[derive(Debug)]
pub enum ListCommand {
    /// Puts the key of an entry on its list, or takes it off.
    Change { entry: Entry, present: bool, answer: oneshot::Sender<Result<Changed, RecordsFull>> },
    /// Requests every entry in effect.
    List(oneshot::Sender<Vec<ListedEntry>>),
    /// An event of the sessions.
    Event(ListEvent),
}

/// The handle of the [`ListService`].
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<ListCommand>,
    snapshot: watch::Receiver<ListSnapshot>,
    gate: Arc<watch::Sender<Option<Instant>>>,
}

/// A handle, which gives access to `snapshot`, and the receiver of its commands.
pub fn channel(
    snapshot: watch::Receiver<ListSnapshot>,
    gate: Arc<watch::Sender<Option<Instant>>>,
) -> (Handle, mpsc::Receiver<ListCommand>) {
    let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
    (Handle { commands, snapshot, gate }, receiver)
}

impl Handle {
    /// Passes on an event, without waiting.
    pub fn on_event(&self, event: ListEvent) {
        // Dropped records and hellos are published again.
        let _ = self.commands.try_send(ListCommand::Event(event));
    }

    /// Closes the gate: keys wait from now on, until the records of the brokers are known.
    pub fn close_gate(&self) {
        self.gate.send_replace(Some(Instant::now()));
    }

    /// Since when the gate is closed; none if it is open.
    #[must_use]
    pub fn gate(&self) -> watch::Receiver<Option<Instant>> {
        self.gate.subscribe()
    }

    /// The state of the lists, now and whenever it changes.
    #[must_use]
    pub fn snapshot(&self) -> watch::Receiver<ListSnapshot> {
        self.snapshot.clone()
    }

    /// Which keys are admitted now.
    #[must_use]
    pub fn admission(&self) -> Arc<Admission> {
        self.snapshot.borrow().admission.clone()
    }

    /// Puts the key of an entry on its list, or takes it off; none when the program ends.
    pub async fn change(&self, entry: Entry, present: bool) -> Option<Result<Changed, RecordsFull>> {
        let (sender, answer) = oneshot::channel();
        self.commands.send(ListCommand::Change { entry, present, answer: sender }).await.ok()?;
        answer.await.ok()
    }

    /// Every entry that is in effect.
    pub async fn list(&self) -> Vec<ListedEntry> {
        let (sender, answer) = oneshot::channel();
        let _ = self.commands.send(ListCommand::List(sender)).await;
        answer.await.unwrap_or_default()
    }
}
