//! A gateway that is the hub of tenants: members of a tenant reach each other through it, members of other tenants do
//! not.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::Process;
use wgkex_tests::websocket::WebSocket;
use wgkex_tests::{wait_until, wait_within};

use crate::read_only_commands::worker;

/// The pool of the tenants and an address of the gateway: all that a member could try to reach.
const EVERYWHERE: &str = "10.64.0.0/10,192.0.2.1/32";
/// How long members that left keep their addresses and peers, in seconds.
const GRACE: u64 = 3;

/// The Python library's client joins at the URL with the key, prints the messages that it receives, and answers pings.
const JOIN: &str = r#"
import asyncio, json, sys, websockets
async def main():
    async with websockets.connect(sys.argv[1]) as ws:
        await ws.send(json.dumps({"display_name": "N", "public_key": sys.argv[2]}))
        async for message in ws:
            print(message, flush=True)
asyncio.run(main())
"#;

/// A machine with a tunnel to the hub, and the client that is the member.
struct Member<'a> {
    host: &'a Host,
    key: String,
    address: String,
    client: Process,
}

/// Joins a tenant at the broker on `gateway`; returns the client's process, and the answer.
fn join(host: &Host, gateway: Ipv4Addr, tenant: &str, key: &str) -> (Process, Value) {
    let url = format!("ws://{gateway}:5000/tenants/{tenant}?hub=1");
    let client = host.start("member", Path::new("/usr/bin/python3"), &["-c", JOIN, &url, key], &[]);
    let answer = client.wait_for_log("virtual_ip");
    let answer = serde_json::from_str(&answer).unwrap();
    (client, answer)
}

impl<'a> Member<'a> {
    /// Joins, and sets up the tunnel of the answer.
    fn join(host: &'a Host, lane: Lane, gateway: Ipv4Addr, tenant: &str) -> Self {
        host.run(match lane {
            Lane::Userspace => "wireguard-go wg-t >/dev/null 2>&1",
            Lane::Kernel => "ip link add wg-t type wireguard",
        });
        let key = host.run("wg genkey > /run/key && wg pubkey < /run/key");
        let (client, answer) = join(host, gateway, tenant, &key);
        let address = answer["virtual_ip"].as_str().unwrap().to_owned();
        let member = Self { host, key, address, client };
        member.configure(&answer["hub"]);
        member
    }

    fn configure(&self, hub: &Value) {
        let [key, endpoint, networks] = ["public_key", "endpoint", "allowed_ips"].map(|key| hub[key].as_str().unwrap());
        self.host.run(&format!(
            "wg set wg-t private-key /run/key peer {key} endpoint {endpoint} allowed-ips {networks} persistent-keepalive 1 &&
             ip addr add {}/32 dev wg-t && ip link set wg-t up && ip route add {networks} dev wg-t",
            self.address
        ));
    }

    /// Allows all addresses on the tunnel to the hub.
    fn widen(&self) {
        let hub = self.host.run("wg show wg-t peers");
        self.host.run(&format!("wg set wg-t peer {hub} allowed-ips {EVERYWHERE}"));
        for network in EVERYWHERE.split(',') {
            self.host.run(&format!("ip route replace {network} dev wg-t"));
        }
    }

    fn reaches(&self, address: &str) -> bool {
        self.host.try_run(&format!("ping -c 1 -W 1 -I {} {address}", self.address)).status.success()
    }

    fn wait_until_it_reaches(&self, address: &str) {
        wait_within(Duration::from_secs(30), &format!("{} reaches {address}", self.address), || {
            self.reaches(address).then_some(())
        });
    }
}

/// Keys and allowed-ips of the hub's peers.
fn peers(host: &Host) -> Vec<String> {
    let mut peers: Vec<_> = host.run("wg show wg-hub allowed-ips").lines().map(str::to_owned).collect();
    peers.sort();
    peers
}

fn peers_of(members: &[&Member]) -> Vec<String> {
    let mut peers: Vec<_> = members.iter().map(|member| format!("{}\t{}/32", member.key, member.address)).collect();
    peers.sort();
    peers
}

/// Traffic from behind the host leaves by its link to the gateway with NAT; new connections from that link are dropped.
fn translate(host: &Host, network: u8) {
    host.run(&format!(
        "ip route add default via 198.18.{network}.1 && echo 1 > /proc/sys/net/ipv4/ip_forward &&
         iptables -t nat -A POSTROUTING -o cable{network} -j MASQUERADE &&
         iptables -A FORWARD -i cable{network} -m conntrack --ctstate NEW -j DROP"
    ));
}

pub fn os21_members_behind_nat_reach_each_other_through_the_hub_and_other_tenants_do_not(lane: Lane) {
    let gateway = Host::new("gw1", lane);
    let [nat1, nat2, m1, m2, m3, m4] = ["nat1", "nat2", "m1", "m2", "m3", "m4"].map(|name| Host::new(name, lane));
    for (nat, member, network) in [(&nat1, &m1, 1), (&nat2, &m2, 2)] {
        let _ = gateway.connect(nat, network);
        let (inner, _) = nat.connect(member, 10 + network);
        translate(nat, network);
        member.run(&format!("ip route add default via {inner}"));
    }
    let (broker_address, _) = gateway.connect(&m3, 3);
    let _ = gateway.connect(&m4, 4);
    m4.run("ip route add default via 198.18.4.1");
    m3.run("ip route add default via 198.18.3.1");
    // Strict reverse path filtering does not disturb it. There is a default route, which no packet of members takes.
    let wan = Host::new("wan", lane);
    let (_, uplink) = gateway.connect(&wan, 9);
    gateway.run(&format!(
        "for all in rp_filter forwarding; do echo 1 > /proc/sys/net/ipv4/conf/all/$all; done &&
         ip addr add 192.0.2.1/32 dev lo && ip route add default via {uplink}"
    ));
    wan.run("for n in 1 2; do ip addr add 10.64.0.$n/32 dev lo; done && iptables -I INPUT -d 10.64.0.0/10");
    let leaked = || wan.run("iptables -vnxL INPUT | awk '/10.64.0.0/ { print $1 }'");
    gateway.configure(&format!(
        "tenants: {{enabled: true, grace: {GRACE}, hub: gw1}}\nhub: {{enabled: true, endpoint: {broker_address}}}\n"
    ));
    gateway.setup();
    let (mut broker, mut worker_process) = (gateway.start_broker(), gateway.start_worker());
    wait_until("the hub is known", || {
        let status: Value = serde_json::from_str(&gateway.get(5000, "/status.json")?.body).ok()?;
        let is_missing = status["problems"].as_array()?.iter().any(|problem| problem["kind"] == "tenants_hub");
        (!is_missing && gateway.get(5000, "/readyz")?.status == 200).then_some(())
    });
    let enter = |host, tenant| Member::join(host, lane, broker_address, tenant);
    let (a, b, other, same) = (enter(&m1, "t"), enter(&m2, "t"), enter(&m3, "u"), enter(&m4, "u"));
    assert_eq!(
        [&a, &b, &other, &same].map(|member| &*member.address),
        ["10.64.0.1", "10.64.0.2", "10.64.16.1", "10.64.16.2"]
    );
    wait_until("the hub has its peers", || (peers(&gateway) == peers_of(&[&a, &b, &other, &same])).then_some(()));
    a.wait_until_it_reaches(&b.address);
    b.wait_until_it_reaches(&a.address);
    other.wait_until_it_reaches(&same.address);
    assert!(worker(&gateway, "status").1.contains("server tenants/hub up: wg-hub; leases 4\n"));
    assert!(worker(&gateway, "doctor").1.contains("ok   server tenants/hub: wg-hub has the peers of all 4 leases"));

    // Whatever allowed-ips members set, the hub isolates tenants, and forwards no packet elsewhere.
    for member in [&a, &b, &other] {
        member.widen();
    }
    for (member, address) in
        [(&other, &*a.address), (&a, &other.address), (&other, "192.0.2.1"), (&other, "10.64.32.1")]
    {
        assert!(!member.reaches(address), "{} reaches {address}", member.address);
    }
    a.wait_until_it_reaches(&b.address);
    // Nor do errors about their packets leave by another route: of too large packets, or without a receiver.
    for (size, address) in [(1600, &*b.address), (56, "10.64.0.99")] {
        let _ = m1.try_run(&format!("ping -c 2 -W 1 -M do -s {size} -I {} {address}", a.address));
    }
    assert_eq!(leaked(), "0");
    // Deleted rules are restored soon: the interface changes, which triggers a read by the worker.
    let trigger_read = || gateway.run("ip link add other type veth peer name another && ip link del other");
    for damage in [
        "ip rule del pref 5183 iif wg-hub",
        "ip route flush table 51830",
        "tc qdisc del dev wg-hub ingress && ip rule del pref 5184 iif wg-hub",
    ] {
        gateway.run(damage);
        trigger_read();
        a.wait_until_it_reaches(&b.address);
        wait_until("the filter is there", || {
            gateway.run("tc filter show dev wg-hub ingress").contains("direct-action").then_some(())
        });
        assert!(!other.reaches(&a.address), "after {damage}");
    }
    // This is not for lack of a route: without the filter the packets pass.
    let _ = worker_process.end_by(Signal::SIGKILL);
    gateway.run("tc filter del dev wg-hub ingress");
    other.wait_until_it_reaches(&a.address);
    gateway.setup();
    assert!(!other.reaches(&a.address) && a.reaches(&b.address), "the filter is there again");
    worker_process = gateway.start_worker();

    // The tunnels survive the end of broker and worker, and a worker without a broker knows its peers.
    let before = peers(&gateway);
    let _ = broker.end_by(Signal::SIGKILL);
    let _ = worker_process.end_by(Signal::SIGKILL);
    assert!(a.reaches(&b.address));
    gateway.run(&format!("wg set wg-hub peer {} remove", same.key));
    let _worker = gateway.start_worker();
    wait_until("the worker restores what is missing", || (peers(&gateway) == before).then_some(()));
    assert!(a.reaches(&b.address));
    let _broker = gateway.start_broker();
    for port in [5000, 9586] {
        wait_until("they are back", || (gateway.get(port, "/readyz")?.status == 200).then_some(()));
    }
    // The addresses of members that do not return are held for a while, and then their peers are removed.
    let key = a.key.clone();
    for member in [a, b, other, same] {
        let Member { mut client, .. } = member;
        let _ = client.end_by(Signal::SIGKILL);
    }
    let (_client, again) = join(&m1, broker_address, "t", &key);
    assert_eq!((&again["virtual_ip"], &again["hub"]["allowed_ips"]), (&json!("10.64.0.1"), &json!("10.64.0.0/20")));
    wait_within(Duration::from_secs(90), "only the one that came back is left", || {
        (peers(&gateway) == [format!("{key}\t10.64.0.1/32")]).then_some(())
    });
}

/// Members that asked for the hub receive its changes, and no others do.
pub fn members_learn_of_a_hub_that_changes(lane: Lane) {
    let gateway = Host::new("gw1", lane);
    let with = |hub: &str| gateway.configure(&format!("tenants: {{enabled: true, hub: gw1}}\n{hub}"));
    with("");
    gateway.setup();
    let (broker, mut worker_process) = (gateway.start_broker(), gateway.start_worker());
    broker.wait_for_log("broker started");
    let page = || gateway.get(5000, "/").unwrap().body;
    wait_until("the broker is ready", || (gateway.get(5000, "/readyz")?.status == 200).then_some(()));
    assert!(page().contains("worker gw1, which tenants.hub names, has not announced a hub"));
    let open = |query: &str| {
        gateway.inside(|| {
            WebSocket::open(SocketAddr::from((Ipv4Addr::LOCALHOST, 5000)), &format!("/tenants/t{query}")).unwrap()
        })
    };
    let mut asks = open("?hub=1");
    let mut plain = open("");
    let [first, second, third] = [1, 2, 3].map(wgkex_tests::key);
    assert_eq!(asks.join("A", &first).unwrap(), json!({ "virtual_ip": "10.64.0.1", "peers": [], "hub": null }));
    let answer = plain.join("B", &second).unwrap();
    assert!(answer.get("hub").is_none(), "{answer}");
    let announcement = json!({ "display_name": "B", "public_key": second, "virtual_ip": "10.64.0.2" });
    assert_eq!(asks.message().unwrap(), announcement);
    for (config, endpoint) in [
        ("hub: {enabled: true, endpoint: hub.example}", Some("hub.example:51830")),
        ("hub: {enabled: true, endpoint: '2001:db8::7', listen_port: 51831}", Some("[2001:db8::7]:51831")),
        ("", None),
    ] {
        assert!(worker_process.end_by(Signal::SIGTERM).success());
        with(config);
        gateway.setup();
        worker_process = gateway.start_worker();
        // The other member answers no pings here, and on a busy machine it may have been removed.
        let message = std::iter::repeat_with(|| asks.message().unwrap()).find(|message| message.get("hub").is_some());
        let message = message.unwrap();
        match endpoint {
            Some(endpoint) => {
                let key = gateway.run("wg show wg-hub public-key");
                let hub = json!({ "public_key": key, "endpoint": endpoint, "allowed_ips": "10.64.0.0/20" });
                assert_eq!(message, json!({ "hub": hub }));
            }
            None => assert_eq!(message, json!({ "hub": null })),
        }
    }
    let _ = broker.wait_for_log("the hub of tenants is gone");
    // The member that did not ask for the hub receives the next announcement, and no message before it.
    let mut last = open("");
    last.join("C", &third).unwrap();
    assert_eq!(plain.message().unwrap()["display_name"], "C");
}
