//! How right the clock is, by an HTTP server and by the system.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use actix_web::http::header::HttpDate;

use crate::cli::http_client;
use crate::doctor::facts::ClockFacts;

pub(super) fn facts(server: Option<&str>) -> ClockFacts {
    ClockFacts {
        server: server.map(|url| off(url).map_err(|error| format!("{error:#}"))),
        is_synchronised: is_synchronised(),
    }
}

/// How far the clock is from that of the server, to the second.
fn off(url: &str) -> anyhow::Result<Duration> {
    let date = http_client::date(&format!("{}/healthz", url.trim_end_matches('/')))?;
    let now = SystemTime::now();
    let date: HttpDate = date.parse().map_err(|_| anyhow::anyhow!("{url}: its header Date is no date"))?;
    let date = SystemTime::from(date);
    Ok(now.duration_since(date).unwrap_or_else(|behind| behind.duration()))
}

fn is_synchronised() -> Option<bool> {
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return Some(true);
    }
    let mut command = Command::new("timedatectl");
    command.args(["show", "--property=NTPSynchronized", "--value"]).stdin(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    match output.stdout.trim_ascii() {
        b"yes" => Some(true),
        b"no" => Some(false),
        _ => None,
    }
}
