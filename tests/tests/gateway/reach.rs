//! Routers that cannot connect to the gateway that they got.

use std::thread::sleep;
use std::time::{Duration, Instant};

use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::binary;
use wgkex_tests::{DEADLINE, wait_until, wait_within};

use crate::Single;
use crate::peers::ping;

/// A router without a handshake for so long is no longer expected.
const PATIENCE: Duration = Duration::from_secs(300);
/// A handshake is reported at the next read of the tables: after 45 s.
const TABLE_READ: Duration = DEADLINE.saturating_add(Duration::from_secs(45));

#[test]
#[ignore = "needs WireGuard in the kernel, and takes five minutes: tests/run vm"]
fn vm_a_gateway_whose_udp_port_is_blocked_is_named() {
    let Single { broker, host, worker: _worker } = Single::new(Lane::Kernel, "");
    let router = Host::new("router", Lane::Kernel);
    let (address, _) = host.connect(&router, 1);
    host.run("iptables -A INPUT -p udp --dport 51820 -j DROP");
    let key = router.run("umask 077 && wg genkey > /run/key && wg pubkey < /run/key");
    let post = || assert_eq!(host.post(2, &key).status, 200);
    post();
    let given = Instant::now();
    let _ = router.tunnel_to(&host, address);

    let cause = "gateway gateway: 1 of 1 routers that were given it have no handshake there after 5 minutes: is its UDP port \
                 blocked";
    while given.elapsed() < PATIENCE {
        assert!(!broker.log().contains(cause), "not yet: {}", broker.log());
        sleep(Duration::from_secs(30));
        assert!(!ping(&router, &host));
        post();
    }
    let unreached = r#"wgkex_broker_gateway_routers{gateway="gateway",state="unreached"}"#;
    wait_until("it is counted", || (host.metric(5000, unreached)? == "1").then_some(()));
    broker.wait_for_log(cause);
    let page = host.get(5000, "/").unwrap().body;
    assert!(page.contains(cause), "{page}");
    let doctor = host.try_run(&format!("{} --config /run/wgkex.yaml doctor", binary("wgkex-broker").display()));
    let doctor = String::from_utf8_lossy(&doctor.stdout);
    assert!(doctor.contains(cause) && doctor.contains("open its UDP port in each firewall"), "{doctor}");

    host.run("iptables -D INPUT -p udp --dport 51820 -j DROP");
    wait_until("the router gets through", || ping(&router, &host).then_some(()));
    wait_within(TABLE_READ, "it is reached", || (host.metric(5000, unreached)? == "0").then_some(()));
    assert!(!host.get(5000, "/").unwrap().body.contains(cause));
}
