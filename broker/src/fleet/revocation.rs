//! Admin calls that wait for gateways to say what became of a denied key, and the word that reaches them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use wgkex_common::wire::message::Revoked;
use wgkex_common::{PublicKey, WorkerName};

use crate::fleet::gateways::Reach;

/// How long an admin call waits for all gateways together.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Gateways whose words one call hears: more than any fleet has.
const GATEWAYS: usize = 4096;
/// What a gateway says is shown no longer than this, in characters.
const SHOWN_MAX: usize = 80;

/// The key in question, and when its record was made.
type Subject = (PublicKey, u64);
/// A gateway, and what it says.
type Word = (WorkerName, String);

/// Everyone who waits. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    waiting: Arc<Mutex<HashMap<Subject, Call>>>,
}

/// Where the words for one call go, and whose have come: the first of each counts.
#[derive(Debug)]
struct Call {
    words: mpsc::Sender<Word>,
    heard: BTreeSet<WorkerName>,
}

/// One admin call that waits; it no longer does when this is dropped.
#[derive(Debug)]
pub struct Waiting {
    answers: Answers,
    subject: Subject,
    words: mpsc::Receiver<Word>,
}

/// What became of a key at a gateway, in an operator's words.
pub const REMOVED: &str = "removed";
/// There was nothing of it.
pub const ABSENT: &str = "was not there";
/// The gateway applies it when it is back, before it takes keys.
pub const OFFLINE: &str = "offline";
/// It is an original, or an old version of ours.
pub const CANNOT: &str = "cannot";
/// It did not say anything in time.
pub const SILENT: &str = "no answer";

/// Whether the key is known not to be at a gateway that says this.
#[must_use]
pub fn is_done(result: &str) -> bool {
    result == REMOVED || result == ABSENT
}

impl Answers {
    /// Waits for what gateways say of the record that was made of `key` at `at`.
    #[must_use]
    pub fn wait_for(&self, key: PublicKey, at: u64) -> Waiting {
        let (sender, words) = mpsc::channel(GATEWAYS);
        let subject = (key, at);
        self.table().insert(subject, Call { words: sender, heard: BTreeSet::new() });
        Waiting { answers: self.clone(), subject, words }
    }

    /// Passes on what `worker` said. Nobody waits for what it applies on its return.
    pub fn resolve(&self, worker: &WorkerName, revoked: Revoked) {
        let mut table = self.table();
        for (key, outcome) in revoked.keys {
            if let Some(call) = table.get_mut(&(key, revoked.at))
                && call.heard.len() < GATEWAYS
                && call.heard.insert(worker.clone())
            {
                let _ = call.words.try_send((worker.clone(), outcome));
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Subject, Call>> {
        self.waiting.lock()
    }
}

impl Waiting {
    /// What became of the key at each gateway, given which of them were `reach`able: as soon as all of these have said
    /// it, and no later than `until`.
    pub async fn results(mut self, reach: BTreeMap<WorkerName, Reach>, until: Instant) -> BTreeMap<WorkerName, String> {
        let online = reach.iter().filter(|(_, reach)| **reach == Reach::Online);
        let mut missing: BTreeSet<WorkerName> = online.map(|(name, _)| name.clone()).collect();
        let mut results: BTreeMap<WorkerName, String> =
            reach.into_iter().map(|(name, reach)| (name, before_any_word(reach).to_owned())).collect();
        while !missing.is_empty() {
            let Ok(Some((worker, outcome))) = timeout_at(until, self.words.recv()).await else { break };
            if missing.remove(&worker) {
                results.insert(worker, shown(&outcome));
            }
        }
        results
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.answers.table().remove(&self.subject);
    }
}

fn before_any_word(reach: Reach) -> &'static str {
    match reach {
        Reach::Online => SILENT,
        Reach::Offline => OFFLINE,
        Reach::Cannot => CANNOT,
    }
}

fn shown(outcome: &str) -> String {
    match outcome {
        Revoked::REMOVED => REMOVED.into(),
        Revoked::ABSENT => ABSENT.into(),
        reason => {
            let reason: String = reason.chars().filter(|c| !c.is_control()).take(SHOWN_MAX).collect();
            format!("failed: {reason}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32]).unwrap()
    }

    fn said(at: u64, n: u8, outcome: &str) -> Revoked {
        Revoked { at, keys: [(key(n), outcome.to_owned())].into() }
    }

    fn reach() -> BTreeMap<WorkerName, Reach> {
        let reach = [("gw1", Reach::Online), ("gw2", Reach::Online), ("gw3", Reach::Offline), ("gw4", Reach::Cannot)];
        reach.map(|(worker, reach)| (name(worker), reach)).into()
    }

    #[tokio::test(start_paused = true)]
    async fn each_gateways_own_word_on_this_record_counts_once() {
        let answers = Answers::default();
        let waiting = answers.wait_for(key(3), 7);
        for (worker, revoked) in [
            ("gw1", said(6, 3, "removed")),
            ("gw1", said(7, 4, "removed")),
            ("stranger", said(7, 3, "removed")),
            ("gw3", said(7, 3, "removed")),
            ("gw1", said(7, 3, "absent")),
            ("gw1", said(7, 3, "removed")),
            ("gw2", said(7, 3, "x\ny")),
        ] {
            answers.resolve(&name(worker), revoked);
        }
        let begun = Instant::now();
        let results = waiting.results(reach(), begun + PATIENCE).await;
        let wanted = [("gw1", ABSENT), ("gw2", "failed: xy"), ("gw3", OFFLINE), ("gw4", CANNOT)];
        assert_eq!(results, wanted.map(|(worker, result)| (name(worker), result.to_owned())).into());
        assert_eq!(begun.elapsed(), Duration::ZERO, "nobody is waited for in vain");
        assert!(answers.table().is_empty());
    }

    /// Fails where every word is queued: there was no place for the other gateway's.
    #[tokio::test(start_paused = true)]
    async fn a_worker_that_says_much_keeps_no_other_from_being_heard() {
        let answers = Answers::default();
        let waiting = answers.wait_for(key(3), 7);
        for _ in 0..2 * GATEWAYS {
            answers.resolve(&name("gw1"), said(7, 3, "failed"));
        }
        answers.resolve(&name("gw2"), said(7, 3, "removed"));
        let results = waiting.results(reach(), Instant::now() + PATIENCE).await;
        assert_eq!((results["gw1"].as_str(), results["gw2"].as_str()), ("failed: failed", REMOVED));
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_waited_for_no_longer_than_the_patience() {
        let answers = Answers::default();
        let waiting = answers.wait_for(key(3), 7);
        answers.resolve(&name("gw2"), said(7, 3, "removed"));
        let begun = Instant::now();
        let results = waiting.results(reach(), begun + PATIENCE).await;
        assert_eq!((results["gw1"].as_str(), results["gw2"].as_str()), (SILENT, REMOVED));
        assert_eq!(begun.elapsed(), PATIENCE);
        assert!(
            is_done(REMOVED) && is_done(ABSENT) && ![SILENT, OFFLINE, CANNOT, "failed: x"].map(is_done).contains(&true)
        );
    }
}
