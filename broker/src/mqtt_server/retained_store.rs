//! What is retained, on disk: `mqtt-retained.sqlite`, at most 1 s behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rumqttc::{QoS, qos};
use rusqlite::{Connection, TransactionBehavior, params};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};
use wgkex_common::storage::sqlite::{self, Failure, Layout};

use crate::mqtt_server::broker::MessageBroker;
use crate::mqtt_server::message::{Message, lower};
use crate::mqtt_server::retained::{Retained, RetainedMessage, Snapshot};

/// How often what changed is written.
const FLUSH: Duration = Duration::from_millis(500);

const LAYOUT: Layout = Layout {
    number: 2,
    schema: "
        CREATE TABLE messages (
            topic TEXT PRIMARY KEY,
            payload BLOB NOT NULL,
            qos INTEGER NOT NULL,
            user TEXT
        ) WITHOUT ROWID;
        CREATE TABLE wills (
            client TEXT PRIMARY KEY,
            topic TEXT NOT NULL,
            payload BLOB NOT NULL,
            qos INTEGER NOT NULL,
            retain INTEGER NOT NULL
        ) WITHOUT ROWID;
    ",
    upgrades: &["ALTER TABLE messages ADD COLUMN user TEXT"],
};

/// The file, and whether it can be written.
pub struct File {
    path: PathBuf,
    /// None while it cannot be opened.
    database: Option<Connection>,
    /// That it cannot be written has been said.
    failing: bool,
}

impl File {
    /// Opens the file in `dir`, and gives what was kept. A damaged one is set aside; one that cannot be written is tried
    /// again later. Neither keeps anybody from starting; the error is that it has a layout which is not known here.
    pub fn open(dir: &Path) -> Result<(Self, Retained), Failure> {
        let mut file = Self { path: dir.join("mqtt-retained.sqlite"), database: None, failing: false };
        match whole(&file.path, |database| read(&database).map(|retained| (database, retained))) {
            Ok((database, retained)) => {
                file.database = Some(database);
                Ok((file, retained))
            }
            Err(failure @ Failure::Unknown(_)) => Err(failure),
            Err(failure) => {
                file.fail(&failure);
                Ok((file, Retained::default()))
            }
        }
    }

    /// Writes behind until `stop` returns, and then what is left.
    pub async fn run(mut self, broker: Arc<MessageBroker>, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut over = false;
        while !over {
            tokio::select! {
                () = sleep(FLUSH) => {}
                () = &mut stop => over = true,
            }
            let broker = broker.clone();
            // An error means that the runtime ends.
            let Ok(file) = spawn_blocking(move || self.flush(&broker)).await else { return };
            self = file;
        }
    }

    fn flush(mut self, broker: &MessageBroker) -> Self {
        if self.database.is_none() {
            match whole(&self.path, Ok) {
                Ok(database) => {
                    broker.require_full_write();
                    self.database = Some(database);
                }
                Err(failure) => {
                    self.fail(&failure);
                    return self;
                }
            }
        }
        let Some(database) = &mut self.database else { return self };
        let snapshot = broker.snapshot();
        if snapshot.is_empty() && !self.failing {
            return self;
        }
        match write(database, &snapshot) {
            Ok(()) if std::mem::take(&mut self.failing) => {
                info!(file = %self.path.display(), "retained messages are kept again");
            }
            Ok(()) => {}
            Err(failure) => {
                broker.requeue(snapshot);
                if matches!(failure, Failure::Damaged(_)) {
                    self.database = None;
                }
                self.fail(&failure);
            }
        }
        self
    }

    fn fail(&mut self, failure: &Failure) {
        if !std::mem::replace(&mut self.failing, true) {
            let file = self.path.display();
            warn!(%file, %failure, "retained messages cannot be kept, a restart would lose them");
        }
    }
}

/// What `read` makes of the file, or of a new one if it is damaged.
fn whole<T>(path: &Path, read: impl Fn(Connection) -> Result<T, Failure>) -> Result<T, Failure> {
    let open = || sqlite::open(path, LAYOUT).and_then(&read);
    match open() {
        Err(Failure::Damaged(reason)) => {
            sqlite::quarantine(path, &reason)?;
            open()
        }
        opened => opened,
    }
}

fn read(database: &Connection) -> Result<Retained, Failure> {
    let mut statement = database.prepare("SELECT topic, payload, qos, user FROM messages")?;
    let kept = |row: &rusqlite::Row<'_>| {
        let (payload, qos, user): (Vec<u8>, u8, Option<String>) = (row.get(1)?, row.get(2)?, row.get(3)?);
        Ok((row.get(0)?, RetainedMessage { payload: payload.into(), qos: quality(qos), by: user.map(Arc::from) }))
    };
    let messages: Vec<_> = statement.query_map([], kept)?.collect::<Result<_, _>>().map_err(|error| damaged(&error))?;
    let mut statement = database.prepare("SELECT client, topic, payload, qos, retain FROM wills")?;
    let will = |row: &rusqlite::Row<'_>| {
        let (payload, qos): (Vec<u8>, u8) = (row.get(2)?, row.get(3)?);
        let will = Message { topic: row.get(1)?, payload: payload.into(), qos: quality(qos), retain: row.get(4)? };
        Ok((row.get(0)?, will))
    };
    let wills: BTreeMap<_, _> =
        statement.query_map([], will)?.collect::<Result<_, _>>().map_err(|error| damaged(&error))?;
    Ok(Retained::restored(messages, wills))
}

fn quality(level: u8) -> QoS {
    lower(qos(level).unwrap_or(QoS::AtMostOnce), QoS::AtLeastOnce)
}

/// A value of another type than was written.
fn damaged(error: &rusqlite::Error) -> Failure {
    Failure::Damaged(error.to_string())
}

fn write(database: &mut Connection, snapshot: &Snapshot) -> Result<(), Failure> {
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if snapshot.needs_full_write {
        transaction.execute_batch("DELETE FROM messages; DELETE FROM wills;")?;
    }
    {
        let mut put = transaction.prepare("REPLACE INTO messages VALUES (?1, ?2, ?3, ?4)")?;
        let mut remove = transaction.prepare("DELETE FROM messages WHERE topic = ?1")?;
        for (topic, kept) in &snapshot.messages {
            match kept {
                Some(RetainedMessage { payload, qos, by }) => {
                    put.execute(params![topic, &payload[..], *qos as u8, by.as_deref()])?
                }
                None => remove.execute([topic])?,
            };
        }
        let mut put = transaction.prepare("REPLACE INTO wills VALUES (?1, ?2, ?3, ?4, ?5)")?;
        let mut remove = transaction.prepare("DELETE FROM wills WHERE client = ?1")?;
        for (client, will) in &snapshot.wills {
            match will {
                Some(Message { topic, payload, qos, retain }) => {
                    put.execute(params![client, topic, &payload[..], *qos as u8, retain])?
                }
                None => remove.execute([client])?,
            };
        }
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bytes::Bytes;

    use super::*;
    use crate::mqtt_server::retained::{PER_USER_FRACTION, TOPICS};

    fn message(topic: &str, payload: &str) -> Message {
        Message { topic: topic.into(), payload: payload.to_owned().into(), qos: QoS::AtLeastOnce, retain: true }
    }

    fn topics(retained: &Retained) -> Vec<(String, Bytes)> {
        let found = retained.find("#", None, (100, 1_000_000));
        found.messages.into_iter().map(|message| (message.topic, message.payload)).collect()
    }

    /// Writes what changed, and lets go of the file.
    fn close(file: File, retained: &mut Retained) {
        write(&mut file.database.unwrap(), &retained.snapshot()).unwrap();
    }

    #[test]
    fn what_is_kept_is_there_after_a_restart_and_wills_are_due() {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut retained) = File::open(dir.path()).unwrap();
        for (topic, payload) in [("a", "1"), ("b", "1"), ("c", "1")] {
            retained.store(&message(topic, payload), None).unwrap();
        }
        retained.set_will("left", message("b", "0"));
        retained.set_will("there", message("c", "0"));
        let _ = retained.clear_will("left");
        close(file, &mut retained);
        let expected = [("a", "1"), ("b", "1"), ("c", "0")].map(|(topic, payload)| (topic.into(), payload.into()));
        for _ in 0..2 {
            let (file, mut retained) = File::open(dir.path()).unwrap();
            assert_eq!(topics(&retained), expected);
            close(file, &mut retained);
        }
    }

    #[test]
    fn who_has_all_of_a_users_part_has_it_after_a_restart_too() {
        let dir = tempfile::tempdir().unwrap();
        let (file, mut retained) = File::open(dir.path()).unwrap();
        for n in 0..TOPICS / PER_USER_FRACTION {
            retained.store(&message(&n.to_string(), "1"), Some("gw1")).unwrap();
        }
        retained.set_will("gw1", message("0", "0"));
        close(file, &mut retained);
        let (_file, mut retained) = File::open(dir.path()).unwrap();
        retained.store(&message("another's", "1"), Some("gw2")).unwrap();
        assert!(retained.store(&message("one more", "1"), Some("gw1")).is_err());
        retained.store(&message("0", ""), Some("gw1")).unwrap();
        retained.store(&message("one more", "1"), Some("gw1")).unwrap();
    }

    #[test]
    fn a_damaged_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mqtt-retained.sqlite");
        fs::write(&path, "this is no database at all").unwrap();
        let (file, mut retained) = File::open(dir.path()).unwrap();
        assert!(topics(&retained).is_empty() && dir.path().join("mqtt-retained.sqlite.damaged").exists());
        retained.store(&message("a", "1"), None).unwrap();
        close(file, &mut retained);
        assert_eq!(topics(&File::open(dir.path()).unwrap().1).len(), 1);
    }

    /// It was taken for damage, and all was forgotten.
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
            retained.store(&message(topic, "1"), Some("gw1")).unwrap();
            close(file, &mut retained);
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
        assert!(file.database.is_none() && file.failing && topics(&retained).is_empty());
    }
}
