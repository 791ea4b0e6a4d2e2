//! Wrong passwords beyond the limit.

use std::iter::repeat_with;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use wgkex_tests::http::Response;
use wgkex_tests::wait_until;

use crate::registry_broker::{LOGIN, RegistryBroker, Store};

/// A wrong password, another one at each call.
fn wrong() -> String {
    static USED: AtomicU32 = AtomicU32::new(0);
    // `admin:`, and three bytes.
    format!("Authorization: Basic YWRtaW46{:04}", USED.fetch_add(1, Ordering::Relaxed))
}
const REFUSED: &str = "wgkex_broker_registry_refused_total{reason=\"guesses\"}";

fn broker_behind_a_proxy() -> RegistryBroker {
    let mut registry = RegistryBroker::prepare(&Store::Sqlite, "");
    registry.stack.plan.config.push_str("trusted_proxies: [127.0.0.1]\n");
    registry.stack.write_config();
    registry.stack.start_broker();
    registry.stack.wait_until_ready();
    registry
}

impl RegistryBroker {
    /// A call with a header of the client with this address, which the proxy names.
    fn call_from(&self, address: &str, header: &str) -> Response {
        let headers = [header, &format!("X-Forwarded-For: {address}")];
        self.stack.connect().request("GET", "/api/v1/server/list_all", &headers, b"")
    }
}

/// When the next password is compared, if this answer says that none is now.
fn retry_seconds(answer: &Response) -> Option<u32> {
    (answer.status == 429).then(|| answer.header("retry-after").unwrap().parse().unwrap())
}

#[test]
fn wrong_passwords_are_limited_by_address_and_lock_out_nobody_who_logged_in_from_there() {
    let mut registry = broker_behind_a_proxy();
    let [strangers, shared, other] = ["198.51.100.1", "198.51.100.2", "2001:db8:0:100::1"];
    assert_eq!(registry.call_from(shared, LOGIN).status, 200);
    for address in [strangers, shared] {
        let begun = Instant::now();
        let answers: Vec<_> = repeat_with(|| registry.call_from(address, &wrong())).take(30).collect();
        assert!(answers[..10].iter().all(|answer| answer.status == 401), "{answers:?}");
        let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
        assert!(refused.len() as u64 >= 19 - begun.elapsed().as_secs() / 5, "{answers:?}");
        for answer in refused {
            assert!(retry_seconds(answer).is_some_and(|seconds| (1..=5).contains(&seconds)), "{answer:?}");
            let error = &answer.json()["error"];
            assert!(error["message"].as_str().unwrap().contains("too many wrong passwords"), "{answer:?}");
            assert!(error["field"].is_null() && answer.header("www-authenticate").is_none(), "{answer:?}");
        }
        assert_eq!(registry.call_from(shared, LOGIN).status, 200, "the right password while others guess");
    }
    wait_until("the limit has just been reached", || {
        retry_seconds(&registry.call_from(strangers, &wrong())).filter(|seconds| *seconds == 5)
    });
    assert_eq!(registry.call_from(strangers, LOGIN).status, 429, "no answer tells which password is right");
    let none = registry.call_from(strangers, "Accept: */*");
    assert!(none.status == 401 && none.header("www-authenticate").is_some(), "{none:?}");
    assert_eq!([wrong().as_str(), LOGIN].map(|login| registry.call_from(other, login).status), [401, 200]);
    assert!(registry.stack.metric(REFUSED).unwrap() >= 30.0);
    let log = registry.stack.broker().log();
    assert_eq!(log.matches("too many wrong passwords").count(), 1, "{log}");
    assert!(![strangers, shared, other].iter().any(|address| log.contains(address)), "{log}");
}
