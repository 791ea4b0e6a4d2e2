//! RabbitMQ delivers no retained message to a subscription with a wildcard.
//!
//! Regression: programs published their states only once per connection, and the broker that started last knew no
//! gateway.

use std::time::Duration;

use wgkex_tests::http::{Http, Response, ask};
use wgkex_tests::in_memory::InMemory;
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V1, V2};
use wgkex_tests::{key, wait_within};

/// Within a minute, on a busy machine.
const SERVED: Duration = Duration::from_secs(90);

/// A new key, by each version.
const KEYS: [(&str, u32); 2] = [(V2, 0), (V1, 1)];

#[test]
fn routers_are_served_in_any_order_of_starting() {
    let mut stack = Stack::prepare(Plan::new(Bus::RabbitMq));
    stack.start_broker();
    let mut gateway = InMemory::start(&stack, "gw1");
    stack.start_rabbitmq();
    assert_served(&stack, &gateway, 10, "the server came last");

    let _ = stack.stop_broker();
    stack.start_broker();
    assert_served(&stack, &gateway, 20, "the broker came last");

    drop(gateway);
    gateway = InMemory::start(&stack, "gw1");
    assert_served(&stack, &gateway, 30, "the worker came last");

    stack.kill_and_restart_bus();
    assert_served(&stack, &gateway, 40, "the server came back");
}

/// Waits until new keys are answered with 200 and in the gateway's kernel.
fn assert_served(stack: &Stack, gateway: &InMemory, first: u32, order: &str) {
    let mut applied = Vec::new();
    for (path, n) in KEYS {
        let key = key(first + n);
        wait_within(SERVED, &format!("{path} serves although {order}"), || {
            let answer = post(stack, path, &key)?;
            applied.extend(gateway.kernel.take_applies().into_iter().flat_map(|(_, changes)| changes));
            (answer.status == 200 && InMemory::took(&applied, &key)).then_some(())
        });
    }
}

fn post(stack: &Stack, path: &str, key: &str) -> Option<Response> {
    Http::try_connect(stack.http).ok()?.try_post(path, &ask(DOMAIN, key)).ok()
}
