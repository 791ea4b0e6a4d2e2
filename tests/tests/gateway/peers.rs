//! Peers with and without handshakes.

use std::fs;
use std::time::{Duration, Instant};

use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::{key, wait_until};

use crate::Single;

pub fn a_repeated_key_keeps_its_handshake(lane: Lane) {
    let single = Single::new(lane, "");
    let host = &single.host;
    let (router, key) = router(host, lane);
    let before = peer(host, &key);
    assert!(before.handshake > 0 && before.received > 0 && before.sent > 0, "{before:?}");
    for version in [1, 2, 1, 2] {
        assert_eq!(host.post(version, &key).status, 200);
        let after = peer(host, &key);
        assert_eq!((&after.endpoint, after.handshake), (&before.endpoint, before.handshake));
        assert!(after.received >= before.received && after.sent >= before.sent, "{before:?}, then {after:?}");
    }
    let installed = r#"wgkex_worker_keys_refreshed_total{domain="test_a"}"#;
    wait_until("they are counted", || (host.metric(9586, installed)?.parse::<u32>().unwrap() >= 4).then_some(()));
    assert!(ping(&router, host), "the tunnel still stands");
    assert_eq!(peer(host, &key).handshake, before.handshake, "it still uses the session it had");
}

pub fn a_silent_peer_is_swept_and_a_foreign_one_stays(lane: Lane) {
    const GRACE: Duration = Duration::from_secs(4);
    let cleanup = "cleanup: {interval: 1, initial_handshake_grace: 4, legacy_stale_timeout: 600}\n";
    let single = Single::new(lane, cleanup);
    let host = &single.host;
    let (_router, talks) = router(host, lane);
    // Peers that wgkex did not make: with other allowed-ips, or with more than their own.
    let (foreign, extended, silent) = (key(1), key(2), key(3));
    host.run(&format!("wg set wg-a peer {foreign} allowed-ips 10.9.0.0/24"));
    host.run(&format!("wg set wg-a peer {extended} allowed-ips {}/128,10.9.1.0/24", link_local(&extended)));
    host.run("ip -6 route add 2001:db8::1/128 dev wg-a proto static");

    let begun = Instant::now();
    assert_eq!(host.post(2, &silent).status, 200);
    assert_eq!(host.tables("a").missing(&silent), Vec::<String>::new());
    wait_until("the silent peer is gone, all of it", || (host.tables("a").missing(&silent).len() == 3).then_some(()));
    assert!(begun.elapsed() > GRACE.mul_f64(0.9), "it had no grace: gone after {:?}", begun.elapsed());

    let sweeps = || host.metric(9586, r#"wgkex_worker_sweeps_total{domain="test_a"}"#)?.parse::<u32>().ok();
    let so_far = sweeps().unwrap();
    wait_until("three more sweeps", || (sweeps()? >= so_far + 3).then_some(()));
    assert_eq!(host.tables("a").missing(&talks), Vec::<String>::new());
    let tables = host.tables("a");
    let has = |peer: &str| tables.peers.iter().any(|line| line.starts_with(peer));
    assert!(has(&foreign) && has(&extended) && !has(&silent), "{tables:#?}");
    assert!(tables.routes.iter().any(|route| route.starts_with("2001:db8::1 ")), "{tables:#?}");
    assert!(tables.fdb.iter().all(|entry| !entry.contains(&link_local(&silent))), "{tables:#?}");

    assert_eq!(host.post(2, &silent).status, 200);
    assert_eq!(host.tables("a").missing(&silent), Vec::<String>::new());
}

/// Fails without the bound of unproven peers (42 at once), and if proven ones are evicted like others.
pub fn a_flood_of_keys_evicts_only_unestablished_peers(lane: Lane) {
    const UNPROVEN: usize = 30;
    let single = Single::new(lane, "cleanup: {interval: 1}\npeers: {unproven: 30}\n");
    let host = &single.host;
    let (router, talks) = router(host, lane);
    let seen = r#"wgkex_broker_live_keys{domain="test_a",state="proven"}"#;
    wait_until("the handshake is noticed", || (host.metric(5000, seen)? == "1").then_some(()));

    let flood: Vec<_> = (0..120).map(key).collect();
    fs::write(host.path("/run/flood"), flood.join("\n") + "\n").unwrap();
    host.run("mosquitto_pub -q 1 -l -t wireguard/test_a/all < /run/flood > /run/flood.log 2>&1 &");
    let tables = || {
        let tables = host.tables("a");
        assert!(tables.peers.len() <= UNPROVEN + 1, "{} peers", tables.peers.len());
        assert_eq!(tables.missing(&talks), Vec::<String>::new());
        tables
    };
    // With the key of the readiness check.
    let heard = r#"wgkex_broker_live_keys{domain="test_a",state="unproven"}"#;
    wait_until("the flood is over", || {
        tables();
        (host.metric(5000, heard)? == "121").then_some(())
    });
    wait_until("nothing is left of those that had to go", || (tables().lengths() == [UNPROVEN + 1; 3]).then_some(()));
    assert!(ping(&router, host), "the tunnel still stands");
    assert_eq!(host.post(2, &talks).status, 200);
}

pub fn an_idle_routers_endpoint_is_forgotten_and_it_gets_through_again(lane: Lane) {
    let config = "cleanup: {interval: 1}\nforget_idle_after: 3\n";
    let single = Single::new(lane, config);
    let host = &single.host;
    let (router, key) = router(host, lane);
    assert_ne!(peer(host, &key).endpoint, "(none)");
    wait_until("its endpoint is forgotten", || (peer(host, &key).endpoint == "(none)").then_some(()));
    assert_eq!(host.tables("a").missing(&key), Vec::<String>::new());
    // A tunnel detects within seconds that the other side has no session any more.
    wait_until("it gets through again", || ping(&router, host).then_some(()));
    assert_ne!(peer(host, &key).endpoint, "(none)");
}

/// Fails with a worker that takes a missing peer for one removed on purpose: none was restored.
pub fn peers_that_vanish_are_back_with_routes_and_entries_and_a_denied_one_is_not(lane: Lane) {
    const KEYS: u32 = 60;
    let single = Single::new(lane, "cleanup: {interval: 1}\nblacklist_file: /run/denied\n");
    let host = &single.host;
    let (router, talks) = router(host, lane);
    for n in 0..KEYS {
        assert_eq!(host.post(2, &key(n)).status, 200);
    }
    let all_but = |gone: &[u32]| {
        let tables = host.tables("a");
        let stands = |n: u32| tables.missing(&key(n)).is_empty();
        let is_so = (0..KEYS).all(|n| stands(n) != gone.contains(&n)) && tables.missing(&talks).is_empty();
        is_so.then_some(())
    };
    let empty =
        "umask 077 && { echo '[Interface]' && wg showconf wg-a | grep -E 'ListenPort|PrivateKey'; } > /run/conf";
    host.run(empty);
    let remove = |keys: &[u32]| {
        keys.iter().fold(String::new(), |script, n| format!("{script}wg set wg-a peer {} remove\n", key(*n)))
    };
    let odd: Vec<_> = (1..KEYS).step_by(2).collect();
    // Another manager of the interface is reloaded; a script removes peers; one peer is removed by hand.
    for vanish in ["wg syncconf wg-a /run/conf", "wg setconf wg-a /run/conf", &remove(&odd), &remove(&[7])] {
        host.run(vanish);
        wait_until(&format!("all are back after {vanish:.20}"), || all_but(&[]));
        wait_until("the router gets through", || ping(&router, host).then_some(()));
    }
    // Only a list entry removes a key for good.
    fs::write(host.path("/run/denied"), format!("[{:?}]\n", key(7))).unwrap();
    wait_until("the denied one is gone, all of it", || (host.tables("a").missing(&key(7)).len() == 3).then_some(()));
    host.run("wg syncconf wg-a /run/conf");
    wait_until("all others are back", || all_but(&[7]));
    let tables = host.tables("a");
    assert!(tables.peers.iter().all(|peer| !peer.starts_with(&key(7))), "{tables:#?}");
}

/// A router that has requested and had a handshake; returns its key, too.
pub fn router(gateway: &Host, lane: Lane) -> (Host, String) {
    let router = Host::new("router", lane);
    let (address, _) = gateway.connect(&router, 1);
    let key = router.run("umask 077 && wg genkey > /run/key && wg pubkey < /run/key");
    assert_eq!(gateway.post(2, &key).status, 200);
    let _ = router.tunnel_to(gateway, address);
    // Repeated, as by a real router: a key without a handshake in its grace may have been removed.
    wait_until("the router gets through", || {
        (gateway.post(2, &key).status == 200 && ping(&router, gateway)).then_some(())
    });
    wait_until("hands are shaken", || (peer(gateway, &key).handshake > 0).then_some(()));
    (router, key)
}

pub fn ping(router: &Host, gateway: &Host) -> bool {
    let remote = link_local(&gateway.run("wg show wg-a public-key"));
    router.try_run(&format!("ping -c 1 -W 1 {remote}%wg-router")).status.success()
}

/// The output of `wg` for a peer.
#[derive(Debug)]
struct Peer {
    endpoint: String,
    handshake: u64,
    received: u64,
    sent: u64,
}

fn peer(host: &Host, key: &str) -> Peer {
    let dump = host.wireguard("wg-a");
    let line = dump.iter().find(|line| line.starts_with(key)).expect("the peer is there");
    let fields: Vec<_> = line.split('\t').collect();
    let figure = |index: usize| fields[index].parse().expect("a figure");
    Peer { endpoint: fields[2].into(), handshake: figure(4), received: figure(5), sent: figure(6) }
}
