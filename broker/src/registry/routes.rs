//! The eleven routes of the registry: who may call, what the call holds, and its answer. Reads are GET with a JSON body or a
//! query, or POST; changes are POST; each with or without a slash at the end.

use std::future::Future;

use actix_web::http::StatusCode;
use actix_web::http::header::{ETAG, HeaderValue, IF_NONE_MATCH, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::web::{self, Data, Payload, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use serde::Serialize;
use serde_json::{Map, Value, json};
use wgkex_common::http::resource;

use crate::database::DatabaseError;
use crate::http::body::{self, Unread};
use crate::registry::model::{Fields, InvalidField};
use crate::registry::store::{self, ServerConfig};
use crate::registry::{CallError, Refusal, Registry};

/// The largest body of a call.
const BODY_MAX: usize = 64 << 10;
/// After how many seconds a call may be tried again.
const RETRY_SECONDS: u32 = 10;

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    ListClients,
    ListServers,
    ServerConfig,
    ServerAddress,
    ServerExists,
    ClientConfig,
    AddServer,
    AddClient,
    DeleteClient,
    DeleteServer,
    RemovePeer,
}

/// The routes, without the slash at the end.
const ROUTES: [(&str, Operation); 11] = [
    ("/api/v1/client/list_all", Operation::ListClients),
    ("/api/v1/server/list_all", Operation::ListServers),
    ("/api/v1/server/config", Operation::ServerConfig),
    ("/api/v1/server/wireguard_ip", Operation::ServerAddress),
    ("/api/v1/server/exists", Operation::ServerExists),
    ("/api/v1/client/config", Operation::ClientConfig),
    ("/api/v1/server/add", Operation::AddServer),
    ("/api/v1/client/add", Operation::AddClient),
    ("/api/v1/client/delete", Operation::DeleteClient),
    ("/api/v1/server/delete", Operation::DeleteServer),
    ("/api/v1/server/remove_peer", Operation::RemovePeer),
];

/// Why a call is answered with an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Rejection {
    #[error("user and password are needed: Authorization: Basic")]
    Unauthorized,
    #[error("{0}")]
    Body(&'static str),
    #[error("the body did not arrive in time")]
    Slow,
    #[error("the body has more than 64 KiB")]
    TooLarge,
    #[error("{0}")]
    Field(InvalidField),
    #[error("{0}")]
    Call(CallError),
}

/// Adds the routes.
pub fn routes(registry: &Registry, config: &mut ServiceConfig) {
    config.app_data(Data::new(registry.clone()));
    for (path, operation) in ROUTES {
        for path in [path.to_owned(), format!("{path}/")] {
            let handler = move |registry: Data<Registry>, request: HttpRequest, body: Payload| async move {
                registry.answer(operation, &request, body).await
            };
            let allow = if operation.is_read() { "GET, HEAD, POST, OPTIONS" } else { "POST, OPTIONS" };
            let mut resource = resource(&path, allow).route(web::post().to(handler));
            if operation.is_read() {
                resource = resource.route(web::get().to(handler)).route(web::head().to(handler));
            }
            config.service(resource);
        }
    }
}

/// The route of a path, as a label.
#[must_use]
pub fn label(path: &str) -> Option<&'static str> {
    let path = path.strip_suffix('/').unwrap_or(path);
    ROUTES.iter().map(|(route, _)| *route).find(|route| *route == path)
}

impl Operation {
    fn is_read(self) -> bool {
        match self {
            Self::ListClients
            | Self::ListServers
            | Self::ServerConfig
            | Self::ServerAddress
            | Self::ServerExists
            | Self::ClientConfig => true,
            Self::AddServer | Self::AddClient | Self::DeleteClient | Self::DeleteServer | Self::RemovePeer => false,
        }
    }
}

impl Registry {
    async fn answer(&self, operation: Operation, request: &HttpRequest, body: Payload) -> HttpResponse {
        let is_open = self.is_client_config_open && operation == Operation::ClientConfig;
        let result = if is_open || self.login.admits(request.headers()) {
            self.call(operation, request, body).await
        } else {
            Err(Rejection::Unauthorized)
        };
        result.unwrap_or_else(|rejection| {
            self.metrics.refused.with_label_values(&[rejection.label()]).inc();
            rejection.response()
        })
    }

    async fn call(
        &self,
        operation: Operation,
        request: &HttpRequest,
        body: Payload,
    ) -> Result<HttpResponse, Rejection> {
        let body = body::read(body, BODY_MAX).await?;
        let fields = fields(&body, if operation.is_read() { request.query_string() } else { "" })?;
        match operation {
            Operation::ListClients => json_of(self.read(store::list_clients)).await,
            Operation::ListServers => json_of(self.read(store::list_servers)).await,
            Operation::ServerConfig => self.server_config(&fields, request).await,
            Operation::ServerAddress => {
                let name = fields.server_name()?;
                let address = self.read(move |tables| store::wireguard_ip(tables, &name)).await?;
                Ok(HttpResponse::Ok().json(json!({ "server_wg_ip": address })))
            }
            Operation::ServerExists => {
                let name = fields.server_name()?;
                empty(StatusCode::OK, self.read(move |tables| store::require_server(tables, &name))).await
            }
            Operation::ClientConfig => {
                let (client, server) = (fields.client_name()?, fields.server_name()?);
                json_of(self.read(move |tables| store::client_config(tables, &client, &server))).await
            }
            Operation::AddServer => {
                let new = fields.new_server()?;
                let added = self
                    .change(move |tables| store::add_server(tables, &new, store::new_id(), None).map(|()| Vec::new()));
                empty(StatusCode::CREATED, added).await
            }
            Operation::AddClient => {
                let new = fields.new_client()?;
                empty(StatusCode::CREATED, self.change(move |tables| store::add_client(tables, &new))).await
            }
            Operation::DeleteClient => {
                let name = fields.client_name()?;
                empty(StatusCode::OK, self.change(move |tables| store::delete_client(tables, &name))).await
            }
            Operation::DeleteServer => {
                let name = fields.server_name()?;
                empty(StatusCode::OK, self.change(move |tables| store::delete_server(tables, &name))).await
            }
            Operation::RemovePeer => {
                let (client, server) = (fields.client_name()?, fields.server_name()?);
                empty(StatusCode::OK, self.change(move |tables| store::remove_peer(tables, &client, &server))).await
            }
        }
    }

    /// The clients of a server; 304 if the caller has them as they are.
    async fn server_config(&self, fields: &Fields, request: &HttpRequest) -> Result<HttpResponse, Rejection> {
        let name = fields.server_name()?;
        let known = request.headers().get_all(IF_NONE_MATCH).filter_map(|value| value.to_str().ok());
        let known: Vec<String> = known.flat_map(|value| value.split(',')).map(|tag| tag.trim().to_owned()).collect();
        let is_known = move |version: &str| known.iter().any(|tag| tag.trim_start_matches("W/") == quoted(version));
        let ServerConfig { version, peers } =
            self.read(move |tables| store::server_config(tables, &name, is_known)).await?;
        let status = if peers.is_some() { StatusCode::OK } else { StatusCode::NOT_MODIFIED };
        let mut response = HttpResponse::build(status);
        response.insert_header((ETAG, quoted(&version)));
        Ok(match peers {
            None => response.finish(),
            Some(peers) => response.json(json!({ "peers": peers })),
        })
    }
}

fn quoted(version: &str) -> String {
    format!("\"{version}\"")
}

/// The answer to a read.
async fn json_of<T: Serialize>(read: impl Future<Output = Result<T, CallError>>) -> Result<HttpResponse, Rejection> {
    Ok(HttpResponse::Ok().json(read.await?))
}

/// The answer to what has nothing to tell but that it was done.
async fn empty(
    status: StatusCode,
    call: impl Future<Output = Result<(), CallError>>,
) -> Result<HttpResponse, Rejection> {
    call.await?;
    Ok(HttpResponse::new(status))
}

/// What a call holds: the object in its body or, without a body, its query.
fn fields(body: &[u8], query: &str) -> Result<Fields, Rejection> {
    if body.is_empty() {
        return from_query(query);
    }
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(Fields(fields)),
        Ok(_) => Err(Rejection::Body("the body must be a JSON object")),
        Err(_) => Err(Rejection::Body("the body must be JSON in UTF-8")),
    }
}

fn from_query(query: &str) -> Result<Fields, Rejection> {
    let pairs = Query::<Vec<(String, String)>>::from_query(query);
    let pairs = pairs.map_err(|_| Rejection::Body("the query must have the form name=value&name=value"))?;
    Ok(Fields(pairs.into_inner().into_iter().map(|(name, value)| (name, Value::String(value))).collect::<Map<_, _>>()))
}

impl Rejection {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Body(_) | Self::Field(_) => StatusCode::BAD_REQUEST,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Call(CallError::Refused(refusal)) => match refusal {
                Refusal::UnknownServer | Refusal::UnknownPeering => StatusCode::NOT_FOUND,
                Refusal::NameTaken | Refusal::KeyTaken | Refusal::NetworkTaken | Refusal::NetworkChanged => {
                    StatusCode::CONFLICT
                }
                Refusal::Exhausted => StatusCode::SERVICE_UNAVAILABLE,
            },
            Self::Call(CallError::Database(_)) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The key in the JSON that it is about.
    fn field(&self) -> Option<&'static str> {
        match self {
            Self::Field(invalid) => Some(invalid.field),
            Self::Call(CallError::Refused(refusal)) => match refusal {
                Refusal::UnknownServer | Refusal::NameTaken | Refusal::Exhausted => Some("server_name"),
                Refusal::UnknownPeering => Some("client_name"),
                Refusal::KeyTaken => Some("public_key"),
                Refusal::NetworkTaken | Refusal::NetworkChanged => Some("network_address"),
            },
            Self::Unauthorized | Self::Body(_) | Self::Slow | Self::TooLarge | Self::Call(CallError::Database(_)) => {
                None
            }
        }
    }

    /// The reason as a label.
    fn label(&self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::Body(_) => "body",
            Self::Slow => "slow",
            Self::TooLarge => "too_large",
            Self::Field(_) => "field",
            Self::Call(CallError::Refused(refusal)) => refusal.into(),
            Self::Call(CallError::Database(DatabaseError::Unavailable(_))) => "database_unavailable",
            Self::Call(CallError::Database(DatabaseError::Corrupt(_))) => "database_corrupt",
        }
    }

    /// The answer. What the database reports is for the log only.
    fn response(&self) -> HttpResponse {
        let is_database = matches!(self, Self::Call(CallError::Database(_)));
        let message = if is_database { "the database cannot be used now".to_owned() } else { self.to_string() };
        let status = self.status();
        let mut response =
            HttpResponse::build(status).json(json!({ "error": { "message": message, "field": self.field() } }));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, RETRY_SECONDS.into());
        }
        if *self == Self::Unauthorized {
            let challenge = HeaderValue::from_static("Basic realm=\"Login Required\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl From<Unread> for Rejection {
    fn from(unread: Unread) -> Self {
        match unread {
            Unread::Incomplete => Self::Body("the body is not complete"),
            Unread::Slow => Self::Slow,
            Unread::TooLarge => Self::TooLarge,
        }
    }
}

impl From<InvalidField> for Rejection {
    fn from(invalid: InvalidField) -> Self {
        Self::Field(invalid)
    }
}

impl From<CallError> for Rejection {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}
