//! Writes changes of the memory to a database, a moment later: one loop, and one rule for a file that is corrupt or
//! cannot be written.
//!
//! One task for each database runs [`WriteBehind::run`]; blocking calls run on a separate thread. The changes are
//! shared with the task that makes them, by [`Table::take`], mostly in a [`ChangeBuffer`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use crate::storage::process_lock::ProcessLock;
use crate::storage::schema::Schema;
use crate::storage::{Health, Noun, StorageError, sqlite, state_file};

/// The interval of writes. With the time of a write it stays below the documented second.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);

/// The most changes that wait while the disk fails: about 50 MB of keys.
pub(super) const CHANGES_MAX: usize = 400_000;

/// Both clocks at one instant.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// For every age.
    pub monotonic: Instant,
    /// Only for the time that the program was down.
    pub wall: SystemTime,
}

impl Clocks {
    /// Reads the system's clocks.
    #[must_use]
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

/// The content of a database.
pub trait Table: Send + 'static {
    /// The tables.
    const SCHEMA: Schema;
    /// The name of the content in the log.
    const NOUN: Noun;
    /// The content that is loaded.
    type Content: Default;
    /// Changes that are not written yet.
    type Changes: Send;

    /// Reads the database, each time when it is opened. An impossible row is [`StorageError::Corrupt`].
    fn load(&mut self, connection: &Connection, now: Clocks) -> Result<Self::Content, StorageError>;
    /// Takes the changes since the last call.
    fn take(&mut self) -> Self::Changes;
    /// Whether the changes have to be written.
    fn is_due(&self, changes: &Self::Changes, now: Clocks) -> bool;
    /// Writes the changes.
    fn write(&self, transaction: &Transaction<'_>, changes: &Self::Changes, now: Clocks) -> rusqlite::Result<()>;
    /// The changes could not be written: they have to be returned by the next `take`, unless there are newer ones.
    fn requeue(&mut self, changes: Self::Changes);
    /// The changes are written.
    fn written(&mut self, _now: Clocks) {}
    /// A new file has replaced a corrupt one.
    fn recreated(&mut self) {}
    /// The file can be written again.
    fn reopened(&mut self) {}
}

/// Changes that are not on disk yet: the last value of each entry, none if it is removed. Clones share it.
#[derive(Debug)]
pub struct ChangeBuffer<K, V> {
    changes: Arc<Mutex<BTreeMap<K, Option<V>>>>,
    /// A new database has replaced a corrupt one, and needs all entries.
    full_write: Arc<AtomicBool>,
}

impl<K, V> Clone for ChangeBuffer<K, V> {
    fn clone(&self) -> Self {
        Self { changes: self.changes.clone(), full_write: self.full_write.clone() }
    }
}

impl<K, V> Default for ChangeBuffer<K, V> {
    fn default() -> Self {
        Self { changes: Arc::default(), full_write: Arc::default() }
    }
}

impl<K: Ord, V> ChangeBuffer<K, V> {
    /// Notes the new value of an entry, or its removal. Changes over the limit are dropped: the entry on disk then
    /// stays as it was.
    pub fn note(&self, entry: K, value: Option<V>) {
        let mut changes = self.changes.lock();
        if changes.len() < CHANGES_MAX || changes.contains_key(&entry) {
            changes.insert(entry, value);
        }
    }

    /// Whether all entries have to be noted again; true once.
    #[must_use]
    pub fn needs_full_write(&self) -> bool {
        self.full_write.swap(false, Ordering::SeqCst)
    }

    /// Requests that all entries are noted again, for a new database.
    pub fn request_full_write(&self) {
        self.full_write.store(true, Ordering::SeqCst);
    }

    /// How many changes are not on disk yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.changes.lock().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the changes since the last call.
    #[must_use]
    pub fn take(&self) -> BTreeMap<K, Option<V>> {
        std::mem::take(&mut *self.changes.lock())
    }

    /// Takes back changes that could not be written, except where there are newer ones.
    pub fn requeue(&self, unwritten: BTreeMap<K, Option<V>>) {
        let mut changes = self.changes.lock();
        for (entry, value) in unwritten {
            if changes.len() >= CHANGES_MAX {
                return;
            }
            changes.entry(entry).or_insert(value);
        }
    }
}

/// The database of a [`Table`].
pub struct WriteBehind<T> {
    file: PathBuf,
    table: T,
    /// None while it cannot be opened.
    connection: Option<Connection>,
    /// Excludes other processes; none if the lock cannot be created.
    lock: Option<ProcessLock>,
    health: Health,
}

impl<T: Table> WriteBehind<T> {
    /// Opens `file`, creating it if it is missing, and returns its content. A corrupt file is renamed; one that cannot
    /// be written is read all the same, and tried again later. The only errors are an unknown version, and a file that
    /// another process uses.
    pub fn with_table(file: PathBuf, table: T, now: Clocks) -> Result<(Self, T::Content), StorageError> {
        let health = Health::new(file.clone(), T::NOUN);
        let lock = match ProcessLock::acquire(&file) {
            Err(taken @ StorageError::InUse(_)) => return Err(taken),
            lock => lock.ok(),
        };
        let mut store = Self { file, table, connection: None, lock, health };
        let error = match store.open_or_recreate(now) {
            Ok(content) => return Ok((store, content)),
            Err(unknown @ StorageError::UnknownVersion(_)) => return Err(unknown),
            Err(error) => error,
        };
        let readable = sqlite::open_to_read(&store.file, T::SCHEMA);
        let content = match readable.and_then(|connection| store.table.load(&connection, now)) {
            Err(unknown @ StorageError::UnknownVersion(_)) => return Err(unknown),
            content => content.unwrap_or_default(),
        };
        store.health.failed(&error);
        Ok((store, content))
    }

    /// Whether the last attempt to open or write the file failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.health.is_failing()
    }

    /// The content to be written.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }

    fn open_or_recreate(&mut self, now: Clocks) -> Result<T::Content, StorageError> {
        if self.lock.is_none() {
            self.lock = match ProcessLock::try_acquire(&self.file) {
                Err(taken @ StorageError::InUse(_)) => return Err(taken),
                lock => lock.ok(),
            };
        }
        match self.connect(now) {
            Err(StorageError::Corrupt(reason)) => {
                state_file::quarantine(&self.file, &reason)?;
                self.table.recreated();
                self.connect(now)
            }
            opened => opened,
        }
    }

    fn connect(&mut self, now: Clocks) -> Result<T::Content, StorageError> {
        let connection = sqlite::open(&self.file, T::SCHEMA)?;
        let content = self.table.load(&connection, now)?;
        self.connection = Some(connection);
        Ok(content)
    }

    /// Writes the changes at intervals until `stop` returns, and then the rest. `is_kept` is called after each write
    /// with whether the file can be written.
    pub async fn run(mut self, mut is_kept: impl FnMut(bool), stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut is_over = false;
        while !is_over {
            tokio::select! {
                () = sleep(FLUSH_INTERVAL) => {}
                () = &mut stop => is_over = true,
            }
            // An error means that the runtime is shutting down.
            let Ok(store) = spawn_blocking(move || self.flush(Clocks::read())).await else { return };
            self = store;
            is_kept(!self.is_failing());
        }
    }

    /// Writes the changes. Failed ones are tried again the next time.
    #[must_use]
    pub fn flush(mut self, now: Clocks) -> Self {
        if self.connection.is_none() {
            match self.open_or_recreate(now) {
                Ok(_) => self.table.reopened(),
                Err(error) => {
                    self.health.failed(&error);
                    return self;
                }
            }
        }
        let Some(connection) = &mut self.connection else { return self };
        let changes = self.table.take();
        if !self.health.is_failing() && !self.table.is_due(&changes, now) {
            return self;
        }
        match write(&self.table, connection, &changes, now) {
            Ok(()) => {
                self.table.written(now);
                self.health.succeeded();
            }
            Err(error) => {
                self.table.requeue(changes);
                if matches!(error, StorageError::Corrupt(_)) {
                    self.connection = None;
                }
                self.health.failed(&error);
            }
        }
        self
    }
}

fn write<T: Table>(
    table: &T,
    connection: &mut Connection,
    changes: &T::Changes,
    now: Clocks,
) -> Result<(), StorageError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    table.write(&transaction, changes, now)?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
impl<T> WriteBehind<T> {
    /// Closes the file, as after corruption.
    pub(crate) fn disconnect(&mut self) {
        self.connection = None;
    }
}
