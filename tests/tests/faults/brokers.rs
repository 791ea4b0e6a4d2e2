//! Brokers die, alone and beside others.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::{key, wait_until};

use crate::lab::{CAUGHT_UP, Fleet, Pace, Routers, caught_up, sleep, within};

/// After this time an accepted key is on disk: half a second until it is written, and more for a slow machine.
const WRITTEN: Duration = Duration::from_millis(1_500);

pub fn a_broker_killed_between_publish_and_answer_leaves_nothing_half_done(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "confirm_timeout: 20\nconfirm_budget: 20");
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 20);
    let witness = fleet.witness();
    let pace = Pace { every: Duration::ZERO, at_most: 4 };
    fleet.gateways[0].process.signal(Signal::SIGSTOP);
    routers.ask_during(&fleet.broker_hosts(), pace, || {
        for n in 21..25 {
            witness.next("the key is published", |message| message.text() == key(n));
        }
        fleet.brokers[0].kill();
    });
    let answers = routers.answers().clone();
    assert_eq!((answers.accepted.len(), answers.refused.len(), answers.silent), (20, 0, 4));
    fleet.gateways[0].process.signal(Signal::SIGCONT);
    // Keys published before the end are at the gateways all the same.
    routers.note((21..25).map(key));
    fleet.caught_up(&routers);
    fleet.brokers[0].start_again();
    fleet.is_complete();
    routers.ask(&fleet.broker_hosts(), 20);
    assert_eq!(routers.answers().accepted.len(), 44);
    fleet.caught_up(&routers);
}

pub fn a_broker_killed_while_writing_still_has_keys_accepted_a_second_before(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    let mut certain = BTreeSet::new();
    for round in 0..8 {
        let broker_hosts = fleet.broker_hosts();
        let broker = &mut fleet.brokers[0];
        let begun = Instant::now();
        routers.ask_during(&broker_hosts, Pace::per_second(400), || {
            sleep(Duration::from_millis(2_200 + 137 * round));
            within("routers were served", CAUGHT_UP, || {
                let answers = routers.answers();
                let written = answers.accepted.values().filter(|at| **at > begun && at.elapsed() > WRITTEN);
                (written.count() > 100).then_some(())
            });
            broker.process.signal(Signal::SIGKILL);
        });
        let killed = Instant::now();
        let _ = broker.process.wait();
        let is_written = |at: &Instant| *at > begun && killed.saturating_duration_since(*at) > WRITTEN;
        let answers = routers.answers().clone();
        certain.extend(answers.accepted.into_iter().filter(|(_, at)| is_written(at)).map(|(key, _)| key));
        broker.start_again();
        let live = within("the broker serves", CAUGHT_UP, || broker.live());
        let (certain, asked) = (certain.len() as u64, answers.asked.len() as u64);
        assert!((certain..=asked).contains(&live), "{certain} must be known, {asked} were asked, {live} are known");
        assert!(certain > 100 * round, "routers were served");
        fleet.is_complete();
    }
    caught_up(&fleet.gateways[0].host, &routers);
    // A gateway that received none of these keys gets them from the broker.
    fleet.add_gateway("");
    let live = within("live keys", CAUGHT_UP, || fleet.brokers[0].live());
    let new = within("a new gateway has what the broker knows", CAUGHT_UP, || {
        let tables = fleet.gateways[1].host.tables("a");
        (tables.lengths() == [usize::try_from(live).ok()?; 3]).then_some(tables)
    });
    assert!(certain.iter().all(|key| new.missing(key).is_empty()), "keys are missing");
}

pub fn either_of_two_brokers_may_die(lane: Lane) {
    let mut fleet = Fleet::new(lane, 2, 1, "");
    let routers = Routers::new();
    routers.ask_during(&fleet.broker_hosts(), Pace::per_second(100), || {
        sleep(Duration::from_secs(8));
        fleet.brokers[0].kill();
        sleep(Duration::from_secs(4));
    });
    // A new gateway gets all keys from the remaining broker.
    let gone = fleet.brokers.remove(0);
    fleet.add_gateway("");
    fleet.is_complete();
    fleet.caught_up(&routers);
    // So does a broker without state.
    let accepted = routers.answers().accepted.len() as u64;
    gone.forget();
    fleet.brokers.insert(0, gone);
    fleet.brokers[0].start_again();
    within("a broker that knew nothing knows all", CAUGHT_UP, || (fleet.brokers[0].live()? >= accepted).then_some(()));
    fleet.is_complete();
    // Then the other broker is killed.
    fleet.brokers.remove(1).kill();
    routers.ask(&fleet.broker_hosts(), 100);
    fleet.add_gateway("");
    fleet.caught_up(&routers);
}

/// A key that only a worker reports is given to no other gateway; once a router sends it, it is proven.
pub fn brokers_that_forgot_everything_know_again_what_routers_send(lane: Lane) {
    let mut fleet = Fleet::new(lane, 1, 1, "");
    let routers = Routers::new();
    routers.ask(&fleet.broker_hosts(), 50);
    let witness = fleet.witness();
    let (router, talking) = router(&fleet, lane);
    routers.note([talking.clone()]);
    let live = |state| format!(r#"wgkex_broker_live_keys{{domain="test_a",state="{state}"}} "#);
    let limit = Duration::from_secs(150);
    within("the broker hears of the handshake", limit, || {
        (fleet.brokers[0].figure(&live("proven"))? == 1).then_some(())
    });
    let seen = witness.next_on("wgkex/worker/gw1/seen").text();
    assert!(seen.contains(&talking) && !seen.contains("198.18."), "the key, and no address: {seen}");

    fleet.brokers[0].kill();
    fleet.brokers[0].forget();
    fleet.brokers[0].start_again();
    within("the broker hears of it again", limit, || (fleet.brokers[0].figure(&live("claimed"))? == 1).then_some(()));
    assert_eq!(fleet.brokers[0].live(), Some(0));
    fleet.caught_up(&routers);
    fleet.add_gateway("");
    fleet.is_complete();
    assert_eq!(fleet.brokers[0].host.post(2, &talking).status, 200);
    assert_eq!(fleet.brokers[0].figure(&live("proven")), Some(1));
    within("a new gateway has it", CAUGHT_UP, || {
        fleet.gateways[1].host.tables("a").missing(&talking).is_empty().then_some(())
    });
    drop(router);
}

/// A router that has had a handshake with the first gateway, and its key.
pub fn router(fleet: &Fleet, lane: Lane) -> (Host, String) {
    let (gateway, broker) = (&fleet.gateways[0].host, &fleet.brokers[0].host);
    let router = Host::new("router", lane);
    let (address, _) = gateway.connect(&router, 200);
    let key = router.run("umask 077 && wg genkey > /run/key && wg pubkey < /run/key");
    let remote = router.tunnel_to(gateway, address);
    wait_until("the router gets through", || {
        let ping = format!("ping -c 1 -W 1 {remote}%wg-router");
        (broker.post(2, &key).status == 200 && router.try_run(&ping).status.success()).then_some(())
    });
    (router, key)
}
