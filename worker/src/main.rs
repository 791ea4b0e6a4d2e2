//! `wgkex-worker`: serves a gateway, or sets its interfaces up.

mod privileges;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use tokio::runtime::Builder;
use wgkex_common::Config;
use wgkex_common::cli::{self, CheckConfig, ConfigFile, Documents};
use wgkex_common::doctor::Program;
use wgkex_common::runtime::process;
use wgkex_kernel::Backend;
use wgkex_kernel::netlink::Netlink;
use wgkex_worker::cli::doctor::Doctor;
use wgkex_worker::cli::drain::{DrainCommand, UndrainCommand};
use wgkex_worker::cli::dry_run::DryRun;
use wgkex_worker::cli::status::StatusCommand;
use wgkex_worker::setup;

const ABOUT: &str = "Puts the WireGuard keys that wgkex-broker announces over MQTT into this gateway's kernel";
const AFTER_HELP: &str = "Reads /etc/wgkex.yaml, or the file named by --config or WGKEX_CONFIG_FILE. Needs CAP_NET_ADMIN and gives up every other privilege. \
                          Exits with 0 when it is stopped, with 78 if its config has mistakes, with 1 if it cannot serve; the help of each command names its exit codes. Exits \
                          with 64 if it is called wrongly. Colours are for terminals; NO_COLOR=1 takes them away.";

#[derive(Parser)]
#[command(version, about = ABOUT, after_help = AFTER_HELP)]
struct Args {
    #[command(flatten)]
    file: ConfigFile,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Makes wg-REST and vx-REST for every configured domain, and the interfaces of servers and of the hub, or completes them; repeating it is harmless
    #[command(after_help = "Exits with 0, or with 1 if something cannot be made; what was made stays.")]
    Setup {
        /// Take the interfaces down instead; the private keys stay
        #[arg(long)]
        remove: bool,
        /// Use wireguard-go even where the kernel has WireGuard
        #[arg(long, conflicts_with = "remove")]
        userspace: bool,
    },
    /// Checks the config and names each problem with its line
    CheckConfig(CheckConfig),
    /// Shows the state of the running worker on one screen: domains, peers, what is wrong
    #[command(
        after_help = "Exits with 0 if all is well, with 3 if something is wrong, with 1 if the worker cannot be reached."
    )]
    Status(StatusCommand),
    /// Shows what the worker would change in the kernel now, as commands of wg, ip and bridge, and changes nothing
    #[command(
        after_help = "Exits with 0, or with 1 if the changes cannot be computed. Reads a copy of the state file. The commands have whole keys."
    )]
    DryRun(DryRun),
    /// Checks everything that the worker needs, and prints what to do about each thing that is wrong; changes nothing
    #[command(
        after_help = "Exits with 0 if all is well, with 1 for warnings, with 3 for failures, also where the checks cannot be made. Works while the worker runs and \
                            while it does not."
    )]
    Doctor(Doctor),
    /// Gives this gateway no new routers; those there stay, or go in portions after --deadline. The running worker notices within
    /// 2 s; a restart changes nothing
    #[command(
        after_help = "After the deadline, peers that connect go in portions of --percent a minute, and so do the others, those that \
                            are silent for longest first. Peers that wgkex did not make, and trusted keys, stay.\n\
                            Kept in state_dir/worker.drain.json. Run it as root or as the worker's user. For originals: \
                            wgkex-broker drain GATEWAY.\n\nExits with 0, also while no worker runs, or with 1 if that cannot be kept."
    )]
    Drain(DrainCommand),
    /// Gives this gateway new routers again
    #[command(after_help = "Exits with 0, also if it does not drain, or with 1 if that cannot be kept.")]
    Undrain(UndrainCommand),
    #[command(flatten)]
    Documents(Documents),
}

fn main() -> ExitCode {
    process::abort_on_panic();
    cli::run(|Args { file, command }| run(file.path(), command))
}

fn run(file: Option<&Path>, command: Option<Command>) -> ExitCode {
    let run = |job| process::config(file).map_or(ExitCode::FAILURE, |config| process::exit(execute(job, config)));
    match command {
        None => process::serve(file, |config| execute(Job::Serve, config)),
        Some(Command::Setup { remove: true, .. }) => run(Job::RemoveInterfaces),
        Some(Command::Setup { userspace: true, .. }) => run(Job::SetUp(Backend::Userspace)),
        Some(Command::Setup { .. }) => run(Job::SetUp(Backend::Kernel)),
        Some(Command::CheckConfig(check)) => check.run(file, Program::Worker),
        Some(Command::Status(status)) => status.run(file),
        Some(Command::Doctor(doctor)) => doctor.run(file),
        Some(Command::DryRun(dry_run)) => dry_run.run(file),
        Some(Command::Drain(drain)) => drain.run(file),
        Some(Command::Undrain(undrain)) => undrain.run(file),
        Some(Command::Documents(documents)) => documents.run(Args::command()),
    }
}

/// The commands that need the config and a runtime.
#[derive(Clone, Copy)]
enum Job {
    Serve,
    SetUp(Backend),
    RemoveInterfaces,
}

fn execute(job: Job, config: Config) -> anyhow::Result<()> {
    if matches!(job, Job::Serve) {
        privileges::keep_only_needed(config.worker_user.as_deref())?;
    }
    let runtime = Builder::new_current_thread().enable_all().build().context("the runtime does not start")?;
    let result = runtime.block_on(async {
        match job {
            Job::Serve => serve(config).await,
            Job::SetUp(backend) => Ok(setup::setup(&config, backend).await?),
            Job::RemoveInterfaces => Ok(setup::remove(&config).await?),
        }
    });
    // A hanging call of the kernel must not keep the process from ending.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let kernel = Netlink::open().context("netlink")?;
    wgkex_worker::run(config, kernel, Netlink::open, process::stop()?).await
}
