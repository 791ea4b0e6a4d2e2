//! Row `bound`: time from a router's POST of a new key to its answer, with as many peers without a handshake as are
//! allowed, beside the same with fewer peers.

use std::time::Duration;

use wgkex_tests::stack::Bus;

use crate::bus::wait_for_domain;
use crate::gateway::{DOMAIN, Gateway, keys};
use crate::measure::percentile;
use crate::post::post;
use crate::table::{Report, milliseconds, ratio};

/// POSTs of new keys below the bound, one after the other; at least as many at the bound.
const POSTS: u32 = 600;

/// Measures with a small bound and with this one.
pub fn measure(report: Report, peers: u32) {
    for bound in [POSTS, peers.max(POSTS)] {
        measure_one(report, bound);
    }
}

fn measure_one(report: Report, bound: u32) {
    let mut gateway = Gateway::with(Bus::Embedded, &format!("peers: {{unproven: {bound}}}"));
    // There is room for exactly as many as are POSTed first.
    gateway.by_c_tools(&keys(0..bound - POSTS));
    gateway.start_bus();
    gateway.start_broker();
    gateway.start_worker();
    wait_for_domain(gateway.stack.mqtt, DOMAIN, 1);

    let below = post(&gateway, bound - POSTS, POSTS);
    // So many that the worker evicts more than once.
    let at = post(&gateway, bound, POSTS.max(bound / 8));
    let _ = gateway.stack.stop_broker();
    let figures = |mut times: Vec<Duration>| [50, 90, 99, 100].map(|share| percentile(&mut times, share));
    let [below, at] = [below, at].map(figures);
    let shown = |figures: [Duration; 4]| figures.map(milliseconds).join(", ");
    let times = ratio(at[0], below[0]);
    report
        .line(format!("{bound} peers without a handshake, as many as may be: p50, p90, p99, max"), shown(at))
        .against(format!("the {POSTS} before them: {}", shown(below)), times)
        .wanted("p50 <= 3.00", times <= 3.0)
        .print();
}
