//! Logs problems of the fleet: one warning when a problem has lasted for a moment, one line when it is over. No clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use wgkex_common::runtime::line_budget::LineBudget;

use crate::fleet::status::{Problem, ProblemKind};

/// How long a problem lasts before it is logged: after a start the states of gateways arrive within seconds, and a
/// restart of a gateway is no problem.
const LOG_DELAY: Duration = Duration::from_secs(10);

/// The current problems, and which of them are logged.
#[derive(Debug)]
pub struct ProblemLog {
    known: BTreeMap<ProblemId, KnownProblem>,
    /// Limits the lines about clashes, which the holder of a stolen password can change at will.
    clashes: LineBudget,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ProblemId {
    kind: ProblemKind,
    subject: String,
}

#[derive(Debug)]
struct KnownProblem {
    since: Instant,
    text: String,
    is_logged: bool,
}

/// A line in the log.
#[derive(Debug, PartialEq, Eq)]
struct ProblemLine {
    text: String,
    is_over: bool,
}

impl ProblemLog {
    /// No problem yet.
    pub fn new(now: Instant) -> Self {
        Self { known: BTreeMap::new(), clashes: LineBudget::new(now) }
    }

    /// Replaces the current problems, and logs the changes. While `is_synced` is false, without the retained states,
    /// problems of the fleet are unknown.
    pub fn update(&mut self, problems: impl IntoIterator<Item = Problem>, is_synced: bool, now: Instant) {
        for ProblemLine { text, is_over } in self.lines(problems, is_synced, now) {
            if is_over {
                info!("over: {text}");
            } else {
                warn!("{text}");
            }
        }
    }

    fn lines(
        &mut self,
        problems: impl IntoIterator<Item = Problem>,
        is_synced: bool,
        now: Instant,
    ) -> Vec<ProblemLine> {
        let mut before = std::mem::take(&mut self.known);
        for Problem { kind, subject, text } in problems.into_iter().filter(|problem| is_logged_here(problem.kind)) {
            let id = ProblemId { kind, subject };
            let before = before.remove(&id);
            let known = before.unwrap_or(KnownProblem { since: now, text: String::new(), is_logged: false });
            self.known.insert(id, KnownProblem { text, ..known });
        }
        let mut lines = Vec::new();
        for (id, known) in before {
            if id.kind.needs_states() && !is_synced {
                // The problem may persist; the time of one that is not logged starts again.
                let since = if known.is_logged { known.since } else { now };
                self.known.insert(id, KnownProblem { since, ..known });
            } else if known.is_logged {
                lines.push(ProblemLine { text: known.text, is_over: true });
            }
        }
        self.clashes.renew(now);
        for (id, known) in &mut self.known {
            let is_due = !known.is_logged && now.saturating_duration_since(known.since) >= LOG_DELAY;
            if !is_due || (id.kind.needs_states() && !is_synced) || (id.kind.is_clash() && self.clashes.is_spent()) {
                continue;
            }
            if id.kind.is_clash() {
                self.clashes.spend();
            }
            known.is_logged = true;
            lines.push(ProblemLine { text: known.text.clone(), is_over: false });
        }
        lines
    }
}

/// Other modules log the other kinds.
fn is_logged_here(kind: ProblemKind) -> bool {
    let is_logged = matches!(
        kind,
        ProblemKind::DomainWithoutGateway
            | ProblemKind::RoutersUnreached
            | ProblemKind::NameInUse
            | ProblemKind::ClockOff
    );
    is_logged || kind.is_clash()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(kind: ProblemKind, subject: &str) -> Problem {
        Problem { kind, subject: subject.into(), text: format!("{subject} is wrong") }
    }

    fn unserved(domain: &str) -> Problem {
        problem(ProblemKind::DomainWithoutGateway, domain)
    }

    #[test]
    fn a_problem_that_lasts_is_logged_once_and_so_is_its_end() {
        let begun = Instant::now();
        let mut log = ProblemLog::new(begun);
        let mut at = |problems: &[Problem], seconds| {
            let lines = log.lines(problems.to_vec(), true, begun + Duration::from_secs(seconds));
            lines.into_iter().map(|line| (line.text, line.is_over)).collect::<Vec<_>>()
        };
        let is = |text: &str, is_over| vec![(format!("{text} is wrong"), is_over)];
        let both = [unserved("a"), unserved("b")];
        assert_eq!(at(&both, 0), []);
        assert_eq!(at(&both[..1], 9), [], "what is over before it was logged is not");
        assert_eq!(at(&both[..1], 10), is("a", false));
        for seconds in 11..500 {
            assert_eq!(at(&both[..1], seconds), []);
        }
        assert_eq!(at(&[], 500), is("a", true));
        assert_eq!(at(&both[..1], 501), []);
        assert_eq!(at(&both[..1], 511), is("a", false), "each change is a line");
    }

    #[test]
    fn while_the_states_are_not_known_nothing_begins_and_nothing_ends() {
        let begun = Instant::now();
        let mut log = ProblemLog::new(begun);
        let mut at = |problems: Vec<Problem>, is_synced, seconds| {
            log.lines(problems, is_synced, begun + Duration::from_secs(seconds)).len()
        };
        assert_eq!(at(vec![unserved("a")], true, 0), 0);
        assert_eq!(at(vec![], false, 100), 0);
        assert_eq!(at(vec![unserved("a")], true, 105), 0, "the grace begins anew");
        assert_eq!(at(vec![unserved("a")], true, 110), 1);
        assert_eq!(at(vec![], false, 200), 0);
        assert_eq!(at(vec![unserved("a")], true, 300), 0, "it is logged");
        assert_eq!(at(vec![], true, 301), 1);
    }

    #[test]
    fn clashes_that_change_all_the_time_have_few_lines() {
        let begun = Instant::now();
        let mut log = ProblemLog::new(begun);
        let mut lines = 0;
        for second in 0..300_u32 {
            let clashes = (0..20).map(|n| problem(ProblemKind::SameKey, &format!("{n} {}", second / 15)));
            let new = log.lines(clashes, true, begun + Duration::from_secs(second.into()));
            lines += new.iter().filter(|line| !line.is_over).count();
        }
        assert!((10..=60).contains(&lines), "{lines}");
        assert!(log.known.len() <= 20);
    }
}
