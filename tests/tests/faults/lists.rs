//! Keys are revoked while gateways and brokers stop and start.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::admin::{printed, token};
use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::key;
use wgkex_tests::probe::message;
use wgkex_tests::process::binary;

use crate::lab::{CAUGHT_UP, Fleet, Node, Routers, sleep, within};

/// The limit for a revocation on every gateway, from the start of the operator's command to its end.
const REVOKED: Duration = Duration::from_secs(2);
/// The factor for an emulated machine, whose two CPUs run other programs, too.
const EMULATED: u32 = 5;
/// After this time the programs' changes are on disk.
const WRITTEN: Duration = Duration::from_secs(2);

/// A fleet that has the keys of 20 routers, 1 to 20, and the operator's token.
fn scene(lane: Lane, brokers: usize, gateways: usize) -> (Fleet, String) {
    let (token, hash) = token();
    let fleet = Fleet::new(lane, brokers, gateways, &format!("admin_token_hash: \"{hash}\""));
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 20);
    fleet.caught_up(&routers);
    (fleet, token)
}

/// Runs `wgkex-broker` with this command line on the host of a broker.
fn operator(broker: &Node, token: &str, arguments: &str) -> Output {
    let program = binary("wgkex-broker");
    let variables = format!("WGKEX_CONFIG_FILE=/run/wgkex.yaml WGKEX_ADMIN_TOKEN={token}");
    broker.host.try_run(&format!("{variables} {} {arguments}", program.display()))
}

fn is_gone(host: &Host, n: u32) -> bool {
    host.tables("a").missing(&key(n)).len() == 3
}

fn is_whole(host: &Host, n: u32) -> bool {
    host.tables("a").missing(&key(n)).is_empty()
}

fn refuses(broker: &Node, n: u32) {
    within("the broker refuses the key", CAUGHT_UP, || {
        [1, 2].iter().all(|version| broker.host.post(*version, &key(n)).status == 403).then_some(())
    });
}

pub fn a_revoked_key_is_gone_from_every_gateway_in_two_seconds_and_stays_away(lane: Lane) {
    let (mut fleet, token) = scene(lane, 2, 2);
    let begun = Instant::now();
    let revoked = operator(&fleet.brokers[0], &token, &format!("revoke {} --reason spam", key(1)));
    let took = begun.elapsed();
    for gateway in &fleet.gateways {
        assert!(is_gone(&gateway.host, 1), "{}", printed(&revoked));
        assert!(is_whole(&gateway.host, 2));
    }
    let limit = if lane == Lane::Kernel { REVOKED * EMULATED } else { REVOKED };
    assert!(took < limit, "{took:?}: {}", printed(&revoked));
    assert!(revoked.status.success(), "{}", printed(&revoked));
    assert_eq!(printed(&revoked), "revoked\ngw1: removed\ngw2: removed\n");

    // On each way: by a router, at the other broker, on the bus alone.
    refuses(&fleet.brokers[0], 1);
    refuses(&fleet.brokers[1], 1);
    let probe = fleet.witness();
    for n in [1, 101] {
        probe.publish(message("wireguard/test_a/all", key(n), 1, false));
    }
    for gateway in &fleet.gateways {
        within("a later key is there", CAUGHT_UP, || is_whole(&gateway.host, 101).then_some(()));
        assert!(is_gone(&gateway.host, 1));
        let failed = r#"wgkex_worker_keys_failed_total{domain="test_a",reason="denied"} "#;
        assert_eq!(gateway.figure(failed), Some(1));
    }

    // After a restart of each program.
    sleep(WRITTEN);
    for broker in &mut fleet.brokers {
        broker.kill();
        broker.start_again();
    }
    for gateway in &mut fleet.gateways {
        gateway.kill();
        gateway.start_again();
    }
    fleet.is_complete();
    for broker in &fleet.brokers {
        refuses(broker, 1);
    }
    sleep(Duration::from_secs(3));
    assert!(fleet.gateways.iter().all(|gateway| is_gone(&gateway.host, 1) && is_whole(&gateway.host, 2)));

    let lifted = operator(&fleet.brokers[1], &token, &format!("unrevoke {}", key(1)));
    assert!(lifted.status.success(), "{}", printed(&lifted));
    for broker in &fleet.brokers {
        within("it may come again", CAUGHT_UP, || (broker.host.post(2, &key(1)).status == 200).then_some(()));
    }
    for gateway in &fleet.gateways {
        within("it is there again", CAUGHT_UP, || is_whole(&gateway.host, 1).then_some(()));
    }
}

pub fn a_gateway_that_was_away_removes_keys_revoked_meanwhile(lane: Lane) {
    let (mut fleet, token) = scene(lane, 1, 2);
    sleep(WRITTEN);
    fleet.gateways[1].kill();
    let revoked = operator(&fleet.brokers[0], &token, &format!("revoke {}", key(1)));
    assert_eq!(revoked.status.code(), Some(2), "{}", printed(&revoked));
    assert!(printed(&revoked).contains("gw1: removed\ngw2: offline"), "{}", printed(&revoked));
    // Its kernel still has the peer.
    assert!(is_whole(&fleet.gateways[1].host, 1) && is_gone(&fleet.gateways[0].host, 1));
    fleet.gateways[1].start_again();
    within("the peer goes", CAUGHT_UP, || is_gone(&fleet.gateways[1].host, 1).then_some(()));

    // After a reboot it restores its keys from its own disk, where the revoked one still is, without that one; nor does
    // it install the revoked key when it receives it on connecting.
    sleep(WRITTEN);
    fleet.gateways[1].kill();
    let revoked = operator(&fleet.brokers[0], &token, &format!("revoke {} --for 10m", key(2)));
    assert_eq!(revoked.status.code(), Some(2), "{}", printed(&revoked));
    fleet.gateways[1].host.remove();
    fleet.gateways[1].host.setup();
    let monitor = ["-6", "monitor", "route"];
    let mut routes = fleet.gateways[1].host.start("ip-monitor", Path::new("/usr/sbin/ip"), &monitor, &[]);
    fleet.gateways[1].start_again();
    let probe = fleet.witness();
    let joined = Instant::now();
    while joined.elapsed() < Duration::from_secs(3) {
        probe.publish(message("wireguard/test_a/all", key(2), 1, false));
        sleep(Duration::from_millis(20));
    }
    let host = &fleet.gateways[1].host;
    within("the others are back", CAUGHT_UP, || (3..20).all(|n| is_whole(host, n)).then_some(()));
    within("what was revoked is not", CAUGHT_UP, || (is_gone(host, 1) && is_gone(host, 2)).then_some(()));
    let log = fleet.gateways[1].process.log();
    assert!(!log.contains("keys are taken without them"), "{log}");
    // These routes were never added, not even for a moment.
    routes.end_by(Signal::SIGTERM);
    let added = |n| routes.log().contains(&link_local(&key(n)));
    assert_eq!([1, 2, 3].map(added), [false, false, true], "{}", routes.log());
}

pub fn separated_brokers_converge_on_the_same_revocations(lane: Lane) {
    let (mut fleet, token) = scene(lane, 2, 1);
    sleep(WRITTEN);
    let revoke = |broker: &Node, n| drop(operator(broker, &token, &format!("revoke {}", key(n))));
    fleet.brokers[1].kill();
    revoke(&fleet.brokers[0], 1);
    fleet.brokers[0].kill();
    fleet.brokers[1].start_again();
    within("b2 serves", CAUGHT_UP, || (fleet.brokers[1].host.try_post(2, &key(2))? == 200).then_some(()));
    revoke(&fleet.brokers[1], 2);
    fleet.brokers[0].start_again();
    fleet.is_complete();
    for broker in &fleet.brokers {
        for n in [1, 2] {
            refuses(broker, n);
        }
    }
    for n in [1, 2] {
        within("both are gone", CAUGHT_UP, || is_gone(&fleet.gateways[0].host, n).then_some(()));
    }
}

pub fn a_gateway_obeys_the_lists_of_its_own_machine(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 0, "");
    let lists = "blacklist_file: /run/wgkex/deny.yaml\nkey_lists: {trusted_dir: /run/wgkex/trusted}\n\
                 allowlist: {refresh_interval: 86400}\n\
                 cleanup: {interval: 2, initial_handshake_grace: 1}";
    fleet.add_gateway(lists);
    let gateway = &fleet.gateways[0];
    let host = &gateway.host;
    let reload = || gateway.process.signal(Signal::SIGHUP);
    host.run("mkdir /run/wgkex/trusted");
    fs::write(host.path("/run/wgkex/deny.yaml"), format!("- {}\n", key(1))).unwrap();
    fs::write(host.path("/run/wgkex/trusted/attic"), key(3)).unwrap();
    fs::write(host.path("/run/wgkex/trusted/cellar"), key(4)).unwrap();
    fleet.is_complete();
    reload();
    // The worker may have read the directory at its start, before the file existed.
    within("the lists are read", CAUGHT_UP, || {
        let keys = |list| gateway.figure(&format!(r#"wgkex_worker_list_keys{{list="{list}"}} "#));
        (keys("deny")? == 1 && keys("trusted")? == 2).then_some(())
    });
    let broker = &fleet.brokers[0].host;
    let answers = [1, 2, 3, 4].map(|n| broker.post(2, &key(n)).status);
    assert_eq!(answers, [403, 200, 200, 200], "what every gateway denies is not to be tried again");
    within("the one that nobody trusts is swept", CAUGHT_UP, || is_gone(host, 2).then_some(()));
    assert!(is_gone(host, 1) && is_whole(host, 3) && is_whole(host, 4));
    fs::write(host.path("/run/wgkex/deny.yaml"), format!("- {}\n", key(3))).unwrap();
    reload();
    within("a trusted one that is denied goes", CAUGHT_UP, || is_gone(host, 3).then_some(()));
    assert!(is_whole(host, 4));
    fs::write(host.path("/run/wgkex/deny.yaml"), "- nonsense\n").unwrap();
    reload();
    within("the damage is counted", CAUGHT_UP, || {
        (gateway.figure(r#"wgkex_worker_lists_damaged{list="blacklist_file"} "#)? == 1).then_some(())
    });
    assert_eq!(broker.post(2, &key(3)).status, 403, "the last good list counts");
}
