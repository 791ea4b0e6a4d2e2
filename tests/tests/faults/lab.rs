//! A fleet on one Mosquitto: brokers and gateways, each a host of its own, and routers that send requests.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane, Tables, link_local};
use wgkex_tests::http::{Http, ask};
use wgkex_tests::key;
use wgkex_tests::probe::{self, Probe};
use wgkex_tests::process::Process;

/// How long lost keys may take to be restored: several rounds of sync requests, on a slow machine.
pub const CAUGHT_UP: Duration = Duration::from_secs(60);
/// Routers per broker that request at the same time.
const CLIENTS: u32 = 4;

/// The program of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Broker,
    Gateway,
}

/// A host and its program.
pub struct Node {
    pub process: Process,
    pub host: Arc<Host>,
    role: Role,
}

impl Node {
    /// Starts the program on `host`, which is configured.
    pub fn start(host: Host, role: Role) -> Self {
        Self { process: program(&host, role), host: host.into(), role }
    }

    pub fn is_broker(&self) -> bool {
        self.role == Role::Broker
    }

    /// Starts the program again after its end.
    pub fn start_again(&mut self) {
        self.process = program(&self.host, self.role);
    }

    /// Kills the program.
    pub fn kill(&mut self) {
        let _ = self.process.end_by(Signal::SIGKILL);
    }

    /// Deletes the program's state; it must not run.
    pub fn forget(&self) {
        self.host.run("rm -rf /run/wgkex/state/*");
    }

    /// A figure of its metrics.
    pub fn figure(&self, series: &str) -> Option<u64> {
        self.figures([series]).map(|[figure]| figure)
    }

    /// Figures of its metrics, all of the same moment.
    fn figures<const N: usize>(&self, series: [&str; N]) -> Option<[u64; N]> {
        let port = if self.role == Role::Broker { 5000 } else { 9586 };
        let metrics = self.host.try_get(port, "/metrics")?;
        let figure = |series| metrics.body.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
        let found: Vec<u64> = series.into_iter().filter_map(figure).collect();
        found.try_into().ok()
    }

    /// The number of live keys of `test_a` at a broker. A key may become a proven one at any time.
    pub fn live(&self) -> Option<u64> {
        let series = ["proven", "unproven"]
            .map(|state| format!(r#"wgkex_broker_live_keys{{domain="test_a",state="{state}"}} "#));
        self.figures(series.each_ref().map(String::as_str)).map(|states| states.iter().sum())
    }
}

fn program(host: &Host, role: Role) -> Process {
    match role {
        Role::Broker => host.start_broker(),
        Role::Gateway => host.start_worker(),
    }
}

/// Brokers `b1`, `b2`..., gateways `gw1`, `gw2`..., and between them `hub` with the MQTT server.
pub struct Fleet {
    pub gateways: Vec<Node>,
    pub brokers: Vec<Node>,
    pub mosquitto: Process,
    pub hub: Host,
    lane: Lane,
    cables: u8,
}

impl Fleet {
    /// A fleet of running programs that know each other; brokers with `more` in their config.
    pub fn new(lane: Lane, brokers: usize, gateways: usize, more: &str) -> Self {
        let hub = Host::new("hub", lane);
        let mosquitto = hub.start_mosquitto();
        let (none, no_one) = (Vec::new(), Vec::new());
        let mut fleet = Self { gateways: none, brokers: no_one, mosquitto, hub, lane, cables: 0 };
        for _ in 0..brokers {
            fleet.add_broker(more);
        }
        for _ in 0..gateways {
            fleet.add_gateway("");
        }
        fleet.is_complete();
        fleet
    }

    pub fn add_broker(&mut self, more: &str) {
        let (host, server) = self.host(&format!("b{}", self.brokers.len() + 1));
        host.configure(&format!("mqtt: {{broker_url: {server}}}\n{more}\n"));
        self.brokers.push(Node::start(host, Role::Broker));
    }

    pub fn add_gateway(&mut self, more: &str) {
        let (host, server) = self.host(&format!("gw{}", self.gateways.len() + 1));
        host.configure(&format!("mqtt: {{broker_url: {server}}}\n{more}\n"));
        host.setup();
        self.gateways.push(Node::start(host, Role::Gateway));
    }

    /// A host with a cable to the hub, and the hub's address on it.
    pub fn host(&mut self, name: &str) -> (Host, Ipv4Addr) {
        let host = Host::new(name, self.lane);
        self.cables += 1;
        let (server, _) = self.hub.connect(&host, self.cables);
        (host, server)
    }

    /// The brokers' hosts, to which routers send requests.
    pub fn broker_hosts(&self) -> Vec<Arc<Host>> {
        self.brokers.iter().map(|broker| broker.host.clone()).collect()
    }

    /// Waits until every gateway is known to every broker, and serves both domains.
    pub fn is_complete(&self) {
        for gateway in &self.gateways {
            within("the gateway is up", CAUGHT_UP, || {
                let up = |rest| gateway.figure(&format!(r#"wgkex_worker_domain_up{{domain="test_{rest}"}} "#));
                let connected = gateway.figure("wgkex_worker_mqtt_connected ")?;
                (up("a")? == 1 && up("b")? == 1 && connected == 1).then_some(())
            });
        }
        for broker in &self.brokers {
            within("the broker knows all gateways", CAUGHT_UP, || {
                let online = broker.figure(r#"wgkex_broker_gateways{state="online"} "#)?;
                let ready = broker.host.try_get(5000, "/readyz")?.status == 200;
                (ready && online >= self.gateways.len() as u64).then_some(())
            });
        }
    }

    /// A client that receives every message on the bus.
    pub fn witness(&self) -> Probe {
        self.probe(probe::Role::new("witness", &["#"]))
    }

    /// A client on the bus.
    pub fn probe(&self, role: probe::Role) -> Probe {
        self.hub.inside(|| Probe::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, 1883)), role))
    }

    /// Waits until each gateway's kernel has the expected keys.
    pub fn caught_up(&self, routers: &Routers) {
        for gateway in &self.gateways {
            caught_up(&gateway.host, routers);
        }
    }
}

/// The routers' requests and answers: the reference for every kernel.
pub struct Routers {
    next: AtomicU32,
    is_over: AtomicBool,
    answers: Mutex<Answers>,
}

/// The outcomes for keys of `test_a`.
#[derive(Debug, Default, Clone)]
pub struct Answers {
    /// All keys that were requested or announced.
    pub asked: BTreeSet<String>,
    /// Keys that got a 200, and when.
    pub accepted: BTreeMap<String, Instant>,
    /// The time of each 503.
    pub refused: Vec<Duration>,
    /// The number of requests without an answer.
    pub silent: usize,
}

/// The rate of requests.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The interval between two routers.
    pub every: Duration,
    /// The maximum number of routers.
    pub at_most: u32,
}

impl Pace {
    /// So many in a second, without a maximum.
    pub fn per_second(rate: u32) -> Self {
        Self { every: Duration::from_secs(1) / rate, at_most: u32::MAX }
    }
}

impl Routers {
    pub fn new() -> Self {
        Self { next: AtomicU32::new(1), is_over: AtomicBool::new(false), answers: Mutex::default() }
    }

    pub fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves numbers of unused keys.
    pub fn take(&self, count: u32) -> std::ops::Range<u32> {
        let first = self.next.fetch_add(count, Ordering::SeqCst);
        first..first + count
    }

    /// Adds keys that did not come from a request, and have to be at every gateway.
    pub fn note(&self, keys: impl IntoIterator<Item = String>) {
        let mut answers = self.answers();
        for key in keys {
            answers.asked.insert(key.clone());
            answers.accepted.insert(key, Instant::now());
        }
    }

    /// Lets routers request from `brokers` at this pace until `fault` returns; if `at_most` is set, the rest of them
    /// request after it.
    pub fn ask_during<T>(&self, brokers: &[Arc<Host>], pace: Pace, fault: impl FnOnce() -> T) -> T {
        self.is_over.store(false, Ordering::SeqCst);
        let first = self.next.load(Ordering::SeqCst);
        let asking = Asking { routers: self, first, begun: Instant::now(), pace };
        thread::scope(|scope| {
            for broker in brokers {
                for _ in 0..CLIENTS {
                    let asking = &asking;
                    scope.spawn(move || broker.inside(|| asking.run()));
                }
            }
            let over = StopOnDrop(&self.is_over);
            let result = fault();
            drop(over);
            result
        })
    }

    /// Lets so many routers request, each as soon as the one before is answered.
    pub fn ask(&self, brokers: &[Arc<Host>], count: u32) {
        self.ask_during(brokers, Pace { every: Duration::ZERO, at_most: count }, || {});
    }
}

/// Stops the requests, also if the test fails meanwhile.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Asking<'a> {
    routers: &'a Routers,
    first: u32,
    begun: Instant,
    pace: Pace,
}

impl Asking<'_> {
    fn run(&self) {
        let mut http = None;
        loop {
            let is_over = self.routers.is_over.load(Ordering::SeqCst);
            if (is_over && self.pace.at_most == u32::MAX) || thread::panicking() {
                return;
            }
            let n = self.routers.next.load(Ordering::SeqCst);
            if n - self.first >= self.pace.at_most {
                return;
            }
            let due = self.begun + self.pace.every * (n - self.first);
            let early = due.saturating_duration_since(Instant::now());
            if !early.is_zero() {
                thread::sleep(early.min(Duration::from_millis(50)));
            } else if self.routers.next.compare_exchange(n, n + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                self.routers.post(&mut http, n);
            }
        }
    }
}

impl Routers {
    fn post(&self, http: &mut Option<Http>, n: u32) {
        let key = key(n);
        self.answers().asked.insert(key.clone());
        let begun = Instant::now();
        let path = format!("/api/v{}/wg/key/exchange", 1 + n % 2);
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, 5000));
        let answer = http.take().map_or_else(|| Http::try_connect(server), Ok).and_then(|mut connected| {
            let answer = connected.try_post(&path, &ask("test_a", &key))?;
            *http = Some(connected);
            Ok(answer)
        });
        let mut answers = self.answers();
        match answer {
            Ok(answer) if answer.status == 200 => {
                answers.accepted.insert(key, Instant::now());
            }
            Ok(answer) => {
                assert_eq!(answer.status, 503, "{answer:?}");
                let again: u32 = answer.header("retry-after").expect("Retry-After").parse().expect("seconds");
                assert!((1..=60).contains(&again), "{answer:?}");
                answers.refused.push(begun.elapsed());
            }
            Err(_) => {
                answers.silent += 1;
                drop(answers);
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Waits until the kernel of `host` has every key that got a 200, and none that was never requested; each with all its
/// objects, and no other objects. As a machine may be slow, it fails only after no progress for the time that catching
/// up may take.
pub fn caught_up(host: &Host, routers: &Routers) {
    let answers = routers.answers().clone();
    let begun = Instant::now();
    let (mut peers, mut since) = (0, begun);
    loop {
        let tables = host.tables("a");
        let Err(difference) = difference(&tables, &answers) else { return };
        if tables.peers.len() != peers && begun.elapsed() < 10 * CAUGHT_UP {
            (peers, since) = (tables.peers.len(), Instant::now());
        }
        assert!(since.elapsed() < CAUGHT_UP, "nothing more within {CAUGHT_UP:?}: {difference}");
        thread::sleep(Duration::from_millis(300));
    }
}

/// The difference between the tables and the reference, if any.
pub fn difference(tables: &Tables, answers: &Answers) -> Result<(), String> {
    let there: BTreeSet<String> =
        tables.peers.iter().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect();
    let missing: Vec<_> = answers.accepted.keys().filter(|key| !there.contains(*key)).collect();
    let strange: Vec<_> = there.iter().filter(|key| !answers.asked.contains(*key)).collect();
    let broken: Vec<_> = there.iter().flat_map(|key| tables.missing(key)).collect();
    let addresses: BTreeSet<_> = there.iter().map(|key| link_local(key)).collect();
    let lengths = tables.lengths();
    if missing.is_empty() && strange.is_empty() && broken.is_empty() && lengths == [addresses.len(); 3] {
        return Ok(());
    }
    let some = |lines: &[&String]| format!("{} ({:?})", lines.len(), lines.iter().take(3).collect::<Vec<_>>());
    Err(format!(
        "of {} accepted and {} asked: missing {}, strange {}, broken {}; tables have {lengths:?}",
        answers.accepted.len(),
        answers.asked.len(),
        some(&missing),
        some(&strange),
        some(&broken.iter().collect::<Vec<_>>()),
    ))
}

/// Waits until `found` returns something, without keeping the machine busy.
pub fn within<T>(what: &str, limit: Duration, mut found: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Sleeps for that long: for events that must not occur meanwhile, or for a program's own timer.
pub fn sleep(time: Duration) {
    thread::sleep(time);
}
