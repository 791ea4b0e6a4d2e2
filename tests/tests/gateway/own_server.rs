//! Gateways on other machines, on the broker's own MQTT server.
//!
//! Fails with a worker that may publish on every topic (the key was in the kernels), and with a listener that accepts
//! other machines without TLS.

use std::fs;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::hash;
use wgkex_tests::{key, wait_until};

use crate::serves;

/// Each gateway has its own link to the broker, TLS, and its own password.
pub fn gateways_on_other_machines_use_tls_and_only_their_own_rights(lane: Lane) {
    let (hub, gw1, gw2) = (Host::new("hub", lane), Host::new("gw1", lane), Host::new("gw2", lane));
    let lines = [(&gw1, hub.connect(&gw1, 1)), (&gw2, hub.connect(&gw2, 2))];
    let ca = certify(&hub, lines.map(|(_, (server, _))| server.to_string()));
    let users = ["gw1", "gw2"].map(|name| format!("{name}: {{password_hash: \"{}\"}}", hash(name))).join(", ");
    hub.configure(&format!(
        "mqtt_listen: {{host: 0.0.0.0, tls: {{cert_file: /run/server.crt, key_file: /run/server.key}}, users: {{{users}}}}}\n"
    ));
    let _broker = hub.start_broker();
    let mut workers = Vec::new();
    for (name, (host, (server, address))) in ["gw1", "gw2"].into_iter().zip(lines) {
        fs::write(host.path("/run/ca.crt"), &ca).unwrap();
        host.configure(&format!(
            "mqtt: {{broker_url: {server}, tls: true, ca_file: /run/ca.crt, username: {name}, password: {name}}}\n\
             externalName: {address}\n"
        ));
        host.setup();
        workers.push(host.start_worker());
    }
    serves(&hub);
    wait_until("both gateways are online", || {
        (hub.metric(5000, r#"wgkex_broker_gateways{state="online"}"#)? == "2").then_some(())
    });

    // Without TLS messages from another machine are refused; with it, a worker has no rights of a broker.
    let ((_, (server, _)), rogue) = (lines[1], key(666));
    let say = |more: &str| {
        gw2.try_run(&format!(
            "mosquitto_pub -h {server} -p 1883 {more} -u gw2 -P gw2 -i gw2-rogue -q 1 -t wireguard/test_a/all -m {rogue}"
        ))
    };
    assert!(!say("").status.success());
    let refused = wait_until("the client is shown that was refused", || {
        let refused = hub.get(5000, "/status.json")?.json()["refused_clients"][0]["cause"].clone();
        refused.as_str().map(str::to_owned)
    });
    assert!(refused.starts_with("it does not use TLS"), "{refused}");
    let said = say("--cafile /run/ca.crt");
    assert!(said.status.success(), "{said:?}");
    for n in 0..10 {
        assert_eq!(hub.post(2, &key(n)).status, 200);
    }
    for host in [&gw1, &gw2] {
        let holds = |key: &str| host.tables("a").missing(key).is_empty();
        wait_until("the gateway has all keys", || (0..10).all(|n| holds(&key(n))).then_some(()));
        assert!(!host.wireguard("wg-a").contains(&rogue) && !holds(&rogue));
    }
    assert_eq!(hub.metric(5000, r#"wgkex_broker_mqtt_forbidden_total{verb="publish"}"#).as_deref(), Some("1"));
    assert_eq!(hub.metric(5000, r#"wgkex_broker_mqtt_forbidden_total{verb="subscribe"}"#).as_deref(), Some("0"));
}

/// Gives the host a certificate for these addresses; returns that of its issuer.
pub(crate) fn certify(host: &Host, addresses: [String; 2]) -> String {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "issuer");
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(addresses).unwrap().signed_by(&key, &ca).unwrap();
    fs::write(host.path("/run/server.crt"), certificate.pem()).unwrap();
    fs::write(host.path("/run/server.key"), key.serialize_pem()).unwrap();
    ca.pem()
}
