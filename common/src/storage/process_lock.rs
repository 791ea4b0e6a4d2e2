//! Which process uses a state file: an advisory lock on a file beside it, held for the life of the process. The kernel
//! releases it with the process. SQLite's own locks do not suffice: a program without access to its database would run
//! on without it.

use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::storage::{StorageError, state_file};

/// How long a killed process may take to end, or the check of a reader may hold the lock.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(2);
/// The pause between two attempts.
const LOCK_RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The lock of a state file. Dropping it releases the lock.
#[derive(Debug)]
pub(super) struct ProcessLock {
    path: PathBuf,
    /// It is locked as long as it is open.
    file: File,
}

/// The process that uses a state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockHolder {
    /// Its process id in its own namespace; none if it has not written it.
    pub pid: Option<u32>,
    /// The name of the process with this id in this namespace, if there is one.
    pub program: Option<String>,
}

impl ProcessLock {
    /// Acquires the lock of `file`; [`StorageError::InUse`] if another process holds it.
    pub(super) fn acquire(file: &Path) -> Result<Self, StorageError> {
        Self::acquire_within(file, LOCK_WAIT_MAX)
    }

    /// The same without waiting.
    pub(super) fn try_acquire(file: &Path) -> Result<Self, StorageError> {
        Self::acquire_within(file, Duration::ZERO)
    }

    fn acquire_within(file: &Path, patience: Duration) -> Result<Self, StorageError> {
        let begun = Instant::now();
        let path = lock_file(&state_file::place(file)?);
        loop {
            let mut lock = state_file::open(&path, OpenOptions::new().read(true).write(true).create(true))?;
            match lock.try_lock() {
                Ok(()) if is_at(&lock, &path) => {
                    // On a full disk the process id cannot be written; the lock is held all the same.
                    let _ = write_pid(&mut lock);
                    return Ok(Self { path, file: lock });
                }
                // Its last owner has deleted it meanwhile.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if begun.elapsed() < patience => sleep(LOCK_RETRY_PAUSE),
                Err(TryLockError::WouldBlock) => return Err(in_use(file, &LockHolder::read(&mut lock))),
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
    }
}

impl Drop for ProcessLock {
    /// A lock file that is left after a kill does no harm. A process that opened it before this deletion opens it
    /// again.
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether `file` is the one at this path.
fn is_at(file: &File, path: &Path) -> bool {
    let number = |metadata: &Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(open), Ok(named)) => number(&open) == number(&named),
        _ => false,
    }
}

impl LockHolder {
    /// The process that uses `file`; none if there is none. No lock is kept and nothing is written.
    pub fn of(file: &Path) -> io::Result<Option<Self>> {
        let mut lock = match state_file::open(&lock_file(file), OpenOptions::new().read(true)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            lock => lock?,
        };
        match lock.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => Ok(Some(Self::read(&mut lock))),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn read(lock: &mut File) -> Self {
        let mut text = String::new();
        let read = lock.rewind().and_then(|()| lock.take(20).read_to_string(&mut text));
        let pid: Option<u32> = read.ok().and_then(|_| text.trim().parse().ok());
        let program = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok());
        Self { pid, program: program.map(|name| name.trim_end().to_owned()) }
    }
}

impl fmt::Display for LockHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { pid: Some(pid), program: Some(program) } => write!(f, "process {pid} ({program})"),
            Self { pid: Some(pid), program: None } => write!(f, "process {pid}"),
            Self { pid: None, .. } => f.write_str("another process"),
        }
    }
}

/// The file that is locked.
fn lock_file(file: &Path) -> PathBuf {
    state_file::with_suffix(file, ".lock".as_ref())
}

fn write_pid(lock: &mut File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    lock.write_all(format!("{}\n", std::process::id()).as_bytes())
}

fn in_use(file: &Path, holder: &LockHolder) -> StorageError {
    let file = file.display();
    StorageError::InUse(format!(
        "{file} is in use by {holder}: end that, or give this program another state_dir; two programs with one state would \
         undo each other's work"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_has_a_file_and_is_named_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/worker.sqlite");
        assert_eq!(LockHolder::of(&file).unwrap(), None);
        let lock = ProcessLock::acquire(&file).unwrap();
        let holder = LockHolder::of(&file).unwrap().unwrap();
        assert_eq!(holder.pid, Some(std::process::id()));
        let refused = ProcessLock::try_acquire(&file).unwrap_err();
        assert!(matches!(refused, StorageError::InUse(_)));
        let refused = refused.to_string();
        assert!(refused.contains("new/worker.sqlite is in use by process ") && refused.contains(&holder.to_string()));
        drop(lock);
        assert_eq!(LockHolder::of(&file).unwrap(), None);
        drop(ProcessLock::try_acquire(&file).unwrap());
        assert!(!lock_file(&file).exists());
    }

    #[test]
    fn one_that_is_about_to_end_and_a_reader_are_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        let lock = ProcessLock::acquire(&file).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sleep(4 * LOCK_RETRY_PAUSE);
                drop(lock);
            });
            drop(ProcessLock::acquire(&file).unwrap());
        });
        fs::write(lock_file(&file), "1").unwrap();
        let reader = File::open(lock_file(&file)).unwrap();
        reader.try_lock_shared().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sleep(4 * LOCK_RETRY_PAUSE);
                drop(reader);
            });
            drop(ProcessLock::acquire(&file).unwrap());
        });
    }
}
