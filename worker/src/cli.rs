//! The commands of `wgkex-worker` that only look: [`status`] at the running worker, [`dry_run`] at what it would change in
//! the kernel, [`doctor`] at everything that it needs. They change nothing, and work while the worker runs. And [`drain`],
//! which writes a file that the running worker reads.
//!
//! No task: each is a command of its own, which ends when it has printed. What they print is decided by [`crate::status`],
//! [`crate::dry_run`] and [`crate::doctor`].

pub mod doctor;
pub mod drain;
pub mod dry_run;
mod http_client;
pub mod status;

use std::io::{self, Write as _};

/// The exit code where something is wrong.
const WRONG: u8 = 3;

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Says why a command cannot be done.
fn complain(error: &anyhow::Error) {
    // There is nobody else to tell.
    let _ = writeln!(io::stderr(), "error: {error:#}");
}
