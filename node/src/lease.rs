//! The command `lease`.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use clap::error::ErrorKind;
use nix::unistd::gethostname;
use wgkex_common::PublicKey;
use wgkex_common::cli::{print_error, refused};
use wgkex_kernel::key_file;

use crate::files::{self, FileChange};
use crate::registry::{AuthorizationHeader, RemoteRegistry};
use crate::tunnel::{InterfaceName, Tunnel};

/// A server, and the interface of the tunnel to it.
struct LeasedServer<'a> {
    name: &'a str,
    interface: InterfaceName,
}

/// The command `lease`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exits with 0, or with 1 if one of the servers cannot be done; the others are. A tunnel that is up has what changed after:\n\
                  wg syncconf INTERFACE <(wg-quick strip INTERFACE)"
)]
pub struct Lease {
    /// The servers, as they are called in the registry; their interfaces have the same names
    #[arg(required = true, value_name = "SERVER")]
    servers: Vec<String>,
    /// Another name for the interface and its files, such as one that interfaces can have; for one server only
    #[arg(long, value_name = "INTERFACE")]
    interface: Option<InterfaceName>,
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
    /// Where the private keys are kept, as INTERFACE.key
    #[arg(long, value_name = "DIR", default_value = "/etc/wgkex")]
    key_dir: PathBuf,
    /// Where the files for wg-quick are written, as INTERFACE.conf
    #[arg(long, value_name = "DIR", default_value = "/etc/wireguard")]
    config_dir: PathBuf,
}

impl Lease {
    /// Runs the command and prints the result for each server.
    #[must_use]
    pub fn run(&self) -> ExitCode {
        let servers = match self.servers() {
            Ok(servers) => servers,
            Err(problem) => {
                return refused(&clap::Error::raw(ErrorKind::ValueValidation, format!("{problem}\n")));
            }
        };
        match self.lease(&servers) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                print_error(&error);
                ExitCode::FAILURE
            }
        }
    }

    /// The servers, and the interface of each.
    fn servers(&self) -> Result<Vec<LeasedServer<'_>>, String> {
        match (&self.interface, self.servers.as_slice()) {
            (None, servers) => servers.iter().map(String::as_str).map(of_same_name).collect(),
            (Some(interface), [name]) => Ok(vec![LeasedServer { name, interface: interface.clone() }]),
            (Some(_), _) => Err("--interface is for one server only".into()),
        }
    }

    /// False if the lease of at least one server failed.
    fn lease(&self, servers: &[LeasedServer<'_>]) -> anyhow::Result<bool> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => gethostname().context("the host name")?.to_string_lossy().into_owned(),
        };
        let login = AuthorizationHeader::read(&self.user, &self.password_file)?;
        let registry = RemoteRegistry::new(&self.registry, login, self.ca_file.as_deref())?;
        let mut are_all_done = true;
        for server in servers {
            match self.one(&registry, &name, server) {
                Ok((file, written)) => writeln!(io::stdout(), "{}: {} {written}", server.name, file.display())?,
                Err(error) => {
                    are_all_done = false;
                    print_error(&format_args!("{}: {error:#}", server.name));
                }
            }
        }
        Ok(are_all_done)
    }

    fn one(
        &self,
        registry: &RemoteRegistry,
        client: &str,
        LeasedServer { name: server, interface }: &LeasedServer<'_>,
    ) -> anyhow::Result<(PathBuf, FileChange)> {
        let key = key_file::load_or_make(&self.key_dir.join(format!("{interface}.key")), None)?;
        let public_key = PublicKey::from_bytes(key.get_public().0)?;
        let file = self.config_dir.join(format!("{interface}.conf"));
        files::check_ours(&file)?;
        let config = registry.lease(client, server, &public_key)?;
        let tunnel = Tunnel::new(config).context("the registry's answer")?;
        let written = files::write(&file, &tunnel.file(&key.to_base64()))?;
        Ok((file, written))
    }
}

/// A server whose interface has the same name.
fn of_same_name(name: &str) -> Result<LeasedServer<'_>, String> {
    let interface = name.parse();
    let interface = interface.map_err(|problem| format!("without --interface the name of server {name} {problem}"))?;
    Ok(LeasedServer { name, interface })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        lease: Lease,
    }

    /// The interface of each server of a command line.
    fn interfaces(arguments: &[&str]) -> Result<Vec<String>, String> {
        let all = [&["lease", "--registry", "http://b", "--password-file", "p"], arguments].concat();
        let lease = Program::try_parse_from(all).map_err(|error| error.to_string())?.lease;
        let servers = lease.servers()?;
        Ok(servers.iter().map(|server| format!("{}: {}", server.name, server.interface)).collect())
    }

    #[test]
    fn an_interface_has_the_name_of_its_server_or_the_one_that_is_given() {
        assert_eq!(interfaces(&["s1", "s2"]).unwrap(), ["s1: s1", "s2: s2"]);
        assert_eq!(interfaces(&["--interface", "wg1", "Level 1 (north)"]).unwrap(), ["Level 1 (north): wg1"]);
        for (arguments, problem) in [
            (["s1", "Level 1"].as_slice(), "without --interface the name of server Level 1 must be"),
            (&["--interface", "wg1", "s1", "s2"], "for one server only"),
            (&["--interface", "a b", "s1"], "must be a name of an interface"),
        ] {
            let said = interfaces(arguments).unwrap_err();
            assert!(said.contains(problem), "{said}");
        }
    }
}
