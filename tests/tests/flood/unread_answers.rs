//! Unread answers, on every listener.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Instant;

use tokio::runtime;
use tokio::sync::oneshot;
use wgkex_common::Config;
use wgkex_kernel::memory::MemoryKernel;
use wgkex_tests::admin::Operator;
use wgkex_tests::http::Http;
use wgkex_tests::probe::{Message, Role};
use wgkex_tests::process;
use wgkex_tests::scripted::{data, peers_of, status};
use wgkex_tests::stack::{DOMAIN, free_address};
use wgkex_tests::unread_answers::{PIPELINED, pile_up, pipelined};
use wgkex_tests::{key, wait_until};

use super::{alone, memory, plan, stack_with};

/// Clients that do not read.
const CLIENTS: usize = 60;
/// How many KiB a program may grow by for them.
const GROWTH: u32 = 24 * 1024;
/// The same for a process in which other tests run, too.
const GROWTH_SHARED: u32 = 200 * 1024;
/// The same for a broker whose clients hold the maximum, which is 16 MiB: its allocator keeps some of the memory that
/// was freed meanwhile.
const GROWTH_FULL: u32 = 32 * 1024;
/// Gateways that make the page large.
const GATEWAYS: usize = 1_500;

/// Clients that request `path` from `server` and read nothing.
fn crowd(server: SocketAddr, path: &str) -> Vec<TcpStream> {
    let requests = pipelined(path);
    let ask = |_| {
        let mut stream = TcpStream::connect(server).unwrap();
        pile_up(&mut stream, |stream| stream, &requests);
        stream
    };
    (0..CLIENTS).map(ask).collect()
}

/// Fails with actix-http's own reading: 60 clients took 1.3 GiB; and with a log line for each admin call without a
/// token.
#[test]
fn unread_answers_of_the_broker_take_bounded_memory_and_refused_admin_calls_a_bounded_log() {
    let _alone = alone();
    let (operator, config) = Operator::new();
    let (mut stack, _worker) = stack_with(plan(&config));
    let (before, begun) = (memory(&mut stack), Instant::now());
    let unread = [(stack.http, "/metrics"), (stack.http, "/healthz"), (operator.address, "/v1/keys")];
    let crowds: Vec<_> = unread.into_iter().map(|(server, path)| crowd(server, path)).collect();
    let after = memory(&mut stack);
    println!("{CLIENTS} clients at each of {unread:?}: {before} KiB before, {after} KiB with them");
    assert!(after < before + GROWTH, "{before} {after}");
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    assert_eq!(operator.call("GET", "/v1/keys", &serde_json::Value::Null).status, 200);
    drop(crowds);
    // A few at once, then one in 10 s.
    let refused = stack.broker().log().matches("unauthorized").count() as u64;
    assert!(refused > 0 && refused <= 12 + begun.elapsed().as_secs() / 10, "{refused} in {:?}", begun.elapsed());
}

/// Fails with actix-http's own reading, and with routes for GET alone.
#[test]
fn unread_answers_of_the_worker_take_bounded_memory() {
    let _alone = alone();
    let (stack, _worker) = stack_with(plan(""));
    let listen = free_address();
    let mut yaml = format!("domains: [{DOMAIN}]\ndomain_prefixes: [ffx_]\nworker_listen: \"{listen}\"\n");
    let (state, bus) = (stack.dir().join("worker"), stack.mqtt);
    writeln!(yaml, "state_dir: {}\nmqtt: {{broker_url: {}, broker_port: {}}}", state.display(), bus.ip(), bus.port())
        .unwrap();
    let config = Config::parse("test", &yaml, "gw2").unwrap();
    let kernel = MemoryKernel::with(&config.domains.iter().cloned().collect::<Vec<_>>());
    let (stop, stopped) = oneshot::channel::<()>();
    let worker = thread::spawn(move || {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let stop = async { stopped.await.unwrap_or_default() };
        runtime.block_on(wgkex_worker::run(config, kernel.clone(), move || Ok(kernel), stop))
    });
    let alive = || Some(Http::try_connect(listen).ok()?.get("/healthz"));
    assert_eq!(wait_until("the worker's metrics", alive).status, 200);
    let before = process::memory(std::process::id());
    let crowd = crowd(listen, "/metrics");
    let after = process::memory(std::process::id());
    println!("{CLIENTS} clients of a worker: {before} KiB before, {after} KiB with them");
    assert!(after < before + GROWTH_SHARED, "{before} {after}");
    let mut http = Http::connect(listen);
    for path in ["/metrics", "//healthz"] {
        let (get, head) = (http.get(path), http.request("HEAD", path, &[], b""));
        assert_eq!((head.status, head.header("content-type")), (200, get.header("content-type")), "{path}");
        let options = http.request("OPTIONS", path, &[], b"");
        assert_eq!((options.status, options.header("allow")), (200, Some("GET, HEAD, OPTIONS")), "{path}");
    }
    drop((crowd, stop));
    worker.join().unwrap().unwrap();
}

/// A page with many gateways, for so many clients that its copies would take too much memory. Fails with actix-http's
/// own reading: 240 clients took 4 GiB; and if only the unsent part of an answer counts: 120 took 37 MiB.
#[test]
fn unread_large_pages_take_bounded_memory_and_a_slow_reader_gets_all() {
    let _alone = alone();
    let (mut stack, _worker) = stack_with(plan(""));
    let names = (0..GATEWAYS).map(|n| format!("gw-{n:0>250}"));
    let domain = [DOMAIN];
    let messages = |name: String| {
        let data = domain.map(|domain| data(&name, domain));
        data.into_iter().chain([peers_of(&name, DOMAIN, "1"), status(&name, "1")]).collect::<Vec<Message>>()
    };
    stack.probe(Role::new("many", &[])).publish_all(names.flat_map(messages));
    stack.wait_for_gateways(u32::try_from(GATEWAYS).unwrap() + 1);
    let page = stack.get("/").body.len();
    let before = memory(&mut stack);
    let crowds: Vec<_> = (0..2).flat_map(|_| crowd(stack.http, "/")).collect();
    let after = memory(&mut stack);
    println!("{} clients of a page of {page} bytes: {before} KiB before, {after} KiB with them", crowds.len());
    assert!(after < before + GROWTH_FULL, "{before} {after}");
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    assert!(stack.metric(r#"wgkex_broker_http_connections_closed_total{reason="unread"}"#).unwrap() > 0.0);
    drop(crowds);
    // A slow reader gets all answers to its pipelined requests.
    let mut late = TcpStream::connect(stack.http).unwrap();
    pile_up(&mut late, |stream| stream, b"GET / HTTP/1.1\r\nHost: b\r\n\r\n");
    let requests = pipelined("/healthz");
    let mut writer = late.try_clone().unwrap();
    let writing = thread::spawn(move || writer.write_all(&requests));
    let mut answers = Vec::new();
    let ends = |answers: &[u8]| answers.windows(7).filter(|window| window == b"\r\n\r\nok\n").count();
    let mut counted = 0;
    while counted < PIPELINED {
        let mut part = [0; 16384];
        let length = late.read(&mut part).unwrap();
        assert!(length > 0, "it ended after {counted} answers");
        answers.extend(&part[..length]);
        counted += ends(&answers);
        answers.drain(..answers.len().saturating_sub(6));
    }
    writing.join().unwrap().unwrap();
}
