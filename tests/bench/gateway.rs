//! A gateway to measure: its network, its interfaces, its worker, and the C tools on the same interfaces.

use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::Change;
use wgkex_tests::http::Http;
use wgkex_tests::probe::Role;
use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::{host_name, wait_until};
use wgkex_worker::plan::{self, Step};
use wgkex_worker::profiles::mesh;

use crate::bus;
use crate::measure::{self, Cost, children};

/// The served domain.
pub const DOMAIN: &str = "ffx_mesh";

const METRICS: &str = "127.0.0.1:9586";

/// A worker with empty or filled tables, and a bus.
pub struct Gateway {
    /// The bus, and the broker if it is started.
    pub stack: Stack,
    mosquitto: Option<Process>,
    worker: Option<Process>,
}

impl Gateway {
    /// Interfaces without peers in a network of their own; nothing else runs.
    pub fn new(bus: Bus) -> Self {
        Self::with(bus, "")
    }

    /// The same, with more in the config.
    pub fn with(bus: Bus, more: &str) -> Self {
        // A slow broker is to be measured, not to answer 503.
        let patience = "confirm_timeout: 20\nconfirm_budget: 20";
        let config = format!("{patience}\nsetup: {{key_dir: /run/keys}}\nworker_listen: \"{METRICS}\"\n{more}");
        let stack = Stack::prepare(Plan::new(bus).domains([DOMAIN]).config(&config));
        let mut gateway = Self { stack, mosquitto: None, worker: None };
        gateway.renew();
        gateway
    }

    /// A new network with new interfaces, without peers; no program runs, and the state is deleted. The old interfaces
    /// stay as they are: deleting many peers takes the kernel minutes, and disturbs the next measurement.
    pub fn renew(&mut self) {
        // At first there is none.
        let _ = fs::remove_dir_all(self.stack.state_dir());
        self.reboot();
    }

    /// The same, but the programs keep their state on disk.
    pub fn reboot(&mut self) {
        (self.mosquitto, self.worker) = (None, None);
        enter_new_network();
        let mut setup = self.stack.program("wgkex-worker", &["setup"]);
        assert!(setup.wait().success(), "{}", setup.log());
    }

    /// Starts Mosquitto, if it is the bus.
    pub fn start_bus(&mut self) {
        if self.stack.plan.bus == Bus::Mosquitto {
            self.mosquitto = Some(bus::start_mosquitto(&self.stack));
        }
    }

    /// Starts the broker, and waits until it is ready.
    pub fn start_broker(&mut self) {
        self.stack.start_broker();
        self.stack.wait_until_ready();
    }

    /// Starts the worker, and waits until it receives keys and has read its tables.
    pub fn start_worker(&mut self) {
        let (status, online) = (format!("wireguard-worker/{}/status", host_name()), b"1");
        let probe = self.stack.probe(Role::new("bench", &[&status]));
        self.launch_worker();
        probe.next("the worker is online", |message| message.topic == status && message.payload == online);
        wait_until("the worker has read its tables", || (metric("domain_up") == Some(1)).then_some(()));
    }

    /// Starts the worker, and does not wait.
    pub fn launch_worker(&mut self) {
        self.worker = Some(self.stack.program("wgkex-worker", &[]));
    }

    /// Waits until the worker reports so many newly installed keys.
    pub fn wait_for_keys(&self, keys: u32, every: Duration) {
        let found = || metric("keys_installed_total").filter(|installed| *installed >= keys);
        let all = measure::look(every, Duration::from_secs(300), found);
        let log = || self.worker.as_ref().map(Process::log).unwrap_or_default();
        assert!(all.is_some(), "keys are missing: {:?} of {keys}\n{}", metric("keys_installed_total"), log());
    }

    /// The worker's process id.
    pub fn worker(&self) -> u32 {
        self.worker.as_ref().expect("a worker that runs").pid()
    }

    /// Ends the worker.
    pub fn stop_worker(&mut self) {
        let mut worker = self.worker.take().expect("a worker that runs");
        assert!(worker.end_by(Signal::SIGTERM).success(), "{}", worker.log());
    }

    /// Has the C tools install keys, all of a kind at once; returns the cost of each tool.
    pub fn by_c_tools(&self, keys: &[PublicKey]) -> [(&'static str, Cost); 3] {
        let file = |name: &str, line: &dyn Fn(&PublicKey) -> String| {
            let path = self.stack.dir().join(name);
            write(&path, keys, line);
            path.display().to_string()
        };
        let peers = file("peers", &|key| format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {}/128\n", key.link_local()));
        let routes = file("routes", &|key| format!("{}\n", route(key)));
        let fdb = file("fdb", &|key| format!("{}\n", flood_entry(key)));
        [
            ("wg addconf", cost(&format!("wg addconf wg-mesh {peers}"))),
            ("ip -batch", cost(&format!("ip -6 -batch {routes}"))),
            ("bridge -batch", cost(&format!("bridge -batch {fdb}"))),
        ]
    }
}

/// Has the C tools install one key, each called for it alone.
pub fn one_by_c_tools(key: &PublicKey) -> Cost {
    let peer = format!("wg set wg-mesh peer {key} allowed-ips {}/128", key.link_local());
    cost(&format!("{peer} && ip -6 {} && bridge {}", route(key), flood_entry(key)))
}

fn route(key: &PublicKey) -> String {
    format!("route add {}/128 dev wg-mesh proto static", key.link_local())
}

fn flood_entry(key: &PublicKey) -> String {
    format!("fdb append 00:00:00:00:00:00 dst {} via wg-mesh dev vx-mesh", key.link_local())
}

/// The commands by which the C tools show the three tables.
pub const SHOW: [&str; 3] =
    ["wg show wg-mesh dump", "ip -6 route show dev wg-mesh proto static", "bridge fdb show dev vx-mesh"];

/// A figure of the worker's metrics for the domain.
pub fn metric(name: &str) -> Option<u32> {
    let server: SocketAddr = METRICS.parse().ok()?;
    let text = Http::try_connect(server).ok()?.get("/metrics").body;
    let series = format!("wgkex_worker_{name}{{domain=\"{DOMAIN}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok())
}

/// Fails unless peers, routes and flood entries are so many each.
pub fn assert_holds(keys: u32) {
    for table in ["wg show wg-mesh peers", SHOW[1], SHOW[2]] {
        assert_eq!(run(table).lines().count(), keys as usize, "{table}");
    }
}

/// The served domain, in the worker's type.
pub fn domain() -> Domain {
    Domain::new(DOMAIN, &["ffx_".into()]).unwrap()
}

/// Keys of these numbers, no two the same, in no order.
pub fn keys(numbers: Range<u32>) -> Vec<PublicKey> {
    numbers.map(key).collect()
}

/// The changes by which the kernel installs `keys`.
pub fn install(keys: impl IntoIterator<Item = PublicKey>) -> Vec<Change> {
    let steps: Vec<_> = keys.into_iter().map(mesh::desired).map(Step::install).collect();
    plan::changes(&steps)
}

/// The key of a number.
pub fn key(number: u32) -> PublicKey {
    // An odd factor maps no two numbers to one.
    wgkex_tests::key(number.wrapping_mul(0x9E37_79B1)).parse().unwrap()
}

/// Writes a line, or more, for each key.
pub fn write(path: &Path, keys: &[PublicKey], line: impl Fn(&PublicKey) -> String) {
    fs::write(path, keys.iter().map(line).collect::<Vec<_>>().concat()).unwrap();
}

/// Moves this thread, and processes that it starts from now on, to a network with only a loopback interface, and a
/// `/run` of its own for the control sockets of a userspace WireGuard.
pub fn enter_new_network() {
    unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
    run("mount -t tmpfs none /run && mkdir -p /run/wireguard && ip link set lo up");
    keep_network();
}

/// Keeps the network of this thread beyond the end of this process, so that its removal, slow with many peers, disturbs
/// no measurement.
#[expect(clippy::zombie_processes, reason = "it never ends while this process runs")]
pub fn keep_network() {
    let mut sleep = Command::new("sleep");
    sleep.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sleep.process_group(0).spawn().expect("sleep runs");
}

/// The cost of a command that must succeed.
pub fn cost(command: &str) -> Cost {
    children(|| drop(run(command)))
}

/// The output of a command that must succeed, trimmed.
pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
