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

use super::{Access, DatabaseError, Migrations, Row, Value};

/// How long the server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How long it may take for one statement.
const STATEMENT: Duration = Duration::from_secs(5);
/// The advisory lock of whoever writes; `wgkex` as a number.
const WRITERS: &str = "SELECT pg_advisory_xact_lock(512955606392)";
const CREATE_LAYOUT: &str = "CREATE TABLE IF NOT EXISTS wgkex_layout (version BIGINT NOT NULL)";

pub(super) struct Postgres {
    client: Client,
    statements: HashMap<&'static str, Statement>,
    /// What the connection runs on, while a statement is waited for.
    runtime: Runtime,
}

impl Postgres {
    /// Connects, and brings the tables to today's layout.
    pub fn connect(server: &Config, password: Option<&Secret>, migrations: Migrations) -> Result<Self, DatabaseError> {
        let unavailable = |error: std::io::Error| DatabaseError::Unavailable(error.to_string());
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(unavailable)?;
        let mut server = server.clone();
        server.connect_timeout(CONNECT).application_name("wgkex-broker");
        if let Some(password) = password {
            server.password(password.expose());
        }
        let client = runtime.block_on(async {
            let (client, connection) = within(CONNECT, server.connect(NoTls)).await?;
            tokio::spawn(connection);
            Ok::<_, DatabaseError>(client)
        })?;
        let mut postgres = Self { client, statements: HashMap::new(), runtime };
        postgres.migrate(migrations)?;
        Ok(postgres)
    }

    pub fn begin(&mut self, access: Access) -> Result<(), DatabaseError> {
        self.command("BEGIN")?;
        match access {
            Access::Read => Ok(()),
            Access::Write => self.query(WRITERS_OF_JOBS, &[]).map(drop),
        }
    }

    pub fn command(&mut self, sql: &str) -> Result<(), DatabaseError> {
        self.runtime.block_on(within(STATEMENT, self.client.batch_execute(sql)))
    }

    pub fn query(&mut self, sql: &'static str, values: &[Value]) -> Result<Vec<Row>, DatabaseError> {
        let statement = self.prepare(sql)?;
        let rows = self.runtime.block_on(within(STATEMENT, self.client.query(&statement, &params(values))))?;
        rows.iter().map(row).collect()
    }

    pub fn execute(&mut self, sql: &'static str, values: &[Value]) -> Result<u64, DatabaseError> {
        let statement = self.prepare(sql)?;
        self.runtime.block_on(within(STATEMENT, self.client.execute(&statement, &params(values))))
    }

    fn prepare(&mut self, sql: &'static str) -> Result<Statement, DatabaseError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let text = sql.replace('?', "$");
        let statement = self.runtime.block_on(within(STATEMENT, self.client.prepare(&text)))?;
        self.statements.insert(sql, statement.clone());
        Ok(statement)
    }

    /// Runs the migrations that the tables lack, all in one transaction. Another broker may want to at the same time.
    fn migrate(&mut self, migrations: Migrations) -> Result<(), DatabaseError> {
        self.command("BEGIN")?;
        self.command(WRITERS)?;
        self.command(CREATE_LAYOUT)?;
        let found = self.query("SELECT version FROM wgkex_layout", &[])?;
        let found = found.first().map_or(Ok(0), |row| row.integer(0))?;
        let known = i64::try_from(migrations.0.len()).unwrap_or(i64::MAX);
        if found > known {
            return Err(DatabaseError::Unavailable(format!(
                "its layout has the number {found}, newer than those up to {known} that this version knows; it is left as it is"
            )));
        }
        for migration in migrations.0.iter().skip(usize::try_from(found).unwrap_or(usize::MAX)) {
            self.command(&migration.replace("BLOB", "BYTEA").replace("INTEGER", "BIGINT"))?;
        }
        if found < known {
            self.command("DELETE FROM wgkex_layout")?;
            self.execute("INSERT INTO wgkex_layout VALUES (?1)", &[known.into()])?;
        }
        self.command("COMMIT")
    }
}

/// The same as [`WRITERS`], with a row that has a value.
const WRITERS_OF_JOBS: &str = "SELECT 1::BIGINT FROM (SELECT pg_advisory_xact_lock(512955606392)) AS locked";

/// What the server answers in time.
async fn within<T>(
    time: Duration,
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, DatabaseError> {
    match timeout(time, answer).await {
        Ok(answer) => answer.map_err(|error| DatabaseError::Unavailable(reason(&error))),
        Err(_) => Err(DatabaseError::Unavailable("it does not answer in time".into())),
    }
}

/// What the server says, or what the system does.
fn reason(error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    error.as_db_error().map(|error| error.message().to_owned()).or(cause).unwrap_or_else(|| error.to_string())
}

fn params(values: &[Value]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}

fn row(row: &tokio_postgres::Row) -> Result<Row, DatabaseError> {
    let value = |(column, of): (usize, &tokio_postgres::Column)| {
        let value = match *of.type_() {
            Type::INT8 => row.try_get(column).map(Value::Integer),
            Type::BYTEA => row.try_get(column).map(Value::Bytes),
            _ => row.try_get(column).map(Value::Text),
        };
        value.map_err(|error| DatabaseError::Corrupt(error.to_string()))
    };
    row.columns().iter().enumerate().map(value).collect::<Result<_, _>>().map(Row)
}

impl ToSql for Value {
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
