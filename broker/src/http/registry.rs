//! The eleven routes of the registry: the login of the caller, the fields of the call, and its answer. Reads are GET
//! with a JSON body or a query, or POST; changes are POST; each with or without a slash at the end.

use std::future::Future;
use std::time::Duration;

use actix_web::body::SizedStream;
use actix_web::http::header::{ContentType, ETAG, HeaderValue, IF_NONE_MATCH, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::http::{Method, StatusCode};
use actix_web::web::{self, Data, Payload, Query, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use bytes::Bytes;
use futures_util::stream;
use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use wgkex_common::http::resource_refusing;

use crate::database::{DatabaseError, Transaction};
use crate::http::body::{self, BodyError};
use crate::http::{App, retry_later};
use crate::registry::model::{CallFields, InvalidField};
use crate::registry::store::{self, ServerConfig};
use crate::registry::{CallError, CallRefusal, LoginRefusal, Registry};

/// The largest body of a call.
const BODY_MAX: usize = 64 << 10;
/// The part of a large answer that is handed on at once.
const ANSWER_PART_BYTES: usize = 16 << 10;
/// How long a caller waits for others to have read their large answers.
const LARGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller waits in all, once its body is there: for other brokers, for others' answers, and for the database.
const CALLER_WAIT_MAX: Duration = Duration::from_secs(9);

/// The operation of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Read(ReadOperation),
    Change(ChangeOperation),
}

/// An operation that changes nothing; its fields may be in the query string, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadOperation {
    ListClients,
    ListServers,
    ServerConfig,
    ServerAddress,
    ServerExists,
    ClientConfig,
}

/// An operation whose answer has no body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChangeOperation {
    AddServer,
    AddClient,
    DeleteClient,
    DeleteServer,
    RemovePeer,
}

/// The beginning of the paths of all routes.
const PREFIX: &str = "/api/v1";

/// The routes, without the slash at the end.
const ROUTES: [(&str, Operation); 11] = [
    ("/api/v1/client/list_all", Operation::Read(ReadOperation::ListClients)),
    ("/api/v1/server/list_all", Operation::Read(ReadOperation::ListServers)),
    ("/api/v1/server/config", Operation::Read(ReadOperation::ServerConfig)),
    ("/api/v1/server/wireguard_ip", Operation::Read(ReadOperation::ServerAddress)),
    ("/api/v1/server/exists", Operation::Read(ReadOperation::ServerExists)),
    ("/api/v1/client/config", Operation::Read(ReadOperation::ClientConfig)),
    ("/api/v1/server/add", Operation::Change(ChangeOperation::AddServer)),
    ("/api/v1/client/add", Operation::Change(ChangeOperation::AddClient)),
    ("/api/v1/client/delete", Operation::Change(ChangeOperation::DeleteClient)),
    ("/api/v1/server/delete", Operation::Change(ChangeOperation::DeleteServer)),
    ("/api/v1/server/remove_peer", Operation::Change(ChangeOperation::RemovePeer)),
];

/// Why a call is answered with an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum CallRejection {
    #[error(
        "user and password are missing or wrong (Authorization: Basic); the broker has read the password at its start"
    )]
    Unauthorized,
    /// The seconds until the next password is compared.
    #[error("too many wrong passwords came from this address: try again later")]
    TooManyWrong(u32),
    #[error("{0}")]
    Body(&'static str),
    #[error("other large answers are not read yet")]
    Busy,
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
            let handler = move |app: Data<App>, registry: Data<Registry>, request: HttpRequest, body: Payload| async move {
                let admitted = registry.admit(operation, &app, &request);
                registry.answer(operation, &request, body, admitted).await
            };
            let allow = if operation.is_read() { "GET, HEAD, POST, OPTIONS" } else { "POST, OPTIONS" };
            let refuse = |status, message: &str| error(status, message, None);
            let mut resource = resource_refusing(&path, allow, refuse).route(web::post().to(handler));
            if operation.is_read() {
                resource = resource.route(web::get().to(handler)).route(web::head().to(handler));
            }
            config.service(resource);
        }
    }
}

/// Refuses the other paths below the routes' own as the routes do. It is registered behind all routes there.
pub fn unknown_paths(config: &mut ServiceConfig) {
    let refuse = || async { error(StatusCode::NOT_FOUND, "there is no such route", None) };
    config.service(web::scope(PREFIX).default_service(web::to(refuse)));
}

/// An error as all routes have it.
fn error(status: StatusCode, message: &str, field: Option<&str>) -> HttpResponse {
    let mut response = HttpResponse::build(status).json(json!({ "error": { "message": message, "field": field } }));
    retry_later(&mut response);
    response
}

/// The route of a path, as a label.
#[must_use]
pub fn label(path: &str) -> Option<&'static str> {
    let path = path.strip_suffix('/').unwrap_or(path);
    ROUTES.iter().map(|(route, _)| *route).find(|route| *route == path)
}

impl Operation {
    fn is_read(self) -> bool {
        matches!(self, Self::Read(_))
    }
}

impl Registry {
    /// Whether the caller may do this.
    fn admit(&self, operation: Operation, app: &App, request: &HttpRequest) -> Result<(), LoginRefusal> {
        if self.is_client_config_open && operation == Operation::Read(ReadOperation::ClientConfig) {
            return Ok(());
        }
        self.login.check(request.headers(), || app.client(request))
    }

    async fn answer(
        &self,
        operation: Operation,
        request: &HttpRequest,
        body: Payload,
        admitted: Result<(), LoginRefusal>,
    ) -> HttpResponse {
        let result = match admitted {
            Ok(()) => self.call(operation, request, body).await,
            Err(refusal) => Err(refusal.into()),
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
    ) -> Result<HttpResponse, CallRejection> {
        let body = body::read(body, BODY_MAX).await?;
        let fields = fields(&body, if operation.is_read() { request.query_string() } else { "" })?;
        match operation {
            Operation::Read(operation) => in_time(self.read_operation(operation, request, &fields)).await,
            Operation::Change(operation) => in_time(self.change_operation(operation, &fields)).await,
        }
    }

    async fn read_operation(
        &self,
        operation: ReadOperation,
        request: &HttpRequest,
        fields: &CallFields,
    ) -> Result<HttpResponse, CallRejection> {
        match operation {
            ReadOperation::ListClients => {
                let place = self.large_place().await?;
                Ok(json_answer(self.read_json(store::list_clients).await?, Some(place)))
            }
            ReadOperation::ListServers => Ok(json_answer(self.read_json(store::list_servers).await?, None)),
            ReadOperation::ServerConfig => self.server_config(fields, request).await,
            ReadOperation::ServerAddress => {
                let name = fields.server_name()?;
                let address = self.read(move |tables| store::wireguard_ip(tables, &name)).await?;
                Ok(HttpResponse::Ok().json(json!({ "server_wg_ip": address })))
            }
            ReadOperation::ServerExists => {
                let name = fields.server_name()?;
                self.read(move |tables| store::require_server(tables, &name)).await?;
                Ok(HttpResponse::new(StatusCode::OK))
            }
            ReadOperation::ClientConfig => {
                let (client, server, key) = (fields.client_name()?, fields.server_name()?, fields.known_key()?);
                let read = self.read_json(move |tables| store::client_config(tables, &client, &server, key));
                Ok(json_answer(read.await?, None))
            }
        }
    }

    async fn change_operation(
        &self,
        operation: ChangeOperation,
        fields: &CallFields,
    ) -> Result<HttpResponse, CallRejection> {
        let status = match operation {
            ChangeOperation::AddServer => {
                let new = fields.new_server()?;
                self.change(move |tables, _| {
                    store::add_server(tables, &new, store::new_id(), None).map(|()| Vec::new())
                })
                .await?;
                StatusCode::CREATED
            }
            ChangeOperation::AddClient => {
                let new = fields.new_client()?;
                self.change(move |tables, now| store::add_client(tables, &new, now)).await?;
                StatusCode::CREATED
            }
            ChangeOperation::DeleteClient => {
                let name = fields.client_name()?;
                self.change(move |tables, now| store::delete_client(tables, &name, now)).await?;
                StatusCode::OK
            }
            ChangeOperation::DeleteServer => {
                let name = fields.server_name()?;
                self.change(move |tables, _| store::delete_server(tables, &name)).await?;
                StatusCode::OK
            }
            ChangeOperation::RemovePeer => {
                let (client, server) = (fields.client_name()?, fields.server_name()?);
                self.change(move |tables, now| store::remove_peer(tables, &client, &server, now)).await?;
                StatusCode::OK
            }
        };
        Ok(HttpResponse::new(status))
    }

    /// The clients of a server; 304 if the caller has them as they are.
    async fn server_config(&self, fields: &CallFields, request: &HttpRequest) -> Result<HttpResponse, CallRejection> {
        let name = fields.server_name()?;
        let known = request.headers().get_all(IF_NONE_MATCH).filter_map(|value| value.to_str().ok());
        let mut known: Vec<String> = known
            .flat_map(|value| value.split(','))
            .map(|tag| tag.trim().trim_start_matches("W/").to_owned())
            .collect();
        if request.method() == Method::POST {
            known.clear();
        }
        let is_known = move |version: &str| known.iter().any(|tag| tag == "*" || *tag == quoted(version));
        let cache = self.config_cache.clone();
        let ServerConfig { version, json } =
            self.read(move |tables| store::server_config(tables, &name, &cache, is_known)).await?;
        let mut response = match json {
            None => HttpResponse::new(StatusCode::NOT_MODIFIED),
            Some(json) => json_answer(json, None),
        };
        if let Ok(tag) = HeaderValue::from_str(&quoted(&version)) {
            response.headers_mut().insert(ETAG, tag);
        }
        Ok(response)
    }

    /// Reads something as JSON, which is made on the thread of the job.
    async fn read_json<T: Serialize>(
        &self,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, CallError> + Send + 'static,
    ) -> Result<Bytes, CallError> {
        self.read(|tables| store::json_of(&work(tables)?)).await
    }

    /// A place for an answer that may be large and that no other caller shares.
    async fn large_place(&self) -> Result<OwnedSemaphorePermit, CallRejection> {
        let place = timeout(LARGE_TIMEOUT, self.large_answers.clone().acquire_owned()).await;
        place.ok().and_then(Result::ok).ok_or(CallRejection::Busy)
    }
}

/// The result of a call; an error before callers give up.
async fn in_time<T>(call: impl Future<Output = Result<T, CallRejection>>) -> Result<T, CallRejection> {
    let late = |_| DatabaseError::Unavailable("the call takes too long".into());
    timeout(CALLER_WAIT_MAX, call).await.map_err(|elapsed| CallError::from(late(elapsed)))?
}

/// An answer that is handed on in parts, so that the unsent rest is held once for all its readers.
fn json_answer(json: Bytes, place: Option<OwnedSemaphorePermit>) -> HttpResponse {
    let size = u64::try_from(json.len()).unwrap_or(u64::MAX);
    let parts = stream::unfold((json, place), |(mut rest, place)| async move {
        let part = rest.split_to(ANSWER_PART_BYTES.min(rest.len()));
        (!part.is_empty()).then_some((Ok::<_, actix_web::Error>(part), (rest, place)))
    });
    let body = SizedStream::new(size, Box::pin(parts));
    HttpResponse::Ok().content_type(ContentType::json()).body(body)
}

fn quoted(version: &str) -> String {
    format!("\"{version}\"")
}

/// The fields of a call: the object in its body or, without a body, its query.
fn fields(body: &[u8], query: &str) -> Result<CallFields, CallRejection> {
    if body.is_empty() {
        return from_query(query);
    }
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(CallFields(fields)),
        Ok(_) => Err(CallRejection::Body("the body must be a JSON object")),
        Err(_) => Err(CallRejection::Body("the body must be JSON in UTF-8")),
    }
}

fn from_query(query: &str) -> Result<CallFields, CallRejection> {
    let invalid = CallRejection::Body("the query must have the form name=value&name=value, in UTF-8");
    if percent_decode_str(query).decode_utf8().is_err() {
        return Err(invalid);
    }
    let pairs = Query::<Vec<(String, String)>>::from_query(query).map_err(|_| invalid)?;
    Ok(CallFields(
        pairs.into_inner().into_iter().map(|(name, value)| (name, Value::String(value))).collect::<Map<_, _>>(),
    ))
}

impl CallRejection {
    fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::TooManyWrong(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Body(_) | Self::Field(_) => StatusCode::BAD_REQUEST,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Call(CallError::Refused(refusal)) => match refusal {
                CallRefusal::UnknownServer | CallRefusal::UnknownPeering => StatusCode::NOT_FOUND,
                CallRefusal::NoLease => StatusCode::BAD_REQUEST,
                CallRefusal::NameTaken
                | CallRefusal::KeyTaken
                | CallRefusal::NetworkTaken
                | CallRefusal::NetworkChanged
                | CallRefusal::LeaseTaken => StatusCode::CONFLICT,
                CallRefusal::Exhausted => StatusCode::SERVICE_UNAVAILABLE,
            },
            Self::Busy | Self::Call(CallError::Database(_) | CallError::Elsewhere(_)) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }

    /// The key in the JSON that it is about.
    fn field(&self) -> Option<&'static str> {
        match self {
            Self::Field(invalid) => Some(invalid.field),
            Self::Call(CallError::Refused(refusal)) => match refusal {
                CallRefusal::UnknownServer | CallRefusal::NameTaken | CallRefusal::Exhausted => Some("server_name"),
                CallRefusal::UnknownPeering => Some("client_name"),
                CallRefusal::KeyTaken => Some("public_key"),
                CallRefusal::NoLease | CallRefusal::LeaseTaken => Some("lease"),
                CallRefusal::NetworkTaken | CallRefusal::NetworkChanged => Some("network_address"),
            },
            Self::Unauthorized
            | Self::TooManyWrong(_)
            | Self::Body(_)
            | Self::Busy
            | Self::Slow
            | Self::TooLarge
            | Self::Call(CallError::Database(_) | CallError::Elsewhere(_)) => None,
        }
    }

    /// The reason as a label.
    fn label(&self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::TooManyWrong(_) => "guesses",
            Self::Body(_) => "body",
            Self::Busy => "busy",
            Self::Slow => "slow",
            Self::TooLarge => "too_large",
            Self::Field(_) => "field",
            Self::Call(CallError::Refused(refusal)) => refusal.into(),
            Self::Call(CallError::Elsewhere(_)) => "elsewhere",
            Self::Call(CallError::Database(DatabaseError::Unavailable(_) | DatabaseError::Emptied(_))) => {
                "database_unavailable"
            }
            Self::Call(CallError::Database(DatabaseError::Corrupt(_))) => "database_corrupt",
        }
    }

    /// The answer. Errors of the database are for the log only.
    fn response(&self) -> HttpResponse {
        let is_database = matches!(self, Self::Call(CallError::Database(_)));
        let message = if is_database { "the database cannot be used now".to_owned() } else { self.to_string() };
        let mut response = error(self.status(), &message, self.field());
        if *self == Self::Unauthorized {
            let challenge = HeaderValue::from_static("Basic realm=\"Login Required\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        } else if let Self::TooManyWrong(seconds) = *self {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl From<LoginRefusal> for CallRejection {
    fn from(refusal: LoginRefusal) -> Self {
        match refusal {
            LoginRefusal::Wrong => Self::Unauthorized,
            LoginRefusal::TooManyWrong(seconds) => Self::TooManyWrong(seconds),
        }
    }
}

impl From<BodyError> for CallRejection {
    fn from(unread: BodyError) -> Self {
        match unread {
            BodyError::Incomplete => Self::Body("the body is not complete"),
            BodyError::Slow => Self::Slow,
            BodyError::TooLarge => Self::TooLarge,
        }
    }
}

impl From<InvalidField> for CallRejection {
    fn from(invalid: InvalidField) -> Self {
        Self::Field(invalid)
    }
}

impl From<CallError> for CallRejection {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_call_that_waits_for_several_things_has_one_deadline() {
        let begun = Instant::now();
        let waits_for_a_place_and_for_the_database = async {
            sleep(Duration::from_secs(4)).await;
            pending::<Result<(), CallRejection>>().await
        };
        let rejection = in_time(waits_for_a_place_and_for_the_database).await.unwrap_err();
        assert_eq!(rejection.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
