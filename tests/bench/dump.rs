//! Row `dump`: the cost of reading and classifying all peers: the plan alone on tables in memory, and with the real
//! kernel's tables beside the C tools that show the same tables.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Runtime;
use wgkex_common::Reserved;
use wgkex_kernel::memory::MemoryKernel;
use wgkex_kernel::netlink::Netlink;
use wgkex_kernel::{Device, Interface, Kernel as _};
use wgkex_tests::stack::Bus;
use wgkex_worker::peers::{Clocks, KnownPeers, Policy};
use wgkex_worker::profiles::mesh::Mesh;

use crate::gateway::{Gateway, SHOW, cost, domain, install, keys};
use crate::measure::{Cost, median, thread_cpu};
use crate::table::{Place, Report, milliseconds, ratio};

/// How often each of them is measured.
const TIMES: usize = 5;

/// Measures with up to `peers` in the kernel, and up to five times as many in memory.
pub fn measure(report: Report, peers: u32) {
    let runtime = Runtime::new().unwrap();
    if report.place == Place::Native {
        let sizes = [1, 10, 20, 50, 100].map(|size| peers / 20 * size);
        print(
            report,
            "classified in memory",
            "a bare copy of the tables",
            &sizes.map(|size| in_memory(&runtime, size)),
        );
    }
    let gateway = Gateway::new(Bus::Mosquitto);
    // Its threads are to be in the gateway's network.
    let runtime = Runtime::new().unwrap();
    let mut filled = 0;
    let kernel = [peers / 20, peers / 2, peers].map(|size| {
        gateway.by_c_tools(&keys(filled..size));
        filled = size;
        let shown: Cost = SHOW.iter().map(|command| median((0..TIMES).map(|_| cost(command)))).sum();
        (size, real(&runtime), shown.time)
    });
    print(report, "read and classified", "`wg`, `ip`, `bridge` show", &kernel);
}

/// Prints the times for so many peers, and those of the `reference`.
fn print(report: Report, what: &str, reference: &str, sizes: &[(u32, Duration, Duration)]) {
    for (size, time, other) in sizes {
        let per_peer = time.as_secs_f64() * 1e6 / f64::from(*size);
        let line = report
            .line(format!("{size} peers {what}"), format!("{}, {per_peer:.2} us each", milliseconds(*time)))
            .against(format!("{reference}: {}", milliseconds(*other)), ratio(*time, *other));
        let holds = *time < Duration::from_millis(300);
        let is_asked = *size == 20_000 && report.place == Place::Native;
        if is_asked { line.wanted("< 300 ms", holds) } else { line }.print();
    }
    for (size, time, other) in sizes {
        let Some((_, tenth, of_other)) = sizes.iter().find(|(other, ..)| other * 10 == *size) else { continue };
        let (grows, limit) = (ratio(*time, *tenth), ratio(*other, *of_other));
        let line = report
            .line(format!("{size} peers {what}, ten times as many"), milliseconds(*time))
            .against(format!("a tenth of them: {}; {reference}: {limit:.1} times", milliseconds(*tenth)), grows);
        line.wanted("<= 12", grows <= 12.0).print();
    }
}

/// The CPU time of the plan for tables of so many peers, read again and again as by a running worker; and that of a
/// copy of these tables, which leaves the caches as soon as they do.
fn in_memory(runtime: &Runtime, peers: u32) -> (u32, Duration, Duration) {
    let (domain, keys) = (domain(), keys(0..peers));
    let mut memory = MemoryKernel::with(std::slice::from_ref(&domain));
    let changes = install(keys);
    runtime.block_on(memory.apply(&Interface::from(&domain), changes));
    memory.alter(&domain, |device| {
        let ages = (0..).map(Duration::from_secs);
        for (peer, age) in device.peers.values_mut().zip(ages) {
            peer.last_handshake = SystemTime::now().checked_sub(age);
        }
    });
    let device = memory.device(&domain).unwrap();
    let mut known = known_peers();
    classify(&mut known, &device);
    let classified = median((0..TIMES).map(|_| thread_cpu(|| classify(&mut known, &device))));
    (peers, classified, median((0..TIMES).map(|_| thread_cpu(|| drop(device.clone())))))
}

/// The time of one read of the kernel's tables with the plan.
fn real(runtime: &Runtime) -> Duration {
    let (interface, mut known) = (Interface::from(&domain()), known_peers());
    runtime.block_on(async {
        let mut kernel = Netlink::open().unwrap();
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let began = Instant::now();
            let device = kernel.read(&interface).await.unwrap();
            classify(&mut known, &device);
            times.push(began.elapsed());
        }
        median(times)
    })
}

fn known_peers() -> KnownPeers {
    KnownPeers::new(Arc::new(Mesh), Policy::default())
}

/// Runs all steps of the plan on one read.
fn classify(known: &mut KnownPeers, device: &Device) {
    let now = Clocks { monotonic: Instant::now(), wall: SystemTime::now() };
    let reserved = Reserved::default();
    known.observe(device, &reserved, now);
    let owed = known.pending_steps(device, &reserved);
    let _ = (known.stale(now.monotonic), known.orphaned(device, now.monotonic), known.counts(now.monotonic));
    assert!(owed.is_empty(), "whole tables lack nothing");
}
