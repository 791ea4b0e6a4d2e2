//! `/metrics`, `/healthz`, `/readyz` and `/status.json`, for monitoring a gateway.
//!
//! One task, [`serve`]; each address has a server with one thread of actix's. Owner: `run` of the worker. No key passes
//! here. Previous stop of a number: the [`MetricsRegistry`], in which each room registers its metrics, and the states that
//! [`crate::reconciler`], [`crate::leases`] and [`crate::bus`] publish; next stop: [`crate::status`].

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use actix_web::http::header::ContentType;
use actix_web::web::Data;
use actix_web::{App, HttpResponse};
use futures_util::future::try_join_all;
use prometheus::{IntCounterVec, IntGauge};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{error, info};
use wgkex_common::access_lists::metrics::ListMetrics;
use wgkex_common::config::Listen;
use wgkex_common::doctor::sockets::taken_by;
use wgkex_common::http::connections::Connections;
use wgkex_common::http::listener::{everywhere, prepare};
use wgkex_common::http::{HttpServer, HttpSettings, readable};
use wgkex_common::mqtt::ConnectionState;
use wgkex_common::runtime::metrics::MetricsRegistry;
use wgkex_common::wire::drain::Drain;
use wgkex_common::{Domain, RejectReason};

use crate::bus::broker_clocks::ClocksOff;
use crate::leases::ServerStatus;
use crate::reconciler::{self, DomainState, DomainStates, WaitingKeys};
use crate::status::{BatchTotals, DomainStatus, KeyTotals, MqttStatus, NAME_IN_USE, PeerTotals, WorkerStatus};

/// How long to wait before a port that is taken is tried again.
const BIND_RETRY: Duration = Duration::from_secs(10);

/// The state that the handlers report.
#[derive(Clone)]
pub struct HttpState {
    /// The metrics of all rooms.
    pub registry: MetricsRegistry,
    /// Whether the sessions are connected.
    pub links: [watch::Receiver<ConnectionState>; 2],
    /// Whether another program may use the client ids of the sessions.
    pub name_suspects: [watch::Receiver<bool>; 2],
    /// The metric for `name_suspects`.
    pub name_in_use: IntGauge,
    /// Whether routers can use each domain.
    pub domains: watch::Receiver<DomainStates>,
    /// The states of the registry's servers on this gateway.
    pub servers: watch::Receiver<BTreeMap<String, ServerStatus>>,
    /// Whether the gateway drains.
    pub drain: watch::Receiver<Option<Drain>>,
    /// The brokers whose clock differs from this gateway's.
    pub clocks_off: watch::Receiver<ClocksOff>,
    /// The name of the worker.
    pub name: String,
    /// The domains that it serves.
    pub served: BTreeSet<Domain>,
    /// When it started.
    pub started: Instant,
    /// The metrics of the lists.
    pub lists: ListMetrics,
    /// The metrics of the reconciler.
    pub reconciler: reconciler::Metrics,
    /// Which keys wait for the kernel.
    pub waiting: watch::Receiver<WaitingKeys>,
}

/// Serves for ever. A port that is taken is logged once and tried again: keys matter more than metrics.
pub async fn serve(listen: Listen, state: HttpState) {
    let mut is_logged = false;
    loop {
        match bind(&listen, &state) {
            Ok(servers) => {
                info!(worker_listen = %listen, "metrics are served");
                is_logged = false;
                if let Err(error) = try_join_all(servers.into_iter().map(|server| server.run(pending()))).await {
                    error!(worker_listen = %listen, %error, "metrics are not served any more");
                }
            }
            Err(error) if !is_logged => {
                is_logged = true;
                let owner = taken_by(&listen.host, listen.port, &error);
                error!(worker_listen = %listen, %error, owner, "metrics are not served, this is tried again");
            }
            Err(_) => {}
        }
        sleep(BIND_RETRY).await;
    }
}

/// A server on each address of the host that can be had.
fn bind(listen: &Listen, state: &HttpState) -> io::Result<Vec<HttpServer>> {
    if listen.host == "::" {
        return Ok(vec![server(prepare(everywhere(listen.port)?)?, state.clone())?]);
    }
    let addresses = (listen.host.as_str(), listen.port).to_socket_addrs()?;
    let (listeners, failed): (Vec<_>, Vec<_>) = addresses.map(TcpListener::bind).partition(Result::is_ok);
    match failed.into_iter().find_map(Result::err) {
        Some(error) if listeners.is_empty() => Err(error),
        _ => listeners.into_iter().flatten().map(|listener| server(prepare(listener)?, state.clone())).collect(),
    }
}

fn server(listener: TcpListener, state: HttpState) -> io::Result<HttpServer> {
    let settings = HttpSettings { threads: 1, tls: None, drain: Duration::ZERO };
    wgkex_common::http::server(listener, settings, &Connections::for_few_clients(), move || {
        App::new()
            .app_data(Data::new(state.clone()))
            .service(readable("/metrics", text))
            .service(readable("/healthz", healthz))
            .service(readable("/readyz", readyz))
            .service(readable("/status.json", status))
    })
}

async fn healthz() -> HttpResponse {
    HttpResponse::Ok().body("ok\n")
}

/// Ready if keys arrive and every domain can be used; else each reason is a line.
async fn readyz(state: Data<HttpState>) -> HttpResponse {
    let (mut answer, mut text) = match state.not_ready_reason() {
        None => (HttpResponse::Ok(), "ready\n".to_owned()),
        Some(reasons) => (HttpResponse::ServiceUnavailable(), reasons),
    };
    if state.is_name_in_use() {
        text = text + NAME_IN_USE + "\n";
    }
    answer.body(text)
}

impl HttpState {
    /// Why this worker is not ready, each reason in a line; none if it is ready.
    pub fn not_ready_reason(&self) -> Option<String> {
        let down = self.mqtt_down().map(|reason| format!("MQTT: {reason}"));
        let domains = self.domains.borrow();
        let unusable = domains.iter().filter_map(|(domain, state)| match state {
            DomainState::Up { .. } => None,
            DomainState::Down { reason } => Some(format!("domain {domain}: {reason}")),
        });
        let unread = domains.is_empty().then(|| "the interfaces are not read yet".to_owned());
        let reasons: Vec<String> = down.into_iter().chain(unread).chain(unusable).collect();
        (!reasons.is_empty()).then(|| reasons.join("\n") + "\n")
    }

    /// Why there is no connection with the MQTT server, if there is none.
    fn mqtt_down(&self) -> Option<String> {
        self.links.iter().find_map(|link| match &*link.borrow() {
            ConnectionState::Up => None,
            ConnectionState::Down(reason) => Some(reason.clone()),
        })
    }

    /// Whether another program may use the name of this worker.
    fn is_name_in_use(&self) -> bool {
        self.name_suspects.iter().any(|suspect| *suspect.borrow())
    }

    fn status(&self, now: Instant) -> WorkerStatus {
        let (cause, waiting, metrics) = (self.mqtt_down(), *self.waiting.borrow(), &self.reconciler);
        let mut status = WorkerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            worker: self.name.clone(),
            pid: std::process::id(),
            uptime_seconds: now.saturating_duration_since(self.started).as_secs(),
            mqtt: MqttStatus { connected: cause.is_none(), cause, name_in_use: self.is_name_in_use() },
            drain: self.drain.borrow().clone(),
            peers_drained: self.sum(&metrics.peers.drained),
            domains: self.served.iter().map(|domain| (domain.to_string(), self.domain_status(domain))).collect(),
            servers: self.servers.borrow().clone(),
            clocks_off: self.clocks_off.borrow().clone(),
            keys: self.key_totals(),
            batches: BatchTotals {
                batches: metrics.batch_keys.get_sample_count(),
                keys: rounded(metrics.batch_keys.get_sample_sum()),
                seconds: metrics.batch_duration.get_sample_sum(),
            },
            queue: metrics.queue_length.get().try_into().unwrap_or_default(),
            pending: waiting.keys as u64,
            oldest_pending_seconds: waiting.since.map(|since| now.saturating_duration_since(since).as_secs_f64()),
            state_kept: metrics.state_kept.get() == 1,
            lists_kept: self.lists.kept.get() == 1,
            lists_damaged: self.lists.damaged_lists().into_iter().map(str::to_owned).collect(),
            problems: Vec::new(),
        };
        status.problems = status.find_problems();
        status
    }

    fn domain_status(&self, domain: &Domain) -> DomainStatus {
        let (up, reason, port) = match self.domains.borrow().get(domain) {
            Some(DomainState::Up { port, .. }) => (true, None, Some(*port)),
            Some(DomainState::Down { reason }) => (false, Some(reason.clone()), None),
            None => (false, None, None),
        };
        let peers = |state| {
            let gauge = self.reconciler.peers.by_state.with_label_values(&[domain.name(), state]);
            gauge.get().try_into().unwrap_or_default()
        };
        let peers = PeerTotals {
            connected: peers("connected"),
            idle: peers("idle"),
            never_connected: peers("pending"),
            stale: peers("stale"),
        };
        DomainStatus { wireguard: domain.wireguard(), vxlan: domain.vxlan(), up, reason, port, peers }
    }

    /// The sum of a counter over all domains.
    fn sum(&self, counters: &IntCounterVec) -> u64 {
        self.served.iter().map(|domain| counters.with_label_values(&[domain.name()]).get()).sum()
    }

    fn key_totals(&self) -> KeyTotals {
        let metrics = &self.reconciler;
        let failed = |reason: RejectReason| {
            let of = |domain: &Domain| metrics.keys_failed.with_label_values(&[domain.name(), reason.as_ref()]).get();
            self.served.iter().map(of).sum::<u64>()
        };
        KeyTotals {
            received: self.sum(&metrics.keys_received),
            installed: self.sum(&metrics.keys_installed),
            refreshed: self.sum(&metrics.keys_refreshed),
            restored: self.sum(&metrics.keys_restored),
            failed: RejectReason::of_requested_keys().map(failed).sum(),
            dropped: reconciler::DROPPED
                .iter()
                .map(|place| metrics.keys_dropped.with_label_values(&[place]).get())
                .sum(),
        }
    }
}

async fn status(state: Data<HttpState>) -> HttpResponse {
    HttpResponse::Ok().json(state.status(Instant::now()))
}

async fn text(state: Data<HttpState>) -> HttpResponse {
    state.name_in_use.set(i64::from(state.is_name_in_use()));
    match state.registry.text() {
        Ok(text) => HttpResponse::Ok().insert_header(ContentType::plaintext()).body(text),
        Err(error) => HttpResponse::InternalServerError().body(error.to_string()),
    }
}

/// A sum of whole numbers.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is one that fits")]
fn rounded(sum: f64) -> u64 {
    sum.round() as u64
}
