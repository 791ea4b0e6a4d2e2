//! Row `fleet`: 50 workers with kernels in memory, 5 brokers and a million live keys on one Mosquitto, all on this
//! machine; and which of them fails first. Ten domains, each served by five of the workers; every broker knows all
//! keys.

use std::thread;
use std::time::{Duration, Instant};

use wgkex_kernel::memory::Delays;
use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, Plan, Stack};

use crate::bus::{announce, start_mosquitto};
use crate::gateway::keys;
use crate::measure::{cpu, memory, memory_left};
use crate::roles;
use crate::storm::worker_config;
use crate::table::{Report, mebibytes, seconds};

/// Ten domains of the fleet.
const DOMAINS: [&str; 10] =
    ["ffx_d0", "ffx_d1", "ffx_d2", "ffx_d3", "ffx_d4", "ffx_d5", "ffx_d6", "ffx_d7", "ffx_d8", "ffx_d9"];
/// Workers of each domain, in one process.
const WORKERS: u16 = 5;
/// Brokers, each in a process.
const BROKERS: usize = 5;
/// How long to wait for the fleet.
const LIMIT: Duration = Duration::from_secs(600);
/// How often to poll its progress.
const LOOK: Duration = Duration::from_millis(500);
/// With less memory left, in KiB, the machine counts as failed.
const RESERVE: u32 = 1_500_000;

struct Fleet {
    mosquitto: Process,
    brokers: Vec<Stack>,
    workers: Vec<Process>,
}

/// Measures with so many live keys.
pub fn measure(report: Report, number: u32) {
    let each = number / u32::try_from(DOMAINS.len()).unwrap_or(1);
    let mut fleet = Fleet::start(number, each);
    let began = Instant::now();
    let publishing = fleet.publish(each);
    let mut published = None;
    let broken = loop {
        if published.is_none() && publishing.iter().all(thread::JoinHandle::is_finished) {
            published = Some(began.elapsed());
        }
        if let Some(broken) = fleet.broken() {
            break Some(broken);
        }
        if fleet.least() >= each && fleet.known() >= f64::from(number) {
            break None;
        }
        if began.elapsed() > LIMIT {
            break Some(format!("time: not within {}", seconds(LIMIT)));
        }
        thread::sleep(LOOK);
    };
    let time = began.elapsed();
    let rate = |time: Duration| f64::from(number) / time.as_secs_f64();
    let what = format!("{BROKERS} brokers, {} workers, {number} keys", DOMAINS.len() * usize::from(WORKERS));
    let shown = published.map_or("not all".into(), |time| format!("{} ({:.0} keys/s)", seconds(time), rate(time)));
    report.line(format!("{what}: published"), shown).print();
    let state = format!("{}: workers have {}, brokers know {}", seconds(time), fleet.least().min(each), fleet.known());
    report
        .line(format!("{what}: workers have {each} each, brokers know all"), state)
        .wanted("all", broken.is_none())
        .print();
    report.line("what broke first", broken.unwrap_or_else(|| format!("nothing; {}", fleet.warnings()))).print();
    fleet.print(report, number, each);
}

impl Fleet {
    fn start(number: u32, each: u32) -> Self {
        // Room for those that POST meanwhile.
        let most = number + number / 10;
        let config = format!("live_keys: {{max: {most}}}");
        let room = format!("peers: {{max: {most}, unproven: {most}}}");
        let plan = |n: usize| {
            let mut plan = Plan::new(Bus::Mosquitto).domains(DOMAINS).config(&config);
            // A broker has the name of its machine.
            let named = format!("hostname broker{n} && exec \"$@\"");
            plan.wrapper = ["unshare", "--uts", "sh", "-c", &named, "sh"].map(str::to_owned).to_vec();
            plan
        };
        let mut brokers: Vec<_> = (0..BROKERS).map(|n| Stack::prepare(plan(n))).collect();
        let mqtt = brokers[0].mqtt;
        let mosquitto = start_mosquitto(&brokers[0]);
        for broker in &mut brokers {
            broker.mqtt = mqtt;
            broker.write_config();
            broker.start_broker();
        }
        brokers.iter_mut().for_each(Stack::wait_until_ready);
        let start = |(domain, first): (&&str, u16)| {
            let file = worker_config(&brokers[0], &[*domain], &room, &format!("{domain}.yaml"));
            let names: Vec<_> = (0..WORKERS).map(|n| format!("{}-{n}", domain.replace('_', "-"))).collect();
            let (wanted, delays, port) = (each.to_string(), roles::word(Delays::default()), first.to_string());
            let words = [file.as_str(), &wanted, &delays, &port].into_iter().chain(names.iter().map(String::as_str));
            roles::start("workers", &words.collect::<Vec<_>>())
        };
        let ports = (0..).map(|n| 10_000 + n * WORKERS);
        let workers: Vec<_> = DOMAINS.iter().zip(ports).map(start).collect();
        let all = u32::try_from(DOMAINS.len()).unwrap_or_default() * u32::from(WORKERS);
        for broker in &brokers {
            broker.wait_for_gateways(all);
        }
        Self { mosquitto, brokers, workers }
    }

    /// Publishes so many keys of each domain.
    fn publish(&self, each: u32) -> Vec<thread::JoinHandle<()>> {
        let stack = &self.brokers[0];
        let publish = |(domain, first): (&'static str, u32)| {
            let (mqtt, plan) = (stack.mqtt, Plan::new(Bus::Mosquitto));
            thread::spawn(move || {
                let mut stack = Stack::prepare(plan);
                stack.mqtt = mqtt;
                announce(&stack, domain, keys(first..first + each));
            })
        };
        DOMAINS.into_iter().zip((0..).map(|n| n * each)).map(publish).collect()
    }

    /// The first part of the fleet that has ended, or a machine that is about to run out of memory.
    fn broken(&mut self) -> Option<String> {
        let left = memory_left();
        let ended = |process: &mut Process| !process.is_running();
        if left < RESERVE {
            return Some(format!("memory: {} are left", mebibytes(left)));
        }
        if ended(&mut self.mosquitto) {
            return Some(format!("Mosquitto ended: {}", self.mosquitto.log()));
        }
        let brokers = self.brokers.iter_mut().filter_map(|broker| ended(broker.broker()).then_some(())).count();
        let workers = self.workers.iter_mut().filter_map(|process| ended(process).then_some(())).count();
        (brokers + workers > 0).then(|| format!("{brokers} brokers and {workers} processes of workers ended"))
    }

    /// The number of keys at the worker with the fewest.
    fn least(&self) -> u32 {
        self.workers.iter().map(roles::has).min().unwrap_or_default()
    }

    /// The number of live keys at the broker with the fewest.
    fn known(&self) -> f64 {
        let known = |broker: &Stack| -> f64 {
            let metrics = broker.get("/metrics").body;
            let live = metrics.lines().filter(|line| line.starts_with("wgkex_broker_live_keys{"));
            live.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
        };
        self.brokers.iter().map(known).fold(f64::INFINITY, f64::min)
    }

    /// The warnings that the programs logged.
    fn warnings(&mut self) -> String {
        let brokers = self.brokers.iter_mut().map(|broker| broker.broker().log());
        let logs: Vec<_> = brokers.chain(self.workers.iter().map(Process::log)).collect();
        let warnings: Vec<_> = logs.iter().flat_map(|log| log.lines()).filter(|line| line.contains("WARN")).collect();
        let first = warnings.first().map(|line| format!(", the first: {line}")).unwrap_or_default();
        format!("{} warnings in the logs{first}", warnings.len())
    }

    fn print(&mut self, report: Report, number: u32, each: u32) {
        let mosquitto = [self.mosquitto.pid()];
        let brokers: Vec<_> = self.brokers.iter_mut().map(|broker| broker.broker().pid()).collect();
        let workers: Vec<_> = self.workers.iter().map(Process::pid).collect();
        let per_process = format!("a process of {WORKERS} workers with {each} keys each, their kernels included");
        for (what, pids) in [
            ("Mosquitto", &mosquitto[..]),
            (&format!("a broker with {number} keys"), &brokers),
            (&per_process, &workers),
        ] {
            let most = pids.iter().map(|pid| memory(*pid)[0]).max().unwrap_or_default();
            let busiest = pids.iter().map(|pid| cpu(*pid)).max().unwrap_or_default();
            report
                .line(format!("{what}: memory, CPU time"), format!("{}, {}", mebibytes(most), seconds(busiest)))
                .print();
        }
    }
}
