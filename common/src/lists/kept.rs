//! The records on disk, in a file of their own: written whole, beside the old one, and then put in its place, so that
//! there is always one that is whole.

use std::fs::{self, File, OpenOptions};
use std::future::pending;
use std::io::{self, Read as _, Write as _};
use std::mem;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};
use tracing::{info, warn};

use super::records::{Record, Records};
use crate::state_file;

/// How long to wait before a write that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// How far the records are on their way to the disk, with one write under way at most. Each change has a number.
#[derive(Debug)]
pub(super) struct Disk {
    file: PathBuf,
    changed: u64,
    written: u64,
    writing: Option<(u64, JoinHandle<io::Result<()>>)>,
    failed: Option<Instant>,
    waiting: Vec<(u64, oneshot::Sender<()>)>,
}

/// A write that has ended: the last change in it, and what became of it.
pub(super) type Written = (u64, io::Result<()>);

impl Disk {
    /// The records of `file`, which are as they were read.
    pub fn new(file: PathBuf) -> Self {
        Self { file, changed: 0, written: 0, writing: None, failed: None, waiting: Vec::new() }
    }

    /// The records changed.
    pub fn changed(&mut self) {
        self.changed += 1;
    }

    /// Tells when the last change is on the disk; an error if it cannot be written now.
    pub fn kept(&mut self) -> oneshot::Receiver<()> {
        let (sender, kept) = oneshot::channel();
        self.waiting.push((self.changed, sender));
        kept
    }

    /// Whether the last write failed.
    pub fn is_failing(&self) -> bool {
        self.failed.is_some()
    }

    /// Whether there is something to write, and the disk takes it.
    pub fn is_behind(&self) -> bool {
        self.written < self.changed && !self.is_failing()
    }

    /// Begins to write what changed, unless that is under way, or failed a moment ago.
    pub fn begin(&mut self, records: &Records, now: Instant) {
        if self.failed.is_some_and(|failed| now.saturating_duration_since(failed) < RETRY) {
            self.waiting.clear();
        } else if self.writing.is_none() && self.written < self.changed {
            let (file, records) = (self.file.clone(), records.clone());
            self.writing = Some((self.changed, spawn_blocking(move || write(&file, &records))));
        }
    }

    /// The end of the write that is under way; for ever, if there is none.
    pub async fn done(&mut self) -> Written {
        let Some((number, task)) = &mut self.writing else { return pending().await };
        let (number, result) = (*number, task.await);
        self.writing = None;
        (number, result.unwrap_or_else(|error| Err(io::Error::other(error))))
    }

    /// Takes in what became of a write; true if the disk fails, or works again.
    pub fn written(&mut self, (number, result): Written) -> bool {
        let was_failing = self.is_failing();
        match result {
            Ok(()) => {
                self.written = number;
                self.failed = None;
                let waiting = mem::take(&mut self.waiting).into_iter();
                let (kept, waiting): (Vec<_>, Vec<_>) = waiting.partition(|(change, _)| *change <= number);
                self.waiting = waiting;
                for (_, sender) in kept {
                    // Who asked may be gone.
                    let _ = sender.send(());
                }
                if was_failing {
                    info!(file = %self.file.display(), "list entries are kept again");
                }
            }
            Err(error) => {
                self.failed = Some(Instant::now());
                self.waiting.clear();
                if !was_failing {
                    let file = self.file.display();
                    warn!(%file, %error, "list entries cannot be kept, a restart would lose them");
                }
            }
        }
        was_failing != self.is_failing()
    }
}

#[derive(Serialize, Deserialize)]
struct Content {
    records: Vec<Record>,
}

/// Reads the records that still matter at `now`, in seconds of Unix time. A damaged file is set aside.
pub(super) fn read(file: &Path, now: u64) -> Records {
    let mut json = Vec::new();
    let read = state_file::open(file, OpenOptions::new().read(true)).and_then(|mut file| file.read_to_end(&mut json));
    let content = match read {
        Ok(_) => serde_json::from_slice::<Content>(&json).map_err(|error| error.to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Records::default(),
        Err(error) => Err(error.to_string()),
    };
    match content {
        Ok(content) => Records::restored(content.records, now),
        Err(reason) => {
            let aside = state_file::set_aside(file).ok();
            warn!(file = %file.display(), set_aside = ?aside, reason, "file of shared list entries is damaged");
            Records::default()
        }
    }
}

/// Writes the records, and returns when they are on the disk.
fn write(file: &Path, records: &Records) -> io::Result<()> {
    let content = Content { records: records.iter().cloned().collect() };
    let json = serde_json::to_vec(&content).map_err(io::Error::other)?;
    let file = state_file::place(file)?;
    let new = new(&file);
    // What a write that was broken off left, or somebody put there: it is not written through.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut written = state_file::open(&new, OpenOptions::new().write(true).create_new(true))?;
    written.write_all(&json)?;
    written.sync_all()?;
    fs::rename(&new, &file)?;
    // The name, too.
    File::open(file.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

/// What is written, until it is whole.
fn new(file: &Path) -> PathBuf {
    state_file::beside(file, ".new".as_ref())
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

    #[tokio::test]
    async fn who_waits_is_told_when_the_change_is_on_the_disk_or_that_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("broker.lists.json");
        let (mut disk, mut records, begun) = (Disk::new(file.clone()), Records::default(), Instant::now());
        let entry = |n| Entry::new(List::Deny, PublicKey::from_bytes([n; 32]).unwrap());
        records.change(entry(3), true, 5).unwrap();
        disk.changed();
        let first = disk.kept();
        disk.begin(&records, begun);
        let early = records.clone();
        // One that comes while that is written is in the next write.
        records.change(entry(4), true, 6).unwrap();
        disk.changed();
        let mut second = disk.kept();
        let written = disk.done().await;
        assert!(!disk.written(written) && disk.is_behind());
        assert!(first.await.is_ok() && second.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        assert_eq!(read(&file, 0), early);

        fs::create_dir(new(&file)).unwrap();
        disk.begin(&records, begun);
        let written = disk.done().await;
        assert!(disk.written(written) && disk.is_failing());
        assert!(second.await.is_err());
        let third = disk.kept();
        disk.begin(&records, Instant::now());
        assert!(third.await.is_err(), "nobody waits for the next try");
        fs::remove_dir(new(&file)).unwrap();
        disk.begin(&records, Instant::now() + RETRY);
        let written = disk.done().await;
        assert!(disk.written(written) && !disk.is_failing() && !disk.is_behind());
        assert_eq!(read(&file, 0), records);
    }

    #[test]
    fn what_cannot_be_written_is_an_error_and_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("broker.lists.json");
        write(&file, &Records::default()).unwrap();
        fs::create_dir(new(&file)).unwrap();
        assert!(write(&file, &Records::default()).is_err());
        assert!(file.exists());
    }
}
