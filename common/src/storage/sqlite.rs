//! An SQLite file of ours: made, opened, brought to today's layout, seen to be whole, and set aside if it is not.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use tracing::{info, warn};

use crate::storage::state_file;

/// What stands in a file.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Counts up with each layout of this file, from 1.
    pub number: i64,
    /// What makes an empty file one of this layout.
    pub schema: &'static str,
    /// What makes a file of layout 1 one of layout 2, and so on to this one.
    pub upgrades: &'static [&'static str],
}

/// Why a file does not serve.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It is not a database, or not a whole one, or not ours.
    #[error("{0}")]
    Damaged(String),
    /// Its layout is one that this program does not know, such as a later version's. It stays as it is.
    #[error("{0}")]
    Unknown(String),
    /// The disk is full, the directory cannot be written, another process has it.
    #[error("{0}")]
    Refused(String),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown) => {
                Self::Damaged(error.to_string())
            }
            Some(ErrorCode::DatabaseBusy) => Self::Refused("another process has it".into()),
            _ => Self::Refused(error.to_string()),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Refused(error.to_string())
    }
}

/// Opens `file` for this process alone, making what is missing. What it says was written is on the disk even if the
/// power fails.
pub fn open(file: &Path, layout: Layout) -> Result<Connection, Failure> {
    let file = state_file::place(file)?;
    // SQLite would make it readable for everybody.
    state_file::open(&file, OpenOptions::new().append(true).create(true))?;
    let mut connection = Connection::open_with_flags(&file, OpenFlags::default() | OpenFlags::SQLITE_OPEN_NOFOLLOW)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
    // Before anything else is done to it.
    let found = layout.of(&connection, &file)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         PRAGMA journal_size_limit = 4194304; PRAGMA cache_size = -512;",
    )?;
    if found != Some(layout.number) {
        layout.bring(&mut connection, found)?;
    }
    if let Some(before) = found.filter(|before| *before != layout.number) {
        info!(file = %file.display(), layout = layout.number, before, "state file has a new layout");
    }
    Ok(connection)
}

/// Opens `file` to read what its last user had put into it, perhaps without the last changes, where nothing can be
/// written.
pub fn open_to_read(file: &Path, layout: Layout) -> Result<Connection, Failure> {
    let file = state_file::place(file)?;
    let uri = format!("file:{}?immutable=1", file.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(uri, flags)?;
    match layout.of(&connection, &file)? {
        Some(number) if number == layout.number => Ok(connection),
        _ => Err(Failure::Refused("its layout is an old one, and cannot be brought to today's".into())),
    }
}

impl Layout {
    /// The number of the layout that stands in a whole file of ours; none if the file is new.
    fn of(&self, connection: &Connection, file: &Path) -> Result<Option<i64>, Failure> {
        let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if (found, tables) == (0, 0) {
            return Ok(None);
        }
        if !(1..=self.number).contains(&found) {
            let (file, own) = (file.display(), self.number);
            let what = if found > own { "newer than" } else { "not one of" };
            return Err(Failure::Unknown(format!(
                "{file} has a layout of number {found}, {what} those up to {own} that this version knows: start the \
                 version that made it, or move it away; it is left as it is"
            )));
        }
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict == "ok" { Ok(Some(found)) } else { Err(Failure::Damaged(verdict)) }
    }

    /// Makes a new file one of this layout, or one of layout number `found`.
    fn bring(&self, connection: &mut Connection, found: Option<i64>) -> Result<(), Failure> {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        match found.and_then(|found| usize::try_from(found).ok()) {
            None => transaction.execute_batch(self.schema)?,
            Some(found) => {
                for upgrade in self.upgrades.iter().skip(found.saturating_sub(1)) {
                    transaction.execute_batch(upgrade)?;
                }
            }
        }
        transaction.pragma_update(None, "user_version", self.number)?;
        transaction.commit()?;
        Ok(())
    }
}

/// Gives a damaged file another name, so that a new one can take its place.
pub fn quarantine(file: &Path, reason: &str) -> Result<(), Failure> {
    let aside = state_file::quarantine(file)?;
    warn!(file = %file.display(), set_aside = %aside.display(), reason, "state file is damaged");
    Ok(())
}
