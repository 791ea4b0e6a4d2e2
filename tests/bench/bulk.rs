//! Many keys at once over Mosquitto into the kernel, beside what the same keys cost the C tools: receiving them
//! (`mosquitto_sub`) and setting them (`wg`, `ip`, `bridge`).

use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use wgkex_common::PublicKey;
use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, Stack};

use crate::gateway::{Gateway, assert_holds, keys, metric, mosquitto, publish, run, write};

/// How often each is measured.
pub const ROUNDS: usize = 3;

/// How often to look whether the keys are in. Looking costs the worker CPU time.
const LOOK: Duration = Duration::from_millis(50);

/// The median times, each in its own row.
pub struct Table {
    keys: usize,
    c_tools: Vec<(&'static str, Duration)>,
    worker: Duration,
    worker_cpu: Duration,
}

/// Measures with so many keys.
pub fn measure(number: u32) -> Table {
    let mut gateway = Gateway::new(Bus::Mosquitto);
    let _mosquitto = start_mosquitto(&gateway.stack);
    let keys = keys(number);
    write(&lines(&gateway.stack), &keys, |key| format!("{key}\n"));
    let rounds: Vec<_> = (0..ROUNDS).map(|_| round(&mut gateway, &keys)).collect();
    let median = |of: &dyn Fn(&Table) -> Duration| {
        let mut times: Vec<_> = rounds.iter().map(of).collect();
        times.sort();
        times[ROUNDS / 2]
    };
    let names = rounds[0].c_tools.iter().map(|(name, _)| *name).enumerate();
    Table {
        keys: keys.len(),
        c_tools: names.map(|(n, name)| (name, median(&|table| table.c_tools[n].1))).collect(),
        worker: median(&|table| table.worker),
        worker_cpu: median(&|table| table.worker_cpu),
    }
}

fn round(gateway: &mut Gateway, keys: &[PublicKey]) -> Table {
    gateway.clear();
    let mut c_tools = vec![("mosquitto_sub", receive(&gateway.stack, keys.len()))];
    c_tools.extend(gateway.by_c_tools(keys));
    assert_holds(keys.len());

    gateway.clear();
    gateway.start_worker();
    let (began, cpu_before) = (Instant::now(), gateway.worker_cpu());
    let mut publisher = publish(&gateway.stack, &lines(&gateway.stack)).spawn().unwrap();
    while metric("keys_installed_total") != Some(keys.len()) {
        assert!(began.elapsed() < Duration::from_secs(300), "keys are missing");
        std::thread::sleep(LOOK);
    }
    let (worker, worker_cpu) = (began.elapsed(), gateway.worker_cpu().saturating_sub(cpu_before));
    assert!(publisher.wait().unwrap().success());
    assert_holds(keys.len());
    gateway.stop_worker();
    Table { keys: keys.len(), c_tools, worker, worker_cpu }
}

/// What `mosquitto_sub` takes for so many keys.
fn receive(stack: &Stack, keys: usize) -> Duration {
    run(&format!("mosquitto_pub -h {} -p {} -t ready -r -m ready", stack.mqtt.ip(), stack.mqtt.port()));
    let mut subscriber = mosquitto("sub", stack)
        .args(["-t", "ready", "-t", "wireguard/+/+", "-q", "1", "-C", &(keys + 1).to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut heard = BufReader::new(subscriber.stdout.take().unwrap()).lines();
    assert_eq!(heard.next().unwrap().unwrap(), "ready");
    let began = Instant::now();
    let mut publisher = publish(stack, &lines(stack)).spawn().unwrap();
    assert_eq!(heard.count(), keys);
    let time = began.elapsed();
    let success = |mut child: Child| child.wait().unwrap().success();
    assert!(publisher.wait().unwrap().success() && success(subscriber));
    time
}

/// The server forgets nothing for want of room, for whoever receives.
fn start_mosquitto(stack: &Stack) -> Process {
    let (file, address) = (stack.dir().join("bench.conf"), stack.mqtt);
    let config = "user root\nallow_anonymous true\nmax_queued_messages 0\n";
    fs::write(&file, format!("listener {} {}\n{config}", address.port(), address.ip())).unwrap();
    let process = Process::start("mosquitto", std::process::Command::new("mosquitto").arg("-c").arg(file));
    wgkex_tests::wait_until("Mosquitto serves", || std::net::TcpStream::connect(address).ok());
    process
}

fn lines(stack: &Stack) -> std::path::PathBuf {
    stack.dir().join("keys")
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c_tools: Duration = self.c_tools.iter().map(|(_, time)| *time).sum();
        let rows = self.c_tools.iter().copied().chain([("sum of these", c_tools), ("wgkex-worker", self.worker)]);
        for (name, time) in rows.chain([("  its CPU time", self.worker_cpu)]) {
            writeln!(f, "  {name:20}{:8.3}", time.as_secs_f64())?;
        }
        let keys = f64::from(u32::try_from(self.keys).unwrap_or(u32::MAX));
        writeln!(f, "  {:20}{:8.2}", "worker / sum", self.worker.as_secs_f64() / c_tools.as_secs_f64())?;
        write!(f, "  {:20}{:8.0}", "keys/s", keys / self.worker.as_secs_f64())
    }
}
