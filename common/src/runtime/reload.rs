//! Reads the config again on SIGHUP.
//!
//! One task, of each program.

use std::future::pending;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;
use tracing::{error, info, warn};

use crate::Config;
use crate::config::{ConfigError, Source};
use crate::runtime::log;

/// The keys that every program applies while it runs.
const LOG_LEVEL: [&str; 2] = ["log_level", "logging_config"];

/// Reads the config again on each SIGHUP: applies its log level, and `apply` the values of the keys in `live` and below
/// them. Logs which keys changed, and which of them count after a restart only. A config with errors changes nothing.
pub async fn on_hangup(config: Config, live: &[&str], mut apply: impl FnMut(&Config)) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return pending().await };
    let mut last = config.source.clone();
    while hangup.recv().await.is_some() {
        let started = config.clone();
        match spawn_blocking(move || started.reload()).await {
            Ok(Ok(new)) => {
                for problem in &new.warnings {
                    warn!("{problem}");
                }
                let changes = Changes::between(&config.source, &last, &new.source, live);
                log::set_level(new.log_level);
                apply(&new);
                changes.log();
                last = new.source;
            }
            Ok(Err(ConfigError { mistakes, warnings })) => {
                for problem in warnings {
                    warn!("{problem}");
                }
                for problem in mistakes {
                    error!("{problem}");
                }
                error!("the config was not reloaded, the one read before stays in effect");
            }
            Err(error) => error!(%error, "the config was not reloaded"),
        }
    }
}

/// The keys whose values changed.
#[derive(Debug, PartialEq, Eq)]
struct Changes {
    /// Since the config was last read, and they are applied.
    applied: Vec<String>,
    /// Since the start, and they count after a restart only.
    need_restart: Vec<String>,
}

impl Changes {
    fn between(started: &Source, last: &Source, new: &Source, live: &[&str]) -> Self {
        let is_live = |key: &String| {
            let is_below =
                |root: &&str| key.strip_prefix(*root).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            live.iter().chain(&LOG_LEVEL).any(is_below)
        };
        Self {
            applied: last.changes(new).into_iter().filter(is_live).collect(),
            need_restart: started.changes(new).into_iter().filter(|key| !is_live(key)).collect(),
        }
    }

    fn log(&self) {
        let Self { applied, need_restart } = self;
        info!(changed = applied.join(", "), "config reloaded");
        if !need_restart.is_empty() {
            warn!(keys = need_restart.join(", "), "changed keys count after a restart only");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_keys_are_applied_and_others_need_a_restart_until_there_is_one() {
        let source = |yaml: &str| {
            let yaml = format!("domains: [d_a]\ndomain_prefixes: [d_]\n{yaml}");
            Config::parse("f", &yaml, "gw").unwrap().source
        };
        let changes = |started, last, new| {
            let changes = Changes::between(&source(started), &source(last), &source(new), &["workers"]);
            (changes.applied.join(" "), changes.need_restart.join(" "))
        };
        let of = |applied: &str, need_restart: &str| (applied.to_owned(), need_restart.to_owned());
        let weights = "workers: {gw: {weight: 2}}\n";
        assert_eq!(changes("", "", weights), of("workers.gw.weight", ""));
        assert_eq!(changes("", weights, weights), of("", ""));
        assert_eq!(changes("", "log_level: DEBUG", "peers: {max: 3}"), of("log_level", "peers.max"));
        assert_eq!(
            changes("", "peers: {max: 3}", "peers: {max: 3}"),
            of("", "peers.max"),
            "as long as it does not count"
        );
        assert_eq!(changes("", "peers: {max: 3}", ""), of("", ""));
        assert_eq!(
            changes("", "", "worker_user: nobody"),
            of("", "worker_user"),
            "a key that only begins like a live one"
        );
    }
}
