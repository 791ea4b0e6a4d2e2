//! The private key of an interface, and the file that lists the keys made by setup: purging the package removes these,
//! and no other keys.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};
use wgkex_common::storage::state_file;
use wgkex_kernel::Key;
use wgkex_kernel::key_file::{self, KeyFileError};

/// A file in the directory of the keys, with a line for each, as printed by `sha256sum`. The packages' postrm reads it.
const NOTE: &str = "made-by-setup.sha256";

/// The key in the file at `path`, as by [`key_file::load_or_make`]. A new key is listed; `current` is not, as another
/// program may use it, too.
pub(super) fn load_or_make(path: &Path, current: Option<&Key>) -> Result<Key, KeyFileError> {
    let is_new = current.is_none() && !path.exists();
    let key = key_file::load_or_make(path, current)?;
    if is_new {
        let note = path.with_file_name(NOTE);
        append(&note, path).map_err(|error| KeyFileError::Io(note, error))?;
    }
    Ok(key)
}

fn append(note: &Path, key_file: &Path) -> io::Result<()> {
    let sum = hex::encode(Sha256::digest(fs::read(key_file)?));
    let line = format!("{sum}  {}\n", key_file.file_name().unwrap_or_default().display());
    state_file::open(note, OpenOptions::new().append(true).create(true))?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_keys_that_are_made_are_noted() {
        let dir = tempfile::tempdir().unwrap();
        let keys = dir.path().join("keys");
        let make = |name: &str, current: Option<&Key>| load_or_make(&keys.join(name), current).unwrap();
        let adopted = make("adopted.key", Some(&Key::generate_private()));
        assert!(!keys.join(NOTE).exists());
        for name in ["wg-a.key", "wg-a.key", "wg-b.key"] {
            make(name, None);
        }
        assert!(make("adopted.key", None) == adopted);
        let noted = fs::read_to_string(keys.join(NOTE)).unwrap();
        let names: Vec<_> = noted.lines().filter_map(|line| line.split_once("  ")).map(|(_, name)| name).collect();
        assert_eq!(names, ["wg-a.key", "wg-b.key"]);
        let check = Command::new("sha256sum").args(["--check", "--strict", NOTE]).current_dir(&keys).output().unwrap();
        assert!(check.status.success(), "{check:?}");
    }

    #[test]
    fn the_note_is_not_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink(at("elsewhere"), at(NOTE)).unwrap();
        let refused = load_or_make(&at("wg-a.key"), None).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("it is a link"), "{refused}");
        assert!(!at("elsewhere").exists());
    }
}
