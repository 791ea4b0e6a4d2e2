//! Requests for a WebSocket, up to the upgrade: the tenant, the client's right to join it, and the room for a
//! connection.

use actix_web::http::StatusCode;
use actix_web::http::header::{AUTHORIZATION, HeaderValue, UPGRADE, WWW_AUTHENTICATE};
use actix_web::web::{self, Data, Payload, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, ResponseError};
use percent_encoding::percent_decode_str;
use wgkex_common::http::resource;

use crate::http::{App, error};
use crate::tenants::TenantsHttpState;
use crate::tenants::id::{IdError, TenantId};
use crate::tenants::message::Form;
use crate::tenants::socket::TenantSocket;
use crate::tenants::tokens::TokenError;
use crate::tenants::upgrade_request::UpgradeRequest;

/// The beginning of a WebSocket's path; the tenant's id follows.
pub const TENANTS_PATH: &str = "/tenants/";

/// Why there is no upgrade.
#[derive(Debug, thiserror::Error)]
enum UpgradeError {
    #[error("{0}")]
    Id(IdError),
    #[error("a WebSocket is served here")]
    NoWebSocket,
    #[error("{0}")]
    Token(TokenError),
    #[error("there are too many WebSockets")]
    Full,
    #[error("{0}")]
    Handshake(actix_web::Error),
}

/// The route of WebSockets.
pub fn routes(config: &mut ServiceConfig) {
    config.service(resource("/tenants/{id:.*}", "GET, OPTIONS").route(web::get().to(upgrade)));
}

async fn upgrade(app: Data<App>, request: HttpRequest, body: Payload) -> Result<HttpResponse, UpgradeError> {
    let Some(TenantsHttpState { handle, tokens, metrics, .. }) = app.tenants.clone() else {
        return Err(UpgradeError::NoWebSocket);
    };
    let tenant = TenantId::of_path(request.uri().path().strip_prefix(TENANTS_PATH).unwrap_or_default());
    let tenant = tenant.map_err(UpgradeError::Id)?;
    if !request.headers().contains_key(UPGRADE) {
        return Err(UpgradeError::NoWebSocket);
    }
    if let Some(tokens) = tokens {
        tokens.check(&tenant, token(&request).as_deref()).map_err(UpgradeError::Token)?;
    }
    let (response, session, messages) = actix_ws::handle(&request, body).map_err(UpgradeError::Handshake)?;
    let connection = app.connections.upgrade(&request).ok_or(UpgradeError::Full)?;
    let upgrade_request = upgrade_request(&request, tenant, &app);
    let messages = messages.aggregate_continuations();
    actix_web::rt::spawn(
        TenantSocket { session, messages, connection, upgrade_request, tenants: handle, metrics }.run(),
    );
    Ok(response)
}

/// A client's endpoint is shown only if the client requests those of others.
fn upgrade_request(request: &HttpRequest, tenant: TenantId, app: &App) -> UpgradeRequest {
    let wants = |name| query(request, name).as_deref() == Some("1");
    let form = Form { endpoints: wants("endpoints"), hub: wants("hub") };
    let endpoint = if form.endpoints { app.client_address(request) } else { None };
    UpgradeRequest { client: app.client(request), tenant, form, endpoint }
}

/// The token of a client, in a header or, for browsers, in the query.
fn token(request: &HttpRequest) -> Option<String> {
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = header.and_then(|value| {
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
    });
    bearer.or_else(|| query(request, "token"))
}

/// The first value of this name in the query.
fn query(request: &HttpRequest, name: &str) -> Option<String> {
    let mut parameters = request.query_string().split('&').filter_map(|parameter| parameter.split_once('='));
    let (_, value) = parameters.find(|(found, _)| *found == name)?;
    percent_decode_str(value).decode_utf8().ok().map(Into::into)
}

impl ResponseError for UpgradeError {
    fn status_code(&self) -> StatusCode {
        match self {
            Self::Id(IdError::Empty | IdError::Slash) => StatusCode::NOT_FOUND,
            Self::Id(IdError::TooLong) => StatusCode::URI_TOO_LONG,
            Self::Id(IdError::NotText) => StatusCode::BAD_REQUEST,
            Self::NoWebSocket => StatusCode::UPGRADE_REQUIRED,
            Self::Token(TokenError::Missing | TokenError::Unknown) => StatusCode::UNAUTHORIZED,
            Self::Token(TokenError::OtherTenant) => StatusCode::FORBIDDEN,
            Self::Full => StatusCode::SERVICE_UNAVAILABLE,
            Self::Handshake(error) => error.error_response().status(),
        }
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = error(self.status_code(), &self.to_string());
        let headers = response.headers_mut();
        match self {
            Self::NoWebSocket => headers.append(UPGRADE, HeaderValue::from_static("websocket")),
            Self::Token(TokenError::Missing | TokenError::Unknown) => {
                headers.append(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::Id(_) | Self::Token(TokenError::OtherTenant) | Self::Full | Self::Handshake(_) => {}
        }
        response
    }
}
