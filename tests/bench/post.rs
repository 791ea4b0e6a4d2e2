//! Row `post`: time from a router's POST to its answer, which is sent when its key is in the kernel; beside the C
//! tools, called for one key.

use std::time::{Duration, Instant};

use wgkex_tests::http::ask;
use wgkex_tests::stack::{Bus, V2};

use crate::bus::wait_for_domain;
use crate::gateway::{DOMAIN, Gateway, assert_holds, keys, one_by_c_tools};
use crate::measure::{median, percentile};
use crate::table::{Place, Report, milliseconds, ratio};

/// POSTs of new keys, one after the other.
const POSTS: u32 = 1_000;
/// Keys that the C tools install.
const BY_C_TOOLS: u32 = 30;

/// Measures with both kinds of bus and 0 to `peers` existing peers.
pub fn measure(report: Report, peers: u32) {
    for bus in [Bus::Embedded, Bus::Mosquitto] {
        for peers in [0, peers / 20, peers] {
            measure_one(report, bus, peers);
        }
    }
}

fn measure_one(report: Report, bus: Bus, peers: u32) {
    let mut gateway = Gateway::new(bus);
    gateway.by_c_tools(&keys(0..peers));
    let reference = median(keys(peers..peers + BY_C_TOOLS).iter().map(|key| one_by_c_tools(key).time));
    gateway.start_bus();
    gateway.start_broker();
    gateway.start_worker();
    wait_for_domain(gateway.stack.mqtt, DOMAIN, 1);

    let mut times = post(&gateway, peers + BY_C_TOOLS, POSTS);
    assert_holds(peers + BY_C_TOOLS + POSTS);
    let _ = gateway.stack.stop_broker();
    let [p50, p90, p99, max] = [50, 90, 99, 100].map(|share| percentile(&mut times, share));
    let shown = [p50, p90, p99, max].map(milliseconds).join(", ");
    let line = report.line(format!("{bus:?}, {peers} peers there: p50, p90, p99, max"), shown);
    let line = line.against(format!("`wg`, `ip`, `bridge`: {}", milliseconds(reference)), ratio(p50, reference));
    let holds = p50 < Duration::from_millis(5) && p99 < Duration::from_millis(50);
    // An emulated kernel is too slow for absolute figures.
    let line = if report.place == Place::Native { line.wanted("p50 < 5 ms, p99 < 50 ms", holds) } else { line };
    line.print();
}

/// The time of each answer to so many keys from this one on, sent one after the other over one connection.
pub fn post(gateway: &Gateway, first: u32, number: u32) -> Vec<Duration> {
    let mut router = gateway.stack.connect();
    let post = |key: wgkex_common::PublicKey| {
        let body = ask(DOMAIN, &key.to_string());
        let began = Instant::now();
        let response = router.post(V2, &body);
        let time = began.elapsed();
        assert_eq!(response.status, 200, "{response:?}");
        time
    };
    keys(first..first + number).into_iter().map(post).collect()
}
