//! The files for `wg-quick`: written atomically, readable by root only; a file that wgkex-node did not write is not
//! replaced.

use std::fmt;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// The first line of each file: it marks files that wgkex-node wrote.
pub const MARK: &str = "# Written by wgkex-node, which overwrites what is changed here.\n";

/// The result of writing a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileChange {
    /// The file did not exist.
    New,
    /// The file had another content.
    Changed,
    /// The file has this content already.
    Unchanged,
}

/// Why a file is not written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file exists and does not begin with [`MARK`].
    #[error("{0} was not written by wgkex-node: move it away, or name another directory by --config-dir")]
    Foreign(PathBuf),
    /// The file could not be read or written.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

/// Returns an error if the file exists and does not begin with [`MARK`].
pub fn check_ours(file: &Path) -> Result<(), FileError> {
    match content(file)? {
        Some(content) if !content.starts_with(MARK.as_bytes()) => Err(FileError::Foreign(file.into())),
        Some(_) | None => Ok(()),
    }
}

/// Writes the file if its content differs, and creates its directory if that is missing.
pub fn write(file: &Path, text: &str) -> Result<FileChange, FileError> {
    check_ours(file)?;
    let written = match content(file)? {
        Some(content) if content == text.as_bytes() => return Ok(FileChange::Unchanged),
        Some(_) => FileChange::Changed,
        None => FileChange::New,
    };
    replace(file, text).map_err(|error| FileError::Io(file.into(), error))?;
    Ok(written)
}

fn content(file: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match fs::read(file) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::Io(file.into(), error)),
    }
}

/// Replaces the file atomically; only its owner may read it.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = file.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let mut next = file.as_os_str().to_owned();
    next.push(".new");
    match fs::remove_file(&next) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&next)?;
    new.write_all(text.as_bytes())?;
    new.sync_all()?;
    fs::rename(&next, file)
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "written",
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_written_for_its_owner_and_only_if_it_differs_and_never_over_another_users() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("wireguard/s1.conf");
        let text = |body: &str| format!("{MARK}{body}");
        for (body, expected) in [("a", FileChange::New), ("a", FileChange::Unchanged), ("b", FileChange::Changed)] {
            assert_eq!(write(&file, &text(body)).unwrap(), expected, "{body}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text(body));
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        fs::write(&file, "[Interface]\n").unwrap();
        let refusal = write(&file, &text("c")).unwrap_err().to_string();
        assert!(refusal.contains("was not written by wgkex-node"), "{refusal}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "[Interface]\n");
    }
}
