//! `setup` on a real kernel, `ip` and `wg` being the witnesses. Each test has network and mount namespaces of its
//! own. `netns_*` use wireguard-go, `vm_*` the kernel's WireGuard.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

use std::collections::BTreeMap;
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use wgkex_common::address::tenants::TenantNetworks;
use wgkex_common::config::{HubSettings, Setup};
use wgkex_common::{Config, Domain, PublicKey};
use wgkex_kernel::Backend;
use wgkex_worker::setup::{Error, remove, setup};

/// A scenario as one test per lane.
macro_rules! lanes {
    ($($netns:ident, $vm:ident: $scenario:ident;)*) => {$(
        #[test]
        #[ignore = "needs root and wireguard-go: cargo test -p wgkex-worker --test setup -- --ignored netns_"]
        fn $netns() {
            in_namespaces(|| async { $scenario(&Place::new(Backend::Userspace)).await });
        }

        #[test]
        #[ignore = "needs root and WireGuard in the kernel: cargo test -p wgkex-worker --test setup -- --ignored vm_"]
        fn $vm() {
            in_namespaces(|| async {
                run("ip link add probe type wireguard && ip link del probe");
                $scenario(&Place::new(Backend::Kernel)).await;
            });
        }
    )*};
}

lanes! {
    netns_both_interfaces_are_as_the_readme_script_makes_them, vm_both_interfaces_are_as_the_readme_script_makes_them: makes;
    netns_a_repeat_changes_nothing, vm_a_repeat_changes_nothing: repeats;
    netns_what_was_spoiled_is_mended_and_peers_stay, vm_what_was_spoiled_is_mended_and_peers_stay: mends;
    netns_remove_takes_both_down_and_the_key_outlives_them, vm_remove_takes_both_down_and_the_key_outlives_them: removes;
    netns_the_key_of_an_interface_in_use_is_kept, vm_the_key_of_an_interface_in_use_is_kept: adopts;
    netns_interfaces_of_another_kind_are_left_alone, vm_interfaces_of_another_kind_are_left_alone: leaves_others;
    netns_another_vxlan_is_left_alone, vm_another_vxlan_is_left_alone: leaves_another_vxlan;
    netns_no_domain_is_changed_when_one_cannot_be, vm_no_domain_is_changed_when_one_cannot_be: all_or_nothing;
    netns_a_taken_port_is_an_error, vm_a_taken_port_is_an_error: taken_port;
    netns_without_ipv6_the_sysctl_is_named, vm_without_ipv6_the_sysctl_is_named: without_ipv6;
    netns_a_hub_forwards_by_a_table_of_its_own, vm_a_hub_forwards_by_a_table_of_its_own: makes_hub;
}

async fn makes(place: &Place) {
    place.setup().await.unwrap();
    let key = run(&format!("wg pubkey < {}", place.key_file("welt").display()));
    let address = key.parse::<PublicKey>().unwrap().link_local();
    assert_eq!(run("wg show wg-welt public-key"), key);
    assert_eq!(run("wg show wg-welt listen-port"), "40011");
    assert_eq!(addresses("wg-welt"), [format!("{address}/128")]);
    assert!(addresses("vx-welt").contains(&"fe80::1/64".to_owned()), "{:?}", addresses("vx-welt"));
    let vxlan = run("ip -d link show vx-welt");
    assert!(vxlan.contains(&format!("vxlan id 99 local {address} dev wg-welt ")), "{vxlan}");
    assert!(vxlan.contains(" dstport 4789 "), "{vxlan}");
    let kind = if place.backend == Backend::Kernel { "wireguard" } else { "tun type tun" };
    let wireguard = run("ip -d link show wg-welt");
    assert!(wireguard.contains(kind), "{wireguard}");
    for shown in [vxlan, wireguard] {
        assert!(shown.contains(",UP,") && !shown.contains("NO-CARRIER"), "{shown}");
    }
    assert_eq!(fs::metadata(place.key_file("welt")).unwrap().permissions().mode() & 0o7777, 0o600);
}

async fn makes_hub(place: &Place) {
    let rules = || run("ip rule show; ip -6 rule show");
    run("ip rule add from 192.0.2.0/24 lookup 100 pref 5183");
    let before = rules();
    let hub = |pool: &[&str]| HubSettings {
        interface: "wg-hub".into(),
        key_file: place.key_file("hub"),
        listen_port: 40012,
        endpoint: None,
        networks: TenantNetworks {
            pool: pool.iter().map(|network| network.parse().unwrap()).collect(),
            tenant_length: 24,
        },
    };
    for pool in [&["10.64.0.0/16"][..], &["10.64.0.0/16"], &["10.65.0.0/16", "192.168.7.0/24"]] {
        let config = Config { hub: Some(hub(pool)), ..place.config.clone() };
        setup(&config, place.backend).await.unwrap();
        let added = rules();
        for network in pool {
            let own = format!("from all to {network} iif lo lookup 51830");
            assert_eq!(added.matches(&own).count(), 1, "{added}");
            assert!(run("ip route show table 51830").contains(&format!("{network} dev wg-hub")));
        }
        assert_eq!(added.matches("from all iif wg-hub lookup 51830").count(), 1, "{added}");
        assert_eq!(added.matches("from all iif wg-hub prohibit").count(), 2, "IPv4 and IPv6: {added}");
        assert_eq!(added.lines().count(), before.lines().count() + 3 + pool.len(), "{added}");
        let filter = run("tc filter show dev wg-hub ingress");
        assert_eq!(filter.matches("direct-action").count(), 1, "{filter}");
        assert_eq!(run("cat /proc/sys/net/ipv4/conf/wg-hub/forwarding"), "1");
        assert_eq!(run("wg show wg-hub listen-port"), "40012");
    }
    // It is deleted by removing everything, by a setup without it, and by a setup with another interface.
    let config = |interface: &str| {
        let hub = HubSettings { interface: interface.into(), ..hub(&["10.64.0.0/16"]) };
        Config { hub: Some(hub), ..place.config.clone() }
    };
    setup(&config("wg-other"), place.backend).await.unwrap();
    assert!(rules().contains("iif wg-other") && !rules().contains("wg-hub"), "{}", rules());
    assert!(!interfaces().contains(&"wg-hub".to_owned()));
    setup(&place.config, place.backend).await.unwrap();
    assert!(rules() == before && !interfaces().contains(&"wg-other".to_owned()), "{}", rules());
    setup(&config("wg-hub"), place.backend).await.unwrap();
    remove(&config("wg-hub")).await.unwrap();
    assert_eq!((rules(), interfaces()), (before, vec!["lo".to_owned()]));
    // The machine's own packets would go to the hub.
    run(
        "ip link add v type veth peer name w && ip addr add 10.64.9.1/24 dev v && ip link set v up && ip link set w up",
    );
    let refusal = setup(&config("wg-hub"), place.backend).await.unwrap_err().to_string();
    assert!(refusal.contains("tenants.pool: this machine has a route to 10.64.9."), "{refusal}");
    run("ip link del v");
    // IPv6 is forwarded by all interfaces or none.
    let config = Config { hub: Some(hub(&["fd00:64::/48"])), ..place.config.clone() };
    let refusal = setup(&config, place.backend).await.unwrap_err().to_string();
    assert!(refusal.contains("net.ipv6.conf.all.forwarding=1"), "{refusal}");
    run("echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
    setup(&config, place.backend).await.unwrap();
    assert!(run("ip -6 route show table 51830").contains("fd00:64::/48 dev wg-hub"));
}

async fn repeats(place: &Place) {
    place.setup().await.unwrap();
    add_peer();
    let before = state();
    place.setup().await.unwrap();
    assert_eq!(state(), before);
}

async fn mends(place: &Place) {
    place.setup().await.unwrap();
    add_peer();
    let address = addresses("wg-welt").remove(0);
    let whole = state();
    for damage in [
        "wg set wg-welt listen-port 1234",
        "wg genkey > /run/other-key; wg set wg-welt private-key /run/other-key",
        &format!("ip addr del {address} dev wg-welt"),
        "ip addr del fe80::1/64 dev vx-welt",
    ] {
        run(damage);
        assert_ne!(state(), whole, "{damage}");
        place.setup().await.unwrap();
        assert_eq!(state(), whole, "after {damage}");
    }
    // These delete the addresses, or the interface, with them.
    for damage in ["ip link set wg-welt down", "ip link set vx-welt down", "ip link del vx-welt"] {
        run(damage);
        makes(place).await;
        assert!(run("wg showconf wg-welt").contains(PEER), "after {damage}");
    }
}

async fn removes(place: &Place) {
    run("ip link add wg-other type vxlan id 1 dstport 1 local ::1");
    place.setup().await.unwrap();
    let key = run("wg show wg-welt public-key");
    remove(&place.config).await.unwrap();
    assert_eq!(interfaces(), ["lo", "wg-other"]);
    assert_eq!(fs::read_dir("/run/wireguard").unwrap().count(), 0, "a userspace WireGuard is still there");
    remove(&place.config).await.unwrap();
    place.setup().await.unwrap();
    assert_eq!(run("wg show wg-welt public-key"), key);
    run("ip link del vx-welt");
    remove(&place.config).await.unwrap();
    assert_eq!(interfaces(), ["lo", "wg-other"]);
}

async fn adopts(place: &Place) {
    place.setup().await.unwrap();
    let private = fs::read_to_string(place.key_file("welt")).unwrap();
    fs::remove_file(place.key_file("welt")).unwrap();
    let before = state();
    place.setup().await.unwrap();
    assert_eq!(state(), before);
    assert_eq!(fs::read_to_string(place.key_file("welt")).unwrap(), private);
}

async fn leaves_others(place: &Place) {
    let mut others = vec![
        ("wg-welt", "ip link add wg-welt type veth peer name other"),
        ("wg-welt", "ip link add wg-welt type vxlan id 1 dstport 1 local ::1"),
        ("vx-welt", "ip link add vx-welt type veth peer name other"),
    ];
    if place.backend == Backend::Userspace {
        others.push(("wg-welt", "ip tuntap add wg-welt mode tun"));
    }
    for (name, add) in others {
        run(add);
        let state = || (interfaces(), run(&format!("ip -d addr show {name}")));
        let before = state();
        for refusal in [place.setup().await.unwrap_err(), remove(&place.config).await.unwrap_err()] {
            assert!(matches!(&refusal, Error::OtherKind { interface, .. } if interface == name), "{refusal}");
        }
        assert_eq!(state(), before);
        run(&format!("ip link del {name}"));
    }
}

async fn leaves_another_vxlan(place: &Place) {
    run("ip link add vx-welt type vxlan id 98 dstport 4789 local ::1");
    let before = run("ip -d addr show");
    let refusal = place.setup().await.unwrap_err().to_string();
    assert!(refusal.starts_with("vx-welt has id 98 instead of 99, local address ::1 instead of fe80::"), "{refusal}");
    assert!(refusal.contains("--remove") && !refusal.contains('\n'), "{refusal}");
    assert_eq!(run("ip -d addr show"), before);
    remove(&place.config).await.unwrap();
    makes(place).await;
}

async fn all_or_nothing(place: &Place) {
    run("ip link add vx-zwei type veth peer name other");
    let mut place = Place::new(place.backend);
    place.add("zwei", 40012);
    assert!(matches!(place.setup().await, Err(Error::OtherKind { interface, .. }) if interface == "vx-zwei"));
    assert_eq!(interfaces(), ["lo", "other", "vx-zwei"]);
    run("ip link del vx-zwei");
    place.setup().await.unwrap();
    assert_eq!(interfaces(), ["lo", "vx-welt", "vx-zwei", "wg-welt", "wg-zwei"]);
    assert_ne!(run("wg show wg-welt public-key"), run("wg show wg-zwei public-key"));
}

async fn taken_port(place: &Place) {
    let taken = UdpSocket::bind("[::]:40011").unwrap();
    let refusal = place.setup().await.unwrap_err().to_string();
    assert!(refusal.starts_with("wg-welt: ") && refusal.contains("Address already in use"), "{refusal}");
    drop(taken);
    // Another test's child process has the socket too until it executes another program.
    wait_until("the port stays taken", || UdpSocket::bind("[::]:40011").is_ok());
    makes(place).await;
}

async fn without_ipv6(place: &Place) {
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let refusal = place.setup().await.unwrap_err().to_string();
    assert!(refusal.contains("net.ipv6.conf.wg-welt.disable_ipv6"), "{refusal}");
    for interface in ["default", "wg-welt"] {
        fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "0").unwrap();
    }
    makes(place).await;
}

#[test]
#[ignore = "needs root and wireguard-go: cargo test -p wgkex-worker --test setup -- --ignored netns_"]
fn netns_the_kernels_wireguard_is_taken_where_there_is_one() {
    in_namespaces(|| async {
        let has_one = sh("ip link add probe type wireguard && ip link del probe").status.success();
        Place::new(Backend::Kernel).setup().await.unwrap();
        let shown = run("ip -d link show wg-welt");
        assert!(shown.contains(if has_one { "wireguard" } else { "tun type tun" }), "{shown}");
    });
}

#[test]
#[ignore = "needs root and wireguard-go: cargo test -p wgkex-worker --test setup -- --ignored netns_"]
fn netns_without_wireguard_go_the_package_is_named() {
    in_namespaces(|| async {
        let place = Place::new(Backend::Userspace);
        run("mount -t tmpfs none $(dirname $(command -v wireguard-go))");
        let refusal = place.setup().await.unwrap_err().to_string();
        assert!(refusal.starts_with("wg-welt: ") && refusal.contains("apt-get install wireguard-go"), "{refusal}");
    });
}

#[test]
#[ignore = "needs root and wireguard-go: cargo test -p wgkex-worker --test setup -- --ignored netns_"]
fn netns_a_wireguard_of_the_same_name_in_another_namespace_is_left_alone() {
    in_namespaces(|| async {
        run("unshare -n wireguard-go wg-welt");
        let refusal = Place::new(Backend::Userspace).setup().await.unwrap_err();
        assert!(matches!(refusal, Error::Elsewhere(..)), "{refusal}");
        assert!(PathBuf::from("/run/wireguard/wg-welt.sock").exists());
        assert_eq!(interfaces(), ["lo"]);
    });
}

#[test]
#[ignore = "needs root: cargo test -p wgkex-worker --test setup -- --ignored netns_"]
fn netns_a_missing_capability_is_named() {
    const INNER: &str = "WGKEX_TEST_WITHOUT_CAPABILITY";
    if std::env::var_os(INNER).is_some() {
        return without_capability();
    }
    let output = Command::new("unshare")
        .args(["-n", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "netns_a_missing_capability_is_named", "--ignored"])
        .env(INNER, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
}

fn without_capability() {
    let place = Place::new(Backend::Kernel);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refusals =
        runtime.block_on(async { [place.setup().await.unwrap_err(), remove(&place.config).await.unwrap_err()] });
    for refusal in refusals {
        assert!(refusal.to_string().starts_with("wg-welt: CAP_NET_ADMIN is missing"), "{refusal}");
    }
    assert!(!place.key_file("welt").exists());
}

const PEER: &str = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";

fn add_peer() {
    let peer = format!("peer {PEER} allowed-ips fe80::2a6:8fff:fe21:5465/128 endpoint [::1]:9");
    run(&format!("wg set wg-welt {peer} persistent-keepalive 25"));
}

/// The state of both interfaces that a repeated setup must not change: indexes, addresses, configuration, peers.
fn state() -> String {
    wait_until("an address stays tentative", || run("ip -6 addr show tentative").is_empty());
    let addresses = run("ip -o -6 addr show | sort -k 4");
    run("wg showconf wg-welt") + &run("ip -d link show wg-welt") + &run("ip -d link show vx-welt") + &addresses
}

fn wait_until(failure: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < until, "{failure}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn addresses(interface: &str) -> Vec<String> {
    let shown = run(&format!("ip -o -6 addr show dev {interface}"));
    shown.lines().filter_map(|line| line.split_whitespace().nth(3)).map(str::to_owned).collect()
}

fn interfaces() -> Vec<String> {
    let shown = run("ip -o link show");
    let names = shown.lines().filter_map(|line| line.split([':', '@', ' ']).nth(2));
    let mut names: Vec<String> = names.map(str::to_owned).collect();
    names.sort();
    names
}

/// A config and a directory for its keys.
struct Place {
    config: Config,
    backend: Backend,
    keys: TempDir,
}

impl Place {
    fn new(backend: Backend) -> Self {
        let yaml = "domains: [ffmuc_welt]\ndomain_prefixes: [ffmuc_]";
        let config = Config { setup: BTreeMap::new(), ..Config::parse("", yaml, "gw1").unwrap() };
        let mut place = Self { config, backend, keys: tempfile::tempdir().unwrap() };
        place.add("welt", 40011);
        place
    }

    fn add(&mut self, name: &str, listen_port: u16) {
        let domain = Domain::new(&format!("ffmuc_{name}"), &["ffmuc_".into()]).unwrap();
        let setup = Setup { key_file: self.key_file(name), listen_port, vxlan_id: 99, vxlan_port: 4789 };
        self.config.setup.insert(domain, setup);
    }

    fn key_file(&self, name: &str) -> PathBuf {
        self.keys.path().join("keys").join(format!("wg-{name}.key"))
    }

    async fn setup(&self) -> Result<(), Error> {
        setup(&self.config, self.backend).await
    }
}

/// Runs a test in a thread with separate namespaces; `/run`, with the control sockets, is separate too.
fn in_namespaces<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("needs root");
            run("mount --make-rprivate / && mount -t tmpfs none /run && mkdir /run/wireguard && ip link set lo up");
            let _end = EndUserspace;
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Ends every wireguard-go of a test: each ends when its control socket is deleted.
struct EndUserspace;

impl Drop for EndUserspace {
    fn drop(&mut self) {
        for socket in fs::read_dir("/run/wireguard").into_iter().flatten().flatten() {
            let _ = fs::remove_file(socket.path());
        }
    }
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
