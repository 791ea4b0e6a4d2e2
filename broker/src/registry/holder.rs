//! Which broker of the bus has the registry. Brokers with a common database share one; a SQLite file is one broker's,
//! so a second broker refuses calls: agents would take its empty list for the truth. It refuses until the first broker
//! has no registry any more, also while that is offline and after a restart. `broker.registry.json` in `state_dir`
//! records that, and since when this broker has servers: the broker with the earliest time is the first. With either
//! database, that time is also the mark by which a database that has lost its tables is not taken for a new one.
//!
//! One task, [`RegistryHolder::run`], writes the file when another broker gets the registry, or gives it up.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{error, info, warn};
use wgkex_common::storage::versions::StateFile;
use wgkex_common::storage::writes::Writes;
use wgkex_common::storage::{StorageError, json_file};
use wgkex_common::wire::message::ServiceAnnouncement;
use wgkex_common::{BrokerName, Config};

use crate::database::HadRowsMark;
use crate::fleet::election;

/// The rules that all brokers with a SQLite file announce.
const SQLITE_RULES: &str = "sqlite";
/// A registry without servers ranks behind all that have some.
const EMPTY_REGISTRY_RANK: u64 = 1 << 52;
/// Brokers that are remembered at most: more than any bus has.
const BROKERS_MAX: usize = 256;
/// How long calls wait for the states of other brokers after the start, at most.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// How often they check.
const START_CHECK: Duration = Duration::from_millis(50);
/// The version of the file.
const LAYOUT: u32 = 1;

/// The file in `state_dir`.
pub const FILE: StateFile = StateFile::json("broker.registry.json", LAYOUT);

/// Whether this broker may serve its registry. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct RegistryHolder(Option<Arc<SharedHolder>>);

#[derive(Debug)]
struct SharedHolder {
    /// The tables are in a file, so that only one broker can have them.
    is_of_one: bool,
    own: BrokerName,
    file: PathBuf,
    mark: HadRowsMark,
    state: Mutex<HolderState>,
    writes: Writes,
    /// Wakes the task that writes the file.
    changed: Notify,
    /// The last write of the file failed.
    is_unsaved: AtomicBool,
}

#[derive(Debug)]
struct HolderState {
    kept: StoredHolder,
    /// No write has begun since `kept` changed.
    is_changed: bool,
    started: u64,
    /// The time from which calls no longer wait for other brokers.
    decide_at: Instant,
    is_status_back: bool,
    is_hello_back: bool,
    others: BTreeMap<BrokerName, OtherHolder>,
}

/// The content of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct StoredHolder {
    /// Since when this broker has servers, in milliseconds since 1970.
    since: Option<u64>,
    /// The broker that has the registry instead.
    holder: Option<BrokerName>,
}

#[derive(Debug, Default)]
struct OtherHolder {
    is_online: bool,
    /// Its hello was received.
    is_known: bool,
    announced: Option<ServiceAnnouncement>,
}

impl RegistryHolder {
    /// For a broker that has just started. Without a registry there is nothing to decide. The errors are that the file
    /// is of a newer version, or cannot be read.
    pub fn open(config: &Config) -> Result<Self, StorageError> {
        if config.registry.is_none() {
            return Ok(Self(None));
        }
        let (is_of_one, file) = (config.storage.url.is_none(), FILE.path(&config.state_dir));
        let kept: StoredHolder = json_file::load(&file, LAYOUT)?.unwrap_or_default();
        if let Some(broker) = kept.holder.as_ref().filter(|_| is_of_one) {
            error!(
                broker = broker.as_str(),
                file = %file.display(),
                "another broker has the registry, by what is kept: this one refuses its calls until that one has none, or this file is \
                 removed"
            );
        }
        let mark = HadRowsMark::new(file.clone(), kept.since.is_some());
        let state = HolderState {
            kept,
            is_changed: false,
            started: election::since(),
            decide_at: Instant::now() + START_TIMEOUT,
            is_status_back: false,
            is_hello_back: false,
            others: BTreeMap::new(),
        };
        let (own, state) = (BrokerName::from(&config.name), Mutex::new(state));
        Ok(Self(Some(Arc::new(SharedHolder {
            is_of_one,
            own,
            file,
            mark,
            state,
            writes: Writes::default(),
            changed: Notify::new(),
            is_unsaved: AtomicBool::default(),
        }))))
    }

    /// Whether only one broker can have it.
    #[must_use]
    pub fn is_of_one(&self) -> bool {
        self.of_one().is_some()
    }

    /// Whether it is known, and on the disk, that there are servers.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        let is_kept = |shared: &Arc<SharedHolder>| !shared.is_unsaved.load(Ordering::Relaxed);
        self.0.as_ref().is_none_or(|shared| is_kept(shared) && shared.state.lock().kept.since.is_some())
    }

    /// Records that there are servers. Returns when that is written to disk.
    pub async fn set_filled(&self) {
        let Some(shared) = &self.0 else { return };
        {
            let mut state = shared.state.lock();
            state.kept.since.get_or_insert_with(election::since);
            state.is_changed = true;
        }
        // Written also if the call ends before.
        shared.changed.notify_one();
        shared.mark.set();
        shared.save().await;
    }

    /// Writes the file when another broker gets the registry, or gives it up, until `stop` returns; then until the last
    /// change is written.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Some(shared) = self.0 else { return stop.await };
        tokio::select! {
            () = stop => {}
            () = shared.save_changes() => {}
        }
        shared.save().await;
        shared.writes.finished().await;
    }

    /// Whether workers get an answer here: there is a registry, which no other broker has instead, and whose tables are not gone.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.0.is_some() && self.other().is_none() && self.mark().lost_rows().is_none()
    }

    /// The mark that the database has servers.
    #[must_use]
    pub fn mark(&self) -> HadRowsMark {
        self.0.as_ref().map(|shared| shared.mark.clone()).unwrap_or_default()
    }

    /// The registry that this broker announces; none while it refuses calls.
    #[must_use]
    pub fn announced(&self) -> Option<ServiceAnnouncement> {
        let state = self.of_one()?.state.lock();
        state.kept.holder.is_none().then(|| state.announced())
    }

    /// A broker is online, or no longer.
    pub fn on_status(&self, broker: &BrokerName, is_online: bool) {
        self.change(broker, |other| other.is_online = is_online, |state| state.is_status_back |= is_online);
    }

    /// A broker has a registry for itself, or no longer; nothing is known of one that `has_gone`.
    pub fn on_hello(&self, broker: &BrokerName, announced: Option<ServiceAnnouncement>, has_gone: bool) {
        let is_own = announced.is_some();
        self.change(
            broker,
            |other| (other.announced, other.is_known) = (announced, !has_gone),
            |state| state.is_hello_back |= is_own || state.kept.holder.is_some(),
        );
    }

    /// The broker that has the registry instead of this one.
    #[must_use]
    pub fn other(&self) -> Option<BrokerName> {
        self.of_one()?.state.lock().kept.holder.clone()
    }

    /// Returns when the states of other brokers are known, or some time after the start.
    pub async fn settled(&self) {
        let is_open =
            |state: &HolderState| !(state.is_status_back && state.is_hello_back) && Instant::now() < state.decide_at;
        while self.of_one().is_some_and(|shared| is_open(&shared.state.lock())) {
            sleep(START_CHECK).await;
        }
    }

    fn of_one(&self) -> Option<&Arc<SharedHolder>> {
        self.0.as_ref().filter(|shared| shared.is_of_one)
    }

    /// Applies a message about a broker. The caller must not wait for the disk.
    fn change(&self, broker: &BrokerName, change: impl FnOnce(&mut OtherHolder), own: impl FnOnce(&mut HolderState)) {
        let Some(shared) = self.of_one() else { return };
        let mut state = shared.state.lock();
        if *broker == shared.own {
            own(&mut state);
        } else if state.others.len() < BROKERS_MAX || state.others.contains_key(broker) {
            change(state.others.entry(broker.clone()).or_default());
            if state.update(&shared.own) {
                state.is_changed = true;
                shared.changed.notify_one();
            }
        }
    }
}

impl SharedHolder {
    async fn save_changes(self: &Arc<Self>) {
        loop {
            self.changed.notified().await;
            self.save().await;
        }
    }

    /// Writes the file on another thread, unless an earlier write has the newest state.
    async fn save(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let write = move || {
            let kept = {
                let mut state = shared.state.lock();
                if !std::mem::take(&mut state.is_changed) {
                    return;
                }
                state.kept.clone()
            };
            let saved = json_file::save(&shared.file, LAYOUT, &kept);
            let was_unsaved = shared.is_unsaved.swap(saved.is_err(), Ordering::Relaxed);
            if let (Err(error), false) = (saved, was_unsaved) {
                warn!(
                    file = %shared.file.display(),
                    %error,
                    "which broker has the registry, and that there are servers, is not kept on disk"
                );
            }
        };
        let _ = self.writes.run(write).await;
    }
}

impl HolderState {
    fn announced(&self) -> ServiceAnnouncement {
        ServiceAnnouncement {
            since: self.kept.since.unwrap_or(EMPTY_REGISTRY_RANK + self.started),
            rules: SQLITE_RULES.into(),
        }
    }

    /// Decides again which broker has the registry, and returns whether that is another one now.
    fn update(&mut self, own: &BrokerName) -> bool {
        let own = (self.announced().since, own);
        let announced = |other: &OtherHolder| {
            other.announced.clone().filter(|announced| other.is_online && announced.rules == SQLITE_RULES)
        };
        let comes_first =
            |(name, other): (&BrokerName, &OtherHolder)| ((announced(other)?.since, name) < own).then(|| name.clone());
        let first = self.others.iter().find_map(comes_first);
        match (&self.kept.holder, first) {
            (None, Some(broker)) => {
                error!(
                    broker = broker.as_str(),
                    "another broker of this bus has a registry, and with SQLite only one can have it: this one refuses its \
                     calls; give both the same PostgreSQL by storage, or disable one of them"
                );
                self.kept.holder = Some(broker);
                true
            }
            (Some(holder), None) => {
                let has_none = |other: &OtherHolder| other.is_online && other.is_known && other.announced.is_none();
                let is_free = self.others.get(holder).is_some_and(has_none);
                if is_free {
                    info!(broker = holder.as_str(), "the other broker has no registry any more: this one has it");
                    self.kept.holder = None;
                }
                is_free
            }
            (None, None) | (Some(_), Some(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::path::Path;
    use std::pin::pin;
    use std::sync::mpsc::channel;

    use tokio::time::timeout;

    use super::*;

    fn holder(dir: &Path, more: &str) -> RegistryHolder {
        let yaml = format!(
            "domains: [ff_a]\ndomain_prefixes: [ff_]\nstate_dir: {}\nregistry: {{enabled: true, password_file: /p}}\n{more}",
            dir.display()
        );
        RegistryHolder::open(&Config::parse("", &yaml, "b").unwrap()).unwrap()
    }

    fn hear(holder: &RegistryHolder, broker: &str, since: Option<u64>) {
        let broker = broker.parse().unwrap();
        holder.on_hello(&broker, since.map(|since| ServiceAnnouncement { since, rules: SQLITE_RULES.into() }), false);
        holder.on_status(&broker, true);
    }

    fn kept(dir: &Path) -> Option<StoredHolder> {
        json_file::read(&FILE.path(dir), LAYOUT).unwrap()
    }

    /// Another thread writes it.
    async fn wait_until_kept(dir: &Path, is_it: impl Fn(&StoredHolder) -> bool) {
        while !kept(dir).is_some_and(|kept| is_it(&kept)) {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Failed before: the file was written while the MQTT session waited for it.
    #[tokio::test]
    async fn a_hello_of_another_broker_does_not_wait_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let refused = holder(dir.path(), "");
        hear(&refused, "a", Some(1));
        assert_eq!((refused.other(), kept(dir.path())), (Some("a".parse().unwrap()), None));
        let writer = tokio::spawn(refused.run(pending()));
        wait_until_kept(dir.path(), |kept| kept.holder.is_some()).await;
        writer.abort();
    }

    /// Failed before: nothing waited for the last write, which the end of the program could cut.
    #[tokio::test]
    async fn it_stops_when_the_last_change_is_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let refused = holder(dir.path(), "");
        let ((end, ended), writes) = (channel::<()>(), refused.0.as_ref().unwrap().writes.clone());
        let mut earlier = pin!(writes.run(move || ended.recv()));
        assert!(timeout(Duration::from_millis(10), &mut earlier).await.is_err(), "a write is running");
        hear(&refused, "a", Some(1));
        let mut stopping = pin!(refused.run(ready(())));
        assert!(timeout(Duration::from_millis(100), &mut stopping).await.is_err(), "it waits");
        end.send(()).unwrap();
        timeout(Duration::from_secs(10), stopping).await.expect("it stops");
        assert!(kept(dir.path()).is_some_and(|kept| kept.holder.is_some()), "the change is on disk");
    }

    #[tokio::test]
    async fn with_either_database_it_is_kept_that_there_were_servers() {
        for storage in ["", "storage: postgres://u@h/d\n"] {
            let dir = tempfile::tempdir().unwrap();
            let filled = holder(dir.path(), storage);
            assert!(!filled.is_filled());
            filled.set_filled().await;
            assert!(filled.is_filled() && holder(dir.path(), storage).is_filled(), "{storage}");
        }
    }

    #[tokio::test]
    async fn the_first_one_with_servers_serves_and_one_that_refuses_does_so_until_that_has_none() {
        let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let [first, second, shared] = dirs.each_ref().map(tempfile::TempDir::path);
        let late = election::since() + 1_000_000;

        let filled = holder(first, "");
        assert!(!filled.is_filled() && filled.announced().unwrap().since > EMPTY_REGISTRY_RANK);
        filled.set_filled().await;
        let since = filled.announced().unwrap().since;
        assert!(filled.is_filled() && since < late);
        for (broker, since) in [("a", late), ("c", EMPTY_REGISTRY_RANK + 1), ("b", 0)] {
            hear(&filled, broker, Some(since));
        }
        assert_eq!(filled.other(), None);
        assert_eq!(holder(first, "").announced().unwrap().since, since, "also after a restart");

        let refused = holder(second, "");
        refused.on_hello(
            &"a".parse().unwrap(),
            Some(ServiceAnnouncement { since: 1, rules: SQLITE_RULES.into() }),
            false,
        );
        assert_eq!(refused.other(), None, "it is not online");
        let writer = tokio::spawn(refused.clone().run(pending()));
        hear(&refused, "a", Some(1));
        refused.on_status(&"a".parse().unwrap(), false);
        refused.on_hello(&"a".parse().unwrap(), None, true);
        assert_eq!((refused.other(), refused.announced()), (Some("a".parse().unwrap()), None));
        assert!(filled.is_serving() && !refused.is_serving() && !RegistryHolder::default().is_serving());
        wait_until_kept(second, |kept| kept.holder.is_some()).await;
        writer.abort();
        let refused = holder(second, "");
        assert!(refused.other().is_some(), "also after a restart");
        refused.on_hello(&"a".parse().unwrap(), None, true);
        refused.on_status(&"a".parse().unwrap(), true);
        assert!(refused.other().is_some(), "nothing is known of it");
        hear(&refused, "a", None);
        assert_eq!(refused.other(), None);

        let shared = holder(shared, "storage: postgres://u@h/d\n");
        hear(&shared, "a", Some(0));
        assert_eq!((shared.other(), shared.announced(), shared.is_of_one()), (None, None, false));
    }

    #[tokio::test(start_paused = true)]
    async fn calls_wait_until_the_states_of_others_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let open = holder(dir.path(), "");
        let own = "b".parse().unwrap();
        let waits = tokio::time::timeout(Duration::from_millis(200), open.settled()).await.is_err();
        open.on_status(&own, true);
        open.on_hello(&own, open.announced(), false);
        assert!(waits);
        open.settled().await;
    }
}
