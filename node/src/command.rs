//! The commands.

use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nix::unistd::gethostname;
use wgkex_common::PublicKey;
use wgkex_kernel::key_file;

use crate::files::{self, FileChange};
use crate::registry::{AuthorizationHeader, RemoteRegistry};
use crate::tunnel::{InterfaceName, Tunnel};

/// What it can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Leases an address of each server, and writes /etc/wireguard/SERVER.conf for wg-quick; repeating it changes only what changed
    #[command(
        after_help = "Exits with 0, or with 1 if one of the servers cannot be done; the others are. A tunnel that is up has what changed after:\n\
                      wg syncconf SERVER <(wg-quick strip SERVER)"
    )]
    Lease(Lease),
}

/// The command `lease`.
#[derive(Debug, Args)]
pub struct Lease {
    /// The servers, as they are called in the registry; their interfaces have the same names
    #[arg(required = true, value_name = "SERVER")]
    servers: Vec<InterfaceName>,
    #[arg(
        long,
        value_name = "URL",
        help = "The broker with the registry, as https://broker.example.org or http://127.0.0.1:5000"
    )]
    registry: String,
    /// The user of the registry
    #[arg(long, default_value = "admin")]
    user: String,
    /// The file with that user's password; a newline at its end does not count
    #[arg(long, value_name = "FILE")]
    password_file: PathBuf,
    /// The certificates that sign the broker's, in PEM, instead of those of the system
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// What this client is called in the registry; its host name by default
    #[arg(long)]
    name: Option<String>,
    /// Where the private keys are kept, as SERVER.key
    #[arg(long, value_name = "DIR", default_value = "/etc/wgkex")]
    key_dir: PathBuf,
    /// Where the files for wg-quick are written, as SERVER.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/wireguard")]
    config_dir: PathBuf,
}

impl Command {
    /// Runs the command and prints the result for each server.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let Self::Lease(lease) = self;
        match lease.run() {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                print_error(&format_args!("{error:#}"));
                ExitCode::FAILURE
            }
        }
    }
}

impl Lease {
    /// False if the lease of at least one server failed.
    fn run(&self) -> anyhow::Result<bool> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => gethostname().context("the host name")?.to_string_lossy().into_owned(),
        };
        let login = AuthorizationHeader::read(&self.user, &self.password_file)?;
        let registry = RemoteRegistry::new(&self.registry, login, self.ca_file.as_deref())?;
        let mut are_all_done = true;
        for server in &self.servers {
            match self.one(&registry, &name, server) {
                Ok((file, written)) => writeln!(io::stdout(), "{server}: {} {written}", file.display())?,
                Err(error) => {
                    are_all_done = false;
                    print_error(&format_args!("{server}: {error:#}"));
                }
            }
        }
        Ok(are_all_done)
    }

    fn one(
        &self,
        registry: &RemoteRegistry,
        client: &str,
        server: &InterfaceName,
    ) -> anyhow::Result<(PathBuf, FileChange)> {
        let key = key_file::load_or_make(&self.key_dir.join(format!("{server}.key")), None)?;
        let public_key = PublicKey::from_bytes(key.get_public().0)?;
        let file = self.file(server);
        files::check_ours(&file)?;
        let config = registry.lease(client, server.as_str(), &public_key)?;
        let tunnel = Tunnel::new(config).context("the registry's answer")?;
        let written = files::write(&file, &tunnel.file(&key.to_base64()))?;
        Ok((file, written))
    }

    fn file(&self, server: &InterfaceName) -> PathBuf {
        Path::new(&self.config_dir).join(format!("{server}.conf"))
    }
}

fn print_error(error: &dyn fmt::Display) {
    // An error of stderr cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "error: {error}");
}
