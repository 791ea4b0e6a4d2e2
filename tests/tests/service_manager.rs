//! The notifications of the programs to systemd, and when they are sent: the test has the socket of the service
//! manager.

#![expect(clippy::unwrap_used, reason = "the lint knows test functions, not what they call")]

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use wgkex_tests::DEADLINE;
use wgkex_tests::stack::{Bus, Plan, Stack};

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

    /// A stack whose programs have a watchdog of a minute.
    fn plan(&self, bus: Bus) -> Plan {
        let socket = self.dir.path().join("notify");
        Plan::new(bus).variable("NOTIFY_SOCKET", socket.to_str().unwrap()).variable("WATCHDOG_USEC", "60000000")
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
