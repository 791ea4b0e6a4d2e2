//! Random parts of a fleet are killed, stopped and frozen, under load, a hundred times.

use std::fmt;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::Lane;
use wgkex_tests::process::Process;

use crate::lab::{CAUGHT_UP, Fleet, Pace, Routers, sleep, within};

/// After so many rounds the second broker and the second gateway are only frozen, and not ended: they must not grow.
const WARM_UP: u32 = 50;
const ROUNDS: u32 = 100;
/// Memory that a survivor may use beside that of its keys: allocators keep some.
const SLACK_KB: u64 = 8 * 1024;
/// Temporary threads and descriptors.
const SLACK: u64 = 8;

pub fn a_hundred_random_faults_lose_no_key_and_leak_nothing(lane: Lane) {
    let seed = std::env::var("WGKEX_SEED").map_or_else(|_| time(), |seed| seed.parse().expect("a number"));
    say(format_args!("WGKEX_SEED={seed}"));
    let mut random = Random(seed | 1);
    let mut fleet = Fleet::new(lane, 2, 2, "");
    let routers = Routers::new();
    let mut warm = Vec::new();
    routers.ask_during(&fleet.broker_hosts(), Pace::per_second(30), || {
        for round in 0..ROUNDS {
            if round == WARM_UP {
                // One of them may be just starting.
                fleet.is_complete();
                warm = survivors(&fleet);
            }
            fault(&mut fleet, &mut random, round >= WARM_UP);
            sleep(Duration::from_millis(random.below(900).into()));
        }
        sleep(Duration::from_secs(3));
    });
    fleet.is_complete();
    fleet.caught_up(&routers);
    let accepted = routers.answers().accepted.len() as u64;
    say(format_args!("{accepted} keys of {}", routers.answers().asked.len()));
    for broker in &fleet.brokers {
        within("each broker knows all", CAUGHT_UP, || (broker.live()? >= accepted).then_some(()));
    }
    for (before, after) in warm.into_iter().zip(survivors(&fleet)) {
        say(format_args!("{before:?}, then {after:?}"));
        assert!(after.resident_kb < before.resident_kb + SLACK_KB, "{before:?}, then {after:?}");
        assert!(after.threads <= before.threads + SLACK, "{before:?}, then {after:?}");
        assert!(after.descriptors as u64 <= before.descriptors as u64 + SLACK, "{before:?}, then {after:?}");
    }
    assert!(accepted > 500, "routers are served meanwhile");
}

/// Freezes one part for a while, or ends it and starts it after a while.
fn fault(fleet: &mut Fleet, random: &mut Random, spares: bool) {
    let part = random.below(5);
    let is_spared = spares && matches!(part, 1 | 3);
    let signal =
        [Signal::SIGSTOP, Signal::SIGTERM, Signal::SIGKILL][random.below(if is_spared { 1 } else { 3 }) as usize];
    let time = Duration::from_millis(random.below(600).into());
    let (brokers, gateways) = (&mut fleet.brokers, &mut fleet.gateways);
    let process = match part {
        n @ 0..2 => &mut brokers[n as usize].process,
        n @ 2..4 => &mut gateways[n as usize - 2].process,
        _ => &mut fleet.mosquitto,
    };
    if signal == Signal::SIGSTOP {
        process.signal(signal);
        sleep(2 * time);
        return process.signal(Signal::SIGCONT);
    }
    let _ = process.end_by(signal);
    sleep(time);
    match part {
        n @ 0..2 => brokers[n as usize].start_again(),
        n @ 2..4 => gateways[n as usize - 2].start_again(),
        _ => fleet.mosquitto = fleet.hub.start_mosquitto(),
    }
}

/// The usage of those that are only frozen after the warm-up.
fn survivors(fleet: &Fleet) -> Vec<Usage> {
    [&fleet.brokers[1], &fleet.gateways[1]].map(|node| usage(&node.process)).into()
}

#[derive(Debug, Clone, Copy)]
struct Usage {
    resident_kb: u64,
    threads: u64,
    descriptors: usize,
}

fn usage(process: &Process) -> Usage {
    let proc = format!("/proc/{}", process.pid());
    let status = fs::read_to_string(format!("{proc}/status")).unwrap();
    let figure = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let descriptors = fs::read_dir(format!("{proc}/fd")).unwrap().count();
    Usage { resident_kb: figure("VmRSS:"), threads: figure("Threads:"), descriptors }
}

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        u32::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % limit
    }
}

fn time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[expect(clippy::print_stderr, reason = "to repeat a failure")]
fn say(text: fmt::Arguments<'_>) {
    eprintln!("{text}");
}
