//! Signs that a task makes progress, for the watchdog of [`super::service_manager`].
//!
//! A watched task beats after each step of its work, and every second while it waits: waiting is no lack of progress,
//! not even for a server that is down. A task beats no more if it is blocked, or if a step of its work never ends.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

/// How often a task that waits beats.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// The heartbeat of one task. Clones share it.
#[derive(Debug, Clone)]
pub struct Heartbeat(Arc<Mutex<Instant>>);

impl Default for Heartbeat {
    /// A task that starts has made progress.
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Heartbeat {
    /// The task made progress.
    pub fn beat(&self) {
        *self.0.lock() = Instant::now();
    }

    /// How long ago the task made progress.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.0.lock().elapsed()
    }

    /// Awaits the next event of the task. It beats as long as the event is waited for, and when it comes.
    pub async fn wait_for<T>(&self, event: impl Future<Output = T>) -> T {
        let mut event = pin!(event);
        loop {
            self.beat();
            if let Ok(event) = timeout(HEARTBEAT_INTERVAL, event.as_mut()).await {
                self.beat();
                return event;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_waits_beats_and_one_whose_step_never_ends_does_not() {
        let heartbeat = Heartbeat::default();
        let of_task = heartbeat.clone();
        tokio::spawn(async move {
            of_task.wait_for(sleep(100 * HEARTBEAT_INTERVAL)).await;
            sleep(100 * HEARTBEAT_INTERVAL).await;
        });
        sleep(99 * HEARTBEAT_INTERVAL + HEARTBEAT_INTERVAL / 2).await;
        assert!(heartbeat.age() <= HEARTBEAT_INTERVAL, "{:?}", heartbeat.age());
        sleep(50 * HEARTBEAT_INTERVAL).await;
        assert!(heartbeat.age() > 49 * HEARTBEAT_INTERVAL, "{:?}", heartbeat.age());
        heartbeat.beat();
        assert_eq!(heartbeat.age(), Duration::ZERO);
    }
}
