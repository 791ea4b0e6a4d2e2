//! The answer to a router's request: one future per request, from its check to the gateway that confirms its key.
//!
//! The previous stop is [`crate::http`]; the next ones are [`crate::fleet`], which selects the gateway, and
//! [`in_flight`](super::in_flight), whose publication the future waits for.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;
use wgkex_common::access_lists::service::ListSnapshot;
use wgkex_common::config::Confirm;
use wgkex_common::wire::message::WorkerData;
use wgkex_common::{Domain, RejectReason, WorkerName};

use crate::client_ip::Client;
use crate::exchange::in_flight::{Answer, Confirmations};
use crate::exchange::keys::{Keys, Request};
use crate::exchange::rate_limit::Limits;
use crate::exchange::{KeyId, Metrics, Rejection};
use crate::fleet::gateways::{Gateways, Online};
use crate::fleet::live_keys::LiveKeys;
use crate::fleet::selection::Selection;

/// How a key stands with this broker when it comes.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// It shook hands at a gateway.
    is_proven: bool,
    /// It was sent before, and comes oftener than a router needs.
    is_hasty: bool,
}

/// What it takes to answer a router. Clones share it.
#[derive(Clone)]
pub struct Exchange {
    /// Who could have the key.
    pub gateways: Arc<Mutex<Gateways>>,
    /// The keys in flight.
    pub keys: Keys,
    /// Where they are remembered.
    pub live: Arc<Mutex<LiveKeys>>,
    /// How often unknown keys may come.
    pub limits: Arc<Limits>,
    /// The domains of which it was said that no gateway ever published its state.
    pub unwitnessed: Arc<Mutex<BTreeSet<Domain>>>,
    /// Who may come.
    pub lists: watch::Receiver<ListSnapshot>,
    /// How long an answer may wait.
    pub confirm: Confirm,
    /// What is counted.
    pub metrics: Metrics,
}

impl Exchange {
    /// The gateways, for as short as it takes to ask one question.
    pub fn gateways(&self) -> MutexGuard<'_, Gateways> {
        self.gateways.lock()
    }

    /// The live keys, as shortly.
    pub fn live(&self) -> MutexGuard<'_, LiveKeys> {
        self.live.lock()
    }

    /// Version 1: the router chooses its gateway itself, so its key is published whatever is known of gateways. Returns when
    /// one that confirms has the key; where none does, when MQTT has taken it.
    pub async fn announce(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<(), Rejection> {
        self.ready(id)?;
        let standing = self.standing(id, client)?;
        if standing.is_hasty && self.told(id).is_some() {
            // What was true then may not be so any more.
            return if self.gateways().are_offline(&id.domain) { Err(Rejection::NoGateway) } else { Ok(()) };
        }
        self.announce_anew(id, standing).await?;
        self.keep(id, standing, None);
        Ok(())
    }

    /// Version 2: returns the gateway that the router is to use, with the key in its kernel if it is one that says so.
    pub async fn assign(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<WorkerData, Rejection> {
        self.ready(id)?;
        let standing = self.standing(id, client)?;
        if standing.is_hasty
            && let Some(Answer { worker: Some(worker), .. }) = self.told(id)
            && let Some(choice) = self.gateways().select(&id.domain, |name, _| *name == worker)
        {
            return Ok(choice.data);
        }
        let choice = self.assign_anew(id, standing).await?;
        self.keep(id, standing, Some(choice.worker));
        Ok(choice.data)
    }

    /// How the key stands, if it may come now.
    fn standing(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<Standing, Rejection> {
        let proven = self.live().is_established(&id.domain, &id.key);
        if proven.is_none() {
            self.limits.admit(&id.key, client, id.domain.name())?;
        }
        self.admit(id)?;
        let is_hasty = proven.is_some() && self.limits.repeat(&id.key, id.domain.name()).is_err();
        Ok(Standing { is_proven: proven == Some(true), is_hasty })
    }

    /// Whether the key may be a router's, and its address is nobody else's.
    fn admit(&self, id: &KeyId) -> Result<(), Rejection> {
        let is_routers = self.live().is_routers(&id.key);
        let refusal = if self.gateways().is_reserved(&id.key, is_routers) {
            Rejection::Reserved
        } else if self.live().is_taken(id.domain.name(), id.key, Instant::now().into_std()) {
            Rejection::AddressTaken
        } else {
            return Ok(());
        };
        warn!(domain = %id.domain, key = ?id.key, reason = refusal.reason(), "key refused");
        Err(refusal)
    }

    fn told(&self, id: &KeyId) -> Option<Answer> {
        self.keys.lock().last_answer(id, Instant::now().into_std()).cloned()
    }

    fn keep(&self, id: &KeyId, standing: Standing, worker: Option<WorkerName>) {
        if standing.is_hasty {
            self.keys.lock().answered(id, worker, Instant::now().into_std());
        }
    }

    async fn announce_anew(&self, id: &KeyId, standing: Standing) -> Result<(), Rejection> {
        let deadlines = Deadlines::now(self.confirm);
        if self.took(id).iter().any(|worker| self.can_take(id, worker)) {
            self.publish_again(id, standing);
            return Ok(());
        }
        let (published, request) = self.publish(id, standing, deadlines).await?;
        let online = self.gateways().online(&id.domain);
        if online.is_empty() {
            return self.unserved(id);
        }
        if online.confirming.is_empty() {
            return Ok(());
        }
        // Originals have the key by now, too: with them about, an error would help nobody.
        let until = if online.legacy.is_empty() { deadlines.budget } else { deadlines.timeout };
        let is_installed = request.find(until, |confirmations| {
            let is_rejected = || confirmations.is_rejected_by_all(&self.gateways().online(&id.domain));
            if confirmations.installed.is_empty() { is_rejected().then_some(false) } else { Some(true) }
        });
        if is_installed.await == Some(true) {
            self.confirmed(published);
            return Ok(());
        }
        if !online.legacy.is_empty() {
            return Ok(());
        }
        let refusal = request.confirmations().refusal(&self.gateways().online(&id.domain));
        Err(refused(request, standing, refusal))
    }

    /// The key is published, and no gateway of its domain is online. Workers that only subscribe say nothing of themselves:
    /// where none ever did, there may be some.
    fn unserved(&self, id: &KeyId) -> Result<(), Rejection> {
        if self.gateways().is_known(&id.domain) {
            return Err(Rejection::NoGateway);
        }
        if self.unwitnessed.lock().insert(id.domain.clone()) {
            warn!(domain = %id.domain, "no gateway has ever published its state: v1 keys are answered once MQTT took them");
        }
        self.metrics.keys_unwitnessed.inc();
        Ok(())
    }

    async fn assign_anew(&self, id: &KeyId, standing: Standing) -> Result<Selection, Rejection> {
        let deadlines = Deadlines::now(self.confirm);
        let took = self.took(id);
        if !took.is_empty()
            && let Some(choice) = self.choose(id, |worker, confirms| confirms && took.contains(worker))
        {
            self.publish_again(id, standing);
            return Ok(choice);
        }
        let first = self.choose(id, |_, _| true).ok_or(Rejection::NoGateway)?;
        let (published, request) = self.publish(id, standing, deadlines).await?;
        let choice = if !first.confirms || self.takes(&first, &request, deadlines).await {
            Ok(first)
        } else {
            self.next_best(id, &request, deadlines).await
        };
        let choice = match choice {
            Ok(choice) => choice,
            Err(refusal) => return Err(refused(request, standing, refusal)),
        };
        if choice.confirms {
            self.confirmed(published);
        }
        Ok(choice)
    }

    /// The gateways that said that they have the key since its router was told to come again. It was late, not lost:
    /// their words on it as it is published again would be late again.
    fn took(&self, id: &KeyId) -> BTreeSet<WorkerName> {
        self.keys.lock().take_late(id, Instant::now().into_std())
    }

    /// Whether the best gateway takes the key within its time.
    async fn takes(&self, first: &Selection, request: &Request, deadlines: Deadlines) -> bool {
        let outcome = request.find(deadlines.timeout, |confirmations| {
            let is_installed = confirmations.installed.contains(&first.worker);
            (is_installed || confirmations.rejected.contains_key(&first.worker)).then_some(is_installed)
        });
        let outcome = outcome.await;
        if outcome.is_none() {
            warn!(worker = first.worker.as_str(), "gateway did not confirm in time");
            self.metrics.confirmations_missed.inc();
            self.gateways().on_timeout(&first.worker);
        }
        outcome == Some(true)
    }

    /// The best of those that have the key. All got it at the same time, so none is waited for by itself.
    async fn next_best(&self, id: &KeyId, request: &Request, deadlines: Deadlines) -> Result<Selection, Rejection> {
        let choice = request.find(deadlines.budget, |confirmations| {
            let has_key = |worker: &WorkerName, confirms: bool| !confirms || confirmations.installed.contains(worker);
            if let Some(next) = self.choose(id, has_key) {
                return Some(Ok(next));
            }
            let online = self.gateways().online(&id.domain);
            confirmations.is_rejected_by_all(&online).then(|| Err(confirmations.refusal(&online)))
        });
        choice.await.unwrap_or(Err(Rejection::NotConfirmed))
    }

    /// Whether this broker can take the key now: it has heard the retained states, and the lists let the key come.
    fn ready(&self, id: &KeyId) -> Result<(), Rejection> {
        if self.lists.borrow().admission.denies(id.domain.name(), &id.key) {
            return Err(Rejection::Denied);
        }
        if self.gateways().is_synced() { Ok(()) } else { Err(Rejection::NotReady) }
    }

    /// Whether `worker` is waited for, and its word on the key counts.
    fn can_take(&self, id: &KeyId, worker: &WorkerName) -> bool {
        self.gateways().can_confirm(worker, id.domain.name())
    }

    /// The best gateway that fits. It counts as answered from here on, so that requests at the same time spread; if it
    /// comes to nothing, the gateway's own next count sets that right.
    fn choose(&self, id: &KeyId, fits: impl Fn(&WorkerName, bool) -> bool) -> Option<Selection> {
        let mut gateways = self.gateways();
        let choice = gateways.select(&id.domain, fits)?;
        gateways.on_assigned(&choice.worker, &id.domain);
        Some(choice)
    }

    /// Publishes the key, and returns when that began, with the request that waits since before that. Where every gateway
    /// confirms, a key that was queued already needs no acknowledgement: their outcomes tell of it.
    async fn publish(
        &self,
        id: &KeyId,
        standing: Standing,
        deadlines: Deadlines,
    ) -> Result<(Instant, Request), Rejection> {
        let begun = Instant::now();
        let Some(request) = self.keys.request(id, standing.is_proven) else {
            self.metrics.publish_failures.inc();
            self.keys.lock().timed_out(id, standing.is_proven, begun.into_std());
            return Err(Rejection::NotPublished);
        };
        let is_published = (request.is_joined() && self.gateways().all_confirm(&id.domain))
            || request.is_published(deadlines.budget).await;
        if is_published {
            return Ok((begun, request));
        }
        self.metrics.publish_failures.inc();
        Err(refused(request, standing, Rejection::NotPublished))
    }

    /// Has a key published that a gateway said it has, for the others and in case it is not there any more. If there is
    /// no place for that the gateway's word holds all the same.
    fn publish_again(&self, id: &KeyId, standing: Standing) {
        self.keys.publish(id, standing.is_proven);
    }

    fn confirmed(&self, published: Instant) {
        self.metrics.confirmation.observe(published.elapsed().as_secs_f64());
    }
}

/// Why a request is not met; if that is for want of time, what comes later is kept for the router's next one.
fn refused(request: Request, standing: Standing, refusal: Rejection) -> Rejection {
    if matches!(refusal, Rejection::NotPublished | Rejection::NotConfirmed) {
        request.timed_out(standing.is_proven);
    }
    refusal
}

/// How long a request may wait.
#[derive(Debug, Clone, Copy)]
struct Deadlines {
    timeout: Instant,
    budget: Instant,
}

impl Deadlines {
    fn now(confirm: Confirm) -> Self {
        let at = Instant::now();
        Self { timeout: at + confirm.timeout, budget: at + confirm.budget }
    }
}

impl Confirmations {
    /// Whether each of those that can confirm the key has rejected it. A gateway that cannot serve the domain is neither
    /// waited for nor does its rejection count.
    fn is_rejected_by_all(&self, online: &Online) -> bool {
        let mut confirming = online.confirming.iter().peekable();
        confirming.peek().is_some() && confirming.all(|worker| self.rejected.contains_key(worker))
    }

    /// Why nobody took the key: what all gateways say that can confirm it, if they say the same.
    fn refusal(&self, online: &Online) -> Rejection {
        let is_refused_by_all = self.is_rejected_by_all(online);
        let reasons = || online.confirming.iter().filter_map(|worker| self.rejected.get(worker));
        let all = |reason: &RejectReason| is_refused_by_all && reasons().all(|other| other == reason);
        match () {
            () if all(&RejectReason::AddressTaken) => Rejection::AddressTaken,
            () if all(&RejectReason::Reserved) => Rejection::Reserved,
            () if all(&RejectReason::Denied) => Rejection::Denied,
            () if all(&RejectReason::Full) => Rejection::Full,
            () => Rejection::NotConfirmed,
        }
    }
}
