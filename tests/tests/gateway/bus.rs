//! The broker and the MQTT server stop and start.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::probe::Probe;
use wgkex_tests::{DEADLINE, key, wait_until};

use crate::{Single, end, serves};

/// The limit for service after a restart, also in a busy emulated machine: both sides pause for a second at most before
/// they reconnect.
const BACK: Duration = Duration::from_secs(25);

pub fn a_broker_outage_leaves_the_peers_alone_and_it_serves_again_afterwards(lane: Lane) {
    let Single { mut broker, mut worker, host } = Single::new(lane, "");
    for (signal, n) in [(Signal::SIGTERM, 0), (Signal::SIGKILL, 100_000)] {
        let peers = host.wireguard("wg-a");
        while_routers_ask(&host, n, || {
            if signal == Signal::SIGTERM {
                end(&mut broker, signal);
            } else {
                assert!(!broker.end_by(signal).success());
            }
            disconnected(&host);
            assert!(host.wireguard("wg-a").is_superset(&peers), "{signal} changed peers");
            broker = host.start_broker();
        });
        assert!(host.wireguard("wg-a").is_superset(&peers), "{signal} changed peers");
        // The MQTT server is a new one, so its messages were published again.
        hello(&host);
    }
    end(&mut worker, Signal::SIGTERM);
}

pub fn an_mqtt_server_outage_leaves_the_peers_alone_and_the_worker_reconnects(lane: Lane) {
    let host = Host::new("gateway", lane);
    host.configure("mqtt: {broker_url: 127.0.0.1}\n");
    host.setup();
    let mut mosquitto = host.start_mosquitto();
    let (mut broker, mut worker) = (host.start_broker(), host.start_worker());
    serves(&host);
    for (signal, n) in [(Signal::SIGTERM, 0), (Signal::SIGKILL, 100_000)] {
        let peers = host.wireguard("wg-a");
        while_routers_ask(&host, n, || {
            let _ = mosquitto.end_by(signal);
            disconnected(&host);
            wait_until("the broker says that it cannot serve", || {
                (host.get(5000, "/readyz")?.status == 503).then_some(())
            });
            assert_eq!(host.post(2, &key(n + 90_000)).status, 503);
            assert!(host.wireguard("wg-a").is_superset(&peers), "{signal} changed peers");
            mosquitto = host.start_mosquitto();
        });
        assert!(host.wireguard("wg-a").is_superset(&peers), "{signal} changed peers");
        hello(&host);
    }
    end(&mut worker, Signal::SIGTERM);
    end(&mut broker, Signal::SIGTERM);
}

fn disconnected(host: &Host) {
    let connected = || host.metric(9586, "wgkex_worker_mqtt_connected");
    wait_until("the worker sees that the bus is gone", || (connected()? == "0").then_some(()));
}

/// Lets a router request with ever new keys, from number `n`, until `fault` is over and it is served again. Every
/// answer is right: 200 with the key in the kernel, 503, or none if no broker runs.
fn while_routers_ask(host: &Host, n: u32, fault: impl FnOnce()) {
    let (is_mended, is_served) = (AtomicBool::new(false), AtomicBool::new(false));
    let begun = Instant::now();
    let router = || {
        for n in n.. {
            let mended = is_mended.load(Ordering::SeqCst);
            match host.try_post(1 + u8::from(n.is_multiple_of(2)), &key(n)) {
                Some(200) => {
                    assert_eq!(host.tables("a").missing(&key(n)), Vec::<String>::new(), "an answer is not true");
                    is_served.store(mended, Ordering::SeqCst);
                }
                Some(503) | None => {}
                Some(status) => panic!("status {status}"),
            }
            if is_served.load(Ordering::SeqCst) || begun.elapsed() > 3 * DEADLINE {
                return;
            }
        }
    };
    thread::scope(|scope| {
        let router = scope.spawn(router);
        fault();
        let mended = Instant::now();
        is_mended.store(true, Ordering::SeqCst);
        router.join().unwrap();
        let took = mended.elapsed();
        assert!(is_served.load(Ordering::SeqCst) && took < BACK, "served again after {took:?}");
    });
}

/// A new client on the bus receives the worker's states.
fn hello(host: &Host) {
    let witness = host.inside(|| Probe::witness(SocketAddr::from((Ipv4Addr::LOCALHOST, 1883))));
    assert_eq!(witness.next_on("wireguard-worker/gateway/status").text(), "1");
    for rest in ["a", "b"] {
        let data = witness.next_on(&format!("wireguard-worker/gateway/test_{rest}/data")).text();
        assert!(data.contains(&host.run(&format!("wg show wg-{rest} public-key"))), "{data}");
        let peers = witness.next_on(&format!("wireguard-metrics/test_{rest}/gateway/connected_peers"));
        assert_eq!(peers.text(), "0");
    }
    assert!(witness.next_on("wgkex/worker/gateway/hello").text().contains("confirm"));
}
