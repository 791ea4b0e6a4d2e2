//! The writes to a file, on blocking threads. Each continues if the task that waits for it is dropped, so a program
//! that stops waits for the last one here.

use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::task::{JoinError, spawn_blocking};

/// The writes to one file, one at a time. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Writes(Arc<Mutex<()>>);

impl Writes {
    /// Runs `write` after those before it, and returns its result.
    pub async fn run<T: Send + 'static>(&self, write: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        let running = self.0.clone().lock_owned().await;
        let write = move || {
            let result = write();
            drop(running);
            result
        };
        spawn_blocking(write).await
    }

    /// Returns when no write is running.
    pub async fn finished(&self) {
        drop(self.0.lock().await);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_write_is_waited_for_whose_task_was_aborted() {
        let (writes, (begin, has_begun), (end, ended)) = (Writes::default(), channel(), channel::<()>());
        let task = tokio::spawn({
            let writes = writes.clone();
            async move {
                let write = move || {
                    begin.send(()).unwrap();
                    ended.recv().unwrap();
                };
                writes.run(write).await
            }
        });
        tokio::task::spawn_blocking(move || has_begun.recv()).await.unwrap().unwrap();
        task.abort();
        assert!(timeout(Duration::from_millis(100), writes.finished()).await.is_err());
        end.send(()).unwrap();
        writes.finished().await;
        assert_eq!(writes.run(|| 7).await.unwrap(), 7);
    }
}
