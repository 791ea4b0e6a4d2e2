//! The lists that stand in files of this machine: read when they change. One that is damaged, half-written or gone keeps
//! what was last read of it.
//!
//! What changes may be changing still, so it is read when it looks the same at two looks. At the start there is no time for
//! that: what stands there counts at once, and nobody goes for not being on an allow list until it looked the same again.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use crate::access_lists::parse::{self, Listed};
use crate::access_lists::{AllowList, Entry, List};
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
    /// At the last look.
    last_seen: Option<FileStamps>,
    /// When it was last read.
    read: Option<FileStamps>,
    /// It looked the same before and after it was read, or once more after that.
    is_settled: bool,
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

/// The stamps of its files, or why there are none.
type FileStamps = Result<Vec<FileStamp>, String>;
/// What changes when a file does.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileStamp {
    path: PathBuf,
    inode: u64,
    size: u64,
    /// Of the last change of the content and of the inode, each in seconds and nanoseconds.
    times: [i64; 4],
}

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
        Self {
            sources: sources
                .into_iter()
                .filter_map(|(name, path, kind)| Some(Source::new(name, path?, kind)))
                .collect(),
            in_config: config.trusted.iter().map(|key| Entry::new(List::Trusted, *key)).collect(),
            only_allowed: allow.is_some(),
        }
    }

    /// Stamps all of them, and reads what is due: what changed and looks the same as at the last look, or all of that if
    /// `anew`. True if the lists are other ones now.
    pub fn read(&mut self, anew: bool) -> bool {
        let mut changed = false;
        for source in &mut self.sources {
            changed |= source.check_and_read(anew);
        }
        changed
    }

    /// Whether the next look should be soon: something changed, or was only seen once.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.sources.iter().any(|source| !source.is_settled || source.last_seen != source.read)
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
        let states = |files: &Self| files.sources.iter().map(state).collect::<Vec<_>>();
        self.allow_list() != other.allow_list() || states(self) != states(other)
    }

    /// Whether only listed keys may come.
    #[must_use]
    pub fn allow_list(&self) -> AllowList {
        let is_unread = |source: &Source| source.kind.allows() && (source.good.is_none() || !source.is_settled);
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

impl Kind {
    /// Whether who is not on it may not come.
    fn allows(self) -> bool {
        matches!(self, Self::Domains | Self::Dir(List::Allow))
    }
}

impl Source {
    fn new(name: &'static str, path: &Path, kind: Kind) -> Self {
        let path = path.to_owned();
        Self { name, path, kind, last_seen: None, read: None, is_settled: false, good: None, damage: None }
    }

    /// True if it says something else now, or who is not on it may go from now on.
    fn check_and_read(&mut self, anew: bool) -> bool {
        let stamps = self.stamp();
        let (is_first, is_same) = (self.read.is_none(), self.last_seen.as_ref() == Some(&stamps));
        let is_read = self.read.as_ref() == Some(&stamps);
        self.last_seen = Some(stamps);
        if !is_first && !is_same {
            return false;
        }
        let was_settled = std::mem::replace(&mut self.is_settled, is_same);
        let may_read = anew || !is_read || self.damage.is_some();
        (may_read && self.read_now()) || (self.kind.allows() && !was_settled && self.is_settled)
    }

    /// Reads what was seen just now, unless it changes meanwhile: then it looks another way the next time.
    fn read_now(&mut self) -> bool {
        let listed = match &self.last_seen {
            Some(Err(reason)) => Err(reason.clone()),
            _ => self.listed(),
        };
        if self.read.is_some() && self.last_seen.as_ref() != Some(&self.stamp()) {
            return false;
        }
        self.read.clone_from(&self.last_seen);
        match listed {
            Ok(listed) => self.take(listed),
            Err(reason) => {
                self.reject(reason);
                false
            }
        }
    }

    fn take(&mut self, Listed { entries, twice, .. }: Listed) -> bool {
        let is_new = self.good.as_deref() != Some(&entries[..]);
        let path = self.path.display();
        if is_new || self.damage.is_some() {
            info!(list = self.name, %path, keys = entries.len(), "list is read");
            for line in twice {
                warn!(list = self.name, %path, line, "a key is given twice in one mapping, the last one counts");
            }
        }
        self.damage = None;
        self.good = Some(entries.into());
        is_new
    }

    fn reject(&mut self, reason: String) {
        if self.damage.as_ref() != Some(&reason) {
            let (list, path) = (self.name, self.path.display());
            warn!(list, %path, reason, "list is damaged, what was last read of it counts");
            self.damage = Some(reason);
        }
    }

    fn stamp(&self) -> FileStamps {
        match self.kind {
            Kind::File(_) | Kind::Domains => Ok(vec![stamp(&self.path)?]),
            Kind::Dir(list) => {
                let files = key_files(&self.path, list)?;
                files.into_iter().map(|(_, file)| stamp(&file)).collect()
            }
        }
    }

    fn listed(&self) -> Result<Listed, String> {
        match self.kind {
            Kind::File(list) => self.whole(|text| parse::keys(text, list)),
            Kind::Domains => self.whole(parse::keys_by_domain),
            Kind::Dir(list) => {
                let files = key_files(&self.path, list)?;
                if list == List::Allow && files.is_empty() {
                    return Err("has no file with a key, at least one is needed".into());
                }
                let entries = files.into_iter().map(|(domain, file)| key_file(list, domain, &file));
                Ok(Listed { entries: entries.collect::<Result<_, _>>()?, ..Listed::default() })
            }
        }
    }

    /// What `parse` makes of the text of the file, if that is not what a copy that broke off leaves.
    fn whole(&self, parse: impl FnOnce(&str) -> Result<Listed, String>) -> Result<Listed, String> {
        let text = text(&self.path, FILE_MAX)?;
        let had = self.good.as_deref().unwrap_or_default();
        // A file without a byte is what a power cut leaves; one of comments may be one that nobody has added to yet.
        let must_speak = self.kind.allows() || !had.is_empty() || text.trim().is_empty();
        if parse::is_blank(&text) && must_speak {
            return Err("says nothing, an empty list is written []".into());
        }
        let listed = parse(&text)?;
        if let Some(domain) = listed.blank_domain.as_ref().filter(|_| listed.entries.is_empty()) {
            return Err(format!("{domain}: says nothing, an empty list is written []"));
        }
        if (parse::may_be_cut_off(&text) || listed.blank_domain.is_some()) && lacks(&listed.entries, had) {
            return Err("lacks keys that it had, and its last line, or a domain, has no end: it may be cut off".into());
        }
        Ok(listed)
    }
}

/// Whether a key of `had` is not in `entries`.
fn lacks(entries: &[Entry], had: &[Entry]) -> bool {
    let keys: BTreeSet<_> = entries.iter().map(|entry| entry.key).collect();
    had.iter().any(|entry| !keys.contains(&entry.key))
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

fn stamp(file: &Path) -> Result<FileStamp, String> {
    let data = fs::metadata(file).map_err(|error| cannot(file, &error))?;
    if !data.is_file() {
        return Err(format!("{} is not a regular file", file.display()));
    }
    let times = [data.mtime(), data.mtime_nsec(), data.ctime(), data.ctime_nsec()];
    Ok(FileStamp { path: file.to_owned(), inode: data.ino(), size: data.size(), times })
}

fn text(file: &Path, max: u64) -> Result<String, String> {
    let mut text = Vec::new();
    let read = File::open(file).and_then(|file| file.take(max + 1).read_to_end(&mut text));
    read.map_err(|error| cannot(file, &error))?;
    if text.len() as u64 > max {
        return Err(format!("has more than {max} bytes, fewer are allowed"));
    }
    if text.contains(&0) {
        return Err("has NUL bytes, as a file that was not wholly written".into());
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

    /// A change that is over is read at the second look.
    fn twice(files: &mut Files) -> bool {
        let first = files.read(false);
        files.read(false) || first
    }

    #[test]
    fn a_file_is_read_again_when_it_changes_and_a_damaged_one_keeps_what_was_good() {
        let dir = dir();
        let file = dir.path().join("deny.yaml");
        let mut files = Files::new(&KeyLists { deny_file: Some(file.clone()), ..KeyLists::default() });
        assert!(!files.read(false));
        assert_eq!(files.damaged(), ["blacklist_file"], "it is missing");
        fs::write(&file, format!("- {A}")).unwrap();
        assert!(twice(&mut files) && files.damaged().is_empty());
        assert!(!files.read(false) && !files.read(true), "nothing changed");
        let zeros = [0; 100];
        for damage in [b"- x".as_slice(), b"\xff", b"- [", A.as_bytes(), &zeros, b"", b"\n", b"# none\n", b"---\n"] {
            fs::write(&file, damage).unwrap();
            assert!(!twice(&mut files));
            assert_eq!(files.damaged(), ["blacklist_file"]);
            assert_eq!(names(&files), [("blacklist_file", A.to_owned(), None)]);
        }
        fs::remove_file(&file).unwrap();
        assert!(!twice(&mut files));
        assert_eq!(names(&files).len(), 1, "a list that is gone is a damaged one");
        fs::write(&file, format!("- {B}")).unwrap();
        assert!(twice(&mut files) && files.damaged().is_empty());
        assert_eq!(names(&files), [("blacklist_file", B.to_owned(), None)]);
        fs::write(&file, format!("{A}: some rea")).unwrap();
        assert!(!twice(&mut files) && files.damaged() == ["blacklist_file"], "it may be cut off");
        fs::write(&file, format!("{B}: new\n{A}: some rea")).unwrap();
        assert!(twice(&mut files) && names(&files).len() == 2, "an editor that ends no line");
        fs::write(&file, "[]").unwrap();
        assert!(twice(&mut files) && names(&files).is_empty() && files.damaged().is_empty());
        fs::write(&file, "# nobody yet\n").unwrap();
        assert!(!twice(&mut files) && files.damaged().is_empty(), "it was empty before");
        fs::write(&file, "\n").unwrap();
        assert!(!twice(&mut files) && files.damaged() == ["blacklist_file"]);
    }

    /// Before, a part of a file that was being written counted as the list.
    #[test]
    fn what_is_being_written_is_read_when_it_looks_the_same_twice() {
        let dir = dir();
        let [deny, allow] = ["deny.yaml", "allow.yaml"].map(|name| dir.path().join(name));
        fs::write(&deny, format!("- {A}\n- {B}\n")).unwrap();
        fs::write(&allow, format!("ff_a: [\"{A}\"]\n")).unwrap();
        let both = Allow { file: Some(allow.clone()), dir: None };
        let config = KeyLists { deny_file: Some(deny.clone()), allow: Some(both), ..KeyLists::default() };
        let mut files = Files::new(&config);
        // At the start there is no time for a second look, but nobody goes before it.
        assert!(files.read(true) && files.is_unsettled());
        assert_eq!((names(&files).len(), files.allow_list()), (3, AllowList::Unread));
        let first = files.clone();
        assert!(files.read(false) && files.differ(&first) && !files.is_unsettled());
        assert_eq!(files.allow_list(), AllowList::Read);
        for part in ["", "- ", &format!("- {A}\n"), &format!("- {A}\n- {B}")] {
            fs::write(&deny, part).unwrap();
            assert!(!files.read(false) && files.is_unsettled(), "{part:?}");
            assert!(files.damaged().is_empty() && names(&files).len() == 3, "{part:?}");
        }
        assert!(!files.read(true) && !files.is_unsettled(), "it says the same");
        // The file that is read at the start may be half of one.
        fs::write(&deny, format!("- {A}\n")).unwrap();
        let mut files = Files::new(&config);
        files.read(true);
        fs::write(&deny, format!("- {A}\n- {B}\n")).unwrap();
        fs::write(&allow, format!("ff_a: [\"{A}\", \"{B}\"]\n")).unwrap();
        assert!(!files.read(false) && files.allow_list() == AllowList::Unread);
        assert!(files.read(false) && files.allow_list() == AllowList::Read);
        assert_eq!(names(&files).len(), 4);
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
        for half in ["x", "", &B[..40], "\0\0\0\0"] {
            fs::write(at("cellar"), half).unwrap();
            assert!(!twice(&mut files));
            assert_eq!(files.damaged(), ["key_lists.trusted_dir"]);
            assert_eq!(names(&files).len(), 1);
        }
        fs::write(at("cellar"), B).unwrap();
        assert!(twice(&mut files));
        assert_eq!(names(&files).len(), 2);
        fs::remove_file(at("attic")).unwrap();
        assert!(twice(&mut files));
        assert_eq!(names(&files), [("key_lists.trusted_dir", B.to_owned(), Some("cellar"))]);
        fs::remove_file(at("cellar")).unwrap();
        assert!(twice(&mut files) && names(&files).is_empty() && files.damaged().is_empty());
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
        assert!(twice(&mut files));
        assert_eq!(files.allow_list(), AllowList::Read);
        let domains: Vec<_> = files.entries().map(|(_, entry)| entry.domain.clone()).collect();
        assert_eq!(domains, [None, Some("ff_a".into())]);
        // A disk that is not mounted, or a copy that has not begun.
        fs::remove_file(dir.path().join("everywhere")).unwrap();
        fs::remove_file(dir.path().join("ff_a/only-here")).unwrap();
        assert!(!twice(&mut files) && files.damaged() == ["key_lists.allow_dir"]);
        assert_eq!(names(&files).len(), 2);
    }

    #[test]
    fn without_a_file_of_allowed_keys_only_those_of_admin_calls_may_come() {
        let dir = dir();
        let allow = |text: Option<&str>| {
            let file = dir.path().join("allow.yaml");
            let _ = text.map(|text| fs::write(&file, text).unwrap());
            let allow = Allow { file: text.map(|_| file), dir: None };
            let mut files = Files::new(&KeyLists { allow: Some(allow), ..KeyLists::default() });
            twice(&mut files);
            files.allow_list()
        };
        assert_eq!(allow(None), AllowList::Read);
        assert_eq!((allow(Some("{}")), allow(Some("[]"))), (AllowList::Read, AllowList::Unread));
        // Cut off behind the name; it was an empty list, which expelled everybody.
        assert_eq!((allow(Some("ff_a:\n")), allow(Some("ff_a: []\n"))), (AllowList::Unread, AllowList::Read));
        for says_nothing in ["", "# none\n", "\0"] {
            assert_eq!(allow(Some(says_nothing)), AllowList::Unread);
        }
        let allow = Allow { file: Some("/nowhere/allow.yaml".into()), dir: None };
        let mut files = Files::new(&KeyLists { allow: Some(allow), ..KeyLists::default() });
        twice(&mut files);
        assert_eq!(files.allow_list(), AllowList::Unread);
        assert_eq!(Files::new(&KeyLists::default()).allow_list(), AllowList::Off);
    }
}
