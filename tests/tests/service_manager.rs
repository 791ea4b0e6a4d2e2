//! The notifications of the programs to systemd, and when they are sent: the test has the socket of the service
//! manager.

#![expect(clippy::unwrap_used, reason = "the lint knows test functions, not what they call")]

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tempfile::TempDir;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::{Process, binary};
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::{DEADLINE, wait_until};

/// A task without progress for so long is stuck.
const WATCHDOG: (&str, &str) = ("WATCHDOG_USEC", "5000000");

/// The service manager's end of the socket.
struct Manager {
    dir: TempDir,
    socket: UnixDatagram,
}

impl Manager {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { dir, socket }
    }

    /// The variables of a program that it watches.
    fn variables(&self) -> [(&'static str, String); 2] {
        let (name, limit) = WATCHDOG;
        [("NOTIFY_SOCKET", self.dir.path().join("notify").to_str().unwrap().to_owned()), (name, limit.to_owned())]
    }

    /// A stack whose programs it watches.
    fn plan(&self, bus: Bus) -> Plan {
        self.variables().iter().fold(Plan::new(bus), |plan, (name, value)| plan.variable(name, value))
    }

    /// A worker of this host that it watches.
    fn start_worker(&self, host: &Host) -> Process {
        let variables = self.variables().map(|(name, value)| format!("{name}={value}"));
        let program = binary("wgkex-worker");
        let words = [variables[0].as_str(), variables[1].as_str(), program.to_str().unwrap()];
        host.start("worker", Path::new("/usr/bin/env"), &words, &[])
    }

    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).expect("a message");
        String::from_utf8(buffer[..length].to_vec()).unwrap().trim_end().to_owned()
    }

    /// The messages up to one with this beginning.
    fn until(&self, beginning: &str) -> Vec<String> {
        let mut messages = vec![self.next()];
        while !messages.last().is_some_and(|last| last.starts_with(beginning)) {
            messages.push(self.next());
        }
        messages
    }

    /// Waits until the program reports that this task is stuck, and checks that it does not feed the watchdog then.
    fn sees_stuck(&self, task: &str) {
        self.until(&format!("STATUS=no progress: {task}"));
        self.socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let length = self.socket.recv(&mut [0; 4096]);
        assert!(length.is_err(), "a message of {length:?} bytes");
        self.socket.set_read_timeout(Some(DEADLINE)).unwrap();
    }
}

/// A thread of a program that does not run as long as this value lives.
struct FrozenThread(Pid);

impl FrozenThread {
    fn of(program: &Process, name: &str) -> Self {
        let mut threads = fs::read_dir(format!("/proc/{}/task", program.pid())).unwrap().map(|dir| dir.unwrap());
        let thread = threads.find(|dir| fs::read_to_string(dir.path().join("comm")).unwrap().trim_end() == name);
        let thread = Pid::from_raw(thread.unwrap().file_name().to_str().unwrap().parse().unwrap());
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(thread).unwrap();
        Self(thread)
    }
}

impl Drop for FrozenThread {
    /// Otherwise the end of the program could not be waited for.
    fn drop(&mut self) {
        let _ = ptrace::detach(self.0, None);
    }
}

/// Starts the process of this WireGuard interface.
fn start_wireguard(host: &Host, interface: &str) -> Process {
    let process = host.start(interface, Path::new("wireguard-go"), &["--foreground", interface], &[]);
    let show = format!("wg show {interface}");
    wait_until("WireGuard answers", || host.try_run(&show).status.success().then_some(()));
    process
}

#[test]
fn a_broker_reports_that_it_is_ready_reads_again_and_stops() {
    let manager = Manager::new();
    let mut stack = Stack::start(manager.plan(Bus::Embedded));
    let before = manager.until("READY=1");
    assert!(before.iter().all(|message| !message.starts_with("STATUS=ready")), "{before:?}");
    manager.until("STATUS=ready");
    manager.until("WATCHDOG=1");
    stack.broker().signal(Signal::SIGHUP);
    manager.until("RELOADING=1");
    manager.until("READY=1");
    assert!(stack.stop_broker().success());
    manager.until("STOPPING=1");
}

#[test]
fn a_broker_without_its_mqtt_server_feeds_the_watchdog_and_one_that_stands_still_does_not() {
    let manager = Manager::new();
    let mut stack = Stack::start(manager.plan(Bus::Mosquitto));
    manager.until("READY=1");
    assert!(stack.mosquitto().end_by(Signal::SIGTERM).code().is_some());
    let status = manager.until("STATUS=not ready: MQTT is not connected").pop().unwrap();
    assert!(!status.contains('\n'), "{status}");
    for _ in 0..5 {
        manager.until("WATCHDOG=1");
    }
    stack.broker().signal(Signal::SIGSTOP);
    manager.socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    while manager.socket.recv(&mut [0; 4096]).is_ok() {}
    assert!(stack.broker().is_running());
    stack.broker().signal(Signal::SIGKILL);
}

/// The server's own thread, as the broker's other threads go on: its sessions reconnect, which does not help.
#[test]
fn a_broker_whose_own_mqtt_server_is_stuck_does_not_feed_the_watchdog() {
    let manager = Manager::new();
    let mut stack = Stack::start(manager.plan(Bus::Embedded));
    manager.until("STATUS=ready");
    let router = FrozenThread::of(stack.broker(), "router-0");
    manager.sees_stuck("the MQTT server");
    drop(router);
    manager.until("WATCHDOG=1");
}

/// The processes of userspace interfaces are stopped, so calls of the kernel take longer than the watchdog allows here.
#[test]
#[ignore = "needs root: tests/run netns"]
fn a_worker_with_a_stuck_task_of_the_kernel_does_not_feed_the_watchdog() {
    let (manager, host) = (Manager::new(), Host::new("gateway", Lane::Userspace));
    host.configure("servers: {s1: {network: 10.77.0.0/24, listen_port: 52820}}\n");
    let interfaces = ["s1", "wg-a"].map(|interface| start_wireguard(&host, interface));
    host.setup();
    let _worker = manager.start_worker(&host);
    manager.until("WATCHDOG=1");
    for (interface, task) in interfaces.iter().zip(["the leases", "the reconciler"]) {
        interface.signal(Signal::SIGSTOP);
        // After a change of addresses both tasks read their interfaces.
        host.run("ip addr add 198.18.0.1/32 dev lo && ip addr del 198.18.0.1/32 dev lo");
        manager.sees_stuck(task);
        interface.signal(Signal::SIGCONT);
        manager.until("WATCHDOG=1");
    }
}
