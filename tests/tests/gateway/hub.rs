//! A gateway that is the hub of tenants: members reach each other through it, and those of other tenants do not.

use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::websocket::WebSocket;
use wgkex_tests::{wait_until, wait_within};

use crate::looks::worker;

/// The pool of the tenants and all that a member could try to reach: an address of the gateway, too.
const EVERYWHERE: &str = "10.64.0.0/10,192.0.2.1/32";
/// How long members that left keep their addresses, and so their peers, in seconds.
const GRACE: u64 = 3;

/// A machine with a tunnel to the hub, whose WebSocket is served by a thread.
struct Member<'a> {
    host: &'a Host,
    key: String,
    address: String,
    stream: TcpStream,
}

impl<'a> Member<'a> {
    /// Joins by the broker at `gateway`, and makes the tunnel that the answer says.
    fn join(host: &'a Host, lane: Lane, gateway: Ipv4Addr, tenant: &str) -> Self {
        host.run(match lane {
            Lane::Userspace => "wireguard-go wg-t >/dev/null 2>&1",
            Lane::Kernel => "ip link add wg-t type wireguard",
        });
        let key = host.run("wg genkey > /run/key && wg pubkey < /run/key");
        let (answer, mut socket) = host.inside(|| {
            let server = SocketAddr::from((gateway, 5000));
            let mut socket = WebSocket::open(server, &format!("/tenants/{tenant}?hub=1")).unwrap();
            (socket.join("N", &key).unwrap(), socket)
        });
        let stream = socket.stream().try_clone().unwrap();
        stream.set_read_timeout(None).unwrap();
        // It answers pings.
        thread::spawn(move || while socket.message().is_ok() {});
        let address = answer["virtual_ip"].as_str().unwrap().to_owned();
        let member = Self { host, key, address, stream };
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

    /// Takes anything from the hub, and sends anything there.
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

    fn leave(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
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

/// What is behind it goes out by its cable to the gateway, translated; nothing comes in by that cable by itself.
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
    // A strict check of sources is no hindrance, and the gateway forwards nothing else for anybody.
    gateway.run("echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter && ip addr add 192.0.2.1/32 dev lo");
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
    let join = |host, tenant| Member::join(host, lane, broker_address, tenant);
    let (a, b, other, same) = (join(&m1, "t"), join(&m2, "t"), join(&m3, "u"), join(&m4, "u"));
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

    // Whatever members set, the hub keeps tenants apart, and lets nobody out.
    for member in [&a, &b, &other] {
        member.widen();
    }
    for (member, address) in
        [(&other, &*a.address), (&a, &other.address), (&other, "192.0.2.1"), (&other, "10.64.32.1")]
    {
        assert!(!member.reaches(address), "{} reaches {address}", member.address);
    }
    a.wait_until_it_reaches(&b.address);
    gateway.run("tc filter del dev wg-hub ingress");
    other.wait_until_it_reaches(&a.address);
    gateway.setup();
    assert!(!other.reaches(&a.address) && a.reaches(&b.address), "the filter is there again");

    // Neither a broker's nor a worker's end is noticed in the tunnels.
    let before = gateway.wireguard("wg-hub").len();
    let _ = broker.end_by(Signal::SIGKILL);
    let _ = worker_process.end_by(Signal::SIGKILL);
    assert!(a.reaches(&b.address));
    let (_broker, _worker) = (gateway.start_broker(), gateway.start_worker());
    wait_until("the worker is back", || (gateway.get(9586, "/readyz")?.status == 200).then_some(()));
    assert!(a.reaches(&b.address));
    assert_eq!(gateway.wireguard("wg-hub").len(), before);
    // The addresses of those that do not come back are held for a while, and then their peers go.
    let again = host_joins_again(&m1, &a.key, broker_address);
    assert_eq!(again.1["virtual_ip"], a.address.as_str());
    wait_within(Duration::from_secs(30), "only the one that came back is left", || {
        (peers(&gateway) == peers_of(&[&a])).then_some(())
    });
    assert_eq!(again.1["hub"]["allowed_ips"], "10.64.0.0/20");
    for member in [b, other, same] {
        member.leave();
    }
}

/// A member whose tunnel is there joins again, with its key.
fn host_joins_again(host: &Host, key: &str, gateway: Ipv4Addr) -> (WebSocket, Value) {
    host.inside(|| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let joined =
                WebSocket::open(SocketAddr::from((gateway, 5000)), "/tenants/t?hub=1").and_then(|mut socket| {
                    let answer = socket.join("N", key)?;
                    Ok((socket, answer))
                });
            match joined {
                Ok(joined) => return joined,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            thread::sleep(Duration::from_millis(50));
        }
    })
}

/// A hub that comes, changes and goes is told to those that asked for it, and to nobody else.
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
        let message = asks.message().unwrap();
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
    // The one that did not ask gets the next announcement, and nothing before.
    let mut last = open("");
    last.join("C", &third).unwrap();
    assert_eq!(plain.message().unwrap()["display_name"], "C");
}
