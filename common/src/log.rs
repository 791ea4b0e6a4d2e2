//! Logging: to stderr, one line per event.

use std::io::IsTerminal as _;

use tracing::Level;
use tracing_subscriber::EnvFilter;

/// Starts logging events of `level` and above to stderr; the variable `RUST_LOG` overrides it. A second call does
/// nothing.
///
/// The libraries below stay at warnings unless `RUST_LOG` asks for more: at debug they would show topics, payloads
/// and with them whole keys.
pub fn init(level: Level) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(directives(level)));
    let ansi = std::io::stderr().is_terminal();
    // Only a second call can fail, and then the first one's subscriber serves.
    let _ = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(ansi).with_env_filter(filter).try_init();
}

fn directives(level: Level) -> String {
    format!("warn,wgkex_common={level},wgkex_broker={level},wgkex_worker={level}")
}
