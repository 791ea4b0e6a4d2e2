//! `PostgreSQL`: a server that several brokers may share.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use bytes::BytesMut;
use tokio::runtime::{self, Runtime};
use tokio::time::timeout;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Config, NoTls, Statement};
use wgkex_common::config::Secret;

use super::had_rows_mark::HadRowsMark;
use super::row::{Row, SqlValue};
use super::types::{AccessMode, DatabaseError, Migrations};

/// How long the server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long it may take for one statement.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Takes the advisory lock of writers (`wgkex` as a number), in a row with a value.
const TAKE_WRITE_LOCK: &str = "SELECT 1::BIGINT FROM (SELECT pg_advisory_xact_lock(512955606392)) AS locked";
/// Overrides the server's default: a writer that has waited for [`TAKE_WRITE_LOCK`] must see the rows of the writer before.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
const CREATE_LAYOUT: &str = "CREATE TABLE IF NOT EXISTS wgkex_layout (version BIGINT NOT NULL)";
const HAS_LAYOUT: &str = "SELECT count(*) FROM information_schema.tables
    WHERE table_name = 'wgkex_layout' AND table_schema = ANY (current_schemas(false))";
/// Keep a broker that is frozen, or disconnected, from holding locks: the server ends its transaction, and soon detects
/// the lost connection.
const SET_TIMEOUTS: &str = "SET statement_timeout = '4s'; SET lock_timeout = '3s'; SET idle_in_transaction_session_timeout = '6s';
    SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3; SET tcp_user_timeout = 10000";

pub(super) struct Postgres {
    client: Client,
    statements: HashMap<&'static str, Statement>,
    /// Drives the connection while a statement is awaited.
    runtime: Runtime,
    /// A statement was not answered in time.
    is_silent: bool,
}

impl Postgres {
    /// Connects, and brings the tables to today's layout.
    pub fn connect(
        server: &Config,
        password: Option<&Secret>,
        migrations: Migrations,
        mark: &HadRowsMark,
    ) -> Result<Self, DatabaseError> {
        let unavailable = |error: std::io::Error| DatabaseError::Unavailable(error.to_string());
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(unavailable)?;
        let mut server = server.clone();
        server.connect_timeout(CONNECT_TIMEOUT).application_name("wgkex-broker");
        if let Some(password) = password {
            server.password(password.expose());
        }
        let client = runtime.block_on(async {
            let (client, connection) = within(CONNECT_TIMEOUT, server.connect(NoTls)).await?;
            tokio::spawn(connection);
            Ok::<_, DatabaseError>(client)
        })?;
        let mut postgres = Self { client, statements: HashMap::new(), runtime, is_silent: false };
        postgres.command(SET_TIMEOUTS)?;
        postgres.check_encoding()?;
        postgres.migrate(migrations, mark)?;
        Ok(postgres)
    }

    /// Whether the server has closed the connection, or does not answer.
    pub fn is_lost(&self) -> bool {
        self.is_silent || self.client.is_closed()
    }

    /// Requires UTF-8: names may have any character.
    fn check_encoding(&mut self) -> Result<(), DatabaseError> {
        let encoding = self.query("SELECT current_setting('server_encoding')", &[])?;
        match encoding.first().map_or(Ok(""), |row| row.text(0))? {
            "UTF8" => Ok(()),
            other => Err(DatabaseError::Unavailable(format!("its encoding is {other}, it must be UTF8"))),
        }
    }

    pub fn begin(&mut self, access: AccessMode) -> Result<(), DatabaseError> {
        self.command(BEGIN)?;
        match access {
            AccessMode::Read => Ok(()),
            AccessMode::Write => self.query(TAKE_WRITE_LOCK, &[]).map(drop),
        }
    }

    /// In a transaction in which a statement has failed, `COMMIT` would be a rollback without an error. Every other
    /// statement fails there, so the query before it reports the error.
    pub fn commit(&mut self) -> Result<(), DatabaseError> {
        self.command("SELECT 1; COMMIT")
    }

    pub fn command(&mut self, sql: &str) -> Result<(), DatabaseError> {
        let answer = self.runtime.block_on(within(STATEMENT_TIMEOUT, self.client.batch_execute(sql)));
        self.noted(answer)
    }

    pub fn query(&mut self, sql: &'static str, values: &[SqlValue]) -> Result<Vec<Row>, DatabaseError> {
        let statement = self.prepare(sql)?;
        let answer = self.runtime.block_on(within(STATEMENT_TIMEOUT, self.client.query(&statement, &params(values))));
        self.noted(answer)?.iter().map(row).collect()
    }

    pub fn execute(&mut self, sql: &'static str, values: &[SqlValue]) -> Result<u64, DatabaseError> {
        let statement = self.prepare(sql)?;
        let answer = self.runtime.block_on(within(STATEMENT_TIMEOUT, self.client.execute(&statement, &params(values))));
        self.noted(answer)
    }

    fn prepare(&mut self, sql: &'static str) -> Result<Statement, DatabaseError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let text = sql.replace('?', "$");
        let answer = self.runtime.block_on(within(STATEMENT_TIMEOUT, self.client.prepare(&text)));
        let statement = self.noted(answer)?;
        self.statements.insert(sql, statement.clone());
        Ok(statement)
    }

    /// Marks the connection as lost if the answer was not received in time.
    fn noted<T>(&mut self, answer: Result<T, DatabaseError>) -> Result<T, DatabaseError> {
        self.is_silent |= matches!(&answer, Err(DatabaseError::Unavailable(reason)) if reason == SILENT);
        answer
    }

    /// Runs the migrations that the tables lack, all in one transaction. Another broker may do so at the same time.
    /// Tables that are up to date need no right but that to read them.
    fn migrate(&mut self, migrations: Migrations, mark: &HadRowsMark) -> Result<(), DatabaseError> {
        let known = i64::try_from(migrations.0.len()).unwrap_or(i64::MAX);
        let found = self.layout(known)?;
        if found == known {
            return mark.check(found);
        }
        self.command(BEGIN)?;
        self.command(TAKE_WRITE_LOCK)?;
        self.command(CREATE_LAYOUT)?;
        let found = self.layout(known)?;
        for migration in migrations.0.iter().skip(usize::try_from(found).unwrap_or(usize::MAX)) {
            self.command(&migration.replace("BLOB", "BYTEA").replace("INTEGER", "BIGINT"))?;
        }
        // Checked after the migrations: with tables but without a version these fail, with an error that names the
        // table. Nothing is committed if this is an error.
        mark.check(found)?;
        if found < known {
            self.command("DELETE FROM wgkex_layout")?;
            self.execute("INSERT INTO wgkex_layout VALUES (?1)", &[known.into()])?;
        }
        self.command("COMMIT")
    }

    /// The version of the tables, 0 if there are none.
    fn layout(&mut self, known: i64) -> Result<i64, DatabaseError> {
        if self.query(HAS_LAYOUT, &[])?.first().map_or(Ok(0), |row| row.integer(0))? == 0 {
            return Ok(0);
        }
        let found = self.query("SELECT version FROM wgkex_layout", &[])?;
        let found = found.first().map_or(Ok(0), |row| row.integer(0))?;
        if found > known {
            return Err(DatabaseError::Unavailable(format!(
                "its layout has the number {found}, newer than those up to {known} that this version knows; it is left as it is"
            )));
        }
        Ok(found)
    }
}

/// The reason of a statement that was not answered in time.
const SILENT: &str = "it does not answer in time";

/// The server's answer; an error if it is not received in time.
async fn within<T>(
    time: Duration,
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, DatabaseError> {
    match timeout(time, answer).await {
        Ok(answer) => answer.map_err(|error| DatabaseError::Unavailable(reason(&error))),
        Err(_) => Err(DatabaseError::Unavailable(SILENT.into())),
    }
}

/// The error of the server, or that of the system.
fn reason(error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    error.as_db_error().map(|error| error.message().to_owned()).or(cause).unwrap_or_else(|| error.to_string())
}

fn params(values: &[SqlValue]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}

fn row(row: &tokio_postgres::Row) -> Result<Row, DatabaseError> {
    let value = |(column, of): (usize, &tokio_postgres::Column)| {
        let value = match *of.type_() {
            Type::INT8 => row.try_get(column).map(SqlValue::Integer),
            Type::BYTEA => row.try_get(column).map(SqlValue::Bytes),
            _ => row.try_get(column).map(SqlValue::Text),
        };
        value.map_err(|error| DatabaseError::Corrupt(error.to_string()))
    };
    row.columns().iter().enumerate().map(value).collect::<Result<_, _>>().map(Row)
}

impl ToSql for SqlValue {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Integer(number) => number.to_sql(kind, out),
            Self::Text(text) => text.to_sql(kind, out),
            Self::Bytes(bytes) => bytes.to_sql(kind, out),
        }
    }

    fn accepts(kind: &Type) -> bool {
        [Type::INT8, Type::TEXT, Type::BYTEA].contains(kind)
    }

    to_sql_checked!();
}
