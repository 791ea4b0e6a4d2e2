//! Keys on disk: what a program knows survives its restart. A [`WriteBuffer`] collects what changed, a [`KeyStore`] writes it
//! behind to an SQLite database.
//!
//! Ages count, not dates: the database keeps a clock of its own, which runs by the monotonic one. Only for the time that
//! the program is down the wall clock is asked, and believed if that is plausible. A step of it while the program runs
//! makes no key older.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::storage::sqlite::{self, Failure, Layout};
use crate::{Domain, PublicKey};

/// How often what changed is written. With the time of a write it stays below the second that is promised.
const FLUSH: Duration = Duration::from_millis(500);
/// How often the database's clock is written when nothing changes.
const CLOCK: Duration = Duration::from_secs(60);
/// Changes that wait at most, while the disk takes none: about 50 MB.
const CHANGES: usize = 400_000;
/// A program is hardly ever down for longer; a clock that says so was stepped.
const DOWN_MAX: Duration = Duration::from_secs(30 * 86_400);
const LAYOUT: Layout = Layout { number: 1, schema: SCHEMA, upgrades: &[] };

const SCHEMA: &str = "
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

/// What is remembered of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRecord {
    /// When it last came, or last shook hands.
    pub last: Instant,
    /// Whether a handshake with it was ever seen.
    pub proven: bool,
}

/// Each key with what is remembered of it.
pub type Keys = BTreeMap<(Domain, PublicKey), KeyRecord>;

/// What changed and is not on disk yet; the last state of each key. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct WriteBuffer {
    changes: Arc<Mutex<Changes>>,
    /// The database was lost, and a new one is to have all keys.
    anew: Arc<AtomicBool>,
}

/// What each key is now; none if it is gone.
type Changes = BTreeMap<(Domain, PublicKey), Option<KeyRecord>>;

impl WriteBuffer {
    /// The key is to be on disk like this.
    pub fn put(&self, domain: &Domain, key: PublicKey, kept: KeyRecord) {
        self.note(domain, key, Some(kept));
    }

    /// The key is to be gone from disk.
    pub fn remove(&self, domain: &Domain, key: PublicKey) {
        self.note(domain, key, None);
    }

    /// One too many is left out: on disk the key then stays as it was.
    fn note(&self, domain: &Domain, key: PublicKey, kept: Option<KeyRecord>) {
        let mut changes = self.lock();
        if changes.len() < CHANGES || changes.contains_key(&(domain.clone(), key)) {
            changes.insert((domain.clone(), key), kept);
        }
    }

    /// Whether all keys are to be put again; true once.
    #[must_use]
    pub fn needs_full_write(&self) -> bool {
        self.anew.swap(false, Ordering::SeqCst)
    }

    /// How many changes are not on disk yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn take(&self) -> Changes {
        std::mem::take(&mut *self.lock())
    }

    /// Takes back what could not be written; what came meanwhile is newer.
    fn requeue(&self, unwritten: Changes) {
        let mut changes = self.lock();
        for (subject, kept) in unwritten {
            if changes.len() >= CHANGES {
                return;
            }
            changes.entry(subject).or_insert(kept);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock()
    }
}

/// The two clocks at one instant.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// For every age.
    pub monotonic: Instant,
    /// For how long the program was down, and nothing else.
    pub wall: SystemTime,
}

impl Clocks {
    /// As the system has them.
    #[must_use]
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

/// The database of one program.
pub struct KeyStore {
    file: PathBuf,
    buffer: WriteBuffer,
    /// None while it cannot be opened.
    database: Option<Database>,
    /// That it cannot be written has been said.
    failing: bool,
}

struct Database {
    connection: Connection,
    /// What the database's clock says, in seconds, at `opened`.
    running: i64,
    opened: Instant,
    /// When its clock was last written.
    written: Instant,
}

impl KeyStore {
    /// Opens `NAME.sqlite` in `dir`, making what is missing, and gives the keys of `domains` in it that are not older
    /// than `ttl`. A damaged file is set aside; one that cannot be written is read all the same, and tried again
    /// later. Neither keeps anybody from starting; the error is that the file has a layout which is not known here.
    pub fn open(
        dir: &Path,
        name: &str,
        domains: &BTreeSet<Domain>,
        ttl: Option<Duration>,
        now: Clocks,
    ) -> Result<(Self, WriteBuffer, Keys), Failure> {
        let file = dir.join(format!("{name}.sqlite"));
        let buffer = WriteBuffer::default();
        let mut store = Self { file, buffer: buffer.clone(), database: None, failing: false };
        let oldest = ttl.map_or(i64::MAX, seconds);
        let (written, keys) = match store.whole(now, |database| database.with_keys(domains, oldest)) {
            Ok((mut database, keys)) => {
                let written = database.forget(oldest, now);
                store.database = Some(database);
                (written, keys)
            }
            Err(failure @ Failure::Unknown(_)) => return Err(failure),
            Err(failure) => {
                let readable = Database::open_to_read(&store.file, now);
                match readable.and_then(|database| database.with_keys(domains, oldest)) {
                    Err(failure @ Failure::Unknown(_)) => return Err(failure),
                    keys => (Err(failure), keys.map_or_else(|_| Keys::new(), |(_, keys)| keys)),
                }
            }
        };
        if let Err(failure) = written {
            store.fail(&failure);
        }
        Ok((store, buffer, keys))
    }

    /// What `read` makes of the database; of a new one, if it is damaged.
    fn whole<T>(&self, now: Clocks, read: impl Fn(Database) -> Result<T, Failure>) -> Result<T, Failure> {
        let open = || Database::open(&self.file, now).and_then(&read);
        match open() {
            Err(Failure::Damaged(reason)) => {
                sqlite::quarantine(&self.file, &reason)?;
                self.buffer.anew.store(true, Ordering::SeqCst);
                open()
            }
            opened => opened,
        }
    }

    /// Writes behind until `stop` returns, and then what is left. Tells `kept` each time whether that succeeds.
    pub async fn run(mut self, mut kept: impl FnMut(bool), stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut over = false;
        while !over {
            tokio::select! {
                () = sleep(FLUSH) => {}
                () = &mut stop => over = true,
            }
            // An error means that the runtime ends.
            let Ok(store) = spawn_blocking(move || self.flush(Clocks::read())).await else { return };
            self = store;
            kept(!self.failing);
        }
    }

    /// Writes what changed. What cannot be written is kept for the next time.
    #[must_use]
    pub fn flush(mut self, now: Clocks) -> Self {
        if self.database.is_none() {
            match self.whole(now, Ok) {
                Ok(database) => self.database = Some(database),
                Err(failure) => {
                    self.fail(&failure);
                    return self;
                }
            }
        }
        let changes = self.buffer.take();
        let Some(database) = &mut self.database else { return self };
        if changes.is_empty() && !self.failing && now.monotonic.saturating_duration_since(database.written) < CLOCK {
            return self;
        }
        match database.write(&changes, now) {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    info!(file = %self.file.display(), "state is kept again");
                }
            }
            Err(failure) => {
                self.buffer.requeue(changes);
                if matches!(failure, Failure::Damaged(_)) {
                    self.database = None;
                }
                self.fail(&failure);
            }
        }
        self
    }

    fn fail(&mut self, failure: &Failure) {
        if !std::mem::replace(&mut self.failing, true) {
            warn!(file = %self.file.display(), %failure, "state cannot be kept, a restart would lose it");
        }
    }
}

impl Database {
    fn open(file: &Path, now: Clocks) -> Result<Self, Failure> {
        Self::with_clock(sqlite::open(file, LAYOUT)?, now)
    }

    /// One that cannot be written, perhaps without the last changes to it.
    fn open_to_read(file: &Path, now: Clocks) -> Result<Self, Failure> {
        Self::with_clock(sqlite::open_to_read(file, LAYOUT)?, now)
    }

    fn with_clock(connection: Connection, now: Clocks) -> Result<Self, Failure> {
        let clock = connection.query_row("SELECT running, wall FROM clock", [], |row| {
            Ok(row.get::<_, i64>(0)?.saturating_add(seconds_down(row.get(1)?, now.wall)))
        });
        let running = clock.optional()?.ok_or_else(|| Failure::Damaged("it has no clock".into()))?;
        Ok(Self { connection, running, opened: now.monotonic, written: now.monotonic })
    }

    /// The database, and its keys of `domains` that are younger than `oldest` seconds.
    fn with_keys(self, domains: &BTreeSet<Domain>, oldest: i64) -> Result<(Self, Keys), Failure> {
        let damaged = |error: rusqlite::Error| Failure::Damaged(error.to_string());
        let mut keys = Keys::new();
        {
            let mut statement = self.connection.prepare("SELECT domain, key, last, proven FROM keys")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let name: String = row.get(0).map_err(damaged)?;
                let key: [u8; 32] = row.get(1).map_err(damaged)?;
                let key = PublicKey::from_bytes(key).map_err(|error| Failure::Damaged(error.to_string()))?;
                let (last, proven) = (row.get(2).map_err(damaged)?, row.get(3).map_err(damaged)?);
                if let Some(domain) = domains.get(name.as_str()).filter(|_| self.running.saturating_sub(last) < oldest)
                {
                    keys.insert((domain.clone(), key), KeyRecord { last: self.instant(last), proven });
                }
            }
        }
        Ok((self, keys))
    }

    /// Removes the keys that are not younger than `oldest` seconds.
    fn forget(&mut self, oldest: i64, now: Clocks) -> Result<(), Failure> {
        let before = self.running.saturating_sub(oldest);
        self.connection.execute("DELETE FROM keys WHERE last <= ?1", [before])?;
        self.write(&Changes::new(), now)
    }

    fn write(&mut self, changes: &Changes, now: Clocks) -> Result<(), Failure> {
        let running = self.seconds(now.monotonic);
        let (opened, base) = (self.opened, self.running);
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut put = transaction.prepare("REPLACE INTO keys VALUES (?1, ?2, ?3, ?4)")?;
            let mut remove = transaction.prepare("DELETE FROM keys WHERE domain = ?1 AND key = ?2")?;
            for ((domain, key), kept) in changes {
                match kept {
                    Some(KeyRecord { last, proven }) => {
                        let last = at(base, opened, *last);
                        put.execute(params![domain.name(), key.as_bytes(), last, proven])?
                    }
                    None => remove.execute(params![domain.name(), key.as_bytes()])?,
                };
            }
            let wall = now.wall.duration_since(UNIX_EPOCH).map_or(0, seconds);
            transaction.execute("UPDATE clock SET running = ?1, wall = ?2", [running, wall])?;
        }
        transaction.commit()?;
        self.written = now.monotonic;
        Ok(())
    }

    fn seconds(&self, instant: Instant) -> i64 {
        at(self.running, self.opened, instant)
    }

    /// The time that the database's clock showed `second`; never in the future.
    fn instant(&self, second: i64) -> Instant {
        let age = u64::try_from(self.running.saturating_sub(second)).unwrap_or_default();
        self.opened.checked_sub(Duration::from_secs(age)).unwrap_or(self.opened)
    }
}

/// What a clock that showed `base` at `opened` shows at `instant`.
fn at(base: i64, opened: Instant, instant: Instant) -> i64 {
    match instant.checked_duration_since(opened) {
        Some(after) => base.saturating_add(seconds(after)),
        None => base.saturating_sub(seconds(opened.duration_since(instant))),
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// How long the program was down, having last seen the wall clock show `then`.
fn seconds_down(then: i64, now: SystemTime) -> i64 {
    let now = now.duration_since(UNIX_EPOCH).map_or(0, seconds);
    let down = now.saturating_sub(then);
    if (0..=seconds(DOWN_MAX)).contains(&down) { down } else { 0 }
}

#[cfg(test)]
mod tests;
