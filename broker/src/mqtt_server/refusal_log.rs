//! Which refused connections are logged: each client and reason once an hour, so many lines a minute at most. No IO.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::mqtt_server::handshake::{ConnectRefusal, RefusedConnection};

/// After how long the same refusal is logged again.
const LOGGED_AGAIN_AFTER: Duration = Duration::from_secs(3_600);
/// The most lines in each period, for users of the config and for strangers each.
const LINES_MAX: u32 = 10;
const LINES_PERIOD: Duration = Duration::from_secs(60);
/// The most refusals that are remembered, for users of the config and for strangers each.
const REMEMBERED_MAX: usize = 512;

/// The refusals that were logged.
#[derive(Debug, Default)]
pub struct RefusalLog {
    users: Lines,
    /// Apart, so that their lines replace none of users.
    strangers: Lines,
}

#[derive(Debug, Default)]
struct Lines {
    logged: BTreeMap<LoggedClient, Instant>,
    since: Option<Instant>,
    count: u32,
    unlogged: u64,
}

/// A client that is refused, and why.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LoggedClient {
    refusal: ConnectRefusal,
    user: Option<String>,
    id: Option<String>,
    cause: String,
}

impl RefusalLog {
    /// Whether to log a refusal now: with the number of those that were not logged since the last line.
    pub fn line(&mut self, refused: &RefusedConnection, now: Instant) -> Option<u64> {
        if refused.is_user { &mut self.users } else { &mut self.strangers }.line(refused, now)
    }
}

impl Lines {
    fn line(&mut self, refused: &RefusedConnection, now: Instant) -> Option<u64> {
        let RefusedConnection { refusal, user, client_id, cause, .. } = refused;
        let client = LoggedClient {
            refusal: *refusal,
            user: user.clone(),
            id: client_id.clone(),
            cause: cause.clone().into_owned(),
        };
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= LINES_PERIOD) {
            self.logged.retain(|_, logged| now.saturating_duration_since(*logged) < LOGGED_AGAIN_AFTER);
            (self.since, self.count) = (Some(now), 0);
        }
        let is_recent = |logged: &Instant| now.saturating_duration_since(*logged) < LOGGED_AGAIN_AFTER;
        if self.logged.get(&client).is_some_and(is_recent) {
            return None;
        }
        if self.count >= LINES_MAX || self.logged.len() >= REMEMBERED_MAX {
            self.unlogged += 1;
            return None;
        }
        self.count += 1;
        self.logged.insert(client, now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(user: &str, is_user: bool) -> RefusedConnection {
        RefusedConnection { is_user, user: Some(user.into()), ..RefusedConnection::from(ConnectRefusal::Password) }
    }

    #[test]
    fn the_same_refusal_is_logged_once_an_hour() {
        let (mut log, begun) = (RefusalLog::default(), Instant::now());
        assert_eq!(log.line(&refused("gw1", true), begun), Some(0));
        for minutes in 1..60 {
            assert_eq!(log.line(&refused("gw1", true), begun + Duration::from_secs(minutes * 60)), None, "{minutes}");
        }
        assert_eq!(log.line(&refused("gw1", true), begun + LOGGED_AGAIN_AFTER), Some(0));
        let another = RefusedConnection { refusal: ConnectRefusal::ClientId, ..refused("gw1", true) };
        assert_eq!(log.line(&another, begun + LOGGED_AGAIN_AFTER), Some(0));
    }

    #[test]
    fn strangers_in_any_number_leave_few_lines_and_hide_no_user() {
        let (mut log, begun) = (RefusalLog::default(), Instant::now());
        let mut lines = 0;
        for n in 0..60_000_u32 {
            let now = begun + Duration::from_millis(n.into());
            lines += u32::from(log.line(&refused(&n.to_string(), false), now).is_some());
        }
        assert_eq!(lines, LINES_MAX);
        assert_eq!(log.line(&refused("gw1", true), begun + LINES_PERIOD), Some(0));
        assert_eq!(log.line(&refused("next", false), begun + LINES_PERIOD), Some(60_000 - u64::from(LINES_MAX)));
        for n in 0..100_000_u32 {
            let now = begun + Duration::from_millis(u64::from(n) * 30);
            log.line(&refused(&n.to_string(), false), now);
        }
        assert!(log.strangers.logged.len() <= REMEMBERED_MAX, "{}", log.strangers.logged.len());
    }
}
