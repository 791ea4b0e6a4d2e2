//! The two connections of one program, and the handling of servers that allow only one: a server that uses the user
//! name as the client id closes each connection when the other one connects. Then the second connection is closed, and
//! the second session publishes and subscribes through the first.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::outbox::PendingPublish;
use super::subscriptions::Filter;
use super::{Event, Publish};

/// A connection that is lost within this time after the other one connected was closed for it.
const TAKEOVER: Duration = Duration::from_secs(2);
/// The new connection may be reported as connected up to this long after the old one was reported as lost.
const NOTICED: Duration = Duration::from_millis(500);
/// If both connections are lost within this time, the server was stopped.
const SIMULTANEOUS: Duration = Duration::from_millis(30);
/// After this many takeovers in a row the server allows only one connection.
const TAKEOVERS: u32 = 4;
/// Events that wait for the second session at most.
const SECOND_SESSION_EVENTS_MAX: usize = 65_536;

/// Which connection of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    First,
    Second,
}

/// How often the connections of a program were closed for one another.
#[derive(Debug, Default)]
struct TakeoverCounter {
    /// When each was connected, if it is.
    connected: [Option<Instant>; 2],
    /// When each was last lost.
    lost: [Option<Instant>; 2],
    /// A connection is lost, and whether it was closed for the other one is decided when that one connects or is lost.
    is_undecided: bool,
    takeovers: u32,
}

impl TakeoverCounter {
    /// The two events of a takeover may be reported in either order.
    fn connected(&mut self, side: Side, now: Instant) {
        let other = 1 - side as usize;
        let lost_just_now =
            self.lost[other].filter(|lost| self.connected[other].is_none() && age(*lost, now) < NOTICED);
        // When a server stops, both connections are lost at once.
        let is_takeover = lost_just_now.is_some_and(|other| {
            self.lost[side as usize].is_none_or(|lost| other.saturating_duration_since(lost) > SIMULTANEOUS)
        });
        self.connected[side as usize] = Some(now);
        if std::mem::take(&mut self.is_undecided) {
            self.takeovers = if is_takeover { self.takeovers + 1 } else { 0 };
        }
    }

    fn lost(&mut self, side: Side, now: Instant) {
        if self.connected[side as usize].take().is_none() {
            return;
        }
        self.lost[side as usize] = Some(now);
        if std::mem::take(&mut self.is_undecided) {
            self.takeovers = 0;
        }
        match self.connected[1 - side as usize] {
            Some(since) if age(since, now) < TAKEOVER => self.takeovers += 1,
            Some(_) => self.takeovers = 0,
            None => self.is_undecided = true,
        }
    }

    fn is_settled(&self) -> bool {
        self.takeovers >= TAKEOVERS
    }
}

fn age(since: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(since)
}

/// The state that one session of a pair shares with the other.
#[derive(Debug)]
pub(super) struct SessionPair {
    side: Side,
    takeover_counter: Arc<Mutex<TakeoverCounter>>,
    /// The channel by which the second session joins the first: the receiver of the first, the sender of the second.
    pub joining: JoinChannel,
}

#[derive(Debug)]
pub(super) enum JoinChannel {
    First(mpsc::Receiver<JoinedSession>),
    Second { joined_sessions: mpsc::Sender<JoinedSession>, queue: mpsc::Sender<PendingPublish> },
}

/// The second session, served by the first on its connection.
#[derive(Debug)]
pub(super) struct JoinedSession {
    pub filters: Vec<Filter>,
    /// Another program may use its name.
    pub is_name_suspect: bool,
    events: mpsc::Sender<Event>,
}

impl SessionPair {
    /// Both sides of a pair; after joining, the second publishes by the `queue` of the first.
    pub(super) fn new(queue: mpsc::Sender<PendingPublish>) -> [Self; 2] {
        let (takeover_counter, (joined_sessions, joining)) = (Arc::default(), mpsc::channel(1));
        let first = Self {
            side: Side::First,
            takeover_counter: Arc::clone(&takeover_counter),
            joining: JoinChannel::First(joining),
        };
        [first, Self { side: Side::Second, takeover_counter, joining: JoinChannel::Second { joined_sessions, queue } }]
    }

    pub(super) fn connected(&self, now: Instant) {
        self.takeover_counter.lock().connected(self.side, now);
    }

    /// A connection is lost; `perhaps` because of the other one.
    pub(super) fn lost(&self, perhaps: bool, now: Instant) {
        let mut takeover_counter = self.takeover_counter.lock();
        if perhaps {
            takeover_counter.lost(self.side, now);
        } else {
            *takeover_counter = TakeoverCounter { connected: takeover_counter.connected, ..TakeoverCounter::default() };
            takeover_counter.connected[self.side as usize] = None;
        }
    }

    /// Whether the server allows one connection only, and this is the one to be given up.
    pub(super) fn has_to_join(&self) -> bool {
        self.side == Side::Second && self.takeover_counter.lock().is_settled()
    }
}

impl JoinedSession {
    pub(super) fn new(filters: Vec<Filter>, is_name_suspect: bool) -> (Self, mpsc::Receiver<Event>) {
        let (events, received) = mpsc::channel(SECOND_SESSION_EVENTS_MAX);
        (Self { filters, is_name_suspect, events }, received)
    }

    /// Whether a message is for one of its filters.
    pub(super) fn matches(&self, publish: &Publish) -> bool {
        self.filters.iter().any(|filter| rumqttc::matches(&publish.topic, &filter.text))
    }

    /// Passes on an event. Further events for a full queue are dropped.
    pub(super) fn on_event(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_throw_each_other_out_become_one_and_those_that_a_server_drops_do_not() {
        let (mut takeover_counter, begun) = (TakeoverCounter::default(), Instant::now());
        let at = |tenths: u32| begun + Duration::from_millis(100) * tenths;
        takeover_counter.connected(Side::First, at(0));
        for (n, [lost, other]) in
            (0..TAKEOVERS).zip([[Side::First, Side::Second], [Side::Second, Side::First]].into_iter().cycle())
        {
            assert!(!takeover_counter.is_settled());
            takeover_counter.connected(other, at(10 * n));
            takeover_counter.lost(lost, at(10 * n + 1));
        }
        assert!(takeover_counter.is_settled());

        let mut takeover_counter = TakeoverCounter::default();
        takeover_counter.connected(Side::First, at(0));
        let sides = [[Side::First, Side::Second], [Side::Second, Side::First]];
        for (n, [lost, other]) in (1..=TAKEOVERS).zip(sides.into_iter().cycle()) {
            assert!(!takeover_counter.is_settled());
            takeover_counter.lost(lost, at(10 * n));
            takeover_counter.connected(other, at(10 * n + 1));
        }
        assert!(takeover_counter.is_settled(), "the loss is noticed first");

        let mut takeover_counter = TakeoverCounter::default();
        for n in 0..20 {
            for side in [Side::First, Side::Second] {
                takeover_counter.connected(side, at(10 * n));
            }
            for side in [Side::Second, Side::First] {
                takeover_counter.lost(side, at(10 * n + 5));
            }
        }
        assert!(!takeover_counter.is_settled(), "the server drops both");
        takeover_counter.connected(Side::First, at(0));
        takeover_counter.connected(Side::Second, at(0));
        for n in 1..20 {
            takeover_counter.lost(Side::First, at(100 * n));
            takeover_counter.connected(Side::First, at(100 * n + 1));
        }
        assert!(!takeover_counter.is_settled(), "one is lost again and again, and not to the other");
    }
}
