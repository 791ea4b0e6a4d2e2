//! `wgkex-node`: leases addresses, and writes the files for the tunnels.

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use wgkex_common::cli::{self, Documents};
use wgkex_node::lease::Lease;

const ABOUT: &str = "Leases addresses from the registry of a wgkex broker, and writes the files for the tunnels";

#[derive(Parser)]
#[command(version, about = ABOUT, after_help = "Exits with 64 if it is called wrongly.")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Leases an address of each server, and writes /etc/wireguard/SERVER.conf for wg-quick; repeating it changes only what changed
    Lease(Lease),
    #[command(flatten)]
    Documents(Documents),
}

fn main() -> ExitCode {
    cli::run(|Args { command }| match command {
        Command::Lease(lease) => lease.run(),
        Command::Documents(documents) => documents.run(Args::command()),
    })
}
