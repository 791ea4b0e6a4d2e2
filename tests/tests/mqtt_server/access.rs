//! Users and their rights.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;

use rumqttc::{Connect, ConnectReturnCode, Login, Packet, QoS, SubscribeReasonCode};
use serde_json::Value;
use wgkex_tests::probe::{Probe, Role, message};
use wgkex_tests::process::{Process, binary, hash};
use wgkex_tests::raw_client::{RawClient, connect, connect_with_will};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, endpoint, key_for, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{key, wait_until};

/// A server with these users; all probes log in with user name and password `gw1`.
pub fn stack(users: &[(&str, &str)]) -> Stack {
    Stack::start(plan(users, ""))
}

/// The plan of such a server, with more keys of `mqtt_listen`.
pub fn plan(users: &[(&str, &str)], more: &str) -> Plan {
    let users: Vec<_> = users
        .iter()
        .map(|(name, role)| format!("{name}: {{password_hash: \"{}\", role: {role}}}", hash(name)))
        .collect();
    let mut plan = Plan::new(Bus::Embedded).listen(&format!("users: {{{}}}{more}", users.join(", ")));
    plan.credentials = Some(("gw1".into(), "gw1".into()));
    plan
}

/// The CONNECT of a user whose password is its name.
pub fn as_user(name: &str, id: &str) -> Connect {
    Connect { login: Some(Login::new(name, name)), ..connect(id) }
}

/// Such a user whose login is accepted.
pub fn join(stack: &Stack, name: &str, id: &str) -> RawClient {
    let (raw, code) = RawClient::try_connect(stack.mqtt, &as_user(name, id));
    assert_eq!(code, Some(ConnectReturnCode::Success), "{name} as {id}");
    raw
}

/// Two gateways and a broker.
pub const TWO: [(&str, &str); 3] = [("gw1", "worker"), ("gw2", "worker"), ("b", "broker")];

#[test]
fn each_refused_client_is_logged_once_with_the_reason() {
    let mut stack = stack(&TWO);
    let refused = |connect: &Connect| {
        for _ in 0..3 {
            let (mut raw, code) = RawClient::try_connect(stack.mqtt, connect);
            assert!(code.is_some_and(|code| code != ConnectReturnCode::Success), "{code:?}");
            raw.wait_for_end();
        }
    };
    refused(&Connect { login: Some(Login::new("gw1", "wrong")), ..connect("gw1") });
    refused(&Connect { login: Some(Login::new("gw\n9", "gw1")), ..connect("gw9") });
    refused(&connect("anonymous"));
    refused(&as_user("gw1", "host1"));
    drop(std::net::TcpStream::connect(stack.mqtt).unwrap());
    stack.broker().wait_for_log("it does not speak MQTT");
    let log = stack.broker().log();
    for (level, user, client, reason) in [
        ("WARN", Some("gw1"), "gw1", "wrong password"),
        ("WARN", Some("gw\\n9"), "gw9", "mqtt_listen.users has no user of this name"),
        ("WARN", None, "anonymous", "it gives no user and password"),
        ("WARN", Some("gw1"), "host1", "begins with its user name: that has to be its host name"),
    ] {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(reason)).collect();
        let [line] = lines.as_slice() else { panic!("{reason}: {lines:?}") };
        assert!(line.contains(level) && line.contains(&format!("client=\"{client}\"")), "{line}");
        assert!(user.is_none_or(|user| line.contains(&format!("user=\"{user}\""))), "{line}");
    }

    // Operators also see refused clients without the log: neither connections without MQTT, nor addresses. A client may
    // see the end of its connection before it is counted.
    let refused = wait_until("all are counted", || {
        let refused = stack.get("/status.json").json()["refused_clients"].clone();
        let counted: u64 = refused.as_array()?.iter().filter_map(|client| client["count"].as_u64()).sum();
        (counted >= 12).then_some(refused)
    });
    assert_eq!(refused.as_array().unwrap().len(), 4, "{refused}");
    for (user, client, reason) in [
        (Some("gw1"), "gw1", "password"),
        (Some("gw\n9"), "gw9", "password"),
        (None, "anonymous", "password"),
        (Some("gw1"), "host1", "client_id"),
    ] {
        let is_it = |shown: &&Value| shown["user"].as_str() == user && shown["client"] == client;
        let shown = refused.as_array().unwrap().iter().find(is_it).unwrap();
        assert_eq!((&shown["reason"], &shown["count"]), (&reason.into(), &3.into()), "{shown}");
    }
    assert!(!refused.to_string().contains("127.0.0.1"), "{refused}");
    let page = stack.get("/").body;
    assert!(page.contains("Refused MQTT clients") && page.contains("wrong password"), "{page}");
    let mut command = Command::new(binary("wgkex-broker"));
    let output = command.arg("status").env("WGKEX_CONFIG_FILE", stack.config_file()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("REFUSED MQTT USER") && text.contains("host1"), "{text}");
}

#[test]
fn a_wrong_password_is_refused_and_the_right_one_admitted() {
    let mut stack = stack(&TWO);
    let wrong = |login: Option<Login>| Connect { login, ..connect("gw1") };
    for login in [
        None,
        Some(Login::new("gw1", "wrong")),
        Some(Login::new("gw1", "gw2")),
        Some(Login::new("gw1", "")),
        Some(Login::new("gw3", "gw1")),
        Some(Login::new("/", "gw1")),
    ] {
        let (mut raw, code) = RawClient::try_connect(stack.mqtt, &wrong(login.clone()));
        assert_eq!(code, Some(ConnectReturnCode::NotAuthorized), "{login:?}");
        raw.wait_for_end();
    }
    stack.wait_for_metric(r#"wgkex_broker_mqtt_refused_total{reason="password"}"#, 6.0);
    let warnings = stack.broker().log().lines().filter(|line| line.contains("wrong password")).count();
    assert_eq!(warnings, 1, "{}", stack.broker().log());
    assert!(!stack.broker().log().contains("argon2id"));
    let _ = join(&stack, "gw1", "gw1");
}

/// Passwords are verified two at a time; clients that wait longer than allowed may be refused, too.
#[test]
fn wrong_passwords_keep_no_client_out_that_logged_in_before() {
    let stack = stack(&TWO);
    let _ = join(&stack, "gw1", "gw1");
    let mut crowd: Vec<_> = (0..200).map(|_| RawClient::connect_tcp(stack.mqtt)).collect();
    let wrong = Connect { login: Some(Login::new("gw1", "wrong")), ..connect("gw1") };
    for stranger in &mut crowd {
        stranger.send(&Packet::Connect(wrong.clone()));
    }
    let _ = join(&stack, "gw1", "gw1");
    for stranger in &mut crowd {
        match stranger.read() {
            Some(Packet::ConnAck(ack)) => assert!(
                [ConnectReturnCode::NotAuthorized, ConnectReturnCode::ServiceUnavailable].contains(&ack.code),
                "{ack:?}"
            ),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_worker_may_do_its_own_work_and_nothing_else() {
    let mut stack = stack(&TWO);
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 3);
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(1)).json(), endpoint("gw1"));
    assert_eq!(worker.probe.next_on(&key_for(DOMAIN, "").topic).text(), key(1));

    let (mut witness, mut rogue) = (join(&stack, "b", "witness"), join(&stack, "gw2", "gw2-rogue"));
    let refused = [SubscribeReasonCode::Failure];
    for filter in ["#", "wireguard/#", "wgkex/worker/gw1/pages", "wireguard-metrics/+/+/connected_peers", "wgkex/#"] {
        assert_eq!(rogue.subscribe(&[(filter, QoS::AtMostOnce)]), refused, "{filter}");
    }
    witness.subscribe(&[("wireguard/#", QoS::AtMostOnce), ("wireguard-metrics/#", QoS::AtMostOnce)]);
    while witness.receive().topic != peers_of("gw1", DOMAIN, "").topic {}
    for message in
        [key_for(DOMAIN, &key(2)), peers_of("gw1", DOMAIN, "999"), status("gw1", "0"), message("other", "x", 1, true)]
    {
        rogue.publish(&message.topic, message.payload, 1, message.retain);
        assert!(matches!(rogue.read(), Some(Packet::PubAck(_))), "{}", message.topic);
    }
    let own = peers_of("gw2", DOMAIN, "7");
    rogue.publish(&own.topic, own.payload, 1, true);
    assert_eq!(witness.receive().topic, own.topic, "nothing of the rest is heard");
    stack.wait_for_metric(r#"wgkex_broker_mqtt_forbidden_total{verb="publish"}"#, 4.0);
    stack.wait_for_metric(r#"wgkex_broker_mqtt_forbidden_total{verb="subscribe"}"#, 5.0);
    let warnings = wait_until("a warning", || {
        let log = stack.broker().log();
        let warnings: Vec<_> = log.lines().filter(|line| line.contains("not allowed")).map(str::to_owned).collect();
        (!warnings.is_empty()).then_some(warnings)
    });
    assert!(warnings.len() == 1 && warnings[0].contains("gw2"), "{warnings:?}");
    // gw2 by its own count, and gw1 still.
    stack.wait_for_gateways(2);
    let (_, code) = RawClient::try_connect(
        stack.mqtt,
        &Connect { login: Some(Login::new("gw2", "gw2")), ..connect_with_will("gw2", &status("gw1", "").topic, "0") },
    );
    assert_eq!(code, Some(ConnectReturnCode::NotAuthorized), "a will for another worker");
}

/// Fails without the limit per user.
#[test]
fn a_worker_with_all_the_retained_messages_it_may_have_leaves_room_for_others() {
    let mut stack = stack(&TWO);
    let mut greedy = join(&stack, "gw1", "gw1");
    let mut keep = |n: u32| {
        greedy.publish(&format!("wireguard-worker/gw1/{n}/data"), "{}", 1, true);
        assert!(matches!(greedy.read(), Some(Packet::PubAck(_))));
    };
    (0..5_000).for_each(&mut keep);
    let refused = "wgkex_broker_mqtt_retained_refused_total";
    stack.wait_for_metric(refused, 0.0);
    (5_000..5_100).for_each(&mut keep);
    stack.wait_for_metric(refused, 100.0);
    let log = stack.broker().log();
    assert_eq!(log.matches("too many retained messages").count(), 1, "{log}");

    let mut modest = join(&stack, "gw2", "gw2");
    modest.publish("wireguard-worker/gw2/status", "1", 1, true);
    assert!(matches!(modest.read(), Some(Packet::PubAck(_))));
    let mut finder = join(&stack, "b", "finder");
    finder.subscribe(&[("wireguard-worker/gw2/status", QoS::AtLeastOnce)]);
    assert!(finder.receive().retain);
    stack.wait_for_metric(refused, 100.0);
}

#[test]
fn a_worker_cannot_take_anothers_connection_over() {
    let stack = stack(&[("gw1", "worker"), ("gw2", "worker"), ("gw1-applied", "worker"), ("b", "broker")]);
    let (mut first, mut second) = (join(&stack, "gw1", "gw1"), join(&stack, "gw1", "gw1-applied"));
    for id in ["gw1", "gw1-applied", "gw", "gw22"] {
        let (_, code) = RawClient::try_connect(stack.mqtt, &as_user("gw2", id));
        assert_eq!(code, Some(ConnectReturnCode::BadClientId), "{id}");
    }
    // These clients may use such ids; they are distinct all the same.
    let (mut same, mut broker) = (join(&stack, "gw1-applied", "gw1-applied"), join(&stack, "b", "gw1"));
    for raw in [&mut first, &mut second, &mut same, &mut broker] {
        raw.send(&Packet::PingReq);
        assert_eq!(raw.read(), Some(Packet::PingResp));
    }
    let _again = join(&stack, "gw1", "gw1");
    first.wait_for_end();
}

#[test]
fn the_server_listens_on_other_addresses_only_with_users() {
    let users = format!("users: {{gw1: {{password_hash: \"{}\"}}}}", hash("gw1"));
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded).listen(&users));
    stack.plan.credentials = Some(("gw1".into(), "gw1".into()));
    let loopback = stack.mqtt;
    stack.mqtt.set_ip([0, 0, 0, 0].into());
    stack.write_config();
    stack.start_broker();
    stack.wait_until_ready();
    let line = stack.broker().wait_for_log("not encrypted");
    assert!(line.contains("WARN") && line.contains("mqtt_listen.tls"), "{line}");
    let (_, code) = RawClient::try_connect(loopback, &as_user("gw1", "gw1"));
    assert_eq!(code, Some(ConnectReturnCode::Success));
}

/// Mosquitto with a password and an access list for each user of the config.
fn mosquitto_with_acl(stack: &Stack, users: &[&str]) -> Process {
    let (list, passwords) = (stack.dir().join("acl"), stack.dir().join("passwords"));
    let mut command = Command::new(binary("wgkex-broker"));
    let output = command.arg("mqtt-acl").env("WGKEX_CONFIG_FILE", stack.config_file()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    fs::write(&list, output.stdout).unwrap();
    fs::write(&passwords, "").unwrap();
    for name in users {
        let made = Command::new("mosquitto_passwd").arg("-b").arg(&passwords).args([name, name]).status().unwrap();
        assert!(made.success());
    }
    let mut config = format!("listener {} 127.0.0.1\nuser root\npersistence false\n", stack.mqtt.port());
    let _ = write!(config, "password_file {}\nacl_file {}\n", passwords.display(), list.display());
    fs::write(stack.dir().join("acl.conf"), config).unwrap();
    let mosquitto = Process::start("mosquitto", Command::new("mosquitto").arg("-c").arg(stack.dir().join("acl.conf")));
    wait_until("Mosquitto serves", || std::net::TcpStream::connect(stack.mqtt).ok());
    mosquitto
}

#[test]
fn the_printed_access_list_does_the_same_in_mosquitto() {
    let mut plan = Plan::new(Bus::Mosquitto).config("workers: {gw1: {weight: 1}, gw2: {weight: 1}}");
    plan.credentials = Some(("wgkex-broker".into(), "wgkex-broker".into()));
    let mut stack = Stack::prepare(plan);
    let _mosquitto = mosquitto_with_acl(&stack, &["wgkex-broker", "gw1", "gw2"]);
    stack.start_broker();
    stack.wait_until_ready();
    stack.plan.credentials = Some(("gw1".into(), "gw1".into()));
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 3);
    stack.wait_for_gateways(1);
    assert_eq!(stack.v2(DOMAIN, &key(1)).json(), endpoint("gw1"), "it can do its job");

    let user = |name: &str, role: Role| Probe::connect(stack.mqtt, role.credentials(name, name));
    let rogue = user("gw2", Role::new("gw2", &["#"]));
    let witness = user("wgkex-broker", Role::new("witness", &["wireguard/#", "wireguard-metrics/#", "wgkex/#"]));
    rogue.publish_all([key_for(DOMAIN, &key(2)), peers_of("gw1", DOMAIN, "999"), status("gw1", "0")]);
    rogue.publish(peers_of("gw2", DOMAIN, "7"));
    assert_eq!(witness.next_on(&peers_of("gw2", DOMAIN, "7").topic).text(), "7");
    let received = witness.received();
    assert!(!received.iter().any(|message| message.payload == b"999" || message.text() == key(2)), "{received:?}");
    // gw2 by its own count, and gw1 still.
    stack.wait_for_gateways(2);
    assert!(!worker.probe.received().iter().any(|message| message.text() == key(2)));
}
