//! The full path, as in the field: a router requests a gateway and joins the mesh, by BATMAN over VXLAN over the
//! kernel's WireGuard. The gateway is the network namespace of the test's thread, the router another one.

#![expect(clippy::unwrap_used, reason = "the lint knows test functions, not what they call")]

use std::path::Path;
use std::process::{Command, Output};

use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use wgkex_common::PublicKey;
use wgkex_tests::stack::{Bus, Plan, Stack, V2};
use wgkex_tests::{http, wait_until};

const DOMAIN: &str = "ffx_mesh";

/// A typical config of a site.
const CONFIG: &str = "\
externalName: 198.18.0.1
setup: {key_dir: /run/keys, listen_port: 40011, vxlan_id: 99, vxlan_port: 8472}";

#[test]
#[ignore = "needs root and Debian's kernel: tests/run vm"]
fn vm_a_router_that_posts_its_key_is_in_the_mesh() {
    std::thread::spawn(|| {
        make_namespaces();
        let mut stack = Stack::prepare(Plan::new(Bus::Embedded).domains([DOMAIN]).config(CONFIG));
        stack.http = "198.18.0.1:5000".parse().unwrap();
        stack.write_config();
        assert!(stack.program("wgkex-worker", &["setup"]).wait().success());
        make_mesh("", "vx-mesh");
        stack.start_broker();
        let _worker = stack.program("wgkex-worker", &[]);
        stack.wait_until_ready();
        stack.wait_for_gateways(1);

        let private_key = stack.dir().join("router.key");
        let endpoint = ask_for_gateway(&stack, &private_key);
        connect(&endpoint, &private_key);
        make_mesh(IN_ROUTER, "vx-router");

        let (gateway, router) = (mac("", "vx-mesh"), mac(IN_ROUTER, "vx-router"));
        wait_until("the router reaches the gateway", || ping(IN_ROUTER, &gateway));
        wait_until("the gateway reaches the router", || ping("", &router));
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Command prefix: runs in the router.
const IN_ROUTER: &str = "nsenter --net=/run/netns/router ";

/// gateway (198.18.0.1) --- (.2) router
fn make_namespaces() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("needs root");
    run("mount --make-rprivate / && mount -t tmpfs none /run && ip netns add router");
    run("ip link add internet type veth peer name internet netns router");
    for (place, address) in [("", "198.18.0.1/24"), (IN_ROUTER, "198.18.0.2/24")] {
        run(&format!("{place}ip address add {address} dev internet"));
        run(&format!("{place}ip link set internet up"));
        run(&format!("{place}ip link set lo up"));
    }
}

/// The first step of the firmware: it POSTs its key by wget. Returns the gateway in the answer.
fn ask_for_gateway(stack: &Stack, private_key: &Path) -> Value {
    let path = private_key.display();
    let key = run(&format!("umask 077 && wg genkey > {path} && wg pubkey < {path}"));
    let (body, url) = (http::ask(DOMAIN, &key), format!("http://{}{V2}", stack.http));
    let answer: Value =
        serde_json::from_str(&run(&format!("{IN_ROUTER}wget -q -O - --post-data '{body}' {url}"))).unwrap();

    let node = key.parse::<PublicKey>().unwrap().link_local();
    assert_eq!(run("wg show wg-mesh allowed-ips"), format!("{key}\t{node}/128"));
    let endpoint = answer["Endpoint"].clone();
    assert_eq!((&endpoint["Address"], &endpoint["Port"]), (&"198.18.0.1".into(), &"40011".into()));
    endpoint
}

/// The second step: WireGuard to the gateway in the answer, and VXLAN on top.
fn connect(endpoint: &Value, private_key: &Path) {
    let of = |value: &Value| value.as_str().unwrap().to_owned();
    let (address, port, peer) = (of(&endpoint["Address"]), of(&endpoint["Port"]), of(&endpoint["PublicKey"]));
    let gateway = of(&endpoint["AllowedIPs"][0]).replace("/128", "");
    let private_key = private_key.display();
    let key = run(&format!("wg pubkey < {private_key}"));
    let node = key.parse::<PublicKey>().unwrap().link_local();
    for command in [
        "ip link add wg-router type wireguard".into(),
        format!("wg set wg-router private-key {private_key}"),
        format!("wg set wg-router peer {peer} endpoint {address}:{port} allowed-ips {gateway}/128"),
        format!("ip address add {node}/128 dev wg-router"),
        "ip link set wg-router up".into(),
        format!("ip route add {gateway}/128 dev wg-router"),
        format!("ip link add vx-router type vxlan id 99 dstport 8472 local {node} remote {gateway} dev wg-router"),
        "ip link set vx-router up".into(),
    ] {
        run(&format!("{IN_ROUTER}{command}"));
    }
}

/// Adds BATMAN to an interface.
fn make_mesh(place: &str, interface: &str) {
    for command in [
        "ip link add bat0 type batadv",
        // Otherwise it would hold back packets from another mesh node for its first half minute.
        "batctl meshif bat0 bridge_loop_avoidance 0",
        &format!("ip link set {interface} master bat0"),
        "ip link set bat0 up",
    ] {
        run(&format!("{place}{command}"));
    }
}

/// Whether a BATMAN ping is answered.
fn ping(from: &str, to: &str) -> Option<()> {
    let output = sh(&format!("{from}batctl meshif bat0 ping -c 1 -t 1 {to}"));
    String::from_utf8_lossy(&output.stdout).contains(" 1 received").then_some(())
}

fn mac(place: &str, interface: &str) -> String {
    run(&format!("{place}ip -o link show {interface} | sed 's|.*link/ether \\([^ ]*\\).*|\\1|'"))
}

/// The output of a command that must succeed, trimmed.
fn run(command: &str) -> String {
    let output = sh(command);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn sh(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).output().unwrap()
}
