//! Files that the programs keep in `state_dir`: not opened through a symbolic link, and renamed without replacing
//! another.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use tracing::warn;

/// The suffixes of SQLite's files beside a database, and that of the database itself.
const PARTS: [&str; 4] = ["", "-wal", "-shm", "-journal"];

/// The path of `file`; creates its directory if that is missing. The directory may be a symbolic link, as systemd's
/// `DynamicUser` makes one; the file itself may not be one.
pub(crate) fn place(file: &Path) -> io::Result<PathBuf> {
    let (Some(dir), Some(name)) = (file.parent(), file.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    Ok(dir.canonicalize()?.join(name))
}

/// Opens a regular file with `options`, not through a symbolic link; a new file is for its owner alone.
pub fn open(file: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // Opening a pipe would block the program.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let opened = options.mode(0o600).custom_flags(flags.bits()).open(file).map_err(|error| {
        let is_link = error.raw_os_error() == Some(Errno::ELOOP as i32);
        if is_link { io::Error::other("it is a link, which is not followed") } else { error }
    })?;
    if opened.metadata()?.is_file() { Ok(opened) } else { Err(io::Error::other("it is not a regular file")) }
}

/// Renames a file that is corrupt for this `reason`, with SQLite's files beside it, to a name that no file has yet, so
/// that a new one can take its place.
pub(crate) fn quarantine(file: &Path, reason: &str) -> io::Result<()> {
    let aside = rename_aside(file)?;
    warn!(file = %file.display(), set_aside = %aside.display(), reason, "state file is damaged");
    Ok(())
}

fn rename_aside(file: &Path) -> io::Result<PathBuf> {
    let aside = free_name(file)?;
    for part in PARTS {
        let renamed = std::fs::rename(with_suffix(file, part.as_ref()), with_suffix(&aside, part.as_ref()));
        match renamed {
            Err(error) if part.is_empty() || error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(aside)
}

/// The name for a damaged `file`, which no file has yet.
fn free_name(file: &Path) -> io::Result<PathBuf> {
    let names = (1_u32..).map(|n| if n == 1 { ".damaged".to_owned() } else { format!(".damaged-{n}") });
    for name in names.map(|suffix| with_suffix(file, suffix.as_ref())) {
        if is_free(&name)? {
            return Ok(name);
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Whether neither a file of this name exists, nor one that SQLite would have beside it. An error if that cannot be
/// checked, as when the directory is no directory.
fn is_free(name: &Path) -> io::Result<bool> {
    for part in PARTS {
        match with_suffix(name, part.as_ref()).symlink_metadata() {
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// `name` with `suffix` behind it.
pub(crate) fn with_suffix(name: &Path, suffix: &OsStr) -> PathBuf {
    let mut name = name.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_opened_where_it_is_and_not_where_a_link_leads() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("victim"), "x").unwrap();
        symlink(at("victim"), at("link")).unwrap();
        symlink(at("nothing"), at("dangling")).unwrap();
        for name in ["link", "dangling"] {
            for options in [OpenOptions::new().read(true), OpenOptions::new().append(true).create(true)] {
                let refused = open(&at(name), options).unwrap_err();
                assert_eq!(refused.to_string(), "it is a link, which is not followed");
            }
        }
        assert!(!at("nothing").exists());
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open(&at("pipe"), OpenOptions::new().read(true)).is_err());
        symlink(dir.path(), at("dir")).unwrap();
        assert!(open(&place(&at("dir/victim")).unwrap(), OpenOptions::new().read(true)).is_ok());
    }

    #[test]
    fn quarantined_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("f.damaged-2-wal"), "somebody's").unwrap();
        for (n, expected) in ["f.damaged", "f.damaged-3", "f.damaged-4"].into_iter().enumerate() {
            fs::write(at("f"), n.to_string()).unwrap();
            fs::write(at("f-wal"), n.to_string()).unwrap();
            assert_eq!(rename_aside(&at("f")).unwrap(), at(expected));
            assert_eq!(fs::read_to_string(at(&format!("{expected}-wal"))).unwrap(), n.to_string());
        }
        assert!(rename_aside(&at("f")).is_err());
        assert_eq!(fs::read_to_string(at("f.damaged")).unwrap(), "0");
        // Failed when it looked for a free name for ever.
        assert!(rename_aside(&at("f.damaged/g")).is_err(), "its directory is a file");
    }
}
