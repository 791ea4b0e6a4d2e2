//! Which client ids are in use by two programs: each connection of one ends the other's. No IO.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The number of takeovers within [`TAKEOVERS_PERIOD`] that is no longer explained by a client that replaces its lost
/// connections.
const TAKEOVERS_SUSPICIOUS: u32 = 4;
const TAKEOVERS_PERIOD: Duration = Duration::from_secs(300);
/// After how long the same client is named again.
const NAMED_AGAIN_AFTER: Duration = Duration::from_secs(3_600);

/// After how long without a takeover a client id is not in use by two programs any more: they try again every 30 s.
const IN_USE_TIMEOUT: Duration = Duration::from_secs(120);
/// The most client ids that are named at once.
const NAMED_MAX: usize = 10;

/// The shortest time between two lines: one user may have many client ids.
const LINE_PAUSE: Duration = Duration::from_secs(10);

/// The clients that took over their own connection lately.
#[derive(Debug, Default)]
pub struct Takeovers {
    clients: BTreeMap<String, Takeover>,
    last_line: Option<Instant>,
}

#[derive(Debug)]
struct Takeover {
    since: Instant,
    last: Instant,
    count: u32,
    /// It happened so often that two programs use the client id.
    is_in_use: bool,
    warned: Option<Instant>,
}

impl Takeovers {
    /// `client` has connected while it was connected. True if that is to be logged: it happens again and again.
    pub fn on_takeover(&mut self, client: &str, now: Instant) -> bool {
        let is_recent = |then: Instant, limit| now.saturating_duration_since(then) < limit;
        self.clients.retain(|_, takeover| {
            is_recent(takeover.since, TAKEOVERS_PERIOD)
                || takeover.warned.is_some_and(|warned| is_recent(warned, NAMED_AGAIN_AFTER))
        });
        let takeover = self.clients.entry(client.to_owned()).or_insert_with(|| Takeover::new(now));
        if !is_recent(takeover.since, TAKEOVERS_PERIOD) {
            (takeover.since, takeover.count) = (now, 0);
        }
        let is_over = !is_recent(takeover.last, IN_USE_TIMEOUT);
        (takeover.count, takeover.last) = (takeover.count + 1, now);
        takeover.is_in_use = takeover.count >= TAKEOVERS_SUSPICIOUS || (takeover.is_in_use && !is_over);
        let is_due = takeover.count >= TAKEOVERS_SUSPICIOUS
            && !takeover.warned.is_some_and(|warned| is_recent(warned, NAMED_AGAIN_AFTER))
            && !self.last_line.is_some_and(|line| is_recent(line, LINE_PAUSE));
        if is_due {
            (takeover.warned, self.last_line) = (Some(now), Some(now));
        }
        is_due
    }

    /// The client ids that two programs use now, without their users.
    pub fn in_use(&self, now: Instant) -> Vec<String> {
        let is_now =
            |takeover: &Takeover| takeover.is_in_use && now.saturating_duration_since(takeover.last) < IN_USE_TIMEOUT;
        let clients = self.clients.iter().filter(|(_, takeover)| is_now(takeover)).take(NAMED_MAX);
        clients.map(|(client, _)| client_id(client).to_owned()).collect()
    }
}

impl Takeover {
    fn new(now: Instant) -> Self {
        Self { since: now, last: now, count: 0, is_in_use: false, warned: None }
    }
}

/// The id of a client, which is known by its user and its id.
pub fn client_id(client: &str) -> &str {
    client.rsplit_once('\n').map_or(client, |(_, id)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_client_ids_leave_few_lines() {
        let (mut takeovers, begun) = (Takeovers::default(), Instant::now());
        let take = |n: u64| takeovers.on_takeover(&(n % 100).to_string(), begun + Duration::from_millis(n * 10));
        assert_eq!((0..6_000).map(take).filter(|is_line| *is_line).count(), 6);
    }

    #[test]
    fn a_client_id_is_in_use_by_two_programs_until_they_stop_to_take_it_over() {
        let (mut takeovers, begun) = (Takeovers::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        for (n, named) in [(0, false), (1, false), (2, false), (3, true)] {
            takeovers.on_takeover("gw1\ngw1-applied", at(n));
            assert_eq!(!takeovers.in_use(at(n)).is_empty(), named, "{n}");
        }
        // They try again more and more seldom.
        for n in (30..900).step_by(30) {
            takeovers.on_takeover("gw1\ngw1-applied", at(n));
            assert_eq!(takeovers.in_use(at(n + 29)), ["gw1-applied"], "{n}");
        }
        assert!(takeovers.in_use(at(870 + 120)).is_empty());
        takeovers.on_takeover("gw1\ngw1-applied", at(2_000));
        assert!(takeovers.in_use(at(2_000)).is_empty(), "it begins anew");
    }

    #[test]
    fn a_client_id_in_use_by_two_programs_is_named_once_an_hour_and_a_lost_connection_is_not() {
        let (mut takeovers, begun) = (Takeovers::default(), Instant::now());
        let mut named = 0;
        for second in 0..7_200 {
            let now = begun + Duration::from_secs(second);
            if second % 20 == 0 {
                named += u32::from(takeovers.on_takeover("two", now));
            }
            if second % 120 == 0 {
                assert!(!takeovers.on_takeover("unstable line", now), "{second}");
            }
        }
        assert_eq!(named, 2);
        assert!(!takeovers.on_takeover("another", begun + Duration::from_secs(100_000)));
        assert_eq!(takeovers.clients.len(), 1, "the others are forgotten");
    }
}
