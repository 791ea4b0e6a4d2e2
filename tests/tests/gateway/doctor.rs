//! `wgkex-worker doctor` names the problems of a gateway, and changes nothing.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::thread;

use nix::sys::signal::Signal;
use serde_json::Value;
use wgkex_tests::gateway::{Host, Lane, link_local};
use wgkex_tests::process::hash;
use wgkex_tests::{key, wait_until};

use crate::own_server::certify;
use crate::peers::router;
use crate::read_only_commands::worker;
use crate::{Single, serves};

/// Runs it; returns its exit code and output.
fn doctor(host: &Host) -> (i32, String) {
    worker(host, "doctor")
}

/// It fails, with a line that begins like this and has this advice.
fn assert_reports(host: &Host, trouble: &str, advice: &str) {
    let (code, said) = doctor(host);
    let line = said.lines().find(|line| line.starts_with(trouble));
    assert!(line.is_some_and(|line| line.contains(advice)), "{trouble} ... {advice} is not in {said}");
    let expected = if trouble.starts_with("fail") { 3 } else { 1 };
    assert!(code == expected || (code == 3 && expected == 1), "{code}: {said}");
}

pub fn a_gateway_on_which_all_is_well_passes_and_a_stopped_worker_is_a_finding(lane: Lane) {
    let Single { broker: _broker, worker: mut process, host } = Single::new(lane, "");
    assert_eq!(host.post(2, &key(0)).status, 200);
    let before = (host.tables("a"), host.wireguard("wg-a"));
    let losses = || process.log().matches("MQTT not connected").count();
    let lost = losses();
    assert_no_other_problem(&host, "", &[]);
    assert_eq!(losses(), lost, "it kept its connections: {}", process.log());
    assert_eq!(host.metric(9586, "wgkex_worker_mqtt_connected").as_deref(), Some("1"));
    assert!(process.end_by(Signal::SIGTERM).success());
    // No unit is installed here, so the user is an option.
    assert_no_other_problem(
        &host,
        &format!("--user {}", host.run("stat -c %U /run/wgkex/state")),
        &["warn worker: no worker runs here"],
    );
    assert_eq!((host.tables("a"), host.wireguard("wg-a")), before);
}

/// It reports nothing but `allowed`, and the machine's own clock.
fn assert_no_other_problem(host: &Host, options: &str, allowed: &[&str]) {
    let command = format!("doctor --broker-url http://127.0.0.1:5000 {options}");
    let (code, said) = worker(host, &command);
    let troubles: Vec<_> =
        said.lines().filter(|line| !line.starts_with("ok ") && !line.starts_with("checks: ")).collect();
    let is_allowed = |line: &&str| {
        line.starts_with("warn clock: it is not synchronised") || allowed.iter().any(|part| line.starts_with(part))
    };
    assert!(troubles.iter().all(is_allowed), "{said}");
    assert!(allowed.iter().all(|part| said.contains(part)), "{said}");
    assert_eq!(code, i32::from(!troubles.is_empty()), "{said}");
    for line in [
        "ok   wg-a: it listens on UDP port 51820\n",
        "ok   vx-b: its MTU 1350 fits into the 1420 of wg-b\n",
        "ok   MQTT: it may subscribe to all that it needs\n",
        "ok   MQTT: what it publishes below wgkex/ comes back\n",
        "ok   MQTT: no other worker is called gateway\n",
    ] {
        assert!(said.contains(line), "{line} is not in {said}");
    }
    let (_, json) = worker(host, &format!("{command} --json"));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(json["worst"] != "fail" && json["findings"].as_array().is_some_and(|found| found.len() > 20), "{json}");
}

pub fn each_fault_of_interfaces_is_named(lane: Lane) {
    let host = Host::new("gateway", lane);
    let _broker = host.start_broker();
    let take = || {
        let bind = || host.inside(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 51820)));
        wait_until("the port is free", || bind().ok())
    };
    assert_reports(&host, "fail wg-a: it is missing", "run `wgkex-worker setup`");
    let taken = take();
    assert_reports(&host, "fail wg-a: its configured UDP port 51820 is taken by process ", "setup.listen_port");
    drop(taken);

    host.setup();
    let local = host.run("ip -6 -o addr show dev wg-a | grep -o 'fe80::[^/]*' | head -1");
    // wireguard-go loses its port, and the kernel refuses to open the interface.
    let (open, trouble) = match lane {
        Lane::Userspace => {
            host.run("wg set wg-a listen-port 51999");
            let trouble = "fail wg-a: it has no UDP port: the configured 51820 is taken by process ";
            ("wg set wg-a listen-port 51820", trouble)
        }
        Lane::Kernel => {
            host.run("ip link set wg-a down");
            ("ip link set wg-a up", "fail wg-a: its UDP port 51820 is taken by process ")
        }
    };
    let taken = take();
    let _ = host.try_run(open);
    assert_reports(&host, trouble, "then `wg set wg-a listen-port 51820`");
    drop(taken);
    host.run(open);
    host.setup();
    assert!(doctor(&host).0 < 3, "{}", doctor(&host).1);
    let whole = || {
        host.run("ip link set wg-a down");
        host.setup();
        assert!(doctor(&host).0 < 3, "{}", doctor(&host).1);
    };
    whole();

    host.run("ip link set wg-a mtu 1300");
    assert_reports(&host, "fail vx-a: the MTU 1300 of wg-a is too small", "`ip link set wg-a mtu 1420`");
    host.run("ip link set wg-a mtu 1400");
    assert_reports(&host, "fail vx-a: its MTU 1350 is too large", "`ip link set vx-a mtu 1330`");
    host.run("ip link set vx-a mtu 1330");
    assert!(doctor(&host).0 < 3, "{}", doctor(&host).1);
    host.run("ip link set wg-a mtu 1420 && ip link add other type veth peer name another");

    for (made, trouble, advice) in [
        (
            format!("vxlan id 7 dstport 8472 local {local} dev wg-a"),
            "fail vx-a: its VXLAN id is 7, and 99 in the config",
            "setup.vxlan_id",
        ),
        (
            format!("vxlan id 99 dstport 8472 local {local} dev other"),
            "fail vx-a: the device under it is not wg-a",
            "make it anew",
        ),
        (
            "vxlan id 99 dstport 8472 local fe80::99 dev wg-a".into(),
            "fail vx-a: its local address fe80::99",
            "make it anew",
        ),
        (
            "veth peer name vx-c".into(),
            "fail vx-a: it is of kind veth, and not a VXLAN interface",
            "`ip link del vx-a`",
        ),
    ] {
        host.run(&format!("ip link del vx-a; ip link add vx-a type {made} && ip link set vx-a up"));
        assert_reports(&host, trouble, advice);
    }
    host.run("ip link del vx-a");
    assert_reports(&host, "fail vx-a: it is missing", "run `wgkex-worker setup`");
    whole();
    host.run("ip link set wg-b down");
    assert_reports(&host, "fail wg-b: it is down", "`ip link set wg-b up`");
    host.run("ip link del wg-b; ip link add wg-b type veth peer name wg-c");
    assert_reports(&host, "fail wg-b: it is of kind veth, and not a WireGuard interface", "`ip link del wg-b`");
}

pub fn each_fault_of_files_clock_and_other_managers_is_named(lane: Lane) {
    let host = Host::new("gateway", lane);
    host.configure("blacklist_file: /run/denied\n");
    host.setup();
    let _broker = host.start_broker();
    assert_reports(&host, "fail blacklist_file: /run/denied is missing", "write it");
    host.run("echo '[]' > /run/denied; mkdir -p /run/wgkex/state; chmod 500 /run/wgkex/state");
    assert_reports(
        &host,
        "fail state: root cannot write to /run/wgkex/state",
        "install -d -m 700 -o root /run/wgkex/state",
    );
    host.run("chmod 700 /run/wgkex/state");
    assert!(doctor(&host).0 < 3, "{}", doctor(&host).1);

    // Root checks for the user of the unit, unless an option names another one.
    let unit = "/run/systemd/system/wgkex-worker.service";
    host.run(&format!("mkdir -p /run/systemd/system && printf '[Service]\\nUser=nobody\\n' >{unit}"));
    assert_reports(&host, "fail state: nobody cannot write to /run/wgkex/state", "install -d -m 700 -o nobody");
    host.run("chmod 600 /run/denied");
    let (code, said) = worker(&host, "check-config --strict");
    let warning = "blacklist_file: /run/denied: nobody, as whom the worker serves, cannot read it: ";
    assert!(code == 1 && said.contains(warning), "{code}: {said}");
    assert_reports(&host, "fail blacklist_file: nobody cannot read /run/denied: ", "let nobody read it");
    assert!(worker(&host, "doctor --user root").0 < 3, "{}", worker(&host, "doctor --user root").1);
    host.run(&format!("rm {unit}; chmod 644 /run/denied"));

    for (hours, trouble) in [(2, "fail clock: it is 7"), (-2, "fail clock: it is 7"), (0, "warn clock: it is ")] {
        let port = dated(&host, hours);
        let (code, said) = worker(&host, &format!("doctor --broker-url http://127.0.0.1:{port}"));
        assert!(said.contains(trouble) && said.contains("timedatectl set-ntp true"), "{trouble} is not in {said}");
        assert_eq!(code, if hours == 0 { 1 } else { 3 }, "{said}");
    }

    // A process and a file as of systemd-networkd.
    host.run("mkdir -p /run/systemd/network && cp \"$(command -v sleep)\" /run/systemd-networkd");
    fs::write(host.path("/run/systemd/network/10-vpn.network"), "[Match]\nName=wg-*\n[Network]\nDHCP=yes\n").unwrap();
    let _networkd = host.start("networkd", Path::new("/run/systemd-networkd"), &["infinity"], &[]);
    assert_reports(
        &host,
        "fail wg-a: systemd-networkd manages it, too, by /run/systemd/network/10-vpn.network",
        "Unmanaged=yes",
    );
    fs::remove_file(host.path("/run/systemd/network/10-vpn.network")).unwrap();
    assert_reports(&host, "warn managers: systemd-networkd runs, and removes routes", "ManageForeignRoutes=no");
    let wants = "/run/systemd/system/multi-user.target.wants";
    host.run(&format!("mkdir -p {wants} && touch {wants}/wg-quick@wg-b.service"));
    assert_reports(&host, "fail wg-b: wg-quick manages it, too", "`systemctl disable --now wg-quick@wg-b`");
}

/// Root can open the control socket of a userspace WireGuard, and the worker's user cannot. The kernel's WireGuard is
/// open to any user with the privilege.
pub fn a_domain_that_the_workers_user_cannot_use_is_named(lane: Lane) {
    let host = Host::new("gateway", lane);
    host.setup();
    host.configure("worker_user: nobody\n");
    host.run("install -d -o nobody /run/wgkex/state");
    let _broker = host.start_broker();
    let _worker = host.start_worker_as_root();
    let trouble = "fail test_a: the running worker cannot use it: ";
    match lane {
        Lane::Userspace => wait_until("it is named", || doctor(&host).1.contains(trouble).then_some(())),
        Lane::Kernel => {
            serves(&host);
            assert!(!doctor(&host).1.contains(trouble), "{}", doctor(&host).1);
        }
    }
    assert!(doctor(&host).1.contains("ok   state: the running worker writes to "), "{}", doctor(&host).1);
}

/// The routers' VXLAN packets arrive through the tunnels. The kernel drops packets with another id without a trace, and
/// answers packets to another port with errors, as described in troubleshooting.md.
pub fn a_vxlan_whose_routers_have_another_id_is_named(lane: Lane) {
    let single = Single::new(lane, "");
    let host = &single.host;
    let (router, key) = router(host, lane);
    let (own, remote) = (link_local(&key), link_local(&host.run("wg show wg-a public-key")));
    let send_by = |id: u32, port: u16| {
        router.run(&format!(
            "ip link del vx-r 2>/dev/null
             ip link add vx-r type vxlan id {id} dstport {port} local {own} remote {remote} dev wg-router &&
             ip addr add fe80::2/64 dev vx-r nodad && ip link set vx-r up && ping -q -i 0.01 -c 150 -W 1 ff02::1%vx-r || true"
        ));
    };
    // Errors that are sent to the router: the gateway also counts others of its own.
    let errors = || router.run("awk '$1 == \"Icmp6InDestUnreachs\" { print $2 }' /proc/net/snmp6");
    let is_named = || assert_reports(host, "warn vx-a: it has never received anything, although ", "setup.vxlan_id");
    let before = errors();
    send_by(7, 8472);
    is_named();
    assert_eq!(errors(), before, "another id");
    send_by(99, 4789);
    is_named();
    assert_ne!(errors(), before, "another port");
    send_by(99, 8472);
    let (_, said) = doctor(host);
    assert!(!said.contains("never received anything"), "{said}");
}

/// An HTTP server on the host whose clock is off by so many hours, or by a hundred seconds; returns its port.
fn dated(host: &Host, hours: i64) -> u16 {
    let listener = host.inside(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let seconds = if hours == 0 { 100 } else { 3600 * hours };
    let date = host.run(&format!("date -u -d '{seconds} seconds' '+%a, %d %b %Y %H:%M:%S GMT'"));
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        let answer = format!("HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).unwrap();
    });
    port
}

/// A gateway with its broker on another machine, with TLS and a password; and a second machine of the same name.
pub fn each_fault_of_the_connection_and_a_second_machine_of_one_name_is_named(lane: Lane) {
    let (hub, gateway, twin) = (Host::new("hub", lane), Host::new("gw1", lane), Host::new("gw1", lane));
    let (server, _) = hub.connect(&gateway, 1);
    let (for_twin, _) = hub.connect(&twin, 2);
    let ca = certify(&hub, [server.to_string(), for_twin.to_string()]);
    let other_ca = certify(&gateway, [server.to_string(), for_twin.to_string()]);
    for host in [&gateway, &twin] {
        fs::write(host.path("/run/ca.crt"), &ca).unwrap();
    }
    fs::write(gateway.path("/run/other.crt"), other_ca).unwrap();
    let mqtt = |server: Ipv4Addr, rest: &str| format!("mqtt: {{broker_url: {server}, username: gw1, {rest}}}\n");
    let right = "password: gw1, tls: true, ca_file: /run/ca.crt";
    gateway.configure(&mqtt(server, right));
    gateway.setup();
    assert_reports(&gateway, &format!("fail MQTT: {server}:1883: "), "start the MQTT server");

    hub.configure(&format!(
        "mqtt_listen: {{host: 0.0.0.0, tls: {{cert_file: /run/server.crt, key_file: /run/server.key}}, \
         users: {{gw1: {{password_hash: \"{0}\"}}, other: {{password_hash: \"{0}\"}}}}}}\n",
        hash("gw1")
    ));
    let _broker = hub.start_broker();
    wait_until("the server lets it in", || {
        doctor(&gateway).1.contains(&format!("ok   MQTT: {server}:1883 lets the worker in\n")).then_some(())
    });
    let (code, said) = doctor(&gateway);
    assert!(code < 3 && said.contains("ok   MQTT: it may subscribe to all that it needs\n"), "{said}");
    assert!(said.contains("ok   MQTT: what it publishes below wgkex/ comes back\n"), "{said}");

    for (rest, trouble, advice) in [
        (
            "password: wrong, tls: true, ca_file: /run/ca.crt",
            "the server refuses the user name or password",
            "mqtt.password",
        ),
        (
            "password: gw1, tls: true, ca_file: /run/other.crt",
            "TLS: mqtt.ca_file names a certificate of the same name",
            "mqtt.ca_file",
        ),
        ("password: gw1", "the server speaks TLS on this port", "set mqtt.tls to true"),
    ] {
        gateway.configure(&mqtt(server, rest));
        assert_reports(&gateway, &format!("fail MQTT: {server}:1883: {trouble}"), advice);
    }

    // A worker that started before the certificate was corrected.
    gateway.configure(&mqtt(server, "password: gw1, tls: true, ca_file: /run/other.crt"));
    let mut refused = gateway.start_worker();
    refused.wait_for_log("MQTT not connected");
    gateway.configure(&mqtt(server, right));
    let told = format!("fail MQTT: the running worker is not connected: {server}:1883: TLS: mqtt.ca_file");
    wait_until("it is told", || doctor(&gateway).1.contains(&told).then_some(()));
    // A worker that is stopped.
    refused.signal(Signal::SIGSTOP);
    assert_reports(&gateway, "fail worker: process ", "(wgkex-worker) has 127.0.0.1:9586, and does not answer there");
    refused.signal(Signal::SIGCONT);
    assert!(refused.end_by(Signal::SIGTERM).success());

    gateway.configure(&mqtt(server, right).replace("username: gw1", "username: other"));
    let trouble = format!("fail MQTT: {server}:1883: the server refuses the client id gw1-doctor of user other");
    assert_reports(&gateway, &trouble, "set mqtt.username to the host name of this machine");

    twin.configure(&mqtt(for_twin, right));
    twin.setup();
    let _twins = twin.start_worker();
    serves(&hub);
    gateway.configure(&mqtt(server, right));
    assert_reports(
        &gateway,
        "fail MQTT: a worker on another machine, or with other interfaces, publishes as gw1",
        "host name",
    );
    gateway.run("ip link del wg-a; ip link del wg-b");
    assert_reports(&gateway, "fail MQTT: a worker gw1 is online, and none runs here", "another machine has this name");
}
