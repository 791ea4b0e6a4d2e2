//! The clock of a virtual machine is stepped, never that of this machine.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use wgkex_tests::gateway::Lane;

use crate::brokers::router;
use crate::lab::{CAUGHT_UP, Fleet, Routers, sleep, within};

const HOUR: i64 = 3_600;
const YEAR: i64 = 365 * 24 * HOUR;

pub fn a_clock_that_is_stepped_costs_no_peer_and_no_key(lane: Lane) {
    assert!(Path::new("/run/vm/command").exists(), "this steps the clock: only in the virtual machine");
    let mut fleet = Fleet::new(lane, 1, 0, "");
    fleet.add_gateway("cleanup: {interval: 1, initial_handshake_grace: 600, legacy_stale_timeout: 600}");
    fleet.is_complete();
    let routers = Routers::new();
    let (_router, talking) = router(&fleet, lane);
    routers.note([talking]);
    routers.ask(&fleet.broker_hosts(), 50);
    fleet.caught_up(&routers);
    let live = fleet.brokers[0].live().unwrap();
    assert_eq!(live, 51);

    let clock = Clock::now();
    for (offset, restarts) in [(HOUR, false), (-HOUR, true), (YEAR, true), (0, false)] {
        clock.set(offset);
        let sweeps = |fleet: &Fleet| fleet.gateways[0].figure(r#"wgkex_worker_sweeps_total{domain="test_a"} "#);
        if restarts {
            // The state is written with the new time.
            sleep(Duration::from_secs(2));
            fleet.brokers[0].kill();
            fleet.gateways[0].kill();
            fleet.brokers[0].start_again();
            fleet.gateways[0].start_again();
            fleet.is_complete();
        }
        let before = sweeps(&fleet).unwrap_or_default();
        within("it looked for stale peers", CAUGHT_UP, || (sweeps(&fleet)? >= before + 3).then_some(()));
        // The broker checks every 10 s for expired keys.
        sleep(Duration::from_secs(2));
        fleet.caught_up(&routers);
        assert_eq!(fleet.brokers[0].live(), Some(live), "{offset} s off");
    }
    routers.ask(&fleet.broker_hosts(), 20);
    fleet.caught_up(&routers);
}

/// The clock without steps; restored at the end.
struct Clock {
    wall: SystemTime,
    monotonic: Instant,
}

impl Clock {
    fn now() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }

    fn set(&self, offset: i64) {
        let right = (self.wall + self.monotonic.elapsed()).duration_since(UNIX_EPOCH).unwrap().as_secs();
        let wanted = i64::try_from(right).unwrap() + offset;
        let status = Command::new("date").args(["-s", &format!("@{wanted}")]).status().unwrap();
        assert!(status.success(), "the clock cannot be set");
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.set(0);
    }
}
