//! Whether this gateway drains: what `wgkex-worker drain` wrote into a file.
//!
//! One task, [`DrainWatch::run`], which `run` of the worker owns; the next stop is the hello of the
//! [`publisher`](crate::bus::publisher). The file is read as it is: only the command writes it.

use std::future::pending;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use prometheus::IntGauge;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{info, warn};
use wgkex_common::access_lists::unix;
use wgkex_common::drain::{self, Drain};
use wgkex_common::storage::StorageError;

/// The time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Looks at the file of the drain.
pub struct DrainWatch {
    file: PathBuf,
    current: watch::Sender<Option<Drain>>,
    metric: IntGauge,
    /// The last look failed, which is logged.
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

    /// Looks again every second, and on SIGHUP.
    pub async fn run(mut self) {
        let mut hangup = signal(SignalKind::hangup()).ok();
        loop {
            tokio::select! {
                () = sleep(INTERVAL) => {}
                () = received(hangup.as_mut()) => {}
            }
            let file = self.file.clone();
            if let Ok(read) = spawn_blocking(move || drain::read(&file)).await {
                self.apply(read, unix(SystemTime::now()));
            }
        }
    }

    /// Takes over what was read. A file that cannot be read changes nothing, except that a drain ends at its time.
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
        let drain = read.filter(|drain| !drain.is_over(now));
        self.metric.set(drain.is_some().into());
        let is_news = self.current.send_if_modified(|current| {
            let is_news = *current != drain;
            current.clone_from(&drain);
            is_news
        });
        match drain {
            Some(drain) if is_news => info!(%drain, "draining: this gateway gets no new routers"),
            None if is_news => info!("no longer draining: this gateway gets new routers"),
            _ => {}
        }
    }
}

async fn received(signal: Option<&mut Signal>) {
    let closed = match signal {
        Some(signal) => signal.recv().await.is_none(),
        None => true,
    };
    if closed {
        pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_counts_from_the_start_until_its_end_and_through_a_damaged_file() {
        let dir = tempfile::tempdir().unwrap();
        let (file, now) = (drain::worker_file(dir.path()), unix(SystemTime::now()));
        let made = Drain { since: now, until: Some(now + 60), reason: None };
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
    }
}
