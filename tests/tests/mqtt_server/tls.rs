//! TLS to the server.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use wgkex_tests::raw_client::RawClient;
use wgkex_tests::stack::{Bus, Plan, Stack};
use wgkex_tests::wait_until;

use crate::assert_serving;

/// Writes a new certificate for 127.0.0.1, its key, and the certificate of its issuer.
fn issue(dir: &Path, issuer: &str) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, issuer);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    fs::write(dir.join(format!("{issuer}.crt")), ca.pem()).unwrap();
    fs::write(dir.join("server.crt"), params.signed_by(&key, &ca).unwrap().pem()).unwrap();
    fs::write(dir.join("server.key"), key.serialize_pem()).unwrap();
}

fn stack() -> Stack {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    issue(stack.dir(), "first");
    let dir = stack.dir().display();
    stack.plan.listen = format!("tls: {{cert_file: {dir}/server.crt, key_file: {dir}/server.key}}");
    stack.write_config();
    stack.start_broker();
    stack.wait_until_ready();
    stack
}

/// Publishes a message by TLS, to a server whose certificate must be issued by `issuer`.
fn publish(stack: &Stack, issuer: &str, more: &[&str]) -> Output {
    let mut command = Command::new("mosquitto_pub");
    command.args(["-h", "127.0.0.1", "-p", &stack.mqtt.port().to_string(), "-q", "1", "-t", "tls/x", "-m", "secret"]);
    command.args(more).arg("--cafile").arg(stack.dir().join(format!("{issuer}.crt"))).output().unwrap()
}

#[test]
fn idle_connections_block_no_tls_handshake() {
    let mut stack = stack();
    let mut idle: Vec<_> = (0..50).map(|_| TcpStream::connect(stack.mqtt).unwrap()).collect();
    // Others send half a handshake.
    for stream in idle.iter_mut().skip(25) {
        std::io::Write::write_all(stream, b"\x16\x03\x01\0\xa5\x01").unwrap();
    }
    let mut subscriber = RawClient::connect(stack.mqtt, "subscriber");
    subscriber.subscribe(&[("tls/x", rumqttc::QoS::AtMostOnce)]);
    for version in ["tlsv1.2", "tlsv1.3"] {
        let output = publish(&stack, "first", &["--tls-version", version]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(&subscriber.receive().payload[..], b"secret");
    }
    assert_serving(&mut stack);
}

#[test]
fn a_new_certificate_counts_without_a_restart_and_a_damaged_one_does_not() {
    let mut stack = stack();
    fs::write(stack.dir().join("server.crt"), "no certificate").unwrap();
    let output = publish(&stack, "first", &[]);
    assert!(output.status.success(), "the one before counts: {output:?}");
    let line = stack.broker().wait_for_log("stays in use");
    assert!(line.contains("WARN") && line.contains("mqtt_listen.tls.cert_file"), "{line}");
    issue(stack.dir(), "second");
    wait_until("the new certificate counts", || publish(&stack, "second", &[]).status.success().then_some(()));
    assert!(!publish(&stack, "first", &[]).status.success());
    let line = stack.broker().wait_for_log("MQTT client refused");
    assert!(line.contains("UnknownCA") && line.contains("mqtt_listen.tls.cert_file"), "{line}");
    assert_serving(&mut stack);
}

#[test]
fn a_file_that_cannot_be_used_is_named_and_the_broker_does_not_start() {
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    issue(stack.dir(), "first");
    fs::write(stack.dir().join("empty"), "").unwrap();
    fs::write(stack.dir().join("other.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let dir = stack.dir().display().to_string();
    for (certificate, key, said) in [
        ("none", "server.key", ["mqtt_listen.tls.cert_file", "/none"]),
        ("empty", "server.key", ["mqtt_listen.tls.cert_file", "/empty: no certificate in it"]),
        ("server.crt", "empty", ["mqtt_listen.tls.key_file", "/empty"]),
        ("server.crt", "other.key", ["mqtt_listen.tls.key_file", "/other.key"]),
    ] {
        stack.plan.listen = format!("tls: {{cert_file: {dir}/{certificate}, key_file: {dir}/{key}}}");
        stack.write_config();
        stack.start_broker();
        assert_eq!(stack.broker().wait().code(), Some(1));
        let log = stack.broker().log();
        assert!(log.contains("ERROR") && said.iter().all(|said| log.contains(said)), "{said:?} in {log}");
    }
}
