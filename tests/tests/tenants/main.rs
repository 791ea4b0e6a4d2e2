//! Tenants: the tests `os...` have the numbers of the list of the original's behaviours. Most behaviour is tested with
//! the Python library's client (`with_websockets.py`); tests that need many connections or restarts are here.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::socket::sockopt::{RcvBuf, TcpMaxSeg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket};
use wgkex_common::storage::schema::Schema;
use wgkex_common::storage::sqlite;
use wgkex_tests::http::Http;
use wgkex_tests::process::{binary, memory};
use wgkex_tests::scripted::{Worker, WorkerBehaviour};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, free_address};
use wgkex_tests::websocket::{Frame, WebSocket};
use wgkex_tests::{DEADLINE, key, wait_until};

mod brokers;

const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tenants/with_websockets.py");
/// The tenants' database has one table so far.
const SCHEMA: Schema = Schema { migrations: &[""] };

/// A broker with tenants; `settings` are more keys of `tenants`.
fn stack_with(settings: &str) -> Stack {
    Stack::start(plan(settings))
}

fn plan(settings: &str) -> Plan {
    Plan::new(Bus::Embedded).config(&format!("tenants: {{enabled: true{settings}}}"))
}

/// A running scenario of the script.
struct Script {
    scenario: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Script {
    fn start(stack: &Stack, scenario: &str, arguments: &[&str]) -> Self {
        Self::start_at(&format!("ws://{}", stack.http), scenario, arguments)
    }

    fn start_at(url: &str, scenario: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(PYTHON);
        command.args([SCRIPT, scenario, url]).args(arguments);
        Self::run(scenario, &mut command)
    }

    fn run(scenario: &str, command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { scenario: scenario.into(), child, input, output }
    }

    /// Waits until it prints this line.
    fn wait_for(&mut self, line: &str) {
        let mut found = String::new();
        self.output.read_line(&mut found).unwrap();
        assert_eq!(found.trim_end(), line, "{} (apt-get install python3-websockets)", self.scenario);
    }

    /// Waits for this text in its terminal output.
    fn wait_until_it_shows(&mut self, text: &str) {
        let mut shown = String::new();
        while !shown.contains(text) {
            let read = self.output.read_line(&mut shown).unwrap();
            assert!(read > 0, "{}: {text} is not in {shown}", self.scenario);
        }
    }

    fn go_on(&mut self) {
        writeln!(self.input, "on").unwrap();
    }

    /// Waits until it ends with success.
    fn finish(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{} (apt-get install python3-websockets)", self.scenario);
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until so many addresses are on the disk.
fn wait_until_kept(stack: &Stack, addresses: i64) {
    let file = stack.state_dir().join("tenants.sqlite");
    wait_until("the addresses are on the disk", || {
        let (_dir, copy) = sqlite::open_copy(&file, SCHEMA).ok()??;
        let rows = copy.query_row("SELECT count(*) FROM addresses", [], |row| row.get::<_, i64>(0)).ok()?;
        (rows == addresses).then_some(())
    });
}

/// Runs a scenario of the script against a broker with these settings.
fn scenario(name: &str, settings: &str) {
    Script::start(&stack_with(settings), name, &[]).finish();
}

/// By the commands of the README.
#[test]
fn a_member_by_hand_joins_and_learns_of_another() {
    let stack = stack_with("");
    let url = format!("ws://{}/tenants/3daf1997-d6eb-41ba-898f-ebc275da1f98", stack.http);
    let mut member = Script::run("by hand", Command::new(PYTHON).args(["-m", "websockets", &url]));
    writeln!(member.input, r#"{{"display_name": "laptop", "public_key": "{}"}}"#, key(1)).unwrap();
    member.wait_until_it_shows(r#"{"virtual_ip":"10.64.0.1","peers":[]}"#);
    let mut phone = WebSocket::open(stack.http, "/tenants/3daf1997-d6eb-41ba-898f-ebc275da1f98").unwrap();
    phone.text(&format!(r#"{{"display_name": "phone", "public_key": "{}"}}"#, key(2))).unwrap();
    member.wait_until_it_shows(&format!(
        r#"{{"display_name":"phone","public_key":"{}","virtual_ip":"10.64.0.2"}}"#,
        key(2)
    ));
    drop(phone);
    member.wait_until_it_shows(r#"{"removed_peer":"10.64.0.2"}"#);
}

#[test]
fn os01_the_first_member_is_alone_at_the_first_address() {
    scenario("os1", "");
}

#[test]
fn os02_a_second_member_and_the_first_learn_of_each_other() {
    scenario("os2", "");
}

#[test]
fn os03_tenants_learn_nothing_of_each_other() {
    scenario("os3", "");
}

#[test]
fn os04_a_thousand_tenants_join_at_once() {
    scenario("os4", "");
}

#[test]
fn os05_two_members_may_have_one_name() {
    scenario("os5", "");
}

#[test]
fn os06_a_leave_is_announced_once() {
    scenario("os6", "");
}

#[test]
fn os07_an_address_is_free_after_its_removal_was_announced() {
    scenario("os7", ", grace: 0");
}

#[test]
fn os08_a_tenant_that_was_emptied_is_empty() {
    scenario("os8", "");
}

#[test]
fn os09_a_bad_join_gets_a_code_and_a_reason_and_takes_nothing() {
    scenario("os9", "");
}

/// Some clients do not wait for the close frame.
#[test]
fn os09_ten_thousand_bad_joins_leak_nothing() {
    let mut stack = stack_with("");
    let (http, pid) = (stack.http, stack.broker().pid());
    let bad = |range: std::ops::Range<usize>| {
        for n in range {
            let mut socket = WebSocket::open(http, &format!("/tenants/{n}")).unwrap();
            match n % 5 {
                0 => socket.text("x").unwrap(),
                1 => socket.send(0x82, b"x").unwrap(),
                2 => socket.text(r#"{"display_name":"A","public_key":"AAAA"}"#).unwrap(),
                // A frame without an end, and no frame at all.
                3 => std::io::Write::write_all(&mut socket.stream(), b"\x81\xff\0\0\0\xff\0\0\0\0\0\0\0\0").unwrap(),
                _ => continue,
            }
            // A close frame after an incomplete frame is a part of that.
            let closed = if n % 5 == 3 { socket.close_frame() } else { socket.closed() };
            let (code, reason) = closed.unwrap();
            assert!([1003, 1008, 1009].contains(&code) && !reason.is_empty(), "{n}: {code} {reason}");
        }
    };
    let all = |count: usize| {
        thread::scope(|scope| {
            for n in 0..8 {
                scope.spawn(move || bad(n * count / 8..(n + 1) * count / 8));
            }
        });
    };
    let files = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let settled = || stack.wait_for_metric("wgkex_broker_tenants_sockets", 0.0);
    all(1000);
    settled();
    let (before, open) = (memory(pid), files());
    all(10_000);
    settled();
    let most = open + 20;
    wait_until("all files are closed", || (files() <= most).then_some(()));
    assert!(memory(pid) < before + 8 * 1024, "{before} KiB before, {} KiB after", memory(pid));
    for name in ["members", "networks", "held_addresses"] {
        stack.wait_for_metric(&format!("wgkex_broker_tenants_{name}"), 0.0);
    }
    let answer = WebSocket::open(http, "/tenants/a").unwrap().join("A", &key(1)).unwrap();
    assert_eq!(answer["virtual_ip"], "10.64.0.1");
}

#[test]
fn os10_silent_clients_delay_no_other_and_are_closed() {
    scenario("os10", "");
}

#[test]
fn os11_of_members_that_join_at_once_each_learns_of_each_other_once() {
    scenario("os11", "");
}

/// As many joins and leaves as in five minutes at three joins a second.
#[test]
fn os12_what_members_put_together_during_churn_is_the_truth() {
    Script::start(&stack_with(", grace: 0.05"), "os12", &["1000"]).finish();
}

#[test]
fn os13_a_member_that_does_not_read_is_dropped_and_announced() {
    let stack = stack_with("");
    Script::start(&stack, "os13", &[]).finish();
    for (reason, members) in [("slow", 1.0), ("silent", 0.0), ("refused", 0.0)] {
        stack.wait_for_metric(&format!("wgkex_broker_tenants_leaves_total{{reason=\"{reason}\"}}"), members);
    }
}

/// All answers together are far larger than the buffers of all connections, and no member reads its answer before all
/// have joined.
#[test]
fn members_of_a_large_tenant_that_come_at_once_all_get_in_and_hold_little() {
    const MEMBERS: u32 = 200;
    // Each character takes six of JSON, so that an answer is as large as that of 2,500 members with short names.
    let name = "\u{1}".repeat(255);
    let mut stack = stack_with("");
    let (http, pid) = (stack.http, stack.broker().pid());
    let open = |_| WebSocket::open(http, "/tenants/t").unwrap();
    let mut members: Vec<_> = (0..MEMBERS).map(open).collect();
    let before = memory(pid);
    for (n, member) in (0..).zip(&mut members) {
        member.text(&serde_json::json!({ "display_name": name, "public_key": key(n) }).to_string()).unwrap();
    }
    stack.wait_for_metric("wgkex_broker_tenants_joins_total", f64::from(MEMBERS));
    let held = memory(pid).saturating_sub(before);
    assert!(held < MEMBERS * 100, "{held} KiB more, of answers with up to 320 KiB each");
    let mut largest = 0;
    for (n, member) in members.iter_mut().enumerate() {
        let answer = member.message().unwrap_or_else(|error| panic!("{n}: {error}"));
        let peers = answer["peers"].as_array().unwrap().iter();
        let mut known: Vec<_> = peers.map(|peer| peer["public_key"].as_str().unwrap().to_owned()).collect();
        largest = largest.max(known.len());
        while known.len() + 1 < MEMBERS as usize {
            known.push(member.message().unwrap()["public_key"].as_str().unwrap().to_owned());
        }
        known.sort();
        known.dedup();
        assert_eq!(known.len() + 1, MEMBERS as usize);
    }
    assert_eq!(largest + 1, MEMBERS as usize);
    for reason in ["closed", "slow", "silent", "refused"] {
        stack.wait_for_metric(&format!("wgkex_broker_tenants_leaves_total{{reason=\"{reason}\"}}"), 0.0);
    }
}

#[test]
fn os14_a_full_network_and_a_full_pool_are_reported() {
    scenario("os14", ", pool: 192.168.1.0/24, tenant_length: 24");
}

#[test]
fn os15_later_messages_of_a_member_are_ignored() {
    scenario("os15", "");
}

#[test]
fn os16_a_key_has_one_member_the_one_that_is_alive() {
    scenario("os16", "");
}

/// The ping is sent before queued messages: on a slow connection the pong would be too late otherwise.
#[test]
fn os16_a_member_that_is_alive_keeps_its_place_however_much_waits_for_it() {
    const WAITING: u32 = 1_300;
    let stack = stack_with("");
    let mut slow = WebSocket::begin(narrow_connection(stack.http), "/tenants/t").unwrap();
    slow.join("slow", &key(0)).unwrap();
    // An announcement of 1.6 KB.
    let name = "\u{1}".repeat(255);
    for n in 1..=WAITING {
        WebSocket::open(stack.http, "/tenants/t").unwrap().join(&name, &key(n)).unwrap();
        // The member sends pongs all the time.
        slow.send(0x8a, b"").unwrap();
    }
    let mut twin = WebSocket::open(stack.http, "/tenants/t").unwrap();
    twin.text(&serde_json::json!({ "display_name": "twin", "public_key": key(0) }).to_string()).unwrap();
    // The pong to a ping after the join shows that the broker has begun to ping the other member.
    twin.send(0x89, b"x").unwrap();
    assert_eq!(twin.receive().unwrap(), Frame::Control);
    WebSocket::open(stack.http, "/tenants/u").unwrap().join("A", &key(0)).unwrap();
    // A third of all queued messages, and more than its connection's buffers hold.
    for _ in 0..WAITING * 2 / 3 {
        slow.receive().unwrap();
    }
    let error = twin.message().unwrap_err().to_string();
    assert_eq!(error, "1008 a member has this public_key and is connected");
    stack.wait_for_metric("wgkex_broker_tenants_leaves_total{reason=\"silent\"}", 0.0);
}

/// A connection with a small receive buffer, in segments of an Ethernet's size: with those of the loopback, which are
/// larger than the buffer, TCP waits for seconds.
fn narrow_connection(server: SocketAddr) -> TcpStream {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&socket, RcvBuf, &(16 << 10)).unwrap();
    setsockopt(&socket, TcpMaxSeg, &1400).unwrap();
    connect(socket.as_raw_fd(), &SockaddrStorage::from(server)).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

#[test]
fn os17_a_wrong_path_is_refused_before_the_upgrade() {
    scenario("os17", "");
}

#[test]
fn os18_with_tokens_a_right_one_is_needed() {
    let mut stack = Stack::prepare(plan(""));
    let file = stack.dir().join("tokens");
    let (tokens, lines): (Vec<_>, Vec<_>) = ["t", "t", "u"].map(tenant_token).into_iter().unzip();
    stack.plan = plan(&format!(", tokens_file: {}", file.display()));
    stack.write_config();
    fs::write(&file, format!("# of this test\n{}\n", lines.join("\n"))).unwrap();
    stack.start_broker();
    stack.wait_until_ready();
    let mut script = Script::start(&stack, "os18", &tokens.iter().map(String::as_str).collect::<Vec<_>>());
    script.wait_for("changed?");
    fs::write(&file, "nonsense\n").unwrap();
    stack.broker().wait_for_log("the tokens that were read before stay in use");
    fs::write(&file, lines[1..].join("\n")).unwrap();
    script.go_on();
    script.finish();
    let log = stack.broker().log();
    assert!(tokens.iter().all(|token| !log.contains(token)) && !log.contains("nonsense"), "{log}");

    fs::remove_file(&file).unwrap();
    assert!(stack.stop_broker().success());
    stack.start_broker();
    let log = stack.broker().wait_for_log("tenants.tokens_file");
    assert!(log.contains("No such file"), "{log}");
    assert!(!stack.broker().wait().success());
}

/// A token for a tenant, and its line for the file.
fn tenant_token(tenant: &str) -> (String, String) {
    let output = Command::new(binary("wgkex-broker")).args(["tenant-token", tenant]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    (lines[1].to_owned(), lines[3].to_owned())
}

#[test]
fn os19_the_same_works_over_tls() {
    let https = free_address();
    let mut stack = Stack::prepare(plan(""));
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| stack.dir().join(name));
    fs::write(&cert, own.cert.pem()).unwrap();
    fs::write(&key, own.signing_key.serialize_pem()).unwrap();
    let (http, cert) = (stack.http, cert.display().to_string());
    stack.plan = plan("").config(&format!(
        "broker_listen: {{host: {}, port: {}, tls: {{port: {}, cert_file: {cert}, key_file: {}}}}}",
        http.ip(),
        http.port(),
        https.port(),
        key.display()
    ));
    stack.write_config();
    stack.start_broker();
    stack.wait_until_ready();
    Script::start_at(&format!("wss://{https}"), "os19", &[&cert]).finish();
}

#[test]
fn os20_members_have_their_addresses_after_a_restart() {
    let mut stack = stack_with("");
    let mut script = Script::start(&stack, "os20", &[]);
    script.wait_for("joined");
    wait_until_kept(&stack, 7);
    assert!(!stack.broker().end_by(Signal::SIGKILL).success());
    stack.start_broker();
    stack.wait_until_ready();
    script.go_on();
    script.wait_for("joined");
    assert!(stack.stop_broker().success());
    stack.start_broker();
    stack.wait_until_ready();
    script.go_on();
    script.finish();
}

#[test]
fn a_broker_that_stops_announces_it_and_does_not_wait() {
    let mut stack = stack_with("");
    let mut script = Script::start(&stack, "stop", &[]);
    script.wait_for("joined");
    // A member that does not answer the close frame.
    let mut deaf = WebSocket::open(stack.http, "/tenants/t").unwrap();
    deaf.join("deaf", &key(1)).unwrap();
    let begun = Instant::now();
    assert!(stack.stop_broker().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    script.finish();
    assert_eq!(deaf.receive().unwrap(), Frame::Close(1001, "the broker stops".into()));
}

#[test]
fn endpoints_are_shown_on_demand_only() {
    scenario("endpoints", "");
    let stack = Stack::start(plan("").config("trusted_proxies: [127.0.0.1]"));
    Script::start(&stack, "endpoints", &["203.0.113.7"]).finish();
}

/// Also behind a proxy, which forwards many clients.
#[test]
fn one_client_does_not_take_the_networks_of_all_tenants() {
    let plan = Plan::new(Bus::Embedded).config("trusted_proxies: [127.0.0.1]");
    let stack = Stack::start(plan.config("tenants: {enabled: true, pool: 10.64.0.0/20, tenant_length: 25}"));
    Script::start(&stack, "one_client", &[]).finish();
    stack.wait_for_metric("wgkex_broker_tenants_refused_total{reason=\"too_many_tenants\"}", 2.0);
}

#[test]
fn tenants_of_ipv6_are_as_those_of_ipv4_also_after_a_restart() {
    let mut stack = stack_with(", pool: \"fd00::/48\", tenant_length: 64");
    let mut script = Script::start(&stack, "ipv6", &[]);
    script.wait_for("joined");
    wait_until_kept(&stack, 4);
    assert!(!stack.broker().end_by(Signal::SIGKILL).success());
    stack.start_broker();
    stack.wait_until_ready();
    script.go_on();
    script.finish();
}

#[test]
fn tenants_are_served_only_where_the_config_enables_them() {
    let stack = Stack::start(Plan::new(Bus::Embedded));
    let error = WebSocket::open(stack.http, "/tenants/a").unwrap_err().to_string();
    assert!(error.starts_with("HTTP/1.1 404"), "{error}");
    assert!(stack.get("/status.json").json().get("tenants").is_none());
    assert!(!stack.state_dir().join("tenants.sqlite").exists());
}

#[test]
fn the_counts_of_tenants_are_on_the_page_and_no_id_is() {
    let mut stack = stack_with("");
    let mut members: Vec<_> = (1..4).map(|_| WebSocket::open(stack.http, "/tenants/secret%20id").unwrap()).collect();
    for (n, member) in (1..).zip(&mut members) {
        member.join("A", &key(n)).unwrap();
    }
    let mut bad = WebSocket::open(stack.http, "/tenants/secret%20id").unwrap();
    bad.text("x").unwrap();
    assert_eq!(bad.closed().unwrap().0, 1003);
    drop(members.pop());
    stack.wait_for_metric("wgkex_broker_tenants_leaves_total{reason=\"closed\"}", 1.0);
    let tenants = stack.get("/status.json").json()["tenants"].clone();
    assert_eq!(tenants, serde_json::json!({ "tenants": 1, "members": 2, "held": 1, "sockets": 2 }));
    let status = Command::new(binary("wgkex-broker")).arg("status").arg("--config").arg(stack.config_file()).output();
    let status = String::from_utf8(status.unwrap().stdout).unwrap();
    assert!(status.contains("tenants 1, members 2, held addresses 1, WebSockets 2"), "{status}");
    assert!(stack.get("/").body.contains(r#"<td>their members</td><td class="n">2</td>"#));
    stack.wait_for_metric("wgkex_broker_tenants_joins_total", 3.0);
    stack.wait_for_metric("wgkex_broker_tenants_refused_total{reason=\"join\"}", 1.0);
    assert!(stack.stop_broker().success());
    for text in [stack.broker().log(), status] {
        assert!(!text.contains("secret"), "{text}");
    }
}

/// More WebSockets than the limit of open files allows leave room for routers and for clients that join.
#[test]
fn websockets_take_no_place_of_routers_and_those_that_do_not_join_go_first() {
    let mut plan = plan("");
    plan.wrapper = ["sh", "-c", "ulimit -n 1024 && exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let stack = Stack::start(plan);
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let open = |n: u32| WebSocket::open(stack.http, &format!("/tenants/{}", n % 7));
    let mut members: Vec<_> = (0..100).map(|n| open(n).unwrap()).collect();
    for (n, member) in (0..).zip(&mut members) {
        member.join("A", &key(n)).unwrap();
    }
    let waiting: Vec<_> = (0..400).map(|n| open(n).unwrap()).collect();
    for n in 0..60 {
        let mut http = Http::connect(stack.http);
        assert_eq!(http.get("/healthz").status, 200, "{n}");
    }
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    let mut late = open(1000).unwrap();
    late.join("late", &key(1000)).unwrap();
    // All members are still connected.
    for member in &mut members {
        member.send(0x89, b"x").unwrap();
        while member.receive().unwrap() != Frame::Control {}
    }
    drop(waiting);
    let more: Vec<_> = (0..47).map(|n| (open(n).unwrap(), n)).collect();
    let joined = more.into_iter().filter_map(|(mut socket, n)| socket.join("B", &key(2000 + n)).ok().map(|_| socket));
    let joined: Vec<_> = joined.collect();
    let refused = open(5).unwrap_err().to_string();
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused} with {} more", joined.len());
    assert_eq!(stack.v2(DOMAIN, &key(2)).status, 200);
}

mod netns {
    use super::{
        CloneFlags, Command, Duration, Instant, PYTHON, SCRIPT, Script, Stack, WebSocket, fs, key, plan, unshare,
        wait_until,
    };

    fn ip(words: &str) {
        assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
    }

    /// The member's packets are dropped, without any notification.
    #[test]
    #[ignore = "needs root: tests/run netns"]
    fn os06_a_member_that_is_lost_silently_is_removed() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        let mut stack = Stack::prepare(plan(""));
        let port = stack.http.port();
        stack.plan = plan("").config(&format!("broker_listen: \"0.0.0.0:{port}\""));
        stack.write_config();
        stack.start_broker();
        stack.wait_until_ready();

        let far = "read on && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", far, "sh", PYTHON, SCRIPT, "member"]);
        command.args([&format!("ws://10.9.0.1:{port}"), "B"]);
        let mut member = Script::run("member", &mut command);
        let pid = member.child.id();
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        wait_until("the member has a network of its own", || {
            (fs::read_link(format!("/proc/{pid}/ns/net")).ok()? != own).then_some(())
        });
        let inside = |words: &str| {
            let status =
                Command::new("nsenter").args(["-t", &pid.to_string(), "-n", "ip"]).args(words.split(' ')).status();
            assert!(status.unwrap().success(), "ip {words}");
        };
        ip(&format!("link add far type veth peer name near netns {pid}"));
        ip("addr add 10.9.0.1/24 dev far");
        ip("link set far up");
        inside("addr add 10.9.0.2/24 dev near");
        inside("link set near up");

        let mut watcher = WebSocket::open(stack.http, "/tenants/t").unwrap();
        watcher.stream().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(watcher.join("A", &key(1)).unwrap()["virtual_ip"], "10.64.0.1");
        member.go_on();
        member.wait_for("joined");
        assert_eq!(watcher.message().unwrap()["display_name"], "B");
        inside("route add blackhole 10.9.0.1/32");
        let lost = Instant::now();
        assert_eq!(watcher.message().unwrap(), serde_json::json!({ "removed_peer": "10.64.0.2" }));
        // The connection was open all the time, and the broker aims at half of the documented time.
        assert!((Duration::from_secs(5)..Duration::from_secs(25)).contains(&lost.elapsed()), "{:?}", lost.elapsed());
        stack.wait_for_metric("wgkex_broker_tenants_leaves_total{reason=\"silent\"}", 1.0);
    }
}
