//! Checks that a session still receives messages of its subscriptions: it publishes to itself and waits for that
//! message. A server that answers pings may have lost the subscriptions, as after the failure of a node of its cluster.
//! No IO, no clock.
//!
//! The first echo of a connection is published before anything else. Mosquitto 2.0.11 with `max_queued_messages 0`
//! closes the connection of a client that publishes against its access list; an access list of the original has no
//! entry for `wgkex/`. If the server closes the connection after the echo, nothing else is published below `wgkex/`
//! either.

use std::time::Duration;

use tokio::time::Instant;

/// How often a session publishes to itself.
const ECHO_INTERVAL: Duration = Duration::from_secs(10);
/// The session reconnects after so long without an echo.
const ECHO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the first echo of a connection delays other messages.
const FIRST_ECHO_TIMEOUT: Duration = Duration::from_secs(2);
/// After so many connections in a row without an echo, but with other messages, the session stops reconnecting: the
/// server may not allow the echo.
const ECHO_TRIES_MAX: u32 = 3;
/// The same for a session that has never received an echo, and receives no other message.
const ECHO_SILENCE_TIMEOUT: Duration = Duration::from_secs(300);
/// After so many connections in a row that the server closed because of the echo nothing more is published below
/// `wgkex/`,
const CLOSED_MAX: u32 = 2;
/// for so long.
const FORBIDDEN_TIME: Duration = Duration::from_secs(600);

/// The echo of a session.
#[derive(Debug, Default)]
pub(super) struct SessionEcho {
    /// When the next one is published; none while there is no connection, or the server does not allow it.
    due: Option<Instant>,
    /// When the first unanswered one was published.
    unanswered: Option<Instant>,
    /// None was received on this connection.
    is_first: bool,
    /// One was received on some connection.
    was_received: bool,
    /// When the last message was received on this connection, apart from retained ones.
    silent: Option<Instant>,
    /// Connections in a row without an echo in time.
    losses: u32,
    /// Connections in a row that the server closed because of the first echo.
    closed: u32,
    forbidden: Option<Instant>,
}

impl SessionEcho {
    /// The session is subscribed.
    pub(super) fn up(&mut self, now: Instant) {
        let due = (!self.is_forbidden(now)).then_some(now);
        (self.due, self.unanswered, self.is_first, self.silent) = (due, None, true, Some(now));
    }

    /// The connection is lost. True if the server closed it because of the first echo.
    pub(super) fn down(&mut self, is_closed: bool, now: Instant) -> bool {
        let is_over_echo = is_closed && self.must_wait(now);
        if is_over_echo {
            self.closed += 1;
            if self.closed >= CLOSED_MAX {
                self.forbidden = Some(now + FORBIDDEN_TIME);
            }
        }
        (self.due, self.unanswered, self.silent) = (None, None, None);
        is_over_echo
    }

    /// Whether an echo has to be published now.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.due.is_some_and(|due| due <= now);
        if is_due {
            self.due = Some(now + ECHO_INTERVAL);
            self.unanswered.get_or_insert(now);
        }
        is_due
    }

    /// Whether other messages wait for the first echo.
    pub(super) fn must_wait(&self, now: Instant) -> bool {
        self.is_first && self.unanswered.is_some_and(|since| now < since + FIRST_ECHO_TIMEOUT)
    }

    /// An echo was received. True if an earlier one was lost, so that other messages may be lost, too.
    pub(super) fn received(&mut self, now: Instant) -> bool {
        let has_gap = self.unanswered.is_some_and(|since| now.saturating_duration_since(since) >= ECHO_INTERVAL);
        (self.unanswered, self.is_first, self.was_received) = (None, false, true);
        (self.losses, self.closed) = (0, 0);
        self.message(now);
        has_gap
    }

    /// A message was received that is not a retained one: the server has some subscription.
    pub(super) fn message(&mut self, now: Instant) {
        self.silent = Some(now);
    }

    /// Whether the echo has been missing for too long, so that the session has to reconnect. After [`ECHO_TRIES_MAX`]
    /// connections in a row only if no other message is received either.
    pub(super) fn is_lost(&mut self, now: Instant) -> bool {
        let is_lost = self.lost_at().is_some_and(|at| at <= now);
        self.losses += u32::from(is_lost && self.losses < ECHO_TRIES_MAX);
        is_lost
    }

    fn lost_at(&self) -> Option<Instant> {
        let unanswered = self.unanswered.map(|since| since + ECHO_TIMEOUT);
        if self.losses < ECHO_TRIES_MAX {
            return unanswered;
        }
        let silence = if self.was_received { ECHO_TIMEOUT } else { ECHO_SILENCE_TIMEOUT };
        unanswered.max(self.silent.map(|since| since + silence)).filter(|_| unanswered.is_some())
    }

    /// Whether echoes have been missing on so many connections that they are no longer expected.
    pub(super) fn is_given_up(&self) -> bool {
        self.losses >= ECHO_TRIES_MAX
    }

    /// Whether the server closes the connection when this program publishes to itself.
    pub(super) fn is_forbidden(&self, now: Instant) -> bool {
        self.forbidden.is_some_and(|until| now < until)
    }

    /// When the next action is due.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let first = self.unanswered.filter(|_| self.must_wait(now)).map(|since| since + FIRST_ECHO_TIMEOUT);
        self.due.into_iter().chain(self.lost_at()).chain(first).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Connects, publishes an echo, and receives nothing for so long; whether the session has to reconnect then.
    fn is_lost_after(echo: &mut SessionEcho, now: &mut Instant, wait: Duration, others: bool) -> bool {
        echo.up(*now);
        assert!(
            echo.is_due(*now)
                && !echo.is_due(*now)
                && echo.must_wait(*now)
                && !echo.must_wait(*now + FIRST_ECHO_TIMEOUT)
        );
        *now += wait;
        if others {
            echo.message(*now);
        }
        let is_lost = echo.is_lost(*now);
        assert!(!echo.down(false, *now));
        is_lost
    }

    #[test]
    fn a_session_to_which_nothing_comes_back_connects_anew_and_not_for_ever_where_others_come() {
        let (mut echo, mut now) = (SessionEcho::default(), Instant::now());
        for is_lost in [true, true, true, false, false] {
            assert_eq!(is_lost_after(&mut echo, &mut now, ECHO_TIMEOUT, true), is_lost);
        }
        assert!(echo.is_given_up());
        assert!(
            !is_lost_after(&mut echo, &mut now, ECHO_TIMEOUT, false),
            "it has never come: an access list may be why"
        );
        assert!(is_lost_after(&mut echo, &mut now, ECHO_SILENCE_TIMEOUT, false));
        echo.up(now);
        assert!(echo.is_due(now));
        assert!(!echo.received(now));
        assert!(!echo.is_given_up() && !echo.is_lost(now + ECHO_TIMEOUT) && !echo.must_wait(now));
        assert_eq!(echo.next(now), Some(now + ECHO_INTERVAL));
    }

    #[test]
    fn one_that_comes_after_a_lost_one_shows_a_gap() {
        let (mut echo, now) = (SessionEcho::default(), Instant::now());
        echo.up(now);
        assert!(echo.is_due(now) && !echo.received(now + ECHO_INTERVAL / 2));
        assert!(
            echo.is_due(now + ECHO_INTERVAL)
                && echo.is_due(now + 2 * ECHO_INTERVAL)
                && echo.received(now + 2 * ECHO_INTERVAL)
        );
        assert!(echo.is_due(now + 3 * ECHO_INTERVAL) && !echo.received(now + 3 * ECHO_INTERVAL));
    }

    /// Failed when the session gave up for ever, and never received a message again.
    #[test]
    fn where_it_came_before_it_is_looked_for_as_long_as_nothing_comes() {
        let (mut echo, mut now) = (SessionEcho::default(), Instant::now());
        echo.up(now);
        assert!(echo.is_due(now));
        echo.received(now);
        assert!(!echo.down(true, now), "not over the first one");
        for _ in 0..10 {
            assert!(is_lost_after(&mut echo, &mut now, ECHO_TIMEOUT, false));
        }
        assert!(
            !is_lost_after(&mut echo, &mut now, ECHO_TIMEOUT, true),
            "it is not allowed any more, and the rest comes"
        );
    }

    #[test]
    fn where_the_connection_ends_over_the_first_one_nothing_of_ours_is_published_for_a_while() {
        let (mut echo, now) = (SessionEcho::default(), Instant::now());
        for is_forbidden in [false, true] {
            echo.up(now);
            assert!(echo.is_due(now) && echo.down(true, now));
            assert_eq!(echo.is_forbidden(now), is_forbidden);
        }
        echo.up(now);
        assert!(!echo.is_due(now) && !echo.must_wait(now) && !echo.down(true, now));
        assert_eq!(echo.next(now), None);
        echo.up(now + FORBIDDEN_TIME);
        assert!(!echo.is_forbidden(now + FORBIDDEN_TIME) && echo.is_due(now + FORBIDDEN_TIME));
    }
}
