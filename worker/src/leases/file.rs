//! The leases on disk: `worker.leases.json` in `state_dir`, written whole before the kernel is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use wgkex_common::PublicKey;
use wgkex_common::storage::versions::StateFile;
use wgkex_common::storage::{StorageError, json_file};
use wgkex_common::wire::lease::{LeaseVersion, LeasedAddresses};

/// The version of the file format.
const LAYOUT: u32 = 1;

/// The file in `state_dir`.
pub const FILE: StateFile = StateFile::json("worker.leases.json", LAYOUT);

/// The content of the file: the state of all servers, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLeases {
    pub servers: BTreeMap<String, StoredServer>,
}

/// The stored state of a server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredServer {
    pub version: Option<LeaseVersion>,
    pub leases: BTreeMap<PublicKey, LeasedAddresses>,
    /// Keys without a lease whose peers wgkex made and that may still exist.
    pub removed: BTreeSet<PublicKey>,
    /// Keys with a lease whose peers another program made.
    pub foreign: BTreeSet<PublicKey>,
}

/// The file in `state_dir`.
pub fn path(state_dir: &Path) -> PathBuf {
    FILE.path(state_dir)
}

/// Loads the file; empty if there is none. A corrupt file is renamed.
pub fn load(file: &Path) -> Result<StoredLeases, StorageError> {
    Ok(json_file::load(file, LAYOUT)?.unwrap_or_default())
}

/// Reads the file without a change of it: a corrupt one is an error.
pub fn read(file: &Path) -> Result<StoredLeases, StorageError> {
    Ok(json_file::read(file, LAYOUT)?.unwrap_or_default())
}

/// Writes the file, and returns when it is on the disk.
pub fn save(file: &Path, stored: &StoredLeases) -> Result<(), StorageError> {
    json_file::save(file, LAYOUT, stored)
}
