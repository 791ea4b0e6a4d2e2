//! Admin calls that only read: where a key is, and the outcome that a request for it would have. Both have one type for
//! the answer and for the command that prints it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use actix_web::ResponseError as _;
use serde::{Deserialize, Serialize};
use wgkex_common::access_lists::Verdict;
use wgkex_common::access_lists::service::ListedEntry;
use wgkex_common::{Domain, KeyId, PublicKey};

use crate::exchange::in_flight::FlightTrace;
use crate::exchange::{Exchange, ExpectedAnswer, Rejection};
use crate::fleet::key_locations::NamedLocations;
use crate::fleet::live_keys::{KeyState, KeyTrace};
use crate::fleet::status::GatewayRating;

/// Where a key is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhereReport {
    /// The key.
    pub key: PublicKey,
    /// The domains in which something is known of it, or an access list has it.
    pub domains: Vec<KeyInDomain>,
    /// The entries of access lists that have it.
    pub lists: Vec<ListedKey>,
}

/// The known state of a key in a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInDomain {
    /// The domain's name.
    pub domain: String,
    /// Its state; none if no router sent it and no gateway reports it.
    pub state: Option<KeyState>,
    /// Its admission by the access lists of this broker.
    pub access: KeyAdmission,
    /// How many seconds ago this run of the broker first received it.
    pub first_secs: Option<u64>,
    /// How many seconds ago a router last sent it, or it last had a handshake.
    pub last_secs: Option<u64>,
    /// How many seconds ago its last handshake was.
    pub last_handshake_secs: Option<u64>,
    /// The gateway that reported it last.
    pub last_handshake_at: Option<String>,
    /// The gateways that confirmed it since this broker started.
    pub confirmed_by: Vec<Confirming>,
    /// How many seconds ago the last one did.
    pub confirmed_secs: Option<u64>,
    /// Where it is on its way, if it is.
    pub in_flight: Option<InFlightKey>,
}

/// A gateway that has confirmed a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirming {
    /// The gateway's name.
    pub gateway: String,
    /// Whether it is online.
    pub online: bool,
}

/// The admission of a key by the access lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyAdmission {
    /// It is admitted.
    Allowed,
    /// It is admitted, and never swept.
    Trusted,
    /// Only listed keys are admitted, and it is none.
    NotAllowlisted,
    /// It is denied.
    Denied,
}

/// A key on its way from a request to its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlightKey {
    /// For how many seconds it has waited to be published.
    pub queued_secs: Option<u64>,
    /// Publications that the MQTT server has not acknowledged.
    pub unacknowledged: usize,
    /// Requests that wait for it.
    pub waiting: usize,
    /// How many seconds ago a request for it timed out; later confirmations answer the next one.
    pub late_secs: Option<u64>,
    /// The outcomes that gateways reported: `installed`, or why not.
    pub outcomes: BTreeMap<String, String>,
}

/// An entry of an access list, as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedKey {
    /// The list.
    pub list: String,
    /// The key of the config that names its list; `admin` for an admin call.
    pub source: String,
    /// The only domain in which it counts.
    pub domain: Option<String>,
    /// The name of the node.
    pub name: Option<String>,
    /// Why it is there.
    pub reason: Option<String>,
    /// When it ends, in seconds of Unix time.
    pub until: Option<u64>,
}

/// The outcome that a request for a key would have in each of some domains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExplainReport {
    /// The key.
    pub key: PublicKey,
    /// In each domain.
    pub domains: Vec<ExplainedDomain>,
    /// Where it is now.
    #[serde(rename = "where")]
    pub now: WhereReport,
}

/// The outcome that a request for a key would have in a domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExplainedDomain {
    /// The domain's name.
    pub domain: String,
    /// Why it would be rejected at once.
    pub refused: Option<ExplainedRejection>,
    /// The gateway that version 2 would name, or await first.
    pub gateway: Option<String>,
    /// Why that one.
    pub why: Option<String>,
    /// The limits of new keys would count; that of the router's address cannot be looked at.
    pub is_new: bool,
    /// Each gateway in the choice.
    pub standings: Vec<GatewayRating>,
}

/// A rejection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedRejection {
    /// The HTTP status.
    pub status: u16,
    /// The word of the metrics.
    pub reason: String,
    /// The answer that the router would get.
    pub message: String,
    /// The details for the operator.
    pub detail: String,
}

/// Where `key` is, in each of `domains`. `listed` are the entries of the access lists that have it.
#[must_use]
pub fn find(exchange: &Exchange, domains: &BTreeSet<Domain>, key: PublicKey, listed: Vec<ListedEntry>) -> WhereReport {
    let now = Instant::now();
    let traces: BTreeMap<_, _> =
        exchange.fleet.live().trace(&key, now).into_iter().map(|trace| (trace.domain.clone(), trace)).collect();
    let lists: Vec<_> = listed.into_iter().filter(|entry| entry.entry.key == key).map(ListedKey::from).collect();
    let admission = exchange.lists.borrow().admission.clone();
    let is_listed_in =
        |domain: &str| lists.iter().any(|listed| listed.domain.as_ref().is_none_or(|listed| listed == domain));
    let in_domain = |domain: &Domain| {
        let id = KeyId { domain: domain.clone(), key };
        let (trace, flight) = (traces.get(domain), exchange.in_flight.lock().trace(&id, now));
        if trace.is_none() && flight.is_none() && !is_listed_in(domain.name()) {
            return None;
        }
        let access = match admission.verdict(domain.name(), &key) {
            Verdict::Denied => KeyAdmission::Denied,
            Verdict::NotAllowlisted => KeyAdmission::NotAllowlisted,
            Verdict::Allowed if admission.trusts(&key) => KeyAdmission::Trusted,
            Verdict::Allowed => KeyAdmission::Allowed,
        };
        Some(KeyInDomain::new(domain, access, trace, flight, exchange))
    };
    WhereReport { key, domains: domains.iter().filter_map(in_domain).collect(), lists }
}

/// The outcome that a request for `key` would have in each of `domains`.
#[must_use]
pub fn explain(exchange: &Exchange, domains: &BTreeSet<Domain>, now: WhereReport) -> ExplainReport {
    let key = now.key;
    let explained = |domain: &Domain| {
        let id = KeyId { domain: domain.clone(), key };
        let (expected_answer, is_new) = (exchange.expected_answer(&id), exchange.fleet.is_established(&id).is_none());
        ExplainedDomain::new(domain, expected_answer, is_new, &now, exchange)
    };
    ExplainReport { key, domains: domains.iter().map(explained).collect(), now }
}

impl KeyInDomain {
    fn new(
        domain: &Domain,
        access: KeyAdmission,
        trace: Option<&KeyTrace>,
        flight: Option<FlightTrace>,
        exchange: &Exchange,
    ) -> Self {
        let secs = |duration: Option<Duration>| duration.map(|duration| duration.as_secs());
        let NamedLocations { confirmed, confirmed_ago, handshakes } =
            trace.map(|trace| trace.locations.clone()).unwrap_or_default();
        let gateways = exchange.fleet.gateways();
        let confirmed_by = confirmed.iter().map(|worker| Confirming {
            gateway: worker.as_str().into(),
            online: gateways.has_online(worker, domain.name()),
        });
        Self {
            domain: domain.to_string(),
            state: trace.map(|trace| trace.state),
            access,
            first_secs: secs(trace.and_then(|trace| trace.first)),
            last_secs: secs(trace.map(|trace| trace.last)),
            last_handshake_secs: secs(trace.and_then(|trace| trace.last_handshake)),
            last_handshake_at: handshakes.map(String::from),
            confirmed_by: confirmed_by.collect(),
            confirmed_secs: secs(confirmed_ago),
            in_flight: flight.map(InFlightKey::from),
        }
    }
}

impl From<FlightTrace> for InFlightKey {
    fn from(FlightTrace { queued, unacknowledged, waiting, late, outcomes }: FlightTrace) -> Self {
        let outcome = |result: Result<(), wgkex_common::RejectReason>| match result {
            Ok(()) => "installed".to_owned(),
            Err(reason) => reason.to_string(),
        };
        Self {
            queued_secs: queued.map(|queued| queued.as_secs()),
            unacknowledged,
            waiting,
            late_secs: late.map(|late| late.as_secs()),
            outcomes: outcomes.into_iter().map(|(worker, result)| (worker.into(), outcome(result))).collect(),
        }
    }
}

impl From<ListedEntry> for ListedKey {
    fn from(ListedEntry { entry, source, since: _ }: ListedEntry) -> Self {
        Self {
            list: entry.list.name().into(),
            source: source.into(),
            domain: entry.domain,
            name: entry.name,
            reason: entry.reason,
            until: entry.until,
        }
    }
}

impl ExplainedDomain {
    fn new(
        domain: &Domain,
        expected_answer: ExpectedAnswer,
        is_new: bool,
        now: &WhereReport,
        exchange: &Exchange,
    ) -> Self {
        let ExpectedAnswer { rejection, gateway, is_late, standings } = expected_answer;
        let chosen = gateway.as_ref().and_then(|name| standings.iter().find(|each| each.name == name.as_str()));
        let why = chosen.map(|chosen| match chosen.last_resort.as_ref().or(chosen.note.as_ref()) {
            _ if is_late => {
                "it is the best of those that confirmed the key after the last request timed out".to_owned()
            }
            Some(reason) if chosen.last_resort.is_some() => format!("there is no other: {reason}"),
            Some(note) => note.clone(),
            None => format!("it is the furthest below its target: {:+.1}", chosen.distance),
        });
        let refused = rejection.map(|rejection| ExplainedRejection {
            status: rejection.status_code().as_u16(),
            reason: rejection.reason().into(),
            message: rejection.to_string(),
            detail: detail(rejection, domain, now, exchange),
        });
        Self { domain: domain.to_string(), refused, gateway: gateway.map(String::from), why, is_new, standings }
    }
}

/// The details of a rejection for the operator, without any other key.
fn detail(rejection: Rejection, domain: &Domain, now: &WhereReport, exchange: &Exchange) -> String {
    if rejection == Rejection::Denied {
        let denied = now.lists.iter().filter(|listed| listed.list == "deny");
        let by: Vec<_> = denied.map(|listed| listed.source.as_str()).collect();
        return if by.is_empty() {
            "it is not on the list allow, and only listed keys may come (allowlist.enabled)".into()
        } else {
            format!("it is on the list deny by {}", by.join(", "))
        };
    }
    let is_listed = || exchange.fleet.gateways().is_reserved(&now.key, true);
    match rejection {
        Rejection::Reserved if is_listed() => {
            "protected_keys or key_whitelist of the config has it, or its address".into()
        }
        Rejection::Reserved => "a gateway publishes it, or its link address, as its own".into(),
        Rejection::AddressTaken => {
            format!("another key has {} in {domain} and has handshakes, or is within its grace", now.key.link_local())
        }
        Rejection::NoGateway => "no gateway of this domain is online and can be given to routers".into(),
        Rejection::NotReady => "this broker is not connected to MQTT, or has not received the retained states".into(),
        Rejection::LimitKey(_) => "limits.per_key: it came too often while it was new".into(),
        Rejection::LimitDomain(_) => "limits.per_domain: too many new keys in this domain".into(),
        Rejection::LimitGlobal(_) => "limits.global: too many new keys in all domains".into(),
        Rejection::LimitClient(_)
        | Rejection::Body(_)
        | Rejection::TooLarge
        | Rejection::Slow
        | Rejection::Domain
        | Rejection::Key(_)
        | Rejection::NotPublished
        | Rejection::NotConfirmed
        | Rejection::Denied
        | Rejection::Full => String::new(),
    }
}
