//! A lab for the programs with a real kernel: hosts in namespaces of their own on this machine, with real WireGuard
//! interfaces, which tests inspect with the C tools. Needs root. Everything in a host ends with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use wgkex_common::PublicKey;

use crate::http::{Http, Response, ask};
use crate::process::{Process, binary};

/// The beginning of every host's config: two domains, `wg-a` on port 51820 and `wg-b` on 51821; no limit per client,
/// since all routers of a test have one address.
const CONFIG: &str = "\
domains: [test_a, test_b]
domain_prefixes: [test_]
broker_listen: {host: 0.0.0.0, port: 5000}
limits: {per_client: {burst: 0}}
setup: {key_dir: /run/wgkex}
state_dir: /run/wgkex/state
";

/// The first process of a host: mounts its own /run (for the config, the keys, the control sockets of a userspace
/// WireGuard), sets its host name, and prints its process id in the namespace of the test.
const HOLD: &str = r#"mount -t tmpfs -o mode=755 none /run && mkdir /run/wireguard /run/wgkex && hostname "$0" &&
    ip link set lo up && read -r pid _ </proc/self/stat && echo "host $pid" && exec sleep infinity"#;

/// The WireGuard implementation of a host's interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// wireguard-go, on any kernel.
    Userspace,
    /// The kernel's, which must support it.
    Kernel,
}

/// A host: network, mounts, host name and processes of its own.
#[derive(Debug)]
pub struct Host {
    name: String,
    pid: u32,
    lane: Lane,
    _first: Process,
}

/// The output of the C tools for a domain, line by line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// `wg show allowed-ips`.
    pub peers: BTreeSet<String>,
    /// `ip -6 route`, protocol static.
    pub routes: BTreeSet<String>,
    /// `bridge fdb`, the all-zeros entries.
    pub fdb: BTreeSet<String>,
    interface: String,
}

impl Host {
    /// A host of this name, which is its worker's, with only a loopback interface. Its processes die with the thread
    /// that makes it.
    #[must_use]
    pub fn new(name: &str, lane: Lane) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let mut command = Command::new("setpriv");
        command.args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
        ]);
        let first = Process::start(name, command.args(["sh", "-c", HOLD, name]));
        let printed = first.wait_for_log("host ");
        let pid = printed.trim_start_matches("host ").parse().expect("a process id");
        let host = Self { name: name.into(), pid, lane, _first: first };
        if lane == Lane::Kernel {
            host.run("ip link add probe type wireguard && ip link del probe");
        }
        host.configure("");
        host
    }

    /// The path of one of its files outside of it. Only files below `/run` are its own.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        format!("/proc/{}/root{inside}", self.pid).into()
    }

    /// Writes the config of its programs: the domains, and `more`.
    pub fn configure(&self, more: &str) {
        fs::write(self.path("/run/wgkex.yaml"), format!("{CONFIG}{more}")).expect("write the config");
    }

    /// Connects it to `other` with a veth pair; returns the addresses at this end and at the other.
    #[must_use]
    pub fn connect(&self, other: &Self, network: u8) -> (Ipv4Addr, Ipv4Addr) {
        let (here, there) = (Ipv4Addr::new(198, 18, network, 1), Ipv4Addr::new(198, 18, network, 2));
        let cable = format!("cable{network}");
        // The process id is valid only in a namespace that sees all processes.
        let add = format!("ip link add {cable} type veth peer name {cable} netns {}", other.pid);
        text(&add, self.inside(|| Command::new("sh").args(["-c", &add]).output().expect("a shell runs")));
        for (host, address) in [(self, here), (other, there)] {
            host.run(&format!("ip addr add {address}/24 dev {cable} && ip link set {cable} up"));
        }
        (here, there)
    }

    /// Runs a shell command in it, which must succeed; returns its output, without the last newline.
    #[expect(clippy::must_use_candidate, reason = "mostly it is run for what it does")]
    pub fn run(&self, command: &str) -> String {
        let output = self.shell(command, |shell| {
            shell.env("WGKEX_CONFIG_FILE", "/run/wgkex.yaml");
        });
        text(command, output)
    }

    /// Runs a shell command in it, which may fail.
    #[must_use]
    pub fn try_run(&self, command: &str) -> Output {
        self.shell(command, |_| {})
    }

    /// Runs a shell whose children stay in the host when they go to the background. Not by nsenter: each program that is
    /// executed costs tens of milliseconds in an emulated machine.
    fn shell(&self, command: &str, prepare: impl FnOnce(&mut Command) + Send) -> Output {
        self.inside(|| {
            self.enter_namespace("pid", CloneFlags::CLONE_NEWPID);
            let mut shell = Command::new("sh");
            prepare(shell.args(["-c", command]));
            shell.output().expect("a shell runs")
        })
    }

    fn enter_by_command(&self) -> Command {
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &self.pid.to_string(), "--net", "--mount", "--uts"]);
        enter
    }

    /// Makes the interfaces of both domains, by `wgkex-worker setup`.
    pub fn setup(&self) {
        let userspace = if self.lane == Lane::Userspace { " --userspace" } else { "" };
        self.run(&format!("{} setup{userspace}", binary("wgkex-worker").display()));
        let kind = if self.lane == Lane::Userspace { "tun" } else { "wireguard" };
        assert!(self.run("ip -d link show wg-a").contains(kind), "wg-a is a {kind} interface");
    }

    /// Takes the interfaces down again, by `wgkex-worker setup --remove`.
    pub fn remove(&self) {
        self.run(&format!("{} setup --remove", binary("wgkex-worker").display()));
    }

    /// Starts a worker: as its unit does where `WGKEX_TEST_UNITS` is set, as root elsewhere.
    #[must_use]
    pub fn start_worker(&self) -> Process {
        match std::env::var_os("WGKEX_TEST_UNITS") {
            Some(_) => self.start_unit("worker", "wgkex-worker"),
            None => self.start_worker_as_root(),
        }
    }

    /// Starts a worker with all privileges.
    #[must_use]
    pub fn start_worker_as_root(&self) -> Process {
        self.start("worker", &binary("wgkex-worker"), &[], &[])
    }

    /// Starts a program as its systemd unit does, with the same user, privileges and filters.
    fn start_unit(&self, name: &str, unit: &str) -> Process {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let log = format!("/run/{unit}.{}.log", STARTED.fetch_add(1, Ordering::Relaxed));
        let file = File::options().create_new(true).read(true).append(true).open(self.path(&log)).expect("a log");
        let mut command = self.enter_by_command();
        let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/as-unit");
        command.args(["setpriv", "--pdeathsig", "KILL", "--"]).arg(runner).arg(unit).arg(binary(unit)).arg(log);
        command.env("WGKEX_CONFIG_FILE", "/run/wgkex.yaml");
        Process::start_below(&format!("{}/{name}", self.name), &mut command, unit, file)
    }

    /// Starts a broker.
    #[must_use]
    pub fn start_broker(&self) -> Process {
        self.start("broker", &binary("wgkex-broker"), &[], &[])
    }

    /// Starts Mosquitto on port 1883 of all addresses. Retained messages do not outlive it.
    #[must_use]
    pub fn start_mosquitto(&self) -> Process {
        let config = "listener 1883 0.0.0.0\nallow_anonymous true\npersistence false\nuser root\n";
        fs::write(self.path("/run/mosquitto.conf"), config).expect("write Mosquitto's config");
        let mosquitto =
            self.start("mosquitto", Path::new("/usr/sbin/mosquitto"), &["-c", "/run/mosquitto.conf", "-v"], &[]);
        mosquitto.wait_for_log(" running");
        mosquitto
    }

    /// Makes it a router: a tunnel `wg-router`, with the private key in `/run/key`, to domain `test_a` of `gateway` at
    /// this address. Returns the gateway's address in it.
    #[must_use]
    pub fn tunnel_to(&self, gateway: &Self, address: Ipv4Addr) -> String {
        self.run(match self.lane {
            Lane::Userspace => "wireguard-go wg-router >/dev/null 2>&1",
            Lane::Kernel => "ip link add wg-router type wireguard",
        });
        let (public_key, port) = (gateway.run("wg show wg-a public-key"), gateway.run("wg show wg-a listen-port"));
        let (own, remote) = (link_local(&self.run("wg pubkey < /run/key")), link_local(&public_key));
        self.run(&format!(
            "wg set wg-router private-key /run/key peer {public_key} endpoint {address}:{port} allowed-ips {remote}/128 &&
             ip addr add {own}/128 dev wg-router && ip link set wg-router up && ip route add {remote}/128 dev wg-router"
        ));
        remote
    }

    /// Starts a program in it; `privileges` are options of `setpriv` that drop some.
    #[must_use]
    pub fn start(&self, name: &str, program: &Path, args: &[&str], privileges: &[&str]) -> Process {
        let mut command = self.enter_by_command();
        command.args(["setpriv", "--pdeathsig", "KILL"]).args(privileges).arg("--").arg(program).args(args);
        command.env("WGKEX_CONFIG_FILE", "/run/wgkex.yaml");
        Process::start(&format!("{}/{name}", self.name), &mut command)
    }

    /// Runs `work` on a thread that is in the host; its sockets and threads stay in the host.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.enter();
                work()
            });
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    fn enter(&self) {
        unshare(CloneFlags::CLONE_FS).expect("a working directory of its own");
        self.enter_namespace("net", CloneFlags::CLONE_NEWNET);
        self.enter_namespace("uts", CloneFlags::CLONE_NEWUTS);
        self.enter_namespace("mnt", CloneFlags::CLONE_NEWNS);
    }

    fn enter_namespace(&self, file: &str, kind: CloneFlags) {
        let namespace = File::open(format!("/proc/{}/ns/{file}", self.pid)).expect("the namespace of a host");
        setns(namespace, kind).unwrap_or_else(|error| panic!("enter {}: {error}", self.name));
    }

    /// POSTs a key of domain `test_a` as a router does, to the broker on this host. Version 1 or 2.
    #[must_use]
    pub fn post(&self, version: u8, key: &str) -> Response {
        self.http(5000).expect("the broker listens").post(&path(version), &ask("test_a", key))
    }

    /// The same, with a client that accepts any end of the connection; `None` if there was no answer.
    #[must_use]
    pub fn try_post(&self, version: u8, key: &str) -> Option<u16> {
        self.try_post_to("test_a", version, key)
    }

    /// The same for any domain.
    #[must_use]
    pub fn try_post_to(&self, domain: &str, version: u8, key: &str) -> Option<u16> {
        Some(self.http(5000).ok()?.try_post(&path(version), &ask(domain, key)).ok()?.status)
    }

    /// GETs a page from a program on this host.
    #[must_use]
    pub fn get(&self, port: u16, path: &str) -> Option<Response> {
        Some(self.http(port).ok()?.get(path))
    }

    /// The same from a program that may end meanwhile; `None` if there was no answer.
    #[must_use]
    pub fn try_get(&self, port: u16, path: &str) -> Option<Response> {
        self.http(port).ok()?.try_get(path).ok()
    }

    fn http(&self, port: u16) -> io::Result<Http> {
        self.inside(|| Http::try_connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))))
    }

    /// The kernel's tables for domain `test_{rest}`, as the C tools show them.
    #[must_use]
    pub fn tables(&self, rest: &str) -> Tables {
        let interface = format!("wg-{rest}");
        let lines = |command: String| -> BTreeSet<String> {
            let mut words = command.split(' ');
            let mut tool = Command::new(words.next().unwrap_or_default());
            let output = text(&command, tool.args(words).output().expect("a tool runs"));
            output.lines().map(|line| line.trim().to_owned()).collect()
        };
        let (peers, routes, mut fdb) = self.inside(|| {
            let peers = lines(format!("wg show {interface} allowed-ips"));
            let routes = lines(format!("ip -6 route show proto static dev {interface}"));
            (peers, routes, lines(format!("bridge fdb show dev vx-{rest}")))
        });
        fdb.retain(|line| line.starts_with("00:00:00:00:00:00 "));
        Tables { peers, routes, fdb, interface }
    }

    /// All that `wg` shows of the interface: keys, endpoints, handshakes, counters.
    #[must_use]
    pub fn wireguard(&self, interface: &str) -> BTreeSet<String> {
        self.run(&format!("wg show {interface} dump")).lines().map(str::to_owned).collect()
    }

    /// One of the figures of `/metrics` on this port, if it is there.
    #[must_use]
    pub fn metric(&self, port: u16, series: &str) -> Option<String> {
        let metrics = self.get(port, "/metrics")?;
        metrics.body.lines().find_map(|line| Some(line.strip_prefix(series)?.trim().to_owned()))
    }
}

impl Tables {
    /// The missing ones of a key's three objects.
    #[must_use]
    pub fn missing(&self, key: &str) -> Vec<String> {
        let node = link_local(key);
        let peer = format!("{key}\t{node}/128");
        let route = format!("{node} metric 1024 pref medium");
        let entry = format!("00:00:00:00:00:00 dst {node} via {} self permanent", self.interface);
        let wanted = [(peer, &self.peers), (route, &self.routes), (entry, &self.fdb)];
        wanted.into_iter().filter_map(|(line, table)| (!table.contains(&line)).then_some(line)).collect()
    }

    /// The number of entries of each table: peers, routes, flood list.
    #[must_use]
    pub fn lengths(&self) -> [usize; 3] {
        [self.peers.len(), self.routes.len(), self.fdb.len()]
    }
}

/// The address that a key's node has.
#[must_use]
pub fn link_local(key: &str) -> String {
    key.parse::<PublicKey>().expect("a key").link_local().to_string()
}

fn path(version: u8) -> String {
    format!("/api/v{version}/wg/key/exchange")
}

/// The output of a command that must succeed, without the last newline.
fn text(command: &str, output: Output) -> String {
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").trim_end_matches('\n').to_owned()
}
