//! Row `answers`: answers per second, and per second of the broker's CPU time, beside a bare actix-web handler that
//! parses the same JSON.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, Plan, Stack, V1, V2, free_address};
use wgkex_tests::wait_until;

use crate::bus::start_mosquitto;
use crate::gateway::DOMAIN;
use crate::load::{Target, closed};
use crate::measure::{cpu, memory};
use crate::roles;
use crate::table::{Report, mebibytes};

/// Connections that POST at the same time.
const CONNECTIONS: u32 = 64;

/// Answers a second.
struct Rate {
    /// Per second of wall-clock time, with the routers on the same machine.
    time: f64,
    /// By the server's CPU time.
    cpu: f64,
    bad: u32,
    memory: u32,
}

/// Measures each server for so many seconds.
pub fn measure(report: Report, seconds: u32) {
    let time = Duration::from_secs(seconds.into());
    let bare = bare(time);
    report.line("bare handler", show(&bare)).print();
    let publishing = publishing(time);
    let line = report.line("bare handler that publishes, Mosquitto", show(&publishing));
    line.against(format!("bare handler {:.0}/CPU s", bare.cpu), publishing.cpu / bare.cpu).print();
    for bus in [Bus::Mosquitto, Bus::Embedded] {
        for (what, path, worker, wanted) in [
            ("v1, an original worker", V1, "original", 0.5),
            ("v1, a confirming worker", V1, "confirming", 0.5),
            ("v2, a confirming worker", V2, "confirming", 0.2),
        ] {
            let rate = broker(bus, path, worker, time);
            let ratio = rate.cpu / bare.cpu;
            let line = report.line(format!("{what}, {bus:?}"), show(&rate));
            let line = line.against(format!("bare handler {:.0}/CPU s", bare.cpu), ratio);
            line.wanted(format!(">= {wanted:.2}"), ratio >= wanted && rate.bad == 0).print();
            if bus == Bus::Mosquitto {
                let line = report.line(format!("{what}, {bus:?}, beside publishing"), format!("{:.0}/CPU s", rate.cpu));
                let reference = format!("bare handler that publishes {:.0}/CPU s", publishing.cpu);
                line.against(reference, rate.cpu / publishing.cpu).print();
            }
        }
    }
}

fn show(rate: &Rate) -> String {
    let Rate { time, cpu, bad, memory } = rate;
    format!("{cpu:.0}/CPU s, {time:.0}/s, {bad} not 200, {}", mebibytes(*memory))
}

fn bare(time: Duration) -> Rate {
    let address = free_address();
    let server = roles::start("bare", &[&address.to_string()]);
    wait_until("the bare handler listens", || TcpStream::connect(address).ok());
    rate(address, V1, &server, time)
}

/// The least cost of an answer that waits for the MQTT server's acknowledgement.
fn publishing(time: Duration) -> Rate {
    let stack = Stack::prepare(Plan::new(Bus::Mosquitto).domains([DOMAIN]));
    let _mosquitto = start_mosquitto(&stack);
    let address = free_address();
    let server = roles::start("publishing", &[&address.to_string(), &stack.mqtt.to_string()]);
    wait_until("the publishing handler listens", || TcpStream::connect(address).ok());
    rate(address, V1, &server, time)
}

fn broker(bus: Bus, path: &'static str, worker: &str, time: Duration) -> Rate {
    // A slow broker is to be measured, not to answer 503, and the rate of requests is not to be limited by 429.
    let limits = "limits: {per_client: {burst: 0}, per_domain: {burst: 0}, global: {burst: 0}}";
    let plan = Plan::new(bus).domains([DOMAIN]).config("confirm_timeout: 20\nconfirm_budget: 20").config(limits);
    let mut stack = Stack::prepare(plan);
    let _mosquitto = (bus == Bus::Mosquitto).then(|| start_mosquitto(&stack));
    stack.start_broker();
    stack.wait_until_ready();
    let _worker = roles::start(worker, &[&stack.config_file().display().to_string(), "scripted"]);
    stack.wait_for_gateways(1);
    rate(stack.http, path, stack.broker(), time)
}

fn rate(server: SocketAddr, path: &'static str, process: &Process, time: Duration) -> Rate {
    let (began, cpu_before) = (Instant::now(), cpu(process.pid()));
    let answers = closed(Target { server, path, domain: DOMAIN }, CONNECTIONS, time);
    let (time, cpu) = (began.elapsed(), cpu(process.pid()).saturating_sub(cpu_before));
    let per = |time: Duration| f64::from(answers.good) / time.as_secs_f64();
    Rate { time: per(time), cpu: per(cpu), bad: answers.bad, memory: memory(process.pid())[0] }
}
