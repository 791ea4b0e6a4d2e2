//! How a worker ends, and the privileges it keeps while it runs: fails with a worker that drops none.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::probe::{Probe, Role, message};
use wgkex_tests::process::{Process, binary};
use wgkex_tests::{key, wait_until};

use crate::{Single, end, serves};

pub fn a_stopped_worker_announces_it_and_leaves_the_kernel_unchanged(lane: Lane) {
    let (host, _mosquitto, _broker) = with_mosquitto(lane);
    for (signal, n) in [(Signal::SIGTERM, 0), (Signal::SIGINT, 1)] {
        let mut worker = host.start_worker();
        serves(&host);
        assert_eq!(host.post(2, &key(n)).status, 200);
        let (peers, tables) = (host.wireguard("wg-a"), host.tables("a"));

        let witness = probe(&host, Role::new("witness", &["#"]));
        witness.next("the worker is online", |message| message.topic == STATUS && message.text() == "1");
        let before = witness.received().len();
        end(&mut worker, signal);
        witness.next("the worker is offline", |message| message.topic == STATUS && message.text() == "0");
        assert_eq!((host.wireguard("wg-a"), host.tables("a")), (peers, tables), "{signal} changed the kernel");

        // A new client, with another name, receives it as a retained message.
        let kept = probe(&host, Role::new("late", &["#"]));
        let state = |topic: &str| kept.next(topic, |message| message.topic == topic && message.retain).text();
        assert_eq!(state(STATUS), "0");
        for rest in ["a", "b"] {
            assert_eq!(state(&peers_topic(rest)), "-1");
        }
        let received = witness.received().split_off(before);
        let messages: Vec<_> = received.iter().map(|message| (message.topic.as_str(), message.text())).collect();
        let place = |topic: &str| messages.iter().position(|(of, text)| *of == topic && *text == "-1");
        let offline = messages.iter().position(|(topic, text)| *topic == STATUS && text == "0");
        for rest in ["a", "b"] {
            assert!(place(&peers_topic(rest)).is_some() && place(&peers_topic(rest)) < offline, "{messages:?}");
        }
        assert_eq!(messages.iter().filter(|(topic, _)| *topic == STATUS).count(), 1, "and no last will: {messages:?}");
    }
}

pub fn a_worker_ends_in_time_although_mqtt_does_not_answer(lane: Lane) {
    let (host, mut mosquitto, _broker) = with_mosquitto(lane);
    for (fault, signal) in [(Signal::SIGSTOP, Signal::SIGTERM), (Signal::SIGKILL, Signal::SIGINT)] {
        let mut worker = host.start_worker();
        serves(&host);
        let (peers, tables) = (host.wireguard("wg-a"), host.tables("a"));
        mosquitto.signal(fault);
        if fault == Signal::SIGKILL {
            let connected = || host.metric(9586, "wgkex_worker_mqtt_connected");
            wait_until("the worker sees that the bus is gone", || (connected()? == "0").then_some(()));
        }
        end(&mut worker, signal);
        assert_eq!((host.wireguard("wg-a"), host.tables("a")), (peers, tables), "{signal} changed the kernel");
        mosquitto = mosquitto_again(mosquitto, &host);
    }
    // A worker that was never connected ends as fast.
    drop(mosquitto);
    let mut worker = host.start_worker();
    worker.wait_for_log("MQTT not connected");
    end(&mut worker, Signal::SIGTERM);
}

fn mosquitto_again(mosquitto: Process, host: &Host) -> Process {
    drop(mosquitto);
    host.start_mosquitto()
}

pub fn cap_net_admin_is_enough_and_its_absence_is_named(lane: Lane) {
    let host = Host::new("gateway", lane);
    // A path that this user may read, wherever the tests were built.
    let program = Path::new("/run/wgkex/wgkex-worker");
    fs::copy(binary("wgkex-worker"), host.path("/run/wgkex/wgkex-worker")).unwrap();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let net_admin = ["--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--bounding-set=-all,+net_admin"];
    // wireguard-go answers only its own user, so this user starts it; on most systems every user may open /dev/net/tun.
    host.run("chown 65534 /run/wgkex /run/wireguard");
    host.run("mknod -m 666 /run/tun c 10 200 && mount --bind /run/tun /dev/net/tun");
    let privileges = [&nobody[..], &net_admin].concat();
    let userspace = if lane == Lane::Userspace { "--userspace" } else { "" };
    host.run(&format!("setpriv {} -- {} setup {userspace}", privileges.join(" "), program.display()));

    let _broker = host.start_broker();
    let mut worker = host.start("worker", program, &[], &privileges);
    serves(&host);
    let status = fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
    for line in ["Uid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000001000", "CapBnd:\t0000000000001000"] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    assert_eq!(host.post(2, &key(0)).status, 200);
    assert_eq!(host.tables("a").missing(&key(0)), Vec::<String>::new());
    end(&mut worker, Signal::SIGTERM);

    let none = ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"];
    let all_but_one = ["--inh-caps=-net_admin", "--ambient-caps=-all", "--bounding-set=-net_admin"];
    for privileges in [&[&nobody[..], &none].concat()[..], &all_but_one] {
        let mut worker = host.start("worker", program, &[], privileges);
        assert_eq!(worker.wait().code(), Some(1));
        assert!(worker.log().contains("CAP_NET_ADMIN is missing"), "{}", worker.log());
    }
}

pub fn a_worker_that_root_starts_gives_up_every_other_privilege_and_none_serves_setuid(lane: Lane) {
    let host = Host::new("gateway", lane);
    host.setup();
    let program = Path::new("/run/wgkex/wgkex-worker");
    fs::copy(binary("wgkex-worker"), host.path("/run/wgkex/wgkex-worker")).unwrap();
    // wireguard-go answers only its own user.
    let users = if lane == Lane::Userspace { vec![("root", 0)] } else { vec![("root", 0), ("nobody", 65534)] };
    for (user, uid) in users {
        host.configure(&format!("worker_user: {user}\n"));
        host.run(&format!("rm -rf /run/wgkex/state && install -d -o {user} /run/wgkex/state"));
        let _broker = host.start_broker();
        let mut worker = host.start_worker_as_root();
        serves(&host);
        let status = fs::read_to_string(format!("/proc/{}/status", worker.pid())).unwrap();
        let ids = format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}");
        let only = ["CapInh:\t0000000000000000", "CapPrm:\t0000000000001000", "CapEff:\t0000000000001000"];
        for line in [&ids[..], "CapBnd:\t0000000000001000", "NoNewPrivs:\t1"].into_iter().chain(only) {
            assert!(status.contains(line), "{line} is not in {status}");
        }
        wait_until("its keys are kept", || (host.metric(9586, "wgkex_worker_state_kept")? == "1").then_some(()));
        end(&mut worker, Signal::SIGTERM);
    }
    host.run("chmod u+s /run/wgkex/wgkex-worker");
    let mut worker = host.start("worker", program, &[], &["--reuid=65534", "--regid=65534", "--clear-groups"]);
    assert_eq!(worker.wait().code(), Some(1));
    assert!(worker.log().contains("setuid"), "{}", worker.log());
}

const STATUS: &str = "wireguard-worker/gateway/status";

fn peers_topic(rest: &str) -> String {
    format!("wireguard-metrics/test_{rest}/gateway/connected_peers")
}

/// Fails with actix's own handling of a closed listener: it tried to accept for ever, and the broker served nobody.
pub fn a_listener_that_is_closed_from_outside_ends_the_broker_and_is_opened_again_by_the_worker(lane: Lane) {
    let Single { mut broker, worker, host } = Single::new(lane, "");
    let close = |port| host.run(&format!("ss -K -tln 'sport = :{port}'"));
    for (port, listener, task) in [(5000, "broker_listen", "broker_listen"), (1883, "mqtt_listen", "the MQTT server")] {
        close(port);
        let status = broker.wait();
        let log = broker.log();
        assert!(!status.success(), "{log}");
        assert!(log.contains(&format!("listener failed listener=\"{listener}\"")), "{log}");
        assert!(log.contains(&format!("{task} ended unexpectedly")), "{log}");
        broker = host.start_broker();
        serves(&host);
    }
    let (peers, failed) = (host.wireguard("wg-a"), "metrics are not served any more");
    close(9586);
    worker.wait_for_log(failed);
    wait_until("metrics are served again", || host.metric(9586, "wgkex_worker_mqtt_connected"));
    assert_eq!(host.wireguard("wg-a"), peers);
}

/// A gateway with its interfaces, a Mosquitto and a broker, but without a worker.
fn with_mosquitto(lane: Lane) -> (Host, Process, Process) {
    let host = Host::new("gateway", lane);
    host.configure("mqtt: {broker_url: 127.0.0.1}\n");
    host.setup();
    let mosquitto = host.start_mosquitto();
    let broker = host.start_broker();
    (host, mosquitto, broker)
}

fn probe(host: &Host, role: Role) -> Probe {
    host.inside(|| Probe::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, 1883)), role))
}

pub fn a_worker_ends_in_time_with_twenty_thousand_peers(lane: Lane) {
    let (host, _mosquitto, _broker) = with_mosquitto(lane);
    fill(&host, 20_000);
    let tables = host.tables("a");
    // During the first read of the tables, and when idle.
    for ready in ["wgkex_worker_mqtt_connected ", r#"wgkex_worker_domain_up{domain="test_a"} "#] {
        let mut worker = host.start_worker();
        wait_until(ready, || host.metric(9586, ready).filter(|value| value == "1"));
        end(&mut worker, Signal::SIGTERM);
    }
    assert_eq!(host.tables("a"), tables);
}

/// Has the C tools install so many keys in `test_a`.
fn fill(host: &Host, keys: u32) {
    let file = |name: &str, line: &dyn Fn(&str, &str) -> String| {
        let lines: Vec<_> = (0..keys).map(key).map(|key| line(&key, &link_local(&key))).collect();
        fs::write(host.path("/run").join(name), lines.concat()).unwrap();
    };
    file("peers", &|key, address| format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {address}/128\n"));
    file("routes", &|_, address| format!("route add {address}/128 dev wg-a proto static\n"));
    file("fdb", &|_, address| format!("fdb append 00:00:00:00:00:00 dst {address} via wg-a dev vx-a\n"));
    host.run("wg addconf wg-a /run/peers && ip -6 -batch /run/routes && bridge -batch /run/fdb");
}

pub fn sighup_applies_the_log_level_of_a_worker_and_names_what_the_rest_needs(lane: Lane) {
    let Single { broker: _broker, worker, host } = Single::new(lane, "");
    let stranger = probe(&host, Role::new("stranger", &[]));
    let nonsense = || stranger.publish(message("wireguard/test_a/all", "no key", 1, false));
    nonsense();
    assert_eq!(host.post(2, &key(0)).status, 200);
    assert!(!worker.log().contains("DEBUG"), "{}", worker.log());
    host.configure("log_level: DEBUG\n");
    worker.signal(Signal::SIGHUP);
    let reloaded = worker.wait_for_log("config reloaded");
    assert!(reloaded.contains("log_level"), "{reloaded}");
    nonsense();
    worker.wait_for_log("DEBUG wgkex_worker");
    // The interfaces are set up by a command, and the other keys are the broker's.
    host.configure(
        "setup: {key_dir: /run/wgkex, vxlan_id: 98}\nmqtt_listen: {max_connections: 99}\ntenants: {grace: 5}\n",
    );
    worker.signal(Signal::SIGHUP);
    let named = worker.wait_for_log("take effect when this command is run");
    assert!(named.contains("keys=\"setup.vxlan_id\" command=\"wgkex-worker setup\""), "{named}");
    assert!(!worker.log().contains("take effect after a restart"), "{}", worker.log());
}

/// Two workers would undo each other's changes.
pub fn a_second_worker_does_not_start_and_a_killed_ones_successor_does(lane: Lane) {
    let Single { mut broker, worker, host } = Single::new(lane, "");
    // A worker in a unit has process ids of its own PID namespace here.
    drop(worker);
    host.run("chown -R root: /run/wgkex/state");
    let mut worker = host.start_worker_as_root();
    serves(&host);
    assert_eq!(host.post(2, &key(0)).status, 200);
    let mut second = host.start_worker_as_root();
    assert_eq!(second.wait().code(), Some(1));
    let (said, pid) = (second.log(), worker.pid());
    assert!(said.contains("/run/wgkex/state/worker.sqlite is in use by process "), "{said}");
    assert!(said.contains(&pid.to_string()) && said.contains("(wgkex-worker)"), "{said}");
    assert!(worker.is_running());

    host.configure("broker_listen: {port: 5002}\nmqtt_listen: {port: 1884}\n");
    let mut other_broker = host.start_broker();
    assert_eq!(other_broker.wait().code(), Some(1));
    assert!(other_broker.log().contains(".sqlite is in use by process "), "{}", other_broker.log());
    assert!(broker.is_running());
    host.configure("");

    // A process with a shared lock, and a restarted worker of our own, do not prevent the start.
    let reader = host.start(
        "reader",
        Path::new("/bin/sh"),
        &["-c", "exec 9</run/wgkex/state/worker.sqlite.lock; flock -s 9; sleep 1"],
        &[],
    );
    for _ in 0..3 {
        worker.signal(Signal::SIGKILL);
        worker = host.start_worker();
        serves(&host);
        wait_until("its keys are kept", || (host.metric(9586, "wgkex_worker_state_kept")? == "1").then_some(()));
    }
    drop(reader);
    assert_eq!(host.tables("a").missing(&key(0)), Vec::<String>::new());
}
