//! Workers are killed, and gateways rebooted.

use std::time::Duration;

use nix::sys::signal::Signal;
use wgkex_tests::gateway::Lane;
use wgkex_tests::process::Process;
use wgkex_tests::{key, probe};

use crate::lab::{CAUGHT_UP, Fleet, Node, Role, Routers, caught_up, sleep, within};

pub fn a_worker_killed_in_the_middle_of_a_batch_goes_on(lane: Lane) {
    const KEYS: u32 = 5_000;
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    // The MQTT server queues the keys for the worker, up to its limit, and drops the others silently.
    fleet.gateways[0].process.signal(Signal::SIGSTOP);
    announce(&fleet, &routers, KEYS);
    let gateway = &mut fleet.gateways[0];
    gateway.process.signal(Signal::SIGCONT);
    let count = || gateway.host.run("wg show wg-a peers | wc -l").parse::<u32>().unwrap();
    within("it is in the middle", CAUGHT_UP, || (count() > KEYS / 20).then_some(()));
    gateway.process.signal(Signal::SIGKILL);
    assert!(count() < KEYS, "the worker was faster");
    let _ = gateway.process.wait();
    gateway.start_again();
    fleet.caught_up(&routers);
}

pub fn a_worker_that_finds_an_intact_kernel_touches_nothing(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    // With more keys than its neighbour table has room for, the kernel's neighbour events would drown all others.
    routers.ask(&fleet.broker_hosts(), 500);
    fleet.caught_up(&routers);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        // The latest state is written.
        sleep(Duration::from_secs(2));
        unchanged(&mut fleet.gateways[0], signal);
    }
    fleet.is_complete();
    routers.ask(&fleet.broker_hosts(), 10);
    fleet.caught_up(&routers);
}

/// The worker ends and starts, and the kernel's tables do not change.
fn unchanged(gateway: &mut Node, signal: Signal) {
    let host = &gateway.host;
    let monitor = |args: &[&str]| host.start("monitor", args[0].as_ref(), &args[1..], &[]);
    let monitors =
        [monitor(&["/usr/bin/ip", "-6", "monitor", "route"]), monitor(&["/usr/sbin/bridge", "monitor", "fdb"])];
    // The monitors report changes as soon as they listen.
    let flood = "00:00:00:00:00:00 dst fe80::77 via wg-a dev vx-a";
    within("the monitors look", CAUGHT_UP, || {
        host.run(&format!("ip -6 route add fe80::77/128 dev wg-a && bridge fdb append {flood}"));
        host.run(&format!("ip -6 route del fe80::77/128 dev wg-a && bridge fdb del {flood}"));
        monitors.iter().all(|monitor| monitor.log().contains("Deleted")).then_some(())
    });
    sleep(Duration::from_secs(1));
    let lines = |monitor: &Process| monitor.log().lines().count();
    let before = (monitors.each_ref().map(lines), host.wireguard("wg-a"), host.tables("a"));
    let _ = gateway.process.end_by(signal);
    gateway.start_again();
    gateway.process.wait_for_log("requesting all live keys");
    let counted = r#"wgkex_worker_peers{domain="test_a",state="pending"} "#;
    let peers = before.2.peers.len() as u64;
    within("the worker has read the tables", CAUGHT_UP, || (gateway.figure(counted)? == peers).then_some(()));
    // The worker receives all pages, and processes their keys.
    sleep(Duration::from_secs(5));
    let host = &gateway.host;
    let after = (monitors.each_ref().map(lines), host.wireguard("wg-a"), host.tables("a"));
    assert!(before == after, "{signal}: the restart changed the kernel: {}, {}", monitors[0].log(), monitors[1].log());
    assert!(!gateway.process.log().contains("peers are removed"), "{}", gateway.process.log());
}

pub fn a_rebooted_gateway_is_full_again_from_the_broker_or_from_its_own_disk(lane: Lane) {
    let keys = if lane == Lane::Userspace { 20_000 } else { 2_000 };
    let mut fleet = Fleet::new(lane, 1, 0, "");
    let routers = Routers::new();
    announce(&fleet, &routers, keys);

    // A gateway without state, as after a reboot with a new disk. It serves before it has all keys.
    fleet.add_gateway("");
    fleet.is_complete();
    routers.ask(&fleet.broker_hosts(), 20);
    let so_far = fleet.gateways[0].host.tables("a").peers.len();
    assert!(routers.answers().accepted.len() == keys as usize + 20, "all are served at once");
    let is_seen = so_far < keys as usize || lane == Lane::Kernel;
    assert!(is_seen, "it was faster than the routers: nothing can be seen");
    fleet.caught_up(&routers);
    // The rest is written.
    sleep(Duration::from_secs(2));

    // A gateway with state, and without broker and bus.
    let mut old = fleet.gateways.remove(0);
    old.kill();
    fleet.brokers[0].kill();
    let _ = fleet.mosquitto.end_by(Signal::SIGKILL);
    let (host, _) = fleet.host("gw1");
    host.run("mkdir -p /run/wgkex/state");
    for file in ["worker.sqlite", "worker.sqlite-wal"] {
        let file = format!("/run/wgkex/state/{file}");
        if old.host.path(&file).exists() {
            std::fs::copy(old.host.path(&file), host.path(&file)).unwrap();
        }
    }
    host.configure("mqtt: {broker_url: 198.18.99.99}\n");
    host.setup();
    assert_eq!(host.tables("a").lengths(), [0; 3]);
    let new = Node::start(host, Role::Gateway);
    caught_up(&new.host, &routers);
    // The kernel takes a long time to delete so many peers; the virtual machine is stopped sooner.
    if lane == Lane::Kernel {
        std::mem::forget((old, new));
    }
}

/// Announces so many keys, as any broker of the fleet does, until the first broker knows them. An MQTT server drops
/// messages beyond its queue.
fn announce(fleet: &Fleet, routers: &Routers, count: u32) {
    let any_broker = fleet.probe(probe::Role::new("any-broker", &[]));
    let keys: Vec<_> = routers.take(count).map(key).collect();
    for chunk in keys.chunks(500) {
        any_broker.publish_all(chunk.iter().map(|key| probe::message("wireguard/test_a/all", key.as_str(), 1, false)));
        routers.note(chunk.iter().cloned());
        let known = routers.answers().accepted.len() as u64;
        within("the broker knows them", CAUGHT_UP, || (fleet.brokers[0].live()? >= known).then_some(()));
    }
}
