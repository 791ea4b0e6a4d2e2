//! The reports of a program to the service manager (systemd): that it is ready, its status, that it makes progress,
//! that it reloads, and that it stops (`sd_notify(3)`). Without a service manager nothing is sent.
//!
//! One task, [`run`], which [`Services::spawn_service_manager`](super::services::Services::spawn_service_manager) starts.

use std::env;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio::time::{Instant, sleep};
use tracing::{debug, error};

use super::heartbeat::Heartbeat;

/// The interval of checks of the program.
const NOTIFY_INTERVAL: Duration = Duration::from_secs(1);

/// A program that is still not ready after this time is reported as ready: it answers requests with the reason.
/// Otherwise a boot, or the installation of a package, would wait for as long as an MQTT server is down.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// The heartbeats of the tasks that are watched, with their names in the log. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct WatchedTasks(Arc<Mutex<Vec<(&'static str, Heartbeat)>>>);

/// The state of the reports, with the last ones.
struct ManagerReport {
    begun: Instant,
    /// A task without progress for so long is stuck; none if the service manager has no watchdog for the program.
    limit: Option<Duration>,
    is_started: bool,
    status: String,
}

/// One message to the service manager.
#[derive(Debug, PartialEq, Eq)]
enum ManagerMessage {
    Ready,
    Status(String),
    Watchdog,
}

/// Runs for ever. `not_ready_reason` returns why the program is not ready, if it is not, as in `/readyz`.
pub async fn run(watched: WatchedTasks, not_ready_reason: impl Fn() -> Option<String>) {
    if env::var_os("NOTIFY_SOCKET").is_none() {
        return pending().await;
    }
    let mut report = ManagerReport::new(sd_notify::watchdog_enabled(), Instant::now());
    let mut was_stuck = None;
    loop {
        let stuck = report.stuck(&watched);
        if let Some(task) = stuck.filter(|_| stuck != was_stuck) {
            error!(task, "no progress, so the watchdog is not notified any more");
        }
        was_stuck = stuck;
        for message in report.next(not_ready_reason(), stuck, Instant::now()) {
            send(message.state());
        }
        sleep(NOTIFY_INTERVAL).await;
    }
}

/// Reports that the lists are being read again, on SIGHUP; [`reloaded`] ends that.
pub fn reloading() {
    send(NotifyState::Reloading);
}

/// Reports that the lists are read.
pub fn reloaded() {
    send(NotifyState::Ready);
}

/// Reports that the program stops.
pub fn stopping() {
    send(NotifyState::Stopping);
}

fn send(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        debug!(%error, "the service manager cannot be notified");
    }
}

impl WatchedTasks {
    /// Watches a task, too.
    pub fn add(&self, task: &'static str, heartbeat: Heartbeat) {
        self.0.lock().push((task, heartbeat));
    }

    /// The names of the tasks.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        self.0.lock().iter().map(|(task, _)| *task).collect()
    }

    /// The first task without progress for longer than `limit`.
    fn stuck(&self, limit: Duration) -> Option<&'static str> {
        self.0.lock().iter().find(|(_, heartbeat)| heartbeat.age() > limit).map(|(task, _)| *task)
    }
}

impl ManagerReport {
    fn new(limit: Option<Duration>, begun: Instant) -> Self {
        Self { begun, limit, is_started: false, status: String::new() }
    }

    /// The first task that is stuck.
    fn stuck(&self, watched: &WatchedTasks) -> Option<&'static str> {
        self.limit.and_then(|limit| watched.stuck(limit))
    }

    /// The messages to send now.
    fn next(&mut self, not_ready_reason: Option<String>, stuck: Option<&str>, now: Instant) -> Vec<ManagerMessage> {
        let mut messages = Vec::new();
        if !self.is_started && (not_ready_reason.is_none() || now - self.begun >= READY_WITHIN) {
            self.is_started = true;
            messages.push(ManagerMessage::Ready);
        }
        let status = match (stuck, not_ready_reason) {
            (Some(task), _) => format!("no progress: {task}"),
            (None, Some(reason)) => format!("not ready: {}", reason.trim_end().replace('\n', "; ")),
            (None, None) => "ready".to_owned(),
        };
        if status != self.status {
            self.status.clone_from(&status);
            messages.push(ManagerMessage::Status(status));
        }
        if self.limit.is_some() && stuck.is_none() {
            messages.push(ManagerMessage::Watchdog);
        }
        messages
    }
}

impl ManagerMessage {
    fn state(&self) -> NotifyState<'_> {
        match self {
            Self::Ready => NotifyState::Ready,
            Self::Status(status) => NotifyState::Status(status),
            Self::Watchdog => NotifyState::Watchdog,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn status(text: &str) -> ManagerMessage {
        ManagerMessage::Status(text.into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_is_started_when_it_is_ready_and_each_status_is_sent_once() {
        let mut report = ManagerReport::new(None, Instant::now());
        let mut next =
            |not_ready_reason: Option<&str>| report.next(not_ready_reason.map(str::to_owned), None, Instant::now());
        assert_eq!(next(Some("one\ntwo\n")), [status("not ready: one; two")]);
        assert_eq!(next(Some("one\ntwo\n")), []);
        assert_eq!(next(None), [ManagerMessage::Ready, status("ready")]);
        assert_eq!(next(None), []);
        assert_eq!(next(Some("lost")), [status("not ready: lost")]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_that_does_not_become_ready_is_started_in_time_all_the_same() {
        let mut report = ManagerReport::new(None, Instant::now());
        assert_eq!(report.next(Some("lost".into()), None, Instant::now()), [status("not ready: lost")]);
        sleep(READY_WITHIN).await;
        assert_eq!(report.next(Some("lost".into()), None, Instant::now()), [ManagerMessage::Ready]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_is_fed_without_a_server_and_not_while_a_task_is_stuck() {
        let mut report = ManagerReport::new(Some(LIMIT), Instant::now());
        let (works, stuck) = (Heartbeat::default(), Heartbeat::default());
        let watched = WatchedTasks::default();
        watched.add("works", works.clone());
        watched.add("stuck", stuck.clone());
        let mut next = |not_ready_reason: Option<&str>| {
            let stuck = report.stuck(&watched);
            report.next(not_ready_reason.map(str::to_owned), stuck, Instant::now())
        };
        assert_eq!(next(None), [ManagerMessage::Ready, status("ready"), ManagerMessage::Watchdog]);
        assert_eq!(next(Some("lost")), [status("not ready: lost"), ManagerMessage::Watchdog]);
        sleep(LIMIT + NOTIFY_INTERVAL).await;
        works.beat();
        assert_eq!(next(None), [status("no progress: stuck")]);
        stuck.beat();
        assert_eq!(next(None), [status("ready"), ManagerMessage::Watchdog]);
    }
}
