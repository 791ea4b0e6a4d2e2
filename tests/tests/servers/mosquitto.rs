//! Mosquitto gives a subscriber about a thousand of the retained messages, and drops the rest.
//!
//! Failed while a broker knew only what it was given on its subscription, and workers published their states but once.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use wgkex_tests::http::ask;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::{Probe, Role, Said, said};
use wgkex_tests::scripted::{data, peers_of, status};
use wgkex_tests::stack::{Bus, Plan, Stack, V2};
use wgkex_tests::{DEADLINE, key};

/// With them each gateway has eight retained messages.
const DOMAINS: [&str; 3] = ["ffx_a", "ffx_b", "ffx_c"];

/// Gateways that are played.
const PLAYED: usize = 997;

/// Real workers, whose messages are the last that are retained.
const REAL: [&str; 3] = ["real1", "real2", "real3"];

/// How long after a broker came up a gateway publishes its states for it, and how often it does in any case.
const FOR_A_NEWCOMER: Duration = Duration::from_secs(5);
const ALWAYS: Duration = Duration::from_secs(60);

/// Within a minute, on a machine that does other things, too.
const KNOWN: Duration = Duration::from_secs(180);

#[test]
fn a_broker_knows_more_gateways_than_the_server_gives_it_retained() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto).domains(DOMAINS));
    stack.start_mosquitto();
    let played = Played::start(&stack);
    let topics = REAL.map(|name| format!("wireguard-worker/{name}/status"));
    let witness = stack.probe(Role::new("witness", &topics.each_ref().map(String::as_str)));
    let _real = REAL.map(|name| InMemory::start(&stack, name));
    topics.iter().for_each(|topic| assert_eq!(witness.next_on(topic).text(), "1"));

    stack.start_broker();
    stack.wait_until_ready();
    let mut missing = Missing::all();
    played.live_until(|| missing.find(&stack));
}

/// Gateways on one connection, which live as real ones do: they publish their states again.
struct Played {
    probe: Probe,
    states: Vec<Vec<Said>>,
}

impl Played {
    fn start(stack: &Stack) -> Self {
        let probe = stack.probe(Role::new("played", &[]));
        let states: Vec<_> = (0..PLAYED).map(|n| states(&name(n))).collect();
        probe.say_all(states.iter().flatten().cloned());
        Self { probe, states }
    }

    /// A broker has come up.
    fn live_until(&self, mut is_done: impl FnMut() -> bool) {
        let begun = Instant::now();
        self.publish(FOR_A_NEWCOMER, false);
        while !is_done() {
            assert!(begun.elapsed() < KNOWN, "the broker does not know all gateways after {KNOWN:?}");
            if begun.elapsed() > ALWAYS {
                self.publish(Duration::ZERO, true);
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// All publish their states, spread over a time.
    fn publish(&self, spread: Duration, retain: bool) {
        let begun = Instant::now();
        for (n, states) in (0..).zip(&self.states) {
            thread::sleep((spread * n / 1000).saturating_sub(begun.elapsed()));
            self.probe.say_all(states.iter().cloned().map(|state| Said { retain, ..state }));
        }
    }
}

fn name(n: usize) -> String {
    format!("played{n:03}")
}

/// All that a gateway retains. It does not confirm, so that the broker answers without its word.
fn states(name: &str) -> Vec<Said> {
    let hello = said(format!("wgkex/worker/{name}/hello"), r#"{"version":"0.1.0","can":[]}"#, 1, true);
    let data = DOMAINS.map(|domain| data(name, domain));
    let counts = DOMAINS.map(|domain| peers_of(name, domain, "0"));
    [hello].into_iter().chain(data).chain(counts).chain([status(name, "1")]).collect()
}

/// What the broker has not shown yet that it knows.
struct Missing {
    /// Gateways that are not on the page as online, with a version and with a count for each domain.
    on_the_page: BTreeSet<String>,
    /// Gateways that no router was given, by domain.
    given: [BTreeSet<String>; 3],
    keys: u32,
}

impl Missing {
    fn all() -> Self {
        let all: BTreeSet<_> = (0..PLAYED).map(name).chain(REAL.map(str::to_owned)).collect();
        Self { on_the_page: all.clone(), given: [(); 3].map(|()| all.clone()), keys: 0 }
    }

    /// Whether nothing is missing any more.
    fn find(&mut self, stack: &Stack) -> bool {
        let page = stack.get("/").body;
        let known = page.split("<tr>").filter(|row| {
            let counts = DOMAINS.iter().all(|domain| row.contains(&format!("{domain} (")));
            counts && ["original", "offline"].iter().all(|word| !row.contains(word)) && row.contains("online")
        });
        let names = known.filter_map(|row| row.strip_prefix("<td>")?.split('<').next());
        for name in names {
            self.on_the_page.remove(name);
        }
        self.on_the_page.is_empty() && (0..DOMAINS.len()).all(|place| self.ask(stack, place))
    }

    /// Routers are given one gateway after the other, as all have the same weight and as many peers.
    fn ask(&mut self, stack: &Stack, place: usize) -> bool {
        let (mut http, begun) = (stack.connect(), Instant::now());
        while !self.given[place].is_empty() && begun.elapsed() < DEADLINE {
            self.keys += 1;
            let answer = http.post(V2, &ask(DOMAINS[place], &key(self.keys)));
            assert_eq!(answer.status, 200, "{answer:?}");
            let address = answer.json()["Endpoint"]["Address"].as_str().map(str::to_owned).unwrap_or_default();
            self.given[place].remove(address.trim_end_matches(".example"));
        }
        self.given[place].is_empty()
    }
}
