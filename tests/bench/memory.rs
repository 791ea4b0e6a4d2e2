//! Row `memory`: the memory of the broker per live key, and of the worker per peer; and that a flood of random keys
//! does not make the broker grow.

use std::thread::sleep;
use std::time::Duration;

use wgkex_tests::stack::{Bus, Plan, Stack};

use crate::bus::{announce, start_mosquitto};
use crate::gateway::{DOMAIN, Gateway, keys};
use crate::measure::{look, memory};
use crate::table::{Report, mebibytes};

/// After this time no work is pending.
const SETTLE_TIME: Duration = Duration::from_secs(5);
/// A worker reads all tables once a minute, and needs the most memory then.
const READ: Duration = Duration::from_secs(65);
/// How long the broker may take to process published keys, once the bus has them.
const LIMIT: Duration = Duration::from_secs(60);

/// Measures with up to so many peers of a worker, and ten times as many live keys of a broker, which is the default
/// limit of live keys.
pub fn measure(report: Report, peers: u32) {
    broker(report, peers * 10);
    worker(report, peers);
}

fn broker(report: Report, most: u32) {
    let max = format!("live_keys: {{max: {most}}}");
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto).domains([DOMAIN]).config(&max));
    let _mosquitto = start_mosquitto(&stack);
    stack.start_broker();
    stack.wait_until_ready();
    let pid = stack.broker().pid();
    let mut sent = 0;
    let mut full = 0;
    for live in [0, most / 4, most] {
        announce(&stack, DOMAIN, keys(sent..live));
        sent = live;
        if let Some(known) = lacking(&stack, f64::from(live)) {
            report.line(format!("broker, {live} live keys"), format!("it knows {known}")).wanted("all", false).print();
        }
        full = print(report, "broker", "live keys", pid, live, 30);
    }
    // Once every key was replaced by another, the keys that are kept are as scattered in memory as they get.
    let mut before = full;
    for (flood, wanted) in [(most, 1.5), (most * 5, 1.1)] {
        for part in 0..10 {
            announce(&stack, DOMAIN, keys(sent + flood / 10 * part..sent + flood / 10 * (part + 1)));
        }
        sent += flood;
        sleep(SETTLE_TIME);
        let [after, peak] = memory(pid);
        let grown = f64::from(after) / f64::from(before);
        let line = report.line(
            format!("broker, after {flood} random keys more"),
            format!("{} (peak {})", mebibytes(after), mebibytes(peak)),
        );
        let line = line.against(format!("before them {}", mebibytes(before)), grown);
        line.wanted(format!("<= {wanted:.2}"), grown <= wanted).print();
        before = after;
    }
}

/// The number of live keys at the broker, if it does not reach `wanted` in time.
fn lacking(stack: &Stack, wanted: f64) -> Option<f64> {
    let series = format!("wgkex_broker_live_keys{{domain=\"{DOMAIN}\",state=\"unproven\"}}");
    let known = || stack.metric(&series).unwrap_or_default();
    let found = look(Duration::from_millis(200), LIMIT, || (known() >= wanted).then_some(()));
    if found.is_some() { None } else { Some(known()) }
}

fn worker(report: Report, most: u32) {
    let mut gateway = Gateway::new(Bus::Mosquitto);
    gateway.start_bus();
    gateway.start_worker();
    let mut sent = 0;
    for peers in [0, most / 20, most] {
        announce(&gateway.stack, DOMAIN, keys(sent..peers));
        sent = peers;
        gateway.wait_for_keys(peers, Duration::from_millis(200));
        sleep(if peers == most { READ } else { SETTLE_TIME });
        print(report, "worker", "peers", gateway.worker(), peers, 20);
    }
    gateway.stop_worker();
    gateway.start_worker();
    sleep(SETTLE_TIME);
    print(report, "worker, started anew", "peers", gateway.worker(), most, 20);
}

/// Prints the memory of a process whose limit is so many megabytes and 300 bytes for each; returns it, in KiB.
fn print(report: Report, who: &str, what: &str, pid: u32, number: u32, base: u32) -> u32 {
    sleep(SETTLE_TIME);
    let [now, peak] = memory(pid);
    let allowed = base * 1_000_000 / 1024 + u32::try_from(u64::from(number) * 300 / 1024).unwrap_or(u32::MAX);
    let ratio = f64::from(now) / f64::from(allowed);
    report
        .line(format!("{who}, {number} {what}"), format!("{} (peak {})", mebibytes(now), mebibytes(peak)))
        .against(format!("{base} MB + 300 B each: {}", mebibytes(allowed)), ratio)
        .wanted("<= 1.00", ratio <= 1.0)
        .print();
    now
}
