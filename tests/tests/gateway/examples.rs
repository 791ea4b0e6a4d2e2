//! The files below deploy/examples, unchanged except for paths and passwords.

use std::fs;
use std::path::Path;

use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::{Process, binary, hash};
use wgkex_tests::{key, wait_until};

const BROKER_HOST: &str = "broker.example.org";
const GATEWAY: &str = "gw01.example.org";
/// The directory that stands for /etc on these hosts.
const DIR: &str = "/run/etc";

/// An example with paths and passwords replaced, each of which must occur in it.
fn example(name: &str, replaced: &[(&str, &str)]) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(name);
    let mut text = fs::read_to_string(&file).unwrap();
    for (old, new) in replaced {
        assert!(text.contains(old), "{name} has no {old}");
        text = text.replace(old, new);
    }
    text
}

fn script(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(name).display().to_string()
}

fn write(host: &Host, file: &str, text: &str) {
    fs::write(host.path(file), text).unwrap();
}

/// Broker, gateway and router, connected with each other, and with names.
fn fleet(lane: Lane) -> [Host; 3] {
    let [broker, gateway, router] = [BROKER_HOST, GATEWAY, "router"].map(|name| Host::new(name, lane));
    let (_, from_gateway) = gateway.connect(&broker, 1);
    let (to_gateway, _) = gateway.connect(&router, 2);
    let (to_broker, _) = broker.connect(&router, 3);
    for (host, names) in [
        (&gateway, format!("{from_gateway} {BROKER_HOST}\n")),
        (&router, format!("{to_gateway} {GATEWAY}\n{to_broker} {BROKER_HOST}\n")),
        (&broker, String::new()),
    ] {
        write(host, "/run/hosts", &format!("127.0.0.1 localhost\n{names}"));
        host.run(&format!("mount --bind /run/hosts /etc/hosts && mkdir {DIR}"));
    }
    [broker, gateway, router]
}

fn check(host: &Host, program: &str) {
    host.run(&format!("{} check-config --strict", binary(program).display()));
}

/// POSTs a key from the router; returns the status.
fn post(router: &Host, url: &str, number: u32) -> String {
    let body = format!(r#"{{"domain": "ffmuc_welt", "public_key": "{}"}}"#, key(number));
    let command = format!("curl -s -m 20 --cacert {DIR}/ca.pem -o /dev/null -w '%{{http_code}}' -d '{body}' {url}");
    String::from_utf8(router.try_run(&format!("{command}/api/v2/wg/key/exchange")).stdout).unwrap()
}

fn status_of(router: &Host, url: &str) -> String {
    let output = router.try_run(&format!("curl -s -m 20 -o /dev/null -w '%{{http_code}}' {url}"));
    String::from_utf8(output.stdout).unwrap()
}

fn nginx(broker: &Host) -> Process {
    let server = example(
        "nginx.conf",
        &[
            ("/etc/ssl/wgkex/fullchain.pem", &format!("{DIR}/{BROKER_HOST}.pem")),
            ("/etc/ssl/wgkex/key.pem", &format!("{DIR}/{BROKER_HOST}.key")),
        ],
    );
    let frame = "daemon off; user root; pid /run/nginx.pid; error_log stderr; events {} http { access_log off; ";
    write(broker, "/run/nginx.conf", &format!("{frame}\n{server}}}\n"));
    broker.start("nginx", Path::new("/usr/sbin/nginx"), &["-c", "/run/nginx.conf"], &[])
}

fn haproxy(broker: &Host) -> Process {
    broker.run(&format!("cat {DIR}/{BROKER_HOST}.pem {DIR}/{BROKER_HOST}.key > {DIR}/both.pem"));
    let config = example("haproxy.cfg", &[("/etc/ssl/wgkex/fullchain-and-key.pem", &format!("{DIR}/both.pem"))]);
    write(broker, "/run/haproxy.cfg", &config);
    broker.start("haproxy", Path::new("/usr/sbin/haproxy"), &["-db", "-f", "/run/haproxy.cfg"], &[])
}

fn mosquitto(broker: &Host) -> Process {
    let acl = broker.run(&format!("{} mqtt-acl", binary("wgkex-broker").display()));
    write(broker, &format!("{DIR}/wgkex.acl"), &acl);
    let file = format!("{DIR}/wgkex.passwords");
    broker.run(&format!(
        "mosquitto_passwd -c -b {file} wgkex-broker secret && mosquitto_passwd -b {file} {GATEWAY} secret"
    ));
    let config =
        example("mosquitto.conf", &[("/etc/wgkex/", &format!("{DIR}/")), ("/etc/mosquitto/", &format!("{DIR}/"))]);
    write(broker, "/run/mosquitto.conf", &format!("user root\n{config}"));
    let mosquitto =
        broker.start("mosquitto", Path::new("/usr/sbin/mosquitto"), &["-c", "/run/mosquitto.conf", "-v"], &[]);
    mosquitto.wait_for_log(" running");
    mosquitto
}

/// With the broker's MQTT server and nginx, then behind another proxy, then with Mosquitto.
pub fn a_router_joins_the_mesh_with_the_example_configs(lane: Lane) {
    let [broker, gateway, router] = fleet(lane);
    broker.run(&format!("{} {DIR} {BROKER_HOST} 2>&1", script("make-ca")));
    let certificate = fs::read(broker.path(&format!("{DIR}/ca.pem"))).unwrap();
    for host in [&gateway, &router] {
        fs::write(host.path(&format!("{DIR}/ca.pem")), &certificate).unwrap();
    }

    let own = (&hash("secret"), "state_dir: /run/state\n");
    let config = example(
        "broker.yaml",
        &[
            ("/etc/wgkex/", &format!("{DIR}/")),
            ("HASH OF THE PASSWORD OF GW01", own.0),
            ("HASH OF THE PASSWORD OF GW02", own.0),
        ],
    );
    write(&broker, "/run/wgkex.yaml", &format!("{config}{}", own.1));
    check(&broker, "wgkex-broker");
    let mut serving = broker.start_broker();
    let mut front = nginx(&broker);

    let config = example(
        "gateway.yaml",
        &[
            ("/etc/wgkex/ca.pem", &format!("{DIR}/ca.pem")),
            ("key_dir: /etc/wgkex", "key_dir: /run/wgkex"),
            ("PASSWORD OF GW01", "secret"),
        ],
    );
    write(&gateway, "/run/wgkex.yaml", &format!("{config}{}", own.1));
    check(&gateway, "wgkex-worker");
    let userspace = if lane == Lane::Userspace { " --userspace" } else { "" };
    gateway.run(&format!("{} setup{userspace}", binary("wgkex-worker").display()));
    let _worker = gateway.start_worker();

    let (plain, tls) = (format!("http://{BROKER_HOST}"), format!("https://{BROKER_HOST}"));
    wait_until("the gateway is online", || (post(&router, &plain, 1) == "200").then_some(()));
    if lane == Lane::Userspace {
        router.run("wireguard-go wg-mesh >/dev/null 2>&1");
    }
    for _ in 0..2 {
        router.run(&format!("{} {plain} ffmuc_welt /run/key 98", script("router.sh")));
        router.run("ip address add fe80::2/64 dev vx-mesh nodad && ping -c 1 -w 20 fe80::1%vx-mesh");
    }
    assert_eq!(post(&router, &tls, 2), "200", "HTTPS by nginx");
    let slashes = format!("{plain}/");
    assert_eq!(post(&router, &slashes, 6), "200", "two slashes by nginx");
    assert_eq!(status_of(&router, &format!("{plain}/metrics")), "404");

    front.end_by(nix::sys::signal::Signal::SIGTERM);
    let _front = haproxy(&broker);
    wait_until("HAProxy serves", || (post(&router, &plain, 3) == "200").then_some(()));
    assert_eq!(post(&router, &tls, 4), "200", "HTTPS by HAProxy");
    assert_eq!(post(&router, &slashes, 7), "200", "two slashes by HAProxy");
    assert_eq!(status_of(&router, &format!("{plain}/metrics")), "403");
    assert!(!serving.log().contains("trusted_proxies"), "the proxies are named: {}", serving.log());

    serving.end_by(nix::sys::signal::Signal::SIGTERM);
    let config = fs::read_to_string(broker.path("/run/wgkex.yaml")).unwrap();
    let (before, _) = config.split_once("mqtt_listen:\n").unwrap();
    let session: Vec<_> = include_str!("../../../deploy/examples/mosquitto.conf")
        .lines()
        .skip_while(|line| !line.contains("mqtt: {"))
        .take(2)
        .map(|line| line.trim_start_matches('#').trim())
        .collect();
    let session =
        session.join(" ").replace("/etc/wgkex/", &format!("{DIR}/")).replace("PASSWORD OF THE BROKER", "secret");
    write(&broker, "/run/hosts", &format!("127.0.0.1 localhost {BROKER_HOST}\n"));
    write(&broker, "/run/wgkex.yaml", &format!("{before}{session}\n{}", own.1));
    check(&broker, "wgkex-broker");
    let _mosquitto = mosquitto(&broker);
    let _serving = broker.start_broker();
    wait_until("routers are served by Mosquitto", || (post(&router, &plain, 5) == "200").then_some(()));
    let peers = gateway.run("wg show wg-welt peers");
    assert!((1..=7).all(|number| peers.contains(&key(number))), "{peers}");
}
