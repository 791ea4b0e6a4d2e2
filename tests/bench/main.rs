//! Measures wgkex beside its references, and prints a table. `tests/bench/run` builds and starts it.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]
#![expect(clippy::unwrap_used, reason = "what fails ends the measurement")]

mod answers;
mod bound;
mod bulk;
mod bus;
mod counted;
mod dump;
mod fleet;
mod gateway;
mod leases;
mod load;
mod measure;
mod memory;
mod post;
mod rebuild;
mod roles;
mod storm;
mod table;
mod tenants;

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::table::{Place, Report};

/// One of the measurements.
struct Row {
    name: &'static str,
    about: &'static str,
    /// The meaning of its number, and the number unless it is divided.
    scale: (&'static str, u32),
    places: &'static [Place],
    measure: fn(Report, u32),
}

const BOTH: &[Place] = &[Place::Native, Place::Vm];

/// In the virtual machine the storm is the last row: the removal of its kernels disturbs any row after it.
const ROWS: [Row; 11] = [
    row("post", "a POST until its key is in the kernel", ("peers there", 20_000), BOTH, post::measure),
    row("bound", "a POST where no more peers may be", ("peers without a handshake", 30_000), BOTH, bound::measure),
    row("bulk", "many keys through MQTT into the kernel", ("keys", 20_000), BOTH, bulk::measure),
    row("answers", "answers per second", ("seconds each", 10), &[Place::Native], answers::measure),
    row("dump", "reading and classifying all peers", ("peers", 20_000), BOTH, dump::measure),
    row("rebuild", "a gateway that lost all its peers", ("keys", 20_000), BOTH, rebuild::measure),
    row("memory", "memory per live key and per peer", ("peers", 20_000), &[Place::Native], memory::measure),
    row("leases", "clients that get an address", ("leases there", 100_000), &[Place::Native], leases::measure),
    row("tenants", "joins of tenants, and memory per member", ("members", 5_000), &[Place::Native], tenants::measure),
    row("fleet", "50 workers, 5 brokers, one Mosquitto", ("keys", 1_000_000), &[Place::Native], fleet::measure),
    row("storm", "thousands of routers in 10 s, 4 gateways", ("routers", 3_300), BOTH, storm::measure),
];

const fn row(
    name: &'static str,
    about: &'static str,
    scale: (&'static str, u32),
    places: &'static [Place],
    measure: fn(Report, u32),
) -> Row {
    Row { name, about, scale, places, measure }
}

fn main() -> ExitCode {
    // Thousands of routers are as many connections; the servers inherit the limit of descriptors.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit of open files");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("as many open files as are allowed");
    let words: Vec<_> = std::env::args().skip(1).collect();
    let texts: Vec<_> = words.iter().map(String::as_str).collect();
    match texts[..] {
        ["play", ..] => roles::run_role(&words[1..]),
        ["head"] => table::print_head(),
        ["places", ref wanted @ ..] => return print_places(wanted),
        ["row", place, wanted] => measure_row(place, wanted),
        ["native", ref wanted @ ..] => return measure_all(Place::Native, wanted),
        ["vm", ref wanted @ ..] => return measure_all(Place::Vm, wanted),
        _ => print_help(),
    }
    ExitCode::SUCCESS
}

fn print_help() {
    println!("usage: tests/bench/run [native|vm] [ROW[:DIVISOR]...]\n");
    println!("Measures all rows, or those named, with their numbers divided. It needs root.\n");
    for Row { name, about, scale: (what, number), places, .. } in ROWS {
        let places: Vec<_> = places.iter().map(|place| place.name()).collect();
        println!("  {name:8} {about} ({number} {what}); {}", places.join(" and "));
    }
}

/// Prints the places in which the wanted rows are measured.
fn print_places(wanted: &[&str]) -> ExitCode {
    for place in BOTH {
        match rows(*place, wanted) {
            Err(unknown) => {
                println!("no such row: {unknown}");
                return ExitCode::FAILURE;
            }
            Ok(rows) if !rows.is_empty() => println!("{}", place.name()),
            Ok(_) => {}
        }
    }
    ExitCode::SUCCESS
}

/// The wanted rows of a place, all if none is named, as words of [`measure_row`].
fn rows(place: Place, wanted: &[&str]) -> Result<Vec<String>, String> {
    if let Some(unknown) = wanted.iter().find(|word| find(word).is_none()) {
        return Err((*unknown).to_owned());
    }
    let here = ROWS.iter().filter(|row| row.places.contains(&place));
    if wanted.is_empty() {
        return Ok(here.map(|row| row.name.to_owned()).collect());
    }
    let named = |row: &Row| wanted.iter().find(|word| find(word).is_some_and(|(found, _)| found.name == row.name));
    Ok(here.filter_map(|row| Some((*named(row)?).to_owned())).collect())
}

/// The row that a word names, and its number.
fn find(word: &str) -> Option<(&'static Row, u32)> {
    let (name, divisor) = word.split_once(':').unwrap_or((word, "1"));
    let row = ROWS.iter().find(|row| row.name == name)?;
    let divisor: u32 = divisor.parse().ok().filter(|divisor| *divisor > 0)?;
    Some((row, row.scale.1 / divisor))
}

/// Measures each row in a process of its own, so that none disturbs, or ends, another.
fn measure_all(place: Place, wanted: &[&str]) -> ExitCode {
    let mut failed = false;
    for word in rows(place, wanted).expect("rows that there are") {
        let mut command = isolated(place);
        command.arg(std::env::current_exe().unwrap()).args(["row", place.name(), &word]);
        let mut child = command.process_group(0).spawn().expect("setpriv runs");
        let group = Pid::from_raw(child.id().try_into().unwrap());
        let good = child.wait().is_ok_and(|status| status.success());
        // Processes that the row left behind, if any.
        let _ = killpg(group, Signal::SIGKILL);
        if !good {
            println!("| {word} | {} | failed: see above | | | | | NO |", place.name());
            failed = true;
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Here all processes of a row end with it. In the virtual machine some processes keep the networks beyond that: see
/// [`gateway::keep_network`].
fn isolated(place: Place) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--net"]);
    if place == Place::Native {
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    }
    command
}

fn measure_row(place: &str, word: &str) {
    let place = if place == Place::Vm.name() { Place::Vm } else { Place::Native };
    let (row, number) = find(word).expect("a row that there is");
    unshare(CloneFlags::CLONE_NEWNS).expect("needs root");
    gateway::run("mount --make-rprivate /");
    gateway::enter_new_network();
    (row.measure)(Report { row: row.name, place }, number);
}
