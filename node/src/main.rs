//! `wgkex-node`: leases addresses, and writes the files for the tunnels.

use std::process::ExitCode;

use clap::Parser;
use wgkex_common::cli;
use wgkex_node::command::Command;

const ABOUT: &str = "Leases addresses from the registry of a wgkex broker, and writes the files for the tunnels";

#[derive(Parser)]
#[command(version, about = ABOUT, after_help = "Exits with 64 if it is called wrongly.")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    cli::run(|Args { command }| command.run())
}
