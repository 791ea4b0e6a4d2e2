//! The subcommands of `wgkex-broker`: what an operator calls by hand. None of them runs a task, and none needs the
//! broker's own state: [`doctor`] finds what is wrong, [`status`] asks a broker that runs for what its page shows, [`admin_client`] makes admin calls,
//! [`tenant_token`] makes tokens of tenants, [`mqtt_acl`] prints access lists for other MQTT servers, from the rules that the embedded one enforces.

pub mod admin_client;
pub mod doctor;
mod http_client;
mod key_reports;
pub mod mqtt_acl;
pub mod registry;
pub mod status;
mod table;
pub mod tenant_token;
