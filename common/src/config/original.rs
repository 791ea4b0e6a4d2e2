//! Sections of the original that have no effect here: they are parsed, so that mistakes in them are reported.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::diagnostics::{Diagnostics, Path};
use super::value::{Flag, Ipam, PrefixLength, Seconds, Text};

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Parker {
    pub enabled: Option<Flag>,
    #[serde(rename = "464xlat")]
    pub xlat464: Option<Flag>,
    pub retry_interval: Option<Seconds>,
    pub wg_keepalive: Option<Seconds>,
    pub ipam: Option<Ipam>,
    pub prefixes: Prefixes,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Prefixes {
    pub ipv4: PrefixIpv4,
    pub ipv6: PrefixIpv6,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct PrefixIpv4 {
    pub length: Option<PrefixLength>,
    pub clat_subnet: Option<Text>,
    pub netbox_filter: Option<Value>,
    pub netbox_additional_data: Option<Value>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct PrefixIpv6 {
    pub length: Option<PrefixLength>,
    pub netbox_filter: Option<Value>,
    pub netbox_additional_data: Option<Value>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Netbox {
    pub url: Option<Text>,
    pub api_key: Option<Text>,
}

impl Parker {
    /// Rejected if the fleet depends on it.
    pub fn check(&self, diagnostics: &mut Diagnostics) {
        if matches!(self.enabled, Some(Flag(true))) {
            let complaint = "must be false, as this version does not support routed networks";
            diagnostics.error(&Path::of("parker.enabled"), complaint);
        }
    }
}
