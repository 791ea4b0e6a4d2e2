//! The retained messages and wills on disk: `mqtt-retained.sqlite`, at most 1 s behind.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rumqttc::{QoS, qos};
use rusqlite::{Connection, Row, Transaction, params};
use wgkex_common::storage::schema::Schema;
use wgkex_common::storage::versions::StateFile;
use wgkex_common::storage::write_behind::{Clocks, Table, WriteBehind};
use wgkex_common::storage::{Noun, StorageError};

use crate::mqtt_server::broker::MessageBroker;
use crate::mqtt_server::message::{PublishedMessage, lower_qos};
use crate::mqtt_server::retained::{RetainedMessage, RetainedMessages, Unwritten};

const CREATE_TABLES: &str = "
    CREATE TABLE messages (topic TEXT PRIMARY KEY, payload BLOB NOT NULL, qos INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE wills (
        client TEXT PRIMARY KEY,
        topic TEXT NOT NULL,
        payload BLOB NOT NULL,
        qos INTEGER NOT NULL,
        retain INTEGER NOT NULL
    ) WITHOUT ROWID;
";
/// The user whose share of the space a message takes.
const ADD_USER: &str = "ALTER TABLE messages ADD COLUMN user TEXT";

/// The file in `state_dir`.
pub const FILE: StateFile = StateFile::sqlite("mqtt-retained.sqlite", RetainedTable::SCHEMA);

/// The file, and its writer.
pub struct File(WriteBehind<RetainedTable>);

/// The state that is written: the retained messages and wills of the server, once there is one.
#[derive(Default)]
struct RetainedTable {
    broker: Option<Arc<MessageBroker>>,
}

impl File {
    /// Opens the file in `dir`, and returns its content. A corrupt one is set aside; one that cannot be written is read
    /// all the same, and tried again later. The only error is that it has a version which is not known here.
    pub fn open(dir: &Path) -> Result<(Self, RetainedMessages), StorageError> {
        let (store, retained) = WriteBehind::with_table(FILE.path(dir), RetainedTable::default(), Clocks::read())?;
        Ok((Self(store), retained))
    }

    /// Writes behind until `stop` returns, and then the last changes.
    pub async fn run(mut self, broker: Arc<MessageBroker>, stop: impl Future<Output = ()>) {
        self.0.table_mut().broker = Some(broker);
        self.0.run(|_| {}, stop).await;
    }
}

impl Table for RetainedTable {
    const SCHEMA: Schema = Schema { migrations: &[CREATE_TABLES, ADD_USER] };
    const NOUN: Noun = Noun { name: "retained messages", pronoun: "them" };
    type Content = RetainedMessages;
    type Changes = Unwritten;

    fn load(&mut self, connection: &Connection, _now: Clocks) -> Result<RetainedMessages, StorageError> {
        read(connection)
    }

    fn take(&mut self) -> Unwritten {
        self.broker.as_ref().map(|broker| broker.take_unwritten()).unwrap_or_default()
    }

    fn is_due(&self, changes: &Unwritten, _now: Clocks) -> bool {
        !changes.is_empty()
    }

    fn write(&self, transaction: &Transaction<'_>, changes: &Unwritten, _now: Clocks) -> rusqlite::Result<()> {
        write(transaction, changes)
    }

    fn requeue(&mut self, changes: Unwritten) {
        if let Some(broker) = &self.broker {
            broker.requeue(changes);
        }
    }

    fn reopened(&mut self) {
        if let Some(broker) = &self.broker {
            broker.require_full_write();
        }
    }
}

fn read(database: &Connection) -> Result<RetainedMessages, StorageError> {
    let mut statement = database.prepare("SELECT topic, payload, qos, user FROM messages")?;
    let kept = |row: &Row<'_>| {
        let (payload, qos, user): (Vec<u8>, u8, Option<String>) = (row.get(1)?, row.get(2)?, row.get(3)?);
        Ok((row.get(0)?, RetainedMessage { payload: payload.into(), qos: quality(qos), by: user.map(Arc::from) }))
    };
    let messages: Vec<_> = statement
        .query_map([], kept)?
        .collect::<Result<_, _>>()
        .map_err(|error| StorageError::corrupt_value(&error))?;
    let mut statement = database.prepare("SELECT client, topic, payload, qos, retain FROM wills")?;
    let will = |row: &Row<'_>| {
        let (payload, qos): (Vec<u8>, u8) = (row.get(2)?, row.get(3)?);
        let will =
            PublishedMessage { topic: row.get(1)?, payload: payload.into(), qos: quality(qos), retain: row.get(4)? };
        Ok((row.get(0)?, will))
    };
    let wills: BTreeMap<_, _> = statement
        .query_map([], will)?
        .collect::<Result<_, _>>()
        .map_err(|error| StorageError::corrupt_value(&error))?;
    Ok(RetainedMessages::restored(messages, wills))
}

fn quality(level: u8) -> QoS {
    lower_qos(qos(level).unwrap_or(QoS::AtMostOnce), QoS::AtLeastOnce)
}

fn write(transaction: &Transaction<'_>, unwritten: &Unwritten) -> rusqlite::Result<()> {
    if unwritten.needs_full_write {
        transaction.execute_batch("DELETE FROM messages; DELETE FROM wills;")?;
    }
    let mut put = transaction.prepare("REPLACE INTO messages (topic, payload, qos, user) VALUES (?1, ?2, ?3, ?4)")?;
    let mut remove = transaction.prepare("DELETE FROM messages WHERE topic = ?1")?;
    for (topic, kept) in &unwritten.messages {
        match kept {
            Some(RetainedMessage { payload, qos, by }) => {
                put.execute(params![topic, &payload[..], *qos as u8, by.as_deref()])?
            }
            None => remove.execute([topic])?,
        };
    }
    let mut put = transaction.prepare("REPLACE INTO wills VALUES (?1, ?2, ?3, ?4, ?5)")?;
    let mut remove = transaction.prepare("DELETE FROM wills WHERE client = ?1")?;
    for (client, will) in &unwritten.wills {
        match will {
            Some(PublishedMessage { topic, payload, qos, retain }) => {
                put.execute(params![client, topic, &payload[..], *qos as u8, retain])?
            }
            None => remove.execute([client])?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bytes::Bytes;
    use tempfile::TempDir;
    use wgkex_common::storage::sqlite;

    use super::*;
    use crate::mqtt_server::retained::{PER_USER_FRACTION, TOPICS_MAX};

    fn topics(retained: &RetainedMessages) -> Vec<(String, Bytes)> {
        let found = retained.find("#", None, (100, 1_000_000));
        found.messages.into_iter().map(|message| (message.topic, message.payload)).collect()
    }

    /// Writes the changes to the file in `dir`, which `file` releases.
    fn close(dir: &TempDir, file: File, retained: &mut RetainedMessages) {
        drop(file);
        let path = dir.path().join("mqtt-retained.sqlite");
        let mut connection = sqlite::open(&path, RetainedTable::SCHEMA).unwrap();
        let transaction = connection.transaction().unwrap();
        write(&transaction, &retained.take_unwritten()).unwrap();
        transaction.commit().unwrap();
    }

    #[test]
    fn retained_messages_survive_a_restart_and_wills_are_due() {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut retained) = File::open(dir.path()).unwrap();
        for (topic, payload) in [("a", "1"), ("b", "1"), ("c", "1")] {
            retained.store(&PublishedMessage::to_retain(topic, payload), None).unwrap();
        }
        retained.set_will("left", PublishedMessage::to_retain("b", "0"));
        retained.set_will("there", PublishedMessage::to_retain("c", "0"));
        let _ = retained.clear_will("left");
        close(&dir, file, &mut retained);
        let expected = [("a", "1"), ("b", "1"), ("c", "0")].map(|(topic, payload)| (topic.into(), payload.into()));
        for _ in 0..2 {
            let (file, mut retained) = File::open(dir.path()).unwrap();
            assert_eq!(topics(&retained), expected);
            close(&dir, file, &mut retained);
        }
    }

    #[test]
    fn a_users_share_counts_after_a_restart_too() {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut retained) = File::open(dir.path()).unwrap();
        for n in 0..TOPICS_MAX / PER_USER_FRACTION {
            retained.store(&PublishedMessage::to_retain(&n.to_string(), "1"), Some("gw1")).unwrap();
        }
        retained.set_will("gw1", PublishedMessage::to_retain("0", "0"));
        close(&dir, file, &mut retained);
        let (_file, mut retained) = File::open(dir.path()).unwrap();
        retained.store(&PublishedMessage::to_retain("another's", "1"), Some("gw2")).unwrap();
        assert!(retained.store(&PublishedMessage::to_retain("one more", "1"), Some("gw1")).is_err());
        retained.store(&PublishedMessage::to_retain("0", ""), Some("gw1")).unwrap();
        retained.store(&PublishedMessage::to_retain("one more", "1"), Some("gw1")).unwrap();
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mqtt-retained.sqlite");
        fs::write(&path, "this is no database at all").unwrap();
        let (file, mut retained) = File::open(dir.path()).unwrap();
        assert!(topics(&retained).is_empty() && dir.path().join("mqtt-retained.sqlite.damaged").exists());
        retained.store(&PublishedMessage::to_retain("a", "1"), None).unwrap();
        close(&dir, file, &mut retained);
        assert_eq!(topics(&File::open(dir.path()).unwrap().1).len(), 1);
    }

    /// Failed before: the layout was taken for damage, and all messages were lost.
    #[test]
    fn a_file_of_the_first_layout_is_brought_to_todays() {
        let dir = tempfile::tempdir().unwrap();
        let first = "
            CREATE TABLE messages (topic TEXT PRIMARY KEY, payload BLOB NOT NULL, qos INTEGER NOT NULL) WITHOUT ROWID;
            CREATE TABLE wills (
                client TEXT PRIMARY KEY,
                topic TEXT NOT NULL,
                payload BLOB NOT NULL,
                qos INTEGER NOT NULL,
                retain INTEGER NOT NULL
            ) WITHOUT ROWID;
            INSERT INTO messages VALUES ('a', X'31', 1);
            PRAGMA user_version = 1;
        ";
        Connection::open(dir.path().join("mqtt-retained.sqlite")).unwrap().execute_batch(first).unwrap();
        for topic in ["b", "c"] {
            let (file, mut retained) = File::open(dir.path()).unwrap();
            retained.store(&PublishedMessage::to_retain(topic, "1"), Some("gw1")).unwrap();
            close(&dir, file, &mut retained);
        }
        let kept = topics(&File::open(dir.path()).unwrap().1);
        assert_eq!(kept.into_iter().map(|(topic, _)| topic).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is set aside");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_no_reason_not_to_start() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let (file, retained) = File::open(&dir.path().join("file")).unwrap();
        assert!(file.0.is_failing() && topics(&retained).is_empty());
    }
}
