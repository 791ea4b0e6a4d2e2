//! How the rest of a program reaches the [`ListService`](super::ListService), and what that notifies it of.

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::BrokerName;
use crate::access_lists::records::{Record, RecordsFull, Refused};
use crate::access_lists::{Admission, Entry};
use crate::wire::message::{Hello, Requester};

/// Commands that wait at most. What brokers publish they publish again, so one too many is dropped.
pub const COMMANDS: usize = 1024;

/// What the lists are now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListSnapshot {
    /// Which keys are admitted.
    pub admission: Arc<Admission>,
    /// The same for all programs with the same records.
    pub digest: String,
    /// The lists that cannot be read now, of [`SOURCES`](crate::access_lists::files::SOURCES).
    pub damaged: Vec<&'static str>,
    /// Those of allowed keys that could not be read since the start.
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
    /// The lists that are damaged, of [`SOURCES`](crate::access_lists::files::SOURCES).
    pub damaged: &'a [&'static str],
    /// Whether all records are on the disk, or about to be.
    pub is_kept: bool,
    /// Records of others that were not taken in since the start; up to a minute behind.
    pub refused: Refused,
}

/// What the sessions receive that concerns the lists.
#[derive(Debug)]
pub enum ListEvent {
    /// Connected: everything that is published from now on is received, and what is retained.
    Up,
    /// Not connected.
    Down,
    /// The program's other session is connected or not, so that this one will be or will not.
    ServerReachable(bool),
    /// What a broker can do; none if it goes.
    Broker(BrokerName, Option<Box<Hello>>),
    /// Records that somebody made.
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
    /// Comes when it is on the disk; an error if it cannot be written now.
    pub persisted: oneshot::Receiver<()>,
}

/// An entry as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedEntry {
    /// The entry.
    #[serde(flatten)]
    pub entry: Entry,
    /// The key of the config that it comes by; `admin` for an admin call.
    pub source: &'static str,
    /// When the admin call was, in seconds of Unix time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
}

/// The [`ListedEntry::source`] of entries that were made by an admin call.
pub const BY_CALL: &str = "admin";

/// What others hand over to the service.
#[derive(Debug)]
pub enum ListCommand {
    /// Puts the key of an entry on its list, or takes it off.
    Change { entry: Entry, present: bool, answer: oneshot::Sender<Result<Changed, RecordsFull>> },
    /// Asks for every entry that counts now.
    List(oneshot::Sender<Vec<ListedEntry>>),
    /// Something was received.
    Event(ListEvent),
}

/// How the rest of the program reaches the [`ListService`].
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<ListCommand>,
    snapshot: watch::Receiver<ListSnapshot>,
    gate: Arc<watch::Sender<Option<Instant>>>,
}

/// A handle by which `snapshot` is read, and the commands that come by it.
pub fn channel(
    snapshot: watch::Receiver<ListSnapshot>,
    gate: Arc<watch::Sender<Option<Instant>>>,
) -> (Handle, mpsc::Receiver<ListCommand>) {
    let (commands, receiver) = mpsc::channel(COMMANDS);
    (Handle { commands, snapshot, gate }, receiver)
}

impl Handle {
    /// Passes on what was received, without waiting.
    pub fn on_event(&self, event: ListEvent) {
        // What finds no place is published again.
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

    /// What the lists are, now and whenever they change.
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

    /// Every entry that counts now.
    pub async fn list(&self) -> Vec<ListedEntry> {
        let (sender, answer) = oneshot::channel();
        let _ = self.commands.send(ListCommand::List(sender)).await;
        answer.await.unwrap_or_default()
    }
}
