use std::time::Duration;

use serde_json::json;
use wgkex_common::doctor::access::FileAccess;
use wgkex_common::doctor::bus::Rights;
use wgkex_common::doctor::clock::ClockFacts;
use wgkex_common::doctor::files::{FileFacts, ListFacts, StateFacts};
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::doctor::{Level, worst};
use wgkex_common::mqtt::Fault;
use wgkex_common::mqtt::trial::{ConnectFailure, EchoOutcome};
use wgkex_common::storage::process_lock::LockHolder;

use super::facts::*;
use super::*;
use crate::fleet::status::Problem;
use crate::tls::Validity;

type Spoil = fn(&mut Facts);

const DAY: Duration = Duration::from_secs(86_400);

/// A broker with another MQTT server, on which all is well, and which does not run.
fn stopped() -> Facts {
    let port = |key, owner| PortFacts { key, listen: "[::]:5000".into(), owner: Ok(owner) };
    Facts {
        config_warnings: Vec::new(),
        running: Err("no broker answers".into()),
        ports: vec![port("broker_listen", PortOwner::Nobody), port("admin_listen", PortOwner::Nobody)],
        certificates: vec![CertificateFacts {
            section: "broker_listen.tls",
            file: "/c.pem".into(),
            denied: None,
            validity: Ok(Some(Validity::Left(30 * DAY))),
        }],
        workers: ["gw1".to_owned()].into(),
        embedded: None,
        mqtt: Some(MqttFacts {
            server: "mqtt:1883".into(),
            outcome: Ok(BusFacts {
                rights: Rights { echo: EchoOutcome::Received, ..Rights::default() },
                hellos: ["gw1".to_owned()].into(),
                retained_received: ["gw1".to_owned()].into(),
            }),
        }),
        state: StateFacts { dir: "/state".into(), user: "wgkex".into(), access: FileAccess::Granted, holder: Ok(None) },
        lists: vec![ListFacts {
            key: "blacklist_file",
            path: "/list".into(),
            access: FileAccess::Granted,
            damage: None,
        }],
        needed: vec![FileFacts { key: "registry.password_file", path: "/r".into(), access: FileAccess::Granted }],
        tokens: Some(Ok(3)),
        files: None,
        clock: ClockFacts { is_synchronised: Some(true), ..ClockFacts::default() },
    }
}

fn status() -> Status {
    let gateway = json!({
        "name": "gw1", "online": true, "version": "0.1.0", "offline": null, "connected": 7, "assigned": 2,
        "weight": 1.0, "share": 1.0, "target": 9.0, "domains": [],
    });
    let keys = json!({
        "accepted": {}, "refused": {}, "established": 0, "unestablished": 0, "queued": 0, "unacknowledged": 0, "waiting": 0,
        "oldest_pending_secs": null, "confirmation": { "count": 0, "p50": null, "p99": null, "buckets": [] },
    });
    let status = json!({
        "version": "0.1.0", "pid": 7, "uptime_secs": 60, "ready": true, "problems": [], "domains": [],
        "gateways": [gateway], "keys": keys,
    });
    serde_json::from_value(status).unwrap()
}

/// The same, and it runs.
fn well() -> Facts {
    let mut facts = stopped();
    facts.running = Ok(status());
    for port in &mut facts.ports {
        port.owner = Ok(PortOwner::Process { pid: 7, name: "wgkex-broker".into() });
    }
    facts.state.holder = Ok(Some(LockHolder { pid: Some(7), program: None }));
    facts.files = Some(20_000);
    facts
}

/// The same with an MQTT server of its own.
fn own_server() -> Facts {
    let workers = ["gw1".to_owned()].into();
    let embedded = EmbeddedFacts { is_reachable: true, has_users: true, workers };
    Facts { mqtt: None, embedded: Some(embedded), ..well() }
}

fn bus(facts: &mut Facts) -> &mut BusFacts {
    facts.mqtt.as_mut().unwrap().outcome.as_mut().unwrap()
}

fn running(facts: &mut Facts) -> &mut Status {
    facts.running.as_mut().unwrap()
}

fn embedded(facts: &mut Facts) -> &mut EmbeddedFacts {
    facts.embedded.as_mut().unwrap()
}

fn add_problem(facts: &mut Facts, kind: ProblemKind, subject: &str) {
    let problem = Problem { kind, subject: subject.into(), text: format!("{subject} is wrong\u{1b}") };
    running(facts).problems.push(problem);
}

fn no_mqtt(facts: &mut Facts, fault: Fault) {
    facts.mqtt.as_mut().unwrap().outcome = Err(ConnectFailure { fault, cause: "the cause".into() });
}

fn taken(facts: &mut Facts) {
    facts.ports[1].owner = Ok(PortOwner::Process { pid: 8, name: "nginx".into() });
}

/// Each spoiled fact makes one more finding, at this level, with these words in its text and in its advice.
fn each_is_found(begin: fn() -> Facts, table: &[(Level, Spoil, &str, &str)]) {
    let troubles = |facts: &Facts| {
        let findings = findings(facts).into_iter();
        findings.filter(|finding| finding.level != Level::Ok).collect::<Vec<_>>()
    };
    let before = troubles(&begin());
    for (level, spoil, found, advice) in table {
        let mut facts = begin();
        spoil(&mut facts);
        let new: Vec<_> = troubles(&facts).into_iter().filter(|finding| !before.contains(finding)).collect();
        assert_eq!(new.len(), 1, "{found}: {new:?}");
        let line = format!("{}: {}", new[0].subject, new[0].found);
        assert_eq!(new[0].level, *level, "{line}");
        assert!(line.contains(found), "{found} is not in {line}");
        let said = new[0].advice.as_deref().unwrap_or_default();
        assert!(said.contains(advice), "{advice} is not in {said}");
    }
}

#[test]
fn a_broker_on_which_all_is_well_has_only_ok_lines_and_a_stopped_one_is_a_finding() {
    for facts in [well(), own_server()] {
        let findings = findings(&facts);
        assert!(worst(&findings) == Level::Ok && findings.len() >= 10, "{findings:?}");
    }
    let findings = findings(&stopped());
    let troubles: Vec<_> = findings.iter().filter(|finding| finding.level != Level::Ok).collect();
    assert!(troubles.len() == 1 && troubles[0].level == Level::Warn, "{troubles:?}");
    assert!(troubles[0].found.starts_with("none runs here"), "{troubles:?}");
}

#[test]
fn each_trouble_of_a_running_broker_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (Level::Fail, |facts| running(facts).ready = false, "broker: version 0.1.0 runs", "below"),
            (
                Level::Fail,
                |facts| add_problem(facts, ProblemKind::DomainWithoutGateway, "ff_b"),
                "fleet: ff_b is wrong?",
                "`wgkex-broker gateways`",
            ),
            (Level::Fail, |facts| add_problem(facts, ProblemKind::SameKey, "a, b"), "fleet: a, b is wrong", "key file"),
            (Level::Fail, |facts| add_problem(facts, ProblemKind::SameLinkAddress, "a, b"), "a, b is", "link address"),
            (Level::Fail, |facts| add_problem(facts, ProblemKind::SameExternalAddress, "a, b"), "a, b", "externalName"),
            (
                Level::Warn,
                |facts| add_problem(facts, ProblemKind::RoutersUnreached, "gw1"),
                "fleet: gw1 is",
                "UDP port",
            ),
            (Level::Fail, |facts| add_problem(facts, ProblemKind::NameInUse, "gw1"), "MQTT: gw1 is wrong", "host name"),
            (
                Level::Fail,
                |facts| add_problem(facts, ProblemKind::DataMissing, "gw1, ff_a"),
                "fleet: gw1, ff_a is wrong",
                "`wgkex-worker doctor`",
            ),
            (
                Level::Warn,
                |facts| add_problem(facts, ProblemKind::ProxyNotTrusted, "10.0.0.1"),
                "trusted_proxies: 10.0.0.1 is wrong",
                "trusted_proxies",
            ),
            (
                Level::Fail,
                |facts| add_problem(facts, ProblemKind::ListDamaged, "blacklist_file"),
                "lists: blacklist_file is wrong",
                "log",
            ),
            (
                Level::Warn,
                |facts| add_problem(facts, ProblemKind::StateNotKept, "it"),
                "broker: it is wrong",
                "the disk is full",
            ),
            (Level::Warn, |facts| facts.files = Some(4096), "files: the running broker may open 4096", "LimitNOFILE"),
            (
                Level::Fail,
                |facts| facts.state.holder = Ok(Some(LockHolder { pid: Some(8), program: None })),
                "two brokers on one machine",
                "end one",
            ),
        ],
    );
}

#[test]
fn each_trouble_of_ports_and_certificates_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (Level::Fail, taken, "admin_listen: [::]:5000 is taken by process 8 (nginx)", "end that"),
            (
                Level::Fail,
                |facts| facts.ports[1].owner = Ok(PortOwner::Nobody),
                "the running broker does not listen on [::]:5000",
                "restart",
            ),
            (Level::Fail, |facts| facts.ports[1].owner = Err("no such".into()), "no program can listen on", "\"::\""),
            (
                Level::Warn,
                |facts| facts.certificates[0].validity = Ok(Some(Validity::Left(Duration::from_secs(30 * 86_400 - 1)))),
                "broker_listen.tls: /c.pem expires in 29 days",
                "renew it",
            ),
            (
                Level::Fail,
                |facts| facts.certificates[0].validity = Ok(Some(Validity::Expired(2 * DAY))),
                "broker_listen.tls: /c.pem has expired, 2 days ago",
                "renew it",
            ),
            (
                Level::Fail,
                |facts| facts.certificates[0].validity = Ok(Some(Validity::NotYet)),
                "not valid yet",
                "clock",
            ),
            (Level::Fail, |facts| facts.certificates[0].validity = Err("no PEM".into()), "no PEM", "cert_file"),
            (Level::Fail, |facts| facts.certificates[0].denied = Some("mode 600".into()), "mode 600", "chmod"),
            (
                Level::Fail,
                |facts| facts.needed[0].access = FileAccess::Denied("mode 600".into()),
                "registry.password_file: wgkex cannot read /r: mode 600",
                "chmod",
            ),
            (
                Level::Warn,
                |facts| facts.needed[0].access = FileAccess::Unknown("denied".into()),
                "/r cannot be looked at: denied",
                "as root",
            ),
            (
                Level::Fail,
                |facts| facts.tokens = Some(Err("line 3".into())),
                "tenants.tokens_file: line 3",
                "correct it",
            ),
            (Level::Warn, |facts| facts.tokens = Some(Ok(0)), "tenants.tokens_file: has no token", "tenant-token"),
        ],
    );
    each_is_found(
        stopped,
        &[
            (Level::Fail, taken, "admin_listen: [::]:5000 is taken by process 8 (nginx)", "end that"),
            (Level::Fail, |facts| facts.ports[1].owner = Ok(PortOwner::Kernel), "not seen from here", "ss -tlnp"),
            (
                Level::Warn,
                |facts| facts.state.holder = Ok(Some(LockHolder { pid: Some(8), program: None })),
                "process 8 has the state file, and no broker answers on broker_listen",
                "log",
            ),
            (
                Level::Fail,
                |facts| facts.state.access = FileAccess::Denied("mode 500".into()),
                "state: wgkex cannot write to /state: mode 500",
                "install -d -m 700 -o wgkex /state",
            ),
            (
                Level::Warn,
                |facts| facts.state.access = FileAccess::OnlyFor("root".into()),
                "/state is writable for root and not for wgkex",
                "--user NAME",
            ),
            (Level::Fail, |facts| facts.lists[0].access = FileAccess::Creatable, "/list is missing", "write it"),
        ],
    );
    let mut other = stopped();
    other.ports[0].owner = Ok(PortOwner::Process { pid: 8, name: "nginx".into() });
    let findings = findings(&other);
    let broker = findings.iter().find(|finding| finding.subject == "broker").unwrap();
    assert!(broker.level == Level::Fail && broker.found == "no broker answers", "{broker:?}");
}

#[test]
fn a_credential_of_a_unit_that_does_not_run_is_no_failure() {
    let mut facts = well();
    facts.certificates[0].validity = Ok(None);
    facts.needed[0].access = FileAccess::OnlyWhileRunning;
    let findings = findings(&facts);
    let unchecked = findings.iter().filter(|finding| finding.found.ends_with("it is not checked")).count();
    assert!(worst(&findings) == Level::Ok && unchecked == 2, "{findings:?}");
}

/// The doctor gives it five seconds.
#[test]
fn a_broker_that_does_not_answer_is_to_be_restarted_and_its_ports_not_to_be_changed() {
    let facts = Facts { running: Err("broker_listen [::]:5000: timeout".into()), ..well() };
    let troubles: Vec<_> = findings(&facts)
        .into_iter()
        .filter(|finding| finding.level != Level::Ok && finding.subject != "state")
        .collect();
    assert_eq!(troubles.len(), 3, "{troubles:?}");
    for trouble in &troubles {
        let advice = trouble.advice.as_deref().unwrap();
        assert!(advice.contains("log") && advice.contains("systemctl restart wgkex-broker"), "{trouble:?}");
        assert!(!advice.contains("another port"), "{trouble:?}");
    }
    assert_eq!(troubles[1].found, "process 7 (wgkex-broker) has [::]:5000, and does not answer");
}

/// In a container it has another number.
#[test]
fn a_broker_that_answers_is_known_by_its_name_too() {
    let mut facts = well();
    running(&mut facts).pid = 1;
    facts.state.holder = Ok(Some(LockHolder { pid: Some(1), program: None }));
    assert_eq!(worst(&findings(&facts)), Level::Ok);
}

#[test]
fn each_trouble_of_another_mqtt_server_is_named_with_what_to_do() {
    each_is_found(
        well,
        &[
            (Level::Fail, |facts| no_mqtt(facts, Fault::Password), "MQTT: mqtt:1883: the cause", "mqtt.password"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::ClientId), "the cause", "wgkex-broker-NAME"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::NoTls), "the cause", "mqtt.tls to true"),
            (Level::Fail, |facts| no_mqtt(facts, Fault::Server), "the cause", "start the MQTT server"),
            (
                Level::Fail,
                |facts| bus(facts).rights.refused = vec!["wgkex/x".into()],
                "subscribe to wgkex/x",
                "the broker's user its rights",
            ),
            (Level::Warn, |facts| bus(facts).rights.echo = EchoOutcome::Lost, "does not come back", "mqtt-acl"),
            (
                Level::Warn,
                |facts| bus(facts).hellos.clear(),
                "knows 1 workers with a hello; no hello is retained of gw1",
                "keeps retained messages",
            ),
            (
                Level::Warn,
                |facts| assert!(bus(facts).hellos.insert("gw2".into())),
                "the running broker has not received: gw2",
                "again",
            ),
        ],
    );
    each_is_found(
        stopped,
        &[(
            Level::Warn,
            |facts| bus(facts).retained_received.clear(),
            "workers: no message is retained of gw1",
            "host name",
        )],
    );
    let mut original = well();
    running(&mut original).gateways[0].version = Some(crate::fleet::status::ORIGINAL.into());
    bus(&mut original).hellos.clear();
    assert_eq!(worst(&findings(&original)), Level::Ok, "it says none");
}

#[test]
fn each_trouble_of_the_own_mqtt_server_is_named_with_what_to_do() {
    each_is_found(
        own_server,
        &[
            (
                Level::Fail,
                |facts| embedded(facts).has_users = false,
                "mqtt_listen: other machines reach it",
                "hash-password",
            ),
            (
                Level::Warn,
                |facts| assert!(facts.workers.insert("gw2".into())),
                "mqtt_listen.users: workers names gw2, which cannot connect",
                "add users",
            ),
            (
                Level::Warn,
                |facts| assert!(embedded(facts).workers.insert("gw3".into())),
                "mqtt_listen.users: no worker is known that uses gw3",
                "take the user out",
            ),
        ],
    );
    let mut local = own_server();
    (embedded(&mut local).is_reachable, embedded(&mut local).has_users) = (false, false);
    assert_eq!(worst(&findings(&local)), Level::Ok);
}
