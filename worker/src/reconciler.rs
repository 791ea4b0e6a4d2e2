//! The one task that owns the kernel: what arrived goes in as one batch, and while the kernel is busy the next
//! batch gathers. It also reads the tables, counts peers, restores what is lost and sweeps what is stale.
//!
//! Nothing that it hands out can block it: states go into a `watch`, confirmations into a bounded queue.

mod domain;
pub mod reports;
pub mod schedule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use wgkex_common::access_lists::Admission;
use wgkex_common::storage::key_store::{Keys, WriteBuffer};
use wgkex_common::wire::message::{Age, Revoked};
use wgkex_common::{Domain, PublicKey, RejectReason, Reserved};

use crate::metrics::Metrics;
use crate::peers::{Clocks, Policy};
use crate::profiles::Profile;
use crate::profiles::mesh::Mesh;
use domain::Served;
use reports::Outbox;
pub use reports::{DomainState, Said, State};
use wgkex_kernel::Kernel;

/// Keys that wait at most for a batch; a full retained fleet fits.
const QUEUE: usize = 65_536;

/// Keys in a batch at most.
const BATCH: usize = 4_096;

/// After a batch that took longer than this, keys gather for as long as it took: where a batch is slow, each key of a
/// storm must cost less than one alone.
const SLOW: Duration = Duration::from_millis(3);

/// The longest that keys gather.
const GATHER: Duration = Duration::from_millis(50);

/// Where so many keys wait after a batch, the next one gathers no more.
const GATHERED: usize = 64;

/// While more than this is owed, live keys that may be lacking are not looked at: they wait with who sent them.
const OWED: usize = 2_048;

/// Live keys with their ages.
type Live = BTreeMap<PublicKey, Age>;

/// Who may come from now on, and which keys were denied just now, by which records.
#[derive(Debug, Default)]
struct Orders {
    admission: Option<Arc<Admission>>,
    denied: BTreeMap<PublicKey, u64>,
}

/// Owns the kernel of a gateway; made with the ends that others hold.
pub struct Installer<K> {
    kernel: K,
    domains: BTreeMap<Domain, Served>,
    keys: mpsc::Receiver<(Domain, PublicKey)>,
    batch: Vec<(Domain, PublicKey)>,
    live: mpsc::Receiver<(Domain, Live)>,
    orders: Arc<Mutex<Orders>>,
    ordered: Arc<Notify>,
    /// Since when keys have to wait, if they have to.
    held: watch::Receiver<Option<std::time::Instant>>,
    reconnected: Arc<Notify>,
    journal: WriteBuffer,
    /// The last event was a batch of keys.
    yields: bool,
    /// The next batch gathers until then.
    gathers: Option<Instant>,
    refresh: Arc<Notify>,
    outbox: Outbox,
}

/// By which others reach the [`Installer`]. It ends when all of them are gone.
#[derive(Debug, Clone)]
pub struct Handle {
    keys: mpsc::Sender<(Domain, PublicKey)>,
    live: mpsc::Sender<(Domain, Live)>,
    orders: Arc<Mutex<Orders>>,
    ordered: Arc<Notify>,
    reconnected: Arc<Notify>,
    refresh: Arc<Notify>,
    state: watch::Receiver<State>,
    metrics: Metrics,
}

/// What can happen to an installer.
#[derive(Debug)]
enum Event {
    /// Keys arrived, in this order.
    Keys(Vec<(Domain, PublicKey)>),
    /// These keys are live, and this gateway may lack some of them.
    Live(Domain, Live),
    /// What was said before may not have been heard.
    Reconnected,
    /// Others may come than before.
    Ordered,
    /// Keys have to wait from now on, or no longer.
    Held,
    /// Links or addresses may have changed, or somebody wants to know.
    Doubt,
    /// It is time to read this domain.
    Due(Domain),
    /// This domain is owed something, and there is nothing better to do.
    Spare(Domain),
}

impl<K: Kernel> Installer<K> {
    /// An installer for `domains`, which may be read from now on, and what it says of keys. It owes the kernel the keys
    /// that are `remembered`, and has the journal written; what is `reserved` it leaves alone.
    pub fn new(
        kernel: K,
        domains: impl IntoIterator<Item = Domain>,
        policy: &Policy,
        (journal, remembered): (WriteBuffer, Keys),
        reserved: &watch::Receiver<Reserved>,
        metrics: &Metrics,
    ) -> (Self, Handle, Said) {
        let (key_sender, keys) = mpsc::channel(QUEUE);
        let (live_sender, live) = mpsc::channel(1);
        let (refresh, reconnected) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (orders, ordered) = (Arc::<Mutex<Orders>>::default(), Arc::new(Notify::new()));
        let (state, state_receiver) = watch::channel(State::new());
        let now = Instant::now().into_std();
        let shared = || (reserved.clone(), journal.clone(), metrics.clone());
        let profile: Arc<dyn Profile> = Arc::new(Mesh);
        let served = |domain: Domain| (domain.clone(), Served::new(domain, profile.clone(), *policy, now, shared()));
        let mut domains: BTreeMap<_, _> = domains.into_iter().map(served).collect();
        for ((domain, key), kept) in remembered {
            if let Some(served) = domains.get_mut(&domain) {
                served.remember(key, kept);
            }
        }
        let (outbox, said) = Outbox::new(state, metrics.clone());
        let installer = Self {
            kernel,
            domains,
            keys,
            batch: Vec::new(),
            live,
            orders: orders.clone(),
            ordered: ordered.clone(),
            held: watch::channel(None).1,
            reconnected: reconnected.clone(),
            journal: journal.clone(),
            yields: false,
            gathers: None,
            refresh: refresh.clone(),
            outbox,
        };
        let (keys, live, metrics) = (key_sender, live_sender, metrics.clone());
        let state = state_receiver;
        (installer, Handle { keys, live, orders, ordered, reconnected, refresh, state, metrics }, said)
    }

    /// Lets keys wait for as long as `held` says since when, those that came and those that are owed.
    #[must_use]
    pub fn held_by(self, held: watch::Receiver<Option<std::time::Instant>>) -> Self {
        Self { held, ..self }
    }

    /// Works until `stop`, or until every [`Handle`] is gone. What the kernel is doing at that moment is not
    /// waited for: it can be repeated without harm.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut work = pin!(self.work());
        tokio::select! {
            () = &mut stop => {}
            () = &mut work => {}
        }
    }

    async fn work(mut self) {
        self.obey(clocks()).await;
        for domain in self.domains.keys().cloned().collect::<Vec<_>>() {
            self.handle(Event::Due(domain), clocks()).await;
        }
        while let Some(event) = self.next().await {
            self.handle(event, clocks()).await;
        }
    }

    /// Waits for the next event. After each batch of keys other work that is due has its turn, so that neither
    /// starves the other and a key never waits for more than one read or one slice of what is owed.
    async fn next(&mut self) -> Option<Event> {
        let is_held = self.held.borrow_and_update().is_some();
        let owed = self.domains.values().find(|served| served.has_backlog() && !is_held);
        let owed = owed.map(|served| Event::Spare(served.domain()));
        let due = self.domains.values().min_by_key(|served| served.due());
        let due = due.map(|served| (Instant::from_std(served.due()), Event::Due(served.domain())));
        let has_room = !is_held && self.domains.values().map(Served::backlog).sum::<usize>() < OWED;
        let mut other = pin!(other(due, owed));
        if std::mem::take(&mut self.yields) {
            if let Some(event) = other.as_mut().now_or_never() {
                return Some(event);
            }
            if has_room && let Ok((domain, keys)) = self.live.try_recv() {
                return Some(Event::Live(domain, keys));
            }
        }
        tokio::select! {
            biased;
            () = self.ordered.notified() => Some(Event::Ordered),
            () = changed(&mut self.held) => Some(Event::Held),
            () = self.kernel.changed() => Some(Event::Doubt),
            () = self.refresh.notified() => Some(Event::Doubt),
            () = self.reconnected.notified() => Some(Event::Reconnected),
            count = gather(self.gathers, &mut self.keys, &mut self.batch), if !is_held => {
                self.yields = true;
                (count > 0).then(|| Event::Keys(std::mem::take(&mut self.batch)))
            }
            Some((domain, keys)) = self.live.recv(), if has_room => Some(Event::Live(domain, keys)),
            event = other => Some(event),
        }
    }

    async fn handle(&mut self, event: Event, now: Clocks) {
        match event {
            Event::Keys(keys) => {
                let begun = Instant::now();
                self.install(keys, now).await;
                let took = begun.elapsed();
                let gathers = took > SLOW && self.keys.len() < GATHERED;
                self.gathers = gathers.then(|| Instant::now() + took.min(GATHER));
            }
            Event::Live(domain, keys) => {
                if let Some(served) = self.domains.get_mut(&domain) {
                    served.learn(keys, now.monotonic);
                }
            }
            Event::Reconnected => self.domains.values_mut().for_each(Served::report_all),
            Event::Ordered => self.obey(now).await,
            Event::Held => {}
            Event::Doubt => self.domains.values_mut().for_each(|served| served.hurry(now.monotonic)),
            Event::Due(domain) => {
                if let Some(served) = self.domains.get_mut(&domain) {
                    served.read(&mut self.kernel, &mut self.outbox, now).await;
                }
            }
            Event::Spare(domain) => {
                if let Some(served) = self.domains.get_mut(&domain) {
                    served.catch_up(&mut self.kernel, &mut self.outbox, now).await;
                }
            }
        }
        let anew = self.journal.needs_full_write();
        self.domains.values_mut().for_each(|served| served.note_changes(anew));
    }

    /// Takes over who may come, removes who may not be here, and says what became of keys that were denied just now.
    async fn obey(&mut self, now: Clocks) {
        let Orders { admission, denied } = std::mem::take(&mut *self.orders.lock());
        let Some(admission) = admission else { return };
        let keys: BTreeSet<PublicKey> = denied.keys().copied().collect();
        let mut said = BTreeMap::<PublicKey, Result<(), RejectReason>>::new();
        for served in self.domains.values_mut() {
            served.admit(admission.clone());
            if keys.is_empty() && !served.has_to_expel() {
                continue;
            }
            for (key, outcome) in served.revoke(&mut self.kernel, &mut self.outbox, &keys, now).await {
                let worst = said.entry(key).or_insert(Ok(()));
                if worst.is_ok() {
                    *worst = outcome;
                }
            }
        }
        self.outbox.revoked(denied.into_iter().map(|(key, at)| {
            let outcome = match said.get(&key) {
                None => Revoked::ABSENT.to_owned(),
                Some(Ok(())) => Revoked::REMOVED.to_owned(),
                Some(Err(reason)) => reason.to_string(),
            };
            (at, key, outcome)
        }));
    }

    async fn install(&mut self, keys: Vec<(Domain, PublicKey)>, now: Clocks) {
        self.outbox.set_queue(self.keys.len());
        let mut by_domain = BTreeMap::<Domain, Vec<PublicKey>>::new();
        for (domain, key) in keys {
            by_domain.entry(domain).or_default().push(key);
        }
        for (domain, keys) in by_domain {
            if let Some(served) = self.domains.get_mut(&domain) {
                served.install(&mut self.kernel, &mut self.outbox, keys, now).await;
            }
        }
    }
}

impl Handle {
    /// Hands over a key that arrived for `domain`, without waiting. One too many is dropped and counted.
    pub fn offer(&self, domain: Domain, key: PublicKey) {
        self.metrics.keys_received.with_label_values(&[domain.name()]).inc();
        if self.keys.try_send((domain, key)).is_err() {
            self.metrics.keys_dropped.with_label_values(&["queue"]).inc();
        }
        let length = self.keys.max_capacity() - self.keys.capacity();
        self.metrics.queue_length.set(i64::try_from(length).unwrap_or(i64::MAX));
    }

    /// Hands over live keys that this gateway may lack; waits while it has enough to do.
    pub async fn learn(&self, domain: Domain, keys: BTreeMap<PublicKey, Age>) {
        // An installer that has ended needs none.
        let _ = self.live.send((domain, keys)).await;
    }

    /// Who may come from now on, and the keys that were denied just now, each with the time of its record: what became
    /// of these is said. Never waits.
    pub fn admit(&self, admission: Arc<Admission>, denied: impl IntoIterator<Item = (PublicKey, u64)>) {
        let mut orders = self.orders.lock();
        orders.admission = Some(admission);
        orders.denied.extend(denied);
        drop(orders);
        self.ordered.notify_one();
    }

    /// The bus was lost, or a broker is new, and what was reported may not have been heard.
    pub fn reconnected(&self) {
        self.reconnected.notify_one();
    }

    /// Asks for all tables to be read anew, soon; what comes of it is in the state.
    pub fn refresh(&self) {
        self.refresh.notify_one();
    }

    /// The state of every domain, now and whenever it changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }
}

/// Takes the keys that wait, and that come until then; how many there are, none if no more will come. Cancel-safe.
async fn gather(
    until: Option<Instant>,
    keys: &mut mpsc::Receiver<(Domain, PublicKey)>,
    batch: &mut Vec<(Domain, PublicKey)>,
) -> usize {
    if let Some(until) = until {
        tokio::time::sleep_until(until).await;
    }
    keys.recv_many(batch, BATCH).await
}

/// Returns when keys have to wait from now on, or no longer.
async fn changed(held: &mut watch::Receiver<Option<std::time::Instant>>) {
    if held.changed().await.is_err() {
        pending::<()>().await;
    }
}

fn clocks() -> Clocks {
    Clocks { monotonic: Instant::now().into_std(), wall: SystemTime::now() }
}

/// What is due at its time, else what is owed, at once.
async fn other(due: Option<(Instant, Event)>, owed: Option<Event>) -> Event {
    match (due, owed) {
        (Some((time, event)), _) if time <= Instant::now() => event,
        (_, Some(event)) => event,
        (Some((time, event)), None) => {
            tokio::time::sleep_until(time).await;
            event
        }
        (None, None) => pending().await,
    }
}
