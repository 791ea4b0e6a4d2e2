//! The error of the clock, by the brokers, by an HTTP server and by the system.

use std::time::{Duration, SystemTime};

use actix_web::http::header::HttpDate;
use wgkex_common::doctor::clock::{ClockFacts, is_synchronised};

use crate::cli::http_client;
use crate::doctor::facts::RunningWorker;

pub(super) fn facts(server: Option<&str>, running: Option<&RunningWorker>) -> ClockFacts {
    ClockFacts {
        brokers: running.map(|worker| worker.clocks_off.clone()).unwrap_or_default(),
        server: server.map(|url| off(url).map_err(|error| format!("{error:#}"))),
        is_synchronised: is_synchronised(),
    }
}

/// The difference between the clock and that of the server, in whole seconds.
fn off(url: &str) -> anyhow::Result<Duration> {
    let date = http_client::date(&format!("{}/healthz", url.trim_end_matches('/')))?;
    let now = SystemTime::now();
    let date: HttpDate = date.parse().map_err(|_| anyhow::anyhow!("{url}: its header Date is no date"))?;
    let date = SystemTime::from(date);
    Ok(now.duration_since(date).unwrap_or_else(|behind| behind.duration()))
}
