use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use rusqlite::Connection;
use tempfile::{TempDir, tempdir};

use super::*;
use crate::storage::sqlite;
use crate::storage::write_behind::CHANGES_MAX;

const FILE: StateFile = StateFile::sqlite("test.sqlite", KeyTable::SCHEMA);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const TTL: Option<Duration> = Some(DAY);

fn domain(name: &str) -> Domain {
    Domain::new(name, &["ff_".into()]).unwrap()
}

fn domains() -> BTreeSet<Domain> {
    [domain("ff_a"), domain("ff_b")].into()
}

fn id(domain_name: &str, n: u8) -> KeyId {
    KeyId { domain: domain(domain_name), key: key(n) }
}

fn key(n: u8) -> PublicKey {
    PublicKey::from_bytes([n; 32]).unwrap()
}

fn open(dir: &TempDir, now: Clocks) -> (KeyStore, WriteBuffer, Keys) {
    KeyStore::open(dir.path(), FILE, &domains(), TTL, now).unwrap()
}

fn later(now: Clocks, by: Duration) -> Clocks {
    Clocks { monotonic: now.monotonic + by, wall: now.wall + by }
}

fn kept(at: Instant) -> KeyRecord {
    KeyRecord { last: at, established: false }
}

/// The age of each key by the monotonic clock, in seconds.
fn ages(keys: &Keys, now: Clocks) -> Vec<(String, u64)> {
    let age = |kept: &KeyRecord| now.monotonic.duration_since(kept.last).as_secs();
    keys.iter().map(|(KeyId { domain, key }, kept)| (format!("{domain}{}", key.as_bytes()[0]), age(kept))).collect()
}

fn aged(domain: &str, age: u64) -> (String, u64) {
    (domain.to_owned(), age)
}

#[test]
fn written_keys_are_read_again_and_removed_ones_are_not() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    let (store, buffer, keys) = open(&dir, now);
    assert!(keys.is_empty());
    buffer.put(&domain("ff_a"), key(1), KeyRecord { established: true, ..kept(now.monotonic) });
    buffer.put(&domain("ff_b"), key(1), kept(now.monotonic));
    buffer.put(&domain("ff_b"), key(2), kept(now.monotonic));
    let store = store.flush(now);
    buffer.remove(&domain("ff_b"), key(2));
    buffer.remove(&domain("ff_b"), key(3));
    drop(store.flush(later(now, HOUR)));

    let again = later(now, 2 * HOUR);
    let (_store, _, keys) = open(&dir, again);
    assert_eq!(ages(&keys, again), [aged("ff_a1", 7200), aged("ff_b1", 7200)]);
    assert!(keys[&id("ff_a", 1)].established && !keys[&id("ff_b", 1)].established);
    for file in [dir.path().join("test.sqlite"), dir.path().join("test.sqlite-wal")] {
        assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_key_of_an_unserved_domain_stays_stored() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    let (store, buffer, _) = open(&dir, now);
    buffer.put(&domain("ff_b"), key(1), kept(now.monotonic));
    drop(store.flush(now));
    let only_a = [domain("ff_a")].into();
    assert!(KeyStore::open(dir.path(), FILE, &only_a, TTL, now).unwrap().2.is_empty());
    assert_eq!(ages(&open(&dir, now).2, now), [aged("ff_b1", 0)]);
}

#[test]
fn keys_expire_while_the_program_is_down_and_a_stepped_clock_ages_none() {
    let year = 365 * DAY;
    for (down, wall, age) in [
        (HOUR, HOUR as Duration, Some(3600)),
        (DAY + HOUR, DAY + HOUR, None),
        // The clock was stepped while it was down.
        (HOUR, year, Some(0)),
    ] {
        let (dir, now) = (tempdir().unwrap(), Clocks::read());
        let (store, buffer, _) = open(&dir, now);
        buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
        drop(store.flush(now));
        let again = Clocks { monotonic: now.monotonic + down, wall: now.wall + wall };
        let found = ages(&open(&dir, again).2, again);
        assert_eq!(found, age.map(|age| aged("ff_a1", age)).into_iter().collect::<Vec<_>>(), "{wall:?}");
    }
    for step in [HOUR, year] {
        let (dir, now) = (tempdir().unwrap(), Clocks::read());
        let (store, buffer, _) = open(&dir, now);
        buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
        // It was stepped back while the program ran, and forth again.
        let store = store.flush(Clocks { wall: now.wall - step, ..now });
        buffer.put(&domain("ff_a"), key(2), kept(now.monotonic));
        drop(store.flush(now));
        let back = Clocks { wall: now.wall - step, ..now };
        assert_eq!(ages(&open(&dir, back).2, back), [aged("ff_a1", 0), aged("ff_a2", 0)]);
    }
}

#[test]
fn a_damaged_file_is_quarantined_and_stops_no_start() {
    let whole = || {
        let (dir, now) = (tempdir().unwrap(), Clocks::read());
        let (store, buffer, _) = open(&dir, now);
        for n in 1..=200 {
            buffer.put(&domain("ff_a"), key(n), kept(now.monotonic));
        }
        drop(store.flush(now));
        dir
    };
    let damages: [fn(&mut Vec<u8>); 6] = [
        |file| file.fill(0xaa),
        |file| file[..100].fill(0),
        |file| file.truncate(file.len() / 2),
        |file| file[4096..].fill(0x55),
        |file| file.truncate(10),
        |file| *file = b"no database".to_vec(),
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        let (dir, now) = (whole(), Clocks::read());
        let path = dir.path().join("test.sqlite");
        let mut file = fs::read(&path).unwrap();
        damage(&mut file);
        fs::write(&path, file).unwrap();
        let (store, buffer, keys) = open(&dir, now);
        assert!(keys.is_empty(), "damage {n}");
        let names = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(names.into_iter().any(|name| name.starts_with("test.sqlite.damaged")), "damage {n}");
        buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
        drop(store.flush(now));
        assert_eq!(ages(&open(&dir, now).2, now), [aged("ff_a1", 0)], "damage {n}");
    }
}

#[test]
fn an_impossible_row_is_damage_too() {
    for damage in ["DROP TABLE clock", "DELETE FROM clock", "INSERT INTO keys VALUES ('ff_a', 'x', 0, 0)"] {
        let (dir, now) = (tempdir().unwrap(), Clocks::read());
        drop(open(&dir, now));
        Connection::open(dir.path().join("test.sqlite")).unwrap().execute_batch(damage).unwrap();
        let (store, _, keys) = open(&dir, now);
        assert!(keys.is_empty() && !store.is_failing(), "{damage}");
    }
}

/// Failed when it was taken for corruption, and all keys were forgotten.
#[test]
fn another_layout_is_no_damage() {
    for change in ["PRAGMA user_version = 2", "PRAGMA user_version = 0", "PRAGMA user_version = -1"] {
        let (dir, now) = (tempdir().unwrap(), Clocks::read());
        let (store, buffer, _) = open(&dir, now);
        buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
        drop(store.flush(now));
        let file = dir.path().join("test.sqlite");
        let run = |text: &str| Connection::open(&file).unwrap().execute_batch(text).unwrap();
        run(change);
        let content = || (fs::read(&file).unwrap(), fs::read_dir(&dir).unwrap().count());
        let before = content();
        let failure = KeyStore::open(dir.path(), FILE, &domains(), TTL, now).map(drop).unwrap_err();
        assert!(matches!(&failure, StorageError::UnknownVersion(text) if text.contains("test.sqlite")), "{failure:?}");
        assert!(matches!(sqlite::open_to_read(&file, KeyTable::SCHEMA), Err(StorageError::UnknownVersion(_))));
        assert_eq!(content(), before, "{change}");
        run("PRAGMA user_version = 1");
        assert_eq!(open(&dir, now).2.len(), 1);
    }
}

#[test]
fn failed_writes_are_kept_and_tried_again() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    drop(open(&dir, now));
    // Another process reads the database; a directory is in its place; a file is in that of its directory.
    let reader = Connection::open(dir.path().join("test.sqlite")).unwrap();
    reader.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN IMMEDIATE").unwrap();
    let (store, buffer, _) = open(&dir, now);
    assert!(store.is_failing());
    buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
    let store = store.flush(now);
    assert!(store.is_failing());
    buffer.put(&domain("ff_a"), key(1), KeyRecord { established: true, ..kept(now.monotonic) });
    drop(reader);
    let store = store.flush(now);
    assert!(!store.is_failing());
    let second = KeyStore::open(dir.path(), FILE, &domains(), TTL, now).map(drop);
    assert!(matches!(second, Err(StorageError::InUse(_))), "{second:?}");
    drop(store);
    assert!(open(&dir, now).2[&id("ff_a", 1)].established);

    fs::create_dir(dir.path().join("taken.sqlite")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(
        KeyStore::open(dir.path(), StateFile::sqlite("taken.sqlite", KeyTable::SCHEMA), &domains(), TTL, now)
            .unwrap()
            .0
            .is_failing()
    );
    assert!(KeyStore::open(&dir.path().join("file"), FILE, &domains(), TTL, now).unwrap().0.is_failing());
}

#[test]
fn a_read_only_file_is_still_read() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    let (store, buffer, _) = open(&dir, now);
    buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
    drop(store.flush(now));
    let path = dir.path().join("test.sqlite");
    // As on a read-only file system, also for root: no file can be created beside it, and it is not opened for writing.
    let mut database = sqlite::open_to_read(&path, KeyTable::SCHEMA).unwrap();
    let mut table = KeyTable::new(WriteBuffer::default(), domains(), None, now);
    assert_eq!(table.load(&database, now).unwrap().len(), 1);
    let transaction = database.transaction().unwrap();
    let refused = table.write(&transaction, &KeyChanges::new(), now).map_err(StorageError::from);
    assert!(matches!(refused, Err(StorageError::Unavailable(_))));
}

#[test]
fn a_database_that_is_damaged_later_gets_everything_again() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    let (store, buffer, _) = open(&dir, now);
    buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
    let mut store = store.flush(now);
    assert!(!buffer.needs_full_write());
    store.disconnect();
    fs::write(dir.path().join("test.sqlite"), "no database").unwrap();
    let store = store.flush(now);
    assert!(buffer.needs_full_write() && !buffer.needs_full_write());
    buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
    drop(store.flush(now));
    assert_eq!(ages(&open(&dir, now).2, now), [aged("ff_a1", 0)]);
}

#[test]
fn the_clock_is_written_although_nothing_changes() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    let (store, buffer, _) = open(&dir, now);
    buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
    let store = store.flush(now);
    // The wall clock was days behind when the program started.
    let stepped = Clocks { monotonic: now.monotonic + HOUR, wall: now.wall + 12 * DAY };
    drop(store.flush(stepped));
    assert_eq!(ages(&open(&dir, stepped).2, stepped), [aged("ff_a1", 3600)]);
}

#[test]
fn no_more_changes_wait_than_their_bound() {
    let (buffer, now) = (WriteBuffer::default(), Instant::now());
    let key = |n: usize| {
        let mut bytes = [0x42; 32];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        PublicKey::from_bytes(bytes).unwrap()
    };
    let domain = domain("ff_a");
    (0..CHANGES_MAX).for_each(|n| buffer.put(&domain, key(n), kept(now)));
    let taken = buffer.take();
    (CHANGES_MAX..CHANGES_MAX + 10).for_each(|n| buffer.put(&domain, key(n), kept(now)));
    buffer.requeue(taken);
    buffer.put(&domain, key(CHANGES_MAX + 99), kept(now));
    assert_eq!(buffer.take().len(), CHANGES_MAX);
}

#[test]
fn requeued_changes_do_not_replace_newer_ones() {
    let (buffer, now) = (WriteBuffer::default(), Instant::now());
    buffer.put(&domain("ff_a"), key(1), kept(now));
    buffer.put(&domain("ff_a"), key(2), kept(now));
    let taken = buffer.take();
    buffer.remove(&domain("ff_a"), key(1));
    buffer.requeue(taken);
    let changes: Vec<_> = buffer.take().into_values().collect();
    assert_eq!(changes, [None, Some(kept(now))]);
}

/// A database of the version before migrations, written by its SQL.
#[test]
fn keys_of_the_first_release_are_taken_over() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    let wall = now.wall.duration_since(UNIX_EPOCH).unwrap().as_secs();
    let first = format!(
        "PRAGMA journal_mode = WAL;
         CREATE TABLE keys (
             domain TEXT NOT NULL,
             key BLOB NOT NULL,
             last INTEGER NOT NULL,
             proven INTEGER NOT NULL,
             PRIMARY KEY (domain, key)
         ) WITHOUT ROWID;
         CREATE TABLE clock (running INTEGER NOT NULL, wall INTEGER NOT NULL);
         INSERT INTO clock VALUES (100, {});
         INSERT INTO keys VALUES ('ff_a', X'{}', 90, 1), ('ff_b', X'{}', 40, 0);
         PRAGMA user_version = 1;",
        wall - 3600,
        "01".repeat(32),
        "02".repeat(32)
    );
    Connection::open(dir.path().join("test.sqlite")).unwrap().execute_batch(&first).unwrap();
    for _ in 0..2 {
        let (store, _, keys) = open(&dir, now);
        assert!(!store.is_failing());
        assert_eq!(ages(&keys, now), [aged("ff_a1", 3610), aged("ff_b2", 3660)]);
        assert!(keys[&id("ff_a", 1)].established && !keys[&id("ff_b", 2)].established);
        drop(store);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is set aside");
}

#[test]
fn a_file_in_use_is_read_with_its_last_changes_and_stays_as_it_is() {
    let (dir, now) = (tempdir().unwrap(), Clocks::read());
    assert!(read_copy(dir.path(), FILE, &domains(), now).unwrap().is_empty());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let (store, buffer, _) = open(&dir, now);
    buffer.put(&domain("ff_a"), key(1), kept(now.monotonic));
    let store = store.flush(now);
    let bytes = || ["test.sqlite", "test.sqlite-wal"].map(|name| fs::read(dir.path().join(name)).unwrap());
    let before = bytes();
    assert_eq!(read_copy(dir.path(), FILE, &domains(), now).unwrap().keys().collect::<Vec<_>>(), [&id("ff_a", 1)]);
    assert!(bytes() == before);
    buffer.put(&domain("ff_a"), key(2), kept(now.monotonic));
    let store = store.flush(now);
    assert!(!store.is_failing());
    assert_eq!(read_copy(dir.path(), FILE, &domains(), now).unwrap().len(), 2);
}
