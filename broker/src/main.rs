//! `wgkex-broker`: takes routers' keys and announces them to the gateways.

use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};
use wgkex_common::config::Level;
use wgkex_common::{Config, log};

/// Takes routers' WireGuard keys over HTTP and announces them to the gateways over MQTT.
///
/// Reads /etc/wgkex.yaml, or the file named by WGKEX_CONFIG_FILE. Without mqtt.broker_url in it, the broker is the
/// MQTT server too, on mqtt_listen.
#[derive(Parser)]
#[command(version)]
struct Args {}

fn main() -> ExitCode {
    Args::parse();
    let config = match Config::load() {
        Ok(config) => config,
        Err(wrong) => {
            log::init(Level::INFO);
            wrong.lines().iter().for_each(|line| error!("{line}"));
            return ExitCode::FAILURE;
        }
    };
    log::init(config.log_level);
    config.warnings.iter().for_each(|line| warn!("{line}"));
    match try_main(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_main(config: Config) -> anyhow::Result<()> {
    Runtime::new()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        wgkex_broker::run(config, stop).await
    })
}
