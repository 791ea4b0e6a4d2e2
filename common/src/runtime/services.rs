//! The services of a program: named tasks in groups. One that ends by itself ends the program; then, or when the program
//! is asked to end, the groups are stopped in the reverse order of their start.

use std::collections::BTreeMap;
use std::future::pending;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::{error, info};

use super::heartbeat::Heartbeat;
use super::service_manager::{self, WatchedTasks};

tokio::task_local! {
    /// The name of the task that runs.
    static TASK: &'static str;
}

/// Running tasks. Those that are left when this is dropped are aborted.
#[derive(Debug, Default)]
pub struct Services {
    tasks: JoinSet<&'static str>,
    groups: Vec<ServiceGroup>,
    watched: WatchedTasks,
}

/// Tasks that are stopped together.
#[derive(Debug)]
struct ServiceGroup {
    stop: CancellationToken,
    limit: Duration,
    overdue: Option<&'static str>,
    running: BTreeMap<&'static str, AbortHandle>,
}

/// A task ended without having been stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} ended unexpectedly")]
pub struct Ended(pub &'static str);

/// The name of the service that runs the current task; none in tasks that it started, and outside of services.
#[must_use]
pub fn running() -> Option<&'static str> {
    TASK.try_with(|name| *name).ok()
}

impl Services {
    /// Begins a group, which is stopped before those that were begun earlier. Its tasks then have `limit` to end; those
    /// that have not are aborted, and `overdue`, if given, is logged as an error of each.
    pub fn group(&mut self, limit: Duration, overdue: Option<&'static str>) -> &mut Self {
        self.groups.push(ServiceGroup { stop: CancellationToken::new(), limit, overdue, running: BTreeMap::new() });
        self
    }

    /// Begins a group of tasks that have nothing to finish: they are aborted when it is stopped.
    pub fn background(&mut self) -> &mut Self {
        self.group(Duration::ZERO, None)
    }

    /// Starts a task in the last group. `name`, which must be unique, is used in the log; `task` gets a future that
    /// returns when the group is stopped.
    pub fn spawn<F>(&mut self, name: &'static str, task: impl FnOnce(WaitForCancellationFutureOwned) -> F) -> &mut Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if self.groups.is_empty() {
            self.background();
        }
        if let Some(group) = self.groups.last_mut() {
            let task = task(group.stop.clone().cancelled_owned());
            let handle = self.tasks.spawn(TASK.scope(name, async move {
                task.await;
                name
            }));
            group.running.insert(name, handle);
        }
        self
    }

    /// Starts a task in the last group that the service manager watches: it restarts the program if there is no
    /// heartbeat for too long.
    pub fn spawn_watched<F>(
        &mut self,
        name: &'static str,
        heartbeat: Heartbeat,
        task: impl FnOnce(WaitForCancellationFutureOwned) -> F,
    ) -> &mut Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.watched.add(name, heartbeat);
        self.spawn(name, task)
    }

    /// Starts the reports to the service manager in the last group, see [`service_manager::run`]. Watched tasks that
    /// start later are in them, too.
    pub fn spawn_service_manager(
        &mut self,
        not_ready_reason: impl Fn() -> Option<String> + Send + 'static,
    ) -> &mut Self {
        let watched = self.watched.clone();
        self.spawn("the service manager", |_| service_manager::run(watched, not_ready_reason))
    }

    /// The names of the watched tasks.
    #[must_use]
    pub fn watched(&self) -> Vec<&'static str> {
        self.watched.names()
    }

    /// Runs until `stop` returns, or until a task ends, which is the error; then stops all, group by group. `program`
    /// is used in the log.
    pub async fn run_until(mut self, program: &'static str, stop: impl Future<Output = ()>) -> Result<(), Ended> {
        let result = tokio::select! {
            biased;
            ended = self.ended() => Err(ended),
            () = stop => Ok(()),
        };
        service_manager::stopping();
        info!("{program} stops");
        while let Some(group) = self.groups.pop() {
            self.stop(group).await;
        }
        result
    }

    /// Returns when a task ends. Cancel-safe.
    async fn ended(&mut self) -> Ended {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(name)) => {
                    self.groups.iter_mut().for_each(|group| drop(group.running.remove(name)));
                    return Ended(name);
                }
                // It was aborted. It did not panic: that ends the process.
                Some(Err(_)) => {}
                None => pending().await,
            }
        }
    }

    async fn stop(&mut self, mut group: ServiceGroup) {
        group.stop.cancel();
        let all = async {
            while !group.running.is_empty() {
                let Ended(name) = self.ended().await;
                group.running.remove(name);
            }
        };
        let _ = timeout(group.limit, all).await;
        for (task, handle) in group.running {
            if let Some(overdue) = group.overdue {
                error!(task, "{overdue}");
            }
            handle.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio::sync::oneshot;
    use tokio::time::{Instant, sleep};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    /// Names in the order in which tasks ended.
    #[derive(Clone, Default)]
    struct Order(Arc<Mutex<Vec<&'static str>>>);

    impl Order {
        /// A task that takes `time` to end after it is stopped.
        async fn task(self, name: &'static str, time: Duration, stop: impl Future<Output = ()>) {
            stop.await;
            sleep(time).await;
            self.0.lock().push(name);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn groups_end_one_after_the_other_in_the_reverse_order_of_their_start() {
        let (order, mut services) = (Order::default(), Services::default());
        let task = |name, time| {
            let order = order.clone();
            move |stop| order.task(name, time, stop)
        };
        services.group(LIMIT, None).spawn("storage", task("storage", LIMIT / 4));
        services.group(LIMIT, None).spawn("slow", task("slow", LIMIT / 2)).spawn("fast", task("fast", LIMIT / 4));
        services.background().spawn("endless", |_| pending());
        services.group(LIMIT, None).spawn("front", task("front", LIMIT / 2));
        assert_eq!(services.run_until("it", sleep(LIMIT)).await, Ok(()));
        assert_eq!(*order.0.lock(), ["front", "fast", "slow", "storage"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_is_named_and_the_others_are_stopped() {
        let (order, mut services) = (Order::default(), Services::default());
        let (last, short) = (order.clone(), order.clone());
        services.group(LIMIT, None).spawn("storage", |stop| last.task("storage", LIMIT / 2, stop));
        services.background().spawn("short", |_| short.task("short", LIMIT, sleep(LIMIT)));
        let ended = services.run_until("it", pending()).await.unwrap_err();
        assert_eq!(ended.to_string(), "short ended unexpectedly");
        assert_eq!(*order.0.lock(), ["short", "storage"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_end_is_waited_for_no_longer_than_the_limit_and_aborted() {
        let (mut services, begun) = (Services::default(), Instant::now());
        let (held, is_held) = oneshot::channel::<()>();
        services.group(LIMIT, None).spawn("storage", |stop| stop);
        services.group(LIMIT, Some("it does not end")).spawn("endless", |_| async move {
            pending::<()>().await;
            drop(held);
        });
        assert_eq!(services.run_until("it", async {}).await, Ok(()));
        assert_eq!(begun.elapsed(), LIMIT);
        assert!(is_held.await.is_err());
    }
}
