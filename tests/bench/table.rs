//! The table that a run prints: a line for each measurement, beside its reference.

use std::fmt::Display;
use std::io::Write as _;
use std::time::Duration;

/// The row and place with which lines are printed.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// The row's name.
    pub row: &'static str,
    /// The place of the measurement: `native` or `vm`.
    pub place: Place,
}

/// The measured kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// This machine's, with a userspace WireGuard where it has none.
    Native,
    /// Debian's, in a virtual machine.
    Vm,
}

/// One line of the table.
pub struct Line {
    report: Report,
    what: String,
    measured: String,
    reference: String,
    ratio: String,
    wanted: String,
    holds: &'static str,
}

impl Place {
    /// Its name on the command line and in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Vm => "vm",
        }
    }
}

impl Report {
    /// A line about `what`, with the result `measured`.
    pub fn line(self, what: impl Display, measured: impl Display) -> Line {
        Line {
            report: self,
            what: what.to_string(),
            measured: measured.to_string(),
            reference: String::new(),
            ratio: String::new(),
            wanted: String::new(),
            holds: "",
        }
    }
}

impl Line {
    /// Adds the reference, and the ratio of the result to it.
    pub fn against(mut self, reference: impl Display, ratio: f64) -> Self {
        self.reference = reference.to_string();
        self.ratio = format!("{ratio:.2}");
        self
    }

    /// Adds the requirement of the design, and whether it holds here.
    pub fn wanted(mut self, wanted: impl Display, holds: bool) -> Self {
        self.wanted = wanted.to_string();
        self.holds = if holds { "yes" } else { "NO" };
        self
    }

    /// Prints the line.
    pub fn print(self) {
        let Self { report, what, measured, reference, ratio, wanted, holds } = self;
        let place = report.place.name();
        println!("| {} | {place} | {what} | {measured} | {reference} | {ratio} | {wanted} | {holds} |", report.row);
        // A run takes an hour: each line is shown at once.
        let _ = std::io::stdout().flush();
    }
}

/// The head of the table.
pub fn print_head() {
    println!("| Row | Where | What | Measured | Reference | Ratio | Wanted | Held |");
    println!("|---|---|---|---|---|---|---|---|");
}

/// A duration in seconds.
pub fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// A duration in milliseconds.
pub fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// Kibibytes, as mebibytes.
pub fn mebibytes(kibibytes: u32) -> String {
    format!("{:.1} MiB", f64::from(kibibytes) / 1024.0)
}

/// The ratio of `part` to `whole`.
pub fn ratio(part: Duration, whole: Duration) -> f64 {
    part.as_secs_f64() / whole.as_secs_f64()
}
