//! `wgkex-broker`: takes routers' keys and announces them to the gateways; or makes an operator's admin call.

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use clap::{CommandFactory as _, Parser, Subcommand};
use tokio::runtime::Runtime;
use wgkex_broker::cli::doctor::Doctor;
use wgkex_broker::cli::mqtt_acl::MqttAcl;
use wgkex_broker::cli::registry::{ClientCommand, ServerCommand};
use wgkex_broker::cli::status::{GatewaysCommand, StatusCommand};
use wgkex_broker::cli::tenant_token::TenantToken;
use wgkex_broker::cli::{MAKE_ENDS, admin_client, print, print_or_complain};
use wgkex_broker::mqtt_server::password;
use wgkex_common::Config;
use wgkex_common::cli::{self, CheckConfig, ConfigFile, Documents};
use wgkex_common::doctor::Program;
use wgkex_common::runtime::process;

const ABOUT: &str = "Takes routers' WireGuard keys over HTTP and announces them to the gateways over MQTT";
const AFTER_HELP: &str = "Reads /etc/wgkex.yaml, or the file named by --config or WGKEX_CONFIG_FILE. Without mqtt.broker_url in it, \
                          the broker is the MQTT server too, on mqtt_listen. Without a command it serves; status, \
                          gateways and doctor query the running broker, on broker_listen, and revoke, unrevoke, allow, trust, list, \
                          where, explain, drain and undrain on admin_listen, with the token. Exits with 0 when it is stopped, with 78 if its config has mistakes, with 1 \
                          if it cannot serve; the help of each command names its exit codes. Exits with 64 if it is called wrongly. Colours are for \
                          terminals; NO_COLOR=1 takes them away.";

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
    #[command(flatten)]
    Keys(admin_client::AdminCommand),
    /// Shows which domains are served by which gateways, what is wrong now, and the results of key requests
    Status(StatusCommand),
    /// Shows each gateway: its state, version, peers, share and target, and why it is offline
    Gateways(GatewaysCommand),
    /// Checks everything that the broker needs, and prints what to do about each thing that is wrong; changes nothing
    #[command(
        after_help = "Exits with 0 if all is well, with 1 for warnings, with 3 for failures, also where the checks cannot be made. Works while the broker runs and \
                            while it does not. Needs no token. Connects to another MQTT server as the client \
                            wgkex-broker-NAME-doctor."
    )]
    Doctor(Doctor),
    /// Checks the config and names each problem with its line
    CheckConfig(CheckConfig),
    /// Asks for a password, or reads it from the first line of stdin, and prints its hash, as the config has it
    #[command(after_help = MAKE_ENDS)]
    HashPassword,
    /// Makes a token by which clients may join a tenant, and prints it with its line for the file of tokens
    TenantToken(TenantToken),
    /// Prints an access list for another MQTT server, with the topics of each user: each of the configured
    /// workers may publish only on its own topics
    MqttAcl(MqttAcl),
    /// Adds, shows and removes the servers of the registry (registry.enabled)
    #[command(subcommand)]
    Server(ServerCommand),
    /// Adds, shows and removes the clients of the registry (registry.enabled)
    #[command(subcommand)]
    Client(ClientCommand),
    #[command(flatten)]
    Documents(Documents),
}

fn main() -> ExitCode {
    process::abort_on_panic();
    cli::run(|Args { file, command }| execute(file.path(), command))
}

fn execute(file: Option<&Path>, command: Option<Command>) -> ExitCode {
    match command {
        None => process::serve(file, serve),
        Some(Command::Keys(command)) => command.run(file),
        Some(Command::Status(command)) => command.run(file),
        Some(Command::Gateways(command)) => command.run(file),
        Some(Command::Doctor(doctor)) => doctor.run(file),
        Some(Command::CheckConfig(check)) => check.run(file, Program::Broker),
        Some(Command::HashPassword) => print_or_complain(hash_password()),
        Some(Command::TenantToken(token)) => print_or_complain(token.text()),
        Some(Command::Server(command)) => command.run(file),
        Some(Command::Client(command)) => command.run(file),
        Some(Command::Documents(documents)) => documents.run(Args::command()),
        Some(Command::MqttAcl(list)) => with_config(file, |config| print(&list.text(&config)?)),
    }
}

fn with_config(file: Option<&Path>, run: impl FnOnce(Config) -> anyhow::Result<()>) -> ExitCode {
    process::config(file).map_or(ExitCode::FAILURE, |config| process::exit(run(config)))
}

fn serve(config: Config) -> anyhow::Result<()> {
    let runtime = Runtime::new()?;
    let result = runtime.block_on(async { wgkex_broker::run(config, process::stop()?).await });
    // A disk that does not answer must not keep the process from its end.
    runtime.shutdown_background();
    result
}

fn hash_password() -> anyhow::Result<String> {
    let line = if io::stdin().is_terminal() {
        rpassword::prompt_password("Password: ").context("the terminal")?
    } else {
        let mut line = String::new();
        io::stdin().read_line(&mut line).context("stdin")?;
        line
    };
    let password = line.trim_end_matches(['\n', '\r']);
    ensure!(!password.is_empty(), "the password is expected on the first line of stdin, there is none");
    Ok(format!("{}\n", password::hash(password)?))
}
