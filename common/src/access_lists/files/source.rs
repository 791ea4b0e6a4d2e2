//! One file or directory of a list: its stamps, its entries as last read, and why it cannot be read.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use crate::access_lists::parse::{self, Listed};
use crate::access_lists::{Entry, List};

/// A directory has no more files than this.
const FILES_MAX: usize = 100_000;
/// The file of one key is no larger.
const KEY_FILE_MAX: u64 = 4096;
/// A file of keys is no larger.
const FILE_MAX: u64 = 16 << 20;

/// A file or directory that the config names.
#[derive(Debug, Clone)]
pub struct ListSource {
    /// The key of the config.
    pub name: &'static str,
    path: PathBuf,
    kind: FileKind,
    /// The stamps at the last check.
    last_seen: Option<FileStamps>,
    /// The stamps when it was last read.
    read: Option<FileStamps>,
    /// The stamps were the same before and after reading, or at a later check.
    is_settled: bool,
    /// The entries of the last valid content.
    last_valid: Option<Arc<[Entry]>>,
    /// The directory, by device and inode, of that content.
    last_valid_dir: Option<[u64; 2]>,
    /// Why it cannot be read now.
    error: Option<String>,
}

/// The kind of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A file of keys of this list.
    File(List),
    /// A file of allowed keys by domain.
    Domains,
    /// A directory with a file for each key of this list.
    Dir(List),
}

/// The stamps of its files, or why there are none.
type FileStamps = Result<Vec<FileStamp>, String>;
/// The attributes of a file that show a change.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileStamp {
    path: PathBuf,
    inode: u64,
    size: u64,
    /// Of the last change of the content and of the inode, each in seconds and nanoseconds.
    times: [i64; 4],
}

impl FileKind {
    /// Whether keys that are not on it are refused.
    fn allows(self) -> bool {
        matches!(self, Self::Domains | Self::Dir(List::Allow))
    }
}

impl ListSource {
    /// Nothing is read yet.
    pub fn new(name: &'static str, path: &Path, kind: FileKind) -> Self {
        let path = path.to_owned();
        Self {
            name,
            path,
            kind,
            last_seen: None,
            read: None,
            is_settled: false,
            last_valid: None,
            last_valid_dir: None,
            error: None,
        }
    }

    /// Whether the next check should be soon.
    pub fn is_unsettled(&self) -> bool {
        !self.is_settled || self.last_seen != self.read
    }

    /// Whether only keys on it are admitted, and it has no content that was confirmed by a second check.
    pub fn is_unread_allow_list(&self) -> bool {
        self.kind.allows() && (self.last_valid.is_none() || !self.is_settled)
    }

    /// Whether only keys on it are admitted, and it had no valid content so far.
    pub fn was_never_read_to_allow(&self) -> bool {
        self.kind.allows() && self.last_valid.is_none()
    }

    /// Whether it cannot be read now.
    pub fn is_damaged(&self) -> bool {
        self.error.is_some()
    }

    /// Why it cannot be read now; none if it can be read.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether its entries or its readability differ from those of `other`.
    pub fn differs(&self, other: &Self) -> bool {
        self.last_valid != other.last_valid || self.is_damaged() != other.is_damaged()
    }

    /// The entries of the last valid content.
    pub fn entries(&self) -> &[Entry] {
        self.last_valid.as_deref().unwrap_or_default()
    }

    /// True if its entries changed, or keys that are not on it may be removed from now on.
    pub fn check_and_read(&mut self, anew: bool) -> bool {
        let stamps = self.stamp();
        let (is_first, is_same) = (self.read.is_none(), self.last_seen.as_ref() == Some(&stamps));
        let is_read = self.read.as_ref() == Some(&stamps);
        self.last_seen = Some(stamps);
        if !is_first && !is_same {
            return false;
        }
        let was_settled = std::mem::replace(&mut self.is_settled, is_same);
        let may_read = anew || !is_read || self.error.is_some();
        (may_read && self.read_now()) || (self.kind.allows() && !was_settled && self.is_settled)
    }

    /// Reads the source as it was just checked, unless it changes meanwhile: then the next check finds other stamps.
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

    fn take(&mut self, Listed { entries, duplicates, .. }: Listed) -> bool {
        let is_new = self.last_valid.as_deref() != Some(&entries[..]);
        let path = self.path.display();
        if is_new || self.error.is_some() {
            info!(list = self.name, %path, keys = entries.len(), "list is read");
            for line in duplicates {
                warn!(list = self.name, %path, line, "a key is given twice in one mapping, the last one counts");
            }
        }
        self.error = None;
        self.last_valid = Some(entries.into());
        self.last_valid_dir = self.dir();
        is_new
    }

    fn reject(&mut self, reason: String) {
        if self.error.as_ref() != Some(&reason) {
            let (list, path) = (self.name, self.path.display());
            let message = match (&self.last_valid, self.kind.allows()) {
                (Some(_), _) => "list is damaged, what was last read of it counts",
                (None, true) => {
                    "list is damaged, and was never read since the start: every key that no admin call allows is refused \
                     until it can be read"
                }
                (None, false) => {
                    "list is damaged, and was never read since the start: nothing of it counts until it can be read"
                }
            };
            warn!(list, %path, reason, "{message}");
            self.error = Some(reason);
        }
    }

    /// The identity of the directory, if the source is an existing one.
    fn dir(&self) -> Option<[u64; 2]> {
        let data = matches!(self.kind, FileKind::Dir(_)).then(|| fs::metadata(&self.path).ok()).flatten()?;
        Some([data.dev(), data.ino()])
    }

    fn stamp(&self) -> FileStamps {
        match self.kind {
            FileKind::File(_) | FileKind::Domains => Ok(vec![stamp(&self.path)?]),
            FileKind::Dir(list) => {
                let files = key_files(&self.path, list)?;
                files.into_iter().map(|(_, file)| stamp(&file)).collect()
            }
        }
    }

    fn listed(&self) -> Result<Listed, String> {
        match self.kind {
            FileKind::File(list) => self.whole(|text| parse::keys(text, list)),
            FileKind::Domains => self.whole(parse::keys_by_domain),
            FileKind::Dir(list) => {
                let files = key_files(&self.path, list)?;
                if list == List::Allow && files.is_empty() {
                    return Err("has no file with a key, at least one is needed".into());
                }
                if files.is_empty() && !self.entries().is_empty() && self.dir() != self.last_valid_dir {
                    return Err("is empty, and another directory than before: is its disk mounted?".into());
                }
                let entries = files.into_iter().map(|(domain, file)| key_file(list, domain, &file));
                Ok(Listed { entries: entries.collect::<Result<_, _>>()?, ..Listed::default() })
            }
        }
    }

    /// Applies `parse` to the text of the file, unless it looks like an interrupted copy.
    fn whole(&self, parse: impl FnOnce(&str) -> Result<Listed, String>) -> Result<Listed, String> {
        let text = text(&self.path, FILE_MAX)?;
        let had = self.entries();
        // A power failure may leave an empty file; a file with comments only may be one without entries yet.
        let must_speak = self.kind.allows() || !had.is_empty() || text.trim().is_empty();
        let listed = parse(&text)?;
        if listed.is_blank && must_speak {
            return Err("has no content, an empty list is written []".into());
        }
        if let Some(domain) = listed.blank_domain.as_ref().filter(|_| listed.entries.is_empty()) {
            return Err(format!("{domain}: has no content, an empty list is written []"));
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

/// The entries of a directory, without hidden files and the backups of editors.
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
