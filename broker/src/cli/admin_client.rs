//! The subcommands that make admin calls, and what they print: one line for each gateway or key, or JSON.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand, ValueEnum};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use wgkex_common::Config;
use wgkex_common::style::Style;
use wgkex_common::time_text::utc;

use crate::cli::http_client::{BROKER_TIMEOUT, BrokerCall, BrokerClient};
use crate::cli::key_reports;
use crate::cli::{MAKE_ENDS, print_error};
use crate::fleet::revocation;
use crate::fleet::status::printable;
use crate::http::admin::{NO_DEADLINE, token_hash};

/// The variable with the token.
const TOKEN: &str = "WGKEX_ADMIN_TOKEN";
/// The exit codes of a command that only reads.
const LOOK_ENDS: &str = "Exits with 0, or with 1 if the broker cannot be reached or refuses the call.";
/// The exit codes of a command that changes a list.
const CHANGE_ENDS: &str = "Exits with 0 if it is done, with 2 if it counts here but MQTT or the disk did not take it, with 1 if the broker \
                           cannot be reached or refuses the call.";
/// The exit codes of a command about a drain, which is not published.
const DRAIN_ENDS: &str = "Exits with 0 if it is done, with 2 if it counts but the disk did not take it, with 1 if the broker cannot be \
                          reached or refuses the call.";
/// The exit code when it was done, but not everywhere.
const NOT_EVERYWHERE: u8 = 2;

/// What an operator does about keys.
#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Denies a key at all gateways: its peer, route and FDB entry go, and it may not come again
    #[command(
        after_help = "Exits with 0 if the key is known to be gone everywhere, with 2 if not, with 1 if the broker cannot be reached or \
                           refuses the call."
    )]
    Revoke {
        /// The key.
        #[command(flatten)]
        about: KeyArgs,
        /// How the call is made and shown.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Lets a key come again that was revoked
    #[command(after_help = CHANGE_ENDS)]
    Unrevoke {
        /// The WireGuard public key
        key: String,
        /// How the call is made and shown.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Allows a key where only listed keys may come (allowlist.enabled)
    #[command(after_help = CHANGE_ENDS)]
    Allow {
        /// The key.
        #[command(flatten)]
        about: KeyArgs,
        /// Only in this domain
        #[arg(long)]
        domain: Option<String>,
        /// Take it off the list instead
        #[arg(long)]
        remove: bool,
        /// How the call is made and shown.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Keeps the peer of a key from being swept, however long it is silent
    #[command(after_help = CHANGE_ENDS)]
    Trust {
        /// The key.
        #[command(flatten)]
        about: KeyArgs,
        /// Take it off the list instead
        #[arg(long)]
        remove: bool,
        /// How the call is made and shown.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Shows which keys are denied, allowed and trusted, and why
    #[command(after_help = LOOK_ENDS)]
    List {
        /// Only this list; revoked: what admin calls denied
        #[arg(long)]
        list: Option<ListName>,
        /// Only what counts in this domain
        #[arg(long)]
        domain: Option<String>,
        /// Only keys with this in their name or reason, or that begin with it
        #[arg(long, value_name = "TEXT")]
        name: Option<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// The connection to the broker.
        #[command(flatten)]
        call: ConnectionArgs,
    },
    /// Shows where a key is: its domains, which gateways have it, its last handshake, and the lists that have it
    #[command(after_help = LOOK_ENDS)]
    Where {
        /// The WireGuard public key
        key: String,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// The connection to the broker.
        #[command(flatten)]
        call: ConnectionArgs,
    },
    /// Explains which gateway a router with this key would get and why, or why it would be refused; changes nothing
    #[command(after_help = LOOK_ENDS)]
    Explain {
        /// The WireGuard public key
        key: String,
        /// In this domain; else in those where the key is known, or in all
        #[arg(long)]
        domain: Option<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// The connection to the broker.
        #[command(flatten)]
        call: ConnectionArgs,
    },
    /// Gives a gateway no new routers, also an original; those there stay. At this broker: with several, run it at each
    #[command(after_help = DRAIN_ENDS)]
    Drain {
        /// The gateway's host name
        gateway: String,
        /// Why; shown to operators only
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// For how long, as 30m, 12h or 7d; until undrain if left out
        #[arg(long = "for", value_name = "DURATION")]
        lasts: Option<String>,
        /// Not at a broker, which cannot remove peers from a gateway: wgkex-worker drain has it
        #[arg(long, value_name = "DURATION")]
        deadline: Option<String>,
        /// How the call is made and shown.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Gives a gateway new routers again that was drained at this broker
    #[command(after_help = DRAIN_ENDS)]
    Undrain {
        /// The gateway's host name
        gateway: String,
        /// How the call is made and shown.
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Makes a token for admin calls, and the line of the config that lets it in
    #[command(after_help = MAKE_ENDS)]
    AdminToken,
}

/// A key, and the texts of its entry.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// The WireGuard public key
    key: String,
    /// Why; shown to operators only
    #[arg(long)]
    reason: Option<String>,
    /// What the node is called
    #[arg(long)]
    name: Option<String>,
    /// For how long, as 30m, 12h or 7d; for good if left out
    #[arg(long = "for", value_name = "DURATION")]
    lasts: Option<String>,
}

/// How the call is made.
#[derive(Debug, Args)]
pub struct ConnectionArgs {
    /// The file with the token; else it is in the variable `WGKEX_ADMIN_TOKEN`
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// How a call that changes something is made and shown.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    /// Print what it came to as JSON, with the result at each gateway where there is one
    #[arg(long)]
    json: bool,
    /// The connection to the broker.
    #[command(flatten)]
    call: ConnectionArgs,
}

/// The lists there are.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ListName {
    /// Denied keys.
    Deny,
    /// Allowed keys.
    Allow,
    /// Trusted keys.
    Trusted,
    /// Keys denied by an admin call.
    Revoked,
}

impl AdminCommand {
    /// Makes the call, and returns the exit code: 0 if all is done, 2 if not everywhere, 1 if it could not be done.
    #[must_use]
    pub fn run(self, file: Option<&Path>) -> ExitCode {
        match self.text(file) {
            Ok((text, code)) => match io::stdout().write_all(text.as_bytes()) {
                Ok(()) => code,
                Err(_) => ExitCode::FAILURE,
            },
            Err(error) => {
                print_error(&error);
                ExitCode::FAILURE
            }
        }
    }

    /// The text that it prints.
    fn text(self, file: Option<&Path>) -> anyhow::Result<(String, ExitCode)> {
        match self {
            Self::AdminToken => admin_token(),
            Self::Drain { deadline: Some(_), .. } => bail!("deadline: {NO_DEADLINE}"),
            Self::Drain { gateway, reason, lasts, deadline: None, change } => {
                let body = json!({ "gateway": gateway, "reason": reason, "for": lasts });
                change.make(file, BrokerCall::post("/v1/drain", &body), |answer| drained(answer, true))
            }
            Self::Undrain { gateway, change } => {
                let body = json!({ "gateway": gateway });
                change.make(file, BrokerCall::post("/v1/undrain", &body), |answer| drained(answer, false))
            }
            Self::Revoke { about, change } => {
                change.make(file, BrokerCall::post("/v1/revoke", &about.fields(None)), outcome)
            }
            Self::Unrevoke { key, change } => {
                change.make(file, BrokerCall::post("/v1/unrevoke", &json!({ "key": key })), outcome)
            }
            Self::Allow { about, domain, remove, change } => {
                change.make(file, list_call("/v1/lists/allow", remove, &about.fields(domain.as_deref())), outcome)
            }
            Self::Trust { about, remove, change } => {
                change.make(file, list_call("/v1/lists/trusted", remove, &about.fields(None)), outcome)
            }
            Self::List { list, domain, name, json, call } => {
                let list = list.and_then(|list| list.to_possible_value()).map(|list| list.get_name().to_owned());
                let path = path("/v1/keys", &[("list", list), ("domain", domain), ("q", name)]);
                let answer = call.make(file, BrokerCall::get(&path))?;
                Ok((if json { format!("{answer:#}\n") } else { table(&answer) }, ExitCode::SUCCESS))
            }
            Self::Where { key, json, call } => {
                let path = path("/v1/where", &[("key", Some(key))]);
                call.report(file, &path, json, key_reports::found)
            }
            Self::Explain { key, domain, json, call } => {
                let path = path("/v1/explain", &[("key", Some(key)), ("domain", domain)]);
                call.report(file, &path, json, |report| key_reports::explained(report, Style::of_stdout()))
            }
        }
    }
}

fn list_call<'a>(path: &'a str, remove: bool, fields: &'a Value) -> BrokerCall<'a> {
    BrokerCall { method: if remove { "DELETE" } else { "POST" }, ..BrokerCall::post(path, fields) }
}

impl KeyArgs {
    fn fields(&self, domain: Option<&str>) -> Value {
        let Self { key, reason, name, lasts } = self;
        json!({ "key": key, "reason": reason, "name": name, "for": lasts, "domain": domain })
    }
}

impl ChangeArgs {
    /// Makes the call, and returns its result by `text`, or as JSON.
    fn make(
        &self,
        file: Option<&Path>,
        call: BrokerCall<'_>,
        text: impl FnOnce(&Value) -> String,
    ) -> anyhow::Result<(String, ExitCode)> {
        let answer = self.call.make(file, call)?;
        if let Some(warning) = answer["warning"].as_str() {
            let _ = writeln!(io::stderr(), "warning: {warning}");
        }
        let code = if answer["done"] == true { ExitCode::SUCCESS } else { NOT_EVERYWHERE.into() };
        Ok((if self.json { format!("{answer:#}\n") } else { text(&answer) }, code))
    }
}

impl ConnectionArgs {
    /// Sends the call to the broker on this machine.
    fn make(&self, file: Option<&Path>, call: BrokerCall<'_>) -> anyhow::Result<Value> {
        let config = Config::load(file)?;
        if config.admin_token_hash.is_none() {
            bail!(
                "admin_token_hash is not set in the config, so the broker takes no admin calls (wgkex-broker admin-token)"
            );
        }
        BrokerClient::for_admin(&config, &self.token()?, BROKER_TIMEOUT).send(call)
    }

    /// A report of the broker as it is printed: as JSON, or by `text`.
    fn report<T: DeserializeOwned>(
        &self,
        file: Option<&Path>,
        path: &str,
        is_json: bool,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<(String, ExitCode)> {
        let answer = self.make(file, BrokerCall::get(path))?;
        if is_json {
            return Ok((format!("{answer:#}\n"), ExitCode::SUCCESS));
        }
        let report = serde_json::from_value(answer).context("the broker's answer is of another version")?;
        Ok((text(&report), ExitCode::SUCCESS))
    }

    fn token(&self) -> anyhow::Result<String> {
        let source = self.token_file.as_ref().map_or(TOKEN.into(), |file| file.display().to_string());
        let token = match &self.token_file {
            Some(file) => fs::read_to_string(file).context(source.clone())?,
            None => {
                env::var(TOKEN).map_err(|_| anyhow!("a token is needed, in {TOKEN} or in a file (--token-file)"))?
            }
        };
        let token = token.trim().to_owned();
        if token.is_empty() {
            bail!("the token in {source} is empty");
        }
        if token.chars().any(|c| c.is_control() || !c.is_ascii()) {
            bail!("the token is not one line of ASCII");
        }
        Ok(token)
    }
}

/// The path with these parameters.
fn path(path: &str, parameters: &[(&str, Option<String>)]) -> String {
    let mut path = format!("{path}?");
    for (name, value) in parameters {
        if let Some(value) = value {
            let _ = write!(path, "{name}={}&", utf8_percent_encode(value, NON_ALPHANUMERIC));
        }
    }
    path
}

/// The outcome of a change, as text.
fn outcome(answer: &Value) -> String {
    let text = |field: &str| answer[field].as_str().unwrap_or_default();
    let is = |field: &str| answer[field] == true;
    let on = answer.get("still_by").is_none();
    let list = text("list");
    let mut lines = match (list, on) {
        ("deny", true) => "revoked".to_owned(),
        ("deny", false) => "not revoked any more".to_owned(),
        (list, true) => format!("on the list {list}"),
        (list, false) => format!("not on the list {list} any more"),
    };
    if let Some(domain) = answer["domain"].as_str() {
        let _ = write!(lines, ", in {domain}");
    }
    if let Some(until) = answer["until"].as_u64().filter(|_| on) {
        let _ = write!(lines, ", until {}", utc(until));
    }
    lines.push_str(match (on, is("was_on")) {
        (true, true) => " (it was before)\n",
        (false, false) => " (it was not)\n",
        _ => "\n",
    });
    for (gateway, result) in answer["gateways"].as_object().into_iter().flatten() {
        let _ = writeln!(lines, "{gateway}: {}", explained(result.as_str().unwrap_or_default()));
    }
    for source in answer["still_by"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let _ = writeln!(lines, "still on the list {list} by {source}");
    }
    if !is("published") {
        lines.push_str("MQTT does not take it: gateways and other brokers get it when it does\n");
    }
    if !is("kept") {
        lines.push_str("the disk does not take it: a restart of this broker may lose it\n");
    }
    lines
}

/// The outcome of a drain, or of its end, as text.
fn drained(answer: &Value, on: bool) -> String {
    let is = |field: &str| answer[field] == true;
    let mut lines = format!(
        "{}: {}",
        printable(answer["gateway"].as_str().unwrap_or_default()),
        if on { "draining" } else { "not drained by this broker any more" }
    );
    if let Some(until) = answer["until"].as_u64().filter(|_| on) {
        let _ = write!(lines, ", until {}", utc(until));
    }
    lines.push_str(match (on, is("was_on")) {
        (true, true) => " (it was before)\n",
        (false, false) => " (it was not)\n",
        _ => "\n",
    });
    if !is("known") {
        lines.push_str("no gateway of this name has published anything, and the config names none\n");
    }
    if !is("kept") {
        lines.push_str("the disk does not take it: a restart of this broker loses it\n");
    }
    lines
}

fn explained(result: &str) -> String {
    match result {
        revocation::OFFLINE => format!("{result} (applies it when it is back, before it takes keys)"),
        revocation::UNSUPPORTED => format!("{result} (an original, or an old version)"),
        _ => result.to_owned(),
    }
}

/// The entries as text: one line each.
fn table(answer: &Value) -> String {
    let mut lines = String::new();
    for entry in answer["keys"].as_array().into_iter().flatten() {
        let text = |field: &str| entry[field].as_str();
        let _ = write!(lines, "{:7} {}", text("list").unwrap_or_default(), text("key").unwrap_or_default());
        let until = entry["until"].as_u64().map(utc);
        let fields = [
            ("name", text("name").map(str::to_owned)),
            ("domain", text("domain").map(str::to_owned)),
            ("until", until),
            ("by", text("source").map(str::to_owned)),
            ("reason", text("reason").map(str::to_owned)),
        ];
        for (field, value) in fields {
            if let Some(value) = value {
                let _ = write!(lines, "  {field}: {value}");
            }
        }
        lines.push('\n');
    }
    if lines.is_empty() { "no entries\n".into() } else { lines }
}

/// A new token of 256 random bits.
pub(super) fn random_token() -> anyhow::Result<String> {
    let mut random = [0; 32];
    SystemRandom::new().fill(&mut random).map_err(|_| anyhow!("the system gives no random numbers"))?;
    Ok(hex::encode(random))
}

fn admin_token() -> anyhow::Result<(String, ExitCode)> {
    let token = random_token()?;
    let hash = token_hash(&token);
    let text = format!(
        "The token, for {TOKEN} or --token-file:\n{token}\nFor the config of the broker, which then has to be restarted:\nadmin_token_hash: \"{hash}\"\n"
    );
    Ok((text, ExitCode::SUCCESS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_of_a_revocation_is_a_line_for_each_gateway() {
        let answer = json!({
            "key": "k", "list": "deny", "domain": null, "until": 1_924_991_999, "was_on": false, "kept": true,
            "published": true, "done": false,
            "gateways": { "gw1": "removed", "gw2": "was not there", "gw3": "offline", "gw4": "cannot" },
        });
        let expected = "revoked, until 2030-12-31T23:59:59Z\n\
                        gw1: removed\n\
                        gw2: was not there\n\
                        gw3: offline (applies it when it is back, before it takes keys)\n\
                        gw4: cannot (an original, or an old version)\n";
        assert_eq!(outcome(&answer), expected);
        let answer = json!({
            "list": "deny", "was_on": false, "kept": false, "published": false, "still_by": ["blacklist_file"],
        });
        let expected = "not revoked any more (it was not)\n\
                        still on the list deny by blacklist_file\n\
                        MQTT does not take it: gateways and other brokers get it when it does\n\
                        the disk does not take it: a restart of this broker may lose it\n";
        assert_eq!(outcome(&answer), expected);
    }

    #[test]
    fn a_drain_is_a_line_and_what_is_odd_about_it() {
        let answer = json!({ "gateway": "gw1", "until": 0, "was_on": false, "known": true, "kept": true });
        assert_eq!(drained(&answer, true), "gw1: draining, until 1970-01-01T00:00:00Z\n");
        let answer = json!({ "gateway": "gw1", "until": null, "was_on": false, "known": false, "kept": false });
        let expected = "gw1: not drained by this broker any more (it was not)\n\
                        no gateway of this name has published anything, and the config names none\n\
                        the disk does not take it: a restart of this broker loses it\n";
        assert_eq!(drained(&answer, false), expected);
    }

    #[test]
    fn a_query_survives_the_path() {
        let path = path("/v1/keys", &[("list", Some("deny".into())), ("domain", None), ("q", Some("ä b/+&".into()))]);
        assert_eq!(path, "/v1/keys?list=deny&q=%C3%A4%20b%2F%2B%26&");
    }

    #[test]
    fn entries_are_a_line_each() {
        let answer = json!({ "keys": [
            { "list": "deny", "key": "K", "name": "attic", "until": 0, "source": "admin", "reason": "spam" },
            { "list": "trusted", "key": "L", "source": "key_whitelist" },
        ] });
        let expected = "deny    K  name: attic  until: 1970-01-01T00:00:00Z  by: admin  reason: spam\n\
                        trusted L  by: key_whitelist\n";
        assert_eq!(table(&answer), expected);
        assert_eq!(table(&json!({ "keys": [] })), "no entries\n");
    }
}
