//! `wgkex-node`: leases addresses, and writes the files for the tunnels.

use std::process::ExitCode;

use clap::Parser;
use wgkex_node::command::Command;

const ABOUT: &str = "Leases addresses from the registry of a wgkex broker, and writes the files for the tunnels";

#[derive(Parser)]
#[command(version, about = ABOUT)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    Args::parse().command.run()
}
