//! The versions of a program's files in `state_dir`, checked before the first file is opened: opening migrates, and a
//! start that fails because of a newer file has to leave all files as they are.

use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;

use crate::storage::schema::Schema;
use crate::storage::{StorageError, json_file, sqlite};

/// A file in `state_dir`, in the format of this version of the program.
#[derive(Debug, Clone, Copy)]
pub struct StateFile {
    /// Its name.
    pub name: &'static str,
    /// Its format.
    pub format: StateFormat,
}

/// The format of a file, with its version.
#[derive(Debug, Clone, Copy)]
pub enum StateFormat {
    /// A database.
    Sqlite(Schema),
    /// A [`json_file`] with this version.
    Json(u32),
}

impl StateFile {
    /// A database.
    #[must_use]
    pub const fn sqlite(name: &'static str, schema: Schema) -> Self {
        Self { name, format: StateFormat::Sqlite(schema) }
    }

    /// A JSON file.
    #[must_use]
    pub const fn json(name: &'static str, layout: u32) -> Self {
        Self { name, format: StateFormat::Json(layout) }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self, state_dir: &Path) -> PathBuf {
        state_dir.join(self.name)
    }

    fn check(&self, state_dir: &Path) -> Result<(), StorageError> {
        let file = self.path(state_dir);
        match self.format {
            StateFormat::Sqlite(schema) => sqlite::check_version(&file, schema),
            StateFormat::Json(layout) => json_file::read::<IgnoredAny>(&file, layout).map(drop),
        }
    }
}

/// Returns an error if a file has a version that this program does not know. Nothing is written; other problems of a
/// file are reported when it is opened.
pub fn check(state_dir: &Path, files: &[StateFile]) -> Result<(), StorageError> {
    // The directory may be a symbolic link; if it does not exist, there are no files.
    let Ok(dir) = state_dir.canonicalize() else { return Ok(()) };
    let unknown = files.iter().find_map(|file| match file.check(&dir) {
        Err(unknown @ StorageError::UnknownVersion(_)) => Some(unknown),
        _ => None,
    });
    unknown.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const OLD: Schema = Schema { migrations: &["CREATE TABLE t (a INTEGER)"] };
    const NEW: Schema = Schema { migrations: &[OLD.migrations[0], "ALTER TABLE t ADD COLUMN b INTEGER"] };

    #[test]
    fn only_an_unknown_version_is_found_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let files = [StateFile::sqlite("a.sqlite", OLD), StateFile::json("b.json", 1)];
        let [database, json] = files.map(|file| file.path(dir.path()));
        check(&dir.path().join("missing"), &files).unwrap();
        assert!(!dir.path().join("missing").exists());
        check(dir.path(), &files).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

        fs::write(&database, "damaged").unwrap();
        fs::write(&json, "{").unwrap();
        check(dir.path(), &files).unwrap();

        fs::write(&json, r#"{"layout":2}"#).unwrap();
        assert!(check(dir.path(), &files).unwrap_err().to_string().contains("b.json"));
        check(dir.path(), &files[..1]).unwrap();
        fs::remove_file(&database).unwrap();
        drop(sqlite::open(&database, NEW).unwrap());
        let before = fs::read(&database).unwrap();
        assert!(check(dir.path(), &files).unwrap_err().to_string().contains("a.sqlite"));
        assert_eq!(fs::read(&database).unwrap(), before);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
