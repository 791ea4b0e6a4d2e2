//! Row `storm`: thousands of routers request within seconds, as after a power cut, and four gateways install all keys.
//! Here with kernels in memory that take the time of a real one, in the virtual machine with four real ones.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use wgkex_kernel::memory::Delays;
use wgkex_kernel::netlink::Netlink;
use wgkex_kernel::{Interface, Kernel as _};
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, Plan, Stack, V2};

use crate::bus::{start_mosquitto, wait_for_domain};
use crate::gateway::{DOMAIN, Gateway, domain, enter_new_network, install, keep_network, keys};
use crate::load::{Answers, Target, open};
use crate::measure::{cpu, look, median, percentile};
use crate::roles;
use crate::table::{Place, Report, milliseconds, ratio, seconds};

/// The time over which the requests are spread.
const LASTS: Duration = Duration::from_secs(10);
/// How long the gateways may take, from the first POST.
const WANTED: Duration = Duration::from_secs(15);
/// How long to wait for the gateways: two repeats of the routers' requests.
const LIMIT: Duration = Duration::from_secs(180);
/// How often to poll whether a gateway has all keys.
const LOOK: Duration = Duration::from_millis(50);
/// The same in the virtual machine, where a poll costs as much as some keys.
const LOOK_INSIDE: Duration = Duration::from_millis(500);
/// The gateways.
const GATEWAYS: u16 = 4;

/// Measures with so many routers.
pub fn measure(report: Report, routers: u32) {
    match report.place {
        Place::Native => in_memory(report, routers),
        Place::Vm => real(report, routers),
    }
}

fn in_memory(report: Report, routers: u32) {
    let delays = cost_of_a_kernel();
    let shown = [delays.read, delays.apply, delays.change].map(milliseconds).join(", ");
    report.line("a kernel's time for a read of 1000 peers, a call, a change", shown).print();

    enter_new_network();
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto).domains([DOMAIN]));
    let _mosquitto = start_mosquitto(&stack);
    stack.start_broker();
    stack.wait_until_ready();
    let file = worker_config(&stack, &[DOMAIN], "", "workers.yaml");
    let start = |n: u16| {
        let (name, port) = (format!("gw{n}"), (10_000 + n).to_string());
        roles::start("workers", &[&file, &routers.to_string(), &roles::word(delays), &port, &name])
    };
    let workers: Vec<_> = (0..GATEWAYS).map(start).collect();
    wait_for_domain(stack.mqtt, DOMAIN, GATEWAYS.into());
    let target = Target { server: stack.http, path: V2, domain: DOMAIN };
    let has = || workers.iter().map(roles::has).min().unwrap_or_default();
    let (time, answers) = storm(routers, has, move || open(target, 0..routers, LASTS));
    print(report, "kernels in memory", routers, time, has(), answers);
}

/// A config for [`play`]'s workers on the bus of `stack`.
pub fn worker_config(stack: &Stack, domains: &[&str], more: &str, name: &str) -> String {
    let (ip, port, state) = (stack.mqtt.ip(), stack.mqtt.port(), stack.dir().join("@name@"));
    let yaml = format!(
        "domains: [{}]\ndomain_prefixes: [ffx_]\nmqtt: {{broker_url: \"{ip}\", broker_port: {port}}}\n\
         worker_listen: \"127.0.0.1:@port@\"\nstate_dir: {}\n{more}\n",
        domains.join(", "),
        state.display(),
    );
    let file = stack.dir().join(name);
    fs::write(&file, yaml).unwrap();
    file.display().to_string()
}

/// The delays of this machine's kernel, by the worker's netlink code.
fn cost_of_a_kernel() -> Delays {
    let _gateway = Gateway::new(Bus::Mosquitto);
    let (interface, mut keys) = (Interface::from(&domain()), keys(0..1_200));
    let many = keys.split_off(200);
    Runtime::new().unwrap().block_on(async {
        let mut kernel = Netlink::open().unwrap();
        let mut singles = Vec::new();
        for key in keys {
            let began = Instant::now();
            kernel.apply(&interface, install([key])).await;
            singles.push(began.elapsed());
        }
        let changes = install(many);
        let count = u32::try_from(changes.len()).unwrap();
        let began = Instant::now();
        kernel.apply(&interface, changes).await;
        let change = began.elapsed() / count;
        let began = Instant::now();
        kernel.read(&interface).await.unwrap();
        Delays { read: began.elapsed(), apply: median(singles).saturating_sub(change * 3), change }
    })
}

fn real(report: Report, routers: u32) {
    let hub = Host::new("hub", Lane::Kernel);
    hub.inside(keep_network);
    hub.configure("mqtt: {broker_url: 127.0.0.1}\n");
    let config = "listener 1883 0.0.0.0\nallow_anonymous true\nuser root\nmax_queued_messages 0\n";
    fs::write(hub.path("/run/mosquitto.conf"), config).unwrap();
    let mosquitto = hub.start("mosquitto", Path::new("/usr/sbin/mosquitto"), &["-c", "/run/mosquitto.conf"], &[]);
    mosquitto.wait_for_log(" running");
    let broker = hub.start_broker();
    let gateways: Vec<_> = (1..=GATEWAYS).map(|n| gateway(&hub, u8::try_from(n).unwrap())).collect();
    hub.inside(|| wait_for_domain("127.0.0.1:1883".parse().unwrap(), "test_a", GATEWAYS.into()));

    let server = "127.0.0.1:5000".parse().unwrap();
    let target = Target { server, path: V2, domain: "test_a" };
    let used = || {
        let gateways = gateways.iter().map(|(_, worker)| cpu(worker.pid())).sum();
        [cpu(mosquitto.pid()), cpu(broker.pid()), gateways, cpu(std::process::id())]
    };
    let before = used();
    let (time, took, answers) = thread::scope(|scope| {
        let (hub, gateways) = (&hub, &gateways);
        let (done, answers) = mpsc::channel();
        let began = Instant::now();
        scope.spawn(move || done.send(hub.inside(|| open(target, 0..routers, LASTS))));
        let time = look(LOOK_INSIDE, LIMIT, || (least(gateways) >= routers).then(|| began.elapsed()));
        let took = used();
        (time, took, answers.recv().unwrap())
    });
    let took: Vec<_> = took.into_iter().zip(before).map(|(took, before)| took.saturating_sub(before)).collect();
    let all: Duration = took.iter().sum();
    let least_time = all / u32::try_from(available_parallelism().unwrap().get()).unwrap();
    report
        .line(
            "real kernels, CPU time: Mosquitto, broker, gateways, routers",
            took.into_iter().map(seconds).collect::<Vec<_>>().join(", "),
        )
        .against(format!("all CPUs busy for {}", seconds(least_time)), ratio(time.unwrap_or(LIMIT), least_time))
        .print();
    print(report, "real kernels", routers, time, least(&gateways), answers);
    for (gateway, _) in &gateways {
        let lengths = gateway.tables("a").lengths();
        assert!(time.is_none() || lengths == [routers as usize; 3], "{lengths:?}");
    }
}

fn gateway(hub: &Host, n: u8) -> (Host, Process) {
    let gateway = Host::new(&format!("gw{n}"), Lane::Kernel);
    gateway.inside(keep_network);
    let (there, _) = hub.connect(&gateway, n);
    gateway.configure(&format!("mqtt: {{broker_url: {there}}}\n"));
    gateway.setup();
    let worker = gateway.start_worker();
    (gateway, worker)
}

/// The number of keys at the gateway with the fewest.
fn least(gateways: &[(Host, Process)]) -> u32 {
    let installed = "wgkex_worker_keys_installed_total{domain=\"test_a\"}";
    let number = |gateway: &Host| gateway.metric(9586, installed)?.parse().ok();
    gateways.iter().map(|(gateway, _)| number(gateway).unwrap_or_default()).min().unwrap_or_default()
}

/// Sends the routers' requests, and waits for the gateways.
fn storm(
    routers: u32,
    has: impl Fn() -> u32,
    ask: impl FnOnce() -> Answers + Send + 'static,
) -> (Option<Duration>, Answers) {
    let began = Instant::now();
    let asking = thread::spawn(ask);
    let time = look(LOOK, LIMIT, || (has() >= routers).then(|| began.elapsed()));
    (time, asking.join().unwrap())
}

fn print(report: Report, what: &str, routers: u32, time: Option<Duration>, least: u32, mut answers: Answers) {
    let Answers { good, later, bad, .. } = answers;
    let measured = time.map_or(format!("{} of {routers} keys after {}", least.min(routers), seconds(LIMIT)), seconds);
    report
        .line(format!("{routers} routers, {GATEWAYS} gateways, {what}: all have all"), measured)
        .against(format!("the routers take {}", seconds(LASTS)), ratio(time.unwrap_or(LIMIT), LASTS))
        .wanted("< 15 s", time.is_some_and(|time| time < WANTED))
        .print();
    let times = [50, 99, 100].map(|share| milliseconds(percentile(&mut answers.times, share))).join(", ");
    report
        .line(
            format!("{what}: routers answered 200 at once, a minute or two later, never; first answers' p50, p99, max"),
            format!("{good}, {later}, {bad}; {times}"),
        )
        .wanted("all at once", later + bad == 0)
        .print();
}
