//! Files as editors, copies and full disks leave them, and a container's environment: tests of the real broker.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Builder;
use wgkex_common::{Config, Domain, PublicKey};
use wgkex_kernel::memory::MemoryKernel;
use wgkex_tests::admin::{Operator, printed};
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::http::Http;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::probe::{Role, message};
use wgkex_tests::process::binary;
use wgkex_tests::scripted::{self, Worker, WorkerBehaviour, hello, key_for, peers_of};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, free_address};
use wgkex_tests::{host_name, key, wait_until};

fn status(stack: &Stack, n: u32) -> u16 {
    stack.v2(DOMAIN, &key(n)).status
}

/// A damage to a complete text.
type Change = fn(&[u8]) -> Vec<u8>;

/// Incomplete text, in each of the ways that a copy, a full disk or a crash leaves it.
const DAMAGES: [Change; 5] = [
    |whole| vec![0; whole.len()],
    |whole| [&whole[..whole.len() / 2], &vec![0; whole.len()]].concat(),
    |whole| whole[..whole.len() - 10].to_vec(),
    |_| Vec::new(),
    |_| b"\n\n".to_vec(),
];

/// Regression: a file of NUL bytes and an empty one were empty lists: no metric, and the denied key got 200.
#[test]
fn a_half_written_list_leaves_the_last_good_one_in_effect() {
    let dir = tempfile::tempdir().unwrap();
    let [deny, allow, denied] = ["deny.yaml", "allow.yaml", "denied"].map(|name| dir.path().join(name));
    fs::create_dir(&denied).unwrap();
    let lines = |keys: [u32; 3]| keys.map(|n| format!("  - {}\n", key(n))).concat();
    let good = [
        (deny.clone(), lines([9, 8, 1])),
        (allow.clone(), format!("{DOMAIN}:\n{}", lines([1, 2, 3]))),
        (denied.join("node-2"), key(2)),
    ];
    let write_all = |change: Change| {
        for (file, text) in &good {
            fs::write(file, change(text.as_bytes())).unwrap();
        }
    };
    write_all(<[u8]>::to_vec);
    let stack = Stack::start(Plan::new(Bus::Embedded).config(&format!(
        "blacklist_file: {}\nallowlist: {{enabled: true, file: {}, refresh_interval: 0.1}}\nkey_lists: {{deny_dir: {}}}",
        deny.display(),
        allow.display(),
        denied.display()
    )));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    let statuses = || [1, 2, 3].map(|n| status(&stack, n));
    assert_eq!(statuses(), [403, 403, 200]);
    let wait_for_damage = |value| {
        for list in ["blacklist_file", "allowlist.file", "key_lists.deny_dir"] {
            stack.wait_for_metric(&format!("wgkex_broker_lists_damaged{{list=\"{list}\"}}"), value);
        }
    };
    for damage in DAMAGES {
        write_all(damage);
        wait_for_damage(1.0);
        assert_eq!(statuses(), [403, 403, 200]);
        write_all(<[u8]>::to_vec);
        wait_for_damage(0.0);
    }
    // Regression: this was an empty list, and expelled all keys.
    fs::write(&allow, format!("{DOMAIN}:\n")).unwrap();
    stack.wait_for_metric("wgkex_broker_lists_damaged{list=\"allowlist.file\"}", 1.0);
    assert_eq!(statuses(), [403, 403, 200]);
    // An explicitly empty list is accepted.
    fs::write(&deny, "[]\n").unwrap();
    wait_until("the list is empty", || (status(&stack, 1) == 200).then_some(()));
}

/// Nine levels of nine aliases each: 387 million values.
fn bomb() -> String {
    let level = |n: u8| {
        let (name, below) = (char::from(b'a' + n), char::from(b'a' + n - 1));
        format!("{name}: &{name} [{}]\n", vec![format!("*{below}"); 9].join(","))
    };
    format!("a: &a [{}]\n", ["x"; 9].join(",")) + &(1..9).map(level).collect::<String>()
}

/// A plan with a memory limit for each program, several times its need.
fn limited(plan: Plan) -> Plan {
    let wrapper = ["sh", "-c", "ulimit -v 3000000; exec \"$@\"", "limited"];
    Plan { wrapper: wrapper.map(str::to_owned).into(), ..plan }
}

/// Regression: both ended by "memory allocation failed".
#[test]
fn aliases_cannot_fill_the_memory() {
    let mut stack = Stack::prepare(limited(Plan::new(Bus::Embedded).config(&bomb())));
    stack.start_broker();
    assert_eq!(stack.broker().wait().code(), Some(78), "{}", stack.broker().log());
    stack.broker().wait_for_log("aliases that stand for more than");

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deny.yaml");
    fs::write(&file, format!("- {}\n", key(1))).unwrap();
    let config = format!("blacklist_file: {}\nallowlist: {{refresh_interval: 0.1}}", file.display());
    let mut stack = Stack::start(limited(Plan::new(Bus::Embedded).config(&config)));
    fs::write(&file, bomb()).unwrap();
    stack.wait_for_metric("wgkex_broker_lists_damaged{list=\"blacklist_file\"}", 1.0);
    assert!(stack.broker().is_running());
    assert_eq!(status(&stack, 1), 403);
}

/// Regression: the broker did not start, as a key given twice was a mistake.
#[test]
fn the_last_of_two_equal_keys_counts_and_a_warning_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("deny.yaml");
    fs::write(&file, format!("{0}: one\n{0}: {{reason: two}}\n", key(1))).unwrap();
    let (operator, admin) = Operator::new();
    let config = format!(
        "log_level: ERROR\nlimits:\n  per_client: {{burst: 1, burst: 0}}\nblacklist_file: {}\nlog_level: INFO\n{admin}",
        file.display()
    );
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config(&config));
    for named in ["log_level: is given twice", "limits.per_client.burst: is given twice"] {
        let line = stack.broker().wait_for_log(named);
        assert!(line.contains("WARN") && line.contains("the last one counts"), "{line}");
    }
    let line = stack.broker().wait_for_log("a key is given twice");
    assert!(line.contains("WARN") && line.contains("line=2") && !line.contains(&key(1)), "{line}");
    let shown = printed(&operator.run(&stack, &["list"]));
    assert!(shown.contains("reason: two") && !shown.contains("one"), "{shown}");
}

/// Regression: `mqtt-acl` printed `topic write wireguard-worker/+/status`.
#[test]
fn a_gateway_is_not_called_by_a_wildcard() {
    for name in ["+", "#", "a/b", ""] {
        let plan = Plan::new(Bus::Embedded).config(&format!("workers: {{\"{name}\": {{weight: 1}}}}"));
        let stack = Stack::prepare(plan);
        let mut refused = stack.program("wgkex-broker", &["mqtt-acl"]);
        assert_eq!(refused.wait().code(), Some(1), "{name}");
        assert!(refused.log().contains("must be a host name without"), "{}", refused.log());
        assert!(!refused.log().contains("topic write"), "{}", refused.log());
    }
}

/// Regression: both had the rights of a broker, by the same name, and by a wildcard.
#[test]
fn the_brokers_user_is_no_gateway_and_no_wildcard() {
    let stack = Stack::prepare(Plan::new(Bus::Embedded).config("workers: {gw1: {weight: 1}}"));
    let mut own_name = stack.program("wgkex-broker", &["mqtt-acl", "--broker", "gw1"]);
    assert_eq!(own_name.wait().code(), Some(1));
    assert!(own_name.log().contains("workers.gw1: is the user name of the brokers"), "{}", own_name.log());
    let mut wildcard = stack.program("wgkex-broker", &["mqtt-acl", "--broker", "+"]);
    assert_eq!(wildcard.wait().code(), Some(64));
    assert!(!wildcard.log().contains("topic write"), "{}", wildcard.log());
}

/// These variables configure a container.
const VARIABLES: [&str; 4] = [
    "WGKEX_CONFIG_FILE=\"/run/none.yaml\"",
    "WGKEX_DOMAINS=\"ffx_a, ffx_b\"",
    "WGKEX_DOMAIN_PREFIXES='ffx_'",
    "WGKEX_DEBUG=\"INFO\"",
];

/// Regression: the broker listened on 127.0.0.1 alone, and took quotes for a part of the domains' names.
#[test]
#[ignore = "needs root: tests/run netns"]
fn variables_alone_make_a_broker_that_all_can_reach() {
    let host = Host::new("container", Lane::Userspace);
    host.run("mount -t tmpfs none /var/lib && ip addr add 192.0.2.1/32 dev lo && ip addr add 2001:db8::1/128 dev lo");
    let (v4, v6) = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    let start = |more: &[&str]| {
        let program = binary("wgkex-broker");
        let words = [&VARIABLES, more, &[program.to_str().unwrap()]].concat();
        host.start("broker", Path::new("/usr/bin/env"), &words, &[])
    };
    let reaches = |address: SocketAddr| {
        host.inside(|| Http::try_connect(address)).is_ok_and(|mut http| http.get("/healthz").status == 200)
    };
    // Also where the system's default makes IPv6 sockets IPv6-only.
    for system in ["true", "echo 1 > /proc/sys/net/ipv6/bindv6only"] {
        host.run(system);
        let mut broker = start(&[]);
        broker.wait_for_log("broker started");
        assert!(reaches((v4, 5000).into()) && reaches((v6, 5000).into()), "{system}");
        assert!(broker.end_by(Signal::SIGTERM).success());
    }
    let mut broker = start(&["WGKEX_BROKER_LISTEN='192.0.2.1:5080'"]);
    broker.wait_for_log("broker started");
    assert!(reaches((v4, 5080).into()) && !reaches((v6, 5080).into()) && !reaches((v4, 5000).into()));
    assert!(broker.end_by(Signal::SIGTERM).success());
    let mut broker = start(&["WGKEX_DOMAINS=ffx_a,\"ffx_b"]);
    assert!(!broker.wait().success());
    assert!(broker.log().contains("WGKEX_DOMAINS[1]: must be a name without quotes"), "{}", broker.log());
}

fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// Regression: the file was taken for damaged: it was renamed, and all keys were forgotten. Later, files that were
/// opened before it were migrated.
#[test]
fn a_newer_layout_of_any_file_stops_the_start_and_none_is_touched() {
    let secrets = TempDir::new().unwrap();
    let password = secrets.path().join("password");
    fs::write(&password, "secret").unwrap();
    let both =
        format!("tenants: {{enabled: true}}\nregistry: {{enabled: true, password_file: {}}}", password.display());
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config(&both));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    assert_eq!(status(&stack, 1), 200);
    // At its end the broker moves the logs into the database files.
    assert!(stack.stop_broker().success());
    let state = stack.state_dir();
    let databases = ["mqtt-retained.sqlite", "broker.sqlite", "registry.sqlite", "tenants.sqlite"];
    for name in databases.into_iter().chain(["broker.lists.json", "broker.drain.json", "broker.registry.json"]) {
        let file = state.join(name);
        let ours = fs::read(&file).ok();
        fs::write(&file, newer(name, ours.as_deref())).unwrap();
        let before = content(&state);
        stack.start_broker();
        assert_eq!(stack.broker().wait().code(), Some(1), "{}", stack.broker().log());
        let line = stack.broker().wait_for_log("number 99");
        assert!(line.contains("ERROR") && line.contains(name) && line.contains("newer"), "{line}");
        assert!(content(&state) == before, "{name}: {:?}", content(&state).keys());
        match ours {
            Some(ours) => fs::write(&file, ours).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
    }
    stack.start_broker();
    stack.wait_until_ready();
    assert_eq!(stack.metric("wgkex_broker_live_keys{domain=\"ffx_a\",state=\"unproven\"}"), Some(1.0));
}

/// A file of version 99.
fn newer(name: &str, ours: Option<&[u8]>) -> Vec<u8> {
    if Path::new(name).extension().is_some_and(|extension| extension == "json") {
        return br#"{"layout":99}"#.to_vec();
    }
    let mut newer = ours.expect("the broker made the database").to_vec();
    // The number of the layout, in the header of every SQLite file.
    newer[60..64].copy_from_slice(&99_u32.to_be_bytes());
    newer
}

#[test]
fn a_newer_layout_stops_the_start_of_a_worker() {
    let database = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("data/state-510c797/broker.sqlite")).unwrap();
    for name in ["worker.lists.json", "worker.drain.json", "worker.leases.json", "worker.sqlite"] {
        let dir = TempDir::new().unwrap();
        let yaml = format!("domains: [{DOMAIN}]\ndomain_prefixes: [ffx_]\nstate_dir: {}\n", dir.path().display());
        let config = Config::parse("test", &yaml, "gw1").unwrap();
        let kernel = MemoryKernel::with(&config.domains.iter().cloned().collect::<Vec<_>>());
        let file = dir.path().join(name);
        fs::write(&file, newer(name, Some(&database))).unwrap();
        let before = content(dir.path());
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let run = wgkex_worker::run(config, kernel.clone(), move || Ok(kernel), std::future::pending());
        let error = format!("{:#}", runtime.block_on(run).unwrap_err());
        assert!(error.contains(name) && error.contains("number 99, newer"), "{error}");
        assert!(content(dir.path()) == before, "{name}");
    }
}

/// Copies `data/state-510c797` into `dir`: the state of the programs of that commit after a kill. It has two live keys, a
/// revoked one, a retained message and the will of a connected client of the broker, and the same keys of a worker. All of
/// it is still in the logs of the databases.
fn copy_old_state(dir: &Path) {
    fs::create_dir(dir).unwrap();
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/state-510c797");
    for (file, bytes) in content(&old) {
        fs::write(dir.join(file.file_name().unwrap()), bytes).unwrap();
    }
}

fn has_damaged_files(dir: &Path) -> bool {
    content(dir).keys().any(|path| path.to_string_lossy().contains("damaged"))
}

const OLD_KEYS: [&str; 2] =
    ["TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=", "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="];
const OLD_REVOKED_KEY: &str = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=";

#[test]
fn the_state_of_an_older_version_is_taken_over() {
    let (operator, admin) = Operator::new();
    // The time since the kill counts, up to 30 days.
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded).config(&admin).config("live_keys: {ttl: 7776000}"));
    copy_old_state(&stack.state_dir());
    // The second start reads the state that the first one has converted.
    for client in ["first", "second"] {
        stack.start_broker();
        stack.wait_until_ready();
        let pages = format!("wgkex/worker/{client}/pages");
        let witness = stack.probe(Role::new(client, &["some/topic", "left/will", &pages]));
        assert_eq!(witness.next_on("some/topic").text(), "retained by 510c797");
        assert_eq!(witness.next_on("left/will").text(), "0");
        let question = json!({ "from": { "worker": client }, "to": host_name(), "domain": DOMAIN, "after": null });
        witness.publish(message(format!("wgkex/worker/{client}/questions"), question.to_string(), 1, false));
        let page: Value = serde_json::from_slice(&witness.next_on(&pages).payload).unwrap();
        let keys: BTreeSet<_> = page["keys"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, BTreeSet::from(OLD_KEYS));
        let listed = operator.call("GET", "/v1/keys", &Value::Null).json();
        assert!(listed.to_string().contains(OLD_REVOKED_KEY), "{listed}");
        assert!(stack.stop_broker().success());
        drop(witness);
    }
    assert!(!has_damaged_files(&stack.state_dir()));
}

#[test]
fn the_state_of_an_older_worker_is_taken_over() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_mosquitto();
    let dir = stack.dir().join("gw1");
    copy_old_state(&dir);
    let outcomes = stack.probe(Role::new("witness", &["wgkex/worker/gw1/applied"]));
    let domain = Domain::new(DOMAIN, &["ffx_".into()]).unwrap();
    let mut kept: BTreeSet<String> = OLD_KEYS.map(str::to_owned).into();
    // The second start reads the state that the first one has converted.
    for n in [1, 2] {
        let worker = InMemory::start(&stack, "gw1");
        let peers = || worker.kernel.device(&domain).unwrap().peers.keys().map(PublicKey::to_string).collect();
        wait_until("the peers are restored", || (kept == peers()).then_some(()));
        for (key, expected) in [
            (OLD_REVOKED_KEY, json!({ "domain": DOMAIN, "installed": [], "failed": { OLD_REVOKED_KEY: "denied" } })),
            (&key(n), json!({ "domain": DOMAIN, "installed": [key(n)], "failed": {} })),
        ] {
            outcomes.publish(key_for(DOMAIN, key));
            let outcome: Value = serde_json::from_slice(&outcomes.next_on("wgkex/worker/gw1/applied").payload).unwrap();
            assert_eq!(outcome, expected);
        }
        kept.insert(key(n));
        assert_eq!(kept, peers());
    }
    assert!(!has_damaged_files(&dir));
}

/// Regression: each overwrote the one before.
#[test]
fn a_quarantined_file_is_never_overwritten() {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    fs::create_dir(stack.state_dir()).unwrap();
    let names = ["broker.sqlite", "mqtt-retained.sqlite", "broker.lists.json"];
    for n in 1..=3 {
        for name in names {
            fs::write(stack.state_dir().join(name), format!("damaged for the {n}. time")).unwrap();
        }
        stack.start_broker();
        stack.wait_until_ready();
        assert!(stack.stop_broker().success());
    }
    for name in names {
        let aside = content(&stack.state_dir()).into_iter().filter(|(path, _)| {
            let file = path.file_name().unwrap().to_str().unwrap();
            file.starts_with(&format!("{name}.damaged"))
        });
        let texts: Vec<_> = aside.map(|(_, text)| String::from_utf8(text).unwrap()).collect();
        assert_eq!(texts, [1, 2, 3].map(|n| format!("damaged for the {n}. time")), "{name}");
    }
}

/// Regression: the targets of the links were created, or overwritten.
#[test]
fn state_is_not_written_through_links() {
    let (operator, admin) = Operator::new();
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded).config(&admin));
    let victims = stack.dir().join("victims");
    let state = stack.dir().join("elsewhere");
    for dir in [&victims, &state] {
        fs::create_dir(dir).unwrap();
    }
    // The directory itself may be a link, as systemd's DynamicUser makes it one.
    symlink(&state, stack.state_dir()).unwrap();
    for name in ["broker.sqlite", "mqtt-retained.sqlite", "broker.lists.json.new"] {
        symlink(victims.join(name), state.join(name)).unwrap();
    }
    fs::write(victims.join("broker.lists.json.new"), "precious").unwrap();
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_metric("wgkex_broker_state_kept", 0.0);
    let revoked = operator.call("POST", "/v1/revoke", &serde_json::json!({ "key": key(1) })).json();
    assert_eq!(revoked["kept"], true, "{revoked}");
    let untouched = BTreeMap::from([(victims.join("broker.lists.json.new"), b"precious".to_vec())]);
    assert_eq!(content(&victims), untouched);
    // Without links, all state is kept there.
    for name in ["broker.sqlite", "mqtt-retained.sqlite"] {
        fs::remove_file(state.join(name)).unwrap();
    }
    stack.wait_for_metric("wgkex_broker_state_kept", 1.0);
    wait_until("both files are there", || {
        ["broker.sqlite", "mqtt-retained.sqlite"].iter().all(|name| state.join(name).exists()).then_some(())
    });
}

/// Regression: the link was set aside as damaged, and the revoked key got 200.
#[test]
fn list_entries_that_cannot_be_read_are_left_alone_and_read_when_they_can_be() {
    let (operator, admin) = Operator::new();
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config(&admin));
    let _worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    assert_eq!(operator.call("POST", "/v1/revoke", &serde_json::json!({ "key": key(1) })).status, 200);
    assert!(stack.stop_broker().success());
    let (file, elsewhere) = (stack.state_dir().join("broker.lists.json"), stack.dir().join("elsewhere"));
    fs::rename(&file, &elsewhere).unwrap();
    symlink(&elsewhere, &file).unwrap();
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_metric("wgkex_broker_lists_kept", 0.0);
    let line = stack.broker().wait_for_log("list entries cannot be read");
    assert!(line.contains("WARN") && line.contains("it is a link"), "{line}");
    fs::rename(&elsewhere, &file).unwrap();
    wait_until("the key is denied", || (status(&stack, 1) == 403).then_some(()));
    stack.wait_for_metric("wgkex_broker_lists_kept", 1.0);

    assert!(stack.stop_broker().success());
    fs::write(&file, r#"{"layout":9,"records":{}}"#).unwrap();
    let before = fs::read(&file).unwrap();
    stack.start_broker();
    assert_eq!(stack.broker().wait().code(), Some(1), "{}", stack.broker().log());
    assert!(stack.broker().wait_for_log("number 9").contains("ERROR"));
    assert_eq!(fs::read(&file).unwrap(), before);
}

/// The worker has the same storage. Regression: it set its file aside.
#[test]
fn a_worker_stops_at_a_newer_layout_too() {
    let stack = Stack::prepare(Plan::new(Bus::Embedded).config(&format!("worker_listen: \"{}\"", free_address())));
    fs::create_dir(stack.state_dir()).unwrap();
    let file = stack.state_dir().join("worker.sqlite");
    let made = Command::new("/usr/bin/python3")
        .args(["-c", "import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript('CREATE TABLE new (x); PRAGMA user_version = 7')"])
        .arg(&file)
        .status();
    assert!(made.unwrap().success());
    let before = content(&stack.state_dir());
    let mut worker = stack.program("wgkex-worker", &[]);
    assert_eq!(worker.wait().code(), Some(1), "{}", worker.log());
    worker.wait_for_log("number 7");
    assert_eq!(content(&stack.state_dir()), before);
}

#[test]
fn sighup_applies_weights_and_the_log_level_and_names_what_needs_a_restart() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config("workers: {gw1: {weight: 1}, gw2: {weight: 0}}"));
    let _gateways = ["gw1", "gw2"].map(|name| Worker::start(&stack, name, WorkerBehaviour::Confirms, 0));
    let chosen = |stack: &Stack, n| {
        let answer = stack.v2(DOMAIN, &key(n)).json();
        answer["Endpoint"]["Address"].as_str().unwrap_or_default().to_owned()
    };
    wait_until("gw1 is chosen", || (chosen(&stack, 1) == "gw1.example").then_some(()));
    let reload = |stack: &mut Stack, config: &str| {
        stack.plan.config = config.to_owned();
        stack.write_config();
        stack.broker().signal(Signal::SIGHUP);
    };
    reload(
        &mut stack,
        "workers: {gw1: {weight: 0}, gw2: {weight: 1}}\nconfirm_timeout: 2\npeers: {max: 9}\nlog_level: DEBUG",
    );
    let line = stack.broker().wait_for_log("config reloaded");
    assert!(line.contains("log_level, workers.gw1.weight, workers.gw2.weight"), "{line}");
    let line = stack.broker().wait_for_log("take effect after a restart");
    assert!(line.contains("keys=\"confirm_timeout\""), "peers mean nothing to a broker: {line}");
    assert_eq!(chosen(&stack, 2), "gw2.example");
    drop(Worker::start(&stack, "gw3", WorkerBehaviour::Confirms, 0));
    stack.broker().wait_for_log(" DEBUG ");
    reload(&mut stack, "workers: {gw1: {weight: high}}");
    let line = stack.broker().wait_for_log("workers.gw1.weight: must be a number from 0 to 1000000000, not \"high\"");
    assert!(line.contains("wgkex.yaml:"), "{line}");
    stack.broker().wait_for_log("was not reloaded");
    assert_eq!(chosen(&stack, 3), "gw2.example", "a config with errors changes nothing");
}

/// The gateways have peers before the broker receives their counts, so that none of them is new to it.
#[test]
fn sighup_applies_how_fast_gateways_are_filled_and_the_drains_in_the_file() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    stack.start_mosquitto();
    let gateways = ["gw1", "gw2"].map(|name| Worker::start(&stack, name, WorkerBehaviour::Confirms, 500));
    stack.start_broker();
    stack.wait_until_ready();
    stack.wait_for_gateways(2);
    gateways[1].probe.publish(scripted::status("gw2", "0"));
    stack.wait_for_gateways(1);
    gateways[1].probe.publish_all([hello("gw2"), peers_of("gw2", DOMAIN, "1"), scripted::status("gw2", "1")]);
    stack.wait_for_gateways(2);
    let chosen = |stack: &Stack, n| {
        let answer = stack.v2(DOMAIN, &key(n)).json();
        answer["Endpoint"]["Address"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(chosen(&stack, 1), "gw1.example", "the other one came back, and is filled slowly");
    stack.plan.config = "rebalance: {over: 0}".to_owned();
    stack.write_config();
    stack.broker().signal(Signal::SIGHUP);
    let line = stack.broker().wait_for_log("config reloaded");
    assert!(line.contains("rebalance.over"), "{line}");
    assert_eq!(chosen(&stack, 2), "gw2.example");

    let drains = |stack: &mut Stack, gateways: &str| {
        let file = stack.state_dir().join("broker.drain.json");
        fs::write(file, format!(r#"{{"layout":1,"gateways":{gateways}}}"#)).unwrap();
        stack.broker().signal(Signal::SIGHUP);
    };
    drains(&mut stack, r#"{"gw2":{"since":1796018400,"reason":"new disk"}}"#);
    let line = stack.broker().wait_for_log("draining, by the file");
    assert!(line.contains("gw2") && line.contains("new disk"), "{line}");
    assert_eq!(chosen(&stack, 3), "gw1.example");
    drains(&mut stack, "{}");
    let line = stack.broker().wait_for_log("no longer draining, by the file");
    assert!(line.contains("gw2"), "{line}");
    assert_eq!(chosen(&stack, 4), "gw2.example");
}

#[test]
fn the_log_is_json_where_the_config_has_it_so() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded).config("log_format: json\npears: 3"));
    let log = stack.broker().log();
    for line in log.lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(event["level"].is_string() && event["message"].is_string() && event["timestamp"].is_string(), "{line}");
    }
    assert!(log.contains("pears") && log.contains("broker started"), "{log}");
}
