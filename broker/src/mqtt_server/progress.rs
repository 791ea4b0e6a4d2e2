//! How far the readers of the log have read. Clients publish no more while a reader is too far behind, so that the log
//! holds the messages that each reader has not read yet, however many are published.
//!
//! No publisher waits long for a reader whose client does not take its messages: its user's [`Account`] limits the time
//! in which its clients keep readers from reading. Beyond that the reader is left out, until it has caught up.
//!
//! [`Account`]: crate::mqtt_server::quota::Account

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// The bytes of a step, in which positions are counted.
const STEP_BYTES: u64 = 64 << 10;
/// A reader that is no further behind has caught up.
const CAUGHT_UP_BYTES: u64 = 2 << 20;

/// The end of the log, and the steps of the readers that publishers wait for.
#[derive(Debug)]
pub struct LogProgress {
    end: AtomicU64,
    /// The first step with a reader; `u64::MAX` if there is none.
    first: AtomicU64,
    readers: Mutex<BTreeMap<u64, usize>>,
}

impl Default for LogProgress {
    fn default() -> Self {
        Self { end: AtomicU64::new(0), first: AtomicU64::new(u64::MAX), readers: Mutex::default() }
    }
}

impl LogProgress {
    /// Everything up to this position was published.
    pub fn publish(&self, end: u64) {
        self.end.store(end, Ordering::Release);
    }

    /// The position up to which everything was published.
    pub fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// How many bytes the last reader has not read yet, to a step. Readers that are left out do not count.
    pub fn lag(&self) -> u64 {
        self.unread(self.first.load(Ordering::Relaxed).saturating_mul(STEP_BYTES))
    }

    fn unread(&self, position: u64) -> u64 {
        self.end().saturating_sub(position)
    }

    fn move_reader(&self, from: Option<u64>, to: Option<u64>) {
        let mut readers = self.readers.lock();
        if let Some(to) = to {
            *readers.entry(to).or_default() += 1;
        }
        if let Some(from) = from
            && let Some(count) = readers.get_mut(&from)
        {
            *count -= 1;
            if *count == 0 {
                readers.remove(&from);
            }
        }
        let first = readers.first_key_value().map_or(u64::MAX, |(step, _)| *step);
        self.first.store(first, Ordering::Relaxed);
    }
}

/// Where a reader is; it is left out when this is dropped.
#[derive(Debug)]
pub struct ReaderPosition {
    progress: Arc<LogProgress>,
    /// None: it is left out.
    step: Option<u64>,
    position: u64,
}

impl ReaderPosition {
    /// A reader that has read everything.
    pub fn at_end(progress: &Arc<LogProgress>) -> Self {
        let progress = progress.clone();
        let position = progress.end();
        let mut reader = Self { progress, step: None, position };
        reader.move_to(Some(position / STEP_BYTES));
        reader
    }

    /// It has read everything up to `position`.
    pub fn advance(&mut self, position: u64) {
        let has_caught_up = self.progress.unread(position) <= CAUGHT_UP_BYTES;
        self.position = position;
        if has_caught_up || self.step.is_some() {
            self.move_to(Some(position / STEP_BYTES));
        }
    }

    /// Whether publishers may have to wait for it: it is not left out, and has not caught up.
    pub fn is_awaited(&self) -> bool {
        self.step.is_some() && self.progress.unread(self.position) > CAUGHT_UP_BYTES
    }

    /// Whether it is left out, and more than `most` behind.
    pub fn is_left_behind(&self, most: u64) -> bool {
        self.step.is_none() && self.progress.unread(self.position) > most
    }

    /// No publisher waits for it from now on.
    pub fn leave(&mut self) {
        self.move_to(None);
    }

    fn move_to(&mut self, step: Option<u64>) {
        if step != self.step {
            self.progress.move_reader(self.step, step);
            self.step = step;
        }
    }
}

impl Drop for ReaderPosition {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_lag_is_that_of_the_last_reader() {
        let progress = Arc::new(LogProgress::default());
        progress.publish(5 * MIB);
        assert_eq!(progress.lag(), 0, "there is no reader");
        let [mut one, mut other] = [(); 2].map(|()| ReaderPosition::at_end(&progress));
        progress.publish(8 * MIB);
        assert_eq!(progress.lag(), 3 * MIB);
        one.advance(7 * MIB);
        assert_eq!(progress.lag(), 3 * MIB);
        other.advance(6 * MIB + 1);
        assert_eq!(progress.lag(), 2 * MIB);
        drop(other);
        assert_eq!(progress.lag(), MIB);
        one.leave();
        assert_eq!(progress.lag(), 0);
    }

    #[test]
    fn a_reader_that_left_counts_again_once_it_has_caught_up() {
        let progress = Arc::new(LogProgress::default());
        let mut reader = ReaderPosition::at_end(&progress);
        progress.publish(CAUGHT_UP_BYTES);
        assert!(!reader.is_awaited());
        progress.publish(6 * MIB);
        assert!(reader.is_awaited());
        reader.leave();
        assert_eq!(progress.lag(), 0, "it is left out");
        assert!(!reader.is_awaited() && reader.is_left_behind(5 * MIB) && !reader.is_left_behind(6 * MIB));
        reader.advance(4 * MIB - 1);
        assert_eq!(progress.lag(), 0);
        reader.advance(4 * MIB);
        assert_eq!(progress.lag(), 2 * MIB, "it has caught up");
        assert!(!reader.is_left_behind(MIB));
    }
}
