//! The drain of this gateway, which `wgkex-worker drain` writes into a file.
//!
//! Two tasks, which `run` of the worker owns: [`DrainWatch::run`], and [`sync_again`] for the keys that a drain
//! removed. The next stops are the hello of the [`publisher`](crate::bus::publisher), and the
//! [`reconciler`](crate::reconciler), which removes peers past the deadline. The worker only reads the file; only the
//! command writes it.

use std::future::pending;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use prometheus::IntGauge;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};
use wgkex_common::drain;
use wgkex_common::runtime::hangups::Hangups;
use wgkex_common::storage::StorageError;
use wgkex_common::sync::{SyncEvent, SyncSender};
use wgkex_common::time_text::unix;
use wgkex_common::wire::drain::Drain;

/// The time between two reads of the file.
const FILE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Polls the file of the drain.
pub struct DrainWatch {
    file: PathBuf,
    current: watch::Sender<Option<Drain>>,
    metric: IntGauge,
    /// The last read failed, which is logged.
    is_failing: bool,
}

impl DrainWatch {
    /// Reads the file in `state_dir`, so that a drain counts from the start.
    pub fn open(state_dir: &Path, metric: IntGauge) -> Self {
        let file = drain::worker_file(state_dir);
        let mut watch = Self { file, current: watch::Sender::new(None), metric, is_failing: false };
        watch.apply(drain::read(&watch.file), unix(SystemTime::now()));
        watch
    }

    /// Whether the gateway drains.
    pub fn receiver(&self) -> watch::Receiver<Option<Drain>> {
        self.current.subscribe()
    }

    /// Reads the file every second, and on SIGHUP.
    pub async fn run(mut self) {
        let mut hangups = Hangups::listen();
        loop {
            tokio::select! {
                () = sleep(FILE_CHECK_INTERVAL) => {}
                () = hangups.next() => {}
            }
            let file = self.file.clone();
            if let Ok(read) = spawn_blocking(move || drain::read(&file)).await {
                self.apply(read, unix(SystemTime::now()));
            }
        }
    }

    /// Applies the result of a read. A file that cannot be read changes nothing, except that a drain ends at its time.
    fn apply(&mut self, read: Result<Option<Drain>, StorageError>, now: u64) {
        let read = match read {
            Ok(drain) => {
                self.is_failing = false;
                drain
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    let file = self.file.display();
                    warn!(%file, %error, "the drain cannot be read, what was last read of it counts");
                }
                self.current.borrow().clone()
            }
        };
        let drain = read.filter(|drain| !drain.is_over(now)).map(|drain| drain.at(now));
        self.metric.set(drain.is_some().into());
        let is_news = self.current.send_if_modified(|current| {
            let is_news = *current != drain;
            current.clone_from(&drain);
            is_news
        });
        match drain {
            Some(drain) if is_news && drain.passed_deadline().is_some() => {
                info!(%drain, "draining, and the deadline is over: peers are removed in portions");
            }
            Some(drain) if is_news => info!(%drain, "draining: this gateway gets no new routers"),
            None if is_news => info!("no longer draining: this gateway gets new routers"),
            _ => {}
        }
    }
}

/// Requests all live keys again whenever a drain no longer removes peers: this gateway lacks their keys.
pub async fn sync_again(mut drain: watch::Receiver<Option<Drain>>, sync: SyncSender) {
    let mut was_removing = false;
    loop {
        let removes = drain.borrow_and_update().as_ref().is_some_and(|drain| drain.passed_deadline().is_some());
        if std::mem::replace(&mut was_removing, removes) && !removes {
            // If the queue is full, the hourly request is for all keys, too.
            let _ = sync.try_send(SyncEvent::KeysRemoved);
        }
        if drain.changed().await.is_err() {
            pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use wgkex_common::drain::DrainRequest;

    use super::*;

    #[test]
    fn a_drain_counts_from_the_start_until_its_end_and_through_a_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        let (file, now) = (drain::worker_file(dir.path()), unix(SystemTime::now()));
        let made = Drain { since: now, until: Some(now + 60), reason: None, deadline: None };
        drain::save(&file, Some(made.clone())).unwrap();
        let metric = IntGauge::new("m", "m").unwrap();
        let mut watch = DrainWatch::open(dir.path(), metric.clone());
        let mut receiver = watch.receiver();
        assert_eq!((receiver.borrow().clone(), metric.get()), (Some(made.clone()), 1));
        std::fs::write(&file, "{").unwrap();
        watch.apply(drain::read(&file), now + 59);
        assert!(!receiver.has_changed().unwrap() && watch.is_failing);
        watch.apply(drain::read(&file), now + 60);
        assert_eq!((receiver.borrow_and_update().clone(), metric.get()), (None, 0));
        watch.apply(Ok(Some(made.clone())), now);
        assert!(receiver.has_changed().unwrap() && !watch.is_failing);
        assert_eq!(*receiver.borrow(), Some(made));
        watch.apply(Ok(None), now);
        assert_eq!((receiver.borrow().clone(), metric.get()), (None, 0));

        let request = DrainRequest { deadline: Some("1m"), ..DrainRequest::default() };
        let made = Drain::begin(request, now).unwrap();
        for (seconds, is_over) in [(59, false), (60, true), (61, true)] {
            watch.apply(Ok(Some(made.clone())), now + seconds);
            let seen = receiver.borrow_and_update().clone().unwrap();
            assert_eq!(seen.passed_deadline().is_some(), is_over, "{seconds}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn when_peers_are_removed_no_longer_all_live_keys_are_requested() {
        let request = DrainRequest { deadline: Some("1m"), ..DrainRequest::default() };
        let made = Drain::begin(request, 0).unwrap();
        let (drain, receiver) = watch::channel(None);
        let (sync, mut events) = wgkex_common::sync::channel();
        tokio::spawn(sync_again(receiver, sync));
        for (state, is_asked) in [
            (Some(made.clone()), false),
            (None, false),
            (Some(made.clone().at(60)), false),
            (Some(Drain { reason: Some("more".into()), ..made.clone().at(60) }), false),
            (None, true),
            (Some(made.at(60)), false),
        ] {
            drain.send_replace(state.clone());
            sleep(FILE_CHECK_INTERVAL).await;
            assert_eq!(events.try_recv().is_ok(), is_asked, "{state:?}");
        }
    }
}
