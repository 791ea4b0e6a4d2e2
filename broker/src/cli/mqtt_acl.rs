//! `mqtt-acl`: the access rules of [`crate::mqtt_server`] as a list for another MQTT server.

use std::fmt::Write as _;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use tracing::warn;
use wgkex_common::Config;
use wgkex_common::config::Role;
use wgkex_common::wire::name::BrokerName;

use crate::cli::MAKE_ENDS;
use crate::mqtt_server::acl::{TopicOperation, filters};

/// For which server and which users.
#[derive(Debug, Args)]
#[command(after_help = MAKE_ENDS)]
pub struct MqttAcl {
    /// For which server
    #[arg(long, value_enum, default_value_t = AclFormat::Mosquitto)]
    format: AclFormat,
    /// The user name of the brokers
    #[arg(long, value_name = "NAME", default_value = "wgkex-broker")]
    broker: BrokerName,
}

/// The servers whose format is known.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum AclFormat {
    /// The file named by `acl_file` in mosquitto.conf
    Mosquitto,
    /// The file acl.conf of EMQX
    Emqx,
}

impl MqttAcl {
    /// The list for the workers of the config and the brokers; an error if one of the former has the brokers' name.
    pub fn text(&self, config: &Config) -> anyhow::Result<String> {
        let broker = self.broker.as_str();
        ensure!(!config.workers.contains_key(broker), "workers.{broker}: is the user name of the brokers (--broker)");
        if config.workers.is_empty() {
            warn!("workers is empty: the list has rights for brokers alone");
        }
        let workers = config.workers.keys().map(|name| (name.as_str(), Role::Worker));
        let users = workers.chain([(broker, Role::Broker)]);
        Ok(match self.format {
            AclFormat::Mosquitto => mosquitto(users),
            AclFormat::Emqx => emqx(users),
        })
    }
}

/// Mosquitto's `acl_file` for these users.
fn mosquitto<'a>(users: impl Iterator<Item = (&'a str, Role)>) -> String {
    let mut text = String::from("# Made by wgkex-broker mqtt-acl. For mosquitto.conf: acl_file FILE\n");
    for (name, role) in users {
        let _ = write!(text, "\nuser {name}\n");
        for (operation, word) in [(TopicOperation::Publish, "write"), (TopicOperation::Subscribe, "read")] {
            for filter in filters(role, operation, name) {
                let _ = writeln!(text, "topic {word} {filter}");
            }
        }
    }
    text
}

/// EMQX's `acl.conf` for these users.
fn emqx<'a>(users: impl Iterator<Item = (&'a str, Role)>) -> String {
    let mut text =
        String::from("%% Made by wgkex-broker mqtt-acl. For EMQX: the file of the authorization source \"file\".\n");
    for (name, role) in users {
        for operation in TopicOperation::ALL {
            let (word, filters) = (operation.word(), filters(role, operation, name));
            let _ = writeln!(text, "{{allow, {{user, {name:?}}}, {word}, {filters:?}}}.");
        }
    }
    text.push_str("{deny, all}.\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The output from before the rules were derived from topics, and the rules of leases.
    const MOSQUITTO: &str = "\
# Made by wgkex-broker mqtt-acl. For mosquitto.conf: acl_file FILE

user gw1
topic write wireguard-metrics/+/gw1/connected_peers
topic write wireguard-worker/gw1/status
topic write wireguard-worker/gw1/+/data
topic write wgkex/worker/gw1/+
topic write wgkex/broker/+/questions
topic write parker/wireguard-metrics/gw1/connected_peers
topic write parker/wireguard-worker/gw1/status
topic write parker/wireguard-worker/gw1/data
topic read parker/wireguard/+
topic read parker/wireguard-worker/+/data
topic read parker/wireguard-broker/+/status
topic read wireguard/+/+
topic read wireguard-worker/+/status
topic read wireguard-worker/+/+/data
topic read wireguard-broker/+/status
topic read wgkex/broker/+/hello
topic read wgkex/worker/gw1/pages
topic read wgkex/worker/gw1/hello
topic read wgkex/worker/gw1/echo
topic read wgkex/worker/gw1/servers
topic read wgkex/worker/gw1/leases
topic read wireguard-metrics/+/gw1/connected_peers
topic read wgkex/revocations

user wgkex
topic write wireguard/+/+
topic write wireguard-broker/+/status
topic write wgkex/broker/+/hello
topic write wgkex/broker/+/questions
topic write wgkex/broker/+/pages
topic write wgkex/broker/+/tenants
topic write wgkex/broker/+/echo
topic write wgkex/worker/+/pages
topic write wgkex/worker/+/leases
topic write wgkex/revocations
topic write parker/wireguard/+
topic write parker/wireguard-broker/+/status
topic read parker/#
topic read wireguard/#
topic read wireguard-metrics/#
topic read wireguard-worker/#
topic read wireguard-broker/#
topic read wgkex/#
";

    #[test]
    fn the_lists_of_other_servers_are_those_of_before_byte_for_byte() {
        let users = || [("gw1", Role::Worker), ("wgkex", Role::Broker)].into_iter();
        assert_eq!(mosquitto(users()), MOSQUITTO);
        // EMQX's has the same rows in the same order, as lists of strings.
        let mut expected =
            "%% Made by wgkex-broker mqtt-acl. For EMQX: the file of the authorization source \"file\".\n".to_owned();
        for user in ["gw1", "wgkex"] {
            let of_user = MOSQUITTO.split("\nuser ").find_map(|part| part.strip_prefix(&format!("{user}\n"))).unwrap();
            for (word, operation) in [("topic write ", "publish"), ("topic read ", "subscribe")] {
                let rows: Vec<_> = of_user.lines().filter_map(|line| line.strip_prefix(word)).collect();
                let rows = rows.iter().map(|row| format!("\"{row}\"")).collect::<Vec<_>>().join(", ");
                let _ = writeln!(expected, "{{allow, {{user, \"{user}\"}}, {operation}, [{rows}]}}.");
            }
        }
        assert_eq!(emqx(users()), expected + "{deny, all}.\n");
    }
}
