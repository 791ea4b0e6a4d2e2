//! The gateway that a router gets (contract section 6), and the broker's knowledge at its first request.

use std::collections::BTreeMap;

use wgkex_tests::http::{Http, ask};
use wgkex_tests::key;
use wgkex_tests::probe::{Message, Role};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, data, endpoint, hello, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V2};
use wgkex_tests::{DEADLINE, wait_until};

use super::{assert_unavailable, on_both};

on_both!(
    a_thousand_answers_follow_the_formula,
    all_states_of_fifty_workers_in_ten_domains_arrive,
    a_broker_that_has_just_started_gives_no_wrong_answer,
);

/// Weight and peers of a gateway; no weight means that the config does not name it.
struct Share {
    name: &'static str,
    weight: Option<f64>,
    peers: f64,
}

const SHARES: [Share; 4] = [
    Share { name: "gw1", weight: Some(84.0), peers: 10.0 },
    Share { name: "gw2", weight: Some(21.0), peers: 120.0 },
    Share { name: "gw3", weight: Some(42.5), peers: 0.0 },
    Share { name: "gw4", weight: None, peers: 2.0 },
];

/// The next gateway: the smallest peers - target, where target = weight / sum of the configured weights x peers of all.
fn next(shares: &[Share]) -> usize {
    let configured: f64 = shares.iter().filter_map(|share| share.weight).sum();
    let all: f64 = shares.iter().map(|share| share.peers).sum();
    let excess = |share: &Share| share.peers - share.weight.unwrap_or(1.0) / configured * all;
    let places = 0..shares.len();
    places.min_by(|&a, &b| excess(&shares[a]).total_cmp(&excess(&shares[b]))).expect("a gateway")
}

fn a_thousand_answers_follow_the_formula(bus: Bus) {
    let weights = "workers: {gw1: {weight: 84}, gw2: {weight: 21}, gw3: {weight: 42.5}}";
    let stack = Stack::start(Plan::new(bus).config(weights));
    let workers = SHARES.map(|share| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small whole number")]
        Worker::start(&stack, share.name, WorkerBehaviour::Original, share.peers as u64)
    });
    stack.wait_for_gateways(4);
    let mut shares = SHARES;
    let mut http = stack.connect();
    for n in 0..1000 {
        let chosen = next(&shares);
        shares[chosen].peers += 1.0;
        let response = http.post(V2, &ask(DOMAIN, &key(n)));
        assert_eq!(response.json(), endpoint(shares[chosen].name), "answer {n}");
    }
    drop(workers);
}

const WORKERS: u32 = 50;

fn name(n: u32) -> String {
    format!("gw{n:02}.example.org")
}

/// Publishes the retained states of 50 workers. The last worker is the best in every domain.
fn say_states(stack: &Stack) {
    let probe = stack.probe(Role::new("fleet", &[]));
    for n in 0..WORKERS {
        let name = name(n);
        let domains = || stack.plan.domains.iter();
        let messages = [hello(&name).with_no_abilities()].into_iter();
        let messages = messages.chain(domains().map(|domain| data(&name, domain)));
        let messages = messages.chain(domains().map(|domain| peers_of(&name, domain, &(WORKERS - n).to_string())));
        probe.publish_all(messages.chain([status(&name, "1")]));
    }
}

trait WithNoAbilities {
    fn with_no_abilities(self) -> Self;
}

impl WithNoAbilities for Message {
    /// So that no confirmation is needed.
    fn with_no_abilities(self) -> Self {
        Self { payload: br#"{"version":"0.1.0","can":[]}"#.into(), ..self }
    }
}

fn ten_domains(bus: Bus) -> Plan {
    Plan::new(bus).domains((0..10).map(|n| format!("ffx_{n}")))
}

/// Waits until the page shows each gateway with all its domains and peers.
fn wait_for_all_states(stack: &Stack) {
    let row = |n: u32| {
        let domains: Vec<_> = stack.plan.domains.iter().map(|domain| format!("{domain} ({})", WORKERS - n)).collect();
        (name(n), domains.join(", "))
    };
    let rows: BTreeMap<_, _> = (0..WORKERS).map(row).collect();
    wait_until("the page shows all states", || {
        let page = stack.get("/").body;
        rows.iter().all(|(name, domains)| page.contains(name) && page.contains(domains)).then_some(())
    });
}

fn all_states_of_fifty_workers_in_ten_domains_arrive(bus: Bus) {
    let mut stack = Stack::start(ten_domains(bus));
    say_states(&stack);
    wait_for_all_states(&stack);
    // A later client receives all of it.
    let late = stack.probe(Role::new("late", &["#"]).at_most_once());
    let expected = WORKERS as usize * (2 + 2 * stack.plan.domains.len());
    wait_until("everything retained", || {
        let retained =
            late.received().iter().filter(|message| message.retain && message.topic.contains("example.org")).count();
        (retained == expected).then_some(())
    });
    let _ = stack.stop_broker();
    stack.start_broker();
    stack.wait_until_ready();
    // A ready broker has all states: the first answer is right, in each domain.
    for domain in &stack.plan.domains {
        assert_eq!(stack.v2(domain, &key(1)).json(), endpoint(&name(WORKERS - 1)), "{domain}");
    }
}

/// Both servers retained the states; no last will was published.
fn a_broker_that_has_just_started_gives_no_wrong_answer(bus: Bus) {
    let mut stack = Stack::start(ten_domains(bus));
    say_states(&stack);
    wait_for_all_states(&stack);
    for round in 0..5 {
        let _ = stack.stop_broker();
        stack.start_broker();
        let begun = std::time::Instant::now();
        let first = loop {
            assert!(begun.elapsed() < DEADLINE, "no answer but 503");
            let Ok(mut http) = Http::try_connect(stack.http) else { continue };
            let ready = http.get("/readyz").status == 200;
            let response = http.post(V2, &ask("ffx_7", &key(round)));
            if response.status == 200 || ready {
                break response;
            }
            assert_unavailable(&response);
        };
        assert_eq!(first.json(), endpoint(&name(WORKERS - 1)), "{first:?}");
    }
}
