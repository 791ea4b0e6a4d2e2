//! What the programs keep in `state_dir`.

pub mod key_store;
pub mod sqlite;
pub mod state_file;
