//! The task that owns the lists of a program: it reads their files, merges and writes the records that brokers share,
//! and notifies the program of each change. Other tasks have a [`Handle`].

mod handle;

use std::future::pending;
use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;
use tracing::{debug, info, warn};

pub use self::handle::{BY_CALL, Changed, Handle, ListEvent, ListSnapshot, ListUpdate, ListedEntry};
use self::handle::{COMMANDS_MAX, ListCommand};
use crate::access_lists::anti_entropy::{AntiEntropy, TimedOut};
use crate::access_lists::files::Files;
use crate::access_lists::records::{Merged, Record, Records, RecordsFull, RefusedRecords};
use crate::access_lists::records_file::{self, FinishedWrite, RecordsWriter};
use crate::access_lists::{Admission, Entry, List};
use crate::mqtt::{Message, MqttHandle};
use crate::runtime::hangups::Hangups;
use crate::runtime::service_manager;
use crate::storage::StorageError;
use crate::time_text::unix;
use crate::wire::message::RecordsRequest;
use crate::wire::name::Participant;
use crate::{Config, Topic};

/// Records in one message at most: some 100 kB of JSON, and never more than 500.
pub const PER_MESSAGE: usize = 500;
/// How often it checks whether something is due: an entry that expires, a request that has to be sent again.
const DUE_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The same while the gate is closed.
const DUE_CHECK_INTERVAL_CLOSED: Duration = Duration::from_millis(20);
/// The shortest pause between two checks of the files.
const REFRESH_MIN: Duration = Duration::from_millis(100);
/// A changed file is checked again after this time, or after the regular pause if that is shorter.
const SECOND_READ_DELAY: Duration = Duration::from_secs(1);
/// The shortest pause between two log lines about rejected records.
const LOG_REFUSED_INTERVAL: Duration = Duration::from_secs(60);

/// Owns the lists of a program.
pub struct ListService {
    own: Participant,
    files: Files,
    refresh: Duration,
    records: Records,
    anti_entropy: AntiEntropy,
    commands: mpsc::Receiver<ListCommand>,
    snapshot: watch::Sender<ListSnapshot>,
    /// Since when the gate is closed; none if it is open.
    gate: Arc<watch::Sender<Option<Instant>>>,
    /// Records about which the rest of the program is not notified yet.
    new_records: Vec<Record>,
    /// The snapshot is outdated.
    is_stale: bool,
    writer: RecordsWriter,
    refused: RefusedRecords,
    /// The counts that were last logged, and when.
    logged_refused: (RefusedRecords, Option<Instant>),
}

impl ListService {
    /// Reads the lists that `config` names, and the records that the last run of the program, `own`, stored.
    pub fn open(config: &Config, own: Participant) -> Result<(Self, Handle), StorageError> {
        let is_broker = matches!(own, Participant::Broker(_));
        let file = if is_broker { records_file::BROKER_FILE } else { records_file::WORKER_FILE };
        let file = file.path(&config.state_dir);
        let now = unix(SystemTime::now());
        let mut files = Files::new(&config.key_lists);
        files.read(true);
        let (writer, restored) = RecordsWriter::open(file)?;
        let records = Records::restored(restored, now);
        let (snapshot, snapshot_receiver) = watch::channel(take_snapshot(&files, &records, !writer.is_failing(), now));
        let gate = Arc::new(watch::channel(None).0);
        let (handle, commands) = handle::channel(snapshot_receiver, gate.clone());
        let own_broker = if let Participant::Broker(name) = &own { Some(name.clone()) } else { None };
        let anti_entropy = AntiEntropy::new(own_broker);
        let service = Self {
            own,
            files,
            refresh: config.key_lists.refresh.max(REFRESH_MIN),
            records,
            anti_entropy,
            commands,
            snapshot,
            gate,
            new_records: Vec::new(),
            is_stale: true,
            writer,
            refused: RefusedRecords::default(),
            logged_refused: (RefusedRecords::default(), None),
        };
        Ok((service, handle))
    }

    /// Works until `stop` returns; requests and answers on `bus`, and notifies of each change.
    pub async fn run(
        mut self,
        bus: MqttHandle,
        mut notify: impl FnMut(ListUpdate<'_>),
        stop: impl Future<Output = ()>,
    ) {
        let mut stop = pin!(stop);
        let mut hangups = Hangups::listen();
        let mut reading: Option<JoinHandle<Files>> = None;
        let mut read_at = Instant::now() + self.pause();
        let (mut gate, mut is_hurried, mut is_reloading) = (self.gate.subscribe(), false, false);
        loop {
            self.settle(&bus, &mut notify);
            if reading.is_none() && (is_hurried || read_at <= Instant::now()) {
                is_reloading = mem::take(&mut is_hurried);
                reading = Some(self.read_files(is_reloading));
            }
            let poll = if self.gate.borrow().is_some() {
                DUE_CHECK_INTERVAL_CLOSED
            } else {
                DUE_CHECK_INTERVAL.min(self.refresh)
            };
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.apply_all(command),
                    None => break,
                },
                files = done(&mut reading) => {
                    self.take_files(files);
                    (reading, read_at) = (None, Instant::now() + self.pause());
                    if mem::take(&mut is_reloading) {
                        service_manager::reloaded();
                    }
                }
                written = self.writer.done() => self.written(written),
                () = hangups.next() => is_hurried = true,
                _ = gate.changed() => {}
                () = sleep(poll) => {}
                () = &mut stop => break,
            }
        }
        self.write_last().await;
    }

    /// The pause until the next check of the files.
    fn pause(&self) -> Duration {
        if self.files.is_unsettled() { SECOND_READ_DELAY.min(self.refresh) } else { self.refresh }
    }

    /// Reads the files, on a blocking thread.
    fn read_files(&self, anew: bool) -> JoinHandle<Files> {
        if anew {
            service_manager::reloading();
            info!("lists are read again");
        }
        let mut files = self.files.clone();
        spawn_blocking(move || {
            files.read(anew);
            files
        })
    }

    /// None means that the runtime is shutting down.
    fn take_files(&mut self, files: Option<Files>) {
        if let Some(files) = files {
            self.is_stale |= files.differ(&self.files);
            self.files = files;
        }
    }

    /// Applies all queued commands, so that many of them cause one notification.
    fn apply_all(&mut self, first: ListCommand) {
        self.apply(first);
        for _ in 0..COMMANDS_MAX {
            let Ok(command) = self.commands.try_recv() else { return };
            self.apply(command);
        }
    }

    fn apply(&mut self, command: ListCommand) {
        match command {
            // The caller may have stopped waiting.
            ListCommand::Change { entry, present, answer } => drop(answer.send(self.change(entry, present))),
            ListCommand::List(answer) => drop(answer.send(self.list())),
            ListCommand::Event(ListEvent::Up) => self.anti_entropy.up(Instant::now()),
            ListCommand::Event(ListEvent::Down) => self.anti_entropy.down(),
            ListCommand::Event(ListEvent::ServerReachable(is_reachable)) => {
                self.anti_entropy.set_server_reachable(is_reachable);
            }
            ListCommand::Event(ListEvent::Broker(name, hello)) => self.anti_entropy.broker(&name, hello.as_deref()),
            ListCommand::Event(ListEvent::Asked(requester)) => self.anti_entropy.on_request(requester, Instant::now()),
            ListCommand::Event(ListEvent::Records(records)) => self.merge(records),
        }
    }

    fn change(&mut self, entry: Entry, present: bool) -> Result<Changed, RecordsFull> {
        let now = SystemTime::now();
        let was_present = self.records.has(&entry, unix(now));
        let ms = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let record = self.records.change(entry, present, u64::try_from(ms).unwrap_or(u64::MAX))?;
        self.note(record.clone());
        Ok(Changed { record, was_present, persisted: self.writer.persisted() })
    }

    fn written(&mut self, written: FinishedWrite) {
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
        let (logged, at) = self.logged_refused;
        let is_due = at.is_none_or(|at| now.saturating_duration_since(at) >= LOG_REFUSED_INTERVAL);
        if is_due && logged != self.refused {
            let RefusedRecords { unsound, future, full } = self.refused;
            warn!(
                unsound,
                future,
                full,
                "list entries of other brokers are refused: they are invalid, a clock is wrong, or they are too many"
            );
            self.logged_refused = (self.refused, Some(now));
            self.is_stale = true;
        }
    }

    fn note(&mut self, record: Record) {
        self.new_records.push(record);
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

    /// Does everything that is due, and sends the notification of changes.
    fn settle(&mut self, bus: &MqttHandle, notify: &mut impl FnMut(ListUpdate<'_>)) {
        let (now, wall) = (Instant::now(), unix(SystemTime::now()));
        if self.records.forget(wall) {
            self.writer.changed();
        }
        self.writer.begin(&self.records, now);
        self.log_refused(now);
        if self.is_stale || self.snapshot.borrow().admission.is_over(wall) {
            self.notify(wall, notify);
        }
        self.share(bus, now);
    }

    fn notify(&mut self, wall: u64, notify: &mut impl FnMut(ListUpdate<'_>)) {
        self.is_stale = false;
        let (records, is_kept) = (mem::take(&mut self.new_records), !self.writer.is_failing());
        let snapshot = take_snapshot(&self.files, &self.records, is_kept, wall);
        if !records.is_empty() {
            let [denied, allowed, trusted] = List::ALL.map(|list| snapshot.admission.len(list));
            info!(new = records.len(), denied, allowed, trusted, "list entries changed");
        }
        let refused = self.refused;
        let ListSnapshot { admission, damaged, .. } = &snapshot;
        notify(ListUpdate { admission, records: &records, damaged, is_kept, refused });
        self.snapshot.send_replace(snapshot);
    }

    fn share(&mut self, bus: &MqttHandle, now: Instant) {
        let digest = self.snapshot.borrow().digest.clone();
        for broker in self.anti_entropy.brokers_to_request(&digest, now) {
            debug!(broker = broker.as_str(), "requesting list entries");
            let is_named = self.anti_entropy.names_records(&broker);
            let topic =
                if is_named { self.own.requests(&broker) } else { Topic::BrokerRequests { broker: broker.clone() } };
            let request = RecordsRequest { from: self.own.clone(), to: is_named.then_some(broker), revocations: true };
            // A lost request is sent again.
            let payload = serde_json::to_vec(&request).unwrap_or_default();
            let _ = bus.try_publish(Message::transient(topic, payload));
        }
        if self.anti_entropy.should_broadcast(&digest, now) {
            let records: Vec<_> = self.records.shared(unix(SystemTime::now())).collect();
            for part in records.chunks(PER_MESSAGE) {
                let payload = serde_json::to_vec(part).unwrap_or_default();
                let _ = bus.try_publish(Message::transient(Topic::Revocations, payload));
            }
        }
        let since = *self.gate.borrow();
        if let Some(opened) = since.and_then(|since| self.anti_entropy.gate_state(since, &digest, now)) {
            if opened == Err(TimedOut) {
                warn!("no broker sent its revocation list in time: keys are accepted without it");
            }
            self.gate.send_if_modified(|gate| *gate == since && gate.take().is_some());
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

/// The admission of a worker on this machine, by the files that `config` names and its stored records. Nothing is
/// written.
pub fn admission_on_disk(config: &Config) -> Result<Admission, StorageError> {
    let mut files = Files::new(&config.key_lists);
    files.read(true);
    let now = unix(SystemTime::now());
    let records = Records::restored(records_file::peek(&records_file::WORKER_FILE.path(&config.state_dir))?, now);
    Ok(Arc::unwrap_or_clone(take_snapshot(&files, &records, true, now).admission))
}

/// The snapshot of `files` and `records`.
fn take_snapshot(files: &Files, records: &Records, is_kept: bool, now: u64) -> ListSnapshot {
    let made = records.iter().filter(|record| record.present).map(|record| &record.entry);
    let entries = files.entries().map(|(_, entry)| entry).chain(made);
    let admission = Admission::of(entries, files.allow_list(), now);
    let (digest, damaged, unread) = (records.digest(now), files.damaged(), files.unread());
    ListSnapshot { admission: Arc::new(admission), digest, damaged, unread, is_kept }
}

async fn done(reading: &mut Option<JoinHandle<Files>>) -> Option<Files> {
    match reading {
        Some(task) => task.await.ok(),
        None => pending().await,
    }
}
