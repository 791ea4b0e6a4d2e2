//! The state that a worker reports on one screen, and as `/status.json`: no keys, no addresses. No IO.
//!
//! No task. Previous stop: [`crate::http`], which makes a [`WorkerStatus`] from the state of the rooms and serves it; next
//! stop: [`crate::cli`], which shows it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use wgkex_common::peer_clock::Difference;
use wgkex_common::style::{Colour, Style};
use wgkex_common::wire::drain::Drain;

use crate::leases::ServerStatus;

/// The problem that is reported if another program may use the worker's name.
pub const NAME_IN_USE: &str = "MQTT: another program may use this worker's name, or mqtt.username is that of another worker: the server ends \
     its connections again and again; each worker needs a host name of its own, and a user of that name";

/// The state of a worker at one instant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// The version of the program.
    pub version: String,
    /// The worker's name on the bus.
    pub worker: String,
    /// Its process id, in its own namespace.
    pub pid: u32,
    /// Its uptime in seconds.
    pub uptime_seconds: u64,
    /// Its connection with the MQTT server.
    pub mqtt: MqttStatus,
    /// That the gateway gets no new routers.
    #[serde(default)]
    pub drain: Option<Drain>,
    /// Peers that drains past their deadlines have removed since it started.
    #[serde(default)]
    pub peers_drained: u64,
    /// Each domain that it serves.
    pub domains: BTreeMap<String, DomainStatus>,
    /// Each server of the registry that it is.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub servers: BTreeMap<String, ServerStatus>,
    /// The brokers whose clock differs from this gateway's, by name, with the difference.
    #[serde(default)]
    pub clocks_off: BTreeMap<String, Difference>,
    /// The outcomes of keys since it started.
    pub keys: KeyTotals,
    /// The batches applied to the kernel since it started.
    pub batches: BatchTotals,
    /// Keys that wait to be taken into a batch.
    pub queue: u64,
    /// Keys that arrived and are not in the kernel, without those in the queue.
    pub pending: u64,
    /// How long the oldest of these has been waiting, in seconds.
    pub oldest_pending_seconds: Option<f64>,
    /// Whether the keys are kept on disk.
    pub state_kept: bool,
    /// Whether list entries of admin calls are kept on disk.
    pub lists_kept: bool,
    /// Lists that cannot be read, by their keys in the config.
    pub lists_damaged: Vec<String>,
    /// The problems, each in one line; none if all is well.
    pub problems: Vec<String>,
}

/// The connection with the MQTT server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MqttStatus {
    /// Whether keys can arrive and be confirmed.
    pub connected: bool,
    /// Why not.
    pub cause: Option<String>,
    /// Whether another program may use the worker's name: the server ends its connections again and again.
    #[serde(default)]
    pub name_in_use: bool,
}

/// A domain at this gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainStatus {
    /// The name of its WireGuard interface.
    pub wireguard: String,
    /// The name of its VXLAN interface.
    pub vxlan: String,
    /// Whether routers can use it here.
    pub up: bool,
    /// Why not.
    pub reason: Option<String>,
    /// The UDP port of WireGuard.
    pub port: Option<u16>,
    /// Its peers, each in one state.
    pub peers: PeerTotals,
}

/// How many peers are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTotals {
    /// With a handshake in the last 3 minutes.
    pub connected: u64,
    /// With an older one.
    pub idle: u64,
    /// With none yet.
    pub never_connected: u64,
    /// Silent for so long that the next sweep removes them, if wgkex made them.
    pub stale: u64,
}

/// The outcomes of keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyTotals {
    /// They arrived over MQTT.
    pub received: u64,
    /// They are newly in the kernel.
    pub installed: u64,
    /// They arrived again.
    pub refreshed: u64,
    /// A lost object of theirs was restored.
    pub restored: u64,
    /// They are not in the kernel.
    pub failed: u64,
    /// They were dropped because a queue was full.
    pub dropped: u64,
}

/// The batches applied to the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchTotals {
    /// How many batches.
    pub batches: u64,
    /// How many keys in all of them.
    pub keys: u64,
    /// How long the kernel took for all of them.
    pub seconds: f64,
}

/// The changes from one [`WorkerStatus`] to a later one, per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Keys that arrived.
    pub keys: f64,
    /// Batches.
    pub batches: f64,
}

impl WorkerStatus {
    /// Derives the problems from the other fields.
    #[must_use]
    pub fn find_problems(&self) -> Vec<String> {
        let mqtt =
            (!self.mqtt.connected).then(|| format!("MQTT: {}", self.mqtt.cause.as_deref().unwrap_or("no connection")));
        let in_use = self.mqtt.name_in_use.then(|| NAME_IN_USE.to_owned());
        let domains = self.domains.iter().filter(|(_, domain)| !domain.up);
        let domains = domains.map(|(name, domain)| {
            format!("domain {name}: {}", domain.reason.as_deref().unwrap_or("its interfaces are not read yet"))
        });
        let servers = self.servers.iter().filter(|(_, server)| !server.up).map(|(name, server)| {
            format!("server {name}: {}", server.reason.as_deref().unwrap_or("its interface is not read yet"))
        });
        let lists = self.lists_damaged.iter().map(|list| {
            format!("list {list}: it cannot be read, what was last read of it counts: the log has the reason")
        });
        let unkept =
            "a restart would lose them: the disk is full or state_dir cannot be written, the log has the reason";
        let state = (!self.state_kept).then(|| format!("state: the keys are not kept on disk, {unkept}"));
        let entries = (!self.lists_kept).then(|| format!("state: list entries are not kept on disk, {unkept}"));
        let clocks = self.clocks_off.iter().map(|(broker, difference)| {
            format!("clock: that of broker {broker} is {difference} this gateway's: synchronise both machines (NTP)")
        });
        let of_bus = mqtt.into_iter().chain(in_use).chain(clocks);
        of_bus.chain(domains).chain(servers).chain(lists).chain(state).chain(entries).collect()
    }

    /// The rates since `before`, `elapsed` ago; none if that was reported by another process.
    #[must_use]
    pub fn rates(&self, before: &Self, elapsed: Duration) -> Option<Rates> {
        let seconds = elapsed.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "it is shown with one digit")]
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        (self.pid == before.pid && seconds > 0.0).then(|| Rates {
            keys: rate(self.keys.received, before.keys.received),
            batches: rate(self.batches.batches, before.batches.batches),
        })
    }

    /// The status as one screen of text.
    #[must_use]
    pub fn screen(&self, rates: Option<Rates>, style: Style) -> String {
        let mut screen = String::new();
        let verdict = match self.problems.len() {
            0 => style.paint(Colour::Good, "all well"),
            1 => style.paint(Colour::Bad, "1 problem"),
            number => style.paint(Colour::Bad, &format!("{number} problems")),
        };
        let Self { worker, version, .. } = self;
        let uptime = uptime(self.uptime_seconds);
        let _ = writeln!(screen, "worker {worker}, version {version}, up {uptime}: {verdict}");
        let mqtt = if self.mqtt.connected {
            style.paint(Colour::Good, "connected")
        } else {
            style.paint(Colour::Bad, "not connected")
        };
        let _ = writeln!(screen, "MQTT {mqtt}");
        if let Some(drain) = &self.drain {
            let _ = writeln!(screen, "{} {drain}", style.paint(Colour::Odd, "draining"));
        }
        if self.peers_drained > 0 {
            let _ = writeln!(screen, "peers removed by drains: {}", self.peers_drained);
        }
        for (name, domain) in &self.domains {
            let _ = writeln!(screen, "{}", domain.line(name, style));
        }
        for (name, ServerStatus { interface, up, leases, .. }) in &self.servers {
            let state = if *up { style.paint(Colour::Good, "up") } else { style.paint(Colour::Bad, "down") };
            let _ = writeln!(screen, "server {name} {state}: {interface}; leases {leases}");
        }
        let KeyTotals { received, installed, refreshed, restored, failed, dropped } = self.keys;
        let per_second = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!(", {rate:.1}/s"));
        let _ = writeln!(
            screen,
            "keys: received {received}{}, installed {installed}, came again {refreshed}, restored {restored}, failed {failed}, \
             dropped {dropped}",
            per_second(rates.map(|rates| rates.keys))
        );
        let _ = writeln!(
            screen,
            "batches: {}{}, {}",
            self.batches.batches,
            per_second(rates.map(|rates| rates.batches)),
            self.batches.average()
        );
        let oldest = self.oldest_pending_seconds.map_or_else(String::new, |age| format!(", the oldest for {age:.1} s"));
        let _ = writeln!(screen, "waiting: {} in the queue, {} pending{oldest}", self.queue, self.pending);
        for problem in &self.problems {
            let _ = writeln!(screen, "{} {problem}", style.paint(Colour::Bad, "wrong:"));
        }
        screen
    }
}

impl DomainStatus {
    fn line(&self, name: &str, style: Style) -> String {
        let Self { wireguard, vxlan, peers, .. } = self;
        let state = if self.up { style.paint(Colour::Good, "up") } else { style.paint(Colour::Bad, "down") };
        let port = self.port.map_or_else(String::new, |port| format!(", UDP port {port}"));
        let PeerTotals { connected, idle, never_connected, stale } = peers;
        format!(
            "domain {name} {state}: {wireguard}, {vxlan}{port}; peers: connected {connected}, idle {idle}, \
             never connected {never_connected}, stale {stale}"
        )
    }
}

impl BatchTotals {
    #[expect(clippy::cast_precision_loss, reason = "it is shown with one digit")]
    fn average(&self) -> String {
        if self.batches == 0 {
            return "none so far".to_owned();
        }
        let (keys, milliseconds) =
            (self.keys as f64 / self.batches as f64, 1000.0 * self.seconds / self.batches as f64);
        format!("on average {keys:.1} keys in {milliseconds:.1} ms")
    }
}

fn uptime(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> WorkerStatus {
        let domain = DomainStatus {
            wireguard: "wg-welt".into(),
            vxlan: "vx-welt".into(),
            up: true,
            reason: None,
            port: Some(40011),
            peers: PeerTotals { connected: 3, idle: 2, never_connected: 1, stale: 4 },
        };
        WorkerStatus {
            version: "1".into(),
            worker: "gw01".into(),
            pid: 7,
            uptime_seconds: 180,
            mqtt: MqttStatus { connected: true, cause: None, name_in_use: false },
            drain: None,
            peers_drained: 0,
            domains: [("ffmuc_welt".to_owned(), domain)].into(),
            servers: [(
                "s1".to_owned(),
                ServerStatus { interface: "wg-s1".into(), up: true, reason: None, leases: 97 },
            )]
            .into(),
            clocks_off: BTreeMap::new(),
            keys: KeyTotals { received: 20, ..KeyTotals::default() },
            batches: BatchTotals { batches: 4, keys: 20, seconds: 0.1 },
            queue: 5,
            pending: 6,
            oldest_pending_seconds: Some(1.25),
            state_kept: true,
            lists_kept: true,
            lists_damaged: Vec::new(),
            problems: Vec::new(),
        }
    }

    #[test]
    fn each_thing_that_is_wrong_is_one_line() {
        type Spoil = fn(&mut WorkerStatus);
        let table: [(Spoil, &str); 9] = [
            (
                |status| status.clocks_off.extend([("b1".to_owned(), Difference::Behind(3_600))]),
                "clock: that of broker b1 is 3600 s behind this gateway's",
            ),
            (
                |status| {
                    let server = ServerStatus { reason: Some("it is missing".into()), ..ServerStatus::default() };
                    status.servers.insert("s1".into(), server);
                },
                "server s1: it is missing",
            ),
            (
                |status| {
                    status.mqtt = MqttStatus { connected: false, cause: Some("refused".into()), name_in_use: false }
                },
                "MQTT: refused",
            ),
            (|status| status.mqtt.name_in_use = true, "MQTT: another program may use this worker's name"),
            (
                |status| down(status, Some("interface wg-welt is missing")),
                "domain ffmuc_welt: interface wg-welt is missing",
            ),
            (|status| down(status, None), "domain ffmuc_welt: its interfaces are not read yet"),
            (|status| status.lists_damaged = vec!["blacklist_file".into()], "list blacklist_file: it cannot be read"),
            (|status| status.state_kept = false, "state: the keys are not kept on disk"),
            (|status| status.lists_kept = false, "state: list entries are not kept on disk"),
        ];
        assert_eq!(well().find_problems(), Vec::<String>::new());
        for (spoil, problem) in table {
            let mut status = well();
            spoil(&mut status);
            let problems = status.find_problems();
            assert!(problems.len() == 1 && problems[0].starts_with(problem), "{problems:?}");
        }
    }

    fn down(status: &mut WorkerStatus, reason: Option<&str>) {
        for domain in status.domains.values_mut() {
            (domain.up, domain.reason) = (false, reason.map(str::to_owned));
        }
    }

    #[test]
    fn the_screen_has_all_of_it_and_colours_only_if_asked() {
        let before = well();
        let mut now = WorkerStatus { keys: KeyTotals { received: 40, ..before.keys }, ..well() };
        now.batches.batches = 14;
        now.problems = vec!["MQTT: refused".into()];
        now.peers_drained = 12;
        now.drain = Some(Drain { since: 0, until: None, reason: Some("kernel".into()), deadline: None });
        let rates = now.rates(&before, Duration::from_secs(2));
        assert_eq!(rates, Some(Rates { keys: 10.0, batches: 5.0 }));
        assert_eq!(WorkerStatus { pid: 8, ..well() }.rates(&before, Duration::from_secs(2)), None, "it was restarted");
        let screen = now.screen(rates, Style::Plain);
        for text in [
            "worker gw01, version 1, up 3 min: 1 problem\n",
            "domain ffmuc_welt up: wg-welt, vx-welt, UDP port 40011; peers: connected 3, idle 2, never connected 1, stale 4\n",
            "keys: received 40, 10.0/s, installed 0",
            "batches: 14, 5.0/s, on average 1.4 keys in 7.1 ms\n",
            "waiting: 5 in the queue, 6 pending, the oldest for 1.2 s\n",
            "wrong: MQTT: refused\n",
            "draining since 1970-01-01T00:00:00Z: kernel\n",
            "peers removed by drains: 12\n",
        ] {
            assert!(screen.contains(text), "{text} is not in {screen}");
        }
        assert!(!screen.contains('\x1b'));
        assert!(now.screen(None, Style::Coloured).contains("\x1b[31m1 problem\x1b[0m"));
        assert!(well().screen(None, Style::Plain).contains(": all well\n"));
    }
}
