//! Whether a session still receives what it subscribed to: it publishes to itself and waits for that to come back. A server
//! that answers pings may have forgotten the subscriptions, as after the failure of a node of its cluster. No IO, no clock.

use std::time::Duration;

use tokio::time::Instant;

/// How often a session publishes to itself.
const PERIOD: Duration = Duration::from_secs(10);
/// How long nothing of that may come back.
const PATIENCE: Duration = Duration::from_secs(30);
/// On so many connections in a row at most nothing comes back: it may be that the server does not let it.
const TRIES: u32 = 3;

/// The echo of a session.
#[derive(Debug, Default)]
pub(super) struct Echo {
    /// When the next one is published; none while there is no connection.
    due: Option<Instant>,
    /// When the first one was published that has not come back.
    unanswered: Option<Instant>,
    /// Connections in a row on which nothing came back in time.
    losses: u32,
}

impl Echo {
    /// The session is subscribed.
    pub(super) fn up(&mut self, now: Instant) {
        (self.due, self.unanswered) = (Some(now + PERIOD), None);
    }

    /// The connection is lost.
    pub(super) fn down(&mut self) {
        (self.due, self.unanswered) = (None, None);
    }

    /// Whether one is to be published now.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.due.is_some_and(|due| due <= now);
        if is_due {
            self.due = Some(now + PERIOD);
            self.unanswered.get_or_insert(now);
        }
        is_due
    }

    /// One came back.
    pub(super) fn heard(&mut self) {
        (self.unanswered, self.losses) = (None, 0);
    }

    /// Whether nothing came back for too long, so that the session is to connect anew. After [`TRIES`] connections in a row
    /// it is not asked for any more until one comes back.
    pub(super) fn is_lost(&mut self, now: Instant) -> bool {
        let late = self.unanswered.is_some_and(|since| now.saturating_duration_since(since) >= PATIENCE);
        let is_lost = late && self.losses < TRIES;
        self.losses += u32::from(is_lost);
        is_lost
    }

    /// Whether nothing came back for so long that it is not expected any more.
    pub(super) fn is_given_up(&self) -> bool {
        self.losses >= TRIES
    }

    /// When there is something to do.
    pub(super) fn next(&self) -> Option<Instant> {
        let lost = self.unanswered.filter(|_| !self.is_given_up()).map(|since| since + PATIENCE);
        self.due.into_iter().chain(lost).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_to_which_nothing_comes_back_connects_anew_and_not_for_ever() {
        let (mut echo, mut now) = (Echo::default(), Instant::now());
        for is_lost in [true, true, true, false] {
            echo.up(now);
            assert!(!echo.is_due(now));
            now += PERIOD;
            assert!(echo.is_due(now) && !echo.is_due(now));
            now += PATIENCE;
            assert_eq!((echo.next().is_some(), echo.is_lost(now)), (true, is_lost));
            echo.down();
            assert_eq!(echo.next(), None);
        }
        assert!(echo.is_given_up());
        echo.up(now);
        assert!(echo.is_due(now + PERIOD));
        echo.heard();
        assert!(!echo.is_given_up() && !echo.is_lost(now + PERIOD + PATIENCE));
        assert_eq!(echo.next(), Some(now + 2 * PERIOD));
    }
}
