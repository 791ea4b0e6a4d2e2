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
const MAX_EVENTS: usize = 65_536;

/// Which connection of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    First,
    Second,
}

/// How often the connections of a program were closed for one another.
#[derive(Debug, Default)]
struct Rivalry {
    /// When each was connected, if it is.
    connected: [Option<Instant>; 2],
    /// When each was last lost.
    lost: [Option<Instant>; 2],
    /// A connection is lost, and whether it was closed for the other one is decided when that one connects or is lost.
    is_undecided: bool,
    takeovers: u32,
}

impl Rivalry {
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
pub(super) struct Pair {
    side: Side,
    rivalry: Arc<Mutex<Rivalry>>,
    /// The channel by which the second session joins the first: the receiver of the first, the sender of the second.
    pub joining: Joining,
}

#[derive(Debug)]
pub(super) enum Joining {
    First(mpsc::Receiver<Guest>),
    Second { guests: mpsc::Sender<Guest>, queue: mpsc::Sender<PendingPublish> },
}

/// The second session, served by the first on its connection.
#[derive(Debug)]
pub(super) struct Guest {
    pub filters: Vec<Filter>,
    /// Another program may use its name.
    pub is_name_suspect: bool,
    events: mpsc::Sender<Event>,
}

impl Pair {
    /// Both sides of a pair; after joining, the second publishes by the `queue` of the first.
    pub(super) fn new(queue: mpsc::Sender<PendingPublish>) -> [Self; 2] {
        let (rivalry, (guests, joining)) = (Arc::default(), mpsc::channel(1));
        let first = Self { side: Side::First, rivalry: Arc::clone(&rivalry), joining: Joining::First(joining) };
        [first, Self { side: Side::Second, rivalry, joining: Joining::Second { guests, queue } }]
    }

    pub(super) fn connected(&self, now: Instant) {
        self.rivalry.lock().connected(self.side, now);
    }

    /// A connection is lost; `perhaps` because of the other one.
    pub(super) fn lost(&self, perhaps: bool, now: Instant) {
        let mut rivalry = self.rivalry.lock();
        if perhaps {
            rivalry.lost(self.side, now);
        } else {
            *rivalry = Rivalry { connected: rivalry.connected, ..Rivalry::default() };
            rivalry.connected[self.side as usize] = None;
        }
    }

    /// Whether the server allows one connection only, and this is the one to be given up.
    pub(super) fn has_to_join(&self) -> bool {
        self.side == Side::Second && self.rivalry.lock().is_settled()
    }
}

impl Guest {
    pub(super) fn new(filters: Vec<Filter>, is_name_suspect: bool) -> (Self, mpsc::Receiver<Event>) {
        let (events, received) = mpsc::channel(MAX_EVENTS);
        (Self { filters, is_name_suspect, events }, received)
    }

    /// Whether a message is for one of its filters.
    pub(super) fn wants(&self, publish: &Publish) -> bool {
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
        let (mut rivalry, begun) = (Rivalry::default(), Instant::now());
        let at = |tenths: u32| begun + Duration::from_millis(100) * tenths;
        rivalry.connected(Side::First, at(0));
        for (n, [lost, other]) in
            (0..TAKEOVERS).zip([[Side::First, Side::Second], [Side::Second, Side::First]].into_iter().cycle())
        {
            assert!(!rivalry.is_settled());
            rivalry.connected(other, at(10 * n));
            rivalry.lost(lost, at(10 * n + 1));
        }
        assert!(rivalry.is_settled());

        let mut rivalry = Rivalry::default();
        rivalry.connected(Side::First, at(0));
        let sides = [[Side::First, Side::Second], [Side::Second, Side::First]];
        for (n, [lost, other]) in (1..=TAKEOVERS).zip(sides.into_iter().cycle()) {
            assert!(!rivalry.is_settled());
            rivalry.lost(lost, at(10 * n));
            rivalry.connected(other, at(10 * n + 1));
        }
        assert!(rivalry.is_settled(), "the loss is noticed first");

        let mut rivalry = Rivalry::default();
        for n in 0..20 {
            for side in [Side::First, Side::Second] {
                rivalry.connected(side, at(10 * n));
            }
            for side in [Side::Second, Side::First] {
                rivalry.lost(side, at(10 * n + 5));
            }
        }
        assert!(!rivalry.is_settled(), "the server drops both");
        rivalry.connected(Side::First, at(0));
        rivalry.connected(Side::Second, at(0));
        for n in 1..20 {
            rivalry.lost(Side::First, at(100 * n));
            rivalry.connected(Side::First, at(100 * n + 1));
        }
        assert!(!rivalry.is_settled(), "one is lost again and again, and not to the other");
    }
}
