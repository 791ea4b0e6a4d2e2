//! Several gateways on one Mosquitto.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::http::Response;
use wgkex_tests::process::Process;
use wgkex_tests::{key, wait_until};

use crate::{END, serves};

/// The limit of an answer with a frozen gateway: `confirm_budget`, and a margin for a busy machine.
const ANSWER: Duration = Duration::from_secs(5);

/// For a test of the shares: on a busy machine, a gateway must not look silent.
const PATIENT: &str = "confirm_timeout: 20\nconfirm_budget: 25";

pub struct Gateway {
    worker: Process,
    pub public_key: String,
    pub host: Host,
}

pub struct Fleet {
    pub gateways: Vec<Gateway>,
    _broker: Process,
    _mosquitto: Process,
    pub hub: Host,
}

impl Fleet {
    /// Gateways `gw1`, `gw2`... of these weights, all of them online, and a broker, all with `more` in their config.
    pub fn new(lane: Lane, weights: &[u32], more: &str) -> Self {
        let hub = Host::new("hub", lane);
        let mosquitto = hub.start_mosquitto();
        let gateways: Vec<_> = (1..).zip(weights).map(|(n, _)| Gateway::new(&hub, lane, n, more)).collect();
        let weights = (1..).zip(weights).map(|(n, weight)| format!("gw{n}: {{weight: {weight}}}"));
        let weights = weights.collect::<Vec<_>>().join(", ");
        hub.configure(&format!("mqtt: {{broker_url: 127.0.0.1}}\nworkers: {{{weights}}}\n{more}\n"));
        let fleet = Self { _broker: hub.start_broker(), gateways, _mosquitto: mosquitto, hub };
        fleet.wait_for_all();
        fleet
    }

    /// Waits until every gateway is online at the broker, and its domains, which are published before that, too.
    fn wait_for_all(&self) {
        serves(&self.hub);
        let online = self.gateways.len().to_string();
        for gateway in &self.gateways {
            let up = |rest| gateway.host.metric(9586, &format!(r#"wgkex_worker_domain_up{{domain="test_{rest}"}}"#));
            wait_until("both domains are up", || (up("a")? == "1" && up("b")? == "1").then_some(()));
            let connected = || gateway.host.metric(9586, "wgkex_worker_mqtt_connected");
            wait_until("the worker is connected", || (connected()? == "1").then_some(()));
        }
        wait_until("all gateways are online", || {
            (self.hub.metric(5000, r#"wgkex_broker_gateways{state="online"}"#)? == online).then_some(())
        });
    }

    /// The number of the gateway that an answer names.
    fn named(&self, answer: &Response) -> usize {
        let key = &answer.json()["Endpoint"]["PublicKey"];
        let named = self.gateways.iter().position(|gateway| *key == gateway.public_key.as_str());
        named.unwrap_or_else(|| panic!("{answer:?} names no gateway"))
    }
}

impl Gateway {
    fn new(hub: &Host, lane: Lane, n: u8, more: &str) -> Self {
        let host = Host::new(&format!("gw{n}"), lane);
        let (server, address) = hub.connect(&host, n);
        // A stopped worker keeps its session, and the server queues its messages.
        host.configure(&format!("mqtt: {{broker_url: {server}, keepalive: 60}}\nexternalName: {address}\n{more}\n"));
        host.setup();
        Self { worker: host.start_worker(), public_key: host.run("wg show wg-a public-key"), host }
    }

    pub fn has(&self, key: &str) -> bool {
        self.host.tables("a").missing(key).is_empty()
    }
}

pub fn four_gateways_share_the_routers_by_weight_and_all_have_every_key(lane: Lane) {
    const ANSWERS: u32 = 420;
    const ROUTERS: u32 = 4;
    let weights = [84, 42, 21, 21];
    let fleet = Fleet::new(lane, &weights, PATIENT);
    // In parallel: once a gateway counts its peers anew, earlier answers to routers that never connected no longer
    // count.
    let (fleet, shares) = (&fleet, Mutex::new(BTreeMap::<usize, u32>::new()));
    thread::scope(|scope| {
        for first in 0..ROUTERS {
            let shares = &shares;
            scope.spawn(move || {
                for n in (first..ANSWERS).step_by(ROUTERS as usize) {
                    let answer = fleet.hub.post(2, &key(n));
                    assert_eq!(answer.status, 200, "{answer:?}");
                    *shares.lock().unwrap().entry(fleet.named(&answer)).or_default() += 1;
                }
            });
        }
    });
    let shares = shares.into_inner().unwrap();
    for (n, weight) in weights.into_iter().enumerate() {
        let (share, fair) = (shares[&n], ANSWERS * weight / weights.iter().sum::<u32>());
        assert!(share.abs_diff(fair) <= 4 + ROUTERS, "gw{}: {share} answers instead of {fair} in {shares:?}", n + 1);
    }
    // One more for the key of the readiness check.
    let all = ANSWERS as usize + 1;
    for gateway in &fleet.gateways {
        wait_until("every key is there", || (gateway.host.tables("a").lengths() == [all; 3]).then_some(()));
    }
}

pub fn a_frozen_gateway_is_passed_over_within_the_budget_and_has_the_keys_when_it_thaws(lane: Lane) {
    // The heavier gateway would get two of three routers.
    let fleet = Fleet::new(lane, &[2, 1], "");
    let [frozen, other] = &fleet.gateways[..] else { panic!("two gateways") };
    let keys = frozen_while_routers_ask(&fleet);

    other.worker.signal(Signal::SIGSTOP);
    for (version, n) in [(1, 50_000), (2, 50_001)] {
        let begun = Instant::now();
        let answer = fleet.hub.post(version, &key(n));
        assert!(begun.elapsed() < ANSWER, "after {:?}", begun.elapsed());
        assert_eq!(answer.status, 503, "{answer:?}");
        let again: u32 = answer.header("retry-after").expect("Retry-After").parse().unwrap();
        assert!((1..=60).contains(&again), "Retry-After: {again}");
    }

    for gateway in &fleet.gateways {
        gateway.worker.signal(Signal::SIGCONT);
    }
    wait_until("gw1 is named again", || {
        let answer = fleet.hub.post(2, &key(60_000));
        (answer.status == 200 && fleet.named(&answer) == 0).then_some(())
    });
    for key in keys.iter().cloned().chain([key(60_000)]) {
        wait_until("the thawed gateway has the key", || frozen.has(&key).then_some(()));
    }
}

/// Stops `gw1` while four routers at a time request, and returns the keys whose requests began after that.
fn frozen_while_routers_ask(fleet: &Fleet) -> Vec<String> {
    let frozen = &fleet.gateways[0];
    let next = AtomicU32::new(0);
    let (is_frozen, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let router = || {
        let mut asked_after = Vec::new();
        while !is_over.load(Ordering::SeqCst) {
            let (after, key) = (is_frozen.load(Ordering::SeqCst), key(next.fetch_add(1, Ordering::SeqCst)));
            let begun = Instant::now();
            let answer = fleet.hub.post(2, &key);
            assert!(begun.elapsed() < ANSWER, "after {:?}", begun.elapsed());
            assert_eq!(answer.status, 200, "{answer:?}");
            match fleet.named(&answer) {
                0 if after => panic!("an answer names the frozen gateway"),
                // It may have confirmed this key just before.
                0 if is_frozen.load(Ordering::SeqCst) => assert!(frozen.has(&key), "an answer is not true"),
                _ => {}
            }
            if after {
                asked_after.push(key);
            }
        }
        asked_after
    };
    thread::scope(|scope| {
        let routers: Vec<_> = (0..4).map(|_| scope.spawn(router)).collect();
        wait_until("routers ask", || (next.load(Ordering::SeqCst) > 20).then_some(()));
        frozen.worker.signal(Signal::SIGSTOP);
        is_frozen.store(true, Ordering::SeqCst);
        // After this, the requests that waited for its confirmation are answered.
        let begun = next.load(Ordering::SeqCst);
        let patient = Instant::now();
        wait_until("routers go on asking", || {
            (patient.elapsed() > END && next.load(Ordering::SeqCst) > begun + 20).then_some(())
        });
        is_over.store(true, Ordering::SeqCst);
        routers.into_iter().flat_map(|router| router.join().unwrap()).collect()
    })
}
