//! The MQTT server hangs, ends and starts; its connection is slow, or loses messages.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use nix::sys::signal::Signal;
use wgkex_tests::gateway::Lane;
use wgkex_tests::proxy::{Proxy, ProxyMode};

use crate::lab::{Fleet, Node, Pace, Role, Routers, sleep};

/// Long enough for a test to observe a fault, and for a slow machine not to look like one.
const BUDGET: &str = "confirm_timeout: 0.5\nconfirm_budget: 1";
/// The limit of an answer's time: the budget above, and a margin.
const ANSWER: Duration = Duration::from_secs(1 + 2);
/// 5,000 routers, of whom 3,300 request in the half minute.
const ROUTERS: Pace = Pace { every: Duration::from_millis(9), at_most: 5_000 };
const HALF_A_MINUTE: Duration = Duration::from_secs(30);

pub fn an_mqtt_server_frozen_for_half_a_minute_causes_no_wrong_answer(lane: Lane) {
    without_mqtt(lane, |fleet, wait| {
        fleet.mosquitto.signal(Signal::SIGSTOP);
        wait();
        fleet.mosquitto.signal(Signal::SIGCONT);
    });
}

pub fn an_mqtt_server_stopped_for_half_a_minute_causes_no_wrong_answer(lane: Lane) {
    without_mqtt(lane, |fleet, wait| {
        let _ = fleet.mosquitto.end_by(Signal::SIGKILL);
        wait();
        fleet.mosquitto = fleet.hub.start_mosquitto();
    });
}

fn without_mqtt(lane: Lane, fault: impl FnOnce(&mut Fleet, &dyn Fn())) {
    let mut fleet = Fleet::new(lane, 1, 2, BUDGET);
    let routers = Routers::new();
    routers.ask_during(&fleet.broker_hosts(), ROUTERS, || {
        sleep(Duration::from_secs(5));
        fault(&mut fleet, &|| {
            // Requests in flight end.
            sleep(ANSWER);
            let before = routers.answers().accepted.len();
            sleep(HALF_A_MINUTE.saturating_sub(ANSWER));
            assert_eq!(routers.answers().accepted.len(), before, "accepted while nobody could hear of it");
        });
    });
    let answers = routers.answers().clone();
    assert_eq!((answers.asked.len(), answers.silent), (5_000, 0));
    assert!(answers.refused.len() > 1_000 && answers.accepted.len() > 1_000, "{}", answers.refused.len());
    let slowest = answers.refused.iter().max().unwrap();
    assert!(*slowest < ANSWER, "a router waited {slowest:?} for a 503");
    fleet.caught_up(&routers);
}

pub fn an_mqtt_server_killed_without_persistence_loses_no_key(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 2, "");
    let routers = Routers::new();
    routers.ask_during(&fleet.broker_hosts(), Pace::per_second(100), || {
        for up in [3_000, 1_500, 4_000] {
            sleep(Duration::from_millis(up));
            let _ = fleet.mosquitto.end_by(Signal::SIGKILL);
            fleet.mosquitto = fleet.hub.start_mosquitto();
        }
        let served = routers.answers().accepted.len();
        crate::lab::within("routers are served again", crate::lab::CAUGHT_UP, || {
            (routers.answers().accepted.len() > served + 100).then_some(())
        });
    });
    fleet.caught_up(&routers);
}

pub fn a_slow_connection_delivers_every_key(lane: Lane) {
    let mode = ProxyMode::Slow { delay: Duration::from_millis(100), rate: 20_000 };
    let (mut fleet, _proxy) = behind(lane, mode);
    let routers = Routers::new();
    routers.ask_during(&fleet.broker_hosts(), Pace { every: Duration::from_millis(10), at_most: 2_500 }, || {});
    fleet.caught_up(&routers);
    // All keys at once, over the slow connection.
    let far = &mut fleet.gateways[1];
    far.kill();
    far.forget();
    far.host.remove();
    far.host.setup();
    far.start_again();
    fleet.caught_up(&routers);
}

pub fn a_connection_that_drops_messages_silently_delivers_keys_late(lane: Lane) {
    let (fleet, proxy) = behind(lane, ProxyMode::Dropping(10));
    let routers = Routers::new();
    routers.ask_during(&fleet.broker_hosts(), Pace { every: Duration::from_millis(5), at_most: 2_000 }, || {});
    assert!(proxy.dropped() >= 190, "{} keys are dropped", proxy.dropped());
    fleet.caught_up(&routers);
    let learnt = fleet.gateways[1].figure(r#"wgkex_worker_keys_learnt_total{domain="test_a"} "#).unwrap();
    assert!(learnt >= 100, "{learnt} keys came from the broker, of {} dropped", proxy.dropped());
}

/// A gateway with a good connection, and one behind such a proxy.
fn behind(lane: Lane, mode: ProxyMode) -> (Fleet, Proxy) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let (host, server) = fleet.host("gw2");
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 1884));
    let proxy = host.inside(|| Proxy::start(listen, vec![SocketAddr::from((server, 1883))], mode));
    host.configure("mqtt: {broker_url: 127.0.0.1, broker_port: 1884}\n");
    host.setup();
    fleet.gateways.push(Node::start(host, Role::Gateway));
    fleet.is_complete();
    (fleet, proxy)
}
