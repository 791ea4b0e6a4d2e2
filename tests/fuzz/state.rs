//! A state file with any content: it is loaded, set aside, or refused for an unknown layout.
#![no_main]

use std::fs;

use libfuzzer_sys::fuzz_target;
use wgkex_common::storage::key_store::{Clocks, KeyStore, WORKER_FILE};
use wgkex_common::{Domain, KeyId};

fuzz_target!(|content: &[u8]| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    fs::write(dir.path().join("worker.sqlite"), content).expect("a file");
    let domains = Domain::new("ff_a", &["ff_".into()]).into_iter().collect();
    let Ok((store, journal, keys)) = KeyStore::open(dir.path(), WORKER_FILE, &domains, None, Clocks::read()) else {
        return;
    };
    for (KeyId { domain, key }, kept) in keys {
        journal.put(&domain, key, kept);
    }
    drop(store.flush(Clocks::read()));
});
