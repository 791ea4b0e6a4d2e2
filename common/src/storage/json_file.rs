//! A JSON file with a version: the new content is written to a second file, which then replaces the old one, so that
//! there is always a complete one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::storage::{StorageError, state_file};

/// The written document: the version, and the fields of the content.
#[derive(Serialize)]
struct Versioned<T> {
    layout: u32,
    #[serde(flatten)]
    content: T,
}

/// The version in a file. The first files have none; a later one may have any type.
#[derive(Deserialize)]
struct LayoutVersion {
    #[serde(default)]
    layout: Value,
}

/// Reads the content of `file`, whose version is `known` or an earlier compatible one; none if there is no file. A
/// corrupt one is renamed, and then there is none either.
pub fn load<T: DeserializeOwned>(file: &Path, known: u32) -> Result<Option<T>, StorageError> {
    match read(file, known) {
        Err(StorageError::Corrupt(reason)) => {
            state_file::quarantine(file, &reason)?;
            Ok(None)
        }
        read => read,
    }
}

/// The same, but a corrupt file is an error and is not renamed.
pub fn read<T: DeserializeOwned>(file: &Path, known: u32) -> Result<Option<T>, StorageError> {
    let mut json = Vec::new();
    let read = state_file::open(file, OpenOptions::new().read(true)).and_then(|mut file| file.read_to_end(&mut json));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StorageError::Unavailable(format!("{} cannot be read: {error}", file.display()))),
        Ok(_) => {}
    }
    if let Ok(LayoutVersion { layout }) = serde_json::from_slice(&json)
        && !layout.is_null()
        && layout.as_u64().is_none_or(|layout| layout > known.into())
    {
        let is_newer = layout.as_f64().is_some_and(|layout| layout > known.into());
        return Err(StorageError::unknown_version(file, layout, is_newer, known.into()));
    }
    serde_json::from_slice(&json).map(Some).map_err(|error| StorageError::Corrupt(error.to_string()))
}

/// Writes the content of `file` as one of version `layout`, and returns when it is on the disk.
pub fn save(file: &Path, layout: u32, content: impl Serialize) -> Result<(), StorageError> {
    let json = serde_json::to_vec(&Versioned { layout, content }).map_err(io::Error::other)?;
    let file = state_file::place(file)?;
    let new = unfinished(&file);
    // The rest of an interrupted write, or a link that somebody made: it is not written through.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut written = state_file::open(&new, OpenOptions::new().write(true).create_new(true))?;
    give_to_owner_of(file.parent(), &written)?;
    written.write_all(&json)?;
    written.sync_all()?;
    fs::rename(&new, &file)?;
    // The rename must be on the disk, too.
    File::open(file.parent().ok_or(io::Error::from(io::ErrorKind::InvalidInput))?)?.sync_all()?;
    Ok(())
}

/// A file that root writes in the directory of another user is given to that user.
fn give_to_owner_of(dir: Option<&Path>, file: &File) -> io::Result<()> {
    let (Some(dir), made) = (dir, file.metadata()?) else { return Ok(()) };
    let owner = fs::metadata(dir)?;
    if made.uid() != 0 || owner.uid() == 0 {
        return Ok(());
    }
    fchown(file, Some(owner.uid()), Some(owner.gid()))
}

/// The second file, until it is complete.
pub(crate) fn unfinished(file: &Path) -> PathBuf {
    state_file::with_suffix(file, ".new".as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Names {
        names: Vec<String>,
    }

    fn names(name: &str) -> Names {
        Names { names: vec![name.into()] }
    }

    #[test]
    fn saved_data_is_loaded_and_begins_with_its_version() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state/f.json");
        assert_eq!(load::<Names>(&file, 2).unwrap(), None);
        for name in ["a", "b"] {
            save(&file, 2, names(name)).unwrap();
            assert_eq!(load(&file, 2).unwrap(), Some(names(name)));
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), r#"{"layout":2,"names":["b"]}"#);
        fs::write(&file, r#"{"names":["c"]}"#).unwrap();
        assert_eq!(load(&file, 2).unwrap(), Some(names("c")), "one of the first versions");
    }

    #[test]
    fn a_newer_version_stays_and_a_corrupt_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.json");
        fs::write(&file, r#"{"layout":3,"names":"of another kind"}"#).unwrap();
        let newer = load::<Names>(&file, 2).unwrap_err().to_string();
        assert!(newer.contains("f.json") && newer.contains("number 3, newer than those up to 2"), "{newer}");
        for layout in ["3", "1099511627776", "-1", "2.5", "\"x\"", "[]"] {
            let text = format!(r#"{{"layout":{layout},"names":[]}}"#);
            fs::write(&file, &text).unwrap();
            assert!(load::<Names>(&file, 2).is_err(), "{layout}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        fs::write(&file, "{").unwrap();
        assert_eq!(load::<Names>(&file, 2).unwrap(), None);
        assert!(!file.exists() && dir.path().join("f.json.damaged").exists());
    }

    #[test]
    fn a_file_is_of_the_owner_of_its_directory_where_root_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, is_root) = (dir.path().join("f.json"), fs::metadata(dir.path()).unwrap().uid() == 0);
        if is_root {
            std::os::unix::fs::chown(dir.path(), Some(65_534), Some(65_534)).unwrap();
        }
        save(&file, 1, names("a")).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().uid(), fs::metadata(dir.path()).unwrap().uid());
    }

    #[test]
    fn a_failed_write_is_an_error_and_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.json");
        save(&file, 1, names("a")).unwrap();
        fs::create_dir(unfinished(&file)).unwrap();
        assert!(save(&file, 1, names("b")).is_err());
        assert_eq!(load(&file, 1).unwrap(), Some(names("a")));
    }
}
