//! Output of the programs for others: no full key, and no address of a router. Fails with keys that are not shortened.

use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::http::ask;
use wgkex_tests::{key, wait_until};

use crate::Single;

pub fn no_key_and_no_routers_address_is_in_logs_metrics_page_or_retained_messages(lane: Lane) {
    const KEYS: u32 = 1_000;
    let single = Single::new(lane, "log_level: DEBUG\npeers: {unproven: 900}\n");
    let host = &single.host;
    let router = Host::new("router", lane);
    let (here, there) = host.connect(&router, 1);
    // Refused keys must not be logged either.
    let refused = [host.run("wg show wg-a public-key"), "x".repeat(44)];
    let bodies = (0..KEYS).map(key).chain(refused.clone()).map(|key| ask("test_a", &key));
    let version = |n: usize| if n.is_multiple_of(2) { "v1" } else { "v2" };
    let request = |(n, body)| {
        format!(
            "url = \"http://{here}:5000/api/{}/wg/key/exchange\"\ndata = {body:?}\noutput = /dev/null\n",
            version(n)
        )
    };
    let requests: Vec<_> = bodies.enumerate().map(request).collect();
    std::fs::write(router.path("/run/requests"), requests.join("next\n")).unwrap();
    router.run("curl -s --no-progress-meter -K /run/requests");
    let came = || host.metric(9586, r#"wgkex_worker_keys_received_total{domain="test_a"}"#)?.parse::<u32>().ok();
    wait_until("the keys came", || (came()? >= KEYS).then_some(()));

    let page = |port, path| host.get(port, path).unwrap().body;
    let retained = host.run("mosquitto_sub -v -t '#' --retained-only -W 3 || true");
    assert!(retained.contains("wgkex/worker/gateway/hello"), "{retained}");
    let said = [
        ("the broker's log", single.broker.log()),
        ("the worker's log", single.worker.log()),
        ("the broker's metrics", page(5000, "/metrics")),
        ("the worker's metrics", page(9586, "/metrics")),
        ("the page", page(5000, "/")),
        ("retained messages", retained.lines().filter(|line| !line.contains("/data ")).collect::<Vec<_>>().join("\n")),
    ];
    for (what, text) in said {
        assert!(!text.is_empty(), "{what}");
        for key in (0..KEYS).map(key).chain(refused.clone()) {
            assert!(!text.contains(&key), "{what}: {key}");
        }
        assert!(!text.contains(&there.to_string()), "{what}: {there}");
    }
}
