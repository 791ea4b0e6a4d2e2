//! The answer to a router's request: one future per request, from its check to the gateway that confirms its key.
//!
//! The previous stop is [`crate::http`]; the next ones are [`crate::fleet`], which selects the gateway, and
//! [`in_flight`](super::in_flight), whose publication the future waits for.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
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
use crate::exchange::in_flight::{CachedAnswer, Confirmations};
use crate::exchange::rate_limit::{Limited, RateLimits};
use crate::exchange::{Metrics, Rejection};
use crate::fleet::gateways::Online;
use crate::fleet::selection::Selection;
use crate::fleet::status::GatewayRating;
use crate::fleet::{Choice, Fleet, KeyConflict};

/// The state of a key when a request for it begins.
#[derive(Debug, Clone, Copy)]
struct KnownKey {
    /// It has had a handshake at some gateway.
    is_established: bool,
    /// It is known, and is requested more often than a router needs.
    is_too_frequent: bool,
}

/// The outcome that a request would have.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpectedAnswer {
    /// Why it would be rejected at once.
    pub rejection: Option<Rejection>,
    /// The gateway that it would be given first; version 1 gives none.
    pub gateway: Option<WorkerName>,
    /// Whether that is the best gateway of those that confirmed the key after the previous request timed out.
    pub is_late: bool,
    /// Each gateway in the choice, or why it is not.
    pub standings: Vec<GatewayRating>,
}

/// Answers routers. Clones share everything.
#[derive(Clone)]
pub struct Exchange {
    /// The gateways, and the keys that brokers remember.
    pub fleet: Fleet,
    /// The keys in flight.
    pub in_flight: InFlightHandle,
    /// The rate limits of unknown keys.
    pub limits: Arc<RateLimits>,
    /// The domains that were logged as having no gateway that ever published its state.
    pub warned_domains: Arc<Mutex<BTreeSet<Domain>>>,
    /// The keys that were logged as refused, with the reason.
    pub refused: Arc<Mutex<LoggedOnce<(KeyId, &'static str)>>>,
    /// Which keys the access lists admit.
    pub lists: watch::Receiver<ListSnapshot>,
    /// How long an answer may wait.
    pub confirm: Confirm,
    /// The metrics.
    pub metrics: Metrics,
}

impl Exchange {
    /// Version 1: the router chooses its gateway itself, so its key is published whether or not gateways are known.
    /// Returns when a gateway has confirmed the key; where none does that, when the MQTT server has acknowledged it.
    pub async fn exchange_v1(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<(), Rejection> {
        self.require_ready_or_log(id)?;
        let status = self.status(id, client)?;
        if status.is_too_frequent && self.cached(id).is_some() {
            // The gateways may have gone offline since that answer.
            return if self.fleet.gateways().are_offline(&id.domain) { Err(Rejection::NoGateway) } else { Ok(()) };
        }
        self.uncached_v1(id, status).await?;
        self.cache(id, status, None);
        Ok(())
    }

    /// Version 2: returns the gateway that the router is to use. If it is one that confirms, the key is in its kernel.
    pub async fn exchange_v2(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<WorkerData, Rejection> {
        self.require_ready_or_log(id)?;
        let status = self.status(id, client)?;
        if status.is_too_frequent
            && let Some(CachedAnswer { worker: Some(worker), .. }) = self.cached(id)
            && let Some(selection) = self.fleet.select_again(id, &worker, now())
        {
            return Ok(selection.data);
        }
        let selection = self.uncached_v2(id, status).await?;
        self.fleet.on_given(id, &selection.worker, now());
        self.cache(id, status, Some(selection.worker));
        Ok(selection.data)
    }

    /// The state of the key, if a request for it is admitted now.
    fn status(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<KnownKey, Rejection> {
        let established = self.admit(id, || self.limits.check(&id.key, client, id.domain.name()));
        let established = established.inspect_err(|rejection| self.log_refused(id, *rejection))?;
        let is_too_frequent = established.is_some() && self.limits.check_key(&id.key, id.domain.name()).is_err();
        Ok(KnownKey { is_established: established == Some(true), is_too_frequent })
    }

    /// Whether the key has had a handshake, if it is known and its request is admitted. `limit` is called for an
    /// unknown key.
    fn admit(&self, id: &KeyId, limit: impl FnOnce() -> Result<(), Limited>) -> Result<Option<bool>, Rejection> {
        let established = self.fleet.is_established(id);
        if established.is_none() {
            limit()?;
        }
        match self.fleet.conflict(id, now()) {
            None => Ok(established),
            Some(KeyConflict::Reserved) => Err(Rejection::Reserved),
            Some(KeyConflict::AddressTaken) => Err(Rejection::AddressTaken),
        }
    }

    /// The outcome that a request for the key would have now, by the checks and the choice that serve requests. Nothing
    /// is counted, published or logged.
    #[must_use]
    pub fn expected_answer(&self, id: &KeyId) -> ExpectedAnswer {
        let admitted =
            self.require_ready(id).and_then(|()| self.admit(id, || self.limits.peek(&id.key, id.domain.name())));
        let late = self.in_flight.lock().late(id, now());
        let Choice { preferred, best, standings } = self.fleet.choice(id, has_confirmed(&late), now());
        let (is_late, gateway) = (preferred.is_some(), preferred.or(best));
        let rejection = admitted.err().or(gateway.is_none().then_some(Rejection::NoGateway));
        ExpectedAnswer { rejection, gateway, is_late, standings }
    }

    fn cached(&self, id: &KeyId) -> Option<CachedAnswer> {
        self.in_flight.lock().cached(id, now()).cloned()
    }

    fn cache(&self, id: &KeyId, status: KnownKey, worker: Option<WorkerName>) {
        if status.is_too_frequent {
            self.in_flight.lock().cache(id, worker, now());
        }
    }

    async fn uncached_v1(&self, id: &KeyId, status: KnownKey) -> Result<(), Rejection> {
        let deadlines = Deadlines::now(self.confirm);
        if self.late_confirmations(id).iter().any(|worker| self.can_confirm(id, worker)) {
            self.publish_again(id, status);
            return Ok(());
        }
        let (published, request) = self.publish(id, status, deadlines).await?;
        let Some(online) = self.fleet.online(&id.domain) else {
            return Err(ended(request, status, Rejection::NotConfirmed));
        };
        if online.is_empty() {
            return self.no_gateway(id);
        }
        if online.confirming.is_empty() {
            return Ok(());
        }
        // An original that is online has the key by now as well and confirms nothing: the router may use that one.
        let until = if online.legacy.is_empty() { deadlines.budget } else { deadlines.timeout };
        let is_installed = request.find(until, |confirmations| {
            let is_rejected = || confirmations.is_rejected_by_all(&self.fleet.gateways().online(&id.domain));
            if confirmations.installed.is_empty() { is_rejected().then_some(false) } else { Some(true) }
        });
        if is_installed.await == Some(true) {
            self.confirmed(published);
            return Ok(());
        }
        if !online.legacy.is_empty() {
            return Ok(());
        }
        let rejection = request.confirmations().rejection(&self.fleet.gateways().online(&id.domain));
        Err(ended(request, status, rejection))
    }

    /// The key is published, and no gateway of its domain is online. Workers before v0.2.0 publish no state: a domain
    /// without any published state may have such workers.
    fn no_gateway(&self, id: &KeyId) -> Result<(), Rejection> {
        if self.fleet.gateways().is_known(&id.domain) {
            return Err(Rejection::NoGateway);
        }
        if self.warned_domains.lock().insert(id.domain.clone()) {
            warn!(domain = %id.domain, "no gateway has ever published its state: v1 requests get 200 without a gateway's confirmation");
        }
        self.metrics.keys_unwitnessed.inc();
        Ok(())
    }

    async fn uncached_v2(&self, id: &KeyId, status: KnownKey) -> Result<Selection, Rejection> {
        let deadlines = Deadlines::now(self.confirm);
        let late = self.late_confirmations(id);
        if !late.is_empty()
            && let Some(selection) = self.fleet.select(id, has_confirmed(&late), now())
        {
            self.publish_again(id, status);
            return Ok(selection);
        }
        let first = self.fleet.select(id, |_, _| true, now()).ok_or(Rejection::NoGateway)?;
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
        self.in_flight.lock().take_late(id, now())
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
            if self.fleet.gateways().on_timeout(&first.worker, now()) {
                warn!(worker = first.worker.as_str(), "gateway did not confirm in time");
            }
        }
        outcome == Some(true)
    }

    /// The best gateway of those that confirmed the key. All received it at the same time, so they are not awaited one
    /// after the other.
    async fn next_best(
        &self,
        id: &KeyId,
        request: &PendingRequest,
        deadlines: Deadlines,
    ) -> Result<Selection, Rejection> {
        let selection = request.find(deadlines.budget, |confirmations| {
            let has_key = |worker: &WorkerName, confirms: bool| !confirms || confirmations.installed.contains(worker);
            if let Some(next) = self.fleet.select(id, has_key, now()) {
                return Some(Ok(next));
            }
            let online = self.fleet.gateways().online(&id.domain);
            confirmations.is_rejected_by_all(&online).then(|| Err(confirmations.rejection(&online)))
        });
        selection.await.unwrap_or(Err(Rejection::NotConfirmed))
    }

    /// The same as [`Self::require_ready`]; a rejection is logged.
    fn require_ready_or_log(&self, id: &KeyId) -> Result<(), Rejection> {
        self.require_ready(id).inspect_err(|rejection| self.log_refused(id, *rejection))
    }

    /// Logs once that a key is refused for a reason that lasts: its router repeats the request for ever.
    fn log_refused(&self, id: &KeyId, rejection: Rejection) {
        let is_of_key = matches!(rejection, Rejection::Denied | Rejection::Reserved | Rejection::AddressTaken);
        let reason = rejection.reason();
        if is_of_key && self.refused.lock().is_due((id.clone(), reason), now()) {
            warn!(domain = %id.domain, key = ?id.key, reason, "key refused");
        }
    }

    /// Rejects a key that the access lists deny, and every key until the retained states are complete.
    fn require_ready(&self, id: &KeyId) -> Result<(), Rejection> {
        if self.lists.borrow().admission.denies(id.domain.name(), &id.key) {
            return Err(Rejection::Denied);
        }
        if self.fleet.gateways().is_synced() { Ok(()) } else { Err(Rejection::NotReady) }
    }

    fn can_confirm(&self, id: &KeyId, worker: &WorkerName) -> bool {
        self.fleet.gateways().can_confirm(worker, id.domain.name())
    }

    /// Publishes the key. Returns the start time and the request, which receives every outcome from before the publish on.
    /// Where every gateway confirms, a key that was queued already needs no acknowledgement of its own: the confirmations
    /// follow it.
    async fn publish(
        &self,
        id: &KeyId,
        status: KnownKey,
        deadlines: Deadlines,
    ) -> Result<(Instant, PendingRequest), Rejection> {
        let begun = Instant::now();
        let Some(request) = self.in_flight.request(id, status.is_established) else {
            self.metrics.publish_failures.inc();
            self.in_flight.lock().timed_out(id, status.is_established, begun.into_std());
            return Err(Rejection::NotPublished);
        };
        let is_published = (request.is_joined() && self.fleet.gateways().all_confirm(&id.domain))
            || request.is_published(deadlines.budget).await;
        if is_published {
            return Ok((begun, request));
        }
        self.metrics.publish_failures.inc();
        Err(ended(request, status, Rejection::NotPublished))
    }

    /// Publishes a confirmed key again for the other gateways; best effort.
    fn publish_again(&self, id: &KeyId, status: KnownKey) {
        self.in_flight.publish(id, status.is_established);
    }

    fn confirmed(&self, published: Instant) {
        self.metrics.confirmation.observe(published.elapsed().as_secs_f64());
    }
}

/// The time for modules without a clock.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// The gateways that confirm keys and have confirmed this one late.
fn has_confirmed(late: &BTreeSet<WorkerName>) -> impl Fn(&WorkerName, bool) -> bool {
    |worker, confirms| confirms && late.contains(worker)
}

/// Ends a request with its rejection. After a timeout, confirmations that are received later are kept for the router's next
/// request.
fn ended(request: PendingRequest, status: KnownKey, rejection: Rejection) -> Rejection {
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

    /// The answer to a router whose key two gateways reject, or do not report.
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
