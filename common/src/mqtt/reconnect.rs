//! When a session reconnects after a loss, and the likely cause of repeated losses. No IO.

use std::time::Duration;

use rumqttc::{ConnectionError, StateError};
use tokio::time::Instant;

/// The pause before the second attempt to connect; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// The longest pause between two attempts to connect.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The longest pause if the server closes each connection soon after it is established.
const PAUSE_CLOSED_SOON: Duration = Duration::from_secs(30);
/// After so many connections in a row that the server closed before it had granted every subscription, a name in a
/// filter may be the cause.
const CLOSED_EARLY: u32 = 3;
/// After so many connections in a row that the server closed soon the likely cause is logged.
const CLOSED_SOON_LIMIT: u32 = 5;
/// A program whose connection is closed for another of the same name reconnects within [`PAUSE_CLOSED_SOON`]: a
/// connection that stayed up twice as long has no such rival.
const RIVAL_EXCLUDED_AFTER: Duration = Duration::from_secs(60);
/// A connection that stayed up this long was good: the next attempt follows soon.
const STABLE_AFTER: Duration = Duration::from_secs(5);

/// The history of the last connections.
#[derive(Debug)]
pub(super) struct Reconnect {
    /// The pause before the next attempt.
    pause: Duration,
    /// When the current connection, or the one just lost, was established.
    since: Option<Instant>,
    /// Connections in a row that the server closed soon after they were established.
    closed_soon: u32,
    /// Connections in a row that the server closed within the time in which another program of the same name
    /// reconnects.
    closed_by_rival: u32,
    /// Connections in a row that the server closed before it had granted every subscription.
    closed_early: u32,
    /// Another program may use this client id.
    is_name_suspect: bool,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self {
            pause: PAUSE_MIN,
            since: None,
            closed_soon: 0,
            closed_by_rival: 0,
            closed_early: 0,
            is_name_suspect: false,
        }
    }
}

impl Reconnect {
    pub(super) fn connected(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// A connection is lost, or an attempt to connect failed; `was_up` if every subscription was granted. True if the
    /// server now has closed so many connections soon that it is logged.
    pub(super) fn lost(&mut self, error: &ConnectionError, was_up: bool) -> bool {
        // MQTT 3.1.1 has no error for an invalid name: the server closes the connection.
        self.closed_early = if is_closed(error) && !was_up { self.closed_early.saturating_add(1) } else { 0 };
        self.closed_soon = self.closed_within(STABLE_AFTER, self.closed_soon, error);
        self.closed_by_rival = self.closed_within(PAUSE_CLOSED_SOON, self.closed_by_rival, error);
        self.is_name_suspect |= self.closed_by_rival >= CLOSED_SOON_LIMIT;
        self.closed_soon == CLOSED_SOON_LIMIT
    }

    /// Whether another program may use this client id.
    pub(super) fn is_name_suspect(&self) -> bool {
        self.is_name_suspect
    }

    /// The other session of this program, which joined this one's connection, has detected another program with its
    /// name.
    pub(super) fn suspect_name(&mut self) {
        self.is_name_suspect = true;
    }

    /// When the current connection will have shown that no other program uses this client id; none if there is no
    /// suspicion.
    pub(super) fn rival_excluded_at(&self) -> Option<Instant> {
        self.since.filter(|_| self.is_name_suspect).map(|since| since + RIVAL_EXCLUDED_AFTER)
    }

    /// The connection is still up at this time.
    pub(super) fn on_still_up(&mut self, now: Instant) {
        if self.rival_excluded_at().is_some_and(|at| at <= now) {
            (self.is_name_suspect, self.closed_soon, self.closed_by_rival) = (false, 0, 0);
        }
    }

    /// How many connections in a row the server has closed within this time, after `before` of them. MQTT 3.1.1 has no
    /// error for another client with the same id.
    fn closed_within(&self, time: Duration, before: u32, error: &ConnectionError) -> u32 {
        let is_closed = matches!(error, ConnectionError::Io(_) | ConnectionError::MqttState(_));
        match self.since {
            Some(since) if since.elapsed() >= time => 0,
            Some(_) if is_closed => before.saturating_add(1),
            // The server does not listen: it was restarted.
            None if matches!(error, ConnectionError::Io(_)) => 0,
            // No connection was established, or this program closed it.
            _ => before,
        }
    }

    /// Whether the server may reject a name in this client's filters.
    pub(super) fn is_closed_early(&self) -> bool {
        self.closed_early >= CLOSED_EARLY
    }

    /// The same, and true only after the connection that showed it.
    pub(super) fn is_closed_early_first(&self) -> bool {
        self.closed_early == CLOSED_EARLY
    }

    /// The pause before the next attempt to connect: short after a good connection, then longer, and random so that the
    /// clients of a restarted server do not reconnect at once.
    pub(super) fn pause(&mut self) -> Duration {
        if self.since.take().is_some_and(|since| since.elapsed() > STABLE_AFTER) {
            self.pause = PAUSE_MIN;
        }
        let pause = self.pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        let longest = if self.closed_soon > CLOSED_SOON_LIMIT { PAUSE_CLOSED_SOON } else { PAUSE_MAX };
        self.pause = (self.pause * 2).min(longest);
        pause
    }
}

/// Whether the server closed an established connection.
pub(super) fn is_closed(error: &ConnectionError) -> bool {
    matches!(
        error,
        ConnectionError::MqttState(StateError::ConnectionAborted | StateError::Io(_) | StateError::Deserialization(_))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_id_is_suspect_until_a_connection_stands_undisputed() {
        let mut reconnect = Reconnect::default();
        let closed = ConnectionError::MqttState(StateError::ConnectionAborted);
        for n in 0..CLOSED_SOON_LIMIT {
            assert!(!reconnect.is_name_suspect(), "{n}");
            reconnect.connected(Instant::now());
            reconnect.lost(&closed, true);
        }
        assert!(reconnect.is_name_suspect());
        let stands = |reconnect: &mut Reconnect, after| reconnect.on_still_up(Instant::now() + after);
        let _ = reconnect.pause();
        stands(&mut reconnect, RIVAL_EXCLUDED_AFTER);
        assert!(reconnect.is_name_suspect(), "there is no connection");
        reconnect.connected(Instant::now());
        stands(&mut reconnect, PAUSE_CLOSED_SOON);
        assert!(reconnect.is_name_suspect());
        assert_eq!(reconnect.rival_excluded_at(), Some(Instant::now() + RIVAL_EXCLUDED_AFTER));
        stands(&mut reconnect, RIVAL_EXCLUDED_AFTER);
        assert!(!reconnect.is_name_suspect() && reconnect.rival_excluded_at().is_none());
    }

    /// Failed when a program whose rival waits longer and longer was never closed soon, and did not report it.
    #[tokio::test(start_paused = true)]
    async fn a_client_id_is_suspect_although_each_connection_stands_for_a_while() {
        let mut reconnect = Reconnect::default();
        let closed = ConnectionError::MqttState(StateError::ConnectionAborted);
        for (stood, is_suspect) in
            [(20, false), (20, false), (31, false), (1, false), (10, false), (29, false), (6, false), (12, true)]
        {
            reconnect.connected(Instant::now());
            tokio::time::advance(Duration::from_secs(stood)).await;
            assert!(!reconnect.lost(&closed, true), "it is not thrown out as soon as it stands");
            assert_eq!(reconnect.is_name_suspect(), is_suspect, "{stood}");
            let _ = reconnect.pause();
        }
    }

    /// A session whose program's other one joins closes its connection; that must not reset the losses counted before.
    #[test]
    fn a_connection_that_the_program_itself_ends_does_not_count_against_its_client_id() {
        let mut reconnect = Reconnect::default();
        let lose = |reconnect: &mut Reconnect, error| {
            reconnect.connected(Instant::now());
            let is_thrown_out = reconnect.lost(&error, true);
            let _ = reconnect.pause();
            is_thrown_out
        };
        for _ in 1..CLOSED_SOON_LIMIT {
            assert!(!lose(&mut reconnect, ConnectionError::MqttState(StateError::ConnectionAborted)));
        }
        for _ in 0..3 {
            assert!(!lose(&mut reconnect, ConnectionError::NetworkTimeout) && !reconnect.is_name_suspect());
        }
        assert!(lose(&mut reconnect, ConnectionError::MqttState(StateError::ConnectionAborted)));
        assert!(reconnect.is_name_suspect());
    }

    /// Failed when quick restarts of the server were taken for another program of the same name, and cost up to 30 s
    /// each.
    #[test]
    fn a_server_that_does_not_listen_between_two_losses_was_restarted() {
        let mut reconnect = Reconnect::default();
        let closed = ConnectionError::MqttState(StateError::ConnectionAborted);
        let refused = ConnectionError::Io(std::io::ErrorKind::ConnectionRefused.into());
        let mut longest = |is_restarted: bool| {
            let pauses = (0..2 * CLOSED_SOON_LIMIT).map(|_| {
                reconnect.connected(Instant::now());
                reconnect.lost(&closed, true);
                let pause = reconnect.pause();
                if is_restarted {
                    reconnect.lost(&refused, false);
                }
                pause
            });
            pauses.max().unwrap()
        };
        assert!(longest(true) <= PAUSE_MAX);
        assert!(longest(false) > PAUSE_MAX);
    }
}
