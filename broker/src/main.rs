//! `wgkex-broker`: takes routers' keys and announces them to the gateways; or makes an operator's admin call.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::runtime::Runtime;
use wgkex_broker::cli;
use wgkex_common::{Config, process};

const ABOUT: &str = "Takes routers' WireGuard keys over HTTP and announces them to the gateways over MQTT";
const AFTER_HELP: &str = "Reads /etc/wgkex.yaml, or the file named by WGKEX_CONFIG_FILE. Without mqtt.broker_url in it, \
                          the broker is the MQTT server too, on mqtt_listen. Without a command it serves; revoke, \
                          unrevoke, allow, trust and list call the one that does, on admin_listen.";

#[derive(Parser)]
#[command(version, about = ABOUT, after_help = AFTER_HELP)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Keys(cli::Command),
}

fn main() -> ExitCode {
    match Args::parse().command {
        None => process::config().map_or(ExitCode::FAILURE, |config| process::exit(try_main(config))),
        Some(Command::Keys(command)) => command.run(),
    }
}

fn try_main(config: Config) -> anyhow::Result<()> {
    let runtime = Runtime::new()?;
    let result = runtime.block_on(async { wgkex_broker::run(config, process::stop()?).await });
    // A disk that does not answer must not keep the process from its end.
    runtime.shutdown_background();
    result
}
