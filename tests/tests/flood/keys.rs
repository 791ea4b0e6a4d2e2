//! Floods of keys, and the limits that keep them from the bus.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::sleep_until;
use wgkex_tests::http::{Http, Response, ask};
use wgkex_tests::many_routers::{address, connect_from, post};
use wgkex_tests::probe::message;
use wgkex_tests::scripted::key_topic;
use wgkex_tests::stack::{DOMAIN, Stack, V1, V2};
use wgkex_tests::{key, wait_until};

use super::{alone, memory, plan, stack_with};

/// Routers that the broker knows.
const KNOWN: u32 = 500;
/// Random keys of a flood.
const FLOOD: u32 = 100_000;
/// Connections that a flood uses at the same time.
const CONNECTIONS: u32 = 64;
/// A proxy that the broker trusts in these tests.
const PROXY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// The limit of the broker's growth in KiB: memory for the keys that pass, and memory that an allocator keeps.
const GROWTH: u32 = 40 * 1024;
/// The address of direct floods.
const FLOODER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

fn limited(response: &Response) -> u32 {
    assert_eq!(response.status, 429, "{response:?}");
    let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("too") && message.contains("try again later"), "{message}");
    let seconds = response.header("retry-after").unwrap().parse().unwrap();
    assert!(seconds >= 1);
    seconds
}

fn refused(stack: &Stack, reason: &str) -> f64 {
    ["v1", "v2"]
        .into_iter()
        .filter_map(|api| stack.metric(&format!(r#"wgkex_broker_keys_refused_total{{api="{api}",reason="{reason}"}}"#)))
        .sum()
}

#[test]
fn unknown_keys_over_a_limit_get_429_and_known_ones_never() {
    for (limit, reason) in [("per_domain", "limit_domain"), ("global", "limit_global")] {
        let config = format!("limits: {{{limit}: {{burst: 2, per_second: 0.02}}}}");
        let (stack, worker) = stack_with(plan(&config));
        assert_eq!((stack.v1(DOMAIN, &key(1)).status, stack.v2(DOMAIN, &key(2)).status), (200, 200));
        assert!(limited(&stack.v1(DOMAIN, &key(3))) <= 50);
        assert!(limited(&stack.v2(DOMAIN, &key(3))) <= 50);
        for _ in 0..5 {
            assert_eq!((stack.v1(DOMAIN, &key(2)).status, stack.v2(DOMAIN, &key(1)).status), (200, 200));
        }
        // An invalid request is answered as such, and does not count for the limits.
        assert_eq!(stack.v2("ffx_none", &key(3)).status, 400);
        assert!((refused(&stack, reason) - 2.0).abs() < 0.1, "{reason}");
        assert!(
            worker.probe.received().iter().all(|message| message.text() != key(3)),
            "what is refused is not published"
        );
        // A key from another broker, or from a gateway, is known, too.
        worker.probe.publish(message(key_topic(DOMAIN), key(4), 1, false));
        wait_until("the key is known", || (stack.v2(DOMAIN, &key(4)).status == 200).then_some(()));
    }
}

#[test]
fn a_key_that_comes_without_end_is_answered_always_and_published_seldom() {
    let (stack, worker) = stack_with(plan("limits: {per_key: {burst: 3, per_second: 0.02}, global: {burst: 1}}"));
    let begun = Instant::now();
    let mut http = stack.connect();
    let first = http.post(V2, &ask(DOMAIN, &key(1)));
    for n in 0..500 {
        let path = if n % 2 == 0 { V2 } else { V1 };
        let response = http.post(path, &ask(DOMAIN, &key(1)));
        assert_eq!(response.status, 200, "{response:?}");
        assert!(path == V1 || response.body == first.body, "{response:?}");
    }
    let published = worker.probe.received().iter().filter(|message| message.text() == key(1)).count();
    // Three by the limit; then once for each version in 3 s.
    let allowed = 3 + 2 * (1 + begun.elapsed().as_secs() / 3);
    assert!(published as u64 <= allowed, "{published} in {:?}", begun.elapsed());
}

#[test]
fn only_a_trusted_proxy_determines_the_client_address() {
    let config = format!("trusted_proxies: [{PROXY}]\nlimits: {{per_client: {{burst: 1, per_second: 0.02}}}}");
    let (mut stack, _worker) = stack_with(plan(&config));
    let server = stack.http;
    let runtime = Runtime::new().unwrap();
    let mut n = 0;
    let mut ask_from = |source, headers: &str| {
        n += 1;
        let body = ask(DOMAIN, &key(n));
        runtime.block_on(async { post(&mut connect_from(source, server).await.unwrap(), V2, headers, &body).await })
    };
    let mut statuses = |source, headers: &[&str]| -> Vec<u16> {
        headers.iter().map(|headers| ask_from(source, headers).unwrap()).collect()
    };
    let forged = ["X-Forwarded-For: 10.0.0.1\r\n", "X-Forwarded-For: 10.0.0.2\r\n", "Forwarded: for=10.0.0.3\r\n"];
    assert_eq!(statuses(FLOODER, &forged), [200, 429, 429]);
    let clients = ["X-Forwarded-For: 10.0.0.4\r\n", "X-Forwarded-For: 10.0.0.5\r\n", "Forwarded: for=10.0.0.6\r\n"];
    assert_eq!(statuses(PROXY, &clients), [200, 200, 200]);
    let same = ["X-Forwarded-For: 10.0.0.99, 10.0.0.4\r\n", "Forwarded: for=10.0.0.98, for=10.0.0.4\r\n"];
    assert_eq!(statuses(PROXY, &same), [429, 429]);
    let networks = ["X-Forwarded-For: 2001:db8::1\r\n", "X-Forwarded-For: 2001:db8:0:ff::1\r\n"];
    assert_eq!(statuses(PROXY, &networks), [200, 429]);
    let log = stack.broker().log();
    assert_eq!(log.matches("not in trusted_proxies").count(), 1, "{log}");
}

/// Fails with a broker that takes the proxy for the client if the sender is unknown: 127.0.0.1 has no limit.
#[test]
fn clients_behind_an_untrusted_local_proxy_share_one_limit() {
    let local = Ipv4Addr::LOCALHOST;
    let nonsense = ["X-Forwarded-For: x\r\n", "Forwarded: for=unknown\r\n", "Via: 1.1 proxy\r\n"];
    for (trusted, directly) in [(format!("{PROXY}"), [200, 200]), (format!("{PROXY}, {local}"), [429, 429])] {
        let config = format!("trusted_proxies: [{trusted}]\nlimits: {{per_client: {{burst: 1, per_second: 0.02}}}}");
        let (stack, _worker) = stack_with(plan(&config));
        let runtime = Runtime::new().unwrap();
        let mut n = 0;
        let mut ask_from = |source, headers: &str| {
            n += 1;
            let body = ask(DOMAIN, &key(n));
            let answer = async { post(&mut connect_from(source, stack.http).await?, V2, headers, &body).await };
            runtime.block_on(answer).unwrap()
        };
        assert_eq!(nonsense.map(|headers| ask_from(local, headers)), [200, 429, 429], "{trusted}");
        assert_eq!(nonsense.map(|headers| ask_from(PROXY, headers)), [429, 429, 429], "{trusted}");
        assert_eq!([ask_from(local, ""), ask_from(local, "")], directly, "{trusted}");
        assert_eq!(ask_from(PROXY, "X-Forwarded-For: 10.0.0.1\r\n"), 200, "who is named has a place of his own");
    }
}

#[test]
fn three_hundred_routers_behind_one_address_at_once_are_all_served_by_the_defaults() {
    let _alone = alone();
    let (stack, _worker) = stack_with(plan("limits: {}"));
    let runtime = Runtime::new().unwrap();
    // Once more, as by routers that got no answer the first time.
    for _ in 0..2 {
        let statuses = runtime.block_on(async {
            let mut routers = JoinSet::new();
            for n in 0..300 {
                let server = stack.http;
                routers.spawn(async move {
                    let mut stream = connect_from(FLOODER, server).await?;
                    post(&mut stream, V2, "", &ask(DOMAIN, &key(n))).await
                });
            }
            routers.join_all().await
        });
        assert!(statuses.iter().all(|status| *status.as_ref().unwrap() == 200), "{statuses:?}");
    }
}

#[test]
fn known_routers_are_served_while_one_address_floods() {
    let accepted = under_flood("", |_| (FLOODER, String::new()), "limit_client");
    assert!(accepted.passed <= 1_000.0 + 20.0 * (accepted.took.as_secs_f64() + 1.0), "{accepted:?}");
}

#[test]
fn known_routers_are_served_while_five_thousand_addresses_flood() {
    let proxy = format!("trusted_proxies: [{PROXY}]");
    let accepted = under_flood(
        &proxy,
        |n| (PROXY, format!("X-Forwarded-For: 10.77.{}.{}\r\n", n % 5_000 / 250, n % 250)),
        "limit_domain",
    );
    assert!(accepted.passed <= 25_000.0 + 250.0 * (accepted.took.as_secs_f64() + 1.0), "{accepted:?}");
}

/// The result of a flood.
#[derive(Debug)]
struct Flood {
    passed: f64,
    took: Duration,
}

/// Posts [`FLOOD`] keys to a broker with the default limits while known routers request again and again, each from an
/// address of its own. `sender` returns the source address and the headers for the `n`th key.
fn under_flood(config: &str, sender: fn(u32) -> (Ipv4Addr, String), reason: &str) -> Flood {
    let _alone = alone();
    let (mut stack, worker) = stack_with(plan(&format!("limits: {{}}\n{config}")));
    let known = known(&stack);
    // Half of them have had a handshake, too.
    let seen: Vec<_> = known.iter().step_by(2).map(|key| format!("\"{key}\"")).collect();
    let seen = format!(r#"{{"domain":"{DOMAIN}","keys":[{}]}}"#, seen.join(","));
    worker.probe.publish(message("wgkex/worker/gw1/seen", seen, 1, false));
    let proven = format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="proven"}}"#);
    stack.wait_for_metric(&proven, f64::from(KNOWN / 2));
    // The machine's speed, with other programs running.
    let quiet = p99(&mut reconnect(&stack, &known[..100], &AtomicBool::new(true)));
    let before = memory(&mut stack);

    let over = Arc::new(AtomicBool::new(false));
    let flooding = {
        let (over, server) = (over.clone(), stack.http);
        thread::spawn(move || {
            let took = Runtime::new().unwrap().block_on(flood(server, sender));
            over.store(true, Ordering::Relaxed);
            took
        })
    };
    let mut times = reconnect(&stack, &known, &over);
    let took = flooding.join().unwrap();
    let p99 = p99(&mut times);
    let after = memory(&mut stack);
    let passed = stack.metric(r#"wgkex_broker_keys_accepted_total{api="v1"}"#).unwrap();
    println!(
        "{FLOOD} keys in {took:.1?}, {passed} of them passed; {} known: p50 {:.1?}, p99 {p99:.1?}, max {:.1?}; \
         memory {before} KiB, {after} KiB after",
        times.len(),
        times[times.len() / 2],
        times.last().unwrap()
    );
    assert!(p99 < Duration::from_secs(1) + 3 * quiet, "{p99:?}, without a flood {quiet:?}");
    assert!(after < before + GROWTH, "{before} {after}");
    assert!(refused(&stack, reason) > 0.0);
    Flood { passed, took }
}

/// The time that 99 of 100 do not exceed; sorts the times.
fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// Makes routers known, each from its own address.
fn known(stack: &Stack) -> Vec<String> {
    let keys: Vec<_> = (0..KNOWN).map(key).collect();
    Runtime::new().unwrap().block_on(async {
        let mut routers = JoinSet::new();
        for (n, key) in (0..).zip(&keys) {
            let (server, body) = (stack.http, ask(DOMAIN, key));
            routers.spawn(async move { post(&mut connect_from(address(n), server).await?, V2, "", &body).await });
        }
        assert!(routers.join_all().await.into_iter().all(|status| status.unwrap() == 200));
    });
    keys
}

/// Lets the known routers request one after the other, at least once each and then until it is `over`; returns the time
/// of each. All are served.
fn reconnect(stack: &Stack, known: &[String], over: &AtomicBool) -> Vec<Duration> {
    let server = stack.http;
    Runtime::new().unwrap().block_on(async {
        let mut routers = JoinSet::new();
        let mut next = tokio::time::Instant::now();
        loop {
            for (n, key) in (0..KNOWN).zip(known) {
                let body = ask(DOMAIN, key);
                routers.spawn(async move {
                    let begun = Instant::now();
                    let mut stream = connect_from(address(n), server).await.unwrap();
                    assert_eq!(post(&mut stream, V2, "", &body).await.unwrap(), 200, "a known router");
                    begun.elapsed()
                });
                next += Duration::from_millis(10);
                sleep_until(next).await;
            }
            if over.load(Ordering::Relaxed) {
                break;
            }
        }
        routers.join_all().await
    })
}

/// Posts random keys, none twice, as fast as the broker answers.
async fn flood(server: SocketAddr, sender: fn(u32) -> (Ipv4Addr, String)) -> Duration {
    let (begun, next) = (Instant::now(), Arc::new(AtomicU32::new(0)));
    let mut flooders = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let next = next.clone();
        flooders.spawn(async move {
            let mut stream = connect_from(sender(0).0, server).await.unwrap();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= FLOOD {
                    return;
                }
                let body = ask(DOMAIN, &key(1_000_000 + n));
                let status = post(&mut stream, V1, &sender(n).1, &body).await.unwrap();
                assert!(status == 200 || status == 429, "{status}");
            }
        });
    }
    flooders.join_all().await;
    begun.elapsed()
}

#[test]
fn known_keys_do_not_queue_behind_new_ones_on_their_way_to_the_bus() {
    let _alone = alone();
    let (mut stack, worker) = stack_with(plan("limits: {}"));
    assert_eq!(stack.v1(DOMAIN, &key(1)).status, 200);
    let seen = format!(r#"{{"domain":"{DOMAIN}","keys":["{}"]}}"#, key(1));
    worker.probe.publish(message("wgkex/worker/gw1/seen", seen, 1, false));
    stack.wait_for_metric(&format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="proven"}}"#), 1.0);
    let send = |mut http: Http, n| {
        let body = ask(DOMAIN, &key(n));
        http.send(format!("POST {V1} HTTP/1.1\r\nHost: b\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
        http
    };
    let mut known = stack.connect();
    assert_eq!(known.get("/healthz").status, 200);
    stack.mosquitto().signal(Signal::SIGSTOP);
    let mut routers: Vec<_> = (0..300).map(|n| send(stack.connect(), 1_000 + n)).collect();
    // With the known router's connection and that of the metrics request.
    wait_until("all are there", || stack.metric("wgkex_broker_http_connections").filter(|open| *open >= 302.0));
    routers.push(send(known, 1));
    // The broker's threads serve connections in turn; once a thread has served a later connection, it has read this
    // one.
    for _ in 0..4 * thread::available_parallelism().map_or(1, NonZero::get) {
        assert_eq!(stack.get("/healthz").status, 200);
    }
    stack.mosquitto().signal(Signal::SIGCONT);
    let statuses: Vec<_> = routers.iter_mut().map(|http| http.response("POST").status).collect();
    assert_eq!(statuses.last(), Some(&200));
    // The first occurrence is from the first request.
    let received = worker.probe.received();
    let place = received.iter().skip(1).position(|message| message.text() == key(1));
    assert!(place.is_some_and(|place| place < 100), "{place:?} of {}", received.len());
}
