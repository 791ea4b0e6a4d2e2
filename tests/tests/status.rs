//! A broker and its fleet as operators see them: the commands, the page and its JSON, the log, and read-only admin
//! calls.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_tests::admin::{Operator, printed};
use wgkex_tests::http::{Http, ask};
use wgkex_tests::probe::message;
use wgkex_tests::process::binary;
use wgkex_tests::raw_client::RawClient;
use wgkex_tests::scripted::{Worker, WorkerBehaviour, data, gateway_key, hello, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, ONE_ADDRESS, Plan, Stack, V2, free_address};
use wgkex_tests::{key, wait_until, wait_within};

/// Runs `wgkex-broker` with a stack's config, without a token.
fn run(stack: &Stack, arguments: &[&str]) -> Output {
    command(stack, arguments).output().expect("the broker's program")
}

fn command(stack: &Stack, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("wgkex-broker"));
    command.args(arguments).env("WGKEX_CONFIG_FILE", stack.config_file()).env_remove("WGKEX_ADMIN_TOKEN");
    command
}

/// The output of the program on a terminal, standard error included.
fn on_terminal(stack: &Stack, arguments: &str, no_color: &str) -> String {
    let program = format!("{} {arguments}", binary("wgkex-broker").display());
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &program, "/dev/null"]).stdin(Stdio::null());
    terminal.env("WGKEX_CONFIG_FILE", stack.config_file()).env("NO_COLOR", no_color);
    String::from_utf8(terminal.output().expect("script, of bsdutils").stdout).expect("UTF-8")
}

#[test]
fn commands_and_the_log_have_colours_on_a_terminal_unless_no_color_is_set() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    // The last one is a second broker: it does not start, and logs that.
    for (arguments, shown) in [("status", "no gateway"), ("doctor", "fail"), ("", " process ")] {
        let (coloured, plain) = (on_terminal(&stack, arguments, ""), on_terminal(&stack, arguments, "1"));
        assert!(coloured.contains(shown) && plain.contains(shown), "{coloured} {plain}");
        assert!(coloured.contains('\x1b') && !plain.contains('\x1b'), "{arguments}: {coloured:?} {plain:?}");
        let mut piped = command(&stack, &arguments.split_whitespace().collect::<Vec<_>>());
        assert!(!printed(&piped.output().unwrap()).contains('\x1b'), "{arguments}: nobody looks");
    }
}

#[test]
fn the_log_names_the_brokers_own_mqtt_server_and_not_the_port_by_which_it_reaches_that() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let line = stack.broker().wait_for_log("MQTT connected");
    assert!(line.contains(r#"server="the broker's own""#) && !line.contains("127.0.0.1"), "{line}");
}

fn kinds(status: &Value) -> Vec<&str> {
    status["problems"].as_array().unwrap().iter().map(|problem| problem["kind"].as_str().unwrap()).collect()
}

fn wait_for_kinds(stack: &Stack, expected: &[&str]) -> Value {
    wait_until(&format!("the problems are {expected:?}"), || {
        let status = stack.get("/status.json").json();
        (kinds(&status) == expected).then_some(status)
    })
}

#[test]
fn status_and_gateways_show_the_fleet_without_a_token_and_exit_by_what_is_wrong() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded).domains([DOMAIN, "ffx_b"]));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 7);
    stack.wait_for_gateways(1);
    wait_for_kinds(&stack, &[]);
    let router = key(1);
    assert_eq!(stack.v2(DOMAIN, &router).status, 200);
    assert_eq!(stack.v1("ffx_none", &router).status, 400);

    let shown = run(&stack, &["status"]);
    let text = printed(&shown);
    assert_eq!(shown.status.code(), Some(0), "{text}");
    let address = stack.http.to_string();
    for part in [
        &address,
        "ready",
        "ffx_b   gw1",
        "online",
        "0.1.0",
        "ffx_a 7, ffx_b 7",
        "keys accepted 1, refused 1: domain 1",
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    assert!(!text.contains('\x1b'), "no colour where there is no terminal: {text}");
    let json = run(&stack, &["status", "--json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["ready"], &json["domains"][1]), (&json!(true), &json!({ "name": "ffx_b", "gateways": ["gw1"] })));
    let gateway = &json["gateways"][0];
    assert_eq!((&gateway["connected"], &gateway["assigned"]), (&json!(14), &json!(1)), "{gateway}");
    assert_eq!(json["keys"]["confirmation"]["count"], 1);
    for secret in [&router[..10], &gateway_key("gw1")[..10], "127.0.0.1"] {
        assert!(!json.to_string().contains(secret), "{secret} is in {json}");
    }
    let gateways = run(&stack, &["gateways"]);
    assert_eq!(gateways.status.code(), Some(0));
    let row = printed(&gateways).lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(row, "gw1 online 0.1.0 14 1 0 100.0% 15.0 ffx_a 7, ffx_b 7");
    let gateways: Value = serde_json::from_slice(&run(&stack, &["gateways", "--json"]).stdout).unwrap();
    assert_eq!(gateways[0]["name"], "gw1");

    // The domain goes down, then the gateway offline, then the broker ends.
    worker.probe.publish(peers_of("gw1", "ffx_b", "-1"));
    wait_for_kinds(&stack, &["domain_without_gateway", "domain_down"]);
    let shown = run(&stack, &["status"]);
    let text = printed(&shown);
    assert_eq!(shown.status.code(), Some(3), "{text}");
    assert!(
        text.contains("! domain ffx_b: no gateway is online") && text.contains("ffx_b interface missing (-1) for"),
        "{text}"
    );
    worker.probe.publish_all([peers_of("gw1", DOMAIN, "-1"), status("gw1", "0")]);
    stack.wait_for_gateways(0);
    let gateways = run(&stack, &["gateways"]);
    assert_eq!(gateways.status.code(), Some(3));
    let text = printed(&gateways);
    assert!(text.contains("offline") && text.contains("0.1.0") && text.contains("stopped, offline for"), "{text}");
    let page = stack.get("/").body;
    assert!(page.contains("offline: stopped, offline for") && page.contains("0.1.0"), "{page}");
    assert!(page.contains("domain ffx_b: no gateway is online") && page.contains("Target: "), "{page}");
    let _ = stack.stop_broker();
    for arguments in [["status"].as_slice(), &["gateways"], &["status", "--json"]] {
        let unreachable = run(&stack, arguments);
        let error = String::from_utf8_lossy(&unreachable.stderr).into_owned();
        assert_eq!((unreachable.status.code(), unreachable.stdout.len()), (Some(1), 0), "{error}");
        let expected =
            format!("error: no broker answers on {address} (broker_listen): is it running, and with this config?");
        assert!(error.starts_with(&expected) && error.contains("refused"), "{error}");
    }
    assert_eq!(run(&stack, &["status", "--nonsense"]).status.code(), Some(64));
}

#[test]
fn a_broker_that_is_not_ready_is_something_wrong() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_broker();
    wait_until("the broker serves", || Http::try_connect(stack.http).ok());
    let shown = run(&stack, &["status"]);
    let text = printed(&shown);
    assert_eq!(shown.status.code(), Some(3), "{text}");
    assert!(text.contains("cannot serve routers") && text.contains("! not ready: MQTT is not connected"), "{text}");
}

/// The commands reach a wildcard address by loopback.
#[test]
fn the_commands_find_a_broker_that_listens_everywhere() {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    stack.plan.config = format!("broker_listen: {{host: \"::\", port: {}}}\n{ONE_ADDRESS}", stack.http.port());
    stack.write_config();
    stack.start_broker();
    stack.wait_until_ready();
    assert!(printed(&run(&stack, &["status"])).contains(&format!("on {}: ready", stack.http)));
}

#[test]
fn watch_shows_rates_and_waits_for_a_broker_that_is_away() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let watching = stack.program("wgkex-broker", &["status", "--watch"]);
    watching.wait_for_log("keys accepted 0,");
    for n in 0..20 {
        assert_eq!(stack.v2(DOMAIN, &key(n)).status, 200);
    }
    let rate = watching.wait_for_log("/s) 20,");
    assert!(rate.starts_with("keys accepted (") && !rate.contains("(0.0/s) 20"), "{rate}");
    wait_until("confirmations since the look before", || {
        let log = watching.log();
        let mut lines = log.lines().filter_map(|line| line.strip_prefix("confirmation just now: "));
        lines.find(|line| !line.starts_with("0 ") && line.contains(" ms, p99 ")).map(str::to_owned)
    });
    let _ = stack.stop_broker();
    watching.wait_for_log("no broker answers on");
    let before = watching.log().matches(": ready, up for").count();
    stack.start_broker();
    wait_until("it is shown again", || (watching.log().matches(": ready, up for").count() > before).then_some(()));
}

#[test]
fn a_domain_without_a_gateway_is_one_warning_and_its_return_one_line() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let served = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    std::thread::sleep(Duration::from_secs(11));
    assert!(!stack.broker().log().contains(&format!("domain {DOMAIN}:")), "not while one is there");
    served.probe.publish(status("gw1", "0"));
    let line = stack.broker().wait_for_log(&format!("domain {DOMAIN}: no gateway is online"));
    assert!(line.contains("WARN"), "{line}");
    assert!(stack.get("/readyz").body.contains(&format!("domain {DOMAIN}: ")), "readyz says it, too");
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(stack.broker().log().matches(&format!("domain {DOMAIN}: no gateway")).count(), 1);
    served.probe.publish(status("gw1", "1"));
    let line = stack.broker().wait_for_log(&format!("over: domain {DOMAIN}: no gateway"));
    assert!(line.contains("INFO"), "{line}");
}

#[test]
fn gateways_that_publish_the_same_are_one_warning_and_stand_on_the_page() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let (_one, two) = (
        Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0),
        Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 0),
    );
    stack.wait_for_gateways(2);
    // Scripted gateways share one link address.
    wait_for_kinds(&stack, &["same_link_address"]);
    let cloned = String::from_utf8(data("gw1", DOMAIN).payload).unwrap();
    two.probe.publish(wgkex_tests::probe::message(data("gw2", DOMAIN).topic, cloned.clone(), 1, true));
    wait_for_kinds(&stack, &["same_key", "same_link_address"]);
    let other = cloned.replace(&gateway_key("gw1"), &gateway_key("gw2")).replace("6c74", "6c75");
    two.probe.publish(wgkex_tests::probe::message(data("gw2", DOMAIN).topic, other, 1, true));
    let json = wait_for_kinds(&stack, &["same_external_address"]);
    assert_eq!(json["problems"][0]["subject"], "gw1, gw2");
    let said = "gateways gw1, gw2 publish the same address gw1.example:40011 with different keys";
    assert!(stack.get("/").body.contains(said));
    let line = stack.broker().wait_for_log(said);
    assert!(line.contains("WARN"), "{line}");
    two.probe.publish(data("gw2", "ffx_none"));
    two.probe.publish(status("gw2", "0"));
    stack.broker().wait_for_log(&format!("over: {said}"));
    assert_eq!(stack.broker().log().matches(said).count(), 2);
}

#[test]
fn the_log_has_the_reason_why_a_gateway_goes_offline() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let workers = ["gw1", "gw2"].map(|name| Worker::start(&stack, name, WorkerBehaviour::Confirms, 7));
    stack.wait_for_gateways(2);
    workers[0].probe.publish_all([peers_of("gw1", DOMAIN, "-1"), status("gw1", "0")]);
    // A last will has the same payload, but no peer counts of -1 before it.
    workers[1].probe.publish(status("gw2", "0"));
    for (worker, reason) in [("gw1", "reason=stopped"), ("gw2", "reason=connection lost")] {
        let broker = stack.broker();
        let line = wait_until("the line", || {
            let log = broker.log();
            log.lines().find(|line| line.contains("gateway is offline") && line.contains(worker)).map(str::to_owned)
        });
        assert!(line.contains(reason), "{line}");
    }
}

/// Regression: page and commands did not show them any more once the connection was lost.
#[test]
fn gateways_stay_shown_as_last_known_while_mqtt_is_away() {
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 7);
    stack.wait_for_gateways(1);
    assert_eq!(wait_for_kinds(&stack, &[])["gateways"][0]["last_known_secs"], Value::Null);
    let _ = stack.mosquitto().end_by(Signal::SIGKILL);
    let json = wait_for_kinds(&stack, &["not_ready"]);
    let gateway = &json["gateways"][0];
    assert_eq!((&gateway["name"], &gateway["online"], &gateway["connected"]), (&json!("gw1"), &json!(true), &json!(7)));
    assert!(gateway["last_known_secs"].is_u64(), "{gateway}");
    for command in ["gateways", "status"] {
        let text = printed(&run(&stack, &[command]));
        assert!(text.contains("last known state: no MQTT for ") && text.contains("gw1"), "{text}");
    }
    let page = stack.get("/").body;
    assert!(page.contains("online (last known state: no MQTT for "), "{page}");
    stack.wait_for_gateways(0);
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 503, "nobody is sent there");
    stack.start_mosquitto();
    assert_eq!(wait_for_kinds(&stack, &[])["gateways"][0]["last_known_secs"], Value::Null);
}

/// Whether the problems of a status contain this text.
fn names_problem(status: &Value, text: &str) -> bool {
    status["problems"].to_string().contains(text)
}

#[test]
fn a_client_id_that_two_programs_use_at_the_brokers_server_is_a_problem_and_a_metric() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    assert_eq!(stack.metric("wgkex_broker_mqtt_name_in_use"), Some(0.0));
    let _twins: Vec<_> = (0..6).map(|_| RawClient::connect(stack.mqtt, "twice")).collect();
    stack.wait_for_metric("wgkex_broker_mqtt_name_in_use", 1.0);
    let text = "two programs use the MQTT client id twice: each ends the other's connection";
    assert!(names_problem(&stack.get("/status.json").json(), text));
    assert!(stack.get("/").body.contains("two programs use the MQTT client id twice"));
    assert!(stack.get("/readyz").body.contains(text));
    let shown = run(&stack, &["status"]);
    assert!(shown.status.code() == Some(3) && printed(&shown).contains(text), "{shown:?}");
}

/// Two stacks of one host name at one Mosquitto, each with the address of its worker's metrics. The first one's broker
/// runs.
fn two_of_one_name() -> [(Stack, SocketAddr); 2] {
    let worker_listen = [free_address(), free_address()];
    let plan = |listen: &SocketAddr| Plan::new(Bus::Mosquitto).config(&format!("worker_listen: \"{listen}\""));
    let stack = Stack::start(plan(&worker_listen[0]));
    let mut other = Stack::prepare(plan(&worker_listen[1]));
    other.mqtt = stack.mqtt;
    other.write_config();
    let [first, second] = worker_listen;
    [(stack, first), (other, second)]
}

/// On another server, each of them detects it only by its own connections.
#[test]
fn a_name_that_two_programs_use_elsewhere_is_a_problem_and_a_metric_of_both() {
    let [(mut stack, first), (mut other, second)] = two_of_one_name();
    let worker_listen = [first, second];
    other.start_broker();
    let in_use = |server: SocketAddr, metric: &str| {
        wait_until(&format!("{metric} at {server}"), || {
            let metrics = Http::try_connect(server).ok()?.get("/metrics").body;
            metrics.lines().any(|line| line == format!("{metric} 1")).then_some(())
        });
    };
    let text = "another program may use";
    for broker in [&stack, &other] {
        in_use(broker.http, "wgkex_broker_mqtt_name_in_use");
        let status = broker.get("/status.json").json();
        assert!(names_problem(&status, text) && kinds(&status).contains(&"name_in_use"), "{status}");
        assert!(broker.get("/readyz").body.contains(text));
    }
    let _workers = [&stack, &other].map(|stack| stack.program("wgkex-worker", &[]));
    for server in worker_listen {
        in_use(server, "wgkex_worker_mqtt_name_in_use");
        let status = Http::connect(server).get("/status.json").json();
        assert!(names_problem(&status, "another program may use this worker's name"), "{status}");
    }
    let _ = stack.mosquitto().end_by(Signal::SIGKILL);
    for (server, text) in [
        (stack.http, "another program may use the MQTT client ids of this broker"),
        (other.http, "another program may use the MQTT client ids of this broker"),
        (worker_listen[0], "another program may use this worker's name"),
        (worker_listen[1], "another program may use this worker's name"),
    ] {
        let ready = wait_until("it is not ready", || {
            let ready = Http::connect(server).get("/readyz");
            (ready.status == 503).then_some(ready)
        });
        assert!(ready.body.contains(text), "{}", ready.body);
    }
}

/// The workers report it in their hellos, as the server is not the broker's.
#[test]
fn a_gateway_whose_name_two_workers_use_is_a_problem_of_the_broker() {
    let [(mut stack, _), (other, _)] = two_of_one_name();
    let _first = stack.program("wgkex-worker", &[]);
    let mut second = other.program("wgkex-worker", &[]);
    let text = "two programs seem to use its name";
    stack.wait_for_metric("wgkex_broker_mqtt_name_in_use", 1.0);
    assert!(names_problem(&stack.get("/status.json").json(), text));
    assert!(stack.get("/readyz").body.contains(text));
    let shown = run(&stack, &["gateways"]);
    assert!(shown.status.code() == Some(3) && printed(&shown).contains(text), "{shown:?}");
    stack.broker().wait_for_log(text);
    let _ = second.end_by(Signal::SIGTERM);
    wait_within(Duration::from_secs(120), "one is left", || {
        (stack.metric("wgkex_broker_mqtt_name_in_use")? < 0.5).then_some(())
    });
}

#[test]
fn a_refused_domain_is_logged_once_by_its_name_and_nothing_else_of_it() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let mut http = stack.connect();
    let router = key(1);
    let (endless, tricky) = ("x".repeat(300), "ff\\n\\u001b[31m");
    for domain in ["ffx_renamed", "ffx_renamed", router.as_str(), &endless, tricky] {
        for _ in 0..3 {
            assert_eq!(http.post(V2, &ask(domain, &router)).status, 400);
        }
    }
    let line = stack.broker().wait_for_log("ff???31m");
    assert!(line.contains("WARN"), "{line}");
    let log = stack.broker().log();
    assert_eq!(log.matches("ffx_renamed").count(), 1, "{log}");
    assert!(log.contains(&router[..8]) && !log.contains(&router) && !log.contains("xxxxxxxxx"), "{log}");
    for n in 0..100 {
        assert_eq!(http.post(V2, &ask(&format!("ffx_{n}"), &router)).status, 400);
    }
    let lines = stack.broker().log().lines().filter(|line| line.contains("is not served here")).count();
    assert!(lines <= 10, "{lines}");
}

#[test]
fn an_allow_list_that_was_never_read_is_what_readyz_log_and_status_say() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("allow.yaml");
    let config = format!("allowlist: {{enabled: true, file: {}, refresh_interval: 0.1}}", file.display());
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config(&config));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let line = stack.broker().wait_for_log("was never read since the start");
    assert!(line.contains("WARN") && line.contains("every key that no admin call allows is refused"), "{line}");
    let ready = stack.get("/readyz");
    assert!(ready.body.contains("allowlist.file was never read since the start: every key"), "{ready:?}");
    wait_for_kinds(&stack, &["allow_list_unread"]);
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 403);
    fs::write(&file, format!("{DOMAIN}: [\"{}\"]\n", key(1))).unwrap();
    wait_for_kinds(&stack, &[]);
    assert_eq!((stack.get("/readyz").body.as_str(), stack.v2(DOMAIN, &key(1)).status), ("ready\n", 200));
}

fn operated(config: &str) -> (Stack, Operator) {
    let (operator, more) = Operator::new();
    (Stack::start(Plan::new(Bus::Embedded).config(config).config(&more)), operator)
}

#[test]
fn allowing_a_key_where_all_may_come_warns_that_it_has_no_effect() {
    let (stack, operator) = operated("");
    let allowed = operator.run(&stack, &["allow", &key(1)]);
    let said = String::from_utf8_lossy(&allowed.stderr).into_owned();
    assert_eq!(allowed.status.code(), Some(0), "{said}");
    assert!(said.starts_with("warning: ") && said.contains("no effect until allowlist.enabled is true"), "{said}");
    let answer = operator.call("POST", "/v1/lists/allow", &json!({ "key": key(2) })).json();
    assert!(answer["warning"].as_str().unwrap().contains("allowlist.enabled"), "{answer}");
    for arguments in [["allow", "--remove", &key(1)].as_slice(), &["trust", &key(1)], &["revoke", &key(3)]] {
        assert_eq!(operator.run(&stack, arguments).stderr, b"", "{arguments:?}");
    }
    let (stack, operator) = operated("allowlist: {enabled: true}");
    assert_eq!(operator.run(&stack, &["allow", &key(1)]).stderr, b"");
}

#[test]
fn an_admin_command_that_reaches_no_broker_names_the_address_that_it_tried() {
    let (mut stack, operator) = operated("");
    let _ = stack.stop_broker();
    let failed = operator.run(&stack, &["where", &key(1)]);
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1));
    let expected = format!("error: no broker answers on {} (admin_listen): is it running", operator.address);
    assert!(said.starts_with(&expected) && said.contains("admin_token_hash"), "{said}");
    assert!(!said.contains(&operator.token), "{said}");
}

fn asked(operator: &Operator, path: &str) -> Value {
    let answer = operator.call("GET", path, &Value::Null);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn encoded(key: &str) -> String {
    key.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
}

#[test]
fn where_shows_the_gateways_of_a_key_and_what_the_lists_say() {
    let (mut stack, operator) = operated("");
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let (ours, unknown) = (key(1), key(2));
    assert_eq!(stack.v2(DOMAIN, &ours).status, 200);
    let path = format!("/v1/where?key={}", encoded(&ours));
    let found = asked(&operator, &path);
    let here = &found["domains"][0];
    assert_eq!(
        (&here["domain"], &here["state"], &here["access"]),
        (&json!(DOMAIN), &json!("unestablished"), &json!("allowed"))
    );
    assert_eq!(here["confirmed_by"], json!([{ "gateway": "gw1", "online": true }]), "{found}");
    let seen = json!({ "domain": DOMAIN, "keys": [ours] }).to_string();
    worker.probe.publish(wgkex_tests::probe::message("wgkex/worker/gw1/seen", seen, 1, false));
    let established = wait_until("the handshake is known", || {
        let found = asked(&operator, &path);
        (found["domains"][0]["state"] == "established").then_some(found)
    });
    assert_eq!(established["domains"][0]["last_handshake_at"], "gw1");
    let text = printed(&operator.run(&stack, &["where", &ours]));
    assert!(text.contains("ffx_a: live, established") && text.contains("confirmed by: gw1, last "), "{text}");
    assert!(text.contains("last handshake reported: ") && text.contains(" ago at gw1"), "{text}");
    let text = printed(&operator.run(&stack, &["where", &unknown]));
    assert_eq!(
        text,
        "no router has sent this key here since it was last forgotten or denied, and no gateway has reported it\n"
    );
    assert!(operator.run(&stack, &["revoke", &unknown, "--reason", "spam"]).status.code().is_some());
    let text = printed(&operator.run(&stack, &["where", &unknown]));
    assert!(text.contains("on the list deny  by: admin  reason: spam"), "{text}");
    assert_eq!(asked(&operator, &format!("/v1/where?key={}", encoded(&unknown)))["domains"][0]["access"], "denied");
    let json: Value = serde_json::from_slice(&operator.run(&stack, &["where", &ours, "--json"]).stdout).unwrap();
    assert_eq!(json["key"], *ours);
    let log = stack.broker().log();
    assert!(log.contains("call=\"where\"") && !log.contains(&ours), "{log}");

    for (path, named) in [
        ("/v1/where", "key: is missing"),
        ("/v1/where?key=x", "key: not a WireGuard"),
        ("/v1/where?key=x&domain=ffx_a", "a parameter is not known"),
        ("/v1/explain?domain=ffx_a", "key: is missing"),
        (&format!("/v1/explain?key={}&domain=ffx_none", encoded(&ours)), "domain: "),
    ] {
        let refused = operator.call("GET", path, &Value::Null);
        let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(refused.status == 400 && message.contains(named), "{path}: {message}");
    }
    for path in ["/v1/where?key=x", "/v1/explain?key=x"] {
        assert_eq!(Http::connect(operator.address).get(path).status, 401, "only with the token");
        assert_eq!(operator.call("OPTIONS", path, &Value::Null).status, 200);
        assert_eq!(operator.call("POST", path, &json!({})).status, 405);
    }
}

#[test]
fn explain_names_the_gateway_that_a_request_gets_and_changes_nothing() {
    let limits = "limits: {per_client: {burst: 0}, per_key: {burst: 2, per_second: 0.001}, per_domain: {burst: 3, per_second: 0.001}}";
    let config = format!("workers: {{gw1: {{weight: 2}}, gw2: {{weight: 1}}, gw3: {{weight: 1}}}}\n{limits}");
    let (stack, operator) = operated(&config);
    let _workers =
        [("gw1", 9), ("gw2", 1)].map(|(name, peers)| Worker::start(&stack, name, WorkerBehaviour::Confirms, peers));
    let gone = stack.probe(wgkex_tests::probe::Role::new("gw3", &[]));
    gone.publish_all([hello("gw3"), data("gw3", DOMAIN), status("gw3", "0")]);
    stack.wait_for_metric(r#"wgkex_broker_gateways{state="offline"}"#, 1.0);
    stack.wait_for_gateways(2);
    let path = |n| format!("/v1/explain?key={}", encoded(&key(n)));
    let explained = |n| asked(&operator, &path(n))["domains"][0].clone();
    // The time since when gateway 3 is offline changes every second.
    let without_time = |mut explained: Value| {
        let unfit = &mut explained["standings"][2]["unfit"];
        *unfit = unfit.as_str().and_then(|unfit| unfit.split(", offline for").next()).into();
        explained
    };
    let first = explained(1);
    for _ in 0..50 {
        assert_eq!(without_time(explained(1)), without_time(first.clone()), "asking is no request");
    }
    assert_eq!(
        (&first["gateway"], &first["refused"], &first["is_new"]),
        (&json!("gw2"), &Value::Null, &json!(true)),
        "{first}"
    );
    let standings = first["standings"].as_array().unwrap();
    let numbers = |n: usize| {
        ["connected", "assigned", "share", "target", "distance"].map(|field| standings[n][field].as_f64().unwrap())
    };
    assert_eq!((numbers(0), numbers(1)), ([9.0, 0.0, 0.5, 5.0, 4.0], [1.0, 0.0, 0.25, 2.5, -1.5]), "{first}");
    assert!(standings[2]["unfit"].as_str().unwrap().starts_with("offline: "), "{first}");
    let assigned = r#"wgkex_broker_gateway_assigned{domain="ffx_a",gateway="gw2"}"#;
    assert_eq!(stack.metric(assigned), Some(0.0));
    let answer = stack.v2(DOMAIN, &key(1));
    assert_eq!(answer.json()["Endpoint"]["Address"], "gw2.example", "{answer:?}");
    assert_eq!(stack.metric(assigned), Some(1.0));
    assert_eq!(explained(1)["is_new"], false);

    // The limit of the domain: three new keys, one of which was requested before.
    assert_eq!([2, 3, 4].map(|n| stack.v1(DOMAIN, &key(n)).status), [200, 200, 429]);
    let limited = explained(5);
    assert_eq!(
        (&limited["refused"]["status"], &limited["refused"]["reason"]),
        (&json!(429), &json!("limit_domain")),
        "{limited}"
    );
    assert!(operator.run(&stack, &["revoke", &key(6), "--reason", "spam"]).status.code().is_some());
    let denied = printed(&operator.run(&stack, &["explain", &key(6), "--domain", DOMAIN]));
    assert!(denied.starts_with("ffx_a: refused with 403 (denied): it is on the list deny by admin\n"), "{denied}");
    assert!(denied.contains("would otherwise get gw2, as it is the furthest below its target"), "{denied}");
    let gateway = asked(&operator, &format!("/v1/explain?key={}", encoded(&gateway_key("gw1"))))["domains"][0].clone();
    assert_eq!(gateway["refused"]["reason"], "limit_domain", "as a request hears: limits come first");
    let text = printed(&operator.run(&stack, &["explain", &key(1)]));
    assert!(text.contains("ffx_a: would get gw2, as") && text.contains("now:\nffx_a: live"), "{text}");
    let json = operator.run(&stack, &["explain", &key(1), "--json"]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["where"]["domains"][0]["state"], "unestablished");
}

#[test]
fn explain_names_what_stands_in_the_way_of_a_key() {
    let (stack, operator) = operated("");
    let nobody = asked(&operator, &format!("/v1/explain?key={}", encoded(&key(1))))["domains"][0].clone();
    assert_eq!((&nobody["refused"]["reason"], &nobody["gateway"]), (&json!("no_gateway"), &Value::Null));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let own = asked(&operator, &format!("/v1/explain?key={}", encoded(&gateway_key("gw1"))))["domains"][0].clone();
    assert_eq!(own["refused"]["reason"], "reserved");
    assert_eq!(stack.v2(DOMAIN, &gateway_key("gw1")).status, 403);
}

#[test]
fn a_router_is_waited_for_until_its_gateway_reports_a_handshake() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let routers = |state| format!(r#"wgkex_broker_gateway_routers{{gateway="gw1",state="{state}"}}"#);
    for n in 1..=2 {
        assert_eq!(stack.v2(DOMAIN, &key(n)).status, 200);
    }
    stack.wait_for_metric(&routers("waiting"), 2.0);
    let payload = json!({ "domain": DOMAIN, "keys": [key(1)] });
    worker.probe.publish(message("wgkex/worker/gw1/seen", payload.to_string(), 1, false));
    stack.wait_for_metric(&routers("reached"), 1.0);
    stack.wait_for_metric(&routers("waiting"), 1.0);
    assert_eq!(stack.metric(&routers("unreached")), Some(0.0));
}
