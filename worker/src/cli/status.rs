//! `status`: the state of the running worker.

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;
use wgkex_common::Config;
use wgkex_common::config::Listen;
use wgkex_common::style::Style;

use super::{EXIT_PROBLEMS, http_client, print, print_error};
use crate::status::WorkerStatus;

/// The pause between two updates of the screen.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// The escape sequence that clears a terminal and moves the cursor to its top.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// The command `status`.
#[derive(Debug, Clone, Args)]
pub struct StatusCommand {
    /// Look again every second, until it is ended
    #[arg(long)]
    watch: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

impl StatusCommand {
    /// Prints it, and returns how the process ends: 0 if all is well, 3 if something is wrong, 1 if the worker cannot be reached.
    #[must_use]
    pub fn run(&self, file: Option<&Path>) -> ExitCode {
        let config = match Config::load(file) {
            Ok(config) => config,
            Err(error) => {
                print_error(&anyhow::Error::from(error));
                return ExitCode::FAILURE;
            }
        };
        if self.watch { self.watch(&config.worker_listen) } else { self.show_once(&config.worker_listen) }
    }

    fn show_once(&self, listen: &Listen) -> ExitCode {
        match http_client::status(listen).map_err(anyhow::Error::from) {
            Ok(status) if print(&self.text(&status, None, Style::of_stdout())).is_err() => ExitCode::FAILURE,
            Ok(status) if status.problems.is_empty() => ExitCode::SUCCESS,
            Ok(_) => EXIT_PROBLEMS.into(),
            Err(error) => {
                print_error(&error);
                ExitCode::FAILURE
            }
        }
    }

    /// Ends when stdout is closed.
    fn watch(&self, listen: &Listen) -> ExitCode {
        let mut before: Option<(Instant, WorkerStatus)> = None;
        let (style, begin) = (Style::of_stdout(), if io::stdout().is_terminal() && !self.json { CLEAR } else { "" });
        loop {
            let now = Instant::now();
            let text = match http_client::status(listen).map_err(anyhow::Error::from) {
                Ok(status) => {
                    let text = self.text(&status, before.as_ref().map(|(then, before)| (before, now - *then)), style);
                    before = Some((now, status));
                    text
                }
                Err(error) if self.json => format!("{}\n", serde_json::json!({ "error": format!("{error:#}") })),
                Err(error) => format!("{error:#}\n"),
            };
            let end = if begin.is_empty() && !self.json { "\n" } else { "" };
            if print(&format!("{begin}{text}{end}")).is_err() {
                return ExitCode::FAILURE;
            }
            sleep(REFRESH_INTERVAL);
        }
    }

    fn text(&self, status: &WorkerStatus, before: Option<(&WorkerStatus, Duration)>, style: Style) -> String {
        if !self.json {
            return status.screen(before.and_then(|(before, elapsed)| status.rates(before, elapsed)), style);
        }
        let json = serde_json::to_value(status).unwrap_or_default();
        if self.watch { format!("{json}\n") } else { format!("{json:#}\n") }
    }
}
