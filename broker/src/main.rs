//! `wgkex-broker`: takes routers' keys and announces them to the gateways; or makes an operator's admin call.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use tokio::runtime::Runtime;
use wgkex_broker::cli;
use wgkex_broker::mqtt_server::{acl, password};
use wgkex_common::Config;
use wgkex_common::config::Role;
use wgkex_common::runtime::process;

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
    /// Reads a password from the first line of stdin and prints its hash, as the config has it
    HashPassword,
    /// Prints who may publish and subscribe to what, as an access list for another MQTT server: each of the configured
    /// workers may say only what is its own
    MqttAcl {
        /// For which server
        #[arg(long, value_enum, default_value_t = Format::Mosquitto)]
        format: Format,
        /// The user name of the brokers
        #[arg(long, value_name = "NAME", default_value = "wgkex-broker")]
        broker: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// The file named by `acl_file` in mosquitto.conf
    Mosquitto,
    /// The file acl.conf of EMQX
    Emqx,
}

fn main() -> ExitCode {
    match Args::parse().command {
        None => with_config(serve),
        Some(Command::Keys(command)) => command.run(),
        Some(Command::HashPassword) => process::exit(hash_password()),
        Some(Command::MqttAcl { format, broker }) => with_config(|config| mqtt_acl(&config, format, &broker)),
    }
}

fn with_config(run: impl FnOnce(Config) -> anyhow::Result<()>) -> ExitCode {
    process::config().map_or(ExitCode::FAILURE, |config| process::exit(run(config)))
}

fn serve(config: Config) -> anyhow::Result<()> {
    let runtime = Runtime::new()?;
    let result = runtime.block_on(async { wgkex_broker::run(config, process::stop()?).await });
    // A disk that does not answer must not keep the process from its end.
    runtime.shutdown_background();
    result
}

fn hash_password() -> anyhow::Result<()> {
    let mut line = String::new();
    io::stdin().read_line(&mut line).context("stdin")?;
    let password = line.trim_end_matches(['\n', '\r']);
    ensure!(!password.is_empty(), "the password is expected on the first line of stdin, there is none");
    print(&format!("{}\n", password::hash(password)?))
}

fn mqtt_acl(config: &Config, format: Format, broker: &str) -> anyhow::Result<()> {
    let workers = config.workers.keys().map(|name| (name.as_str(), Role::Worker));
    let users = workers.chain([(broker, Role::Broker)]);
    print(&match format {
        Format::Mosquitto => acl::mosquitto(users),
        Format::Emqx => acl::emqx(users),
    })
}

fn print(text: &str) -> anyhow::Result<()> {
    io::stdout().write_all(text.as_bytes()).context("stdout")
}
