//! Keys and addresses of other owners: of gateways, and of routers that registered first.
//!
//! Each attack succeeds without its guard: the first if no key is reserved (it got a 200), the others if any claim
//! beats another.

use std::thread;

use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::http::ask;
use wgkex_tests::{key, wait_until};

use crate::peers::ping;
use crate::several_gateways::Fleet;
use crate::{READINESS_KEY, Single};

/// A router's private key, its public key, and another key that derives the same address. For one of many routers such
/// a key is found in seconds, without its private half.
const ROUTER: (&str, &str, &str) = (
    "AAKrRxERERERERERERERERERERERERERERERERERERE=",
    "vUefIpGTuJ6gkScjyFZcGFmFxSNzp0SKQrdMRfFcW2c=",
    "AAAAAAAATDFCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=",
);

/// The contract's two keys with one address, the smaller first.
const TWINS: [&str; 2] =
    ["fAKaBGbh8TB6KaToe27fkEi9ghZwYGi6sOvHDXG2PLI=", "3c+xZQV94mSS+WVbTdDrC58V7h9hA3uIECwx0uu1kpg="];

pub fn a_gateways_key_is_no_routers_and_its_peer_stays(lane: Lane) {
    let cleanup = "cleanup: {interval: 1, initial_handshake_grace: 4, legacy_stale_timeout: 4}";
    let listed = key(7);
    let fleet = Fleet::new(lane, &[1, 1], &format!("{cleanup}\nkey_whitelist: [\"{listed}\"]"));
    let [one, two] = &fleet.gateways[..] else { panic!("two gateways") };
    // Gateways are peers of one another, with the address of their keys, and may have no handshake for long.
    let (gateway, address) = (&one.public_key, link_local(&one.public_key));
    two.host.run(&format!(
        "wg set wg-a peer {gateway} allowed-ips {address}/128 && wg set wg-a peer {listed} allowed-ips {}/128 &&
         ip -6 route add {address}/128 dev wg-a proto static &&
         bridge fdb append 00:00:00:00:00:00 dev vx-a dst {address} via wg-a self permanent",
        link_local(&listed)
    ));
    for version in [1, 2] {
        for key in [gateway, &listed] {
            let answer = fleet.hub.post(version, key);
            assert_eq!(answer.status, 403, "{answer:?}");
            assert!(answer.json()["error"]["message"].is_string(), "{answer:?}");
        }
    }
    publish(&fleet.hub, gateway);
    publish(&fleet.hub, &key(1));
    for gateway in [one, two] {
        wait_until("what comes after it is there", || gateway.has(&key(1)).then_some(()));
    }
    assert_eq!(one.host.tables("a").missing(gateway).len(), 3, "at the gateway itself");
    assert_eq!(failed(&two.host, "reserved").as_deref(), Some("1"));

    wait_until("a silent router is swept", || (two.host.tables("a").missing(&key(1)).len() == 3).then_some(()));
    let sweeps = || two.host.metric(9586, r#"wgkex_worker_sweeps_total{domain="test_a"}"#)?.parse::<u32>().ok();
    let so_far = sweeps().unwrap();
    wait_until("three more sweeps", || (sweeps()? >= so_far + 3).then_some(()));
    let tables = two.host.tables("a");
    assert_eq!(tables.missing(gateway), Vec::<String>::new());
    assert!(tables.peers.iter().any(|peer| peer.starts_with(&listed)), "{tables:#?}");

    // A new gateway publishes its data, and its key is protected from then on.
    let new = key(9);
    assert_eq!(fleet.hub.post(2, &new).status, 200);
    let data = format!(r#"{{"ExternalAddress":"gw3","Port":1,"PublicKey":"{new}","LinkAddress":"fe80::3"}}"#);
    fleet.hub.run(&format!("mosquitto_pub -r -t wireguard-worker/gw3/test_b/data -m '{data}'"));
    wait_until("it is protected", || (fleet.hub.post(2, &new).status == 403).then_some(()));
}

pub fn an_address_stays_with_the_router_that_has_it_until_that_is_gone(lane: Lane) {
    let (private, owner, other) = ROUTER;
    // The router is silent for longer than its grace, in which WireGuard retries its handshake (after 5 s); only that
    // handshake proves it.
    let cleanup = "cleanup: {interval: 1, initial_handshake_grace: 7, legacy_stale_timeout: 14}";
    let single = Single::new(lane, cleanup);
    let host = &single.host;
    let router = Host::new("router", lane);
    let (address, _) = host.connect(&router, 1);
    router.run(&format!("umask 077; echo {private} > /run/key"));
    let _ = router.tunnel_to(host, address);
    let connects = || {
        assert_eq!(host.post(2, owner).status, 200);
        ping(&router, host)
    };
    wait_until("the router is connected", || connects().then_some(()));
    let seen = r#"wgkex_broker_live_keys{domain="test_a",state="proven"}"#;
    wait_until("the broker knows", || (host.metric(5000, seen)? == "1").then_some(()));

    for version in [1, 2] {
        let answer = host.post(version, other);
        assert_eq!(answer.status, 409, "{answer:?}");
    }
    publish(host, other);
    wait_until("the worker refuses it", || (failed(host, "address taken")? == "1").then_some(()));
    assert_eq!(host.tables("a").missing(owner), Vec::<String>::new());
    assert!(!host.tables("a").peers.iter().any(|peer| peer.starts_with(other)));
    assert!(ping(&router, host), "the tunnel still stands");

    router.run("ip link set wg-router down");
    wait_until("the owner is gone", || (host.tables("a").missing(owner).len() == 3).then_some(()));
    // The other key has no handshake: it is swept after its grace.
    let comes = || (host.post(2, other).status == 200 && host.tables("a").missing(other).is_empty()).then_some(());
    wait_until("the other may come", comes);
    assert_eq!(host.post(2, READINESS_KEY).status, 200);
}

/// Fails with a broker that reserves any key that a worker names: the router got 403, and its peer belonged to nobody.
pub fn a_routers_peer_survives_misuse_of_its_key_by_others(lane: Lane) {
    let (private, owner, other) = ROUTER;
    let single = Single::new(lane, "cleanup: {interval: 1}");
    let host = &single.host;
    let router = Host::new("router", lane);
    let (address, _) = host.connect(&router, 1);
    router.run(&format!("umask 077; echo {private} > /run/key"));
    let _ = router.tunnel_to(host, address);
    wait_until("the router is connected", || (host.post(2, owner).status == 200 && ping(&router, host)).then_some(()));
    let seen = r#"wgkex_broker_live_keys{domain="test_a",state="proven"}"#;
    wait_until("the broker knows", || (host.metric(5000, seen)? == "1").then_some(()));
    let handshake = || host.run(&format!("wg show wg-a latest-handshakes | grep {owner}"));
    let before = handshake();

    // In another domain, where no router has the key; and as a gateway's own key, in both.
    for (domain, key, status) in [("test_b", owner, "200"), ("test_b", other, "409"), ("test_a", other, "409")] {
        assert_eq!(post_to(host, domain, key), status);
    }
    for key in [owner, other] {
        for domain in ["test_a", "test_b"] {
            let data = format!(r#"{{"ExternalAddress":"gw","Port":1,"PublicKey":"{key}","LinkAddress":"fe80::1"}}"#);
            host.run(&format!("mosquitto_pub -r -t wireguard-worker/thief/{domain}/data -m '{data}'"));
        }
        let sweeps = || host.metric(9586, r#"wgkex_worker_sweeps_total{domain="test_a"}"#)?.parse::<u32>().ok();
        let so_far = sweeps().unwrap();
        wait_until("two more sweeps", || (sweeps()? >= so_far + 2).then_some(()));
        thread::scope(|scope| {
            for n in 0..40 {
                scope.spawn(move || assert_eq!(host.post(1 + n % 2, owner).status, 200));
            }
        });
    }
    assert_eq!((failed(host, "reserved").as_deref(), handshake()), (Some("0"), before));
    host.run(&format!("ip -6 route del {}/128 dev wg-a", link_local(owner)));
    wait_until("what is lost is restored", || host.tables("a").missing(owner).is_empty().then_some(()));
    assert!(ping(&router, host), "the tunnel still stands");
}

fn post_to(host: &Host, domain: &str, key: &str) -> String {
    let url = "http://127.0.0.1:5000/api/v1/wg/key/exchange";
    host.run(&format!("curl -s -o /dev/null -w '%{{http_code}}' -d '{}' {url}", ask(domain, key)))
}

pub fn two_brokers_that_admit_two_keys_of_one_address_at_once_leave_every_gateway_with_the_same(lane: Lane) {
    let fleet = Fleet::new(lane, &[1, 1], "");
    let _broker = fleet.gateways[0].host.start_broker();
    let hosts = [&fleet.hub, &fleet.gateways[0].host];
    crate::serves(hosts[1]);
    thread::scope(|scope| {
        for (host, key) in hosts.into_iter().zip(TWINS.into_iter().rev()) {
            scope.spawn(move || host.post(1, key));
        }
    });
    let [winner, loser] = TWINS;
    for gateway in &fleet.gateways {
        wait_until("every gateway has one of them", || {
            let tables = gateway.host.tables("a");
            let has = |key: &str| tables.peers.iter().any(|peer| peer.starts_with(key));
            (has(winner) != has(loser)).then_some(())
        });
    }
    let tables = fleet.gateways.iter().map(|gateway| gateway.host.tables("a"));
    let with: Vec<_> = tables.map(|tables| TWINS.map(|key| tables.missing(key).is_empty())).collect();
    assert_eq!(with[0], with[1], "the same one, with all its three objects");
    assert_ne!(with[0], [false; 2]);
}

/// Publishes a key as an original broker does.
fn publish(host: &Host, key: &str) {
    host.run(&format!("mosquitto_pub -t wireguard/test_a/all -m {key}"));
}

fn failed(host: &Host, reason: &str) -> Option<String> {
    host.metric(9586, &format!(r#"wgkex_worker_keys_failed_total{{domain="test_a",reason="{reason}"}}"#))
}
