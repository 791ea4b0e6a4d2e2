//! Reads the config again on SIGHUP.
//!
//! One task, in each program.

use std::collections::BTreeMap;

use tokio::task::spawn_blocking;
use tracing::{error, info, warn};

use crate::Config;
use crate::config::{ConfigError, ConfigSource};
use crate::runtime::hangups::Hangups;
use crate::runtime::log;

/// The keys that every program applies while it runs.
const LOG_LEVEL: [&str; 2] = ["log_level", "logging_config"];

/// The effect of changed keys, and of those below them, on a running program; all others need a restart.
#[derive(Debug, Clone, Default)]
pub struct KeyUse {
    /// They are applied at once.
    pub live: Vec<&'static str>,
    /// They have no effect on this program.
    pub unused: Vec<&'static str>,
    /// They only affect a command, each with that command.
    pub of_commands: Vec<(&'static str, &'static str)>,
}

/// Reads the config again on each SIGHUP: applies its log level, and `apply` the values of the live keys. Logs which keys
/// changed, and which of them take effect after a restart, or when a command is run. A config with errors changes nothing.
pub async fn on_hangup(config: Config, keys: KeyUse, mut apply: impl FnMut(&Config)) {
    let (mut hangups, mut last) = (Hangups::listen(), config.source.clone());
    loop {
        hangups.next().await;
        let started = config.clone();
        match spawn_blocking(move || started.reload()).await {
            Ok(Ok(new)) => {
                for problem in &new.warnings {
                    warn!("{problem}");
                }
                let changes = ChangedSettings::between(&config.source, &last, &new.source, &keys);
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
struct ChangedSettings {
    /// Since the config was last read, and they are applied.
    applied: Vec<String>,
    /// Since the start, and they take effect after a restart.
    need_restart: Vec<String>,
    /// Since the config was last read, and they take effect when this command is run.
    need_command: BTreeMap<&'static str, Vec<String>>,
}

impl ChangedSettings {
    fn between(started: &ConfigSource, last: &ConfigSource, new: &ConfigSource, keys: &KeyUse) -> Self {
        let KeyUse { live, unused, of_commands } = keys;
        let is_below =
            |key: &str, root: &str| key.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let is_in = |key: &str, roots: &[&str]| roots.iter().any(|root| is_below(key, root));
        let is_live = |key: &String| is_in(key, live) || is_in(key, &LOG_LEVEL);
        let command = |key: &str| of_commands.iter().find(|(root, _)| is_below(key, root)).map(|(_, command)| *command);
        let needs_restart = |key: &String| !is_live(key) && !is_in(key, unused) && command(key).is_none();
        let mut need_command: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for key in last.changes(new) {
            if let Some(command) = command(&key) {
                need_command.entry(command).or_default().push(key);
            }
        }
        Self {
            applied: last.changes(new).into_iter().filter(is_live).collect(),
            need_restart: started.changes(new).into_iter().filter(needs_restart).collect(),
            need_command,
        }
    }

    fn log(&self) {
        let Self { applied, need_restart, need_command } = self;
        info!(changed = applied.join(", "), "config reloaded");
        if !need_restart.is_empty() {
            warn!(keys = need_restart.join(", "), "changed keys take effect after a restart");
        }
        for (command, keys) in need_command {
            warn!(keys = keys.join(", "), command, "changed keys take effect when this command is run");
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
            let keys = KeyUse { live: vec!["workers"], unused: vec!["hub"], of_commands: vec![("setup", "w setup")] };
            let changes = ChangedSettings::between(&source(started), &source(last), &source(new), &keys);
            let of_setup = changes.need_command.get("w setup").into_iter().flatten().cloned();
            let need_restart: Vec<_> = changes.need_restart.into_iter().chain(of_setup.map(|key| key + "!")).collect();
            (changes.applied.join(" "), need_restart.join(" "))
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
        assert_eq!(changes("", "", "hub: {listen_port: 7}"), of("", ""));
        let setup = "setup: {listen_port: 7}";
        assert_eq!(changes("", "", setup), of("", "setup.listen_port!"));
        assert_eq!(changes("", setup, setup), of("", ""), "the command was named when it changed");
        assert_eq!(
            changes("", "", "worker_user: nobody"),
            of("", "worker_user"),
            "a key that only begins like a live one"
        );
    }
}
