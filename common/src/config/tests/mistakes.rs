//! Tables of operators' mistakes, with the exact lines that report them.

use super::*;

/// The text after [`LEAST`], and the lines that reject it.
const MISTAKES: &[(&str, &[&str])] = &[
    (
        "tenants: {pool: 10.0.0.1}",
        &["tenants.pool: must be a network such as 10.64.0.0/10, or a list of them, not \"10.0.0.1\""],
    ),
    (
        "tenants: {pool: [10.0.0.0/8, 10.1.0.0/16]}",
        &["tenants.pool: must be apart from the others, such as 10.0.0.0/8, not \"10.1.0.0/16\""],
    ),
    (
        "tenants: {pool: [10.0.0.0/8, 'fd00::/48']}",
        &["tenants.pool: must be of the family of the others, either IPv4 or IPv6, not \"fd00::/48\""],
    ),
    (
        "tenants: {pool: 10.0.0.0/29}",
        &["tenants.pool: must be a network with a prefix length of at most 28, not \"10.0.0.0/29\""],
    ),
    ("tenants: {tenant_length: 29}", &["tenants.tenant_length: must be a number from 8 to 28, not 29"]),
    (
        "tenants: {tenant_length: /20}",
        &["tenants.tenant_length: must be a number from 8 to 28 (IPv6: 124), not \"/20\""],
    ),
    ("tenants: {hub: gw/1}", &["tenants.hub: must be the host name of a worker without \"/\", \"+\" and \"#\""]),
    (
        "hub: {interface: wg hub}",
        &["hub.interface: must be the name of an interface: 1 to 15 characters, without blanks and \"/\""],
    ),
    (
        "hub: {enabled: true, interface: s1, listen_port: 51840}\nservers: {s1: {network: 10.0.0.0/24}}",
        &[
            "hub.interface: must be another interface than s1, which is that of server s1",
            "hub.listen_port: must be another port than 51840, which is that of server s1",
        ],
    ),
    (
        "servers: {a: {network: 10.0.0.0/8, listen_port: 51820}, b: {network: 10.1.0.0/16, interface: a}}",
        &[
            "servers.a.listen_port: must be another port than 51820, which is that of ffmuc_welt",
            "servers.b.interface: must be another interface than a, which is that of server a",
            "servers.b.network: must be apart from that of server a",
        ],
    ),
    (
        "servers: {a: {network: 10.0.0.1/8}}",
        &["servers.a.network: must have no bits behind its length, as 10.0.0.0/8, not \"10.0.0.1/8\""],
    ),
    (
        "tenants: {pool: 10.64.0.0/9}",
        &["tenants.pool: must have no bits behind its length, as 10.0.0.0/9, not \"10.64.0.0/9\""],
    ),
    ("tenants: {grace: -1}", &["tenants.grace: must be a number of seconds from 0 (off) to 1000000, not -1"]),
    ("mqtt: {broker_port: abc}", &["mqtt.broker_port: must be a number from 1 to 65535, not \"abc\""]),
    ("mqtt: {broker_port: 0}", &["mqtt.broker_port: must be a number from 1 to 65535, not 0"]),
    ("mqtt: {broker_port: 70000}", &["mqtt.broker_port: must be a number from 1 to 65535, not 70000"]),
    ("mqtt: {broker_port: -1}", &["mqtt.broker_port: must be a number from 1 to 65535, not -1"]),
    ("mqtt: {broker_port: [1]}", &["mqtt.broker_port: must be a number from 1 to 65535, not a list"]),
    (
        "mqtt: {broker_url: 'mqtt://example.org'}",
        &[
            "mqtt.broker_url: must be a host name or an address (no scheme, no path; a port has its own key), not \"mqtt://example.org\"",
        ],
    ),
    (
        "mqtt: {broker_url: 'example.org:1883'}",
        &[
            "mqtt.broker_url: must be a host name or an address (no scheme, no path; a port has its own key), not \"example.org:1883\"",
        ],
    ),
    (
        "mqtt: {broker_url: 'user:pw@example.org'}",
        &["mqtt.broker_url: must be a host name or an address (no scheme, no path; a port has its own key)"],
    ),
    ("mqtt: {keepalive: -1}", &["mqtt.keepalive: must be a whole number of seconds from 0 to 65535, not -1"]),
    ("mqtt: {keepalive: 70000}", &["mqtt.keepalive: must be a whole number of seconds from 0 to 65535, not 70000"]),
    ("mqtt: {broker_url: a, tls: on, cert_file: /a}", &["mqtt.key_file: must be set, as mqtt.cert_file is"]),
    ("mqtt: {ca_file: ca.pem}", &["mqtt.ca_file: must be the absolute path of a file, not \"ca.pem\""]),
    (
        "mqtt_listen: {users: {gw01: secr3t}}",
        &[
            "mqtt_listen.users.gw01: must be a mapping (keys: password_hash, role)",
            "mqtt_listen.users.gw01.password_hash: must be set, to what \"wgkex-broker hash-password\" prints",
        ],
    ),
    (
        "broker_listen: 127.0.0.1:1883",
        &["mqtt_listen: must be another address or port than that of broker_listen, not \"127.0.0.1:1883\""],
    ),
    (
        "broker_listen: \"[::]:9586\"\nmqtt: {broker_url: a}",
        &["worker_listen: must be another address or port than that of broker_listen, not \"127.0.0.1:9586\""],
    ),
    ("mqtt: {tls: maybe}", &["mqtt.tls: must be true or false, not \"maybe\""]),
    ("mqtt: {password: 12345}", &["mqtt.password: must be a text (a number needs quotes around it)"]),
    ("mqtt: {password: [secret]}", &["mqtt.password: must be a text (a number needs quotes around it)"]),
    (
        "mqtt: mqtt.example.org",
        &[
            "mqtt: must be a mapping (keys: broker_port, broker_url, ca_file, cert_file, keepalive, key_file, password, password_file, tls, username), not \"mqtt.example.org\"",
        ],
    ),
    (
        "mqtt: [{password: secret}]",
        &[
            "mqtt: must be a mapping (keys: broker_port, broker_url, ca_file, cert_file, keepalive, key_file, password, password_file, tls, username), not a list",
        ],
    ),
    ("workers: [gw1]", &["workers: must be a mapping (keys: a name), not a list"]),
    ("workers: {gw1: {weight: -1}}", &["workers.gw1.weight: must be a number from 0 to 1000000000, not -1"]),
    (
        "workers: {gw1.example.org: {weight: 1e999}}",
        &["workers.gw1.example.org.weight: must be a number from 0 to 1000000000, not \"inf\""],
    ),
    ("workers: {gw1: {id: one}}", &["workers.gw1.id: must be a whole number, not \"one\""]),
    (
        "externalName: 12",
        &["externalName: must be a host name or an address (no scheme, no port, no path, no blanks), not 12"],
    ),
    (
        "externalName: 'http://gw01.example.org/'",
        &[
            "externalName: must be a host name or an address (no scheme, no port, no path, no blanks), not \"http://gw01.example.org/\"",
        ],
    ),
    (
        "externalName: gw01.example.org:51820",
        &[
            "externalName: must be a host name or an address (no scheme, no port, no path, no blanks), not \"gw01.example.org:51820\"",
        ],
    ),
    (
        "externalName: gw 01",
        &["externalName: must be a host name or an address (no scheme, no port, no path, no blanks), not \"gw 01\""],
    ),
    (
        "mqtt: {username: gw1, password: '...'}",
        &["mqtt.password: must be the password of mqtt.username, not that of an example"],
    ),
    (
        "mqtt: {username: gw1, password: PASSWORD OF GW01}",
        &["mqtt.password: must be the password of mqtt.username, not that of an example"],
    ),
    (
        "mqtt_listen: {users: {gw1: {password_hash: $argon2id$...}, gw2: {password_hash: '$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHQ$9sTb'}}}",
        &[
            "mqtt_listen.users.gw1.password_hash: must be what \"wgkex-broker hash-password\" prints, all of it",
            "mqtt_listen.users.gw2.password_hash: must be what \"wgkex-broker hash-password\" prints, all of it",
        ],
    ),
    ("cleanup: {interval: 0}", &["cleanup.interval: must be a number of seconds from 0.001 to 1000000000, not 0"]),
    (
        "cleanup: {legacy_stale_timeout: 3h}",
        &["cleanup.legacy_stale_timeout: must be a number of seconds from 0.001 to 1000000000, not \"3h\""],
    ),
    ("parker: {enabled: yes}", &["parker.enabled: must be false, as this version does not support routed networks"]),
    ("parker: {ipam: excel}", &["parker.ipam: must be json or netbox, not \"excel\""]),
    (
        "parker: {prefixes: {ipv6: {length: 129}}}",
        &["parker.prefixes.ipv6.length: must be a number from 0 to 128, not 129"],
    ),
    ("broker_listen: '127.0.0.1:http'", &["broker_listen.port: must be a number from 1 to 65535, not \"http\""]),
    ("broker_listen: 5000", &["broker_listen: must be a mapping (keys: host, port, tls), not 5000"]),
    (
        "worker_listen: {host: 'a b'}",
        &[
            "worker_listen.host: must be a host name or an address (no scheme, no path; a port has its own key), not \"a b\"",
        ],
    ),
    (
        "mqtt_listen: {host: 0.0.0.0}",
        &[
            "mqtt_listen.host: must be a loopback address such as 127.0.0.1 (another only with mqtt_listen.users, as without them everybody may publish everything), not \"0.0.0.0\"",
        ],
    ),
    (
        "mqtt_listen: {host: mqtt.example.org, tls: {cert_file: /c}, max_connections: 1}",
        &[
            "mqtt_listen.max_connections: must be a whole number from 10 to 1000000, not 1",
            "mqtt_listen.tls.key_file: must be set, as mqtt_listen.tls.cert_file is",
            "mqtt_listen.host: must be an address such as 127.0.0.1 or \"::\", not \"mqtt.example.org\"",
        ],
    ),
    (
        concat!(
            "mqtt_listen: {users: {gw1: {role: worker}, gw2: {password_hash: very-secret}, gw3: {password_hash: '",
            hash!(),
            "', role: root}, a/b: {password_hash: '",
            hash!(),
            "'}}}"
        ),
        &[
            "mqtt_listen.users.gw2.password_hash: must be what \"wgkex-broker hash-password\" prints, all of it",
            "mqtt_listen.users.gw3.role: must be worker or broker, not \"root\"",
            "mqtt_listen.users.a/b: must be a user name without \"/\", \"+\" and \"#\"",
            "mqtt_listen.users.gw1.password_hash: must be set, to what \"wgkex-broker hash-password\" prints",
        ],
    ),
    ("log_level: LOUD", &["log_level: must be DEBUG, INFO, WARNING, ERROR or CRITICAL, not \"LOUD\""]),
    (
        "logging_config: {root: {level: LOUD}}",
        &["logging_config.root.level: must be DEBUG, INFO, WARNING, ERROR or CRITICAL, not \"LOUD\""],
    ),
    (
        "broker_listen: {tls: {cert_file: /c}}",
        &["broker_listen.tls.key_file: must be set, as broker_listen.tls.cert_file is"],
    ),
    (
        "broker_listen: {tls: {port: 5000, cert_file: /c, key_file: /k}}",
        &["broker_listen.tls.port: must be another port than that of broker_listen, not 5000"],
    ),
    (
        "trusted_proxies: [proxy.example.org]",
        &["trusted_proxies[0]: must be an address, or a network such as 192.0.2.0/24, not \"proxy.example.org\""],
    ),
    (
        "limits: {per_client: {burst: -1, per_second: 0}}",
        &[
            "limits.per_client.burst: must be a whole number from 0 (no limit) to 1000000, not -1",
            "limits.per_client.per_second: must be a number from 0.001 to 1000000, not 0",
        ],
    ),
    ("limits: {global: 500}", &["limits.global: must be a mapping (keys: burst, per_second), not 500"]),
    ("state_dir: state", &["state_dir: must be the absolute path of a directory, not \"state\""]),
    (
        "live_keys: {max: 0, ttl: never}",
        &[
            "live_keys.max: must be a whole number from 1 to 100000000, not 0",
            "live_keys.ttl: must be a number of seconds from 0.001 to 1000000000, not \"never\"",
        ],
    ),
    ("confirm_timeout: 5", &["confirm_timeout: must be at most 3, as confirm_budget is, not 5.0"]),
    (
        "key_whitelist: [abc]",
        &["key_whitelist[0]: must be a WireGuard public key, 44 characters of base64, not \"abc\""],
    ),
    ("key_lists: {deny_dir: keys}", &["key_lists.deny_dir: must be the absolute path of a directory, not \"keys\""]),
    (
        "admin_token_hash: abc",
        &[
            "admin_token_hash: must be a SHA-256 hash, 64 hexadecimal digits (\"wgkex-broker admin-token\" makes a token and its hash)",
        ],
    ),
    ("setup: {key_dir: keys}", &["setup.key_dir: must be the absolute path of a directory, not \"keys\""]),
    ("setup: {vxlan_id: 16777216}", &["setup.vxlan_id: must be a number from 1 to 16777215, not 16777216"]),
    ("setup: {domains: {ffmuc_wlet: {vxlan_id: 5}}}", &["setup.domains.ffmuc_wlet: must be one of domains"]),
    (
        "setup: {domains: {ffmuc_umland: {listen_port: 51820}}}",
        &["setup.domains.ffmuc_umland.listen_port: must be another port than 51820, which is that of ffmuc_welt"],
    ),
    (
        "setup: {listen_port: 8471}",
        &["setup.domains.ffmuc_umland.listen_port: must be another port than 8472, which is a vxlan_port"],
    ),
    (
        "setup: {listen_port: 65535}",
        &["setup.listen_port: must be lower, as it counts up to 65536 for ffmuc_umland, and 65535 is the last port"],
    ),
    (
        "mqtt: {broker_port: abc, tls: maybe}\nconfirm_budget: no",
        &[
            "confirm_budget: must be a number of seconds from 0.001 to 1000000000, not \"no\"",
            "mqtt.broker_port: must be a number from 1 to 65535, not \"abc\"",
            "mqtt.tls: must be true or false, not \"maybe\"",
        ],
    ),
    (
        "workers: {'+': {}, a/b: ~, '': {weight: 1}, gw1: {}}",
        &[
            "workers.: must be a host name without \"/\", \"+\" and \"#\"",
            "workers.+: must be a host name without \"/\", \"+\" and \"#\"",
            "workers.a/b: must be a host name without \"/\", \"+\" and \"#\"",
        ],
    ),
    ("log_level: INFO\n\0\0\0", &["line 4: must not have a NUL byte, as a file has that was not wholly written"]),
    ("logging_config: &a {a: *a}", &["line 3: must not have an alias for what it stands in itself"]),
    ("mqtt:\n\ttls: yes", &["line 4: must begin with spaces, not with a tab"]),
    ("setup:\n  key_dir: /a\n\tlisten_port: 1\nlog_level: INFO", &["line 5: must begin with spaces, not with a tab"]),
    (
        "logging_config:\n  text: |\n    x\n\n    \ty\nmqtt: {tls: yes",
        &["line 8: is not YAML: while parsing a flow mapping, did not find expected ',' or '}'"],
    ),
    (
        "#\tan old line\n\t# and one more\nlog_level:DEBUG\ntenants: {}",
        &["line 5: is not YAML: a key lacks the colon behind it, or the space behind that"],
    ),
    (
        "mqtt:\n  username: x\n  password: ab: cd",
        &["line 5: is not YAML: a value with a colon at its end, or before a space, needs quotes around it"],
    ),
    (
        "mqtt:\n  password: abcd: # of gw1",
        &["line 4: is not YAML: a value with a colon at its end, or before a space, needs quotes around it"],
    ),
    ("mqtt\n\n  broker_url: x", &["line 3: is not YAML: a key lacks the colon behind it, or the space behind that"]),
    (
        "log_level:DEBUG\ntenants: {}",
        &["line 3: is not YAML: a key lacks the colon behind it, or the space behind that"],
    ),
    (
        "mqtt_listen:\n  host: \"::\"\n   port: 1883",
        &[
            "line 5: is not YAML: this line begins in column 4, and the one before in column 3: the keys of one block begin \
             in the same column, and those below a key further right",
        ],
    ),
    (
        "mqtt_listen:\n  host: \"::\"\n port: 1883",
        &[
            "line 5: is not YAML: this line begins in column 2, and the one before in column 3: the keys of one block begin \
             in the same column, and those below a key further right",
        ],
    ),
    (
        "setup:\n  listen_port: 1\n    vxlan_id: 99",
        &[
            "line 5: is not YAML: this line begins in column 5, and the one before in column 3: the keys of one block begin \
             in the same column, and those below a key further right",
        ],
    ),
    ("mqtt: {tls: yes", &["line 3: is not YAML: while parsing a flow mapping, did not find expected ',' or '}'"]),
    (
        "mqtt: {password: .inf}",
        &["line 3: must not have a value that is no number and no text, such as .inf or .nan; quotes make it a text"],
    ),
    ("? [a, b]\n: c", &["line 3: must have a text as each key, and has a list, a mapping or nothing"]),
    ("---\nmqtt: ~", &["line 3: must have one document only (no second line \"---\")"]),
];

#[test]
fn each_mistake_is_one_line_with_the_allowed_values() {
    for (yaml, expected) in MISTAKES {
        assert_eq!(mistakes(yaml), *expected, "{yaml}");
    }
}

#[test]
fn a_file_without_domains_is_refused() {
    let empty = "must have domains and domain_prefixes at least, and is empty";
    let no_domains = "domains: must be a list with at least one entry";
    let no_prefixes = "domain_prefixes: must be a list with at least one entry";
    let cases: &[(&str, &[&str])] = &[
        ("", &[empty]),
        ("# nothing\n", &[empty]),
        ("---\n", &[empty]),
        ("{}", &[empty]),
        ("wgkex", &["must be a mapping, with keys such as \"domains:\" at its top"]),
        ("- domains\n", &["must be a mapping, with keys such as \"domains:\" at its top"]),
        ("log_level: INFO\n", &[no_domains, no_prefixes]),
        ("domains: [ffmuc_welt]\n", &[no_prefixes]),
        ("domains:\ndomain_prefixes: [ffmuc_]\n", &[no_domains]),
        (
            "domains: ffmuc_welt\ndomain_prefixes: [ffmuc_]\n",
            &["domains: must be a list, lines that begin with \"- \", not \"ffmuc_welt\""],
        ),
        (
            "domains:\n-\ndomain_prefixes: [ffmuc_]\n",
            &["domains[0]: must be an entry, a value behind \"- \", not nothing"],
        ),
        (
            "domains: [12, ffmuc_a]\ndomain_prefixes: [ffmuc_]\n",
            &["domains[0]: must be a text (a number needs quotes around it), not 12"],
        ),
        (
            "domains: [ffmuc_1234567890123]\ndomain_prefixes: [ffmuc_]\n",
            &[
                "domains[0]: \"ffmuc_1234567890123\" gives the interface name \"wg-1234567890123\": 1 to 12 characters without \"/\", \":\" or spaces may follow \"wg-\"",
            ],
        ),
        (
            "domains: [ffmuc_x, welt]\ndomain_prefixes: [ffmcu_]\n",
            &["domains: must have at least one that begins with one of domain_prefixes"],
        ),
        (
            "domains: [ffmuc_x, ffdon_x]\ndomain_prefixes: [ffmuc_, ffdon_]\n",
            &["domains[1]: \"ffdon_x\" would have the interface wg-x of \"ffmuc_x\", each domain needs its own"],
        ),
    ];
    for (yaml, expected) in cases {
        assert_eq!(lines(parse(yaml).unwrap_err()), *expected, "{yaml}");
    }
}

#[test]
fn odd_but_harmless_settings_are_warnings() {
    let cases: &[(&str, &[&str])] = &[
        ("broker_listn: 1", &["broker_listn: is not a known key and is ignored, did you mean broker_listen?"]),
        ("mqtt: {pasword: x}", &["mqtt.pasword: is not a known key and is ignored, did you mean mqtt.password?"]),
        (
            "broker_url: x",
            &[
                "broker_url: is not a known key and is ignored, did you mean mqtt.broker_url? It belongs below mqtt, with spaces before it",
            ],
        ),
        ("trusted_proxy: []", &["trusted_proxy: is not a known key and is ignored, did you mean trusted_proxies?"]),
        (
            "cleanup: {stale_timeout: 9}",
            &["cleanup.stale_timeout: is not a known key and is ignored, did you mean cleanup.legacy_stale_timeout?"],
        ),
        (
            "pasword_hash: x",
            &[
                "pasword_hash: is not a known key and is ignored, did you mean mqtt_listen.users.NAME.password_hash? \"wgkex-broker hash-password\" prints what it must be",
            ],
        ),
        (
            "users: {}",
            &[
                "users: is not a known key and is ignored, did you mean mqtt_listen.users? It belongs below mqtt_listen, with spaces before it",
            ],
        ),
        // Several blocks have such a key: the empty one is suggested, or none.
        (
            "registry:\nenabled: false",
            &[
                "enabled: is not a known key and is ignored, did you mean registry.enabled? It belongs below registry, with spaces before it",
            ],
        ),
        (
            "broker_listen:\nhost: 127.0.0.1",
            &[
                "host: is not a known key and is ignored, did you mean broker_listen.host? It belongs below broker_listen, with spaces before it",
            ],
        ),
        ("enabled: true", &["enabled: is not a known key and is ignored"]),
        ("mqtt: {port: 1}", &["mqtt.port: is not a known key and is ignored, did you mean mqtt.broker_port?"]),
        ("external_name: x", &["external_name: is not a known key and is ignored, did you mean externalName?"]),
        (
            "workers: {gw1: {wieght: 2}}",
            &["workers.gw1.wieght: is not a known key and is ignored, did you mean workers.gw1.weight?"],
        ),
        ("\"two\\nlines\": 1", &["two\\nlines: is not a known key and is ignored"]),
        ("colour: red", &["colour: is not a known key and is ignored"]),
        ("mqtt: {tls: on}", &["mqtt.tls: is not used, as mqtt.broker_url is not set"]),
        ("mqtt: {broker_url: a, ca_file: /ca}", &["mqtt.ca_file: is not used, as mqtt.tls is not true"]),
        ("mqtt: {broker_port: 8883}", &["mqtt.broker_port: is not used, as mqtt.broker_url is not set"]),
        (
            "mqtt: {broker_url: x}\nmqtt_listen: {port: 1}",
            &["mqtt_listen: is not used, as mqtt.broker_url names another server"],
        ),
        (
            "broker_listen: {tls: {port: 443}}",
            &["broker_listen.tls.port: is not used, as broker_listen.tls.cert_file is not set"],
        ),
        (
            concat!("mqtt_listen: {host: '::', users: {gw1: {password_hash: '", hash!(), "'}}}"),
            &["mqtt_listen: passwords and keys are not encrypted, as mqtt_listen.tls is not set"],
        ),
        ("mqtt: {username: x}", &["mqtt.username: is not used, as mqtt.password is not set"]),
        ("mqtt: {password: x}", &["mqtt.password: is not used, as mqtt.username is not set"]),
        (
            "allowlist: {enabled: on}",
            &[
                "allowlist.enabled: is true, but neither allowlist.file nor key_lists.allow_dir is set: only keys that are allowed by an admin call may come",
            ],
        ),
        ("allowlist: {file: x}", &["allowlist.file: is not used, as allowlist.enabled is not true"]),
        ("key_lists: {allow_dir: /x}", &["key_lists.allow_dir: is not used, as allowlist.enabled is not true"]),
        ("allowlist: {enabled: on, file: x}\nblacklist_file: y\nkey_lists: {deny_dir: /x, trusted_dir: /y}", &[]),
        ("logging_config: {anything: {goes: [here]}}", &[]),
        (
            "mqtt: {tls: yes}\nlog_level: INFO\n'mqtt':\n  tls: no\n",
            &["mqtt: is given twice in one mapping (line 5), the last one counts"],
        ),
        (
            "logging_config: {a: [0, {b: {c: 1, \"c\": 2, c: 3}}]}",
            &[
                "logging_config.a[1].b.c: is given twice in one mapping (line 3), the last one counts",
                "logging_config.a[1].b.c: is given twice in one mapping (line 3), the last one counts",
            ],
        ),
        ("parker: {prefixes: {ipv4: {netbox_filter: x, netbox_additional_data: {a: {b: 1}}}}}", &[]),
    ];
    for (yaml, expected) in cases {
        let expected: Vec<String> = expected.iter().map(|line| format!("/etc/wgkex.yaml: {line}")).collect();
        assert_eq!(texts(&parse(&format!("{LEAST}{yaml}")).unwrap().warnings), expected, "{yaml}");
    }
}

#[test]
fn a_secret_inside_another_value_or_key_is_not_shown() {
    let cases = [
        ("log_level: \"x\n  password: very-secret\"", "log_level: must be DEBUG"),
        ("\"x password: very-secret\": {}", "?: is not a known key and is ignored"),
        (
            "workers: {very-secret: {weight: x}}\nnetbox: {api_key: very-secret}",
            "workers.?.weight: must be a number from 0 to 1000000000, not \"x\"",
        ),
        (
            "workers: {very-secret: {}, very-secret: {}} # password: very-secret",
            "workers.?: is given twice in one mapping (line 3)",
        ),
        ("mqtt: {password: very-secret, broker_url: 'very-secret/'}", "mqtt.broker_url: must be a host name"),
        ("mqtt: {password: \"very\\x2dsecret\", broker_url: 'very-secret/'}", "mqtt.broker_url: must be a host name"),
        ("mqtt: {password: 4711, broker_port: 471100}", "mqtt.broker_port: must be a number"),
        (
            "mqtt: {broker_port: {password: very-secret}}",
            "mqtt.broker_port: must be a number from 1 to 65535, not a mapping",
        ),
        (
            "setup: {domains: {very-secret: {}}}\nbroker_signing_key: very-secret",
            "setup.domains.?: must be one of domains",
        ),
    ];
    for (yaml, expected) in cases {
        let result = parse(&format!("{LEAST}{yaml}"));
        let lines = result.map_or_else(|error| texts(&error.mistakes), |config| texts(&config.warnings));
        assert!(lines.iter().any(|line| line.starts_with(&format!("/etc/wgkex.yaml: {expected}"))), "{lines:?}");
        assert!(!lines.concat().contains("very-secret"), "{lines:?}");
    }
    let yaml = "domains: [very-secret-and-long]\ndomain_prefixes: [very-]\nmqtt: {username: x, password: very-secret}";
    assert_eq!(lines(parse(yaml).unwrap_err()), ["domains[0]: the value cannot be a domain"]);
}

#[test]
fn text_of_any_size_and_depth_is_parsed_or_refused() {
    let deep = |open: &str, levels| format!("logging_config: {}", open.repeat(levels));
    let steps = |levels: usize| (0..levels).map(|level| " ".repeat(level) + "a:\n").collect::<String>();
    for yaml in
        [deep("[", 100_000), deep("{a: ", 100_000), deep("[a: ", 250), steps(190), steps(1000), "a: ".repeat(9999)]
    {
        let _ = parse(&yaml);
    }
    for (text, levels) in [("- ".repeat(100_000), 200), (format!("a: {}", "[".repeat(201)), 200)] {
        let said = format!("line 1: must not open more than {levels} levels");
        assert_eq!(lines(parse(&text).unwrap_err()), [said]);
    }
    let nested: Vec<_> = (1..150).map(|n| format!("a{n}: &a{n} [[*a{}]]", n - 1)).collect();
    let nested = lines(parse(&format!("a0: &a0 []\n{}", nested.join("\n"))).unwrap_err());
    assert!(nested[0].ends_with("must not open more than 200 levels"), "{nested:?}");
    let wide: Vec<_> = (1..9).map(|n| format!("b{n}: &b{n} [{}]", vec![format!("*b{}", n - 1); 9].join(","))).collect();
    let wide = lines(parse(&format!("b0: &b0 [x,x,x,x,x,x,x,x,x]\n{}", wide.join("\n"))).unwrap_err());
    assert_eq!(wide, ["line 5: must not have aliases that stand for more than 4194304 bytes"]);
    let long = format!("# {}", "x".repeat(1 << 20));
    assert_eq!(lines(parse(&long).unwrap_err()), ["must have at most 1048576 bytes, not 1048578"]);
    let wrong = format!("domains: [{}]\ndomain_prefixes: [x_]", "1, ".repeat(1000));
    assert_eq!(parse(&wrong).unwrap_err().mistakes.len(), 50);
}

/// The errors of `yaml`, after [`LEAST`], without the file's name.
fn mistakes(yaml: &str) -> Vec<String> {
    lines(parse(&format!("{LEAST}{yaml}")).unwrap_err())
}

/// Without the file's name; those about the whole file with their line.
fn lines(error: ConfigError) -> Vec<String> {
    let shown = |problem: ConfigProblem| match problem {
        ConfigProblem { key: None, line: Some(line), problem, .. } => format!("line {line}: {problem}"),
        other => ConfigProblem { file: None, line: None, ..other }.to_string(),
    };
    error.mistakes.into_iter().map(shown).collect()
}

#[test]
fn each_problem_has_the_line_of_its_key() {
    let yaml = "domains: [x_a]\ndomain_prefixes:\n  - x_\n  - [1]\nmqtt:\n  # a comment\n  broker_port: abc\n  tls: on\n  \
                cert_file: /a\nbroker_listen: 127.0.0.1:0\nworkers:\n  gw1: {weight: x}\n  gw1: {weigt: 1}\nlog_levl: INFO\n";
    let error = Config::parse("f", yaml, "gw1").unwrap_err();
    let place = |problem: &ConfigProblem| (problem.line.unwrap(), problem.key.clone().unwrap());
    let mut places: Vec<_> = error.mistakes.iter().chain(&error.warnings).map(place).collect();
    places.sort_unstable();
    let expected = [
        (4, "domain_prefixes[1]"),
        (5, "mqtt.key_file"),
        (7, "mqtt.broker_port"),
        (8, "mqtt.tls"),
        (10, "broker_listen.port"),
        (13, "workers.gw1"),
        (13, "workers.gw1.weigt"),
        (14, "log_levl"),
    ];
    assert_eq!(places, expected.map(|(line, key)| (line, key.to_owned())));
    assert!(
        error.to_string().contains("f:7: mqtt.broker_port: must be a number from 1 to 65535, not \"abc\""),
        "{error}"
    );
    let error = Config::parse("f", "domains: [x_a\nmqtt: {}\n", "gw1").unwrap_err();
    assert!(error.to_string().starts_with("f:2: is not YAML"), "{error}");
    let error = parse(&format!("{LEAST}mqtt_listen: {{users: {{gw1: {{pasword_hash: x}}}}}}")).unwrap_err();
    assert!(error.warnings[0].to_string().contains("did you mean mqtt_listen.users.gw1.password_hash?"), "{error:?}");
    let error = parse(&format!("{LEAST}mqtt_listen:\n  users:\n    gw1: {{password: x}}")).unwrap_err();
    let expected = "/etc/wgkex.yaml:5: mqtt_listen.users.gw1.password: is not a known key and is ignored, did you mean \
                    mqtt_listen.users.gw1.password_hash? \"wgkex-broker hash-password\" prints what it must be";
    assert_eq!(error.warnings[0].to_string(), expected);
}
