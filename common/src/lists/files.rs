//! The lists that stand in files of this machine: read when they change. One that is damaged, or gone, keeps what was
//! last read of it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use super::{AllowList, Entry, List, parse};
use crate::config::KeyLists;

/// A directory has no more files than this.
const FILES_MAX: usize = 100_000;
/// The file of one key is no larger.
const KEY_FILE_MAX: u64 = 4096;
/// A file of keys is no larger.
const FILE_MAX: u64 = 16 << 20;

/// The keys of the config that name lists, as metrics and answers name them.
pub const SOURCES: [&str; 5] =
    ["blacklist_file", "allowlist.file", "key_lists.deny_dir", "key_lists.allow_dir", "key_lists.trusted_dir"];
/// The list that stands in the config itself.
const IN_CONFIG: &str = "key_whitelist";

/// Every file and directory that the config names, and what was read of them.
#[derive(Debug, Clone)]
pub struct Files {
    sources: Vec<Source>,
    in_config: Vec<Entry>,
    only_allowed: bool,
}

#[derive(Debug, Clone)]
struct Source {
    name: &'static str,
    path: PathBuf,
    kind: Kind,
    /// The files when they were last read; another look means that they changed.
    seen: Vec<Look>,
    /// What was last read of it without a mistake.
    good: Option<Arc<[Entry]>>,
    /// What is wrong with it now.
    damage: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File(List),
    /// Keys by domain.
    Domains,
    Dir(List),
}

/// How a file looks from outside: its name, inode, size and times.
type Look = (PathBuf, u64, u64, [i64; 4]);

impl Files {
    /// Those that `config` names; nothing is read yet.
    #[must_use]
    pub fn new(config: &KeyLists) -> Self {
        let [deny_file, allow_file, deny_dir, allow_dir, trusted_dir] = SOURCES;
        let allow = config.allow.as_ref();
        let sources = [
            (deny_file, config.deny_file.as_ref(), Kind::File(List::Deny)),
            (allow_file, allow.and_then(|allow| allow.file.as_ref()), Kind::Domains),
            (deny_dir, config.deny_dir.as_ref(), Kind::Dir(List::Deny)),
            (allow_dir, allow.and_then(|allow| allow.dir.as_ref()), Kind::Dir(List::Allow)),
            (trusted_dir, config.trusted_dir.as_ref(), Kind::Dir(List::Trusted)),
        ];
        let source = |(name, path, kind): (_, Option<&PathBuf>, _)| {
            Some(Source { name, path: path?.clone(), kind, seen: Vec::new(), good: None, damage: None })
        };
        Self {
            sources: sources.into_iter().filter_map(source).collect(),
            in_config: config.trusted.iter().map(|key| Entry::new(List::Trusted, *key)).collect(),
            only_allowed: allow.is_some(),
        }
    }

    /// Reads what changed, or all if `anew`; true if the lists are other ones now.
    pub fn read(&mut self, anew: bool) -> bool {
        let mut changed = false;
        for source in &mut self.sources {
            changed |= source.read(anew);
        }
        changed
    }

    /// Every entry, with the key of the config that it comes by.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, &Entry)> {
        let files = self
            .sources
            .iter()
            .flat_map(|source| source.good.iter().flat_map(|entries| entries.iter()).map(|entry| (source.name, entry)));
        files.chain(self.in_config.iter().map(|entry| (IN_CONFIG, entry)))
    }

    /// Whether they say, or lack, something else than `other`.
    #[must_use]
    pub fn differ(&self, other: &Self) -> bool {
        let state = |source: &Source| (source.good.clone(), source.damage.is_some());
        !self.sources.iter().map(state).eq(other.sources.iter().map(state))
    }

    /// Whether only listed keys may come.
    #[must_use]
    pub fn allow_list(&self) -> AllowList {
        let is_unread =
            |source: &Source| matches!(source.kind, Kind::Domains | Kind::Dir(List::Allow)) && source.good.is_none();
        if !self.only_allowed {
            AllowList::Off
        } else if self.sources.iter().any(is_unread) {
            AllowList::Unread
        } else {
            AllowList::Read
        }
    }

    /// Those that cannot be read now, of [`SOURCES`].
    #[must_use]
    pub fn damaged(&self) -> Vec<&'static str> {
        self.sources.iter().filter(|source| source.damage.is_some()).map(|source| source.name).collect()
    }
}

impl Source {
    fn read(&mut self, anew: bool) -> bool {
        // What is seen is older than what is read: a change in between is found at the next look.
        let looks = self.look();
        let is_same = looks.as_ref().is_ok_and(|looks| *looks == self.seen) && self.damage.is_none();
        if is_same && !anew && self.good.is_some() {
            return false;
        }
        let entries = looks.and_then(|looks| {
            self.seen = looks;
            self.entries()
        });
        match entries {
            Ok(entries) => self.take(entries),
            Err(reason) => {
                if self.damage.as_ref() != Some(&reason) {
                    let (list, path) = (self.name, self.path.display());
                    warn!(list, %path, reason, "list is damaged, what was last read of it counts");
                    self.damage = Some(reason);
                }
                false
            }
        }
    }

    fn take(&mut self, entries: Vec<Entry>) -> bool {
        let is_new = self.good.as_deref() != Some(&entries[..]);
        if is_new || self.damage.is_some() {
            info!(list = self.name, path = %self.path.display(), keys = entries.len(), "list is read");
        }
        self.damage = None;
        self.good = Some(entries.into());
        is_new
    }

    fn look(&self) -> Result<Vec<Look>, String> {
        match self.kind {
            Kind::File(_) | Kind::Domains => Ok(vec![look(&self.path)?]),
            Kind::Dir(list) => {
                let files = key_files(&self.path, list)?;
                files.into_iter().map(|(_, file)| look(&file)).collect()
            }
        }
    }

    fn entries(&self) -> Result<Vec<Entry>, String> {
        match self.kind {
            Kind::File(list) => parse::keys(&text(&self.path, FILE_MAX)?, list),
            Kind::Domains => parse::keys_by_domain(&text(&self.path, FILE_MAX)?),
            Kind::Dir(list) => {
                let files = key_files(&self.path, list)?;
                files.into_iter().map(|(domain, file)| key_file(list, domain, &file)).collect()
            }
        }
    }
}

/// The entry of a file that has one key and is named after its node.
fn key_file(list: List, domain: Option<String>, file: &Path) -> Result<Entry, String> {
    let named = |wrong: String| format!("{}: {wrong}", file.display());
    let key = text(file, KEY_FILE_MAX).and_then(|text| parse::one_key(&text)).map_err(named)?;
    let name = file.file_name().map(|name| name.to_string_lossy().chars().filter(|c| !c.is_control()).collect());
    Ok(Entry { domain, name, ..Entry::new(list, key) })
}

/// The files of a directory in order; those of allowed keys may stand in a directory named after their domain.
fn key_files(dir: &Path, list: List) -> Result<Vec<(Option<String>, PathBuf)>, String> {
    let mut files = Vec::new();
    for path in children(dir)? {
        if !path.is_dir() {
            files.push((None, path));
        } else if list == List::Allow {
            let domain = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let keys = children(&path)?.into_iter().filter(|path| !path.is_dir());
            files.extend(keys.map(|path| (domain.clone(), path)));
        }
    }
    if files.len() > FILES_MAX {
        return Err(format!("has {} files, {FILES_MAX} are allowed", files.len()));
    }
    files.sort();
    Ok(files)
}

/// What is in a directory, but for hidden files and the backups of editors.
fn children(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let paths = fs::read_dir(dir).and_then(|entries| {
        let paths = entries.take(2 * FILES_MAX).map(|entry| entry.map(|entry| entry.path()));
        paths.collect::<io::Result<Vec<_>>>()
    });
    let is_shown = |path: &PathBuf| {
        path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            !name.starts_with('.') && !name.ends_with('~')
        })
    };
    Ok(paths.map_err(|error| cannot(dir, &error))?.into_iter().filter(is_shown).collect())
}

fn look(file: &Path) -> Result<Look, String> {
    let data = fs::metadata(file).map_err(|error| cannot(file, &error))?;
    if !data.is_file() {
        return Err(format!("{} is not a regular file", file.display()));
    }
    let times = [data.mtime(), data.mtime_nsec(), data.ctime(), data.ctime_nsec()];
    Ok((file.to_owned(), data.ino(), data.size(), times))
}

fn text(file: &Path, max: u64) -> Result<String, String> {
    let mut text = Vec::new();
    let read = File::open(file).and_then(|file| file.take(max + 1).read_to_end(&mut text));
    read.map_err(|error| cannot(file, &error))?;
    if text.len() as u64 > max {
        return Err(format!("has more than {max} bytes, fewer are allowed"));
    }
    String::from_utf8(text).map_err(|_| "is not UTF-8".into())
}

fn cannot(path: &Path, error: &io::Error) -> String {
    format!("{} cannot be read: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::config::Allow;

    const A: &str = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";
    const B: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    fn dir() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    fn names(files: &Files) -> Vec<(&'static str, String, Option<&str>)> {
        files.entries().map(|(source, entry)| (source, entry.key.to_string(), entry.name.as_deref())).collect()
    }

    #[test]
    fn a_file_is_read_again_when_it_changes_and_a_damaged_one_keeps_what_was_good() {
        let dir = dir();
        let file = dir.path().join("deny.yaml");
        let mut files = Files::new(&KeyLists { deny_file: Some(file.clone()), ..KeyLists::default() });
        assert!(!files.read(false));
        assert_eq!(files.damaged(), ["blacklist_file"], "it is missing");
        fs::write(&file, format!("- {A}")).unwrap();
        assert!(files.read(false) && files.damaged().is_empty());
        assert!(!files.read(false) && !files.read(true), "nothing changed");
        for damage in [b"- x".as_slice(), b"\xff", b"- [", A.as_bytes()] {
            fs::write(&file, damage).unwrap();
            assert!(!files.read(false));
            assert_eq!(files.damaged(), ["blacklist_file"]);
            assert_eq!(names(&files), [("blacklist_file", A.to_owned(), None)]);
        }
        fs::remove_file(&file).unwrap();
        assert!(!files.read(false));
        assert_eq!(names(&files).len(), 1, "a list that is gone is a damaged one");
        fs::write(&file, format!("- {B}")).unwrap();
        assert!(files.read(false) && files.damaged().is_empty());
        assert_eq!(names(&files), [("blacklist_file", B.to_owned(), None)]);
        fs::write(&file, "").unwrap();
        assert!(files.read(false) && names(&files).is_empty());
    }

    #[test]
    fn a_directory_has_a_file_for_each_key_and_one_damaged_file_keeps_the_last_good_list() {
        let dir = dir();
        let at = |name: &str| dir.path().join(name);
        let mut files = Files::new(&KeyLists { trusted_dir: Some(dir.path().into()), ..KeyLists::default() });
        fs::write(at("attic"), format!("{A}\n")).unwrap();
        fs::write(at(".hidden"), "x").unwrap();
        fs::write(at("attic~"), "x").unwrap();
        fs::create_dir(at("sub")).unwrap();
        assert!(files.read(false) && files.damaged().is_empty());
        assert_eq!(names(&files), [("key_lists.trusted_dir", A.to_owned(), Some("attic"))]);
        fs::write(at("cellar"), "x").unwrap();
        assert!(!files.read(false));
        assert_eq!(files.damaged(), ["key_lists.trusted_dir"]);
        assert_eq!(names(&files).len(), 1);
        fs::write(at("cellar"), B).unwrap();
        assert!(files.read(false));
        assert_eq!(names(&files).len(), 2);
        fs::remove_file(at("attic")).unwrap();
        assert!(files.read(false));
        assert_eq!(names(&files), [("key_lists.trusted_dir", B.to_owned(), Some("cellar"))]);
    }

    #[test]
    fn allowed_keys_may_stand_in_directories_of_domains() {
        let dir = dir();
        fs::write(dir.path().join("everywhere"), A).unwrap();
        fs::create_dir(dir.path().join("ff_a")).unwrap();
        fs::write(dir.path().join("ff_a/only-here"), B).unwrap();
        let allow = Allow { file: None, dir: Some(dir.path().into()) };
        let mut files = Files::new(&KeyLists { allow: Some(allow), ..KeyLists::default() });
        assert_eq!(files.allow_list(), AllowList::Unread);
        assert!(files.read(false));
        assert_eq!(files.allow_list(), AllowList::Read);
        let domains: Vec<_> = files.entries().map(|(_, entry)| entry.domain.as_deref()).collect();
        assert_eq!(domains, [None, Some("ff_a")]);
    }

    #[test]
    fn without_a_file_of_allowed_keys_only_those_of_admin_calls_may_come() {
        let allow = |file: Option<&str>| {
            let allow = Allow { file: file.map(PathBuf::from), dir: None };
            let mut files = Files::new(&KeyLists { allow: Some(allow), ..KeyLists::default() });
            files.read(false);
            files.allow_list()
        };
        assert_eq!(allow(None), AllowList::Read);
        assert_eq!(allow(Some("/nowhere/allow.yaml")), AllowList::Unread);
        assert_eq!(Files::new(&KeyLists::default()).allow_list(), AllowList::Off);
    }
}
