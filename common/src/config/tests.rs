//! The config as operators write it, mistakes included.

/// The output of "wgkex-broker hash-password", as a literal.
macro_rules! hash {
    () => {
        "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHQ$9sTbSlTio3Biev89thdrlKKiCaYsjjYVJxGAL3swxpQ"
    };
}

mod mistakes;

use std::io;
use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::address::first_of;

const EXAMPLE: &str = include_str!("../../../wgkex.yaml.example");

/// The smallest valid config.
const LEAST: &str = "domains: [ffmuc_welt, ffmuc_umland]\ndomain_prefixes: [ffmuc_]\n";

/// All keys of the original, in the shapes that its users have.
const ORIGINAL: &str = r#"
domains:
  - ffmuc_muc_cty
  - ffmuc_welt
  - ffdon_umland
domain_prefixes:
  - ffmuc_muc_
  - ffmuc_
  - ffdon_
workers:
  gw04.in.ffmuc.net:
    weight: 30
    id: 1
    pop: vie
    location: Vienna
  gw05.in.ffmuc.net:
    weight: ~
  gw06.in.ffmuc.net:
sticky_worker_tolerance: 10
externalName: gw04.ext.ffmuc.net
cleanup:
  interval: 1800
  parker_stale_timeout: 300
  legacy_stale_timeout: 7200
  initial_handshake_grace: 900
parker:
  enabled: no
  464xlat: True
  retry_interval: 120
  wg_keepalive: 25
  ipam: netbox
  prefixes:
    ipv4:
      length: 22
      clat_subnet: 10.80.96.0/22
      netbox_filter: {role: clat}
    ipv6:
      length: 63
      netbox_filter:
        mask_length: 48
        custom: [1, two]
      netbox_additional_data:
        status: active
        tenant: {name: ffmuc}
broker_signing_key: RWRCSwAAAABzaWduaW5nLWtleQ==
netbox:
  url: https://netbox.ffmuc.net
  api_key: very-secret-token
mqtt:
  broker_url: mqtt.ffmuc.net
  broker_port: "8883"
  username: wgkex
  password: very-secret-password
  keepalive: 5
  tls: True
broker_listen:
  host: 0.0.0.0
  port: 5000
logging_config:
  formatters:
    standard:
      format: "%(asctime)s,%(msecs)d %(levelname)-8s [%(filename)s:%(lineno)d] %(message)s"
  handlers:
    console:
      class: logging.StreamHandler
      formatter: standard
  root:
    handlers:
      - console
    level: DEBUG
  version: 1
"#;

/// Each problem with its file and without its line, which is in a test of its own.
fn texts(problems: &[ConfigProblem]) -> Vec<String> {
    let without_line = |problem: &ConfigProblem| ConfigProblem { line: None, ..problem.clone() }.to_string();
    problems.iter().map(without_line).collect()
}

fn parse(yaml: &str) -> Result<Config, ConfigError> {
    Config::parse("/etc/wgkex.yaml", yaml, "gw04.in.ffmuc.net")
}

fn quota(burst: u32, per_second: f64) -> Option<Quota> {
    Some(Quota { burst: NonZeroU32::new(burst)?, per_second })
}

fn setup(config: &Config, domain: &str) -> Setup {
    config.setup[domain].clone()
}

fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_originals_file_works_without_a_warning() {
    let config = parse(ORIGINAL).unwrap();
    assert_eq!(texts(&config.warnings), [""; 0]);
    let domains: Vec<&str> = config.domains.iter().map(Domain::interface_suffix).collect();
    assert_eq!(domains, ["umland", "cty", "welt"]);
    assert_eq!(config.external_name, "gw04.ext.ffmuc.net");
    let weights: Vec<f64> = config.workers.values().map(|worker| worker.weight).collect();
    assert_eq!(weights, [30.0, 1.0, 1.0]);
    let seconds = Duration::from_secs;
    assert_eq!(config.cleanup, Cleanup { interval: seconds(1800), stale: seconds(7200), grace: seconds(900) });
    assert_eq!(config.mqtt.server, MqttAddress::External { host: "mqtt.ffmuc.net".into(), port: 8883 });
    assert_eq!(config.mqtt.tls, Some(Tls::default()));
    let credentials = config.mqtt.credentials.clone().unwrap();
    assert_eq!((credentials.username.as_str(), credentials.password.expose()), ("wgkex", "very-secret-password"));
    assert_eq!(config.broker_listen.to_string(), "0.0.0.0:5000");
    assert_eq!(config.log_level, Level::DEBUG);
    assert!(!format!("{config:?}").contains("very-secret"), "{config:?}");
}

#[test]
fn routers_get_the_external_name_as_it_is_written() {
    let told = |yaml: &str| parse(&format!("{LEAST}{yaml}")).unwrap().external_name;
    for name in ["gw04.ext.ffmuc.net", "192.0.2.1", "2001:db8::1", "[2001:db8::1]"] {
        assert_eq!(told(&format!("externalName: '{name}'")), name);
    }
    assert_eq!(told("externalName: ''"), "gw04.in.ffmuc.net");
}

#[test]
fn the_time_to_fill_a_gateway_may_be_none() {
    let over = |yaml: &str| parse(&format!("{LEAST}{yaml}")).map(|config| config.rebalance.over);
    assert_eq!(over("rebalance: {over: 0}").unwrap(), Duration::ZERO);
    assert_eq!(over("rebalance: {over: 60}").unwrap(), Duration::from_secs(60));
    for wrong in ["-1", "1000001", "never"] {
        let error = over(&format!("rebalance: {{over: {wrong}}}")).unwrap_err().to_string();
        assert!(error.contains("rebalance.over") && error.contains("from 0 (off) to 1000000"), "{error}");
    }
}

#[test]
fn missing_keys_have_their_defaults() {
    let config = parse(LEAST).unwrap();
    let seconds = Duration::from_secs;
    let expected = Config {
        domains: config.domains.clone(),
        name: "gw04.in.ffmuc.net".parse().unwrap(),
        external_name: "gw04.in.ffmuc.net".into(),
        workers: BTreeMap::new(),
        cleanup: Cleanup { interval: seconds(3600), stale: seconds(10800), grace: seconds(600) },
        mqtt: Mqtt {
            server: MqttAddress::Embedded("127.0.0.1:1883".parse().unwrap()),
            credentials: None,
            keepalive: seconds(5),
            tls: None,
        },
        mqtt_listen: Some(MqttListen {
            address: "127.0.0.1:1883".parse().unwrap(),
            tls: None,
            users: BTreeMap::new(),
            max_connections: 10_000,
        }),
        broker_listen: Listen { host: "127.0.0.1".into(), port: 5000 },
        https: None,
        worker_listen: Listen { host: "127.0.0.1".into(), port: 9586 },
        state_dir: "/var/lib/wgkex".into(),
        live_keys: LiveKeyLimits { max: 200_000, ttl: Duration::from_secs(86_400) },
        worker_user: None,
        forget_idle_after: None,
        peers: PeerLimits { max: 100_000, unproven: 30_000 },
        rebalance: Rebalance { over: seconds(900) },
        protected_keys: BTreeSet::new(),
        trusted_proxies: vec![],
        limits: Limits {
            per_key: quota(10, 1.0),
            per_client: quota(1_000, 20.0),
            per_domain: quota(25_000, 250.0),
            global: quota(50_000, 500.0),
        },
        confirm: Confirm { timeout: seconds(1), budget: seconds(3) },
        key_lists: KeyLists { refresh: seconds(5), ..KeyLists::default() },
        admin_listen: Listen { host: "127.0.0.1".into(), port: 5001 },
        admin_token_hash: None,
        storage: Storage::default(),
        registry: None,
        servers: BTreeMap::new(),
        hub: None,
        tenants: None,
        is_setup_named: false,
        setup: config.setup.clone(),
        log_level: Level::INFO,
        log_format: LogFormat::Text,
        source: ConfigSource::default(),
        warnings: vec![],
    };
    assert_eq!(config, expected);
    let interfaces = |name: &str, listen_port| Setup {
        key_file: format!("/etc/wgkex/wg-{name}.key").into(),
        listen_port,
        vxlan_id: 99,
        vxlan_port: 8472,
    };
    assert_eq!(setup(&config, "ffmuc_welt"), interfaces("welt", 51820));
    assert_eq!(setup(&config, "ffmuc_umland"), interfaces("umland", 51821));
}

#[test]
fn null_and_an_empty_section_mean_the_default_everywhere() {
    for path in keys::paths().into_iter().filter(|path| path.0.len() == 1) {
        let yaml = format!("{LEAST}{path}: ~\n");
        if yaml.matches(&format!("{path}:")).count() == 1 {
            assert_eq!(parse(&yaml), parse(LEAST), "{path}");
        }
    }
    assert_eq!(parse(&format!("{LEAST}mqtt: {{broker_url: ~, tls: null}}\nsetup: {{domains: ~}}")), parse(LEAST));
}

#[test]
fn truth_values_and_numbers_are_read_as_the_originals_parser_has_them() {
    let tls = |text: &str| {
        let yaml = format!("{LEAST}mqtt: {{broker_url: mqtt, tls: {text}}}");
        parse(&yaml).map(|config| config.mqtt.tls.is_some()).unwrap()
    };
    assert!(["yes", "Yes", "on", "ON", "True", "true", "1", "\"true\""].into_iter().all(tls));
    assert!(!["no", "No", "off", "OFF", "False", "false", "0", "'no'"].into_iter().any(tls));
    let interval = |text: &str| {
        let yaml = format!("{LEAST}cleanup: {{interval: {text}}}");
        parse(&yaml).map(|config| config.cleanup.interval.as_secs_f64()).unwrap()
    };
    let read: Vec<f64> = ["60", "'60'", "6e1", "60.5", "\"0.5\"", "1_000", "0x10"].into_iter().map(interval).collect();
    assert_eq!(read, [60.0, 60.0, 60.0, 60.5, 0.5, 1000.0, 16.0]);
}

#[test]
fn keys_may_be_merged_from_another_mapping() {
    let yaml = format!(
        "{LEAST}cleanup: &times {{interval: 60}}\nworkers:\n  gw1: &gw {{weight: 2}}\n  gw2:\n    <<: *gw\n  gw3: {{<<: [*gw], weight: 3}}\n"
    );
    let weights: Vec<f64> = parse(&yaml).unwrap().workers.values().map(|worker| worker.weight).collect();
    assert_eq!(weights, [2.0, 2.0, 3.0]);
}

#[test]
fn of_a_key_given_twice_the_last_counts() {
    let config =
        parse(&format!("{LEAST}cleanup: {{interval: 1, interval: 2}}\nlog_level: DEBUG\nlog_level: ERROR")).unwrap();
    assert_eq!((config.cleanup.interval, config.log_level), (Duration::from_secs(2), Level::ERROR));
}

#[test]
fn a_keepalive_of_0_is_the_longest_there_is() {
    let keepalive = |yaml: &str| parse(&format!("{LEAST}mqtt: {{keepalive: {yaml}}}")).unwrap().mqtt.keepalive;
    assert_eq!(keepalive("0"), Duration::from_secs(65535));
    assert_eq!(keepalive("7"), Duration::from_secs(7));
}

#[test]
fn domains_that_no_router_could_use_are_left_out() {
    let config =
        parse("domains: [ffmuc_welt, welt, ffmuc_welt]\ndomain_prefixes: [ffmuc_]\nsetup: {domains: {welt: {}}}");
    let config = config.unwrap();
    assert_eq!(config.domains.iter().map(Domain::name).collect::<Vec<_>>(), ["ffmuc_welt"]);
    let expected = [
        "/etc/wgkex.yaml: domains[1]: \"welt\" begins with none of domain_prefixes and is ignored",
        "/etc/wgkex.yaml: domains[2]: is listed twice",
    ];
    assert_eq!(texts(&config.warnings), expected);
}

#[test]
fn listeners_are_given_as_keys_or_as_text() {
    let shown = |text: &str| parse(&format!("{LEAST}broker_listen: {text}")).unwrap().broker_listen.to_string();
    assert_eq!(shown("{port: 80}"), "127.0.0.1:80");
    assert_eq!(shown("{host: '::'}"), "[::]:5000");
    assert_eq!(shown("{host: '[::1]', port: '80'}"), "[::1]:80");
    assert_eq!(shown("0.0.0.0:80"), "0.0.0.0:80");
    assert_eq!(shown("'[::1]:80'"), "[::1]:80");
    assert_eq!(shown("'::1'"), "[::1]:5000");
    assert_eq!(shown("localhost"), "localhost:5000");
    let embedded = |text: &str| parse(&format!("{LEAST}mqtt_listen: {text}")).unwrap().mqtt.server;
    assert_eq!(embedded("localhost:1884"), MqttAddress::Embedded("127.0.0.1:1884".parse().unwrap()));
    assert_eq!(embedded("'[::1]:1884'"), MqttAddress::Embedded("[::1]:1884".parse().unwrap()));
}

#[test]
fn a_listener_on_all_addresses_is_reached_by_loopback() {
    let reachable = |host: &str| Listen { host: host.into(), port: 7 }.reachable();
    assert_eq!(["0.0.0.0", "::"].map(reachable), ["127.0.0.1:7", "127.0.0.1:7"]);
    assert_eq!(["192.0.2.1", "2001:db8::1"].map(reachable), ["192.0.2.1:7", "[2001:db8::1]:7"]);
    assert_eq!(reachable("broker.example"), "broker.example:7");
}

#[test]
fn https_has_the_host_of_plain_http_and_a_port_of_its_own() {
    let https = |text: &str| parse(&format!("{LEAST}broker_listen: {text}")).unwrap().https;
    let files = "cert_file: /c.pem, key_file: /k.pem";
    let expected = |host: &str, port| Https {
        listen: Listen { host: host.into(), port },
        cert_file: "/c.pem".into(),
        key_file: "/k.pem".into(),
    };
    assert_eq!(https(&format!("{{host: '::', tls: {{{files}}}}}")), Some(expected("::", 5443)));
    assert_eq!(https(&format!("{{tls: {{port: 443, {files}}}}}")), Some(expected("127.0.0.1", 443)));
    assert_eq!(https("{tls: {cert_file: ~}}"), None);
    assert_eq!(https("0.0.0.0:80"), None);
}

#[test]
fn limits_are_set_one_by_one_and_a_burst_of_0_is_none() {
    let limits = |text: &str| parse(&format!("{LEAST}limits: {text}")).unwrap().limits;
    let default = limits("~");
    let set = limits("{per_key: {burst: 0}, per_client: {burst: 5, per_second: 0.5}, global: {per_second: 7}}");
    assert_eq!((set.per_key, set.per_client), (None, quota(5, 0.5)));
    assert_eq!((set.per_domain, set.global), (default.per_domain, quota(50_000, 7.0)));
}

#[test]
fn proxies_are_networks_or_single_addresses() {
    let config = parse(&format!("{LEAST}trusted_proxies: [192.0.2.77/24, '::1', '2001:db8::/32', 10.0.0.1]")).unwrap();
    let shown: Vec<_> = config.trusted_proxies.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["192.0.2.0/24", "::1/128", "2001:db8::/32", "10.0.0.1/32"]);
}

#[test]
fn the_embedded_server_has_users_and_tls() {
    let listen = "mqtt_listen: {host: '::', tls: {cert_file: /c, key_file: /k}, max_connections: 50, users: {\
                  gw1: {password_hash: 'HASH'}, b: {password_hash: 'HASH', role: broker}}}";
    let config = parse(&format!("{LEAST}{listen}").replace("HASH", hash!())).unwrap();
    assert_eq!(texts(&config.warnings), [""; 0]);
    assert_eq!(
        config.mqtt.server,
        MqttAddress::Embedded("[::1]:1883".parse().unwrap()),
        "what a worker beside it connects to"
    );
    let user = |hash: &str, role| MqttUser { password_hash: Secret::new(hash.into()), role };
    let expected = MqttListen {
        address: "[::]:1883".parse().unwrap(),
        tls: Some(("/c".into(), "/k".into())),
        users: BTreeMap::from([("gw1".into(), user(hash!(), Role::Worker)), ("b".into(), user(hash!(), Role::Broker))]),
        max_connections: 50,
    };
    assert!(!format!("{config:?}").contains("argon2id"));
    assert_eq!(config.mqtt_listen, Some(expected));
    let external = parse(&format!("{LEAST}mqtt: {{broker_url: mqtt}}")).unwrap();
    assert_eq!(external.mqtt_listen, None);
}

#[test]
fn a_domains_own_interface_settings_win() {
    let config = parse(&format!(
        "{LEAST}setup: {{key_dir: /k, listen_port: 40000, vxlan_id: 7, domains: {{ffmuc_welt: {{listen_port: 40010, vxlan_port: 4789}}}}}}"
    ));
    let config = config.unwrap();
    let expected = Setup { key_file: "/k/wg-welt.key".into(), listen_port: 40010, vxlan_id: 7, vxlan_port: 4789 };
    assert_eq!(setup(&config, "ffmuc_welt"), expected);
    assert_eq!(setup(&config, "ffmuc_umland").listen_port, 40001);
}

#[test]
fn lists_and_the_token_are_taken_as_they_stand() {
    let key = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";
    let hash = "AB".repeat(32);
    let config = parse(&format!(
        "{LEAST}blacklist_file: deny.yaml\nallowlist: {{enabled: yes, file: /allow, refresh_interval: 60}}\n\
         key_whitelist: [{key}]\nkey_lists: {{deny_dir: /d, allow_dir: /a, trusted_dir: /t}}\n\
         admin_listen: \"[::1]:81\"\nadmin_token_hash: {hash}\n"
    ));
    let config = config.unwrap();
    let expected = KeyLists {
        deny_file: Some("deny.yaml".into()),
        deny_dir: Some("/d".into()),
        allow: Some(Allow { file: Some("/allow".into()), dir: Some("/a".into()) }),
        trusted: [key.parse().unwrap()].into(),
        trusted_dir: Some("/t".into()),
        refresh: Duration::from_secs(60),
    };
    assert_eq!((config.key_lists.clone(), config.admin_listen.to_string()), (expected, "[::1]:81".into()));
    assert_eq!(config.admin_token_hash.as_ref().unwrap().expose(), hash.to_lowercase());
    assert!(!format!("{config:?}").contains(&hash.to_lowercase()));
    assert_eq!(parse(&format!("{LEAST}allowlist: {{file: /a}}")).unwrap().key_lists.allow, None);
}

#[test]
fn the_log_level_is_ours_before_the_originals() {
    let level = |yaml: &str| parse(&format!("{LEAST}{yaml}")).unwrap().log_level;
    assert_eq!(level("log_level: warning"), Level::WARN);
    assert_eq!(level("log_level: CRITICAL"), Level::ERROR);
    assert_eq!(level("log_level: 10"), Level::DEBUG);
    assert_eq!(level("logging_config: {root: {level: error}}"), Level::ERROR);
    assert_eq!(level("logging_config: {root: {level: error}}\nlog_level: DEBUG"), Level::DEBUG);
    assert_eq!(level("logging_config: text"), Level::INFO);
}

#[test]
fn a_host_name_that_no_topic_can_have_is_refused() {
    for name in ["", "a/b", "a+", "#"] {
        let [line] = &Config::parse("f", LEAST, name).unwrap_err().mistakes[..] else { panic!("{name}") };
        let line = line.to_string();
        assert!(
            line.starts_with("f: the host name must be one without") && line.ends_with(&format!("not {name:?}")),
            "{line}"
        );
    }
}

#[test]
fn a_containers_variables_are_a_config() {
    let set = variables(&[
        ("WGKEX_DOMAINS", "ffmuc_welt, ffmuc_umland,ffmuc_gauting"),
        ("WGKEX_DOMAIN_PREFIXES", "ffmuc_"),
        ("WGKEX_DEBUG", "ERROR"),
        ("MQTT_BROKER_URL", "mqtt"),
        ("MQTT_BROKER_PORT", "8883"),
        ("MQTT_USERNAME", "wgkex"),
        ("MQTT_PASSWORD", "012345"),
        ("MQTT_KEEPALIVE", "10"),
        ("MQTT_TLS", "True"),
        ("HOME", "/root"),
    ]);
    let config = Config::from_variables(&set, "gw1").unwrap();
    assert_eq!(config.domains.len(), 3);
    let expected = Mqtt {
        server: MqttAddress::External { host: "mqtt".into(), port: 8883 },
        credentials: Some(Credentials { username: "wgkex".into(), password: Secret::new("012345".into()) }),
        keepalive: Duration::from_secs(10),
        tls: Some(Tls::default()),
    };
    assert_eq!(config.mqtt, expected);
    assert_eq!(config.log_level, Level::ERROR);
    assert_eq!(texts(&config.warnings), [""; 0]);
    assert_eq!(config.broker_listen.to_string(), "[::]:5000");
    for (debug, level) in [("1", Level::DEBUG), ("yes", Level::DEBUG), ("False", Level::INFO), ("", Level::INFO)] {
        let mut set = set.clone();
        set.insert("WGKEX_DEBUG".into(), debug.into());
        assert_eq!(Config::from_variables(&set, "gw1").unwrap().log_level, level, "{debug}");
    }
}

/// A file of variables keeps the quotes that a shell would remove.
#[test]
fn one_pair_of_quotes_around_a_variable_is_taken_off() {
    for quoted in [
        ["\"x_a, x_b\"", "\"x_\"", "\"very 'secret'\"", "\"0.0.0.0:80\""],
        ["'x_a,x_b'", "'x_'", "'very 'secret''", "'0.0.0.0:80'"],
        ["\"x_a\",\"x_b\"", "x_", "\"very 'secret'\"", "0.0.0.0:80"],
    ] {
        let [domains, prefixes, password, listen] = quoted;
        let set = variables(&[
            ("WGKEX_DOMAINS", domains),
            ("WGKEX_DOMAIN_PREFIXES", prefixes),
            ("MQTT_BROKER_PORT", "\"8883\""),
            ("MQTT_BROKER_URL", "'mqtt'"),
            ("MQTT_USERNAME", "\"wgkex\""),
            ("MQTT_PASSWORD", password),
            ("WGKEX_BROKER_LISTEN", listen),
            ("WGKEX_DEBUG", "\"\""),
        ]);
        let config = Config::from_variables(&set, "gw1").unwrap();
        assert_eq!(config.domains.iter().map(Domain::name).collect::<Vec<_>>(), ["x_a", "x_b"]);
        assert_eq!(config.mqtt.server, MqttAddress::External { host: "mqtt".into(), port: 8883 });
        assert_eq!(config.mqtt.credentials.clone().unwrap().password.expose(), "very 'secret'");
        assert_eq!(config.broker_listen.to_string(), "0.0.0.0:80");
    }
    let of_port =
        variables(&[("WGKEX_DOMAINS", "x_a"), ("WGKEX_DOMAIN_PREFIXES", "x_"), ("WGKEX_BROKER_LISTEN", "5009")]);
    assert_eq!(Config::from_variables(&of_port, "gw1").unwrap().broker_listen.to_string(), "[::]:5009");
    let set = variables(&[("WGKEX_DOMAINS", "\"x_a,x_b"), ("WGKEX_DOMAIN_PREFIXES", "\"x_")]);
    let quoted = "must be a name without quotes";
    let expected = [format!("WGKEX_DOMAIN_PREFIXES[0]: {quoted}"), format!("WGKEX_DOMAINS[0]: {quoted}")];
    let error = Config::from_variables(&set, "gw1").unwrap_err();
    assert_eq!(texts(&error.mistakes)[..2], expected);
    let error = parse("domains: [\"'ffmuc_a'\", ffmuc_b]\ndomain_prefixes: [ffmuc_]").unwrap_err();
    assert_eq!(texts(&error.mistakes), [format!("/etc/wgkex.yaml: domains[0]: {quoted}")]);
}

#[test]
fn a_mistake_in_a_variable_names_the_variable() {
    let set = variables(&[("WGKEX_DOMAINS", "ffmuc_1234567890123"), ("MQTT_BROKER_PORT", "abc"), ("WGKEX_DEBUG", "x")]);
    let error = Config::from_variables(&set, "gw1").unwrap_err();
    let expected = [
        "WGKEX_DEBUG: must be DEBUG, INFO, WARNING, ERROR or CRITICAL, not \"x\"",
        "MQTT_BROKER_PORT: must be a number from 1 to 65535, not \"abc\"",
        "WGKEX_DOMAIN_PREFIXES: must be a list with at least one entry",
    ];
    assert_eq!(texts(&error.mistakes), expected);
    let set = variables(&[("MQTT_PASSWORD", "very-secret"), ("MQTT_BROKER_URL", "very-secret/")]);
    let error = Config::from_variables(&set, "gw1").unwrap_err();
    assert!(texts(&error.mistakes)[0].starts_with("MQTT_BROKER_URL: must be a host name"), "{error}");
}

#[test]
fn a_misspelt_variable_is_named() {
    let set =
        [("WGKEX_DOMAINS", "x_a"), ("WGKEX_DOMAIN_PREFIXES", "x_"), ("WGKEX_DOMAIN", "x_b"), ("MQTT_BROKER", "b")];
    let others = [("MQTT_PASWORD", "p"), ("MQTT_QUITE_ANOTHER", "1"), ("WGKEX_CONFIG_FILE", "/f"), ("PATH", "/bin")];
    let config = Config::from_variables(&variables(&[&set[..], &others].concat()), "gw1").unwrap();
    let expected = [
        "MQTT_BROKER: is not a known variable and is ignored, did you mean MQTT_BROKER_URL?",
        "MQTT_PASWORD: is not a known variable and is ignored, did you mean MQTT_PASSWORD?",
        "WGKEX_DOMAIN: is not a known variable and is ignored, did you mean WGKEX_DOMAINS?",
    ];
    assert_eq!(texts(&config.warnings), expected);
}

#[test]
fn a_file_counts_alone_and_variables_stand_in_for_none() {
    let set = variables(&[("WGKEX_DOMAINS", "x_a"), ("WGKEX_DOMAIN_PREFIXES", "x_"), ("MQTT_PASSWORD", "hidden")]);
    let choose =
        |content, set: &_| Config::choose("/f", content, set, HostDefaults { host_name: "gw1", credential: None });
    let no_file = || Err(io::Error::from(io::ErrorKind::NotFound));
    let config = choose(Ok(LEAST.to_owned()), &set).unwrap();
    assert_eq!(config.domains.len(), 2);
    let warning = "/f: counts alone, these variables are ignored: WGKEX_DOMAIN_PREFIXES, WGKEX_DOMAINS, MQTT_PASSWORD";
    assert_eq!(texts(&config.warnings), [warning]);
    assert_eq!(choose(no_file(), &set).unwrap().domains.len(), 1);
    let error = choose(no_file(), &variables(&[("WGKEX_DOMAINS", "")])).unwrap_err().to_string();
    assert_eq!(
        error,
        "/f: does not exist; write it (wgkex.yaml.example shows how), name another file in WGKEX_CONFIG_FILE, or set \
         WGKEX_DOMAINS and WGKEX_DOMAIN_PREFIXES instead of a file"
    );
    let denied = Err(io::Error::from(io::ErrorKind::PermissionDenied));
    assert_eq!(choose(denied, &set).unwrap_err().to_string(), "/f: cannot be read: permission denied");
}

#[test]
fn a_credential_of_the_service_manager_is_the_password_unless_the_config_has_one() {
    let dir = tempfile::TempDir::new().unwrap();
    let credentials = variables(&[("CREDENTIALS_DIRECTORY", dir.path().to_str().unwrap())]);
    assert_eq!(password_credential(&credentials), None);
    std::fs::write(dir.path().join("mqtt-password"), "from-unit\n").unwrap();
    let file = password_credential(&credentials).unwrap();
    let machine = HostDefaults { host_name: "gw1", credential: Some(&file) };
    let password = |config: &Config| config.mqtt.credentials.as_ref().map(|of| of.password.expose().to_owned());
    let of_file = |more: &str| Config::of_file("/f", &format!("{LEAST}mqtt: {{{more}}}\n"), machine).unwrap();
    assert_eq!(password(&of_file("username: gw1")).as_deref(), Some("from-unit"));
    assert_eq!(password(&of_file("username: gw1, password: own")).as_deref(), Some("own"));
    let unused = of_file("");
    assert_eq!(password(&unused), None);
    assert_eq!(texts(&unused.warnings), ["/f: mqtt.password_file: is not used, as mqtt.username is not set"]);

    let set = [("WGKEX_DOMAINS", "x_a"), ("WGKEX_DOMAIN_PREFIXES", "x_"), ("MQTT_USERNAME", "gw1")];
    assert_eq!(password(&Config::of_variables(&variables(&set), machine).unwrap()).as_deref(), Some("from-unit"));
    let missing = variables(&[&set[..], &[("MQTT_PASSWORD_FILE", "/nonexistent")]].concat());
    let error = Config::of_variables(&missing, machine).unwrap_err();
    assert!(texts(&error.mistakes)[0].starts_with("MQTT_PASSWORD_FILE: /nonexistent: cannot be read: "), "{error}");
}

/// The example with every commented-out key enabled: "#key" is one, "# text" is prose.
fn everything_of_the_example() -> String {
    let line = |line: &str| match line.split_once('#') {
        Some((indent, key)) if indent.trim().is_empty() && !key.starts_with(' ') => format!("{indent}{key}\n"),
        _ => format!("{line}\n"),
    };
    EXAMPLE.lines().map(line).collect::<String>().replace("$argon2id$v=19$m=19456,t=2,p=1$...", hash!())
}

#[test]
fn the_example_documents_every_key_with_its_default() {
    let least = parse(LEAST).unwrap();
    assert_eq!(parse(EXAMPLE).unwrap(), least);

    let everything = everything_of_the_example();
    let mut config = parse(&everything).unwrap();
    assert_eq!(config.workers, BTreeMap::from([("gw01.example.org".parse().unwrap(), GatewayShare { weight: 1.0 })]));
    config.workers.clear();
    assert_eq!(config.servers, parse(&format!("{LEAST}servers: {{s1: {{network: 192.168.2.0/24}}}}")).unwrap().servers);
    config.servers.clear();
    let users = &mut config.mqtt_listen.as_mut().unwrap().users;
    assert_eq!(users.remove("gw01.example.org").unwrap().role, Role::Worker);
    assert!(std::mem::take(&mut config.is_setup_named));
    assert_eq!(config, least);

    let mut tree = yaml::parse(&everything, &mut Diagnostics::of_file("", "", keys::names())).unwrap();
    for path in keys::paths() {
        let named = |step: &String| match (step.as_str(), path.0[0].as_str()) {
            (raw::ANY, "workers" | "mqtt_listen") => "gw01.example.org".to_owned(),
            (raw::ANY, "servers") => "s1".to_owned(),
            (raw::ANY, _) => "ffmuc_welt".to_owned(),
            _ => step.clone(),
        };
        let path = diagnostics::Path(path.0.iter().map(named).collect());
        assert!(path.find(&mut tree).is_some(), "{path} is not documented");
    }
}

/// `text` with some characters removed, doubled or replaced, as by typing errors.
fn mistyped(text: &'static str) -> impl Strategy<Value = String> {
    let edit = (any::<prop::sample::Index>(), 0..4usize, "[ \t\n:#'\"{}\\[\\]|>&*!%@,a0-]");
    prop::collection::vec(edit, 1..6).prop_map(|edits| {
        let mut chars: Vec<char> = text.chars().collect();
        for (place, removed, inserted) in edits {
            let at = place.index(chars.len());
            let end = (at + removed).min(chars.len());
            chars.splice(at..end, inserted.chars());
        }
        chars.into_iter().collect()
    })
}

fn check_lines(result: Result<Config, ConfigError>) -> Result<(), TestCaseError> {
    let said = format!(
        "{result:?} {}",
        result.as_ref().map_or_else(ToString::to_string, |config| texts(&config.warnings).join("\n"))
    );
    prop_assert!(!said.contains("very-secret"), "{said}");
    prop_assert!(!said.contains("WduaW5nLWtleQ"), "{said}");
    if let Err(error) = result {
        prop_assert!(!error.mistakes.is_empty());
        let is_one_line = |line: &String| line.starts_with("/etc/wgkex.yaml: ") && !line.contains('\n');
        prop_assert!(texts(&error.mistakes).iter().all(is_one_line));
    }
    Ok(())
}

#[test]
fn a_secret_whose_colon_is_mistyped_is_not_shown() {
    for (right, mistyped) in [
        ("api_key: very-secret-token\nmqtt:", "api_key% very-secret-toke{mqtt:"),
        ("api_key: very-secret-token\nmqtt:", "api_key0very-secret-toke{mqtt:"),
        ("api_key: very-secret-token\nmqtt:", "api_key\tvery-secret-token mqtt:"),
        ("  keepalive: 5\n", "  keepalive: a\n   password very-secret-password\n"),
        ("  broker_port: \"8883\"\n", "  broker_port: a\n    password- 'very-secret-password'\n"),
    ] {
        assert!(ORIGINAL.contains(right), "{right}");
        check_lines(parse(&ORIGINAL.replace(right, mistyped))).unwrap();
    }
    // Text after the name of a secret that is part of another key, or in prose, is not secret.
    let others = "registry: {enabled: maybe, password_file: maybe}\n# the password of maybe\n";
    assert!(parse(&format!("{LEAST}{others}")).unwrap_err().to_string().contains("\"maybe\""));
}

proptest! {
    #[test]
    fn any_text_is_a_config_or_an_error(text in any::<String>()) {
        check_lines(parse(&text))?;
    }

    #[test]
    fn anything_that_looks_like_yaml_is_a_config_or_an_error(text in "([a-z_]{0,3}|[-?:,&*!|>'\"{}\\[\\]# \n]|domains: |mqtt: |0){0,40}") {
        check_lines(parse(&format!("{LEAST}{text}")))?;
        check_lines(parse(&text))?;
    }

    #[test]
    fn a_mistyped_file_shows_no_secret(text in mistyped(ORIGINAL)) {
        check_lines(parse(&text))?;
    }
}

#[test]
fn the_registry_needs_a_password_file_and_its_database_no_password() {
    let with = |yaml: &str| parse(&format!("{LEAST}{yaml}"));
    let config = with(
        "registry: {enabled: true, password_file: /p}\nstorage: postgres://u@h:5432/d\nstorage_password_file: /q\n",
    );
    let config = config.unwrap();
    let expected = RegistrySettings { user: "admin".into(), password_file: "/p".into(), open_client_config: false };
    assert_eq!(config.registry, Some(expected));
    assert_eq!(config.storage, Storage { url: Some("postgres://u@h:5432/d".into()), password_file: Some("/q".into()) });
    assert_eq!(with("registry: {enabled: false}").unwrap().registry, None);
    for (yaml, key) in [
        ("registry: {enabled: true}", "registry.password_file"),
        ("registry: {enabled: true, password_file: p}", "registry.password_file"),
        ("registry: {enabled: true, password_file: /p, user: \"a:b\"}", "registry.user"),
        ("registry: {enabled: maybe, password_file: /p}", "registry.enabled"),
        ("storage: mysql://u@h/d", "storage"),
        ("storage: postgres://u:secret@h/d", "storage"),
        ("storage: postgres://h/d", "storage"),
        ("storage: postgres://u@h", "storage"),
        ("storage: postgres://u@h:99999/d", "storage"),
        ("storage: postgres://u@h:port/d", "storage"),
        ("storage: postgres://u@h/d?sslmode=require", "storage"),
    ] {
        let error = with(yaml).unwrap_err().to_string();
        assert!(error.contains(key) && !error.contains("secret"), "{yaml}: {error}");
    }
}

#[test]
fn a_server_needs_a_network_and_an_interface() {
    let with = |yaml: &str| parse(&format!("{LEAST}servers: {{{yaml}}}"));
    let config = with(
        "s1: {network: 192.168.2.0/24}, long-name-of-server: {interface: wg1, listen_port: 51841, network: \"fd00::/64\", reserved: 20}",
    );
    let servers = config.unwrap().servers;
    let expected = ServerSettings {
        interface: "s1".into(),
        key_file: "/etc/wgkex/s1.key".into(),
        listen_port: 51840,
        network: "192.168.2.0/24".parse().unwrap(),
        reserved: 0,
        endpoint: None,
        allowed_ips: None,
    };
    assert_eq!(servers["s1"], expected);
    assert_eq!(
        (servers["long-name-of-server"].interface.as_str(), servers["long-name-of-server"].reserved),
        ("wg1", 20)
    );
    assert_eq!(first_of(servers["s1"].network).to_string(), "192.168.2.1");
    assert_eq!(first_of(servers["long-name-of-server"].network).to_string(), "fd00::1");
    for (yaml, key) in [
        ("s1: {}", "servers.s1.network"),
        ("s1: {network: 192.168.2.0/31}", "servers.s1.network"),
        ("long-name-of-server: {network: 192.168.2.0/24}", "servers.long-name-of-server.interface"),
        ("s1: {network: 192.168.2.0/24, interface: a/b}", "servers.s1.interface"),
        ("s1: {network: 192.168.2.0/24, reserved: -1}", "servers.s1.reserved"),
        ("s1: {network: 192.168.2.0/24, listen_port: 0}", "servers.s1.listen_port"),
    ] {
        let error = with(yaml).unwrap_err().to_string();
        assert!(error.contains(key), "{yaml}: {error}");
    }
}

#[test]
fn a_hub_has_the_networks_of_the_tenants_whether_they_are_served_here_or_not() {
    for (enabled, pool, expected) in [(true, "", "10.64.0.0/10"), (false, ", pool: 10.0.0.0/16", "10.0.0.0/16")] {
        let yaml = format!(
            "{LEAST}tenants: {{enabled: {enabled}{pool}, tenant_length: 24, hub: gw1}}\n\
             hub: {{enabled: true, endpoint: hub.example}}\nsetup: {{key_dir: /keys}}\n"
        );
        let config = parse(&yaml).unwrap();
        let hub = config.hub.unwrap();
        assert_eq!((hub.networks.pool, hub.networks.tenant_length), (vec![expected.parse().unwrap()], 24));
        assert_eq!((hub.listen_port, hub.endpoint.as_deref()), (51830, Some("hub.example")));
        assert_eq!(hub.key_file, Path::new("/keys/wg-hub.key"));
        assert_eq!(config.tenants.map(|tenants| tenants.hub.unwrap().to_string()), enabled.then(|| "gw1".into()));
    }
}

#[test]
fn a_pool_has_a_bounded_number_of_networks() {
    let pool = |count: usize| (0..count).map(|n| format!("10.0.{n}.0/24")).collect::<Vec<_>>().join(", ");
    let with = |count| parse(&format!("{LEAST}tenants: {{pool: [{}]}}", pool(count)));
    assert!(with(64).is_ok());
    assert!(with(65).unwrap_err().to_string().contains("tenants.pool: must be 64 networks at most"));
}
