//! The numbers of frames between this broker and another one, each way, and the items that wait to be sent. It has no
//! IO and no clock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::tenants::frame::FRAME_MAX;

/// The longest time between two frames; one without items is sent if need be.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Frames that are sent at once, at most: a router's key may wait behind them.
const FRAMES_MAX: usize = 20;

/// Both ways to another broker, since it registered or was registered with.
#[derive(Debug)]
pub struct BrokerStream<T> {
    epoch: u64,
    /// Frames that were sent.
    sent: u64,
    /// Frames that were received.
    received: u64,
    waiting: VecDeque<T>,
    sent_at: Option<Instant>,
    /// When the last frame was received, or the epoch began.
    pub last_received: Instant,
}

/// A frame that is to be sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Numbered<T> {
    /// Its epoch.
    pub epoch: u64,
    /// Its number.
    pub number: u64,
    /// Its items.
    pub items: Vec<T>,
}

impl<T> BrokerStream<T> {
    /// The stream of an epoch that begins now.
    pub fn new(epoch: u64, now: Instant) -> Self {
        Self { epoch, sent: 0, received: 0, waiting: VecDeque::new(), sent_at: None, last_received: now }
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Adds an item to be sent.
    pub fn push(&mut self, item: T) {
        self.waiting.push_back(item);
    }

    /// Counts a received frame; false if others before it are missing.
    pub fn receive(&mut self, number: u64, now: Instant) -> bool {
        let is_next = number == self.received;
        if is_next {
            self.received += 1;
            self.last_received = now;
        }
        is_next
    }

    /// The frames that are to be sent now.
    pub fn take_frames(&mut self, now: Instant) -> Vec<Numbered<T>> {
        let is_silent = self.sent_at.is_none_or(|sent| now.saturating_duration_since(sent) >= HEARTBEAT);
        let mut frames = Vec::new();
        while (!self.waiting.is_empty() && frames.len() < FRAMES_MAX) || (is_silent && frames.is_empty()) {
            let items = self.waiting.drain(..self.waiting.len().min(FRAME_MAX)).collect();
            frames.push(Numbered { epoch: self.epoch, number: self.sent, items });
            self.sent += 1;
            self.sent_at = Some(now);
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_a_bounded_number_of_items_and_come_at_least_every_few_seconds() {
        let now = Instant::now();
        let mut stream = BrokerStream::new(7, now);
        let sizes = |frames: Vec<Numbered<u32>>| -> Vec<_> {
            frames.into_iter().map(|frame| (frame.epoch, frame.number, frame.items.len())).collect()
        };
        (0..201).for_each(|n| stream.push(n));
        assert_eq!(sizes(stream.take_frames(now)), [(7, 0, 100), (7, 1, 100), (7, 2, 1)]);
        assert_eq!(sizes(stream.take_frames(now + HEARTBEAT / 2)), []);
        assert_eq!(sizes(stream.take_frames(now + HEARTBEAT)), [(7, 3, 0)]);
        stream.push(1);
        assert_eq!(sizes(stream.take_frames(now + HEARTBEAT)), [(7, 4, 1)]);
        let accepted = [1, 0, 0, 2, 1].map(|number| stream.receive(number, now));
        assert_eq!(accepted, [false, true, false, false, true]);
    }
}
