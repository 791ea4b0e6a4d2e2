//! The forms of requests and answers.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use serde_json::{Value, json};
use wgkex_tests::http::Response;
use wgkex_tests::key;
use wgkex_tests::process::binary;
use wgkex_tests::stack::free_address;

use crate::registry_broker::{CHANGES, LOGIN, READS, RegistryBroker, Store, client, server, with, with_each_store};

/// Checks for an error in JSON with a text, and the field if there is one.
fn assert_error(answer: &Response, status: u16, field: Option<&str>) {
    assert_eq!(answer.status, status, "{answer:?}");
    let error = &answer.json()["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer:?}");
    assert_eq!(error["field"].as_str(), field, "{answer:?}");
}

#[test]
fn wa1_each_route_wants_user_and_password_before_it_looks_at_the_body() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        registry.add_client("c1", "s1", 1);
        let before = registry.everything();
        let body = json!({ "server_name": "s1", "client_name": "c1" }).to_string();
        let wrong = ["", "Basic", "Basic !!!", "Basic YWRtaW46czNjcmV1", "Bearer YWRtaW46czNjcmV0", "Basic czNjcmV0"];
        let by_post = READS.iter().chain(&CHANGES).map(|route| ("POST", route));
        for (method, route) in READS.iter().map(|route| ("GET", route)).chain(by_post) {
            for value in wrong {
                let header = format!("Authorization: {value}");
                let headers: &[&str] = if value.is_empty() { &[] } else { &[&header] };
                for body in [body.as_bytes(), b"no json"] {
                    let answer = registry.stack.connect().request(method, &format!("/api/v1/{route}"), headers, body);
                    assert_error(&answer, 401, None);
                    assert_eq!(answer.header("www-authenticate"), Some("Basic realm=\"Login Required\""));
                }
            }
        }
        assert_eq!(registry.everything(), before);
    });
}

#[test]
fn wa28_calls_come_over_tls_and_no_password_is_logged() {
    let mut registry = RegistryBroker::prepare(&Store::Sqlite, "");
    let (https, http, dir) = (free_address(), registry.stack.http, registry.stack.dir().to_owned());
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| dir.join(name).display().to_string());
    fs::write(&cert, own.cert.pem()).unwrap();
    fs::write(&key, own.signing_key.serialize_pem()).unwrap();
    let (ip, port, tls) = (http.ip(), http.port(), https.port());
    let more = format!(
        "broker_listen: {{host: {ip}, port: {port}, tls: {{port: {tls}, cert_file: {cert}, key_file: {key}}}}}\nlog_level: DEBUG\n"
    );
    registry.stack.plan.config.push_str(&more);
    registry.stack.write_config();
    registry.stack.start_broker();
    registry.stack.wait_until_ready();
    registry.add_server("s1", "192.168.2.0", 24, 20);
    let call = |version: &str, user: &str| {
        let url = format!("https://127.0.0.1:{tls}/api/v1/server/exists?server_name=s1");
        let output = Command::new("curl")
            .args([
                "-s",
                "-m",
                "10",
                "--cacert",
                &cert,
                version,
                "-u",
                user,
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                &url,
            ])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    assert_eq!([2, 3].map(|minor| answer_to_hello(https, minor)), [ALERT, HANDSHAKE], "TLS 1.1 is refused, 1.2 is not");
    for version in ["--tlsv1.2", "--tlsv1.3"] {
        assert_eq!(call(version, "admin:s3cret"), "200", "{version}");
        assert_eq!(call(version, "admin:wr0ng"), "401", "{version}");
    }
    // So do the calls of a node that trusts the issuer of the certificate.
    fs::write(dir.join("password"), "s3cret\n").unwrap();
    let node = |more: &[&str]| {
        let mut command = Command::new(binary("wgkex-node"));
        command.current_dir(&dir).args([
            "lease",
            "--password-file",
            "password",
            "--key-dir",
            "keys",
            "--config-dir",
            ".",
        ]);
        let output = command.args(["--registry", &format!("https://127.0.0.1:{tls}/")]).args(more).output().unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (is_done, said) = node(&["--name", "c1", "s1"]);
    assert!(!is_done && said.contains("certificate") && !said.contains("s3cret"), "{said}");
    assert_eq!(node(&["--name", "c1", "--ca-file", &cert, "s1"]), (true, "s1: ./s1.conf written\n".into()));
    assert_eq!(registry.get("client/list_all", &json!({})).json()["c1"].as_object().unwrap().len(), 1);
    // A server whose name is none of an interface.
    registry.add_server("Level 1 (north)", "192.168.3.0", 24, 20);
    let (is_done, said) = node(&["--name", "c1", "--ca-file", &cert, "--interface", "north", "Level 1 (north)"]);
    assert!(is_done && said == "Level 1 (north): ./north.conf written\n", "{said}");
    assert!(fs::read_to_string(dir.join("north.conf")).unwrap().contains("Address = 192.168.3.21\n"));
    assert!(dir.join("keys/north.key").exists());
    assert!(registry.stack.stop_broker().success());
    let log = registry.stack.broker().log();
    let (_, login) = LOGIN.rsplit_once(' ').unwrap();
    assert!(log.contains("DEBUG") && !["s3cret", "wr0ng", login].iter().any(|secret| log.contains(secret)), "{log}");
}

/// Types of TLS records (RFC 5246 section 6.2.1).
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

/// The type of the first record of a server's answer to an offer of TLS 1.1 (`minor` 2) or 1.2 (3), with suites for
/// both.
fn answer_to_hello(server: SocketAddr, minor: u8) -> u8 {
    let extensions = [
        [0, 10, 0, 4, 0, 2, 0, 23].as_slice(), // the group secp256r1
        &[0, 11, 0, 2, 1, 0],                  // uncompressed points
        &[0, 13, 0, 4, 0, 2, 4, 3],            // ECDSA with SHA-256
    ]
    .concat();
    // ECDHE_ECDSA with AES_128: GCM of TLS 1.2, and CBC of TLS 1.1.
    let suites = [0, 4, 0xc0, 0x2b, 0xc0, 0x09];
    let length = u8::try_from(extensions.len()).unwrap();
    let body = [&[3, minor], [7; 32].as_slice(), &[0], &suites, &[1, 0, 0, length], &extensions].concat();
    let hello = [&[1, 0, 0, u8::try_from(body.len()).unwrap()], body.as_slice()].concat();
    let record = [&[HANDSHAKE, 3, 1, 0, u8::try_from(hello.len()).unwrap()], hello.as_slice()].concat();
    let mut stream = TcpStream::connect(server).unwrap();
    stream.write_all(&record).unwrap();
    let mut first = [0];
    stream.read_exact(&mut first).unwrap();
    first[0]
}

#[test]
fn the_config_of_a_client_can_be_open_and_nothing_else() {
    let registry = RegistryBroker::start(&Store::Sqlite, "open_client_config: true");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    registry.add_client("c1", "s1", 1);
    let body = json!({ "server_name": "s1", "client_name": "c1" }).to_string();
    for route in READS {
        let answer = registry.stack.connect().request("GET", &format!("/api/v1/{route}/"), &[], body.as_bytes());
        assert_eq!(answer.status, if route == "client/config" { 200 } else { 401 }, "{route}");
    }
}

#[test]
fn wa2_the_end_of_the_line_is_no_part_of_the_password() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    assert_eq!(std::fs::read(registry.stack.dir().join("password")).unwrap(), b"s3cret\n");
    assert_eq!(registry.get("server/list_all", &json!({})).status, 200);
}

#[test]
fn wa3_wa4_wa5_a_server_is_added_listed_and_found() {
    with_each_store(|registry| {
        let new = server("s1", "192.168.2.0", 24, 20);
        registry.add_server("s1", "192.168.2.0", 24, 20);
        let shown =
            json!({ "endpoint_address": "203.0.113.5", "endpoint_port": 5128, "public_key": new["public_key"] });
        assert_eq!(registry.get("server/list_all", &json!({})).json(), json!({ "s1": shown }));
        let [known, unknown] = ["s1", "s2"].map(|name| json!({ "server_name": name }));
        assert_eq!(registry.get("server/wireguard_ip/", &known).json(), json!({ "server_wg_ip": "192.168.2.1" }));
        assert_error(&registry.get("server/wireguard_ip/", &unknown), 404, Some("server_name"));
        let found = registry.get("server/exists/", &known);
        assert_eq!((found.status, found.body.as_str()), (200, ""));
        assert_error(&registry.get("server/exists/", &unknown), 404, Some("server_name"));
        assert_eq!(registry.get("server/config/", &known).json(), json!({ "peers": [] }));
        assert_error(&registry.get("server/config/", &unknown), 404, Some("server_name"));
        assert_eq!(registry.get("client/list_all", &json!({})).json(), json!({}));
    });
}

#[test]
fn wa7_a_client_gets_its_config() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        assert_eq!(registry.add_client("c1", "s1", 1), 201);
        let names = json!({ "client_name": "c1", "server_name": "s1" });
        let expected = json!({
            "server": {
                "endpoint_address": "203.0.113.5",
                "endpoint_port": 5128,
                "public_key": server("s1", "192.168.2.0", 24, 20)["public_key"],
            },
            "subnet": { "allowed_ips": "192.168.2.0/24", "lease": "192.168.2.21" },
        });
        assert_eq!(registry.get("client/config/", &names).json(), expected);
        for other in
            [json!({ "client_name": "c2", "server_name": "s1" }), json!({ "client_name": "c1", "server_name": "s2" })]
        {
            assert_error(&registry.get("client/config/", &other), 404, Some("client_name"));
        }
        // A client can ask whether it has its key there.
        let with_key = |key: Value| registry.get("client/config/", &with(&names, "with_public_key", key));
        assert_eq!(with_key(json!(key(1))).json(), with(&expected, "public_key", json!(key(1))));
        assert_error(&with_key(json!(key(2))), 404, Some("client_name"));
        assert_error(&with_key(json!("x")), 400, Some("with_public_key"));
    });
}

#[test]
fn wa20_reads_answer_alike_to_each_form_of_a_call() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        registry.add_client("c 1", "s1", 1);
        let fields = json!({ "server_name": "s1", "client_name": "c 1" }).to_string();
        let chunked = format!("{:x}\r\n{fields}\r\n0\r\n\r\n", fields.len());
        for route in READS {
            let expected =
                registry.stack.connect().request("POST", &format!("/api/v1/{route}"), &[LOGIN], fields.as_bytes());
            assert_eq!(expected.status, 200, "{route}: {expected:?}");
            for path in [format!("/api/v1/{route}"), format!("/api/v1/{route}/")] {
                for kind in
                    ["", "application/json", "application/json;", "text/plain", "application/x-www-form-urlencoded"]
                {
                    let header = format!("Content-Type: {kind}");
                    let headers: &[&str] = if kind.is_empty() { &[LOGIN] } else { &[LOGIN, &header] };
                    for method in ["GET", "POST"] {
                        let answer = registry.stack.connect().request(method, &path, headers, fields.as_bytes());
                        assert_eq!((answer.status, &answer.body), (200, &expected.body), "{method} {path} {kind}");
                    }
                }
                let query = format!("{path}?server_name=s1&client_name=c%201");
                let answer = registry.stack.connect().request("GET", &query, &[LOGIN], b"");
                assert_eq!((answer.status, &answer.body), (200, &expected.body), "{query}");
                let mut http = registry.stack.connect();
                http.send(
                    format!("GET {path} HTTP/1.1\r\nHost: b\r\n{LOGIN}\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}")
                        .as_bytes(),
                );
                assert_eq!(http.response("GET").body, expected.body, "{path} in chunks");
            }
        }
    });
}

#[test]
fn wa20_each_route_is_there_with_and_without_a_slash_at_its_end() {
    with_each_store(|registry| {
        for slash in ["", "/"] {
            let call = |route: &str, fields: &Value| registry.post(&format!("{route}{slash}"), fields).status;
            assert_eq!(call("server/add", &server("s1", "192.168.2.0", 24, 20)), 201, "{slash}");
            assert_eq!(call("client/add", &client("c1", "s1", 1)), 201, "{slash}");
            assert_eq!(call("client/add", &client("c2", "s1", 2)), 201, "{slash}");
            let names = json!({ "server_name": "s1", "client_name": "c1" });
            for route in READS {
                assert_eq!(call(route, &names), 200, "{route}{slash}");
            }
            assert_eq!(call("server/remove_peer", &names), 200, "{slash}");
            assert_eq!(registry.lease("c1", "s1"), None, "{slash}");
            assert_eq!(call("client/delete", &json!({ "client_name": "c2" })), 200, "{slash}");
            assert_eq!(registry.lease("c2", "s1"), None, "{slash}");
            assert_eq!(call("server/delete", &names), 200, "{slash}");
            assert_eq!(registry.everything(), json!({ "clients": {}, "servers": {} }), "{slash}");
        }
    });
}

#[test]
fn a_method_that_does_not_fit_changes_nothing() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    registry.add_server("s1", "192.168.2.0", 24, 20);
    registry.add_client("c1", "s1", 1);
    let before = registry.everything();
    let fields = json!({ "server_name": "s1", "client_name": "c1" }).to_string();
    let wrong =
        READS.iter().map(|route| (route, ["PUT", "DELETE"])).chain(CHANGES.iter().map(|route| (route, ["GET", "PUT"])));
    for (route, methods) in wrong {
        for method in methods {
            let answer =
                registry.stack.connect().request(method, &format!("/api/v1/{route}/"), &[LOGIN], fields.as_bytes());
            assert_eq!(answer.status, 405, "{method} {route}");
            assert!(answer.json()["error"]["message"].is_string(), "{answer:?}");
        }
    }
    assert_eq!(registry.everything(), before);
}

#[test]
fn a_body_that_is_no_object_is_refused() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    let deep = [b"[".repeat(60_000), b"]".repeat(5)].concat();
    let (open, close) = ("[".repeat(10_000), "]".repeat(10_000));
    let valid_and_deep = format!("{{\"server_name\":\"s1\",\"client_name\":\"c1\",\"a\":{open}{close}}}");
    let bodies: [&[u8]; 9] = [
        b"{",
        b"null",
        b"[]",
        b"1",
        b"\"x\"",
        b"{\"server_name\": \"\xff\"}",
        b"{} {}",
        &deep,
        valid_and_deep.as_bytes(),
    ];
    for route in READS.iter().chain(&CHANGES) {
        for body in bodies {
            let answer = registry.stack.connect().request("POST", &format!("/api/v1/{route}/"), &[LOGIN], body);
            assert_error(&answer, 400, None);
        }
    }
    assert_eq!(registry.everything(), json!({ "clients": {}, "servers": {} }));
}

#[test]
fn wa22_values_of_another_type_and_huge_ones_are_refused() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        for value in [json!(["a"]), json!({ "a": 1 }), json!(7), json!(true), Value::Null, json!("x".repeat(10_000))] {
            let answer = registry.get("client/config/", &json!({ "client_name": value, "server_name": "s1" }));
            assert_error(&answer, 400, Some("client_name"));
        }
        let large = json!({ "client_name": "x".repeat(1 << 20), "server_name": "s1" });
        assert_error(&registry.get("client/config/", &large), 413, None);
        assert_eq!(registry.get("server/exists/", &json!({ "server_name": "s1" })).status, 200);
    });
}

#[test]
fn many_megabytes_are_refused_before_they_are_read() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    let mut http = registry.stack.connect();
    let head = format!("POST /api/v1/client/add/ HTTP/1.1\r\nHost: b\r\n{LOGIN}\r\nContent-Length: 1000000000\r\n\r\n");
    http.send(&[head.as_bytes(), &vec![b'x'; 1_200_000]].concat());
    assert_error(&http.response("POST"), 413, None);
}

#[test]
fn an_unchanged_config_is_not_sent_again() {
    with_each_store(|registry| {
        registry.add_server("s1", "192.168.2.0", 24, 20);
        let ask = |known: Option<&str>| {
            let known = known.map(|tag| format!("If-None-Match: {tag}"));
            let headers: Vec<&str> = [LOGIN].into_iter().chain(known.as_deref()).collect();
            registry.stack.connect().request("HEAD", "/api/v1/server/config/?server_name=s1", &headers, b"")
        };
        let tag = |answer: &Response| answer.header("etag").unwrap().to_owned();
        registry.add_client("c0", "s1", 10);
        let mut last = tag(&ask(None));
        registry.add_client("c0", "s1", 10);
        assert_eq!(ask(Some(&last)).status, 304, "a client that comes again as it was");
        let changes = [
            ("client/add/", client("c1", "s1", 1)),
            ("client/add/", client("c1", "s1", 2)),
            ("client/add/", client("c2", "s1", 3)),
            ("server/remove_peer/", json!({ "client_name": "c2", "server_name": "s1" })),
            ("client/delete/", json!({ "client_name": "c1" })),
        ];
        for (route, fields) in changes {
            assert_eq!(ask(Some(&last)).status, 304);
            assert_eq!(ask(Some(&format!("\"x\", W/{last}"))).status, 304);
            assert!(registry.post(route, &fields).status < 300);
            let next = ask(Some(&last));
            assert_eq!(next.status, 200, "{route}");
            last = tag(&next);
        }
        registry.post("server/delete/", &json!({ "server_name": "s1" }));
        registry.add_server("s1", "192.168.2.0", 24, 20);
        assert_eq!(ask(Some(&last)).status, 200, "another server of the same name");
    });
}

/// Other paths get the registry's errors if it is enabled, and the key exchange is unchanged.
#[test]
fn an_unknown_path_below_the_routes_is_refused_as_the_routes_do() {
    let registry = RegistryBroker::start(&Store::Sqlite, "");
    for path in ["/api/v1", "/api/v1/", "/api/v1/server", "/api/v1/server/nothing", "/api/v1/client/list_all/more"] {
        for method in ["GET", "POST", "PUT"] {
            let answer = registry.stack.connect().request(method, path, &[], b"");
            assert_error(&answer, 404, None);
            assert!(answer.json()["error"].as_object().is_some_and(|error| error.contains_key("field")), "{answer:?}");
        }
    }
    assert_eq!(registry.stack.get("/api/v1/wg/key/exchange").status, 405);
    let other = registry.stack.get("/api/v2/nothing");
    assert_eq!((other.status, other.json()["error"].get("field")), (404, None));
}
