//! The broker's HTTP side (contract section 1): one short handler per route, and refusals as JSON.

pub mod admin;
mod body;
pub mod client_ip;
pub mod listen;
mod metrics;
mod status_page;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use actix_web::dev::{Service as _, ServiceRequest};
use actix_web::guard::{Guard, GuardContext};
use actix_web::http::StatusCode;
use actix_web::http::header::{
    CONTENT_LENGTH, ContentType, FORWARDED, HeaderName, RETRY_AFTER, TRANSFER_ENCODING, VIA, X_FORWARDED_FOR,
    X_FORWARDED_HOST, X_FORWARDED_PROTO,
};
use actix_web::web::{self, BytesMut, Data, Payload, ServiceConfig};
use actix_web::{App as Routes, HttpRequest, HttpResponse, Resource, ResponseError};
use futures_util::StreamExt as _;
use ipnet::IpNet;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;
use wgkex_common::Domain;
pub use wgkex_common::http::Server;
use wgkex_common::http::connections::Connections;
use wgkex_common::http::{Settings, readable, refusal, resource};
use wgkex_common::mqtt::ConnectionState;
use wgkex_common::runtime::tls::rustls::ServerConfig;
use wgkex_common::wire::message::WorkerData;

use crate::exchange::{Ask, Exchange, Refusal};
use crate::fleet;
use crate::http::client_ip::{Client, is_in, is_near, origin};
use crate::metrics::{Registry, set};

pub use self::metrics::Metrics;

/// The largest body of a request; a router's has about 100 bytes.
const BODY_MAX: usize = 4096;
/// What of a body that is too large is still read, so that its sender gets to see the answer.
const BODY_DRAIN: usize = 1 << 20;
/// How long the body of a request may take.
const REQUEST: Duration = Duration::from_secs(5);
/// Seconds after which a router may ask again. Routers try every minute anyway.
const RETRY_SECONDS: u32 = 10;
/// When a router is told to come again that no gateway has room for: when the next peers may have left.
const ROOM_SECONDS: u32 = 60;

const V1: &str = "/api/v1/wg/key/exchange";
const V2: &str = "/api/v2/wg/key/exchange";

/// What only proxies write into a head.
const PROXIED: [HeaderName; 6] =
    [FORWARDED, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, VIA, HeaderName::from_static("x-real-ip")];

/// What every handler needs.
#[derive(Clone)]
pub struct App {
    /// The domains that are served.
    pub domains: BTreeSet<Domain>,
    /// The road of a key.
    pub exchange: Exchange,
    /// Whether the bus can be used, to hear and to publish.
    pub links: [watch::Receiver<ConnectionState>; 2],
    /// The connections that are open.
    pub connections: Connections,
    /// The networks of the trusted proxies.
    pub trusted: Arc<[IpNet]>,
    /// Whether somebody was heard nearby who is a proxy and not trusted.
    pub proxy_missed: Arc<AtomicBool>,
    /// What is counted here.
    pub metrics: Metrics,
    /// The metrics of the fleet, which are up to date only when they are read.
    pub fleet_metrics: fleet::Metrics,
    /// All metrics.
    pub registry: Registry,
}

/// The server on `listener`, with `tls` for HTTPS; it runs when awaited. When it is stopped, requests under way have
/// `drain` to end.
pub fn server(listener: TcpListener, tls: Option<ServerConfig>, app: App, drain: Duration) -> std::io::Result<Server> {
    let settings = Settings { threads: available_parallelism()?.get(), tls, drain };
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
    let app = Data::new(app.clone());
    move |config| {
        config
            .app_data(app)
            .service(exchange(V1).route(web::post().to(v1)).route(web::get().guard(HasBody).to(v1)))
            .service(exchange(V2).route(web::post().to(v2)).route(web::get().guard(HasBody).to(v2)))
            .service(readable("/", index))
            .service(readable("/healthz", healthz))
            .service(readable("/readyz", readyz))
            .service(readable("/metrics", scrape))
            .default_service(web::to(|| async { error(StatusCode::NOT_FOUND, "there is nothing here") }));
    }
}

fn exchange(path: &str) -> Resource {
    resource(path, "POST, OPTIONS")
}

/// A GET that brings a key, as the example of the original's README does; without a body it is a mistake.
struct HasBody;

impl Guard for HasBody {
    fn check(&self, context: &GuardContext<'_>) -> bool {
        let headers = &context.head().headers;
        headers.contains_key(TRANSFER_ENCODING)
            || headers.get(CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0")
    }
}

async fn v1(app: Data<App>, request: HttpRequest, body: Payload) -> Result<HttpResponse, Refusal> {
    let result = async { app.exchange.announce(&ask(&app, body).await?, || app.client(&request)).await };
    let result = app.counted("v1", result.await);
    result.map(|()| HttpResponse::Ok().json(serde_json::json!({ "Message": "OK" })))
}

async fn v2(app: Data<App>, request: HttpRequest, body: Payload) -> Result<HttpResponse, Refusal> {
    let result = async { app.exchange.assign(&ask(&app, body).await?, || app.client(&request)).await };
    let gateway = app.counted("v2", result.await)?;
    Ok(HttpResponse::Ok().json(Answer::from(gateway)))
}

async fn ask(app: &App, body: Payload) -> Result<Ask, Refusal> {
    let body = read(body).await?;
    let text = body::text(&body).ok_or(Refusal::Body("the body is not valid JSON"))?;
    Ask::parse(text.as_bytes(), &app.domains)
}

/// The body, whatever its type is said to be.
async fn read(body: Payload) -> Result<BytesMut, Refusal> {
    timeout(REQUEST, collect(body)).await.unwrap_or(Err(Refusal::Slow))
}

async fn collect(mut body: Payload) -> Result<BytesMut, Refusal> {
    let (mut taken, mut size) = (BytesMut::new(), 0);
    while let Some(part) = body.next().await {
        let part = part.map_err(|_| Refusal::Body("the body is not complete"))?;
        size += part.len();
        if size <= BODY_MAX {
            taken.extend_from_slice(&part);
        } else if size > BODY_DRAIN {
            break;
        }
    }
    if size > BODY_MAX { Err(Refusal::TooLarge) } else { Ok(taken) }
}

impl App {
    fn counted<T>(&self, api: &str, result: Result<T, Refusal>) -> Result<T, Refusal> {
        match &result {
            Ok(_) => self.metrics.keys_accepted.with_label_values(&[api]).inc(),
            Err(refusal) => self.metrics.keys_refused.with_label_values(&[api, refusal.reason()]).inc(),
        }
        result
    }

    /// Whose request it is.
    fn client(&self, request: &HttpRequest) -> Client {
        let peer = request.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |address| address.ip());
        let headers = request.headers();
        // What is not even text is as good as nonsense.
        let values = |name: HeaderName| headers.get_all(name).map(|value| value.to_str().unwrap_or_default());
        let is_proxied = PROXIED.iter().any(|name| headers.contains_key(name));
        if is_proxied
            && is_near(peer)
            && !is_in(&self.trusted, peer)
            && !self.proxy_missed.swap(true, Ordering::Relaxed)
        {
            warn!("a proxy nearby is not in trusted_proxies: all routers behind it count as one client");
        }
        origin(peer, &self.trusted, is_proxied, values(FORWARDED), values(X_FORWARDED_FOR))
    }

    /// Why this broker cannot serve routers now.
    fn unready(&self) -> Option<String> {
        for link in &self.links {
            if let ConnectionState::Down(reason) = &*link.borrow() {
                return Some(format!("MQTT is not connected: {reason}"));
            }
        }
        let complete = self.exchange.gateways().complete();
        (!complete).then(|| "what is retained is not heard yet".into())
    }
}

async fn index(app: Data<App>) -> HttpResponse {
    let (overview, unserved) = {
        let gateways = app.exchange.gateways();
        (gateways.overview(), gateways.unserved())
    };
    let page = status_page::render(&overview, &unserved, app.unready().as_deref(), &app.metrics);
    HttpResponse::Ok()
        .content_type(ContentType::html())
        .insert_header(("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'"))
        .insert_header(("Cache-Control", "no-store"))
        .body(page)
}

async fn healthz(_: Data<App>) -> HttpResponse {
    HttpResponse::Ok().content_type(ContentType::plaintext()).body("ok\n")
}

async fn readyz(app: Data<App>) -> HttpResponse {
    let (status, text) = match app.unready() {
        None => {
            let unserved = app.exchange.gateways().unserved();
            (StatusCode::OK, unserved.iter().fold("ready\n".to_owned(), |text, unserved| format!("{text}{unserved}\n")))
        }
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    };
    HttpResponse::build(status).content_type(ContentType::plaintext()).body(text)
}

async fn scrape(app: Data<App>) -> HttpResponse {
    app.fleet_metrics.set_gateways(&app.exchange.gateways().overview());
    app.fleet_metrics.set_live(app.exchange.live().counts());
    set(&app.metrics.connections, app.connections.open());
    match app.registry.text() {
        Ok(text) => HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(text),
        Err(wrong) => error(StatusCode::INTERNAL_SERVER_ERROR, &wrong.to_string()),
    }
}

/// The answer of version 2; the port is a text.
#[derive(serde::Serialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    endpoint: Endpoint,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "PascalCase")]
struct Endpoint {
    address: String,
    port: String,
    #[serde(rename = "AllowedIPs")]
    allowed_ips: [String; 1],
    public_key: String,
}

impl From<WorkerData> for Answer {
    fn from(data: WorkerData) -> Self {
        let WorkerData { external_address, port, public_key, link_address } = data;
        Self {
            endpoint: Endpoint {
                address: external_address,
                port: port.to_string(),
                allowed_ips: [link_address],
                public_key: public_key.to_string(),
            },
        }
    }
}

impl ResponseError for Refusal {
    fn status_code(&self) -> StatusCode {
        match self {
            Self::Body(_) | Self::Domain | Self::Key(_) => StatusCode::BAD_REQUEST,
            Self::Reserved | Self::Denied => StatusCode::FORBIDDEN,
            Self::AddressTaken => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::Limited(_) | Self::Full => StatusCode::TOO_MANY_REQUESTS,
            Self::NotReady | Self::NoGateway | Self::NotPublished | Self::NotConfirmed => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = error(self.status_code(), &self.to_string());
        if let Self::Limited(limited) = self {
            response.headers_mut().insert(RETRY_AFTER, limited.seconds.into());
        } else if *self == Self::Full {
            response.headers_mut().insert(RETRY_AFTER, ROOM_SECONDS.into());
        }
        response
    }
}

/// A refusal as routers and operators get it.
pub(crate) fn error(status: StatusCode, message: &str) -> HttpResponse {
    let mut response = refusal(status, message);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS.into());
    }
    response
}

/// The route as a label, from a fixed set.
fn route(request: &ServiceRequest) -> &'static str {
    [V1, V2, "/", "/healthz", "/readyz", "/metrics"]
        .into_iter()
        .find(|route| *route == request.path())
        .unwrap_or("other")
}
