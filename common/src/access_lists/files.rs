//! The lists in files of this machine: read when they change. If a file is damaged, half-written or missing, its last
//! valid content stays in effect.
//!
//! A changed file is read once two checks, a second apart, find it unchanged: it may still be being written. At the
//! start it is read at once, but no peer is removed for missing from an allow list before the second check.

mod source;

use self::source::{FileKind, ListSource};
use crate::access_lists::{AllowList, Entry, List};
use crate::config::KeyLists;

/// The keys of the config that name lists, as used in metrics and answers.
pub const SOURCES: [&str; 5] =
    ["blacklist_file", "allowlist.file", "key_lists.deny_dir", "key_lists.allow_dir", "key_lists.trusted_dir"];
/// The list in the config itself.
const IN_CONFIG: &str = "key_whitelist";

/// All files and directories that the config names, and their content as last read.
#[derive(Debug, Clone)]
pub struct Files {
    sources: Vec<ListSource>,
    in_config: Vec<Entry>,
    only_allowed: bool,
}

impl Files {
    /// The sources that `config` names; nothing is read yet.
    #[must_use]
    pub fn new(config: &KeyLists) -> Self {
        let [deny_file, allow_file, deny_dir, allow_dir, trusted_dir] = SOURCES;
        let allow = config.allow.as_ref();
        let sources = [
            (deny_file, config.deny_file.as_ref(), FileKind::File(List::Deny)),
            (allow_file, allow.and_then(|allow| allow.file.as_ref()), FileKind::Domains),
            (deny_dir, config.deny_dir.as_ref(), FileKind::Dir(List::Deny)),
            (allow_dir, allow.and_then(|allow| allow.dir.as_ref()), FileKind::Dir(List::Allow)),
            (trusted_dir, config.trusted_dir.as_ref(), FileKind::Dir(List::Trusted)),
        ];
        let named = sources.into_iter().filter_map(|(name, path, kind)| Some(ListSource::new(name, path?, kind)));
        Self {
            sources: named.collect(),
            in_config: config.trusted.iter().map(|key| Entry::new(List::Trusted, *key)).collect(),
            only_allowed: allow.is_some(),
        }
    }

    /// Checks all sources, and reads those that changed and are the same as at the last check; all of these if `anew`.
    /// True if the lists changed.
    pub fn read(&mut self, anew: bool) -> bool {
        let mut changed = false;
        for source in &mut self.sources {
            changed |= source.check_and_read(anew);
        }
        changed
    }

    /// Whether the next check should be soon: a source changed, or was checked only once.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.sources.iter().any(ListSource::is_unsettled)
    }

    /// All entries, each with the key of the config that names its source.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, &Entry)> {
        let files = self.sources.iter().flat_map(|source| source.entries().iter().map(|entry| (source.name, entry)));
        files.chain(self.in_config.iter().map(|entry| (IN_CONFIG, entry)))
    }

    /// Whether they have, or lack, other entries than `other`.
    #[must_use]
    pub fn differ(&self, other: &Self) -> bool {
        let sources = self.sources.iter().zip(&other.sources);
        self.allow_list() != other.allow_list() || sources.into_iter().any(|(source, other)| source.differs(other))
    }

    /// Whether only listed keys are admitted.
    #[must_use]
    pub fn allow_list(&self) -> AllowList {
        if !self.only_allowed {
            AllowList::Off
        } else if self.sources.iter().any(ListSource::is_unread_allow_list) {
            AllowList::Unread
        } else {
            AllowList::Read
        }
    }

    /// The sources of allowed keys that could not be read since the start, as named in [`SOURCES`].
    #[must_use]
    pub fn unread(&self) -> Vec<&'static str> {
        self.sources.iter().filter(|source| source.was_never_read_to_allow()).map(|source| source.name).collect()
    }

    /// The sources that cannot be read now, as named in [`SOURCES`], each with the reason.
    pub fn damages(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.sources.iter().filter_map(|source| Some((source.name, source.error()?)))
    }

    /// The sources that cannot be read now, as named in [`SOURCES`].
    #[must_use]
    pub fn damaged(&self) -> Vec<&'static str> {
        self.sources.iter().filter(|source| source.is_damaged()).map(|source| source.name).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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

    /// A completed change is read at the second check.
    fn twice(files: &mut Files) -> bool {
        let first = files.read(false);
        files.read(false) || first
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_damaged_one_keeps_the_last_good_entries() {
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

    /// Failed when a partly written file was taken for the list.
    #[test]
    fn a_file_being_written_is_read_once_its_stamp_is_stable() {
        let dir = dir();
        let [deny, allow] = ["deny.yaml", "allow.yaml"].map(|name| dir.path().join(name));
        fs::write(&deny, format!("- {A}\n- {B}\n")).unwrap();
        fs::write(&allow, format!("ff_a: [\"{A}\"]\n")).unwrap();
        let both = Allow { file: Some(allow.clone()), dir: None };
        let config = KeyLists { deny_file: Some(deny.clone()), allow: Some(both), ..KeyLists::default() };
        let mut files = Files::new(&config);
        // At the start there is no time for a second check, but no peer is removed before it.
        assert!(files.read(true) && files.is_unsettled());
        assert_eq!((names(&files).len(), files.allow_list()), (3, AllowList::Unread));
        assert!(files.unread().is_empty(), "it was read, if once only");
        let first = files.clone();
        assert!(files.read(false) && files.differ(&first) && !files.is_unsettled());
        assert_eq!(files.allow_list(), AllowList::Read);
        for part in ["", "- ", &format!("- {A}\n"), &format!("- {A}\n- {B}")] {
            fs::write(&deny, part).unwrap();
            assert!(!files.read(false) && files.is_unsettled(), "{part:?}");
            assert!(files.damaged().is_empty() && names(&files).len() == 3, "{part:?}");
        }
        assert!(!files.read(true) && !files.is_unsettled(), "it says the same");
        // The file that is read at the start may be incomplete.
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
    fn a_directory_that_is_another_one_and_empty_is_not_an_empty_list() {
        let dir = dir();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("denied")).unwrap();
        fs::write(at("denied/attic"), A).unwrap();
        let mut files = Files::new(&KeyLists { deny_dir: Some(at("denied")), ..KeyLists::default() });
        assert!(files.read(false) && names(&files).len() == 1);
        // Like the empty directory under the mount point of a disk that is not mounted.
        fs::rename(at("denied"), at("disk")).unwrap();
        fs::create_dir(at("denied")).unwrap();
        assert!(!twice(&mut files) && files.damaged() == ["key_lists.deny_dir"]);
        assert_eq!(names(&files).len(), 1);
        fs::remove_dir(at("denied")).unwrap();
        fs::rename(at("disk"), at("denied")).unwrap();
        fs::remove_file(at("denied/attic")).unwrap();
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
        // Truncated after the name: it was read as an empty list, so all peers were removed.
        assert_eq!((allow(Some("ff_a:\n")), allow(Some("ff_a: []\n"))), (AllowList::Unread, AllowList::Read));
        for says_nothing in ["", "# none\n", "\0"] {
            assert_eq!(allow(Some(says_nothing)), AllowList::Unread);
        }
        let allow = Allow { file: Some("/nowhere/allow.yaml".into()), dir: None };
        let mut files = Files::new(&KeyLists { allow: Some(allow), ..KeyLists::default() });
        twice(&mut files);
        assert_eq!(files.allow_list(), AllowList::Unread);
        assert_eq!(files.unread(), ["allowlist.file"]);
        assert_eq!(Files::new(&KeyLists::default()).allow_list(), AllowList::Off);
    }
}
