//! Row `leases`: clients per second that get an address from the registry with many leases, beside the same with few;
//! the cost of a gateway's poll; and whether a router waits longer meanwhile, and while members of tenants join.

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use wgkex_tests::http::{Http, Response};
use wgkex_tests::probe::{Probe, Role, message};
use wgkex_tests::scripted::{Worker, WorkerBehaviour};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{key, wait_until};

use crate::measure::{median, memory, percentile};
use crate::table::{Report, mebibytes, milliseconds, ratio};
use crate::tenants::keep_joining;

/// Callers at the same time.
const CALLERS: u32 = 16;
/// Leases per measurement of a rate.
const PART: u32 = 5_000;
/// Clients that are deleted and added again.
const CHURN: u32 = 500;
/// Requests of routers, one after the other.
const ROUTERS: u32 = 500;
/// `admin:s3cret`.
const LOGIN: &str = "Authorization: Basic YWRtaW46czNjcmV0";

/// Measures with so many leases.
pub fn measure(report: Report, leases: u32) {
    let (mut stack, _worker, server) = start();
    let http = stack.http;
    let few = add(http, 0..PART.min(leases));
    add(http, PART.min(leases)..leases);
    let many = add(http, leases..leases + PART);
    let rate = |time: Duration| format!("{:.0} leases/s", f64::from(PART) / time.as_secs_f64());
    report
        .line(format!("{CALLERS} callers, {leases} leases there"), rate(many))
        .against(format!("with none there: {}", rate(few)), ratio(many, few))
        .wanted("<= 1.50", ratio(many, few) <= 1.5)
        .print();
    churn(report, http, many);
    poll(report, http, leases + PART);
    report.line("memory of the broker with them", mebibytes(memory(stack.broker().pid())[0])).print();
    let told = server.received().len();
    routers(report, &stack, leases + PART);
    assert!(server.received().len() > told, "the gateway is told of clients meanwhile");
    let _ = stack.stop_broker();
}

/// A broker, a gateway for routers, and one that is the server `s1` and so receives all changes of its clients.
fn start() -> (Stack, Worker, Probe) {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    let file = stack.dir().join("password");
    fs::write(&file, "s3cret").unwrap();
    let registry = format!("registry: {{enabled: true, password_file: {}}}", file.display());
    stack.plan.config = format!("{registry}\ntenants: {{enabled: true}}");
    stack.write_config();
    stack.start_broker();
    stack.wait_until_ready();
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let server = json!({
        "public_key": key(u32::MAX), "network": "10.0.0.0/8", "reserved": 20, "endpoint_address": "192.0.2.1",
        "endpoint_port": 51820, "allowed_ips": "10.0.0.0/8",
    });
    let announced = message("wgkex/worker/gw2/servers", json!({ "servers": { "s1": server } }).to_string(), 1, true);
    let server = stack.probe(Role::new("gw2", &["wgkex/worker/gw2/leases"]).greeting(vec![announced]));
    wait_until("the server is in the registry", || {
        let exists = call(&mut stack.connect(), "server/exists", r#"{"server_name":"s1"}"#);
        (exists.status == 200).then_some(())
    });
    (stack, worker, server)
}

fn call(http: &mut Http, route: &str, body: &str) -> Response {
    http.request("POST", &format!("/api/v1/{route}"), &[LOGIN], body.as_bytes())
}

fn lease(http: &mut Http, number: u32) {
    let client = json!({ "client_name": format!("c{number}"), "server_name": "s1", "public_key": key(number) });
    let added = call(http, "client/add", &client.to_string());
    assert_eq!(added.status, 201, "{added:?}");
}

/// Adds clients of these numbers, and returns how long that took.
fn add(server: SocketAddr, numbers: std::ops::Range<u32>) -> Duration {
    let (begun, next) = (Instant::now(), AtomicU32::new(numbers.start));
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                let mut http = Http::connect(server);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= numbers.end {
                        return;
                    }
                    lease(&mut http, number);
                }
            });
        }
    });
    begun.elapsed()
}

/// The rate at which the clients with the lowest addresses leave, and others get these. `added` is the time in which as
/// many new clients were added.
fn churn(report: Report, server: SocketAddr, added: Duration) {
    let mut http = Http::connect(server);
    let begun = Instant::now();
    for number in 0..CHURN {
        let deleted = call(&mut http, "client/delete", &json!({ "client_name": format!("c{number}") }).to_string());
        assert_eq!(deleted.status, 200, "{deleted:?}");
        lease(&mut http, number);
    }
    let (each, of_many) = (begun.elapsed() / CHURN, added * CALLERS / PART);
    report
        .line("the lowest address is given back, and leased again, by one caller", milliseconds(each))
        .against(format!("a new client, by one of {CALLERS}: {}", milliseconds(of_many)), ratio(each, of_many))
        .print();
}

/// The time of a gateway's poll: with the whole list, and with an unchanged one.
fn poll(report: Report, server: SocketAddr, leases: u32) {
    let mut http = Http::connect(server);
    let ask = |http: &mut Http, known: &str| {
        let begun = Instant::now();
        let answer = http.request("GET", "/api/v1/server/config?server_name=s1", &[LOGIN, known], b"");
        (begun.elapsed(), answer)
    };
    let (whole, answer) = ask(&mut http, "If-None-Match: \"none\"");
    assert_eq!((answer.status, answer.json()["peers"].as_array().unwrap().len()), (200, leases as usize));
    let known = format!("If-None-Match: {}", answer.header("etag").unwrap());
    let unchanged = median((0..100).map(|_| {
        // A 304 has no body by its status alone (RFC 9110 section 15.4.5).
        let begun = Instant::now();
        let answer = http.request("HEAD", "/api/v1/server/config?server_name=s1", &[LOGIN, &known], b"");
        assert_eq!(answer.status, 304);
        begun.elapsed()
    }));
    report
        .line(format!("poll of {leases} leases that are known"), milliseconds(unchanged))
        .against(format!("all of them: {}", milliseconds(whole)), ratio(unchanged, whole))
        .print();
}

/// The time that routers wait while clients are added as fast as possible, and while members of tenants join.
fn routers(report: Report, stack: &Stack, first: u32) {
    let quiet = ask(stack, 1 << 30);
    let (is_over, next) = (AtomicBool::new(false), AtomicU32::new(first));
    let busy = thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                let mut http = stack.connect();
                while !is_over.load(Ordering::Relaxed) {
                    lease(&mut http, next.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
        let busy = ask(stack, 2 << 30);
        is_over.store(true, Ordering::Relaxed);
        busy
    });
    let is_over = AtomicBool::new(false);
    let beside_joins = thread::scope(|scope| {
        scope.spawn(|| keep_joining(stack.http, &is_over));
        let times = ask(stack, 3 << 30);
        is_over.store(true, Ordering::Relaxed);
        times
    });
    let shown = |times: &[Duration; 2]| times.map(milliseconds).join(", ");
    for (what, times) in
        [(format!("{CALLERS} callers add clients"), busy), ("members of tenants join".into(), beside_joins)]
    {
        report
            .line(format!("a router's POST while {what}: p50, p99"), shown(&times))
            .against(format!("without them: {}", shown(&quiet)), ratio(times[0], quiet[0]))
            .print();
    }
}

fn ask(stack: &Stack, first: u32) -> [Duration; 2] {
    let mut times: Vec<_> = (first..first + ROUTERS)
        .map(|number| {
            let begun = Instant::now();
            let answer = stack.v2(DOMAIN, &key(number));
            assert_eq!(answer.status, 200, "{answer:?}");
            begun.elapsed()
        })
        .collect();
    [50, 99].map(|share| percentile(&mut times, share))
}
