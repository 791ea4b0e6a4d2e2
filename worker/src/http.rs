//! `/metrics`, `/healthz` and `/readyz`, for monitoring a gateway.
//!
//! One task, [`serve`]; each address has a server with one thread of actix's. Owner: `run` of the worker. No key comes
//! here: each room registers its metrics in the [`Registry`] that is read here.

use std::future::pending;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::time::Duration;

use actix_web::http::header::ContentType;
use actix_web::web::Data;
use actix_web::{App, HttpResponse};
use futures_util::future::try_join_all;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{error, info};
use wgkex_common::config::Listen;
use wgkex_common::http::connections::Connections;
use wgkex_common::http::listener::prepare;
use wgkex_common::http::{Server, Settings, readable};
use wgkex_common::mqtt::ConnectionState;
use wgkex_common::runtime::metrics::Registry;

use crate::reconciler::{DomainState, DomainStates};

/// How long to wait for a port that is taken.
const BIND_RETRY: Duration = Duration::from_secs(10);

/// What is state of this worker.
#[derive(Clone)]
pub struct HttpState {
    /// The metrics of all rooms.
    pub registry: Registry,
    /// Whether the sessions are connected.
    pub links: [watch::Receiver<ConnectionState>; 2],
    /// Whether routers can use each domain.
    pub domains: watch::Receiver<DomainStates>,
}

/// Serves for ever. A port that is taken is logged once and tried again: keys matter more than metrics.
pub async fn serve(listen: Listen, state: HttpState) {
    let mut said = false;
    loop {
        match bind(&listen, &state) {
            Ok(servers) => {
                info!(worker_listen = %listen, "metrics are served");
                said = false;
                if let Err(error) = try_join_all(servers.into_iter().map(|server| server.run(pending()))).await {
                    error!(worker_listen = %listen, %error, "metrics are not served any more");
                }
            }
            Err(error) if !said => {
                said = true;
                error!(worker_listen = %listen, %error, "metrics are not served, this is tried again");
            }
            Err(_) => {}
        }
        sleep(BIND_RETRY).await;
    }
}

/// A server on each address of the host that can be had.
fn bind(listen: &Listen, state: &HttpState) -> io::Result<Vec<Server>> {
    let addresses = (listen.host.as_str(), listen.port).to_socket_addrs()?;
    let (listeners, failed): (Vec<_>, Vec<_>) = addresses.map(TcpListener::bind).partition(Result::is_ok);
    match failed.into_iter().find_map(Result::err) {
        Some(error) if listeners.is_empty() => Err(error),
        _ => listeners.into_iter().flatten().map(|listener| server(prepare(listener)?, state.clone())).collect(),
    }
}

fn server(listener: TcpListener, state: HttpState) -> io::Result<Server> {
    let settings = Settings { threads: 1, tls: None, drain: Duration::ZERO };
    wgkex_common::http::server(listener, settings, &Connections::few(), move || {
        App::new()
            .app_data(Data::new(state.clone()))
            .service(readable("/metrics", text))
            .service(readable("/healthz", healthz))
            .service(readable("/readyz", readyz))
    })
}

async fn healthz() -> HttpResponse {
    HttpResponse::Ok().body("ok\n")
}

/// Ready if keys arrive and every domain can be used; else each reason is a line.
async fn readyz(state: Data<HttpState>) -> HttpResponse {
    match state.unready() {
        None => HttpResponse::Ok().body("ready\n"),
        Some(reasons) => HttpResponse::ServiceUnavailable().body(reasons),
    }
}

impl HttpState {
    /// Why this worker is not ready, each reason in a line; none if it is ready.
    pub fn unready(&self) -> Option<String> {
        let down = self.links.iter().find_map(|link| match &*link.borrow() {
            ConnectionState::Up => None,
            ConnectionState::Down(reason) => Some(format!("MQTT: {reason}")),
        });
        let domains = self.domains.borrow();
        let unusable = domains.iter().filter_map(|(domain, state)| match state {
            DomainState::Up { .. } => None,
            DomainState::Down { reason } => Some(format!("domain {domain}: {reason}")),
        });
        let unread = domains.is_empty().then(|| "the interfaces are not read yet".to_owned());
        let reasons: Vec<String> = down.into_iter().chain(unread).chain(unusable).collect();
        (!reasons.is_empty()).then(|| reasons.join("\n") + "\n")
    }
}

async fn text(state: Data<HttpState>) -> HttpResponse {
    match state.registry.text() {
        Ok(text) => HttpResponse::Ok().insert_header(ContentType::plaintext()).body(text),
        Err(error) => HttpResponse::InternalServerError().body(error.to_string()),
    }
}
