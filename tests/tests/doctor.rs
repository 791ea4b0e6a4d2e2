//! `wgkex-broker doctor` names the problems of a broker, and changes nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{Uid, User};
use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use serde_json::Value;
use wgkex_tests::http::ask;
use wgkex_tests::key;
use wgkex_tests::process::{binary, hash};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, data, hello_sent, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V2, free_address};
use wgkex_tests::wait_until;

/// Its exit code and output.
struct DoctorOutput {
    code: i32,
    text: String,
}

/// Runs it with a stack's config, for files of the user of the tests.
fn doctor(stack: &Stack, arguments: &[&str]) -> DoctorOutput {
    doctor_for(stack, &User::from_uid(Uid::effective()).unwrap().unwrap().name, arguments)
}

fn doctor_for(stack: &Stack, user: &str, arguments: &[&str]) -> DoctorOutput {
    let mut command = Command::new(binary("wgkex-broker"));
    command.args(["doctor", "--user", user]).args(arguments).env("WGKEX_CONFIG_FILE", stack.config_file());
    let output = command.output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    DoctorOutput { code: output.status.code().unwrap(), text: String::from_utf8(output.stdout).unwrap() }
}

/// It reports nothing but `allowed`, and the machine's own clock.
fn assert_no_other_problem(stack: &Stack, allowed: &[&str]) -> String {
    let DoctorOutput { code, text } = doctor(stack, &[]);
    let lines = text.lines().filter(|line| !line.starts_with("ok ") && !line.starts_with("checks: "));
    let troubles: Vec<_> = lines.collect();
    let is_allowed = |line: &str| line.starts_with("warn clock: ") || allowed.iter().any(|part| line.starts_with(part));
    assert!(troubles.iter().all(|line| is_allowed(line)), "{text}");
    assert!(allowed.iter().all(|part| text.contains(part)), "{text}");
    assert_eq!(code, i32::from(!troubles.is_empty()), "{text}");
    text
}

/// It prints a line that begins like this and has this advice, and its exit code is at least that of the line's level.
fn assert_reports(stack: &Stack, trouble: &str, advice: &str) {
    let DoctorOutput { code, text } = doctor(stack, &[]);
    let line = text.lines().find(|line| line.starts_with(trouble));
    assert!(line.is_some_and(|line| line.contains(advice)), "{trouble} ... {advice} is not in {text}");
    let least = if trouble.starts_with("fail") { 3 } else { 1 };
    assert!(code >= least, "{code}: {text}");
}

/// A certificate that ends at `not_after`, and its key, as cert.pem and key.pem.
fn issue(stack: &Stack, not_after: Option<i32>) {
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    if let Some(year) = not_after {
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
    }
    let key = KeyPair::generate().unwrap();
    fs::write(stack.dir().join("cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    fs::write(stack.dir().join("key.pem"), key.serialize_pem()).unwrap();
}

#[test]
fn a_broker_on_which_all_is_well_passes_and_a_stopped_one_is_a_finding() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 7);
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    let text = assert_no_other_problem(&stack, &[]);
    for part in [
        "ok   config: it is valid\n",
        "and is ready\n",
        "ok   fleet: gateways online: 1, and no problem\n",
        "ok   broker_listen: the running broker listens on ",
        "ok   mqtt_listen: the running broker listens on ",
        "ok   mqtt_listen: only programs of this machine reach it",
        "ok   state: the running broker writes to ",
        "ok   state: the running broker has its state file\n",
        "ok   files: the running broker may open ",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let DoctorOutput { text, .. } = doctor(&stack, &["--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert!(json["worst"] != "fail" && json["findings"].as_array().unwrap().len() >= 10, "{json}");
    assert!(!text.contains(&key(1)[..10]), "{text}");
    assert!(stack.stop_broker().success());
    let before = files(&stack);
    let text = assert_no_other_problem(&stack, &["warn broker: none runs here"]);
    assert!(text.contains("systemctl start wgkex-broker") && text.contains(" is free\n"), "{text}");
    assert_eq!(files(&stack), before, "it changes nothing");
}

fn files(stack: &Stack) -> Vec<String> {
    let entries = fs::read_dir(stack.state_dir()).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> =
        entries.map(|entry| format!("{} {}", entry.file_name().display(), entry.metadata().unwrap().len())).collect();
    files.sort();
    files
}

#[test]
fn a_config_that_is_not_valid_is_its_first_finding() {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    stack.plan.config = "broker_listn: x\nlive_keys: {ttl: x}".into();
    stack.write_config();
    let DoctorOutput { code, text } = doctor(&stack, &[]);
    assert!(code == 3 && text.starts_with("fail config: "), "{text}");
}

#[test]
fn each_fault_of_another_mqtt_server_is_named() {
    let plan = Plan { credentials: Some(("wgkex".into(), "right".into())), ..Plan::new(Bus::Mosquitto) };
    let mut stack = Stack::prepare(plan);
    let mqtt = stack.mqtt;
    assert_reports(&stack, &format!("fail MQTT: {mqtt}: "), "start the MQTT server");
    stack.start_mosquitto();
    stack.start_broker();
    stack.wait_until_ready();
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 7);
    stack.wait_for_gateways(1);
    let text = assert_no_other_problem(&stack, &[]);
    for part in [
        &format!("ok   MQTT: {mqtt} lets the broker in\n"),
        "ok   MQTT: it may subscribe to all that it needs\n",
        "ok   MQTT: what it publishes below wgkex/ comes back\n",
        "ok   MQTT: workers whose hello is retained: 1, as the running broker has it\n",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!stack.broker().log().contains("MQTT not connected"), "it kept its connections");
    stack.plan.credentials = Some(("wgkex".into(), "wrong".into()));
    stack.write_config();
    assert_reports(
        &stack,
        &format!("fail MQTT: {mqtt}: the server refuses the user name or password"),
        "mqtt.password",
    );
}

#[test]
fn a_server_with_tls_is_not_taken_for_one_without() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto).domains(["ffx_a.b"]));
    issue(&stack, None);
    let dir = stack.dir().display().to_string();
    stack.plan.mosquitto = format!("certfile {dir}/cert.pem\nkeyfile {dir}/key.pem");
    stack.start_mosquitto();
    let trouble = format!("fail MQTT: {}: the server speaks TLS on this port", stack.mqtt);
    assert_reports(&stack, &trouble, "set mqtt.tls to true");

    // Nor for a server that accepts no dot in a name.
    stack.start_broker();
    let line = stack.broker().wait_for_log("MQTT not connected");
    assert!(line.contains("the server speaks TLS on this port: set mqtt.tls to true"), "{line}");
    let attempts = |stack: &mut Stack| stack.mosquitto().log().matches("wrong version number").count();
    let before = attempts(&mut stack);
    wait_until("it has tried again and again", || (attempts(&mut stack) > before + 7).then_some(()));
    assert!(!stack.broker().log().contains("NATS"), "{}", stack.broker().log());
}

#[test]
fn certificates_that_have_ended_or_end_soon_are_named() {
    let https = free_address();
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    let dir = stack.dir().display().to_string();
    let files = format!("cert_file: {dir}/cert.pem, key_file: {dir}/key.pem");
    let (ip, port) = (stack.http.ip(), stack.http.port());
    stack.plan.config =
        format!("broker_listen: {{host: {ip}, port: {port}, tls: {{port: {}, {files}}}}}", https.port());
    stack.plan.listen = format!("tls: {{{files}}}");
    stack.write_config();
    for section in ["broker_listen.tls", "mqtt_listen.tls"] {
        assert_reports(&stack, &format!("fail {section}: {section}.cert_file {dir}/cert.pem: "), "PEM");
    }
    issue(&stack, Some(2020));
    for section in ["broker_listen.tls", "mqtt_listen.tls"] {
        assert_reports(&stack, &format!("fail {section}: {dir}/cert.pem has expired, "), "renew it");
    }
    issue(&stack, None);
    let text = assert_no_other_problem(&stack, &["warn broker: none runs here"]);
    assert!(text.contains(&format!("ok   mqtt_listen.tls: {dir}/cert.pem has its key, and expires in ")), "{text}");
    fs::write(stack.dir().join("key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert_reports(&stack, &format!("fail mqtt_listen.tls: mqtt_listen.tls.key_file {dir}/key.pem: "), "its own key");
}

/// The service manager creates them when it starts the unit.
#[test]
fn a_certificate_that_is_a_credential_of_the_unit_is_not_checked_while_that_does_not_run() {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    issue(&stack, None);
    let key = "/run/credentials/no-such-unit.service/tls-key";
    stack.plan.listen = format!("tls: {{cert_file: {}/cert.pem, key_file: {key}}}", stack.dir().display());
    stack.write_config();
    let text = assert_no_other_problem(&stack, &["warn broker: none runs here"]);
    let line = format!("ok   mqtt_listen.tls: {key} is there only while the unit runs: it is not checked\n");
    assert!(text.contains(&line), "{text}");
}

#[test]
fn a_used_port_is_named_with_its_process() {
    let stack = Stack::prepare(Plan::new(Bus::Embedded));
    let taken = TcpListener::bind(stack.mqtt).unwrap();
    let this = std::process::id();
    assert_reports(&stack, &format!("fail mqtt_listen: {} is taken by process {this} ", stack.mqtt), "end that");
    drop(taken);
    let _taken = TcpListener::bind(stack.http).unwrap();
    assert_reports(&stack, &format!("fail broker_listen: {} is taken by process {this} ", stack.http), "end that");
    assert_reports(&stack, "fail broker: no broker answers on ", "see below which process has the port");
}

#[test]
fn the_problems_of_the_running_broker_are_lines() {
    let stack = Stack::start(Plan::new(Bus::Embedded).domains([DOMAIN, "ffx_b"]).config("workers: {gw9: {}}"));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 7);
    stack.wait_for_gateways(1);
    assert_reports(
        &stack,
        "warn fleet: gateway gw9, which the config names, is offline: it has published nothing",
        "workers",
    );
    worker.probe.publish(peers_of("gw1", "ffx_b", "-1"));
    wait_until("the domain is down", || {
        doctor(&stack, &[]).text.contains("fail fleet: domain ffx_b: no gateway is online").then_some(())
    });
    assert_reports(&stack, "fail fleet: domain ffx_b: no gateway is online", "`wgkex-broker gateways` shows why");
    assert_reports(&stack, "warn fleet: gateway gw1, domain ffx_b: interface missing", "`wgkex-worker doctor`");
}

#[test]
fn a_gateway_that_counts_a_domain_without_data_is_named() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let probe = stack.probe(wgkex_tests::probe::Role::new("gw1", &[]));
    probe.publish_all([wgkex_tests::scripted::hello("gw1"), peers_of("gw1", DOMAIN, "0"), status("gw1", "1")]);
    stack.wait_for_gateways(1);
    assert_reports(&stack, "fail fleet: gateway gw1, domain ffx_a: it has published no data", "`wgkex-worker doctor`");
}

/// The age of a retained hello is unknown.
#[test]
fn a_gateway_whose_clock_is_off_is_named_by_its_live_hellos() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_mosquitto();
    let worker = stack.probe(wgkex_tests::probe::Role::new("gw1", &[]));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    worker.publish_all([
        hello_sent("gw1", now - 86_400),
        data("gw1", DOMAIN),
        peers_of("gw1", DOMAIN, "0"),
        status("gw1", "1"),
    ]);
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_gateways(1);
    assert_no_other_problem(&stack, &[]);
    worker.publish_all([hello_sent("gw1", now + 3_600), hello_sent("gw1", now + 3_660)]);
    let named = "gateway gw1: its clock is 3";
    wait_until("it is named", || doctor(&stack, &[]).text.contains(named).then_some(()));
    assert_reports(&stack, &format!("warn clock: {named}"), "synchronise both machines: `timedatectl set-ntp true`");
    assert!(stack.get("/").body.contains(named) && stack.broker().wait_for_log(named).contains("WARN"));
    worker.publish(hello_sent("gw1", now + 30));
    stack.broker().wait_for_log("over: gateway gw1: its clock is");
    assert_no_other_problem(&stack, &[]);
}

#[test]
fn workers_without_a_user_and_users_without_a_worker_are_named() {
    let user = |name: &str| format!("{name}: {{password_hash: \"{}\"}}", hash(name));
    let listen = format!("users: {{{}, {}}}", user("gw1"), user("gw3"));
    let stack = Stack::start(Plan::new(Bus::Embedded).listen(&listen).config("workers: {gw1: {}, gw2: {}}"));
    assert_reports(&stack, "warn mqtt_listen.users: workers names gw2, which cannot connect", "hash-password");
    assert_reports(&stack, "warn mqtt_listen.users: no worker is known that uses gw3", "take the user out");
}

#[test]
fn a_proxy_that_is_not_trusted_is_named_by_its_address() {
    let limits = "limits: {per_client: {burst: 9}}";
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config(limits));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    assert_no_other_problem(&stack, &[]);
    let (body, client) = (ask(DOMAIN, &key(1)), "198.51.100.7");
    let forwarded = format!("X-Forwarded-For: {client}");
    assert_eq!(stack.connect().request("POST", V2, &[&forwarded], body.as_bytes()).status, 200);
    assert_reports(
        &stack,
        "warn trusted_proxies: proxy 127.0.0.1 is not in trusted_proxies",
        "add its address to trusted_proxies",
    );
    let status = stack.get("/status.json");
    assert_eq!(status.json()["problems"][0]["kind"], "proxy_not_trusted");
    let (log, DoctorOutput { text, .. }) = (stack.broker().log(), doctor(&stack, &[]));
    assert!(log.contains("not in trusted_proxies") && log.contains("proxy=127.0.0.1"), "{log}");
    assert!([&status.body, &log, &text].iter().all(|text| !text.contains(client)), "the client is not named");
}

#[test]
fn a_state_directory_that_is_not_writable_is_named() {
    let stack = Stack::prepare(Plan::new(Bus::Embedded));
    let (dir, mode) = (stack.state_dir(), |mode| fs::Permissions::from_mode(mode));
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, mode(0o500)).unwrap();
    let user = User::from_uid(Uid::effective()).unwrap().unwrap().name;
    let dir = dir.display();
    let trouble = format!("fail state: {user} cannot write to {dir}: ");
    assert_reports(&stack, &trouble, &format!("`install -d -m 700 -o {user} {dir}`"));
    fs::set_permissions(stack.state_dir(), mode(0o700)).unwrap();
    assert_no_other_problem(&stack, &["warn broker: none runs here"]);
    let DoctorOutput { code, text } = doctor_for(&stack, "no such user", &[]);
    assert!(code == 3 && text.contains("there is no user no such user"), "{text}");
}

#[test]
fn a_list_that_is_missing_is_named_and_so_is_one_that_the_running_broker_cannot_read() {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    let list = stack.dir().join("denied");
    stack.plan.config = format!("blacklist_file: {}", list.display());
    stack.write_config();
    assert_reports(&stack, &format!("fail blacklist_file: {} is missing", list.display()), "write it");
    fs::write(&list, "[]").unwrap();
    let text = assert_no_other_problem(&stack, &["warn broker: none runs here"]);
    assert!(text.contains("ok   blacklist_file: "), "{text}");
    fs::write(&list, format!("- {}\n\t- {}\n", key(1), key(2))).unwrap();
    let named = format!("fail blacklist_file: {}: line 2: must begin with spaces, not with a tab", list.display());
    assert_reports(&stack, &named, "correct it");
    stack.start_broker();
    stack.wait_until_ready();
    assert_reports(&stack, "fail lists: blacklist_file cannot be read", "log");
    assert_reports(&stack, &named, "correct it");
}
