//! Every command in a block of the documents is run by a test, and every config there is valid. A new command in a
//! document has to be added here, or to the scripts that run the documents. Metrics, files and links in documents
//! exist.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use wgkex_tests::admin::Operator;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::process::{binary, hash};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::{http::Http, key, wait_until};
use yaml_rust2::{Yaml, YamlLoader};

/// The scripts that run blocks of documents unchanged: `run_block DOCUMENT "SECTION" NUMBER`, and for drop-ins of units
/// `extend_unit UNIT DOCUMENT "SECTION" NUMBER`.
const SCRIPTS: [&str; 2] = ["tests/packages", "tests/first-router"];

/// Commands that are run in another form: the file that runs each, and the text in it.
const RUN_IN_OTHER_FORM: [(&str, &str, &str); 11] = [
    (
        "ip addr add VIRTUAL_IP/32 dev wg0 && ip route add HUB_ALLOWED_IPS dev wg0",
        "tests/tests/gateway/hub.rs",
        "ip addr add {}/32 dev wg-t && ip link set wg-t up && ip route add {networks} dev wg-t",
    ),
    (
        "wgkex-node lease --registry https://broker.example.org --password-file /etc/wgkex/registry.password s1 s2",
        "tests/tests/gateway/servers.rs",
        "{} lease --registry http://{address}:5000 --password-file /run/password",
    ),
    ("wg-quick up s1", "tests/tests/gateway/servers.rs", "wg-quick up {file}"),
    (
        "wg set wg0 peer HUB_KEY endpoint HUB_ENDPOINT allowed-ips HUB_ALLOWED_IPS persistent-keepalive 25",
        "tests/tests/gateway/hub.rs",
        "peer {key} endpoint {endpoint} allowed-ips {networks} persistent-keepalive",
    ),
    ("systemctl restart wgkex-broker", "tests/packages", "inside systemctl restart wgkex-broker"),
    (
        "python3 -m websockets ws://127.0.0.1:5000/tenants/3daf1997-d6eb-41ba-898f-ebc275da1f98",
        "tests/tests/tenants/main.rs",
        "[\"-m\", \"websockets\", &url]",
    ),
    ("deploy/demo", "tests/tests/docs.rs", "\"-c\", \"deploy/demo --once\""),
    ("tests/run", ".ci/run", "tests/run"),
    ("wgkex-broker mqtt-acl > /etc/mosquitto/acl", "tests/tests/gateway/examples.rs", "{} mqtt-acl"),
    // This command asks for a password.
    (
        "mosquitto_passwd -c /etc/mosquitto/passwords wgkex-broker",
        "tests/tests/gateway/examples.rs",
        "mosquitto_passwd -c -b",
    ),
    (
        "mosquitto_passwd /etc/mosquitto/passwords gw01.example.org",
        "tests/tests/gateway/examples.rs",
        "mosquitto_passwd -b",
    ),
];

struct Block {
    document: String,
    section: String,
    language: String,
    /// Its number among the section's blocks of this language, from 1.
    number: usize,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn documents() -> Vec<String> {
    let docs = fs::read_dir(root().join("deploy/docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let docs = docs
        .filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "md"))
        .map(|name| format!("deploy/docs/{name}"));
    docs.chain(["README.md".into()]).collect()
}

/// The fenced blocks of a document.
fn blocks(document: &str) -> Vec<Block> {
    let (mut blocks, mut section, mut open) = (Vec::<Block>::new(), String::new(), false);
    for line in read(document).lines() {
        match (open, line.strip_prefix("```")) {
            (true, Some(_)) => open = false,
            (true, None) => blocks.last_mut().unwrap().text.extend([line, "\n"]),
            (false, Some(language)) => {
                open = true;
                let same = |block: &&Block| block.section == section && block.language == language;
                let number = blocks.iter().filter(same).count() + 1;
                let (document, section, language) = (document.into(), section.clone(), language.into());
                blocks.push(Block { document, section, language, number, text: String::new() });
            }
            (false, None) if line.starts_with('#') => section = line.trim_start_matches('#').trim().into(),
            (false, None) => {}
        }
    }
    blocks
}

fn blocks_of(language: &str) -> Vec<Block> {
    documents().iter().flat_map(|document| blocks(document)).filter(|block| block.language == language).collect()
}

impl Block {
    fn place(&self) -> String {
        format!("{}, {}, {}. {}", self.document, self.section, self.number, self.language)
    }

    /// Whether a script runs this block by `function`.
    fn is_run_by(&self, function: &str) -> bool {
        let call = format!("{function} {} \"{}\" {}", self.document, self.section, self.number);
        SCRIPTS.iter().flat_map(|script| read(script).lines().map(str::to_owned).collect::<Vec<_>>()).any(|line| {
            line.split_once(&call).is_some_and(|(_, rest)| !rest.starts_with(|next: char| next.is_ascii_digit()))
        })
    }

    fn commands(&self) -> impl Iterator<Item = &str> {
        self.text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()).filter(|line| !line.is_empty())
    }
}

#[test]
fn every_command_in_the_documents_is_run_by_a_test() {
    let mut in_other_form: BTreeSet<_> = RUN_IN_OTHER_FORM.iter().map(|(command, _, _)| *command).collect();
    for block in blocks_of("sh") {
        if block.is_run_by("run_block") {
            continue;
        }
        for command in block.commands() {
            let known = RUN_IN_OTHER_FORM.iter().find(|(known, _, _)| *known == command);
            let (_, file, text) = known.unwrap_or_else(|| panic!("{}: no test runs {command}", block.place()));
            assert!(read(file).contains(text), "{file} has no {text}, so no test runs {command}");
            in_other_form.remove(command);
        }
    }
    assert!(in_other_form.is_empty(), "not in the documents any more: {in_other_form:?}");
}

#[test]
fn every_extension_of_a_unit_in_the_documents_is_tried() {
    for block in blocks_of("ini") {
        let is_tried =
            ["wgkex-broker", "wgkex-worker"].iter().any(|unit| block.is_run_by(&format!("extend_unit {unit}")));
        assert!(is_tried, "{}: no test extends a unit by it", block.place());
    }
}

#[test]
fn every_config_in_the_documents_is_valid() {
    let (dir, hash) = (tempfile::tempdir().unwrap(), hash("secret"));
    let file = dir.path().join("wgkex.yaml");
    let blocks = blocks_of("yaml");
    assert!(!blocks.is_empty());
    for block in blocks {
        let domains =
            if block.text.contains("domains:") { "" } else { "domains: [ffmuc_welt]\ndomain_prefixes: [ffmuc_]\n" };
        let text = block.text.replace("$argon2id$...", &hash).replace("password: \"...\"", "password: \"secret\"");
        fs::write(&file, format!("{domains}{}", with_files(&text, dir.path()))).unwrap();
        for program in ["wgkex-broker", "wgkex-worker"] {
            let output =
                Command::new(binary(program)).args(["--config"]).arg(&file).arg("check-config").output().unwrap();
            assert!(output.status.success(), "{}: {program}: {output:?}", block.place());
        }
    }
}

/// The config with its file names replaced by those of files in `dir`, which exist.
fn with_files(text: &str, dir: &Path) -> String {
    let words = text.split(|next: char| next.is_whitespace() || ",{}\"".contains(next));
    let files: BTreeSet<_> =
        words.filter(|word| word.starts_with('/') && Path::new(word).extension().is_some()).collect();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let pem = own.cert.pem() + &own.signing_key.serialize_pem();
    files.iter().enumerate().fold(text.to_owned(), |text, (number, named)| {
        let file = dir.join(number.to_string());
        let is_pem =
            Path::new(named).extension().is_some_and(|name| ["pem", "crt", "key"].iter().any(|pem| name == *pem));
        fs::write(&file, if is_pem { &pem } else { "secret\n" }).unwrap();
        text.replace(named, &file.display().to_string())
    })
}

/// The targets of links and pictures in a document.
fn links(text: &str) -> impl Iterator<Item = &str> {
    [("](", ')'), ("src=\"", '"'), ("srcset=\"", '"')].into_iter().flat_map(|(open, close)| {
        text.split(open).skip(1).filter_map(move |rest| rest.split_once(close)).map(|(link, _)| link)
    })
}

/// The anchors of a document's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut is_open = false;
    let headings = text.lines().filter(|line| {
        is_open ^= line.starts_with("```");
        !is_open && line.starts_with('#')
    });
    let anchor = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        words.chars().filter(|char| char.is_alphanumeric() || "-_".contains(*char)).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    for document in documents() {
        let text = read(&document);
        for link in links(&text).filter(|link| !link.starts_with("http")) {
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let dir = Path::new(&document).parent().unwrap();
            let file = if file.is_empty() { document.clone() } else { dir.join(file).display().to_string() };
            assert!(root().join(&file).exists(), "{document}: {link}");
            if let Some(anchor) = anchor {
                assert!(anchors(&read(&file)).contains(anchor), "{document}: {link}");
            }
        }
    }
}

/// The names in backquotes of the first column of a table's rows.
fn first_column(text: &str) -> BTreeSet<String> {
    let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// A section of a document.
fn section(document: &str, heading: &str) -> String {
    let text = read(document);
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("{document}: {heading}"));
    section.split("\n## ").next().unwrap_or_default().to_owned()
}

/// A broker with all its features enabled, and a worker that is a server and the hub.
fn all_enabled() -> (Stack, InMemory) {
    let (operator, admin) = Operator::new();
    let password = tempfile::NamedTempFile::new().unwrap();
    fs::write(&password, "secret\n").unwrap();
    let registry = format!("registry: {{enabled: true, password_file: {}}}", password.path().display());
    let plan = Plan::new(Bus::Embedded).config(&admin).config(&registry).config("tenants: {enabled: true, hub: gw1}");
    let stack = Stack::start(plan);
    let worker = InMemory::start_with(
        &stack,
        "gw1",
        "servers: {s1: {network: 192.168.2.0/24}}\ntenants: {enabled: true, hub: gw1}\nhub: {enabled: true}\n",
    );
    // Causes the events whose series exist only after them.
    assert_eq!(stack.get("/api/v1/server/list_all").status, 401);
    wait_until("a router has its gateway", || (stack.v2(DOMAIN, &key(1)).status == 200).then_some(()));
    for command in [&["trust", &key(9)][..], &["drain", "gw1"]] {
        let output = operator.run(&stack, command);
        assert!(output.status.success(), "{output:?}");
    }
    (stack, worker)
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_there() {
    let (stack, worker) = all_enabled();
    let families = |metrics: &str| -> BTreeSet<String> {
        let lines = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        lines.map(str::to_owned).collect()
    };
    for (part, http) in [("Broker", stack.http), ("Worker", worker.http)] {
        let documented = first_column(&section("deploy/docs/metrics.md", part));
        let found = families(&Http::connect(http).get("/metrics").body);
        let differing: Vec<_> = found.symmetric_difference(&documented).collect();
        assert!(differing.is_empty(), "{part}: in metrics.md or in /metrics alone: {differing:?}");
    }
}

/// Each file of `state_dir`, by its name in the code and as the programs create it, has a row in upgrade.md, and no
/// other file has.
#[test]
fn every_file_of_the_state_is_in_the_document_of_upgrades() {
    let documented = first_column(&section("deploy/docs/upgrade.md", "Back to the version before"));
    let mut in_code = BTreeSet::new();
    for dir in ["broker/src", "common/src", "worker/src"] {
        for source in sources(&root().join(dir)) {
            let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            for ending in [".sqlite\"", ".json\""] {
                let names = code.match_indices(ending).filter_map(|(at, _)| {
                    let name = code[..at].rsplit('"').next()?;
                    (!name.contains('/')).then(|| format!("{name}{}", ending.trim_end_matches('"')))
                });
                in_code.extend(names);
            }
        }
    }
    assert_eq!(in_code, documented);

    let (stack, worker) = all_enabled();
    drop(worker);
    for dir in [stack.state_dir(), stack.dir().join("gw1")] {
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let file = ["-wal", "-shm", ".lock"].iter().fold(&*name, |name, part| name.trim_end_matches(part));
            assert!(documented.contains(file), "{name} is not in upgrade.md");
        }
    }
}

/// The texts of the source files below a directory, without those of tests.
fn sources(dir: &Path) -> Vec<String> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let text = |path: PathBuf| {
        if path.is_dir() {
            return sources(&path);
        }
        let is_test = path.file_name().is_some_and(|name| name == "tests.rs");
        if is_test { Vec::new() } else { vec![fs::read_to_string(&path).unwrap()] }
    };
    paths.flat_map(text).collect()
}

/// Whether all braces, brackets, parentheses and quotes of a text are closed, in order.
fn is_balanced(expression: &str) -> bool {
    let (mut open, mut is_quoted) = (Vec::new(), false);
    for char in expression.chars() {
        match char {
            '"' => is_quoted = !is_quoted,
            _ if is_quoted => {}
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(char) => return false,
            _ => {}
        }
    }
    open.is_empty() && !is_quoted
}

#[test]
fn the_alerts_are_whole_rules_about_documented_metrics() {
    let metrics = first_column(&read("deploy/docs/metrics.md"));
    let alerts = YamlLoader::load_from_str(&read("deploy/examples/prometheus-alerts.yaml")).unwrap().remove(0);
    let rules: Vec<&Yaml> =
        alerts["groups"].as_vec().unwrap().iter().flat_map(|group| group["rules"].as_vec().unwrap()).collect();
    assert!(rules.len() >= 10, "{rules:?}");
    for metric in metrics.iter().filter(|metric| metric.ends_with("_up")) {
        let is_down = format!("{metric} == 0");
        assert!(rules.iter().any(|rule| rule["expr"].as_str() == Some(&is_down)), "no rule for {metric}");
    }
    for rule in rules {
        let text = |value: &Yaml| value.as_str().unwrap_or_else(|| panic!("{rule:?}")).to_owned();
        let [name, expression, duration] = ["alert", "expr", "for"].map(|key| text(&rule[key]));
        assert_eq!(rule.as_hash().unwrap().len(), 5, "{name}");
        assert!(duration.trim_end_matches('m').parse::<u32>().is_ok(), "{name}: {duration}");
        assert!(["critical", "warning"].contains(&&*text(&rule["labels"]["severity"])), "{name}");
        let summary = text(&rule["annotations"]["summary"]);
        assert_eq!(summary.matches("{{").count(), summary.matches("}}").count(), "{name}: {summary}");
        assert!(is_balanced(&expression), "{name}: {expression}");
        let words = expression.split(|char: char| !char.is_ascii_lowercase() && char != '_');
        for metric in words.filter(|word| word.starts_with("wgkex_")) {
            assert!(metrics.contains(metric), "{name}: {metric} is no metric");
        }
    }
}

#[test]
#[ignore = "needs root: tests/run netns"]
fn the_demo_gets_a_ping_through() {
    let dir = tempfile::tempdir().unwrap();
    // The programs are built already.
    std::os::unix::fs::symlink("/bin/true", dir.path().join("cargo")).unwrap();
    let target = binary("wgkex-broker").ancestors().nth(2).unwrap().to_owned();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let mut demo = Command::new("sh");
    demo.args(["-c", "deploy/demo --once"]).current_dir(root()).env("PATH", path).env("CARGO_TARGET_DIR", target);
    let output = demo.output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
