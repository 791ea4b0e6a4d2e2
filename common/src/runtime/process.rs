//! The common start and end of both programs.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::{self, PanicHookInfo};
use std::path::Path;
use std::process::{self, ExitCode};
use std::{io, thread};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{Level, error, warn};

use crate::Config;
use crate::config::{ConfigError, ConfigProblem, LogFormat};
use crate::runtime::{log, services};

/// Ends the whole process when a thread or task panics, after the message is logged, or printed if logging is not set
/// up yet, whatever the build profile's panic strategy: the locks have no poison, and no task continues with a
/// half-done change.
pub fn abort_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if tracing::enabled!(Level::ERROR) {
            log_panic(info);
        } else {
            print(info);
        }
        process::abort();
    }));
}

/// The name of the service; outside of services that of the thread.
fn log_panic(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let task = services::running().or(thread.name());
    let place = info.location().map(ToString::to_string);
    let payload = info.payload();
    let message = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref().map(String::as_str));
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    error!(task, place, backtrace, "panicked: {}", message.unwrap_or("no message"));
}

/// The exit code of a service with an invalid config, as `EX_CONFIG` of sysexits.h: its unit does not restart it.
const EXIT_CONFIG: u8 = 78;

/// Serves with the config, in `file` if one is named, and returns the exit code.
#[must_use]
pub fn serve(file: Option<&Path>, serve: impl FnOnce(Config) -> anyhow::Result<()>) -> ExitCode {
    match load(file) {
        Ok(config) => exit(serve(config)),
        Err(wrong) if wrong.mistakes.iter().any(ConfigProblem::may_resolve_itself) => ExitCode::FAILURE,
        Err(_) => EXIT_CONFIG.into(),
    }
}

/// Reads the config, in `file` if one is named, and starts logging at its level. Its errors are logged, and then none
/// is returned.
#[must_use]
pub fn config(file: Option<&Path>) -> Option<Config> {
    load(file).ok()
}

fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
    let loaded = Config::load(file);
    let (level, format) =
        loaded.as_ref().map_or((Level::INFO, LogFormat::Text), |config| (config.log_level, config.log_format));
    log::init(level, format);
    let warnings = loaded.as_ref().map_or_else(|wrong| &wrong.warnings, |config| &config.warnings);
    for problem in warnings {
        warn!("{problem}");
    }
    loaded.inspect_err(|wrong| wrong.mistakes.iter().for_each(|problem| error!("{problem}")))
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

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;
    use crate::runtime::services::Services;

    /// Set in the child process that has to panic.
    const PANICS: &str = "WGKEX_TEST_PANICS";

    /// Failed when the message was printed as text among JSON lines, without the name of the task.
    #[test]
    fn a_panic_is_logged_with_the_name_of_its_task_and_ends_the_process() {
        if std::env::var_os(PANICS).is_some() {
            log::init(Level::INFO, LogFormat::Json);
            abort_on_panic();
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let _ = runtime.block_on(async {
                let mut services = Services::default();
                services.spawn("the test", |_| async { panic!("of a test") });
                services.run_until("it", pending()).await
            });
        }
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args([
            "runtime::process::tests::a_panic_is_logged_with_the_name_of_its_task_and_ends_the_process",
            "--exact",
        ]);
        let output = again.arg("--nocapture").env(PANICS, "1").env_remove("RUST_LOG").output().unwrap();
        assert_eq!(output.status.signal(), Some(nix::sys::signal::Signal::SIGABRT as i32), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<serde_json::Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [line] = lines.as_slice() else { panic!("{said}") };
        assert_eq!((&line["level"], &line["task"]), (&"ERROR".into(), &"the test".into()), "{said}");
        assert_eq!(line["message"], "panicked: of a test");
        assert!(line["place"].as_str().is_some_and(|place| place.contains("process.rs")), "{said}");
    }
}
