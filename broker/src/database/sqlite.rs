//! SQLite: a file that only this process opens.

use std::path::Path;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{ToSql, params_from_iter};
use wgkex_common::storage::StorageError;
use wgkex_common::storage::schema::Schema;
use wgkex_common::storage::sqlite;

use super::had_rows_mark::HadRowsMark;
use super::row::{Row, SqlValue};
use super::types::{AccessMode, DatabaseError, Migrations};

/// The pages that are kept in memory, in KiB.
const CACHE_KIB: i64 = 8 << 10;

pub(super) struct Sqlite(rusqlite::Connection);

impl Sqlite {
    pub fn open(file: &Path, migrations: Migrations, mark: &HadRowsMark) -> Result<Self, DatabaseError> {
        let connection = sqlite::open_if(file, Schema { migrations: migrations.0 }, |found| mark.check(found))?;
        connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
        connection.set_prepared_statement_cache_capacity(64);
        Ok(Self(connection))
    }

    pub fn begin(&mut self, access: AccessMode) -> Result<(), DatabaseError> {
        self.command(if access == AccessMode::Write { "BEGIN IMMEDIATE" } else { "BEGIN" })
    }

    pub fn command(&mut self, sql: &str) -> Result<(), DatabaseError> {
        Ok(self.0.execute_batch(sql)?)
    }

    pub fn query(&mut self, sql: &str, values: &[SqlValue]) -> Result<Vec<Row>, DatabaseError> {
        let mut statement = self.0.prepare_cached(sql)?;
        let columns = statement.column_count();
        let mut found = statement.query(params_from_iter(values))?;
        let mut rows = Vec::new();
        while let Some(row) = found.next()? {
            let values = (0..columns).map(|column| value(row.get_ref(column)?, column));
            rows.push(Row(values.collect::<Result<_, _>>()?));
        }
        Ok(rows)
    }

    pub fn execute(&mut self, sql: &str, values: &[SqlValue]) -> Result<u64, DatabaseError> {
        let changed = self.0.prepare_cached(sql)?.execute(params_from_iter(values))?;
        Ok(u64::try_from(changed).unwrap_or(u64::MAX))
    }
}

fn value(value: ValueRef<'_>, column: usize) -> Result<SqlValue, DatabaseError> {
    let corrupt = |what: &str| DatabaseError::Corrupt(format!("column {column} has {what}"));
    match value {
        ValueRef::Integer(number) => Ok(SqlValue::Integer(number)),
        ValueRef::Text(text) => match std::str::from_utf8(text) {
            Ok(text) => Ok(SqlValue::Text(text.to_owned())),
            Err(_) => Err(corrupt("a text that is not UTF-8")),
        },
        ValueRef::Blob(bytes) => Ok(SqlValue::Bytes(bytes.to_vec())),
        ValueRef::Null => Err(corrupt("nothing")),
        ValueRef::Real(_) => Err(corrupt("a fraction")),
    }
}

impl ToSql for SqlValue {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

impl From<rusqlite::Error> for DatabaseError {
    fn from(error: rusqlite::Error) -> Self {
        StorageError::from(error).into()
    }
}

impl From<StorageError> for DatabaseError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Corrupt(reason) => Self::Corrupt(reason),
            StorageError::Unavailable(reason) | StorageError::UnknownVersion(reason) | StorageError::InUse(reason) => {
                Self::Unavailable(reason)
            }
        }
    }
}
