//! The broker's HTTP servers: that of routers ([`key_exchange`], with the pages for operators: status, health and
//! metrics, the calls of the registry ([`registry`]), and the WebSockets of tenants ([`tenants`])), on a plain and on a TLS
//! port, and that of admin calls ([`admin`]), on a port of its own.
//!
//! Tasks: none of their own; each server has actix's worker threads, and every handler runs on one of them. Owners:
//! `wgkex_common::http::connections` has the open connections, [`App`] the state that the handlers share. Previous stop
//! of a key: the router. Next stop: [`crate::exchange`], which answers or refuses; of an admin call: the access lists,
//! and then [`crate::bus`] and [`crate::fleet`], whose gateways confirm it.

pub mod admin;
mod body;
mod key_exchange;
pub mod key_reports;
mod metrics;
mod refused_domains;
pub(crate) mod registry;
pub mod status;
mod status_page;
pub(crate) mod tenants;
mod unnamed_proxies;

use std::collections::BTreeSet;
use std::iter::once;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use actix_web::dev::{Service as _, ServiceRequest};
use actix_web::http::StatusCode;
use actix_web::http::header::{ContentType, RETRY_AFTER};
use actix_web::web::{self, Data, ServiceConfig};
use actix_web::{App as Routes, HttpResponse};
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::watch;
use wgkex_common::Domain;
pub use wgkex_common::http::HttpServer;
use wgkex_common::http::connections::Connections;
use wgkex_common::http::{HttpSettings, readable, refusal};
use wgkex_common::mqtt::ConnectionState;
use wgkex_common::tls::rustls::ServerConfig;

use crate::exchange::Exchange;
use crate::fleet::status::ProblemKind;
use crate::fleet::{self, Fleet};
use crate::http::key_exchange::{V1, V2};
use crate::metrics::{MetricsRegistry, set};
use crate::mqtt_server::ClientProblems;
use crate::registry::Registry;
use crate::tenants::TenantsHttpState;

pub use self::metrics::Metrics;
pub use self::refused_domains::RefusedDomains;
pub use self::unnamed_proxies::UnnamedProxies;

/// Seconds after which a router may repeat its request. Routers do so every minute anyway.
const RETRY_SECONDS: u32 = 10;

/// The state that every handler needs.
#[derive(Clone)]
pub struct App {
    /// The domains that are served.
    pub domains: BTreeSet<Domain>,
    /// The exchange of keys.
    pub exchange: Exchange,
    /// The gateways and the live keys.
    pub fleet: Fleet,
    /// The states of the two MQTT sessions.
    pub links: [watch::Receiver<ConnectionState>; 2],
    /// Whether another program may use the client ids of these sessions.
    pub name_suspects: [watch::Receiver<bool>; 2],
    /// The clients that this broker's MQTT server had trouble with.
    pub client_problems: ClientProblems,
    /// The connections that are open.
    pub connections: Connections,
    /// The networks of the trusted proxies.
    pub trusted: Arc<[IpNet]>,
    /// The proxies nearby that forward requests and are not trusted.
    pub unnamed_proxies: Arc<UnnamedProxies>,
    /// The metrics of the HTTP servers.
    pub metrics: Metrics,
    /// The metrics of the fleet, which are up to date only when they are read.
    pub fleet_metrics: fleet::Metrics,
    /// All metrics.
    pub all_metrics: MetricsRegistry,
    /// The registry of servers and clients, if it is enabled.
    pub registry: Option<Registry>,
    /// The domains of refused requests that were logged.
    pub refused_domains: Arc<Mutex<RefusedDomains>>,
    /// Where clients join tenants, if the config enables that.
    pub tenants: Option<TenantsHttpState>,
    /// When the broker started.
    pub started: Instant,
}

/// The server on `listener`, with `tls` for HTTPS; it runs when awaited. When it is stopped, requests in flight have
/// `drain` to end.
pub fn server(
    listener: TcpListener,
    tls: Option<ServerConfig>,
    app: App,
    drain: Duration,
) -> std::io::Result<HttpServer> {
    let settings = HttpSettings { threads: available_parallelism()?.get(), tls, drain };
    let connections = app.connections.clone();
    wgkex_common::http::server(listener, settings, &connections, move || {
        let metrics = app.metrics.clone();
        Routes::new().configure(routes(&app)).wrap_fn(move |request, service| {
            let (begun, metrics, route) = (Instant::now(), metrics.clone(), route(&request));
            let response = service.call(request);
            async move {
                let response = response.await?;
                let duration = metrics.duration.with_label_values(&[route, response.status().as_str()]);
                duration.observe(begun.elapsed().as_secs_f64());
                Ok(response)
            }
        })
    })
}

fn routes(app: &App) -> impl FnOnce(&mut ServiceConfig) {
    let (app, registry) = (Data::new(app.clone()), app.registry.clone());
    move |config| {
        if let Some(registry) = &registry {
            registry::routes(registry, config);
        }
        if app.tenants.is_some() {
            config.configure(tenants::routes);
        }
        config
            .app_data(app)
            .configure(key_exchange::routes)
            .service(readable("/", index))
            .service(readable(status::STATUS_PATH, status_json))
            .service(readable("/healthz", healthz))
            .service(readable("/readyz", readyz))
            .service(readable("/metrics", scrape));
        if registry.is_some() {
            config.configure(registry::unknown_paths);
        }
        config.default_service(web::to(|| async { error(StatusCode::NOT_FOUND, "there is nothing here") }));
    }
}

impl App {
    /// Why this broker cannot serve routers now.
    pub fn not_ready_reason(&self) -> Option<String> {
        for link in &self.links {
            if let ConnectionState::Down(reason) = &*link.borrow() {
                return Some(format!("MQTT is not connected: {reason}"));
            }
        }
        let is_synced = self.fleet.gateways().is_synced();
        (!is_synced).then(|| "the retained states are not received yet".into())
    }
}

async fn index(app: Data<App>) -> HttpResponse {
    let page = status_page::render(&app.status(Instant::now()));
    HttpResponse::Ok()
        .content_type(ContentType::html())
        .insert_header(("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"))
        .insert_header(("Cache-Control", "no-store"))
        .body(page)
}

async fn status_json(app: Data<App>) -> HttpResponse {
    HttpResponse::Ok().insert_header(("Cache-Control", "no-store")).json(app.status(Instant::now()))
}

async fn healthz(_: Data<App>) -> HttpResponse {
    HttpResponse::Ok().content_type(ContentType::plaintext()).body("ok\n")
}

async fn readyz(app: Data<App>) -> HttpResponse {
    let (status, mut lines) = match app.not_ready_reason() {
        None => {
            let unserved = app.fleet.gateways().unserved();
            let lists = status::list_problems(&app.exchange.lists.borrow());
            let unread = lists.into_iter().filter(|problem| problem.kind == ProblemKind::AllowListUnread);
            let lines = unserved.iter().map(ToString::to_string).chain(unread.map(|problem| problem.text));
            (StatusCode::OK, once("ready".to_owned()).chain(lines).collect::<Vec<_>>())
        }
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, vec![reason]),
    };
    // A broker whose client id is in use elsewhere is ready at one moment and not at the next.
    lines.extend(app.names_in_use(Instant::now()).into_iter().map(|problem| problem.text));
    HttpResponse::build(status).content_type(ContentType::plaintext()).body(lines.join("\n") + "\n")
}

async fn scrape(app: Data<App>) -> HttpResponse {
    if let Some(registry) = &app.registry {
        registry.set_metrics();
    }
    let (gateways, domains) = {
        let gateways = app.fleet.gateways();
        (gateways.statuses(Instant::now()), gateways.domain_statuses())
    };
    app.fleet_metrics.set_gateways(&gateways);
    app.fleet_metrics.set_domains(&domains);
    app.fleet_metrics.set_live(app.fleet.live().counts());
    set(&app.metrics.connections, app.connections.open());
    app.metrics.name_in_use.set(i64::from(!app.names_in_use(Instant::now()).is_empty()));
    match app.all_metrics.text() {
        Ok(text) => HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text),
        Err(wrong) => error(StatusCode::INTERNAL_SERVER_ERROR, &wrong.to_string()),
    }
}

/// A refusal as routers and operators get it.
fn error(status: StatusCode, message: &str) -> HttpResponse {
    let mut response = refusal(status, message);
    retry_later(&mut response);
    response
}

/// A 503 has the time after which to try again.
fn retry_later(response: &mut HttpResponse) {
    if response.status() == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS.into());
    }
}

/// The route as a label, from a fixed set.
fn route(request: &ServiceRequest) -> &'static str {
    let path = request.path();
    let found =
        [V1, V2, "/", status::STATUS_PATH, "/healthz", "/readyz", "/metrics"].into_iter().find(|route| *route == path);
    // The tenant's id, which follows, is a secret.
    let of_tenants = || path.starts_with(tenants::TENANTS_PATH).then_some(tenants::TENANTS_PATH);
    found.or_else(|| registry::label(path)).or_else(of_tenants).unwrap_or("other")
}
