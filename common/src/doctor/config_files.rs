//! Configs in the format of systemd, in directories whose files override or extend one another (systemd.syntax(7)).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// An assignment of a config file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment<'a> {
    /// The section that it is in; empty before the first one.
    pub section: &'a str,
    /// Its key.
    pub key: &'a str,
    /// Its value, without quotation marks around it.
    pub value: &'a str,
}

/// The files with this extension in `dirs`, of which the most important one is last, by name; of several with one name
/// that in the most important directory.
#[must_use]
pub fn files(dirs: impl IntoIterator<Item = PathBuf>, extension: &str) -> Vec<PathBuf> {
    let mut files = BTreeMap::new();
    for dir in dirs {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let of_kind =
            entries.filter(|entry| Path::new(&entry.file_name()).extension().is_some_and(|is| is == extension));
        files.extend(of_kind.map(|entry| (entry.file_name(), entry.path())));
    }
    files.into_values().collect()
}

/// The assignments of a file, in their order.
pub fn assignments(text: &str) -> impl Iterator<Item = Assignment<'_>> {
    let mut section = "";
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name;
        }
        let (key, value) = line.split_once('=').filter(|_| !line.starts_with(['#', ';']))?;
        Some(Assignment { section, key: key.trim(), value: value.trim().trim_matches('"') })
    })
}
