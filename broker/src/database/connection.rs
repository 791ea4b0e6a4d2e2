//! A connection to either server, and the operations within one of its transactions.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use wgkex_common::config::Secret;

use super::had_rows_mark::HadRowsMark;
use super::postgres::Postgres;
use super::row::{Row, SqlValue};
use super::sqlite::Sqlite;
use super::types::{AccessMode, DatabaseError, Migrations};

/// The least time between two attempts to open the database.
const CONNECT_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Where the database is.
#[derive(Debug, Clone)]
pub enum Location {
    /// An SQLite file, made if it is missing.
    File(PathBuf),
    /// A `PostgreSQL` server: a URL without a password, and the password.
    Server(Box<tokio_postgres::Config>, Option<Secret>),
}

/// As the log shows it, without user and password.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(f, "{}", file.display()),
            Self::Server(server, _) => {
                write!(f, "PostgreSQL database {}", server.get_dbname().or(server.get_user()).unwrap_or_default())
            }
        }
    }
}

/// Opens the database, not too often.
pub(super) struct Connector {
    location: Location,
    migrations: Migrations,
    mark: HadRowsMark,
    failed: Option<(Instant, DatabaseError)>,
}

pub(super) enum Connection {
    Sqlite(Sqlite),
    Postgres(Box<Postgres>),
}

/// The operations of a job. It reads rows that were committed, or written by earlier jobs in the same transaction.
pub struct Transaction<'a> {
    connection: &'a mut Connection,
    /// The previous job has left a savepoint.
    has_savepoint: bool,
}

impl Connector {
    pub fn new(location: Location, migrations: Migrations, mark: HadRowsMark) -> Self {
        Self { location, migrations, mark, failed: None }
    }

    pub fn location(&self) -> &Location {
        &self.location
    }

    /// A connection to a database of today's layout.
    pub fn connect(&mut self) -> Result<Connection, DatabaseError> {
        if let Some((failed, error)) = &self.failed
            && failed.elapsed() < CONNECT_RETRY_PAUSE
        {
            return Err(error.clone());
        }
        let connected = match &self.location {
            Location::File(file) => Sqlite::open(file, self.migrations, &self.mark).map(Connection::Sqlite),
            Location::Server(server, password) => {
                let connected = Postgres::connect(server, password.as_ref(), self.migrations, &self.mark);
                connected.map(|connected| Connection::Postgres(Box::new(connected)))
            }
        };
        self.failed = connected.as_ref().err().map(|error| (Instant::now(), error.clone()));
        connected
    }
}

impl Connection {
    pub fn begin(&mut self, access: AccessMode) -> Result<(), DatabaseError> {
        match self {
            Self::Sqlite(sqlite) => sqlite.begin(access),
            Self::Postgres(postgres) => postgres.begin(access),
        }
    }

    fn commit(&mut self) -> Result<(), DatabaseError> {
        match self {
            Self::Sqlite(sqlite) => sqlite.command("COMMIT"),
            Self::Postgres(postgres) => postgres.commit(),
        }
    }

    fn command(&mut self, sql: &str) -> Result<(), DatabaseError> {
        match self {
            Self::Sqlite(sqlite) => sqlite.command(sql),
            Self::Postgres(postgres) => postgres.command(sql),
        }
    }
}

impl<'a> Transaction<'a> {
    /// The transaction that `connection` has begun.
    pub(super) fn of(connection: &'a mut Connection) -> Self {
        Self { connection, has_savepoint: false }
    }

    /// The rows of a query; `?1`, `?2` and so on in it stand for the values, and no other question mark is in it.
    pub fn query(&mut self, sql: &'static str, values: &[SqlValue]) -> Result<Vec<Row>, DatabaseError> {
        match self.connection {
            Connection::Sqlite(sqlite) => sqlite.query(sql, values),
            Connection::Postgres(postgres) => postgres.query(sql, values),
        }
    }

    /// The first row of a query.
    pub fn first(&mut self, sql: &'static str, values: &[SqlValue]) -> Result<Option<Row>, DatabaseError> {
        Ok(self.query(sql, values)?.into_iter().next())
    }

    /// Changes rows, and returns how many.
    pub fn execute(&mut self, sql: &'static str, values: &[SqlValue]) -> Result<u64, DatabaseError> {
        match self.connection {
            Connection::Sqlite(sqlite) => sqlite.execute(sql, values),
            Connection::Postgres(postgres) => postgres.execute(sql, values),
        }
    }

    /// Whether the connection can no longer be used.
    pub(super) fn is_lost(&self) -> bool {
        match &self.connection {
            Connection::Sqlite(_) => false,
            Connection::Postgres(postgres) => postgres.is_lost(),
        }
    }

    pub(super) fn commit(self) -> Result<(), DatabaseError> {
        self.connection.commit()
    }

    /// Does `work`; if it fails, its changes are rolled back, and earlier ones stay.
    pub(super) fn within_savepoint<T, E: From<DatabaseError>>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        // The previous savepoint is released in the same command: each command is a round trip to the server.
        let release = if std::mem::replace(&mut self.has_savepoint, true) { "RELEASE SAVEPOINT job; " } else { "" };
        self.connection.command(&format!("{release}SAVEPOINT job"))?;
        let result = work(self);
        if result.is_err() {
            self.connection.command("ROLLBACK TO SAVEPOINT job")?;
        }
        result
    }
}
