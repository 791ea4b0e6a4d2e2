//! Opens an SQLite file of a program, for writing or, where that is not possible, for reading.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;
use tracing::info;

use crate::storage::schema::Schema;
use crate::storage::{StorageError, state_file};

/// How often copying a file is tried while its process changes it.
const COPY_ATTEMPTS_MAX: u32 = 20;
/// The pause between two copies.
const COPY_PAUSE: Duration = Duration::from_millis(50);

/// Opens `file` for this process alone, creating it if it is missing, and migrates it to the current version. Committed
/// changes are on the disk even if the power fails.
pub fn open(file: &Path, schema: Schema) -> Result<Connection, StorageError> {
    open_if(file, schema, |_| Ok(()))
}

/// The same if `admit` accepts the version that is found, 0 for a file without tables. Otherwise nothing is written.
pub fn open_if<E: From<StorageError>>(
    file: &Path,
    schema: Schema,
    admit: impl FnOnce(i64) -> Result<(), E>,
) -> Result<Connection, E> {
    let file = state_file::place(file).map_err(StorageError::from)?;
    let (connection, found) = lock(&file, schema)?;
    admit(found)?;
    Ok(migrate(connection, found, &file, schema)?)
}

/// Opens `file` for this process alone, and reads its version.
fn lock(file: &Path, schema: Schema) -> Result<(Connection, i64), StorageError> {
    // SQLite would create it readable for everybody.
    state_file::open(file, OpenOptions::new().append(true).create(true))?;
    let connection = Connection::open_with_flags(file, OpenFlags::default() | OpenFlags::SQLITE_OPEN_NOFOLLOW)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    connection.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
    // Before any change.
    let found = schema.found(&connection, file)?;
    Ok((connection, found))
}

fn migrate(mut connection: Connection, found: i64, file: &Path, schema: Schema) -> Result<Connection, StorageError> {
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

/// Opens `file` for reading its content, perhaps without the last changes, if it cannot be written.
pub fn open_to_read(file: &Path, schema: Schema) -> Result<Connection, StorageError> {
    let file = state_file::place(file)?;
    let connection = open_immutable(&file)?;
    if schema.found(&connection, &file)? == schema.version() {
        Ok(connection)
    } else {
        Err(StorageError::Unavailable("its layout is an old one, and cannot be brought to today's".into()))
    }
}

/// Checks that the version of `file` is known, without its last changes.
pub(crate) fn check_version(file: &Path, schema: Schema) -> Result<(), StorageError> {
    schema.known(&open_immutable(file)?, file).map(drop)
}

/// Opens `file` alone, without SQLite's files beside it. Nothing is written.
fn open_immutable(file: &Path) -> Result<Connection, StorageError> {
    // SQLite would block on a pipe.
    state_file::open(file, OpenOptions::new().read(true))?;
    let uri = format!("file:{}?immutable=1", file.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    Ok(Connection::open_with_flags(uri, flags)?)
}

/// Copies `file`, which another process may use, and opens the copy; none if there is no such file. The process is not
/// disturbed: no lock is taken, and its locks do not matter.
pub fn open_copy(file: &Path, schema: Schema) -> Result<Option<(TempDir, Connection)>, StorageError> {
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("copy");
    for _ in 0..COPY_ATTEMPTS_MAX {
        let before = stamps(file);
        match copy_to(&copy, file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            copied => copied?,
        }
        if before == stamps(file)
            && let Ok(connection) = Connection::open(&copy)
            && let Ok(found) = schema.found(&connection, file)
        {
            return if found == schema.version() {
                Ok(Some((dir, connection)))
            } else {
                Err(StorageError::Unavailable(format!("{} has an old layout, or none", file.display())))
            };
        }
        sleep(COPY_PAUSE);
    }
    Err(StorageError::Corrupt(format!("{} cannot be copied whole, or is damaged", file.display())))
}

/// Its files; the second has the last changes.
fn parts(file: &Path) -> [PathBuf; 2] {
    ["", "-wal"].map(|part| state_file::with_suffix(file, part.as_ref()))
}

/// Changes when one of its files does.
fn stamps(file: &Path) -> [Option<(u64, SystemTime)>; 2] {
    parts(file).map(|part| {
        let metadata = part.symlink_metadata().ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    })
}

fn copy_to(copy: &Path, file: &Path) -> io::Result<()> {
    for (from, to) in parts(file).iter().zip(parts(copy)) {
        match state_file::open(from, OpenOptions::new().read(true)) {
            Ok(mut from) => drop(io::copy(&mut from, &mut File::create(&to)?)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound && from != file => drop(fs::remove_file(&to)),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
