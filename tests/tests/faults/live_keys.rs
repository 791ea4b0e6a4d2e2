//! The number of live keys at a broker, and their lifetime.

use std::time::Duration;

use wgkex_tests::key;
use wgkex_tests::probe::message;
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};

use crate::lab::{CAUGHT_UP, sleep, within};

const MAX: f64 = 320.0;

#[test]
fn live_keys_are_bounded_and_forgotten_after_their_time_and_a_restart_changes_neither() {
    let mut stack = Stack::start(Plan::new(Bus::Mosquitto).config("live_keys: {max: 320, ttl: 20}"));
    let witness = stack.witness();
    let live = |stack: &Stack| {
        let of = |state| stack.metric(&format!(r#"wgkex_broker_live_keys{{domain="{DOMAIN}",state="{state}"}}"#));
        Some(of("proven")? + of("unproven")?)
    };
    let topic = format!("wireguard/{DOMAIN}/all");
    for n in 0..20 {
        witness.publish_all((n * 100..n * 100 + 100).map(|n| message(&topic, key(n), 1, false)));
        assert!(live(&stack).unwrap() <= MAX);
    }
    within("they are heard", CAUGHT_UP, || (live(&stack)? > MAX * 0.9).then_some(()));
    sleep(Duration::from_secs(2));
    let _ = stack.broker().end_by(nix::sys::signal::Signal::SIGKILL);
    stack.start_broker();
    stack.wait_until_ready();
    let known = live(&stack).unwrap();
    assert!(known > MAX * 0.9 && known <= MAX, "{known}");
    within("their time is over", CAUGHT_UP, || (live(&stack)? < 0.5).then_some(()));
    let _ = stack.broker().end_by(nix::sys::signal::Signal::SIGTERM);
    stack.start_broker();
    stack.wait_until_ready();
    assert!(live(&stack).unwrap() < 0.5);
}
