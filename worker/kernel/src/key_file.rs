//! The private key of a gateway's interface in a file, as `wg genkey` writes it, so that it outlives the interface.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use wireguard_control::Key;

/// Why a key file cannot be used, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// Others than its owner may read or write it.
    #[error("key file {0} is open to others (mode {1:04o}): chmod 600 it if the key is still a secret")]
    Open(PathBuf, u32),
    /// It does not hold one key.
    #[error("key file {0} does not hold one WireGuard private key in base64, as `wg genkey` prints it")]
    Malformed(PathBuf),
    /// It could not be read or written.
    #[error("key file {0}: {1}")]
    Io(PathBuf, io::Error),
}

/// The key in the file at `path`. Where there is no file it is made, for its owner alone, and its directory too:
/// with `current`, the key that is in use already, or else with a new one.
pub fn load_or_make(path: &Path, current: Option<&Key>) -> Result<Key, KeyFileError> {
    let failed = |error| KeyFileError::Io(path.into(), error);
    match File::open(path) {
        Ok(file) => read(file, path),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let key = current.cloned().unwrap_or_else(Key::generate_private);
            make(path, &key).map_err(failed)?;
            Ok(key)
        }
        Err(error) => Err(failed(error)),
    }
}

fn read(file: File, path: &Path) -> Result<Key, KeyFileError> {
    let failed = |error| KeyFileError::Io(path.into(), error);
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Open(path.into(), mode));
    }
    let mut bytes = Vec::new();
    file.take(100).read_to_end(&mut bytes).map_err(failed)?;
    parse(&bytes).ok_or_else(|| KeyFileError::Malformed(path.into()))
}

fn parse(bytes: &[u8]) -> Option<Key> {
    let text = std::str::from_utf8(bytes).ok()?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let key = Key::from_base64(text).ok()?;
    (key.to_base64() == text && key != Key::zero()).then_some(key)
}

fn make(path: &Path, key: &Key) -> io::Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = writeln!(file, "{}", key.to_base64()).and_then(|()| file.sync_all());
    if written.is_err() {
        // An incomplete key file would make the next attempt fail.
        fs::remove_file(path)?;
    }
    written.and_then(|()| File::open(directory)?.sync_all())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const KEY: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";

    #[test]
    fn a_missing_file_is_made_for_its_owner_alone_and_read_back() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a/b/wg-welt.key");
        let key = load_or_make(&path, None).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o755, "certificates may be there, too");
        assert_eq!(load_or_make(&path, None).unwrap().to_base64(), key.to_base64());
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", key.to_base64()));
    }

    #[test]
    fn two_keys_are_never_the_same() {
        let place = tempfile::tempdir().unwrap();
        let make = |name| load_or_make(&place.path().join(name), None).unwrap().to_base64();
        assert_ne!(make("one"), make("two"));
    }

    #[test]
    fn a_key_in_use_goes_to_the_file_and_never_over_another() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("key");
        let current = Key::from_base64(KEY).unwrap();
        assert_eq!(load_or_make(&path, Some(&current)).unwrap().to_base64(), KEY);
        let other = Key::generate_private();
        assert_eq!(load_or_make(&path, Some(&other)).unwrap().to_base64(), KEY);
    }

    #[test]
    fn a_file_without_exactly_one_key_is_refused_and_left_unchanged() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("key");
        for bad in [
            "",
            "\n",
            "secret\n",
            &KEY[..43],
            &format!("{KEY}\n{KEY}\n"),
            &format!(" {KEY}\n"),
            &format!("{KEY}\r\n"),
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n",
        ] {
            write(&path, bad, 0o600);
            let refusal = load_or_make(&path, None).map(|_| ()).unwrap_err().to_string();
            assert!(refusal.contains("does not hold one WireGuard private key"), "{bad:?}: {refusal}");
            assert_eq!(fs::read_to_string(&path).unwrap(), bad);
        }
        write(&path, KEY, 0o400);
        assert_eq!(load_or_make(&path, None).unwrap().to_base64(), KEY);
    }

    #[test]
    fn a_file_open_to_others_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("key");
        for mode in [0o644, 0o640, 0o604, 0o620] {
            write(&path, KEY, mode);
            assert!(matches!(load_or_make(&path, None), Err(KeyFileError::Open(_, found)) if found == mode));
        }
    }

    #[test]
    fn a_directory_in_its_place_is_an_error_that_names_it() {
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let refusal = load_or_make(place.path(), None).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.starts_with(&format!("key file {}: ", place.path().display())), "{refusal}");
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    fn write(path: &Path, text: &str, mode: u32) {
        let _ = fs::remove_file(path);
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}
