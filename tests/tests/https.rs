//! The broker's HTTPS: beside plain HTTP, with certificates that change while it runs.
//!
//! Fails without the time limit of a handshake. Rustls has no old TLS to accept; `openssl s_server -min_protocol TLSv1`
//! answers the same two hellos with its own hello and its certificate.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wgkex_common::tls::provider;
use wgkex_common::tls::rustls::pki_types::pem::PemObject as _;
use wgkex_common::tls::rustls::pki_types::{CertificateDer, ServerName};
use wgkex_common::tls::rustls::version::{TLS12, TLS13};
use wgkex_common::tls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};
use wgkex_tests::http::ask;
use wgkex_tests::process::memory;
use wgkex_tests::scripted::{Worker, WorkerBehaviour};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V2, free_address};
use wgkex_tests::unread_answers::{pile_up, pipelined};
use wgkex_tests::{key, wait_until};

/// Clients that do not read.
const CLIENTS: usize = 60;
/// The bytes that each of them sends: as many as it can without blocking, so that it need not read meanwhile.
const SENT: usize = 32 << 10;
/// How many KiB the broker may grow by for them.
const GROWTH: u32 = 24 * 1024;
const BOTH: &[&SupportedProtocolVersion] = &[&TLS12, &TLS13];

/// A stack that is not started, whose broker is to serve HTTPS at the returned address with `cert.pem` and `key.pem`.
fn prepare() -> (Stack, SocketAddr) {
    let https = free_address();
    let mut stack = Stack::prepare(Plan::new(Bus::Embedded));
    let (http, dir) = (stack.http, stack.dir().display().to_string());
    stack.plan.config = format!(
        "broker_listen: {{host: {}, port: {}, tls: {{port: {}, cert_file: {dir}/cert.pem, key_file: {dir}/key.pem}}}}",
        http.ip(),
        http.port(),
        https.port()
    );
    stack.write_config();
    issue(&stack);
    (stack, https)
}

/// A new certificate for the broker, which signs itself.
fn issue(stack: &Stack) -> String {
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    fs::write(stack.dir().join("cert.pem"), own.cert.pem()).unwrap();
    fs::write(stack.dir().join("key.pem"), own.signing_key.serialize_pem()).unwrap();
    own.cert.pem()
}

fn started() -> (Stack, SocketAddr, Worker) {
    let (mut stack, https) = prepare();
    stack.start_broker();
    stack.wait_until_ready();
    let worker = Worker::start(&stack, "gw1", WorkerBehaviour::Confirms, 0);
    stack.wait_for_gateways(1);
    (stack, https, worker)
}

/// An HTTPS connection of a client that trusts only `certificate`.
fn connect(
    https: SocketAddr,
    certificate: &str,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(versions).unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
    let stream = TcpStream::connect(https)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(StreamOwned::new(ClientConnection::new(config, name).unwrap(), stream))
}

/// The answer to a router over HTTPS that trusts only `certificate`.
fn post(
    https: SocketAddr,
    certificate: &str,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<String> {
    let mut stream = connect(https, certificate, versions)?;
    let body = ask(DOMAIN, &key(1));
    let head = format!("POST {V2} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes())?;
    let mut answer = String::new();
    // A connection may end without close_notify.
    match stream.read_to_string(&mut answer) {
        Err(error) if answer.is_empty() => Err(error),
        _ => Ok(answer),
    }
}

fn certificate(stack: &Stack) -> String {
    fs::read_to_string(stack.dir().join("cert.pem")).unwrap()
}

#[test]
fn https_and_http_serve_side_by_side() {
    let (mut stack, https, _worker) = started();
    let line = stack.broker().wait_for_log("HTTPS listens");
    assert!(line.contains(&https.to_string()), "{line}");
    for version in BOTH {
        let answer = post(https, &certificate(&stack), &[version]).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("gw1.example"), "{answer}");
        assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    }
    assert!(stack.stop_broker().success());
}

#[test]
fn unread_answers_take_bounded_memory() {
    let (mut stack, https, _worker) = started();
    let (certificate, requests) = (certificate(&stack), pipelined("/metrics"));
    let before = memory(stack.broker().pid());
    let ask = |_| {
        let mut stream = connect(https, &certificate, BOTH).unwrap();
        stream.conn.complete_io(&mut stream.sock).unwrap();
        pile_up(&mut stream, |stream| &stream.sock, &requests[..SENT]);
        stream
    };
    let unread: Vec<_> = (0..CLIENTS).map(ask).collect();
    let after = memory(stack.broker().pid());
    println!("{CLIENTS} clients by HTTPS: {before} KiB before, {after} KiB with them");
    assert!(after < before + GROWTH, "{before} {after}");
    assert!(post(https, &certificate, BOTH).unwrap().starts_with("HTTP/1.1 200 OK"));
    drop(unread);
}

#[test]
fn old_tls_is_refused() {
    let (_stack, https, _worker) = started();
    for minor in [1, 2] {
        // A ClientHello of TLS 1.0 or 1.1: version, random, no session, two suites of that time, no compression.
        let mut hello = vec![3, minor];
        hello.extend([7; 32]);
        hello.extend([0, 0, 4, 0, 0x2f, 0, 0x35, 1, 0]);
        let mut record = vec![22, 3, 1, 0, u8::try_from(hello.len() + 4).unwrap(), 1, 0, 0];
        record.push(u8::try_from(hello.len()).unwrap());
        record.extend(hello);
        let mut stream = TcpStream::connect(https).unwrap();
        stream.write_all(&record).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        // A fatal alert.
        assert!(answer.len() == 7 && answer[0] == 21 && answer[5] == 2, "{answer:?}");
    }
}

#[test]
fn new_certificates_are_taken_over_without_a_restart_and_broken_ones_are_not() {
    let (mut stack, https, _worker) = started();
    let old = certificate(&stack);
    assert!(post(https, &old, BOTH).is_ok());
    let new = issue(&stack);
    wait_until("the new certificate is served", || post(https, &new, BOTH).ok());
    assert!(post(https, &old, BOTH).is_err());
    fs::write(stack.dir().join("key.pem"), "no key").unwrap();
    let line = stack.broker().wait_for_log("stays in use");
    assert!(
        line.contains("WARN") && line.contains("broker_listen.tls.key_file") && line.contains("/key.pem"),
        "{line}"
    );
    assert!(post(https, &new, BOTH).is_ok());
    let newer = issue(&stack);
    wait_until("the newest certificate is served", || post(https, &newer, BOTH).ok());
    let log = stack.broker().log();
    assert_eq!(log.matches("stays in use").count(), 1, "{log}");
    assert_eq!(log.matches("is renewed").count(), 2, "{log}");
}

#[test]
fn a_file_that_cannot_be_used_at_the_start_is_named() {
    let (stack, _) = prepare();
    let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    for (file, content, said) in [
        ("key.pem", Some(other.signing_key.serialize_pem()), ["broker_listen.tls.key_file", "/key.pem: "]),
        ("key.pem", Some("nothing".into()), ["broker_listen.tls.key_file", "/key.pem: "]),
        ("cert.pem", Some(String::new()), ["broker_listen.tls.cert_file", "no certificate in it"]),
        ("cert.pem", None, ["broker_listen.tls.cert_file", "/cert.pem: "]),
    ] {
        let path = stack.dir().join(file);
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
        let mut broker = stack.program("wgkex-broker", &[]);
        assert_eq!(broker.wait().code(), Some(1));
        let log = broker.log();
        let lines: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
        assert!(lines.len() == 1 && said.iter().all(|said| lines[0].contains(said)), "{said:?} in {log}");
    }
}

#[test]
fn a_taken_port_is_named() {
    let (stack, https) = prepare();
    let _taken = std::net::TcpListener::bind(https).unwrap();
    let mut broker = stack.program("wgkex-broker", &[]);
    assert_eq!(broker.wait().code(), Some(1));
    assert!(broker.log().contains(&format!("broker_listen.tls {https}")), "{}", broker.log());
}

#[test]
fn hanging_handshakes_are_ended_and_delay_no_plain_request() {
    let (stack, https, _worker) = started();
    let mut hanging: Vec<_> = (0..600).map(|_| TcpStream::connect(https).unwrap()).collect();
    let begun = Instant::now();
    assert_eq!(stack.v2(DOMAIN, &key(1)).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(post(https, &certificate(&stack), BOTH).is_ok());
    for stream in &mut hanging {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_or_default(), 0);
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}
