//! How a WebSocket was opened: from [`routes`](super::routes) to its [`socket`](super::socket).

use std::net::IpAddr;

use crate::client_ip::Client;
use crate::tenants::id::TenantId;
use crate::tenants::message::Form;

/// The data of the request for the WebSocket.
#[derive(Debug)]
pub struct UpgradeRequest {
    /// Its client.
    pub client: Client,
    /// The tenant that the client wants to join.
    pub tenant: TenantId,
    /// The form of the messages that it gets.
    pub form: Form,
    /// Its address, if it is to be shown.
    pub endpoint: Option<IpAddr>,
}
