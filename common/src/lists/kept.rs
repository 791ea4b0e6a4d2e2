//! The records on disk, in a file of their own: written whole, beside the old one, and then put in its place, so that
//! there is always one that is whole.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::records::{Record, Records};

#[derive(Serialize, Deserialize)]
struct Content {
    records: Vec<Record>,
}

/// Reads the records that still matter at `now`, in seconds of Unix time. A damaged file is set aside.
pub(super) fn read(file: &Path, now: u64) -> Records {
    let content = match fs::read(file) {
        Ok(json) => serde_json::from_slice::<Content>(&json).map_err(|error| error.to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Records::default(),
        Err(error) => Err(error.to_string()),
    };
    let mut records = Records::default();
    match content {
        Ok(content) => {
            for record in content.records {
                records.merge(record, now);
            }
        }
        Err(reason) => {
            let aside = beside(file, ".damaged");
            let is_aside = fs::rename(file, &aside).is_ok();
            warn!(file = %file.display(), reason, is_aside, "file of shared list entries is damaged");
        }
    }
    records
}

/// Writes the records, and returns when they are on the disk.
pub(super) fn write(file: &Path, records: &Records) -> io::Result<()> {
    let content = Content { records: records.iter().cloned().collect() };
    let json = serde_json::to_vec(&content).map_err(io::Error::other)?;
    let dir = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = beside(file, ".new");
    let mut options = OpenOptions::new();
    let mut written = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    written.write_all(&json)?;
    written.sync_all()?;
    fs::rename(&new, file)?;
    // The name, too.
    File::open(dir)?.sync_all()
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PublicKey;
    use crate::lists::{Entry, List};

    #[test]
    fn what_is_written_is_read_and_a_damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state/broker.lists.json");
        assert_eq!(read(&file, 0), Records::default());
        let mut records = Records::default();
        let key = PublicKey::from_bytes([3; 32]).unwrap();
        records.change(Entry::new(List::Deny, key), true, 5).unwrap();
        records.change(Entry::new(List::Trusted, key), false, 6).unwrap();
        write(&file, &records).unwrap();
        assert_eq!(read(&file, 0), records);
        write(&file, &Records::default()).unwrap();
        assert_eq!(read(&file, 0), Records::default());
        fs::write(&file, "{").unwrap();
        assert_eq!(read(&file, 0), Records::default());
        assert!(!file.exists() && dir.path().join("state/broker.lists.json.damaged").exists());
    }

    #[test]
    fn what_cannot_be_written_is_an_error_and_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("broker.lists.json");
        write(&file, &Records::default()).unwrap();
        fs::create_dir(beside(&file, ".new")).unwrap();
        assert!(write(&file, &Records::default()).is_err());
        assert!(file.exists());
    }
}
