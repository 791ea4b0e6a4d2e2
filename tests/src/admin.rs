//! Admin calls, as an operator makes them.

use std::net::SocketAddr;
use std::process::{Command, Output};

use serde_json::Value;

use crate::http::{Http, Response};
use crate::process::binary;
use crate::stack::{Stack, free_address};

/// Makes admin calls to a stack, with the token.
pub struct Operator {
    /// The address at which the broker takes admin calls.
    pub address: SocketAddr,
    /// The token for the calls.
    pub token: String,
}

/// A new token, and its hash, by `wgkex-broker admin-token`.
#[must_use]
pub fn token() -> (String, String) {
    let made = Command::new(binary("wgkex-broker")).arg("admin-token").output().expect("the broker runs");
    assert!(made.status.success(), "{made:?}");
    let text = String::from_utf8(made.stdout).expect("text");
    let token = text.lines().nth(1).expect("a token").to_owned();
    let hash = text.lines().find_map(|line| line.strip_prefix("admin_token_hash: ")).expect("a hash");
    (token, hash.trim_matches('"').to_owned())
}

impl Operator {
    /// An operator, and the lines of the config that enable admin calls.
    #[must_use]
    pub fn new() -> (Self, String) {
        let (address, (token, hash)) = (free_address(), token());
        (Self { address, token }, format!("admin_listen: \"{address}\"\nadmin_token_hash: \"{hash}\"\n"))
    }

    /// Makes a call.
    #[must_use]
    pub fn call(&self, method: &str, path: &str, body: &Value) -> Response {
        let bearer = format!("Authorization: Bearer {}", self.token);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        Http::connect(self.address).request(method, path, &[&bearer], body.as_bytes())
    }

    /// Runs `wgkex-broker` with this command line.
    #[must_use]
    pub fn run(&self, stack: &Stack, arguments: &[&str]) -> Output {
        let mut command = Command::new(binary("wgkex-broker"));
        command.args(arguments).env("WGKEX_CONFIG_FILE", stack.config_file()).env("WGKEX_ADMIN_TOKEN", &self.token);
        command.output().expect("the broker runs")
    }
}

/// The output of a program, standard output first.
#[must_use]
pub fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}
