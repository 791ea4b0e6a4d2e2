//! Requests that wait for gateways to say what became of a key, and the word that reaches them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use wgkex_common::PublicKey;
use wgkex_common::message::Applied;

/// Verdicts that one request may leave unread: more than any fleet has gateways.
const UNREAD: usize = 256;

/// What a request waits for: a key in a domain.
type Subject = (String, PublicKey);

/// A gateway's word on a key: it stands in its kernel, or the reason why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The worker's name.
    pub worker: String,
    /// What became of the key there.
    pub outcome: Result<(), String>,
}

/// Everyone who waits. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Waiters {
    waiting: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    last: u64,
    by_subject: HashMap<Subject, BTreeMap<u64, mpsc::Sender<Verdict>>>,
}

/// One request that waits; it no longer does when this is dropped.
#[derive(Debug)]
pub struct Waiting {
    waiters: Waiters,
    subject: Subject,
    id: u64,
    verdicts: mpsc::Receiver<Verdict>,
}

impl Waiters {
    /// Waits for `key` in `domain` from now on: what was said before counts for others.
    #[must_use]
    pub fn wait_for(&self, domain: &str, key: PublicKey) -> Waiting {
        let (sender, verdicts) = mpsc::channel(UNREAD);
        let subject = (domain.to_owned(), key);
        let mut table = self.table();
        table.last += 1;
        let id = table.last;
        table.by_subject.entry(subject.clone()).or_default().insert(id, sender);
        drop(table);
        Waiting { waiters: self.clone(), subject, id, verdicts }
    }

    /// Passes on what `worker` said of a batch of keys. Nobody waits for most of them.
    pub fn resolve(&self, worker: &str, applied: Applied) {
        let Applied { domain, installed, failed } = applied;
        let installed = installed.into_iter().map(|key| (key, Ok(())));
        let failed = failed.into_iter().map(|(key, reason)| (key, Err(reason)));
        let table = self.table();
        for (key, outcome) in installed.chain(failed) {
            for sender in table.by_subject.get(&(domain.clone(), key)).into_iter().flat_map(BTreeMap::values) {
                // One that reads nothing any more is about to leave.
                let _ = sender.try_send(Verdict { worker: worker.to_owned(), outcome: outcome.clone() });
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// The next verdict on the key, from any gateway.
    pub async fn verdict(&mut self) -> Option<Verdict> {
        self.verdicts.recv().await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut table = self.waiters.table();
        if let Some(waiting) = table.by_subject.get_mut(&self.subject) {
            waiting.remove(&self.id);
            if waiting.is_empty() {
                table.by_subject.remove(&self.subject);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> PublicKey {
        text.parse().unwrap()
    }

    fn verdicts(waiting: &mut Waiting) -> Vec<(String, Result<(), String>)> {
        std::iter::from_fn(|| waiting.verdicts.try_recv().ok()).map(|said| (said.worker, said.outcome)).collect()
    }

    #[test]
    fn a_verdict_reaches_everyone_who_waits_for_that_key_in_that_domain_and_nobody_else() {
        let (ours, other) =
            (key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="), key("o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg="));
        let waiters = Waiters::default();
        let said = |domain: &str, key| Applied { domain: domain.into(), installed: vec![key], failed: BTreeMap::new() };
        waiters.resolve("early", said("a", ours));
        let mut first = waiters.wait_for("a", ours);
        let mut second = waiters.wait_for("a", ours);
        let mut elsewhere = waiters.wait_for("b", ours);
        let mut another = waiters.wait_for("a", other);
        waiters.resolve("gw1", said("a", ours));
        waiters.resolve("gw2", Applied { failed: [(ours, "full".into())].into(), ..said("a", other) });
        let expected = vec![("gw1".to_owned(), Ok(())), ("gw2".to_owned(), Err("full".to_owned()))];
        assert_eq!(verdicts(&mut first), expected);
        assert_eq!(verdicts(&mut second), expected);
        assert_eq!(verdicts(&mut elsewhere), []);
        assert_eq!(verdicts(&mut another), [("gw2".to_owned(), Ok(()))]);
    }

    #[test]
    fn who_leaves_leaves_nothing_behind_and_who_never_reads_is_bounded() {
        let key = key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=");
        let waiters = Waiters::default();
        let waiting = waiters.wait_for("a", key);
        for _ in 0..UNREAD + 10 {
            waiters.resolve("gw", Applied { domain: "a".into(), installed: vec![key], failed: BTreeMap::new() });
        }
        assert_eq!(waiting.verdicts.len(), UNREAD);
        let another = waiters.wait_for("a", key);
        drop(waiting);
        assert_eq!(waiters.table().by_subject.len(), 1);
        drop(another);
        assert!(waiters.table().by_subject.is_empty());
    }
}
