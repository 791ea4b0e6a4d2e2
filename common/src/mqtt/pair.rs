//! The two connections of one program, and what happens where a server lets it have only one: one that takes the user name
//! for the client id throws out each when the other connects. Then the second connection gives up its own, and publishes
//! and subscribes through the first.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::outbox::PendingPublish;
use super::subscriptions::Filter;
use super::{Event, Publish};

/// A connection that is lost within this time after the other one connected was taken over by it.
const TAKEOVER: Duration = Duration::from_secs(2);
/// A takeover may be noticed at the new connection up to this long after the old one was lost.
const NOTICED: Duration = Duration::from_millis(500);
/// Losses closer together than this come from the server going down.
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

/// How often the connections of a program were lost to one another.
#[derive(Debug, Default)]
struct Rivalry {
    /// Since when each is connected.
    connected: [Option<Instant>; 2],
    /// When each was lost last.
    lost: [Option<Instant>; 2],
    /// A connection is lost, and whether to the other one is seen when that has connected, or not.
    is_undecided: bool,
    takeovers: u32,
}

impl Rivalry {
    /// What the server did first, to throw out the one or to let in the other, may be noticed last.
    fn connected(&mut self, side: Side, now: Instant) {
        let other = 1 - side as usize;
        let lost_just_now =
            self.lost[other].filter(|lost| self.connected[other].is_none() && age(*lost, now) < NOTICED);
        // Where a server goes, both are lost at once.
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

/// What one session of a pair has of the other.
#[derive(Debug)]
pub(super) struct Pair {
    side: Side,
    rivalry: Arc<Mutex<Rivalry>>,
    /// How the second session comes to the first: its end there, and its beginning here.
    pub joining: Joining,
}

#[derive(Debug)]
pub(super) enum Joining {
    First(mpsc::Receiver<Guest>),
    Second { guests: mpsc::Sender<Guest>, queue: mpsc::Sender<PendingPublish> },
}

/// The second session, as the first has it on its own connection.
#[derive(Debug)]
pub(super) struct Guest {
    pub filters: Vec<Filter>,
    /// Another program may use its name.
    pub is_name_suspect: bool,
    events: mpsc::Sender<Event>,
}

impl Pair {
    /// Both sides of a pair; the second publishes by the `queue` of the first when it has joined that.
    pub(super) fn new(queue: mpsc::Sender<PendingPublish>) -> [Self; 2] {
        let (rivalry, (guests, joining)) = (Arc::default(), mpsc::channel(1));
        let first = Self { side: Side::First, rivalry: Arc::clone(&rivalry), joining: Joining::First(joining) };
        [first, Self { side: Side::Second, rivalry, joining: Joining::Second { guests, queue } }]
    }

    pub(super) fn connected(&self, now: Instant) {
        self.rivalry.lock().connected(self.side, now);
    }

    /// A connection is lost, `perhaps` to the other one.
    pub(super) fn lost(&self, perhaps: bool, now: Instant) {
        let mut rivalry = self.rivalry.lock();
        if perhaps {
            rivalry.lost(self.side, now);
        } else {
            *rivalry = Rivalry { connected: rivalry.connected, ..Rivalry::default() };
            rivalry.connected[self.side as usize] = None;
        }
    }

    /// Whether the server lets the program have one connection only, and this is the one that goes.
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

    /// Passes an event on. One too many is dropped, as servers do it.
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
