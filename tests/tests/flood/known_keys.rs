//! An attacker with every router's key, since routers publish theirs. Requests with these keys must not lock the
//! routers out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::sleep;
use wgkex_tests::http::ask;
use wgkex_tests::many_routers::{address, connect_from, post};
use wgkex_tests::probe::message;
use wgkex_tests::scripted::Worker;
use wgkex_tests::stack::{DOMAIN, Stack, V1, V2};
use wgkex_tests::{key, wait_until};

use super::{alone, plan, stack_with};

/// A domain without the routers of these tests.
const OTHER: &str = "ffx_b";
/// Two keys of the contract with the same address. A second such key is found within a minute.
const TWINS: [&str; 2] =
    ["fAKaBGbh8TB6KaToe27fkEi9ghZwYGi6sOvHDXG2PLI=", "3c+xZQV94mSS+WVbTdDrC58V7h9hA3uIECwx0uu1kpg="];
/// Routers that the broker knows.
const ROUTERS: u32 = 200;
/// The duration of the attack.
const ATTACK: Duration = Duration::from_secs(4);
/// The number of attacking addresses.
const ATTACKERS: u32 = 16;

fn shakes_hands(stack: &Stack, worker: &Worker, keys: &[String]) {
    let keys: Vec<_> = keys.iter().map(|key| format!("\"{key}\"")).collect();
    let seen = format!(r#"{{"domain":"{DOMAIN}","keys":[{}]}}"#, keys.join(","));
    worker.probe.publish(message("wgkex/worker/gw1/seen", seen, 1, false));
    let proven = format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="proven"}}"#);
    #[expect(clippy::cast_precision_loss, reason = "a few keys")]
    stack.wait_for_metric(&proven, keys.len() as f64);
}

/// Fails with one limit of a key for all domains: the router got 429.
#[test]
fn a_new_router_is_served_although_its_key_is_sent_for_another_domain_without_end() {
    let config = "limits: {per_key: {burst: 3, per_second: 0.02}}";
    let (stack, _worker) = stack_with(plan(config).domains([DOMAIN, OTHER]));
    for _ in 0..10 {
        assert_eq!(stack.v2(OTHER, &key(1)).status, 200);
    }
    assert_eq!((stack.v1(DOMAIN, &key(1)).status, stack.v2(DOMAIN, &key(1)).status), (200, 200));
}

/// Fails where a key that never had a handshake takes the address of one with a handshake some hours ago: the router
/// got 409, and would have got it again with one such key after the other.
#[test]
fn a_router_that_was_silent_for_long_has_its_address_again_when_it_comes_back() {
    let limits = "limits: {per_client: {burst: 0}, per_key: {burst: 0}}";
    let config = &format!("cleanup: {{legacy_stale_timeout: 1, initial_handshake_grace: 600}}\n{limits}");
    let (stack, worker) = stack_with(plan(config));
    let [router, attacker] = TWINS;
    assert_eq!(stack.v2(DOMAIN, router).status, 200);
    shakes_hands(&stack, &worker, &[router.into()]);
    assert_eq!(stack.v1(DOMAIN, attacker).status, 409);
    wait_until("the router is silent for long", || (stack.v1(DOMAIN, attacker).status == 200).then_some(()));
    assert_eq!((stack.v2(DOMAIN, router).status, stack.v1(DOMAIN, router).status), (200, 200));
    for _ in 0..3 {
        assert_eq!((stack.v1(DOMAIN, attacker).status, stack.v2(DOMAIN, router).status), (409, 200));
    }
}

/// Attackers send the keys of all routers all the time, in every domain, from as many addresses as there are attackers;
/// and new keys, as far as the limits let them pass.
#[test]
fn known_routers_are_served_while_others_send_their_keys() {
    let _alone = alone();
    let (stack, worker) = stack_with(plan("limits: {}").domains([DOMAIN, OTHER]));
    let routers: Vec<_> = (0..ROUTERS).map(key).collect();
    assert!(ask_all(&stack, &routers).iter().all(|(status, _)| *status == 200));
    shakes_hands(&stack, &worker, &routers[..routers.len() / 2]);

    let over = AtomicBool::new(false);
    let (server, keys) = (stack.http, Arc::new(routers.clone()));
    let mut times = Vec::new();
    thread::scope(|scope| {
        let attack = scope.spawn(|| Runtime::new().unwrap().block_on(send_their_keys(server, keys, &over)));
        let begun = Instant::now();
        while begun.elapsed() < ATTACK {
            times.extend(ask_all(&stack, &routers));
        }
        over.store(true, Ordering::Relaxed);
        let sent = attack.join().unwrap();
        println!("{sent} requests of others, {} of routers", times.len());
        assert!(sent > ROUTERS, "{sent}");
    });
    let refused = times.iter().filter(|(status, _)| *status != 200).count();
    let mut times: Vec<_> = times.into_iter().map(|(_, time)| time).collect();
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    println!("p50 {:.1?}, p99 {p99:.1?}, {refused} refused", times[times.len() / 2]);
    assert_eq!(refused, 0, "known routers are refused");
    // A router waits 3 s for its answer; the machine may be busy.
    assert!(p99 < Duration::from_secs(2), "{p99:?}");
}

/// Lets routers request, each from its own address, a few at a time; returns the status and time of each.
fn ask_all(stack: &Stack, routers: &[String]) -> Vec<(u16, Duration)> {
    let server = stack.http;
    let ask_some = |(n, some): (usize, &[String])| {
        let some: Vec<_> = some.iter().cloned().zip(u32::try_from(n).unwrap() * 20..).collect();
        async move {
            let mut asking = JoinSet::new();
            for (key, n) in some {
                asking.spawn(async move {
                    let begun = Instant::now();
                    let mut stream = connect_from(address(n), server).await.unwrap();
                    let path = if n % 2 == 0 { V2 } else { V1 };
                    (post(&mut stream, path, "", &ask(DOMAIN, &key)).await.unwrap(), begun.elapsed())
                });
            }
            asking.join_all().await
        }
    };
    Runtime::new().unwrap().block_on(async {
        let mut answers = Vec::new();
        for some in routers.chunks(20).enumerate() {
            answers.extend(ask_some(some).await);
        }
        answers
    })
}

async fn send_their_keys(server: SocketAddr, keys: Arc<Vec<String>>, over: &AtomicBool) -> u32 {
    let (sent, mut attackers) = (Arc::new(AtomicU32::new(0)), JoinSet::new());
    let ended = Arc::new(AtomicBool::new(false));
    for n in 0..ATTACKERS {
        let (sent, keys, ended) = (sent.clone(), keys.clone(), ended.clone());
        attackers.spawn(async move {
            let mut stream = connect_from(address(100_000 + n), server).await.unwrap();
            while !ended.load(Ordering::Relaxed) {
                let turn = sent.fetch_add(1, Ordering::Relaxed);
                let domain = if turn.is_multiple_of(3) { OTHER } else { DOMAIN };
                let new = key(1_000_000 + turn);
                let key = if turn.is_multiple_of(5) { &new } else { &keys[turn as usize % keys.len()] };
                post(&mut stream, if turn.is_multiple_of(2) { V1 } else { V2 }, "", &ask(domain, key)).await.unwrap();
            }
        });
    }
    while !over.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(20)).await;
    }
    ended.store(true, Ordering::Relaxed);
    attackers.join_all().await;
    sent.load(Ordering::Relaxed)
}
