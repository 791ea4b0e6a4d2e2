//! An HTTP client of the worker on this machine, and of a broker.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use wgkex_common::config::Listen;
use wgkex_common::http::client::agent;

use crate::status::WorkerStatus;

/// The timeout for the connection, and for each part of an answer.
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest answer, in bytes.
const ANSWER_MAX: u64 = 16 << 20;

/// The worker's status.
pub fn status(listen: &Listen) -> anyhow::Result<WorkerStatus> {
    let is_running = || format!("worker_listen {listen}: is the worker running?");
    let answer = agent(HTTP_TIMEOUT).get(format!("http://{}/status.json", listen.reachable())).call();
    let mut answer = answer.map_err(ureq::Error::into_io).with_context(is_running)?;
    let text = answer.body_mut().with_config().limit(ANSWER_MAX).read_to_string();
    let text = text.map_err(ureq::Error::into_io).with_context(is_running)?;
    ensure!(
        answer.status() == 200,
        "worker_listen {listen}: answers {}: is it a worker, of this version?",
        answer.status()
    );
    serde_json::from_str(&text).with_context(|| format!("worker_listen {listen}: is it a worker, of this version?"))
}

/// The header `Date` of a server's answer, whatever its status.
pub fn date(url: &str) -> anyhow::Result<String> {
    ensure!(url.starts_with("http://"), "{url}: must begin with http://, as TLS is not spoken here");
    let answer = agent(HTTP_TIMEOUT).get(url).call().map_err(ureq::Error::into_io).with_context(|| url.to_owned())?;
    let date = answer.headers().get("date").with_context(|| format!("{url}: its answer has no header Date"))?;
    Ok(date.to_str().with_context(|| format!("{url}: its header Date is no text"))?.to_owned())
}
