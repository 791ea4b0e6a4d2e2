//! What both programs do at their beginning and at their end.

use std::path::Path;
use std::process::{self, ExitCode};
use std::{io, panic};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{Level, error, warn};

use crate::Config;
use crate::config::LogFormat;
use crate::runtime::log;

/// Ends the whole process when a thread or task panics, after the message is printed, whatever the build profile says
/// of panics: the locks have no poison, and no task goes on with what a panic left half done.
pub fn abort_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        print(info);
        process::abort();
    }));
}

/// The exit code of a service whose config cannot be used, as `EX_CONFIG` of sysexits.h: its unit does not start it again.
const CONFIG: u8 = 78;

/// Serves by the config, in `file` if one is named, and returns how the process ends.
#[must_use]
pub fn serve(file: Option<&Path>, serve: impl FnOnce(Config) -> anyhow::Result<()>) -> ExitCode {
    config(file).map_or(CONFIG.into(), |config| exit(serve(config)))
}

/// Reads the config, in `file` if one is named, and starts logging at its level. Errors in it are logged, and then there is
/// none.
#[must_use]
pub fn config(file: Option<&Path>) -> Option<Config> {
    match Config::load(file) {
        Ok(config) => {
            log::init(config.log_level, config.log_format);
            config.warnings.iter().for_each(|problem| warn!("{problem}"));
            Some(config)
        }
        Err(wrong) => {
            log::init(Level::INFO, LogFormat::Text);
            wrong.warnings.iter().for_each(|problem| warn!("{problem}"));
            wrong.mistakes.iter().for_each(|problem| error!("{problem}"));
            None
        }
    }
}

/// Returns when the process is asked to end, by SIGTERM or SIGINT. Within a tokio runtime.
pub fn stop() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Logs the error, if there is one, and returns the exit code.
#[must_use]
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
