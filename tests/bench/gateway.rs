//! A gateway to measure: its namespaces, its interfaces, its worker, and the C tools on the same interfaces.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use wgkex_common::PublicKey;
use wgkex_tests::http::Http;
use wgkex_tests::probe::Role;
use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::{host_name, wait_until};

/// The domain that is served.
pub const DOMAIN: &str = "ffx_mesh";

const METRICS: &str = "127.0.0.1:9586";

/// A worker with empty or filled tables, and a bus.
pub struct Gateway {
    /// The bus, and the broker if it runs.
    pub stack: Stack,
    worker: Option<Process>,
}

impl Gateway {
    /// Interfaces without peers on a bus of this kind; nothing else runs.
    pub fn new(bus: Bus) -> Self {
        // Slowness is to be measured, not to be answered 503.
        let patience = "confirm_timeout: 20\nconfirm_budget: 20";
        let config = format!("{patience}\nsetup: {{key_dir: /run/keys}}\nworker_listen: \"{METRICS}\"");
        let stack = Stack::prepare(Plan::new(bus).domains([DOMAIN]).config(&config));
        let gateway = Self { stack, worker: None };
        gateway.clear();
        gateway
    }

    /// Takes all peers, routes and flood entries away.
    pub fn clear(&self) {
        // With many entries this takes the kernel long.
        run("for link in vx-mesh wg-mesh; do ip link del $link 2>/dev/null || true; done");
        let mut setup = self.stack.program("wgkex-worker", &["setup"]);
        assert!(setup.wait().success(), "{}", setup.log());
    }

    /// Starts the worker, and waits until it hears keys and has read its tables.
    pub fn start_worker(&mut self) {
        let (status, online) = (format!("wireguard-worker/{}/status", host_name()), b"1");
        let probe = self.stack.probe(Role::new("bench", &[&status]));
        self.worker = Some(self.stack.program("wgkex-worker", &[]));
        probe.next("the worker is online", |said| said.topic == status && said.payload == online);
        wait_until("the worker has read its tables", || (metric("domain_up") == Some(1)).then_some(()));
    }

    /// The CPU time that the worker has used so far.
    pub fn worker_cpu(&self) -> Duration {
        let worker = self.worker.as_ref().expect("a worker that runs");
        let stat = fs::read_to_string(format!("/proc/{}/stat", worker.pid())).unwrap();
        // In user space and in the kernel, in hundredths of a second.
        let ticks = stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2);
        Duration::from_millis(ticks.map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum())
    }

    /// Ends the worker.
    pub fn stop_worker(&mut self) {
        let mut worker = self.worker.take().expect("a worker that runs");
        assert!(worker.end_by(Signal::SIGTERM).success(), "{}", worker.log());
    }

    /// Has the C tools put keys in, and gives what each of them took.
    pub fn by_c_tools(&self, keys: &[PublicKey]) -> [(&'static str, Duration); 3] {
        let file = |name: &str, line: &dyn Fn(&PublicKey) -> String| {
            let path = self.stack.dir().join(name);
            write(&path, keys, line);
            path.display().to_string()
        };
        let peers = file("peers", &|key| format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {}/128\n", key.link_local()));
        let routes = file("routes", &|key| format!("route add {}/128 dev wg-mesh proto static\n", key.link_local()));
        let fdb = file("fdb", &|key| {
            format!("fdb append 00:00:00:00:00:00 dst {} via wg-mesh dev vx-mesh\n", key.link_local())
        });
        [
            ("wg addconf", timed(&format!("wg addconf wg-mesh {peers}"))),
            ("ip -batch", timed(&format!("ip -6 -batch {routes}"))),
            ("bridge -batch", timed(&format!("bridge -batch {fdb}"))),
        ]
    }
}

/// A number of the worker's for the domain.
pub fn metric(name: &str) -> Option<usize> {
    let text = Http::try_connect(METRICS.parse().unwrap()).ok()?.get("/metrics").body;
    let series = format!("wgkex_worker_{name}{{domain=\"{DOMAIN}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok())
}

/// Fails unless peers, routes and flood entries are so many each.
pub fn assert_holds(keys: usize) {
    for table in ["wg show wg-mesh peers", "ip -6 route show dev wg-mesh proto static", "bridge fdb show dev vx-mesh"] {
        assert_eq!(run(table).lines().count(), keys, "{table}");
    }
}

/// The first keys of many.
pub fn keys(number: u32) -> Vec<PublicKey> {
    (0..number).map(|n| wgkex_tests::key(n).parse().unwrap()).collect()
}

/// Writes a line, or more, for each key.
pub fn write(path: &Path, keys: &[PublicKey], line: impl Fn(&PublicKey) -> String) {
    fs::write(path, keys.iter().map(line).collect::<Vec<_>>().concat()).unwrap();
}

/// Network and files of this process's own.
pub fn make_namespaces() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("needs root");
    run("mount --make-rprivate / && mount -t tmpfs none /run && ip link set lo up");
}

/// What a command takes that must succeed.
pub fn timed(command: &str) -> Duration {
    let began = Instant::now();
    run(command);
    began.elapsed()
}

/// The output of a command that must succeed, trimmed.
pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Publishes the lines of a file as keys.
pub fn publish(stack: &Stack, lines: &Path) -> Command {
    let mut command = mosquitto("pub", stack);
    command.args(["-t", &format!("wireguard/{DOMAIN}/all"), "-q", "1", "-l"]).stdin(File::open(lines).unwrap());
    command
}

/// One of Mosquitto's clients.
pub fn mosquitto(client: &str, stack: &Stack) -> Command {
    let mut command = Command::new(format!("mosquitto_{client}"));
    command.args(["-h", &stack.mqtt.ip().to_string(), "-p", &stack.mqtt.port().to_string()]);
    command.stdin(Stdio::null());
    command
}
