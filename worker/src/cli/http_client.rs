//! An HTTP client of the worker on this machine, and of a broker.

use std::io;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ureq::http::StatusCode;
use wgkex_common::config::Listen;
use wgkex_common::http::client::agent;

use crate::status::WorkerStatus;

/// The timeout for the connection, and for each part of an answer.
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest answer, in bytes.
const ANSWER_MAX: u64 = 16 << 20;

/// Why the worker's status is not known.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Nothing answers.
    #[error("worker_listen {0}: is the worker running?")]
    NoAnswer(Listen, #[source] io::Error),
    /// The answer has another HTTP status than 200.
    #[error("worker_listen {0}: answers {1}: is it a worker, of this version?")]
    OtherHttpStatus(Listen, StatusCode),
    /// The answer is not a status of this version.
    #[error("worker_listen {0}: is it a worker, of this version?")]
    OtherContent(Listen, #[source] serde_json::Error),
}

/// The worker's status.
pub fn status(listen: &Listen) -> Result<WorkerStatus, StatusError> {
    let no_answer = |error: ureq::Error| StatusError::NoAnswer(listen.clone(), error.into_io());
    let url = format!("http://{}/status.json", listen.reachable());
    let mut answer = agent(HTTP_TIMEOUT).get(url).call().map_err(no_answer)?;
    let text = answer.body_mut().with_config().limit(ANSWER_MAX).read_to_string().map_err(no_answer)?;
    if answer.status() != StatusCode::OK {
        return Err(StatusError::OtherHttpStatus(listen.clone(), answer.status()));
    }
    serde_json::from_str(&text).map_err(|error| StatusError::OtherContent(listen.clone(), error))
}

/// The header `Date` of a server's answer, whatever its status.
pub fn date(url: &str) -> anyhow::Result<String> {
    ensure!(url.starts_with("http://"), "{url}: must begin with http://, as TLS is not spoken here");
    let answer = agent(HTTP_TIMEOUT).get(url).call().map_err(ureq::Error::into_io).with_context(|| url.to_owned())?;
    let date = answer.headers().get("date").with_context(|| format!("{url}: its answer has no header Date"))?;
    Ok(date.to_str().with_context(|| format!("{url}: its header Date is no text"))?.to_owned())
}
