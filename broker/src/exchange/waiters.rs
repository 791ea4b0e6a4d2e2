//! Requests that wait for gateways to say what became of a key, and the word that reaches them. What comes too late for
//! a request is kept for the router's next one: where much is under way at once, every word is late.
//!
//! Of each gateway only the last word is kept, so that none can crowd out the words of others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use wgkex_common::wire::message::Applied;
use wgkex_common::{PublicKey, RejectReason};

/// How long a router has to come again: it does so every minute.
const AGAIN: Duration = Duration::from_secs(120);
/// Keys of which words are kept at most.
const KEPT: usize = 32_768;

/// What a request waits for: a key in a domain.
type Subject = (String, PublicKey);

/// A gateway's word on a key: it stands in its kernel, or the reason why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The worker's name.
    pub worker: String,
    /// What became of the key there.
    pub outcome: Result<(), RejectReason>,
}

/// Everyone who waits. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Waiters {
    waiting: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    /// Counts requests, and what is kept for late ones, in the order in which they come.
    last: u64,
    by_subject: HashMap<Subject, BTreeMap<u64, Arc<Mailbox>>>,
    /// What nobody was left to hear.
    late: HashMap<Subject, Late>,
    /// When what a worker had said so far became void, in a domain or in all.
    void: HashMap<(String, Option<String>), u64>,
}

/// What one request was told and has not read.
#[derive(Debug, Default)]
struct Mailbox {
    unread: Mutex<BTreeMap<String, Result<(), RejectReason>>>,
    told: Notify,
}

/// What gateways said of a key after its router was told to come again.
#[derive(Debug)]
struct Late {
    since: Instant,
    /// Those that have it, and when they said so.
    took: BTreeMap<String, u64>,
}

impl Late {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= AGAIN
    }
}

/// One request that waits; it no longer does when this is dropped.
#[derive(Debug)]
pub struct Waiting {
    waiters: Waiters,
    subject: Subject,
    id: u64,
    mailbox: Arc<Mailbox>,
}

impl Waiters {
    /// Waits for `key` in `domain` from now on: what was said before counts for others.
    #[must_use]
    pub fn wait_for(&self, domain: &str, key: PublicKey) -> Waiting {
        let mailbox = Arc::<Mailbox>::default();
        let subject = (domain.to_owned(), key);
        let mut table = self.waiting.lock();
        table.last += 1;
        let id = table.last;
        table.by_subject.entry(subject.clone()).or_default().insert(id, mailbox.clone());
        drop(table);
        Waiting { waiters: self.clone(), subject, id, mailbox }
    }

    /// Passes on what `worker` said of a batch of keys. Nobody waits for most of them.
    pub fn resolve(&self, worker: &str, applied: Applied) {
        let Applied { domain, installed, failed } = applied;
        let installed = installed.into_iter().map(|key| (key, Ok(())));
        let failed = failed.into_iter().map(|(key, reason)| (key, Err(reason)));
        let outcomes: BTreeMap<_, _> = installed.chain(failed).collect();
        let mut table = self.waiting.lock();
        table.last += 1;
        let now = table.last;
        for (key, outcome) in outcomes {
            let subject = (domain.clone(), key);
            table.tell(&subject, worker, &outcome);
            if let Some(late) = table.late.get_mut(&subject) {
                match outcome {
                    Ok(()) => late.took.insert(worker.to_owned(), now),
                    Err(_) => late.took.remove(worker),
                };
            }
        }
    }

    /// The gateways that said that they have `key` since its router was told to come again; once.
    #[must_use]
    pub fn take(&self, domain: &str, key: PublicKey, now: Instant) -> BTreeSet<String> {
        let mut table = self.waiting.lock();
        let late = table.late.remove(&(domain.to_owned(), key)).filter(|late| !late.is_over(now));
        let took = late.map(|late| late.took).unwrap_or_default().into_iter();
        took.filter(|(worker, said)| table.holds(worker, domain, *said)).map(|(worker, _)| worker).collect()
    }

    /// What `worker` said may not be so any more, in this domain or in all.
    pub fn forget(&self, worker: &str, domain: Option<&str>) {
        let mut table = self.waiting.lock();
        let concerns = |subject: &Subject| domain.is_none_or(|domain| domain == subject.0);
        if !table.late.is_empty() {
            table.last += 1;
            let now = table.last;
            table.void.insert((worker.to_owned(), domain.map(str::to_owned)), now);
        }
        for subject in table.by_subject.keys().filter(|subject| concerns(subject)) {
            table.tell(subject, worker, &Err(RejectReason::Removed));
        }
    }

    /// What anybody said to those who were told to come again may not be so any more.
    pub fn forget_all(&self) {
        let mut table = self.waiting.lock();
        table.late.clear();
        table.void.clear();
    }

    /// Drops what was kept for routers that did not come again.
    pub fn tidy(&self, now: Instant) {
        let mut table = self.waiting.lock();
        table.late.retain(|_, late| !late.is_over(now));
        if table.late.is_empty() {
            table.void.clear();
        }
    }
}

impl Table {
    /// Tells everyone who waits for the key.
    fn tell(&self, subject: &Subject, worker: &str, outcome: &Result<(), RejectReason>) {
        for mailbox in self.by_subject.get(subject).into_iter().flat_map(BTreeMap::values) {
            mailbox.unread.lock().insert(worker.to_owned(), outcome.clone());
            mailbox.told.notify_one();
        }
    }

    /// Whether what `worker` said of a key of `domain` then has not become void since.
    fn holds(&self, worker: &str, domain: &str, said: u64) -> bool {
        let void = |domain: Option<&str>| self.void.get(&(worker.to_owned(), domain.map(str::to_owned)));
        [None, Some(domain)].into_iter().filter_map(void).all(|void| *void < said)
    }
}

impl Waiting {
    /// The next verdict on the key, from any gateway; of each the last.
    pub async fn verdict(&mut self) -> Verdict {
        loop {
            if let Some(verdict) = self.unread() {
                return verdict;
            }
            self.mailbox.told.notified().await;
        }
    }

    fn unread(&self) -> Option<Verdict> {
        let unread = self.mailbox.unread.lock().pop_first();
        unread.map(|(worker, outcome)| Verdict { worker, outcome })
    }

    /// The router is told to come again: what is said from now on is kept until then, if there is room. Half of it is for
    /// keys that are proven.
    pub fn leave(self, is_proven: bool, now: Instant) {
        let mut table = self.waiters.waiting.lock();
        let most = if is_proven { KEPT } else { KEPT / 2 };
        if table.late.len() < most {
            table.late.insert(self.subject.clone(), Late { since: now, took: BTreeMap::new() });
        }
        drop(table);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut table = self.waiters.waiting.lock();
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

    fn verdicts(waiting: &Waiting) -> Vec<(String, Result<(), RejectReason>)> {
        std::iter::from_fn(|| waiting.unread()).map(|said| (said.worker, said.outcome)).collect()
    }

    #[test]
    fn a_verdict_reaches_everyone_who_waits_for_that_key_in_that_domain_and_nobody_else() {
        let (ours, other) =
            (key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="), key("o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg="));
        let waiters = Waiters::default();
        let said = |domain: &str, key| Applied { domain: domain.into(), installed: vec![key], failed: BTreeMap::new() };
        waiters.resolve("early", said("a", ours));
        let first = waiters.wait_for("a", ours);
        let second = waiters.wait_for("a", ours);
        let elsewhere = waiters.wait_for("b", ours);
        let another = waiters.wait_for("a", other);
        waiters.resolve("gw1", said("a", ours));
        waiters.resolve("gw2", Applied { failed: [(ours, RejectReason::Full)].into(), ..said("a", other) });
        let expected = vec![("gw1".to_owned(), Ok(())), ("gw2".to_owned(), Err(RejectReason::Full))];
        assert_eq!(verdicts(&first), expected);
        assert_eq!(verdicts(&second), expected);
        assert_eq!(verdicts(&elsewhere), []);
        assert_eq!(verdicts(&another), [("gw2".to_owned(), Ok(()))]);
    }

    #[test]
    fn what_is_said_too_late_is_kept_for_the_routers_next_request() {
        let (ours, other) =
            (key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g="), key("o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg="));
        let waiters = Waiters::default();
        let said = |domain: &str, key| Applied { domain: domain.into(), installed: vec![key], failed: BTreeMap::new() };
        let failed = |key, why| Applied { failed: [(key, why)].into(), ..said("a", other) };
        let now = Instant::now();
        let is_kept = || waiters.waiting.lock().late.contains_key(&("a".to_owned(), ours));
        waiters.resolve("early", said("a", ours));
        let waiting = waiters.wait_for("a", ours);
        waiters.resolve("unread", said("a", ours));
        waiting.leave(true, now);
        for worker in ["gw1", "gw2", "gw3", "gw4"] {
            waiters.resolve(worker, said("a", ours));
        }
        waiters.resolve("gw2", failed(ours, RejectReason::Full));
        waiters.resolve("gw4", failed(ours, RejectReason::Removed));
        waiters.resolve("gw1", said("b", ours));
        waiters.resolve("gw1", said("a", other));
        assert_eq!((waiters.take("b", ours, now), waiters.take("a", other, now)), (BTreeSet::new(), BTreeSet::new()));
        waiters.forget("gw1", Some("a"));
        waiters.resolve("gw1", said("a", ours));
        waiters.forget("gw1", Some("b"));
        waiters.resolve("gw5", said("a", ours));
        waiters.forget("gw5", None);
        assert_eq!(Vec::from_iter(waiters.take("a", ours, now)), ["gw1", "gw3"], "who lost it since does not have it");
        assert!(!is_kept(), "the next request has to ask");
        waiters.wait_for("a", ours).leave(true, now);
        waiters.resolve("gw1", said("a", ours));
        assert!(waiters.take("a", ours, now + AGAIN).is_empty(), "it is too long ago");
        waiters.wait_for("a", ours).leave(true, now);
        waiters.tidy(now + AGAIN);
        assert!(waiters.waiting.lock().late.is_empty());
    }

    #[test]
    fn who_waits_hears_that_a_gateway_may_not_have_the_key_any_more() {
        let ours = key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=");
        let waiters = Waiters::default();
        let (here, elsewhere) = (waiters.wait_for("a", ours), waiters.wait_for("b", ours));
        waiters.forget("gw1", Some("a"));
        let removed = |worker: &str| (worker.to_owned(), Err(RejectReason::Removed));
        assert_eq!((verdicts(&here), verdicts(&elsewhere)), (vec![removed("gw1")], vec![]));
        waiters.forget("gw2", None);
        assert_eq!((verdicts(&here), verdicts(&elsewhere)), (vec![removed("gw2")], vec![removed("gw2")]));
    }

    #[test]
    fn a_flood_of_keys_that_nobody_takes_keeps_only_so_many() {
        let (waiters, now) = (Waiters::default(), Instant::now());
        let most = u32::try_from(KEPT).unwrap();
        let leave = |n: u32, is_proven| {
            let mut bytes = [0x42; 32];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            waiters.wait_for("a", PublicKey::from_bytes(bytes).unwrap()).leave(is_proven, now);
        };
        (0..most).for_each(|n| leave(n, false));
        assert_eq!(waiters.waiting.lock().late.len(), KEPT / 2, "routers that are known have places all the same");
        (0..2 * most).for_each(|n| leave(n, true));
        assert_eq!(waiters.waiting.lock().late.len(), KEPT);
        waiters.forget_all();
        assert!(waiters.waiting.lock().late.is_empty());
    }

    /// Fails where every word is queued: there was no place for the second gateway's.
    #[test]
    fn a_worker_that_says_much_keeps_no_other_from_being_heard() {
        let (waiters, now) = (Waiters::default(), Instant::now());
        let ours = key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=");
        let said = |installed: Vec<PublicKey>| Applied { domain: "a".into(), installed, failed: BTreeMap::new() };
        let waiting = waiters.wait_for("a", ours);
        waiters.wait_for("a", ours).leave(true, now);
        for _ in 0..1_000 {
            waiters.resolve("thief", said(vec![ours; 100]));
            waiters.forget("thief", None);
        }
        waiters.resolve("gw", said(vec![ours]));
        let removed = Err(RejectReason::Removed);
        assert_eq!(verdicts(&waiting), [("gw".to_owned(), Ok(())), ("thief".to_owned(), removed)]);
        assert_eq!(Vec::from_iter(waiters.take("a", ours, now)), ["gw"]);
        waiters.tidy(now + AGAIN);
        assert!(waiters.waiting.lock().void.is_empty());
    }

    #[test]
    fn who_leaves_leaves_nothing_behind() {
        let key = key("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=");
        let waiters = Waiters::default();
        let waiting = waiters.wait_for("a", key);
        let another = waiters.wait_for("a", key);
        drop(waiting);
        assert_eq!(waiters.waiting.lock().by_subject.len(), 1);
        drop(another);
        assert!(waiters.waiting.lock().by_subject.is_empty());
    }
}
