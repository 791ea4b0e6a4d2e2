//! The commands of `wgkex-worker` beside serving: [`status`] shows the running worker, [`dry_run`] what it would change
//! in the kernel, [`doctor`] checks everything that it needs. These change nothing, and work while the worker runs.
//! [`drain`] writes a file that the running worker reads.
//!
//! No task: each is a command of its own, which ends when it has printed. Their output is computed by [`crate::status`],
//! [`crate::dry_run`] and [`crate::doctor`].

pub mod doctor;
pub mod drain;
pub mod dry_run;
mod http_client;
pub mod status;

use std::io::{self, Write as _};

use wgkex_common::cli::print_error;

/// The exit code of a command that finds a problem.
const EXIT_PROBLEMS: u8 = 3;

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
