//! The files for containers, as far as they can be checked without an engine: the files that they name exist, the
//! configs in them are valid, Mosquitto accepts its config, and the images' health checks tell serving programs from
//! others.

#![expect(clippy::unwrap_used, reason = "the lint knows test functions, not what they call")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;
use wgkex_common::Config;
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::process::{Process, binary};
use wgkex_tests::stack::{Bus, Plan, Stack, free_address};
use wgkex_tests::wait_until;
use yaml_rust2::{Yaml, YamlLoader};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/container")
}

fn read(file: &str) -> String {
    fs::read_to_string(dir().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn compose() -> Yaml {
    YamlLoader::load_from_str(&read("compose.yaml")).unwrap().remove(0)
}

/// The texts in a list.
fn texts(list: &Yaml) -> Vec<&str> {
    list.as_vec().into_iter().flatten().map(|text| text.as_str().unwrap()).collect()
}

/// A copy of `file` in `place` that names its secrets there, each a file of one line.
fn with_secrets(file: &str, place: &TempDir) -> PathBuf {
    let copy = place.path().join(file);
    fs::write(&copy, read(file).replace("/run/secrets", place.path().to_str().unwrap())).unwrap();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    for secret in compose()["secrets"].as_hash().unwrap().keys() {
        let name = secret.as_str().unwrap();
        let content = match name.rsplit('-').next() {
            Some("ca" | "cert") => own.cert.pem(),
            Some("key") => own.signing_key.serialize_pem(),
            _ => "secret\n".to_owned(),
        };
        fs::write(place.path().join(name), content).unwrap();
    }
    copy
}

fn run(program: &str, config: &Path, arguments: &[&str]) -> Output {
    Command::new(binary(program)).arg("--config").arg(config).args(arguments).output().unwrap()
}

/// The instructions of an image, after those of its base image.
fn instructions<'a>(images: &'a str, image: &str) -> Vec<&'a str> {
    let (before, own) = images.split_once(&format!(" AS {image}\n")).unwrap_or_else(|| panic!("no image {image}"));
    let own: Vec<_> = own.lines().take_while(|line| !line.starts_with("FROM ")).collect();
    let from = before.rsplit(' ').next().unwrap();
    if images.contains(&format!(" AS {from}\n")) { [instructions(images, from), own].concat() } else { own }
}

#[test]
fn images_run_without_root_and_their_health_checks_ask_the_programs() {
    let (images, stack) = (read("Containerfile"), Stack::start(Plan::new(Bus::Embedded)));
    let worker = InMemory::start(&stack, "gw1");
    let defaults = Config::parse("", "domains: [ffx_a]\ndomain_prefixes: [ffx_]", "gw1").unwrap();
    for (image, listens, default) in
        [("broker", stack.http, defaults.broker_listen.port), ("worker", worker.http, defaults.worker_listen.port)]
    {
        let lines = instructions(&images, image);
        assert_eq!(lines.iter().rfind(|line| line.starts_with("USER ")), Some(&"USER wgkex"), "{image}");
        assert!(lines.contains(&&*format!("ENTRYPOINT [\"wgkex-{image}\"]")), "{image}");
        let check = lines.iter().find_map(|line| line.strip_prefix("HEALTHCHECK ")?.split_once(" CMD ")).unwrap().1;
        let words: Vec<String> = serde_json::from_str(check).unwrap();
        let script = words.last().unwrap();
        let asked = format!("/127.0.0.1/{default} ");
        assert!(script.contains(&asked), "{image}: {check}");
        let is_well = |port: u16| {
            let script = script.replace(&asked, &format!("/127.0.0.1/{port} "));
            Command::new(&words[0]).args(&words[1..words.len() - 1]).arg(script).output().unwrap().status.success()
        };
        wait_until(&format!("the {image} is well"), || is_well(listens.port()).then_some(()));
        assert!(!is_well(free_address().port()), "{image}");
    }
}

#[test]
fn every_service_has_its_files_its_secrets_and_its_image() {
    let (compose, images) = (compose(), read("Containerfile"));
    for (name, service) in compose["services"].as_hash().unwrap() {
        for volume in texts(&service["volumes"]) {
            let source = volume.split(':').next().unwrap();
            let is_there = match source.strip_prefix("./") {
                Some(file) => dir().join(file).exists(),
                None => !compose["volumes"][source].is_badvalue(),
            };
            assert!(is_there, "{name:?}: {volume}");
        }
        for secret in texts(&service["secrets"]) {
            assert!(compose["secrets"][secret]["file"].as_str().unwrap().starts_with("secrets/"), "{name:?}: {secret}");
        }
        if let Some(target) = service["build"]["target"].as_str() {
            assert!(images.contains(&format!(" AS {target}\n")), "{target}");
            assert!(dir().join("../..").join(service["build"]["dockerfile"].as_str().unwrap()).exists());
        }
    }
}

#[test]
fn the_configs_are_valid_and_name_only_secrets_of_their_service() {
    let place = TempDir::new().unwrap();
    let compose = compose();
    for service in ["broker", "worker"] {
        let file = format!("{service}.yaml");
        let output = run(&format!("wgkex-{service}"), &with_secrets(&file, &place), &["check-config", "--strict"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let secrets = texts(&compose["services"][service]["secrets"]);
        let named = read(&file);
        let named: Vec<&str> = named.split("/run/secrets/").skip(1).map(|rest| rest.lines().next().unwrap()).collect();
        assert_eq!(named, secrets, "{file}");
    }
}

#[test]
fn mosquitto_takes_its_config_and_the_access_list_is_the_brokers() {
    let place = TempDir::new().unwrap();
    let acl = run("wgkex-broker", &with_secrets("broker.yaml", &place), &["mqtt-acl"]);
    assert_eq!(String::from_utf8(acl.stdout).unwrap(), read("acl"));

    let config = with_secrets("mosquitto.conf", &place);
    let certificate = rcgen::generate_simple_self_signed(["mqtt".to_owned()]).unwrap();
    fs::write(place.path().join("mqtt-certificate"), certificate.cert.pem()).unwrap();
    fs::write(place.path().join("mqtt-key"), certificate.signing_key.serialize_pem()).unwrap();
    fs::write(place.path().join("mqtt-passwords"), "").unwrap();
    let port = free_address().port();
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("listener 8883", &format!("user root\nlog_dest stderr\nlistener {port} 127.0.0.1"));
    let text = text.replace("/mosquitto/config/acl", dir().join("acl").to_str().unwrap());
    fs::write(&config, text.replace("/mosquitto/data/", &format!("{}/", place.path().display()))).unwrap();
    let mosquitto = Process::start("mosquitto", Command::new("mosquitto").arg("-c").arg(&config));
    mosquitto.wait_for_log(" running");
}
