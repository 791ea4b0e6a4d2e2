//! The tables of a database, as numbered migrations. The number of the last applied one is the database's version,
//! which SQLite stores as `user_version`.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use crate::storage::StorageError;

/// The migrations of a database.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// SQL for each version: the first migrates an empty file to version 1, the second that to version 2, and so on.
    /// Released ones are never changed; a change is a new one at the end.
    pub migrations: &'static [&'static str],
}

impl Schema {
    /// The current version.
    #[must_use]
    pub fn version(&self) -> i64 {
        i64::try_from(self.migrations.len()).unwrap_or(i64::MAX)
    }

    /// The version of the database at `file`, 0 if it is empty, which must be a known one.
    pub(super) fn known(&self, connection: &Connection, file: &Path) -> Result<i64, StorageError> {
        let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if (found, tables) == (0, 0) {
            return Ok(0);
        }
        if !(1..=self.version()).contains(&found) {
            return Err(StorageError::unknown_version(file, found, found > self.version(), self.version()));
        }
        Ok(found)
    }

    /// The same, after an integrity check: a corrupt database is an error. Nothing is written.
    pub(super) fn found(&self, connection: &Connection, file: &Path) -> Result<i64, StorageError> {
        let found = self.known(connection, file)?;
        if found == 0 {
            return Ok(0);
        }
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict == "ok" { Ok(found) } else { Err(StorageError::Corrupt(verdict)) }
    }

    /// Applies the missing migrations to a database of version `found`, all in one transaction.
    pub(super) fn migrate(&self, connection: &mut Connection, found: i64) -> Result<(), StorageError> {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for migration in self.migrations.iter().skip(usize::try_from(found).unwrap_or(usize::MAX)) {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "user_version", self.version())?;
        transaction.commit()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::storage::sqlite;

    const FIRST: Schema = Schema { migrations: &["CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1)"] };
    const THIRD: Schema =
        Schema { migrations: &[FIRST.migrations[0], "ALTER TABLE t ADD COLUMN b INTEGER", "UPDATE t SET b = a + 1"] };
    const BROKEN: Schema =
        Schema { migrations: &[FIRST.migrations[0], "UPDATE t SET a = 9", "UPDATE nothing SET x = 1"] };

    fn row(connection: &Connection) -> (i64, Option<i64>) {
        connection.query_row("SELECT a, b FROM t", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
    }

    #[test]
    fn a_new_file_and_an_old_one_come_to_the_same_tables() {
        let dir = tempfile::tempdir().unwrap();
        let [new, old] = ["new", "old"].map(|name| dir.path().join(name));
        drop(sqlite::open(&old, FIRST).unwrap());
        for file in [&new, &old, &old] {
            let connection = sqlite::open(file, THIRD).unwrap();
            assert_eq!((THIRD.found(&connection, file).unwrap(), row(&connection)), (3, (1, Some(2))));
        }
        let newer = sqlite::open(&new, FIRST).unwrap_err().to_string();
        assert!(newer.contains("number 3, newer than those up to 1"), "{newer}");
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        drop(sqlite::open(&file, FIRST).unwrap());
        let before = fs::read(&file).unwrap();
        assert!(sqlite::open(&file, BROKEN).is_err());
        assert!(fs::read(&file).unwrap() == before);
        assert_eq!(row(&sqlite::open(&file, THIRD).unwrap()), (1, Some(2)));
    }
}
