//! The road of one key through the broker: checked, published, and answered when a gateway has it.
//!
//! A key comes from [`crate::http`]. [`in_flight`] owns its state, behind the handle of [`keys`]; the task of [`publisher`]
//! hands it to MQTT, and [`crate::bus`] brings what gateways made of it. One request is one future here.

pub mod in_flight;
pub mod keys;
mod metrics;
pub mod publisher;
pub mod rate_limit;

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
use crate::exchange::rate_limit::{Limit, Limited, Limits};
use crate::fleet::gateways::{Choice, Gateways, Online};
use crate::fleet::live_keys::LiveKeys;

pub use self::in_flight::KeyId;
pub use self::metrics::Metrics;

/// Why a router's request is not met. The text is for the router's owner and shows nothing that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The body is not what it should be.
    #[error("{0}")]
    Body(&'static str),
    /// The body is larger than any request can be.
    #[error("the body is too large: at most 4096 bytes are allowed")]
    TooLarge,
    /// The body did not arrive in time.
    #[error("the body did not arrive in time")]
    Slow,
    /// The domain is not served.
    #[error("domain: this is not a domain that is served here")]
    Domain,
    /// The key cannot be used.
    #[error("public_key: {0}")]
    Key(wgkex_common::KeyError),
    /// The key is a gateway's, or derives a gateway's address.
    #[error("public_key: this key is not accepted, it or its address is a gateway's")]
    Reserved,
    /// Another key has the address that this one derives.
    #[error("public_key: the address of this key is another's at the moment")]
    AddressTaken,
    /// The key is not known, and came too often or with too many others.
    #[error("{}, try again later", too_many(.0.limit))]
    Limited(Limited),
    /// No gateway has room for a new key.
    #[error("the gateways have no room for new keys at the moment, try again later")]
    Full,
    /// The lists do not let the key come; which one, and why, is not for its owner.
    #[error("this key is not accepted here")]
    Denied,
    /// This broker cannot serve now; the reason is its state.
    #[error("no connection to the gateways at the moment, try again later")]
    NotReady,
    /// No gateway of the domain is online.
    #[error("no gateway of this domain is online, try again later")]
    NoGateway,
    /// MQTT did not take the key in time.
    #[error("the key could not be passed on in time, try again later")]
    NotPublished,
    /// No gateway said in time that it has the key.
    #[error("no gateway confirmed the key in time, try again later")]
    NotConfirmed,
}

impl Refusal {
    /// Every reason that metrics name.
    pub const REASONS: [&str; 17] = [
        "body",
        "too_large",
        "slow",
        "domain",
        "key",
        "reserved",
        "address_taken",
        "not_ready",
        "no_gateway",
        "not_published",
        "not_confirmed",
        "limit_key",
        "limit_client",
        "limit_domain",
        "limit_global",
        "denied",
        "full",
    ];

    /// One word for metrics, from [`Refusal::REASONS`].
    #[must_use]
    pub fn reason(self) -> &'static str {
        let index = match self {
            Self::Body(_) => 0,
            Self::TooLarge => 1,
            Self::Slow => 2,
            Self::Domain => 3,
            Self::Key(_) => 4,
            Self::Reserved => 5,
            Self::AddressTaken => 6,
            Self::NotReady => 7,
            Self::NoGateway => 8,
            Self::NotPublished => 9,
            Self::NotConfirmed => 10,
            Self::Limited(Limited { limit: Limit::Key, .. }) => 11,
            Self::Limited(Limited { limit: Limit::Client, .. }) => 12,
            Self::Limited(Limited { limit: Limit::Domain, .. }) => 13,
            Self::Limited(Limited { limit: Limit::Global, .. }) => 14,
            Self::Denied => 15,
            Self::Full => 16,
        };
        Self::REASONS[index]
    }
}

fn too_many(limit: Limit) -> &'static str {
    match limit {
        Limit::Key => "this key came too often",
        Limit::Client => "too many new keys from this address",
        Limit::Domain => "too many new keys of this domain",
        Limit::Global => "too many new keys at the moment",
    }
}

/// How a key stands with this broker when it comes.
#[derive(Debug, Clone, Copy)]
struct Standing {
    /// It shook hands at a gateway.
    is_proven: bool,
    /// It was sent before, and comes oftener than a router needs.
    is_hasty: bool,
}

impl KeyId {
    /// Reads a router's request (contract section 1): JSON, whatever else it has.
    pub fn parse(body: &[u8], domains: &BTreeSet<Domain>) -> Result<Self, Refusal> {
        let json: serde_json::Value =
            serde_json::from_slice(body).map_err(|_| Refusal::Body("the body is not valid JSON"))?;
        let object = json.as_object().ok_or(Refusal::Body("the body is not a JSON object"))?;
        let text = |name, missing| object.get(name).and_then(|value| value.as_str()).ok_or(Refusal::Body(missing));
        let domain = text("domain", "domain: a text is expected")?;
        let key = text("public_key", "public_key: a text is expected")?;
        let domain = domains.get(domain).cloned().ok_or(Refusal::Domain)?;
        Ok(Self { domain, key: key.parse().map_err(Refusal::Key)? })
    }
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
    pub async fn announce(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<(), Refusal> {
        self.ready(id)?;
        let standing = self.standing(id, client)?;
        if standing.is_hasty && self.told(id).is_some() {
            // What was true then may not be so any more.
            return if self.gateways().are_offline(&id.domain) { Err(Refusal::NoGateway) } else { Ok(()) };
        }
        self.announce_anew(id, standing).await?;
        self.keep(id, standing, None);
        Ok(())
    }

    /// Version 2: returns the gateway that the router is to use, with the key in its kernel if it is one that says so.
    pub async fn assign(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<WorkerData, Refusal> {
        self.ready(id)?;
        let standing = self.standing(id, client)?;
        if standing.is_hasty
            && let Some(Answer { worker: Some(worker), .. }) = self.told(id)
            && let Some(choice) = self.gateways().choose(&id.domain, |name, _| *name == worker)
        {
            return Ok(choice.data);
        }
        let choice = self.assign_anew(id, standing).await?;
        self.keep(id, standing, Some(choice.worker));
        Ok(choice.data)
    }

    /// How the key stands, if it may come now.
    fn standing(&self, id: &KeyId, client: impl FnOnce() -> Client) -> Result<Standing, Refusal> {
        let proven = self.live().is_proven(&id.domain, &id.key);
        if proven.is_none() {
            self.limits.admit(&id.key, client, id.domain.name()).map_err(Refusal::Limited)?;
        }
        self.admit(id)?;
        let is_hasty = proven.is_some() && self.limits.repeat(&id.key, id.domain.name()).is_err();
        Ok(Standing { is_proven: proven == Some(true), is_hasty })
    }

    /// Whether the key may be a router's, and its address is nobody else's.
    fn admit(&self, id: &KeyId) -> Result<(), Refusal> {
        let is_routers = self.live().is_routers(&id.key);
        let refusal = if self.gateways().forbids(&id.key, is_routers) {
            Refusal::Reserved
        } else if self.live().is_taken(id.domain.name(), id.key, Instant::now().into_std()) {
            Refusal::AddressTaken
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

    async fn announce_anew(&self, id: &KeyId, standing: Standing) -> Result<(), Refusal> {
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
        let until = if online.others.is_empty() { deadlines.budget } else { deadlines.timeout };
        let is_installed = request.find(until, |confirmations| {
            let is_rejected = || confirmations.is_rejected_by_all(&self.gateways().online(&id.domain));
            if confirmations.installed.is_empty() { is_rejected().then_some(false) } else { Some(true) }
        });
        if is_installed.await == Some(true) {
            self.confirmed(published);
            return Ok(());
        }
        if !online.others.is_empty() {
            return Ok(());
        }
        let refusal = request.confirmations().refusal(&self.gateways().online(&id.domain));
        Err(refused(request, standing, refusal))
    }

    /// The key is published, and no gateway of its domain is online. Workers that only subscribe say nothing of themselves:
    /// where none ever did, there may be some.
    fn unserved(&self, id: &KeyId) -> Result<(), Refusal> {
        if self.gateways().is_known(&id.domain) {
            return Err(Refusal::NoGateway);
        }
        if self.unwitnessed.lock().insert(id.domain.clone()) {
            warn!(domain = %id.domain, "no gateway has ever published its state: v1 keys are answered once MQTT took them");
        }
        self.metrics.keys_unwitnessed.inc();
        Ok(())
    }

    async fn assign_anew(&self, id: &KeyId, standing: Standing) -> Result<Choice, Refusal> {
        let deadlines = Deadlines::now(self.confirm);
        let took = self.took(id);
        if !took.is_empty()
            && let Some(choice) = self.choose(id, |worker, confirms| confirms && took.contains(worker))
        {
            self.publish_again(id, standing);
            return Ok(choice);
        }
        let first = self.choose(id, |_, _| true).ok_or(Refusal::NoGateway)?;
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
    async fn takes(&self, first: &Choice, request: &Request, deadlines: Deadlines) -> bool {
        let outcome = request.find(deadlines.timeout, |confirmations| {
            let is_installed = confirmations.installed.contains(&first.worker);
            (is_installed || confirmations.rejected.contains_key(&first.worker)).then_some(is_installed)
        });
        let outcome = outcome.await;
        if outcome.is_none() {
            warn!(worker = first.worker.as_str(), "gateway did not confirm in time");
            self.metrics.confirmations_missed.inc();
            self.gateways().silent(&first.worker);
        }
        outcome == Some(true)
    }

    /// The best of those that have the key. All got it at the same time, so none is waited for by itself.
    async fn next_best(&self, id: &KeyId, request: &Request, deadlines: Deadlines) -> Result<Choice, Refusal> {
        let choice = request.find(deadlines.budget, |confirmations| {
            let has_key = |worker: &WorkerName, confirms: bool| !confirms || confirmations.installed.contains(worker);
            if let Some(next) = self.choose(id, has_key) {
                return Some(Ok(next));
            }
            let online = self.gateways().online(&id.domain);
            confirmations.is_rejected_by_all(&online).then(|| Err(confirmations.refusal(&online)))
        });
        choice.await.unwrap_or(Err(Refusal::NotConfirmed))
    }

    /// Whether this broker can take the key now: it has heard the retained states, and the lists let the key come.
    fn ready(&self, id: &KeyId) -> Result<(), Refusal> {
        if self.lists.borrow().admission.denies(id.domain.name(), &id.key) {
            return Err(Refusal::Denied);
        }
        if self.gateways().complete() { Ok(()) } else { Err(Refusal::NotReady) }
    }

    /// Whether `worker` is waited for, and its word on the key counts.
    fn can_take(&self, id: &KeyId, worker: &WorkerName) -> bool {
        self.gateways().can_take(worker, id.domain.name())
    }

    /// The best gateway that fits. It counts as answered from here on, so that requests at the same time spread; if it
    /// comes to nothing, the gateway's own next count sets that right.
    fn choose(&self, id: &KeyId, fits: impl Fn(&WorkerName, bool) -> bool) -> Option<Choice> {
        let mut gateways = self.gateways();
        let choice = gateways.choose(&id.domain, fits)?;
        gateways.assigned(&choice.worker, &id.domain);
        Some(choice)
    }

    /// Publishes the key, and returns when that began, with the request that waits since before that. Where every gateway
    /// confirms, a key that was queued already needs no acknowledgement: their outcomes tell of it.
    async fn publish(
        &self,
        id: &KeyId,
        standing: Standing,
        deadlines: Deadlines,
    ) -> Result<(Instant, Request), Refusal> {
        let begun = Instant::now();
        let Some(request) = self.keys.request(id, standing.is_proven) else {
            self.metrics.publish_failures.inc();
            self.keys.lock().timed_out(id, standing.is_proven, begun.into_std());
            return Err(Refusal::NotPublished);
        };
        let is_published = (request.is_joined() && self.gateways().all_confirm(&id.domain))
            || request.is_published(deadlines.budget).await;
        if is_published {
            return Ok((begun, request));
        }
        self.metrics.publish_failures.inc();
        Err(refused(request, standing, Refusal::NotPublished))
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
fn refused(request: Request, standing: Standing, refusal: Refusal) -> Refusal {
    if matches!(refusal, Refusal::NotPublished | Refusal::NotConfirmed) {
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
    fn refusal(&self, online: &Online) -> Refusal {
        let is_refused_by_all = self.is_rejected_by_all(online);
        let reasons = || online.confirming.iter().filter_map(|worker| self.rejected.get(worker));
        let all = |reason: &RejectReason| is_refused_by_all && reasons().all(|other| other == reason);
        match () {
            () if all(&RejectReason::AddressTaken) => Refusal::AddressTaken,
            () if all(&RejectReason::Reserved) => Refusal::Reserved,
            () if all(&RejectReason::Denied) => Refusal::Denied,
            () if all(&RejectReason::Full) => Refusal::Full,
            () => Refusal::NotConfirmed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    #[test]
    fn a_routers_request_is_read_as_the_original_reads_it() {
        let domains: BTreeSet<_> = [Domain::new("ff_a", &["ff_".into()]).unwrap()].into();
        let parse = |body: &str| KeyId::parse(body.as_bytes(), &domains);
        let id = KeyId { domain: domains.first().unwrap().clone(), key: KEY.parse().unwrap() };
        for body in [
            format!(r#"{{"domain":"ff_a","public_key":"{KEY}"}}"#),
            format!(r#" {{ "public_key" : "{KEY}" , "domain" : "ff_a" , "location": null }} "#),
            format!(r#"{{"domain":"x","domain":"ff_a","public_key":"{KEY}"}}"#),
            format!(r#"{{"domain":"ff\u005fa","public_key":"{KEY}"}}"#),
        ] {
            assert_eq!(parse(&body), Ok(id.clone()), "{body}");
        }
        for (body, reason) in [
            (String::new(), "body"),
            ("x".into(), "body"),
            ("null".into(), "body"),
            ("[]".into(), "body"),
            ("{}".into(), "body"),
            (format!("domain=ff_a&public_key={KEY}"), "body"),
            (format!(r#"{{"domain":1,"public_key":"{KEY}"}}"#), "body"),
            (r#"{"domain":"ff_a","public_key":null}"#.into(), "body"),
            (format!(r#"{{"domain":"ff_b","public_key":"{KEY}"}}"#), "domain"),
            (format!(r#"{{"domain":"","public_key":"{KEY}"}}"#), "domain"),
            (r#"{"domain":"ff_a","public_key":""}"#.into(), "key"),
            (format!(r#"{{"domain":"ff_a","public_key":"{KEY}\n"}}"#), "key"),
            (r#"{"domain":"ff_a","public_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#.into(), "key"),
            ("[".repeat(4096), "body"),
        ] {
            let refusal = parse(&body).unwrap_err();
            assert_eq!(refusal.reason(), reason, "{body}");
            assert!(!refusal.to_string().contains("ff_b"), "what was sent is not echoed");
        }
    }
}
