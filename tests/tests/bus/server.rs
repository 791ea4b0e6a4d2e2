//! MQTT servers that refuse, do not answer, lose messages or are late: the program reports it, and retries.

use std::time::Duration;

use wgkex_tests::in_memory::InMemory;
use wgkex_tests::scripted::{data, endpoint, peers_of, status};
use wgkex_tests::scripted_server::{Behaviour, ScriptedServer};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{host_name, key, wait_until, wait_within};

/// A broker on such a server.
fn broker_on(server: &ScriptedServer) -> Stack {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.mqtt = server.address;
    stack.write_config();
    stack.start_broker();
    wait_until("the broker serves", || wgkex_tests::http::Http::try_connect(stack.http).ok());
    stack
}

fn refusing(filter: &str) -> Behaviour {
    Behaviour { refuses: vec![filter.into()], ..Behaviour::default() }
}

/// Waits until the broker reports that it is not ready, with this reason.
fn wait_until_unready(stack: &Stack, why: &str) {
    wait_until(&format!("not ready: {why}"), || {
        let ready = stack.get("/readyz");
        (ready.status == 503 && ready.body.contains(why) && stack.get("/").body.contains(why)).then_some(())
    });
}

/// Regression: it logged a warning, reported that it is ready, and received nothing.
#[test]
fn a_refused_subscription_keeps_a_broker_from_being_ready_until_it_is_granted() {
    for filter in ["wgkex/worker/+/applied", "wgkex/revocations"] {
        let server = ScriptedServer::start(refusing(filter));
        let mut stack = broker_on(&server);
        wait_until_unready(&stack, &format!("the server refuses the subscription to {filter}"));
        wait_until("it asks again", || (server.subscriptions(filter) >= 3).then_some(()));
        assert_eq!(server.subscriptions("wireguard-worker/+/status"), 1, "only for what was refused");
        assert_eq!(stack.broker().log().matches("subscription refused").count(), 1, "the log says it once");
        server.behave(Behaviour::default());
        stack.wait_until_ready();
        assert_eq!(server.connections().len(), 2, "on the same connections");
    }
}

/// Regression: it waited for ever.
#[test]
fn a_subscription_that_is_not_answered_is_asked_for_on_a_new_connection() {
    let server = ScriptedServer::start(Behaviour { is_silent: true, ..Behaviour::default() });
    let mut stack = broker_on(&server);
    wait_until("it connects anew", || (server.connections().len() > 2).then_some(()));
    wait_until_unready(&stack, "the server does not answer");
    server.behave(Behaviour::default());
    stack.wait_until_ready();
}

/// Regression for the first: a server may have lost the subscriptions although it answers pings.
#[test]
fn a_session_without_echoes_reconnects_and_one_with_a_refused_echo_does_not() {
    let server = ScriptedServer::start(Behaviour { swallows: Some("/echo".into()), ..Behaviour::default() });
    let no_echo = ScriptedServer::start(refusing("/echo"));
    let (mut stack, mut other) = (broker_on(&server), broker_on(&no_echo));
    let worker = InMemory::start(&stack, "gw1");
    other.wait_until_ready();
    stack.wait_until_ready();
    let connections = |id: &str| server.connections().iter().filter(|connected| *connected == id).count();
    let host = host_name();
    let ids = [format!("wgkex-broker-{host}"), format!("wgkex-broker-{host}-keys"), "gw1".into(), "gw1-applied".into()];
    let begun = std::time::Instant::now();
    wait_within(Duration::from_secs(90), "each has connected anew", || {
        ids.iter().all(|id| connections(id) >= 2).then_some(())
    });
    assert!(begun.elapsed() > Duration::from_secs(25), "{:?}", begun.elapsed());
    server.behave(Behaviour::default());
    stack.wait_until_ready();
    assert_eq!(no_echo.connections().len(), 2, "where an access list does not know of the echo");
    drop(worker);
}

/// Regression: it was ready two seconds after it had reconnected, and received nothing.
#[test]
fn a_broker_is_unready_while_it_receives_no_messages() {
    let server = ScriptedServer::start(Behaviour::default());
    let mut stack = broker_on(&server);
    stack.wait_until_ready();
    server.behave(Behaviour { swallows: Some(String::new()), ..Behaviour::default() });
    let own = format!("wgkex-broker-{}", host_name());
    let connections = || server.connections().iter().filter(|connected| **connected == own).count();
    wait_within(Duration::from_secs(90), "it has connected anew", || (connections() >= 2).then_some(()));
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(stack.get("/readyz").status, 503, "{}", stack.broker().log());
    server.behave(Behaviour::default());
    let is_ready = || (stack.get("/readyz").status == 200).then_some(());
    wait_within(Duration::from_secs(90), "it is ready on the next connection", is_ready);
}

/// Regression: retained messages that were lost on the way were never received.
#[test]
fn a_session_that_missed_messages_for_a_while_subscribes_again() {
    let server = ScriptedServer::start(Behaviour::default());
    let mut stack = broker_on(&server);
    stack.wait_until_ready();
    let filter = "wgkex/worker/+/hello";
    assert_eq!(server.subscriptions(filter), 1);
    server.behave(Behaviour { swallows: Some(String::new()), ..Behaviour::default() });
    // An echo contains its session's id. With two lost echoes the session does not reconnect yet.
    let id = format!("wgkex-broker-{}", host_name());
    let are_lost = || (server.swallowed(&id) >= 2).then_some(());
    wait_within(Duration::from_secs(60), "two echoes are lost", are_lost);
    server.behave(Behaviour::default());
    let is_subscribed = || (server.subscriptions(filter) == 2).then_some(());
    wait_within(Duration::from_secs(60), "it has subscribed again", is_subscribed);
    stack.wait_until_ready();
    assert_eq!(stack.broker().log().matches("MQTT connected").count(), 1, "on the same connection");
}

/// Regression: the broker was ready on receiving its own status, and answered 503 although a gateway was online.
#[test]
fn a_broker_is_ready_only_after_all_retained_messages() {
    let retained = vec![data("gw1", DOMAIN), peers_of("gw1", DOMAIN, "3"), status("gw1", "1")];
    let late = Behaviour { retained: (Duration::from_millis(150), retained), ..Behaviour::default() };
    let server = ScriptedServer::start(late);
    for n in 0..5 {
        let mut stack = broker_on(&server);
        stack.wait_until_ready();
        assert_eq!(stack.v2(DOMAIN, &key(n)).json(), endpoint("gw1"));
        let _ = stack.stop_broker();
    }
}

/// Regression: each connection of a program ended the other, again and again.
#[test]
fn a_server_that_takes_the_user_name_for_the_client_id_has_one_connection_of_each_program() {
    let users = tempfile::tempdir().unwrap();
    let file = users.path().join("users");
    std::fs::write(&file, "").unwrap();
    for user in ["broker", "gw1"] {
        let made = std::process::Command::new("mosquitto_passwd").arg("-b").arg(&file).args([user, "word"]).status();
        assert!(made.unwrap().success());
    }
    let plan = Plan { mosquitto: "use_username_as_clientid true".into(), ..Plan::new(Bus::Mosquitto) };
    let mut stack = Stack::prepare(Plan { credentials: Some(("broker".into(), "word".into())), ..plan });
    stack.start_mosquitto_with_users(&file);
    stack.start_broker();
    let worker = InMemory::start_as(&stack, "gw1", ", username: gw1, password: word");
    let one = "lets this program have one connection only";
    stack.broker().wait_for_log(one);
    stack.wait_until_ready();
    stack.wait_for_gateways(1);
    for n in 0..50 {
        let answer = stack.v2(DOMAIN, &key(n));
        assert_eq!(answer.status, 200, "{answer:?}");
        let public: wgkex_common::PublicKey = key(n).parse().unwrap();
        let domain = wgkex_common::Domain::new(DOMAIN, &["ffx_".into()]).unwrap();
        let device = worker.kernel.device(&domain).unwrap();
        assert!(device.peers.contains_key(&public), "{n}");
    }
    assert_eq!(stack.broker().log().matches(one).count(), 1, "once");
    assert_eq!(
        stack.metric("wgkex_broker_mqtt_name_in_use"),
        Some(0.0),
        "it is the program itself that used its name twice"
    );
    let connected = stack.mosquitto().log().matches("New client connected").count();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(stack.mosquitto().log().matches("New client connected").count(), connected, "it is quiet");
}

/// Regression: the log did not name the cause.
#[test]
fn a_client_id_in_use_by_two_programs_is_logged() {
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto));
    let first = InMemory::start(&stack, "gw1");
    stack.wait_for_gateways(1);
    let mut twin = Stack::prepare(Plan::new(Bus::Mosquitto));
    twin.mqtt = stack.mqtt;
    twin.write_config();
    twin.start_broker();
    let message = "another program may use this name";
    wait_until("one of them says it", || {
        (stack.broker().log().contains(message) || twin.broker().log().contains(message)).then_some(())
    });
    drop(first);
}
