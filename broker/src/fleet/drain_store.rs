//! The drains on disk: `broker.drain.json` in `state_dir`, written at once for an admin call, which waits for it, and by one
//! task when a drain ends by itself. That task reads it again on SIGHUP.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};
use wgkex_common::runtime::hangups::Hangups;
use wgkex_common::storage::versions::StateFile;
use wgkex_common::storage::writes::Writes;
use wgkex_common::storage::{StorageError, json_file};
use wgkex_common::time_text::unix;
use wgkex_common::wire::drain::Drain;
use wgkex_common::{Config, WorkerName};

use crate::fleet::Fleet;
use crate::fleet::drains::{DrainChange, Drains, TooManyDrains};

/// The version of the file.
const LAYOUT: u32 = 1;
/// The file in `state_dir`.
pub const FILE: StateFile = StateFile::json("broker.drain.json", LAYOUT);
/// How often to check for drains that are over.
const EXPIRY_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps the drains on disk. Clones share it.
#[derive(Clone)]
pub struct DrainStore {
    file: PathBuf,
    fleet: Fleet,
    /// Held while the drains are changed and written, or read again, so that the file has the last change.
    writing: Arc<tokio::sync::Mutex<()>>,
    writes: Writes,
}

impl DrainStore {
    /// Reads the file into `fleet`. One of a newer version is an error; one that is damaged is set aside, and one that
    /// cannot be read counts as none.
    pub fn open(config: &Config, fleet: Fleet) -> Result<Self, StorageError> {
        let file = FILE.path(&config.state_dir);
        match json_file::load::<Drains>(&file, LAYOUT) {
            Ok(drains) => fleet.gateways().set_drains(drains.unwrap_or_default()),
            Err(error @ StorageError::UnknownVersion(_)) => return Err(error),
            Err(error) => {
                warn!(file = %file.display(), %error, "drains cannot be read, no gateway is drained by this broker");
            }
        }
        fleet.gateways().expire_drains(unix(SystemTime::now()), Instant::now());
        Ok(Self { file, fleet, writing: Arc::default(), writes: Writes::default() })
    }

    /// Begins or ends the drain of a gateway, and returns whether the change is on disk.
    pub async fn set(&self, worker: &WorkerName, drain: Option<Drain>) -> Result<DrainOutcome, TooManyDrains> {
        let _writing = self.writing.lock().await;
        let was_on = self.fleet.gateways().set_drain(worker, drain, Instant::now())?;
        Ok(DrainOutcome { was_on, is_kept: self.save().await })
    }

    /// Ends each drain at its time, and reads the file again on SIGHUP, until `stop` returns; then until the last write has
    /// ended, also that of an admin call.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = stop => {}
            () = self.follow() => {}
        }
        self.writes.finished().await;
    }

    async fn follow(&self) {
        let mut hangups = Hangups::listen();
        loop {
            let is_hangup = tokio::select! {
                () = sleep(EXPIRY_CHECK_INTERVAL) => false,
                () = hangups.next() => true,
            };
            let _writing = self.writing.lock().await;
            if is_hangup {
                self.reload().await;
            }
            let over = self.fleet.gateways().expire_drains(unix(SystemTime::now()), Instant::now());
            if over.is_empty() {
                continue;
            }
            for worker in &over {
                info!(worker = worker.as_str(), "drain is over: the gateway gets new routers");
            }
            self.save().await;
        }
    }

    /// A file that is missing or cannot be read changes nothing.
    async fn reload(&self) {
        let file = self.file.clone();
        match spawn_blocking(move || json_file::read::<Drains>(&file, LAYOUT)).await {
            Ok(Ok(Some(drains))) => {
                let before = self.fleet.gateways().replace_drains(drains.clone(), Instant::now());
                before.changes(&drains).for_each(DrainChange::log);
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => {
                warn!(file = %self.file.display(), %error, "drains cannot be read, they stay as they are");
            }
            Err(error) => warn!(%error, "drains cannot be read, they stay as they are"),
        }
    }

    async fn save(&self) -> bool {
        let (file, drains) = (self.file.clone(), self.fleet.gateways().drains().clone());
        let saved = self.writes.run(move || json_file::save(&file, LAYOUT, drains)).await;
        let failure = match saved {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        warn!(file = %self.file.display(), failure, "drains cannot be kept, a restart would lose them");
        false
    }
}

/// The outcome of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainOutcome {
    /// The gateway drained before.
    pub was_on: bool,
    /// It is on the disk.
    pub is_kept: bool,
}

#[cfg(test)]
mod tests {
    use std::future::ready;
    use std::pin::pin;
    use std::sync::mpsc::channel;

    use tokio::time::timeout;
    use wgkex_common::storage::key_store::{Keys, WriteBuffer};

    use super::*;
    use crate::fleet::gateways::Gateways;
    use crate::fleet::live_keys::LiveKeys;

    fn fleet(config: &Config) -> Fleet {
        let live = LiveKeys::new(config, Keys::new(), WriteBuffer::default(), Instant::now());
        Fleet::new(Gateways::new(config), live)
    }

    #[tokio::test]
    async fn it_stops_when_the_last_write_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let yaml = format!("domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: {}", dir.path().display());
        let config = Config::parse("", &yaml, "b").unwrap();
        let store = DrainStore::open(&config, fleet(&config)).unwrap();
        let ((end, ended), writes) = (channel::<()>(), store.writes.clone());
        let mut call = pin!(writes.run(move || ended.recv()));
        assert!(timeout(Duration::from_millis(10), &mut call).await.is_err(), "it is written");
        let mut stopping = pin!(store.run(ready(())));
        assert!(timeout(Duration::from_millis(100), &mut stopping).await.is_err(), "it waits");
        end.send(()).unwrap();
        timeout(Duration::from_secs(10), stopping).await.expect("it stops");
    }

    #[tokio::test]
    async fn drains_survive_a_restart_and_a_newer_file_stops_it() {
        let dir = tempfile::tempdir().unwrap();
        let yaml = format!("domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: {}", dir.path().display());
        let config = Config::parse("", &yaml, "b").unwrap();
        let open = || DrainStore::open(&config, fleet(&config));
        let (store, worker) = (open().unwrap(), "gw1".parse().unwrap());
        let drain = Drain { since: 7, until: None, reason: Some("r".into()), deadline: None };
        let outcome = store.set(&worker, Some(drain.clone())).await.unwrap();
        assert_eq!(outcome, DrainOutcome { was_on: false, is_kept: true });
        let again = open().unwrap();
        assert_eq!(again.fleet.gateways().drains().get(&worker), Some(&drain));
        assert!(again.set(&worker, None).await.unwrap().was_on);
        std::fs::write(store.file.clone(), r#"{"layout":1,"gateways":{"gw2":{"since":9}}}"#).unwrap();
        again.reload().await;
        let is_drained = |name: &str| again.fleet.gateways().drains().get(&name.parse().unwrap()).is_some();
        assert_eq!([is_drained("gw1"), is_drained("gw2")], [false, true], "read again");
        std::fs::write(store.file.clone(), "{").unwrap();
        again.reload().await;
        assert!(is_drained("gw2"), "a damaged file changes nothing");
        let over = Drain { until: Some(8), ..drain };
        let _ = again.set(&worker, Some(over)).await.unwrap();
        assert_eq!(open().unwrap().fleet.gateways().drains().get(&worker), None, "it ended meanwhile");
        let file = dir.path().join("broker.drain.json");
        assert!(std::fs::read_to_string(&file).unwrap().starts_with(r#"{"layout":1,"gateways":{"gw1""#));
        std::fs::write(&file, r#"{"layout":2}"#).unwrap();
        assert!(open().is_err());
    }
}
