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
use wgkex_common::runtime::logged_once::LoggedOnce;
use wgkex_common::wire::message::WorkerData;
use wgkex_common::{Domain, KeyId, WorkerName};

use crate::client_ip::Client;
use crate::exchange::handle::{InFlightHandle, PendingRequest};
use crate::exchange::in_flight::{Answer, Confirmations};
use crate::exchange::rate_limit::{Limited, RateLimits};
use crate::exchange::{Metrics, Rejection};
use crate::fleet::gateways::{Gateways, Online, Router};
use crate::fleet::live_keys::LiveKeys;
use crate::fleet::selection::Selection;
use crate::fleet::status::Standing;

/// What this broker knows of a key when a request for it begins.
#[derive(Debug, Clone, Copy)]
struct KeyStatus {
    /// It has had a handshake at some gateway.
    is_established: bool,
    /// It is known, and is requested more often than a router needs.
    is_too_frequent: bool,
}

/// What a request would come to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Why it would be rejected at once.
    pub rejection: Option<Rejection>,
    /// The gateway that it would be given first; version 1 gives none.
    pub gateway: Option<WorkerName>,
    /// That is the best of those that confirmed the key after the request before timed out.
    pub is_late: bool,
    /// Each gateway in the choice, or why it is not.
    pub standings: Vec<Standing>,
}

/// Answers routers. Clones share everything.
#[derive(Clone)]
pub struct Exchange {
    /// The gateways, and which of them is next.
    pub gateways: Arc<Mutex<Gateways>>,
    /// The keys in flight.
    pub in_flight: InFlightHandle,
    /// The keys that brokers remember.
    pub live: Arc<Mutex<LiveKeys>>,
    /// How often keys may be requested that are not known.
    pub limits: Arc<RateLimits>,
    /// The domains that were logged as having no gateway that ever published its state.
    pub warned_domains: Arc<Mutex<BTreeSet<Domain>>>,
    /// The keys that were logged as refused, with the reason.
    pub refused: Arc<Mutex<LoggedOnce<(KeyId, &'static str)>>>,
    /// Which keys the access lists admit.
    pub lists: watch::Receiver<ListSnapshot>,
    /// How long an answer may wait.
    pub confirm: Confirm,
    /// What is counted.
    pub metrics: Metrics,
}

impl Exchange {
    /// The gateways, locked: for one question only.
    pub fn gateways(&self) -> MutexGuard<'_, Gateways> {
        self.gateways.lock()
    }

    /// The live keys, locked: for one question only.
    pub fn live(&self) -> MutexGuard<'_, LiveKeys> {
        self.live.lock()
    }

    /// Version 1: the router chooses its gateway itself, so its key is published whatever is known of gateways. Returns when
    /// a gateway has confirmed the key; where none does that, when the MQTT server has acknowledged it.
    pub async fn exchange_v1(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<(), Rejection> {
        self.enter(id)?;
        let status = self.status(id, client)?;
        if status.is_too_frequent && self.cached(id).is_some() {
            // The gateways may have gone offline since that answer.
            return if self.gateways().are_offline(&id.domain) { Err(Rejection::NoGateway) } else { Ok(()) };
        }
        self.uncached_v1(id, status).await?;
        self.cache(id, status, None);
        Ok(())
    }

    /// Version 2: returns the gateway that the router is to use. If it is one that confirms, the key is in its kernel.
    pub async fn exchange_v2(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<WorkerData, Rejection> {
        self.enter(id)?;
        let status = self.status(id, client)?;
        if status.is_too_frequent
            && let Some(Answer { worker: Some(worker), .. }) = self.cached(id)
            && let Some(selection) = self.gateways().select(router(id, None), |name, _| *name == worker)
        {
            return Ok(selection.data);
        }
        let selection = self.uncached_v2(id, status).await?;
        let now = Instant::now().into_std();
        let is_connected = self.on_given(id, &selection.worker, now);
        self.gateways().on_given(&selection.worker, id, is_connected, now);
        self.cache(id, status, Some(selection.worker));
        Ok(selection.data)
    }

    /// Remembers that the router is sent to `worker`; true if that is the gateway that last reported handshakes of it.
    fn on_given(&self, id: &KeyId, worker: &WorkerName, now: std::time::Instant) -> bool {
        let mut live = self.live();
        live.on_given(id, worker, now);
        live.last_with_handshakes(id) == Some(worker)
    }

    /// What is known of the key, if a request for it is admitted now.
    fn status(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<KeyStatus, Rejection> {
        let established = self.admit(id, || self.limits.check(&id.key, client, id.domain.name()));
        let established = established.inspect_err(|rejection| self.log_refused(id, *rejection))?;
        let is_too_frequent = established.is_some() && self.limits.check_key(&id.key, id.domain.name()).is_err();
        Ok(KeyStatus { is_established: established == Some(true), is_too_frequent })
    }

    /// Whether the key has had a handshake, if it is known and its request is admitted. `limit` is asked for an unknown key.
    fn admit(&self, id: &KeyId, limit: impl FnOnce() -> Result<(), Limited>) -> Result<Option<bool>, Rejection> {
        let established = self.live().is_established(&id.domain, &id.key);
        if established.is_none() {
            limit()?;
        }
        self.owner_rejection(id).map_or(Ok(established), Err)
    }

    /// Why no router may have the key: a gateway has it, or another key has its address.
    fn owner_rejection(&self, id: &KeyId) -> Option<Rejection> {
        let is_routers = self.live().has_handshake(&id.key);
        if self.gateways().is_reserved(&id.key, is_routers) {
            Some(Rejection::Reserved)
        } else if self.live().is_taken(id.domain.name(), id.key, Instant::now().into_std()) {
            Some(Rejection::AddressTaken)
        } else {
            None
        }
    }

    /// What a request for the key would come to now, by the checks and the choice that serve requests. Nothing is counted,
    /// published or logged.
    #[must_use]
    pub fn outlook(&self, id: &KeyId) -> Outlook {
        let now = Instant::now().into_std();
        let admitted = self.ready(id).and_then(|()| self.admit(id, || self.limits.look(&id.key, id.domain.name())));
        let late = self.in_flight.lock().late(id, now);
        let home = self.home(id);
        let (gateways, router) = (self.gateways(), router(id, home.as_ref()));
        let by_confirmation = gateways.select(router, has_confirmed(&late)).map(|selection| selection.worker);
        let best = || gateways.select(router, |_, _| true).map(|selection| selection.worker);
        let (is_late, gateway) = (by_confirmation.is_some(), by_confirmation.or_else(best));
        let rejection = admitted.err().or(gateway.is_none().then_some(Rejection::NoGateway));
        Outlook { rejection, gateway, is_late, standings: gateways.standings(router) }
    }

    fn cached(&self, id: &KeyId) -> Option<Answer> {
        self.in_flight.lock().cached(id, Instant::now().into_std()).cloned()
    }

    fn cache(&self, id: &KeyId, status: KeyStatus, worker: Option<WorkerName>) {
        if status.is_too_frequent {
            self.in_flight.lock().cache(id, worker, Instant::now().into_std());
        }
    }

    async fn uncached_v1(&self, id: &KeyId, status: KeyStatus) -> Result<(), Rejection> {
        let deadlines = Deadlines::now(self.confirm);
        if self.late_confirmations(id).iter().any(|worker| self.can_confirm(id, worker)) {
            self.publish_again(id, status);
            return Ok(());
        }
        let (published, request) = self.publish(id, status, deadlines).await?;
        let Some(online) = self.online(&id.domain) else {
            return Err(ended(request, status, Rejection::NotConfirmed));
        };
        if online.is_empty() {
            return self.unserved(id);
        }
        if online.confirming.is_empty() {
            return Ok(());
        }
        // An original that is online has the key by now as well and confirms nothing: the router may use that one.
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
        let rejection = request.confirmations().rejection(&self.gateways().online(&id.domain));
        Err(ended(request, status, rejection))
    }

    /// The gateways of a domain that are online. None while the retained states are incomplete, as after a reconnect: a gateway of
    /// ours whose hello is still to come would count as an original, of which no confirmation is waited for.
    fn online(&self, domain: &Domain) -> Option<Online> {
        let gateways = self.gateways();
        gateways.is_synced().then(|| gateways.online(domain))
    }

    /// The key is published, and no gateway of its domain is online. Workers before v0.2.0 publish nothing of themselves: where
    /// no gateway ever did, there may be some of these.
    fn unserved(&self, id: &KeyId) -> Result<(), Rejection> {
        if self.gateways().is_known(&id.domain) {
            return Err(Rejection::NoGateway);
        }
        if self.warned_domains.lock().insert(id.domain.clone()) {
            warn!(domain = %id.domain, "no gateway has ever published its state: v1 requests get 200 without a gateway's confirmation");
        }
        self.metrics.keys_unwitnessed.inc();
        Ok(())
    }

    async fn uncached_v2(&self, id: &KeyId, status: KeyStatus) -> Result<Selection, Rejection> {
        let deadlines = Deadlines::now(self.confirm);
        let late = self.late_confirmations(id);
        if !late.is_empty()
            && let Some(selection) = self.select(id, has_confirmed(&late))
        {
            self.publish_again(id, status);
            return Ok(selection);
        }
        let first = self.select(id, |_, _| true).ok_or(Rejection::NoGateway)?;
        let (published, request) = self.publish(id, status, deadlines).await?;
        let selection = if !first.confirms || self.await_gateway(&first, &request, deadlines).await {
            Ok(first)
        } else {
            self.next_best(id, &request, deadlines).await
        };
        let selection = match selection {
            Ok(selection) => selection,
            Err(rejection) => return Err(ended(request, status, rejection)),
        };
        if selection.confirms {
            self.confirmed(published);
        }
        Ok(selection)
    }

    /// The gateways that confirmed the key after the previous request for it timed out; used instead of waiting again.
    fn late_confirmations(&self, id: &KeyId) -> BTreeSet<WorkerName> {
        self.in_flight.lock().take_late(id, Instant::now().into_std())
    }

    /// Whether the best gateway confirms the key within its time.
    async fn await_gateway(&self, first: &Selection, request: &PendingRequest, deadlines: Deadlines) -> bool {
        let outcome = request.find(deadlines.timeout, |confirmations| {
            let is_installed = confirmations.installed.contains(&first.worker);
            (is_installed || confirmations.rejected.contains_key(&first.worker)).then_some(is_installed)
        });
        let outcome = outcome.await;
        if outcome.is_none() {
            self.metrics.confirmations_missed.inc();
            if self.gateways().on_timeout(&first.worker, Instant::now().into_std()) {
                warn!(worker = first.worker.as_str(), "gateway did not confirm in time");
            }
        }
        outcome == Some(true)
    }

    /// The best gateway of those that confirmed the key. All received it at the same time, so none is waited for by itself.
    async fn next_best(
        &self,
        id: &KeyId,
        request: &PendingRequest,
        deadlines: Deadlines,
    ) -> Result<Selection, Rejection> {
        let selection = request.find(deadlines.budget, |confirmations| {
            let has_key = |worker: &WorkerName, confirms: bool| !confirms || confirmations.installed.contains(worker);
            if let Some(next) = self.select(id, has_key) {
                return Some(Ok(next));
            }
            let online = self.gateways().online(&id.domain);
            confirmations.is_rejected_by_all(&online).then(|| Err(confirmations.rejection(&online)))
        });
        selection.await.unwrap_or(Err(Rejection::NotConfirmed))
    }

    /// The same for a request.
    fn enter(&self, id: &KeyId) -> Result<(), Rejection> {
        self.ready(id).inspect_err(|rejection| self.log_refused(id, *rejection))
    }

    /// Logs once that a key is refused for what it is: its router asks again for ever.
    fn log_refused(&self, id: &KeyId, rejection: Rejection) {
        let is_of_key = matches!(rejection, Rejection::Denied | Rejection::Reserved | Rejection::AddressTaken);
        let reason = rejection.reason();
        if is_of_key && self.refused.lock().is_due((id.clone(), reason), Instant::now().into_std()) {
            warn!(domain = %id.domain, key = ?id.key, reason, "key refused");
        }
    }

    /// Rejects a key that the access lists deny, and every key until the retained states are complete.
    fn ready(&self, id: &KeyId) -> Result<(), Rejection> {
        if self.lists.borrow().admission.denies(id.domain.name(), &id.key) {
            return Err(Rejection::Denied);
        }
        if self.gateways().is_synced() { Ok(()) } else { Err(Rejection::NotReady) }
    }

    fn can_confirm(&self, id: &KeyId, worker: &WorkerName) -> bool {
        self.gateways().can_confirm(worker, id.domain.name())
    }

    /// The gateway where the router is connected; it only counts while some gateway drains.
    fn home(&self, id: &KeyId) -> Option<WorkerName> {
        let is_any_draining = self.gateways().is_any_draining();
        is_any_draining.then(|| self.live().home(id, Instant::now().into_std()).cloned()).flatten()
    }

    /// The best gateway of those that are `eligible`, none while the retained states are incomplete. The router counts as its
    /// peer from here on, so that requests at the same time spread; if the request fails, the gateway's own next count
    /// corrects that.
    fn select(&self, id: &KeyId, eligible: impl Fn(&WorkerName, bool) -> bool) -> Option<Selection> {
        let home = self.home(id);
        let mut gateways = self.gateways();
        if !gateways.is_synced() {
            return None;
        }
        let selection = gateways.select(router(id, home.as_ref()), eligible)?;
        gateways.on_assigned(&selection.worker, &id.domain);
        Some(selection)
    }

    /// Publishes the key. Returns the start time and the request, which receives every outcome from before the publish on.
    /// Where every gateway confirms, a key that was queued already needs no acknowledgement of its own: the confirmations
    /// follow it.
    async fn publish(
        &self,
        id: &KeyId,
        status: KeyStatus,
        deadlines: Deadlines,
    ) -> Result<(Instant, PendingRequest), Rejection> {
        let begun = Instant::now();
        let Some(request) = self.in_flight.request(id, status.is_established) else {
            self.metrics.publish_failures.inc();
            self.in_flight.lock().timed_out(id, status.is_established, begun.into_std());
            return Err(Rejection::NotPublished);
        };
        let is_published = (request.is_joined() && self.gateways().all_confirm(&id.domain))
            || request.is_published(deadlines.budget).await;
        if is_published {
            return Ok((begun, request));
        }
        self.metrics.publish_failures.inc();
        Err(ended(request, status, Rejection::NotPublished))
    }

    /// Publishes a confirmed key again for the other gateways; best effort.
    fn publish_again(&self, id: &KeyId, status: KeyStatus) {
        self.in_flight.publish(id, status.is_established);
    }

    fn confirmed(&self, published: Instant) {
        self.metrics.confirmation.observe(published.elapsed().as_secs_f64());
    }
}

/// The router of a key that asks now.
fn router<'a>(id: &'a KeyId, home: Option<&'a WorkerName>) -> Router<'a> {
    Router { domain: &id.domain, home, now: Instant::now().into_std() }
}

/// The gateways that confirm keys and have confirmed this one late.
fn has_confirmed(late: &BTreeSet<WorkerName>) -> impl Fn(&WorkerName, bool) -> bool {
    |worker, confirms| confirms && late.contains(worker)
}

/// Ends a request with its rejection. After a timeout, confirmations that are received later are kept for the router's next
/// request.
fn ended(request: PendingRequest, status: KeyStatus, rejection: Rejection) -> Rejection {
    if matches!(rejection, Rejection::NotPublished | Rejection::NotConfirmed) {
        request.timed_out(status.is_established);
    }
    rejection
}

/// Until when a request waits.
#[derive(Debug, Clone, Copy)]
struct Deadlines {
    /// For one gateway.
    timeout: Instant,
    /// For all of them.
    budget: Instant,
}

impl Deadlines {
    fn now(confirm: Confirm) -> Self {
        let at = Instant::now();
        Self { timeout: at + confirm.timeout, budget: at + confirm.budget }
    }
}

impl Confirmations {
    /// Whether every gateway that can confirm the key has rejected it. A gateway whose interface of the domain is down is not
    /// waited for, and its rejection does not count.
    fn is_rejected_by_all(&self, online: &Online) -> bool {
        let mut confirming = online.confirming.iter().peekable();
        confirming.peek().is_some() && confirming.all(|worker| self.rejected.contains_key(worker))
    }

    /// Why no gateway has the key: the reason of all that can confirm it, if it is the same.
    fn rejection(&self, online: &Online) -> Rejection {
        let mut rejections = online
            .confirming
            .iter()
            .map(|worker| self.rejected.get(worker).map_or(Rejection::NotConfirmed, Rejection::from));
        let first = rejections.next().unwrap_or(Rejection::NotConfirmed);
        if rejections.all(|rejection| rejection == first) { first } else { Rejection::NotConfirmed }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use wgkex_common::RejectReason;

    use super::*;

    /// What a router gets whose key two gateways reject, or do not answer.
    fn rejection(first: Option<RejectReason>, second: Option<RejectReason>) -> Rejection {
        let (names, reasons) = (["gw1", "gw2"].map(|name| name.parse().unwrap()), [first, second]);
        let rejected = names.iter().cloned().zip(reasons).filter_map(|(name, reason)| Some((name, reason?))).collect();
        let online = Online { confirming: BTreeSet::from(names), legacy: BTreeSet::new() };
        Confirmations { installed: BTreeSet::new(), rejected }.rejection(&online)
    }

    #[test]
    fn a_reason_that_all_gateways_have_is_the_routers_answer() {
        use RejectReason::{AddressTaken, Denied, Full, Interface, Kernel, Other, OwnKey, Reserved};
        for (first, second, expected) in [
            (AddressTaken, AddressTaken, Rejection::AddressTaken),
            (OwnKey, Reserved, Rejection::Reserved),
            (Denied, Denied, Rejection::Denied),
            (Full, Full, Rejection::Full),
            (Full, Denied, Rejection::NotConfirmed),
            (Kernel, Interface, Rejection::NotConfirmed),
            (Other("new".into()), Other("new".into()), Rejection::NotConfirmed),
        ] {
            assert_eq!(rejection(Some(first), Some(second)), expected);
        }
        assert_eq!(rejection(Some(Full), None), Rejection::NotConfirmed);
    }
}
