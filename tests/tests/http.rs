//! HTTP answers of the real broker to routers and operators (contract section 1).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::http::{Http, Response, ask};
use wgkex_tests::key;
use wgkex_tests::process::Process;
use wgkex_tests::scripted::{Worker, WorkerBehaviour, endpoint};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V1, V2};
use wgkex_tests::wait_until;

fn stack_with_gateway() -> (Stack, Worker) {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    (stack, worker)
}

/// Checks that it is an error in the form of the contract, and returns its message.
fn refusal(response: &Response, status: u16) -> String {
    assert_eq!(response.status, status, "{response:?}");
    assert_eq!(response.header("content-type"), Some("application/json"), "{response:?}");
    let json = response.json();
    let message = json["error"]["message"].as_str().unwrap_or_else(|| panic!("no message: {response:?}")).to_owned();
    assert_eq!(json, serde_json::json!({ "error": { "message": message } }));
    assert!(!message.is_empty() && !message.contains('\n'), "one sentence: {message:?}");
    message
}

#[test]
fn a_router_is_answered_whatever_its_content_type_and_the_order_of_its_fields() {
    let (stack, _worker) = stack_with_gateway();
    let mut http = stack.connect();
    let key = key(1);
    let types: [&[&str]; 5] = [
        &["Content-Type: application/x-www-form-urlencoded"],
        &[],
        &["Content-Type: application/json"],
        &["Content-Type: text/plain; charset=latin1"],
        &["Content-Type: nonsense", "User-Agent: gluon/v2023.2.5 (x) OpenWrt/24.10.2", "X-Gluon-Version: v2023.2.5"],
    ];
    let bodies = [
        ask(DOMAIN, &key),
        format!(r#"{{"public_key":"{key}","domain":"{DOMAIN}"}}"#),
        format!(" {{ \"public_key\": \"{key}\",\r\n \"new\": [1, {{}}], \"domain\": \"{DOMAIN}\" }} "),
    ];
    for headers in types {
        for body in &bodies {
            let v1 = http.request("POST", V1, headers, body.as_bytes());
            assert_eq!((v1.status, v1.body.as_str()), (200, r#"{"Message":"OK"}"#), "{headers:?} {body}");
            assert_eq!(v1.header("content-type"), Some("application/json"));
            let v2 = http.request("POST", V2, headers, body.as_bytes());
            assert_eq!((v2.status, v2.json()), (200, endpoint("gw1")), "{headers:?} {body}");
            assert_eq!(v2.header("content-type"), Some("application/json"));
        }
    }
}

#[test]
fn the_answer_of_version_2_is_the_originals_to_the_byte() {
    let (stack, _worker) = stack_with_gateway();
    let gateway = wgkex_tests::scripted::gateway_key("gw1");
    let expected = format!(
        r#"{{"Endpoint":{{"Address":"gw1.example","Port":"40011","AllowedIPs":["fe80::27c:16ff:fec0:6c74"],"PublicKey":"{gateway}"}}}}"#
    );
    assert_eq!(stack.v2(DOMAIN, &key(1)).body, expected);
}

#[test]
fn a_mistake_is_named_and_not_echoed() {
    let (stack, _worker) = stack_with_gateway();
    let good = key(1);
    let cases = [
        ("", "JSON"),
        ("MARKER", "JSON"),
        ("[\"MARKER\"]", "object"),
        ("{\"MARKER\":", "JSON"),
        ("{\"domain\":\"MARKER\"}", "public_key"),
        (&format!(r#"{{"domain":7,"public_key":"{good}"}}"#), "domain"),
        (&ask("ffx_MARKER", &good), "domain"),
        (&ask("", &good), "domain"),
        (&ask(DOMAIN, "MARKER"), "public_key"),
        (&ask(DOMAIN, ""), "public_key"),
        (&ask(DOMAIN, &format!("{good}\\n")), "public_key"),
        (&ask(DOMAIN, &good.replace('=', "")), "public_key"),
        (&ask(DOMAIN, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "public_key"),
        // Points of small order on Curve25519.
        (&ask(DOMAIN, "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "public_key"),
        (&ask(DOMAIN, "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA="), "public_key"),
    ];
    for (body, named) in cases {
        for path in [V1, V2] {
            let message = refusal(&stack.connect().post(path, body), 400);
            assert!(message.contains(named), "{body}: {message}");
            assert!(!message.contains("MARKER") && !message.contains(&good), "{body}: {message}");
        }
    }
    let message = refusal(&stack.connect().request("POST", V2, &[], b"{\"domain\":\"\xff\"}"), 400);
    assert!(message.contains("JSON"), "{message}");
}

#[test]
fn a_body_over_4096_bytes_is_answered_with_an_error() {
    let (stack, _worker) = stack_with_gateway();
    let padded = |size: usize| {
        let ask = ask(DOMAIN, &key(1));
        let padding = " ".repeat(size - ask.len());
        ask + &padding
    };
    assert_eq!(stack.connect().post(V2, &padded(4096)).status, 200);
    for size in [4097, 10_000, 1 << 20] {
        refusal(&stack.connect().post(V2, &padded(size)), 413);
        refusal(&chunked(&stack, &padded(size)), 413);
    }
    assert_eq!(chunked(&stack, &padded(4096)).status, 200);
}

fn chunked(stack: &Stack, body: &str) -> Response {
    let mut request = format!("POST {V2} HTTP/1.1\r\nHost: broker\r\nTransfer-Encoding: chunked\r\n\r\n");
    for chunk in body.as_bytes().chunks(1000) {
        let chunk = std::str::from_utf8(chunk).expect("text");
        write!(request, "{:x}\r\n{chunk}\r\n", chunk.len()).expect("room");
    }
    request += "0\r\n\r\n";
    let mut http = stack.connect();
    http.send(request.as_bytes());
    http.response("POST")
}

#[test]
fn unknown_paths_and_methods_are_answered_in_json() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let mut http = stack.connect();
    for path in ["/nothing", "/api/v1/wg/key/exchange/", "/api/v3/wg/key/exchange", "/config", "//nothing", "/%00"] {
        refusal(&http.get(path), 404);
        refusal(&stack.connect().post(path, "{}"), 404);
    }
    for (method, path, allowed) in [
        ("GET", V1, "POST"),
        ("PUT", V2, "POST"),
        ("DELETE", V1, "POST"),
        ("POST", "/", "GET"),
        ("POST", "/healthz", "GET"),
        ("POST", "/readyz", "GET"),
        ("POST", "/status.json", "GET"),
        ("PUT", "/metrics", "GET"),
    ] {
        let response = http.request(method, path, &[], b"");
        refusal(&response, 405);
        let allow = response.header("allow").unwrap_or_default();
        assert!(allow.split(", ").any(|method| method == allowed), "{method} {path}: {response:?}");
    }
}

#[test]
fn one_connection_serves_many_requests() {
    let (stack, _worker) = stack_with_gateway();
    let mut http = stack.connect();
    for n in 0..20 {
        assert_eq!(http.post(V2, &ask(DOMAIN, &key(n))).status, 200);
        assert_eq!(http.post(V2, "nonsense").status, 400);
        assert_eq!(http.get("/healthz").body, "ok\n");
        assert_eq!(http.get("/nothing").status, 404);
    }
    let two = format!("GET /healthz HTTP/1.1\r\nHost: b\r\n\r\n{}", "GET /readyz HTTP/1.1\r\nHost: b\r\n\r\n");
    http.send(two.as_bytes());
    assert_eq!((http.response("GET").body, http.response("GET").body), ("ok\n".into(), "ready\n".into()));
}

/// Regression: 404 for the slashes, 405 for OPTIONS and GET, 400 for the encodings.
#[test]
fn the_forms_of_requests_are_served_that_the_originals_web_server_takes() {
    let (stack, _worker) = stack_with_gateway();
    let mut http = stack.connect();
    let body = ask(DOMAIN, &key(1));
    for (path, query) in [("/", V1), ("//", V1), ("/", "/"), ("//", "/healthz?x=//y"), ("/", "/readyz")] {
        let path = format!("{path}{query}");
        let response = if query == V1 { http.post(&path, &body) } else { http.get(&path) };
        assert_eq!(response.status, 200, "{path}: {response:?}");
    }
    for (path, allowed) in [
        (V1, "POST"),
        (V2, "POST"),
        ("/", "GET"),
        ("/healthz", "GET"),
        ("/readyz", "GET"),
        ("/metrics", "HEAD"),
        ("/status.json", "GET"),
    ] {
        let response = http.request("OPTIONS", path, &[], b"");
        assert_eq!((response.status, response.body.as_str()), (200, ""), "{path}");
        let allow: Vec<_> = response.header("allow").unwrap().split(", ").collect();
        assert!(allow.contains(&allowed) && allow.contains(&"OPTIONS"), "{path}: {allow:?}");
    }
    // As HAProxy checks a server.
    let mut check = stack.connect();
    check.send(b"OPTIONS / HTTP/1.0\r\n\r\n");
    assert!(check.first_line().contains("200"));
    refusal(&http.request("OPTIONS", "/nothing", &[], b""), 404);
    let marked = format!("\u{feff}{body}");
    let wide: Vec<u8> = marked.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let wider: Vec<u8> = body.chars().flat_map(|char| u32::from(char).to_be_bytes()).collect();
    for path in [V1, V2] {
        for body in [marked.as_bytes(), &wide, &wider] {
            assert_eq!(http.request("POST", path, &[], body).status, 200, "{path} {body:?}");
        }
        // As the Python example of the original's README does.
        let got = http.request("GET", path, &["Content-Type: application/json"], body.as_bytes());
        assert_eq!(got.body, http.post(path, &body).body);
        assert_eq!(stack.connect().request("HEAD", path, &[], b"").status, 405);
    }
}

#[test]
fn head_has_the_head_of_get() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let mut http = stack.connect();
    for path in ["/", "/healthz", "/readyz", "/metrics", "/status.json"] {
        let get = http.get(path);
        let head = http.request("HEAD", path, &[], b"");
        assert_eq!((head.status, head.header("content-type")), (get.status, get.header("content-type")), "{path}");
        assert_eq!(head.body, "");
    }
}

#[test]
fn the_page_shows_the_gateways_without_a_script_or_a_key() {
    let (stack, _worker) = stack_with_gateway();
    let (router, other) = (key(1), key(2));
    assert_eq!((stack.v2(DOMAIN, &router).status, stack.v1(DOMAIN, &other).status), (200, 200));
    let page = stack.get("/");
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").unwrap().starts_with("text/html"), "{page:?}");
    for part in ["gw1", "online", DOMAIN, "0.1.0", "Weight", "Target"] {
        assert!(page.body.contains(part), "{part} is missing: {}", page.body);
    }
    for part in ["<script", "http://", "https://", "src=", &router[..10], &other[..10]] {
        assert!(!page.body.contains(part), "{part} is there: {}", page.body);
    }
    let gateway = wgkex_tests::scripted::gateway_key("gw1");
    assert!(!page.body.contains(&gateway), "{}", page.body);
}

#[test]
fn every_metric_of_the_broker_is_there_and_parses() {
    let (stack, _worker) = stack_with_gateway();
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    assert_eq!(stack.v1("ffx_none", &key(1)).status, 400);
    let response = stack.get("/metrics");
    assert!(response.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"), "{response:?}");
    let mut families = BTreeSet::new();
    for line in response.body.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line}"));
        value.parse::<f64>().unwrap_or_else(|error| panic!("{line}: {error}"));
        assert!(!series.contains(&key(1)) && !series.contains("127.0.0.1"), "{line}");
        families.insert(series.split('{').next().unwrap().to_owned());
    }
    for family in [
        "wgkex_broker_keys_accepted_total",
        "wgkex_broker_keys_refused_total",
        "wgkex_broker_http_request_duration_seconds_bucket",
        "wgkex_broker_publish_failures_total",
        "wgkex_broker_mqtt_connected",
        "wgkex_broker_confirmation_seconds_bucket",
        "wgkex_broker_gateways",
        "wgkex_broker_gateway_up",
        "wgkex_broker_gateway_connected",
        "wgkex_broker_gateway_assigned",
        "wgkex_broker_domain_gateways",
        "wgkex_broker_build_info",
    ] {
        assert!(families.contains(family), "{family} is missing in {families:?}");
    }
    for (series, value) in [
        (r#"wgkex_broker_keys_accepted_total{api="v2"}"#, 1.0),
        (r#"wgkex_broker_keys_refused_total{api="v1",reason="domain"}"#, 1.0),
        ("wgkex_broker_mqtt_connected", 1.0),
        ("wgkex_broker_confirmation_seconds_count", 1.0),
        (r#"wgkex_broker_gateway_up{gateway="gw1"}"#, 1.0),
        (r#"wgkex_broker_gateway_connected{domain="ffx_a",gateway="gw1"}"#, 0.0),
        (r#"wgkex_broker_gateway_assigned{domain="ffx_a",gateway="gw1"}"#, 1.0),
        (r#"wgkex_broker_gateway_routers{gateway="gw1",state="waiting"}"#, 1.0),
        (r#"wgkex_broker_domain_gateways{domain="ffx_a"}"#, 1.0),
    ] {
        assert_eq!(stack.metric(series), Some(value), "{series}");
    }
}

#[test]
fn a_slow_client_blocks_no_other_one_and_times_out() {
    let (stack, _worker) = stack_with_gateway();
    let mut slow: Vec<Http> = (0..50).map(|_| stack.connect()).collect();
    for (n, http) in slow.iter_mut().enumerate() {
        let head = format!("POST {V2} HTTP/1.1\r\nHost: broker\r\nContent-Length: 100\r\n");
        http.send(if n % 2 == 0 { head.as_bytes() } else { b"POST " });
        if n % 4 == 0 {
            http.send(b"\r\n{");
        }
    }
    let begun = Instant::now();
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    for http in &mut slow {
        // Some clients get 408, others only the end of the connection.
        if let Ok(response) = http.try_response("POST") {
            refusal_or_empty(&response);
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
}

fn refusal_or_empty(response: &Response) {
    assert_eq!(response.status, 408, "{response:?}");
    if !response.body.is_empty() {
        refusal(response, 408);
    }
}

/// Checks that the broker does not start, and logs that in one line that contains `texts`; returns the log.
fn does_not_start(stack: &Stack, texts: &[&str]) -> String {
    let mut broker = stack.program("wgkex-broker", &[]);
    ends_with_one_line(&mut broker, texts)
}

fn ends_with_one_line(broker: &mut Process, texts: &[&str]) -> String {
    let status = broker.wait();
    let log = broker.log();
    assert!(!status.success(), "{log}");
    let lines: Vec<_> = log.lines().filter(|line| texts.iter().all(|text| line.contains(text))).collect();
    assert_eq!(lines.len(), 1, "one line with {texts:?}: {log}");
    assert!(lines[0].contains("ERROR"), "{log}");
    assert_eq!(log.lines().filter(|line| line.contains("ERROR")).count(), 1, "{log}");
    log
}

#[test]
fn a_taken_broker_listen_ends_the_broker_with_one_line_that_names_it() {
    let stack = Stack::prepare(Plan::new(Bus::Embedded));
    let _taken = TcpListener::bind(stack.http).unwrap();
    does_not_start(&stack, &["broker_listen", &stack.http.to_string(), "in use"]);
}

/// Regression: only the port was named.
#[test]
fn a_second_broker_with_the_same_config_names_the_process_of_the_first() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let first = format!("in use by process {}", stack.broker().pid());
    let log = does_not_start(&stack, &["broker.sqlite", &first, "state_dir"]);
    assert!(!log.contains("broker_listen"), "{log}");
}

#[test]
fn a_taken_mqtt_listen_ends_the_broker_with_the_reason() {
    let stack = Stack::prepare(Plan::new(Bus::Embedded));
    let _taken = TcpListener::bind(stack.mqtt).unwrap();
    does_not_start(&stack, &["mqtt_listen", &stack.mqtt.to_string(), "in use"]);
}

#[test]
fn every_mistake_of_the_config_is_one_line_and_the_broker_does_not_start() {
    let cases = [
        ("confirm_timeout: never", "confirm_timeout"),
        ("confirm_timeout: 5\nconfirm_budget: 1", "confirm_budget"),
        ("parker: {enabled: true}", "parker.enabled"),
        ("log_level: LOUD", "log_level"),
        ("cleanup: {interval: 0}", "cleanup.interval"),
    ];
    for (yaml, named) in cases {
        let stack = Stack::prepare(Plan::new(Bus::Embedded).config(yaml));
        does_not_start(&stack, &[named, "wgkex.yaml"]);
    }
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    stack.mqtt.set_ip([192, 0, 2, 1].into());
    stack.write_config();
    does_not_start(&stack, &["mqtt_listen", "loopback"]);
    fs::write(stack.config_file(), "domains: [\n").unwrap();
    does_not_start(&stack, &["wgkex.yaml"]);
    fs::remove_file(stack.config_file()).unwrap();
    does_not_start(&stack, &["wgkex.yaml", "does not exist"]);
}

#[test]
fn an_unknown_key_of_the_config_is_a_warning() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config("confirm_timout: 1"));
    let line = stack.broker().wait_for_log("confirm_timout");
    assert!(line.contains("WARN") && line.contains("confirm_timeout"), "{line}");
}

#[test]
fn an_unreachable_mqtt_server_is_logged_once_and_the_broker_reconnects() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_broker();
    stack.broker().wait_for_log("MQTT not connected");
    let unready = wait_until("the broker serves", || Some(Http::try_connect(stack.http).ok()?.get("/readyz")));
    assert_eq!(unready.status, 503);
    assert!(unready.body.contains("refused") && unready.body.contains(&stack.mqtt.to_string()), "{unready:?}");
    assert_eq!(stack.get("/healthz").status, 200);
    assert_eq!(stack.get("/").status, 200);
    for response in [stack.v1(DOMAIN, &key(1)), stack.v2(DOMAIN, &key(1))] {
        refusal(&response, 503);
        assert!(response.header("retry-after").is_some_and(|after| after.parse::<u32>().is_ok()), "{response:?}");
    }
    stack.wait_for_metric("wgkex_broker_mqtt_connected", 0.0);
    // Long enough for several attempts.
    std::thread::sleep(Duration::from_secs(3));
    let log = stack.broker().log();
    assert_eq!(log.matches("MQTT not connected").count(), 1, "{log}");
    stack.start_mosquitto();
    stack.wait_until_ready();
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    let _ = stack.mosquitto().end_by(Signal::SIGKILL);
    wait_until("the broker is not ready", || (stack.get("/readyz").status == 503).then_some(()));
    stack.start_mosquitto();
    stack.wait_until_ready();
}

const PASSWORD: &str = "pa55-w0rd-of-the-bus";

/// A broker at a Mosquitto that requires `PASSWORD`, with another one in its own config; logs at all levels.
fn stack_with_password(configured: &str) -> Stack {
    let mut plan = Plan::new(Bus::Mosquitto).variable("RUST_LOG", "debug").config("log_level: DEBUG");
    plan.credentials = Some(("wgkex".into(), PASSWORD.into()));
    let mut stack = Stack::prepare(plan);
    stack.start_mosquitto();
    stack.plan.credentials = Some(("wgkex".into(), configured.into()));
    stack.write_config();
    stack.start_broker();
    stack
}

#[test]
fn a_wrong_password_is_one_clear_line_and_not_shown() {
    let mut stack = stack_with_password("wr0ng-pa55");
    let line = stack.broker().wait_for_log("MQTT not connected");
    assert!(line.contains("user name or password"), "{line}");
    let unready = stack.get("/readyz");
    assert_eq!(unready.status, 503);
    assert!(unready.body.contains("user name or password"), "{unready:?}");
    assert!(stack.broker().is_running());
    let _ = stack.stop_broker();
    let log = stack.broker().log();
    assert_eq!(log.matches("MQTT not connected").count(), 1, "{log}");
    assert!(!log.contains("wr0ng-pa55"), "{log}");
}

#[test]
fn the_right_password_is_taken_and_not_shown() {
    let mut stack = stack_with_password(PASSWORD);
    stack.wait_until_ready();
    let _ = stack.stop_broker();
    let log = stack.broker().log();
    assert!(log.contains("DEBUG"), "everything is logged: {log}");
    assert!(!log.contains(PASSWORD), "{log}");
}
