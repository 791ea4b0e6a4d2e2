//! Mosquitto and its clients.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use wgkex_common::PublicKey;
use wgkex_tests::probe::{Probe, Role};
use wgkex_tests::process::Process;
use wgkex_tests::stack::Stack;
use wgkex_tests::wait_until;

/// After this time all subscribers have received a published message.
const HEARD: Duration = Duration::from_millis(500);

/// Starts Mosquitto where `stack` expects the bus. Its queues have no bound, so it drops no message for a subscriber.
pub fn start_mosquitto(stack: &Stack) -> Process {
    let (file, address) = (stack.dir().join("bench.conf"), stack.mqtt);
    let config = "user root\nallow_anonymous true\nmax_queued_messages 0\n";
    fs::write(&file, format!("listener {} {}\n{config}", address.port(), address.ip())).unwrap();
    let process = Process::start("mosquitto", Command::new("mosquitto").arg("-c").arg(file));
    wait_until("Mosquitto serves", || TcpStream::connect(address).ok());
    process
}

/// Publishes `keys` of `domain`, acknowledged one by one, and returns when the server has them.
pub fn announce(stack: &Stack, domain: &str, keys: impl IntoIterator<Item = PublicKey>) {
    let lines = stack.dir().join(format!("{domain}.keys"));
    let keys: Vec<_> = keys.into_iter().map(|key| format!("{key}\n")).collect();
    fs::write(&lines, keys.concat()).unwrap();
    assert!(publish(stack, domain, &lines).status().unwrap().success(), "mosquitto_pub fails");
}

/// Waits until so many gateways have announced `domain` for routers, and brokers have received that.
pub fn wait_for_domain(mqtt: SocketAddr, domain: &str, gateways: usize) {
    let counts = format!("wireguard-metrics/{domain}/+/connected_peers");
    let probe = Probe::connect(mqtt, Role::new("bench-domain", &[&counts]).at_most_once());
    wait_until("gateways serve the domain", || {
        let serving =
            probe.received().into_iter().filter(|message| message.payload != b"-1").map(|message| message.topic);
        (serving.collect::<BTreeSet<_>>().len() >= gateways).then_some(())
    });
    sleep(HEARD);
}

/// The command that publishes the lines of a file as keys of `domain`. Given more at once, `mosquitto_pub -l` loses
/// some of them.
pub fn publish(stack: &Stack, domain: &str, lines: &Path) -> Command {
    let (host, port) = (stack.mqtt.ip(), stack.mqtt.port());
    let publish = format!("mosquitto_pub -h {host} -p {port} -t wireguard/{domain}/all -q 1 -l");
    let mut command = Command::new("split");
    command.args(["-l", "5000", &format!("--filter={publish}")]).arg(lines).stdin(Stdio::null());
    command
}

/// One of Mosquitto's clients.
pub fn client(name: &str, stack: &Stack) -> Command {
    let mut command = Command::new(format!("mosquitto_{name}"));
    command.args(["-h", &stack.mqtt.ip().to_string(), "-p", &stack.mqtt.port().to_string()]);
    command.stdin(Stdio::null());
    command
}
