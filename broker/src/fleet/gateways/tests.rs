use proptest::prelude::*;
use wgkex_common::config;

use super::*;
use crate::fleet::gateway::REPEATED_COUNT_WINDOW;
use crate::fleet::status::{GatewayDomainState, Offline, OfflineReason, ProblemKind};

const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

fn name(name: &str) -> WorkerName {
    name.parse().unwrap()
}

fn domain(name: &str) -> Domain {
    Domain::new(name, &["ff_".into()]).unwrap()
}

/// A router that is connected nowhere.
fn router(domain: &Domain) -> Router<'_> {
    Router { domain, current_gateway: None, now: Instant::now() }
}

fn gateways(weights: &[(&str, f64)]) -> Gateways {
    let yaml = "domains: [ff_a, ff_b]\ndomain_prefixes: [ff_]\nstate_dir: /nonexistent";
    let mut config = Config::parse("", yaml, "broker1").unwrap();
    config.workers =
        weights.iter().map(|(worker, weight)| (name(worker), config::GatewayShare { weight: *weight })).collect();
    Gateways::new(&config)
}

#[test]
fn a_gateways_key_and_address_are_no_new_routers_also_when_the_bus_is_lost() {
    let mut gateways = gateways(&[]);
    let key: PublicKey = KEY.parse().unwrap();
    assert!(!gateways.is_reserved(&key, false));
    gateways.data("gw1", "ff_none");
    assert!(!gateways.is_reserved(&key, false), "a domain that is not served counts for nothing");
    gateways.data("gw1", "ff_b");
    gateways.on_disconnect(Instant::now());
    assert!(gateways.is_reserved(&key, false) && !gateways.is_reserved(&key, true));
    gateways.live("wireguard-worker/gw1/ff_b/data", "");
    assert!(!gateways.is_reserved(&key, false));
}

#[test]
fn a_report_makes_a_key_a_routers_unless_the_worker_claims_that_key() {
    let mut gateways = gateways(&[]);
    let key: PublicKey = KEY.parse().unwrap();
    gateways.data("thief", "ff_a");
    assert!(!gateways.may_report(&name("thief"), &key) && gateways.may_report(&name("gw1"), &key));
    gateways.on_disconnect(Instant::now());
    assert!(!gateways.may_report(&name("thief"), &key));
    let mut config = Config::parse("", "domains: [ff_a]\ndomain_prefixes: [ff_]", "broker1").unwrap();
    config.protected_keys = [key].into();
    assert!(!Gateways::new(&config).may_report(&name("gw1"), &key));
}

#[test]
fn reported_handshakes_count_in_domains_that_the_worker_serves() {
    let mut gateways = gateways(&[]);
    gateways.arrive("gw1", 0);
    gateways.live("wgkex/worker/gw2/hello", r#"{"version":"1","can":["confirm"],"domains":["ff_a","ff_none"]}"#);
    let speak = |gateways: &Gateways, worker| {
        ["ff_a", "ff_b", "ff_none"].map(|domain| gateways.can_report(&name(worker), domain))
    };
    assert_eq!(speak(&gateways, "gw2"), [false; 3], "it is not online");
    gateways.live("wireguard-worker/gw2/status", "1");
    assert_eq!(speak(&gateways, "gw1"), [true, true, false], "it does not say which");
    assert_eq!(speak(&gateways, "gw2"), [true, false, false]);
    assert_eq!(speak(&gateways, "gw3"), [false; 3]);
}

fn online(confirming: &[&str], legacy: &[&str]) -> Online {
    let names = |names: &[&str]| names.iter().map(|worker| name(worker)).collect();
    Online { confirming: names(confirming), legacy: names(legacy) }
}

impl Gateways {
    /// Applies a valid message that is published just now.
    fn live(&mut self, topic: &str, payload: &str) {
        self.apply(&Topic::parse(topic).unwrap(), payload.as_bytes(), false, Instant::now()).unwrap();
    }

    fn found(&mut self, topic: &str, payload: &str) {
        self.apply(&Topic::parse(topic).unwrap(), payload.as_bytes(), true, Instant::now()).unwrap();
    }

    /// A worker of ours comes online in domain `ff_a`.
    fn arrive(&mut self, worker: &str, peers: u64) {
        self.live(&format!("wgkex/worker/{worker}/hello"), r#"{"version":"1","can":["confirm"]}"#);
        self.data(worker, "ff_a");
        self.live(&format!("wireguard-metrics/ff_a/{worker}/connected_peers"), &peers.to_string());
        self.live(&format!("wireguard-worker/{worker}/status"), "1");
    }

    fn data(&mut self, worker: &str, domain: &str) {
        let data =
            format!(r#"{{"ExternalAddress":"{worker}.ext","Port":1,"PublicKey":"{KEY}","LinkAddress":"fe80::1"}}"#);
        self.live(&format!("wireguard-worker/{worker}/{domain}/data"), &data);
    }

    /// The peers of the first gateway.
    fn peers(&self) -> u64 {
        self.by_name.values().next().unwrap().peers().total()
    }

    fn best(&self, domain: &str) -> Option<String> {
        self.select(router(&self::domain(domain)), |_, _| true).map(|selection| selection.worker.into())
    }

    fn answer(&mut self) -> String {
        let best = self.best("ff_a").unwrap();
        self.on_assigned(&name(&best), &domain("ff_a"));
        best
    }
}

#[test]
fn the_worker_furthest_below_its_target_is_chosen() {
    type Case<'a> = (&'a [(&'a str, f64)], &'a [(&'a str, u64)], &'a str);
    let cases: &[Case] = &[
        (&[("a", 1.0), ("b", 1.0)], &[("a", 10), ("b", 9)], "b"),
        (&[("a", 3.0), ("b", 1.0)], &[("a", 29), ("b", 11)], "a"),
        (&[("a", 3.0), ("b", 1.0)], &[("a", 31), ("b", 9)], "b"),
        (&[("a", 84.0), ("b", 42.0)], &[("a", 0), ("b", 0)], "a"),
        (&[], &[("a", 5), ("b", 4), ("c", 6)], "b"),
        (&[("a", 1.0), ("gone", 8.0)], &[("a", 5), ("b", 4)], "b"),
        (&[("a", 0.0)], &[("a", 0), ("b", 900)], "b"),
    ];
    for (weights, workers, best) in cases {
        let mut gateways = gateways(weights);
        for (worker, peers) in *workers {
            gateways.arrive(worker, *peers);
        }
        assert_eq!(gateways.best("ff_a").as_deref(), Some(*best), "{weights:?} {workers:?}");
    }
}

#[test]
fn peers_of_all_domains_count() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 1);
    gateways.arrive("b", 2);
    gateways.live("wireguard-metrics/ff_b/a/connected_peers", "5");
    assert_eq!(gateways.best("ff_a").unwrap(), "b");
    assert_eq!(gateways.best("ff_b"), None, "a has no data there");
    gateways.data("a", "ff_b");
    assert_eq!(gateways.best("ff_b").unwrap(), "a");
}

#[test]
fn a_worker_without_status_data_or_count_is_never_chosen() {
    for (topic, payload) in [
        ("wireguard-worker/a/status", "0"),
        ("wireguard-worker/a/status", ""),
        ("wireguard-metrics/ff_a/a/connected_peers", "-1"),
        ("wireguard-metrics/ff_a/a/connected_peers", ""),
    ] {
        let mut gateways = gateways(&[]);
        gateways.arrive("a", 0);
        assert_eq!(gateways.best("ff_a").unwrap(), "a");
        gateways.live(topic, payload);
        assert_eq!(gateways.best("ff_a"), None, "{topic} {payload:?}");
    }
}

#[test]
fn an_invalid_payload_changes_nothing() {
    for (topic, payload) in [
        ("wireguard-worker/a/status", "2"),
        ("wireguard-worker/a/status", "online"),
        ("wireguard-worker/a/ff_a/data", "{"),
        ("wireguard-worker/a/ff_a/data", "[]"),
        ("wireguard-worker/a/ff_a/data", r#"{"Port":"x"}"#),
        ("wireguard-metrics/ff_a/a/connected_peers", "abc"),
        ("wireguard-metrics/ff_a/a/connected_peers", "-5"),
        ("wireguard-metrics/ff_a/a/connected_peers", "1e30"),
        ("wireguard-metrics/ff_a/a/connected_peers", "1000000000000000000000000000000"),
        ("wgkex/worker/a/hello", "1"),
    ] {
        let mut gateways = gateways(&[]);
        gateways.arrive("a", 3);
        let now = Instant::now();
        let before = gateways.statuses(now);
        assert!(
            gateways.apply(&Topic::parse(topic).unwrap(), payload.as_bytes(), false, Instant::now()).is_err(),
            "{topic} {payload}"
        );
        assert_eq!(gateways.statuses(now), before);
        assert_eq!(gateways.best("ff_a").unwrap(), "a");
    }
}

#[test]
fn an_invalid_payload_of_a_stranger_makes_no_gateway() {
    let mut gateways = gateways(&[]);
    for topic in ["wireguard-worker/x/status", "wgkex/worker/x/hello", "wireguard-metrics/ff_a/x/connected_peers"] {
        assert!(gateways.apply(&Topic::parse(topic).unwrap(), b"nonsense", false, Instant::now()).is_err());
    }
    assert_eq!(gateways.statuses(Instant::now()), []);
}

#[test]
fn domains_of_other_fleets_are_not_remembered() {
    let mut gateways = gateways(&[]);
    gateways.live("wireguard-worker/a/other/data", "{");
    gateways.live("wireguard-metrics/other/a/connected_peers", "7");
    assert_eq!(gateways.statuses(Instant::now()), []);
}

#[test]
fn a_bus_full_of_names_is_not_remembered_without_bound() {
    let mut gateways = gateways(&[]);
    for number in 0..NAMES_MAX + 10 {
        let worker = Topic::WorkerStatus { worker: name(&number.to_string()) };
        let _ = gateways.apply(&worker, b"1", false, Instant::now());
        let _ = gateways.apply(
            &Topic::BrokerStatus { broker: number.to_string().parse().unwrap() },
            b"1",
            false,
            Instant::now(),
        );
    }
    assert_eq!((gateways.by_name.len(), gateways.brokers.len()), (NAMES_MAX, NAMES_MAX));
}

#[test]
fn states_are_complete_when_the_own_greeting_comes_back() {
    let mut gateways = gateways(&[]);
    gateways.found("wireguard-broker/broker1/status", "1");
    gateways.live("wireguard-broker/broker2/status", "1");
    assert!(!gateways.is_synced());
    let now = Instant::now();
    assert!(!gateways.check_synced(now + RETAINED_WAIT_MAX));
    gateways.live("wireguard-broker/broker1/status", "1");
    assert!(!gateways.check_synced(now), "servers do not order different topics");
    gateways.found("wireguard-worker/a/status", "1");
    let found = gateways.last_retained.unwrap();
    assert!(!gateways.check_synced(found + RETAINED_QUIET / 2));
    assert!(gateways.check_synced(found + RETAINED_QUIET) && gateways.is_synced());
    assert!(!gateways.check_synced(found + RETAINED_QUIET), "only once");
    gateways.on_disconnect(Instant::now());
    assert!(!gateways.is_synced());
}

#[test]
fn retained_messages_without_end_do_not_keep_a_broker_from_its_routers() {
    let mut gateways = gateways(&[]);
    let now = Instant::now();
    gateways.force_echo(now);
    let topic = Topic::WorkerStatus { worker: name("a") };
    for tenths in 0..100 {
        let at = now + Duration::from_millis(100) * tenths;
        gateways.apply(&topic, b"1", true, at).unwrap();
        assert!(!gateways.check_synced(at));
    }
    assert!(gateways.check_synced(now + RETAINED_WAIT_MAX));
}

#[test]
fn each_answer_counts_once_for_every_broker_online() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 0);
    gateways.live("wireguard-broker/broker1/status", "1");
    gateways.answer();
    assert_eq!(gateways.peers(), 1);
    gateways.live("wireguard-broker/broker2/status", "1");
    gateways.live("wireguard-broker/broker3/status", "1");
    gateways.live("wireguard-broker/broker3/status", "0");
    gateways.answer();
    assert_eq!(gateways.peers(), 3);
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "2");
    assert_eq!(gateways.peers(), 2);
}

#[test]
fn a_count_that_is_published_again_for_a_newcomer_does_not_take_back_answers() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 0);
    gateways.answer();
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "0");
    assert_eq!(gateways.peers(), 1);
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "5");
    assert_eq!(gateways.peers(), 5);
    let topic = Topic::parse("wireguard-metrics/ff_a/a/connected_peers").unwrap();
    gateways.answer();
    gateways.apply(&topic, b"5", false, Instant::now() + REPEATED_COUNT_WINDOW).unwrap();
    assert_eq!(gateways.peers(), 5);
}

#[test]
fn an_unresponsive_worker_is_the_last_resort_until_it_publishes_again() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 0);
    gateways.arrive("b", 50);
    let now = Instant::now();
    let is_logged = [0, 9_999, 10_000].map(|ms| gateways.on_timeout(&name("a"), now + Duration::from_millis(ms)));
    assert_eq!(is_logged, [true, false, true]);
    assert_eq!(gateways.best("ff_a").unwrap(), "b");
    let only_a = gateways.select(router(&domain("ff_a")), |worker, _| worker.as_str() == "a");
    assert_eq!(only_a.unwrap().worker, name("a"));
    assert!(gateways.on_confirmation(&name("a"), Instant::now()));
    assert_eq!(gateways.best("ff_a").unwrap(), "a");
    assert!(!gateways.on_confirmation(&name("stranger"), Instant::now()));
}

#[test]
fn only_a_worker_with_a_hello_before_its_status_is_awaited() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 0);
    let confirms =
        |gateways: &Gateways| gateways.select(router(&domain("ff_a")), |_, _| true).map(|selection| selection.confirms);
    assert_eq!(confirms(&gateways), Some(true));

    // An original takes its place, without a hello.
    gateways.live("wireguard-worker/a/status", "0");
    gateways.live("wireguard-worker/a/status", "1");
    assert_eq!(confirms(&gateways), Some(false));

    // Our worker returns.
    gateways.live("wireguard-worker/a/status", "0");
    gateways.arrive("a", 0);
    assert_eq!(confirms(&gateways), Some(true));

    // A broker that starts receives both as retained, in either order.
    for hello_first in [true, false] {
        gateways.on_disconnect(Instant::now());
        gateways.data("a", "ff_a");
        gateways.found("wireguard-metrics/ff_a/a/connected_peers", "0");
        let mut messages =
            [("wgkex/worker/a/hello", r#"{"version":"1","can":["confirm"]}"#), ("wireguard-worker/a/status", "1")];
        if !hello_first {
            messages.reverse();
        }
        for (topic, payload) in messages {
            gateways.found(topic, payload);
        }
        assert_eq!(confirms(&gateways), Some(true));
    }

    // It receives a retained hello that was left behind, and an original comes online.
    gateways.on_disconnect(Instant::now());
    gateways.data("a", "ff_a");
    gateways.found("wireguard-metrics/ff_a/a/connected_peers", "0");
    gateways.found("wireguard-worker/a/status", "0");
    gateways.found("wgkex/worker/a/hello", r#"{"version":"1","can":["confirm"]}"#);
    gateways.live("wireguard-worker/a/status", "1");
    assert_eq!(confirms(&gateways), Some(false));
}

#[test]
fn a_broker_that_subscribes_between_hello_and_status_learns_of_it_by_the_next_hello() {
    let mut gateways = gateways(&[]);
    let hello = r#"{"version":"1","can":["confirm"]}"#;
    gateways.found("wgkex/worker/a/hello", hello);
    gateways.data("a", "ff_a");
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "0");
    gateways.live("wireguard-worker/a/status", "1");
    gateways.live("wgkex/worker/a/hello", hello);
    assert_eq!(gateways.online(&domain("ff_a")), online(&["a"], &[]));
}

#[test]
fn retained_states_of_a_domain_that_the_hello_does_not_name_do_not_count() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 0);
    gateways.data("a", "ff_b");
    gateways.live("wireguard-metrics/ff_b/a/connected_peers", "0");
    assert_eq!(gateways.best("ff_b").unwrap(), "a");
    gateways.live("wgkex/worker/a/hello", r#"{"version":"1","can":["confirm"],"domains":["ff_a"]}"#);
    assert_eq!(gateways.best("ff_b"), None);
    assert_eq!(gateways.online(&domain("ff_b")), Online::default());
    assert_eq!(gateways.best("ff_a").unwrap(), "a");
    assert_eq!(gateways.statuses(Instant::now())[0].domains.len(), 1);
}

#[test]
fn an_original_takes_keys_before_it_has_counted_its_peers() {
    let mut gateways = gateways(&[]);
    gateways.data("old", "ff_a");
    assert_eq!(gateways.online(&domain("ff_a")), Online::default());
    gateways.live("wireguard-worker/old/status", "1");
    assert_eq!(gateways.online(&domain("ff_a")), online(&[], &["old"]));
    assert_eq!(gateways.best("ff_a"), None);
    gateways.arrive("new", 0);
    assert_eq!(gateways.online(&domain("ff_a")), online(&["new"], &["old"]));
    gateways.live("wireguard-metrics/ff_a/new/connected_peers", "-1");
    assert_eq!(gateways.online(&domain("ff_a")), online(&[], &["old"]));
    gateways.live("wireguard-metrics/ff_a/old/connected_peers", "-1");
    assert_eq!(gateways.online(&domain("ff_a")), Online::default(), "it said that the domain is offline there");
    gateways.live("wireguard-metrics/ff_a/old/connected_peers", "");
    assert_eq!(gateways.online(&domain("ff_a")), online(&[], &["old"]), "not said any more");
    assert_eq!(gateways.online(&domain("ff_b")), Online::default());
}

/// The messages of one worker, and for how many seconds after the last one it counts as alive.
#[test]
fn a_worker_is_alive_as_long_as_its_messages_show_it() {
    type Message = (&'static str, &'static str, bool);
    const LIVE: bool = false;
    const FOUND: bool = true;
    let (status, count, hello) =
        ("wireguard-worker/a/status", "wireguard-metrics/ff_a/a/connected_peers", "wgkex/worker/a/hello");
    let can = r#"{"version":"1","can":["confirm"]}"#;
    let cases: &[(&[Message], u64)] = &[
        (&[(status, "1", LIVE), (count, "3", LIVE)], 150),
        (&[(count, "3", LIVE), (status, "1", LIVE)], 150),
        (&[(hello, can, LIVE), (status, "1", LIVE)], 150),
        // Retained messages, or messages written by hand.
        (&[(status, "1", FOUND), (count, "3", FOUND), (hello, can, FOUND)], 65),
        (&[(status, "1", LIVE)], 65),
        // A last will that was published late, or zero that was written by hand.
        (&[(status, "1", LIVE), (count, "3", LIVE), (status, "0", LIVE)], 0),
        (&[(status, "0", FOUND), (count, "3", FOUND)], 0),
        (&[(status, "0", FOUND), (count, "3", LIVE)], 65),
        (&[(status, "0", LIVE), (count, "-1", LIVE)], 0),
        (&[(status, "0", LIVE), (hello, can, LIVE)], 0),
        // No status, as a client removed it, or the server delivers none.
        (&[(count, "3", LIVE)], 65),
        (&[(count, "3", LIVE), (count, "3", LIVE)], 65),
        (&[(count, "3", FOUND), (status, "", LIVE), (count, "3", LIVE)], 65),
        (&[(count, "3", FOUND)], 0),
        (&[(hello, can, LIVE)], 0),
    ];
    for (messages, seconds) in cases {
        let (mut gateways, now) = (gateways(&[]), Instant::now());
        for (topic, payload, retained) in *messages {
            gateways.apply(&Topic::parse(topic).unwrap(), payload.as_bytes(), *retained, now).unwrap();
        }
        assert_eq!(gateways.is_online(&name("a")), *seconds > 0, "{messages:?}");
        let until = now + Duration::from_secs(*seconds);
        if *seconds > 0 {
            assert!(gateways.expire(until.checked_sub(Duration::from_secs(1)).unwrap()).is_empty(), "{messages:?}");
            assert_eq!(gateways.expire(until), [name("a")], "{messages:?}");
        }
        assert!(!gateways.is_online(&name("a")) && gateways.expire(until).is_empty());
    }
}

/// The hellos that an original may seem to have, written by hand or left from a worker of ours.
#[test]
fn a_hello_counts_as_long_as_it_is_repeated_or_the_worker_confirms() {
    let hellos = [
        r#"{"version":"9","can":["confirm"],"domains":["ff_a"]}"#,
        r#"{"version":"9","can":["confirm"],"domains":[]}"#,
        r#"{"version":"9","can":[]}"#,
    ];
    let topic = Topic::parse("wgkex/worker/a/hello").unwrap();
    for (hello, retained) in hellos.into_iter().flat_map(|hello| [(hello, false), (hello, true)]) {
        let (mut gateways, now) = (gateways(&[]), Instant::now());
        let seconds = |seconds| now + Duration::from_secs(seconds);
        let ours = Hello::parse(hello.as_bytes()).unwrap().unwrap();
        let counts = |gateways: &Gateways| gateways.by_name["a"].hello.is_some();
        gateways.arrive("a", 3);
        gateways.apply(&topic, b"", false, now).unwrap();
        gateways.apply(&topic, hello.as_bytes(), retained, now).unwrap();
        gateways.expire(seconds(60));
        gateways.apply(&topic, hello.as_bytes(), false, seconds(60)).unwrap();
        gateways.expire(seconds(124));
        assert!(counts(&gateways), "{hello}");
        assert_eq!(gateways.best("ff_a").is_some(), ours.serves("ff_a"), "{hello}");
        let confirms = gateways.on_confirmation(&name("a"), seconds(124));
        assert_eq!(confirms, ours.confirms(), "{hello}");
        gateways.expire(seconds(125));
        assert_eq!(counts(&gateways), confirms, "{hello}");
        gateways
            .apply(&Topic::ConnectedPeers { domain: "ff_a".into(), worker: name("a") }, b"4", false, seconds(180))
            .unwrap();
        gateways.expire(seconds(189));
        assert!(!counts(&gateways), "{hello}");
        assert_eq!(gateways.online(&domain("ff_a")), online(&[], &["a"]), "{hello}");
        assert_eq!(
            gateways.select(router(&domain("ff_a")), |_, _| true).map(|selection| selection.confirms),
            Some(false),
            "{hello}"
        );
        assert_eq!(
            gateways.on_confirmation(&name("a"), seconds(190)),
            ours.confirms(),
            "{hello}: one of ours confirms again"
        );
        assert_eq!(counts(&gateways), ours.confirms(), "{hello}");
    }
}

#[test]
fn data_that_is_removed_stays_as_long_as_the_gateway_counts_there() {
    let (data, count) = ("wireguard-worker/old/ff_a/data", "wireguard-metrics/ff_a/old/connected_peers");
    let (data, count) = (Topic::parse(data).unwrap(), Topic::parse(count).unwrap());
    let key: PublicKey = KEY.parse().unwrap();
    for removed in [false, true] {
        let (mut gateways, now) = (gateways(&[]), Instant::now());
        let seconds = |seconds| now + Duration::from_secs(seconds);
        gateways.data("old", "ff_a");
        gateways.live("wireguard-worker/old/status", "1");
        gateways.apply(&data, b"", removed, now).unwrap();
        assert_eq!(gateways.online(&domain("ff_a")), online(&[], &["old"]), "it came just now");
        for at in [60, 120, 180, 240] {
            gateways.apply(&count, b"3", false, seconds(at)).unwrap();
            gateways.apply(&data, b"", removed, seconds(at)).unwrap();
            gateways.expire(seconds(at + 59));
            assert_eq!(gateways.best("ff_a").as_deref(), Some("old"));
        }
        // A client publishes that it is offline, and it publishes a count again.
        gateways.apply(&Topic::WorkerStatus { worker: name("old") }, b"0", false, seconds(299)).unwrap();
        assert_eq!(gateways.best("ff_a"), None);
        gateways.apply(&count, b"3", false, seconds(300)).unwrap();
        assert_eq!(gateways.best("ff_a").as_deref(), Some("old"));
        assert!(gateways.is_reserved(&key, false));
        // It no longer publishes counts.
        gateways.expire(seconds(449));
        assert!(gateways.by_name["old"].data.contains_key("ff_a"));
        gateways.expire(seconds(450));
        assert!(gateways.by_name["old"].data.is_empty() && !gateways.is_reserved(&key, false));
    }
}

#[test]
fn a_domain_whose_gateways_data_was_removed_counts_as_never_published() {
    let (data, count) = ("wireguard-worker/a/ff_a/data", "wireguard-metrics/ff_a/a/connected_peers");
    let (hello, status) = ("wgkex/worker/a/hello", "wireguard-worker/a/status");
    let is_known = |gateways: &Gateways| gateways.is_known(&domain("ff_a"));
    // Data of a worker that was never online.
    let mut gateways = gateways(&[]);
    gateways.data("a", "ff_a");
    gateways.data("b", "ff_a");
    gateways.live(data, "");
    assert!(is_known(&gateways), "of another one it stands");
    gateways.live("wireguard-worker/b/ff_a/data", "");
    assert!(!is_known(&gateways));
    // Whatever it published, in any order, and also when the bus was lost meanwhile.
    for (is_lost, order) in [(false, [data, count, hello]), (false, [hello, count, data]), (true, [count, data, hello])]
    {
        gateways.data("a", "ff_a");
        gateways.live(count, "-1");
        gateways.live(hello, r#"{"version":"1","can":["confirm"],"domains":["ff_a"]}"#);
        gateways.live(status, "0");
        if is_lost {
            gateways.on_disconnect(Instant::now());
        }
        assert!(is_known(&gateways));
        for topic in order {
            gateways.live(topic, "");
        }
        assert!(!is_known(&gateways), "{order:?}");
    }
    // Data of a worker that is online stays as long as it publishes counts there.
    let now = Instant::now();
    gateways.arrive("a", 3);
    gateways.live(data, "");
    gateways.expire(now + Duration::from_secs(149));
    assert!(is_known(&gateways));
    gateways.expire(now + Duration::from_secs(151));
    assert!(!is_known(&gateways) && gateways.best("ff_a").is_none());
    let count = Topic::parse(count).unwrap();
    gateways.apply(&count, b"-1", false, now + Duration::from_secs(152)).unwrap();
    gateways.expire(now + Duration::from_secs(153));
    assert!(is_known(&gateways), "its interface is missing");
}

#[test]
fn data_that_was_removed_does_not_outlive_the_bus_and_is_good_when_it_comes_again() {
    let key: PublicKey = KEY.parse().unwrap();
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 0);
    gateways.live("wireguard-worker/a/ff_a/data", "");
    gateways.data("a", "ff_a");
    gateways.on_disconnect(Instant::now());
    assert!(gateways.is_reserved(&key, false));
    gateways.arrive("a", 0);
    gateways.live("wireguard-worker/a/ff_a/data", "");
    gateways.on_disconnect(Instant::now());
    assert!(!gateways.is_reserved(&key, false));
}

#[test]
fn removed_retained_messages_make_no_gateway() {
    for topic in [
        "wireguard-worker/gone/status",
        "wireguard-worker/gone/ff_a/data",
        "wireguard-metrics/ff_a/gone/connected_peers",
        "wgkex/worker/gone/hello",
    ] {
        let mut gateways = gateways(&[]);
        gateways.live(topic, "");
        gateways.found(topic, "");
        assert!(!gateways.is_known(&domain("ff_a")), "{topic}");
        assert_eq!(gateways.statuses(Instant::now()), [], "{topic}");
        assert!(gateways.reachability().is_empty(), "{topic}");
    }
}

#[test]
fn a_confirmation_is_a_sign_of_life_and_counts_only_from_one_that_can_take_the_key() {
    let (mut gateways, now) = (gateways(&[]), Instant::now());
    gateways.arrive("a", 0);
    assert!(gateways.can_confirm(&name("a"), "ff_a") && !gateways.can_confirm(&name("a"), "ff_b"));
    gateways.live("wireguard-worker/a/status", "0");
    assert!(!gateways.can_confirm(&name("a"), "ff_a"));
    assert!(gateways.on_confirmation(&name("a"), now));
    assert!(gateways.can_confirm(&name("a"), "ff_a"));
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "-1");
    assert!(
        gateways.on_confirmation(&name("a"), now) && !gateways.can_confirm(&name("a"), "ff_a"),
        "its interface is missing"
    );
    gateways.live("wireguard-worker/original/status", "1");
    assert!(!gateways.on_confirmation(&name("original"), now), "it cannot know what it says");
}

#[test]
fn unserved_domains_and_whether_a_gateway_ever_served_them() {
    let mut gateways = gateways(&[]);
    let unserved = |gateways: &Gateways| -> Vec<_> {
        gateways.unserved().into_iter().map(|unserved| (unserved.domain.to_string(), unserved.is_known)).collect()
    };
    assert_eq!(unserved(&gateways), [("ff_a".into(), false), ("ff_b".into(), false)]);
    gateways.live("wgkex/worker/a/hello", r#"{"version":"1","can":["confirm"],"domains":["ff_a"]}"#);
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "0");
    gateways.live("wireguard-worker/a/status", "1");
    assert_eq!(unserved(&gateways), [("ff_b".into(), false)]);
    gateways.live("wireguard-worker/a/status", "0");
    gateways.on_disconnect(Instant::now());
    assert_eq!(unserved(&gateways), [("ff_a".into(), true), ("ff_b".into(), false)]);
    gateways.live("wgkex/worker/b/hello", r#"{"version":"1","can":["confirm"]}"#);
    assert_eq!(unserved(&gateways), [("ff_a".into(), true), ("ff_b".into(), true)], "it may serve any");
}

#[test]
fn connected_peers_are_those_that_are_counted_and_assigned_ones_stand_apart() {
    let mut gateways = gateways(&[]);
    gateways.arrive("a", 5);
    gateways.answer();
    gateways.answer();
    let status = gateways.statuses(Instant::now()).remove(0);
    assert_eq!((status.connected, status.assigned, status.target), (5, 2, 7.0));
    assert_eq!((status.domains[0].connected, status.domains[0].assigned), (5, 2));
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "6");
    let status = gateways.statuses(Instant::now()).remove(0);
    assert_eq!((status.connected, status.assigned), (6, 0));
}

/// Failed before: the version was shown as an original's, and no reason was shown.
#[test]
fn an_offline_gateway_keeps_its_version_and_has_time_and_reason() {
    let mut gateways = gateways(&[]);
    let offline = |gateways: &Gateways, after: u64| {
        let now = Instant::now() + Duration::from_secs(after);
        let status = gateways.statuses(now).remove(0);
        (status.online, status.version, status.offline.map(|offline| (offline.reason, offline.for_secs.is_some())))
    };
    let version = || Some("1".to_owned());
    gateways.arrive("a", 0);
    assert_eq!(offline(&gateways, 0), (true, version(), None));
    gateways.live("wireguard-worker/a/status", "0");
    assert_eq!(offline(&gateways, 0), (false, version(), Some((OfflineReason::ConnectionLost, true))));
    gateways.arrive("a", 0);
    // The messages of a worker that stops.
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "-1");
    gateways.live("wgkex/worker/a/hello", "");
    assert_eq!(gateways.statuses(Instant::now())[0].domains[0].state, GatewayDomainState::Down(Some(0)));
    gateways.live("wireguard-worker/a/status", "0");
    assert_eq!(offline(&gateways, 0), (false, version(), Some((OfflineReason::Stopped, true))));
    let later = Instant::now() + Duration::from_secs(90);
    assert_eq!(gateways.statuses(later)[0].offline.as_ref().unwrap().for_secs, Some(90));
    // A state that is received as retained after a reconnection is of unknown age, and the version is not forgotten.
    gateways.on_disconnect(Instant::now());
    gateways.found("wireguard-worker/a/status", "0");
    gateways.found("wireguard-metrics/ff_a/a/connected_peers", "-1");
    assert_eq!(offline(&gateways, 0), (false, version(), Some((OfflineReason::ConnectionLost, true))));
    // An original takes its place.
    gateways.live("wireguard-worker/a/status", "1");
    assert_eq!(offline(&gateways, 0), (true, Some("original".into()), None));
    gateways.live("wireguard-worker/a/status", "0");
    assert_eq!(offline(&gateways, 0).1, Some("original".into()));
    gateways.arrive("a", 0);
    let silent = Instant::now() + Duration::from_secs(200);
    assert_eq!(gateways.expire(silent), [name("a")]);
    let status = gateways.statuses(silent + Duration::from_secs(7)).remove(0);
    let Offline { reason: OfflineReason::Silent(silence), for_secs } = status.offline.unwrap() else { panic!() };
    assert!((199..=200).contains(&silence) && for_secs == Some(7));
    let mut newcomer = self::gateways(&[]);
    newcomer.found("wireguard-worker/a/status", "0");
    assert_eq!(offline(&newcomer, 0), (false, None, Some((OfflineReason::ConnectionLost, false))));
    newcomer.data("b", "ff_a");
    let status = newcomer.statuses(Instant::now()).remove(1);
    assert_eq!(status.offline.map(|offline| offline.reason), Some(OfflineReason::NeverOnline));
}

#[test]
fn what_is_remembered_while_there_is_no_connection_is_bounded() {
    let mut gateways = gateways(&[]);
    for round in 0..2 {
        for number in 0..NAMES_MAX {
            let topic = Topic::WorkerStatus { worker: name(&format!("{round}-{number}")) };
            gateways.apply(&topic, b"1", false, Instant::now()).unwrap();
        }
        gateways.on_disconnect(Instant::now());
    }
    assert_eq!(gateways.remembered.len(), NAMES_MAX);
}

/// Failed before: the gateways vanished from the page as soon as the connection was lost.
#[test]
fn operators_see_what_was_last_known_until_the_states_are_received_again() {
    let mut gateways = gateways(&[]);
    let begun = Instant::now();
    let shown = |gateways: &Gateways, seconds| {
        let shown = gateways.shown(begun + Duration::from_secs(seconds)).into_iter();
        shown.map(|gateway| (gateway.name, gateway.online, gateway.last_known_secs)).collect::<Vec<_>>()
    };
    gateways.is_synced = true;
    gateways.arrive("a", 7);
    gateways.arrive("b", 0);
    assert_eq!(shown(&gateways, 0), [("a".into(), true, None), ("b".into(), true, None)]);
    gateways.on_disconnect(begun);
    assert_eq!(shown(&gateways, 40), [("a".into(), true, Some(40)), ("b".into(), true, Some(40))]);
    assert_eq!(gateways.statuses(begun), [], "selection and metrics do not count them");
    // A connection that is lost before the states are received takes nothing away.
    gateways.found("wireguard-worker/b/status", "0");
    assert_eq!(shown(&gateways, 50), [("a".into(), true, Some(50)), ("b".into(), false, None)]);
    gateways.on_disconnect(begun + Duration::from_secs(60));
    assert_eq!(shown(&gateways, 70), [("a".into(), true, Some(70)), ("b".into(), true, Some(70))]);
    gateways.echo = Some(begun);
    assert!(gateways.check_synced(begun + RETAINED_WAIT_MAX));
    assert_eq!(shown(&gateways, 80), []);
}

#[test]
fn problems_of_the_fleet_are_known_once_the_states_are() {
    let mut gateways = gateways(&[("a", 1.0), ("never", 1.0)]);
    let kinds = |gateways: &Gateways| {
        let problems = gateways.problems(Instant::now()).all().into_iter();
        problems.map(|problem| (problem.kind, problem.subject)).collect::<Vec<_>>()
    };
    assert_eq!(kinds(&gateways), []);
    gateways.is_synced = true;
    gateways.arrive("a", 0);
    let unserved = (ProblemKind::DomainWithoutGateway, "ff_b".to_owned());
    let never = (ProblemKind::GatewayOffline, "never".to_owned());
    assert_eq!(kinds(&gateways), [unserved, never]);
    gateways.arrive("b", 0);
    assert!(kinds(&gateways).contains(&(ProblemKind::SameKey, "a, b".into())), "{:?}", kinds(&gateways));
    gateways.live("wireguard-worker/b/status", "0");
    assert_eq!(kinds(&gateways).len(), 2, "what an offline gateway has left disturbs nobody");
}

#[test]
fn the_standings_agree_with_the_choice() {
    let mut gateways = gateways(&[("a", 2.0), ("b", 1.0), ("null", 0.0)]);
    for (worker, peers) in [("a", 9), ("b", 3), ("null", 0)] {
        gateways.arrive(worker, peers);
    }
    gateways.arrive("down", 0);
    gateways.live("wireguard-metrics/ff_a/down/connected_peers", "-1");
    gateways.data("gone", "ff_a");
    let standings = gateways.standings(router(&domain("ff_a")));
    for standing in &standings {
        let worker = name(&standing.name);
        let is_selected = gateways.select(router(&domain("ff_a")), |candidate, _| *candidate == worker).is_some();
        assert_eq!(standing.unfit.is_none(), is_selected, "{standing:?}");
    }
    let fit = standings.iter().filter(|standing| standing.unfit.is_none() && standing.last_resort.is_none());
    let best = fit.min_by(|a, b| a.distance.total_cmp(&b.distance)).unwrap();
    assert_eq!(Some(best.name.clone()), gateways.best("ff_a"));
    assert_eq!((best.name.as_str(), best.target, best.distance), ("b", 4.0, -1.0));
    let texts: Vec<_> = standings.iter().filter_map(|standing| standing.unfit.as_deref()).collect();
    assert_eq!(texts, ["the interface is missing there (-1)", "offline: it has not published that it is online"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn shares_after_many_answers_are_the_weights(weights in prop::collection::vec(1_u32..=100, 1..8)) {
        let names: Vec<String> = (0..weights.len()).map(|number| format!("gw{number}")).collect();
        let configured: Vec<_> = names.iter().map(String::as_str).zip(weights.iter().copied().map(f64::from)).collect();
        let mut gateways = gateways(&configured);
        for name in &names {
            gateways.arrive(name, 0);
        }
        let mut answers = BTreeMap::new();
        for _ in 0..10_000 {
            *answers.entry(gateways.answer()).or_insert(0_u32) += 1;
        }
        let sum: u32 = weights.iter().sum();
        for (name, weight) in names.iter().zip(&weights) {
            let share = f64::from(answers.get(name).copied().unwrap_or_default()) / 10_000.0;
            prop_assert!((share - f64::from(*weight) / f64::from(sum)).abs() < 0.01, "{name}: {share}");
        }
    }

}

proptest! {
    #[test]
    fn no_payload_panics_and_no_offline_gateway_is_selected(
        messages in prop::collection::vec((0_usize..6, 0_usize..3, payload(), any::<bool>()), 0..60),
    ) {
        let mut gateways = gateways(&[("w0", 2.0)]);
        for (kind, worker, payload, retained) in messages {
            let worker = name(&format!("w{worker}"));
            let topic = match kind {
                0 => Topic::WorkerStatus { worker },
                1 => Topic::WorkerData { worker, domain: "ff_a".into() },
                2 => Topic::ConnectedPeers { domain: "ff_a".into(), worker },
                3 => Topic::WorkerHello { worker },
                4 => Topic::BrokerStatus { broker: worker.as_str().parse().unwrap() },
                _ => Topic::Applied { worker },
            };
            let _ = gateways.apply(&topic, &payload, retained, Instant::now());
            if let Some(best) = gateways.best("ff_a") {
                let worker = &gateways.by_name[best.as_str()];
                prop_assert!(worker.online && worker.peers[&domain("ff_a")].is_some());
            }
        }
    }
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(b"0".to_vec()),
        Just(b"1".to_vec()),
        Just(b"-1".to_vec()),
        Just(b"".to_vec()),
        Just(br#"{"version":"1","can":["confirm"]}"#.to_vec()),
        Just(format!(r#"{{"ExternalAddress":"x","Port":1,"PublicKey":"{KEY}","LinkAddress":"l"}}"#).into_bytes()),
        prop::collection::vec(any::<u8>(), 0..20),
    ]
}

#[test]
fn gateways_that_are_online_and_revoke_are_reachable() {
    let mut gateways = gateways(&[("named", 1.0)]);
    let hello = |can: &str| format!(r#"{{"version":"1","can":[{can}]}}"#);
    for (worker, can) in [("new", r#""confirm","revoke""#), ("old", r#""confirm""#)] {
        gateways.live(&format!("wgkex/worker/{worker}/hello"), &hello(can));
        gateways.live(&format!("wireguard-worker/{worker}/status"), "1");
    }
    gateways.live("wireguard-worker/original/status", "1");
    gateways.found("wireguard-worker/nobody/status", "0");
    gateways.data("away", "ff_a");
    gateways.found("wireguard-worker/away/status", "0");
    let reach: Vec<_> = gateways.reachability().into_iter().collect();
    let expected = [
        ("away", Reachability::Offline),
        ("named", Reachability::Offline),
        ("new", Reachability::Online),
        ("old", Reachability::Unsupported),
        ("original", Reachability::Unsupported),
    ];
    assert_eq!(reach, expected.map(|(worker, reach)| (name(worker), reach)));
}

#[test]
fn a_gateway_that_routers_do_not_reach_is_a_problem() {
    let mut gateways = gateways(&[]);
    gateways.is_synced = true;
    gateways.arrive("gw1", 0);
    gateways.data("original", "ff_a");
    gateways.live("wireguard-metrics/ff_a/original/connected_peers", "0");
    gateways.live("wireguard-worker/original/status", "1");
    let id = |n: u8| KeyId { domain: domain("ff_a"), key: PublicKey::from_bytes([n; 32]).unwrap() };
    let begun = Instant::now();
    let unreached = |gateways: &Gateways| {
        let problems = gateways.problems(Instant::now()).all().into_iter();
        let found = problems.filter(|problem| problem.kind == ProblemKind::RoutersUnreached);
        (found.map(|problem| problem.text).collect::<Vec<_>>(), gateways.statuses(begun)[0].reach)
    };
    for minute in 0..=5 {
        assert_eq!(unreached(&gateways).0, Vec::<String>::new(), "{minute} min");
        for n in 10..15 {
            for gateway in ["gw1", "original"] {
                gateways.on_given(&name(gateway), &id(n), false, begun + Duration::from_secs(minute * 60));
            }
        }
    }
    let (problems, reach) = unreached(&gateways);
    assert_eq!(problems.len(), 1, "originals report no handshakes: {problems:?}");
    assert!(
        problems[0].starts_with("gateway gw1: 5 of 5 routers that were given it have no handshake"),
        "{problems:?}"
    );
    assert_eq!(reach.unreached, 5);
    for n in 10..13 {
        gateways.on_handshake(&name("gw1"), "ff_a", id(n).key);
    }
    let (problems, reach) = unreached(&gateways);
    assert_eq!((problems.len(), reach.reached, reach.unreached), (0, 3, 2));
}

/// `worker` publishes its hello again, with a drain or without.
fn hello(gateways: &mut Gateways, worker: &str, drain: &str) {
    let hello = format!(r#"{{"version":"1","can":["confirm"]{drain}}}"#);
    gateways.live(&format!("wgkex/worker/{worker}/hello"), &hello);
}

const DRAIN: &str = r#","drain":{"since":7,"reason":"kernel"}"#;

#[test]
fn a_gateway_that_drains_is_passed_over_by_its_own_word_or_by_the_brokers() {
    let mut gateways = gateways(&[("a", 1.0), ("b", 1.0)]);
    gateways.arrive("a", 5);
    gateways.arrive("b", 90);
    assert!(gateways.best("ff_a").as_deref() == Some("a") && !gateways.is_any_draining());
    hello(&mut gateways, "a", DRAIN);
    assert!(gateways.best("ff_a").as_deref() == Some("b") && gateways.is_any_draining());
    let (domain, current_gateway) = (domain("ff_a"), name("a"));
    let router = Router { current_gateway: Some(&current_gateway), ..router(&domain) };
    assert_eq!(gateways.select(router, |_, _| true).unwrap().worker, current_gateway, "a router that is there stays");
    let status = &gateways.statuses(Instant::now())[0];
    assert_eq!((status.state(), status.draining.len()), ("draining", 1));
    let standing = &gateways.standings(self::router(&domain))[0];
    assert_eq!(standing.last_resort.as_deref(), Some("draining since 1970-01-01T00:00:07Z: kernel"));
    assert!(gateways.online(&domain).confirming.contains(&current_gateway), "keys still go there");
    let drain = Drain { since: 8, until: Some(9), reason: None, deadline: None };
    assert_eq!(gateways.set_drain(&name("b"), Some(drain), Instant::now()), Ok(false));
    assert_eq!(gateways.best("ff_a").as_deref(), Some("a"), "there is no other");
    gateways.on_disconnect(Instant::now());
    gateways.arrive("a", 5);
    gateways.arrive("b", 0);
    assert_eq!(gateways.best("ff_a").as_deref(), Some("a"), "what the broker drains stays");
    assert_eq!(gateways.expire_drains(9, Instant::now()), [name("b")]);
    assert!(!gateways.is_any_draining());
}

#[test]
fn a_gateway_past_the_deadline_of_its_drain_keeps_no_router_and_is_the_very_last_resort() {
    let mut gateways = gateways(&[("a", 1.0), ("b", 1.0)]);
    gateways.arrive("a", 5);
    gateways.arrive("b", 90);
    let drain =
        |is_over: bool| format!(r#","drain":{{"since":7,"deadline":{{"at":9,"percent":25,"is_over":{is_over}}}}}"#);
    let (domain, current_gateway) = (domain("ff_a"), name("a"));
    let router = Router { current_gateway: Some(&current_gateway), ..router(&domain) };
    let best = |gateways: &Gateways| gateways.select(router, |_, _| true).unwrap().worker.to_string();
    hello(&mut gateways, "a", &drain(false));
    assert_eq!(best(&gateways), "a", "it stays until the deadline");
    hello(&mut gateways, "a", &drain(true));
    assert_eq!(best(&gateways), "b");
    let standing = &gateways.standings(router)[0];
    let why = "draining since 1970-01-01T00:00:07Z, peers are being removed since 1970-01-01T00:00:09Z, 25 % a minute";
    assert_eq!((standing.last_resort.as_deref(), &standing.note), (Some(why), &None));
    let drained = Drain { since: 8, until: None, reason: None, deadline: None };
    gateways.set_drain(&name("b"), Some(drained.clone()), Instant::now()).unwrap();
    assert_eq!(best(&gateways), "b", "another one that drains is better");
    gateways.set_drain(&name("a"), Some(drained), Instant::now()).unwrap();
    assert_eq!(best(&gateways), "b", "its own word is the stronger one");
    gateways.live("wireguard-worker/b/status", "0");
    assert_eq!(best(&gateways), "a", "there is no other");
    assert!(gateways.online(&domain).confirming.contains(&current_gateway), "keys still go there");
}

#[test]
fn a_gateway_that_comes_back_to_peers_elsewhere_is_filled_slowly() {
    let mut gateways = gateways(&[("a", 1.0), ("b", 1.0)]);
    for worker in ["a", "b"] {
        gateways.found(&format!("wgkex/worker/{worker}/hello"), r#"{"version":"1","can":["confirm"]}"#);
        gateways.data(worker, "ff_a");
        gateways.found(&format!("wireguard-metrics/ff_a/{worker}/connected_peers"), "500");
        gateways.found(&format!("wireguard-worker/{worker}/status"), "1");
    }
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "0");
    assert_eq!(gateways.best("ff_a").as_deref(), Some("a"), "it was there before this broker looked");
    gateways.live("wireguard-worker/a/status", "0");
    gateways.arrive("a", 1);
    assert_eq!(gateways.best("ff_a").as_deref(), Some("b"));
    let note = gateways.standings(router(&domain("ff_a")))[0].note.clone();
    assert!(note.unwrap().starts_with("it came back"));
    let later = |seconds| Instant::now() + Duration::from_secs(seconds);
    let best = |gateways: &Gateways, now| {
        let domain = domain("ff_a");
        gateways.select(Router { now, ..router(&domain) }, |_, _| true).unwrap().worker.to_string()
    };
    assert_eq!((best(&gateways, later(90)), best(&gateways, later(901))), ("a".into(), "a".into()));
    hello(&mut gateways, "a", DRAIN);
    hello(&mut gateways, "a", "");
    assert_eq!(gateways.best("ff_a").as_deref(), Some("b"), "a drain that ends is a return");
    gateways.live("wireguard-metrics/ff_a/a/connected_peers", "480");
    assert_eq!(gateways.best("ff_a").as_deref(), Some("a"), "it has its peers");
}

#[test]
fn a_gateway_whose_clock_is_off_is_a_problem_while_it_is_online_and_after_the_bus_was_lost() {
    let mut gateways = gateways(&[]);
    let clocks = |gateways: &mut Gateways| {
        gateways.is_synced = true;
        let problems = gateways.problems(Instant::now()).all().into_iter();
        let clocks = problems.filter(|problem| problem.kind == ProblemKind::ClockOff);
        clocks.map(|problem| format!("{}: {}", problem.subject, problem.text)).collect::<Vec<_>>()
    };
    gateways.arrive("a", 0);
    gateways.on_time(&name("a"), 4_600, 1_000);
    assert_eq!(clocks(&mut gateways), [""; 0], "one hello may have come late");
    gateways.on_time(&name("a"), 4_660, 1_060);
    gateways.on_time(&name("none"), 4_660, 1_060);
    let expected = ["a: gateway a: its clock is 3600 s ahead of this broker's: one of the two is wrong"];
    assert_eq!(clocks(&mut gateways), expected);
    gateways.on_disconnect(Instant::now());
    gateways.arrive("a", 0);
    assert_eq!(clocks(&mut gateways), expected);
    gateways.live("wireguard-worker/a/status", "0");
    assert_eq!(clocks(&mut gateways), [""; 0]);
}

#[test]
fn a_fleet_without_peers_starts_as_a_whole() {
    let mut gateways = gateways(&[]);
    gateways.found("wireguard-worker/a/status", "1");
    gateways.arrive("a", 0);
    gateways.arrive("b", 0);
    let answers: Vec<_> = (0..6).map(|_| gateways.answer()).collect();
    assert_eq!(answers.iter().filter(|worker| *worker == "a").count(), 3, "{answers:?}");
}
