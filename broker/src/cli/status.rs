//! `status` and `gateways`: what the status page shows, for a terminal or a script. They need no token.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;
use wgkex_common::Config;
use wgkex_common::style::{Colour, Style};

use crate::cli::http_client::{BROKER_TIMEOUT, BrokerCall, BrokerClient};
use crate::cli::table::{Cell, table};
use crate::cli::{print, print_error};
use crate::fleet::status::{DomainGateways, GatewayStatus, Problem, ProblemKind, age, printable};
use crate::http::status::{Durations, KeyStatus, STATUS_PATH, Status};
use crate::mqtt_server::RefusedClient;
use crate::registry::RegistryStatus;
use crate::tenants::TenantStatus;

/// The exit code when the broker was reached, and something is wrong.
const EXIT_PROBLEMS: u8 = 3;
/// How often `--watch` reads the status.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// Moves the cursor of a terminal to its first place, and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// The exit codes, for the help.
pub const EXIT_CODES: &str = "Exits with 0 if all is well, with 1 if the broker cannot be reached, with 3 if something is wrong: it is not ready, a domain \
     has no gateway, a gateway that the config names is offline, an interface is missing or its data is, a clock is off, a list cannot be read, state \
     is not kept, two programs use one MQTT client id, a proxy is not in trusted_proxies, the registry cannot be used, is another \
     broker's or refuses a gateway's server, tenants of another broker have other rules, their hub is missing, routers do not reach \
     a gateway, or two gateways publish the same. Needs no token: it shows what the page / on broker_listen shows.";

/// The command `status`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct StatusCommand {
    /// Look again every 2 s, with rates, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// As JSON; with --watch a line each time
    #[arg(long)]
    json: bool,
}

/// The command `gateways`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct GatewaysCommand {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// An answer of the broker, and its time.
pub(super) struct StatusSample {
    at: Instant,
    json: Value,
    pub(super) status: Status,
}

impl GatewaysCommand {
    /// Prints the gateways, and returns the exit code: 0 if all is well, 1 without an answer, 3 if something is wrong.
    #[must_use]
    pub fn run(self, file: Option<&Path>) -> ExitCode {
        let printed = client(file).and_then(|client| {
            let StatusSample { json, status, .. } = fetch_status(&client)?;
            let text = if self.json {
                format!("{:#}\n", json["gateways"])
            } else {
                let style = Style::of_stdout();
                problem_lines(&status.problems, style) + &gateways(&status.gateways, style)
            };
            print(&text)?;
            Ok(exit_code(&status))
        });
        or_failure(printed)
    }
}

impl StatusCommand {
    /// Prints the status, and returns the exit code: 0 if all is well, 1 without an answer, 3 if something is wrong.
    #[must_use]
    pub fn run(self, file: Option<&Path>) -> ExitCode {
        or_failure(client(file).and_then(|client| if self.watch { self.watch(&client) } else { self.once(&client) }))
    }

    fn once(&self, client: &BrokerClient) -> anyhow::Result<ExitCode> {
        let sample = fetch_status(client)?;
        let text = if self.json {
            format!("{:#}\n", sample.json)
        } else {
            screen(&client.address(), &sample, None, Style::of_stdout())
        };
        print(&text)?;
        Ok(exit_code(&sample.status))
    }

    /// Repeats until the output is closed. A broker that does not answer is tried again.
    fn watch(&self, client: &BrokerClient) -> anyhow::Result<ExitCode> {
        let style = Style::of_stdout();
        let is_terminal = io::IsTerminal::is_terminal(&io::stdout());
        let mut before: Option<StatusSample> = None;
        loop {
            let sample = fetch_status(client);
            let text = match &sample {
                Ok(sample) if self.json => format!("{}\n", sample.json),
                Ok(sample) => screen(&client.address(), sample, before.as_ref(), style) + "\n",
                Err(error) if self.json => {
                    print_error(error);
                    String::new()
                }
                Err(error) => format!("{}\n\n", style.paint(Colour::Bad, &printable(&format!("error: {error:#}")))),
            };
            let clear = if is_terminal && !self.json { CLEAR } else { "" };
            print(&format!("{clear}{text}"))?;
            before = sample.ok();
            sleep(WATCH_INTERVAL);
        }
    }
}

fn client(file: Option<&Path>) -> anyhow::Result<BrokerClient> {
    Ok(BrokerClient::for_anybody(&Config::load(file)?, BROKER_TIMEOUT))
}

/// Requests the status of the broker.
pub(super) fn fetch_status(client: &BrokerClient) -> anyhow::Result<StatusSample> {
    let json = client.send(BrokerCall::get(STATUS_PATH))?;
    let at = Instant::now();
    let status = serde_json::from_value(json.clone()).context("the broker's status is of another version")?;
    Ok(StatusSample { at, json, status })
}

fn or_failure(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        print_error(&error);
        ExitCode::FAILURE
    })
}

fn exit_code(status: &Status) -> ExitCode {
    if status.ready && status.problems.is_empty() { ExitCode::SUCCESS } else { EXIT_PROBLEMS.into() }
}

/// Everything on one screen, with rates since the sample `before`.
fn screen(address: &str, sample: &StatusSample, before: Option<&StatusSample>, style: Style) -> String {
    let Status {
        version,
        uptime_secs,
        ready,
        problems,
        domains,
        gateways: all,
        refused_clients,
        keys: now,
        tenants,
        registry,
        pid: _,
    } = &sample.status;
    let state =
        if *ready { style.paint(Colour::Good, "ready") } else { style.paint(Colour::Bad, "cannot serve routers") };
    let up = age(*uptime_secs);
    let mut text = format!("wgkex-broker {} on {address}: {state}, up for {up}\n", printable(version));
    text += &problem_lines(problems, style);
    let rates = before.map(|before| ExchangeRates::between(before, sample));
    let unserved = |name: &str| {
        let has_problem = |kind, subject: &str| kind == ProblemKind::DomainWithoutGateway && subject == name;
        problems.iter().any(|problem| has_problem(problem.kind, &problem.subject))
    };
    let row = |DomainGateways { name, gateways }: &DomainGateways| {
        let served = if gateways.is_empty() { Cell::text("none") } else { Cell::text(&gateways.join(", ")) };
        let colour = if gateways.is_empty() && unserved(name) { Colour::Bad } else { Colour::Plain };
        [Cell::text(name), served.coloured(colour)]
    };
    let domains: Vec<_> = domains.iter().map(row).collect();
    let _ = write!(text, "\n{}\n{}\n", table(["DOMAIN", "SERVED BY"], &domains, style), gateways(all, style));
    let tenants = tenants.as_ref().map(tenants_line).unwrap_or_default();
    let registry = registry.as_ref().map(registry_line).unwrap_or_default();
    text + &keys(now, rates.as_ref()) + &tenants + &registry + &refused(refused_clients, style)
}

/// The problems.
fn problem_lines(problems: &[Problem], style: Style) -> String {
    let line = |problem: &Problem| style.paint(Colour::Bad, &format!("! {}", printable(&problem.text))) + "\n";
    problems.iter().map(line).collect()
}

/// The clients that the MQTT server refused last; nothing if there are none.
fn refused(clients: &[RefusedClient], style: Style) -> String {
    let row = |client: &RefusedClient| {
        let or_none = |text: &Option<String>| Cell::text(text.as_deref().unwrap_or("-"));
        [
            or_none(&client.user),
            or_none(&client.client),
            Cell::number(&client.count),
            Cell::number(&format!("{} ago", age(client.last_secs))),
            Cell::text(&client.cause),
        ]
    };
    let rows: Vec<_> = clients.iter().map(row).collect();
    let head = ["REFUSED MQTT USER", "CLIENT ID", "TIMES", "LAST", "WHY"];
    if rows.is_empty() { String::new() } else { format!("\n{}", table(head, &rows, style)) }
}

fn tenants_line(TenantStatus { tenants, members, held, sockets }: &TenantStatus) -> String {
    format!("tenants {tenants}, members {members}, held addresses {held}, WebSockets {sockets}\n")
}

fn registry_line(status: &RegistryStatus) -> String {
    let RegistryStatus { storage, storage_up, elsewhere, emptied, servers, leases } = status;
    let state = match elsewhere {
        Some(broker) => format!("refused here, broker {} has it", printable(broker.as_str())),
        None if *storage_up => "up".to_owned(),
        None if emptied.is_some() => "empty, but had servers before".to_owned(),
        None => "cannot be used".to_owned(),
    };
    format!("registry {} {state}, servers {servers}, leases {leases}\n", printable(storage))
}

/// The changes between two samples.
struct ExchangeRates {
    accepted: f64,
    refused: f64,
    confirmation: Durations,
}

impl ExchangeRates {
    fn between(before: &StatusSample, after: &StatusSample) -> Self {
        let seconds = after.at.saturating_duration_since(before.at).as_secs_f64().max(f64::MIN_POSITIVE);
        #[expect(clippy::cast_precision_loss, reason = "counts of keys stay far below 2^52")]
        let rate =
            |of: fn(&KeyStatus) -> u64| of(&after.status.keys).saturating_sub(of(&before.status.keys)) as f64 / seconds;
        Self {
            accepted: rate(accepted),
            refused: rate(refused_keys),
            confirmation: after.status.keys.confirmation.since(&before.status.keys.confirmation),
        }
    }
}

fn accepted(keys: &KeyStatus) -> u64 {
    keys.accepted.values().sum()
}

fn refused_keys(keys: &KeyStatus) -> u64 {
    keys.refused.values().flat_map(|by_reason| by_reason.values()).sum()
}

fn keys(keys: &KeyStatus, rates: Option<&ExchangeRates>) -> String {
    let KeyStatus { established, unestablished, queued, unacknowledged, waiting, oldest_pending_secs, .. } = keys;
    let rate = |of: fn(&ExchangeRates) -> f64| rates.map_or(String::new(), |rates| format!(" ({:.1}/s)", of(rates)));
    let oldest = oldest_pending_secs.map_or("-".to_owned(), |seconds| format!("{seconds:.1} s"));
    let (Durations { count, p50, p99, .. }, period) = match rates {
        Some(rates) => (&rates.confirmation, "just now"),
        None => (&keys.confirmation, "since the start"),
    };
    let reasons = keys.refused.values().flatten().filter(|(_, count)| **count > 0);
    let mut by_reason = std::collections::BTreeMap::<&str, u64>::new();
    for (reason, count) in reasons {
        *by_reason.entry(reason).or_default() += count;
    }
    let by_reason: Vec<_> = by_reason.iter().map(|(reason, count)| format!("{} {count}", printable(reason))).collect();
    let by_reason = if by_reason.is_empty() { String::new() } else { format!(": {}", by_reason.join(", ")) };
    format!(
        "keys accepted{} {}, refused{} {}{by_reason}\n\
         live keys {}, {established} of them have had a handshake\n\
         queued {queued}, unacknowledged {unacknowledged}, requests waiting {waiting}, oldest pending {oldest}\n\
         confirmation {period}: {count} keys, p50 {}, p99 {}\n",
        rate(|rates| rates.accepted),
        accepted(keys),
        rate(|rates| rates.refused),
        refused_keys(keys),
        established + unestablished,
        milliseconds(*p50),
        milliseconds(*p99),
    )
}

fn milliseconds(seconds: Option<f64>) -> String {
    seconds.map_or("-".into(), |seconds| format!("{:.1} ms", seconds * 1000.0))
}

/// The table of gateways.
fn gateways(gateways: &[GatewayStatus], style: Style) -> String {
    if gateways.is_empty() {
        return "no gateway is known\n".into();
    }
    let row = |gateway: &GatewayStatus| {
        let colour = if gateway.online { Colour::Good } else { Colour::Bad };
        let is_sure = gateway.draining.is_empty() && gateway.last_known_secs.is_none();
        let colour = if is_sure { colour } else { Colour::Plain };
        let domains: Vec<_> =
            gateway.domains.iter().map(|domain| format!("{} {}", domain.domain, domain.note(gateway.online))).collect();
        let offline = gateway.offline.as_ref().map(ToString::to_string);
        let draining = gateway.draining.iter().map(ToString::to_string);
        let notes = gateway
            .last_known()
            .into_iter()
            .chain(offline)
            .chain(draining)
            .chain([domains.join(", ")])
            .filter(|note| !note.is_empty());
        [
            Cell::text(&gateway.name),
            Cell::text(gateway.state()).coloured(colour),
            Cell::text(gateway.version.as_deref().unwrap_or("unknown")),
            Cell::number(&gateway.connected),
            Cell::number(&gateway.assigned),
            Cell::number(&gateway.reach.unreached),
            Cell::number(&format!("{:.1}%", gateway.share * 100.0)),
            Cell::number(&format!("{:.1}", gateway.target)),
            Cell::text(&notes.collect::<Vec<_>>().join("; ")),
        ]
    };
    let rows: Vec<_> = gateways.iter().map(row).collect();
    let head = ["GATEWAY", "STATE", "VERSION", "CONNECTED", "ASSIGNED", "UNREACHED", "SHARE", "TARGET", "DOMAINS"];
    table(head, &rows, style)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(at: Instant, accepted: u64) -> StatusSample {
        let status = json!({
            "version": "9.9", "uptime_secs": 7500, "ready": true,
            "problems": [
                { "kind": "domain_without_gateway", "subject": "ff_b", "text": "domain ff_b: no gateway is online\u{1b}" },
            ],
            "domains": [{ "name": "ff_a", "gateways": ["gw1", "gw2"] }, { "name": "ff_b", "gateways": [] }],
            "gateways": [
                {
                    "name": "gw1", "online": true, "version": "9.9", "offline": null, "connected": 7, "assigned": 2,
                    "weight": 84.0, "share": 0.6667, "target": 6.0,
                    "domains": [{ "domain": "ff_a", "state": "up", "connected": 7, "assigned": 2 }],
                },
                {
                    "name": "gw3", "online": false, "version": null, "connected": 0, "assigned": 0,
                    "offline": { "reason": { "silent": 150 }, "for_secs": 60 },
                    "weight": 1.0, "share": 0.01, "target": 0.1,
                    "domains": [{ "domain": "ff_b", "state": { "down": 90 }, "connected": 0, "assigned": 0 }],
                },
                {
                    "name": "gw4", "online": true, "version": "9.9", "offline": null, "connected": 1, "assigned": 0,
                    "draining": [{ "by": "broker", "since": 0, "until": 60, "reason": "kernel" }],
                    "weight": 1.0, "share": 0.01, "target": 0.1, "domains": [],
                },
            ],
            "refused_clients": [{
                "user": "gw1\u{1b}", "client": null, "reason": "password", "cause": "wrong password", "count": 3, "last_secs": 40,
            }],
            "keys": {
                "accepted": { "v1": 1, "v2": accepted }, "refused": { "v1": { "domain": 2, "key": 0 }, "v2": { "domain": 1 } },
                "established": 3, "unestablished": 4, "queued": 5, "unacknowledged": 6, "waiting": 7,
                "oldest_pending_secs": 1.25,
                "confirmation": {
                    "count": accepted, "p50": 0.002, "p99": 0.2,
                    "buckets": [{ "le": 0.1, "count": accepted }],
                },
            },
        });
        StatusSample { at, status: serde_json::from_value(status.clone()).unwrap(), json: status }
    }

    #[test]
    fn one_screen_has_all_that_is_served_and_all_that_is_wrong() {
        let sample = sample(Instant::now(), 40);
        let expected = "wgkex-broker 9.9 on 127.0.0.1:5000: ready, up for 2 h 5 min\n\
            ! domain ff_b: no gateway is online?\n\
            \n\
            DOMAIN  SERVED BY\n\
            ff_a    gw1, gw2\n\
            ff_b    none\n\
            \n\
            GATEWAY  STATE     VERSION  CONNECTED  ASSIGNED  UNREACHED  SHARE  TARGET  DOMAINS\n\
            gw1      online    9.9              7         2          0  66.7%     6.0  ff_a 7\n\
            gw3      offline   unknown          0         0          0   1.0%     0.1  nothing received for 2 min, offline for 60 s; ff_b offline\n\
            gw4      draining  9.9              1         0          0   1.0%     0.1  draining by this broker, since 1970-01-01T00:00:00Z, until 1970-01-01T00:01:00Z: kernel\n\
            \n\
            keys accepted 41, refused 3: domain 3\n\
            live keys 7, 3 of them have had a handshake\n\
            queued 5, unacknowledged 6, requests waiting 7, oldest pending 1.2 s\n\
            confirmation since the start: 40 keys, p50 2.0 ms, p99 200.0 ms\n\
            \n\
            REFUSED MQTT USER  CLIENT ID  TIMES      LAST  WHY\n\
            gw1?               -              3  40 s ago  wrong password\n";
        assert_eq!(screen("127.0.0.1:5000", &sample, None, Style::Plain), expected);
        let coloured = screen("127.0.0.1:5000", &sample, None, Style::Coloured);
        assert!(coloured.contains("\x1b[31mnone\x1b[0m") && coloured.contains("\x1b[32mready\x1b[0m"), "{coloured}");
        assert_eq!(exit_code(&sample.status), EXIT_PROBLEMS.into());
    }

    #[test]
    fn rates_are_those_between_two_looks() {
        let begun = Instant::now();
        let (before, after) = (sample(begun, 40), sample(begun + Duration::from_secs(2), 140));
        let text = screen("x", &after, Some(&before), Style::Plain);
        assert!(text.contains("keys accepted (50.0/s) 141, refused (0.0/s) 3: domain 3\n"), "{text}");
        assert!(text.contains("confirmation just now: 100 keys, p50 50.0 ms, p99 99.0 ms\n"), "{text}");
    }
}
