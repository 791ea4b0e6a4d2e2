//! `drain` and `undrain`: whether this gateway gets new routers.

use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use wgkex_common::Config;
use wgkex_common::drain::{self, DrainRequest};
use wgkex_common::time_text::unix;
use wgkex_common::wire::drain::Drain;

use super::{print, print_error};

/// The command `drain`.
#[derive(Debug, Clone, Args)]
pub struct DrainCommand {
    /// Why; shown to operators only
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// For how long, as 30m, 12h or 7d; until undrain if left out
    #[arg(long = "for", value_name = "DURATION")]
    lasts: Option<String>,
    /// After how long the worker begins to remove peers that it made, so that their routers ask for another gateway
    #[arg(long, value_name = "DURATION")]
    deadline: Option<String>,
    /// How many percent of the peers that are there at the deadline go in a minute, at most: 1 to 100; 10 if left out
    #[arg(long, value_name = "NUMBER", requires = "deadline")]
    percent: Option<u8>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// The command `undrain`.
#[derive(Debug, Clone, Args)]
pub struct UndrainCommand {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

impl DrainCommand {
    /// Writes the file of the drain, and returns how the process ends: 0, or 1 if that cannot be done.
    #[must_use]
    pub fn run(&self, file: Option<&Path>) -> ExitCode {
        let now = unix(SystemTime::now());
        let request = DrainRequest {
            reason: self.reason.as_deref(),
            lasts: self.lasts.as_deref(),
            deadline: self.deadline.as_deref(),
            percent: self.percent,
        };
        finish(Drain::begin(request, now).map_err(Into::into).and_then(|drain| {
            save(file, Some(drain.clone()))?;
            Ok(if self.json { as_json(Some(&drain)) } else { format!("draining {drain}\n") })
        }))
    }
}

impl UndrainCommand {
    /// Writes that there is no drain, and returns how the process ends: 0, or 1 if that cannot be done.
    #[must_use]
    pub fn run(&self, file: Option<&Path>) -> ExitCode {
        let text = if self.json { as_json(None) } else { "not draining\n".into() };
        finish(save(file, None).map(|()| text))
    }
}

fn save(file: Option<&Path>, drain: Option<Drain>) -> anyhow::Result<()> {
    let config = Config::load(file)?;
    let file = drain::worker_file(&config.state_dir);
    drain::save(&file, drain).with_context(|| file.display().to_string())
}

/// The drain as in `/status.json`.
fn as_json(drain: Option<&Drain>) -> String {
    format!("{:#}\n", json!({ "drain": drain }))
}

fn finish(done: anyhow::Result<String>) -> ExitCode {
    match done {
        Ok(text) if print(&text).is_ok() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            print_error(&error);
            ExitCode::FAILURE
        }
    }
}
