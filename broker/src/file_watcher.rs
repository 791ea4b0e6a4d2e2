//! Detects when files that the config names have a new content that is complete.
//!
//! No task of its own: [`watch`] runs in a task of its caller, [`crate::tls`] or [`crate::tenants`], which `run` of the
//! broker owns. Previous stop of a file: the disk; next stop: its caller, which reads it again. No key of a router
//! passes here.

use std::fs::metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::sleep;

/// How often to check files.
const FILE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Identifies a version of a file: time, size and inode; none for a file that is not there.
pub type FileVersion = Option<(i64, i64, u64, u64)>;

/// The version that is there now.
pub fn file_version(file: &Path) -> FileVersion {
    let file = metadata(file).ok()?;
    Some((file.mtime(), file.mtime_nsec(), file.len(), file.ino()))
}

/// Calls `renew` whenever there is a complete new version of the files that `of` was read from, for ever. Files may be
/// slow, so they are read on threads for blocking calls.
pub async fn watch<T, V>(of: Arc<T>, version: fn(&T) -> V, renew: fn(&T))
where
    T: Send + Sync + 'static,
    V: Copy + PartialEq + Send + 'static,
{
    let mut watcher = FileWatcher::new(version(&of));
    loop {
        sleep(FILE_CHECK_INTERVAL).await;
        let seen = of.clone();
        let Ok(now) = spawn_blocking(move || version(&seen)).await else { continue };
        if watcher.is_stable(now) {
            let stale = of.clone();
            let _ = spawn_blocking(move || renew(&stale)).await;
        }
    }
}

/// Detects when new versions of files are complete: they do not change at the same instant.
struct FileWatcher<V> {
    taken: V,
    last: V,
}

impl<V: Copy + PartialEq> FileWatcher<V> {
    /// The version `taken` is in use.
    fn new(taken: V) -> Self {
        Self { taken, last: taken }
    }

    /// Whether the version `now` is new, and did not change since the last check.
    fn is_stable(&mut self, now: V) -> bool {
        let is_still = std::mem::replace(&mut self.last, now) == now;
        is_still && std::mem::replace(&mut self.taken, now) != now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_files_are_taken_once_both_stay_as_they_are() {
        let file = |time| Some((time, 0, 1, 1));
        let old: [FileVersion; 2] = [file(1), file(1)];
        let mut watcher = FileWatcher::new(old);
        for (now, is_stable) in [
            (old, false),
            ([file(2), file(1)], false),
            ([file(2), file(2)], false),
            ([file(2), file(2)], true),
            ([file(2), file(2)], false),
            ([None, file(2)], false),
            ([None, file(2)], true),
            ([None, file(2)], false),
            ([file(2), file(2)], false),
            ([file(2), file(2)], true),
        ] {
            assert_eq!(watcher.is_stable(now), is_stable, "{now:?}");
        }
    }
}
