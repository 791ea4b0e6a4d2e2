//! Every command in a block of the documents is run by a test, and every config there is a valid one. Commands that are new
//! in a document are missing here, or in the scripts that run the documents.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use wgkex_tests::process::{binary, hash};

/// What runs blocks of documents as they stand there: `run_block DOCUMENT "SECTION" NUMBER`, and for drop-ins of units
/// `extend_unit UNIT DOCUMENT "SECTION" NUMBER`.
const SCRIPTS: [&str; 2] = ["tests/packages", "tests/first-router"];

/// Commands that are run in another form: by which file, and the text in it that does so.
const OTHERWISE: [(&str, &str, &str); 14] = [
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
        "tests/tests/tenants/with_websockets.py",
        "websockets.connect(",
    ),
    ("deploy/demo", "tests/tests/docs.rs", "\"-c\", \"deploy/demo --once\""),
    ("tests/run", ".ci/run", "tests/run"),
    ("wgkex-broker mqtt-acl > /etc/mosquitto/acl", "tests/tests/gateway/examples.rs", "{} mqtt-acl"),
    (
        "wgkex-broker server add s1 --network 192.168.2.0/24 --endpoint gw01.example.org --key KEY",
        "tests/tests/registry/commands.rs",
        "\"add\",\n        \"s1\"",
    ),
    (
        "wgkex-broker client add laptop --server s1 --key KEY",
        "tests/tests/registry/commands.rs",
        "[\"client\", \"add\", \"c1\", \"--server\", \"s1\", \"--key\"",
    ),
    ("wgkex-broker client show laptop --server s1 --wg-quick", "tests/tests/registry/commands.rs", "[\"--wg-quick\""),
    // It asks for a password.
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
    /// Which of those with this language in the section, from 1.
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
    let mut otherwise: BTreeSet<_> = OTHERWISE.iter().map(|(command, _, _)| *command).collect();
    for block in blocks_of("sh") {
        if block.is_run_by("run_block") {
            continue;
        }
        for command in block.commands() {
            let known = OTHERWISE.iter().find(|(known, _, _)| *known == command);
            let (_, file, text) = known.unwrap_or_else(|| panic!("{}: no test runs {command}", block.place()));
            assert!(read(file).contains(text), "{file} has no {text}, so no test runs {command}");
            otherwise.remove(command);
        }
    }
    assert!(otherwise.is_empty(), "not in the documents any more: {otherwise:?}");
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

/// The config with the files that it names in `dir`, where they are.
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
