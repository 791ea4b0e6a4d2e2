//! Row `rebuild`: a gateway that lost all its peers restores them from a broker, and from its own state file without
//! broker and bus; beside the C tools' batches for the same keys.

use std::time::{Duration, Instant};

use wgkex_tests::stack::Bus;

use crate::bus::announce;
use crate::gateway::{DOMAIN, Gateway, assert_holds, keys};
use crate::measure::{Cost, cpu, look};
use crate::table::{Place, Report, ratio, seconds};

/// How often to poll whether the keys are in.
const LOOK: Duration = Duration::from_millis(50);

/// Measures with so many live keys.
pub fn measure(report: Report, number: u32) {
    let mut gateway = Gateway::new(Bus::Mosquitto);
    let sum: Cost = gateway.by_c_tools(&keys(0..number)).into_iter().map(|(_, cost)| cost).sum();

    gateway.renew();
    gateway.start_bus();
    gateway.start_broker();
    announce(&gateway.stack, DOMAIN, keys(0..number));
    let series = format!("wgkex_broker_live_keys{{domain=\"{DOMAIN}\",state=\"unproven\"}}");
    let knows = || gateway.stack.metric(&series).filter(|known| *known >= f64::from(number));
    assert!(look(LOOK, Duration::from_secs(120), knows).is_some(), "the broker lacks keys");
    print(report, "from a broker", number, fill(&mut gateway, number), sum);

    gateway.stop_worker();
    assert!(gateway.stack.stop_broker().success());
    gateway.reboot();
    print(report, "from its state file", number, fill(&mut gateway, number), sum);
    gateway.stop_worker();
}

/// The cost of the worker from its start until so many keys are in.
fn fill(gateway: &mut Gateway, number: u32) -> Cost {
    let began = Instant::now();
    gateway.launch_worker();
    gateway.wait_for_keys(number, LOOK);
    let cost = Cost { time: began.elapsed(), cpu: cpu(gateway.worker()) };
    assert_holds(number);
    cost
}

fn print(report: Report, whence: &str, number: u32, worker: Cost, c_tools: Cost) {
    let measured = format!("{} (CPU {})", seconds(worker.time), seconds(worker.cpu));
    let reference = format!("`wg`, `ip`, `bridge` batches {} (CPU {})", seconds(c_tools.time), seconds(c_tools.cpu));
    let line = report.line(format!("{number} keys {whence}"), measured);
    let line = line.against(reference, ratio(worker.time, c_tools.time));
    let holds = worker.time < Duration::from_secs(10);
    let line = if report.place == Place::Native { line.wanted("< 10 s", holds) } else { line };
    line.print();
}
