//! Mosquitto gives a subscription of quality of service 1 about a thousand of the retained messages, and drops the
//! rest. Brokers subscribe to states with quality of service 0, and gateways publish theirs again: either is enough, so
//! this is no regression test.

use std::collections::BTreeSet;
use std::fs;
use std::iter;
use std::thread;
use std::time::{Duration, Instant};

use wgkex_common::Domain;
use wgkex_tests::http::Http;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::{Message, Probe, Role, message};
use wgkex_tests::scripted::{data, peers_of, status};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{key, wait_until};

/// With them each gateway has eight retained messages.
const DOMAINS: [&str; 3] = ["ffx_a", "ffx_b", "ffx_c"];

/// Scripted gateways.
const PLAYED: usize = 999;

/// A real worker, whose messages are the last retained ones.
const REAL: &str = "real";

/// The delay after a broker's start at which a gateway publishes its states for it, and the interval at which it does
/// so in any case.
const FOR_A_NEWCOMER: Duration = Duration::from_secs(5);
const ALWAYS: Duration = Duration::from_secs(60);

/// Within a minute, on a busy machine.
const KNOWN: Duration = Duration::from_secs(240);

#[test]
fn a_broker_knows_more_gateways_than_the_server_gives_it_retained() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto).domains(DOMAINS));
    stack.start_mosquitto();
    let played = Played::start(&stack);
    let topic = format!("wireguard-worker/{REAL}/status");
    let witness = stack.probe(Role::new("witness", &[&topic]));
    let _real = InMemory::start(&stack, REAL);
    assert_eq!(witness.next_on(&topic).text(), "1");

    stack.start_broker();
    let mut missing = Missing::all();
    played.live_until(|| missing.find(&stack));
}

/// Debian's Mosquitto with this setting ends the connection of a client that publishes on a topic outside its access
/// list. Regression: no connection lasted, no router was served, and the log blamed a server with one connection per
/// program.
#[test]
fn with_the_originals_access_list_routers_are_served_and_missing_rights_are_logged() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    let list = stack.dir().join("access");
    let trees = ["wireguard", "wireguard-worker", "wireguard-broker", "wireguard-metrics"];
    fs::write(&list, trees.map(|tree| format!("topic readwrite {tree}/#\n")).concat()).unwrap();
    stack.plan.mosquitto = format!("max_queued_messages 0\nacl_file {}", list.display());
    stack.start_mosquitto();
    let gateway = InMemory::start(&stack, "gw1");
    stack.start_broker();
    stack.wait_until_ready();
    wait_until("routers are served", || {
        (stack.v1(DOMAIN, &key(1)).status == 200 && stack.v2(DOMAIN, &key(1)).status == 200).then_some(())
    });
    let domain = Domain::new(DOMAIN, &["ffx_".into()]).unwrap();
    wait_until("the gateway has the key", || {
        gateway.kernel.device(&domain)?.peers.contains_key(&key(1).parse().unwrap()).then_some(())
    });
    let line = stack.broker().wait_for_log("ends the connection when this program publishes below wgkex/");
    assert!(line.contains("WARN") && line.contains("access list"), "{line}");
    let log = stack.broker().log();
    assert!(!log.contains("one connection only"), "{log}");
    assert!(log.matches("MQTT connected").count() <= 4, "{log}");
}

/// Gateways on one connection, which publish their states again like real ones.
struct Played {
    probe: Probe,
    states: Vec<Vec<Message>>,
}

impl Played {
    fn start(stack: &Stack) -> Self {
        let probe = stack.probe(Role::new("played", &[]));
        let states: Vec<_> = (0..PLAYED).map(|n| states(&name(n))).collect();
        probe.publish_all(states.iter().flatten().cloned());
        Self { probe, states }
    }

    /// After a broker's start: all gateways publish their states for it, and then again and again.
    fn live_until(&self, mut is_done: impl FnMut() -> Result<(), String>) {
        let begun = Instant::now();
        let rounds = iter::once((FOR_A_NEWCOMER, false)).chain(iter::repeat((ALWAYS, true)));
        for (spread, retain) in rounds {
            let round = Instant::now();
            for (n, states) in (1..).zip(&self.states) {
                self.probe.publish_all(states.iter().cloned().map(|state| Message { retain, ..state }));
                thread::sleep((spread * n / 1000).saturating_sub(round.elapsed()));
                if n % 100 == 0 || n as usize == PLAYED {
                    let Err(missing) = is_done() else { return };
                    assert!(
                        begun.elapsed() < KNOWN,
                        "after {KNOWN:?} the broker does not know all gateways: {missing}"
                    );
                }
            }
        }
    }
}

fn name(n: usize) -> String {
    format!("played{n:03}")
}

/// All that a gateway retains. It does not confirm keys.
fn states(name: &str) -> Vec<Message> {
    let hello = message(format!("wgkex/worker/{name}/hello"), r#"{"version":"0.1.0","can":[]}"#, 1, true);
    let data = DOMAINS.map(|domain| data(name, domain));
    let counts = DOMAINS.map(|domain| peers_of(name, domain, "0"));
    [hello].into_iter().chain(data).chain(counts).chain([status(name, "1")]).collect()
}

/// Gateways that the broker's page does not yet show as online, with a version and with a count for each domain.
struct Missing(BTreeSet<String>);

impl Missing {
    fn all() -> Self {
        Self((0..PLAYED).map(name).chain([REAL.to_owned()]).collect())
    }

    /// Reads the page; returns the gateways that are still missing.
    fn find(&mut self, stack: &Stack) -> Result<(), String> {
        let page = Http::try_connect(stack.http).map_err(|error| error.to_string())?.get("/").body;
        let known = page.split("<tr>").filter(|row| {
            let counts = DOMAINS.iter().all(|domain| row.contains(&format!("{domain} (")));
            counts && ["original", "offline"].iter().all(|word| !row.contains(word)) && row.contains("online")
        });
        for name in known.filter_map(|row| row.strip_prefix("<td>")?.split('<').next()) {
            self.0.remove(name);
        }
        self.0.first().map_or(Ok(()), |first| Err(format!("{first} and {} more", self.0.len() - 1)))
    }
}
