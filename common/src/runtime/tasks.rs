//! The tasks of a program, by name: none of them ends before the program does without being noticed.

use std::collections::BTreeSet;
use std::future::pending;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

/// Tasks that run. Those that are left when this is dropped are aborted.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<&'static str>,
    running: BTreeSet<&'static str>,
}

/// A task ended, and nobody had asked it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} ended unexpectedly")]
pub struct Ended(pub &'static str);

impl Tasks {
    /// Starts a task, which no other has the name of.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.running.insert(name);
        self.set.spawn(async move {
            task.await;
            name
        });
    }

    /// Returns when one of them ends. Cancel-safe.
    pub async fn ended(&mut self) -> Ended {
        // A task is neither aborted while it is here nor does it panic: that ends the process.
        match self.set.join_next().await {
            Some(Ok(name)) => {
                self.running.remove(name);
                Ended(name)
            }
            Some(Err(_)) | None => pending().await,
        }
    }

    /// Waits until all have ended, no longer than `limit`, and names those that have not.
    pub async fn finish(mut self, limit: Duration) -> Vec<&'static str> {
        let all = async {
            while !self.running.is_empty() {
                self.ended().await;
            }
        };
        let _ = timeout(limit, all).await;
        self.running.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_task_that_ends_is_named_and_one_that_does_not_is_waited_for_no_longer_than_the_limit() {
        let mut tasks = Tasks::default();
        tasks.spawn("short", sleep(LIMIT / 2));
        tasks.spawn("endless", pending());
        let (held, is_held) = oneshot::channel::<()>();
        tasks.spawn("long", async move {
            sleep(LIMIT).await;
            drop(held);
        });
        assert_eq!(tasks.ended().await.to_string(), "short ended unexpectedly");
        assert!(timeout(LIMIT / 4, tasks.ended()).await.is_err());
        assert_eq!(tasks.finish(LIMIT / 2).await, ["endless"]);
        assert!(is_held.await.is_err());
    }
}
