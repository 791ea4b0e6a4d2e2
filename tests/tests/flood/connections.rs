//! Clients that are slow, silent, or too many, and invalid requests.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use wgkex_tests::key;
use wgkex_tests::many_routers::{address, connect_from};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V2};

use super::{alone, memory, plan, stack_with};

/// The time limit of a request's head, or its body, and a second for the machine.
const SLOW: Duration = Duration::from_secs(8);
/// Idle connections.
const MANY: u32 = 10_000;
/// Files that a test has open beside its connections.
const FILES: u64 = 500;
/// The number of connections that a broker with a limit of 1,024 open files takes.
const CONNECTIONS_MAX: u32 = 224;
/// The memory limit of an open connection, in bytes.
const MEMORY_PER_CONNECTION: u32 = 24 * 1024;

/// A plan whose broker may have so few open files that it takes only [`CONNECTIONS_MAX`] connections.
fn few_files() -> Plan {
    let mut plan = plan("");
    plan.wrapper = ["sh", "-c", "ulimit -n 1024 && exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    plan
}

fn connect(server: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

/// Checks that a router is served while other clients load the broker.
fn assert_serves(stack: &Stack, n: u32) {
    let begun = Instant::now();
    assert_eq!(stack.v2(DOMAIN, &key(n)).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

/// Sends `drop` again and again until the server has closed the connection; returns the answer.
fn drip(stream: &mut TcpStream, drop: &[u8]) -> String {
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let (begun, mut answer) = (Instant::now(), [0; 4096]);
    let mut said = Vec::new();
    while begun.elapsed() < Duration::from_secs(60) {
        let is_over = stream.write_all(drop).is_err();
        match stream.read(&mut answer) {
            Ok(0) => return String::from_utf8(said).unwrap(),
            Ok(length) => said.extend(&answer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && !is_over => {}
            Err(_) => return String::from_utf8(said).unwrap(),
        }
    }
    panic!("the connection lasts");
}

fn request(body: &str) -> String {
    format!("POST {V2} HTTP/1.1\r\nHost: b\r\n{body}")
}

#[test]
fn heads_and_bodies_sent_byte_by_byte_time_out() {
    let (stack, _worker) = stack_with(plan(""));
    let slow = [
        (String::new(), &b""[..]),
        ("POST ".into(), b"x"),
        (request("X-A: "), b"a"),
        (request("Content-Length: 4000\r\n\r\n{"), b" "),
        (request("Content-Length: 99999999999\r\n\r\n{"), b" "),
    ];
    let server = stack.http;
    thread::scope(|scope| {
        for (begin, drop) in &slow {
            scope.spawn(move || {
                let mut stream = connect(server);
                stream.write_all(begin.as_bytes()).unwrap();
                let begun = Instant::now();
                let said = drip(&mut stream, drop);
                assert!(begun.elapsed() < SLOW, "{begin:?} {:?}", begun.elapsed());
                assert!(said.starts_with("HTTP/1.1 408"), "{begin:?} {said:?}");
            });
        }
        // An endless body ends its connection after the same time as a pause between two requests.
        scope.spawn(|| {
            let mut stream = connect(server);
            stream.write_all(request("Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n").as_bytes()).unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"HTTP/1.1 408");
        });
        assert_serves(&stack, 1);
    });
}

#[test]
fn a_full_connection_table_evicts_connections_without_a_whole_request() {
    let (stack, _worker) = stack_with(few_files());
    let mut open: Vec<_> = (0..200)
        .map(|n| {
            let mut stream = connect(stack.http);
            // A whole request, after which the next head has no time limit of its own; or an endless body.
            let begin = if n % 2 == 0 { "GET /healthz HTTP/1.1\r\nHost: b\r\n\r\nGET /" } else { ENDLESS };
            stream.write_all(begin.as_bytes()).unwrap();
            let mut answer = [0; 1024];
            assert!(stream.read(&mut answer).unwrap() > 0);
            stream
        })
        .collect();
    assert_serves(&stack, 1);
    let begun = Instant::now();
    let is_over = |n: usize, stream: &mut TcpStream| {
        let drop: &[u8] = if n.is_multiple_of(2) { b"x" } else { b"1\r\n \r\n" };
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let wrote = stream.write_all(drop);
        wrote.is_err() || matches!(stream.read(&mut [0; 1024]), Ok(0))
    };
    while open.len() > CONNECTIONS_MAX as usize / 2 {
        let mut n = 0;
        open.retain_mut(|stream| {
            n += 1;
            !is_over(n - 1, stream)
        });
        assert!(begun.elapsed() < SLOW, "{} are open", open.len());
        sleep(Duration::from_millis(200));
    }
    assert_serves(&stack, 2);
    assert!(stack.metric(r#"wgkex_broker_http_connections_closed_total{reason="idle"}"#).unwrap() >= 80.0);
}

const ENDLESS: &str = "GET /healthz HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n";

#[test]
fn excess_connections_make_room_for_routers() {
    let (stack, _worker) = stack_with(few_files());
    let mut idle = Vec::new();
    for n in 0..600 {
        idle.push(connect(stack.http));
        if n % 50 == 0 {
            assert_serves(&stack, n);
        }
    }
    assert_serves(&stack, 600);
    assert!(stack.metric("wgkex_broker_http_connections").unwrap() <= f64::from(CONNECTIONS_MAX));
    assert!(stack.metric(r#"wgkex_broker_http_connections_closed_total{reason="full"}"#).unwrap() >= 300.0);
}

/// Fails with a server for which a connection is busy as soon as it has a request's head: none was evicted, and the
/// router was refused.
#[test]
fn missing_bodies_keep_no_router_out() {
    let (stack, _worker) = stack_with(few_files());
    let mut unfinished = Vec::new();
    for n in 0..600 {
        let mut stream = connect(stack.http);
        // The connection may have been closed already.
        let _ = stream.write_all(request("Content-Length: 100\r\n\r\n{").as_bytes());
        unfinished.push(stream);
        if n % 50 == 0 {
            assert_serves(&stack, n);
        }
    }
    assert_serves(&stack, 600);
    assert!(stack.metric(r#"wgkex_broker_http_connections_closed_total{reason="full"}"#).unwrap() > 0.0);
}

#[test]
fn one_client_has_only_so_many_connections() {
    let _alone = alone();
    let (stack, _worker) = stack_with(plan(""));
    let source = Ipv4Addr::new(127, 0, 0, 3);
    let runtime = Runtime::new().unwrap();
    let open: Vec<_> = (0..1_200).map(|_| runtime.block_on(connect_from(source, stack.http)).unwrap()).collect();
    stack.wait_for_metric(r#"wgkex_broker_http_connections_closed_total{reason="client"}"#, 176.0);
    assert_serves(&stack, 1);
    drop(open);
}

#[test]
fn ten_thousand_idle_connections_take_bounded_memory_and_routers_are_served() {
    let _alone = alone();
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, files, files).unwrap();
    let many = MANY.min(u32::try_from(files.saturating_sub(FILES)).unwrap());
    let (mut stack, _worker) = stack_with(plan(""));
    let before = memory(&mut stack);
    let begun = Instant::now();
    let runtime = Runtime::new().unwrap();
    let mut idle = Vec::new();
    let mut most: f64 = 0.0;
    for n in 0..many {
        idle.push(runtime.block_on(connect_from(address(n % 5_000), stack.http)).unwrap());
        if n % 1_000 == 999 {
            assert_serves(&stack, n);
            most = most.max(stack.metric("wgkex_broker_http_connections").unwrap());
        }
    }
    let (took, full) = (begun.elapsed(), memory(&mut stack));
    println!("{many} connections in {took:.1?}, {most} open at once: {before} KiB before, {full} KiB with them");
    assert!(most <= 8_192.0);
    assert!(full < before + MANY * MEMORY_PER_CONNECTION / 1024, "{before} {full}");
    // None of them has sent any data.
    let gone = Instant::now();
    wgkex_tests::wait_until("all are closed", || {
        stack.metric("wgkex_broker_http_connections").filter(|open| *open < 10.0)
    });
    assert!(gone.elapsed() < SLOW * 2, "{:?}", gone.elapsed());
    assert_serves(&stack, 1);
}

#[test]
fn heads_that_are_huge_or_none_are_refused_at_once_and_fill_no_log() {
    let (mut stack, _worker) = stack_with(plan(""));
    let many = "X-A: y\r\n".repeat(200);
    for (head, answer) in [
        (request(&format!("X-Large: {}\r\n\r\n", "x".repeat(1 << 20))), "HTTP/1.1 431"),
        (request(&format!("{many}\r\n")), "HTTP/1.1 431"),
        (format!("GET /{} HTTP/1.1\r\nHost: b\r\n\r\n", "x".repeat(1 << 20)), ""),
        ("\u{16}\u{3}\u{1} this is no HTTP\r\n\r\n".into(), "HTTP/1.1 400"),
    ] {
        let begun = Instant::now();
        let mut stream = connect(stack.http);
        // The server may refuse it before all of it is sent.
        let _ = stream.write_all(head.as_bytes());
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with(answer) || said.is_empty() && head.len() > 1 << 20, "{said:?}");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        assert_serves(&stack, 1);
    }
    assert!(stack.stop_broker().success());
    let log = stack.broker().log();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

#[test]
fn the_broker_has_as_many_files_open_as_the_system_lets_it() {
    let mut plan = plan("");
    plan.wrapper = ["sh", "-c", "ulimit -S -n 200 && exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let (stack, _worker) = stack_with(plan);
    let _idle: Vec<_> = (0..400).map(|_| connect(stack.http)).collect();
    wgkex_tests::wait_until("all are open", || {
        stack.metric("wgkex_broker_http_connections").filter(|open| *open >= 400.0)
    });
    assert_serves(&stack, 1);
}

#[test]
fn both_kinds_of_bus_share_the_limit_of_files() {
    let mut plan = few_files();
    plan.bus = Bus::Embedded;
    let (stack, _worker) = stack_with(plan);
    let _idle: Vec<_> = (0..400).map(|_| connect(stack.http)).collect();
    assert_serves(&stack, 1);
}
