//! The mark that a database had rows. A marked database without tables has lost them, and is not taken for a new one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::types::DatabaseError;

/// Whether a database had rows, as recorded in a file. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct HadRowsMark(Arc<Mark>);

#[derive(Debug, Default)]
struct Mark {
    file: PathBuf,
    is_set: AtomicBool,
    is_emptied: AtomicBool,
}

impl HadRowsMark {
    /// The mark as recorded in `file`, which its owner writes.
    #[must_use]
    pub fn new(file: PathBuf, is_set: bool) -> Self {
        Self(Arc::new(Mark { file, is_set: is_set.into(), is_emptied: false.into() }))
    }

    /// The database has rows.
    pub fn set(&self) {
        self.0.is_set.store(true, Ordering::Relaxed);
    }

    /// The file, if the database had rows and has no tables now.
    #[must_use]
    pub fn lost_rows(&self) -> Option<&Path> {
        self.0.is_emptied.load(Ordering::Relaxed).then_some(&self.0.file)
    }

    /// Refuses a database without tables, whose layout is 0, if it had rows.
    pub(super) fn check(&self, layout: i64) -> Result<(), DatabaseError> {
        let is_emptied = layout == 0 && self.0.is_set.load(Ordering::Relaxed);
        self.0.is_emptied.store(is_emptied, Ordering::Relaxed);
        if is_emptied { Err(DatabaseError::Emptied(self.0.file.clone())) } else { Ok(()) }
    }
}
