//! The hub of tenants that this gateway is: `hub`.

use std::path::{Path as FilePath, PathBuf};

use serde::{Deserialize, Serialize};

use super::diagnostics::{Diagnostics, Path};
use super::servers::{INTERFACE_COMPLAINT, is_interface};
use super::value::{Flag, Host, Port, Text, port};
use crate::address::tenants::TenantNetworks;

/// A WireGuard interface that forwards between the members of a tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// The WireGuard interface.
    pub interface: String,
    /// The file of its private key.
    pub key_file: PathBuf,
    /// Its UDP port.
    pub listen_port: u16,
    /// The endpoint for members; none for `externalName`.
    pub endpoint: Option<String>,
    /// The networks within which it forwards.
    pub networks: TenantNetworks,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawHub {
    pub enabled: Option<Flag>,
    pub interface: Option<Text>,
    pub listen_port: Option<Port>,
    pub endpoint: Option<Host>,
}

impl RawHub {
    /// None unless it is enabled. Its key file is in `key_dir`.
    pub fn check(
        self,
        networks: &TenantNetworks,
        key_dir: &FilePath,
        diagnostics: &mut Diagnostics,
    ) -> Option<HubSettings> {
        let path = Path::of("hub.interface");
        let interface = self.interface.map_or_else(|| "wg-hub".to_owned(), |interface| interface.0);
        if !is_interface(&interface) {
            diagnostics.error(&path, INTERFACE_COMPLAINT);
        }
        let hub = HubSettings {
            key_file: key_dir.join(format!("{interface}.key")),
            interface,
            listen_port: port(self.listen_port.as_ref(), 51830),
            endpoint: self.endpoint.map(|endpoint| endpoint.0),
            networks: networks.clone(),
        };
        self.enabled.is_some_and(|flag| flag.0).then_some(hub)
    }
}
