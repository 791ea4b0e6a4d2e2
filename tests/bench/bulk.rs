//! Row `bulk`: many keys at once over Mosquitto into the kernel, beside the cost of the same keys with the C tools:
//! receiving them (`mosquitto_sub`) and setting them (`wg`, `ip`, `bridge`).

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use wgkex_common::PublicKey;
use wgkex_tests::stack::{Bus, Stack};

use crate::bus::{announce, client, publish};
use crate::gateway::{DOMAIN, Gateway, assert_holds, key, keys, run, write};
use crate::measure::{Cost, children, cpu, median};
use crate::table::{Place, Report, ratio, seconds};

/// How often each number of keys is measured.
const ROUNDS: usize = 3;

/// How often to poll whether the keys are in. Polling costs the worker CPU time.
const LOOK: Duration = Duration::from_millis(10);

struct Round {
    c_tools: Vec<(&'static str, Cost)>,
    worker: Cost,
}

/// Measures with a twentieth, a half and all of `most` keys.
pub fn measure(report: Report, most: u32) {
    for number in [most / 20, most / 2, most] {
        measure_one(report, number);
    }
}

fn measure_one(report: Report, number: u32) {
    let keys = keys(0..number);
    let mut gateway = Gateway::new(Bus::Mosquitto);
    write(&lines(&gateway.stack), &keys, |key| format!("{key}\n"));
    let rounds: Vec<_> = (0..ROUNDS).map(|_| round(&mut gateway, &keys)).collect();

    let tool = |n: usize| median(rounds.iter().map(|round| round.c_tools[n].1));
    let tools: Vec<_> = rounds[0].c_tools.iter().enumerate().map(|(n, (name, _))| (*name, tool(n))).collect();
    for (name, cost) in &tools {
        report.line(format!("{number} keys, `{name}`"), show(*cost)).print();
    }
    let sum: Cost = tools.into_iter().map(|(_, cost)| cost).sum();
    let worker = median(rounds.iter().map(|round| round.worker));
    let ratio_of_times = ratio(worker.time, sum.time);
    report
        .line(format!("{number} keys, `wgkex-worker`"), show(worker))
        .against(format!("sum of the C tools {}", show(sum)), ratio_of_times)
        .wanted("<= 1.00", ratio_of_times <= 1.0)
        .print();
    let cpu = format!("sum of the C tools {}", seconds(sum.cpu));
    report
        .line(format!("{number} keys, CPU time"), seconds(worker.cpu))
        .against(cpu, ratio(worker.cpu, sum.cpu))
        .print();
    let rate = f64::from(number) / worker.time.as_secs_f64();
    let line = report.line(format!("{number} keys, rate"), format!("{rate:.0} keys/s"));
    let line = if report.place == Place::Native { line.wanted(">= 1000 keys/s", rate >= 1000.0) } else { line };
    line.print();
}

fn show(cost: Cost) -> String {
    format!("{} (CPU {})", seconds(cost.time), seconds(cost.cpu))
}

fn round(gateway: &mut Gateway, keys: &[PublicKey]) -> Round {
    let number = u32::try_from(keys.len()).unwrap();
    gateway.renew();
    gateway.start_bus();
    let mut c_tools = vec![("mosquitto_sub", receive(&gateway.stack, keys.len()))];
    c_tools.extend(gateway.by_c_tools(keys));
    assert_holds(number);

    gateway.renew();
    gateway.start_bus();
    gateway.start_worker();
    // On a new connection the worker first waits for the brokers' revocation list.
    announce(&gateway.stack, DOMAIN, [key(u32::MAX)]);
    gateway.wait_for_keys(1, LOOK);
    let number = number + 1;
    let (began, cpu_before) = (Instant::now(), cpu(gateway.worker()));
    let mut publisher = publish(&gateway.stack, DOMAIN, &lines(&gateway.stack)).spawn().unwrap();
    gateway.wait_for_keys(number, LOOK);
    let worker = Cost { time: began.elapsed(), cpu: cpu(gateway.worker()).saturating_sub(cpu_before) };
    assert!(publisher.wait().unwrap().success());
    assert_holds(number);
    gateway.stop_worker();
    Round { c_tools, worker }
}

/// The cost of receiving so many keys with `mosquitto_sub`.
fn receive(stack: &Stack, keys: usize) -> Cost {
    run(&format!("mosquitto_pub -h {} -p {} -t ready -r -m ready", stack.mqtt.ip(), stack.mqtt.port()));
    let mut subscriber = client("sub", stack)
        .args(["-t", "ready", "-t", "wireguard/+/+", "-q", "1", "-C", &(keys + 1).to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut heard = BufReader::new(subscriber.stdout.take().unwrap()).lines();
    assert_eq!(heard.next().unwrap().unwrap(), "ready");
    let mut publisher = publish(stack, DOMAIN, &lines(stack)).spawn().unwrap();
    // Only the subscriber is awaited, so only its CPU time counts.
    let cost = children(|| {
        assert_eq!(heard.count(), keys);
        assert!(subscriber.wait().unwrap().success());
    });
    assert!(publisher.wait().unwrap().success());
    cost
}

fn lines(stack: &Stack) -> PathBuf {
    stack.dir().join("keys")
}
