//! The commands of operators and scripts, run as they run them.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use wgkex_tests::process::{Process, binary};
use wgkex_tests::stack::free_address;

const PROGRAMS: [&str; 2] = ["wgkex-broker", "wgkex-worker"];
const LEAST: &str = "domains: [ffmuc_welt]\ndomain_prefixes: [ffmuc_]\n";

fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary(program));
    command.args(arguments).env_remove("WGKEX_CONFIG_FILE").output().expect("run a program")
}

fn check(program: &str, config: &Path, more: &[&str]) -> (Option<i32>, String) {
    let output = run(program, &[&["check-config", "--config", config.to_str().expect("a UTF-8 path")], more].concat());
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), String::from_utf8(output.stdout).expect("UTF-8"))
}

#[test]
fn check_config_names_each_problem_with_its_line_and_how_bad_it_is() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("wgkex.yaml");
    let cases = [
        ("", 0, 0, [].as_slice()),
        ("trusted_proxy: [192.0.2.1]\n", 0, 1, &[":3: trusted_proxy: ", "did you mean trusted_proxies?"]),
        ("mqtt_listen:\nusers: {}\n", 0, 1, &[":4: users: ", "It belongs below mqtt_listen, with spaces before it"]),
        ("mqtt:\n  broker_port: abc\nbroker_listn: x\n", 2, 2, &[":4: mqtt.broker_port: ", ":5: broker_listn: "]),
        ("mqtt_listen:\n  port: 1\n   host: x\n", 2, 2, &[":5: is not YAML: ", "this line begins in column 4"]),
        ("mqtt: [\n", 2, 2, &["is not YAML"]),
    ];
    for program in PROGRAMS {
        for (more, code, strict, said) in cases {
            fs::write(&file, format!("{LEAST}{more}")).unwrap();
            let (found, text) = check(program, &file, &[]);
            assert_eq!(found, Some(code), "{more}: {text}");
            assert!(said.iter().all(|said| text.contains(said)), "{more}: {text}");
            assert_eq!(check(program, &file, &["--strict"]).0, Some(strict), "{more}");
            let (found, json) = check(program, &file, &["--json"]);
            let json: Value = serde_json::from_str(&json).unwrap();
            let problems = json["errors"].as_array().unwrap().len() + json["warnings"].as_array().unwrap().len();
            assert_eq!((found, problems > 0), (Some(code), !said.is_empty()), "{json}");
        }
        let missing = check(program, &dir.path().join("none.yaml"), &[]);
        assert_eq!(missing.0, Some(2));
        assert!(missing.1.contains("none.yaml: cannot be read: "), "{}", missing.1);
    }
}

/// A file without which a program does not start is a mistake, another one a warning; both have the line of their key.
#[test]
fn check_config_names_files_that_cannot_be_read() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let file = dir.path().join("wgkex.yaml");
    let files = |name: &str| format!("{{cert_file: {}, key_file: {}}}", at(name), at(name));
    let (both, one, none) = ([Some(2), Some(2)], [Some(2), Some(0)], [Some(0), Some(0)]);
    let cases = [
        (format!("broker_listen:\n  tls: {}\n", files("none")), one, ":4: broker_listen.tls.cert_file: "),
        (format!("mqtt_listen:\n  tls: {}\n", files("none")), one, ":4: mqtt_listen.tls.key_file: "),
        (format!("mqtt:\n  broker_url: x\n  tls: yes\n  ca_file: {}\n", at("none")), both, ":6: mqtt.ca_file: "),
        (format!("tenants:\n  enabled: yes\n  tokens_file: {}\n", at("none")), one, ":5: tenants.tokens_file: "),
        (format!("blacklist_file: {}\n", at("none")), none, ":3: blacklist_file: "),
        (format!("allowlist: {{enabled: yes, file: {}}}\n", at("none")), none, ":3: allowlist.file: "),
        (format!("key_lists:\n  trusted_dir: {}\n", at("none")), none, ":4: key_lists.trusted_dir: "),
    ];
    for (more, codes, said) in &cases {
        fs::write(&file, format!("{LEAST}{more}")).unwrap();
        for (program, code) in PROGRAMS.iter().zip(codes) {
            let (found, text) = check(program, &file, &[]);
            assert_eq!(found, *code, "{program}: {more}: {text}");
            assert!(text.contains(&format!("{said}{}: does not exist\n", at("none"))), "{program}: {text}");
            let strict = if *code == Some(0) { Some(1) } else { *code };
            assert_eq!(check(program, &file, &["--strict"]).0, strict, "{program}: {more}");
        }
    }
    // Files that exist, with wrong content.
    fs::write(at("text"), "no PEM\n").unwrap();
    let (text, dir_itself) = (at("text"), dir.path().display().to_string());
    for (more, said) in [
        (format!("mqtt: {{broker_url: x, tls: yes, ca_file: {text}}}\n"), "text: has no certificate: PEM is expected"),
        (format!("broker_listen: {{tls: {}}}\n", files("text")), "text: has no private key: PEM is expected"),
        (format!("mqtt: {{broker_url: x, tls: yes, ca_file: {dir_itself}}}\n"), ": is a directory: a file is expected"),
        (format!("key_lists: {{deny_dir: {text}}}\n"), "text: is no directory: a directory is expected"),
    ] {
        fs::write(&file, format!("{LEAST}{more}")).unwrap();
        let (_, found) = check("wgkex-broker", &file, &[]);
        assert!(found.contains(said), "{more}: {found}");
    }
    // An existing file and directory, and a credential, which exists while its unit runs.
    fs::write(at("there"), "- x\n").unwrap();
    let credential = "{cert_file: /run/credentials/wgkex-broker.service/c, key_file: /run/credentials/x.service/k}";
    let more = format!(
        "blacklist_file: {}\nkey_lists: {{deny_dir: {}}}\nbroker_listen: {{tls: {credential}}}\n",
        at("there"),
        dir.path().display()
    );
    fs::write(&file, format!("{LEAST}{more}")).unwrap();
    for program in PROGRAMS {
        assert_eq!(check(program, &file, &["--strict"]), (Some(0), "the config is valid\n".to_owned()));
    }
}

/// The unit does not restart it: `RestartPreventExitStatus=78`.
#[test]
fn a_service_whose_config_cannot_be_used_ends_with_an_exit_code_of_its_own() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("wgkex.yaml");
    fs::write(&file, format!("{LEAST}log_level: loud\n")).unwrap();
    let unread = dir.path().join("unread.yaml");
    fs::write(&unread, format!("{LEAST}mqtt: {{username: u, password_file: {}/p}}\n", dir.path().display())).unwrap();
    for program in PROGRAMS {
        // A missing file may appear a moment later.
        for (config, code) in [(&file, 78), (&unread, 1), (&dir.path().join("none.yaml"), 1)] {
            let output = run(program, &["--config", config.to_str().unwrap()]);
            assert_eq!(output.status.code(), Some(code), "{program}: {output:?}");
        }
        assert!(help(program, &[]).contains("with 78 if its config has mistakes"), "{program}");
        let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../deploy/systemd/{program}.service"));
        let unit = fs::read_to_string(unit).unwrap();
        assert!(unit.contains("\nRestartPreventExitStatus=78\n"), "{unit}");
        let check = unit.find(&format!("\nExecReload=+/usr/bin/{program} check-config\n"));
        assert!(check.is_some_and(|check| unit[check..].contains("\nExecReload=/bin/sh -c 'kill -HUP $MAINPID'\n")));
    }
}

#[test]
fn the_example_is_valid() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wgkex.yaml.example");
    for program in PROGRAMS {
        assert_eq!(check(program, &example, &["--strict"]), (Some(0), "the config is valid\n".to_owned()));
    }
}

#[test]
fn each_program_writes_completions_for_five_shells_and_a_manual_page_for_each_command() {
    for (program, command, other) in [
        ("wgkex-broker", "hash-password", "check-config"),
        ("wgkex-worker", "setup", "check-config"),
        ("wgkex-node", "lease", "completions"),
    ] {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let output = run(program, &["completions", shell]);
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            assert!([program, command, other].iter().all(|part| text.contains(part)), "{shell}: {text}");
        }
        let dir = TempDir::new().unwrap();
        assert!(run(program, &["man-pages", dir.path().to_str().unwrap()]).status.success());
        let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page(&format!("{program}.1")).contains("with 64 if it is called wrongly"));
        assert!(page(&format!("{program}-{command}.1")).starts_with(".ie"));
        let missing = run(program, &["man-pages", "/nonexistent"]);
        assert_eq!(missing.status.code(), Some(1));
        assert!(String::from_utf8(missing.stderr).unwrap().starts_with("error: cannot be written: "));
    }
}

#[test]
fn hash_password_names_what_is_missing() {
    let output = run("wgkex-broker", &["hash-password"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("the password is expected on the first line of stdin"), "{error}");
}

#[test]
fn the_commands_that_look_at_a_program_document_their_exit_codes() {
    for (program, command, said) in [
        ("wgkex-worker", "status", "with 3 if something is wrong, with 1 if the worker cannot be reached"),
        ("wgkex-worker", "dry-run", "with 1 if the changes cannot be computed"),
        ("wgkex-worker", "doctor", "with 1 for warnings, with 3 for failures"),
        ("wgkex-broker", "doctor", "with 1 for warnings, with 3 for failures"),
    ] {
        let help = run(program, &[command, "--help"]);
        let help = String::from_utf8(help.stdout).unwrap();
        assert!(help.contains(said) && help.contains("--json"), "{help}");
    }
}

/// The commands in the help of `program` with these words, each after those words.
fn commands(program: &str, words: &[String]) -> Vec<Vec<String>> {
    let help = help(program, words);
    let listed =
        help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest.split_once("\n\n").map_or(rest, |(list, _)| list));
    // The description of a command continues in lines with a deeper indentation.
    let first = |line: &str| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')).map(str::to_owned);
    let names = listed.lines().filter_map(first).filter_map(|line| line.split_whitespace().next().map(str::to_owned));
    let of_name = |name: String| {
        let words = [words, &[name]].concat();
        let below = commands(program, &words);
        if below.is_empty() { vec![words] } else { below }
    };
    names.filter(|name| name != "help").flat_map(of_name).collect()
}

fn help(program: &str, words: &[String]) -> String {
    let words: Vec<_> = words.iter().map(String::as_str).chain(["--help"]).collect();
    let output = run(program, &words);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn every_command_documents_its_exit_codes_and_is_in_the_table_of_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = fs::read_to_string(root.join("deploy/docs/commands.md")).unwrap();
    let (_, table) = text.split_once("## Exit codes").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    for (program, number) in [("wgkex-broker", 26), ("wgkex-worker", 8), ("wgkex-node", 2)] {
        assert!(help(program, &[]).contains("Exits with 64 if it is called wrongly"), "{program}");
        let commands = commands(program, &[]);
        assert!(commands.len() >= number, "{commands:?}");
        for words in commands {
            let help = help(program, &words);
            let ends = help.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(ends.contains("Exits with 0") && ends.contains("with 1"), "{program} {words:?}: {help}");
            assert!(table.contains(&format!("`{}", words[0])), "{program} {words:?} is not in {table}");
            let words: Vec<_> = words.iter().map(String::as_str).chain(["--resaon"]).collect();
            let wrong = run(program, &words);
            assert_eq!(wrong.status.code(), Some(64), "{program} {words:?}: {wrong:?}");
            assert!(wrong.stdout.is_empty() && !wrong.stderr.is_empty(), "{program} {words:?}: {wrong:?}");
        }
        assert_eq!(run(program, &["--version"]).status.code(), Some(0));
    }
    assert_eq!(run("wgkex-node", &[]).status.code(), Some(64), "a command is needed");
    let lease =
        ["lease", "--registry", "http://127.0.0.1:1", "--password-file", "none", "--interface", "wg1", "s1", "s2"];
    let output = run("wgkex-node", &lease);
    assert_eq!(
        (output.status.code(), &*output.stderr),
        (Some(64), b"error: --interface is for one server only\n".as_slice())
    );
}

#[test]
fn a_config_that_is_not_valid_is_the_doctors_first_finding() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("wgkex.yaml");
    fs::write(&file, format!("{LEAST}mqtt:\n  broker_port: abc\nbroker_listn: x\n")).unwrap();
    let path = file.to_str().unwrap();
    for (command, code) in [("doctor", 3), ("status", 1), ("dry-run", 1)] {
        let output = run("wgkex-worker", &[command, "--config", path]);
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(code), "{command}: {said}");
        assert!(said.contains(":4: mqtt.broker_port: "), "{command}: {said}");
        if command == "doctor" {
            assert!(said.starts_with(&format!("fail config: {path}:4: ")), "{said}");
            assert!(said.ends_with("checks: 2, warnings: 1, failures: 1\n"), "{said}");
        }
    }
}

/// The original's access lists allow no topic below `wgkex/`; with an unbounded queue Mosquitto ends the connection.
#[test]
fn the_doctor_names_rights_that_the_mqtt_server_does_not_give() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    let acl = |allowed: &str| {
        let topics = ["wireguard", "wireguard-worker", "wireguard-metrics", "wireguard-broker", allowed];
        let lines = topics.map(|topic| format!("topic readwrite {topic}/#\n")).concat();
        fs::write(at("acl"), lines).unwrap();
    };
    for (more, allowed, said) in [
        ("", "other", "warn MQTT: what it publishes below wgkex/ does not come back"),
        (
            "max_queued_messages 0\n",
            "other",
            "warn MQTT: the server ends the connection when it publishes below wgkex/",
        ),
        ("max_queued_messages 0\n", "wgkex", "ok   MQTT: what it publishes below wgkex/ comes back\n"),
    ] {
        acl(allowed);
        let address = free_address();
        let (port, list) = (address.port(), at("acl").display().to_string());
        let text = format!("listener {port} 127.0.0.1\nallow_anonymous true\nacl_file {list}\nuser root\n{more}");
        fs::write(at("mosquitto.conf"), text).unwrap();
        let mut mosquitto = Command::new("/usr/sbin/mosquitto");
        let mosquitto = Process::start("mosquitto", mosquitto.arg("-c").arg(at("mosquitto.conf")).arg("-v"));
        mosquitto.wait_for_log(" running");
        let config = format!(
            "{LEAST}state_dir: {}\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}}}\n",
            dir.path().display()
        );
        fs::write(at("wgkex.yaml"), config).unwrap();
        let output = run("wgkex-worker", &["doctor", "--config", at("wgkex.yaml").to_str().unwrap()]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(said), "{said} is not in {text}");
        assert_eq!(text.contains("`wgkex-broker mqtt-acl` prints them"), said.starts_with("warn"), "{text}");
        assert!(text.contains("fail wg-welt: it is missing"), "{text}");
    }
}

/// Each output that troubleshooting.md quotes is expected by some test.
#[test]
fn each_cause_that_is_documented_is_the_text_of_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut tests = String::new();
    for (dir, name) in [("tests/tests", ".rs"), ("broker/src", "tests.rs"), ("worker/src", "tests.rs")] {
        collect(&root.join(dir), name, &mut tests);
    }
    let text = fs::read_to_string(root.join("deploy/docs/troubleshooting.md")).unwrap();
    let (_, table) = text.split_once("## What names the cause").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let rows: Vec<_> = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| What")).collect();
    assert!(rows.len() >= 20, "{rows:?}");
    for row in rows {
        let shown = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for part in shown.split('`').skip(1).step_by(2) {
            assert!(tests.contains(part), "no test has {part}: {row}");
        }
    }
}

/// Appends the text of each file below `dir` with this end of its name.
fn collect(dir: &Path, name: &str, text: &mut String) {
    for path in fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path()) {
        if path.is_dir() {
            collect(&path, name, text);
        } else if path.to_string_lossy().ends_with(name) {
            text.push_str(&fs::read_to_string(&path).expect("a text"));
        }
    }
}
