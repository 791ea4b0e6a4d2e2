//! The subcommands of `wgkex-broker`: the commands that an operator calls by hand. None of them runs a task, and none
//! needs the broker's own state: [`doctor`] finds what is wrong, [`status`] prints the status of a running broker,
//! [`admin_client`] makes admin calls, [`tenant_token`] makes tokens of tenants, [`mqtt_acl`] prints access lists for
//! other MQTT servers, from the rules that the embedded one enforces.

pub mod admin_client;
pub mod doctor;
mod http_client;
mod import;
mod key_reports;
pub mod mqtt_acl;
pub mod registry;
mod registry_json;
pub mod status;
mod table;
pub mod tenant_token;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use wgkex_common::cli::print_error;

/// The exit codes of a command that makes something out of the config or of nothing.
pub const MAKE_ENDS: &str = "Exits with 0, or with 1 if it cannot be made.";

/// Prints the output of a command.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("stdout")
}

/// Prints the output of a command, or its error, and returns the exit code: 0 or 1.
#[must_use]
pub fn print_or_complain(text: anyhow::Result<String>) -> ExitCode {
    match text.and_then(|text| print(&text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_error(&error);
            ExitCode::FAILURE
        }
    }
}
