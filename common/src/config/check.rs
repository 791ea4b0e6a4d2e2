//! From keys with types to a [`Config`]: defaults, and what several keys have to be together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;
use tracing::Level;

use super::diagnostics::{Diagnostics, Path};
use super::raw::{self, Raw};
use super::value::{Count, Directory, File, Flag, Host, Keepalive, LogLevel, Port, Seconds, Text, UserRole};
use super::{
    Allow, Cleanup, Config, Confirm, Credentials, Https, KeyLists, Limits, Listen, LiveKeys, Mqtt, MqttListen,
    MqttUser, Peers, Quota, Role, Secret, Server, Setup, Tls, Worker,
};
use crate::{Domain, DomainError, HostName, PublicKey, WorkerName, is_topic_level};

/// More mistakes than anybody reads at once.
const ERRORS_MAX: usize = 50;

/// Where the embedded MQTT server listens unless told otherwise.
const MQTT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1883);

/// Gives the keys of a normalized `tree` their types. A value of another type is reported and left out, so that all such
/// mistakes are found at once; none if they are too many to go on.
pub(super) fn types(tree: &mut Value, diagnostics: &mut Diagnostics) -> Option<Raw> {
    for _ in 0..ERRORS_MAX {
        let error = match serde_path_to_error::deserialize::<_, Raw>(&*tree) {
            Ok(raw) => return Some(raw),
            Err(error) => error,
        };
        let path = Path::from(error.path());
        let value = path.find(tree).map(Value::take).unwrap_or_default();
        diagnostics.invalid(&path, &value, &error.inner().to_string());
    }
    None
}

/// The config that `raw` means on the machine `host_name`; it only counts if the diagnostics has no mistake.
pub(super) fn check(raw: Raw, host_name: &str, diagnostics: &mut Diagnostics) -> Config {
    let name = name(host_name, diagnostics);
    refuse_and_warn(&raw, diagnostics);
    let listed: Vec<Text> = raw.domains.into_iter().flatten().collect();
    let prefixes: Vec<String> = raw.domain_prefixes.into_iter().flatten().map(|prefix| prefix.0).collect();
    for (index, _) in prefixes.iter().enumerate().filter(|(_, prefix)| has_quote(prefix)) {
        diagnostics.error(&Path::of("domain_prefixes").index(index), QUOTED);
    }
    let domains = domains(&listed, &prefixes, diagnostics);
    let fits = |Text(name): &Text| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if !listed.is_empty() && !prefixes.is_empty() && !listed.iter().any(fits) {
        diagnostics
            .error(&Path::of("domains"), "none can be served, at least one must begin with one of domain_prefixes");
    }
    let raw::BrokerListen { host, port, tls } = raw.broker_listen;
    let broker_listen = listen(raw::Listen { host, port }, 5000);
    let is_listen_set = raw.mqtt_listen.is_set();
    let mqtt_listen = raw.mqtt.broker_url.is_none().then(|| mqtt_listen(raw.mqtt_listen, diagnostics));
    let external_name = raw.external_name.map(|name| name.0).filter(|name| !name.is_empty());
    let whitelist: BTreeSet<PublicKey> = raw.key_whitelist.into_iter().flatten().map(|key| key.0).collect();
    let protected_keys = raw.protected_keys.into_iter().flatten().map(|key| key.0);
    Config {
        name,
        external_name: external_name.unwrap_or_else(|| host_name.to_owned()),
        workers: workers(&raw.workers, diagnostics),
        cleanup: cleanup(&raw.cleanup),
        mqtt: mqtt(raw.mqtt, mqtt_listen.as_ref(), is_listen_set, diagnostics),
        mqtt_listen,
        https: https(tls, &broker_listen, diagnostics),
        broker_listen,
        worker_listen: listen(raw.worker_listen, 9586),
        worker_user: raw.worker_user.map(|user| user.0).filter(|user| !user.is_empty()),
        confirm: confirm(raw.confirm_timeout.as_ref(), raw.confirm_budget.as_ref(), diagnostics),
        state_dir: raw.state_dir.map_or_else(|| "/var/lib/wgkex".into(), |dir| dir.0.into()),
        live_keys: live_keys(&raw.live_keys),
        peers: peers(&raw.peers),
        forget_idle_after: forget_idle_after(raw.forget_idle_after.as_ref(), diagnostics),
        protected_keys: protected_keys.chain(whitelist.clone()).collect(),
        trusted_proxies: raw.trusted_proxies.into_iter().flatten().map(|net| IpNet::trunc(&net.0)).collect(),
        limits: limits(&raw.limits),
        key_lists: key_lists(raw.blacklist_file, raw.allowlist, whitelist, raw.key_lists, diagnostics),
        admin_listen: listen(raw.admin_listen, 5001),
        admin_token_hash: raw.admin_token_hash.map(|hash| Secret(hash.0)),
        setup: setup(&raw.setup, &listed, &domains, diagnostics),
        log_level: log_level(raw.log_level, raw.logging_config.as_ref(), diagnostics),
        warnings: Vec::new(),
        domains: domains.into_iter().collect(),
    }
}

fn name(host_name: &str, diagnostics: &mut Diagnostics) -> HostName {
    host_name.parse().unwrap_or_else(|_| {
        diagnostics.error_of_source(&format!(
            "the host name {host_name:?} cannot be part of an MQTT topic: \"/\", \"+\", \"#\" and control characters \
             are not allowed"
        ));
        HostName::any()
    })
}

/// rumqttc takes no silence for ever; the longest there is comes close.
fn keepalive(seconds: u16) -> u64 {
    if seconds == 0 { u16::MAX.into() } else { seconds.into() }
}

/// What has to be there; and what this version cannot do yet: refused where the fleet would miss it, else a warning.
fn refuse_and_warn(raw: &Raw, diagnostics: &mut Diagnostics) {
    for (key, is_missing) in [("domains", raw.domains.is_empty()), ("domain_prefixes", raw.domain_prefixes.is_empty())]
    {
        if is_missing {
            diagnostics.error(&Path::of(key), "is missing, a list with at least one entry is needed");
        }
    }
    let is_on = |flag: &Option<Flag>| matches!(flag, Some(Flag(true)));
    if is_on(&raw.parker.enabled) {
        diagnostics.invalid(
            &Path::of("parker.enabled"),
            &Value::Bool(true),
            "is not supported by this version (routed networks), false is allowed",
        );
    }
}

/// The domains served, in the order of the file.
fn domains(listed: &[Text], prefixes: &[String], diagnostics: &mut Diagnostics) -> Vec<Domain> {
    let mut served: Vec<Domain> = Vec::new();
    for (index, Text(name)) in listed.iter().enumerate() {
        let path = Path::of("domains").index(index);
        match Domain::new(name, prefixes) {
            _ if has_quote(name) => diagnostics.error(&path, QUOTED),
            Ok(domain) if served.contains(&domain) => diagnostics.warn(&path, "is listed twice"),
            Ok(domain) => match served.iter().find(|other| other.rest() == domain.rest()) {
                Some(other) => diagnostics.error(&path, &same_interfaces(&domain, other)),
                None => served.push(domain),
            },
            Err(_) if prefixes.is_empty() => {}
            Err(error) => bad_domain(&path, name, &error, diagnostics),
        }
    }
    served
}

/// What is left of a quote too many, or of one that YAML or a shell did not take off.
const QUOTED: &str = "has a quote in it, a name without quotes is allowed";

fn has_quote(name: &str) -> bool {
    name.contains(['"', '\''])
}

fn same_interfaces(domain: &Domain, other: &Domain) -> String {
    let (name, other, interface) = (domain.name(), other.name(), domain.wireguard());
    format!("{name:?} would have the interface {interface} of {other:?}, each domain needs its own")
}

fn bad_domain(path: &Path, name: &str, error: &DomainError, diagnostics: &mut Diagnostics) {
    let said =
        if diagnostics.contains_secret(name) { "the value cannot be a domain".to_owned() } else { error.to_string() };
    match error {
        DomainError::NoPrefix(_) => diagnostics.warn(path, &format!("{said} and is ignored")),
        DomainError::Interface(..) | DomainError::Topic(_) => diagnostics.error(path, &said),
    }
}

/// Each is called by its host name, which is a level of topics: what is more would give its user others' rights.
fn workers(raw: &BTreeMap<String, raw::Worker>, diagnostics: &mut Diagnostics) -> BTreeMap<WorkerName, Worker> {
    let mut workers = BTreeMap::new();
    for (name, raw) in raw {
        if let Ok(name) = name.parse() {
            workers.insert(name, Worker { weight: raw.weight.as_ref().map_or(1.0, |weight| weight.0) });
        } else {
            let complaint = "is not a gateway's name, a host name without \"/\", \"+\" and \"#\" is allowed";
            diagnostics.error(&Path::of("workers").then(name), complaint);
        }
    }
    workers
}

fn cleanup(raw: &raw::Cleanup) -> Cleanup {
    Cleanup {
        interval: seconds(raw.interval.as_ref(), 3600),
        stale: seconds(raw.legacy_stale_timeout.as_ref(), 10800),
        grace: seconds(raw.initial_handshake_grace.as_ref(), 600),
    }
}

fn live_keys(raw: &raw::LiveKeys) -> LiveKeys {
    LiveKeys { max: raw.max.as_ref().map_or(200_000, |max| max.0), ttl: seconds(raw.ttl.as_ref(), 86_400) }
}

fn forget_idle_after(raw: Option<&Seconds>, diagnostics: &mut Diagnostics) -> Option<Duration> {
    // WireGuard shakes hands anew after 120 s at the earliest, and takes nothing after 180 s (REJECT_AFTER_TIME).
    if raw.is_some_and(|after| after.0 < Duration::from_secs(180)) {
        diagnostics.warn(&Path::of("forget_idle_after"), "cuts tunnels that are in use, at least 180 is what is idle");
    }
    raw.map(|after| after.0)
}

fn peers(raw: &raw::Peers) -> Peers {
    let count = |raw: &Option<Count>, default| raw.as_ref().map_or(default, |count| count.0);
    Peers { max: count(&raw.max, 100_000), unproven: count(&raw.unproven, 30_000) }
}

/// Loose for a client, behind which thousands of routers may be, since a router that is refused costs a household a
/// minute; what bounds a flood is the rate of all together.
fn limits(raw: &raw::Limits) -> Limits {
    Limits {
        per_key: quota(&raw.per_key, 10, 1.0),
        per_client: quota(&raw.per_client, 1_000, 20.0),
        per_domain: quota(&raw.per_domain, 25_000, 250.0),
        global: quota(&raw.global, 50_000, 500.0),
    }
}

fn quota(raw: &raw::Limit, burst: u32, per_second: f64) -> Option<Quota> {
    let burst = raw.burst.as_ref().map_or(burst, |burst| burst.0);
    let per_second = raw.per_second.as_ref().map_or(per_second, |rate| rate.0);
    NonZeroU32::new(burst).map(|burst| Quota { burst, per_second })
}

fn key_lists(
    deny: Option<Text>,
    allow: raw::Allowlist,
    trusted: BTreeSet<PublicKey>,
    dirs: raw::KeyLists,
    diagnostics: &mut Diagnostics,
) -> KeyLists {
    let path = |text: Text| PathBuf::from(text.0);
    let dir = |dir: Directory| PathBuf::from(dir.0);
    let (is_enabled, file, allow_dir) =
        (allow.enabled.is_some_and(|flag| flag.0), allow.file.map(path), dirs.allow.map(dir));
    for (key, is_set) in [("allowlist.file", file.is_some()), ("key_lists.allow_dir", allow_dir.is_some())] {
        if is_set && !is_enabled {
            diagnostics.warn(&Path::of(key), "is not used, as allowlist.enabled is not true");
        }
    }
    if is_enabled && file.is_none() && allow_dir.is_none() {
        let note = "is true, but neither allowlist.file nor key_lists.allow_dir is set: only keys that are allowed by \
                    an admin call may come";
        diagnostics.warn(&Path::of("allowlist.enabled"), note);
    }
    KeyLists {
        deny_file: deny.map(path),
        deny_dir: dirs.deny.map(dir),
        allow: is_enabled.then_some(Allow { file, dir: allow_dir }),
        trusted,
        trusted_dir: dirs.trusted.map(dir),
        refresh: seconds(allow.refresh_interval.as_ref(), 5),
    }
}

fn seconds(raw: Option<&Seconds>, default: u64) -> Duration {
    raw.map_or(Duration::from_secs(default), |seconds| seconds.0)
}

fn port(raw: Option<&Port>, default: u16) -> u16 {
    raw.map_or(default, |port| port.0)
}

fn listen(raw: raw::Listen, default_port: u16) -> Listen {
    let host = raw.host.map_or_else(|| Ipv4Addr::LOCALHOST.to_string(), |host| host.0);
    Listen { host, port: port(raw.port.as_ref(), default_port) }
}

fn https(raw: raw::ListenTls, http: &Listen, diagnostics: &mut Diagnostics) -> Option<Https> {
    const TLS: &str = "broker_listen.tls";
    let port = port(raw.port.as_ref(), 5443);
    let Some((cert_file, key_file)) = pair(TLS, raw.cert_file, raw.key_file, diagnostics) else {
        if port != 5443 {
            diagnostics.warn(&Path::of(TLS).then("port"), "is not used, as broker_listen.tls.cert_file is not set");
        }
        return None;
    };
    if port == http.port {
        diagnostics.invalid(
            &Path::of(TLS).then("port"),
            &Value::from(port),
            "is that of broker_listen, another is allowed",
        );
    }
    Some(Https { listen: Listen { host: http.host.clone(), port }, cert_file, key_file })
}

fn mqtt(raw: raw::Mqtt, own: Option<&MqttListen>, is_listen_set: bool, diagnostics: &mut Diagnostics) -> Mqtt {
    let is_encrypted = raw.tls.is_some_and(|tls| tls.0);
    let is_external = own.is_none();
    let (another, none, plain) =
        ("mqtt.broker_url names another server", "mqtt.broker_url is not set", "mqtt.tls is not true");
    let unused = [
        ("mqtt.broker_port", !is_external && port(raw.broker_port.as_ref(), 1883) != 1883, none),
        ("mqtt.tls", !is_external && is_encrypted, none),
        ("mqtt.ca_file", !is_encrypted && raw.ca_file.is_some(), plain),
        ("mqtt.cert_file", !is_encrypted && raw.cert_file.is_some(), plain),
        ("mqtt.key_file", !is_encrypted && raw.key_file.is_some(), plain),
        ("mqtt_listen", is_external && is_listen_set, another),
    ];
    for (path, _, why) in unused.iter().filter(|(_, is_unused, _)| *is_unused) {
        diagnostics.warn(&Path::of(path), &format!("is not used, as {why}"));
    }
    let own_files = pair("mqtt", raw.cert_file, raw.key_file, diagnostics);
    let tls = Tls { ca_file: raw.ca_file.map(|file| file.0.into()), own: own_files };
    let external = |host: Host| Server::External { host: host.0, port: port(raw.broker_port.as_ref(), 1883) };
    Mqtt {
        credentials: credentials(raw.username, raw.password, diagnostics),
        keepalive: Duration::from_secs(raw.keepalive.map_or(5, |Keepalive(seconds)| keepalive(seconds))),
        tls: (is_encrypted && is_external).then_some(tls),
        server: match (raw.broker_url, own) {
            (Some(host), _) => external(host),
            (None, own) => Server::Embedded(reachable(own.map_or(MQTT, |own| own.address))),
        },
    }
}

/// A certificate and its key, below `section`: both or none.
fn pair(
    section: &str,
    certificate: Option<File>,
    key: Option<File>,
    diagnostics: &mut Diagnostics,
) -> Option<(PathBuf, PathBuf)> {
    let mut lacks = |lacks: &str, has: &str| {
        let complaint = format!("is missing, as {section}.{has} is set, a file is needed");
        diagnostics.error(&Path::of(section).then(lacks), &complaint);
        None
    };
    match (certificate, key) {
        (Some(certificate), Some(key)) => Some((certificate.0.into(), key.0.into())),
        (Some(_), None) => lacks("key_file", "cert_file"),
        (None, Some(_)) => lacks("cert_file", "key_file"),
        (None, None) => None,
    }
}

/// Where a program on the same machine reaches a server that listens on `address`.
fn reachable(address: SocketAddr) -> SocketAddr {
    let loopback: IpAddr = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    SocketAddr::new(if address.ip().is_unspecified() { loopback } else { address.ip() }, address.port())
}

fn mqtt_listen(raw: raw::MqttListen, diagnostics: &mut Diagnostics) -> MqttListen {
    let has_users = !raw.users.is_empty();
    let users = raw.users.into_iter().filter_map(|(name, raw)| mqtt_user(name, raw, diagnostics)).collect();
    let tls = pair("mqtt_listen.tls", raw.tls.cert_file, raw.tls.key_file, diagnostics);
    let host = raw.host.map_or_else(|| MQTT.ip().to_string(), |host| host.0);
    let ip = mqtt_ip(&host, has_users, diagnostics);
    if !ip.is_loopback() && tls.is_none() {
        diagnostics
            .warn(&Path::of("mqtt_listen"), "passwords and keys are not encrypted, as mqtt_listen.tls is not set");
    }
    MqttListen {
        address: SocketAddr::new(ip, port(raw.port.as_ref(), MQTT.port())),
        tls,
        users,
        max_connections: raw.max_connections.map_or(10_000, |max| max.0),
    }
}

/// Where the embedded server listens: only users make others than this machine's programs strangers.
fn mqtt_ip(host: &str, has_users: bool, diagnostics: &mut Diagnostics) -> IpAddr {
    let address = if host == "localhost" { "127.0.0.1" } else { host }.parse().ok();
    let complaint = match address {
        Some(ip) if has_users || IpAddr::is_loopback(&ip) => return ip,
        Some(_) => {
            "is not a loopback address, one such as 127.0.0.1 is allowed (another only with mqtt_listen.users, as \
             without them everybody may say everything)"
        }
        None => "is not an address, one such as 127.0.0.1 or \"::\" is allowed",
    };
    diagnostics.invalid(&Path::of("mqtt_listen.host"), &Value::from(host), complaint);
    MQTT.ip()
}

fn mqtt_user(name: String, raw: raw::MqttUser, diagnostics: &mut Diagnostics) -> Option<(String, MqttUser)> {
    let path = Path::of("mqtt_listen.users").then(&name);
    if !is_topic_level(&name) {
        diagnostics.error(&path, "is not a user's name, one without \"/\", \"+\" and \"#\" is allowed");
    }
    let Some(hash) = raw.password_hash else {
        diagnostics
            .error(&path.then("password_hash"), "is missing, what \"wgkex-broker hash-password\" prints is needed");
        return None;
    };
    let role = raw.role.map_or(Role::Worker, |UserRole(role)| role);
    Some((name, MqttUser { password_hash: Secret(hash.0), role }))
}

/// A user has both, as in the original.
fn credentials(username: Option<Text>, password: Option<Text>, diagnostics: &mut Diagnostics) -> Option<Credentials> {
    let given = |text: Option<Text>| text.map(|text| text.0).filter(|text| !text.is_empty());
    match (given(username), given(password)) {
        (Some(username), Some(password)) => Some(Credentials { username, password: Secret(password) }),
        (None, None) => None,
        (Some(_), None) => {
            diagnostics.warn(&Path::of("mqtt.username"), "is not used, as mqtt.password is not set");
            None
        }
        (None, Some(_)) => {
            diagnostics.warn(&Path::of("mqtt.password"), "is not used, as mqtt.username is not set");
            None
        }
    }
}

fn confirm(timeout: Option<&Seconds>, budget: Option<&Seconds>, diagnostics: &mut Diagnostics) -> Confirm {
    let confirm = Confirm { timeout: seconds(timeout, 1), budget: seconds(budget, 3) };
    if confirm.timeout > confirm.budget {
        let (timeout, budget) = (confirm.timeout.as_secs_f64(), confirm.budget.as_secs_f64());
        diagnostics.invalid(
            &Path::of("confirm_timeout"),
            &Value::from(timeout),
            &format!("is more than confirm_budget, at most {budget} is allowed"),
        );
    }
    confirm
}

/// `log_level`, else what the original's logging had.
fn log_level(own: Option<LogLevel>, logging_config: Option<&Value>, diagnostics: &mut Diagnostics) -> Level {
    let foreign = logging_config.and_then(|config| config.pointer("/root/level")).filter(|level| !level.is_null());
    match (own, foreign) {
        (Some(level), _) => level.0,
        (None, None) => Level::INFO,
        (None, Some(value)) => match serde_json::from_value::<LogLevel>(value.clone()) {
            Ok(level) => level.0,
            Err(error) => {
                diagnostics.invalid(&Path::of("logging_config.root.level"), value, &error.to_string());
                Level::INFO
            }
        },
    }
}

fn setup(
    raw: &raw::Setup,
    listed: &[Text],
    domains: &[Domain],
    diagnostics: &mut Diagnostics,
) -> BTreeMap<Domain, Setup> {
    for name in raw.domains.keys().filter(|name| !listed.iter().any(|listed| listed.0 == **name)) {
        diagnostics.error(&Path::of("setup.domains").then(name), "is not one of domains, one of them is allowed");
    }
    let key_dir = FilePath::new(raw.key_dir.as_ref().map_or("/etc/wgkex", |dir| &dir.0));
    let first_port = port(raw.listen_port.as_ref(), 51820);
    let default = raw::SetupDomain::default();
    let mut interfaces = BTreeMap::new();
    for (domain, counted) in domains.iter().zip(u32::from(first_port)..) {
        let own = raw.domains.get(domain.name()).unwrap_or(&default);
        let vni = own.vxlan_id.as_ref().or(raw.vxlan_id.as_ref());
        let vxlan_port = own.vxlan_port.as_ref().or(raw.vxlan_port.as_ref());
        let setup = Setup {
            key_file: key_dir.join(format!("{}.key", domain.wireguard())),
            listen_port: own
                .listen_port
                .as_ref()
                .map_or_else(|| counted_port(counted, domain, diagnostics), |port| port.0),
            vxlan_id: vni.map_or(99, |id| id.0),
            vxlan_port: port(vxlan_port, 8472),
        };
        interfaces.insert(domain.clone(), setup);
    }
    check_udp_ports(domains, &interfaces, diagnostics);
    interfaces
}

fn counted_port(counted: u32, domain: &Domain, diagnostics: &mut Diagnostics) -> u16 {
    u16::try_from(counted).unwrap_or_else(|_| {
        let complaint = format!("is too high, as it counts up to {counted} for {domain} and 65535 is the last port");
        diagnostics.error(&Path::of("setup.listen_port"), &complaint);
        0
    })
}

/// A UDP port serves one WireGuard interface, and none that VXLAN has; VXLANs may share theirs.
fn check_udp_ports(domains: &[Domain], interfaces: &BTreeMap<Domain, Setup>, diagnostics: &mut Diagnostics) {
    let vxlan: BTreeSet<u16> = interfaces.values().map(|setup| setup.vxlan_port).collect();
    let mut taken: BTreeMap<u16, &Domain> = BTreeMap::new();
    for (domain, setup) in domains.iter().filter_map(|domain| interfaces.get_key_value(domain)) {
        let port = setup.listen_port;
        let path = Path::of("setup.domains").then(domain.name()).then("listen_port");
        if port == 0 {
            continue; // reported where it was counted
        }
        if vxlan.contains(&port) {
            diagnostics.error(&path, &format!("{port} is a vxlan_port, another one is allowed"));
        }
        if let Some(other) = taken.insert(port, domain) {
            diagnostics.error(&path, &format!("{port} is also that of {other}, another one is allowed"));
        }
    }
}
