//! The kernel's tables change without the worker.

use std::fs;
use std::time::Duration;

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::{key, wait_until};

use crate::lab::{CAUGHT_UP, Fleet, Pace, Routers, sleep, within};

/// Numbers of keys that no router requests.
const FOREIGN: u32 = 900_000;

pub fn a_worker_that_missed_netlink_events_notices_and_catches_up(lane: Lane) {
    let fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 300);
    let gateway = &fleet.gateways[0];
    let host = &gateway.host;
    gateway.process.signal(Signal::SIGSTOP);
    host.run("ip link add other type veth peer name another");
    let order = |n: u32, what: &str| format!("address {what} 10.77.{}.{}/32 dev other\n", n / 250, n % 250);
    let lines: Vec<_> = (0..5_000).flat_map(|n| [order(n, "add"), order(n, "del")]).collect();
    fs::write(host.path("/run/batch"), lines.concat()).unwrap();
    host.run("ip -batch /run/batch");
    make_anew(host);
    assert!(dropped(host), "netlink has lost nothing: {}", host.run("cat /proc/net/netlink"));
    gateway.process.signal(Signal::SIGCONT);
    fleet.caught_up(&routers);
    fleet.is_complete();
    routers.ask(&fleet.broker_hosts(), 100);
    fleet.caught_up(&routers);
}

/// Whether a netlink listener was too slow and lost events.
fn dropped(host: &Host) -> bool {
    let sockets = host.run("cat /proc/net/netlink");
    sockets.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        // sk, Eth, Pid, Groups, Rmem, Wmem, Dump, Locks, Drops, Inode
        fields[3] != "00000000" && fields[8] != "0"
    })
}

/// Deletes the interfaces and makes them again.
fn make_anew(host: &Host) {
    host.remove();
    let free = "! ip link show wg-a && ! ip link show wg-b && ! ls /run/wireguard/*.sock";
    wait_until("the names are free", || host.try_run(free).status.success().then_some(()));
    host.setup();
}

pub fn interfaces_deleted_and_made_again_in_the_middle_of_a_storm_lose_no_key(lane: Lane) {
    // The kernel in a virtual machine deletes peers slowly.
    let rate = if lane == Lane::Userspace { 150 } else { 15 };
    let fleet = Fleet::new(lane, 1, 2, "");
    let routers = Routers::new();
    routers.ask_during(&fleet.broker_hosts(), Pace::per_second(rate), || {
        for gateway in [0, 1, 0] {
            sleep(Duration::from_secs(3));
            make_anew(&fleet.gateways[gateway].host);
        }
        sleep(Duration::from_secs(3));
    });
    assert!(routers.answers().accepted.len() > 100, "routers are served meanwhile");
    fleet.is_complete();
    fleet.caught_up(&routers);
}

pub fn lost_objects_are_restored_orphans_removed_and_foreign_ones_kept(lane: Lane) {
    let fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 20);
    let gateway = &fleet.gateways[0];
    let host = &gateway.host;
    fleet.caught_up(&routers);
    let (foreign, orphan) = (key(FOREIGN), link_local(&key(FOREIGN + 1)));
    host.run(&format!("wg set wg-a peer {foreign} allowed-ips 10.9.0.0/24,{}/128", link_local(&foreign)));
    host.run("ip -6 route add fe80::1/128 dev wg-a proto static");
    host.run("bridge fdb append 00:00:00:00:00:00 dst fe80::1 via wg-a dev vx-a");
    let with_foreign = (host.tables("a"), host.wireguard("wg-a"));
    // Orphans, as left by a crash.
    host.run(&format!("ip -6 route add {orphan}/128 dev wg-a proto static"));
    host.run(&format!("bridge fdb append 00:00:00:00:00:00 dst {orphan} via wg-a dev vx-a"));
    delete_objects(host);

    // No event informs the worker of lost objects: it reads the tables every minute, and a read may be due.
    let repaired = || {
        let all = (1..=20).all(|n| host.tables("a").missing(&key(n)).is_empty());
        all.then_some(())
    };
    within("what was lost is back", 2 * CAUGHT_UP, repaired);
    within("and counted", CAUGHT_UP, || (gateway.figure(RESTORED)? == 3).then_some(()));
    // Orphans are kept for a while, as their peer may follow. Then any change of the links triggers a read.
    sleep(Duration::from_secs(32));
    delete_objects(host);
    host.run("ip link add other type veth peer name another");
    within("what was lost is back again", CAUGHT_UP / 2, repaired);
    within("what was left over goes", CAUGHT_UP / 2, || (host.tables("a") == with_foreign.0).then_some(()));
    within("and counted", CAUGHT_UP, || (gateway.figure(RESTORED)? == 6).then_some(()));
    let removed = r#"wgkex_worker_orphans_removed_total{domain="test_a"} "#;
    assert_eq!(gateway.figure(removed), Some(2));
    assert_eq!((host.tables("a"), host.wireguard("wg-a")), with_foreign, "and nothing else has changed");
}

const RESTORED: &str = r#"wgkex_worker_keys_restored_total{domain="test_a"} "#;

/// Deletes a route, an entry of the flood list, and an allowed-ip.
fn delete_objects(host: &Host) {
    let node = |n| link_local(&key(n));
    host.run(&format!("ip -6 route del {}/128 dev wg-a", node(1)));
    host.run(&format!("bridge fdb del 00:00:00:00:00:00 dst {} via wg-a dev vx-a", node(2)));
    host.run(&format!("wg set wg-a peer {} allowed-ips ''", key(3)));
}
