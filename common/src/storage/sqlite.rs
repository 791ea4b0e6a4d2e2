//! Opens an SQLite file of a program, for writing or, where that is not possible, for reading.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tracing::info;

use crate::storage::schema::Schema;
use crate::storage::{StorageError, state_file};

/// Opens `file` for this process alone, making what is missing, and migrates it to today's version. What it reports as
/// written is on the disk even if the power fails.
pub fn open(file: &Path, schema: Schema) -> Result<Connection, StorageError> {
    let file = state_file::place(file)?;
    // SQLite would make it readable for everybody.
    state_file::open(&file, OpenOptions::new().append(true).create(true))?;
    let mut connection = Connection::open_with_flags(&file, OpenFlags::default() | OpenFlags::SQLITE_OPEN_NOFOLLOW)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
    // Before anything else is done to it.
    let found = schema.found(&connection, &file)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         PRAGMA journal_size_limit = 4194304; PRAGMA cache_size = -512;",
    )?;
    let version = schema.version();
    if found != version {
        schema.migrate(&mut connection, found)?;
    }
    if found != version && found != 0 {
        info!(file = %file.display(), layout = version, before = found, "state file has a new layout");
    }
    Ok(connection)
}

/// Opens `file` to read what its last user had put into it, perhaps without the last changes, where nothing can be
/// written.
pub fn open_to_read(file: &Path, schema: Schema) -> Result<Connection, StorageError> {
    let file = state_file::place(file)?;
    // SQLite would wait for the other end of a pipe.
    state_file::open(&file, OpenOptions::new().read(true))?;
    let uri = format!("file:{}?immutable=1", file.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(uri, flags)?;
    if schema.found(&connection, &file)? == schema.version() {
        Ok(connection)
    } else {
        Err(StorageError::Unavailable("its layout is an old one, and cannot be brought to today's".into()))
    }
}
