//! Linux in a network namespace of each test, controlled by the C tools. A missing tool fails the test.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wgkex_common::{Domain, PublicKey};
use wgkex_kernel::netlink::Netlink;

use crate::SOON;
use crate::lab::{Lab, Shown, key};

/// The WireGuard implementation: it depends on how the interface is created.
#[derive(Debug, Clone, Copy)]
pub enum WireGuard {
    Kernel,
    Userspace,
}

pub struct Linux {
    wireguard: WireGuard,
    /// The userspace processes, by interface.
    processes: RefCell<BTreeMap<String, Process>>,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

const PORT: u16 = 40_001;

/// Private keys, in base64, of a gateway and of a node.
const GATEWAY: &str = "EBESExQVFhcYGRobHB0eHyAhIiMkJSYnKCkqKywtLm8=";
const NODE: &str = "MDEyMzQ1Njc4OTo7PD0+P0BBQkNERUZHSElKS0xNTk8=";

impl Linux {
    /// Stops the userspace process of a domain, or continues it.
    pub fn freeze(&self, domain: &Domain, frozen: bool) {
        let processes = self.processes.borrow();
        let Process(child) = &processes[&domain.wireguard()];
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, if frozen { Signal::SIGSTOP } else { Signal::SIGCONT }).unwrap();
        // Running threads stop a moment later.
        while frozen && !is_stopped(pid) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs a scenario on a separate thread in fresh namespaces, isolated from other tests and the host. `/run` is
    /// separate too, as the control sockets of a userspace WireGuard are found by the interface's name alone.
    pub fn run(wireguard: WireGuard, scenario: impl AsyncFnOnce(Linux) + Send + 'static) {
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root may unshare");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            run("ip link set lo up");
            let lab = Linux { wireguard, processes: RefCell::default() };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(scenario(lab));
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// Makes a node beside the gateway that has it as a peer, and returns its key. It does not start a handshake yet.
    pub fn make_node(&self, domain: &Domain) -> PublicKey {
        let gateway = public_key(GATEWAY);
        self.make_wireguard("wg-node", NODE);
        run(&format!("wg set wg-node peer {gateway} endpoint 127.0.0.1:{PORT} allowed-ips fe80::/64"));
        run("ip link set wg-node up");
        assert_ne!(domain.wireguard(), "wg-node");
        public_key(NODE)
    }

    /// Makes the node start handshakes until the gateway shows one, and then be silent.
    pub async fn shake_hands(&self, domain: &Domain, node: PublicKey) {
        let gateway = public_key(GATEWAY);
        run(&format!("wg set wg-node peer {gateway} persistent-keepalive 1"));
        let deadline = Instant::now() + SOON;
        while received(domain, node) == 0 {
            assert!(Instant::now() < deadline, "no handshake");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        run(&format!("wg set wg-node peer {gateway} persistent-keepalive 0"));
        let mut before = None;
        while before != Some(shown_peer(domain, node)) {
            before = Some(shown_peer(domain, node));
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
    }

    fn make_wireguard(&self, name: &str, private_key: &str) {
        match self.wireguard {
            WireGuard::Kernel => drop(run(&format!("ip link add {name} type wireguard"))),
            WireGuard::Userspace => {
                self.processes.borrow_mut().insert(name.to_owned(), start_userspace(name));
            }
        }
        run_with(&format!("wg set {name} private-key /dev/stdin"), private_key);
    }
}

impl Lab for Linux {
    type Kernel = Netlink;

    fn kernel(&self) -> Netlink {
        // On a busy machine a slow process must not count as a hanging one.
        Netlink::open().unwrap().with_timeout(4 * SOON)
    }

    fn domain(&self, name: &str) -> Domain {
        Domain::new(name, &[String::new()]).unwrap()
    }

    fn make(&self, domain: &Domain) {
        self.remove(domain);
        let wg = domain.wireguard();
        self.make_wireguard(&wg, GATEWAY);
        run(&format!("wg set {wg} listen-port {}", PORT + number(domain)));
        run(&format!("ip link set {wg} addrgenmode none"));
        run(&format!("ip address add {}/64 dev {wg} nodad", public_key(GATEWAY).link_local()));
        run(&format!("ip link set {wg} up"));
        make_vxlan(domain, "");
    }

    fn remove(&self, domain: &Domain) {
        self.remove_vxlan(domain);
        self.processes.borrow_mut().remove(&domain.wireguard());
        try_run(&format!("ip link del {}", domain.wireguard()));
    }

    fn remove_vxlan(&self, domain: &Domain) {
        try_run(&format!("ip link del {}", domain.vxlan()));
    }

    fn set_up(&self, domain: &Domain, up: bool) {
        let state = if up { "up" } else { "down" };
        run(&format!("ip link set {} {state}", domain.wireguard()));
    }

    fn assert_absent(&self, domain: &Domain) {
        assert!(!run("ip -br link").contains(&domain.wireguard()));
    }

    fn own(&self, _domain: &Domain) -> (Option<PublicKey>, u16, Option<IpAddr>) {
        let key = public_key(GATEWAY);
        (Some(key), PORT, Some(key.link_local().into()))
    }

    fn add_foreign(&self, domain: &Domain) {
        let (wg, vx, other) = (domain.wireguard(), domain.vxlan(), key(u32::MAX));
        let peer = "allowed-ips 10.9.0.0/24,fe80::f/128 endpoint 127.0.0.1:9 persistent-keepalive 25";
        run(&format!("wg set {wg} peer {other} {peer}"));
        let of_own_key = key(1).link_local();
        for route in [
            "2001:db8::/64 proto static".into(),
            "2001:db8::1 proto static metric 7".into(),
            "fe80::f proto boot".into(),
            format!("{of_own_key} proto static table 77"),
            format!("{of_own_key} proto boot metric 9"),
        ] {
            run(&format!("ip -6 route add {route} dev {wg}"));
        }
        for entry in [
            format!("02:00:00:00:00:01 dst fe80::f via {wg}"),
            format!("00:00:00:00:00:00 dst fe80::f via {wg}"),
            format!("00:00:00:00:00:00 dst {of_own_key} via {wg} port 9999"),
            "00:00:00:00:00:00 dst fe80::e via lo".into(),
        ] {
            run(&format!("bridge fdb append {entry} dev {vx}"));
        }
    }

    fn foreign_routes(&self) -> BTreeSet<IpNet> {
        ["2001:db8::1/128", "2001:db8::/64"].map(|route| route.parse().unwrap()).into()
    }

    fn shown(&self, domain: &Domain) -> Shown {
        let (wg, vx) = (domain.wireguard(), domain.vxlan());
        let lines = |text: String| text.lines().map(|line| line.trim().to_owned()).collect();
        Shown {
            peers: lines(run(&format!("wg show {wg} allowed-ips"))),
            routes: lines(
                run(&format!("ip -6 route show dev {wg} proto static")).replace(" metric", " proto static metric"),
            ),
            fdb: lines(run(&format!("bridge fdb show dev {vx}"))),
        }
    }

    fn tables(&self, domain: &Domain) -> String {
        let (wg, vx) = (domain.wireguard(), domain.vxlan());
        let config = run(&format!("wg showconf {wg}"));
        // wireguard-go names its peers in any order.
        let peers: BTreeSet<_> = config.trim().split("\n\n").collect();
        let routes = run(&format!("ip -6 -d route show table all dev {wg}"));
        format!("{peers:#?}\n{routes}\n{}", run(&format!("bridge -d fdb show dev {vx}")))
    }
}

pub fn make_vxlan(domain: &Domain, more: &str) {
    let (wg, vx, network) = (domain.wireguard(), domain.vxlan(), 99 + number(domain));
    let local = public_key(GATEWAY).link_local();
    run(&format!("ip link add {vx} up type vxlan id {network} local {local} dev {wg} dstport 8472 {more}"));
}

/// Each domain has its own port and network.
fn number(domain: &Domain) -> u16 {
    u16::from(domain.interface_suffix().as_bytes()[0] - b'a')
}

/// Whether every thread of a process is stopped (proc(5): the state stands behind the name, which is in brackets).
fn is_stopped(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|fields| fields.starts_with('T'))
    })
}

/// Starts a process that ends with this thread, and waits until it answers.
fn start_userspace(name: &str) -> Process {
    let process = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "wireguard-go", "--foreground", name])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(Process)
        .expect("setpriv");
    let (socket, deadline) = (format!("/var/run/wireguard/{name}.sock"), Instant::now() + SOON);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "wireguard-go does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    process
}

fn public_key(private_key: &str) -> PublicKey {
    run_with("wg pubkey", private_key).trim().parse().unwrap()
}

/// `wg set` on a domain's interface.
pub fn wg(domain: &Domain, arguments: &str) {
    run(&format!("wg set {} {arguments}", domain.wireguard()));
}

/// `wg addconf` on a domain's interface.
pub fn add_config(domain: &Domain, config: &str) {
    run_with(&format!("wg addconf {} /dev/stdin", domain.wireguard()), config);
}

fn received(domain: &Domain, node: PublicKey) -> u64 {
    shown_peer(domain, node).counters[0]
}

/// A peer as `wg show dump` has it (wg(8)).
#[derive(Debug, PartialEq, Eq)]
pub struct ShownPeer {
    /// The bytes received and sent.
    pub counters: Vec<u64>,
    /// Everything else.
    pub rest: Vec<String>,
}

/// A peer with all fields that WireGuard reports.
pub fn shown_peer(domain: &Domain, peer: PublicKey) -> ShownPeer {
    let dump = run(&format!("wg show {} dump", domain.wireguard()));
    let line = dump.lines().find(|line| line.starts_with(&peer.to_string())).expect("the peer");
    let mut rest: Vec<_> = line.split('\t').map(str::to_owned).collect();
    let counters = rest.drain(5..7).map(|bytes| bytes.parse().expect("a number of bytes")).collect();
    ShownPeer { counters, rest }
}

/// Runs a command that must succeed, and returns its output.
pub fn run(command: &str) -> String {
    run_with(command, "")
}

fn run_with(command: &str, input: &str) -> String {
    let (ok, output) = output(command, input);
    assert!(ok, "{command}: {output}");
    output
}

fn try_run(command: &str) {
    output(command, "");
}

fn output(command: &str, input: &str) -> (bool, String) {
    use std::io::Write as _;
    let mut words = command.split_whitespace();
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    // A command that fails before it has read all of its input reports the reason on stderr.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(text).unwrap())
}
