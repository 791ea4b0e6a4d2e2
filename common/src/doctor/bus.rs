//! Checks of the connection to the MQTT server: whether it works, and the rights that it has.

use super::{Finding, Program};
use crate::mqtt::trial::{Allowed, ConnectFailure, EchoOutcome, Trial};
use crate::mqtt::{Fault, TlsError};

/// The subject of these findings.
pub const SUBJECT: &str = "MQTT";

/// The MQTT server, and the facts about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MqttFacts<B> {
    /// The server, for people.
    pub server: String,
    /// The facts about the connection; or why it failed.
    pub outcome: Result<B, ConnectFailure>,
}

impl<B> MqttFacts<B> {
    /// The facts of a `trial`: `known` derives those of the program from an accepted connection.
    pub fn of(trial: Result<Trial, TlsError>, known: impl FnOnce(&Allowed) -> B) -> Self {
        match trial {
            Err(error) => {
                let failure = ConnectFailure { fault: Fault::Tls, cause: error.to_string() };
                Self { server: "certificates".into(), outcome: Err(failure) }
            }
            Ok(Trial { server, outcome }) => Self { server, outcome: outcome.map(|allowed| known(&allowed)) },
        }
    }
}

/// The rights that the MQTT server does not grant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rights {
    /// Refused subscriptions that the program needs.
    pub refused: Vec<String>,
    /// Other refused subscriptions.
    pub refused_optional: Vec<String>,
    /// The result of a message below `wgkex/`.
    pub echo: EchoOutcome,
}

impl From<&Allowed> for Rights {
    fn from(Allowed { refused, refused_optional, echo, .. }: &Allowed) -> Self {
        Self { refused: refused.clone(), refused_optional: refused_optional.clone(), echo: *echo }
    }
}

/// The finding for a failed connection.
#[must_use]
pub fn no_connection(program: Program, server: &str, ConnectFailure { fault, cause }: &ConnectFailure) -> Finding {
    Finding::fail(SUBJECT, format!("{server}: {cause}"), advice(program, *fault))
}

fn advice(program: Program, fault: Fault) -> &'static str {
    match fault {
        Fault::Password => "set mqtt.username and mqtt.password to what the server knows",
        Fault::ClientId => match program {
            Program::Worker => "set mqtt.username to the host name of this machine",
            Program::Broker => "let its user have the client ids wgkex-broker-NAME, -NAME-keys and -NAME-doctor",
        },
        Fault::Tls => {
            "check mqtt.tls and mqtt.broker_port, that mqtt.broker_url is a name in the server's certificate, and that mqtt.ca_file \
             names who signed it"
        }
        Fault::NoTls => "set mqtt.tls to true if the server has TLS on this port, or mqtt.broker_port to one without",
        Fault::Busy => "correct mqtt.username and mqtt.password, then wait a minute; the broker's log names the cause",
        Fault::Server => {
            "start the MQTT server, which is in wgkex-broker if there is no mqtt.broker_url; or correct that and mqtt.broker_port"
        }
    }
}

/// The findings about the rights at a server that accepted the connection.
#[must_use]
pub fn rights(program: Program, server: &str, rights: &Rights) -> Vec<Finding> {
    let connected = Finding::ok(SUBJECT, format!("{server} lets the {} in", program.word()));
    vec![connected, subscriptions(program, rights), echo(program, rights.echo)]
}

fn lacking(program: Program) -> String {
    let user = program.word();
    format!("give the {user}'s user its rights: `wgkex-broker mqtt-acl` prints them for Mosquitto and EMQX")
}

fn subscriptions(program: Program, rights: &Rights) -> Finding {
    let refused = |filters: &[String]| format!("the server refuses to let it subscribe to {}", filters.join(", "));
    match (&rights.refused[..], &rights.refused_optional[..]) {
        ([], []) => Finding::ok(SUBJECT, "it may subscribe to all that it needs"),
        ([], optional) => Finding::warn(SUBJECT, refused(optional), lacking(program)),
        (required, _) => Finding::fail(SUBJECT, refused(required), lacking(program)),
    }
}

fn echo(program: Program, echo: EchoOutcome) -> Finding {
    let follows = match program {
        Program::Worker => "brokers get no confirmations",
        Program::Broker => "workers receive no revocations, and may miss keys",
    };
    let warn = |found| Finding::warn(SUBJECT, format!("{found}: {follows}"), lacking(program));
    match echo {
        EchoOutcome::Received => Finding::ok(SUBJECT, "what it publishes below wgkex/ comes back"),
        EchoOutcome::Lost => warn("what it publishes below wgkex/ does not come back"),
        EchoOutcome::Closed => warn("the server ends the connection when it publishes below wgkex/"),
    }
}
