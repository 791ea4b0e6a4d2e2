//! Admin calls: changes of the access lists by HTTP, on a listener of its own and with a token. Each call is a line in the
//! log, with its outcome; of calls without the token only some are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use actix_web::dev::{Service as _, ServiceRequest};
use actix_web::http::StatusCode;
use actix_web::http::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use actix_web::web::{self, Data, Path, Payload, Query, ServiceConfig};
use actix_web::{App as Routes, HttpResponse};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};
use wgkex_common::access_lists::service::{BY_CALL, Changed, Handle, ListedEntry};
use wgkex_common::access_lists::{Entry, List};
use wgkex_common::config::Secret;
use wgkex_common::drain::DrainRequest;
use wgkex_common::http::connections::Connections;
use wgkex_common::http::{HttpServer, HttpSettings, readable, resource};
use wgkex_common::mqtt::{Message, MqttHandle};
use wgkex_common::runtime::log::AUDIT;
use wgkex_common::time_text::{self, unix};
use wgkex_common::wire::drain::Drain;
use wgkex_common::{Domain, PublicKey, Topic, WorkerName};

use crate::exchange::Exchange;
use crate::fleet::Fleet;
use crate::fleet::drain_store::{DrainOutcome, DrainStore};
use crate::fleet::revocation::{self, GatewayOutcome, PendingRevocations};
use crate::http::body::{self, BodyError};
use crate::http::error;
use crate::http::key_reports::{self, WhereReport};

/// The largest body of a call.
const BODY_MAX: usize = 64 << 10;
/// How long the disk may take before the answer has `kept: false`.
const DISK_TIMEOUT: Duration = Duration::from_secs(1);
/// The time per line about calls without the token, after the first ones.
const UNAUTHORIZED_INTERVAL: Duration = Duration::from_secs(10);
/// The most such lines at once.
const UNAUTHORIZED_BURST: u32 = 10;
/// The fields of a call that changes a list.
const FIELDS: [&str; 5] = ["key", "domain", "name", "reason", "for"];
/// The fields of a call that drains a gateway.
const DRAIN_FIELDS: [&str; 3] = ["gateway", "reason", "for"];
/// Why the drains of a broker have no deadline.
pub const NO_DEADLINE: &str = "a broker cannot remove peers from a gateway: run wgkex-worker drain --deadline on the gateway; an \
                               original keeps its peers until its sweep";

/// The longest name of a gateway.
const GATEWAY_MAX: usize = 255;

/// The answer to a call that allows a key where no allow list is enabled.
const NO_ALLOW_LIST: &str =
    "the entry is kept, but has no effect until allowlist.enabled is true: every key may come that is not denied";

/// The state that every call needs.
#[derive(Clone)]
pub struct Admin {
    /// The lists.
    pub lists: Handle,
    /// The exchange, which predicts the outcomes of requests.
    pub exchange: Exchange,
    /// The gateways that a change has to reach.
    pub fleet: Fleet,
    /// The changes that wait for their results.
    pub revocations: PendingRevocations,
    /// The gateways that get no new routers.
    pub drains: DrainStore,
    /// The session that it is published by.
    pub bus: MqttHandle,
    /// The domains that are served.
    pub domains: BTreeSet<Domain>,
    /// The SHA-256 of the token, 64 hexadecimal digits in lower case.
    pub token_hash: Secret,
}

/// Logs a few calls without the token at once, then one in [`UNAUTHORIZED_INTERVAL`], and counts the others.
#[derive(Debug, Default)]
struct AuditThrottle {
    /// When a whole burst may be logged again.
    quiet: Option<Instant>,
    unlogged: u64,
}

/// A call that is refused: the status, and a sentence for the caller.
#[derive(Debug)]
struct ApiError(StatusCode, String);

/// The SHA-256 of a token as the config has it.
#[must_use]
pub fn token_hash(token: &str) -> String {
    hex::encode(Sha256::digest(token))
}

/// The server of admin calls on `listener`; it runs when awaited, and ends with the program.
pub fn server(listener: TcpListener, admin: Admin) -> std::io::Result<HttpServer> {
    let settings = HttpSettings { threads: 1, tls: None, drain: Duration::ZERO };
    let throttle = Arc::new(Mutex::new(AuditThrottle::default()));
    wgkex_common::http::server(listener, settings, &Connections::for_few_clients(), move || {
        let (guard, throttle) = (admin.clone(), throttle.clone());
        Routes::new().configure(routes(&admin)).wrap_fn(move |request, service| {
            let call = if guard.is_authorized(&request) {
                Ok(service.call(request))
            } else {
                let has_token = request.headers().contains_key(AUTHORIZATION);
                Err(request.into_response(unauthorized(has_token, &throttle)))
            };
            async {
                match call {
                    Ok(call) => call.await,
                    Err(refusal) => Ok(refusal),
                }
            }
        })
    })
}

fn routes(admin: &Admin) -> impl FnOnce(&mut ServiceConfig) {
    let admin = Data::new(admin.clone());
    move |config| {
        let lists = resource("/v1/lists/{list}", "POST, DELETE, OPTIONS");
        config
            .app_data(admin)
            .service(resource("/v1/revoke", "POST, OPTIONS").route(web::post().to(revoke)))
            .service(resource("/v1/unrevoke", "POST, OPTIONS").route(web::post().to(unrevoke)))
            .service(resource("/v1/drain", "POST, OPTIONS").route(web::post().to(drain)))
            .service(resource("/v1/undrain", "POST, OPTIONS").route(web::post().to(undrain)))
            .service(readable("/v1/keys", keys))
            .service(readable("/v1/where", find))
            .service(readable("/v1/explain", explain))
            .service(lists.route(web::post().to(add)).route(web::delete().to(remove)))
            .default_service(web::to(|| async { error(StatusCode::NOT_FOUND, "there is nothing here") }));
    }
}

fn unauthorized(has_token: bool, throttle: &Mutex<AuditThrottle>) -> HttpResponse {
    if let Some(unlogged) = throttle.lock().log(Instant::now()) {
        warn!(target: AUDIT, outcome = "unauthorized", unlogged, "admin call");
    }
    let message = if has_token {
        "the token is wrong: admin_token_hash of the broker's config is of another one"
    } else {
        "a token is needed: Authorization: Bearer TOKEN"
    };
    let mut response = error(StatusCode::UNAUTHORIZED, message);
    response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

async fn revoke(admin: Data<Admin>, body: Payload) -> HttpResponse {
    admin.change("revoke", Ok(List::Deny), body, true).await
}

async fn unrevoke(admin: Data<Admin>, body: Payload) -> HttpResponse {
    admin.change("unrevoke", Ok(List::Deny), body, false).await
}

async fn add(admin: Data<Admin>, list: Path<String>, body: Payload) -> HttpResponse {
    admin.change("put on list", list_named(&list), body, true).await
}

async fn remove(admin: Data<Admin>, list: Path<String>, body: Payload) -> HttpResponse {
    admin.change("take off list", list_named(&list), body, false).await
}

async fn drain(admin: Data<Admin>, body: Payload) -> HttpResponse {
    admin.drain("drain", body, true).await
}

async fn undrain(admin: Data<Admin>, body: Payload) -> HttpResponse {
    admin.drain("undrain", body, false).await
}

async fn keys(admin: Data<Admin>, query: Query<BTreeMap<String, String>>) -> HttpResponse {
    let result = EntryFilter::parse(&query);
    info!(target: AUDIT, call = "list", outcome = if result.is_ok() { "ok" } else { "bad request" }, "admin call");
    match result {
        Ok(filter) => {
            let keys: Vec<_> = admin.lists.list().await.into_iter().filter(|shown| filter.matches(shown)).collect();
            HttpResponse::Ok().json(json!({ "keys": keys }))
        }
        Err(ApiError(status, message)) => error(status, &message),
    }
}

async fn find(admin: Data<Admin>, query: Query<BTreeMap<String, String>>) -> HttpResponse {
    admin.report_on_key("where", &query, &["key"], |_, found, _| json!(found)).await
}

async fn explain(admin: Data<Admin>, query: Query<BTreeMap<String, String>>) -> HttpResponse {
    let explained = |admin: &Admin, found: WhereReport, domain: Option<Domain>| {
        let known = found.domains.iter().filter(|known| known.state.is_some());
        let known = known.filter_map(|known| admin.domains.get(known.domain.as_str()).cloned());
        let domains: BTreeSet<_> = domain.map_or_else(|| known.collect(), |domain| [domain].into());
        let domains = if domains.is_empty() { &admin.domains } else { &domains };
        json!(key_reports::explain(&admin.exchange, domains, found))
    };
    admin.report_on_key("explain", &query, &["key", "domain"], explained).await
}

impl AuditThrottle {
    /// One more call; if it is to be logged, returns how many before it were not.
    fn log(&mut self, now: Instant) -> Option<u64> {
        let quiet = self.quiet.map_or(now, |quiet| quiet.max(now));
        if quiet - now > UNAUTHORIZED_INTERVAL * (UNAUTHORIZED_BURST - 1) {
            self.unlogged += 1;
            return None;
        }
        self.quiet = Some(quiet + UNAUTHORIZED_INTERVAL);
        Some(std::mem::take(&mut self.unlogged))
    }
}

impl Admin {
    /// Whether the request has the token; compared in constant time.
    fn is_authorized(&self, request: &ServiceRequest) -> bool {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = header.and_then(|header| header.split_once(' '));
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer")).map(|(_, token)| token.trim());
        token.is_some_and(|token| bool::from(token_hash(token).as_bytes().ct_eq(self.token_hash.expose().as_bytes())))
    }

    /// Answers a call that reports on one key, by `report` of where it is and of the requested domain.
    async fn report_on_key(
        &self,
        call: &str,
        query: &BTreeMap<String, String>,
        known: &[&str],
        report: impl FnOnce(&Self, WhereReport, Option<Domain>) -> Value,
    ) -> HttpResponse {
        let read = || {
            if query.keys().any(|field| !known.contains(&field.as_str())) {
                return Err(bad_request(format!("a parameter is not known: {} are allowed", known.join(", "))));
            }
            let key =
                query.get("key").ok_or_else(|| bad_request("key: is missing, a WireGuard public key is expected"))?;
            let key: PublicKey = key.parse().map_err(|error| bad_request(format!("key: {error}")))?;
            let domain = query.get("domain").map(|name| {
                let served = self.domains.get(name.as_str()).cloned();
                served.ok_or_else(|| bad_request("domain: this is not a domain that is served here"))
            });
            Ok((key, domain.transpose()?))
        };
        match read() {
            Ok((key, domain)) => {
                info!(target: AUDIT, call, ?key, outcome = "ok", "admin call");
                let found = key_reports::find(&self.exchange, &self.domains, key, self.lists.list().await);
                HttpResponse::Ok().json(report(self, found, domain))
            }
            Err(ApiError(status, message)) => {
                info!(target: AUDIT, call, outcome = message, "admin call");
                error(status, &message)
            }
        }
    }

    /// Begins or ends the drain of the gateway in the body.
    async fn drain(&self, call: &str, body: Payload, on: bool) -> HttpResponse {
        let read = async { drain_fields(&read(body).await?, unix(SystemTime::now())) };
        let DrainFields { gateway, drain } = match read.await {
            Ok(fields) => fields,
            Err(ApiError(status, message)) => {
                info!(target: AUDIT, call, outcome = message, "admin call");
                return error(status, &message);
            }
        };
        let (worker, is_known) = (gateway.as_str(), self.fleet.gateways().is_worker_known(&gateway));
        match self.drains.set(&gateway, on.then_some(drain)).await {
            Ok(DrainOutcome { was_on, is_kept }) => {
                info!(target: AUDIT, call, worker, outcome = if is_kept { "done" } else { "not kept" }, "admin call");
                let until = self.fleet.gateways().drains().get(&gateway).and_then(|drain| drain.until);
                HttpResponse::Ok().json(json!({
                    "gateway": worker, "until": until, "was_on": was_on, "known": is_known, "kept": is_kept, "done": is_kept,
                }))
            }
            Err(refused) => {
                warn!(target: AUDIT, call, worker, outcome = %refused, "admin call");
                error(StatusCode::INSUFFICIENT_STORAGE, &refused.to_string())
            }
        }
    }

    /// Adds the key in the body to a list or removes it; the answer has the result at each gateway.
    async fn change(&self, call: &str, list: Result<List, ApiError>, body: Payload, on: bool) -> HttpResponse {
        let entry = async { entry(list?, &read(body).await?, &self.domains, unix(SystemTime::now())) };
        let entry = match entry.await {
            Ok(entry) => entry,
            Err(ApiError(status, message)) => {
                info!(target: AUDIT, call, outcome = message, "admin call");
                return error(status, &message);
            }
        };
        let (list, key) = (entry.list.name(), entry.key);
        match self.apply(entry, on).await {
            Ok(answer) => {
                let outcome = if answer["done"] == true { "done" } else { "not done everywhere" };
                info!(target: AUDIT, call, list, ?key, outcome, "admin call");
                HttpResponse::Ok().json(answer)
            }
            Err(ApiError(status, message)) => {
                warn!(target: AUDIT, call, list, ?key, outcome = message, "admin call");
                error(status, &message)
            }
        }
    }

    async fn apply(&self, entry: Entry, on: bool) -> Result<Value, ApiError> {
        let until = Instant::now() + revocation::REVOCATION_TIMEOUT;
        let Entry { list, key, .. } = entry;
        let changed = self.lists.change(entry, on).await;
        let Changed { record, was_present: was_on, persisted: kept } = changed
            .ok_or_else(|| ApiError(StatusCode::SERVICE_UNAVAILABLE, "this broker stops".into()))?
            .map_err(|full| ApiError(StatusCode::INSUFFICIENT_STORAGE, full.to_string()))?;
        let pending = (on && list == List::Deny).then(|| self.revocations.begin(key, record.at));
        let is_kept = timeout(DISK_TIMEOUT, kept).await.is_ok_and(|kept| kept.is_ok());
        let (reachability, is_synced) = {
            let gateways = self.fleet.gateways();
            (gateways.reachability(), gateways.is_synced())
        };
        let payload = serde_json::to_vec(&[&record]).unwrap_or_default();
        let published = timeout_at(until, self.bus.publish(Message::transient(Topic::Revocations, payload)));
        let is_published = published.await.is_ok_and(|published| published.is_ok());
        let mut answer = json!({
            "key": key, "list": list, "domain": record.entry.domain, "until": record.entry.until,
            "was_on": was_on, "kept": is_kept, "published": is_published, "done": is_kept && is_published,
        });
        if on && list == List::Allow && !self.lists.admission().only_allows() {
            answer["warning"] = NO_ALLOW_LIST.into();
        }
        if let Some(pending) = pending {
            let results = pending.results(reachability, until).await;
            // Until the retained messages have arrived it is not known which gateways there are.
            let is_done = is_synced && is_kept && is_published && results.values().all(GatewayOutcome::is_done);
            answer["done"] = is_done.into();
            answer["gateways"] = json!(results);
        }
        if !on {
            answer["still_by"] = json!(self.sources(list, key).await);
        }
        Ok(answer)
    }

    /// Which files have `key` on `list`.
    async fn sources(&self, list: List, key: PublicKey) -> BTreeSet<&'static str> {
        let shown = self.lists.list().await.into_iter();
        shown.filter(|shown| shown.entry.list == list && shown.entry.key == key).map(|shown| shown.source).collect()
    }
}

fn bad_request(message: impl Into<String>) -> ApiError {
    ApiError(StatusCode::BAD_REQUEST, message.into())
}

/// The list of this name.
fn list_named(name: &str) -> Result<List, ApiError> {
    let list = List::ALL.into_iter().find(|list| list.name() == name);
    list.ok_or_else(|| ApiError(StatusCode::NOT_FOUND, "there is no such list: deny, allow and trusted are".into()))
}

async fn read(body: Payload) -> Result<Map<String, Value>, ApiError> {
    let body = body::read(body, BODY_MAX).await.map_err(|unread| match unread {
        BodyError::Incomplete => bad_request("the body is not complete"),
        BodyError::Slow => ApiError(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time".into()),
        BodyError::TooLarge => {
            ApiError(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is too large: {BODY_MAX} bytes are allowed"))
        }
    })?;
    serde_json::from_slice(&body).map_err(|_| bad_request("the body is not a JSON object"))
}

/// The fields of a call that begins or ends the drain of a gateway.
#[derive(Debug, PartialEq)]
struct DrainFields {
    gateway: WorkerName,
    drain: Drain,
}

fn drain_fields(fields: &Map<String, Value>, now: u64) -> Result<DrainFields, ApiError> {
    if fields.contains_key("deadline") || fields.contains_key("percent") {
        return Err(bad_request(format!("deadline: {NO_DEADLINE}")));
    }
    if fields.keys().any(|field| !DRAIN_FIELDS.contains(&field.as_str())) {
        return Err(bad_request(format!("a field is not known: {} are allowed", DRAIN_FIELDS.join(", "))));
    }
    let text = |field: &'static str| match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(bad_request(format!("{field}: a text is expected"))),
    };
    let gateway = text("gateway")?.filter(|name| (1..=GATEWAY_MAX).contains(&name.len()));
    let gateway = gateway.ok_or_else(|| bad_request("gateway: is missing or too long, a host name is expected"))?;
    let gateway = gateway.parse().map_err(|error| bad_request(format!("gateway: {error}")))?;
    let request = DrainRequest { reason: text("reason")?, lasts: text("for")?, ..DrainRequest::default() };
    let drain = Drain::begin(request, now).map_err(|error| bad_request(error.to_string()))?;
    Ok(DrainFields { gateway, drain })
}

/// The entry in the fields of a call.
fn entry(list: List, fields: &Map<String, Value>, domains: &BTreeSet<Domain>, now: u64) -> Result<Entry, ApiError> {
    if fields.keys().any(|field| !FIELDS.contains(&field.as_str())) {
        return Err(bad_request(format!("a field is not known: {} are allowed", FIELDS.join(", "))));
    }
    let text = |field: &'static str| match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(bad_request(format!("{field}: a text is expected"))),
    };
    let line = |field| text(field)?.map(|text| time_text::text(field, text)).transpose().map_err(bad_request);
    let key = text("key")?.ok_or_else(|| bad_request("key: is missing, a WireGuard public key is expected"))?;
    let key = key.parse().map_err(|error| bad_request(format!("key: {error}")))?;
    let lasts = match text("for")? {
        None => None,
        Some(text) => Some(time_text::duration(text).ok_or_else(|| {
            bad_request("for: is not a duration, one as 30m, 12h or 7d of at most ten years is allowed")
        })?),
    };
    let domain = match text("domain")? {
        Some(_) if list != List::Allow => return Err(bad_request("domain: only the list allow has domains")),
        Some(name) => {
            Some(domains.get(name).ok_or_else(|| bad_request("domain: this is not a domain that is served here"))?)
        }
        None => None,
    };
    Ok(Entry {
        domain: domain.map(ToString::to_string),
        name: line("name")?,
        reason: line("reason")?,
        until: lasts.map(|lasts| now + lasts),
        ..Entry::new(list, key)
    })
}

/// Which entries an operator wants to see.
#[derive(Debug, Default)]
struct EntryFilter {
    list: Option<List>,
    /// Only those made by an admin call.
    only_made: bool,
    domain: Option<String>,
    /// Part of a name or reason, or the beginning of a key.
    text: Option<String>,
}

impl EntryFilter {
    fn parse(query: &BTreeMap<String, String>) -> Result<Self, ApiError> {
        let mut filter = Self::default();
        for (field, value) in query {
            match field.as_str() {
                "list" if value == "revoked" => (filter.list, filter.only_made) = (Some(List::Deny), true),
                "list" => {
                    let list = List::ALL.into_iter().find(|list| list.name() == value);
                    filter.list =
                        Some(list.ok_or_else(|| bad_request("list: deny, allow, trusted and revoked are allowed"))?);
                }
                "domain" => filter.domain = Some(value.clone()),
                "q" => filter.text = Some(value.to_lowercase()),
                _ => return Err(bad_request("a parameter is not known: list, domain and q are allowed")),
            }
        }
        Ok(filter)
    }

    fn matches(&self, shown: &ListedEntry) -> bool {
        let Entry { list, key, domain, name, reason, .. } = &shown.entry;
        let has = |wanted: &String| {
            let texts = [name, reason].into_iter().flatten();
            texts.map(|text| text.to_lowercase()).any(|text| text.contains(wanted))
                || key.to_string().to_lowercase().starts_with(wanted)
        };
        self.list.is_none_or(|wanted| wanted == *list)
            && (!self.only_made || shown.source == BY_CALL)
            && self.domain.as_ref().is_none_or(|wanted| domain.as_ref().is_none_or(|domain| domain == wanted))
            && self.text.as_ref().is_none_or(has)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    fn parse_entry(list: List, body: &Value) -> Result<Entry, String> {
        let domains = [Domain::new("ff_a", &["ff_".into()]).unwrap()].into();
        entry(list, body.as_object().unwrap(), &domains, 1_000).map_err(|ApiError(status, message)| {
            assert_eq!(status, StatusCode::BAD_REQUEST);
            message
        })
    }

    #[test]
    fn a_call_is_read_or_its_mistake_named() {
        let plain = Entry::new(List::Deny, KEY.parse().unwrap());
        let all = Entry { name: Some("n".into()), reason: Some("r".into()), until: Some(1_060), ..plain.clone() };
        assert_eq!(parse_entry(List::Deny, &json!({ "key": KEY, "name": null })), Ok(plain));
        assert_eq!(parse_entry(List::Deny, &json!({ "key": KEY, "name": "n", "reason": "r", "for": "1m" })), Ok(all));
        let allowed = parse_entry(List::Allow, &json!({ "key": KEY, "domain": "ff_a" })).unwrap();
        assert_eq!(allowed.domain.as_deref(), Some("ff_a"));
        for (list, body, named) in [
            (List::Deny, json!({}), "key: "),
            (List::Deny, json!({ "key": 7 }), "key: "),
            (List::Deny, json!({ "key": "x" }), "key: "),
            (List::Deny, json!({ "key": KEY, "for": "x" }), "for: "),
            (List::Deny, json!({ "key": KEY, "for": 7 }), "for: "),
            (List::Deny, json!({ "key": KEY, "reason": "a\nb" }), "reason: "),
            (List::Deny, json!({ "key": KEY, "name": "x".repeat(201) }), "name: "),
            (List::Deny, json!({ "key": KEY, "domain": "ff_a" }), "domain: "),
            (List::Allow, json!({ "key": KEY, "domain": "ff_b" }), "domain: "),
            (List::Deny, json!({ "key": KEY, "until": 7 }), "a field is not known: "),
        ] {
            let message = parse_entry(list, &body).unwrap_err();
            assert!(message.starts_with(named) && !message.contains('\n'), "{body}: {message}");
        }
    }

    #[test]
    fn a_call_that_drains_is_read_or_its_mistake_named() {
        let read = |body: Value| {
            drain_fields(body.as_object().unwrap(), 1_000).map_err(|ApiError(status, message)| {
                assert_eq!(status, StatusCode::BAD_REQUEST);
                message
            })
        };
        let drain = Drain { since: 1_000, until: Some(1_060), reason: Some("r".into()), deadline: None };
        let expected = DrainFields { gateway: "gw1".parse().unwrap(), drain };
        assert_eq!(read(json!({ "gateway": "gw1", "reason": "r", "for": "1m" })), Ok(expected));
        assert_eq!(read(json!({ "gateway": "gw1" })).unwrap().drain.until, None);
        for (body, named) in [
            (json!({}), "gateway: "),
            (json!({ "gateway": 7 }), "gateway: "),
            (json!({ "gateway": "a/b" }), "gateway: "),
            (json!({ "gateway": "x".repeat(256) }), "gateway: "),
            (json!({ "gateway": "gw1", "for": "x" }), "for: "),
            (json!({ "gateway": "gw1", "reason": "a\nb" }), "reason: "),
            (json!({ "gateway": "gw1", "key": "x" }), "a field is not known: "),
            (json!({ "gateway": "gw1", "deadline": "1h" }), "deadline: a broker cannot remove peers"),
        ] {
            let message = read(body.clone()).unwrap_err();
            assert!(message.starts_with(named) && !message.contains('\n'), "{body}: {message}");
        }
    }

    #[test]
    fn entries_are_found_by_list_domain_and_text() {
        let shown = |list, source, domain: Option<&str>, name: &str| ListedEntry {
            entry: Entry {
                domain: domain.map(str::to_owned),
                name: Some(name.into()),
                ..Entry::new(list, KEY.parse().unwrap())
            },
            source,
            since: None,
        };
        let all = [
            shown(List::Deny, BY_CALL, None, "Attic"),
            shown(List::Deny, "blacklist_file", None, "cellar"),
            shown(List::Allow, BY_CALL, Some("ff_a"), "attic"),
            shown(List::Allow, BY_CALL, Some("ff_b"), "barn"),
        ];
        let found = |query: &[(&str, &str)]| {
            let query = query.iter().map(|(field, value)| ((*field).to_owned(), (*value).to_owned())).collect();
            let filter = EntryFilter::parse(&query).map_err(|ApiError(_, message)| message)?;
            Ok::<_, String>((0..4).filter(|n| filter.matches(&all[*n])).collect::<Vec<_>>())
        };
        assert_eq!(found(&[]), Ok(vec![0, 1, 2, 3]));
        assert_eq!(found(&[("list", "deny")]), Ok(vec![0, 1]));
        assert_eq!(found(&[("list", "revoked")]), Ok(vec![0]));
        assert_eq!(found(&[("list", "allow"), ("domain", "ff_a")]), Ok(vec![2]));
        assert_eq!(found(&[("domain", "ff_b")]), Ok(vec![0, 1, 3]), "what has no domain is so in all");
        assert_eq!(found(&[("q", "ATTIC")]), Ok(vec![0, 2]));
        assert_eq!(found(&[("q", "TszFS3oF"), ("list", "revoked")]), Ok(vec![0]));
        assert!(found(&[("list", "x")]).is_err() && found(&[("x", "y")]).is_err());
    }

    #[test]
    fn refusals_are_logged_at_a_bounded_rate_and_none_goes_uncounted() {
        let (mut throttle, begun) = (AuditThrottle::default(), Instant::now());
        let logged: Vec<_> = (0..30).filter_map(|_| throttle.log(begun)).collect();
        assert_eq!(logged, [0; 10]);
        assert_eq!(throttle.log(begun + UNAUTHORIZED_INTERVAL - Duration::from_secs(1)), None);
        assert_eq!(throttle.log(begun + UNAUTHORIZED_INTERVAL), Some(21));
        assert_eq!(throttle.log(begun + UNAUTHORIZED_INTERVAL), None);
        let later = begun + UNAUTHORIZED_INTERVAL * 100;
        let logged: Vec<_> = (0..30).filter_map(|_| throttle.log(later)).collect();
        assert_eq!(logged, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_hash_is_that_of_sha256() {
        assert_eq!(token_hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
