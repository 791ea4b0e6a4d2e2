//! The key exchange over HTTP (contract section 1): a router's request in, the answer of [`crate::exchange`] or its
//! rejection out, as JSON.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use actix_web::guard::{Guard, GuardContext};
use actix_web::http::StatusCode;
use actix_web::http::header::{
    CONTENT_LENGTH, FORWARDED, HeaderName, RETRY_AFTER, TRANSFER_ENCODING, VIA, X_FORWARDED_FOR, X_FORWARDED_HOST,
    X_FORWARDED_PROTO,
};
use actix_web::web::{self, Data, Payload, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, Resource, ResponseError};
use tracing::warn;
use wgkex_common::KeyId;
use wgkex_common::http::resource;
use wgkex_common::wire::message::WorkerData;

use crate::client_ip::{Client, address_of_request, client_of_request, is_in, is_private};
use crate::exchange::{Rejection, request};
use crate::http::body::{self, BodyError};
use crate::http::{App, error};

/// The path of version 1.
pub const V1: &str = "/api/v1/wg/key/exchange";
/// The path of version 2.
pub const V2: &str = "/api/v2/wg/key/exchange";

/// The largest body of a request; a router's has about 100 bytes.
const BODY_MAX: usize = 4096;
/// The `Retry-After` when no gateway has room: by then peers may have left.
const ROOM_SECONDS: u32 = 60;

/// The headers that only proxies add.
const PROXIED: [HeaderName; 6] =
    [FORWARDED, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, VIA, HeaderName::from_static("x-real-ip")];

/// The routes of both versions.
pub fn routes(config: &mut ServiceConfig) {
    config
        .service(route_at(V1).route(web::post().to(v1)).route(web::get().guard(HasBody).to(v1)))
        .service(route_at(V2).route(web::post().to(v2)).route(web::get().guard(HasBody).to(v2)));
}

fn route_at(path: &str) -> Resource {
    resource(path, "POST, OPTIONS")
}

/// A GET with a body, as in the example of the original's README; without a body it is an error.
struct HasBody;

impl Guard for HasBody {
    fn check(&self, context: &GuardContext<'_>) -> bool {
        let headers = &context.head().headers;
        headers.contains_key(TRANSFER_ENCODING)
            || headers.get(CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0")
    }
}

async fn v1(app: Data<App>, request: HttpRequest, body: Payload) -> Result<HttpResponse, Rejection> {
    let result = async { app.exchange.exchange_v1(&read(&app, body).await?, || app.client(&request)).await };
    let result = app.counted("v1", result.await);
    result.map(|()| HttpResponse::Ok().json(serde_json::json!({ "Message": "OK" })))
}

async fn v2(app: Data<App>, request: HttpRequest, body: Payload) -> Result<HttpResponse, Rejection> {
    let result = async { app.exchange.exchange_v2(&read(&app, body).await?, || app.client(&request)).await };
    let gateway = app.counted("v2", result.await)?;
    Ok(HttpResponse::Ok().json(EndpointReply::from(gateway)))
}

async fn read(app: &App, body: Payload) -> Result<KeyId, Rejection> {
    let body = body::read(body, BODY_MAX).await?;
    let text = body::text(&body).ok_or(Rejection::Body("the body is not valid JSON"))?;
    let parsed = request::parse(text.as_bytes(), &app.domains);
    if parsed == Err(Rejection::Domain) {
        app.log_refused_domain(text.as_bytes());
    }
    parsed
}

impl App {
    fn counted<T>(&self, api: &str, result: Result<T, Rejection>) -> Result<T, Rejection> {
        match &result {
            Ok(_) => self.metrics.keys_accepted.with_label_values(&[api]).inc(),
            Err(rejection) => self.metrics.keys_refused.with_label_values(&[api, rejection.reason()]).inc(),
        }
        result
    }

    /// Logs the domain in a body that was refused for it, if it was not before.
    fn log_refused_domain(&self, body: &[u8]) {
        let logged = request::domain(body).and_then(|name| {
            let mut refused = self.refused_domains.lock();
            refused.on_refused(&name, Instant::now())
        });
        if let Some(domain) = logged {
            warn!(domain, "routers request a domain that is not served here");
        }
    }

    /// The client of the request.
    pub fn client(&self, request: &HttpRequest) -> Client {
        client_of_request(peer(request), &self.trusted, self.client_address(request))
    }

    /// The address of the client of the request, if it is known.
    pub fn client_address(&self, request: &HttpRequest) -> Option<IpAddr> {
        let peer = peer(request);
        let is_proxied = PROXIED.iter().any(|name| request.headers().contains_key(name));
        if is_proxied && is_private(peer) && !is_in(&self.trusted, peer) && self.unnamed_proxies.add(peer) {
            let proxy = peer.to_canonical();
            warn!(%proxy, "a proxy nearby is not in trusted_proxies: all routers behind it count as one client");
        }
        let (forwarded, x_forwarded_for) = (values(request, FORWARDED), values(request, X_FORWARDED_FOR));
        address_of_request(peer, &self.trusted, is_proxied, forwarded, x_forwarded_for)
    }
}

/// The address from which a request was received.
fn peer(request: &HttpRequest) -> IpAddr {
    request.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |address| address.ip())
}

/// The values of a header. One that is not text is as invalid as an empty one.
fn values(request: &HttpRequest, name: HeaderName) -> impl Iterator<Item = &str> {
    request.headers().get_all(name).map(|value| value.to_str().unwrap_or_default())
}

/// The answer of version 2; the port is a text.
#[derive(serde::Serialize)]
#[serde(rename_all = "PascalCase")]
struct EndpointReply {
    endpoint: GatewayEndpoint,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "PascalCase")]
struct GatewayEndpoint {
    address: String,
    port: String,
    #[serde(rename = "AllowedIPs")]
    allowed_ips: [String; 1],
    public_key: String,
}

impl From<WorkerData> for EndpointReply {
    fn from(data: WorkerData) -> Self {
        let WorkerData { external_address, port, public_key, link_address } = data;
        Self {
            endpoint: GatewayEndpoint {
                address: external_address,
                port: port.to_string(),
                allowed_ips: [link_address],
                public_key: public_key.to_string(),
            },
        }
    }
}

impl Rejection {
    /// When the router may try again, where that depends on the rejection.
    fn retry_seconds(self) -> Option<u32> {
        if let Self::LimitKey(seconds)
        | Self::LimitClient(seconds)
        | Self::LimitDomain(seconds)
        | Self::LimitGlobal(seconds) = self
        {
            Some(seconds)
        } else {
            (self == Self::Full).then_some(ROOM_SECONDS)
        }
    }
}

impl From<BodyError> for Rejection {
    fn from(unread: BodyError) -> Self {
        match unread {
            BodyError::Incomplete => Self::Body("the body is not complete"),
            BodyError::Slow => Self::Slow,
            BodyError::TooLarge => Self::TooLarge,
        }
    }
}

impl ResponseError for Rejection {
    fn status_code(&self) -> StatusCode {
        match self {
            Self::Body(_) | Self::Domain | Self::Key(_) => StatusCode::BAD_REQUEST,
            Self::Reserved | Self::Denied => StatusCode::FORBIDDEN,
            Self::AddressTaken => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::LimitKey(_) | Self::LimitClient(_) | Self::LimitDomain(_) | Self::LimitGlobal(_) | Self::Full => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::NotReady | Self::NoGateway | Self::NotPublished | Self::NotConfirmed => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = error(self.status_code(), &self.to_string());
        if let Some(seconds) = self.retry_seconds() {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}
