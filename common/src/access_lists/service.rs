//! The task that owns the lists of a program: it reads their files, merges and writes the records that brokers share, and
//! notifies the program of each change. Everything else has a [`Handle`].

use std::future::pending;
use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::access_lists::anti_entropy::{AntiEntropy, TimedOut};
use crate::access_lists::files::Files;
use crate::access_lists::records::{Full, Merged, Record, Records, Refused};
use crate::access_lists::records_file::{RecordsWriter, Written};
use crate::access_lists::{Admission, Entry, List, unix};
use crate::mqtt::{Message, MqttHandle};
use crate::storage::StorageError;
use crate::wire::message::{Hello, Participant, RecordsRequest};
use crate::{BrokerName, Config, Topic};

/// Commands that wait at most. What brokers publish they publish again, so one too many is dropped.
const COMMANDS: usize = 1024;
/// Records in one message at most: some 100 kB of JSON, and never more than 500.
pub const PER_MESSAGE: usize = 500;
/// How often it checks whether something is due: an entry that ends, a request that is to be sent again.
const POLL: Duration = Duration::from_secs(1);
/// The same while the gate is closed.
const POLL_CLOSED: Duration = Duration::from_millis(20);
/// The files are looked at no more often than this.
const REFRESH_MIN: Duration = Duration::from_millis(100);
/// What changed is looked at again after this time, or after that between two looks if it is shorter.
const SETTLE: Duration = Duration::from_secs(1);
/// How often it is logged at most that records are refused.
const LOG_REFUSED: Duration = Duration::from_secs(60);

/// What the lists are now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListSnapshot {
    /// What they say.
    pub admission: Arc<Admission>,
    /// The same for everybody who has the same records.
    pub digest: String,
}

/// A change of the lists, for the rest of the program.
#[derive(Debug)]
pub struct ListUpdate<'a> {
    /// What the lists say now.
    pub admission: &'a Arc<Admission>,
    /// Records that were made, or heard for the first time.
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
    /// What a broker can do; none if it goes.
    Broker(BrokerName, Option<Hello>),
    /// Records that somebody made.
    Records(Vec<Record>),
    /// A request for all records.
    Asked,
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

/// What [`ListedEntry::source`] says of entries that were made by an admin call.
pub const BY_CALL: &str = "admin";

#[derive(Debug)]
enum Command {
    Change(Entry, bool, oneshot::Sender<Result<Changed, Full>>),
    List(oneshot::Sender<Vec<ListedEntry>>),
    Event(ListEvent),
}

/// How the rest of the program reaches the [`ListService`].
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<ListSnapshot>,
    held: Arc<watch::Sender<Option<Instant>>>,
}

/// Owns the lists of a program.
pub struct ListService {
    own: Participant,
    files: Files,
    refresh: Duration,
    records: Records,
    anti_entropy: AntiEntropy,
    commands: mpsc::Receiver<Command>,
    view: watch::Sender<ListSnapshot>,
    held: Arc<watch::Sender<Option<Instant>>>,
    /// Records that the rest of the program has not been told of.
    news: Vec<Record>,
    /// Something is not as the view says.
    is_stale: bool,
    writer: RecordsWriter,
    refused: Refused,
    /// What was last said of that, and when.
    logged_refused: (Refused, Option<Instant>),
}

impl ListService {
    /// Reads the lists that `config` names, and the records that the last run of the program, `own`, kept.
    pub fn open(config: &Config, own: Participant) -> Result<(Self, Handle), StorageError> {
        let program = if matches!(own, Participant::Broker(_)) { "broker" } else { "worker" };
        let file = config.state_dir.join(format!("{program}.lists.json"));
        let now = unix(SystemTime::now());
        let mut files = Files::new(&config.key_lists);
        files.read(true);
        let (writer, restored) = RecordsWriter::open(file)?;
        let records = Records::restored(restored, now);
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (view, viewed) = watch::channel(snapshot(&files, &records, now));
        let held = Arc::new(watch::channel(None).0);
        let own_broker = if let Participant::Broker(name) = &own { Some(name.clone()) } else { None };
        let anti_entropy = AntiEntropy::new(own_broker);
        let keeper = Self {
            own,
            files,
            refresh: config.key_lists.refresh.max(REFRESH_MIN),
            records,
            anti_entropy,
            commands,
            view,
            held: held.clone(),
            news: Vec::new(),
            is_stale: true,
            writer,
            refused: Refused::default(),
            logged_refused: (Refused::default(), None),
        };
        Ok((keeper, Handle { commands: sender, view: viewed, held }))
    }

    /// Works until `stop` returns; requests and answers on `bus`, and notifies of each change.
    pub async fn run(
        mut self,
        bus: MqttHandle,
        mut notify: impl FnMut(ListUpdate<'_>),
        stop: impl Future<Output = ()>,
    ) {
        let mut stop = pin!(stop);
        let mut hangup = signal(SignalKind::hangup()).ok();
        let mut reading: Option<JoinHandle<Files>> = None;
        let mut read_at = Instant::now() + self.pause();
        let (mut held, mut is_hurried) = (self.held.subscribe(), false);
        loop {
            self.settle(&bus, &mut notify);
            if reading.is_none() && (is_hurried || read_at <= Instant::now()) {
                reading = Some(self.read_files(mem::take(&mut is_hurried)));
            }
            let poll = if self.held.borrow().is_some() { POLL_CLOSED } else { POLL.min(self.refresh) };
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.apply_all(command),
                    None => break,
                },
                files = done(&mut reading) => {
                    self.take_files(files);
                    (reading, read_at) = (None, Instant::now() + self.pause());
                }
                written = self.writer.done() => self.written(written),
                () = hung_up(&mut hangup) => is_hurried = true,
                _ = held.changed() => {}
                () = sleep(poll) => {}
                () = &mut stop => break,
            }
        }
        self.write_last().await;
    }

    /// How long until the files are looked at again.
    fn pause(&self) -> Duration {
        if self.files.is_unsettled() { SETTLE.min(self.refresh) } else { self.refresh }
    }

    /// Reads the files, on a thread that may wait for them.
    fn read_files(&self, anew: bool) -> JoinHandle<Files> {
        if anew {
            info!("lists are read again");
        }
        let mut files = self.files.clone();
        spawn_blocking(move || {
            files.read(anew);
            files
        })
    }

    /// Without any, the runtime ends.
    fn take_files(&mut self, files: Option<Files>) {
        if let Some(files) = files {
            self.is_stale |= files.differ(&self.files);
            self.files = files;
        }
    }

    /// Applies the commands that have come so far, so that many of them make one notification.
    fn apply_all(&mut self, first: Command) {
        self.apply(first);
        for _ in 0..COMMANDS {
            let Ok(command) = self.commands.try_recv() else { return };
            self.apply(command);
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            // Who asked and is gone needs no answer.
            Command::Change(entry, on, answer) => drop(answer.send(self.change(entry, on))),
            Command::List(answer) => drop(answer.send(self.list())),
            Command::Event(ListEvent::Up) => self.anti_entropy.up(Instant::now()),
            Command::Event(ListEvent::Down) => self.anti_entropy.down(),
            Command::Event(ListEvent::Broker(name, hello)) => self.anti_entropy.broker(&name, hello.as_ref()),
            Command::Event(ListEvent::Asked) => self.anti_entropy.asked(),
            Command::Event(ListEvent::Records(records)) => self.merge(records),
        }
    }

    fn change(&mut self, entry: Entry, on: bool) -> Result<Changed, Full> {
        let now = SystemTime::now();
        let was_present = self.records.has(&entry, unix(now));
        let ms = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let record = self.records.change(entry, on, u64::try_from(ms).unwrap_or(u64::MAX))?;
        self.note(record.clone());
        Ok(Changed { record, was_present, persisted: self.writer.persisted() })
    }

    fn written(&mut self, written: Written) {
        let was_failing = self.writer.is_failing();
        if let Some(records) = self.writer.written(written) {
            self.merge(records);
            self.writer.changed();
        }
        self.is_stale |= was_failing != self.writer.is_failing();
    }

    fn merge(&mut self, records: Vec<Record>) {
        let Merged { taken, refused } = self.records.merge(records, unix(SystemTime::now()));
        for record in taken {
            self.note(record);
        }
        self.refused += refused;
    }

    fn log_refused(&mut self, now: Instant) {
        let (said, at) = self.logged_refused;
        let is_due = at.is_none_or(|at| now.saturating_duration_since(at) >= LOG_REFUSED);
        if is_due && said != self.refused {
            let Refused { unsound, future, full } = self.refused;
            warn!(
                unsound,
                future,
                full,
                "list entries of other brokers are not taken in: nobody makes such, a clock is wrong, or they are too many"
            );
            self.logged_refused = (self.refused, Some(now));
            self.is_stale = true;
        }
    }

    fn note(&mut self, record: Record) {
        self.news.push(record);
        self.is_stale = true;
        self.writer.changed();
    }

    fn list(&self) -> Vec<ListedEntry> {
        let now = unix(SystemTime::now());
        let records = self.records.iter().filter(|record| record.counts(now)).map(|record| ListedEntry {
            entry: record.entry.clone(),
            source: BY_CALL,
            since: Some(record.at / 1000),
        });
        let listed = self.files.entries().filter(|(_, entry)| entry.counts(now));
        let listed = listed.map(|(source, entry)| ListedEntry { entry: entry.clone(), source, since: None });
        records.chain(listed).collect()
    }

    /// Does everything that is due, and notifies of what changed.
    fn settle(&mut self, bus: &MqttHandle, notify: &mut impl FnMut(ListUpdate<'_>)) {
        let (now, wall) = (Instant::now(), unix(SystemTime::now()));
        if self.records.forget(wall) {
            self.writer.changed();
        }
        self.writer.begin(&self.records, now);
        self.log_refused(now);
        if self.is_stale || self.view.borrow().admission.is_over(wall) {
            self.notify(wall, notify);
        }
        self.share(bus, now);
    }

    fn notify(&mut self, wall: u64, notify: &mut impl FnMut(ListUpdate<'_>)) {
        self.is_stale = false;
        let (view, damaged) = (snapshot(&self.files, &self.records, wall), self.files.damaged());
        let (records, is_kept) = (mem::take(&mut self.news), !self.writer.is_failing());
        if !records.is_empty() {
            let [denied, allowed, trusted] = List::ALL.map(|list| view.admission.len(list));
            info!(new = records.len(), denied, allowed, trusted, "list entries changed");
        }
        let refused = self.refused;
        notify(ListUpdate { admission: &view.admission, records: &records, damaged: &damaged, is_kept, refused });
        self.view.send_replace(view);
    }

    fn share(&mut self, bus: &MqttHandle, now: Instant) {
        let digest = self.view.borrow().digest.clone();
        for broker in self.anti_entropy.ask(&digest, now) {
            debug!(broker = broker.as_str(), "asking for list entries");
            let question = RecordsRequest { from: self.own.clone(), revocations: true };
            // One that is lost is put again.
            let payload = serde_json::to_vec(&question).unwrap_or_default();
            let _ = bus.try_publish(Message::transient(Topic::BrokerRequests { broker }, payload));
        }
        if self.anti_entropy.should_broadcast(now) {
            let records: Vec<_> = self.records.shared(unix(SystemTime::now())).collect();
            for part in records.chunks(PER_MESSAGE) {
                let payload = serde_json::to_vec(part).unwrap_or_default();
                let _ = bus.try_publish(Message::transient(Topic::Revocations, payload));
            }
        }
        let since = *self.held.borrow();
        if let Some(released) = since.and_then(|since| self.anti_entropy.gate_state(since, &digest, now)) {
            if released == Err(TimedOut) {
                warn!("no broker said its list entries in time, keys are taken without them");
            }
            self.held.send_if_modified(|held| *held == since && held.take().is_some());
        }
    }

    async fn write_last(mut self) {
        while self.writer.is_behind() {
            self.writer.begin(&self.records, Instant::now());
            let written = self.writer.done().await;
            self.written(written);
        }
    }
}

impl Handle {
    /// Passes on what was received, without waiting.
    pub fn on_event(&self, event: ListEvent) {
        // What finds no place is published again.
        let _ = self.commands.try_send(Command::Event(event));
    }

    /// Closes the gate: keys wait from now on, until the records of the brokers are known.
    pub fn close_gate(&self) {
        self.held.send_replace(Some(Instant::now()));
    }

    /// Since when the gate is closed; none if it is open.
    #[must_use]
    pub fn gate(&self) -> watch::Receiver<Option<Instant>> {
        self.held.subscribe()
    }

    /// What the lists are, now and whenever they change.
    #[must_use]
    pub fn snapshot(&self) -> watch::Receiver<ListSnapshot> {
        self.view.clone()
    }

    /// What they say now.
    #[must_use]
    pub fn admission(&self) -> Arc<Admission> {
        self.view.borrow().admission.clone()
    }

    /// Puts the key of an entry on its list, or takes it off; none when the program ends.
    pub async fn change(&self, entry: Entry, on: bool) -> Option<Result<Changed, Full>> {
        let (sender, answer) = oneshot::channel();
        self.commands.send(Command::Change(entry, on, sender)).await.ok()?;
        answer.await.ok()
    }

    /// Every entry that counts now.
    pub async fn list(&self) -> Vec<ListedEntry> {
        let (sender, answer) = oneshot::channel();
        let _ = self.commands.send(Command::List(sender)).await;
        answer.await.unwrap_or_default()
    }
}

/// What `files` and `records` come to.
fn snapshot(files: &Files, records: &Records, now: u64) -> ListSnapshot {
    let made = records.iter().filter(|record| record.present).map(|record| &record.entry);
    let entries = files.entries().map(|(_, entry)| entry).chain(made);
    let admission = Admission::of(entries, files.allow_list(), now);
    ListSnapshot { admission: Arc::new(admission), digest: records.digest(now) }
}

async fn done(reading: &mut Option<JoinHandle<Files>>) -> Option<Files> {
    match reading {
        Some(task) => task.await.ok(),
        None => pending().await,
    }
}

async fn hung_up(signal: &mut Option<tokio::signal::unix::Signal>) {
    match signal {
        Some(signal) => {
            // It never ends.
            let _ = signal.recv().await;
        }
        None => pending().await,
    }
}
