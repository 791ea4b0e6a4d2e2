//! The records on disk, in a separate file, written as soon as they change: the admin call that makes a record waits
//! for that.

use std::future::pending;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::warn;

use crate::access_lists::records::{Record, Records};
use crate::storage::versions::StateFile;
use crate::storage::{Health, Noun, StorageError, json_file};

/// The pause before a failed write or read is tried again.
const WRITE_RETRY: Duration = Duration::from_secs(5);
/// The version of the file format.
const LAYOUT: u32 = 1;

/// A broker's file in `state_dir`.
pub const BROKER_FILE: StateFile = StateFile::json("broker.lists.json", LAYOUT);
/// A worker's.
pub const WORKER_FILE: StateFile = StateFile::json("worker.lists.json", LAYOUT);
const NOUN: Noun = Noun { name: "list entries", pronoun: "them" };

/// The progress of writing the records to disk, with one write at a time. Changes are numbered. A file that could not
/// be read is not overwritten.
#[derive(Debug)]
pub(super) struct RecordsWriter {
    file: PathBuf,
    is_unread: bool,
    changed: u64,
    written: u64,
    working: Option<(u64, JoinHandle<WriteOutcome>)>,
    failed: Option<Instant>,
    health: Health,
    waiting: Vec<(u64, oneshot::Sender<()>)>,
}

/// The result of a write, or that of a read, with the records.
type WriteOutcome = Result<Option<Vec<Record>>, StorageError>;
/// A finished write or read: the number of the last change in it, and its result.
pub(super) type FinishedWrite = (u64, WriteOutcome);

impl RecordsWriter {
    /// Reads the records of `file`, where they are written from now on. A corrupt file is renamed; one that cannot be
    /// read is tried again later. The only error is a file of a later version.
    pub fn open(file: PathBuf) -> Result<(Self, Vec<Record>), StorageError> {
        let found = load(&file);
        let (is_unread, failed) = (found.is_err(), found.is_err().then(Instant::now));
        let (records, health) = match found {
            Ok(records) => (records, Health::new(file.clone(), NOUN)),
            Err(unknown @ StorageError::UnknownVersion(_)) => return Err(unknown),
            Err(error @ (StorageError::Unavailable(_) | StorageError::InUse(_) | StorageError::Corrupt(_))) => {
                let path = file.display();
                warn!(file = %path, %error, "list entries cannot be read: those that were kept do not count until they are");
                (Vec::new(), Health::unread(file.clone(), NOUN))
            }
        };
        let (working, waiting) = (None, Vec::new());
        Ok((Self { file, is_unread, changed: 0, written: 0, working, failed, health, waiting }, records))
    }

    /// The records changed.
    pub fn changed(&mut self) {
        self.changed += 1;
    }

    /// Resolves when the last change is on the disk; the sender is dropped if it cannot be written now.
    pub fn persisted(&mut self) -> oneshot::Receiver<()> {
        let (sender, kept) = oneshot::channel();
        self.waiting.push((self.changed, sender));
        kept
    }

    /// Whether the last attempt failed.
    pub fn is_failing(&self) -> bool {
        self.failed.is_some()
    }

    /// Whether there are changes to write, and the last attempt did not fail.
    pub fn is_behind(&self) -> bool {
        self.written < self.changed && !self.is_failing()
    }

    /// Starts to write the changes, unless a write is running or has just failed.
    pub fn begin(&mut self, records: &Records, now: Instant) {
        if self.failed.is_some_and(|failed| now.saturating_duration_since(failed) < WRITE_RETRY) {
            self.waiting.clear();
        } else if self.working.is_none() && self.is_unread {
            let file = self.file.clone();
            self.working = Some((self.written, spawn_blocking(move || load(&file).map(Some))));
        } else if self.working.is_none() && self.written < self.changed {
            let (file, records) = (self.file.clone(), records.clone());
            self.working = Some((self.changed, spawn_blocking(move || write(&file, &records).map(|()| None))));
        }
    }

    /// Returns when the running write or read has finished; never if none is running.
    pub async fn done(&mut self) -> FinishedWrite {
        let Some((number, task)) = &mut self.working else { return pending().await };
        let (number, result) = (*number, task.await);
        self.working = None;
        (number, result.unwrap_or_else(|error| Err(io::Error::other(error).into())))
    }

    /// Handles the result of a write or a read, and returns the records that were read.
    pub fn written(&mut self, (number, result): FinishedWrite) -> Option<Vec<Record>> {
        match result {
            Ok(found) => {
                self.is_unread = false;
                self.written = number;
                self.failed = None;
                let waiting = mem::take(&mut self.waiting).into_iter();
                let (kept, waiting): (Vec<_>, Vec<_>) = waiting.partition(|(change, _)| *change <= number);
                self.waiting = waiting;
                for (_, sender) in kept {
                    // The caller may have stopped waiting.
                    let _ = sender.send(());
                }
                self.health.succeeded();
                found
            }
            Err(error) => {
                self.failed = Some(Instant::now());
                self.waiting.clear();
                self.health.failed(&error);
                None
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct StoredRecords {
    records: Vec<Record>,
}

/// Reads the records of a file; empty if there is no file, or a corrupt one, which is renamed.
fn load(file: &Path) -> Result<Vec<Record>, StorageError> {
    let content = json_file::load::<StoredRecords>(file, LAYOUT)?;
    Ok(content.map(|content| content.records).unwrap_or_default())
}

/// Reads the records of a file of another process without changing it.
pub(super) fn peek(file: &Path) -> Result<Vec<Record>, StorageError> {
    let content = json_file::read::<StoredRecords>(file, LAYOUT)?;
    Ok(content.map(|content| content.records).unwrap_or_default())
}

/// Writes the records, and returns when they are on the disk.
fn write(file: &Path, records: &Records) -> Result<(), StorageError> {
    json_file::save(file, LAYOUT, StoredRecords { records: records.iter().cloned().collect() })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::PublicKey;
    use crate::access_lists::{Entry, List};

    fn read(file: &Path, now: u64) -> Records {
        Records::restored(load(file).unwrap(), now)
    }

    #[test]
    fn written_records_are_read_again_and_a_damaged_file_is_quarantined() {
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

    /// Failed when both were taken for corruption: the file was renamed, and the denied keys were no longer denied.
    #[tokio::test]
    async fn a_file_that_cannot_be_read_is_read_later_and_one_of_a_later_version_stays() {
        let dir = tempfile::tempdir().unwrap();
        let [file, elsewhere] = ["broker.lists.json", "elsewhere"].map(|name| dir.path().join(name));
        let mut records = Records::default();
        records.change(Entry::new(List::Deny, PublicKey::from_bytes([3; 32]).unwrap()), true, 5).unwrap();
        write(&elsewhere, &records).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        let (mut disk, found) = RecordsWriter::open(file.clone()).unwrap();
        assert!(found.is_empty() && disk.is_failing() && !disk.is_behind());
        disk.changed();
        let begun = Instant::now();
        for is_link in [true, false] {
            if !is_link {
                fs::rename(&elsewhere, &file).unwrap();
            }
            disk.begin(&Records::default(), begun + 2 * WRITE_RETRY);
            let written = disk.done().await;
            assert_eq!(disk.written(written).is_some(), !is_link);
            assert_eq!((disk.is_failing(), file.is_symlink()), (is_link, is_link));
        }
        assert_eq!(read(&file, 0), records);
        assert!(disk.is_behind(), "what changed meanwhile is written now");

        fs::write(&file, r#"{"layout":2,"records":"of another kind"}"#).unwrap();
        let newer = RecordsWriter::open(file.clone()).unwrap_err().to_string();
        assert!(newer.contains("number 2") && file.exists(), "{newer}");
    }

    #[tokio::test]
    async fn a_waiter_learns_whether_its_change_is_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("broker.lists.json");
        let (mut disk, _) = RecordsWriter::open(file.clone()).unwrap();
        let (mut records, begun) = (Records::default(), Instant::now());
        let entry = |n| Entry::new(List::Deny, PublicKey::from_bytes([n; 32]).unwrap());
        records.change(entry(3), true, 5).unwrap();
        disk.changed();
        let first = disk.persisted();
        disk.begin(&records, begun);
        let early = records.clone();
        // A change during that write is in the next one.
        records.change(entry(4), true, 6).unwrap();
        disk.changed();
        let mut second = disk.persisted();
        let written = disk.done().await;
        assert!(disk.written(written).is_none() && disk.is_behind() && !disk.is_failing());
        assert!(first.await.is_ok() && second.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        assert_eq!(read(&file, 0), early);

        fs::create_dir(json_file::unfinished(&file)).unwrap();
        disk.begin(&records, begun);
        let written = disk.done().await;
        assert!(disk.written(written).is_none() && disk.is_failing());
        assert!(second.await.is_err());
        let third = disk.persisted();
        disk.begin(&records, Instant::now());
        assert!(third.await.is_err(), "nobody waits for the next try");
        fs::remove_dir(json_file::unfinished(&file)).unwrap();
        disk.begin(&records, Instant::now() + WRITE_RETRY);
        let written = disk.done().await;
        assert!(disk.written(written).is_none() && !disk.is_failing() && !disk.is_behind());
        assert_eq!(read(&file, 0), records);
    }
}
