//! The bus over TLS: a Mosquitto that requires client certificates.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::path::Path;
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use wgkex_tests::process::Process;
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};
use wgkex_tests::wait_until;

type Ca = CertifiedIssuer<'static, KeyPair>;

fn params(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<_> = hosts.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(hosts).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn ca(name: &str) -> Ca {
    let mut params = params(name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes `NAME.crt` and `NAME.key`, signed by `ca`, for these hosts.
fn issue(dir: &Path, name: &str, hosts: &[&str], ca: &Ca) {
    let key = KeyPair::generate().unwrap();
    let certificate = params(name, hosts).signed_by(&key, ca).unwrap();
    fs::write(dir.join(format!("{name}.crt")), certificate.pem()).unwrap();
    fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

/// A Mosquitto on the stack's address with a certificate for 127.0.0.1, which accepts clients with a certificate of the
/// same CA.
fn scene() -> (Stack, Process) {
    let stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    let (dir, ca) = (stack.dir(), ca("ours"));
    fs::write(dir.join("ca.crt"), ca.pem()).unwrap();
    fs::write(dir.join("other.crt"), self::ca("theirs").pem()).unwrap();
    issue(dir, "server", &["127.0.0.1"], &ca);
    issue(dir, "client", &[], &ca);
    let at = |name: &str| dir.join(name).display().to_string();
    let config = format!(
        "listener {} 127.0.0.1\nuser root\nallow_anonymous true\nrequire_certificate true\ncafile {}\ncertfile {}\nkeyfile {}\n",
        stack.mqtt.port(),
        at("ca.crt"),
        at("server.crt"),
        at("server.key"),
    );
    fs::write(dir.join("tls.conf"), config).unwrap();
    let mosquitto = Process::start("mosquitto", Command::new("mosquitto").arg("-c").arg(dir.join("tls.conf")));
    wait_until("Mosquitto serves", || std::net::TcpStream::connect(stack.mqtt).ok());
    (stack, mosquitto)
}

/// Writes a config with this host and these files, `DIR` being the stack's directory.
fn configure(stack: &Stack, host: &str, files: &str) {
    let files = files.replace("DIR", &stack.dir().display().to_string());
    let (port, http, state) = (stack.mqtt.port(), stack.http, stack.state_dir());
    let config = format!(
        "domains: [{DOMAIN}]\ndomain_prefixes: [ffx_]\nbroker_listen: \"{http}\"\nstate_dir: {}\n\
         mqtt: {{broker_url: {host}, broker_port: {port}, tls: true, {files}}}\n",
        state.display()
    );
    fs::write(stack.config_file(), config).unwrap();
}

const OWN: &str = "cert_file: DIR/client.crt, key_file: DIR/client.key";

#[test]
fn with_the_right_certificates_the_bus_serves() {
    let (mut stack, _mosquitto) = scene();
    configure(&stack, "127.0.0.1", &format!("ca_file: DIR/ca.crt, {OWN}"));
    stack.start_broker();
    stack.wait_until_ready();
    assert!(stack.stop_broker().success());
}

#[test]
fn each_tls_error_is_one_clear_line_and_the_broker_tries_again() {
    let (mut stack, _mosquitto) = scene();
    for (host, files, said) in [
        ("127.0.0.1", format!("ca_file: DIR/other.crt, {OWN}"), "UnknownIssuer"),
        ("127.0.0.1", OWN.to_owned(), "UnknownIssuer"),
        ("localhost", format!("ca_file: DIR/ca.crt, {OWN}"), "not valid for"),
    ] {
        configure(&stack, host, &files);
        stack.start_broker();
        let line = stack.broker().wait_for_log("MQTT not connected");
        assert!(line.contains(said) && line.contains(host), "{said} in {line}");
        assert!(stack.get("/readyz").body.contains(said));
        let lines = stack.broker().log().lines().filter(|line| line.contains("WARN")).count();
        assert_eq!(lines, 1, "{}", stack.broker().log());
        assert!(stack.stop_broker().success());
    }
    // The server reports only after the handshake that it requires a certificate.
    configure(&stack, "127.0.0.1", "ca_file: DIR/ca.crt");
    stack.start_broker();
    let line = stack.broker().wait_for_log("MQTT not connected");
    assert!(line.contains("CertificateRequired"), "{line}");
    assert!(stack.stop_broker().success());
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let mut stack = Stack::prepare(Plan::new(Bus::Mosquitto));
    fs::write(stack.dir().join("empty"), "").unwrap();
    issue(stack.dir(), "client", &[], &ca("ours"));
    issue(stack.dir(), "other", &[], &ca("ours"));
    for (files, said) in [
        ("ca_file: DIR/none", ["mqtt.ca_file", "/none: "]),
        ("ca_file: DIR/empty", ["mqtt.ca_file", "/empty: no certificate in it, PEM is expected"]),
        ("cert_file: DIR/client.crt, key_file: DIR/empty", ["mqtt.key_file", "/empty: "]),
        ("cert_file: DIR/client.crt, key_file: DIR/other.key", ["mqtt.key_file", "/other.key: "]),
    ] {
        configure(&stack, "127.0.0.1", files);
        stack.start_broker();
        assert_eq!(stack.broker().wait().code(), Some(1));
        let log = stack.broker().log();
        assert!(log.contains("ERROR") && said.iter().all(|said| log.contains(said)), "{said:?} in {log}");
    }
}
