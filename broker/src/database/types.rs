//! The common parts of both servers: the tables, the ways to use them, and the errors.

use std::path::PathBuf;

/// The tables of all rooms, as numbered migrations for both servers. `BLOB` and `INTEGER` stand for the types that
/// `PostgreSQL` calls `BYTEA` and `BIGINT`. A released migration never changes; a change is a new one at the end.
#[derive(Debug, Clone, Copy)]
pub struct Migrations(pub &'static [&'static str]);

/// Why a job was not done. Nothing of it is in the database, unless the connection was lost during the commit, or the
/// caller timed out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
    /// The server is away, the disk is full, too many jobs wait. The job may be tried again.
    #[error("the database is not available: {0}")]
    Unavailable(String),
    /// The database has a value that this program never writes.
    #[error("the database has a value that cannot be: {0}")]
    Corrupt(String),
    /// It has no tables, and had rows by this file.
    #[error(
        "it has no tables, but had servers before: restore it, or, if it is to be empty, remove {} while this broker is stopped",
        .0.display()
    )]
    Emptied(PathBuf),
}

/// Whether a job changes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessMode {
    /// It reads.
    Read,
    /// It may write. No other job that may write, of any broker, runs at the same time.
    Write,
}
