//! The disk is full, read-only, or has damaged files.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};

use crate::lab::{CAUGHT_UP, Fleet, Node, Pace, Routers, caught_up, sleep, within};

const STATE: &str = "/run/wgkex/state";

pub fn with_a_full_disk_both_serve_and_they_write_when_there_is_room(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    for_each(&mut fleet, |node| {
        node.kill();
        node.host.run(&format!("mount -t tmpfs -o size=512k none {STATE}"));
        node.start_again();
    });
    fleet.is_complete();
    routers.ask(&fleet.broker_hosts(), 100);
    for_each(&mut fleet, |node| {
        is_kept(node, true);
        // Fills the last blocks, too.
        let _ = node.host.try_run(&format!("dd if=/dev/zero of={STATE}/filler bs=4k; cat /dev/zero >> {STATE}/filler"));
    });
    let keys_after = 5_000;
    routers.ask_during(&fleet.broker_hosts(), Pace { every: Duration::from_millis(3), at_most: keys_after }, || {});
    assert!(routers.answers().accepted.len() > 5_000, "{} accepted", routers.answers().accepted.len());
    for_each(&mut fleet, |node| {
        is_kept(node, false);
        assert_eq!(warnings(node), 1, "{}", node.process.log());
        node.host.run(&format!("rm {STATE}/filler && mount -o remount,size=16m {STATE}"));
        is_kept(node, true);
    });
    knows_all(&mut fleet, &routers);
}

pub fn with_a_read_only_disk_both_serve_and_they_write_when_they_may(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    for_each(&mut fleet, |node| {
        node.kill();
        node.host.run(&format!("mount -t tmpfs none {STATE} && mount -o remount,ro {STATE}"));
        node.start_again();
    });
    fleet.is_complete();
    routers.ask(&fleet.broker_hosts(), 200);
    assert_eq!(routers.answers().accepted.len(), 200);
    for_each(&mut fleet, |node| {
        is_kept(node, false);
        assert_eq!(warnings(node), 1, "{}", node.process.log());
        node.host.run(&format!("mount -o remount,rw {STATE}"));
        is_kept(node, true);
    });
    knows_all(&mut fleet, &routers);

    // State from before the end is readable all the same.
    fleet.gateways[0].start_again();
    fleet.is_complete();
    let (broker, gateway) = (&mut fleet.brokers[0], &mut fleet.gateways[0]);
    for node in [&mut *broker, &mut *gateway] {
        let _ = node.process.end_by(Signal::SIGTERM);
        node.host.run(&format!("mount -o remount,ro {STATE}"));
    }
    gateway.host.remove();
    gateway.host.setup();
    gateway.start_again();
    caught_up(&gateway.host, &routers);
    broker.start_again();
    let accepted = routers.answers().accepted.len() as u64;
    within("the broker serves", CAUGHT_UP, || (broker.live()? >= accepted).then_some(()));
    is_kept(broker, false);
    is_kept(gateway, false);
}

pub fn damaged_state_is_quarantined_and_stops_no_start(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 200);
    // A written file is truncated or overwritten.
    let damages: [fn(Vec<u8>) -> Vec<u8>; 4] = [
        |_| b"this is no database, but it is longer than a header of one, which has a hundred bytes: ".repeat(3),
        |file| file[..file.len() / 2].to_vec(),
        |mut file| {
            let middle = file.len() / 3;
            file[middle..].fill(0x55);
            file
        },
        |file| file.iter().map(|byte| !byte).collect(),
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        // No damaged file is overwritten.
        let suffix = if n == 0 { String::new() } else { format!("-{}", n + 1) };
        sleep(Duration::from_secs(2));
        for_each(&mut fleet, |node| {
            // At its end the program moves the log into the database file.
            let _ = node.process.end_by(Signal::SIGTERM);
            let file = node.host.path(&format!("{STATE}/{}.sqlite", name(node)));
            let spoilt = damage(fs::read(&file).unwrap());
            fs::write(&file, &spoilt).unwrap();
            node.host.run(&format!("rm -f {STATE}/*-wal"));
            node.start_again();
            node.process.wait_for_log("state file is damaged");
            let aside = node.host.path(&format!("{STATE}/{}.sqlite.damaged{suffix}", name(node)));
            assert!(fs::read(aside).unwrap() == spoilt, "it is not what was set aside");
            is_kept(node, true);
        });
        fleet.is_complete();
        routers.ask(&fleet.broker_hosts(), 50);
        fleet.caught_up(&routers);
    }
}

pub fn an_unfinished_last_write_is_logged(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    for_each(&mut fleet, |node| {
        node.kill();
        node.host.run(&format!(
            "truncate -s 16M /run/wgkex/disk && mkfs.ext4 -q /run/wgkex/disk && mount -o loop /run/wgkex/disk {STATE}"
        ));
        node.start_again();
    });
    fleet.is_complete();
    let frozen: Vec<_> = fleet.brokers.iter().chain(&fleet.gateways).map(|node| Frozen::new(&node.host)).collect();
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 20);
    assert_eq!(routers.answers().accepted.len(), 20);
    for_each(&mut fleet, |node| {
        node.process.signal(Signal::SIGTERM);
        let said = node.process.wait_for_log("the disk did not take the last state in time");
        assert!(said.contains("ERROR") && said.contains("the state file"), "{said}");
    });
    drop(frozen);
    for_each(&mut fleet, |node| assert!(node.process.wait().success()));
}

/// A disk that blocks writes until this value is dropped.
struct Frozen(Arc<Host>);

impl Frozen {
    fn new(host: &Arc<Host>) -> Self {
        host.run(&format!("fsfreeze --freeze {STATE}"));
        Self(host.clone())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.run(&format!("fsfreeze --unfreeze {STATE}"));
    }
}

fn for_each(fleet: &mut Fleet, work: impl FnMut(&mut Node)) {
    fleet.brokers.iter_mut().chain(&mut fleet.gateways).for_each(work);
}

fn name(node: &Node) -> &'static str {
    if node.is_broker() { "broker" } else { "worker" }
}

fn is_kept(node: &Node, wanted: bool) {
    let series = format!("wgkex_{}_state_kept ", name(node));
    within(&format!("state is kept: {wanted}"), CAUGHT_UP, || {
        (node.figure(&series)? == u64::from(wanted)).then_some(())
    });
}

fn warnings(node: &Node) -> usize {
    node.process.log().lines().filter(|line| line.contains("state cannot be kept")).count()
}

/// Both have all keys after a restart without any other source: the gateway's interfaces are new, its broker is down.
fn knows_all(fleet: &mut Fleet, routers: &Routers) {
    let accepted = routers.answers().accepted.len() as u64;
    sleep(Duration::from_secs(2));
    let (broker, gateway) = (&mut fleet.brokers[0], &mut fleet.gateways[0]);
    broker.kill();
    gateway.kill();
    gateway.host.remove();
    gateway.host.setup();
    gateway.start_again();
    caught_up(&gateway.host, routers);
    gateway.kill();
    broker.start_again();
    let live = within("the broker serves", CAUGHT_UP, || broker.live());
    assert!(live >= accepted, "{live} of {accepted}");
}
