//! Keys on disk, so that they survive a restart. A [`ChangeBuffer`] collects changes, a [`KeyStore`] writes them later
//! to an SQLite database.
//!
//! Ages are stored, not dates: the database has its own clock, which follows the monotonic one. Only for the time that
//! the program was down the wall clock is used, if it is plausible. A step of the wall clock while the program runs
//! makes no key older.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension as _, Transaction, params};

use crate::storage::schema::Schema;
use crate::storage::versions::StateFile;
use crate::storage::write_behind::{ChangeBuffer, Table, WriteBehind};
use crate::storage::{Noun, StorageError, sqlite};
use crate::{Domain, KeyId, PublicKey};

pub use crate::storage::write_behind::Clocks;

/// How often the database's clock is written when nothing changes.
const CLOCK_INTERVAL: Duration = Duration::from_secs(60);
/// The longest plausible time that a program was down; if the wall clock differs by more, it was stepped.
const DOWN_MAX: Duration = Duration::from_secs(30 * 86_400);

const CREATE_TABLES: &str = "
    CREATE TABLE keys (
        domain TEXT NOT NULL,
        key BLOB NOT NULL,
        last INTEGER NOT NULL,
        proven INTEGER NOT NULL,
        PRIMARY KEY (domain, key)
    ) WITHOUT ROWID;
    CREATE TABLE clock (running INTEGER NOT NULL, wall INTEGER NOT NULL);
    INSERT INTO clock VALUES (0, 0);
";

/// A broker's file in `state_dir`.
pub const BROKER_FILE: StateFile = StateFile::sqlite("broker.sqlite", KeyTable::SCHEMA);
/// A worker's.
pub const WORKER_FILE: StateFile = StateFile::sqlite("worker.sqlite", KeyTable::SCHEMA);

/// The stored state of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRecord {
    /// When it last arrived, or last had a handshake.
    pub last: Instant,
    /// Whether it ever had a handshake.
    pub established: bool,
}

/// Each key with its stored state.
pub type Keys = BTreeMap<KeyId, KeyRecord>;

/// Changes that are not on disk yet; the last state of each key. Clones share it.
pub type WriteBuffer = ChangeBuffer<KeyId, KeyRecord>;

/// The new state of each changed key; none if it is removed.
pub type KeyChanges = BTreeMap<KeyId, Option<KeyRecord>>;

impl WriteBuffer {
    /// Sets the state of a key.
    pub fn put(&self, domain: &Domain, key: PublicKey, kept: KeyRecord) {
        self.note(KeyId { domain: domain.clone(), key }, Some(kept));
    }

    /// Removes a key.
    pub fn remove(&self, domain: &Domain, key: PublicKey) {
        self.note(KeyId { domain: domain.clone(), key }, None);
    }
}

/// The database of one program's keys.
pub type KeyStore = WriteBehind<KeyTable>;

/// The table of the keys, and the database's clock.
#[derive(Debug)]
pub struct KeyTable {
    buffer: WriteBuffer,
    /// The domains whose keys are read; the keys of others stay in the database.
    domains: BTreeSet<Domain>,
    /// Keys that have been idle for so many seconds are removed.
    oldest: i64,
    clock: Clock,
    /// Keys that were last seen at this second, or earlier, are to be removed.
    expired: Option<i64>,
}

/// The database's clock, in seconds.
#[derive(Debug, Clone, Copy)]
struct Clock {
    /// Its value at `opened`.
    uptime: i64,
    opened: Instant,
    /// When it was last written.
    written: Instant,
}

impl KeyStore {
    /// Opens `file` in `dir`, creating it if it is missing, and returns the keys of `domains` in it that are not older
    /// than `ttl`. A corrupt file is renamed; one that cannot be written is read all the same, and tried again later.
    /// The only errors are a file of an unknown version, and one that another process uses.
    pub fn open(
        dir: &Path,
        file: StateFile,
        domains: &BTreeSet<Domain>,
        ttl: Option<Duration>,
        now: Clocks,
    ) -> Result<(Self, WriteBuffer, Keys), StorageError> {
        let buffer = WriteBuffer::default();
        let table = KeyTable::new(buffer.clone(), domains.clone(), ttl, now);
        let (store, keys) = Self::with_table(file.path(dir), table, now)?;
        let store = if store.is_failing() { store } else { store.flush(now) };
        Ok((store, buffer, keys))
    }
}

/// The keys of `domains` in `file` in `dir`, even if another process uses it; none if there is no such file. It is not
/// changed.
pub fn read_copy(dir: &Path, file: StateFile, domains: &BTreeSet<Domain>, now: Clocks) -> Result<Keys, StorageError> {
    let Some((_dir, connection)) = sqlite::open_copy(&file.path(dir), KeyTable::SCHEMA)? else {
        return Ok(Keys::new());
    };
    KeyTable::new(WriteBuffer::default(), domains.clone(), None, now).load(&connection, now)
}

impl KeyTable {
    fn new(buffer: WriteBuffer, domains: BTreeSet<Domain>, ttl: Option<Duration>, now: Clocks) -> Self {
        let clock = Clock { uptime: 0, opened: now.monotonic, written: now.monotonic };
        Self { buffer, domains, oldest: ttl.map_or(i64::MAX, seconds), clock, expired: None }
    }
}

impl Table for KeyTable {
    const SCHEMA: Schema = Schema { migrations: &[CREATE_TABLES] };
    const NOUN: Noun = Noun { name: "state", pronoun: "it" };
    type Content = Keys;
    type Changes = KeyChanges;

    fn load(&mut self, connection: &Connection, now: Clocks) -> Result<Keys, StorageError> {
        self.clock = Clock::load(connection, now)?;
        self.expired = Some(self.clock.uptime.saturating_sub(self.oldest));
        let corrupt = |error| StorageError::corrupt_value(&error);
        let mut keys = Keys::new();
        let mut statement = connection.prepare("SELECT domain, key, last, proven FROM keys")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (name, key): (String, [u8; 32]) = (row.get(0).map_err(corrupt)?, row.get(1).map_err(corrupt)?);
            let key = PublicKey::from_bytes(key).map_err(|error| StorageError::Corrupt(error.to_string()))?;
            let (last, established) = (row.get(2).map_err(corrupt)?, row.get(3).map_err(corrupt)?);
            let is_live = self.clock.uptime.saturating_sub(last) < self.oldest;
            if let Some(domain) = self.domains.get(name.as_str()).filter(|_| is_live) {
                let id = KeyId { domain: domain.clone(), key };
                keys.insert(id, KeyRecord { last: self.clock.instant(last), established });
            }
        }
        Ok(keys)
    }

    fn take(&mut self) -> KeyChanges {
        self.buffer.take()
    }

    fn is_due(&self, changes: &KeyChanges, now: Clocks) -> bool {
        let is_clock_due = now.monotonic.saturating_duration_since(self.clock.written) >= CLOCK_INTERVAL;
        !changes.is_empty() || self.expired.is_some() || is_clock_due
    }

    fn write(&self, transaction: &Transaction<'_>, changes: &KeyChanges, now: Clocks) -> rusqlite::Result<()> {
        if let Some(expired) = self.expired {
            transaction.execute("DELETE FROM keys WHERE last <= ?1", [expired])?;
        }
        let mut put = transaction.prepare("REPLACE INTO keys VALUES (?1, ?2, ?3, ?4)")?;
        let mut remove = transaction.prepare("DELETE FROM keys WHERE domain = ?1 AND key = ?2")?;
        for (KeyId { domain, key }, record) in changes {
            match record {
                Some(KeyRecord { last, established }) => {
                    put.execute(params![domain.name(), key.as_bytes(), self.clock.at(*last), established])?
                }
                None => remove.execute(params![domain.name(), key.as_bytes()])?,
            };
        }
        let wall = now.wall.duration_since(UNIX_EPOCH).map_or(0, seconds);
        transaction.execute("UPDATE clock SET running = ?1, wall = ?2", [self.clock.at(now.monotonic), wall])?;
        Ok(())
    }

    fn requeue(&mut self, changes: KeyChanges) {
        self.buffer.requeue(changes);
    }

    fn written(&mut self, now: Clocks) {
        (self.expired, self.clock.written) = (None, now.monotonic);
    }

    fn recreated(&mut self) {
        self.buffer.request_full_write();
    }
}

impl Clock {
    fn load(connection: &Connection, now: Clocks) -> Result<Self, StorageError> {
        let uptime = connection.query_row("SELECT running, wall FROM clock", [], |row| {
            Ok(row.get::<_, i64>(0)?.saturating_add(seconds_down(row.get(1)?, now.wall)))
        });
        let uptime = uptime.optional()?.ok_or_else(|| StorageError::Corrupt("it has no clock".into()))?;
        Ok(Self { uptime, opened: now.monotonic, written: now.monotonic })
    }

    /// Its value at `instant`.
    fn at(&self, instant: Instant) -> i64 {
        match instant.checked_duration_since(self.opened) {
            Some(after) => self.uptime.saturating_add(seconds(after)),
            None => self.uptime.saturating_sub(seconds(self.opened.duration_since(instant))),
        }
    }

    /// When its value was `second`; never in the future.
    fn instant(&self, second: i64) -> Instant {
        let age = u64::try_from(self.uptime.saturating_sub(second)).unwrap_or_default();
        self.opened.checked_sub(Duration::from_secs(age)).unwrap_or(self.opened)
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// How long the program was down; `then` is the wall clock when it was last running.
fn seconds_down(then: i64, now: SystemTime) -> i64 {
    let now = now.duration_since(UNIX_EPOCH).map_or(0, seconds);
    let down = now.saturating_sub(then);
    if (0..=seconds(DOWN_MAX)).contains(&down) { down } else { 0 }
}

#[cfg(test)]
mod tests;
