//! Which client ids are in use by two programs: each connection of one ends the other's. No IO.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// So many takeovers within [`PERIOD`] are no lost connection any more that its client replaces.
const SUSPICIOUS: u32 = 4;
const PERIOD: Duration = Duration::from_secs(300);
/// After how long the same client is named again.
const REPEAT: Duration = Duration::from_secs(3_600);

/// The shortest time between two lines: one user may have many client ids.
const PAUSE: Duration = Duration::from_secs(10);

/// The clients that took over their own connection lately.
#[derive(Debug, Default)]
pub struct Takeovers {
    clients: BTreeMap<String, Takeover>,
    last_line: Option<Instant>,
}

#[derive(Debug)]
struct Takeover {
    since: Instant,
    count: u32,
    warned: Option<Instant>,
}

impl Takeovers {
    /// `client` has connected while it was connected. True if that is to be logged: it happens again and again.
    pub fn on_takeover(&mut self, client: &str, now: Instant) -> bool {
        let is_recent = |then: Instant, limit| now.saturating_duration_since(then) < limit;
        self.clients.retain(|_, takeover| {
            is_recent(takeover.since, PERIOD) || takeover.warned.is_some_and(|warned| is_recent(warned, REPEAT))
        });
        let takeover = self.clients.entry(client.to_owned()).or_insert(Takeover { since: now, count: 0, warned: None });
        if !is_recent(takeover.since, PERIOD) {
            (takeover.since, takeover.count) = (now, 0);
        }
        takeover.count += 1;
        let is_due = takeover.count >= SUSPICIOUS
            && !takeover.warned.is_some_and(|warned| is_recent(warned, REPEAT))
            && !self.last_line.is_some_and(|line| is_recent(line, PAUSE));
        if is_due {
            (takeover.warned, self.last_line) = (Some(now), Some(now));
        }
        is_due
    }
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
