//! The subcommands of `wgkex-broker`: what an operator calls by hand. None of them runs a task, and none needs the
//! broker's own state: [`admin_client`] makes the admin calls of a broker that runs, [`mqtt_acl`] prints access lists for
//! other MQTT servers, from the rules that the embedded one enforces.

pub mod admin_client;
pub mod mqtt_acl;
