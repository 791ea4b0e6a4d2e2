//! The HTTP server of both programs: HTTP/1.1 whose clients take bounded memory and time, whatever they send and
//! however little they read. actix-http decodes all requests at once that a client pipelines, 6 KiB each;
//! [`pipeline_gate`] passes on one after the other. [`connections`] has all open connections, and closes some when
//! there are too many.
//! [`client`] is the HTTP client of the commands. A connection that is upgraded to a WebSocket takes no place of the
//! others; [`frames`] bounds the messages of its client.
//!
//! Tasks: each server has its own, owned by the program's list of services. Owners: each server has its table of connections.
//! Previous stop of a request: a client; next stop: the `http` room of the program, which has the routes.

pub mod client;
pub mod connections;
mod frames;
pub mod listener;
mod pipeline_gate;

use std::future::ready;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_http::error::DispatchError;
use actix_http::{Extensions, HttpService};
use actix_server::{GracefulShutdownSignal, ServerBuilder};
use actix_service::{IntoServiceFactory as _, ServiceFactory, ServiceFactoryExt as _, fn_service, map_config};
use actix_tls::accept::rustls_0_23::{Acceptor, TlsStream};
use actix_tls::accept::{TlsError, max_concurrent_tls_connect};
use actix_web::body::MessageBody;
use actix_web::dev::{self, AppConfig, Payload, Service as _, ServiceRequest, ServiceResponse};
use actix_web::error::PayloadError;
use actix_web::http::header::{ALLOW, HeaderValue};
use actix_web::http::{Method, StatusCode, Uri};
use actix_web::web::{self, Bytes};
use actix_web::{App, Error, FromRequest, Handler, HttpMessage as _, HttpResponse, Resource, Responder};
use futures_util::Stream;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

pub use self::frames::MESSAGE_MAX;

use self::connections::{ActiveRequest, ConnectionActivity, Connections, IDLE_TIMEOUT};
use self::pipeline_gate::PipelineGate;
use crate::tls::rustls::ServerConfig;

/// The timeout for the head of the first request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The timeout of a TLS handshake.
const TLS_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a client has to read the response to a request that was not read completely.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// The most bytes of a response that are encrypted before they are sent.
const ENCRYPTED_BYTES_MAX: usize = 16 << 10;

/// The settings of a server.
pub struct HttpSettings {
    /// The number of threads.
    pub threads: usize,
    /// The settings of TLS, for HTTPS.
    pub tls: Option<ServerConfig>,
    /// How long running requests may take to end when the server is stopped.
    pub drain: Duration,
}

/// A server, and the listener that it accepts connections from.
pub struct HttpServer {
    server: dev::Server,
    listener: TcpListener,
}

impl HttpServer {
    /// Serves until `stop` returns, and then until running requests are answered. The error is that the listener was
    /// closed.
    pub async fn run(self, stop: impl Future<Output = ()>) -> io::Result<()> {
        let Self { server, listener } = self;
        let handle = server.handle();
        let mut server = pin!(server);
        let is_closed = tokio::select! {
            ended = &mut server => return ended,
            () = listener::closed(listener) => true,
            () = stop => false,
        };
        let ((), ended) = tokio::join!(handle.stop(!is_closed), server);
        if is_closed { Err(io::Error::other("the listener was closed from outside")) } else { ended }
    }
}

/// The server on `listener`, with the app that `factory` makes for each of its threads. It has separate threads, so
/// that hanging TLS handshakes do not delay the requests of another server.
pub fn server<T, B>(
    listener: TcpListener,
    settings: HttpSettings,
    connections: &Connections,
    factory: impl Fn() -> App<T> + Clone + Send + 'static,
) -> io::Result<HttpServer>
where
    T: ServiceFactory<ServiceRequest, Config = (), Response = ServiceResponse<B>, Error = Error, InitError = ()>
        + 'static,
    B: MessageBody + 'static,
{
    let HttpSettings { threads, tls, drain } = settings;
    let watched = listener.try_clone()?;
    let (connections, room) = (connections.clone(), connections.capacity());
    // A full server would accept no more connections; the table evicts some before that.
    let each = (room.open + room.pending).div_ceil(threads);
    let upgraded = room.upgraded.div_ceil(threads);
    let builder = ServerBuilder::new()
        .workers(threads)
        .max_concurrent_connections(if tls.is_none() { each + upgraded } else { each.div_ceil(4) + upgraded })
        .disable_signals()
        .shutdown_timeout(drain.as_secs() + 1);
    let stopped = builder.graceful_shutdown_signal();
    let builder = match tls {
        None => builder.listen("http", listener, move || {
            let connections = connections.clone();
            let open = move |stream: TcpStream| ready(Ok(pipeline_gate(stream, |stream| stream, &connections)));
            fn_service(open).and_then(http(factory(), stopped.clone()))
        })?,
        Some(tls) => {
            max_concurrent_tls_connect(each);
            builder.listen("https", listener, move || {
                let connections = connections.clone();
                let open = move |mut stream: TlsStream<TcpStream>| {
                    stream.get_mut().1.set_buffer_limit(Some(ENCRYPTED_BYTES_MAX));
                    pipeline_gate(stream, |stream| stream.get_ref().0, &connections)
                };
                let mut acceptor = Acceptor::new(tls.clone());
                acceptor.set_handshake_timeout(TLS_HANDSHAKE_TIMEOUT);
                let accepted = acceptor.map_err(TlsError::into_service_error).map(open);
                accepted.and_then(http(factory(), stopped.clone()).map_err(TlsError::Service))
            })?
        }
    };
    Ok(HttpServer { server: builder.run(), listener: watched })
}

/// A connection with its place in the table, and its client's address.
fn pipeline_gate<S>(
    stream: S,
    socket: impl Fn(&S) -> &TcpStream,
    open: &Connections,
) -> (PipelineGate<S>, Option<SocketAddr>) {
    let (place, peer) = (open.opened(socket(&stream)), socket(&stream).peer_addr().ok());
    (PipelineGate::new(stream, place), peer)
}

/// The service for the connections of one thread.
fn http<S, T, B>(
    app: App<T>,
    stopped: GracefulShutdownSignal,
) -> impl ServiceFactory<
    (PipelineGate<S>, Option<SocketAddr>),
    Config = (),
    Response = (),
    Error = DispatchError,
    InitError = (),
>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
    T: ServiceFactory<ServiceRequest, Config = (), Response = ServiceResponse<B>, Error = Error, InitError = ()>
        + 'static,
    B: MessageBody + 'static,
{
    let app = app.wrap_fn(|mut request, service| {
        merge_slashes(&mut request);
        let busy = begin(&mut request);
        let response = service.call(request);
        async move {
            let response = response.await;
            drop(busy);
            response
        }
    });
    let app = app.into_factory().map_err(|error: Error| error.error_response());
    HttpService::build()
        .graceful_shutdown_signal(move || {
            let stopped = stopped.clone();
            async move { stopped.notified().await }
        })
        .keep_alive(IDLE_TIMEOUT)
        .client_request_timeout(HEAD_TIMEOUT)
        .client_disconnect_timeout(LINGER_TIMEOUT)
        .on_connect_ext(|stream: &PipelineGate<S>, data: &mut Extensions| {
            data.insert(stream.activity());
        })
        .h1(map_config(app, |()| AppConfig::default()))
}

/// Several slashes at the beginning of a path count as one, as in the original's web server.
fn merge_slashes(request: &mut ServiceRequest) {
    let path = request.uri().path_and_query().map_or("", |path| path.as_str());
    if !path.starts_with("//") {
        return;
    }
    let path = format!("/{}", path.trim_start_matches('/'));
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = path.parse().ok();
    if let Ok(uri) = Uri::from_parts(parts) {
        request.match_info_mut().get_mut().update(&uri);
        request.head_mut().uri = uri;
    }
}

/// Marks the connection as busy until the response, except while the request's body is awaited.
fn begin(request: &mut ServiceRequest) -> Option<ActiveRequest> {
    let activity = request.conn_data::<Arc<ConnectionActivity>>()?.clone();
    let busy = activity.begin();
    match request.take_payload() {
        Payload::None => {}
        payload @ (Payload::H1 { .. } | Payload::Stream { .. }) => {
            let body = Body { payload, since: busy.since(), activity };
            request.set_payload(Payload::Stream { payload: Box::pin(body) });
        }
    }
    Some(busy)
}

/// The body of a request that began at `since`.
struct Body {
    payload: Payload,
    since: u64,
    activity: Arc<ConnectionActivity>,
}

impl Stream for Body {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = Pin::new(&mut self.payload).poll_next(cx);
        match &next {
            Poll::Pending => self.activity.wait_for_client(self.since),
            Poll::Ready(_) => self.activity.set_busy(),
        }
        next
    }
}

/// A resource without routes yet, whose methods are those in `allow`.
#[must_use]
pub fn resource(path: &str, allow: &'static str) -> Resource {
    resource_refusing(path, allow, refusal)
}

/// The same with another form of error responses.
#[must_use]
pub fn resource_refusing(
    path: &str,
    allow: &'static str,
    refuse: impl Fn(StatusCode, &str) -> HttpResponse + Clone + 'static,
) -> Resource {
    web::resource(path).default_service(web::to(move |method: Method| {
        let mut response = match method {
            Method::OPTIONS => HttpResponse::Ok().finish(),
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "this method is not allowed here"),
        };
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
        ready(response)
    }))
}

/// A resource with GET and HEAD.
pub fn readable<F, Args>(path: &str, handler: F) -> Resource
where
    F: Handler<Args>,
    Args: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    resource(path, "GET, HEAD, OPTIONS").route(web::get().to(handler.clone())).route(web::head().to(handler))
}

/// An error response with the reason in one sentence.
#[must_use]
pub fn refusal(status: StatusCode, message: &str) -> HttpResponse {
    HttpResponse::build(status).json(json!({ "error": { "message": message } }))
}
