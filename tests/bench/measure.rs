//! Time, CPU time and memory of programs, and statistics of them.

use std::fs;
use std::ops::Add;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};

/// The cost of a piece of work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost {
    /// Wall-clock time.
    pub time: Duration,
    /// In user space and in the kernel, over all its threads.
    pub cpu: Duration,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { time: self.time + other.time, cpu: self.cpu + other.cpu }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Self::add)
    }
}

/// The cost of `work`; its CPU time is that of the children that it started and awaited.
pub fn children(work: impl FnOnce()) -> Cost {
    let (began, cpu) = (Instant::now(), children_cpu());
    work();
    Cost { time: began.elapsed(), cpu: children_cpu().saturating_sub(cpu) }
}

/// The CPU time of `work` on this thread, whatever else the machine does.
pub fn thread_cpu(work: impl FnOnce()) -> Duration {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock of the thread"));
    let before = now();
    work();
    now().saturating_sub(before)
}

/// The CPU time of all children that ended and were awaited.
fn children_cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("what was used");
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(microseconds.unsigned_abs())
}

/// The CPU time that a running process has used so far, in steps of 10 ms.
pub fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process that runs");
    // utime and stime (proc(5)), the 12th and 13th field after the name.
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    Duration::from_millis(ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10)
}

/// The memory that a running process has, and the most it ever had, in KiB.
pub fn memory(pid: u32) -> [u32; 2] {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that runs");
    ["VmRSS:", "VmHWM:"].map(|name| kibibytes(&status, name))
}

/// The memory that this machine has left, in KiB.
pub fn memory_left() -> u32 {
    kibibytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:")
}

fn kibibytes(table: &str, name: &str) -> u32 {
    let value = table.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
    value.unwrap_or_default()
}

/// The middle value.
pub fn median<T: Ord + Copy>(values: impl IntoIterator<Item = T>) -> T {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_unstable();
    values[values.len() / 2]
}

/// The percentile: the value that `share` of a hundred values do not exceed.
pub fn percentile<T: Ord + Copy>(values: &mut [T], share: usize) -> T {
    values.sort_unstable();
    values[(values.len() * share / 100).min(values.len() - 1)]
}

/// Polls `found` every so often until it returns something; none if that takes longer than `limit`.
pub fn look<T>(every: Duration, limit: Duration, mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    while began.elapsed() < limit {
        if let Some(found) = found() {
            return Some(found);
        }
        std::thread::sleep(every);
    }
    found()
}
