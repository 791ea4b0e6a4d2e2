//! An SQLite file of ours: made, opened, seen to be whole, and set aside if it is not.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tracing::warn;

/// What stands in a file.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Another number is another program's.
    pub number: i64,
    /// What makes an empty file one of this layout.
    pub schema: &'static str,
}

/// Why a file does not serve.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It is not a database, or not a whole one, or not ours.
    #[error("{0}")]
    Damaged(String),
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
    if let Some(dir) = file.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // SQLite would make it readable for everybody.
    OpenOptions::new().append(true).create(true).mode(0o600).open(file)?;
    let mut connection = Connection::open(file)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    connection.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         PRAGMA journal_size_limit = 4194304; PRAGMA cache_size = -512;",
    )?;
    check(&mut connection, layout)?;
    Ok(connection)
}

/// Makes a new database ours, and sees whether an old one is, and whole.
fn check(connection: &mut Connection, layout: Layout) -> Result<(), Failure> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if (found, tables) == (0, 0) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(layout.schema)?;
        transaction.pragma_update(None, "user_version", layout.number)?;
        transaction.commit()?;
        return Ok(());
    }
    if found != layout.number {
        let reason = format!("its layout is number {found}, this program's is {}", layout.number);
        return Err(Failure::Damaged(reason));
    }
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict == "ok" { Ok(()) } else { Err(Failure::Damaged(verdict)) }
}

/// Gives a damaged file another name, so that a new one can take its place.
pub fn set_aside(file: &Path, reason: &str) -> Result<(), Failure> {
    let aside = beside(file, ".damaged");
    std::fs::rename(file, &aside)?;
    for suffix in ["-wal", "-shm"] {
        match std::fs::rename(beside(file, suffix), beside(&aside, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    warn!(file = %file.display(), set_aside = %aside.display(), reason, "state file is damaged");
    Ok(())
}

fn beside(name: &Path, suffix: &str) -> PathBuf {
    let mut name = name.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
