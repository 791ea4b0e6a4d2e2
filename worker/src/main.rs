//! `wgkex-worker`: serves a gateway, or sets its interfaces up.

mod privileges;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tokio::runtime::Builder;
use wgkex_common::Config;
use wgkex_common::runtime::process;
use wgkex_kernel::Backend;
use wgkex_kernel::netlink::Netlink;
use wgkex_worker::setup;

const ABOUT: &str = "Puts the WireGuard keys that wgkex-broker announces over MQTT into this gateway's kernel";
const AFTER_HELP: &str = "Reads /etc/wgkex.yaml, or the file named by WGKEX_CONFIG_FILE. Needs CAP_NET_ADMIN and gives up every other privilege.";

#[derive(Parser)]
#[command(version, about = ABOUT, after_help = AFTER_HELP)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Makes wg-REST and vx-REST for every configured domain, or completes them; repeating it is harmless
    Setup {
        /// Take the interfaces down instead; the private keys stay
        #[arg(long)]
        remove: bool,
        /// Use wireguard-go even where the kernel has WireGuard
        #[arg(long, conflicts_with = "remove")]
        userspace: bool,
    },
}

fn main() -> ExitCode {
    process::abort_on_panic();
    let args = Args::parse();
    process::config().map_or(ExitCode::FAILURE, |config| process::exit(try_main(&args, config)))
}

fn try_main(args: &Args, config: Config) -> anyhow::Result<()> {
    if args.command.is_none() {
        privileges::keep_only_needed(config.worker_user.as_deref())?;
    }
    let runtime = Builder::new_current_thread().enable_all().build().context("the runtime does not start")?;
    let result = runtime.block_on(async {
        match &args.command {
            None => serve(config).await,
            Some(Command::Setup { remove: true, .. }) => Ok(setup::remove(&config.setup).await?),
            Some(Command::Setup { userspace, .. }) => {
                let backend = if *userspace { Backend::Userspace } else { Backend::Kernel };
                Ok(setup::setup(&config.setup, backend).await?)
            }
        }
    });
    // A kernel that does not answer must not keep the process from its end.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let kernel = Netlink::open().context("netlink")?;
    wgkex_worker::run(config, kernel, process::stop()?).await
}
