//! A single gateway, and the answers to its routers.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::http::ask;
use wgkex_tests::process::Process;
use wgkex_tests::{key, wait_until};

use crate::Single;

/// From the contract: a key, and its node's address.
const NODE: (&str, &str) = ("TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=", "fe80::27c:16ff:fec0:6c74");

pub fn a_router_gets_the_contracts_answers_and_the_gateway_its_three_objects(lane: Lane) {
    let single = Single::new(lane, "externalName: gw.example.org\n");
    let host = &single.host;
    let public_key = host.run("wg show wg-a public-key");
    let port = host.run("wg show wg-a listen-port");
    let address = host.run("ip -6 -o addr show dev wg-a | sed -n 's/.*inet6 \\([^/]*\\).*/\\1/p'");
    let v1 = r#"{"Message":"OK"}"#.to_owned();
    let v2 = format!(
        r#"{{"Endpoint":{{"Address":"gw.example.org","Port":"{port}","AllowedIPs":["{address}"],"PublicKey":"{public_key}"}}}}"#
    );

    let wget = |body: &str, url: &str| format!("wget -q -O- --post-data='{body}' {url}");
    let curl = |body: &str, url: &str| format!("curl -sf -H 'Content-Type: application/json' -d '{body}' {url}");
    let untyped = |body: &str, url: &str| format!("curl -sf -H 'Content-Type:' -d '{body}' {url}");
    for (version, answer, n) in [("v1", &v1, 0), ("v2", &v2, 3)] {
        let url = format!("http://127.0.0.1:5000/api/{version}/wg/key/exchange");
        let body = |n| ask("test_a", &key(n));
        let commands = [wget(&body(n), &url), curl(&body(n + 1), &url), untyped(&body(n + 2), &url)];
        for (command, n) in commands.iter().zip(n..) {
            assert_eq!(&host.run(command), answer, "{command}");
            assert_eq!(host.tables("a").missing(&key(n)), Vec::<String>::new(), "{command}");
        }
    }

    let (key, node) = NODE;
    assert_eq!(host.post(2, key).body, v2);
    let tables = host.tables("a");
    let entry = format!("00:00:00:00:00:00 dst {node} via wg-a self permanent");
    assert!(tables.peers.contains(&format!("{key}\t{node}/128")), "{tables:#?}");
    assert!(tables.routes.contains(&format!("{node} metric 1024 pref medium")), "{tables:#?}");
    assert!(tables.fdb.contains(&entry), "{tables:#?}");
    // Only the key of the readiness check is there.
    assert_eq!(host.tables("b").lengths(), [1; 3]);
    watched_over(host);
}

fn watched_over(host: &Host) {
    assert_eq!(host.get(9586, "/healthz").unwrap().status, 200);
    assert_eq!(host.get(9586, "/readyz").unwrap().status, 200);
    assert_eq!(host.get(5000, "/healthz").unwrap().status, 200);
    assert_eq!(host.get(5000, "/readyz").unwrap().status, 200);
    for domain in ["test_a", "test_b"] {
        let up = format!(r#"wgkex_worker_domain_up{{domain="{domain}"}}"#);
        assert_eq!(host.metric(9586, &up).as_deref(), Some("1"));
    }
    // 3 clients x 2 versions, the contract's key, and that of the readiness check.
    let received = r#"wgkex_worker_keys_received_total{domain="test_a"}"#;
    wait_until("8 keys are counted", || (host.metric(9586, received)? == "8").then_some(()));
}

pub fn each_key_is_in_the_kernel_at_the_instant_of_its_200(lane: Lane) {
    // A virtual machine is slow to start the C tools, and a pending request cannot wait for that.
    let (keys, clients) = if lane == Lane::Kernel { (100, 1) } else { (1_000, 4) };
    let single = Single::new(lane, "");
    let host = &single.host;
    let frozen = FrozenKernel { worker: &single.worker, inspecting: Mutex::new(0) };
    let next = AtomicU32::new(0);
    let never_posted = key(keys);
    let lacking = |n: u32| {
        let key = key(n);
        let answer = host.post(1 + u8::from(n.is_multiple_of(2)), &key);
        let tables = frozen.inspect(|| host.tables("a"));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(tables.missing(&never_posted).len(), 3, "what was not POSTed is not there");
        (!tables.missing(&key).is_empty()).then(|| (n, tables.missing(&key)))
    };
    let untrue: Vec<_> = thread::scope(|scope| {
        let client = || {
            let numbers = std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < keys));
            numbers.filter_map(lacking).collect::<Vec<_>>()
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert!(untrue.is_empty(), "{} of {keys} answers came too early: {untrue:?}", untrue.len());
    assert_eq!(host.tables("a").lengths(), [keys as usize + 1; 3]);
}

/// Keeps the kernel unchanged while a client inspects it, by stopping the worker.
struct FrozenKernel<'a> {
    worker: &'a Process,
    inspecting: Mutex<u32>,
}

impl FrozenKernel<'_> {
    fn inspect<T>(&self, inspect: impl FnOnce() -> T) -> T {
        let mut inspecting = self.inspecting.lock().unwrap();
        if *inspecting == 0 {
            self.worker.signal(Signal::SIGSTOP);
        }
        *inspecting += 1;
        drop(inspecting);
        let seen = inspect();
        let mut inspecting = self.inspecting.lock().unwrap();
        *inspecting -= 1;
        if *inspecting == 0 {
            self.worker.signal(Signal::SIGCONT);
        }
        seen
    }
}
